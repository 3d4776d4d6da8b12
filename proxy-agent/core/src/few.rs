//! A small set in one piece: one of the standard library has room for eleven from its first element on.

use std::ops::Deref;

/// Few elements, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Few<T>(Vec<T>);

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Ord> Few<T> {
    pub(crate) fn insert(&mut self, value: T) {
        if let Err(place) = self.0.binary_search(&value) {
            if self.0.is_empty() {
                self.0.reserve_exact(1); // Most have no second one.
            }
            self.0.insert(place, value);
        }
    }

    pub(crate) fn remove(&mut self, value: &T) {
        if let Ok(place) = self.0.binary_search(value) {
            self.0.remove(place);
        }
    }
}

impl<T> Deref for Few<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<'a, T> IntoIterator for &'a Few<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(proptest::test_runner::Config { failure_persistence: None, ..Default::default() })]

        #[test]
        fn it_is_a_set(changes in prop::collection::vec((any::<bool>(), 0_u8..8), 0..40)) {
            let (mut few, mut set) = (Few::default(), BTreeSet::new());
            for (added, value) in changes {
                if added {
                    few.insert(value);
                    set.insert(value);
                } else {
                    few.remove(&value);
                    set.remove(&value);
                }
                prop_assert!(few.iter().eq(&set));
            }
        }
    }
}

//! Arrays of the kernel as values, in one piece, as they are there: entries of a map take three times as much.

use proxy_common::abi::Backend;

/// What an array consists of.
pub trait Element: Copy + PartialEq {
    /// What an element is before its first write.
    const NEVER: Self;
}

impl Element for u32 {
    const NEVER: Self = 0;
}

impl Element for u64 {
    const NEVER: Self = 0;
}

impl Element for Backend {
    const NEVER: Self = Self::retired(0);
}

/// The elements that have been written, by index. Arrays are filled from their beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Array<V>(Vec<V>);

impl<V> Default for Array<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<V: Element> Array<V> {
    /// An element that has been written.
    #[must_use]
    pub fn get(&self, index: u32) -> Option<&V> {
        self.0.get(index as usize).filter(|value| **value != V::NEVER)
    }

    /// Writes an element.
    pub fn insert(&mut self, index: u32, value: V) {
        let index = index as usize;
        if index >= self.0.len() {
            if value == V::NEVER {
                return;
            }
            self.0.resize(index + 1, V::NEVER);
        }
        if let Some(place) = self.0.get_mut(index) {
            *place = value;
        }
        // What is equal is equal however it came to be.
        while self.0.pop_if(|last| *last == V::NEVER).is_some() {}
    }

    /// The elements with their indices.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &V)> {
        (0..).zip(&self.0).filter(|(_, value)| **value != V::NEVER)
    }

    /// The elements.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.0.iter().filter(|value| **value != V::NEVER)
    }

    /// The highest index that has been written.
    #[must_use]
    pub fn last(&self) -> Option<u32> {
        u32::try_from(self.0.len()).ok()?.checked_sub(1)
    }

    /// Whether nothing has been written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<V: Element> FromIterator<(u32, V)> for Array<V> {
    fn from_iter<I: IntoIterator<Item = (u32, V)>>(elements: I) -> Self {
        let mut array = Self::default();
        elements.into_iter().for_each(|(index, value)| array.insert(index, value));
        array
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_written_is_not_there() {
        let mut array: Array<u32> = [(3, 7), (1, 5), (9, 0)].into_iter().collect();
        assert!(array.iter().eq([(1, &5), (3, &7)]) && array.values().eq([&5, &7]));
        assert_eq!((array.get(0), array.get(1), array.get(9), array.last()), (None, Some(&5), None, Some(3)));
        array.insert(3, 0);
        assert_eq!(array, Array::from_iter([(1, 5)]));
        assert_eq!(array.last(), Some(1));
        array.insert(1, 0);
        assert!(array.is_empty() && array.last().is_none());
    }
}

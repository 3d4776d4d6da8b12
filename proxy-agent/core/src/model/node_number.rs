//! Numbers for the names of nodes: what the programs know a node by that answers clients itself (direct server return).
//!
//! A number is made of the name alone, so that every agent, and the next one, finds the same.

use std::collections::BTreeMap;
use std::sync::Arc;

/// The number of a node: FNV-1a, and never 0, which stands for no node.
#[must_use]
pub fn node_number(name: &str) -> u32 {
    const BASIS: u32 = 0x811c_9dc5;
    const PRIME: u32 = 0x0100_0193;
    let hash = name.bytes().fold(BASIS, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(PRIME));
    hash.max(1)
}

/// Names of nodes in use, and who of them has a number.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct NodeNumbers {
    /// By number, in alphabetical order: the names, and how often each is used.
    names: BTreeMap<u32, BTreeMap<Arc<str>, usize>>,
}

impl NodeNumbers {
    /// One more use of a name. Those that have another number than before for it are returned: none, nearly always.
    pub fn add(&mut self, name: &Arc<str>) -> Vec<Arc<str>> {
        let names = self.names.entry(node_number(name)).or_default();
        let before = names.keys().next().cloned();
        *names.entry(name.clone()).or_default() += 1;
        moved(before, names)
    }

    /// One use of a name less.
    pub fn remove(&mut self, name: &Arc<str>) -> Vec<Arc<str>> {
        let number = node_number(name);
        let Some(names) = self.names.get_mut(&number) else { return Vec::new() };
        let before = names.keys().next().cloned();
        if let Some(uses) = names.get_mut(name) {
            *uses -= 1;
            if *uses == 0 {
                names.remove(name);
            }
        }
        let moved = moved(before, names);
        if names.is_empty() {
            self.names.remove(&number);
        }
        moved
    }

    /// The number of a node in use; 0 for one that is not, and for one that shares it with a name that comes first in
    /// alphabetical order: nothing is to go to the wrong node.
    #[must_use]
    pub fn number(&self, name: &str) -> u32 {
        let number = node_number(name);
        let first = self.names.get(&number).and_then(|names| names.keys().next());
        if first.is_some_and(|first| **first == *name) { number } else { 0 }
    }

    /// The nodes in use that have a number.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, u32)> {
        self.names.iter().filter_map(|(number, names)| Some((names.keys().next()?, *number)))
    }

    /// Nodes in use without a number, each with the one that has it.
    pub fn without(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<str>)> {
        self.names.values().flat_map(|names| {
            let first = names.keys().next();
            names.keys().skip(1).filter_map(move |name| Some((name, first?)))
        })
    }
}

/// Who had the number until now, and who has it from now on, if these are two names.
fn moved(before: Option<Arc<str>>, names: &BTreeMap<Arc<str>, usize>) -> Vec<Arc<str>> {
    match (before, names.keys().next()) {
        (Some(before), Some(now)) if before != *now => vec![before, now.clone()],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(numbers: &NodeNumbers) -> Vec<(&str, u32)> {
        numbers.iter().map(|(name, number)| (&**name, number)).collect()
    }

    #[test]
    fn a_number_is_the_names_own_and_never_0() {
        // From the test vectors of the hash's authors (FNV-1a, 32 bits).
        for (name, number) in [("", 0x811c_9dc5), ("a", 0xe40c_292c), ("foobar", 0xbf9c_f968)] {
            assert_eq!(node_number(name), number, "{name:?}");
        }
        assert_eq!(node_number("ppkttia"), 1, "its hash is 0");
    }

    #[test]
    fn of_two_names_with_one_number_the_first_has_it_as_long_as_it_is_used() {
        let (first, second): (Arc<str>, Arc<str>) = ("costarring".into(), "liquid".into());
        let number = node_number(&first);
        assert_eq!(number, node_number(&second), "they are known to be two with one hash");
        let mut numbers = NodeNumbers::default();
        assert_eq!(numbers.add(&second), []);
        assert_eq!((numbers.number(&first), numbers.number(&second)), (0, number));
        assert_eq!(numbers.add(&first), [second.clone(), first.clone()]);
        assert_eq!((numbers.number(&first), numbers.number(&second)), (number, 0));
        assert_eq!(pairs(&numbers), [("costarring", number)]);
        assert_eq!(numbers.without().collect::<Vec<_>>(), [(&second, &first)]);
        // It is used twice now.
        assert_eq!(numbers.add(&first), []);
        assert_eq!(numbers.remove(&first), []);
        assert_eq!(numbers.remove(&first), [first.clone(), second.clone()]);
        assert_eq!((numbers.number(&first), numbers.number(&second)), (0, number));
        assert_eq!(numbers.remove(&second), []);
        assert_eq!(pairs(&numbers), []);
    }
}

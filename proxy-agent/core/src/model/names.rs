//! Names of nodes, zones, namespaces and ports, each kept once: a hundred thousand endpoints run on a few thousand nodes.

use std::collections::HashSet;
use std::sync::Arc;

/// Below this size nobody looks for names that are out of use.
const SMALL: usize = 1_024;

/// Names in use.
#[derive(Debug, Default)]
pub struct Names {
    known: HashSet<Arc<str>>,
    tidy_at: usize,
}

impl Names {
    /// `name`, in the memory of its equals.
    pub fn get(&mut self, name: &str) -> Arc<str> {
        self.known.get(name).cloned().unwrap_or_else(|| self.add(name.into()))
    }

    /// Lets `name` share the memory of its equals.
    pub fn share(&mut self, name: &mut Arc<str>) {
        *name = match self.known.get(name) {
            Some(known) => known.clone(),
            None => self.add(name.clone()),
        };
    }

    fn add(&mut self, name: Arc<str>) -> Arc<str> {
        if self.known.len() >= self.tidy_at.max(SMALL) {
            self.known.retain(|name| Arc::strong_count(name) > 1);
            self.tidy_at = self.known.len() * 2; // Nodes come and go; tidying is paid by their number.
        }
        self.known.insert(name.clone());
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_names_share_their_memory_and_unused_ones_go() {
        let mut names = Names::default();
        let (mut a, mut b): (Arc<str>, Arc<str>) = ("n1".into(), "n1".into());
        names.share(&mut a);
        names.share(&mut b);
        assert!(Arc::ptr_eq(&a, &b) && Arc::ptr_eq(&a, &names.get("n1")));
        for i in 0..10 * SMALL {
            names.share(&mut format!("removed-{i}").into());
        }
        assert!(names.known.len() <= SMALL + 1, "{}", names.known.len());
        assert!(names.known.contains("n1"));
    }
}

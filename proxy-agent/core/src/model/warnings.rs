//! What is wrong with the input, by object, for `status`.

use std::collections::BTreeMap;

/// Objects remembered; what comes beyond is only counted.
const MAX_OBJECTS: usize = 1_000;
/// Lines remembered of one object.
const MAX_LINES: usize = 16;

/// One line about one object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Warning {
    /// The object, for a person: `Service default/web`.
    pub object: String,
    /// What is wrong with it.
    pub line: String,
}

/// Warnings by object. Bounded: input that is wrong on purpose must not cost memory without end.
#[derive(Debug, Default)]
pub(super) struct Warnings(BTreeMap<String, Vec<String>>);

impl Warnings {
    /// Replaces what is known of an object; tells whether that changed anything.
    pub(super) fn replace(&mut self, object: String, mut lines: Vec<String>) -> bool {
        if lines.is_empty() {
            return self.0.remove(&object).is_some();
        }
        if self.0.len() >= MAX_OBJECTS && !self.0.contains_key(&object) {
            return false;
        }
        if lines.len() > MAX_LINES {
            let more = lines.len() - MAX_LINES + 1;
            lines.truncate(MAX_LINES - 1);
            lines.push(format!("… and {more} more"));
        }
        match self.0.get_mut(&object) {
            Some(known) if *known == lines => false,
            Some(known) => {
                *known = lines;
                true
            }
            None => {
                self.0.insert(object, lines);
                true
            }
        }
    }

    /// All lines, by object.
    pub(super) fn iter(&self) -> impl Iterator<Item = Warning> {
        self.0.iter().flat_map(|(object, lines)| {
            lines.iter().map(|line| Warning { object: object.clone(), line: line.clone() })
        })
    }
}

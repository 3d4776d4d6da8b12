//! LAYOUT: what a generation says of itself, and how values of one layout become values of another.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use proxy_common::abi::layout::{Field, Shape, Table, tables};
use proxy_common::abi::{ABI_VERSION, Config, maps};
use serde::{Deserialize, Serialize};

use crate::datapath::store::note;
use crate::datapath::store::pin::BpfRoot;
use crate::sys;

/// The text of LAYOUT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Layout {
    /// `ABI_VERSION` of who has made the tables; for people.
    pub(crate) version: u32,
    tables: Vec<Described>,
}

/// A [`Table`] as text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Described {
    name: String,
    key: Form,
    value: Form,
    #[serde(default)]
    elements: Vec<String>,
}

/// A [`Shape`] as text: name, offset, size and count of each field.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Form {
    size: usize,
    fields: Vec<(String, usize, usize, usize)>,
}

impl From<&Shape> for Form {
    fn from(shape: &Shape) -> Self {
        let field = |Field { name, offset, size, count }: &Field| (name.clone(), *offset, *size, *count);
        Self { size: shape.size, fields: shape.fields.iter().map(field).collect() }
    }
}

impl From<&Form> for Shape {
    fn from(form: &Form) -> Self {
        let field = |(name, offset, size, count): &(String, usize, usize, usize)| Field {
            name: name.clone(),
            offset: *offset,
            size: *size,
            count: *count,
        };
        Self { size: form.size, fields: form.fields.iter().map(field).collect() }
    }
}

impl Layout {
    /// That of this agent.
    pub(crate) fn own() -> Self {
        Self::of(&tables())
    }

    fn of(tables: &[Table]) -> Self {
        let described = |table: &Table| Described {
            name: table.name.clone(),
            key: (&table.key).into(),
            value: (&table.value).into(),
            elements: table.elements.clone(),
        };
        Self { version: ABI_VERSION, tables: tables.iter().map(described).collect() }
    }

    /// What it says of a table.
    pub(crate) fn table(&self, name: &str) -> Option<Table> {
        self.tables.iter().find(|table| table.name == name).map(|table| Table {
            name: table.name.clone(),
            key: (&table.key).into(),
            value: (&table.value).into(),
            elements: table.elements.clone(),
        })
    }

    /// Reads what is pinned.
    pub(crate) fn read(root: &BpfRoot) -> io::Result<Self> {
        let text = note::read(&root.map(maps::LAYOUT))?;
        serde_json::from_slice(&text).map_err(io::Error::other)
    }

    /// Pins this one at `path`, beside the tables.
    pub(crate) fn write(&self, path: &Path) -> io::Result<OwnedFd> {
        let text = serde_json::to_vec(self).map_err(io::Error::other)?;
        note::pin(maps::LAYOUT, &text, path)
    }
}

/// How a value (or key) of one layout becomes one of another: field by field, by their names.
#[derive(Clone, Debug)]
pub(crate) struct Translation {
    start: Vec<u8>,
    moves: Vec<Move>,
}

#[derive(Clone, Copy, Debug)]
struct Move {
    from: usize,
    to: usize,
    len: usize,
}

impl Translation {
    /// From one shape to another, whose fields are zero where the first one has none.
    pub(crate) fn new(from: &Shape, to: &Shape) -> Self {
        Self::with_default(from, to, vec![0; to.size])
    }

    /// The same for the values of a table, which may have another default.
    pub(crate) fn of_values(from: &Table, to: &Table) -> Self {
        let start = match to.name.as_str() {
            maps::CONFIG => sys::bytes(&Config::EMPTY).to_vec(),
            _ => vec![0; to.value.size],
        };
        Self::with_default(&from.value, &to.value, start)
    }

    fn with_default(from: &Shape, to: &Shape, mut start: Vec<u8>) -> Self {
        let mut moves: Vec<Move> = Vec::new();
        for field in &to.fields {
            let Some(old) = from.fields.iter().find(|old| old.name == field.name) else { continue };
            for n in 0..field.count.min(old.count) {
                // Numbers begin with their lowest byte: what is cut off, or filled up with zeros, is the highest.
                let len = field.size.min(old.size);
                let (from, to) = (old.offset + n * old.size, field.offset + n * field.size);
                start.get_mut(to..to + field.size).into_iter().flatten().for_each(|byte| *byte = 0);
                match moves.last_mut() {
                    Some(last) if last.from + last.len == from && last.to + last.len == to => last.len += len,
                    _ => moves.push(Move { from, to, len }),
                }
            }
        }
        Self { start, moves }
    }

    /// What is copied: from where, to where, and how many bytes.
    pub(crate) fn moves(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        self.moves.iter().map(|Move { from, to, len }| (*from, *to, *len))
    }

    /// Translates; what has another length than the layout says has the defaults where it ends.
    pub(crate) fn apply(&self, old: &[u8]) -> Vec<u8> {
        let mut new = self.start.clone();
        for Move { from, to, len } in &self.moves {
            if let (Some(old), Some(new)) = (old.get(*from..from + len), new.get_mut(*to..to + len)) {
                new.copy_from_slice(old);
            }
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::{Affinity, Frontend, FrontendKey, Run};
    use proxy_common::addr::{Addr, Port, Proto};

    use super::*;

    fn shape(size: usize, fields: &[(&str, usize, usize, usize)]) -> Shape {
        let field = |(name, offset, size, count): &(&str, usize, usize, usize)| Field {
            name: (*name).to_owned(),
            offset: *offset,
            size: *size,
            count: *count,
        };
        Shape { size, fields: fields.iter().map(field).collect() }
    }

    #[test]
    fn fields_are_found_by_their_names_in_both_directions() {
        let now = Shape::of::<Affinity>();
        // Another place, another size, and something new.
        let next = shape(
            32,
            &[("last_seen", 0, 8, 1), ("new", 8, 8, 1), ("generation", 16, 8, 1), ("backend", 24, 4, 1)],
        );
        let value = Affinity { backend: 7, generation: u32::MAX, last_seen: 1 << 40 };
        let there = Translation::new(&now, &next).apply(sys::bytes(&value));
        assert_eq!(there.len(), 32);
        assert_eq!(there[..8], (1_u64 << 40).to_le_bytes());
        assert_eq!(there[16..24], u64::from(u32::MAX).to_le_bytes());
        let mut known = there;
        known[8..16].copy_from_slice(&[9; 8]);
        let back = Translation::new(&next, &now).apply(&known);
        assert_eq!(sys::values::<Affinity>(&back), [value]);
    }

    #[test]
    fn arrays_keep_as_many_elements_as_both_have() {
        let (two, three) = (shape(4, &[("a", 0, 2, 2)]), shape(16, &[("b", 0, 4, 1), ("a", 4, 4, 3)]));
        let there = Translation::new(&two, &three).apply(&[1, 0, 2, 0]);
        assert_eq!(there, [0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Translation::new(&three, &two).apply(&there), [1, 0, 2, 0]);
    }

    #[test]
    fn what_is_missing_has_the_default_of_its_type() {
        let own = Layout::own();
        let config = own.table(maps::CONFIG).unwrap();
        let mut old = config.clone();
        old.value.fields.retain(|field| field.name == "seed");
        let mut bytes = vec![0; old.value.size];
        let at = old.value.fields[0].offset;
        bytes[at..at + 4].copy_from_slice(&7_u32.to_ne_bytes());
        let found = sys::values::<Config>(&Translation::of_values(&old, &config).apply(&bytes));
        assert_eq!(found, [Config { seed: 7, ..Config::EMPTY }]);
    }

    #[test]
    fn the_own_layout_survives_its_text_and_is_the_same_as_itself() {
        let own = Layout::own();
        let text = serde_json::to_string(&own).unwrap();
        assert_eq!(serde_json::from_str::<Layout>(&text).unwrap(), own);
        let key = FrontendKey::new(Addr::v4(1), Port::new(2), Proto::TCP);
        let value = Frontend {
            service: 1,
            cluster: Run { first: 2, count: 3 },
            local: Run::EMPTY,
            flags: 4,
            affinity_secs: 5,
            seal: 0,
        }
        .sealed(&key);
        let table = own.table(maps::FRONTENDS).unwrap();
        let same = Translation::of_values(&table, &table).apply(sys::bytes(&value));
        assert_eq!(same, sys::bytes(&value));
    }
}

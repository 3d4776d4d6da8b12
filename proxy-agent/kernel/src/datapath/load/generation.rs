//! Generations of tables: what is pinned, what of it can stay, and what has to be made anew.
//!
//! A new generation is made from the one before it: a table whose layout and size need not change is the same map, pinned once
//! more; others are made, and what is in them is carried over.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use aya_obj::Object;
use aya_obj::generated::bpf_map_type as Kind;
use proxy_common::abi::maps;

use agent_core::capacity::size_flag;

use super::LoadError;
use crate::datapath::store::layout::Layout;
use crate::datapath::store::pin::BpfRoot;
use crate::sys::{self, MapFacts};

/// Flags the kernel sets by itself, or that do not change what a map holds: `BPF_F_RDONLY_PROG` and `BPF_F_WRONLY_PROG`
/// come from the object, `BPF_F_TOKEN_FD` from the creator.
const IGNORED_FLAGS: u32 = 1 << 16;
/// The tables of flows, which go together: one leads to another by indices.
pub(crate) const FLOW_TABLES: [&str; 5] =
    [maps::FLOWS, maps::FLOW_FILTER, maps::RECORDS, maps::FREE, maps::RING];

/// A map of a generation.
#[derive(Debug)]
pub(crate) struct FoundMap {
    pub(crate) fd: OwnedFd,
    pub(crate) facts: MapFacts,
}

/// A generation that is pinned.
#[derive(Debug)]
pub(crate) struct Generation {
    /// Its root, with this generation alone.
    pub(crate) root: BpfRoot,
    pub(crate) layout: Layout,
    maps: BTreeMap<String, FoundMap>,
}

impl Generation {
    /// Opens one with all its tables, also those that this agent does not know.
    pub(crate) fn open(root: BpfRoot) -> Result<Self, LoadError> {
        let layout = Layout::read(&root)
            .map_err(|source| LoadError::Layout { path: root.map(maps::LAYOUT), source })?;
        let mut found = BTreeMap::new();
        for name in crate::datapath::store::pin::names(&root.maps())? {
            let failed = |source| LoadError::OpenPin { path: root.map(&name), source };
            let fd = sys::obj_get(&root.map(&name)).map_err(failed)?;
            let facts = sys::map_facts(fd.as_fd()).map_err(failed)?;
            found.insert(name, FoundMap { fd, facts });
        }
        Ok(Self { root, layout, maps: found })
    }

    /// A map of it.
    pub(crate) fn map(&self, name: &str) -> Option<&FoundMap> {
        self.maps.get(name)
    }
}

/// The generations under a root, the newest first. There are several after an agent has died that was about to exchange the
/// programs: some of them may still work with an older one.
pub(crate) fn all(root: &BpfRoot) -> Result<Vec<Generation>, LoadError> {
    root.generations()?.into_iter().rev().map(|number| Generation::open(root.at(number))).collect()
}

/// What becomes of the tables.
#[derive(Debug, Default)]
pub(crate) struct Fates {
    /// Entries of those that are to be made.
    pub(crate) made: BTreeMap<&'static str, u32>,
    /// Entries of the others.
    pub(crate) kept: BTreeMap<&'static str, u32>,
    /// What the operator should know.
    pub(crate) warnings: Vec<String>,
}

impl Fates {
    /// Whether flows have other tables than before.
    pub(crate) fn of_flows(&self) -> bool {
        FLOW_TABLES.iter().any(|name| self.made.contains_key(name))
    }

    /// Entries of a table.
    pub(crate) fn size(&self, name: &str) -> Option<u32> {
        self.made.get(name).or_else(|| self.kept.get(name)).copied()
    }
}

/// Compares what is pinned with the object, whose tables are to have these sizes.
pub(crate) fn fates(
    object: &Object,
    found: Option<&Generation>,
    sizes: &BTreeMap<&'static str, u32>,
) -> Result<Fates, LoadError> {
    let own = Layout::own();
    let mut fates = Fates::default();
    for name in maps::ALL {
        let Some(map) = object.maps.get(name) else {
            return Err(LoadError::Missing { what: "map", name: name.into() });
        };
        let mut wanted = MapFacts {
            id: 0,
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: sizes.get(name).copied().unwrap_or_else(|| map.max_entries()),
            flags: map.map_flags(),
            name: name.into(),
        };
        let there = found.and_then(|found| Some((found.map(name)?, found.layout.table(name)?)));
        let Some((there, layout)) = there else {
            fates.made.insert(name, wanted.max_entries);
            continue;
        };
        let asked = wanted.max_entries;
        // What is in a table has to find room in the next one.
        wanted.max_entries = asked.max(there.facts.max_entries);
        let sized = wanted.kind != Kind::BPF_MAP_TYPE_SK_STORAGE as u32;
        // Where there is no flag nobody has asked.
        if sized && there.facts.max_entries > asked && size_flag(name).is_some() {
            fates.warnings.push(format!(
                "map {name} keeps its {} entries ({asked} asked for): tables become smaller only after `proxy-agent cleanup`",
                there.facts.max_entries
            ));
        }
        let stays = is_like(&there.facts, &wanted) && own.table(name) == Some(layout);
        let fate = if stays { &mut fates.kept } else { &mut fates.made };
        fate.insert(name, wanted.max_entries);
    }
    if fates.of_flows() {
        for name in FLOW_TABLES {
            if let Some(size) = fates.kept.remove(name) {
                fates.made.insert(name, size);
            }
        }
    }
    Ok(fates)
}

fn is_like(found: &MapFacts, wanted: &MapFacts) -> bool {
    let form = |m: &MapFacts| (m.kind, m.key_size, m.value_size, m.flags & !IGNORED_FLAGS);
    let sized = wanted.kind != Kind::BPF_MAP_TYPE_SK_STORAGE as u32;
    form(found) == form(wanted) && (!sized || found.max_entries == wanted.max_entries)
}

/// Pins those maps of a generation that stay in the one that is being made.
pub(crate) fn pin_kept(found: &Generation, fates: &Fates, making: &BpfRoot) -> Result<(), LoadError> {
    for name in fates.kept.keys() {
        let Some(map) = found.map(name) else { continue };
        let path = making.map(name);
        sys::obj_pin(map.fd.as_fd(), &path)
            .map_err(|source: io::Error| LoadError::OpenPin { path, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(value_size: u32, max_entries: u32, flags: u32) -> MapFacts {
        MapFacts { id: 1, kind: 1, key_size: 4, value_size, max_entries, flags, name: "FLOWS".into() }
    }

    #[test]
    fn a_map_stays_if_form_and_size_are_the_same() {
        assert!(is_like(&facts(8, 10, IGNORED_FLAGS), &facts(8, 10, 0)));
        for other in [facts(16, 10, 0), facts(8, 10, 1), facts(8, 11, 0)] {
            assert!(!is_like(&other, &facts(8, 10, 0)), "{other:?}");
        }
        let storage =
            |max_entries| MapFacts { kind: Kind::BPF_MAP_TYPE_SK_STORAGE as u32, ..facts(8, max_entries, 0) };
        assert!(is_like(&storage(1), &storage(0)), "it has no size");
    }
}

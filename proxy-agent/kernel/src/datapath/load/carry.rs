//! Carrying over what is in the tables of one generation to those of the next, whatever the layout of either.
//!
//! All but flows (`carry_flows`) and what sockets remember (`carry_sockets`).

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use aya_obj::generated::bpf_map_type as Kind;
use proxy_common::abi::{Affinity, Frontend, FrontendKey, Reason, ServiceStats, ask, maps};

use super::generation::{FLOW_TABLES, FoundMap, Generation};
use crate::datapath::flow::Flows;
use crate::datapath::store::layout::Translation;
use crate::datapath::store::table::{TableError, scan_bytes};
use crate::sys;

/// Tables whose entries programs write as they go: what they have written last comes over at the end.
const MOVING: [&str; 3] = [maps::AFFINITY, maps::PEERS, maps::FRAGMENTS];

/// Carries over every table that is made anew, but flows, counters, and what sockets remember. The new programs run nowhere yet.
pub(crate) fn tables(
    old: &Generation,
    new: &Generation,
    made: &BTreeMap<&'static str, u32>,
) -> Result<(), TableError> {
    let counters = [maps::REASONS, maps::SERVICE_STATS, maps::SOCKETS, maps::PAUSE];
    for name in made.keys().filter(|name| !FLOW_TABLES.contains(name) && !counters.contains(name)) {
        entries(old, new, name)?;
    }
    Ok(())
}

/// Carries over again what programs may have written since; where the new programs run already, theirs counts.
pub(crate) fn moving(
    old: &Generation,
    new: &Generation,
    made: &BTreeMap<&'static str, u32>,
) -> Result<(), TableError> {
    for name in MOVING.into_iter().filter(|name| made.contains_key(name)) {
        entries(old, new, name)?;
    }
    Ok(())
}

/// Whether there are such tables among those that are made anew.
pub(crate) fn is_moving(made: &BTreeMap<&'static str, u32>) -> bool {
    MOVING.iter().any(|name| made.contains_key(name))
}

fn entries(old: &Generation, new: &Generation, name: &'static str) -> Result<(), TableError> {
    let (Some(from), Some(to)) = (old.map(name), new.map(name)) else { return Ok(()) };
    let (Some(theirs), Some(ours)) = (old.layout.table(name), new.layout.table(name)) else {
        return Ok(());
    };
    let key = Translation::new(&theirs.key, &ours.key);
    let value = Translation::of_values(&theirs, &ours);
    let array = to.facts.kind == Kind::BPF_MAP_TYPE_ARRAY as u32;
    let failed =
        |source| TableError::Call { act: "carry over", object: "an entry".into(), map: name, source };
    let mut outcome = Ok(());
    let mut see = |old_key: &[u8], old_value: &[u8]| {
        // An element of an array that was never written is the same in the new one.
        if outcome.is_err() || array && old_value.iter().all(|byte| *byte == 0) {
            return;
        }
        let (key, mut value) = (key.apply(old_key), value.apply(old_value));
        seal(name, &key, &mut value);
        if !is_older(name, to, &key, &value) {
            outcome = sys::update_bytes(to.fd.as_fd(), &key, &value).map_err(failed);
        }
    };
    scan_bytes(from.fd.as_fd(), &from.facts, name, &mut see)?;
    outcome
}

/// Sums over key and value are those of the new layout.
fn seal(name: &str, key: &[u8], value: &mut [u8]) {
    if name != maps::FRONTENDS {
        return;
    }
    if let ([key], [frontend]) = (&sys::values::<FrontendKey>(key)[..], &sys::values::<Frontend>(value)[..]) {
        value.copy_from_slice(sys::bytes(&frontend.sealed(key)));
    }
}

/// Whether the new table knows better: of clients that are bound it says since when.
fn is_older(name: &str, to: &FoundMap, key: &[u8], value: &[u8]) -> bool {
    if !MOVING.contains(&name) {
        return false;
    }
    let mut there = vec![0; (to.facts.value_size as usize).next_multiple_of(8)];
    if !sys::lookup_bytes(to.fd.as_fd(), key, &mut there).unwrap_or(false) {
        return false;
    }
    if name != maps::AFFINITY {
        return true;
    }
    let last = |bytes: &[u8]| sys::values::<Affinity>(bytes).first().map_or(0, |affinity| affinity.last_seen);
    last(&there) >= last(value)
}

/// The counters: what has not been carried over yet is added to the new ones, in the kernel, where nothing is lost of what is
/// counted at the same moment.
#[derive(Debug)]
pub(crate) struct Counters<'a> {
    old: &'a Generation,
    reasons: Option<Vec<(u32, Reason)>>,
    stats: Option<(Vec<u32>, Translation)>,
    /// What has been carried over.
    done: BTreeMap<u32, u64>,
}

impl<'a> Counters<'a> {
    /// Those that are made anew.
    pub(crate) fn new(old: &'a Generation, made: &BTreeMap<&'static str, u32>, own: &Generation) -> Self {
        let is_made = |name: &str| made.contains_key(name);
        let reasons = old.layout.table(maps::REASONS).filter(|_| is_made(maps::REASONS)).map(|table| {
            // Found by their words: another layout may have others.
            let known = |label: &String| Reason::ALL.iter().find(|reason| reason.label() == label).copied();
            (0..).zip(&table.elements).filter_map(|(n, label)| Some((n, known(label)?))).collect()
        });
        let stats = || {
            let theirs = old.layout.table(maps::SERVICE_STATS)?;
            let ours = own.layout.table(maps::SERVICE_STATS)?;
            let mut ids = Vec::new();
            let services = old.map(maps::SERVICES)?;
            let see = &mut |key: &[u8], _: &[u8]| ids.extend(sys::values::<u32>(key));
            scan_bytes(services.fd.as_fd(), &services.facts, maps::SERVICES, see).ok()?;
            Some((ids, Translation::of_values(&theirs, &ours)))
        };
        let stats = is_made(maps::SERVICE_STATS).then(stats).flatten();
        Self { old, reasons, stats, done: BTreeMap::new() }
    }

    /// Adds what has been counted since the last time.
    pub(crate) fn add_rest(&mut self, flows: &Flows) -> Result<(), TableError> {
        for (which, now) in self.read()? {
            let done = self.done.entry(which).or_default();
            let more = now.saturating_sub(*done);
            if more != 0 {
                flows.add_count(which, more)?;
                *done = now;
            }
        }
        Ok(())
    }

    /// The counters as they stand, summed over the CPUs, by what [`ask::COUNT`] calls them.
    fn read(&self) -> Result<Vec<(u32, u64)>, TableError> {
        let mut found = Vec::new();
        if let (Some(reasons), Some(map)) = (&self.reasons, self.old.map(maps::REASONS)) {
            for (index, reason) in reasons {
                let each = counted(map, maps::REASONS, *index)?;
                let sum = each.iter().flat_map(|one| sys::values::<u64>(one)).fold(0, u64::wrapping_add);
                found.push((*reason as u32, sum));
            }
        }
        if let (Some((ids, translation)), Some(map)) = (&self.stats, self.old.map(maps::SERVICE_STATS)) {
            for id in ids {
                let mut sums = [0_u64; 3];
                for one in counted(map, maps::SERVICE_STATS, *id)? {
                    for ServiceStats { chosen, refused, dropped, .. } in sys::values(&translation.apply(&one))
                    {
                        let each = [chosen, refused, dropped];
                        sums.iter_mut().zip(each).for_each(|(sum, n)| *sum = sum.wrapping_add(n));
                    }
                }
                found.extend((0..).zip(sums).map(|(n, sum)| (ask::STATS + id * 4 + n, sum)));
            }
        }
        Ok(found)
    }
}

/// An element of an array of counters, one for each CPU or one for all; nothing past its end.
fn counted(map: &FoundMap, name: &'static str, index: u32) -> Result<Vec<Vec<u8>>, TableError> {
    let per_cpu = map.facts.kind == Kind::BPF_MAP_TYPE_PERCPU_ARRAY as u32;
    let cpus = if per_cpu { crate::datapath::tables::cpus::cpus() as usize } else { 1 };
    let size = (map.facts.value_size as usize).next_multiple_of(8);
    let mut values = vec![0; size * cpus];
    let failed = |source| TableError::Call { act: "read", object: format!("{index}"), map: name, source };
    if index >= map.facts.max_entries
        || !sys::lookup_bytes(map.fd.as_fd(), &index.to_ne_bytes(), &mut values).map_err(failed)?
    {
        return Ok(Vec::new());
    }
    Ok(values.chunks_exact(size).map(<[u8]>::to_vec).collect())
}

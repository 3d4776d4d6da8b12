//! How large tables are at first, and when which of them is to become larger.
//!
//! They begin small and double when they are four fifths full, up to the sizes that the operator allows, each and all
//! together. What is in them comes along (`change`), so that only memory speaks against larger ones.

use std::collections::BTreeMap;
use std::fmt;

use proxy_common::abi::{
    Affinity, AffinityKey, Backend, Flow, FlowId, Fragment, FragmentKey, Frontend, FrontendKey, Iface, Key,
    Leg, ServiceName, ServiceStats, SourceKey, maps,
};
use proxy_common::addr::Addr;

use super::capacity::{Capacities, cpus};
use super::pin::BpfRoot;
use super::sys;

/// A table grows when it is so full, in per cent.
pub const FULL: u64 = 80;
/// Tables begin with this part of what they may become.
const PART: u32 = 16;
/// But with no fewer entries: what is smaller saves next to nothing.
const LEAST: u32 = 4_096;
/// Flows come in bursts, and a table that grows takes seconds to do so.
const FLOWS: u32 = 32_768;
/// What the kernel keeps for an entry of a hash table besides key and value, its place among the buckets included.
const ENTRY: u64 = 64;
/// The same of a trie of prefixes.
const NODE: u64 = 56;
/// Bytes of a MiB.
const MIB: u64 = 1 << 20;

/// What tables may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Each.
    pub each: Capacities,
    /// All together, in MiB.
    pub memory: u32,
}

/// A table that is to become larger, or ought to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Larger {
    map: &'static str,
    used: u64,
    from: u32,
    to: u32,
    /// MiB of all tables with it.
    memory: u64,
    /// Whether there is so much.
    allowed: Option<u32>,
}

impl Larger {
    /// Whether memory allows it.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        self.allowed.is_none()
    }
}

impl fmt::Display for Larger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { map, used, from, to, memory, allowed } = *self;
        write!(f, "table {map} has {used} of {from} entries in use and ")?;
        match allowed {
            None => write!(f, "grows to {to}; all tables take {memory} MiB then"),
            Some(limit) => write!(
                f,
                "cannot grow to {to}: all tables would take {memory} MiB of the {limit} allowed; raise --map-memory"
            ),
        }
    }
}

impl Limits {
    /// What tables begin with: what is pinned already, and no less than a part of what they may become.
    #[must_use]
    pub fn start(&self, root: &BpfRoot) -> Capacities {
        let mut sizes = self.each;
        for (map, size) in sizes.fields() {
            let limit = *size;
            let least = if map == maps::RECORDS { FLOWS } else { LEAST };
            // A ring goes with the flows; what is under way in fragments goes by itself.
            if map != maps::RING && map != maps::FRAGMENTS {
                *size = limit.min((limit / PART).max(least));
            }
            if let Some(pinned) = pinned(root, map) {
                *size = (*size).max(pinned.min(limit));
            }
        }
        sizes.young_flows = sizes.young_flows.min(self.young(sizes.flows)).max(1);
        sizes
    }

    /// Places for young flows beside so many flows.
    fn young(&self, flows: u32) -> u32 {
        let (all, young) = (u64::from(self.each.flows.max(1)), u64::from(self.each.young_flows));
        u32::try_from(young * u64::from(flows) / all).unwrap_or(u32::MAX).max(1)
    }

    /// The sizes that are wanted next, if that are others; and what is said of it. `short` are tables that have found no room
    /// for something.
    #[must_use]
    pub fn next(
        &self,
        now: &Capacities,
        used: &BTreeMap<&'static str, u64>,
        short: &[&'static str],
    ) -> (Option<Capacities>, Vec<Larger>) {
        let (mut sizes, mut said) = (*now, Vec::new());
        let mut limits = self.each;
        let limits: BTreeMap<&str, u32> =
            limits.fields().into_iter().map(|(map, limit)| (map, *limit)).collect();
        for (map, from) in { *now }.fields() {
            let (from, limit) = (*from, limits.get(map).copied().unwrap_or(0));
            let used = used.get(map).copied().unwrap_or(0);
            let is_short = short.contains(&map);
            if from >= limit || !is_short && used * 100 < u64::from(from) * FULL {
                continue;
            }
            // What is short of room may lack much of it: a node learns all of a large cluster at once.
            let factor = if is_short { 8 } else { 2 };
            let to = from.saturating_mul(factor).min(limit);
            let mut tried = sizes;
            for (field, size) in tried.fields() {
                if field == map {
                    *size = to;
                }
            }
            tried.young_flows = tried.young_flows.max(self.young(tried.flows));
            let memory = bytes(&tried).div_ceil(MIB);
            let allowed = (memory > u64::from(self.memory)).then_some(self.memory);
            if allowed.is_none() {
                sizes = tried;
            }
            said.push(Larger { map, used, from, to, memory, allowed });
        }
        ((sizes != *now).then_some(sizes), said)
    }
}

/// The size of a table that is pinned; of a ring per CPU.
fn pinned(root: &BpfRoot, map: &str) -> Option<u32> {
    use std::os::fd::AsFd;
    let fd = sys::obj_get(&root.map(map)).ok()?;
    let size = sys::map_facts(fd.as_fd()).ok()?.max_entries;
    Some(if map == maps::RING { size / cpus() } else { size })
}

/// About how much memory tables of these sizes take; those whose size nobody chooses are left out, which are small.
#[must_use]
pub fn bytes(sizes: &Capacities) -> u64 {
    let hash =
        |key: usize, value: usize| (key.next_multiple_of(8) + value.next_multiple_of(8)) as u64 + ENTRY;
    let each = |map: &str| match map {
        maps::FRONTENDS => hash(size_of::<FrontendKey>(), size_of::<Frontend>()),
        maps::SLOTS | maps::FREE => size_of::<u32>() as u64,
        maps::BACKENDS => size_of::<Backend>() as u64,
        maps::ADDRESSES => hash(size_of::<Addr>(), size_of::<u32>()),
        maps::SOURCES => size_of::<SourceKey>() as u64 + NODE,
        maps::IFACES => hash(size_of::<u32>(), size_of::<Iface>()),
        maps::SERVICES => hash(size_of::<u32>(), size_of::<ServiceName>()),
        maps::SERVICE_STATS => size_of::<ServiceStats>() as u64 * u64::from(cpus()),
        maps::RECORDS => size_of::<Flow>() as u64,
        maps::FLOWS => hash(size_of::<Key>(), size_of::<Leg>()),
        maps::RING => size_of::<FlowId>() as u64,
        maps::FRAGMENTS => hash(size_of::<FragmentKey>(), size_of::<Fragment>()),
        maps::AFFINITY => hash(size_of::<AffinityKey>(), size_of::<Affinity>()),
        _ => 0,
    };
    sizes.each().into_iter().map(|(map, size)| each(map) * u64::from(size)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { each: Capacities::DEFAULT, memory: 512 };

    fn nowhere() -> BpfRoot {
        BpfRoot::new("/nonexistent")
    }

    #[test]
    fn tables_begin_with_little_and_never_with_more_than_they_may_become() {
        let start = LIMITS.start(&nowhere());
        assert!(
            bytes(&start) * 4 < bytes(&Capacities::DEFAULT),
            "{} of {}",
            bytes(&start),
            bytes(&LIMITS.each)
        );
        assert_eq!((start.flows, start.slots, start.services), (FLOWS, 65_536, LEAST));
        let small = Limits { each: Capacities { flows: 1_000, services: 7, ..LIMITS.each }, ..LIMITS };
        let start = small.start(&nowhere());
        assert_eq!((start.flows, start.services, start.young_flows), (1_000, 7, LIMITS.each.young_flows));
    }

    #[test]
    fn a_table_doubles_when_it_is_four_fifths_full_up_to_its_limit() {
        let now = LIMITS.start(&nowhere());
        let next = |used: u64| LIMITS.next(&now, &BTreeMap::from([(maps::SERVICES, used)]), &[]);
        assert_eq!(next(u64::from(LEAST) * 80 / 100 - 1), (None, Vec::new()));
        let (sizes, said) = next(u64::from(LEAST) * 80 / 100 + 1);
        assert_eq!(sizes, Some(Capacities { services: LEAST * 2, ..now }));
        assert!(
            said[0].is_allowed() && said[0].to_string().contains("SERVICES has 3277 of 4096"),
            "{}",
            said[0]
        );
        let full = BTreeMap::from([(maps::SERVICES, u64::from(LIMITS.each.services))]);
        assert_eq!(LIMITS.next(&LIMITS.each, &full, &[maps::SERVICES]), (None, Vec::new()), "the limit");
        let (sizes, _) = LIMITS.next(&now, &BTreeMap::new(), &[maps::SLOTS]);
        assert_eq!(sizes.unwrap().slots, now.slots * 8, "what finds no room grows at once");
    }

    #[test]
    fn more_flows_have_larger_rings() {
        let now = LIMITS.start(&nowhere());
        let (sizes, _) = LIMITS.next(&now, &BTreeMap::from([(maps::RECORDS, u64::from(now.flows))]), &[]);
        let sizes = sizes.unwrap();
        assert_eq!((sizes.flows, sizes.young_flows), (now.flows * 2, now.young_flows * 2));
    }

    #[test]
    fn memory_forbids_and_says_what_to_do() {
        let now = LIMITS.start(&nowhere());
        let memory = u32::try_from(bytes(&now).div_ceil(MIB)).unwrap();
        let limits = Limits { memory, ..LIMITS };
        let used = BTreeMap::from([(maps::RECORDS, u64::from(now.flows)), (maps::IFACES, 1)]);
        let (sizes, said) = limits.next(&now, &used, &[]);
        assert_eq!(sizes, None);
        assert!(!said[0].is_allowed() && said[0].to_string().contains("--map-memory"), "{}", said[0]);
    }
}

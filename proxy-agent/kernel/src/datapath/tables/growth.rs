//! How large tables are at first, and when which of them is to become larger.
//!
//! They begin small and double when they are four fifths full, up to the sizes that the operator allows, each and all
//! together. What is in them comes along (`change`), so that only memory speaks against larger ones.

use std::collections::BTreeMap;
use std::fmt;

use proxy_common::abi::{
    Affinity, AffinityKey, Backend, Flow, FlowId, Fragment, FragmentKey, Frontend, FrontendKey, Iface, Key,
    Leg, PeerKey, RouteKey, ServiceName, ServiceStats, SocketEntry, SourceKey, Tuple, capacity, maps,
};
use proxy_common::addr::Addr;

use agent_core::capacity::{Capacities, size_flag};

use super::cpus::cpus;
use crate::datapath::store::pin::BpfRoot;
use crate::sys;

/// A table grows when it is so full, in per cent.
pub const FULL: u64 = 80;
/// Tables begin with this part of what they may become.
const PART: u32 = 16;
/// But with no fewer entries: what is smaller saves next to nothing.
const LEAST: u32 = 4_096;
/// Flows come in bursts, and a table that grows takes seconds to do so.
const FLOWS: u32 = 32_768;
/// Where memory is short, tables begin with no fewer entries than this, and flows than that.
const SMALLEST: u32 = 256;
/// See above.
const SMALLEST_FLOWS: u32 = 1_024;
/// Before 6.16 each CPU sets so many free entries of an LRU table aside, where others do not find them: they evict instead.
const SET_ASIDE: u32 = 128;
/// What the kernel keeps for an entry of a hash table besides key and value, its place among the buckets included.
const ENTRY: u64 = 64;
/// The same of a trie of prefixes.
const NODE: u64 = 56;
/// Bytes of a MiB.
const MIB: u64 = 1 << 20;

/// What tables may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub each: Capacities,
    /// All together, in MiB.
    pub memory: u32,
}

/// Less memory than any tables take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--map-memory={memory} is too little: the smallest tables take {least} MiB on this machine; give that or more, or lower \
     --max-fragments"
)]
pub struct TooLittle {
    memory: u32,
    least: u64,
}

/// What speaks against a larger table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against {
    /// So many MiB are allowed.
    Memory(u32),
    /// It is as large as its flag allows.
    Limit,
}

impl Against {
    /// Its name in metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Memory(_) => "memory",
            Self::Limit => "limit",
        }
    }
}

/// A table that is to become larger, or ought to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Larger {
    pub map: &'static str,
    used: u64,
    from: u32,
    /// Entries that it is to have.
    pub to: u32,
    /// MiB of all tables with it.
    memory: u64,
    /// Whether and why it stays as it is.
    pub against: Option<Against>,
}

impl fmt::Display for Larger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { map, used, from, to, memory, against } = *self;
        write!(f, "table {map} has {used} of {from} entries in use and ")?;
        match against {
            None => write!(f, "grows to {to}; all tables take {memory} MiB then"),
            Some(Against::Memory(limit)) => write!(
                f,
                "cannot grow to {to}: all tables would take {memory} MiB of the {limit} allowed; raise --map-memory"
            ),
            Some(Against::Limit) => {
                write!(f, "is as large as {} allows", size_flag(map).unwrap_or("it can be"))
            }
        }
    }
}

/// How growth stands, for whoever watches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Bytes that the tables take when they are full.
    pub memory: u64,
    /// Bytes that they may take.
    pub limit: u64,
    /// Entries of tables that are about to be larger.
    pub planned: BTreeMap<&'static str, u32>,
    /// Tables that ought to be larger, and what speaks against it.
    pub blocked: BTreeMap<&'static str, Against>,
    /// How often tables have grown.
    pub done: u64,
    /// How often they could not.
    pub failed: u64,
}

impl Limits {
    /// What tables begin with: what is pinned already, and no less than a part of what they may become, unless that is more
    /// than half of what memory allows: nobody knows yet which of them will need the other half. With it comes what the
    /// operator should know.
    pub fn start(&self, root: &BpfRoot) -> Result<(Capacities, Vec<String>), TooLittle> {
        let mut sizes = self.each;
        for (map, size) in sizes.fields() {
            let limit = *size;
            let least = if map == maps::RECORDS { FLOWS } else { LEAST.max(smallest(map)) };
            // A ring goes with the flows; what is under way in fragments goes by itself.
            if map != maps::RING && map != maps::FRAGMENTS {
                *size = limit.min((limit / PART).max(least));
            }
        }
        sizes.young_flows = sizes.young_flows.min(self.young(sizes.flows)).max(1);
        let (usual, allowed) = (bytes(&sizes), u64::from(self.memory) * MIB);
        while bytes(&sizes) > allowed / 2 && self.halve(&mut sizes) {}
        let begun = bytes(&sizes);
        if begun > allowed {
            return Err(TooLittle { memory: self.memory, least: begun.div_ceil(MIB) });
        }
        let mut remarks = Vec::new();
        if begun < usual {
            remarks.push(format!(
                "tables begin with {} MiB instead of {}, since --map-memory allows {}: where much comes at once, what finds no \
                 room before they have grown is dropped or refused",
                begun.div_ceil(MIB),
                usual.div_ceil(MIB),
                self.memory
            ));
        }
        let mut limits = self.each;
        for ((map, size), (_, limit)) in sizes.fields().into_iter().zip(limits.fields()) {
            *size = (*size).max(pinned(root, map).unwrap_or(0).min(*limit));
        }
        let memory = bytes(&sizes);
        if memory > allowed {
            remarks.push(format!(
                "tables are pinned that take {} MiB, more than --map-memory allows ({}): they become smaller only after \
                 `proxy-agent cleanup`",
                memory.div_ceil(MIB),
                self.memory
            ));
        }
        Ok((sizes, remarks))
    }

    /// Makes tables smaller; whether there were any that can be. That of fragments never grows.
    fn halve(&self, sizes: &mut Capacities) -> bool {
        let before = *sizes;
        for (map, size) in sizes.fields() {
            if map != maps::RING && map != maps::FRAGMENTS {
                *size = (*size / 2).max(smallest(map)).min(*size);
            }
        }
        sizes.young_flows = sizes.young_flows.min(self.young(sizes.flows));
        *sizes != before
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
        for ((map, from), (_, limit)) in { *now }.fields().into_iter().zip(limits.fields()) {
            let (from, limit) = (*from, *limit);
            let used = used.get(map).copied().unwrap_or(0);
            let is_short = short.contains(&map);
            if !is_short && used * 100 < u64::from(from) * FULL {
                continue;
            }
            // What is short of room may lack much of it: a node learns all of a large cluster at once.
            let factors: &[u32] = if is_short { &[8, 4, 2] } else { &[2] };
            let with = |factor: u32| {
                let (mut tried, to) = (sizes, from.saturating_mul(factor).min(limit).max(from));
                for (field, size) in tried.fields() {
                    if field == map {
                        *size = to;
                    }
                }
                tried.young_flows = tried.young_flows.max(self.young(tried.flows));
                (tried, to, bytes(&tried).div_ceil(MIB))
            };
            let mut tries = factors.iter().map(|factor| with(*factor));
            let fits = tries.find(|(.., memory)| *memory <= u64::from(self.memory));
            let (tried, to, memory) = fits.unwrap_or_else(|| with(2));
            let against = match (from >= limit, fits) {
                (true, _) => Some(Against::Limit),
                (false, None) => Some(Against::Memory(self.memory)),
                (false, Some(_)) => None,
            };
            if against.is_none() {
                sizes = tried;
            }
            said.push(Larger { map, used, from, to, memory, against });
        }
        ((sizes != *now).then_some(sizes), said)
    }

    /// How it stands while nothing grows.
    #[must_use]
    pub fn standing(&self, sizes: &Capacities) -> Standing {
        Standing { memory: bytes(sizes), limit: u64::from(self.memory) * MIB, ..Standing::default() }
    }
}

/// With how many entries a table begins where memory is short.
fn smallest(map: &str) -> u32 {
    match map {
        maps::RECORDS => SMALLEST_FLOWS,
        // Much more than four fifths of it are to be had, whatever CPUs set aside.
        maps::AFFINITY => SMALLEST.max(8 * SET_ASIDE * cpus()),
        _ => SMALLEST,
    }
}

/// The size of a table that is pinned; of a ring per CPU.
fn pinned(root: &BpfRoot, map: &str) -> Option<u32> {
    use std::os::fd::AsFd;
    let fd = sys::obj_get(&root.map(map)).ok()?;
    let size = sys::map_facts(fd.as_fd()).ok()?.max_entries;
    Some(if map == maps::RING { size / cpus() } else { size })
}

/// About how much memory tables of these sizes take when they are full, with those whose size nobody chooses.
#[must_use]
pub fn bytes(sizes: &Capacities) -> u64 {
    let hash =
        |key: usize, value: usize| (key.next_multiple_of(8) + value.next_multiple_of(8)) as u64 + ENTRY;
    let words =
        capacity::ENDPOINT_BITS + capacity::ADDRESS_BITS + capacity::SERVICE_PORTS + capacity::FLOW_FILTER;
    let fixed = hash(size_of::<PeerKey>(), size_of::<SocketEntry>()) * capacity::PEERS as u64
        + hash(size_of::<Tuple>(), size_of::<u32>()) * capacity::TAKEN as u64
        + (size_of::<RouteKey>() as u64 + NODE) * capacity::MASQUERADE as u64
        + words as u64 * size_of::<u64>() as u64;
    let each = |map: &str| match map {
        maps::FRONTENDS => hash(size_of::<FrontendKey>(), size_of::<Frontend>()),
        // An element of an array takes whole words.
        maps::SLOTS => size_of::<u64>() as u64,
        maps::FREE => size_of::<u32>() as u64,
        maps::BACKENDS => size_of::<Backend>() as u64,
        maps::ADDRESSES => hash(size_of::<Addr>(), size_of::<u32>()),
        maps::SOURCES => size_of::<SourceKey>() as u64 + NODE,
        maps::IFACES => hash(size_of::<u32>(), size_of::<Iface>()),
        maps::SERVICES => hash(size_of::<u32>(), size_of::<ServiceName>()),
        maps::SERVICE_STATS => size_of::<ServiceStats>() as u64,
        maps::RECORDS => size_of::<Flow>() as u64,
        maps::FLOWS => hash(size_of::<Key>(), size_of::<Leg>()),
        maps::RING => size_of::<FlowId>() as u64,
        maps::FRAGMENTS => hash(size_of::<FragmentKey>(), size_of::<Fragment>()),
        maps::AFFINITY => hash(size_of::<AffinityKey>(), size_of::<Affinity>()),
        _ => 0,
    };
    fixed + sizes.each(cpus()).into_iter().map(|(map, size)| each(map) * u64::from(size)).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { each: Capacities::DEFAULT, memory: 512 };

    fn nowhere() -> BpfRoot {
        BpfRoot::new("/nonexistent")
    }

    fn start(limits: &Limits) -> Capacities {
        limits.start(&nowhere()).unwrap().0
    }

    #[test]
    fn tables_begin_with_little_and_never_with_more_than_they_may_become() {
        let (begun, remarks) = LIMITS.start(&nowhere()).unwrap();
        assert!(
            bytes(&begun) * 3 < bytes(&Capacities::DEFAULT) && remarks.is_empty(),
            "{} of {}: {remarks:?}",
            bytes(&begun),
            bytes(&LIMITS.each)
        );
        assert_eq!((begun.flows, begun.slots, begun.services), (FLOWS, 65_536, LEAST));
        let small = Limits { each: Capacities { flows: 1_000, services: 7, ..LIMITS.each }, ..LIMITS };
        let begun = start(&small);
        assert_eq!((begun.flows, begun.services, begun.young_flows), (1_000, 7, LIMITS.each.young_flows));
    }

    #[test]
    fn where_memory_is_short_tables_begin_smaller_and_say_so_and_keep_room_to_grow() {
        let mib = |sizes: &Capacities| u32::try_from(bytes(sizes).div_ceil(MIB)).unwrap();
        let usual = start(&LIMITS);
        let limits = Limits { memory: mib(&usual), ..LIMITS };
        let (begun, remarks) = limits.start(&nowhere()).unwrap();
        assert!(mib(&begun) < mib(&usual) && mib(&begun) * 2 <= limits.memory + 1, "{begun:?}");
        assert!(begun.flows >= SMALLEST_FLOWS && begun.fragments == usual.fragments, "{begun:?}");
        assert!(remarks[0].contains("--map-memory allows"), "{remarks:?}");
        let used = BTreeMap::from([(maps::RECORDS, u64::from(begun.flows))]);
        assert_eq!(limits.next(&begun, &used, &[]).0.unwrap().flows, begun.flows * 2);
    }

    #[test]
    fn less_memory_than_the_smallest_tables_take_is_refused_with_what_they_take() {
        let TooLittle { least, .. } = Limits { memory: 1, ..LIMITS }.start(&nowhere()).unwrap_err();
        let least = u32::try_from(least).unwrap();
        let error = Limits { memory: least - 1, ..LIMITS }.start(&nowhere()).unwrap_err().to_string();
        assert!(error.contains(&format!("smallest tables take {least} MiB")), "{error}");
        let begun = start(&Limits { memory: least, ..LIMITS });
        assert_eq!((begun.flows, begun.services, begun.slots), (SMALLEST_FLOWS, SMALLEST, SMALLEST));
    }

    #[test]
    fn a_table_doubles_when_it_is_four_fifths_full_up_to_its_limit() {
        let now = start(&LIMITS);
        let next = |used: u64| LIMITS.next(&now, &BTreeMap::from([(maps::SERVICES, used)]), &[]);
        assert_eq!(next(u64::from(LEAST) * 80 / 100 - 1), (None, Vec::new()));
        let (sizes, said) = next(u64::from(LEAST) * 80 / 100 + 1);
        assert_eq!(sizes, Some(Capacities { services: LEAST * 2, ..now }));
        assert!(
            said[0].against.is_none() && said[0].to_string().contains("SERVICES has 3277 of 4096"),
            "{}",
            said[0]
        );
        let full = BTreeMap::from([(maps::SERVICES, u64::from(LIMITS.each.services))]);
        let (sizes, said) = LIMITS.next(&LIMITS.each, &full, &[maps::SERVICES]);
        assert_eq!((sizes, said[0].against), (None, Some(Against::Limit)));
        assert!(said[0].to_string().ends_with("is as large as --max-services allows"), "{}", said[0]);
        let (sizes, _) = LIMITS.next(&now, &BTreeMap::new(), &[maps::SLOTS]);
        assert_eq!(sizes.unwrap().slots, now.slots * 8, "what finds no room grows at once");
        let memory = u32::try_from(bytes(&Capacities { slots: now.slots * 5, ..now }).div_ceil(MIB)).unwrap();
        let (sizes, _) = Limits { memory, ..LIMITS }.next(&now, &BTreeMap::new(), &[maps::SLOTS]);
        assert_eq!(sizes.unwrap().slots, now.slots * 4, "as far as memory goes");
    }

    #[test]
    fn more_flows_have_larger_rings() {
        let now = start(&LIMITS);
        let (sizes, _) = LIMITS.next(&now, &BTreeMap::from([(maps::RECORDS, u64::from(now.flows))]), &[]);
        let sizes = sizes.unwrap();
        assert_eq!((sizes.flows, sizes.young_flows), (now.flows * 2, now.young_flows * 2));
    }

    #[test]
    fn memory_forbids_and_says_what_to_do() {
        let now = start(&LIMITS);
        let memory = u32::try_from(bytes(&now).div_ceil(MIB)).unwrap();
        let limits = Limits { memory, ..LIMITS };
        let used = BTreeMap::from([(maps::RECORDS, u64::from(now.flows)), (maps::IFACES, 1)]);
        let (sizes, said) = limits.next(&now, &used, &[]);
        assert_eq!((sizes, said[0].against), (None, Some(Against::Memory(memory))));
        assert!(said[0].to_string().contains("raise --map-memory"), "{}", said[0]);
    }
}

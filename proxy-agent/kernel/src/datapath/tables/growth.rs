//! How large tables are at first, and when which of them is to become larger.
//!
//! They begin small and double when they are four fifths full (small ones of flows earlier), up to the sizes that the
//! operator allows, each and all together. What is in them comes along (`change`), so that only memory speaks against larger
//! ones.

use std::collections::BTreeMap;
use std::fmt;

use proxy_common::abi::maps;

use agent_core::capacity::{Capacities, lru, size_flag};

use super::cpus::cpus;
use super::memory::bytes;
use crate::datapath::store::pin::BpfRoot;
use crate::sys;

/// A table grows when it is so full, in per cent.
pub const FULL: u64 = 80;
/// Tables begin with this part of what they may become.
const PART: u32 = 32;
/// But with no fewer entries: what is smaller saves next to nothing.
const LEAST: u32 = 4_096;
/// Flows come in bursts, and a table that grows takes seconds to do so: it begins with so many entries,
const FLOWS: u32 = 16_384;
/// and grows when fewer than these are free, as far as they are no more than two fifths of it.
const FREE_FLOWS: u32 = 6_500;
/// Where memory is short, tables begin with no fewer entries than this, and flows than that.
const SMALLEST: u32 = 256;
/// See above.
const SMALLEST_FLOWS: u32 = 1_024;
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
            let is_full = is_short || used * 100 >= u64::from(from) * FULL;
            if !is_full && !is_due(map, from, used) {
                continue;
            }
            // What is short of room may lack much of it: a node learns all of a large cluster at once.
            let factors: &[u32] = if is_short { &[16, 8, 4, 2] } else { &[2] };
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
            match against {
                None => sizes = tried,
                // It would have grown early.
                Some(_) if !is_full => continue,
                Some(_) => {}
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

/// Whether a table grows before it is four fifths full: a small one of flows.
fn is_due(map: &str, size: u32, used: u64) -> bool {
    map == maps::RECORDS && used + u64::from(FREE_FLOWS.min(size / 5 * 2)) > u64::from(size)
}

/// With how many entries a table begins where memory is short.
fn smallest(map: &str) -> u32 {
    match map {
        maps::RECORDS => SMALLEST_FLOWS,
        // Much more than four fifths of it are to be had, whatever CPUs set aside.
        maps::AFFINITY => SMALLEST.max(lru(cpus())),
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
        assert_eq!((begun.flows, begun.slots, begun.services), (FLOWS, 32_768, LEAST));
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
        assert_eq!(sizes.unwrap().slots, now.slots * 16, "what finds no room grows at once");
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

    #[test]
    fn a_small_table_of_flows_grows_early_and_nothing_is_said_where_it_cannot() {
        let now = start(&LIMITS);
        let next = |limits: &Limits, now: &Capacities, used: u32| {
            limits.next(now, &BTreeMap::from([(maps::RECORDS, u64::from(used))]), &[])
        };
        assert_eq!(next(&LIMITS, &now, FLOWS - FREE_FLOWS).0, None);
        assert_eq!(next(&LIMITS, &now, FLOWS - FREE_FLOWS + 1).0.unwrap().flows, FLOWS * 2);
        let large = Capacities { flows: FLOWS * 4, ..now };
        assert_eq!(next(&LIMITS, &large, FLOWS * 3).0, None, "a large one at four fifths");
        let small = Capacities { flows: 1_000, ..now };
        assert_eq!(next(&LIMITS, &small, 600).0, None);
        assert!(next(&LIMITS, &small, 601).0.is_some());
        let most = Limits { each: Capacities { flows: FLOWS, ..LIMITS.each }, ..LIMITS };
        assert_eq!(next(&most, &now, FLOWS - 4_000), (None, Vec::new()));
    }
}

//! How large the tables are made: for every size that can be chosen its field, flag, table and default.
//!
//! The flags of `run`, the sizes of maps, the planner's room and the words about a full table all follow from this list.
//! The defaults themselves are in [`proxy_common::abi::capacity`], where the kernel programs find them, too.

use proxy_common::abi::{capacity, maps};
use proxy_common::lb::Ring;

/// Entries that any table may have. With three legs for each of so many flows a byte of FLOW_FILTER counts a hundred, and
/// never as many as it cannot hold.
pub const MOST_ENTRIES: u32 = 1 << 24;

/// Legs of a masqueraded flow.
const LEGS: u32 = 3;
/// Before 6.16 each CPU sets so many free entries of an LRU table aside, where others do not find them: they evict instead.
const SET_ASIDE: u32 = 128;

/// A number of entries, as the kernel takes it; one that it could not take does not compile.
#[expect(clippy::cast_possible_truncation, reason = "asserted")]
pub(crate) const fn entries(count: usize) -> u32 {
    assert!(count <= u32::MAX as usize);
    count as u32
}

/// Entries of PEERS, and how many there are at most on a machine with many CPUs.
const PEERS: u32 = entries(capacity::PEERS);
/// See above.
const MOST_PEERS: u32 = 32_768;

/// Entries of an LRU table of which nearly all are to be had, whatever so many CPUs set aside.
#[must_use]
pub fn lru(cpus: u32) -> u32 {
    cpus.saturating_mul(8 * SET_ASIDE)
}

/// A size that can be chosen.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Its flag, with the dashes.
    pub flag: &'static str,
    /// The table that it is the size of; others follow from it ([`Capacities::each`]).
    pub map: &'static str,
    /// What it is without the flag.
    pub default: u32,
    /// What is counted, for `--help`.
    pub help: &'static str,
}

macro_rules! sizes {
    ($($(#[doc = $help:literal])+ $field:ident: $map:ident, $flag:literal;)*) => {
        /// Sizes of the tables, in entries.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct Capacities {
            $($(#[doc = $help])+ pub $field: u32,)*
        }

        /// Every size that can be chosen, in the order of [`Capacities::fields`].
        pub const SIZES: &[Size] = &[
            $(Size {
                flag: $flag,
                map: maps::$map,
                default: entries(capacity::$map),
                help: concat!($($help),+),
            },)*
        ];

        impl Capacities {
            /// Those of [`proxy_common::abi::capacity`].
            pub const DEFAULT: Self = Self { $($field: entries(capacity::$map),)* };

            /// Each of them, with the name of the table that it is the size of.
            pub fn fields(&mut self) -> [(&'static str, &mut u32); SIZES.len()] {
                let Self { $($field,)* } = self;
                [$((maps::$map, $field),)*]
            }
        }
    };
}

sizes! {
    /// Addresses x ports of all Services
    frontends: FRONTENDS, "--max-frontends";
    /// Slots of all Services: about twice the endpoints, counted once per Service port
    slots: SLOTS, "--max-slots";
    /// Endpoints, counted once per Service port
    backends: BACKENDS, "--max-backends";
    /// Service ports
    services: SERVICES, "--max-services";
    /// Source ranges of all Services
    sources: SOURCES, "--max-sources";
    /// Service and node addresses
    addresses: ADDRESSES, "--max-addresses";
    /// Flows, those of the node itself that have to be known included
    flows: RECORDS, "--max-flows";
    /// Places on each CPU for flows whose ends have not shown yet that they mean it: with more, the oldest goes
    young_flows: RING, "--max-young-flows";
    /// Fragmented packets under way
    fragments: FRAGMENTS, "--max-fragments";
    /// Clients that Services with session affinity remember
    affinity: AFFINITY, "--max-affinity";
    /// Interfaces of this node
    ifaces: IFACES, "--max-interfaces";
}

impl Capacities {
    /// The size of each map that has one to choose or depends on the machine, which has so many CPUs.
    #[must_use]
    pub fn each(&self, cpus: u32) -> [(&'static str, u32); 15] {
        let Self {
            frontends,
            slots,
            backends,
            services,
            sources,
            addresses,
            flows,
            young_flows: _,
            fragments,
            affinity,
            ifaces,
        } = *self;
        [
            (maps::FRONTENDS, frontends),
            (maps::SLOTS, slots),
            (maps::BACKENDS, backends),
            (maps::ADDRESSES, addresses),
            (maps::SOURCES, sources),
            (maps::IFACES, ifaces),
            (maps::SERVICES, services),
            (maps::SERVICE_STATS, services),
            (maps::RECORDS, flows),
            (maps::FREE, flows),
            (maps::FLOWS, flows.saturating_mul(LEGS)),
            (maps::RING, self.places().saturating_mul(Ring::COUNT * cpus)),
            (maps::FRAGMENTS, fragments),
            (maps::AFFINITY, affinity),
            (maps::PEERS, PEERS.max(lru(cpus).min(MOST_PEERS))),
        ]
    }

    /// Places of one ring on one CPU.
    #[must_use]
    pub fn places(&self) -> u32 {
        (self.young_flows / Ring::COUNT).max(1)
    }
}

/// The flag of `run` that sizes a map, where there is one.
#[must_use]
pub fn size_flag(map: &str) -> Option<&'static str> {
    let sized = match map {
        maps::SERVICE_STATS => maps::SERVICES,
        maps::FREE | maps::FLOWS => maps::RECORDS,
        map => map,
    };
    SIZES.iter().find(|size| size.map == sized).map(|size| size.flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_size_has_the_flag_for_it() {
        for (map, size) in Capacities::DEFAULT.each(2) {
            assert!(size_flag(map).is_some() || map == maps::PEERS, "{map}");
            assert!(size != 0, "{map}");
        }
    }

    #[test]
    fn the_table_of_sockets_grows_with_what_cpus_set_aside() {
        let peers = |cpus| Capacities::DEFAULT.each(cpus).into_iter().find(|(map, _)| *map == maps::PEERS);
        assert_eq!(peers(2), Some((maps::PEERS, 8_192)));
        assert_eq!(peers(16), Some((maps::PEERS, 16_384)));
        assert_eq!(peers(64), Some((maps::PEERS, 32_768)));
    }

    #[test]
    fn maps_of_a_fixed_size_name_no_flag() {
        assert_eq!(size_flag(maps::CONFIG), None);
        assert_eq!(size_flag(maps::FLOWS), Some("--max-flows"));
    }

    #[test]
    fn fields_are_in_the_order_of_their_flags() {
        let mut capacities = Capacities::DEFAULT;
        let fields = capacities.fields();
        assert!(
            fields.iter().zip(SIZES).all(|((map, value), size)| *map == size.map && **value == size.default)
        );
    }
}

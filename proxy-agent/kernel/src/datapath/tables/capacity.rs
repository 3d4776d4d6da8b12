//! How large the maps are made.

use proxy_common::abi::{capacity, maps};
use proxy_common::lb::Ring;

/// Legs of a masqueraded flow.
const LEGS: u32 = 3;
const RINGS: u32 = Ring::COUNT;

/// CPUs that may ever run.
pub(crate) fn cpus() -> u32 {
    aya::util::nr_cpus().map_or(1, |n| u32::try_from(n).unwrap_or(1))
}

/// Sizes of the maps that can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacities {
    /// FRONTENDS.
    pub frontends: u32,
    /// SLOTS.
    pub slots: u32,
    /// BACKENDS.
    pub backends: u32,
    /// ADDRESSES.
    pub addresses: u32,
    /// SOURCES.
    pub sources: u32,
    /// IFACES.
    pub ifaces: u32,
    /// SERVICES and SERVICE_STATS.
    pub services: u32,
    /// RECORDS and FREE; FLOWS has room for all legs of so many.
    pub flows: u32,
    /// Places of RING on each CPU.
    pub young_flows: u32,
    /// FRAGMENTS.
    pub fragments: u32,
    /// AFFINITY.
    pub affinity: u32,
}

impl Capacities {
    /// The sizes of [`capacity`].
    pub const DEFAULT: Self = Self {
        frontends: capacity::FRONTENDS as u32,
        slots: capacity::SLOTS as u32,
        backends: capacity::BACKENDS as u32,
        addresses: capacity::ADDRESSES as u32,
        sources: capacity::SOURCES as u32,
        ifaces: capacity::IFACES as u32,
        services: capacity::SERVICES as u32,
        flows: capacity::RECORDS as u32,
        young_flows: capacity::RING as u32,
        fragments: capacity::FRAGMENTS as u32,
        affinity: capacity::AFFINITY as u32,
    };

    /// The size of each map that has one to choose.
    #[must_use]
    pub fn each(&self) -> [(&'static str, u32); 14] {
        let Self {
            frontends,
            slots,
            backends,
            addresses,
            sources,
            ifaces,
            services,
            flows,
            young_flows: _,
            fragments,
            affinity,
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
            (maps::RING, self.places().saturating_mul(RINGS * cpus())),
            (maps::FRAGMENTS, fragments),
            (maps::AFFINITY, affinity),
        ]
    }

    /// Each of them, with the name of the map that it is the size of.
    pub(crate) fn fields(&mut self) -> [(&'static str, &mut u32); 11] {
        let Self {
            frontends,
            slots,
            backends,
            addresses,
            sources,
            ifaces,
            services,
            flows,
            young_flows,
            fragments,
            affinity,
        } = self;
        [
            (maps::FRONTENDS, frontends),
            (maps::SLOTS, slots),
            (maps::BACKENDS, backends),
            (maps::ADDRESSES, addresses),
            (maps::SOURCES, sources),
            (maps::IFACES, ifaces),
            (maps::SERVICES, services),
            (maps::RECORDS, flows),
            (maps::RING, young_flows),
            (maps::FRAGMENTS, fragments),
            (maps::AFFINITY, affinity),
        ]
    }

    /// Places of one ring on one CPU.
    #[must_use]
    pub fn places(&self) -> u32 {
        (self.young_flows / RINGS).max(1)
    }
}

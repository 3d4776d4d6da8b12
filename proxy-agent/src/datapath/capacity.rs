//! How large the maps are made.

use proxy_common::abi::{capacity, maps};

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
    /// FLOWS.
    pub flows: u32,
    /// HALF_OPEN.
    pub half_open: u32,
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
        flows: capacity::FLOWS as u32,
        half_open: capacity::HALF_OPEN as u32,
        fragments: capacity::FRAGMENTS as u32,
        affinity: capacity::AFFINITY as u32,
    };

    /// The size of each map that has one to choose.
    #[must_use]
    pub fn each(&self) -> [(&'static str, u32); 12] {
        let Self {
            frontends,
            slots,
            backends,
            addresses,
            sources,
            ifaces,
            services,
            flows,
            half_open,
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
            (maps::FLOWS, flows),
            (maps::HALF_OPEN, half_open),
            (maps::FRAGMENTS, fragments),
            (maps::AFFINITY, affinity),
        ]
    }
}

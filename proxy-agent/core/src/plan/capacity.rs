//! How much the tables hold, and what to say when one is full.

use std::fmt;

use proxy_common::abi::{capacity, maps};

/// Entries the tables were made for. Index 0 of SLOTS, BACKENDS and SERVICES is never used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// FRONTENDS (`--max-frontends`).
    pub frontends: u32,
    /// SLOTS (`--max-slots`).
    pub slots: u32,
    /// BACKENDS (`--max-backends`).
    pub backends: u32,
    /// ADDRESSES (`--max-addresses`).
    pub addresses: u32,
    /// SOURCES (`--max-sources`).
    pub sources: u32,
    /// SERVICES and SERVICE_STATS (`--max-services`).
    pub services: u32,
    /// IFACES (`--max-interfaces`).
    pub ifaces: u32,
    /// MASQUERADE, whose size is fixed.
    pub routes: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            frontends: capacity::FRONTENDS as u32,
            slots: capacity::SLOTS as u32,
            backends: capacity::BACKENDS as u32,
            addresses: capacity::ADDRESSES as u32,
            sources: capacity::SOURCES as u32,
            services: capacity::SERVICES as u32,
            ifaces: capacity::IFACES as u32,
            routes: capacity::MASQUERADE as u32,
        }
    }
}

/// A table that takes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shortage {
    table: &'static str,
    flag: &'static str,
    needed: usize,
    free: usize,
    /// Entries that come free when the grace period is over.
    resting: usize,
}

impl Shortage {
    /// Which table it is.
    pub(super) const fn table(&self) -> &'static str {
        self.table
    }

    pub(super) const fn frontends(needed: usize, free: usize) -> Self {
        Self { table: maps::FRONTENDS, flag: "--max-frontends", needed, free, resting: 0 }
    }

    pub(super) const fn slots(needed: usize, free: usize, resting: usize) -> Self {
        Self { table: maps::SLOTS, flag: "--max-slots", needed, free, resting }
    }

    pub(super) const fn backends(needed: usize, free: usize, resting: usize) -> Self {
        Self { table: maps::BACKENDS, flag: "--max-backends", needed, free, resting }
    }

    pub(super) const fn addresses(needed: usize, free: usize) -> Self {
        Self { table: maps::ADDRESSES, flag: "--max-addresses", needed, free, resting: 0 }
    }

    pub(super) const fn sources(needed: usize, free: usize) -> Self {
        Self { table: maps::SOURCES, flag: "--max-sources", needed, free, resting: 0 }
    }

    pub(super) const fn services(free: usize, resting: usize) -> Self {
        Self { table: maps::SERVICES, flag: "--max-services", needed: 1, free, resting }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, flag, needed, free, resting } = self;
        write!(f, "table {table} is full: {needed} more needed, {free} free")?;
        if *resting != 0 {
            write!(f, " ({resting} more in a moment)")?;
        }
        // Runs are contiguous: enough slots in all may still be too few in one place.
        if free >= needed {
            f.write_str(" but not in one piece")?;
        }
        write!(f, "; raise {flag}")
    }
}

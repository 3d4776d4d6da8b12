//! How much the tables hold, and what to say when one is full.

use std::fmt;

use proxy_common::abi::{capacity, maps};

use crate::capacity::{Capacities, entries, size_flag};

/// Entries the tables were made for. Index 0 of SLOTS, BACKENDS and SERVICES is never used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    pub frontends: u32,
    pub slots: u32,
    pub backends: u32,
    pub addresses: u32,
    pub sources: u32,
    /// SERVICES and SERVICE_STATS.
    pub services: u32,
    pub ifaces: u32,
    /// MASQUERADE, whose size is fixed.
    pub routes: u32,
}

impl From<&Capacities> for Capacity {
    fn from(sizes: &Capacities) -> Self {
        let Capacities { frontends, slots, backends, addresses, sources, services, ifaces, .. } = *sizes;
        let routes = entries(capacity::MASQUERADE);
        Self { frontends, slots, backends, addresses, sources, services, ifaces, routes }
    }
}

impl Capacity {
    /// That of maps of such sizes; where there is no size it is the default.
    #[must_use]
    pub fn of_maps(sizes: &[(&'static str, u32)]) -> Self {
        let size = |name: &str, default: u32| {
            sizes.iter().find(|(map, _)| *map == name).map_or(default, |(_, size)| *size)
        };
        let mut chosen = Capacities::DEFAULT;
        chosen.fields().into_iter().for_each(|(map, entries)| *entries = size(map, *entries));
        let capacity = Self::from(&chosen);
        Self { routes: size(maps::MASQUERADE, capacity.routes), ..capacity }
    }
}

impl Default for Capacity {
    fn default() -> Self {
        Self::from(&Capacities::DEFAULT)
    }
}

/// A table that takes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shortage {
    table: &'static str,
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
        Self { table: maps::FRONTENDS, needed, free, resting: 0 }
    }

    pub(super) const fn slots(needed: usize, free: usize, resting: usize) -> Self {
        Self { table: maps::SLOTS, needed, free, resting }
    }

    pub(super) const fn backends(needed: usize, free: usize, resting: usize) -> Self {
        Self { table: maps::BACKENDS, needed, free, resting }
    }

    pub(super) const fn addresses(needed: usize, free: usize) -> Self {
        Self { table: maps::ADDRESSES, needed, free, resting: 0 }
    }

    pub(super) const fn sources(needed: usize, free: usize) -> Self {
        Self { table: maps::SOURCES, needed, free, resting: 0 }
    }

    pub(super) const fn services(free: usize, resting: usize) -> Self {
        Self { table: maps::SERVICES, needed: 1, free, resting }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, needed, free, resting } = self;
        write!(f, "table {table} is full: {needed} more needed, {free} free")?;
        if *resting != 0 {
            write!(f, " ({resting} more in a moment)")?;
        }
        // Runs are contiguous: enough slots in all may still be too few in one place.
        if free >= needed {
            f.write_str(" but not in one piece")?;
        }
        match size_flag(table) {
            Some(flag) => write!(f, "; raise {flag}"),
            None => Ok(()),
        }
    }
}

/// Why a Service port was left as it is.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("its name is longer than Kubernetes allows; rename it")]
    Name,
    #[error("{0}")]
    Full(Shortage),
}

//! What is: the configuration tables as values.

use std::collections::{BTreeMap, BTreeSet};

use proxy_common::abi::{Backend, Config, Frontend, FrontendKey, Iface, ServiceName, SourceKey};
use proxy_common::addr::Addr;

/// The configuration tables, read from the kernel at start and kept in step with every write since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actual {
    /// FRONTENDS.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// SLOTS that are not zero.
    pub slots: BTreeMap<u32, u32>,
    /// BACKENDS that were ever used; retired ones keep their generation.
    pub backends: BTreeMap<u32, Backend>,
    /// ADDRESSES.
    pub addresses: BTreeMap<Addr, u32>,
    /// SOURCES.
    pub sources: BTreeSet<SourceKey>,
    /// SERVICES.
    pub services: BTreeMap<u32, ServiceName>,
    /// IFACES.
    pub ifaces: BTreeMap<u32, Iface>,
    /// CONFIG.
    pub config: Config,
}

impl Default for Actual {
    fn default() -> Self {
        Self {
            frontends: BTreeMap::new(),
            slots: BTreeMap::new(),
            backends: BTreeMap::new(),
            addresses: BTreeMap::new(),
            sources: BTreeSet::new(),
            services: BTreeMap::new(),
            ifaces: BTreeMap::new(),
            config: Config::EMPTY,
        }
    }
}

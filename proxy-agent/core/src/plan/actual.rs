//! What is: the configuration tables as values.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use proxy_common::abi::{
    Backend, Config, Frontend, FrontendKey, Iface, RouteKey, Run, ServiceName, SourceKey, address,
};
use proxy_common::addr::{Addr, Port, Proto};

use super::{Array, Step};

/// The configuration tables, read from the kernel at start and kept in step with every write since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actual {
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// SLOTS that are not zero.
    pub slots: Array<u32>,
    /// BACKENDS that were ever used; retired ones keep their generation.
    pub backends: Array<Backend>,
    pub addresses: BTreeMap<Addr, u32>,
    pub sources: BTreeSet<SourceKey>,
    /// A name is a large value: whoever looks by name has the same one.
    pub services: BTreeMap<u32, Arc<ServiceName>>,
    pub ifaces: BTreeMap<u32, Iface>,
    /// MASQUERADE.
    pub routes: BTreeMap<RouteKey, Addr>,
    /// Words of SERVICE_PORTS that are not zero.
    pub service_ports: Array<u64>,
    /// CONFIG.
    pub config: Config,
}

impl Default for Actual {
    fn default() -> Self {
        Self {
            frontends: BTreeMap::new(),
            slots: Array::default(),
            backends: Array::default(),
            addresses: BTreeMap::new(),
            sources: BTreeSet::new(),
            services: BTreeMap::new(),
            ifaces: BTreeMap::new(),
            routes: BTreeMap::new(),
            service_ports: Array::default(),
            config: Config::EMPTY,
        }
    }
}

impl Actual {
    /// The frontend that a packet to this address and port is for: its own, or a NodePort's at an address of this node.
    #[must_use]
    pub fn frontend_at(&self, addr: Addr, port: Port, proto: Proto) -> Option<&Frontend> {
        let mut key = FrontendKey::new(addr, port, proto);
        let own = self.frontends.get(&key);
        let known = self.addresses.get(&addr).copied().unwrap_or(0);
        if own.is_some() || known & address::NODE_PORT == 0 && !addr.is_loopback() {
            return own;
        }
        key.addr = addr.wildcard();
        self.frontends.get(&key)
    }

    /// Does one step.
    pub fn apply(&mut self, step: &Step) {
        match *step {
            Step::PutConfig(ref config) => self.config = **config,
            Step::PutIface(index, iface) => drop(self.ifaces.insert(index, iface)),
            Step::DeleteIface(index) => drop(self.ifaces.remove(&index)),
            Step::PutRoute(key, source) => drop(self.routes.insert(key, source)),
            Step::DeleteRoute(key) => drop(self.routes.remove(&key)),
            Step::PutServicePorts(word, bits) => self.service_ports.insert(word, bits),
            Step::PutService(id, ref name) => drop(self.services.insert(id, name.clone())),
            Step::DeleteService(id) => drop(self.services.remove(&id)),
            Step::PutBackend(index, backend) => self.backends.insert(index, backend),
            Step::PutSlot(slot, backend) => self.slots.insert(slot, backend),
            Step::PutSource(key) => drop(self.sources.insert(key)),
            Step::DeleteSource(key) => drop(self.sources.remove(&key)),
            Step::PutFrontend(key, value) => drop(self.frontends.insert(key, value)),
            Step::DeleteFrontend(key) => drop(self.frontends.remove(&key)),
            Step::PutAddress(addr, bits) => drop(self.addresses.insert(addr, bits)),
            Step::DeleteAddress(addr) => drop(self.addresses.remove(&addr)),
        }
    }

    /// The backend indices in a run, slot by slot; an empty slot reads as 0.
    pub fn run(&self, run: Run) -> impl Iterator<Item = u32> + '_ {
        let end = run.first.saturating_add(run.count);
        (run.first..end).map(|slot| self.slots.get(slot).copied().unwrap_or(0))
    }

    /// Slots that a frontend shows. What else is written in SLOTS is what nobody shows any more: it is overwritten in
    /// time, never erased.
    #[must_use]
    pub fn shown_slots(&self) -> usize {
        let runs: BTreeSet<Run> =
            self.frontends.values().flat_map(|value| [value.cluster, value.local]).collect();
        let (mut shown, mut from) = (0, 0);
        for run in runs {
            let end = run.first.saturating_add(run.count);
            shown += end.saturating_sub(run.first.max(from)) as usize;
            from = from.max(end);
        }
        shown
    }

    /// For each Service with session affinity, how long its clients are remembered, in seconds.
    #[must_use]
    pub fn affinity_secs(&self) -> BTreeMap<u32, u32> {
        let mut secs: BTreeMap<u32, u32> = BTreeMap::new();
        for value in self.frontends.values().filter(|value| value.affinity_secs != 0) {
            let longest = secs.entry(value.service).or_default();
            *longest = value.affinity_secs.max(*longest);
        }
        secs
    }

    /// The live endpoints behind a run, in slot order.
    pub fn endpoints(&self, run: Run) -> impl Iterator<Item = (Addr, Port)> + '_ {
        self.run(run)
            .filter_map(|index| self.backends.get(index))
            .filter(|backend| backend.is_live())
            .map(|backend| (backend.addr, backend.port))
    }

    /// The steps that make these tables out of empty ones, table by table in key order.
    pub fn entries(&self) -> impl Iterator<Item = Step> + '_ {
        let Self {
            frontends,
            slots,
            backends,
            addresses,
            sources,
            services,
            ifaces,
            routes,
            service_ports,
            config,
        } = self;
        std::iter::once_with(|| Step::PutConfig(Box::new(*config)))
            .chain(ifaces.iter().map(|(index, iface)| Step::PutIface(*index, *iface)))
            .chain(routes.iter().map(|(key, source)| Step::PutRoute(*key, *source)))
            .chain(service_ports.iter().map(|(word, bits)| Step::PutServicePorts(word, *bits)))
            .chain(services.iter().map(|(id, name)| Step::PutService(*id, name.clone())))
            .chain(backends.iter().map(|(index, backend)| Step::PutBackend(index, *backend)))
            .chain(slots.iter().map(|(slot, backend)| Step::PutSlot(slot, *backend)))
            .chain(sources.iter().map(|key| Step::PutSource(*key)))
            .chain(frontends.iter().map(|(key, value)| Step::PutFrontend(*key, *value)))
            .chain(addresses.iter().map(|(addr, bits)| Step::PutAddress(*addr, *bits)))
    }

    /// Every entry as one line, as [`Step`] shows it.
    #[must_use]
    pub fn dump(&self) -> String {
        let mut out = String::new();
        for entry in self.entries() {
            writeln!(out, "{entry}").expect("a String takes all that is written to it");
        }
        out
    }
}

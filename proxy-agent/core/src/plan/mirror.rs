//! The tables as they are, with the indices that make a plan cost no more than its change.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use proxy_common::abi::{Backend, Frontend, FrontendKey, Run, ServiceName, SourceKey, address, frontend};
use proxy_common::addr::{Addr, Port};

use super::{Actual, Step};
use crate::few::Few;

/// What in the tables bears one service id, by its keys; the values are there.
#[derive(Debug, Default)]
pub(super) struct Held {
    named: bool,
    pub(super) frontends: Few<FrontendKey>,
    /// Of live backends.
    indices: Few<u32>,
    pub(super) sources: BTreeSet<SourceKey>,
}

impl Held {
    fn is_empty(&self) -> bool {
        let Self { named, frontends, indices, sources } = self;
        !named && frontends.is_empty() && indices.is_empty() && sources.is_empty()
    }
}

/// How many frontends of each kind stand at an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Uses {
    pub(super) internal: u32,
    pub(super) external: u32,
}

impl Uses {
    pub(super) fn add(&mut self, flags: u32) {
        match use_of(flags) {
            address::CLUSTER_IP => self.internal += 1,
            address::EXTERNAL => self.external += 1,
            _ => {}
        }
    }

    pub(super) fn remove(&mut self, flags: u32) {
        match use_of(flags) {
            address::CLUSTER_IP => self.internal -= 1,
            address::EXTERNAL => self.external -= 1,
            _ => {}
        }
    }

    pub(super) fn bits(self) -> u32 {
        let internal = if self.internal == 0 { 0 } else { address::CLUSTER_IP };
        let external = if self.external == 0 { 0 } else { address::EXTERNAL };
        internal | external
    }
}

/// The bit of ADDRESSES that a frontend with these flags brings; none for a NodePort.
pub(super) const fn use_of(flags: u32) -> u32 {
    if flags & frontend::NODE_PORT != 0 {
        0
    } else if flags & frontend::INTERNAL != 0 {
        address::CLUSTER_IP
    } else {
        address::EXTERNAL
    }
}

/// Whether a frontend with these flags makes its port one that SERVICE_PORTS names.
const fn names_port(flags: u32) -> bool {
    flags & frontend::INTERNAL == 0
}

/// [`Actual`] and its indices, changed only by [`Self::apply`].
#[derive(Debug, Default)]
pub(super) struct Mirror {
    actual: Actual,
    by_name: HashMap<Arc<ServiceName>, u32>,
    held: HashMap<u32, Held>,
    uses: HashMap<Addr, Uses>,
    /// How many frontends beside ClusterIPs have a port.
    ports: HashMap<u16, u32>,
    /// Of Services with session affinity, how long their clients are remembered, in seconds.
    affinity_secs: BTreeMap<u32, u32>,
    /// Of ADDRESSES those with bits of the node: few, beside the ClusterIPs.
    of_node: BTreeSet<Addr>,
}

/// The bits of ADDRESSES that are the node's.
pub(super) const NODE_BITS: u32 = address::NODE | address::NODE_PORT;

impl Mirror {
    pub(super) fn new(actual: &Actual) -> Self {
        let mut mirror = Self::default();
        for step in actual.entries() {
            mirror.apply(&step);
        }
        mirror
    }

    pub(super) fn actual(&self) -> &Actual {
        &self.actual
    }

    pub(super) fn id(&self, name: &ServiceName) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    pub(super) fn held(&self, id: u32) -> Option<&Held> {
        self.held.get(&id)
    }

    /// The endpoints of an id, each with its index: the lowest, if it has several.
    pub(super) fn endpoints(&self, id: u32) -> BTreeMap<(Addr, Port), u32> {
        let mut endpoints = BTreeMap::new();
        for index in self.held(id).into_iter().flat_map(|held| &held.indices) {
            if let Some(backend) = self.actual.backends.get(*index) {
                endpoints.entry((backend.addr, backend.port)).or_insert(*index);
            }
        }
        endpoints
    }

    /// Indices of an id beside those of its `endpoints`.
    pub(super) fn strays(&self, id: u32, endpoints: &BTreeMap<(Addr, Port), u32>) -> Vec<u32> {
        let held = self.held(id).filter(|held| held.indices.len() != endpoints.len());
        let kept: BTreeSet<&u32> = endpoints.values().collect();
        let indices = held.into_iter().flat_map(|held| &held.indices);
        indices.filter(|index| !kept.contains(index)).copied().collect()
    }

    pub(super) fn ids(&self) -> BTreeSet<u32> {
        self.held.keys().copied().collect()
    }

    pub(super) fn affinity_secs(&self) -> &BTreeMap<u32, u32> {
        &self.affinity_secs
    }

    /// The node's addresses.
    pub(super) fn of_node(&self) -> &BTreeSet<Addr> {
        &self.of_node
    }

    pub(super) fn uses(&self, addr: &Addr) -> Uses {
        self.uses.get(addr).copied().unwrap_or_default()
    }

    /// How many frontends beside ClusterIPs will have each of the ports that `changed` frontends (`None`: removed) have
    /// or had; with `all` of every port that has or had one.
    pub(super) fn ports_after<'a>(
        &self,
        changed: impl Iterator<Item = (&'a FrontendKey, Option<&'a Frontend>)>,
        all: bool,
    ) -> BTreeMap<u16, u32> {
        let now = |port: u16| self.ports.get(&port).copied().unwrap_or(0);
        let mut after = BTreeMap::new();
        for (key, new) in changed {
            let port = key.port.number();
            let count: &mut u32 = after.entry(port).or_insert_with(|| now(port));
            let old = self.actual.frontends.get(key);
            *count += u32::from(new.is_some_and(|new| names_port(new.flags)));
            *count -= u32::from(old.is_some_and(|old| names_port(old.flags)));
        }
        if all {
            let named = self.actual.service_ports.iter().flat_map(|(word, bits)| {
                let set = (0..64).filter(move |bit| bits >> bit & 1 != 0);
                set.filter_map(move |bit| u16::try_from(word * 64 + bit).ok())
            });
            for port in self.ports.keys().copied().chain(named) {
                after.entry(port).or_insert_with(|| now(port));
            }
        }
        after
    }

    /// The runs that the frontends of a Service show.
    pub(super) fn runs(&self, id: u32) -> BTreeSet<Run> {
        let keys = self.held.get(&id).into_iter().flat_map(|held| &held.frontends);
        keys.filter_map(|key| self.actual.frontends.get(key))
            .flat_map(|value| [value.cluster, value.local])
            .filter(|run| run.count != 0)
            .collect()
    }

    pub(super) fn apply(&mut self, step: &Step) {
        match *step {
            Step::PutService(id, ref name) => {
                self.unname(id);
                self.held.entry(id).or_default().named = true;
                // Of two ids with one name the first keeps it; the other is unwanted.
                self.by_name.entry(name.clone()).or_insert(id);
            }
            Step::DeleteService(id) => self.unname(id),
            Step::PutBackend(index, value) => {
                if let Some(old) = self.actual.backends.get(index).copied() {
                    self.unlink_backend(index, &old);
                }
                self.link_backend(index, &value);
            }
            Step::PutSource(key) => {
                self.held.entry(u32::from_be(key.service)).or_default().sources.insert(key);
            }
            Step::DeleteSource(key) => self.with(u32::from_be(key.service), |held| {
                held.sources.remove(&key);
            }),
            Step::PutFrontend(key, value) => {
                self.unlink_frontend(&key);
                self.link_frontend(key, &value);
            }
            Step::DeleteFrontend(key) => self.unlink_frontend(&key),
            Step::PutAddress(addr, bits) if bits & NODE_BITS != 0 => drop(self.of_node.insert(addr)),
            Step::PutAddress(addr, _) | Step::DeleteAddress(addr) => drop(self.of_node.remove(&addr)),
            Step::PutConfig(_)
            | Step::PutIface(..)
            | Step::DeleteIface(_)
            | Step::PutRoute(..)
            | Step::DeleteRoute(_)
            | Step::PutServicePorts(..)
            | Step::PutSlot(..) => {}
        }
        self.actual.apply(step);
    }

    /// Changes what an id holds and forgets the id when nothing is left.
    fn with(&mut self, id: u32, change: impl FnOnce(&mut Held)) {
        if let Some(held) = self.held.get_mut(&id) {
            change(held);
            if held.is_empty() {
                self.held.remove(&id);
            }
        }
    }

    fn unname(&mut self, id: u32) {
        if let Some(name) = self.actual.services.get(&id)
            && self.by_name.get(name) == Some(&id)
        {
            self.by_name.remove(name);
        }
        self.with(id, |held| held.named = false);
    }

    fn link_backend(&mut self, index: u32, value: &Backend) {
        if !value.is_live() {
            return;
        }
        self.held.entry(value.service).or_default().indices.insert(index);
    }

    fn unlink_backend(&mut self, index: u32, old: &Backend) {
        self.with(old.service, |held| held.indices.remove(&index));
    }

    fn link_frontend(&mut self, key: FrontendKey, value: &Frontend) {
        self.held.entry(value.service).or_default().frontends.insert(key);
        // All frontends of a Service say the same.
        match value.affinity_secs {
            0 => self.affinity_secs.remove(&value.service),
            secs => self.affinity_secs.insert(value.service, secs),
        };
        if names_port(value.flags) {
            *self.ports.entry(key.port.number()).or_default() += 1;
        }
        if use_of(value.flags) != 0 {
            self.uses.entry(key.addr).or_default().add(value.flags);
        }
    }

    fn unlink_frontend(&mut self, key: &FrontendKey) {
        let Some(old) = self.actual.frontends.get(key).copied() else { return };
        self.with(old.service, |held| held.frontends.remove(key));
        if self.held(old.service).is_none_or(|held| held.frontends.is_empty()) {
            self.affinity_secs.remove(&old.service);
        }
        let port = key.port.number();
        if names_port(old.flags)
            && let Some(count) = self.ports.get_mut(&port)
        {
            *count -= 1;
            if *count == 0 {
                self.ports.remove(&port);
            }
        }
        if use_of(old.flags) != 0
            && let Some(uses) = self.uses.get_mut(&key.addr)
        {
            uses.remove(old.flags);
            if *uses == Uses::default() {
                self.uses.remove(&key.addr);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_the_node_are_known_without_a_walk_through_all_of_them() {
        let addr = |last: u8| Addr::from(std::net::IpAddr::from([10, 0, 0, last]));
        let mut mirror = Mirror::default();
        for (last, bits) in [
            (1, address::NODE),
            (2, address::CLUSTER_IP),
            (3, NODE_BITS | address::EXTERNAL),
            (4, address::NODE),
        ] {
            mirror.apply(&Step::PutAddress(addr(last), bits));
        }
        assert_eq!(*mirror.of_node(), BTreeSet::from([addr(1), addr(3), addr(4)]));
        // It becomes a Service's alone; it goes.
        mirror.apply(&Step::PutAddress(addr(3), address::EXTERNAL));
        mirror.apply(&Step::DeleteAddress(addr(4)));
        assert_eq!(*mirror.of_node(), BTreeSet::from([addr(1)]));
        assert_eq!(*Mirror::new(mirror.actual()).of_node(), BTreeSet::from([addr(1)]));
    }
}

//! A plan in the making: what each Service needs, sorted into phases.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use proxy_common::abi::{Backend, Frontend, FrontendKey, Run, maps};
use proxy_common::addr::Addr;

use super::Step;
use super::capacity::{Capacity, Shortage};
use super::mirror::{Mirror, NODE_BITS, use_of};
use super::print::Destination;
use crate::model::NodeTables;

/// What nothing refers to once the plan has been carried out.
#[derive(Debug, Default)]
pub(super) struct Released {
    pub(super) services: Vec<u32>,
    pub(super) backends: Vec<u32>,
    pub(super) runs: Vec<Run>,
}

/// Steps by phase (see the module), and what several Services share.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) names: Vec<Step>,
    pub(super) backends: Vec<Step>,
    pub(super) slots: Vec<Step>,
    pub(super) sources: Vec<Step>,
    pub(super) node: Vec<Step>,
    /// Backend values that may only be seen after the frontends have flipped.
    pub(super) late_backends: Vec<Step>,
    pub(super) late_sources: Vec<Step>,
    pub(super) late_names: Vec<Step>,
    pub(super) late_node: Vec<Step>,
    /// Values that differ from what is.
    puts: BTreeMap<FrontendKey, Frontend>,
    /// Frontends that a Service of this plan no longer wants.
    dropped: BTreeSet<FrontendKey>,
    /// Which Service of this plan has a frontend.
    owners: HashMap<FrontendKey, u32>,
    /// Ids whose frontends change.
    touched: BTreeSet<u32>,
    new_frontends: usize,
    new_sources: usize,
    new_addresses: HashSet<Addr>,
    pub(super) released: Released,
    pub(super) warnings: Vec<String>,
    /// Tables that found no room for something.
    pub(super) short: Vec<&'static str>,
}

impl Batch {
    pub(super) fn has_owner(&self, key: &FrontendKey) -> bool {
        self.owners.contains_key(key)
    }

    pub(super) fn check_frontends(
        &self,
        mirror: &Mirror,
        capacity: &Capacity,
        keys: &[(FrontendKey, u32)],
    ) -> Result<(), Shortage> {
        let actual = mirror.actual();
        // Deletes come after puts: what this plan deletes still takes its place.
        let needed = keys.iter().filter(|(key, _)| !actual.frontends.contains_key(key)).count();
        let free = (capacity.frontends as usize).saturating_sub(actual.frontends.len() + self.new_frontends);
        if needed > free {
            return Err(Shortage::frontends(needed, free));
        }
        let addresses: HashSet<Addr> = keys
            .iter()
            .filter(|(_, flags)| use_of(*flags) != 0)
            .map(|(key, _)| key.addr)
            .filter(|addr| !actual.addresses.contains_key(addr) && !self.new_addresses.contains(addr))
            .collect();
        let free = self.free_addresses(mirror, capacity);
        if addresses.len() > free {
            return Err(Shortage::addresses(addresses.len(), free));
        }
        Ok(())
    }

    pub(super) fn free_sources(&self, mirror: &Mirror, capacity: &Capacity) -> usize {
        (capacity.sources as usize).saturating_sub(mirror.actual().sources.len() + self.new_sources)
    }

    fn free_addresses(&self, mirror: &Mirror, capacity: &Capacity) -> usize {
        (capacity.addresses as usize)
            .saturating_sub(mirror.actual().addresses.len() + self.new_addresses.len())
    }

    /// Takes a frontend for a Service, away from whoever has it: a hand-over is this one put.
    pub(super) fn put_frontend(&mut self, mirror: &Mirror, key: FrontendKey, value: Frontend) {
        let actual = mirror.actual();
        let value = value.sealed(&key);
        self.owners.insert(key, value.service);
        if use_of(value.flags) != 0 && !actual.addresses.contains_key(&key.addr) {
            self.new_addresses.insert(key.addr);
        }
        let old = actual.frontends.get(&key);
        if old == Some(&value) {
            return;
        }
        self.touched.insert(value.service);
        match old {
            Some(old) => drop(self.touched.insert(old.service)),
            None => self.new_frontends += 1,
        }
        self.puts.insert(key, value);
    }

    /// Gives up a frontend of Service `id`, unless another Service of this plan takes it over.
    pub(super) fn drop_frontend(&mut self, id: u32, key: FrontendKey) {
        self.touched.insert(id);
        self.dropped.insert(key);
    }

    pub(super) fn put_source(&mut self, step: Step) {
        self.new_sources += 1;
        self.sources.push(step);
    }

    pub(super) fn retire_backend(&mut self, mirror: &Mirror, index: u32) {
        let generation = mirror.actual().backends.get(index).map_or(0, |backend| backend.generation);
        self.late_backends.push(Step::PutBackend(index, Backend::retired(generation.wrapping_add(1))));
        self.released.backends.push(index);
    }

    /// Plans settings and interfaces, and keeps room for the node's addresses. False when something found
    /// no room.
    pub(super) fn plan_node(&mut self, mirror: &Mirror, capacity: &Capacity, node: &NodeTables) -> bool {
        let actual = mirror.actual();
        if actual.config != node.config {
            self.node.push(Step::PutConfig(Box::new(node.config)));
        }
        let mut room = (capacity.ifaces as usize).saturating_sub(actual.ifaces.len());
        let mut whole = true;
        for (index, iface) in &node.ifaces {
            match actual.ifaces.get(index) {
                Some(old) if old == iface => {}
                None if room == 0 => {
                    whole = false;
                    self.short.push(maps::IFACES);
                    self.warnings.push(format!(
                        "interface {index}: table IFACES is full ({} entries): answers to what comes in there leave as the routes say; \
                         remove interfaces the node does not need",
                        capacity.ifaces
                    ));
                }
                old => {
                    room -= usize::from(old.is_none());
                    self.node.push(Step::PutIface(*index, *iface));
                }
            }
        }
        let removed = actual.ifaces.keys().filter(|index| !node.ifaces.contains_key(index));
        self.late_node.extend(removed.map(|index| Step::DeleteIface(*index)));
        whole &= self.plan_routes(mirror, capacity, node);
        for addr in node.addresses.keys().filter(|addr| !actual.addresses.contains_key(addr)) {
            if self.free_addresses(mirror, capacity) == 0 {
                whole = false;
                self.short.push(maps::ADDRESSES);
                self.warnings.push(format!("node address {addr}: {}", Shortage::addresses(1, 0)));
            } else {
                self.new_addresses.insert(*addr);
            }
        }
        whole
    }

    /// The same for the sources of masqueraded flows, those of whole interfaces first: if there is no room for one of
    /// a single route, flows of that route leave as the interface's other flows do.
    fn plan_routes(&mut self, mirror: &Mirror, capacity: &Capacity, node: &NodeTables) -> bool {
        let actual = mirror.actual();
        let mut room = (capacity.routes as usize).saturating_sub(actual.routes.len());
        let mut refused = 0_usize;
        let mut first_refused = None;
        let mut routes: Vec<_> = node.routes.iter().collect();
        routes.sort_by_key(|(key, _)| key.bits());
        for (key, source) in routes {
            match actual.routes.get(key) {
                Some(old) if old == source => {}
                None if room == 0 => {
                    refused += 1;
                    first_refused.get_or_insert(*key);
                }
                old => {
                    room -= usize::from(old.is_none());
                    self.node.push(Step::PutRoute(*key, *source));
                }
            }
        }
        if let Some(key) = first_refused {
            self.warnings.push(format!(
                "routes: table MASQUERADE is full ({} entries): {refused} routes, the first of them to {}/{} by \
                 interface {}, are masqueraded as shorter ones of their interfaces; give routes with the same \
                 source a common prefix",
                capacity.routes,
                key.dst,
                key.bits(),
                u32::from_be(key.ifindex)
            ));
        }
        let removed = actual.routes.keys().filter(|key| !node.routes.contains_key(key));
        self.late_node.extend(removed.map(|key| Step::DeleteRoute(*key)));
        refused == 0
    }

    /// The steps in order. With `everything` all addresses are compared, not only those of changed frontends.
    pub(super) fn finish(
        mut self,
        mirror: &Mirror,
        node: Option<&NodeTables>,
        everything: bool,
    ) -> (Vec<Step>, Released, Vec<String>) {
        let owners = &self.owners;
        self.dropped.retain(|key| !owners.contains_key(key));
        let (widen, narrow) = self.addresses(mirror, node, everything);
        let (name_ports, unname_ports) = self.ports(mirror, everything);
        self.release_runs(mirror);

        let phases = [
            self.names,
            self.backends,
            self.slots,
            self.sources,
            self.node,
            name_ports,
            self.puts.into_iter().map(|(key, value)| Step::PutFrontend(key, value)).collect(),
            widen,
            narrow,
            self.dropped.into_iter().map(Step::DeleteFrontend).collect(),
            unname_ports,
            self.late_backends,
            self.late_sources,
            self.late_names,
            self.late_node,
        ];
        // The first plan of a large cluster is larger than all that is known of it: no room for more, and none twice.
        let mut steps = Vec::with_capacity(phases.iter().map(Vec::len).sum());
        phases.into_iter().for_each(|phase| steps.extend(phase));
        (steps, self.released, self.warnings)
    }

    /// Puts that add bits, and puts and deletes that take bits away.
    fn addresses(
        &self,
        mirror: &Mirror,
        node: Option<&NodeTables>,
        everything: bool,
    ) -> (Vec<Step>, Vec<Step>) {
        let actual = mirror.actual();
        let mut uses = BTreeMap::new();
        for key in self.puts.keys().chain(&self.dropped) {
            let uses = uses.entry(key.addr).or_insert_with(|| mirror.uses(&key.addr));
            if let Some(old) = actual.frontends.get(key) {
                uses.remove(old.flags);
            }
            if let Some(new) = self.puts.get(key) {
                uses.add(new.flags);
            }
        }
        let mut look = |addr: &Addr| {
            uses.entry(*addr).or_insert_with(|| mirror.uses(addr));
        };
        if let Some(node) = node {
            node.addresses.keys().for_each(&mut look);
            mirror.of_node().iter().for_each(&mut look);
        }
        if everything {
            actual.addresses.keys().for_each(&mut look);
            actual.frontends.keys().for_each(|key| look(&key.addr));
        }

        let (mut widen, mut narrow) = (Vec::new(), Vec::new());
        for (addr, uses) in uses {
            let old = actual.addresses.get(&addr).copied();
            let of_node = match node {
                Some(node) => node.addresses.get(&addr).copied().unwrap_or(0),
                None => old.unwrap_or(0) & NODE_BITS,
            };
            let new = of_node | uses.bits();
            if old.is_none() && !self.new_addresses.contains(&addr) {
                continue; // Nothing stands there, or there was no room.
            }
            let both = old.unwrap_or(0) | new;
            if old != Some(both) {
                widen.push(Step::PutAddress(addr, both));
            }
            match new {
                0 => narrow.push(Step::DeleteAddress(addr)),
                _ if new != both => narrow.push(Step::PutAddress(addr, new)),
                _ => {}
            }
        }
        (widen, narrow)
    }

    /// Words of SERVICE_PORTS that name more ports, and words that name fewer.
    fn ports(&self, mirror: &Mirror, everything: bool) -> (Vec<Step>, Vec<Step>) {
        let puts = self.puts.iter().map(|(key, value)| (key, Some(value)));
        let changed = puts.chain(self.dropped.iter().map(|key| (key, None)));
        let mut words: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        for (port, count) in mirror.ports_after(changed, everything) {
            let (word, bit) = (u32::from(port) / 64, 1 << (port % 64));
            let (named, unnamed) = words.entry(word).or_default();
            *if count == 0 { unnamed } else { named } |= bit;
        }
        let (mut more, mut fewer) = (Vec::new(), Vec::new());
        for (word, (named, unnamed)) in words {
            let old = mirror.actual().service_ports.get(word).copied().unwrap_or(0);
            let both = old | named;
            if both != old {
                more.push(Step::PutServicePorts(word, both));
            }
            if both & unnamed != 0 {
                fewer.push(Step::PutServicePorts(word, both & !unnamed));
            }
        }
        (more, fewer)
    }

    /// Finds the runs that no frontend will show any more.
    fn release_runs(&mut self, mirror: &Mirror) {
        let actual = mirror.actual();
        let mut new: HashMap<u32, BTreeSet<Run>> = HashMap::new();
        for value in self.puts.values() {
            new.entry(value.service).or_default().extend([value.cluster, value.local]);
        }
        for id in &self.touched {
            let mut removed = mirror.runs(*id);
            let kept = mirror.held(*id).into_iter().flat_map(|held| &held.frontends);
            for key in kept.filter(|key| !self.puts.contains_key(key) && !self.dropped.contains(key)) {
                if let Some(value) = actual.frontends.get(key) {
                    removed.remove(&value.cluster);
                    removed.remove(&value.local);
                }
            }
            let new = new.get(id);
            self.released
                .runs
                .extend(removed.into_iter().filter(|run| new.is_none_or(|new| !new.contains(run))));
        }
    }

    pub(super) fn warn_of_owner(&mut self, what: &str, key: &FrontendKey) {
        let id = self.owners.get(key).copied().unwrap_or(0);
        self.warnings.push(format!(
            "{what}: {} already belongs to service id {id} in this plan and stays there",
            Destination(key)
        ));
    }
}

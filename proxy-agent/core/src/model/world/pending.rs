//! What follows for the tables: all of it, or what differs from the last time.

use std::collections::BTreeMap;

use ipnet::IpNet;
use proxy_common::abi::config;

use super::World;
use crate::model::compile::{compile, destinations_in_use};
use crate::model::tables::node_tables;
use crate::model::{Desired, DesiredService, NoLocalByFamily, NodeTables, ObjectName, ServicePort};

/// What should be in the tables of one Service.
pub(super) type Ports = BTreeMap<ServicePort, DesiredService>;

impl World {
    /// The Service ports that differ from what was last taken; `None` is to be removed. A destination that
    /// moves from one Service port to another is in the same batch for both.
    pub fn take_dirty(&mut self) -> Vec<(ServicePort, Option<DesiredService>)> {
        let mut dirty = Vec::new();
        for name in std::mem::take(&mut self.stale) {
            self.note_in_use(&name);
            let now = self.compile(&name);
            dirty.extend(self.taken.replace(&name, now));
        }
        dirty
    }

    /// Everything that should be.
    #[must_use]
    pub fn desired(&self) -> Desired {
        let services = self.services.keys().flat_map(|name| self.compile(name)).collect();
        Desired { services, node: self.node() }
    }

    /// Everything that should be, for a full sync: [`Self::take_dirty`] starts from here.
    pub fn take_desired(&mut self) -> Desired {
        self.stale.clear();
        self.in_use.clear();
        self.taken.clear();
        let mut services = BTreeMap::new();
        for name in self.services.keys().cloned().collect::<Vec<_>>() {
            self.note_in_use(&name);
            let now = self.compile(&name);
            let all = self.taken.replace(&name, now);
            services.extend(all.into_iter().filter_map(|(port, desired)| Some((port, desired?))));
        }
        Desired { services, node: self.node() }
    }

    /// What should be programmed for the node itself. It depends on Services, too (M-13), and is cheap:
    /// compare it on every sync.
    #[must_use]
    pub fn node(&self) -> NodeTables {
        let ranges = self.service_ranges.values().flatten().copied();
        // Another proxy may serve addresses there that we do not know yet.
        let drops = self.leave & config::LEAVE_NEW == 0;
        let ranges = ranges.filter(|range| drops && self.lies_inside(range).is_none()).collect();
        let mut tables =
            node_tables(&self.settings, &self.last_node, &self.links, &self.around, &self.owners, &ranges);
        tables.config.flags |= self.leave;
        if self.pods_by_packet {
            tables.config.flags &= !config::SOCKET_PODS;
        }
        tables
    }

    /// Service ports that are programmed with policy Local and without an endpoint of this node, of those for
    /// which there are endpoints elsewhere (H-42).
    #[must_use]
    pub fn without_local_endpoints(&self) -> NoLocalByFamily {
        self.taken.no_local()
    }

    fn compile(&self, name: &ObjectName) -> Ports {
        match self.services.get(name) {
            Some(service) => compile(name, service, self.slices_of(name), &self.here, &self.owners),
            None => Ports::new(),
        }
    }

    /// Notes which destinations of a Service the node or its pods use.
    fn note_in_use(&mut self, name: &ObjectName) {
        let found = self.services.get(name).map(|service| destinations_in_use(name, service, &self.here));
        match found.filter(|found| !found.is_empty()) {
            Some(found) => drop(self.in_use.insert(name.clone(), found)),
            None => drop(self.in_use.remove(name)),
        }
    }

    /// What of the node or of pods lies inside a range of ClusterIPs: to drop what goes to addresses of no Service
    /// there would cut it off.
    pub(super) fn lies_inside(&self, range: &IpNet) -> Option<String> {
        // A wide pod range that holds the Services, too, is somebody's way to say "everything in here is ours".
        let pods = self.settings.cluster_cidrs.iter().find(|pods| range.contains(*pods));
        // A range of addresses is one of the set, too: pods outside it cost nothing.
        let pod = || self.pods_in_ranges.range(range.network()..=range.broadcast()).next();
        pods.map(|pods| format!("the pod range {pods}"))
            .or_else(|| self.here.local.inside(range))
            .or_else(|| pod().map(|ip| format!("the pod {ip}")))
    }
}

//! What a report changes in the world, and which Services it concerns.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::World;
use crate::model::peers::peers;
use crate::model::tables::{Around, global_addresses};
use crate::model::{Family, Link, Node, NodeIps, ObjectName, Route, Service, Slice, Urgency};

impl World {
    pub(super) fn apply_service(&mut self, name: ObjectName, service: Option<Service>) -> Option<Urgency> {
        let name = self.shared(name);
        let service = service.map(|service| self.permitted(service));
        let old = self.services.get(&name);
        if old == service.as_ref() {
            return None;
        }
        let urgency = Urgency::of_service(old, service.as_ref(), self.slices_of.contains_key(&name));
        let moved = self.owners.replace(&name, old, service.as_ref());
        self.stale.extend(moved);
        let own = |service: &Service| {
            let Service { cluster_ips, external_ips, load_balancer_ips, .. } = service;
            let mut all = cluster_ips.iter().chain(external_ips).chain(load_balancer_ips);
            all.any(|ip| self.here.addresses.contains(ip))
        };
        let was_direct = self.is_direct(&name);
        let near = self.services.get(&name).is_some_and(own) || service.as_ref().is_some_and(own);
        match service {
            Some(service) => self.services.insert(name.clone(), service),
            None => self.services.remove(&name),
        };
        let is_direct = self.is_direct(&name);
        if was_direct != is_direct {
            self.count_all_nodes(&name, is_direct);
        }
        self.note_check(&name);
        self.stale.insert(name);
        if near {
            self.look_around(); // M-13: an address of an interface became a Service's, or ceased to be.
        }
        Some(urgency)
    }

    /// The name of a Service in the memory of its equals.
    fn shared(&mut self, mut name: ObjectName) -> ObjectName {
        let known = self.services.get_key_value(&name).map(|(known, _)| known);
        let known = known.or_else(|| self.slices_of.get_key_value(&name).map(|(known, _)| known));
        if let Some(known) = known {
            return known.clone();
        }
        self.names.share(&mut name.namespace);
        name
    }

    /// A Service without what is switched off: a family (S-12), external IPs (V-8). What it does not say about direct server
    /// return holds as the operator has set it. It is kept for long.
    fn permitted(&mut self, mut service: Service) -> Service {
        let families = self.settings.families();
        service.cluster_ips.retain(|ip| families.contains(&Family::of(ip)));
        if !self.settings.external_ips {
            service.external_ips.clear();
        }
        service.mode.get_or_insert(self.settings.loadbalancer_mode);
        service.ports.iter_mut().for_each(|port| self.names.share(&mut port.name));
        service.cluster_ips.shrink_to_fit();
        service.ports.shrink_to_fit();
        service
    }

    pub(super) fn apply_slice(&mut self, mut name: ObjectName, slice: Option<Slice>) -> Option<Urgency> {
        let slice = slice.map(|slice| {
            let mut slice = slice.sorted(&mut self.names);
            slice.service = self.shared(slice.service);
            slice
        });
        self.names.share(&mut name.namespace);
        let old = self.slices.get(&name);
        if old == slice.as_ref() {
            return None;
        }
        let service = slice.as_ref().and_then(|slice| self.services.get(&slice.service));
        let has_others = slice.as_ref().is_some_and(|slice| self.has_others(&name, slice));
        let agents = &self.settings.agents_service;
        let of_agents = [old, slice.as_ref()].into_iter().flatten().any(|slice| slice.service == *agents);
        let urgency = Urgency::of_slice(old, slice.as_ref(), service, has_others);
        if let Some(slice) = &slice {
            self.endpoints += slice.endpoints.len();
            self.count_pods(slice, true);
            if self.is_direct(&slice.service) {
                self.count_nodes(slice, true);
            }
        }
        // E-7: a slice that changes hands leaves its old Service.
        if let Some(old) = self.slices.remove(&name) {
            self.endpoints -= old.endpoints.len();
            self.count_pods(&old, false);
            if self.is_direct(&old.service) {
                self.count_nodes(&old, false);
            }
            if let Some(names) = self.slices_of.get_mut(&old.service) {
                names.remove(&name);
                if names.is_empty() {
                    self.slices_of.remove(&old.service);
                }
            }
            self.note_check(&old.service);
            self.stale.insert(old.service);
        }
        if let Some(slice) = slice {
            self.slices_of.entry(slice.service.clone()).or_default().insert(name.clone());
            self.note_check(&slice.service);
            self.stale.insert(slice.service.clone());
            self.slices.insert(name, slice);
        }
        if of_agents {
            self.peers = peers(self.slices_of(&self.settings.agents_service)).into();
        }
        Some(urgency)
    }

    /// Whether the Service of a slice has other slices of its family.
    fn has_others(&self, name: &ObjectName, slice: &Slice) -> bool {
        let names = self.slices_of.get(&slice.service).into_iter().flatten().filter(|other| *other != name);
        names.filter_map(|other| self.slices.get(other)).any(|other| other.family == slice.family)
    }

    /// Adds or removes a slice's pods.
    fn count_pods(&mut self, slice: &Slice, added: bool) {
        let moved = self.here.local.count_slice(slice, added);
        self.changed_hands(&moved);
        for ip in moved {
            if !added {
                self.pods_in_ranges.remove(&ip);
            } else if self.service_ranges.values().flatten().any(|range| range.contains(&ip)) {
                self.pods_in_ranges.insert(ip);
            }
        }
    }

    pub(super) fn apply_node(&mut self, node: Option<Node>) -> bool {
        if self.node == node {
            return false;
        }
        if let Some(node) = &node {
            let ips = NodeIps::new(&node.ips, self.settings.bind_address).known();
            if self.here.zone != node.zone || self.here.ips != ips {
                self.here.zone.clone_from(&node.zone);
                self.here.ips.clone_from(&ips);
                self.stale.extend(self.services.keys().cloned()); // Y-14
            }
            self.last_node = Node { ips, ..node.clone() };
            let moved = self.here.local.set_node(&self.last_node, &self.links);
            self.changed_hands(&moved);
            if self.here.local.set_pod_cidrs(&node.pod_cidrs) {
                self.stale.extend(self.services.keys().cloned());
            }
            self.trust_ranges();
            self.look_around();
        }
        self.node = node;
        true
    }

    /// Y-16: in force with the next sync, whose node tables are compared each time.
    pub(super) fn apply_service_ranges(&mut self, name: String, ranges: Option<Vec<IpNet>>) -> bool {
        let changed = match ranges {
            Some(ranges) => self.service_ranges.insert(name, ranges.clone()) != Some(ranges),
            None => self.service_ranges.remove(&name).is_some(),
        };
        if changed {
            let inside = |ip: &IpAddr| self.service_ranges.values().flatten().any(|range| range.contains(ip));
            self.pods_in_ranges = self.here.local.pods().filter(inside).collect();
            self.trust_ranges();
        }
        changed
    }

    pub(super) fn apply_links(&mut self, mut links: Vec<Link>) -> bool {
        links.sort_by_key(|link| link.index);
        if self.links_known && self.links == links {
            return false;
        }
        let addresses: BTreeSet<IpAddr> = global_addresses(&links).collect();
        let moved: BTreeSet<IpAddr> = addresses.symmetric_difference(&self.here.addresses).copied().collect();
        if !moved.is_empty() {
            let touched = self.slices.values().filter(|slice| {
                slice.endpoints.iter().any(|endpoint| endpoint.node.is_none() && moved.contains(&endpoint.ip))
            });
            self.stale.extend(touched.map(|slice| slice.service.clone()));
        }
        self.here.addresses = addresses;
        self.links = links;
        self.links_known = true;
        let moved = self.here.local.set_node(&self.last_node, &self.links);
        self.changed_hands(&moved);
        self.trust_ranges();
        self.look_around();
        true
    }

    pub(super) fn apply_routes(&mut self, routes: Vec<Route>) -> bool {
        if self.routes == routes {
            return false;
        }
        self.routes = routes;
        let before = std::mem::take(&mut self.around);
        self.look_around();
        // Of many routes few matter.
        (&before.sources, &before.uplinks) != (&self.around.sources, &self.around.uplinks)
    }

    fn look_around(&mut self) {
        self.around = Around::look(&self.settings, &self.last_node, &self.links, &self.routes, &self.owners);
    }

    /// Marks the Services that ask for one of these addresses.
    fn changed_hands(&mut self, moved: &[IpAddr]) {
        let asked = |ip: &&IpAddr| self.owners.is_service_address(&(**ip).into());
        let moved: HashSet<&IpAddr> = moved.iter().filter(asked).collect();
        if moved.is_empty() {
            return;
        }
        let asks = |service: &Service| {
            let Service { cluster_ips, external_ips, load_balancer_ips, .. } = service;
            cluster_ips.iter().chain(external_ips).chain(load_balancer_ips).any(|ip| moved.contains(ip))
        };
        let asking = self.services.iter().filter(|(_, service)| asks(service));
        self.stale.extend(asking.map(|(name, _)| name.clone()));
    }

    /// Which ranges of ClusterIPs hold nothing of the node's or the cluster's pods.
    fn trust_ranges(&mut self) {
        let covers = |range: &IpNet| {
            let pods = self.settings.cluster_cidrs.iter().any(|pods| range.contains(pods));
            pods || self.here.local.inside(range).is_some()
        };
        let trusted = self.service_ranges.values().flatten().filter(|range| !covers(range)).copied();
        let trusted = trusted.collect();
        let moved = self.here.local.set_service_ranges(trusted);
        self.changed_hands(&moved);
    }
}

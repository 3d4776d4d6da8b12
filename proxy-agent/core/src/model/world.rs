//! World: everything reported so far, and what follows from it for the tables.
//!
//! A change marks the Services it touches; only those are compiled again, and only what really differs from
//! the last time is handed on. The cost of a change does not depend on how many Services there are.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use proxy_common::abi::{FrontendKey, config};

use super::compile::{Here, compile, destinations_in_use};
use super::conflicts::Owners;
use super::local::{InUse, Local};
use super::merge::{merge, sorted};
use super::names::Names;
use super::no_local::NoLocalByFamily;
use super::tables::{self, Accepted, Around, global_addresses, node_tables};
use super::warnings::{Warning, Warnings};
use super::{
    Desired, DesiredService, DetectLocal, Family, Link, Node, NodeIps, NodeTables, ObjectName, Route, Service,
};
use super::{ServicePort, Settings, Slice};
use crate::model::{Change, Kind};

type Ports = BTreeMap<ServicePort, DesiredService>;

/// How many warnings about destinations that several Services ask for there are at most.
const MAX_CONFLICTS: usize = 1_000;

/// Everything reported so far.
#[derive(Debug)]
pub struct World {
    settings: Settings,
    /// What is left to another proxy.
    leave: u32,
    pods_by_packet: bool,
    services: BTreeMap<ObjectName, Service>,
    slices: HashMap<ObjectName, Slice>,
    /// Names of the slices of a Service, in order.
    slices_of: HashMap<ObjectName, BTreeSet<ObjectName>>,
    /// The Node object while there is one.
    node: Option<Node>,
    /// The last Node object there was, with the addresses that count: a deleted one does not change the tables
    /// (Y-13).
    last_node: Node,
    links: Vec<Link>,
    routes: Vec<Route>,
    around: Around,
    /// Ranges of ClusterIPs by the name of their ServiceCIDR: one that two of them have goes with the last.
    service_ranges: BTreeMap<String, Vec<IpNet>>,
    /// Pods whose addresses lie inside these ranges.
    pods_in_ranges: BTreeSet<IpAddr>,
    here: Here,
    /// Destinations that Services do not get, because the node or its pods use them.
    in_use: BTreeMap<ObjectName, Vec<(FrontendKey, InUse)>>,
    owners: Owners,
    warnings: Warnings,
    names: Names,
    synced: HashSet<Kind>,
    links_known: bool,
    connected: bool,
    whole: bool,
    stale: BTreeSet<ObjectName>,
    taken: HashMap<ObjectName, Ports>,
}

/// A `healthCheckNodePort` to serve, in one family (H-14).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HealthCheck {
    /// The Service.
    pub service: ObjectName,
    /// Family to listen in.
    pub family: Family,
    /// Port to listen on.
    pub port: u16,
    /// Distinct local ready endpoint addresses of the Service (H-20).
    pub local_endpoints: usize,
}

impl World {
    /// Nothing reported yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let ips = NodeIps::new(&[], settings.bind_address).known();
        let here = Here {
            node: settings.node_name.clone(),
            ips: ips.clone(),
            local: Local::new(&settings.own_ports),
            ..Here::default()
        };
        Self {
            settings,
            leave: 0,
            pods_by_packet: false,
            services: BTreeMap::new(),
            slices: HashMap::new(),
            slices_of: HashMap::new(),
            node: None,
            last_node: Node { ips, ..Node::default() },
            links: Vec::new(),
            routes: Vec::new(),
            around: Around::default(),
            service_ranges: BTreeMap::new(),
            pods_in_ranges: BTreeSet::new(),
            here,
            in_use: BTreeMap::new(),
            owners: Owners::default(),
            warnings: Warnings::default(),
            names: Names::default(),
            synced: HashSet::new(),
            links_known: false,
            connected: false,
            whole: true,
            stale: BTreeSet::new(),
            taken: HashMap::new(),
        }
    }

    /// Applies a change; says whether it changed anything.
    pub fn apply(&mut self, change: Change) -> bool {
        match change {
            Change::Service(name, service) => self.apply_service(name, service),
            Change::Slice(name, slice) => self.apply_slice(name, slice),
            Change::Node(node) => self.apply_node(node),
            Change::ServiceRanges(name, ranges) => self.apply_service_ranges(name, ranges),
            Change::Links(links) => self.apply_links(links),
            Change::Routes(routes) => self.apply_routes(routes),
            Change::Synced(kind) => self.synced.insert(kind),
            Change::Warnings { object, lines } => self.warnings.replace(object, lines),
            Change::Whole(whole) => std::mem::replace(&mut self.whole, whole) != whole,
            Change::Triggered(..) | Change::Repeated(_) | Change::Excluded(..) => false,
            Change::Connected(connected) => std::mem::replace(&mut self.connected, connected) != connected,
        }
    }

    /// Whether every kind of object has been listed and the links are known. Before that nothing may be
    /// programmed: half a world would take away what works (Y-17).
    #[must_use]
    pub fn synced(&self) -> bool {
        self.links_known
            && [Kind::Service, Kind::Slice, Kind::Node].iter().all(|kind| self.synced.contains(kind))
    }

    /// The Service ports that differ from what was last taken; `None` is to be removed. A destination that
    /// moves from one Service port to another is in the same batch for both.
    pub fn take_dirty(&mut self) -> Vec<(ServicePort, Option<DesiredService>)> {
        let mut dirty = Vec::new();
        for name in std::mem::take(&mut self.stale) {
            let now = self.compile(&name);
            self.note_in_use(&name);
            let mut before = self.taken.remove(&name).unwrap_or_default();
            for (port, desired) in &now {
                if before.remove(port).as_ref() != Some(desired) {
                    dirty.push((port.clone(), Some(desired.clone())));
                }
            }
            dirty.extend(before.into_keys().map(|port| (port, None)));
            if !now.is_empty() {
                self.taken.insert(name, now);
            }
        }
        dirty
    }

    /// Everything that should be.
    #[must_use]
    pub fn desired(&self) -> Desired {
        let services = self.services.keys().flat_map(|name| self.compile(name)).collect();
        Desired { services, node: self.node() }
    }

    /// Everything that should be, for a full pass: [`Self::take_dirty`] starts from here.
    pub fn take_desired(&mut self) -> Desired {
        self.stale.clear();
        self.in_use.clear();
        for name in self.services.keys().cloned().collect::<Vec<_>>() {
            self.note_in_use(&name);
        }
        self.taken = self.services.keys().map(|name| (name.clone(), self.compile(name))).collect();
        let services = self.taken.values().flatten().map(|(port, desired)| (port.clone(), desired.clone()));
        Desired { services: services.collect(), node: self.node() }
    }

    /// What should be programmed for the node itself. It depends on Services, too (M-13), and is cheap:
    /// compare it on every pass.
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

    /// Whether sockets of pods are translated by their packets, whatever the settings say; true when that is news. One that
    /// connects straight to an endpoint may be given a port that a connection has there that was begun otherwise: a pod's kernel
    /// tells ports apart by the address that was asked for.
    pub fn set_pods_by_packet(&mut self, wanted: bool) -> bool {
        std::mem::replace(&mut self.pods_by_packet, wanted) != wanted
            && self.settings.socket_lb == super::SocketLb::All
    }

    /// What is left to another proxy on this node: bits of [`config`].
    pub fn set_leave(&mut self, bits: u32) {
        self.leave = bits;
    }

    /// What of the node or of pods lies inside a range of ClusterIPs: to drop what goes to addresses of no Service
    /// there would cut it off.
    fn lies_inside(&self, range: &IpNet) -> Option<String> {
        // A wide pod range that holds the Services, too, is somebody's way to say "everything in here is ours".
        let pods = self.settings.cluster_cidrs.iter().find(|pods| range.contains(*pods));
        let pod = || self.pods_in_ranges.iter().find(|ip| range.contains(*ip));
        pods.map(|pods| format!("the pod range {pods}"))
            .or_else(|| self.here.local.inside(range))
            .or_else(|| pod().map(|ip| format!("the pod {ip}")))
    }

    /// The Node object, while there is one.
    #[must_use]
    pub fn node_object(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// The family of the node's first address (Y-10), as last reported.
    #[must_use]
    pub fn primary_family(&self) -> Family {
        NodeIps::new(&self.last_node.ips, self.settings.bind_address).primary
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The links of the node, by index.
    #[must_use]
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// Every Service that is proxied.
    pub fn services(&self) -> impl Iterator<Item = (&ObjectName, &Service)> {
        self.services.iter()
    }

    /// Every slice with a Service's name on it.
    pub fn slices(&self) -> impl Iterator<Item = (&ObjectName, &Slice)> {
        self.slices.iter()
    }

    /// Number of Services that are proxied.
    #[must_use]
    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    /// Number of endpoints in all slices.
    #[must_use]
    pub fn endpoint_count(&self) -> usize {
        self.slices.values().map(|slice| slice.endpoints.len()).sum()
    }

    /// Whether everything the source has was understood at least once.
    #[must_use]
    pub fn whole(&self) -> bool {
        self.whole
    }

    /// Whether the source answers.
    #[must_use]
    pub fn connected(&self) -> bool {
        self.connected
    }

    /// What is wrong with the input, destinations that another Service owns included; by object.
    #[must_use]
    pub fn warnings(&self) -> Vec<Warning> {
        let conflicts = self.owners.conflicts().take(MAX_CONFLICTS).map(|(key, loser, owner)| Warning {
            object: format!("Service {}", loser.service),
            line: format!(
                "{} is held by Service {}, which comes first (ClusterIPs, then age, then name)",
                destination(key),
                owner.service
            ),
        });
        let mut all: Vec<Warning> = self.warnings.iter().chain(conflicts).collect();
        all.extend(self.no_pod_cidrs());
        all.extend(self.covering_ranges());
        let not_served = |(name, all): (&ObjectName, &Vec<(FrontendKey, InUse)>)| {
            let lines = all.iter().filter_map(|(key, by)| why_not_served(key, by));
            lines.map(|line| Warning { object: format!("Service {name}"), line }).collect::<Vec<_>>()
        };
        all.extend(self.in_use.iter().flat_map(not_served));
        all.sort();
        all.dedup();
        all
    }

    /// What should be known and is as it should be; by object.
    #[must_use]
    pub fn notes(&self) -> Vec<Warning> {
        let mut all = Vec::new();
        for (name, used) in &self.in_use {
            for (key, by) in used {
                if let InUse::ByLocalService(device) = by {
                    all.push(Warning {
                        object: format!("Service {name}"),
                        line: format!(
                            "{} is served on this node by what has bound it on {device} (such as NodeLocal DNSCache), \
                             and by the Service again when that goes",
                            destination(key)
                        ),
                    });
                }
            }
        }
        all
    }

    /// Ranges of ClusterIPs with something else in them.
    fn covering_ranges(&self) -> Vec<Warning> {
        let ranges =
            self.service_ranges.iter().flat_map(|(name, ranges)| ranges.iter().map(move |r| (name, r)));
        let drops = self.settings.drop_unallocated;
        let warning = |(name, range): (&String, &IpNet)| {
            let inside = self.lies_inside(range)?;
            let line = format!(
                "{range} covers {inside}: packets to addresses of no Service in it are not dropped; give Services \
                 a range of their own"
            );
            Some(Warning { object: format!("ServiceCIDR {name}"), line })
        };
        ranges.filter(|_| drops).filter_map(warning).collect()
    }

    /// A Node whose podCIDRs were asked for and are not there: kube-proxy would not start (Y-9).
    fn no_pod_cidrs(&self) -> Option<Warning> {
        let wanted = self.settings.detect_local == DetectLocal::NodeCidr;
        (wanted && self.synced() && self.last_node.pod_cidrs.is_empty()).then(|| Warning {
            object: format!("Node {}", self.settings.node_name),
            line: "has no podCIDRs: until it has, no source counts as a pod (--detect-local-mode NodeCIDR)"
                .to_owned(),
        })
    }

    /// The `healthCheckNodePort`s to serve, with their counts (H-14, H-20).
    #[must_use]
    pub fn health_checks(&self) -> Vec<HealthCheck> {
        let with_port = self.services.iter().filter(|(_, service)| service.health_check_node_port != 0);
        with_port
            .flat_map(|(name, service)| {
                service.cluster_ips.iter().map(|ip| HealthCheck {
                    service: name.clone(),
                    family: Family::of(ip),
                    port: service.health_check_node_port,
                    local_endpoints: self.local_ready(name, service, Family::of(ip)),
                })
            })
            .collect()
    }

    /// Where NodePorts of a family are accepted, and health checks are served (H-15).
    #[must_use]
    pub fn node_port_addresses(&self, family: Family) -> Accepted {
        tables::accepted(&self.settings, &self.last_node, &self.links, family)
    }

    /// Service ports that are programmed with policy Local and without an endpoint of this node, of those for
    /// which there are endpoints elsewhere (H-42).
    #[must_use]
    pub fn without_local_endpoints(&self) -> NoLocalByFamily {
        let mut count = NoLocalByFamily::default();
        let local = self.services.iter().filter(|(_, s)| s.internal_local || s.external_local);
        local.filter_map(|(name, _)| self.taken.get(name)).for_each(|ports| count.add(ports));
        count
    }

    /// Whether an endpoint has left a Service port that is still there and wants to know: no slice names it any more.
    #[must_use]
    pub fn has_left(&self, owner: &ServicePort, endpoint: (IpAddr, u16)) -> bool {
        let there = |service: &&Service| {
            service.reset_on_loss
                && service.ports.iter().any(|port| port.name == owner.port && port.proto == owner.proto)
        };
        self.services.get(&owner.service).is_some_and(|service| there(&service))
            && !merge(owner, self.slices_of(&owner.service)).contains_key(&endpoint)
    }

    /// A slice, as last reported.
    #[must_use]
    pub fn slice(&self, name: &ObjectName) -> Option<&Slice> {
        self.slices.get(name)
    }

    fn local_ready(&self, name: &ObjectName, service: &Service, family: Family) -> usize {
        let mut ips: BTreeSet<IpAddr> = BTreeSet::new();
        for wanted in super::frontends::wanted(name, service) {
            if wanted.owner.family == family {
                let endpoints = merge(&wanted.owner, self.slices_of(name));
                let ready = endpoints.values().filter(|e| e.ready && self.here.is_local(e));
                ips.extend(ready.map(|endpoint| endpoint.ip));
            }
        }
        ips.len()
    }

    fn apply_service(&mut self, name: ObjectName, service: Option<Service>) -> bool {
        let service = service.map(|service| self.permitted(service));
        if self.services.get(&name) == service.as_ref() {
            return false;
        }
        let moved = self.owners.replace(&name, service.as_ref());
        self.stale.extend(moved);
        let own = |service: &Service| {
            let Service { cluster_ips, external_ips, load_balancer_ips, .. } = service;
            let mut all = cluster_ips.iter().chain(external_ips).chain(load_balancer_ips);
            all.any(|ip| self.here.addresses.contains(ip))
        };
        let near = self.services.get(&name).is_some_and(own) || service.as_ref().is_some_and(own);
        match service {
            Some(service) => self.services.insert(name.clone(), service),
            None => self.services.remove(&name),
        };
        self.stale.insert(name);
        if near {
            self.look_around(); // M-13: an address of an interface became a Service's, or ceased to be.
        }
        true
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

    fn apply_routes(&mut self, routes: Vec<Route>) -> bool {
        if self.routes == routes {
            return false;
        }
        self.routes = routes;
        let before = std::mem::take(&mut self.around);
        self.look_around();
        // Of many routes few matter.
        (&before.sources, &before.uplinks) != (&self.around.sources, &self.around.uplinks)
    }

    /// Notes which destinations of a Service the node or its pods use.
    fn note_in_use(&mut self, name: &ObjectName) {
        let found = self.services.get(name).map(|service| destinations_in_use(name, service, &self.here));
        match found.filter(|found| !found.is_empty()) {
            Some(found) => drop(self.in_use.insert(name.clone(), found)),
            None => drop(self.in_use.remove(name)),
        }
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

    /// A Service without what is switched off: a family (S-12), external IPs (V-8).
    fn permitted(&self, mut service: Service) -> Service {
        let families = self.settings.families();
        service.cluster_ips.retain(|ip| families.contains(&Family::of(ip)));
        if !self.settings.external_ips {
            service.external_ips.clear();
        }
        service
    }

    fn apply_slice(&mut self, name: ObjectName, slice: Option<Slice>) -> bool {
        let slice = slice.map(|slice| sorted(slice, &mut self.names));
        if self.slices.get(&name) == slice.as_ref() {
            return false;
        }
        if let Some(slice) = &slice {
            self.count_pods(slice, true);
        }
        // E-7: a slice that changes hands leaves its old Service.
        if let Some(old) = self.slices.remove(&name) {
            self.count_pods(&old, false);
            if let Some(names) = self.slices_of.get_mut(&old.service) {
                names.remove(&name);
                if names.is_empty() {
                    self.slices_of.remove(&old.service);
                }
            }
            self.stale.insert(old.service);
        }
        if let Some(slice) = slice {
            self.slices_of.entry(slice.service.clone()).or_default().insert(name.clone());
            self.stale.insert(slice.service.clone());
            self.slices.insert(name, slice);
        }
        true
    }

    fn apply_node(&mut self, node: Option<Node>) -> bool {
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

    /// Y-16: in force with the next pass, whose node tables are compared each time.
    fn apply_service_ranges(&mut self, name: String, ranges: Option<Vec<IpNet>>) -> bool {
        let changed = match ranges {
            Some(ranges) => self.service_ranges.insert(name, ranges.clone()) != Some(ranges),
            None => self.service_ranges.remove(&name).is_some(),
        };
        if changed {
            let inside =
                |ip: &&IpAddr| self.service_ranges.values().flatten().any(|range| range.contains(*ip));
            self.pods_in_ranges = self.here.local.pods().filter(inside).copied().collect();
            self.trust_ranges();
        }
        changed
    }

    fn apply_links(&mut self, mut links: Vec<Link>) -> bool {
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

    fn compile(&self, name: &ObjectName) -> Ports {
        match self.services.get(name) {
            Some(service) => compile(name, service, self.slices_of(name), &self.here, &self.owners),
            None => Ports::new(),
        }
    }

    fn slices_of(&self, name: &ObjectName) -> impl Iterator<Item = &Slice> + Clone {
        self.slices_of.get(name).into_iter().flatten().filter_map(|slice| self.slices.get(slice))
    }
}

/// Why a Service does not get a destination; nothing where it is meant to be so.
fn why_not_served(key: &FrontendKey, by: &InUse) -> Option<String> {
    let why = match by {
        InUse::ByLocalService(_) => return None,
        InUse::ByInterface(name) => format!("the address is the node's, on {name}"),
        InUse::ByNode => "the address is the node's, by its Node object".to_owned(),
        InUse::ByPod => "the address is that of a pod".to_owned(),
        InUse::ByPodRange(range) => format!("the address lies in the node's pod range {range}"),
        InUse::ByAgent => "the agent serves health and metrics there".to_owned(),
    };
    let remedy = if *by == InUse::ByAgent { "port" } else { "address" };
    Some(format!("{} is not served, because {why}; give the Service another {remedy}", destination(key)))
}

/// A destination for a person.
fn destination(key: &FrontendKey) -> String {
    if key.addr.is_unspecified() {
        format!("NodePort {}/{}", key.port, key.proto)
    } else if key.addr.is_v4() {
        format!("{}:{}/{}", key.addr, key.port, key.proto)
    } else {
        format!("[{}]:{}/{}", key.addr, key.port, key.proto)
    }
}

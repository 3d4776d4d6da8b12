//! World: everything heard so far, and what follows from it for the tables.
//!
//! A change marks the Services it touches; only those are compiled again, and only what really differs from
//! the last time is handed on. The cost of a change does not depend on how many Services there are.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use proxy_common::abi::{FrontendKey, config};

use super::claims::Claims;
use super::compile::{Here, compile, objections};
use super::local::{Local, Owner};
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

/// Warnings about contested destinations that are told; the rest is the same story.
const MAX_CONTESTED: usize = 1_000;

/// Everything heard so far.
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
    /// Destinations that Services do not get.
    objections: BTreeMap<ObjectName, Vec<(FrontendKey, Owner)>>,
    claims: Claims,
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
    /// Nothing heard yet.
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
            objections: BTreeMap::new(),
            claims: Claims::default(),
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

    /// Takes a change in; tells whether it changed anything.
    pub fn hear(&mut self, change: Change) -> bool {
        match change {
            Change::Service(name, service) => self.hear_service(name, service),
            Change::Slice(name, slice) => self.hear_slice(name, slice),
            Change::Node(node) => self.hear_node(node),
            Change::ServiceRanges(name, ranges) => self.hear_service_ranges(name, ranges),
            Change::Links(links) => self.hear_links(links),
            Change::Routes(routes) => self.hear_routes(routes),
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
            self.object(&name);
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
        self.objections.clear();
        for name in self.services.keys().cloned().collect::<Vec<_>>() {
            self.object(&name);
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
            node_tables(&self.settings, &self.last_node, &self.links, &self.around, &self.claims, &ranges);
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

    /// The family of the node's first address (Y-10), as last heard.
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

    /// What is wrong with the input, contested destinations included; by object.
    #[must_use]
    pub fn warnings(&self) -> Vec<Warning> {
        let contested = self.claims.lost().take(MAX_CONTESTED).map(|(key, loser, holder)| Warning {
            object: format!("Service {}", loser.service),
            line: format!(
                "{} is held by Service {}, which comes first (ClusterIPs, then age, then name)",
                destination(key),
                holder.service
            ),
        });
        let mut all: Vec<Warning> = self.warnings.iter().chain(contested).collect();
        all.extend(self.no_pod_cidrs());
        all.extend(self.covering_ranges());
        let objected = |(name, all): (&ObjectName, &Vec<(FrontendKey, Owner)>)| {
            let lines = all.iter().filter_map(|(key, owner)| objection(key, owner));
            lines.map(|line| Warning { object: format!("Service {name}"), line }).collect::<Vec<_>>()
        };
        all.extend(self.objections.iter().flat_map(objected));
        all.sort();
        all.dedup();
        all
    }

    /// What should be known and is as it should be; by object.
    #[must_use]
    pub fn notes(&self) -> Vec<Warning> {
        let mut all = Vec::new();
        for (name, taken) in &self.objections {
            for (key, owner) in taken {
                if let Owner::LocalService(device) = owner {
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

    /// A slice, as last heard of.
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

    fn hear_service(&mut self, name: ObjectName, service: Option<Service>) -> bool {
        let service = service.map(|service| self.permitted(service));
        if self.services.get(&name) == service.as_ref() {
            return false;
        }
        let moved = self.claims.replace(&name, service.as_ref());
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
        self.around = Around::look(&self.settings, &self.last_node, &self.links, &self.routes, &self.claims);
    }

    /// Marks the Services that claim one of these addresses.
    fn changed_hands(&mut self, moved: &[IpAddr]) {
        let claimed = |ip: &&IpAddr| self.claims.is_service_address(&(**ip).into());
        let moved: HashSet<&IpAddr> = moved.iter().filter(claimed).collect();
        if moved.is_empty() {
            return;
        }
        let claims = |service: &Service| {
            let Service { cluster_ips, external_ips, load_balancer_ips, .. } = service;
            cluster_ips.iter().chain(external_ips).chain(load_balancer_ips).any(|ip| moved.contains(ip))
        };
        let claimants = self.services.iter().filter(|(_, service)| claims(service));
        self.stale.extend(claimants.map(|(name, _)| name.clone()));
    }

    /// Which ranges of ClusterIPs hold nothing of the node's or the cluster's pods.
    fn trust_ranges(&mut self) {
        let covers = |range: &IpNet| {
            let pods = self.settings.cluster_cidrs.iter().any(|pods| range.contains(pods));
            pods || self.here.local.inside(range).is_some()
        };
        let trusted = self.service_ranges.values().flatten().filter(|range| !covers(range)).copied();
        let trusted = trusted.collect();
        let moved = self.here.local.hear_service_ranges(trusted);
        self.changed_hands(&moved);
    }

    fn hear_routes(&mut self, routes: Vec<Route>) -> bool {
        if self.routes == routes {
            return false;
        }
        self.routes = routes;
        let before = std::mem::take(&mut self.around);
        self.look_around();
        // Of many routes few matter.
        (&before.sources, &before.uplinks) != (&self.around.sources, &self.around.uplinks)
    }

    /// Takes note of what a Service does not get.
    fn object(&mut self, name: &ObjectName) {
        let found = self.services.get(name).map(|service| objections(name, service, &self.here));
        match found.filter(|found| !found.is_empty()) {
            Some(found) => drop(self.objections.insert(name.clone(), found)),
            None => drop(self.objections.remove(name)),
        }
    }

    /// Takes a slice's pods in, or out.
    fn hear_pods(&mut self, slice: &Slice, comes: bool) {
        let moved = self.here.local.hear_slice(slice, comes);
        self.changed_hands(&moved);
        for ip in moved {
            if !comes {
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

    fn hear_slice(&mut self, name: ObjectName, slice: Option<Slice>) -> bool {
        let slice = slice.map(|slice| sorted(slice, &mut self.names));
        if self.slices.get(&name) == slice.as_ref() {
            return false;
        }
        if let Some(slice) = &slice {
            self.hear_pods(slice, true);
        }
        // E-7: a slice that changes hands leaves its old Service.
        if let Some(old) = self.slices.remove(&name) {
            self.hear_pods(&old, false);
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

    fn hear_node(&mut self, node: Option<Node>) -> bool {
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
            let moved = self.here.local.hear(&self.last_node, &self.links);
            self.changed_hands(&moved);
            if self.here.local.hear_pod_cidrs(&node.pod_cidrs) {
                self.stale.extend(self.services.keys().cloned());
            }
            self.trust_ranges();
            self.look_around();
        }
        self.node = node;
        true
    }

    /// Y-16: in force with the next pass, whose node tables are compared each time.
    fn hear_service_ranges(&mut self, name: String, ranges: Option<Vec<IpNet>>) -> bool {
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

    fn hear_links(&mut self, mut links: Vec<Link>) -> bool {
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
        let moved = self.here.local.hear(&self.last_node, &self.links);
        self.changed_hands(&moved);
        self.trust_ranges();
        self.look_around();
        true
    }

    fn compile(&self, name: &ObjectName) -> Ports {
        match self.services.get(name) {
            Some(service) => compile(name, service, self.slices_of(name), &self.here, &self.claims),
            None => Ports::new(),
        }
    }

    fn slices_of(&self, name: &ObjectName) -> impl Iterator<Item = &Slice> + Clone {
        self.slices_of.get(name).into_iter().flatten().filter_map(|slice| self.slices.get(slice))
    }
}

/// Why a Service does not get a destination; nothing where it is meant to be so.
fn objection(key: &FrontendKey, owner: &Owner) -> Option<String> {
    let whose = match owner {
        Owner::LocalService(_) => return None,
        Owner::Interface(name) => format!("the address is the node's, on {name}"),
        Owner::Node => "the address is the node's, by its Node object".to_owned(),
        Owner::Pod => "the address is that of a pod".to_owned(),
        Owner::PodRange(range) => format!("the address lies in the node's pod range {range}"),
        Owner::Agent => "the agent serves health and metrics there".to_owned(),
    };
    let remedy = if *owner == Owner::Agent { "port" } else { "address" };
    Some(format!("{} is not served, because {whose}; give the Service another {remedy}", destination(key)))
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

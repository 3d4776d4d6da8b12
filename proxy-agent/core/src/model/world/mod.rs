//! World: everything reported so far, and what follows from it for the tables.
//!
//! A change marks the Services it touches; only those are compiled again, and only what really differs from
//! the last time is handed on. The cost of a change does not depend on how many Services there are.

mod apply;
mod direct;
mod health;
mod pending;
mod taken;
mod warn;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_common::abi::FrontendKey;

use self::health::Checks;
pub use self::health::HealthCheck;
use self::taken::Taken;
use super::compile::Here;
use super::conflicts::Owners;
use super::drivers;
use super::local::{Local, UsedBy};
use super::merge::merge;
use super::names::Names;
use super::tables::Around;
use super::warnings::Warnings;
use super::{
    AtDriver, Change, Drivers, Family, Kind, Link, Node, NodeIps, ObjectName, Peers, Route, Service,
    ServicePort, Settings, Slice, SocketLb, Urgency,
};
use crate::few::Few;

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
    slices_of: HashMap<ObjectName, Few<ObjectName>>,
    /// How many Services have direct server return.
    direct_services: usize,
    /// The agents that slices of their Service name.
    peers: Arc<Peers>,
    /// In all slices.
    endpoints: usize,
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
    in_use: BTreeMap<ObjectName, Vec<(FrontendKey, UsedBy)>>,
    owners: Owners,
    warnings: Warnings,
    names: Names,
    synced: HashSet<Kind>,
    links_known: bool,
    connected: bool,
    whole: bool,
    /// Services to compile again.
    stale: BTreeSet<ObjectName>,
    taken: Taken,
    checks: Checks,
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
            direct_services: 0,
            peers: Arc::default(),
            endpoints: 0,
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
            taken: Taken::default(),
            checks: Checks::default(),
        }
    }

    /// Applies a change. Unless it changed nothing it says how soon that has to be in the tables; nothing but Services and
    /// their endpoints is in a hurry.
    pub fn apply(&mut self, change: Change) -> Option<Urgency> {
        let news = match change {
            Change::Service(name, service) => return self.apply_service(name, service),
            Change::Slice(name, slice) => return self.apply_slice(name, slice),
            Change::Node(node) => self.apply_node(node),
            Change::ServiceRanges(name, ranges) => self.apply_service_ranges(name, ranges),
            Change::Links(links) => self.apply_links(links),
            Change::Routes(routes) => self.apply_routes(routes),
            Change::Synced(kind) => self.synced.insert(kind),
            Change::Warnings { object, lines } => self.warnings.replace(object, lines),
            Change::Whole(whole) => std::mem::replace(&mut self.whole, whole) != whole,
            Change::Triggered(..) | Change::Repeated(_) | Change::Excluded(..) => false,
            Change::Connected(connected) => std::mem::replace(&mut self.connected, connected) != connected,
        };
        news.then_some(Urgency::Settled)
    }

    /// Whether every kind of object has been listed and the links are known. Before that nothing may be
    /// programmed: half a world would take away what works (Y-17).
    #[must_use]
    pub fn synced(&self) -> bool {
        self.links_known
            && [Kind::Service, Kind::Slice, Kind::Node].iter().all(|kind| self.synced.contains(kind))
    }

    /// Whether sockets of pods are translated by their packets, whatever the settings say; true when that is news. One that
    /// connects straight to an endpoint may be given a port that a connection has there that was begun otherwise: a pod's kernel
    /// tells ports apart by the address that was asked for.
    pub fn set_pods_by_packet(&mut self, wanted: bool) -> bool {
        std::mem::replace(&mut self.pods_by_packet, wanted) != wanted
            && self.settings.socket_lb == SocketLb::All
    }

    /// What is left to another proxy on this node: bits of [`proxy_common::abi::config`].
    pub fn set_leave(&mut self, bits: u32) {
        self.leave = bits;
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

    /// The interfaces whose drivers are to carry a program.
    #[must_use]
    pub fn at_drivers(&self, mode: Drivers) -> Vec<AtDriver> {
        drivers::at_drivers(mode, &self.links, &self.around.uplinks)
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
        self.endpoints
    }

    /// The agents of all nodes, as far as their Service (`--agents-service`) has endpoints.
    #[must_use]
    pub fn peers(&self) -> &Arc<Peers> {
        &self.peers
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

    fn slices_of(&self, name: &ObjectName) -> impl Iterator<Item = &Slice> + Clone {
        self.slices_of.get(name).into_iter().flatten().filter_map(|slice| self.slices.get(slice))
    }
}

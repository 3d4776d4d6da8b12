//! What the node and its pods use already: a Service that asks for it does not get it.
//!
//! A ClusterIP is the cluster's to give: one that equals an address of the node or of a pod is a mistake of somebody's,
//! and serving it would cut the node or the pod off. That an address is a pod's is the word of an EndpointSlice, which
//! many may write; inside a range that the API server gives ClusterIPs from, its word for the Service counts more.
//! External and load-balancer IPs may well be the node's own (V-7); pods' they may not be. An address bound on a device for local services (NodeLocal DNSCache) is taken on purpose.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_common::abi::{FrontendKey, frontend};
use proxy_common::addr::Proto;

use super::node::is_global;
use super::pods::Pods;
use super::{Link, Node, Slice};

/// Who uses an address already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum UsedBy {
    /// A service of this node alone, by its device.
    LocalService(Arc<str>),
    /// The node, by the interface.
    Interface(Arc<str>),
    /// The node, by its object.
    Node,
    /// A pod.
    Pod,
    /// A pod of the node has or will have it.
    PodRange(IpNet),
    /// The agent listens there.
    Agent,
}

impl UsedBy {
    /// Whether it is meant to be so.
    pub(super) fn is_meant(&self) -> bool {
        matches!(self, Self::LocalService(_))
    }
}

/// All that is in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Local {
    /// Of the node.
    own: BTreeMap<IpAddr, UsedBy>,
    pods: Pods,
    pod_cidrs: Vec<IpNet>,
    /// Ranges of ClusterIPs and nothing else.
    service_ranges: Vec<IpNet>,
    /// Ports that the agent serves.
    ports: Vec<u16>,
}

impl Local {
    pub(super) fn new(ports: &[u16]) -> Self {
        Self { ports: ports.to_vec(), ..Self::default() }
    }

    /// Replaces what the node has; returns the addresses that changed hands.
    pub(super) fn set_node(&mut self, node: &Node, links: &[Link]) -> Vec<IpAddr> {
        let mut own: BTreeMap<IpAddr, UsedBy> = node.ips.iter().map(|ip| (*ip, UsedBy::Node)).collect();
        for link in links.iter().filter(|link| !link.holds_cluster_ips()) {
            for ip in link.addresses.iter().map(IpNet::addr).filter(is_global) {
                let name = link.name.clone();
                let service = link.holds_local_services();
                own.insert(ip, if service { UsedBy::LocalService(name) } else { UsedBy::Interface(name) });
            }
        }
        let changed = self.own.keys().chain(own.keys()).filter(|ip| self.own.get(ip) != own.get(ip));
        let changed = changed.copied().collect();
        self.own = own;
        changed
    }

    /// Replaces the node's pod ranges; says whether they changed.
    pub(super) fn set_pod_cidrs(&mut self, ranges: &[IpNet]) -> bool {
        let changed = self.pod_cidrs != ranges;
        ranges.clone_into(&mut self.pod_cidrs);
        changed
    }

    /// Replaces the ranges that ClusterIPs, and nothing else that is known, come from; returns the addresses that became or
    /// ceased to be pods'.
    pub(super) fn set_service_ranges(&mut self, ranges: Vec<IpNet>) -> Vec<IpAddr> {
        if self.service_ranges == ranges {
            return Vec::new();
        }
        let was = std::mem::replace(&mut self.service_ranges, ranges);
        let inside = |ranges: &[IpNet], ip: &IpAddr| ranges.iter().any(|range| range.contains(ip));
        self.pods().filter(|ip| inside(&was, ip) != inside(&self.service_ranges, ip)).collect()
    }

    /// Adds or removes a slice; returns the addresses that became or ceased to be pods'.
    pub(super) fn count_slice(&mut self, slice: &Slice, added: bool) -> Vec<IpAddr> {
        let mut changed = Vec::new();
        // Endpoints without a node are written by hand, and may be anything.
        for ip in
            slice.endpoints.iter().filter(|endpoint| endpoint.node.is_some()).map(|endpoint| endpoint.ip)
        {
            if if added { self.pods.insert(ip) } else { self.pods.remove(ip) } {
                changed.push(ip);
            }
        }
        changed
    }

    /// Every pod that is known.
    pub(super) fn pods(&self) -> impl Iterator<Item = IpAddr> {
        self.pods.iter()
    }

    /// Who uses a destination already; nobody does most.
    pub(super) fn in_use(&self, key: &FrontendKey, flags: u32) -> Option<UsedBy> {
        if flags & frontend::NODE_PORT != 0 {
            let taken = key.proto == Proto::TCP && self.ports.contains(&key.port.number());
            return taken.then_some(UsedBy::Agent);
        }
        let ip = IpAddr::from(key.addr);
        let own = self.own.get(&ip);
        let in_range =
            || self.pod_cidrs.iter().find(|range| range.contains(&ip)).copied().map(UsedBy::PodRange);
        if flags & frontend::INTERNAL == 0 {
            return if own.is_some() { None } else { in_range() };
        }
        let is_pod =
            || self.pods.contains(ip) && !self.service_ranges.iter().any(|range| range.contains(&ip));
        own.cloned().or_else(|| is_pod().then_some(UsedBy::Pod)).or_else(in_range)
    }

    /// What of the node or its pods lies inside a range of ClusterIPs, in words.
    pub(super) fn inside(&self, range: &IpNet) -> Option<String> {
        // What holds ClusterIPs on purpose is none of it.
        let mut own = self.own.iter().filter(|(_, owner)| !owner.is_meant());
        let pods = |range: &IpNet, pods: &&IpNet| range.contains(*pods) || pods.contains(range);
        let cidr = self.pod_cidrs.iter().find(|cidr| pods(range, cidr));
        cidr.map(|cidr| format!("the node's pod range {cidr}")).or_else(|| {
            own.find(|(ip, _)| range.contains(*ip)).map(|(ip, _)| format!("the node's address {ip}"))
        })
    }
}

//! A small cluster as Kubernetes would describe it, drawn from small pools so that its parts collide.

use std::collections::BTreeMap;
use std::net::IpAddr;

use agent_core::model::{LoadBalancerMode, SocketLb};
use ipnet::IpNet;
use proxy_common::addr::Proto;

/// Own node name.
pub(crate) const OWN_NODE: &str = "n1";
/// Nodes by number; endpoints of no node have none.
pub(crate) const NODES: [&str; 3] = [OWN_NODE, "n2", "n3"];
/// Zones by number.
pub(crate) const ZONES: [&str; 3] = ["a", "b", "c"];
/// Both families.
pub(crate) const FAMILIES: [bool; 2] = [false, true];

/// Ports a Service may have: name, protocol, number.
pub(crate) const PORTS: [(&str, Proto, u16); 4] =
    [("", Proto::TCP, 80), ("dns", Proto::UDP, 53), ("dns-tcp", Proto::TCP, 53), ("s", Proto::SCTP, 80)];

/// Ports a slice may have: name, protocol, number; `None` stands for a missing field.
pub(crate) const SLICE_PORTS: [(Option<&str>, Option<Proto>, Option<u16>); 9] = [
    (Some(""), Some(Proto::TCP), Some(8080)),
    (Some("dns"), Some(Proto::UDP), Some(5353)),
    (Some("dns-tcp"), None, Some(5353)),
    (Some("s"), Some(Proto::SCTP), Some(9000)),
    (Some(""), Some(Proto::TCP), Some(8081)),
    (Some("dns"), Some(Proto::TCP), Some(5353)),
    (Some("s"), Some(Proto::UDP), Some(9000)),
    (Some(""), Some(Proto::TCP), None),
    (None, Some(Proto::TCP), Some(8080)),
];

/// `v4` or `v6` as a test names them.
pub(crate) fn ip(v4: &str, v6: &str, six: bool) -> IpAddr {
    let text = if six { v6 } else { v4 };
    text.parse().unwrap_or_else(|_| panic!("{text} is an address"))
}

/// ClusterIPs by number.
pub(crate) fn cluster_ip(n: u8, six: bool) -> IpAddr {
    ip(&format!("10.96.0.{n}"), &format!("fd00:96::{n}"), six)
}

/// Addresses outside the cluster by number: 1 to 3 are pure VIPs, 4 is a ClusterIP, 5 an own address.
pub(crate) fn vip(n: u8, six: bool) -> IpAddr {
    match n {
        4 => cluster_ip(1, six),
        5 => own_addresses(six)[1],
        _ => ip(&format!("203.0.113.{n}"), &format!("2001:db8:113::{n}"), six),
    }
}

/// Addresses this node may have: two at the uplink, then the one at the bridge of the pods.
pub(crate) fn own_addresses(six: bool) -> [IpAddr; 3] {
    [
        ip("192.168.10.1", "fd00:10::1", six),
        ip("172.16.0.1", "fd00:16::1", six),
        ip("10.244.1.254", "fd00:244:1::fe", six),
    ]
}

/// Addresses of endpoints by number: three on each node, then a process of this node, then one of no node.
pub(crate) fn endpoint_ip(n: u8, six: bool) -> IpAddr {
    match n {
        0..9 => {
            let (node, pod) = (n / 3 + 1, n % 3 + 10);
            ip(&format!("10.244.{node}.{pod}"), &format!("fd00:244:{node}::{pod}"), six)
        }
        9 => own_addresses(six)[0],
        _ => ip("198.51.100.200", "2001:db8:51::200", six),
    }
}

/// The node of an endpoint by number.
pub(crate) fn endpoint_node(n: u8) -> Option<&'static str> {
    match n {
        0..9 => Some(NODES[usize::from(n / 3)]),
        9 => Some(OWN_NODE),
        _ => None,
    }
}

/// Source ranges by number; those from 5 on are not ranges that restrict anything.
pub(crate) fn source_range(n: u8) -> &'static str {
    [
        "198.51.100.0/24",
        " 192.168.10.0/24",
        "10.244.1.11/32",
        "2001:db8:51::/48",
        "fd00:10::/64",
        "garbage",
        "0.0.0.0/0",
    ][usize::from(n)]
}

/// A Service as its owner wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServiceFacts {
    /// `spec.type`.
    pub(crate) kind: &'static str,
    /// Number of its ClusterIP; `None` is headless.
    pub(crate) cluster_ip: Option<u8>,
    /// IPv4, IPv6.
    pub(crate) families: [bool; 2],
    /// Indices into [`PORTS`] with NodePorts (0 for none).
    pub(crate) ports: BTreeMap<usize, u16>,
    /// Numbers of [`vip`].
    pub(crate) external_ips: Vec<u8>,
    /// Numbers of [`vip`] with `ipMode`.
    pub(crate) ingress: Vec<(u8, Option<&'static str>)>,
    /// Numbers of [`source_range`].
    pub(crate) ranges: Vec<u8>,
    /// `sessionAffinity: ClientIP`, and its time-out in seconds if one is given.
    pub(crate) affinity: Option<Option<u32>>,
    /// `internalTrafficPolicy`.
    pub(crate) internal: Option<&'static str>,
    /// `externalTrafficPolicy`.
    pub(crate) external: Option<&'static str>,
    /// Day of creation.
    pub(crate) day: u8,
    /// Whether it belongs to another proxy (S-1).
    pub(crate) foreign: bool,
    /// What it says of who answers clients from outside.
    pub(crate) mode: Option<&'static str>,
}

/// One endpoint as a slice shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EndpointFacts {
    /// Number of [`endpoint_ip`].
    pub(crate) n: u8,
    /// Whether its address is of the other family than the slice.
    pub(crate) stray: bool,
    /// `ready`, `serving`, `terminating`.
    pub(crate) conditions: [Option<bool>; 3],
}

/// A slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SliceFacts {
    /// Number of its Service.
    pub(crate) service: u8,
    /// Whether it is of IPv6.
    pub(crate) six: bool,
    /// Indices into [`SLICE_PORTS`].
    pub(crate) ports: Vec<usize>,
    /// Its endpoints.
    pub(crate) endpoints: Vec<EndpointFacts>,
}

/// The node's own object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NodeFacts {
    /// Number of its zone.
    pub(crate) zone: Option<u8>,
    /// Which of [`own_addresses`] is the primary one.
    pub(crate) primary: usize,
}

/// Zone and node hints of an endpoint, by number.
pub(crate) type Hints = (Vec<u8>, Vec<u8>);

/// How pods are recognised (M-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detect {
    /// By their addresses.
    Range,
    /// By the bridge they are behind.
    Bridge,
    /// By the first letters of that bridge's name.
    Prefix,
    /// By an interface that is not there.
    Nothing,
}

/// What the operator has set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Operator {
    /// `--cluster-cidr`.
    pub(crate) cluster_cidrs: Vec<IpNet>,
    /// `spec.podCIDRs` of the node, used when there is no `--cluster-cidr`.
    pub(crate) pod_cidrs: Vec<IpNet>,
    /// `--masquerade-all`.
    pub(crate) masquerade_all: bool,
    /// `--masquerade-local`.
    pub(crate) masquerade_local: bool,
    /// `--loadbalancer-mode`: it decides who answers, and nothing that is asked here.
    pub(crate) loadbalancer_mode: LoadBalancerMode,
    /// `--nodeport-addresses`; `None` is `primary`.
    pub(crate) node_port_ranges: Option<Vec<IpNet>>,
    /// Whether the node has IPv6 at all.
    pub(crate) ipv6: bool,
    /// Feature gate `AllowServiceExternalIPs`.
    pub(crate) external_ips: bool,
    /// `--detect-local-mode`.
    pub(crate) detect: Detect,
    /// `--drop-unallocated-cluster-ips`.
    pub(crate) drop_unallocated: bool,
    /// `--socket-lb`.
    pub(crate) socket_lb: SocketLb,
    /// `--localhost-nodeports`.
    pub(crate) localhost_node_ports: bool,
}

/// Everything.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// Settings.
    pub(crate) operator: Operator,
    /// Services by number.
    pub(crate) services: BTreeMap<u8, ServiceFacts>,
    /// Slices by number.
    pub(crate) slices: BTreeMap<u8, SliceFacts>,
    /// Hints by number of the endpoint: wherever it is listed it carries the same, since which of two wins is
    /// not laid down (E-21).
    pub(crate) hints: Vec<Hints>,
    /// The node's object, once there is one.
    pub(crate) node: Option<NodeFacts>,
    /// Which of [`own_addresses`] the node has; always the first.
    pub(crate) has: [bool; 3],
    /// The ServiceCIDRs that are known.
    pub(crate) ranges: Vec<IpNet>,
}

/// One edit of the cluster.
#[derive(Clone, Debug)]
pub(crate) enum Edit {
    /// A Service appears, changes or goes.
    Service(u8, Option<ServiceFacts>),
    /// A slice appears, changes or goes.
    Slice(u8, Option<SliceFacts>),
    /// An endpoint of a slice changes its conditions.
    Conditions(u8, usize, [Option<bool>; 3]),
    /// Endpoints get other hints.
    Hints(Vec<Hints>),
    /// The node's object appears or changes.
    Node(NodeFacts),
    /// Addresses of the node appear or go.
    Links([bool; 3]),
    /// ServiceCIDRs change.
    Ranges(Vec<IpNet>),
    /// The agent starts anew.
    Restart,
    /// So many seconds pass.
    Rest(u32),
}

/// What has to be observed again after edits.
#[derive(Debug, Default)]
pub(crate) struct Stale {
    /// Numbers of Services.
    pub(crate) services: Vec<u8>,
    /// Numbers of slices.
    pub(crate) slices: Vec<u8>,
    /// The node's object.
    pub(crate) node: bool,
    /// The node's links.
    pub(crate) links: bool,
    /// The ServiceCIDRs.
    pub(crate) ranges: bool,
}

impl Facts {
    /// The addresses the node has, in one family.
    pub(crate) fn own(&self, six: bool) -> Vec<IpAddr> {
        own_addresses(six).into_iter().zip(self.has).filter(|(_, has)| *has).map(|(ip, _)| ip).collect()
    }

    /// The node's primary address (Y-10); without its object the first it has.
    pub(crate) fn primary(&self, six: bool) -> IpAddr {
        own_addresses(six)[self.node.as_ref().map_or(0, |node| node.primary)]
    }

    /// Carries an edit out.
    pub(crate) fn edit(&mut self, edit: &Edit, stale: &mut Stale) {
        match edit {
            Edit::Service(n, facts) => {
                set(&mut self.services, *n, facts.as_ref());
                stale.services.push(*n);
            }
            Edit::Slice(n, facts) => {
                set(&mut self.slices, *n, facts.as_ref());
                stale.slices.push(*n);
            }
            Edit::Conditions(n, at, conditions) => {
                let endpoints = self.slices.get_mut(n).map(|slice| &mut slice.endpoints);
                if let Some(endpoints) = endpoints.filter(|list| !list.is_empty()) {
                    let at = at % endpoints.len();
                    endpoints[at].conditions = *conditions;
                }
                stale.slices.push(*n);
            }
            Edit::Hints(hints) => {
                self.hints.clone_from(hints);
                stale.slices.extend(self.slices.keys());
            }
            Edit::Node(node) => {
                self.node = Some(node.clone());
                stale.node = true;
            }
            Edit::Links(has) => {
                self.has = *has;
                stale.links = true;
            }
            Edit::Ranges(ranges) => {
                self.ranges.clone_from(ranges);
                stale.ranges = true;
            }
            Edit::Restart | Edit::Rest(_) => {}
        }
    }
}

fn set<T: Clone>(map: &mut BTreeMap<u8, T>, n: u8, value: Option<&T>) {
    match value {
        Some(value) => map.insert(n, value.clone()),
        None => map.remove(&n),
    };
}

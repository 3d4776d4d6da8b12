//! What the operator has set, as far as it shapes the tables.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_common::abi::PortRange;

use super::{Family, ObjectName};

/// Whose sockets are translated at `connect` (`--socket-lb`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketLb {
    /// Host processes and pods.
    All,
    /// Host processes; pods are left to TC.
    Host,
    /// Nobody.
    Off,
}

/// What becomes of a packet from outside for an endpoint on another node (`--loadbalancer-mode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LoadBalancerMode {
    /// It is masqueraded, and the answer comes back here.
    Snat,
    /// It goes to the endpoint's node as it is, which answers the client itself (direct server return).
    Dsr,
}

/// Node addresses at which NodePorts are accepted (`--nodeport-addresses`, V-33).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The node's primary addresses (Y-10).
    Primary,
    /// Addresses of the node inside these ranges; a family without a range accepts on all its addresses.
    Ranges(Vec<IpNet>),
}

/// How pods are told from other sources (`--detect-local-mode`, M-1). A family without a range knows no pods (M-3,
/// M-5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// `--cluster-cidr`, and where it is not set the Node's `podCIDRs`: whoever sets nothing still keeps
    /// the addresses of pods.
    AnyRange,
    /// `--cluster-cidr` only.
    ClusterCidr,
    /// The Node's `podCIDRs` only.
    NodeCidr,
    /// What comes in by the bridge of this name, or by a port of it.
    Bridge(Arc<str>),
    /// What comes in by an interface whose name begins like this, or by a port of such a bridge.
    InterfacePrefix(Arc<str>),
}

/// Settings that do not change while the agent runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Own node name (F-9).
    pub node_name: Arc<str>,
    /// `--bind-address`, unless unspecified: stands for the node in its family, which becomes primary (Y-10).
    pub bind_address: Option<IpAddr>,
    /// Whether the node has IPv6 at all; without, nothing of that family is served (S-12, Y-11).
    pub ipv6: bool,
    /// Feature gate `AllowServiceExternalIPs` (V-8).
    pub external_ips: bool,
    /// `--cluster-cidr`: at most one range a family.
    pub cluster_cidrs: Vec<IpNet>,
    /// `--detect-local-mode`.
    pub detect_local: DetectLocal,
    /// `--masquerade-all`.
    pub masquerade_all: bool,
    /// Masquerade flows to local endpoints under policy Cluster, as kube-proxy does.
    pub masquerade_local: bool,
    /// `--loadbalancer-mode`: what holds for Services that say nothing.
    pub loadbalancer_mode: LoadBalancerMode,
    /// `--drop-unallocated-cluster-ips`: what goes to an address inside a ServiceCIDR that is no Service's is dropped
    /// (P-22).
    pub drop_unallocated: bool,
    /// `--nodeport-addresses`.
    pub nodeport_addresses: NodePortAddresses,
    /// `--socket-lb`.
    pub socket_lb: SocketLb,
    /// `--localhost-nodeports`: host processes reach NodePorts at 127.0.0.1 and ::1, too (V-36).
    pub localhost_node_ports: bool,
    /// Cookie of the node's network namespace; 0 when the kernel does not tell it.
    pub host_netns: u64,
    /// Source ports for masquerading, those of NodePorts beside the usual range not yet taken out.
    pub snat_ports: Vec<PortRange>,
    /// Ports that the agent serves on the node: no NodePort takes them over.
    pub own_ports: Vec<u16>,
    /// `--agents-service`: the Service whose endpoints are the agents of all nodes.
    pub agents_service: ObjectName,
    /// `--dsr-probe-port`: where the agent answers probes of other nodes; 0 for nowhere.
    pub probe_port: u16,
    /// Seed of the selection hash: the same on every node, so that nodes agree.
    pub seed: u32,
}

impl Settings {
    /// A node of this name for which nothing has been set, and of whose kernel nothing is known.
    #[must_use]
    pub fn of_node(name: &str) -> Self {
        Self {
            node_name: name.into(),
            bind_address: None,
            ipv6: true,
            external_ips: true,
            cluster_cidrs: Vec::new(),
            detect_local: DetectLocal::AnyRange,
            masquerade_all: false,
            masquerade_local: false,
            loadbalancer_mode: LoadBalancerMode::Snat,
            drop_unallocated: true,
            nodeport_addresses: NodePortAddresses::Primary,
            socket_lb: SocketLb::All,
            localhost_node_ports: true,
            host_netns: 0,
            snat_ports: Vec::new(),
            own_ports: Vec::new(),
            agents_service: ObjectName::new("kube-system", "ebpf-proxy"),
            probe_port: 0,
            seed: 0,
        }
    }

    /// The families that are served.
    #[must_use]
    pub fn families(&self) -> &'static [Family] {
        if self.ipv6 { &[Family::V4, Family::V6] } else { &[Family::V4] }
    }
}

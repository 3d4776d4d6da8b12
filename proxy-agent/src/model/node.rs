//! Who we are, as the Node object says.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

/// The node's own object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Node {
    /// InternalIPs, then ExternalIPs, in order (Y-10).
    pub ips: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// Label `topology.kubernetes.io/zone`; empty is none.
    pub zone: Option<Arc<str>>,
    /// False with a `deletionTimestamp` or the taint `ToBeDeletedByClusterAutoscaler` (H-8).
    pub eligible: bool,
}

/// A network interface of the node's namespace, as rtnetlink describes it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: Arc<str>,
    /// Whether it is the loopback interface.
    pub loopback: bool,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether its frames have no Ethernet header (WireGuard, IPIP, tun).
    pub layer3: bool,
    /// Index of the bridge or bond that it is a port of.
    pub master: Option<u32>,
    /// Its addresses, in the kernel's order, without deprecated, tentative-duplicate and temporary ones.
    pub addresses: Vec<IpNet>,
}

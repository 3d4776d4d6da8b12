//! Who we are, as the Node object says.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

/// The node's own object.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
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

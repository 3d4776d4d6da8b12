//! A Service: the fields of S-16 and nothing else.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_common::addr::Proto;

use super::LoadBalancerMode;

/// Namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// From namespace and name.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// An IP family: each is proxied on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    /// Its name for people, and in labels.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// Session affinity of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Affinity {
    /// None.
    None,
    /// By client address, with an idle time-out in seconds.
    ClientIp(u32),
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Port {
    /// Name; empty when unnamed.
    pub name: Arc<str>,
    pub proto: Proto,
    /// Port number at the Service's addresses.
    pub port: u16,
    /// NodePort; 0 for none.
    pub node_port: u16,
}

/// A Service that is to be proxied (S-1…S-5 have been applied).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Service {
    /// At most one ClusterIP a family; a family without one is not proxied (S-10).
    pub cluster_ips: Vec<IpAddr>,
    /// Ports with a number in range and a protocol that is proxied.
    pub ports: Vec<Port>,
    /// External IPs (V-7).
    pub external_ips: Vec<IpAddr>,
    /// Load-balancer IPs in VIP mode (V-9).
    pub load_balancer_ips: Vec<IpAddr>,
    /// `loadBalancerSourceRanges` that parse (V-15).
    pub source_ranges: Vec<IpNet>,
    /// Session affinity.
    pub affinity: Affinity,
    /// `internalTrafficPolicy: Local` (S-17).
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local` where it is honoured (S-18).
    pub external_local: bool,
    /// `healthCheckNodePort` where it is active (S-20); 0 for none.
    pub health_check_node_port: u16,
    /// Connections to an endpoint that leaves without having terminated are reset.
    pub reset_on_loss: bool,
    /// What becomes of packets from outside for endpoints on other nodes; `None` for what the operator has set.
    pub mode: Option<LoadBalancerMode>,
    /// Creation time in Unix seconds: the older Service wins a contested address.
    pub created: i64,
}

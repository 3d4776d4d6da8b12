//! Endpoints as EndpointSlices bring them.

use std::net::IpAddr;
use std::sync::Arc;

use proxy_common::addr::Proto;

use super::{Family, ObjectName};

/// One port of a slice; it applies to all the slice's endpoints (E-10).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SlicePort {
    /// Name; empty when unnamed.
    pub name: Arc<str>,
    pub proto: Proto,
    /// Port number at the endpoints.
    pub port: u16,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Its first address (E-16).
    pub ip: IpAddr,
    /// Gets new flows (P-1).
    pub ready: bool,
    /// Still answers.
    pub serving: bool,
    /// Is on its way out.
    pub terminating: bool,
    /// The node it runs on.
    pub node: Option<Arc<str>>,
    /// Zones it is meant for (E-20).
    pub zone_hints: Vec<Arc<str>>,
    /// Nodes it is meant for (E-20).
    pub node_hints: Vec<Arc<str>>,
}

/// An EndpointSlice that belongs to a Service (E-4).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Slice {
    /// The Service it belongs to.
    pub service: ObjectName,
    /// Family of its addresses.
    pub family: Family,
    /// Ports with a number.
    pub ports: Vec<SlicePort>,
    /// Endpoints whose address parses.
    pub endpoints: Vec<Endpoint>,
}

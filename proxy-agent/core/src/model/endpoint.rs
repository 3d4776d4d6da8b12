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
    /// What it is meant for; most are for everybody, and of a large cluster's there are very many.
    pub hints: Option<Box<Hints>>,
}

/// What an endpoint is meant for (E-20).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hints {
    /// Zones.
    pub zones: Vec<Arc<str>>,
    /// Nodes.
    pub nodes: Vec<Arc<str>>,
}

impl Hints {
    /// For these zones and nodes; nothing where there are none.
    #[must_use]
    pub fn new(zones: Vec<Arc<str>>, nodes: Vec<Arc<str>>) -> Option<Box<Self>> {
        (!zones.is_empty() || !nodes.is_empty()).then(|| Box::new(Self { zones, nodes }))
    }
}

impl Endpoint {
    /// Zones it is meant for.
    #[must_use]
    pub fn zone_hints(&self) -> &[Arc<str>] {
        self.hints.as_deref().map_or(&[], |hints| &hints.zones)
    }

    /// Nodes it is meant for.
    #[must_use]
    pub fn node_hints(&self) -> &[Arc<str>] {
        self.hints.as_deref().map_or(&[], |hints| &hints.nodes)
    }
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

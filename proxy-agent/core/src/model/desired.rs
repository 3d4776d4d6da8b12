//! What should be in the tables.

use std::collections::BTreeMap;
use std::sync::Arc;

use proxy_common::abi::{Config, FrontendKey, Iface, RouteKey};
use proxy_common::addr::{Addr, Port, Proto};

use super::{Family, ObjectName};

/// The unit of programming: one port of a Service in one family.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServicePort {
    pub service: ObjectName,
    /// Name of the port; empty when unnamed.
    pub port: Arc<str>,
    pub proto: Proto,
    /// Family.
    pub family: Family,
}

/// One destination of a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DesiredFrontend {
    /// Address, port and protocol; a NodePort stands under the wildcard address.
    pub key: FrontendKey,
    /// Bits of [`proxy_common::abi::frontend`].
    pub flags: u32,
}

/// One endpoint that may hold flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct DesiredBackend {
    /// Bits of [`proxy_common::abi::backend`].
    pub flags: u16,
    /// The number of the other node that answers clients itself; 0 for none.
    pub node: u32,
}

/// What should be programmed for one Service port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct DesiredService {
    /// The destinations it has won, in key order.
    pub frontends: Vec<DesiredFrontend>,
    /// Idle time-out of session affinity in seconds; 0 without affinity.
    pub affinity_secs: u32,
    /// Every endpoint that may hold flows: those of both sets, and those that get no new flows but still serve
    /// (`DRAINING`).
    pub backends: BTreeMap<(Addr, Port), DesiredBackend>,
    /// The endpoints new flows use under policy Cluster, one element a slot.
    pub cluster: Vec<(Addr, Port)>,
    /// The same under policy Local, and for what another node has sent on (direct server return); empty also when no
    /// destination of this port asks for that.
    pub local: Vec<(Addr, Port)>,
    /// Source ranges as (network address, prefix bits in its own family); used by frontends that carry
    /// the flag `SOURCE_RANGES`.
    pub source_ranges: Vec<(Addr, u32)>,
}

/// What should be programmed for the node itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeTables {
    /// Settings.
    pub config: Config,
    /// Interfaces by index.
    pub ifaces: BTreeMap<u32, Iface>,
    /// Sources of masqueraded flows (M-13).
    pub routes: BTreeMap<RouteKey, Addr>,
    /// The node's addresses with bits of [`proxy_common::abi::address`] (`NODE`, `NODE_PORT`).
    pub addresses: BTreeMap<Addr, u32>,
}

/// Everything that should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desired {
    /// Every Service port.
    pub services: BTreeMap<ServicePort, DesiredService>,
    pub node: NodeTables,
}

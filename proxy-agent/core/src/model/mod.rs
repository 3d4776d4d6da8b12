//! Know and wish: compact node-local copies of the fields that matter, and every policy as a pure function.
//!
//! No I/O, no clock, no Kubernetes types, no maps.

#[cfg(test)]
mod around_tests;
mod change;
mod compile;
mod conflicts;
mod desired;
#[cfg(test)]
mod direct_tests;
mod drivers;
mod endpoint;
mod frontends;
mod local;
mod masquerade;
mod merge;
mod names;
mod no_local;
mod node;
mod node_number;
mod peers;
mod pods;
pub mod ports;
mod service;
mod settings;
mod tables;
#[cfg(test)]
mod tests;
pub mod topology;
pub mod tunnels;
mod uplinks;
mod urgency;
mod warnings;
mod world;

pub use change::{Change, Kind};
pub use desired::{Desired, DesiredBackend, DesiredFrontend, DesiredService, NodeTables, ServicePort};
pub use drivers::{AtDriver, Drivers};
pub use endpoint::{Endpoint, Hints, Slice, SlicePort};
pub use names::Names;
pub use no_local::{NoLocal, NoLocalByFamily};
pub use node::{Device, Link, Node, NodeIps, Route};
pub use node_number::{NodeNumbers, node_number};
pub use peers::{PORT_NAME, Peer, Peers};
pub use service::{Affinity, Family, ObjectName, Port, Service};
pub use settings::{DetectLocal, LoadBalancerMode, NodePortAddresses, Settings, SocketLb};
pub use tables::{Accepted, NODE_PORTS};
pub use urgency::Urgency;
pub use warnings::Warning;
pub use world::{HealthCheck, World};

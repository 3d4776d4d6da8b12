//! Know and wish: compact node-local copies of the fields that matter, and every policy as a pure function.
//!
//! No I/O, no clock, no Kubernetes types, no maps.

mod claims;
mod compile;
mod complaints;
mod desired;
mod endpoint;
mod frontends;
mod merge;
mod names;
mod no_local;
mod node;
mod service;
mod settings;
mod tables;
#[cfg(test)]
mod tests;
pub mod topology;
mod world;

pub use complaints::Complaint;
pub use desired::{Desired, DesiredFrontend, DesiredService, NodeTables, ServicePort};
pub use endpoint::{Endpoint, Slice, SlicePort};
pub use no_local::{NoLocal, NoLocalByFamily};
pub use node::{Link, Node, NodeIps};
pub use service::{Affinity, Family, ObjectName, Port, Service};
pub use settings::{DetectLocal, NodePortAddresses, Settings, SocketLb};
pub use tables::Accepted;
pub use world::{HealthCheck, World};

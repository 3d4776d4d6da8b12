//! Where Services and endpoints come from: the Kubernetes API, or a directory of manifests. Both send the same
//! [`Change`](agent_core::model::Change)s.
//!
//! Kubernetes types stop here: what leaves this crate is checked, normalised, and of our own types.

pub mod address;
mod backoff;
pub mod blocking;
mod body;
mod client_config;
pub mod convert;
mod decoded;
pub mod directory;
mod discovery;
mod end_reason;
pub mod events;
mod exec_plugin;
mod file;
pub mod kubernetes;
mod list_watch;
pub mod manifest;
mod probe;
mod recovery;
mod reflector;
pub mod requests;
mod servers;
mod stall;
mod tls;
mod transport;

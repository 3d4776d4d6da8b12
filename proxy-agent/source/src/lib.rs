//! Where Services and endpoints come from: the Kubernetes API, or a directory of manifests. Both send the same
//! [`Change`](agent_core::model::Change)s.
//!
//! Kubernetes types stop here: what leaves this crate is checked, normalised, and of our own types.

pub mod api;
pub mod blocking;
pub mod convert;
pub mod directory;
pub mod manifests;

//! Hear: where Services and endpoints come from. Every source yields the same [`Change`]s.
//!
//! Kubernetes types stop here: what leaves this room is ours, checked and normalised.

mod account;
pub mod address;
mod backoff;
pub mod blocking;
mod body;
mod connect;
pub mod convert;
pub mod directory;
mod end;
pub mod events;
mod feed;
mod file;
mod follow;
mod heard;
pub mod kubernetes;
mod learn;
pub mod manifest;
mod plugin;
mod probe;
pub mod requests;
mod resume;
mod servers;
mod silence;
mod tls;

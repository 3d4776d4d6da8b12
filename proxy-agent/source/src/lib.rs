//! Where Services and endpoints come from: the Kubernetes API, or a directory of manifests. Both send the same
//! [`Change`](agent_core::model::Change)s.
//!
//! Kubernetes types stop here: what leaves this crate is checked, normalised, and of our own types.

#![warn(clippy::cast_possible_truncation)] // Sizes and ports come from outside.

pub mod api;
pub mod blocking;
pub mod convert;
pub mod directory;
pub mod manifests;

use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher, Hash};

/// A hash by which a change is noticed.
fn hash(value: impl Hash) -> u64 {
    BuildHasherDefault::<DefaultHasher>::new().hash_one(value)
}

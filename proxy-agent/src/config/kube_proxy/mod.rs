//! kube-proxy's settings as it has them: one shape for its flags and its file, their names, and the file read.
//!
//! Nothing here knows what this agent makes of them.

pub(super) mod duration;
pub(super) mod fields;
pub(super) mod file;
pub(super) mod gates;
pub(super) mod v1alpha1;

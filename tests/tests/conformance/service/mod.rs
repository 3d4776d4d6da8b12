//! `network/service.go`.
//!
//! Not mirrored: 1575 (collisions of NodePorts), 1629 (NodePorts out of range), 3243, 3269 and 3495 (lists, status and
//! collections) test the API server alone.

mod affinity;
mod basic;
mod labels;
mod policies;
mod ports;
mod reject;
mod terminating;
mod types;
mod unready;

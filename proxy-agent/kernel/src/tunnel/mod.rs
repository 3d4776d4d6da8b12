//! What agents ask each other: whether packets that are wrapped in others get through from one node to the next.
//!
//! A question is a datagram to the other agent's port, wrapped as the programs wrap what goes to an endpoint there; that node's
//! programs take the wrapping off, and its agent answers without one.

mod probe;
mod sockets;

pub use probe::{LENGTH, Probe, question, wrapped};
pub use sockets::{Heard, Listener, Wrapper};

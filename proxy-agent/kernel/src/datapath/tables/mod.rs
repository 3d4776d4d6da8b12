//! The tables that the agent writes: read and written, compared with what it has written, made as large as is needed.

pub(crate) mod address_bits;
pub mod compare;
pub(crate) mod cpus;
pub mod growth;
pub mod kernel;
pub mod memory;
pub mod taken;
pub mod tunnels;

//! Tables and packets in memory: what unit tests, fuzzing and the end-to-end tests share.

mod frame;
mod packet;
mod run;
mod socket;
mod tables;

pub use frame::ByteFrame;
pub use packet::{frame, icmp_error, segment, tuple, verify};
pub use run::{Outcome, run, run_on, run_through};
pub use socket::MemorySocket;
pub use tables::{MemoryTables, SECRET};

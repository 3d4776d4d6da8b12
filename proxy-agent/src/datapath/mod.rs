//! See and write: the only room that talks to BPF.

mod address_bits;
pub mod attach;
mod capacity;
mod carry;
mod carry_flows;
mod carry_sockets;
pub mod change;
pub mod compare;
mod exchange;
pub mod exclude;
mod filter;
pub mod flow;
mod generation;
pub(crate) mod grace;
pub mod growth;
mod hooks;
mod instruction;
pub mod kernel;
mod layout;
pub mod load;
pub mod look;
pub mod memory;
pub mod netns;
pub mod note;
pub mod others;
pub mod pin;
pub mod pinned;
pub mod probe;
mod program_log;
mod refusal;
pub mod remove;
pub mod retired;
pub mod sockets;
pub mod streams;
mod sys;
mod table;
pub mod taken;
pub mod xtables;

pub use table::{TableError, size_flag};

use crate::plan::{Actual, Step};

/// The tables, wherever they are.
pub trait Datapath {
    /// Why it could not be done.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Reads every configuration table, and returns when no program follows any more what stood there before the last
    /// write: what nothing in the tables refers to may be used again at once.
    fn read(&mut self) -> Result<Actual, Self::Error>;

    /// Does the steps in order; the first that fails ends it, and how many were done is returned with the
    /// error. What was done stays: the caller reads and plans again.
    fn apply(&mut self, steps: &[Step]) -> Result<(), (usize, Self::Error)>;
}

//! The tables, wherever they are: in the kernel, or in memory for tests.

pub mod memory;

use crate::plan::{Actual, Step};

/// Tables that are read whole and written step by step.
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

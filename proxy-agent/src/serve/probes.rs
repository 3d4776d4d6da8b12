//! What agents have asked each other.

/// Counts of probes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProbeCounts {
    /// Questions to other nodes.
    pub asked: u64,
    /// Answers to them.
    pub answered: u64,
    /// Answers that did not come.
    pub missing: u64,
    /// Answers to questions of other nodes.
    pub given: u64,
    /// Questions that were too many to be answered.
    pub withheld: u64,
}

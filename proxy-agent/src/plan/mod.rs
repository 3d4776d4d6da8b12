//! Plan: what should be, minus what is, as a list of writes that leave nothing to decide.

mod actual;
mod step;

pub use actual::Actual;
pub use step::Step;

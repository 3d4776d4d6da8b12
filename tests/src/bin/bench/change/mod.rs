//! What a change costs: planned and written by itself, and on its way through an agent.

mod lone;
mod plan;

use anyhow::Result;

use crate::figure::Figures;

pub(crate) fn measure(figures: &mut Figures, rounds: usize) -> Result<()> {
    plan::measure(figures, rounds)?;
    lone::measure(figures, rounds)
}

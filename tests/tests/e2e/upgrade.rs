//! An agent with another table layout takes over from one that runs, and nobody notices.

use anyhow::{Result, ensure};
use proxy_tests::chaos::upgrade::{Plan, play};

#[test]
fn nothing_breaks_when_the_table_layout_changes_there_and_back_under_load() -> Result<()> {
    let seen = play(&Plan { rounds: 4, kill_every: 0, seed: 1 })?;
    ensure!(seen.is_clean() && seen.changes == 4 && seen.held >= 30, "{seen:#?}");
    Ok(())
}

#[test]
fn nothing_breaks_when_the_agent_is_killed_over_a_change_of_the_layout() -> Result<()> {
    let seen = play(&Plan { rounds: 4, kill_every: 1, seed: 7 })?;
    ensure!(seen.is_clean() && seen.killed == 4, "{seen:#?}");
    Ok(())
}

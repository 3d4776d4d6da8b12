//! Upgrades and downgrades across a changed table layout. The other layout is made up (`cargo xtask build-ebpf --next`).
//! In two rounds of four, one there and one back, the agent is killed over the change, and the next one starts at once.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fastrand::Rng;

use super::{Fault, Next};
use crate::agent::Agent;
use crate::chaos::ground::Ground;
use crate::crowd::now_ms;
use crate::require::{agent_binary, next_agent_binary};
use crate::stop::pause;

/// Loading takes about a second; what comes after is what matters.
const CHANGE: Duration = Duration::from_secs(3);

/// What has come of it.
pub(super) struct Upgrade {
    random: Rng,
    /// How often each frontend was chosen.
    counted: BTreeMap<String, u64>,
    killed: u64,
}

impl Upgrade {
    pub(super) fn new(seed: u64) -> Self {
        Self { random: Rng::with_seed(seed), counted: BTreeMap::new(), killed: 0 }
    }

    /// Reads the counters again; none may fall.
    fn count(&mut self, agent: &Agent) -> Result<()> {
        let now = counters(agent)?;
        for (name, before) in &self.counted {
            let after = now.get(name).copied().unwrap_or_default();
            ensure!(after >= *before, "the counter of {name} falls from {before} to {after}");
        }
        self.counted = now;
        Ok(())
    }
}

impl Fault for Upgrade {
    fn round(&mut self, ground: &mut Ground<'_>, number: u64) -> Result<Next> {
        let (there, next) = (
            number.is_multiple_of(2),
            if number.is_multiple_of(2) { next_agent_binary()? } else { agent_binary()? },
        );
        ground.clients.step(format!("upgrade {number}: {}", if there { "there" } else { "back" }));
        if self.random.bool() {
            ground.agent.stop()?;
        } else {
            ground.agent.kill()?;
        }
        ground.agent.becomes(&next);
        ground.agent.spawn()?;
        if number % 4 >= 2 {
            pause(CHANGE.mul_f64(self.random.f64()))?;
            ground.clients.step(format!("upgrade {number}: SIGKILL"));
            ground.agent.kill()?;
            ground.agent.spawn()?;
            self.killed += 1;
        }
        ground.settle();
        let begun = now_ms();
        let counted = self.count(&ground.agent);
        ground.clients.note("counters", "none that falls", begun, counted);
        ground.clients.check()?;
        Ok(Next::More)
    }

    fn end(&mut self, ground: &mut Ground<'_>) -> Result<Vec<String>> {
        ground.settle();
        Ok(vec![format!(
            "{} agents were killed over it; what was new waited for at most {:.1} ms",
            self.killed,
            longest_pause(&ground.agent.log_text())
        )])
    }
}

fn counters(agent: &Agent) -> Result<BTreeMap<String, u64>> {
    let frontends = agent.service_list_json()?;
    let mut found = BTreeMap::new();
    for frontend in frontends.as_array().context("a list of frontends")? {
        let name = ["service", "type", "protocol", "family"].map(|field| frontend[field].to_string());
        found.insert(name.join(" "), frontend["connections"].as_u64().context("a counter")?);
    }
    ensure!(found.values().any(|count| *count > 0), "nothing is counted: {frontends:#}");
    Ok(found)
}

fn longest_pause(log: &str) -> f64 {
    let pauses = log.lines().filter_map(|line| {
        let (_, rest) = line.split_once("what was new waited for ")?;
        rest.split(' ').next()?.parse::<f64>().ok()
    });
    pauses.fold(0.0, f64::max)
}

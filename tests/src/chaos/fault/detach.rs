//! Somebody detaches programs, puts others behind links, removes pins, writes to tables: one [`Sabotage`] a round.
//!
//! Between that and its repair the agent can do nothing. Where only pins go nothing may fail. Where hooks or entries go new
//! requests may, until the agent has repaired it or should have: they are counted apart. Connections that are held have to
//! live in any case. Those whose packets are translated say nothing while nobody translates, since the node itself would
//! reset them; others go on.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{Fault, Next};
use crate::agent::Agent;
use crate::chaos::ground::Ground;
use crate::chaos::sabotage::{Entry, Sabotage, contents, pins};
use crate::crowd::now_ms;
use crate::probe::eventually;

/// What is done, in turn, and how long the agent took at most to undo it.
pub(super) struct Detach {
    all: Vec<Sabotage>,
    longest: BTreeMap<Sabotage, Duration>,
}

impl Detach {
    pub(super) fn new(all: impl IntoIterator<Item = Sabotage>) -> Self {
        Self { all: all.into_iter().collect(), longest: BTreeMap::new() }
    }
}

impl Fault for Detach {
    fn round(&mut self, ground: &mut Ground<'_>, number: u64) -> Result<Next> {
        let sabotage = self.all[usize::try_from(number)? % self.all.len()];
        ground.settle();
        let before = Attached::read(&ground.agent)?;
        if sabotage.leaves_packets_alone() {
            ground.clients.order("be-silent")?;
        }
        if !sabotage.is_harmless() {
            ground.clients.begin_gap();
        }
        ground.clients.step(format!("detach {number}: {}", sabotage.name()));
        let (begun, begun_ms) = (Instant::now(), now_ms());
        sabotage.commit(&ground.agent)?;
        let outcome = eventually(sabotage.undone_within(), || Attached::read(&ground.agent)?.is(&before));
        ground.clients.end_gap(now_ms());
        ground.clients.step(format!("detach {number}: {} is undone", sabotage.name()));
        let longest = self.longest.entry(sabotage).or_default();
        *longest = begun.elapsed().max(*longest);
        let expected = format!("all as it was within {:?}", sabotage.undone_within());
        ground.clients.note("the agent", &expected, begun_ms, outcome);
        ground.clients.check()?;
        ground.clients.order("speak")?;
        Ok(Next::More)
    }

    fn end(&mut self, ground: &mut Ground<'_>) -> Result<Vec<String>> {
        ground.settle();
        ground.clients.order("report")?;
        let took = self
            .longest
            .iter()
            .map(|(sabotage, took)| format!("{} {:.1} s", sabotage.name(), took.as_secs_f64()));
        Ok(vec![
            format!("undone after at most: {}", took.collect::<Vec<_>>().join(", ")),
            format!(
                "{} new requests failed while hooks or entries were gone, and are not counted as lost",
                ground.clients.excused()
            ),
        ])
    }
}

/// What the agent has attached, pinned and written.
struct Attached {
    links: Value,
    pins: Vec<PathBuf>,
    entries: Vec<Entry>,
}

impl Attached {
    fn read(agent: &Agent) -> Result<Self> {
        let (pins, entries) = (pins(agent)?, contents(agent)?);
        let mut links = agent.status_json()?["links"].clone();
        for link in links.as_array_mut().into_iter().flatten() {
            // An agent leaves the same program of an earlier one alone, and puts its own back.
            link.as_object_mut().map(|link| link.remove("program_id"));
        }
        Ok(Self { links, pins, entries })
    }

    fn is(&self, before: &Self) -> Result<()> {
        ensure!(self.links == before.links, "links: {:#}, not {:#}", self.links, before.links);
        let differ = |a: &Self, b: &Self| {
            let pins = a.pins.iter().filter(|pin| !b.pins.contains(pin));
            let entries = a.entries.iter().filter(|entry| b.entries.binary_search(entry).is_err());
            let entries = entries.map(|(table, key, _)| format!("{table} {key:?}"));
            pins.map(|pin| pin.display().to_string()).chain(entries).collect::<Vec<_>>()
        };
        let (missing, strange) = (differ(before, self), differ(self, before));
        ensure!(missing.is_empty() && strange.is_empty(), "there is no {missing:?}, but {strange:?}");
        Ok(())
    }
}

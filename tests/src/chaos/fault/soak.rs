//! Minutes of everything at random. In the first half the agent is killed, too; in the second one agent bears the rest.
//! Then nothing may have grown: tables, memory, descriptors.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;

use super::api::Api;
use super::churn::Churn;
use super::detach::Detach;
use super::flood::Flood;
use super::idle_clients::IdleClients;
use super::kill::Kill;
use super::{Fault, Next, Options};
use crate::apiserver::Fault as ServerFault;
use crate::chaos::figures::Figures;
use crate::chaos::ground::Ground;
use crate::chaos::sabotage::Sabotage;
use crate::chaos::services::COMING;
use crate::crowd::now_ms;
use crate::probe::eventually;

/// How long it lasts by default.
const LASTS: Duration = Duration::from_secs(300);
/// Flows of datagrams end this long after the last; see [`super::Name::flags`].
const ENDS: Duration = Duration::from_secs(30);
/// Connections that have ended are remembered for two minutes. A soak that is shorter does not wait for it, and plays no
/// sabotage that takes long to be undone.
const REMEMBERED: Duration = Duration::from_secs(150);

/// One of the faults that it is made of.
struct Part {
    name: &'static str,
    fault: Box<dyn Fault>,
    done: u64,
}

impl Part {
    fn new(name: &'static str, fault: impl Fault + 'static) -> Self {
        Self { name, fault: Box::new(fault), done: 0 }
    }
}

/// What it has begun with.
pub(super) struct Soak {
    random: Rng,
    lasts: Duration,
    parts: Vec<Part>,
    /// Parts that are still to be played before all are played again.
    left: Vec<usize>,
    begun: Option<Instant>,
    first: Option<Figures>,
    /// Of the agent that bears the second half.
    second: Option<(Instant, Figures)>,
    /// Whether that agent had borne each part by then.
    warm: bool,
}

/// The place of [`Kill`] among the parts.
const KILL: usize = 0;

impl Soak {
    pub(super) fn new(options: &Options) -> Self {
        let mut random = Rng::with_seed(options.seed);
        let lasts = options.lasts.unwrap_or(LASTS);
        let mut servers = ServerFault::NAMED.map(|(_, fault)| fault).to_vec();
        random.shuffle(&mut servers);
        let mut sabotages = Sabotage::ALL.to_vec();
        sabotages.retain(|sabotage| lasts >= REMEMBERED || sabotage.undone_within() < ENDS);
        // While clients must be silent the flows of their datagrams end, which are remembered for ten seconds here.
        sabotages.retain(|sabotage| !sabotage.leaves_packets_alone() || sabotage.undone_within() < ENDS);
        random.shuffle(&mut sabotages);
        let parts = vec![
            Part::new("kill", Kill::new(options.seed)),
            Part::new("churn", Churn),
            Part::new("flood", Flood::default()),
            Part::new("detach", Detach::new(sabotages)),
            Part::new("idle-clients", IdleClients::default()),
            Part::new("api", Api::new(servers)),
        ];
        Self { random, lasts, parts, left: Vec::new(), begun: None, first: None, second: None, warm: false }
    }

    /// One of the parts, each of them once before any comes again.
    fn part(&mut self, ground: &mut Ground<'_>, kills: bool) -> Result<()> {
        self.left.retain(|index| kills || *index != KILL);
        if self.left.is_empty() {
            self.left = (usize::from(!kills)..self.parts.len()).collect();
            self.random.shuffle(&mut self.left);
        }
        let index = self.left.pop().context("a part to be played")?;
        // What a part has served it may have ended.
        COMING.into_iter().try_for_each(|pod| ground.serve(pod))?;
        let part = &mut self.parts[index];
        part.fault.round(ground, part.done)?;
        part.done += 1;
        if index == KILL {
            ground.settle();
        }
        Ok(())
    }

    /// Waits for what only time ends, and tells what is left.
    fn last(&self, ground: &mut Ground<'_>, first: &Figures) -> Result<Figures> {
        let begun = now_ms();
        let outcome = eventually(ENDS, || first.no_more_flows(&Figures::read(ground)?));
        ground.clients.note("the agent", "no flow that lives", begun, outcome);
        if self.lasts >= REMEMBERED {
            ground.clients.step("soak: what is remembered is forgotten");
            let outcome = eventually(REMEMBERED, || first.no_more_traffic(&Figures::read(ground)?));
            ground.clients.note("tables of traffic", "not more than at the beginning", begun, outcome);
        }
        Figures::read(ground)
    }
}

impl Fault for Soak {
    fn begin(&mut self, ground: &mut Ground<'_>) -> Result<()> {
        self.first = Some(Figures::read(ground)?);
        Ok(())
    }

    fn round(&mut self, ground: &mut Ground<'_>, _: u64) -> Result<Next> {
        let begun = *self.begun.get_or_insert_with(Instant::now);
        if begun.elapsed() >= self.lasts {
            return Ok(Next::Over);
        }
        let kills = begun.elapsed() < self.lasts / 2;
        self.part(ground, kills)?;
        // What is kept for later has been allocated when each part has been played once.
        let warm = self.left.is_empty();
        if !kills && (self.second.is_none() || warm && !self.warm) {
            self.warm = warm;
            ground.settle();
            self.second = Some((Instant::now(), Figures::read(ground)?));
        }
        Ok(Next::More)
    }

    fn end(&mut self, ground: &mut Ground<'_>) -> Result<Vec<String>> {
        ground.move_to(&[])?;
        ground.settle();
        ground.clients.step("soak: everybody has gone");
        ground.clients.end()?;
        let first = self.first.as_ref().context("a soak that has not begun")?;
        let begun = now_ms();
        let ended = self.last(ground, first)?;
        let tables = first.same_tables(&ended);
        ground.clients.note("tables of the agent", "as many entries as at the beginning", begun, tables);
        let parts = self.parts.iter().map(|part| format!("{} {}", part.name, part.done));
        let mut remarks = vec![
            parts.collect::<Vec<_>>().join(", "),
            format!("tables at begin and end: {}", first.beside(&ended)),
            format!("the agents of begin and end: {}", first.process_beside(&ended)),
        ];
        if let Some((since, second)) = &self.second {
            let grown = second.not_grown(&ended);
            ground.clients.note("the agent's process", "not more than at the beginning", begun, grown);
            let lived = since.elapsed().as_secs_f64();
            remarks.push(format!("one agent for {lived:.0} s: {}", second.process_beside(&ended)));
        }
        Ok(remarks)
    }
}

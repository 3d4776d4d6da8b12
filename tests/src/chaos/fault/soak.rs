//! Minutes of everything at random. In the first half the agent is killed, too; in the second one agent bears the rest.
//! Then nothing may have grown: tables, memory, descriptors.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use serde_json::Value;

use super::churn::Churn;
use super::flood::Flood;
use super::kill::Kill;
use super::{Fault, Next, Options};
use crate::chaos::ground::Ground;
use crate::chaos::services::COMING;
use crate::crowd::now_ms;
use crate::probe::eventually;

/// How long it lasts unless told.
const LASTS: Duration = Duration::from_secs(300);
/// Flows of datagrams end this long after the last; see [`super::Name::flags`].
const ENDS: Duration = Duration::from_secs(30);
/// Memory may differ by so much: what is in use at the moment differs.
const MEMORY: u64 = 4 << 10;
/// Tables that the agent fills: at the end they hold what they held at the beginning.
const BY_AGENT: [&str; 7] =
    ["FRONTENDS", "BACKENDS", "ADDRESSES", "SOURCES", "IFACES", "MASQUERADE", "SERVICES"];
/// Slots keep what was written until they are used again, and rest before; so many are enough for what is done here.
const SLOTS: u64 = 1024;

/// What it has begun with.
pub(super) struct Soak {
    random: Rng,
    lasts: Duration,
    parts: [Box<dyn Fault>; 3],
    begun: Option<Instant>,
    first: Option<Figures>,
    /// Of the agent that bears the second half.
    second: Option<(Instant, Figures)>,
    done: [u64; 3],
}

/// The place of [`Kill`] among the parts.
const KILL: usize = 2;

impl Soak {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            random: Rng::with_seed(options.seed),
            lasts: options.lasts.unwrap_or(LASTS),
            parts: [Box::new(Churn), Box::new(Flood::default()), Box::new(Kill::new(options.seed))],
            begun: None,
            first: None,
            second: None,
            done: [0; 3],
        }
    }

    /// One of the first so many parts.
    fn part(&mut self, ground: &mut Ground<'_>, of: usize) -> Result<()> {
        let index = self.random.usize(..of);
        // What a part has served it may have ended.
        COMING.into_iter().try_for_each(|pod| ground.serve(pod))?;
        let number = self.done[index];
        self.parts[index].round(ground, number)?;
        self.done[index] += 1;
        if index == KILL {
            ground.settle();
        }
        Ok(())
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
        if begun.elapsed() < self.lasts / 2 {
            self.part(ground, KILL + 1)?;
        } else {
            self.part(ground, KILL)?;
            if self.second.is_none() {
                // What is kept for later has been allocated by now.
                ground.settle();
                self.second = Some((Instant::now(), Figures::read(ground)?));
            }
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
        let ended = eventually(ENDS * crate::patience(), || {
            let now = Figures::read(ground)?;
            ensure!(now.living <= first.living, "{} flows live", now.living);
            Ok(now)
        });
        let ended = match ended {
            Ok(ended) => ended,
            Err(error) => {
                ground.clients.note("the agent", "no flow that lives", begun, Err(error));
                Figures::read(ground)?
            }
        };
        let tables = first.same_tables(&ended);
        ground.clients.note("tables of the agent", "as many entries as at the beginning", begun, tables);
        let mut remarks = vec![format!(
            "churn {}, floods {}, kills {}; tables at begin and end: {}",
            self.done[0],
            self.done[1],
            self.done[KILL],
            first.beside(&ended)
        )];
        if let Some((since, second)) = &self.second {
            let grown = second.not_grown(&ended);
            ground.clients.note("the agent's process", "not more than at the beginning", begun, grown);
            remarks.push(format!(
                "one agent for {:.0} s: resident memory {} → {} KiB, descriptors {} → {}",
                since.elapsed().as_secs_f64(),
                second.resident,
                ended.resident,
                second.descriptors,
                ended.descriptors
            ));
        }
        Ok(remarks)
    }
}

/// What may not grow.
#[derive(Clone, Debug, Default)]
struct Figures {
    tables: BTreeMap<String, u64>,
    /// Flows that carry something.
    living: usize,
    /// KiB.
    resident: u64,
    descriptors: usize,
}

impl Figures {
    fn read(ground: &Ground<'_>) -> Result<Self> {
        let status = ground.agent.status_json()?;
        let tables = status["tables"].as_array().with_context(|| format!("no tables in {status}"))?;
        let named =
            tables.iter().filter_map(|table| Some((table["name"].as_str()?, table["used"].as_u64()?)));
        let flows = ground.agent.json(&["conntrack", "list", "--output", "json"])?;
        let flows = flows.as_array().context("no list of flows")?.iter();
        // Neither those that have ended nor those of SYNs that were never followed by more, as a flood leaves them.
        let over = |state: &Value| state == "closed" || state == "reset";
        let young = |flow: &Value| {
            flow["protocol"] == "TCP" && flow["state"].as_str().is_some_and(|s| s.ends_with("answered"))
        };
        let living = flows.filter(|flow| !over(&flow["state"]) && !young(flow));
        let pid = ground.agent.pid().context("no agent runs")?;
        let process =
            std::fs::read_to_string(format!("/proc/{pid}/status")).context("reading a process's state")?;
        let resident = process.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok());
        Ok(Self {
            tables: named.map(|(name, used)| (name.to_owned(), used)).collect(),
            living: living.count(),
            resident: resident.with_context(|| format!("no resident memory in {process}"))?,
            descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).context("listing descriptors")?.count(),
        })
    }

    fn same_tables(&self, ended: &Self) -> Result<()> {
        for name in BY_AGENT {
            let (before, after) = (self.tables.get(name), ended.tables.get(name));
            ensure!(before.is_some() && before == after, "{name} had {before:?} entries and has {after:?}");
        }
        let slots = ended.tables.get("SLOTS").copied().unwrap_or(u64::MAX);
        ensure!(slots <= SLOTS, "{slots} slots have been written, and none is used again");
        Ok(())
    }

    fn not_grown(&self, ended: &Self) -> Result<()> {
        let (memory, descriptors) = (ended.resident, ended.descriptors);
        ensure!(memory <= self.resident + MEMORY, "{memory} KiB are resident, after {}", self.resident);
        ensure!(
            descriptors <= self.descriptors,
            "{descriptors} descriptors are open, after {}",
            self.descriptors
        );
        Ok(())
    }

    fn beside(&self, ended: &Self) -> String {
        let pair = |(name, before): (&String, &u64)| {
            let after = ended.tables.get(name).copied().unwrap_or_default();
            (*before != 0 || after != 0).then(|| format!("{name} {before} → {after}"))
        };
        let tables: Vec<String> = self.tables.iter().filter_map(pair).collect();
        format!("{}; flows that live {} → {}", tables.join(", "), self.living, ended.living)
    }
}

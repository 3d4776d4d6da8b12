//! What may not grow: entries of tables, memory and descriptors of the agent.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::ground::Ground;
use crate::agent::Agent;

/// Memory may differ by so many KiB: what is in use at the moment differs.
const MEMORY: u64 = 4 << 10;
/// And so many descriptors: connections to API servers come and go.
const DESCRIPTORS: usize = 3;
/// Tables that the agent fills: at the end they hold what they held at the beginning.
const BY_AGENT: [&str; 7] =
    ["FRONTENDS", "BACKENDS", "ADDRESSES", "SOURCES", "IFACES", "MASQUERADE", "SERVICES"];
/// Tables that traffic fills: once it has ended, and its time-outs are over, they hold no more than at the beginning.
const BY_TRAFFIC: [&str; 4] = ["RECORDS", "FLOWS", "FRAGMENTS", "AFFINITY"];
/// Slots keep what was written until they are used again, and rest before; so many are enough for what is done here.
const SLOTS: u64 = 1024;

/// How many descriptors an agent has open.
pub(super) fn descriptors(agent: &Agent) -> Result<usize> {
    let pid = agent.pid().context("no agent runs")?;
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd")).context("listing descriptors")?.count())
}

/// What may not grow.
#[derive(Clone, Debug, Default)]
pub(super) struct Figures {
    tables: BTreeMap<String, u64>,
    /// Flows that carry something.
    living: usize,
    /// KiB.
    resident: u64,
    descriptors: usize,
}

impl Figures {
    pub(super) fn read(ground: &Ground<'_>) -> Result<Self> {
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
            descriptors: descriptors(&ground.agent)?,
        })
    }

    /// An error as long as flows live that did not at the beginning.
    pub(super) fn no_more_flows(&self, now: &Self) -> Result<()> {
        ensure!(now.living <= self.living, "{} flows live", now.living);
        Ok(())
    }

    /// An error as long as tables hold what traffic has left.
    pub(super) fn no_more_traffic(&self, now: &Self) -> Result<()> {
        for name in BY_TRAFFIC {
            let (before, after) = (self.tables.get(name), now.tables.get(name));
            ensure!(before.is_some() && after <= before, "{name} had {before:?} entries and has {after:?}");
        }
        Ok(())
    }

    pub(super) fn same_tables(&self, ended: &Self) -> Result<()> {
        for name in BY_AGENT {
            let (before, after) = (self.tables.get(name), ended.tables.get(name));
            ensure!(before.is_some() && before == after, "{name} had {before:?} entries and has {after:?}");
        }
        let slots = ended.tables.get("SLOTS").copied().unwrap_or(u64::MAX);
        ensure!(slots <= SLOTS, "{slots} slots have been written, and none is used again");
        Ok(())
    }

    pub(super) fn not_grown(&self, ended: &Self) -> Result<()> {
        let (memory, descriptors) = (ended.resident, ended.descriptors);
        ensure!(memory <= self.resident + MEMORY, "{memory} KiB are resident, after {}", self.resident);
        ensure!(
            descriptors <= self.descriptors + DESCRIPTORS,
            "{descriptors} descriptors are open, after {}",
            self.descriptors
        );
        Ok(())
    }

    pub(super) fn process_beside(&self, ended: &Self) -> String {
        format!(
            "resident memory {} → {} KiB, descriptors {} → {}",
            self.resident, ended.resident, self.descriptors, ended.descriptors
        )
    }

    pub(super) fn beside(&self, ended: &Self) -> String {
        let pair = |(name, before): (&String, &u64)| {
            let after = ended.tables.get(name).copied().unwrap_or_default();
            format!("{name} {before} → {after}")
        };
        let tables: Vec<String> = self.tables.iter().map(pair).collect();
        format!("{}; flows that live {} → {}", tables.join(", "), self.living, ended.living)
    }
}

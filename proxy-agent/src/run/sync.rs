//! One sync: plan, write, and what follows from it.

use std::time::Instant;

use agent_core::datapath::Datapath as _;
use agent_core::plan::{Plan, Planner, Step};
use anyhow::{Context as _, Result, anyhow, bail};

use super::takeover::adopt::Adoption;
use super::{Agent, MAX_GAP_MS, lost, sockets};

/// A plan of so many steps leaves much memory behind that was needed for it.
const MANY: usize = 10_000;

impl Agent {
    /// Compares what was set with what the node is, once it is known (F-13).
    pub(super) fn fit(&mut self) -> Result<()> {
        let node = self.world.node_object();
        if self.fitted || node.is_none() && self.config.settings.bind_address.is_none() {
            return Ok(());
        }
        let pod_cidrs = node.map_or(&[][..], |node| &node.pod_cidrs);
        let misfits = self.config.misfits(self.world.primary_family(), pod_cidrs);
        if !misfits.errors.is_empty() {
            bail!("the settings do not fit this node: {}", misfits.errors.join("; "));
        }
        misfits.warnings.into_iter().for_each(|line| self.report.warn(line));
        self.fitted = true;
        Ok(())
    }

    /// Counts what is in the tables: now and then, not with each sync.
    pub(super) fn count(&self) {
        if let Some(planner) = &self.planner {
            self.report.count(planner);
        }
    }

    /// Brings the tables in line with the world.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.fit()?;
        let started = Instant::now();
        let now = self.now_ms();
        if now.saturating_sub(self.full_at_ms) >= MAX_GAP_MS {
            self.full = true;
        }
        self.runner.begin();
        let full = self.full;
        match self.write(now) {
            Ok(Written { plan, retired }) => {
                self.runner.succeeded(self.now_ms());
                if let Some(at) = plan.retry_at_ms {
                    self.runner.request_at(at);
                }
                if full {
                    self.full_at_ms = now;
                }
                self.taken.wrote(self.kernel.take_news());
                if !self.ready {
                    self.attach()?;
                }
                self.follow_nodes();
                self.freed |= full || plan.steps.len() >= MANY;
                let first = !std::mem::replace(&mut self.ready, true);
                self.report.wrote(&mut self.world, &plan, full, started.elapsed());
                self.follow_sockets(retired, first || !plan.steps.is_empty()); // Y-25: last, and only after success.
                if retired {
                    self.lead_in();
                }
                self.report.write(&self.world, false);
                if first {
                    self.count();
                    self.report.ready(&self.world, &plan);
                }
                self.adopt();
            }
            Err(error) => {
                self.runner.failed(self.now_ms());
                self.full = true;
                self.report.failed(&self.world, &error, full, started.elapsed());
            }
        }
        Ok(())
    }

    /// Plans and writes. After an error the kernel must be read again.
    fn write(&mut self, now: u64) -> Result<Written> {
        let proposal = if self.full || self.planner.is_none() {
            self.planner = None; // Its tables are read again, and a large cluster's are not to be held twice.
            let actual = self.kernel.read().context("reading the tables")?;
            if self.adoption.is_none() {
                let mut adoption = Adoption::plan(self.served, &actual);
                if self.retired.get()? {
                    adoption.retire(true);
                }
                self.retired_early = false;
                self.world.set_leave(adoption.leave());
                self.adoption = Some(adoption);
                // An agent may have taken them over that ran before.
                self.lead_pods();
            }
            let planner = Planner::new(&actual, self.capacity);
            drop(actual);
            let desired = self.world.take_desired();
            if self.world.whole() { planner.full(&desired, now) } else { planner.full_keeping(&desired, now) }
        } else {
            let dirty = self.world.take_dirty();
            let node = self.world.node();
            match self.planner.take() {
                Some(planner) => planner.dirty(&dirty, Some(&node), now),
                None => bail!("no planner between two syncs"),
            }
        };
        let retired = sockets::retires_udp(proposal.before(), &proposal.plan.steps);
        let lost = lost::lost(&self.world, &proposal);
        if let Err((done, error)) = self.kernel.apply(&proposal.plan.steps) {
            let failed = proposal.plan.steps.get(done).map(Step::to_string).unwrap_or_default();
            return Err(anyhow!(error).context(format!(
                "step {} of {} was not done: {failed}",
                done + 1,
                proposal.plan.steps.len()
            )));
        }
        let (planner, plan) = proposal.applied(self.now_ms());
        self.planner = Some(planner);
        self.growth.short(plan.short.iter().copied());
        self.full = false;
        self.lost.reset(lost);
        Ok(Written { plan, retired })
    }
}

struct Written {
    plan: Plan,
    retired: bool,
}

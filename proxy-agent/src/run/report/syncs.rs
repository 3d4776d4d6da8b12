//! What is said of syncs: wanted, done, failed; and how far the first one is.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use agent_core::model::{Family, World};
use agent_core::plan::Plan;
use jiff::Timestamp;

use super::Report;
use super::{PROGRESS, unix_ms};

impl Report {
    pub(in crate::run) fn queued(&self) {
        for family in self.families {
            self.health.queued(*family);
        }
    }

    /// While the first lists come in: how far it is.
    pub(in crate::run) fn progress(&mut self, world: &World) {
        if self.reported.elapsed() >= PROGRESS {
            self.reported = Instant::now();
            tracing::info!(
                "loading from {}: {} Services, {} endpoints so far",
                self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).source,
                world.service_count(),
                world.endpoint_count()
            );
        }
    }

    pub(in crate::run) fn wrote(&mut self, world: &mut World, plan: &Plan, full: bool, took: Duration) {
        for family in self.families {
            self.health.synced(*family);
            self.metrics.syncs().took(*family, full, took);
        }
        for (family, seconds) in self.latency.programmed(Timestamp::now()) {
            self.metrics.syncs().programmed(family, seconds);
        }
        self.eligible = world.node_object().map_or(self.eligible, |node| node.eligible);
        self.health.node_eligible(self.eligible);
        let accepted = [Family::V4, Family::V6].map(|family| world.node_port_addresses(family));
        self.service_health.want(world.take_health_checks(), accepted); // Y-25: after success only.
        self.failure = None;
        self.state.synced_ms = unix_ms();
        self.refused.clone_from(&plan.warnings);
        for line in &plan.warnings {
            if self.logged.is_new(line) {
                tracing::error!("{line}");
            }
        }
        if !plan.steps.is_empty() {
            self.state.generation += 1;
            tracing::info!(
                "sync {}: {} writes in {:.1} ms{}",
                self.state.generation,
                plan.steps.len(),
                took.as_secs_f64() * 1000.0,
                if full { ", everything compared" } else { "" }
            );
        }
        let mut snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        self.pending.clear();
        snapshot.service_changes_pending = 0;
        snapshot.without_local = world.without_local_endpoints();
        snapshot.endpoint_changes_pending = 0;
    }

    pub(in crate::run) fn failed(
        &mut self,
        world: &World,
        error: &anyhow::Error,
        full: bool,
        took: Duration,
    ) {
        for family in self.families {
            self.metrics.syncs().took(*family, full, took);
        }
        tracing::error!("{error:#}; reading the tables and trying again");
        self.failure = Some(format!("the last sync failed: {error:#}"));
        self.write(world, true);
    }

    /// The one line that says it is done.
    pub(in crate::run) fn ready(&self, world: &World, plan: &Plan) {
        tracing::info!(
            "ready after {:.2} s: {} Services, {} endpoints, {} interfaces, {} writes{}",
            self.started.elapsed().as_secs_f64(),
            world.service_count(),
            world.endpoint_count(),
            self.state.interfaces,
            plan.steps.len(),
            match world.warnings().len() {
                0 => String::new(),
                n => format!("; {n} objects need attention, see `proxy-agent status`"),
            }
        );
    }
}

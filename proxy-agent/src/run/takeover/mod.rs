//! Another proxy on this node: its connections are taken over, and what is new is left to it where the operator says so.

pub(super) mod adopt;
mod handover;
pub(super) mod reserve;

use agent_core::model::Urgency;
use agent_core::plan::Planner;
use proxy_common::abi::config::{LEAVE_MIDDLE, LEAVE_NEW};

use super::Agent;

impl Agent {
    /// Does what the operator has said with `proxy-agent retire`.
    pub(super) fn follow_retirement(&mut self) {
        let Some(adoption) = &mut self.adoption else { return self.retire_early() };
        match self.retired.get() {
            Ok(retired) if retired != adoption.is_retired() => {
                tracing::info!(
                    "{}",
                    if retired {
                        "retired: what is new is left to another proxy"
                    } else {
                        "retired no longer"
                    }
                );
                adoption.retire(retired);
                let leave = adoption.leave();
                // Before anybody else begins something, and again when that is in the kernel.
                self.reserve_ports();
                self.world.set_leave(leave);
                // Rules serve the node from now on, or until what they have begun has been taken over.
                self.report.keep_rules(true);
                self.taken_over = false;
                let now = self.now_ms();
                self.runner.request(now, Urgency::Settled);
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot see whether to retire");
            }
        }
        self.report.retired(self.adoption.as_ref().is_some_and(adopt::Adoption::is_retired));
    }

    /// The same before the tables are planned for the first time, which may take as long as no server answers: those of an
    /// agent that ran before are at work.
    pub(super) fn retire_early(&mut self) {
        let done = self.retired.get().and_then(|retired| {
            if retired && !self.retired_early {
                self.kernel.leave_new()?;
            }
            Ok(retired)
        });
        match done {
            Ok(retired) => {
                if retired && !self.retired_early {
                    tracing::info!("retired: what is new is left to another proxy");
                }
                self.retired_early = retired;
            }
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "cannot retire yet"),
        }
        self.report.retired(self.retired_early);
    }

    /// While another proxy serves what is new, it is told which source ports are ours.
    pub(super) fn reserve_ports(&mut self) {
        let leaves = self.adoption.as_ref().is_some_and(|adoption| adoption.leave() & LEAVE_NEW != 0);
        if leaves || self.retired_early {
            let written = self.retired_early || planner_flags(self.planner.as_ref()) & LEAVE_NEW != 0;
            match self.reserve.keep_up(self.sweeper.flows(), written) {
                Ok(0) => {}
                Ok(count) => tracing::debug!("{count} source ports are held in connection tracking"),
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "another proxy may masquerade with source ports of flows that go on"
                ),
            }
        }
    }

    /// Goes on with taking over connections from a kube-proxy; when that is done its rules may go.
    pub(super) fn adopt(&mut self) {
        let (Some(adoption), Some(planner)) = (&mut self.adoption, &self.planner) else { return };
        match adoption.go_on(self.sweeper.flows(), planner.actual(), self.report.is_attached()) {
            Ok(false) => {}
            Ok(true) => {
                self.world.set_leave(adoption.leave());
                self.lead_pods();
                let now = self.now_ms();
                self.runner.request(now, Urgency::Settled);
            }
            Err(error) => {
                tracing::warn!("connections of kube-proxy's rules are not taken over yet: {error:#}");
            }
        }
        let left = planner_flags(self.planner.as_ref());
        let done = left == 0 && self.adoption.as_ref().is_some_and(|adoption| adoption.leave() == 0);
        if done && !std::mem::replace(&mut self.taken_over, true) {
            self.report.left_to_netfilter(self.adoption.as_ref().map_or(0, adopt::Adoption::left));
            self.report.keep_rules(false);
            self.report.take_over(&self.config);
        }
    }

    /// Sockets of pods are translated by their packets as long as connections live that another proxy has begun.
    pub(super) fn lead_pods(&mut self) {
        match self.sweeper.flows().has_adopted_streams() {
            Ok(any) => {
                if self.world.set_pods_by_packet(any) {
                    let how = if any {
                        "by their packets, as long as connections live that another proxy has begun"
                    } else {
                        "when they connect"
                    };
                    tracing::info!("sockets of pods are translated {how}");
                    let now = self.now_ms();
                    self.runner.request(now, Urgency::Settled);
                }
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "cannot see whether connections live that another proxy has begun"
            ),
        }
    }
}

/// What is left to another proxy, as it stands in the kernel.
fn planner_flags(planner: Option<&Planner>) -> u32 {
    planner.map_or(0, |planner| planner.actual().config.flags & (LEAVE_NEW | LEAVE_MIDDLE))
}

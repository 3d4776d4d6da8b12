//! Questions as DNS has them: one from each port, one answer, and nothing more on that port.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::flood::outstanding;
use super::load::{Shared, Sources, question};
use super::ports::{attempts, watched};
use super::progress;
use super::report::{Report, Tally};
use super::scene::{Cast, Forwarder, Scene, Stage, want_descriptors};
use crate::pod::Place;

/// What can be chosen.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Who forwards, and how.
    pub stage: Stage,
    /// Questions a second, over all clients.
    pub rate: f64,
    /// For how long.
    pub lasts: Duration,
    /// Ports, over all clients, after which the first is used again; each is used once by default.
    pub sources: Option<u64>,
    /// How long a client waits for an answer.
    pub timeout: Duration,
}

/// What the lines of the report are about.
pub const NODE_PORT: &str = "questions from outside to a NodePort";
/// The second.
pub const CLUSTER_IP: &str = "questions from pods to a ClusterIP, by packet";

/// Plays it with each forwarder, from outside and from pods, each on tables that are empty.
pub fn play(plan: &Plan) -> Result<Report> {
    let mut report = Report::default();
    for forwarder in &plan.stage.forwarders {
        for what in [NODE_PORT, CLUSTER_IP] {
            let tally =
                once(plan, *forwarder, what).with_context(|| format!("dns, {}, {what}", forwarder.name()))?;
            report.row(*forwarder, what, tally);
        }
    }
    Ok(report)
}

fn once(plan: &Plan, forwarder: Forwarder, what: &str) -> Result<Tally> {
    let questions = attempts(plan.rate, plan.lasts);
    let sources = plan.sources.unwrap_or(questions).clamp(1, questions.max(1));
    ensure!(
        sources == questions || sources >= 2 * outstanding(plan.rate, plan.timeout),
        "{sources} ports are too few: a port would be used again while its answer may be on its way (--sources)"
    );
    let sources = Sources::new(sources)?;
    want_descriptors(outstanding(plan.rate, plan.timeout))?;
    let names = sources.names();
    let mut cast = Cast { lasts: plan.lasts + plan.timeout, ..Cast::default() };
    let mut stage = plan.stage.clone();
    if what == NODE_PORT {
        cast.clients.clone_from(&names);
    } else {
        cast.pods.clone_from(&names);
        // Else connecting would choose the endpoint, and no packet would be looked at.
        stage.agent_flags.push("--socket-lb=off".into());
    }
    let scene = Scene::raise(&stage, forwarder, &cast)?;
    let to = if what == NODE_PORT { scene.node_port() } else { scene.cluster_ip() };
    progress(&format!(
        "{}: {what}: {:.0} a second for {:.0} s",
        forwarder.name(),
        plan.rate,
        plan.lasts.as_secs_f64()
    ));
    let askers: Vec<&Place> = names.iter().map(|name| scene.place(name)).collect();
    let tally = Shared::default();
    watched(forwarder, &tally, || {
        sources.steady(&askers, to.ip(), (plan.rate, questions), |number, from| {
            tally.clone().count(question(from, to, number, plan.timeout))
        })
    })?;
    Ok(tally.so_far())
}

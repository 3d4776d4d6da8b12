//! A lone change of one endpoint, from the API server to the kernel's tables, with very many Services around it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::apiserver::ApiServer;
use proxy_tests::probe::eventually;
use proxy_tests::require;
use proxy_tests::test_cluster::{Plan, TestCluster};

use crate::cluster::{self, ENDPOINTS};
use crate::figure::{Figures, Goal, median, progress, rank};

/// Services of each cluster.
const CLUSTERS: [(u32, &str); 2] = [(10_000, "10,000"), (50_000, "50,000")];
/// Changes of one round, and those before all that warm up.
const CHANGES: u32 = 100;
const WARMING: u32 = 20;
/// From one change to the next: longer than the least time between two syncs, and no part of a tick of the agent's.
const ALONE: Duration = Duration::from_millis(37);
/// How long the agent may take to read everything.
const LOADING: Duration = Duration::from_secs(180);
/// When a change is given up.
const LOST: Duration = Duration::from_secs(10);
/// Between two looks at the table: the agent is not to be kept from its processor.
const LOOK: Duration = Duration::from_micros(20);
/// What half of the changes, and all but one in a hundred, may take.
const MEDIAN_MS: f64 = 1.0;
const TAIL_MS: f64 = 5.0;

pub(super) fn measure(figures: &mut Figures, rounds: usize) -> Result<()> {
    for (services, spelled) in CLUSTERS {
        progress(&format!(
            "change: one endpoint of {spelled} Services with {ENDPOINTS} endpoints each, from the API server"
        ));
        let cluster = Cluster::new(services)?;
        let rounds = (0..rounds).map(|round| cluster.round(round)).collect::<Result<Vec<_>>>()?;
        let medians: Vec<f64> = rounds.iter().map(|times| median(times)).collect();
        let tails: Vec<f64> = rounds.iter().map(|times| rank(times, 0.99)).collect();
        let name = |what| format!("from the API server to the tables, {spelled} Services, {what}");
        figures.value(name("half of all"), "ms", &medians).within(Goal::Value(MEDIAN_MS));
        figures.value(name("99 of 100"), "ms", &tails).within(Goal::Value(TAIL_MS));
    }
    Ok(())
}

/// An agent that has read very many Services.
struct Cluster {
    services: u32,
    agent: Agent,
    server: ApiServer,
    _nodes: TestCluster,
}

impl Cluster {
    fn new(services: u32) -> Result<Self> {
        let nodes = Plan::default().node("node1", &["a"]).raise()?;
        let server = cluster::api_server(nodes.place("node1"), services)?;
        let flags = cluster::flags(services);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let mut agent = Agent::prepare(&require::agent_binary()?, &nodes, "node1", &server, &flags)?;
        agent.spawn()?;
        // Tables begin small, and have grown when the last Service has its place.
        let all = || {
            agent.is_ready(agent.pid())?;
            cluster::is_there(agent.bpf_root(), services)
        };
        eventually(LOADING, all).with_context(|| agent.log_text())?;
        let cluster = Self { services, agent, server, _nodes: nodes };
        for change in 0..WARMING {
            cluster.change(change * (services / WARMING), 1)?;
        }
        Ok(cluster)
    }

    /// What each change of one round took, in milliseconds.
    fn round(&self, round: usize) -> Result<Vec<f64>> {
        let (round, step) = (u32::try_from(round)?, self.services / CHANGES);
        (0..CHANGES).map(|n| self.change((n * step + round) % self.services, 2 + round)).collect()
    }

    /// Replaces one endpoint of a Service; how long that took, in milliseconds.
    fn change(&self, n: u32, version: u32) -> Result<f64> {
        std::thread::sleep(ALONE);
        // They may grow once more.
        let frontends = cluster::frontends(self.agent.bpf_root())?;
        let before =
            frontends.get(&cluster::key(n), 0).with_context(|| format!("Service {n} is in no table"))?;
        let object = cluster::slice(n, version).build();
        let begun = Instant::now();
        self.server.put(&object);
        // The list of endpoints is written elsewhere, and then shown by the frontend.
        while frontends.get(&cluster::key(n), 0)? == before {
            let late = begun.elapsed() >= LOST;
            ensure!(!late, "a change of Service {n} came to nothing\n{}", self.agent.log_text());
            std::thread::sleep(LOOK);
        }
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    }
}

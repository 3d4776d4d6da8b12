//! A lone change of one endpoint, from the API server to the kernel's tables, with very many Services around it.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use agent_kernel::datapath::store::pin::BpfRoot;
use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use proxy_common::abi::{Frontend, FrontendKey, maps};
use proxy_common::addr::{Port, Proto};
use proxy_tests::agent::Agent;
use proxy_tests::apiserver::{ApiServer, Gone};
use proxy_tests::manifests::{Family, Phase, ServicePlan, SlicePlan};
use proxy_tests::probe::eventually;
use proxy_tests::require;
use proxy_tests::test_cluster::{Plan, TestCluster};

use super::ENDPOINTS;
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

type Frontends = HashMap<MapData, FrontendKey, Frontend>;

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
        let at = (Ipv4Addr::LOCALHOST, 6443).into();
        let server = ApiServer::start_in(&nodes.place("node1").netns, at)?;
        for n in 0..services {
            let service = ServicePlan::new(&name(n), &[address(n).into()]).port("http", "TCP", 80, 8080);
            server.put(&service.build());
            server.put(&slice(n, 0).build());
        }
        // It looks through the changes that it remembers for each watch: those of the loading are of no use.
        server.expire(Gone::Event);

        let room = |times: u32| (services * times).to_string();
        let flags = [
            "--cluster-cidr=10.128.0.0/9".to_owned(),
            format!("--max-services={}", room(2)),
            format!("--max-frontends={}", room(2)),
            format!("--max-addresses={}", room(2)),
            format!("--max-backends={}", room(2 * ENDPOINTS)),
            format!("--max-slots={}", room(4 * ENDPOINTS)),
        ];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let mut agent = Agent::prepare(&require::agent_binary()?, &nodes, "node1", &server, &flags)?;
        agent.spawn()?;
        // Tables begin small, and have grown when the last Service has its place.
        let all = || {
            agent.is_ready(agent.pid())?;
            let frontends = frontends(agent.bpf_root())?;
            let each = (0..services).try_for_each(|n| frontends.get(&key(n), 0).map(drop));
            each.context("not all are in the table")
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
        let frontends = frontends(self.agent.bpf_root())?;
        let before = frontends.get(&key(n), 0).with_context(|| format!("Service {n} is in no table"))?;
        let object = slice(n, version).build();
        let begun = Instant::now();
        self.server.put(&object);
        // The list of endpoints is written elsewhere, and then shown by the frontend.
        while frontends.get(&key(n), 0)? == before {
            let late = begun.elapsed() >= LOST;
            ensure!(!late, "a change of Service {n} came to nothing\n{}", self.agent.log_text());
            std::thread::sleep(LOOK);
        }
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    }
}

fn frontends(root: &Path) -> Result<Frontends> {
    let pin = BpfRoot::new(root).settled()?.map(maps::FRONTENDS);
    let map = MapData::from_pin(&pin).with_context(|| format!("opening {}", pin.display()))?;
    Ok(Map::HashMap(map).try_into()?)
}

fn name(n: u32) -> String {
    format!("service-{n}")
}

fn address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 100, 0, 1)) + n)
}

fn key(n: u32) -> FrontendKey {
    FrontendKey::new(IpAddr::from(address(n)).into(), Port::new(80), Proto::TCP)
}

/// Ten endpoints; of another version the last one is another.
fn slice(n: u32, version: u32) -> SlicePlan {
    let mut slice = SlicePlan::new(&name(n), "v4", Family::V4).port("http", "TCP", 8080);
    for k in (0..ENDPOINTS - 1).chain([ENDPOINTS - 1 + version]) {
        let number = n * (ENDPOINTS + 1) + k;
        let pod = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 1)) + number);
        let node = format!("node{}", 2 + number % 100);
        slice = slice.endpoint(&format!("pod-{number}"), pod.into(), Some(&node), Phase::Ready);
    }
    slice
}

//! A node with a client pod and a server pod, and who forwards on it.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use agent_kernel::datapath::store::pin::BpfRoot;
use anyhow::{Context, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData};
use proxy_common::abi::{Frontend, FrontendKey, maps};
use proxy_common::addr::{Port, Proto};
use proxy_tests::agent::Agent;
use proxy_tests::answer::Rate;
use proxy_tests::apiserver::{ApiServer, Gone};
use proxy_tests::pod::Place;
use proxy_tests::probe::Process;
use proxy_tests::require;
use proxy_tests::test_cluster::{Plan as Cluster, TestCluster};

use super::sample::Who;
use super::{ENDPOINTS, PODS, server};
use crate::memory::tables::Tables;
use crate::rulesets::{Fed, PORT, Plan, Service, TARGET};

/// How long one client is measured.
const TURN: &str = "0.15";
/// Longer than any turn.
const PATIENCE: Duration = Duration::from_secs(20);
/// From one change to the next: longer than the least time between two of the agent's syncs, and no part of a tick of it.
const ALONE: Duration = Duration::from_millis(137);
/// Between two looks at a table: the agent is not to be kept from its processor.
const LOOK: Duration = Duration::from_micros(50);
/// Between two looks at the kernel's memory, until it has come to rest, and for how long at most.
const REST: Duration = Duration::from_millis(100);
const RESTLESS: Duration = Duration::from_secs(10);
/// MiB by which it may still move.
const STILL: f64 = 0.3;
const NODE: &str = "node1";

type Frontends = HashMap<MapData, FrontendKey, Frontend>;

/// What became of a cold start.
pub(super) enum Started {
    /// There is nothing to be started.
    Nothing,
    /// It took too long.
    GivenUp,
    /// Until all is in place; and MiB in the kernel.
    Took { time: Duration, memory: f64 },
}

/// Fields go in order.
pub(super) struct Node {
    pub(super) who: Who,
    agent: Option<Agent>,
    api: Option<ApiServer>,
    _server: Process,
    cluster: TestCluster,
}

impl Node {
    pub(super) fn raise(who: Who) -> Result<Self> {
        let plan = Cluster::default().node(NODE, &["client", "server", "second"]).client("elsewhere");
        let cluster = plan.raise()?;
        let (node, pod) = (cluster.place(NODE), cluster.place("server"));
        let addresses = || (0..=ENDPOINTS).map(server);
        let interface = pod.host_interface.as_deref().context("the server pod has no interface")?;
        node.netns.ip(&addresses()
            .map(|own| format!("route add {own}/32 dev {interface}\n"))
            .collect::<String>())?;
        pod.netns.ip(&addresses().map(|own| format!("addr add {own}/32 dev eth0\n")).collect::<String>())?;
        let arguments = ["--port", &TARGET.to_string(), "--seconds", "3600"].map(ToOwned::to_owned);
        let mut server = Process::start(pod, "answer", &arguments)?;
        server.line::<serde_json::Value>(PATIENCE)?;
        Ok(Self { who, agent: None, api: None, _server: server, cluster })
    }

    /// The node's own address.
    pub(super) fn address(&self) -> Ipv4Addr {
        self.cluster.place(NODE).v4
    }

    /// Loads everything, after what was there before has been taken away.
    pub(super) fn start(&mut self, plan: &Plan, limit: Duration) -> Result<Started> {
        match self.who {
            Who::Nobody => Ok(Started::Nothing),
            Who::Agent | Who::AgentTc => self.start_agent(plan, limit),
            Who::Rules(kind) => {
                let node = self.cluster.place(NODE);
                kind.clear(node, limit * 2)?;
                let before = memory_at_rest()?;
                let Fed::Took(time) = kind.load(node, plan, limit)? else {
                    kind.clear(node, limit * 2)?;
                    return Ok(Started::GivenUp);
                };
                Ok(Started::Took { time, memory: memory_at_rest()? - before })
            }
        }
    }

    fn start_agent(&mut self, plan: &Plan, limit: Duration) -> Result<Started> {
        self.agent = None;
        if self.api.is_none() {
            let at = (Ipv4Addr::LOCALHOST, 6443).into();
            let api = ApiServer::start_in(&self.cluster.place(NODE).netns, at)?;
            for service in &plan.services {
                api.put(&service.object());
                api.put(&service.slice());
            }
            // It looks through the changes that it remembers for each watch: those of the loading are of no use.
            api.expire(Gone::Event);
            self.api = Some(api);
        }
        let api = self.api.as_ref().context("no API server")?;
        let flags = flags(u32::try_from(plan.services.len())?);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let agent =
            self.agent.insert(Agent::prepare(&require::agent_binary()?, &self.cluster, NODE, api, &flags)?);
        let begun = Instant::now();
        agent.spawn()?;
        let mut known = 0;
        // The tables are not there yet, and grow while they are filled: they are opened with each look.
        while known < plan.services.len() {
            if let Ok(frontends) = frontends(agent) {
                let there = |service: &&Service| frontends.get(&key(service.address), 0).is_ok();
                known += plan.services[known..].iter().take_while(there).count();
            }
            if begun.elapsed() >= limit {
                self.agent = None;
                return Ok(Started::GivenUp);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let time = begun.elapsed();
        agent.wait_ready()?;
        Ok(Started::Took { time, memory: Tables::of(agent.bpf_root())?.bytes() / MIB })
    }

    /// What the agent holds itself, in MiB, where there is one.
    pub(super) fn process(&self) -> Result<Option<f64>> {
        let Some(agent) = &self.agent else { return Ok(None) };
        let pid = agent.pid().context("the agent does not run")?;
        number(&format!("/proc/{pid}/status"), "VmRSS:").map(Some)
    }

    /// One turn of new connections, by a process in the client pod.
    pub(super) fn turn(&self, who: Who, to: Ipv4Addr) -> Result<Rate> {
        let to = match who {
            Who::Nobody => format!("{}:{TARGET}", server(0)),
            _ => format!("{to}:{PORT}"),
        };
        let place = match who {
            // In a cgroup that is none of the node's. A client of its own, too: a connection that bears the Service's address
            // when it leaves the pod has other sequence numbers than one that does not, and the server has just closed many.
            Who::AgentTc => Place {
                cgroup: self.cluster.place("elsewhere").cgroup.clone(),
                ..self.cluster.place("second").clone()
            },
            _ => self.cluster.place("client").clone(),
        };
        let arguments = ["--to", &to, "--seconds", TURN].map(ToOwned::to_owned);
        let rate: Rate = Process::start(&place, "rate", &arguments)?.line(PATIENCE)?;
        ensure!(
            rate.failed == 0 && rate.done > 0,
            "{}: {} of {} to {to} failed: {}",
            who.name(),
            rate.failed,
            rate.failed + rate.done,
            rate.failure.unwrap_or_default()
        );
        Ok(rate)
    }

    /// Makes the endpoints of one Service those of the plan. For the agent: from the API server to the table.
    pub(super) fn change(&mut self, after: &Plan, before: &Service, limit: Duration) -> Result<Duration> {
        std::thread::sleep(ALONE);
        if let Who::Rules(kind) = self.who {
            let Fed::Took(took) = kind.change(self.cluster.place(NODE), after, before, limit)? else {
                bail!("it took longer than {limit:?}")
            };
            return Ok(took);
        }
        let (agent, api) = self.agent.as_ref().zip(self.api.as_ref()).context("no agent")?;
        let (frontends, key) = (frontends(agent)?, key(before.address));
        let old = frontends.get(&key, 0).context("the Service is in no table")?;
        let slice = after.services.iter().find(|service| service.number == before.number);
        let slice = slice.context("the plan has no such Service")?.slice();
        let begun = Instant::now();
        api.put(&slice);
        // The list of endpoints is written elsewhere, and then shown by the frontend.
        while frontends.get(&key, 0)? == old {
            ensure!(begun.elapsed() < limit, "a change came to nothing\n{}", agent.log_text());
            std::thread::sleep(LOOK);
        }
        Ok(begun.elapsed())
    }
}

/// Bytes of a MiB.
const MIB: f64 = 1_048_576.0;

/// Flags of an agent whose tables have room for so many Services.
fn flags(services: u32) -> Vec<String> {
    let room = |of_each: u32| services.max(1000) * of_each;
    vec![
        format!("--cluster-cidr={PODS}"),
        format!("--max-services={}", room(2)),
        format!("--max-frontends={}", room(2)),
        format!("--max-addresses={}", room(2)),
        format!("--max-backends={}", room(2 * ENDPOINTS)),
        format!("--max-slots={}", room(4 * ENDPOINTS)),
    ]
}

fn frontends(agent: &Agent) -> Result<Frontends> {
    let pin = BpfRoot::new(agent.bpf_root()).settled()?.map(maps::FRONTENDS);
    let map = MapData::from_pin(&pin).with_context(|| format!("opening {}", pin.display()))?;
    Ok(Map::HashMap(map).try_into()?)
}

fn key(address: Ipv4Addr) -> FrontendKey {
    FrontendKey::new(IpAddr::from(address).into(), Port::new(PORT), Proto::TCP)
}

/// What the kernel has taken for itself, in MiB, once it is at rest: it frees old rules when it finds the time.
fn memory_at_rest() -> Result<f64> {
    let begun = Instant::now();
    let mut last = memory()?;
    loop {
        std::thread::sleep(REST);
        let now = memory()?;
        if (now - last).abs() < STILL || begun.elapsed() >= RESTLESS {
            return Ok(now);
        }
        last = now;
    }
}

/// Slabs that cannot be reclaimed, memory by pages, and counters of each processor.
fn memory() -> Result<f64> {
    ["SUnreclaim:", "VmallocUsed:", "Percpu:"].iter().map(|name| number("/proc/meminfo", name)).sum()
}

/// A number of KiB in a file of /proc, in MiB.
fn number(path: &str, name: &str) -> Result<f64> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let word = line.and_then(|line| line.split_whitespace().next());
    let kib: f64 = word.with_context(|| format!("{path} says no {name}"))?.parse()?;
    Ok(kib / 1024.0)
}

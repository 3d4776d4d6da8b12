//! What connections cost: new ones, requests over one, and many bytes over one, from pod to pod, from a pod to a Service,
//! and from outside to a NodePort.
//!
//! Five nodes of the same build, each with a client pod, a server pod and a client outside: one without an agent, one with
//! the agent, one with the agent and sockets left to TC, one with nftables rules, one with those of iptables. The same program
//! asks on all of them, in turns.

mod extra;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::answer::{Rate, Used, Work};
use proxy_tests::manifests::{EndpointController, Family, ManifestDir, ServicePlan};
use proxy_tests::object::{Object, Publish};
use proxy_tests::probe::{Process, eventually};
use proxy_tests::test_cluster::{Plan, TestCluster};

use crate::figure::{Figures, Goal, progress};
use crate::rulesets::{self, Fed, Kind};

/// How long one client is measured.
const TURN: &str = "0.15";
/// Turns are short, so that a busy moment of the machine meets all; there are this many times as many of them.
const TURNS: usize = 3;
/// Longer than any turn.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the agent may take to read the manifests of 10,000 Services.
const LOADING: Duration = Duration::from_secs(120);
/// Services in the large case.
const MANY: u32 = 10_000;
/// Where the server pod listens.
const PORT: u16 = 8080;
/// Where the Service is known to those outside.
const NODE_PORT: u16 = 30_080;
/// The Service.
const VIP: [u8; 4] = [10, 100, 0, 1];

/// Who forwards on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forwarder {
    None,
    Agent,
    AgentTc,
    Rules(Kind),
}

/// A node with a client and a server. Fields go in order.
struct Node {
    server: std::cell::RefCell<Process>,
    agent: Option<(Agent, ManifestDir)>,
    cluster: TestCluster,
}

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    Pod,
    ClusterIp,
    /// From outside.
    NodePort,
}

/// A column of the measurement: on which node, and who is asked.
struct Lane {
    name: &'static str,
    on: Forwarder,
    to: To,
    /// Which lane it is compared with, and what it may cost the processor beside that: a connection; a request or bytes.
    against: &'static [(usize, [Option<f64>; 2])],
}

/// The last number is the goal for a request and for bytes.
const LANES: [Lane; 9] = [
    Lane { name: "pod to pod, no agent", on: Forwarder::None, to: To::Pod, against: &[] },
    Lane {
        name: "pod to pod, agent attached",
        on: Forwarder::Agent,
        to: To::Pod,
        against: &[(0, [Some(1.03), Some(1.02)])],
    },
    Lane {
        name: "ClusterIP, socket LB",
        on: Forwarder::Agent,
        to: To::ClusterIp,
        against: &[(0, [Some(1.04), Some(1.02)]), (4, [None; 2]), (7, [None; 2])],
    },
    Lane {
        name: "ClusterIP, TC",
        on: Forwarder::AgentTc,
        to: To::ClusterIp,
        against: &[(0, [Some(1.04), Some(1.02)]), (4, [None; 2]), (7, [None; 2])],
    },
    Lane {
        name: "ClusterIP, nftables",
        on: Forwarder::Rules(Kind::Nftables),
        to: To::ClusterIp,
        against: &[(0, [None; 2])],
    },
    Lane { name: "NodePort, nftables", on: Forwarder::Rules(Kind::Nftables), to: To::NodePort, against: &[] },
    Lane {
        name: "NodePort, agent",
        on: Forwarder::Agent,
        to: To::NodePort,
        against: &[(5, [Some(0.85), None]), (8, [None; 2])],
    },
    Lane {
        name: "ClusterIP, iptables",
        on: Forwarder::Rules(Kind::Iptables),
        to: To::ClusterIp,
        against: &[(0, [None; 2])],
    },
    Lane { name: "NodePort, iptables", on: Forwarder::Rules(Kind::Iptables), to: To::NodePort, against: &[] },
];

const WORKS: [Work; 3] = [Work::Connections, Work::Requests, Work::Bulk];

pub(crate) fn measure(figures: &mut Figures, rounds: usize) -> Result<()> {
    let mut nodes = Vec::new();
    let rivals = [Kind::Nftables, Kind::Iptables].map(Forwarder::Rules);
    for forwarder in [Forwarder::None, Forwarder::Agent, Forwarder::AgentTc].into_iter().chain(rivals) {
        match Node::raise(forwarder) {
            Ok(node) => nodes.push((forwarder, node)),
            Err(error) => match forwarder {
                // Without the rivals' programs the others can be measured still.
                Forwarder::Rules(kind) => {
                    figures.missing(&format!("wire: {}", kind.name()), &format!("{error:#}"));
                }
                _ => return Err(error.context(format!("a node with {forwarder:?}"))),
            },
        }
    }
    for services in [1, MANY] {
        if services != 1 {
            progress(&format!("wire: loading {services} Services"));
            nodes.iter().try_for_each(|(forwarder, node)| node.load(*forwarder, services))?;
        }
        progress(&format!("wire: {services} Service(s), {} rounds", rounds * TURNS));
        for (work, turns) in WORKS.iter().zip(turns(&nodes, rounds * TURNS)?) {
            report(figures, services, *work, &turns);
        }
    }
    for (_, node) in &nodes {
        if let Some((agent, _)) = &node.agent
            && let Some(memory) = memory(agent)
        {
            figures.value("memory of the agent with 10,000 Services (VmRSS)", "MiB", &[memory]);
            break;
        }
    }
    Ok(())
}

/// What the turns of a lane came to.
#[derive(Clone, Default)]
struct Turns {
    /// Connections, requests or mebibytes a second.
    rates: Vec<f64>,
    /// Processor time of client, server and kernel for each, in microseconds.
    costs: Vec<f64>,
}

/// One of the measures.
type Pick = fn(&Turns) -> &[f64];

/// All turns by work and lane. A lane whose node is missing is empty.
fn turns(nodes: &[(Forwarder, Node)], rounds: usize) -> Result<Vec<Vec<Turns>>> {
    let mut all = vec![vec![Turns::default(); LANES.len()]; WORKS.len()];
    // The first round warms up.
    for round in 0..=rounds {
        let mut order: Vec<usize> = (0..LANES.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for (work, all) in WORKS.iter().zip(&mut all) {
            for index in &order {
                let (lane, turns) = (&LANES[*index], &mut all[*index]);
                let Some((_, node)) = nodes.iter().find(|(forwarder, _)| *forwarder == lane.on) else {
                    continue;
                };
                let again = matches!(lane.on, Forwarder::Rules(_));
                // Rules that masquerade lose a connection now and then, when the port that they choose is not free at the
                // server: such a turn is made once more. Ours is not forgiven.
                let measured = node.turn(lane.to, *work).or_else(|error| match again {
                    true => node.turn(lane.to, *work),
                    false => Err(error),
                });
                let (rate, cost) = measured.with_context(|| format!("{}: {}", work.name(), lane.name))?;
                if round > 0 {
                    turns.rates.push(rate);
                    turns.costs.push(cost);
                }
            }
        }
    }
    Ok(all)
}

fn report(figures: &mut Figures, services: u32, work: Work, turns: &[Turns]) {
    let count = if services == 1 { "1 Service" } else { "10,000 Services" };
    let (rate, cost) = match work {
        Work::Connections => ("connections/s", "us/connection"),
        Work::Requests => ("requests/s", "us/request"),
        Work::Bulk => ("MiB/s", "us/MiB"),
    };
    let measures: [(&str, &str, Pick); 2] =
        [("rate", rate, |turns| &turns.rates), ("CPU", cost, |turns| &turns.costs)];
    for (measure, unit, of) in measures {
        let name = |lane: usize| format!("{}, {measure}: {}, {count}", work.name(), LANES[lane].name);
        for (lane, turn) in turns.iter().enumerate().filter(|(_, turn)| !turn.rates.is_empty()) {
            if LANES[lane].against.is_empty() {
                figures.value(name(lane), unit, of(turn));
            }
            for (other, goals) in LANES[lane].against.iter().filter(|(n, _)| !turns[*n].rates.is_empty()) {
                let name = format!("{} vs {}", name(lane), LANES[*other].name);
                let figure = figures.pair(name, unit, of(turn), of(&turns[*other]));
                let goal = goals[usize::from(work != Work::Connections)];
                if let Some(goal) = goal.filter(|_| measure == "CPU") {
                    figure.within(Goal::Ratio(goal));
                }
            }
        }
    }
}

impl Node {
    fn raise(forwarder: Forwarder) -> Result<Self> {
        let cluster = Plan::default().node("node1", &["client", "server"]).client("outside").raise()?;
        let arguments = ["--port".to_owned(), PORT.to_string()];
        let mut server = Process::start(cluster.place("server"), "answer", &arguments)?;
        server.line::<serde_json::Value>(PATIENCE)?;
        let agent = match forwarder {
            Forwarder::Agent => Some(start_agent(&cluster, "all")?),
            Forwarder::AgentTc => Some(start_agent(&cluster, "host")?),
            Forwarder::None => None,
            Forwarder::Rules(kind) => {
                load_rules(kind, &cluster, 1)?;
                None
            }
        };
        Ok(Self { server: server.into(), agent, cluster })
    }

    /// Adds Services that nobody asks.
    fn load(&self, forwarder: Forwarder, services: u32) -> Result<()> {
        if let Forwarder::Rules(kind) = forwarder {
            kind.clear(self.cluster.place("node1"), LOADING)?;
            load_rules(kind, &self.cluster, services)?;
        }
        let Some((agent, manifests)) = &self.agent else { return Ok(()) };
        manifests.write("extra.json", &extra::services(services - 1)?)?;
        eventually(LOADING, || {
            let status = agent.status_json()?;
            // What is in the table, not what was published.
            let known = find_number(&status, "frontends").context("status tells no number of frontends")?;
            ensure!(known >= services.into(), "the agent has programmed {known} of {services} Services");
            Ok(())
        })
    }

    /// One turn: how many a second, and microseconds of processor time for each.
    fn turn(&self, to: To, work: Work) -> Result<(f64, f64)> {
        let (from, to): (_, SocketAddr) = match to {
            To::Pod => ("client", (self.cluster.place("server").v4, PORT).into()),
            To::ClusterIp => ("client", (VIP, 80).into()),
            To::NodePort => ("outside", (self.cluster.place("node1").v4, NODE_PORT).into()),
        };
        let before = self.used()?;
        let arguments =
            ["--to", &to.to_string(), "--seconds", TURN, "--work", work.name()].map(ToOwned::to_owned);
        let mut client = Process::start(self.cluster.place(from), "rate", &arguments)?;
        let rate: Rate = client.line(PATIENCE)?;
        let used = rate.cpu_seconds + self.used()? - before;
        ensure!(
            rate.failed == 0 && rate.done > 0,
            "{} of {} to {to} failed: {}",
            rate.failed,
            rate.failed + rate.done,
            rate.failure.unwrap_or_default()
        );
        #[expect(clippy::cast_precision_loss, reason = "a count of one turn")]
        let done = rate.done as f64;
        Ok((done / rate.seconds, used * 1e6 / done))
    }

    /// Processor time of the server so far.
    fn used(&self) -> Result<f64> {
        let mut server = self.server.borrow_mut();
        server.order("report")?;
        Ok(server.line::<Used>(PATIENCE)?.cpu_seconds)
    }
}

/// Rules for the one Service, and as many more as make up `services`.
fn load_rules(kind: Kind, cluster: &TestCluster, services: u32) -> Result<()> {
    kind.needs()?;
    let node = cluster.place("node1");
    let web = rulesets::Service {
        number: 0,
        proto: "tcp",
        address: VIP.into(),
        node_port: Some(NODE_PORT),
        endpoints: vec![cluster.place("server").v4],
    };
    let extra = (0..services - 1).map(|n| rulesets::Service {
        number: 1 + n,
        proto: "tcp",
        address: extra::address(n),
        node_port: None,
        endpoints: extra::endpoints(n).collect(),
    });
    let plan = rulesets::Plan {
        node: node.v4,
        pods: TestCluster::CLUSTER_CIDRS[0],
        services: std::iter::once(web).chain(extra).collect(),
    };
    let fed = kind.load(node, &plan, LOADING)?;
    ensure!(fed != Fed::GivenUp, "loading {services} Services took longer than {LOADING:?}");
    Ok(())
}

/// An agent with the one Service, whose pod is the server.
fn start_agent(cluster: &TestCluster, socket_lb: &str) -> Result<(Agent, ManifestDir)> {
    let manifests = ManifestDir::new()?;
    let service =
        ServicePlan::new("web", &[VIP.into()]).port("http", "TCP", 80, PORT).node_port(NODE_PORT).build();
    manifests.publish(&Object::from(&service))?;
    let ports = [("http", "TCP", PORT)];
    EndpointController::adopt(&manifests, "web", &ports, &[Family::V4], &[cluster.place("server")])?;
    let ranges = TestCluster::CLUSTER_CIDRS.join(",");
    let flags = ["--cluster-cidr", &ranges, "--socket-lb", socket_lb];
    let agent = Agent::start(cluster, "node1", &manifests, &flags)?;
    Ok((agent, manifests))
}

/// The number called `name`, wherever it stands in what `status` says.
fn find_number(value: &serde_json::Value, name: &str) -> Option<u64> {
    match value {
        serde_json::Value::Object(members) => members
            .get(name)
            .and_then(serde_json::Value::as_u64)
            .or_else(|| members.values().find_map(|member| find_number(member, name))),
        _ => None,
    }
}

/// What the agent holds in memory, in MiB.
fn memory(agent: &Agent) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid()?)).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib / 1024.0)
}

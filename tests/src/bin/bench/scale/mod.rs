//! What grows with the number of Services: beside no proxy, and beside rules of nftables and of iptables.
//!
//! For each number four nodes are raised, with a client pod and a server pod each: one with nothing, one with the agent and
//! an API server, two with rules. The Service that is asked, and whose endpoint changes, stands in the middle of the others.

mod curve;
mod node;
mod sample;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use self::node::{Node, Started};
use self::sample::{Measure, Samples, Who};
use crate::figure::{Figures, progress};
use crate::rulesets::{Kind, Plan, Service};

/// Numbers of Services.
const SIZES: [u32; 5] = [1, 100, 1_000, 10_000, 30_000];
/// Endpoints of each.
const ENDPOINTS: u32 = 10;
/// One Service in so many has a NodePort.
const NODE_PORTS: u32 = 20;
/// The first of them.
const FIRST_NODE_PORT: u16 = 30_000;
/// Cold starts of each, and what all of one size may take before no further round begins.
const STARTS: usize = 3;
const STARTING: Duration = Duration::from_secs(90);
/// The same for changes.
const CHANGING: Duration = Duration::from_secs(60);
/// What takes longer is left out.
const LIMIT: Duration = Duration::from_secs(180);
/// Turns of connections are short: so many of them are one round.
const TURNS: usize = 2;
/// All pods of the cluster.
const PODS: &str = "10.128.0.0/9";

pub(crate) fn measure(figures: &mut Figures, rounds: usize) -> Result<()> {
    for kind in [Kind::Nftables, Kind::Iptables] {
        kind.needs()?;
    }
    let mut samples = Samples::default();
    let out = figures.out.join("scale");
    let measured = SIZES.iter().try_for_each(|services| {
        size(*services, rounds, &mut samples, figures).with_context(|| format!("{services} Services"))?;
        // The largest take long: who ends it then has the others.
        curve::save(&out, &samples)
    });
    // What has been measured is shown, whatever came later.
    samples.report(figures);
    measured
}

fn size(services: u32, rounds: usize, samples: &mut Samples, figures: &mut Figures) -> Result<()> {
    progress(&format!("scale: {services} Service(s) with {ENDPOINTS} endpoints each"));
    let mut nodes = Who::NODES
        .into_iter()
        .map(|who| Node::raise(who).with_context(|| format!("a node with {}", who.name())))
        .collect::<Result<Vec<_>>>()?;
    let plans = [0, 1].map(|version| plan(services, version, nodes[0].address()));
    starts(services, &plans[0], &mut nodes, samples, figures)?;
    progress("scale: connections");
    connections(services, rounds * TURNS, &nodes, samples)?;
    progress("scale: one changed endpoint");
    changes(services, rounds, &plans, &mut nodes, samples)
}

/// Everything is loaded from nothing. Who takes too long is left out.
fn starts(
    services: u32,
    plan: &Plan,
    nodes: &mut Vec<Node>,
    samples: &mut Samples,
    figures: &mut Figures,
) -> Result<()> {
    let begun = Instant::now();
    let mut given_up = Vec::new();
    for round in 0..STARTS {
        for node in nodes.iter_mut() {
            if given_up.contains(&node.who) {
                continue;
            }
            let started = node.start(plan, LIMIT).with_context(|| format!("starting {}", node.who.name()))?;
            match started {
                Started::Nothing => {}
                Started::GivenUp => given_up.push(node.who),
                Started::Took { time, memory } => {
                    samples.add(services, Measure::Start, node.who, time.as_secs_f64() * 1e3);
                    samples.add(services, Measure::Memory, node.who, memory);
                }
            }
        }
        progress(&format!("scale: cold start {} of {STARTS}", round + 1));
        if begun.elapsed() > STARTING {
            break;
        }
    }
    for who in &given_up {
        let name = format!("{services} Services, {}: LEFT OUT, not loaded within", who.name());
        figures.value(name, "s", &[LIMIT.as_secs_f64()]);
    }
    if let Some(process) = nodes.iter().find_map(|node| node.process().transpose()) {
        samples.add(services, Measure::Process, Who::Agent, process?);
    }
    nodes.retain(|node| !given_up.contains(&node.who));
    Ok(())
}

/// New connections, in turns.
fn connections(services: u32, rounds: usize, nodes: &[Node], samples: &mut Samples) -> Result<()> {
    // The first round warms up.
    for round in 0..=rounds {
        let mut order = Who::ALL;
        if round % 2 == 1 {
            order.reverse();
        }
        for who in order {
            let Some(node) = nodes.iter().find(|node| node.who == who.node()) else { continue };
            let rate = node.turn(who, vip(asked(services)))?;
            if round > 0 {
                #[expect(clippy::cast_precision_loss, reason = "a count of one turn")]
                samples.add(services, Measure::Rate, who, rate.done as f64 / rate.seconds);
                samples.add(services, Measure::Connect, who, rate.connect_us);
            }
        }
    }
    Ok(())
}

/// One endpoint of the Service in the middle becomes another, and back.
fn changes(
    services: u32,
    rounds: usize,
    plans: &[Plan; 2],
    nodes: &mut [Node],
    samples: &mut Samples,
) -> Result<()> {
    let begun = Instant::now();
    let at = asked(services) as usize;
    // The first round warms up.
    for round in 0..=rounds {
        let (before, after) = (&plans[round % 2], &plans[(round + 1) % 2]);
        for node in nodes.iter_mut().filter(|node| node.who != Who::Nobody) {
            let took = node
                .change(after, &before.services[at], LIMIT)
                .with_context(|| format!("one endpoint, {}", node.who.name()))?;
            if round > 0 {
                samples.add(services, Measure::Change, node.who, took.as_secs_f64() * 1e3);
            }
        }
        if begun.elapsed() > CHANGING {
            break;
        }
    }
    Ok(())
}

/// The number of the Service in the middle.
const fn asked(services: u32) -> u32 {
    services / 2
}

/// The address of a Service.
fn vip(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 100, 0, 1)) + n)
}

/// The addresses of the server pod, one more than a Service has endpoints.
fn server(k: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 244, 1, 100)) + k)
}

/// All Services. Behind the one in the middle is the server pod under ten addresses; of the other version the last is another.
fn plan(services: u32, version: u32, node: Ipv4Addr) -> Plan {
    let endpoints = |n: u32| -> Vec<Ipv4Addr> {
        if n == asked(services) {
            return (0..ENDPOINTS - 1).chain([ENDPOINTS - 1 + version]).map(server).collect();
        }
        let pod = |k| Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 1)) + n * ENDPOINTS + k);
        (0..ENDPOINTS).map(pod).collect()
    };
    let service = |n: u32| Service {
        number: n,
        proto: "tcp",
        address: vip(n),
        node_port: n
            .is_multiple_of(NODE_PORTS)
            .then(|| u16::try_from(n / NODE_PORTS).ok()?.checked_add(FIRST_NODE_PORT))
            .flatten(),
        endpoints: endpoints(n),
    };
    Plan { node, pods: PODS, services: (0..services).map(service).collect() }
}

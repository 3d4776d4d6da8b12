//! Upgrades and downgrades across a changed table layout, back and forth, while clients of every kind go on.
//!
//! The other layout is made up (`cargo xtask build-ebpf --next`). Connections are held from a pod, from the node itself and from
//! outside, over TCP and UDP and both families, busy and nearly idle, some of them masqueraded, some bound to their endpoint;
//! new ones come all the time. The agent may be killed at any moment of a change, and the next one starts at once.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::agent::{Agent, FLAGS};
use crate::answer::{Hold, Load};
use crate::manifests::{EndpointController, ManifestDir, Phase, ServicePlan};
use crate::object::{Object, Publish};
use crate::pod::Place;
use crate::probe::{Ask, Runner, Server, eventually};
use crate::town::{Plan as TownPlan, Town};

/// How soon everything must go on.
const SOON: Duration = Duration::from_secs(20);
/// How long a new connection may take.
const PATIENT: Duration = Duration::from_secs(5);
/// The endpoints' port.
const TARGET: u16 = 8080;

/// What is played.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Changes of the layout, each there or back.
    pub rounds: u32,
    /// With each change whose number this divides the agent is killed; 0 for never.
    pub kill_every: u32,
    /// Where the random numbers begin.
    pub seed: u64,
}

/// What clients have seen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// Changes of the layout that were whole.
    pub changes: u32,
    /// Agents that were killed over one.
    pub killed: u32,
    /// Connections that were held all the time.
    pub held: usize,
    /// Of these, those that broke or lost an answer, with what happened.
    pub broken: Vec<String>,
    /// New connections and questions.
    pub requests: u64,
    /// Of these, those that failed.
    pub failed: u64,
    /// How they failed.
    pub reasons: Vec<String>,
    /// The longest time in which nothing new began, in milliseconds, as the agent says.
    pub longest_pause_ms: f64,
}

impl Seen {
    /// Whether nobody has noticed anything.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.broken.is_empty() && self.failed == 0 && self.requests != 0
    }
}

/// Two nodes with three Services, and an agent on the first of them. Fields are dropped in order.
#[derive(Debug)]
pub struct Scene {
    _servers: Vec<Server>,
    /// The agent.
    pub agent: Agent,
    manifests: ManifestDir,
    town: Town,
}

impl Scene {
    /// Raises it; the agent gets these flags.
    pub fn raise(flags: &[&str]) -> Result<Self> {
        let town = TownPlan::default()
            .node("node1", &["a", "b"])
            .host_pod("h1")
            .node("node2", &["c", "d"])
            .client_via("outside", "node1")
            .raise()?;
        let manifests = ManifestDir::new()?;
        let start = |pod| Server::start(town.place(pod), &[TARGET]);
        let servers = ["b", "c"].into_iter().map(start).collect::<Result<_>>()?;
        publish(&manifests, &town, "web", 1, &["b", "c"], |service| service)?;
        publish(&manifests, &town, "far", 2, &["c"], |service| service)?;
        publish(&manifests, &town, "sticky", 3, &["b", "c"], |service| service.affinity(10_800))?;
        let agent = Agent::start(&town, "node1", &manifests, flags)?;
        Ok(Self { _servers: servers, agent, manifests, town })
    }

    /// Everybody who asks, for so long at most.
    pub fn clients(&self, limit: Duration) -> Result<Clients> {
        let mut clients = Clients::begin(&self.town, limit)?;
        clients.go_on(3, 3)?;
        Ok(clients)
    }

    /// As many Services more, over TCP and UDP and both families, with an endpoint.
    pub fn add_services(&self, count: u16) -> Result<()> {
        for n in 0..count {
            let [high, low] = n.to_be_bytes();
            let v4 = IpAddr::from([10, 97, high, low]);
            let v6 = IpAddr::from([0xfd00, 0x10, 0x97, 0, 0, 0, 0, n]);
            let name = format!("more{n}");
            let plan = ServicePlan::new(&name, &[v4, v6]);
            let plan = plan.port("tcp", "TCP", 80, TARGET).port("udp", "UDP", 80, TARGET);
            self.manifests.publish(&Object::from(&plan.build()))?;
            let ports = [("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)];
            EndpointController::new(&self.manifests, &name, &ports)?
                .set(self.town.place("c"), Phase::Ready)?;
        }
        Ok(())
    }
}

/// Plays it. Counters that fall are an error.
pub fn play(plan: &Plan) -> Result<Seen> {
    let binaries = [crate::require::agent_binary()?, crate::require::next_agent_binary()?];
    let mut scene = Scene::raise(&FLAGS)?;
    let limit = Duration::from_secs(60 + u64::from(plan.rounds) * 20);
    let mut clients = scene.clients(limit)?;
    let agent = &mut scene.agent;
    let mut seen = Seen::default();
    let mut random = plan.seed;
    let mut counted = counters(agent)?;
    for round in 0..plan.rounds {
        super::progress(&format!("upgrade: round {} of {}", round + 1, plan.rounds));
        let next: &PathBuf = &binaries[usize::from(round % 2 == 0)];
        if random.is_multiple_of(2) {
            agent.stop()?;
        } else {
            agent.kill()?;
        }
        agent.becomes(next);
        agent.spawn()?;
        random = step(random);
        if plan.kill_every != 0 && round.is_multiple_of(plan.kill_every) {
            // Loading takes about a second; what comes after is what matters.
            let point = Duration::from_millis(random % 3_000);
            std::thread::sleep(point);
            agent.kill()?;
            seen.killed += 1;
            agent.spawn()?;
        }
        agent.wait_ready()?;
        clients.go_on(3, 1).with_context(|| format!("round {round}: {}", agent.log_text()))?;
        seen.changes += 1;
        let now = counters(agent)?;
        for (name, before) in &counted {
            let after = now.iter().find(|(other, _)| other == name).map_or(0, |(_, count)| *count);
            ensure!(after >= *before, "round {round}: the counter of {name} falls from {before} to {after}");
        }
        counted = now;
    }
    seen.longest_pause_ms = longest_pause(&agent.log_text());
    clients.end(&mut seen)?;
    Ok(seen)
}

/// SplitMix64.
fn step(state: u64) -> u64 {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// How often each Service was chosen, and how often each reason was counted.
fn counters(agent: &Agent) -> Result<Vec<(String, u64)>> {
    let services = agent.service_list_json()?;
    let mut found = Vec::new();
    for service in services.as_array().context("a list of Services")? {
        let name = ["service", "type", "protocol", "family"].map(|field| service[field].to_string());
        found.push((name.join(" "), service["chosen"].as_u64().context("a counter")?));
    }
    ensure!(found.iter().any(|(_, count)| *count > 0), "nothing is counted: {services:#}");
    Ok(found)
}

fn longest_pause(log: &str) -> f64 {
    let pauses = log.lines().filter_map(|line| {
        let (_, rest) = line.split_once("what was new waited for ")?;
        rest.split(' ').next()?.parse::<f64>().ok()
    });
    pauses.fold(0.0, f64::max)
}

fn publish<'a>(
    to: &'a ManifestDir,
    town: &Town,
    name: &str,
    n: u8,
    pods: &[&str],
    change: impl Fn(ServicePlan) -> ServicePlan,
) -> Result<EndpointController<'a>> {
    let node_port = 30_079 + u16::from(n);
    let plan = ServicePlan::new(name, &vips(n))
        .port("tcp", "TCP", 80, TARGET)
        .node_port(node_port)
        .port("udp", "UDP", 80, TARGET)
        .node_port(node_port);
    to.publish(&Object::from(&change(plan).build()))?;
    let mut controller =
        EndpointController::new(to, name, &[("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)])?;
    for pod in pods {
        controller.set(town.place(pod), Phase::Ready)?;
    }
    Ok(controller)
}

fn vips(n: u8) -> [IpAddr; 2] {
    [format!("10.96.0.{n}"), format!("fd00:10:96::{n}")].map(|text| text.parse().expect("an address"))
}

/// Everybody who asks.
#[derive(Debug)]
pub struct Clients {
    loads: Vec<(String, Runner<Load>)>,
    busy: Vec<(String, Runner<Hold>)>,
    idle: Vec<(String, Runner<Hold>)>,
}

impl Clients {
    fn begin(town: &Town, limit: Duration) -> Result<Self> {
        let mut clients = Self { loads: Vec::new(), busy: Vec::new(), idle: Vec::new() };
        let (pod, host, outside) = (town.place("a"), town.place("h1"), town.place("outside"));
        let node = town.place("node1");
        let service = |n: u8| vips(n).map(|vip| SocketAddr::new(vip, 80));
        for (place, targets) in [(pod, service(1)), (host, service(1)), (outside, node.at(30_080))] {
            for to in targets {
                clients.load(place, &Ask::tcp(to).timeout(PATIENT), to, limit)?;
            }
        }
        // One question each: what is lost fails.
        for (place, targets) in [(pod, service(2)), (outside, node.at(30_081))] {
            for to in targets {
                clients.load(place, &Ask::udp(to).timeout(PATIENT), to, limit)?;
            }
        }
        for to in service(3) {
            clients.load(pod, &Ask::tcp(to).timeout(PATIENT), to, limit)?;
        }
        for (place, targets) in
            [(pod, service(2)), (host, service(2)), (outside, node.at(30_081)), (pod, service(3))]
        {
            for to in targets {
                for ask in [Ask::tcp(to), Ask::udp(to)] {
                    clients.hold(place, &ask.timeout(PATIENT), to, limit)?;
                }
            }
        }
        Ok(clients)
    }

    fn load(&mut self, place: &Place, ask: &Ask, to: SocketAddr, limit: Duration) -> Result<()> {
        let runner = Runner::load(place, ask, 20, 2, limit)?;
        self.loads.push((format!("{} → {to} ({ask:?})", place.name), runner));
        Ok(())
    }

    fn hold(&mut self, place: &Place, ask: &Ask, to: SocketAddr, limit: Duration) -> Result<()> {
        let what = format!("{} holds {to} ({ask:?})", place.name);
        self.busy.push((what.clone(), Runner::hold(place, ask, Duration::from_millis(20), limit)?));
        self.idle.push((what, Runner::hold(place, ask, Duration::from_secs(3), limit)?));
        Ok(())
    }

    /// Waits until each has been answered so many times more; whoever fails is told at the end.
    pub fn go_on(&mut self, answers: u64, idle: u64) -> Result<()> {
        for (what, runner) in &mut self.loads {
            let before = runner.report()?;
            let before = before.made + before.failed;
            eventually(SOON, || {
                let now = runner.report()?;
                ensure!(now.made + now.failed >= before + answers, "{what} stands still: {now:?}");
                Ok(())
            })?;
        }
        let busy = self.busy.iter_mut().map(|(what, runner)| (what, runner, answers));
        let idle = self.idle.iter_mut().map(|(what, runner)| (what, runner, idle));
        for (what, runner, answers) in busy.chain(idle) {
            let before = runner.report()?;
            let before = before.made + before.failed;
            eventually(SOON, || {
                let now = runner.report()?;
                ensure!(
                    now.broke.is_some() || now.made + now.failed >= before + answers,
                    "{what} stands still: {now:?}"
                );
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Ends all of them, and adds what they have seen.
    pub fn end(self, seen: &mut Seen) -> Result<()> {
        let Self { loads, busy, idle } = self;
        for (what, runner) in loads {
            let load = runner.stop()?;
            seen.requests += load.made + load.failed;
            seen.failed += load.failed;
            if load.failed != 0 {
                seen.reasons.push(format!("{what}: {load:?}"));
            }
            if what.contains("10.96.0.3") || what.contains("fd00:10:96::3") {
                ensure!(load.names.len() == 1, "{what}: a client that is bound was led elsewhere: {load:?}");
            }
        }
        for (what, runner) in busy.into_iter().chain(idle) {
            let hold = runner.stop()?;
            seen.held += 1;
            if hold.failed != 0 || hold.broke.is_some() || hold.names.len() != 1 {
                seen.broken.push(format!("{what}: {hold:?}"));
            }
        }
        Ok(())
    }
}

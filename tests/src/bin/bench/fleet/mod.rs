//! What the agents of many nodes ask of an API server, and what that costs it and them: at their start, for a change, when
//! it comes back, and at rest.
//!
//! The server is the one of the tests, in this process on a thread of its own: its requests and bytes are those of a real one, its
//! processor time is not. The agents are their source halves alone, all on another thread.

mod agents;
mod request;
mod scene;

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use proxy_tests::netns::Netns;
use proxy_tests::probe::eventually;

use self::agents::Agents;
use self::request::{busiest, goes_on, lists, reads_storage, spread};
use self::scene::{Scene, Spent};
use crate::cluster::{self, ENDPOINTS};
use crate::figure::{Figures, Goal, median, progress, rank};

/// Services of the cluster: what lists cost grows with them.
const SERVICES: u32 = 500;
/// Kinds that an agent watches.
const KINDS: usize = 4;
/// How long all may take to have everything, and to hear of a change.
const LOADING: Duration = Duration::from_secs(300);
const HEARING: Duration = Duration::from_secs(30);
/// After which a start is over: agents read one ConfigMap some seconds after their lists.
const STARTED: Duration = Duration::from_secs(8);
const CHANGES: u32 = 20;
/// How long the server is away: less than a real one needs, and a crowd comes back closer together the sooner it is.
const AWAY: Duration = Duration::from_secs(5);
/// Parts of an hour at rest, and what passes between them. The second is as long as the longest watch that is begun anew.
const FIRST: Duration = Duration::from_secs(60);
const BETWEEN: Duration = Duration::from_secs(180);
const LATER: Duration = Duration::from_secs(120);
const HOUR: f64 = 3600.0;
const KIB: f64 = 1024.0;
/// Which share of the nodes may come back within a tenth of a second: twice what it would be if all came evenly.
const CROWD: f64 = 0.2;

pub(crate) fn measure(figures: &mut Figures, nodes: usize) -> Result<()> {
    descriptors()?;
    Netns::new("fleet")?.run_in(|| Fleet::start(figures, nodes)?.all(figures))?
}

fn node_name(node: usize) -> String {
    format!("node{node}")
}

/// Connections have two ends here.
fn descriptors() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("reading the limit of descriptors")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the limit of descriptors")
}

struct Fleet {
    nodes: usize,
    agents: Agents,
    scene: Scene,
}

impl Fleet {
    /// All agents start at once, and nothing is known to them.
    fn start(figures: &mut Figures, nodes: usize) -> Result<Self> {
        progress(&format!("fleet: {nodes} agents start, {SERVICES} Services x {ENDPOINTS}"));
        let mut scene = Scene::new(nodes, SERVICES)?;
        let begun = scene.up()?;
        let before = scene.spent()?;
        let agents = Agents::start(nodes, &scene.kubeconfig())?;
        let times = agents.complete(nodes, LOADING)?;
        sleep(STARTED);
        let spent = scene.spent()?.since(&before);
        figures.value("cold start: until half have everything", "s", &[median(&seconds(&times, begun))]);
        figures.value("cold start: until all have everything", "s", &[rank(&seconds(&times, begun), 1.0)]);
        let fleet = Self { nodes, agents, scene };
        fleet.costs(figures, "cold start", &spent, 1.0);
        Ok(fleet)
    }

    fn all(mut self, figures: &mut Figures) -> Result<()> {
        self.changes(figures)?;
        self.rest(figures, "first minute at rest", FIRST)?;
        progress(&format!("fleet: {} s at rest go by", BETWEEN.as_secs()));
        sleep(BETWEEN);
        self.rest(figures, "after four minutes at rest", LATER)?;
        self.cut(figures)?;
        self.restart(figures, "restart, versions known", false)?;
        self.restart(figures, "restart, versions forgotten", true)
    }

    /// One endpoint of a Service is another.
    fn changes(&self, figures: &mut Figures) -> Result<()> {
        progress(&format!("fleet: {CHANGES} changed endpoints"));
        let (mut half, mut last) = (Vec::new(), Vec::new());
        let before = self.scene.spent()?;
        for n in 0..CHANGES {
            self.agents.forget();
            let slice = cluster::slice(n * (SERVICES / CHANGES), 1).build();
            let begun = Instant::now();
            self.scene.server()?.put(&slice);
            let times = seconds(&self.agents.reached(self.nodes, HEARING)?, begun);
            ensure!(times.len() == self.nodes, "{} agents heard of one change", times.len());
            half.push(median(&times) * 1e3);
            last.push(rank(&times, 1.0) * 1e3);
        }
        let spent = self.scene.spent()?.since(&before);
        figures.value("changed endpoint: until half have heard", "ms", &half);
        figures.value("changed endpoint: until all have heard", "ms", &last);
        self.costs(figures, "changed endpoint", &spent, f64::from(CHANGES));
        Ok(())
    }

    /// Nothing happens.
    fn rest(&self, figures: &mut Figures, what: &str, time: Duration) -> Result<()> {
        progress(&format!("fleet: {what}"));
        let before = self.scene.spent()?;
        sleep(time);
        let spent = self.scene.spent()?.since(&before);
        let others = spent.requests.iter().filter(|request| !goes_on(request)).count();
        let hours = spent.at.duration_since(before.at).as_secs_f64() / HOUR;
        // At first each agent has the server tell its version, once for each kind whose list is long.
        let name = format!("{what}: requests of an agent that do not go on with a watch");
        let most = if time == FIRST { 2.0 } else { 0.0 };
        figures.value(name, "", &[count(others) / count(self.nodes)]).within(Goal::Value(most));
        let name = format!("{what}: new connections");
        figures.value(name, "", &[count(spent.connections.len())]).within(Goal::Value(0.0));
        self.costs(figures, &format!("{what}, an hour"), &spent, hours);
        Ok(())
    }

    /// All connections break at once, and the server is there: as when something on the way ends.
    fn cut(&self, figures: &mut Figures) -> Result<()> {
        progress("fleet: all connections break");
        let before = self.scene.spent()?;
        let begun = Instant::now();
        self.scene.server()?.cut();
        self.back(figures, "connections cut", begun, &before)
    }

    fn restart(&mut self, figures: &mut Figures, what: &str, forget: bool) -> Result<()> {
        progress(&format!("fleet: {what}, after {} s", AWAY.as_secs()));
        self.scene.down(forget);
        let before = self.scene.spent()?;
        sleep(AWAY);
        let begun = self.scene.up()?;
        self.back(figures, what, begun, &before)
    }

    /// Waits until everything is watched again.
    fn back(&self, figures: &mut Figures, what: &str, begun: Instant, before: &Spent) -> Result<()> {
        let all = u64::try_from(self.nodes * KINDS)?;
        eventually(LOADING, || {
            let watches = self.scene.server()?.watches();
            ensure!(watches == all, "{watches} of {all} watches have begun again");
            Ok(())
        })?;
        // Lists end after their watches have begun.
        sleep(STARTED);
        let spent = self.scene.spent()?.since(before);
        let times = seconds(&spent.connections, begun);
        progress(&format!("fleet: {what}: connections by time: {}", spread(&spent.connections, begun)));
        figures.value(format!("{what}: until half of the connections are back"), "s", &[median(&times)]);
        figures.value(format!("{what}: until all connections are back"), "s", &[rank(&times, 1.0)]);
        figures
            .value(
                format!("{what}: connections in the busiest 100 ms"),
                "",
                &[count(busiest(&spent.connections))],
            )
            .within(Goal::Value((count(self.nodes) * CROWD).ceil()));
        self.costs(figures, what, &spent, 1.0);
        Ok(())
    }

    /// What one of so many turns has cost, an agent.
    fn costs(&self, figures: &mut Figures, what: &str, spent: &Spent, turns: f64) {
        let each = count(self.nodes) * turns;
        let stored = spent.requests.iter().filter(|request| reads_storage(request)).count();
        let listed = spent.requests.iter().filter(|request| lists(request)).count();
        let name = format!("{what}: requests that are not answered from the cache");
        figures.value(name, "requests", &[count(stored)]).within(Goal::Value(0.0));
        for (of, unit, value) in [
            ("connections of an agent", "", count(spent.connections.len())),
            ("requests of an agent", "", count(spent.requests.len())),
            ("of them lists", "", count(listed)),
            ("to an agent", "KiB", spent.sent as f64 / KIB),
            ("from an agent", "KiB", spent.received as f64 / KIB),
            ("processor time of the server for an agent", "ms", spent.server.as_secs_f64() * 1e3),
            ("processor time of an agent", "ms", spent.agents.as_secs_f64() * 1e3),
        ] {
            figures.value(format!("{what}: {of}"), unit, &[value / each]);
        }
    }
}

fn seconds(times: &[Instant], from: Instant) -> Vec<f64> {
    times.iter().map(|time| time.saturating_duration_since(from).as_secs_f64()).collect()
}

fn count(number: usize) -> f64 {
    number as f64
}

//! What an agent keeps: the tables of a node that does nothing yet, and the process with a large cluster.

pub(crate) mod tables;

use std::time::Duration;

use anyhow::{Context, Result};
use proxy_tests::agent::{Agent, Feed};
use proxy_tests::manifests::ManifestDir;
use proxy_tests::probe::eventually;
use proxy_tests::require;
use proxy_tests::test_cluster::{Plan, TestCluster};

use self::tables::Tables;
use crate::cluster;
use crate::figure::{Figures, Goal, progress};
use crate::process::{MIB, Memory};

/// Services of a large cluster, and of one that is very large.
const SERVICES: u32 = 10_000;
const MANY: u32 = 50_000;
/// How long the agent may take to read everything, and then to come to rest.
const LOADING: Duration = Duration::from_secs(240);
const REST: Duration = Duration::from_secs(10);
/// CPUs of a large machine: what each has for itself counts so often there.
const CPUS: u32 = 64;
const NODE: &str = "node1";

/// Goals, in MiB.
const IDLE: f64 = 16.0;
const COUNTERS: f64 = 2.0;
const MANIFEST: f64 = 100.0;

pub(crate) fn measure(figures: &mut Figures, _rounds: usize) -> Result<()> {
    idle(figures)?;
    for (services, resident, peak) in [(SERVICES, 60.0, 100.0), (MANY, 250.0, 350.0)] {
        progress(&format!("memory: {services} Services x {} from an API server", cluster::ENDPOINTS));
        let used = with_api_server(services)?;
        let name =
            |what: &str| format!("agent, {services} Services x {} from the API, {what}", cluster::ENDPOINTS);
        figures.value(name("resident"), "MiB", &[used.resident]).within(Goal::Value(resident));
        figures.value(name("peak"), "MiB", &[used.peak]).within(Goal::Value(peak));
        figures.value(name("tables"), "MiB", &[used.tables]);
    }
    progress(&format!("memory: {SERVICES} Services x {} from one manifest", cluster::ENDPOINTS));
    let used = with_manifest(SERVICES)?;
    let name =
        |what: &str| format!("agent, {SERVICES} Services x {} from one manifest, {what}", cluster::ENDPOINTS);
    figures.value(name("resident"), "MiB", &[used.resident]).within(Goal::Value(MANIFEST));
    figures.value(name("peak"), "MiB", &[used.peak]);
    Ok(())
}

/// The tables of an agent with default settings and no Services.
fn idle(figures: &mut Figures) -> Result<()> {
    progress("memory: tables of an idle node");
    let cluster = Plan::default().node(NODE, &["a"]).raise()?;
    let manifests = ManifestDir::new()?;
    let agent = Agent::start(&cluster, NODE, &manifests, &[])?;
    let tables = Tables::of(agent.bpf_root())?;
    figures.value("tables of an idle node", "MiB", &[tables.bytes() / MIB]).within(Goal::Value(IDLE));
    figures
        .value(format!("counters on {CPUS} CPUs"), "MiB", &[tables.counters(CPUS) / MIB])
        .within(Goal::Value(COUNTERS));
    for (name, bytes) in tables.largest() {
        figures.value(format!("of them {name}"), "MiB", &[bytes / MIB]);
    }
    let used = used(&agent)?;
    figures.value("agent of an idle node, resident", "MiB", &[used.resident]);
    Ok(())
}

fn with_api_server(services: u32) -> Result<Used> {
    let nodes = Plan::default().node(NODE, &["a"]).raise()?;
    let server = cluster::api_server(nodes.place(NODE), services)?;
    serve(&nodes, &server, services)
}

fn with_manifest(services: u32) -> Result<Used> {
    let nodes = Plan::default().node(NODE, &["a"]).raise()?;
    let manifests = ManifestDir::new()?;
    manifests.write("all.json", &cluster::manifest(services)?)?;
    serve(&nodes, &manifests, services)
}

/// What a process has and had at most, and what its tables take, in MiB.
struct Used {
    resident: f64,
    peak: f64,
    tables: f64,
}

fn serve(nodes: &TestCluster, feed: impl Into<Feed>, services: u32) -> Result<Used> {
    let flags = cluster::flags(services);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mut agent = Agent::prepare(&require::agent_binary()?, nodes, NODE, feed, &flags)?;
    agent.spawn()?;
    // Tables begin small, and have grown when the last Service has its place.
    let all = || {
        agent.is_ready(agent.pid())?;
        cluster::is_there(agent.bpf_root(), services)
    };
    eventually(LOADING, all).with_context(|| agent.log_text())?;
    std::thread::sleep(REST);
    used(&agent)
}

fn used(agent: &Agent) -> Result<Used> {
    let pid = agent.pid().context("the agent does not run")?;
    let Memory { resident, peak } = Memory::of(pid)?;
    let tables = Tables::of(agent.bpf_root())?.bytes() / MIB;
    Ok(Used { resident, peak, tables })
}

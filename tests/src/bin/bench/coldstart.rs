//! An agent's process from its start until its tables are complete, with Services from an API server.
//!
//! Beside it what it takes only to decode the same objects. In a start there are also the programs, which the kernel
//! verifies, and the API server, which is a part of this process and makes text of its objects meanwhile.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use proxy_tests::agent::Agent;
use proxy_tests::object::Object;
use proxy_tests::probe::eventually;
use proxy_tests::require;
use proxy_tests::test_cluster::Plan;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::cluster::{self, ENDPOINTS};
use crate::figure::{Figures, Goal, progress};
use crate::memory::tables::Tables;
use crate::process::{Clock, MIB, Memory, cpu};

/// Services of each cluster.
const CLUSTERS: [u32; 4] = [1, 1_000, 10_000, 50_000];
/// From so many on decoding counts for more than the start itself.
const MANY: u32 = 10_000;
/// Rounds at most: a large start takes its time.
const ROUNDS: usize = 3;
/// Tables have room for so many Services at least.
const ROOM: u32 = 1_000;
const LOADING: Duration = Duration::from_secs(240);
/// Between two looks at the tables.
const LOOK: Duration = Duration::from_millis(2);
/// What a start may take of the time that decoding takes.
const RATIO: f64 = 2.0;
const NODE: &str = "node1";

pub(crate) fn measure(figures: &mut Figures, rounds: usize) -> Result<()> {
    for services in CLUSTERS {
        progress(&format!("coldstart: {services} Services x {ENDPOINTS} from an API server"));
        let rounds = (0..rounds.min(ROUNDS)).map(|_| start(services)).collect::<Result<Vec<_>>>()?;
        let of = |field: fn(&Start) -> f64| rounds.iter().map(field).collect::<Vec<_>>();
        let name = |what: &str| format!("{services} Services x {ENDPOINTS}: {what}");
        let times = [("from exec to tables", of(|one| one.took), of(|one| one.decoding[0]))];
        let cpu = [("processor time until then", of(|one| one.cpu), of(|one| one.decoding[1]))];
        for (what, took, decoding) in times.into_iter().chain(cpu) {
            let figure = figures.pair(name(what), "ms", &took, &decoding);
            if services >= MANY {
                figure.within(Goal::Ratio(RATIO));
            }
        }
        figures.value(name("tables"), "MiB", &of(|one| one.tables));
        figures.value(name("peak resident memory"), "MiB", &of(|one| one.peak));
    }
    Ok(())
}

/// Milliseconds and MiB of one start.
struct Start {
    took: f64,
    cpu: f64,
    peak: f64,
    tables: f64,
    /// Time, and processor time.
    decoding: [f64; 2],
}

fn start(services: u32) -> Result<Start> {
    let decoding = decoding(services)?;
    let nodes = Plan::default().node(NODE, &["a"]).raise()?;
    let server = cluster::api_server(nodes.place(NODE), services)?;
    let flags = cluster::flags(services.max(ROOM));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mut agent = Agent::prepare(&require::agent_binary()?, &nodes, NODE, &server, &flags)?;
    let begun = Instant::now();
    agent.spawn()?;
    let pid = agent.pid().context("the agent does not run")?;
    // Until it has pinned its tables there are none to look at.
    while cluster::is_there(agent.bpf_root(), services).is_err() {
        ensure!(begun.elapsed() < LOADING, "the tables do not become complete\n{}", agent.log_text());
        std::thread::sleep(LOOK);
    }
    let (took, cpu) = (begun.elapsed(), cpu(pid)?);
    eventually(LOADING, || agent.is_ready(agent.pid())).with_context(|| agent.log_text())?;
    let peak = Memory::of(pid)?.peak;
    let [took, cpu] = [took, cpu].map(|time| time.as_secs_f64() * 1e3);
    Ok(Start { took, cpu, peak, tables: Tables::of(agent.bpf_root())?.bytes() / MIB, decoding })
}

/// An event of a watch.
#[derive(Deserialize)]
struct Event<K> {
    object: K,
}

/// What it takes to decode the events of the first lists, in milliseconds.
fn decoding(services: u32) -> Result<[f64; 2]> {
    let line = |object: Object| json!({ "type": "ADDED", "object": object.json }).to_string();
    let known: Vec<String> = (0..services).map(|n| line((&cluster::service(n).build()).into())).collect();
    let slices: Vec<String> = (0..services).map(|n| line((&cluster::slice(n, 0).build()).into())).collect();
    let clock = Clock::start()?;
    known.iter().try_for_each(|line| decode::<Service>(line))?;
    slices.iter().try_for_each(|line| decode::<EndpointSlice>(line))?;
    clock.stop()
}

fn decode<K: DeserializeOwned>(line: &str) -> Result<()> {
    let Event { object } = serde_json::from_str::<Event<K>>(line).context("decoding an event")?;
    black_box(object);
    Ok(())
}

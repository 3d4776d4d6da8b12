//! An API server whose watches begin and say nothing, beside others and alone, and one that has nothing to say (Y-5).

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::apiserver::{ApiServer, Fault};
use proxy_tests::manifests::node;
use proxy_tests::pod::Place;
use proxy_tests::probe::{eventually, get, wait};
use proxy_tests::test_cluster::TestCluster;

use crate::api_scene::ApiScene;
use crate::api_server::connected;
use crate::health::http;
use crate::life::{answers, quick, warns};

/// A watch of 15 s says nothing, then one of as long, which the server may end 3 s late.
const NOTICED: Duration = Duration::from_secs(33);
/// From there to an answer, on a machine that is busy.
const FOLLOWED: Duration = Duration::from_secs(7);
/// How the warning begins.
const WITHHELD: [&str; 2] = ["API server", "EndpointSlices: its watches are stalled"];

/// Lists among requests, in both forms; what asks for one object to learn a version is none. ServiceCIDRs, which nobody waits for,
/// may still be on their way.
fn lists(server: &ApiServer) -> usize {
    let whole = |path: &&String| {
        !path.contains("/servicecidrs?")
            && (path.contains("sendInitialEvents=true") || path.contains("limit=500"))
    };
    server.requests().iter().filter(whole).count()
}

/// How often something was counted, by the beginning of its line and a label.
fn counted(cluster: &TestCluster, metric: &str, label: &str) -> Result<u64> {
    let (_, metrics) = http(cluster.place("node1"), "127.0.0.1:10249", "/metrics")?;
    let lines = metrics.lines().filter(|line| line.starts_with(metric) && line.contains(label));
    Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
}

/// The change to endpoint c is noticed although a server keeps it back.
fn is_followed(agent: &Agent, pod: &Place, vip: SocketAddr) -> Result<()> {
    eventually(NOTICED + FOLLOWED, || {
        let name = get(pod, &quick(vip))?.name;
        ensure!(name == "c", "{name} answers");
        Ok(())
    })
    .with_context(|| agent.log_text())
}

#[test]
fn a_server_that_withholds_what_it_knows_is_left_for_another_without_a_list() -> Result<()> {
    let scene = ApiScene::raise()?;
    let (cluster, first, second) = (&scene.cluster, &scene.server, scene.beside(6444)?);
    let (mut controller, agent) = (scene.web()?, scene.agent(scene.urls(&second))?);
    let (pod, vip) = (scene.pod(), scene.vip());
    let begun = Instant::now();
    first.fail(Fault::Silent);
    controller.replace(&[cluster.place("c")])?;
    is_followed(&agent, pod, vip)?;
    eprintln!("silent: another server is followed after {:?}", begun.elapsed());
    warns(&agent, &[&first.url(), WITHHELD[1]], true)?;
    ensure!(counted(cluster, "proxy_agent_watches_ended_total{", "reason=\"stalled\"")? == 1);
    ensure!(lists(&second) == 0, "watches go on from their version: {:#?}", second.requests());
    ensure!(!first.is_watched() && second.is_watched());
    connected(&agent, true)
}

#[test]
fn one_server_that_withholds_what_it_knows_is_listed_and_warned_of_until_it_speaks() -> Result<()> {
    let scene = ApiScene::raise()?;
    let (mut controller, agent) = (scene.web()?, scene.agent(&scene.server)?);
    let (cluster, server, pod, vip) = (&scene.cluster, &scene.server, scene.pod(), scene.vip());
    let (begun, asked, listed) = (Instant::now(), server.requests().len(), lists(server));
    server.fail(Fault::Silent);
    controller.replace(&[cluster.place("c")])?;
    is_followed(&agent, pod, vip)?;
    eprintln!("silent: listed after {:?}", begun.elapsed());
    warns(&agent, &WITHHELD, true)?;
    wait(Duration::from_secs(4), "a watch that is only accepted is not taken for one that works");
    warns(&agent, &WITHHELD, true)?;
    ensure!(lists(server) == listed + 1, "{:#?}", server.requests());
    let asked = server.requests().len() - asked;
    ensure!(asked <= 40, "{asked} requests in {:?}", begun.elapsed());
    server.fail(Fault::None);
    controller.replace(&[cluster.place("b")])?;
    answers(pod, vip, "b").with_context(|| agent.log_text())?;
    warns(&agent, &WITHHELD, false)
}

/// Nothing of what an agent watches changes, but other things do all the time: no server is left, and none is asked for
/// lists again. Bookmarks come as from the real server: before the end of a watch, if there is progress at all.
fn quiet(progress: bool) -> Result<()> {
    let scene = ApiScene::raise()?;
    let (first, second) = (&scene.server, &scene.beside(6444)?);
    for server in [first, second] {
        server.bookmark_every(Duration::from_secs(3600));
        if !progress {
            server.without_progress();
        }
    }
    let (_controller, agent) = (scene.web()?, scene.agent(scene.urls(second))?);
    let (begun, listed) = (Instant::now(), lists(first));
    while begun.elapsed() < NOTICED + FOLLOWED {
        first.put(&node("other", &[], &[], &[]));
        sleep(Duration::from_millis(200));
    }
    let slices = |path: &&String| path.contains("/endpointslices?");
    let asked = first.requests();
    let asked: Vec<&String> = asked.iter().filter(slices).collect();
    // It was begun anew, or this shows nothing.
    ensure!((3..=9).contains(&asked.len()), "{asked:#?}");
    ensure!(second.requests().is_empty(), "{}", agent.log_text());
    ensure!(lists(first) == listed, "{:#?}", first.requests());
    ensure!(counted(&scene.cluster, "proxy_agent_watches_ended_total{", "reason=\"stalled\"")? == 0);
    warns(&agent, &["API server"], false)
}

#[test]
fn a_server_that_has_nothing_to_say_but_bookmarks_is_kept() -> Result<()> {
    quiet(true)
}

#[test]
fn a_server_that_has_nothing_to_say_at_all_is_kept() -> Result<()> {
    quiet(false)
}

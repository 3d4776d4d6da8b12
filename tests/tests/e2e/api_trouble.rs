//! An API server that hangs, is silent, cuts, lies, drips or talks nonsense: what is served goes on, the server is not
//! asked all the time, what is wrong is said, and what changed meanwhile is in force soon after (Y-5, Y-6).

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::{Agent, Feed};
use proxy_tests::apiserver::tls::Ca;
use proxy_tests::apiserver::{ApiServer, Fault, Gone};
use proxy_tests::manifests::EndpointController;
use proxy_tests::probe::{eventually, get, wait};
use proxy_tests::test_cluster::TestCluster;

use crate::api_scene::ApiScene;
use crate::api_server::{connected, server};
use crate::api_way::kubeconfig;
use crate::health::http;
use crate::life::{FLAGS, answers, one_node, quick, service, status_until, warns};

/// How long a fault lasts here.
const LASTS: Duration = Duration::from_secs(12);
/// What all of an agent may ask a server for in that time: each of four kinds begins anew at most once in the pauses
/// of 0.8, 1.6, 3.2 and 6.4 seconds, with a list before the watch, and a second time where the fault begins.
const REQUESTS: usize = 40;

/// Has everybody's answers counted while a fault lasts, and ends it.
struct Trouble<'a> {
    cluster: &'a TestCluster,
    server: &'a ApiServer,
    agent: &'a Agent,
}

impl Trouble<'_> {
    /// How many watches have broken.
    fn broken(&self) -> Result<u64> {
        let (_, metrics) = http(self.cluster.place("node1"), "127.0.0.1:10249", "/metrics")?;
        let ended = metrics.lines().filter(|line| line.starts_with("proxy_agent_watches_ended_total"));
        let broken = ended.filter(|line| line.contains("reason=\"limit_exceeded\""));
        Ok(broken.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
    }

    /// One fault: `words` are said of it.
    fn play(&self, fault: Fault, words: &[&str], controller: &mut EndpointController<'_>) -> Result<()> {
        let Self { cluster, server, agent } = self;
        let (pod, vip) = (cluster.place("a"), service(1)[0]);
        let name = get(pod, &quick(vip))?.name;
        let other = if name == "b" { "c" } else { "b" };
        let (asked, logged) = (server.requests().len(), agent.log_text().lines().count());
        let begun = Instant::now();
        server.fail(fault);
        if matches!(fault, Fault::Half | Fault::Stale) {
            server.expire(Gone::Event);
        } else {
            // Most faults are those of an answer: watches that run have theirs.
            server.cut();
        }
        wait(Duration::from_millis(500), "watches break, and begin again");
        if matches!(fault, Fault::Busy(_)) {
            wait(
                Duration::from_secs(2),
                "each of four kinds asks once, and then none does as long as the server wants",
            );
            let early = server.requests().len() - asked;
            ensure!(early <= 6, "{early} requests to a server that wants to be left alone");
        }
        let broken = self.broken()?;
        controller.replace(&[cluster.place(other)])?;
        if !words.is_empty() {
            warns(agent, words, true)?;
            let (code, metrics) = http(cluster.place("node1"), "127.0.0.1:10249", "/metrics")?;
            ensure!(code == 200 && metrics.contains("proxy_agent_watches_ended_total{"), "{metrics}");
        }
        while begun.elapsed() < LASTS {
            ensure!(get(pod, &quick(vip))?.name == name, "what is served is harmed");
            sleep(Duration::from_millis(100));
        }
        // Nothing else ends a watch of which something comes all the time.
        ensure!(fault != Fault::Slow || self.broken()? > broken, "drops are waited for");
        ensure!(agent.status_json()?["healthy"] == true, "losing the API server is no illness (Y-6)");
        let asked = server.requests().split_off(asked);
        ensure!(asked.len() <= REQUESTS, "{} requests in {LASTS:?}: {asked:#?}", asked.len());
        let lines = agent.log_text().lines().count() - logged;
        ensure!(lines <= 25, "{lines} lines:\n{}", agent.log_text());
        let over = Instant::now();
        server.fail(Fault::None);
        answers(pod, vip, other)?;
        let served = over.elapsed();
        connected(agent, true)?;
        if !words.is_empty() {
            warns(agent, words, false)?;
        }
        eprintln!("{fault:?}: {} requests in {LASTS:?}, served again after {:?}", asked.len(), served);
        Ok(())
    }
}

/// Plays some faults one after the other.
fn faults(faults: &[(Fault, &[&str])]) -> Result<()> {
    let scene = ApiScene::raise()?;
    let mut controller = scene.web()?;
    let agent = scene.agent(&scene.server)?;
    for (fault, words) in faults {
        let trouble = Trouble { cluster: &scene.cluster, server: &scene.server, agent: &agent };
        let played = trouble.play(*fault, words, &mut controller);
        played.with_context(|| agent.log_text()).with_context(|| format!("{fault:?}"))?;
    }
    Ok(())
}

#[test]
fn a_server_that_begins_no_watch_or_ends_each_at_once_is_asked_now_and_then() -> Result<()> {
    faults(&[
        (Fault::NoHeaders, &["API server", "no answer within"]),
        (Fault::Cut, &["API server", "closes as soon as it has started"]),
    ])
}

#[test]
fn a_server_that_drips_or_talks_nonsense_harms_nothing() -> Result<()> {
    faults(&[
        (Fault::Slow, &[]),
        (Fault::Garbage, &["API server", "cannot be decoded"]),
        (Fault::Half, &["API server", "half-way"]),
    ])
}

#[test]
fn a_server_that_shows_the_past_or_wants_to_be_left_alone_is_followed_when_it_is_well() -> Result<()> {
    faults(&[
        // First: later on pauses have grown, and nobody could tell whether the server's wish is followed.
        (Fault::Busy(3), &["API server", "TooManyRequests"]),
        (Fault::Stale, &["API server", "older state"]),
        (Fault::Silent, &[]),
    ])
}

#[test]
fn a_watch_that_has_gone_deaf_is_begun_anew() -> Result<()> {
    let scene = ApiScene::raise()?;
    let mut controller = scene.web()?;
    let agent = scene.agent(&scene.server)?;
    scene.server.deafen();
    let begun = Instant::now();
    controller.replace(&[scene.cluster.place("c")])?;
    // Watches of endpoints are proved to work every 10 to 15 seconds.
    answers(scene.pod(), scene.vip(), "c").with_context(|| agent.log_text())?;
    eprintln!("deaf: served after {:?}", begun.elapsed());
    Ok(())
}

#[test]
fn a_server_that_hangs_is_noticed_within_seconds_and_followed_when_it_goes_on() -> Result<()> {
    let scene = ApiScene::raise()?;
    let mut controller = scene.web()?;
    let agent = scene.agent(&scene.server)?;
    let (begun, asked) = (Instant::now(), scene.server.requests().len());
    scene.server.fail(Fault::Hang);
    controller.replace(&[scene.cluster.place("c")])?;
    // Silence of 3 to 4 seconds, 5 for an answer.
    eventually(Duration::from_secs(10), || {
        let status = agent.status_json()?;
        ensure!(status["agent"]["connected"] == false, "{:#}", status["agent"]);
        Ok(())
    })?;
    eprintln!("hang: noticed after {:?}", begun.elapsed());
    warns(&agent, &["API server", "no answer within"], true)?;
    wait(LASTS, "the agent goes on asking a server that hangs");
    // While nobody answers one request at a time is made.
    let asked = scene.server.requests().len() - asked;
    eprintln!("hang: {asked} requests");
    ensure!(asked <= 8, "{asked} requests");
    answers(scene.pod(), scene.vip(), "b")?;
    scene.server.fail(Fault::None);
    answers(scene.pod(), scene.vip(), "c").with_context(|| agent.log_text())?;
    connected(&agent, true)?;
    status_until(&agent, "no warning", |status| !status["object_warnings"].to_string().contains("API server"))
        .map(drop)
}

#[test]
fn a_server_of_which_nothing_is_heard_is_asked_whether_it_lives_unless_its_connection_tells() -> Result<()> {
    let cluster = one_node(&["a"])?;
    let (server, home, ca) = (server(&cluster)?, tempfile::tempdir()?, Ca::new("cluster")?);
    server.bookmark_every(Duration::from_secs(3600));
    let asked = || server.requests().iter().filter(|path| *path == "/livez").count();
    let agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    wait(LASTS, "a server of which nothing comes is asked over HTTP/1 whether it lives");
    // Every four to five seconds; a watch that is renewed is an answer, too.
    ensure!((1..=4).contains(&asked()), "{} times over HTTP/1", asked());
    connected(&agent, true)?;
    drop(agent);
    server.secure(&ca.server(&["127.0.0.1"])?, None)?;
    fs::write(home.path().join("ca.crt"), ca.pem())?;
    let (flag, before) = (kubeconfig(home.path(), &server, "{}")?, asked());
    let flags = [&FLAGS[..], &[&flag]].concat();
    let agent = Agent::start(&cluster, "node1", Feed::ApiServer(String::new()), &flags)?;
    wait(LASTS, "over HTTP/2 the connection tells");
    ensure!(asked() == before, "{} times over HTTP/2", asked() - before);
    connected(&agent, true)
}

#[test]
fn while_nothing_listens_it_is_tried_one_at_a_time() -> Result<()> {
    let cluster = one_node(&["a"])?;
    let server = server(&cluster)?;
    let agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    connected(&agent, true)?;
    let tried = || -> Result<u64> {
        let (_, metrics) = http(cluster.place("node1"), "127.0.0.1:10249", "/metrics")?;
        let failed = metrics.lines().filter(|line| line.contains("requests_total{code=\"<error>\""));
        Ok(failed.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
    };
    let before = tried()?;
    drop(server);
    connected(&agent, false)?;
    wait(LASTS, "the agent goes on trying to connect");
    let tries = tried()? - before;
    ensure!((3..=20).contains(&tries), "{tries} tries");
    let log = agent.log_text();
    ensure!(log.lines().filter(|line| line.contains("cannot watch")).count() <= 12, "{log}");
    warns(&agent, &["API server", "refused"], true)
}

//! Events that operators see with `kubectl get events`: about the Node, and about Services (H-12, H-16, H-28, H-29).

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::apiserver::{ApiServer, Fault};
use proxy_tests::manifests::ServicePlan;
use proxy_tests::probe::{eventually, wait};
use proxy_tests::require::agent_binary;
use serde_json::{Value, json};

use crate::api_server::server;
use crate::common::{manifests, vips, web};
use crate::life::{FLAGS, SOON, answers, one_node, servers, service};

/// Waits for the event with this reason.
pub(crate) fn event(server: &ApiServer, reason: &str) -> Result<Value> {
    eventually(SOON, || {
        let events = server.events();
        let found = events.iter().find(|event| event["reason"] == reason).cloned();
        found.with_context(|| format!("no {reason} in {events:#?}"))
    })
}

#[test]
fn an_agent_says_that_it_starts_and_which_service_health_it_cannot_serve() -> Result<()> {
    let cluster = one_node(&["a"])?;
    let server = server(&cluster)?;
    let _agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    // H-29.
    let starting = event(&server, "Starting")?;
    ensure!(starting["type"] == "Normal" && starting["action"] == "StartKubeProxy", "{starting:#}");
    ensure!(starting["reportingController"] == "kube-proxy", "{starting:#}");
    ensure!(starting["reportingInstance"] == "node1", "{starting:#}");
    ensure!(starting["apiVersion"] == "events.k8s.io/v1" || starting["apiVersion"].is_null(), "{starting:#}");
    let regarding = json!({ "apiVersion": "v1", "kind": "Node", "name": "node1", "uid": "node1" });
    ensure!(starting["regarding"] == regarding, "{starting:#}");
    let paths = server.requests();
    ensure!(paths.iter().any(|path| path.starts_with("/apis/events.k8s.io/v1/namespaces/default/events")));

    // H-16: a second Service with the same health check port.
    let taken = |name: &str, n: u8| {
        let vip = [format!("192.0.2.{n}").parse().expect("an address")];
        let plan = ServicePlan::new(name, &vips(n)[..1]).port("tcp", "TCP", 80, 8080).load_balancer(&vip);
        server.put(&plan.external_local(Some(32_123)).build());
    };
    taken("first", 1);
    taken("second", 2);
    let failed = event(&server, "FailedToStartServiceHealthcheck")?;
    ensure!(failed["type"] == "Warning" && failed["action"] == "Listen", "{failed:#}");
    let regarding = &failed["regarding"];
    ensure!(regarding["kind"] == "Service" && regarding["namespace"] == "default", "{failed:#}");
    ensure!(["first", "second"].iter().any(|name| regarding["name"] == *name), "{failed:#}");
    let note = failed["note"].as_str().context("no note")?;
    let service = format!("default/{}", regarding["name"].as_str().unwrap_or_default());
    for word in ["node1", &service, "32123", "Address already in use"] {
        ensure!(note.contains(word), "no {word} in {note:?}");
    }
    Ok(())
}

#[test]
fn an_agent_that_must_not_tell_events_says_so_once_and_works() -> Result<()> {
    let cluster = one_node(&["a", "b"])?;
    let server = server(&cluster)?;
    server.forbid_events();
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&server, &cluster, "web", 1, &["b"], |plan| plan)?;
    let agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    answers(cluster.place("a"), service(1)[0], "b")?;
    eventually(SOON, || {
        let log = agent.log_text();
        ensure!(log.contains("the verbs create and patch for events in the group events.k8s.io"), "{log}");
        Ok(())
    })?;
    ensure!(agent.log_text().matches("events cannot be recorded").count() == 1, "{}", agent.log_text());
    Ok(())
}

#[test]
fn events_of_a_time_of_trouble_are_told_when_it_is_over_and_the_server_is_not_asked_all_the_time()
-> Result<()> {
    /// Longer than somebody who tries a few times would try.
    const LASTS: Duration = Duration::from_secs(30);
    let cluster = one_node(&["a"])?;
    let server = server(&cluster)?;
    server.fail(Fault::Status(500));
    let mut agent = Agent::prepare(&agent_binary()?, &cluster, "node1", &server, &FLAGS)?;
    agent.spawn()?;
    wait(LASTS, "the agent tries to report its start to a server that fails");
    let sent = server.requests().iter().filter(|path| path.starts_with("/apis/events.k8s.io")).count();
    // After 1, 2, 4, 8, 16 seconds.
    ensure!((3..=7).contains(&sent), "{sent} times in {LASTS:?}");
    ensure!(server.events().is_empty());
    server.fail(Fault::None);
    agent.wait_ready()?;
    eventually(LASTS, || event(&server, "Starting"))?;
    let starts = server.events().iter().filter(|event| event["reason"] == "Starting").count();
    ensure!(starts == 1, "{:#?}", server.events());
    Ok(())
}

#[test]
fn without_an_api_server_events_are_in_the_log() -> Result<()> {
    let (cluster, dir) = (one_node(&["a"])?, manifests()?);
    let agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let log = agent.log_text();
    ensure!(log.contains("event Starting about Node node1"), "{log}");
    Ok(())
}

/// An agent with `--bind-address-hard-fail` whose port is taken ends, and the event says why.
fn ends_hard(port: u16, reason: &str) -> Result<()> {
    let cluster = one_node(&["a"])?;
    let server = server(&cluster)?;
    let _taken = cluster.place("node1").netns.listen(format!("0.0.0.0:{port}").parse()?)?;
    let flags = [&FLAGS[..], &["--bind-address-hard-fail"]].concat();
    let mut agent = Agent::prepare(&agent_binary()?, &cluster, "node1", &server, &flags)?;
    agent.spawn()?;
    let failed = event(&server, reason)?;
    ensure!(failed["type"] == "Warning" && failed["action"] == "StartKubeProxy", "{failed:#}");
    ensure!(failed["regarding"]["kind"] == "Node", "{failed:#}");
    ensure!(failed["note"].as_str().is_some_and(|note| note.contains(&port.to_string())), "{failed:#}");
    let status = agent.ended()?;
    ensure!(status.code() == Some(1), "{status}: {}", agent.log_text());
    ensure!(agent.log_text().contains("--bind-address-hard-fail"), "{}", agent.log_text());
    Ok(())
}

#[test]
fn a_health_port_that_is_taken_ends_an_agent_that_is_told_so() -> Result<()> {
    ends_hard(10256, "FailedToStartProxierHealthcheck") // H-12.
}

#[test]
fn a_metrics_port_that_is_taken_ends_an_agent_that_is_told_so() -> Result<()> {
    ends_hard(10249, "FailedToStartMetricServer") // H-28.
}

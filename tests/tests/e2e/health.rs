//! `/healthz`, `/livez` and `/metrics`, where load balancers and monitoring look for them (H-1…H-40).

use std::net::TcpListener;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::apiserver::ApiServer;
use proxy_tests::manifests::{ServicePlan, node};
use proxy_tests::object::Object;
use proxy_tests::pod::Place;
use proxy_tests::probe::{self, eventually};
use serde_json::Value;

use crate::common::{manifests, vips, web};
use crate::life::{FLAGS, SOON, answers, one_node, servers, service};

/// Asks over HTTP from a place: code and body.
pub(crate) fn http(place: &Place, to: &str, path: &str) -> Result<(u16, String)> {
    probe::http(place, to.parse()?, path)
}

fn until_code(place: &Place, path: &str, code: u16) -> Result<Value> {
    eventually(SOON, || {
        let (found, body) = http(place, "127.0.0.1:10256", path)?;
        ensure!(found == code, "{path}: {found}, not {code}: {body}");
        serde_json::from_str(&body).with_context(|| format!("{path} is no JSON: {body}"))
    })
}

#[test]
fn a_node_fed_from_a_directory_is_healthy_and_has_metrics() -> Result<()> {
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    let _agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let host = cluster.place("node1");
    // A directory has no Node to speak of: none was ever seen, and yet the node may have traffic (H-8).
    let health = until_code(host, "/healthz", 200)?;
    ensure!(health["healthy"] == true && health["nodeEligible"] == true, "{health:#}");
    ensure!(health["status"]["IPv4"]["healthy"] == true && health["status"]["IPv6"]["healthy"] == true);
    let alive = until_code(host, "/livez", 200)?;
    ensure!(alive["healthy"] == true && alive.get("nodeEligible").is_none(), "{alive:#}");
    // From outside, too: load balancers ask there.
    let outside = http(cluster.place("outside"), &format!("{}:10256", host.v4), "/healthz")?;
    ensure!(outside.0 == 200, "{outside:?}");
    ensure!(http(host, "127.0.0.1:10256", "/nothing")?.0 == 404);

    answers(cluster.place("a"), service(1)[0], "b")?;
    let (code, metrics) = http(host, "127.0.0.1:10249", "/metrics")?;
    ensure!(code == 200, "{code}: {metrics}");
    for name in [
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "kubeproxy_proxy_healthz_total",
        "proxy_agent_",
        "process_resident_memory_bytes",
    ] {
        ensure!(metrics.contains(name), "no {name} in:\n{metrics}");
    }
    // Two ports, two families; and tables of the agent's own and of traffic's.
    for line in ["frontends 4", "\"FRONTENDS\"", "\"BACKENDS\"", "\"FLOWS\""] {
        ensure!(metrics.lines().any(|found| found.contains(line)), "no {line} in:\n{metrics}");
    }
    ensure!(
        http(cluster.place("outside"), &format!("{}:10249", host.v4), "/metrics").is_err(),
        "not for all"
    );
    Ok(())
}

#[test]
fn a_node_that_is_to_be_deleted_wants_no_traffic_but_lives() -> Result<()> {
    let cluster = one_node(&["a"])?;
    let host = cluster.place("node1");
    let server = ApiServer::start_in(&host.netns, "127.0.0.1:6443".parse()?)?;
    let agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    // H-8, Y-15, T-104: with an API server a Node that was never seen is not eligible.
    until_code(host, "/healthz", 503)?;
    until_code(host, "/livez", 200)?;
    // Y-15: each event of the Node object counts.
    let good = Object::from(&node("node1", &host.addresses(), &cluster.pod_cidrs("node1"), &[]));
    server.put(good.clone());
    until_code(host, "/healthz", 200)?;
    let mut doomed = good.clone();
    doomed.json["spec"]["taints"] =
        serde_json::json!([{ "key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule" }]);
    server.put(doomed);
    let health = until_code(host, "/healthz", 503)?;
    ensure!(health["nodeEligible"] == false && health["healthy"] == true, "{health:#}");
    until_code(host, "/livez", 200)?;
    server.put(good.clone());
    until_code(host, "/healthz", 200)?;
    // Whoever deletes the object of a node that lives has kubelet make it again: what was seen last counts.
    for n in [1, 2] {
        let passes =
            |agent: &Agent| Ok::<_, anyhow::Error>(agent.status_json()?["agent"]["generation"].clone());
        let before = passes(&agent)?;
        ensure!(server.delete(&good.key));
        // The next pass is made with what is known then, and tells health.
        server.put(&ServicePlan::new(&format!("s{n}"), &vips(n)).port("tcp", "TCP", 80, 80).build());
        eventually(SOON, || {
            ensure!(passes(&agent)? != before, "no pass yet");
            Ok(())
        })?;
        ensure!(
            http(host, "127.0.0.1:10256", "/healthz")?.0 == 200,
            "a node whose object is gone is not ill"
        );
        server.put(good.clone());
        until_code(host, "/healthz", 200)?;
    }
    Ok(())
}

#[test]
fn a_health_port_that_is_taken_is_tried_until_it_is_free_and_services_do_not_wait_for_it() -> Result<()> {
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    let host = cluster.place("node1");
    let taken: TcpListener = host.netns.listen("0.0.0.0:10256".parse()?)?;
    let agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    answers(cluster.place("a"), service(1)[0], "b")?;
    let log = agent.log_text();
    ensure!(log.contains("cannot serve health at 0.0.0.0:10256") && log.contains("trying again"), "{log}");
    ensure!(http(host, "127.0.0.1:10249", "/metrics")?.0 == 200, "metrics do not wait for health");
    drop(taken);
    until_code(host, "/healthz", 200).map(drop)
}

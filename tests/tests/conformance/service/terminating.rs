//! When the only endpoints left are ending ones that still serve.

use anyhow::{Context, Result, ensure};
use proxy_tests::manifests::{Phase, ServicePlan};
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, everywhere, service, web, web_node_port};
use crate::http;
use crate::reach::{dial_all, down, soon};

const NODE_PORT: u16 = 30_080;
const HEALTH: u16 = 30_999;

/// A Service whose only endpoint is the pod `a` on `node1`, which is ending but serves.
fn ending(cluster: &Cluster, plan: &ServicePlan, check: impl Fn() -> Result<()>) -> Result<()> {
    let _servers = cluster.serve(&["a"])?;
    let mut endpoints = cluster.expose(plan, &["a"])?;
    endpoints.set(cluster.place("a"), Phase::Terminating)?;
    observed(cluster)?;
    check()
}

/// Waits until every agent has acted on all slices so far: on a later one, of another Service, it has.
fn observed(cluster: &Cluster) -> Result<()> {
    cluster.expose(&web("marker", 250), &["f"])?;
    let marker = cluster.place("f").v6.to_string();
    cluster.agents.iter().try_for_each(|agent| {
        soon(|| {
            let listed = agent.json(&["backend", "list", "--output", "json"])?.to_string();
            ensure!(listed.contains(&marker), "the agent has not observed it yet: {listed}");
            Ok(())
        })
    })
}

#[test]
fn should_fail_health_check_node_port_if_there_are_only_terminating_endpoints() -> Result<()> {
    // service.go:2823; H-20, P-6
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    let _servers = cluster.serve(&["a"])?;
    let plan = web_node_port("health-check", 1, NODE_PORT).load_balancer(&[]).external_local(Some(HEALTH));
    let mut endpoints = cluster.expose(&plan, &["a"])?;
    let (node, client) = (cluster.place("node1"), cluster.place("b"));
    let says = |code: &str| {
        node.at(HEALTH).into_iter().try_for_each(|to| {
            soon(|| {
                let response = http::get(client, to, "/healthz")?;
                ensure!(response.split(' ').nth(1) == Some(code), "{to} says {response}, not {code}");
                Ok(())
            })
        })
    };
    says("200")?;
    endpoints.set(cluster.place("a"), Phase::Terminating)?;
    says("503")?;
    for client in cluster.places(["b", "h1", "d", "outside"]) {
        soon(|| dial_all(client, node.at(NODE_PORT), &["a"]))?;
    }
    Ok(())
}

#[test]
fn should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints_with_internal_policy_cluster()
-> Result<()> {
    // service.go:2920; P-4
    let cluster = Cluster::raise(PodNetwork::Bridged)?;
    ending(&cluster, &web("ending", 1), || {
        cluster.places(["b", "d"]).into_iter().try_for_each(|client| dial_all(client, service(1), &["a"]))
    })
}

#[test]
fn should_fallback_to_local_terminating_endpoints_when_there_are_no_ready_endpoints_with_internal_policy_local()
-> Result<()> {
    // service.go:2994; P-6, P-15
    everywhere(|cluster| {
        ending(cluster, &web("ending", 1).internal_local(), || {
            dial_all(cluster.place("b"), service(1), &["a"])?;
            down([cluster.place("d")], service(1))
        })
    })
}

#[test]
fn should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints_with_external_policy_cluster()
-> Result<()> {
    // service.go:3073; P-4
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    ending(&cluster, &web_node_port("ending", 1, NODE_PORT), || {
        for client in cluster.places(["b", "d"]) {
            for node in cluster.places(["node1", "node2"]) {
                dial_all(client, node.at(NODE_PORT), &["a"])?;
            }
        }
        Ok(())
    })
}

#[test]
fn should_fallback_to_local_terminating_endpoints_when_there_are_no_ready_endpoints_with_external_policy_local()
-> Result<()> {
    // service.go:3149; P-6, P-16, V-30, V-31
    everywhere(|cluster| {
        ending(cluster, &web_node_port("ending", 1, NODE_PORT).external_local(None), || {
            let [node0, node1] = cluster.places(["node1", "node2"]).map(|node| node.at(NODE_PORT));
            let [pod0, pod1] = cluster.places(["b", "d"]);
            // A pod of another node is an outside client: nothing keeps node1 from sending it away.
            down([pod0], node1).context("pod0 → node1")?;
            dial_all(pod0, node0, &["a"]).context("pod0 → node0")?;
            dial_all(pod1, node0, &["a"]).context("pod1 → node0")
        })
    })
}

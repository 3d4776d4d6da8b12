//! Types of Services, and changes between them.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use proxy_tests::manifests::ServicePlan;
use proxy_tests::probe::{Ask, Server};
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, READY, at, ip, service, vips, web, web_node_port};
use crate::reach::{dial, dial_all, down, refused, soon};

const NODE_PORT: u16 = 30_080;
const PORTS: [(&str, &str, u16); 2] = [("tcp", "TCP", 8080), ("udp", "UDP", 8080)];

/// The Service as ExternalName, which has neither address nor ports; its slices are left to be seen.
fn external_name(name: &str) -> Service {
    let spec = ServiceSpec {
        type_: Some("ExternalName".into()),
        external_name: Some("foo.example.com".into()),
        ..ServiceSpec::default()
    };
    Service { spec: Some(spec), status: None, ..ServicePlan::new(name, &vips(1)).build() }
}

/// ClusterIP and the NodePorts of two nodes lead to exactly these pods, from a pod.
fn node_port_works(cluster: &Cluster, n: u8, pods: &[&str]) -> Result<()> {
    let nodes = cluster.places(["node1", "node2"]).map(|node| node.at(NODE_PORT));
    for targets in [service(n), nodes[0], nodes[1]] {
        soon(|| dial_all(cluster.place("a"), targets, pods))?;
    }
    Ok(())
}

#[test]
fn should_be_able_to_create_a_functioning_node_port_service() -> Result<()> {
    // service.go:1287; V-32, M-8
    let cluster = Cluster::raise(PodNetwork::RoutedOverlay)?;
    let _servers = cluster.serve(&["b", "c"])?;
    cluster.expose(&web_node_port("nodeport-test", 1, NODE_PORT), &["b", "c"])?;
    node_port_works(&cluster, 1, &["b", "c"])
}

#[test]
fn should_be_possible_to_connect_to_a_service_via_external_ip_when_it_is_not_assigned_to_a_node() -> Result<()>
{
    // service.go:1313; V-7
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    let _servers = cluster.serve(&["b", "c"])?;
    let external = [ip("203.0.113.250"), ip("2001:db8::cb00:71fa")];
    cluster.expose(&web("externalip-test", 1).external_ips(&external), &["b", "c"])?;
    for targets in [service(1), at(external, 80)] {
        soon(|| dial_all(cluster.place("a"), targets, &["b", "c"]))?;
    }
    Ok(())
}

#[test]
fn should_be_able_to_update_service_type_to_node_port_listening_on_same_port_number_but_different_protocols()
-> Result<()> {
    // service.go:1350; S-13
    let cluster = Cluster::raise(PodNetwork::Bridged)?;
    let _servers = cluster.serve(&["b", "c"])?;
    let tcp = ServicePlan::new("nodeport-update-service", &vips(1)).port("tcp", "TCP", 80, 8080);
    cluster.apply(&tcp);
    cluster.slices("nodeport-update-service", "all", &PORTS, &[("b", READY), ("c", READY)]);
    for to in service(1) {
        soon(|| dial(cluster.place("a"), &Ask::tcp(to), &["b", "c"]))?;
    }
    cluster.apply(tcp.node_port(NODE_PORT));
    for to in cluster.place("node2").at(NODE_PORT) {
        soon(|| dial(cluster.place("a"), &Ask::tcp(to), &["b", "c"]))?;
    }
    cluster.apply(web_node_port("nodeport-update-service", 1, NODE_PORT));
    node_port_works(&cluster, 1, &["b", "c"])
}

/// From ExternalName to another type: nothing answers before, everything after.
fn from_external_name(network: PodNetwork, node_port: bool) -> Result<()> {
    let cluster = Cluster::raise(network)?;
    let _servers = cluster.serve(&["b", "c"])?;
    cluster.api.put(&external_name("external"));
    cluster.slices("external", "all", &PORTS, &[("b", READY), ("c", READY)]);
    down([cluster.place("a")], service(1))?;
    if node_port {
        cluster.apply(web_node_port("external", 1, NODE_PORT));
        node_port_works(&cluster, 1, &["b", "c"])
    } else {
        cluster.apply(web("external", 1));
        soon(|| dial_all(cluster.place("a"), service(1), &["b", "c"]))
    }
}

#[test]
fn should_be_able_to_change_the_type_from_external_name_to_cluster_ip() -> Result<()> {
    // service.go:1423; S-6
    from_external_name(PodNetwork::Routed, false)
}

#[test]
fn should_be_able_to_change_the_type_from_external_name_to_node_port() -> Result<()> {
    // service.go:1462; S-6
    from_external_name(PodNetwork::Overlay, true)
}

/// To ExternalName: its addresses lead nowhere, and no agent warns of it.
fn to_external_name(network: PodNetwork, plan: &ServicePlan) -> Result<()> {
    let cluster = Cluster::raise(network)?;
    let _servers = cluster.serve(&["b", "c"])?;
    cluster.expose(plan, &["b", "c"])?;
    let client = cluster.place("a");
    soon(|| dial_all(client, service(1), &["b", "c"]))?;
    cluster.api.put(&external_name("internal"));
    down([client], service(1))?;
    down([client], cluster.place("node2").at(NODE_PORT))?;
    for agent in &cluster.agents {
        let status = agent.status_json()?;
        let warnings = status["object_warnings"].as_array().context("no warnings in status")?;
        ensure!(warnings.is_empty(), "{warnings:?}");
    }
    Ok(())
}

#[test]
fn should_be_able_to_change_the_type_from_cluster_ip_to_external_name() -> Result<()> {
    // service.go:1500; S-4
    to_external_name(PodNetwork::Bridged, &web("internal", 1))
}

#[test]
fn should_be_able_to_change_the_type_from_node_port_to_external_name() -> Result<()> {
    // service.go:1540; S-4
    to_external_name(PodNetwork::Routed, &web_node_port("internal", 1, NODE_PORT))
}

#[test]
fn should_release_node_ports_on_delete() -> Result<()> {
    // service.go:1696; V-37, V-39
    let cluster = Cluster::raise(PodNetwork::Bridged)?;
    let _servers = cluster.serve(&["b", "c"])?;
    cluster.expose(&web_node_port("nodeports", 1, NODE_PORT), &["b", "c"])?;
    node_port_works(&cluster, 1, &["b", "c"])?;
    let listening = cluster.place("node1").netns.output("ss", &["-Hlntu"])?;
    ensure!(!listening.contains(&format!(":{NODE_PORT} ")), "somebody listens: {listening}");
    cluster.delete("nodeports");
    let node = cluster.place("node1");
    // It is an ordinary port of the node again, at which nobody listens.
    for client in cluster.places(["a", "h1", "node1", "outside"]) {
        soon(|| refused(client, node.at(NODE_PORT)))?;
    }
    // A process of the node can have it now, and then another Service.
    let own = Server::start(cluster.place("h1"), &[NODE_PORT])?;
    dial_all(cluster.place("outside"), node.at(NODE_PORT), &["h1"])?;
    drop(own);
    cluster.expose(&web_node_port("nodeports", 2, NODE_PORT), &["b", "c"])?;
    node_port_works(&cluster, 2, &["b", "c"])
}

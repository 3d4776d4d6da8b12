//! `network/topology_hints.go` and `network/traffic_distribution.go`: the tests write the hints that Kubernetes' controller
//! writes for these Services.

use anyhow::Result;
use k8s_openapi::api::discovery::v1::{EndpointHints, ForNode, ForZone};
use proxy_tests::manifests::ServicePlan;
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, NODES, READY, service, web};
use crate::reach::{dial_all, soon};

const PORTS: [(&str, &str, u16); 2] = [("tcp", "TCP", 8080), ("udp", "UDP", 8080)];
/// A node in each zone.
const APART: [&str; 3] = ["zone1", "zone2", "zone3"];
/// Two nodes in the first zone.
const SHARED: [&str; 3] = ["zone1", "zone1", "zone2"];

/// Publishes the endpoints with hints for their own zones, and for their own nodes too if so wanted.
fn publish(cluster: &Cluster, zones: [&str; 3], pods: &[&str], nodes: bool) {
    let ready: Vec<_> = pods.iter().map(|pod| (*pod, READY)).collect();
    for mut slice in cluster.written("hinted", "all", &PORTS, &ready) {
        for endpoint in slice.endpoints.iter_mut().flatten() {
            let node = endpoint.node_name.clone().unwrap_or_default();
            let zone =
                NODES.iter().zip(zones).find(|(name, _)| **name == node).map(|(_, zone)| zone.to_owned());
            endpoint.zone = zone.clone();
            endpoint.hints = Some(EndpointHints {
                for_zones: zone.map(|name| vec![ForZone { name }]),
                for_nodes: nodes.then(|| vec![ForNode { name: node }]),
            });
        }
        cluster.api.put(&slice);
    }
}

/// A pod of each node, and a process of its host, reaches exactly these endpoints.
fn expect(cluster: &Cluster, wanted: [&[&str]; 3]) -> Result<()> {
    for (clients, endpoints) in [["b", "h1"], ["d", "h2"], ["f", "h3"]].into_iter().zip(wanted) {
        for client in clients {
            soon(|| dial_all(cluster.place(client), service(1), endpoints))?;
        }
    }
    Ok(())
}

/// Endpoints in these pods of a cluster with these zones, reached by the clients of each node as wanted.
fn distributes(
    network: PodNetwork,
    distribution: &str,
    zones: [&str; 3],
    pods: &[&str],
    wanted: [&[&str]; 3],
) -> Result<()> {
    let cluster = Cluster::with(network, zones, &[])?;
    let _servers = cluster.serve(pods)?;
    cluster.apply(web("hinted", 1).traffic_distribution(distribution));
    publish(&cluster, zones, pods, distribution == "PreferSameNode");
    expect(&cluster, wanted)
}

#[test]
fn should_distribute_endpoints_evenly() -> Result<()> {
    // topology_hints.go:55; P-11, P-12, P-13
    let cluster = Cluster::with(PodNetwork::Bridged, APART, &[])?;
    let pods = ["a", "c", "e"];
    let _servers = cluster.serve(&pods)?;
    let plan = |mode: &str| -> ServicePlan {
        web("hinted", 1).annotation("service.kubernetes.io/topology-mode", mode)
    };
    cluster.apply(plan("Auto"));
    publish(&cluster, APART, &pods, false);
    expect(&cluster, [&["a"], &["c"], &["e"]])?;
    // One endpoint without a hint, and all zones are open again.
    for mut slice in cluster.written("hinted", "all", &PORTS, &pods.map(|pod| (pod, READY))) {
        for endpoint in slice.endpoints.iter_mut().flatten().skip(1) {
            let for_zones = Some(vec![ForZone { name: "zone2".into() }]);
            endpoint.hints = Some(EndpointHints { for_zones, for_nodes: None });
        }
        cluster.api.put(&slice);
    }
    expect(&cluster, [&pods, &pods, &pods])
}

#[test]
fn should_route_traffic_to_an_endpoint_in_the_same_zone_when_using_prefer_close() -> Result<()> {
    // traffic_distribution.go:350; P-11: the zone without an endpoint reaches all.
    distributes(PodNetwork::Routed, "PreferClose", APART, &["a", "c"], [&["a"], &["c"], &["a", "c"]])
}

#[test]
fn should_route_traffic_correctly_between_pods_on_multiple_nodes_when_using_prefer_close() -> Result<()> {
    // traffic_distribution.go:357; P-11
    let wanted: [&[&str]; 3] = [&["a", "c"], &["a", "c"], &["e"]];
    distributes(PodNetwork::Overlay, "PreferClose", SHARED, &["a", "c", "e"], wanted)
}

#[test]
fn should_route_traffic_to_an_endpoint_in_the_same_zone_when_using_prefer_same_zone() -> Result<()> {
    // traffic_distribution.go:364; P-11
    distributes(PodNetwork::Bridged, "PreferSameZone", APART, &["a", "c"], [&["a"], &["c"], &["a", "c"]])
}

#[test]
fn should_route_traffic_correctly_between_pods_on_multiple_nodes_when_using_prefer_same_zone() -> Result<()> {
    // traffic_distribution.go:371; P-11
    let wanted: [&[&str]; 3] = [&["a", "c"], &["a", "c"], &["e"]];
    distributes(PodNetwork::RoutedOverlay, "PreferSameZone", SHARED, &["a", "c", "e"], wanted)
}

#[test]
fn should_route_traffic_to_an_endpoint_on_the_same_node_or_fall_back_to_same_zone_when_using_prefer_same_node()
-> Result<()> {
    // traffic_distribution.go:378; P-11, T-11, T-12, T-13
    let cluster = Cluster::with(PodNetwork::Overlay, SHARED, &[])?;
    let _servers = cluster.serve(&["a", "c", "e"])?;
    cluster.apply(web("hinted", 1).traffic_distribution("PreferSameNode"));
    publish(&cluster, SHARED, &["a", "c", "e"], true);
    expect(&cluster, [&["a"], &["c"], &["e"]])?;
    // node2 has none now, but its zone has.
    publish(&cluster, SHARED, &["a", "e"], true);
    expect(&cluster, [&["a"], &["a"], &["e"]])?;
    // node3 has none, and neither has its zone.
    publish(&cluster, SHARED, &["a", "c"], true);
    expect(&cluster, [&["a"], &["c"], &["a", "c"]])
}

#[test]
fn should_route_traffic_to_an_endpoint_on_the_same_node_and_fall_back_when_it_becomes_unavailable()
-> Result<()> {
    // traffic_distribution.go:430; P-11, P-4
    let cluster = Cluster::with(PodNetwork::Routed, APART, &[])?;
    let mut servers = cluster.serve(&["a", "c"])?;
    cluster.apply(web("hinted", 1).traffic_distribution("PreferSameNode"));
    publish(&cluster, APART, &["a", "c"], true);
    expect(&cluster, [&["a"], &["c"], &["a", "c"]])?;
    drop(servers.remove(0));
    publish(&cluster, APART, &["c"], true);
    expect(&cluster, [&["c"], &["c"], &["c"]])
}

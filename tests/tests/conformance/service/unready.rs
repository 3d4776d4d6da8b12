//! Endpoints that are not ready, and Services that want them all the same.

use std::net::SocketAddr;

use anyhow::Result;
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, Conditions, service, web_node_port};
use crate::reach::{dial_all, down, soon};

const NODE_PORT: u16 = 30_080;
const PORTS: [(&str, &str, u16); 2] = [("tcp", "TCP", 8080), ("udp", "UDP", 8080)];

/// With `publishNotReadyAddresses` the endpoint controller calls every pod ready; what it serves is said as it is.
const PUBLISHED: Conditions = (true, false, false);
/// The same for a pod that is being deleted.
const PUBLISHED_ENDING: Conditions = (true, false, true);
/// Without: a pod that is not ready.
const UNREADY: Conditions = (false, false, false);
/// Without: a pod that is not ready and being deleted.
const UNREADY_ENDING: Conditions = (false, false, true);

/// A Service with the endpoint `c`, of which the slices say this.
fn publish(cluster: &Cluster, published: bool, conditions: Conditions) {
    let plan = web_node_port("tolerate-unready", 1, NODE_PORT);
    cluster.apply(&if published { plan.publish_not_ready() } else { plan });
    cluster.slices("tolerate-unready", "all", &PORTS, &[("c", conditions)]);
}

/// ClusterIP and the NodePort of both nodes.
fn addresses(cluster: &Cluster) -> [[SocketAddr; 2]; 3] {
    let nodes = cluster.places(["node1", "node2"]).map(|node| node.at(NODE_PORT));
    [service(1), nodes[0], nodes[1]]
}

#[test]
fn should_create_endpoints_for_unready_pods() -> Result<()> {
    // service.go:1792; E-25, P-2
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    let _servers = cluster.serve(&["c"])?;
    let client = cluster.place("a");
    publish(&cluster, true, PUBLISHED);
    soon(|| dial_all(client, service(1), &["c"]))?;
    publish(&cluster, false, UNREADY);
    down([client], service(1))?;
    publish(&cluster, true, PUBLISHED_ENDING);
    soon(|| dial_all(client, service(1), &["c"]))
}

#[test]
fn should_be_able_to_connect_to_terminating_and_unready_endpoints_if_publish_not_ready_addresses_is_true()
-> Result<()> {
    // service.go:1948; E-25
    let cluster = Cluster::raise(PodNetwork::Routed)?;
    let _servers = cluster.serve(&["c"])?;
    publish(&cluster, true, PUBLISHED_ENDING);
    for targets in addresses(&cluster) {
        soon(|| dial_all(cluster.place("a"), targets, &["c"]))?;
    }
    Ok(())
}

#[test]
fn should_not_be_able_to_connect_to_terminating_and_unready_endpoints_if_publish_not_ready_addresses_is_false()
-> Result<()> {
    // service.go:2068; P-2, P-14
    let cluster = Cluster::raise(PodNetwork::Bridged)?;
    let _servers = cluster.serve(&["c"])?;
    publish(&cluster, false, crate::cluster::READY);
    for targets in addresses(&cluster) {
        soon(|| dial_all(cluster.place("a"), targets, &["c"]))?;
    }
    publish(&cluster, false, UNREADY_ENDING);
    for targets in addresses(&cluster) {
        down([cluster.place("a")], targets)?;
    }
    Ok(())
}

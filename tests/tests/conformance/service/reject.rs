//! Services that nobody serves.

use anyhow::Result;
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, service, web, web_node_port};
use crate::reach::{refused, soon};

const NODE_PORT: u16 = 30_080;

#[test]
fn should_be_rejected_when_no_endpoints_exist() -> Result<()> {
    // service.go:2419; P-14, P-19
    let cluster = Cluster::raise(PodNetwork::RoutedOverlay)?;
    cluster.expose(&web_node_port("no-pods", 1, NODE_PORT), &[])?;
    for client in cluster.places(["a", "h1"]) {
        for targets in
            [service(1), cluster.place("node1").at(NODE_PORT), cluster.place("node2").at(NODE_PORT)]
        {
            soon(|| refused(client, targets))?;
        }
    }
    soon(|| refused(cluster.place("outside"), cluster.place("node2").at(NODE_PORT)))
}

#[test]
fn should_be_rejected_for_evicted_pods() -> Result<()> {
    // service.go:2464; P-14
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    let plan = web("evicted-pods", 1).publish_not_ready();
    let mut endpoints = cluster.expose(&plan, &["c"])?;
    // A failed pod is in no slice, whatever the Service publishes.
    endpoints.remove("c")?;
    for client in cluster.places(["a", "d", "h2"]) {
        soon(|| refused(client, service(1)))?;
    }
    Ok(())
}

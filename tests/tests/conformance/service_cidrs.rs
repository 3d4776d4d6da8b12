//! `network/service_cidrs.go`.
//!
//! Not mirrored: 166 and 212 test the API alone.

use anyhow::Result;
use proxy_tests::manifests::ServicePlan;
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, at, ip};
use crate::reach::{dial_all, soon};

const NODE_PORT: u16 = 30_080;

#[test]
fn should_create_services_and_serve_on_different_service_cidrs() -> Result<()> {
    // service_cidrs.go:69; Y-16, P-22: a range that no agent knows.
    let cluster = Cluster::raise(PodNetwork::RoutedOverlay)?;
    let _servers = cluster.serve(&["b", "c"])?;
    let addresses = [ip("203.0.113.77"), ip("2001:db8:cb00::77")];
    let plan = ServicePlan::new("cidr-test", &addresses).port("tcp", "TCP", 80, 8080).node_port(NODE_PORT);
    cluster.expose(&plan.port("udp", "UDP", 80, 8080).node_port(NODE_PORT), &["b", "c"])?;
    let [node1, node2] = cluster.places(["node1", "node2"]).map(|node| node.at(NODE_PORT));
    for targets in [at(addresses, 80), node1, node2] {
        for client in cluster.places(["a", "h3"]) {
            soon(|| dial_all(client, targets, &["b", "c"]))?;
        }
    }
    Ok(())
}

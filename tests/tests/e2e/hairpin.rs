//! A pod that is its own only endpoint.

use anyhow::Result;

use proxy_tests::test_cluster::PodNetwork;

use crate::common::{ip, manifests, vips};
use crate::scene::{agent, answers, at, in_every_network, in_network, is_served, seen_as, servers, service};

#[test]
fn a_pod_reaches_itself_through_its_own_service() -> Result<()> {
    // M-10, M-13: ClusterIP and NodePort, TCP and UDP, packet by packet. A pod that is shown its own address would
    // answer over its own loopback.
    in_every_network(|cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["b"])?;
        service(&dir, &cluster, ("own", 1, 30001), &["b"], |plan| plan)?;
        let _agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off"])?;
        let node_in_pod_network = ["10.244.1.1", "fd00:244:1::1"].map(ip);
        for targets in [at(vips(1), 80), cluster.place("node1").at(30001)] {
            answers(cluster.place("b"), targets, "b", |answer| seen_as(answer, node_in_pod_network))?;
        }
        Ok(())
    })
}

#[test]
fn a_pod_reaches_itself_by_translated_sockets() -> Result<()> {
    // M-10; a connected UDP socket of a pod goes by packet all the same.
    in_network(PodNetwork::Bridged, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["b"])?;
        service(&dir, &cluster, ("own", 1, 30001), &["b"], |plan| plan)?;
        let _agent = agent(&cluster, "node1", &dir, &[])?;
        is_served(cluster.place("b"), at(vips(1), 80), "b")?;
        is_served(cluster.place("b"), cluster.place("node1").at(30001), "b")
    })
}

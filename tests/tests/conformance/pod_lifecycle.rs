//! `network/pod_lifecycle.go`.
//!
//! Not mirrored: 60 and 85 use pods' addresses alone.

use anyhow::Result;
use proxy_tests::manifests::Phase;
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, service, web};
use crate::reach::{connections, dial_all, soon, unbroken};

#[test]
fn should_be_able_to_have_zero_downtime_on_a_blue_green_deployment_using_services_and_readiness_gates()
-> Result<()> {
    // pod_lifecycle.go:110; P-1, P-2
    let cluster = Cluster::raise(PodNetwork::RoutedOverlay)?;
    let _servers = cluster.serve(&["c", "e"])?;
    let [blue, green] = cluster.places(["c", "e"]);
    let mut endpoints = cluster.expose(&web("blue-green", 1), &["c"])?;
    endpoints.set(green, Phase::Starting)?;
    let clients = cluster.places(["a", "h1"]);
    let mut loads = Vec::new();
    for client in clients {
        soon(|| dial_all(client, service(1), &["c"]))?;
        for to in service(1) {
            loads.push(connections(client, to)?);
        }
    }
    for [on, off] in [[green, blue], [blue, green]] {
        // The gates are switched one after the other: in between both are ready.
        endpoints.set(on, Phase::Ready)?;
        endpoints.set(off, Phase::Starting)?;
        for client in clients {
            soon(|| dial_all(client, service(1), &[&on.name]))?;
        }
    }
    loads.into_iter().try_for_each(unbroken)
}

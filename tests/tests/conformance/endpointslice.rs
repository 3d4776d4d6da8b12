//! `network/endpointslice.go`.
//!
//! Not mirrored: 67, 144 and 274 test Kubernetes' controllers and the API.

use anyhow::Result;
use proxy_tests::manifests::ServicePlan;
use proxy_tests::probe::{Ask, Server};
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, READY, at, vips};
use crate::reach::{dial, soon};

/// A Service without a selector, with two ports.
fn plan(name: &str) -> ServicePlan {
    ServicePlan::new(name, &vips(1)).port("http80", "TCP", 80, 3000).port("http81", "TCP", 8080, 3001)
}

/// Both ports lead to these.
fn leads(cluster: &Cluster, endpoints: [&[&str]; 2]) -> Result<()> {
    for (port, endpoints) in [80, 8080].into_iter().zip(endpoints) {
        for to in at(vips(1), port) {
            soon(|| dial(cluster.place("a"), &Ask::tcp(to), endpoints))?;
        }
    }
    Ok(())
}

#[test]
fn should_support_a_service_with_multiple_ports_specified_in_multiple_endpoint_slices() -> Result<()> {
    // endpointslice.go:458; E-3, E-10
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    let _servers = [3000, 3001]
        .map(|port| Server::named(cluster.place("c"), &format!("c-{port}"), &[port]))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    cluster.apply(plan("example-custom-endpoints"));
    cluster.slices("example-custom-endpoints", "one", &[("http80", "TCP", 3000)], &[("c", READY)]);
    cluster.slices("example-custom-endpoints", "two", &[("http81", "TCP", 3001)], &[("c", READY)]);
    leads(&cluster, [&["c-3000"], &["c-3001"]])
}

#[test]
fn should_support_a_service_with_multiple_endpoint_ips_specified_in_multiple_endpoint_slices() -> Result<()> {
    // endpointslice.go:570; E-6
    let cluster = Cluster::raise(PodNetwork::Bridged)?;
    let _servers = ["c", "e"]
        .map(|pod| Server::start(cluster.place(pod), &[3000, 3001]))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    cluster.apply(plan("example-custom-endpoints"));
    let ports = [("http80", "TCP", 3000), ("http81", "TCP", 3001)];
    for pod in ["c", "e"] {
        cluster.slices("example-custom-endpoints", pod, &ports, &[(pod, READY)]);
    }
    leads(&cluster, [&["c", "e"], &["c", "e"]])
}

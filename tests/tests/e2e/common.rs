//! The cluster that most tests play in, and the Services that most of them use.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use proxy_tests::manifests::{EndpointController, ManifestDir, Phase, ServicePlan};
use proxy_tests::object::{Object, Publish};
use proxy_tests::test_cluster::{Plan, PodNetwork, TestCluster};

/// `node1` with pods `a` and `b`, `node2` with pods `c` and `d`, a host-network pod on each, and a client
/// outside that routes Service addresses through `node1`.
pub(crate) fn two_nodes(network: PodNetwork) -> Result<TestCluster> {
    Plan::default()
        .node("node1", &["a", "b"])
        .host_pod("h1")
        .node("node2", &["c", "d"])
        .host_pod("h2")
        .client_via("outside", "node1")
        .network(network)
        .raise()
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) fn at(ip_text: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(ip_text), port)
}

/// The ClusterIPs of a Service, both families: 10.96.0.`n` and fd00:10:96::`n`.
pub(crate) fn vips(n: u8) -> [IpAddr; 2] {
    [ip(&format!("10.96.0.{n}")), ip(&format!("fd00:10:96::{n}"))]
}

/// A Service `name` over TCP and UDP, port 80 to 8080 of the given places, dual-stack.
pub(crate) fn web<'a>(
    to: &'a dyn Publish,
    cluster: &TestCluster,
    name: &str,
    n: u8,
    pods: &[&str],
    change: impl Fn(ServicePlan) -> ServicePlan,
) -> Result<EndpointController<'a>> {
    let plan = ServicePlan::new(name, &vips(n)).port("tcp", "TCP", 80, 8080).port("udp", "UDP", 80, 8080);
    to.publish(&Object::from(&change(plan).build()))?;
    let mut controller = EndpointController::new(to, name, &[("tcp", "TCP", 8080), ("udp", "UDP", 8080)])?;
    for pod in pods {
        controller.set(cluster.place(pod), Phase::Ready)?;
    }
    Ok(controller)
}

/// An empty directory of manifests.
pub(crate) fn manifests() -> Result<ManifestDir> {
    ManifestDir::new()
}

//! `network/dual_stack.go`: Services of one family and of two, and the granular checks over the secondary family.
//!
//! Not mirrored: 64–170 use no Service; 257 asks for the family that the API server takes by itself, and is 294 for a
//! service proxy; 469 is SCTP. What 294–401 ask of the API server is that a Service has the right addresses; of the proxy,
//! that these are served, and a NodePort in their families alone.

use std::net::IpAddr;

use anyhow::Result;
use proxy_tests::manifests::ServicePlan;
use proxy_tests::probe::Ask;
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, vips};
use crate::granular::{self, Family::Secondary};
use crate::reach::{WAYS, dial, refuses, soon};

const NODE_PORT: u16 = 30_080;

/// A Service with these ClusterIPs, in this order, is served in their families and in no other.
fn serves(network: PodNetwork, cluster_ips: &[IpAddr]) -> Result<()> {
    let cluster = Cluster::raise(network)?;
    let _servers = cluster.serve(&["b", "c"])?;
    let plan = ServicePlan::new("families", cluster_ips).port("tcp", "TCP", 80, 8080).node_port(NODE_PORT);
    cluster.expose(&plan.port("udp", "UDP", 80, 8080).node_port(NODE_PORT), &["b", "c"])?;
    let client = cluster.place("a");
    for way in WAYS {
        for vip in cluster_ips {
            soon(|| dial(client, &way((*vip, 80).into()), &["b", "c"]))?;
        }
        for to in cluster.place("node2").at(NODE_PORT) {
            if cluster_ips.iter().any(|vip| vip.is_ipv4() == to.is_ipv4()) {
                soon(|| dial(client, &way(to), &["b", "c"]))?;
            } else {
                refuses(client, &way(to))?;
            }
        }
    }
    Ok(())
}

#[test]
fn should_create_service_with_ipv4_cluster_ip() -> Result<()> {
    // dual_stack.go:294; S-9, S-10
    serves(PodNetwork::Bridged, &vips(1)[..1])
}

#[test]
fn should_create_service_with_ipv6_cluster_ip() -> Result<()> {
    // dual_stack.go:330; S-9, S-10
    serves(PodNetwork::Overlay, &vips(1)[1..])
}

#[test]
fn should_create_service_with_ipv4_v6_cluster_ip() -> Result<()> {
    // dual_stack.go:365; S-9
    serves(PodNetwork::RoutedOverlay, &vips(1))
}

#[test]
fn should_create_service_with_ipv6_v4_cluster_ip() -> Result<()> {
    // dual_stack.go:401; S-9
    let [v4, v6] = vips(1);
    serves(PodNetwork::Routed, &[v6, v4])
}

#[test]
fn should_function_for_pod_service_http() -> Result<()> {
    // dual_stack.go:441; S-9, S-10
    granular::client_reaches("b", Secondary, Ask::tcp)
}

#[test]
fn should_function_for_pod_service_udp() -> Result<()> {
    // dual_stack.go:455; S-9, S-10
    granular::client_reaches("b", Secondary, Ask::udp)
}

#[test]
fn should_function_for_node_service_http() -> Result<()> {
    // dual_stack.go:484; V-3
    granular::client_reaches("h1", Secondary, Ask::tcp)
}

#[test]
fn should_function_for_node_service_udp() -> Result<()> {
    // dual_stack.go:499; V-3
    granular::client_reaches("h1", Secondary, Ask::udp)
}

#[test]
fn should_function_for_endpoint_service_http() -> Result<()> {
    // dual_stack.go:514; M-10
    granular::client_reaches("a", Secondary, Ask::tcp)
}

#[test]
fn should_function_for_endpoint_service_udp() -> Result<()> {
    // dual_stack.go:528; M-10
    granular::client_reaches("a", Secondary, Ask::udp)
}

#[test]
fn should_update_endpoints_http() -> Result<()> {
    // dual_stack.go:542; P-28
    granular::update_endpoints(Secondary, Ask::tcp)
}

#[test]
fn should_update_endpoints_udp() -> Result<()> {
    // dual_stack.go:558; P-28
    granular::update_endpoints(Secondary, Ask::udp)
}

#[test]
fn should_function_for_client_ip_based_session_affinity_http() -> Result<()> {
    // dual_stack.go:576; A-1
    granular::affinity(Secondary, Ask::tcp)
}

#[test]
fn should_function_for_client_ip_based_session_affinity_udp() -> Result<()> {
    // dual_stack.go:594; A-1
    granular::affinity(Secondary, Ask::udp)
}

#[test]
fn should_be_able_to_handle_large_requests_http() -> Result<()> {
    // dual_stack.go:611; D-3
    granular::large(Secondary, Ask::tcp)
}

#[test]
fn should_be_able_to_handle_large_requests_udp() -> Result<()> {
    // dual_stack.go:618; D-3
    granular::large(Secondary, Ask::udp)
}

#[test]
fn should_function_for_service_endpoints_using_host_network() -> Result<()> {
    // dual_stack.go:628; E-26
    granular::host_network(Secondary)
}

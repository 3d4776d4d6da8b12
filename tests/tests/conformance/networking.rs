//! `network/networking.go`: granular checks of Services over the primary family, in every pod network.
//!
//! Not mirrored: 88–102 (egress of pods) and 109 (paths of the API) test no proxy; 177, 219, 263 are SCTP (see the crate's
//! documentation); 548 deletes iptables chains, of which there are none; 635 is the CNI's hostPort.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use proxy_tests::probe::Ask;
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::Cluster;
use crate::granular::{self, Family::Primary};
use crate::http;

#[test]
fn should_check_kube_proxy_urls() -> Result<()> {
    // networking.go:132; H-1, H-11, H-27
    let cluster = Cluster::raise(PodNetwork::Routed)?;
    for host in ["h1", "h2", "h3"] {
        let ask = |port, path| http::get(cluster.place(host), SocketAddr::from(([127, 0, 0, 1], port)), path);
        let health = ask(10256, "/healthz")?;
        ensure!(health.starts_with("HTTP/1.1 200 OK\r\n") && health.contains("lastUpdated"), "{health}");
        let mode = ask(10249, "/proxyMode")?;
        ensure!(mode.starts_with("HTTP/1.1 200 OK\r\n"), "{mode}");
    }
    Ok(())
}

#[test]
fn should_function_for_pod_service_http() -> Result<()> {
    // networking.go:147; P-25, M-8
    granular::client_reaches("b", Primary, Ask::tcp)
}

#[test]
fn should_function_for_pod_service_udp() -> Result<()> {
    // networking.go:162; P-25, M-8
    granular::client_reaches("b", Primary, Ask::udp)
}

#[test]
fn should_function_for_node_service_http() -> Result<()> {
    // networking.go:191; V-3, D-12
    granular::client_reaches("h1", Primary, Ask::tcp)
}

#[test]
fn should_function_for_node_service_udp() -> Result<()> {
    // networking.go:205; V-3, D-12
    granular::client_reaches("h1", Primary, Ask::udp)
}

#[test]
fn should_function_for_endpoint_service_http() -> Result<()> {
    // networking.go:234; M-10
    granular::client_reaches("a", Primary, Ask::tcp)
}

#[test]
fn should_function_for_endpoint_service_udp() -> Result<()> {
    // networking.go:248; M-10
    granular::client_reaches("a", Primary, Ask::udp)
}

#[test]
fn should_function_for_multiple_endpoint_services_with_same_selector() -> Result<()> {
    // networking.go:280; S-22, D-5
    granular::same_selector(Primary)
}

#[test]
fn should_update_endpoints_http() -> Result<()> {
    // networking.go:325; P-28, C-4
    granular::update_endpoints(Primary, Ask::tcp)
}

#[test]
fn should_update_endpoints_udp() -> Result<()> {
    // networking.go:342; P-28, C-4
    granular::update_endpoints(Primary, Ask::udp)
}

#[test]
fn should_update_node_port_http() -> Result<()> {
    // networking.go:360; S-22
    granular::update_node_port(Primary, Ask::tcp)
}

#[test]
fn should_support_basic_node_port_udp_functionality() -> Result<()> {
    // networking.go:381; D-12
    granular::client_reaches("h1", Primary, Ask::unconnected)
}

#[test]
fn should_update_node_port_udp() -> Result<()> {
    // networking.go:391; S-22
    granular::update_node_port(Primary, Ask::udp)
}

#[test]
fn should_function_for_client_ip_based_session_affinity_http() -> Result<()> {
    // networking.go:413
    granular::affinity(Primary, Ask::tcp)
}

#[test]
fn should_function_for_client_ip_based_session_affinity_udp() -> Result<()> {
    // networking.go:431
    granular::affinity(Primary, Ask::udp)
}

#[test]
fn should_be_able_to_handle_large_requests_http() -> Result<()> {
    // networking.go:448; D-3
    granular::large(Primary, Ask::tcp)
}

#[test]
fn should_be_able_to_handle_large_requests_udp() -> Result<()> {
    // networking.go:458; D-3
    granular::large(Primary, Ask::udp)
}

#[test]
fn should_function_for_service_endpoints_using_host_network() -> Result<()> {
    // networking.go:471; E-26, M-15, D-12
    granular::host_network(Primary)
}

//! `network/dual_stack.go`: the granular checks over the secondary family, in every pod network.
//!
//! Not mirrored: 64–170 use no Service; 257–401 are what the API server allocates (the clusters of these tests are
//! dual-stack throughout, and the service proxy's part, S-9, shows in both families); 469 is SCTP.

use anyhow::Result;
use proxy_tests::probe::Ask;

use crate::granular::{self, Family::Secondary};

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

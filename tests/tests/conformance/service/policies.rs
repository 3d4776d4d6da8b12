//! Traffic policies.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::manifests::ServicePlan;
use proxy_tests::pod::Place;
use proxy_tests::probe::eventually;
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, NODES, everywhere, ip, service, web, web_node_port};
use crate::http;
use crate::reach::{dial_all, down, is_down, seen_as, soon};

const NODE_PORT: u16 = 30_080;
const HEALTH: u16 = 30_999;

/// Clients on the node of the Service's endpoint reach it; clients on another fail every time.
fn internal_local(endpoint: &str, near: &[&str], far: &[&str]) -> Result<()> {
    everywhere(|cluster| {
        let _servers = cluster.serve(&[endpoint])?;
        cluster.expose(&web("internal-local", 1).internal_local(), &[endpoint])?;
        for client in near {
            soon(|| dial_all(cluster.place(client), service(1), &[endpoint]))?;
        }
        down(far.iter().map(|client| cluster.place(client)), service(1))
    })
}

#[test]
fn should_respect_internal_traffic_policy_local_pod_to_pod() -> Result<()> {
    // service.go:2528; P-15
    internal_local("c", &["d"], &["a", "e"])
}

#[test]
fn should_respect_internal_traffic_policy_local_host_network_pod_to_pod() -> Result<()> {
    // service.go:2597; P-15, M-7
    internal_local("c", &["h2"], &["h1", "h3"])
}

#[test]
fn should_respect_internal_traffic_policy_local_pod_and_node_to_host_network_pod() -> Result<()> {
    // service.go:2668; P-15, E-26, D-12
    internal_local("h2", &["d", "h2"], &["a", "h1"])
}

#[test]
fn should_support_external_traffic_policy_local_for_type_node_port() -> Result<()> {
    // service.go:2771; V-26, M-9
    everywhere(|cluster| {
        let _servers = cluster.serve(&["c"])?;
        cluster.expose(&web_node_port("external-local", 1, NODE_PORT).external_local(None), &["c"])?;
        let (node1, node2) = (cluster.place("node1"), cluster.place("node2"));
        soon(|| seen_as(cluster.place("h1"), node2.at(NODE_PORT), node1.addresses()))
    })
}

/// What a client in the host network of `node1` must see while the endpoint is on `node2`.
struct Changing<'a> {
    cluster: &'a Cluster,
    client: &'a Place,
}

impl Changing<'_> {
    fn at(&self, node: &str, port: u16) -> [SocketAddr; 2] {
        self.cluster.place(node).at(port)
    }

    /// The status of each node's health check: nothing where nobody listens.
    fn health(&self, wanted: [Option<&str>; 3]) -> Result<()> {
        for (node, wanted) in NODES.iter().zip(wanted) {
            for to in self.at(node, HEALTH) {
                let response = http::try_get(self.client, to, "/healthz")?;
                let code = response.as_ref().map(|text| text.split(' ').nth(1).unwrap_or_default());
                ensure!(code == wanted, "{node}: {response:?}, not {wanted:?}");
            }
        }
        Ok(())
    }

    /// `externalTrafficPolicy: Local`.
    fn local(&self) -> Result<()> {
        self.health([Some("503"), Some("200"), Some("503")])?;
        let node1 = self.cluster.place("node1").addresses();
        seen_as(self.client, self.at("node2", NODE_PORT), node1).context("the endpoint's node")?;
        // The own node is no outside: it leads to the endpoint wherever that is. A host's packets to pods of other nodes
        // come from the tunnel in an overlay.
        let tunnel: [IpAddr; 2] = [ip("10.244.1.0"), ip("fd00:244:1::")];
        let overlay = [PodNetwork::Overlay, PodNetwork::RoutedOverlay].contains(&self.cluster.network);
        let own = if overlay { tunnel } else { node1 };
        seen_as(self.client, self.at("node1", NODE_PORT), own).context("the client's own node")?;
        is_down([self.client], self.at("node3", NODE_PORT)).context("the third node")
    }

    /// `externalTrafficPolicy: Cluster`.
    fn cluster(&self) -> Result<()> {
        self.health([None; 3])?;
        NODES.into_iter().try_for_each(|node| dial_all(self.client, self.at(node, NODE_PORT), &["c"]))
    }

    /// Upstream gives each phase 30 seconds, for all of it.
    fn phase(&self, check: fn(&Self) -> Result<()>) -> Result<()> {
        eventually(Duration::from_secs(30), || check(self))
    }
}

#[test]
fn should_implement_node_port_and_health_check_node_port_correctly_when_external_traffic_policy_changes()
-> Result<()> {
    // service.go:3833; V-25, V-26, H-18, H-25
    everywhere(|cluster| {
        let _servers = cluster.serve(&["c"])?;
        // Of type LoadBalancer, to which nobody has given an address.
        let plan = || -> ServicePlan { web_node_port("policy-changes", 1, NODE_PORT).load_balancer(&[]) };
        let changing = Changing { cluster, client: cluster.place("h1") };
        cluster.expose(&plan().external_local(Some(HEALTH)), &["c"])?;
        changing.phase(Changing::local).context("Local")?;
        cluster.apply(plan());
        changing.phase(Changing::cluster).context("Cluster")?;
        cluster.apply(plan().external_local(Some(HEALTH)));
        changing.phase(Changing::local).context("Local again")
    })
}

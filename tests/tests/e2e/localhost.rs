//! NodePorts at 127.0.0.1 and ::1: for processes of the host, and for nobody else.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::manifests::ServicePlan;
use proxy_tests::probe::{Ask, Server, request};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};

use crate::common::{at, manifests, two_nodes, vips, web};

const PORT: u16 = 30_081;
const SOON: Duration = Duration::from_millis(500);

/// What a place sees at the loopback NodePort: who answers, asked in every way a process can.
fn answers(cluster: &TestCluster, place: &str) -> Result<Vec<Option<String>>> {
    let mut seen = Vec::new();
    for to in [at("127.0.0.1", PORT), at("::1", PORT)] {
        for ask in [Ask::tcp(to), Ask::udp(to), Ask::unconnected(to)] {
            let request = request(cluster.place(place), &ask.timeout(SOON))?;
            let from: Option<SocketAddr> = request.peer_name.or(request.received_from);
            // D-1: the process sees the address it asked for, never the endpoint's.
            ensure!(from.is_none_or(|from| from == to), "{place} asked {to} and sees {from:?}");
            seen.push(request.answer.map(|answer| answer.name));
        }
    }
    Ok(seen)
}

#[test]
fn host_processes_reach_node_ports_at_loopback_and_pods_do_not() -> Result<()> {
    let cluster = two_nodes(PodNetwork::Routed)?;
    let dir = manifests()?;
    let _server = Server::start(cluster.place("c"), &[8080])?;
    let ports = |_: ServicePlan| {
        let plan = ServicePlan::new("web", &vips(1)).port("tcp", "TCP", 80, 8080).node_port(PORT);
        plan.port("udp", "UDP", 80, 8080).node_port(PORT)
    };
    let _web = web(&dir, &cluster, "web", 1, &["c"], ports)?;
    let cidrs = TestCluster::CLUSTER_CIDRS.join(",");
    let (yes, no) = (vec![Some("c".to_owned()); 6], vec![None; 6]);
    // V-36: kube-proxy offers it for IPv4 alone.
    for (switch, expected) in [("true", &yes), ("false", &no)] {
        let flag = format!("--localhost-nodeports={switch}");
        let _agent = Agent::start(&cluster, "node1", &dir, &["--cluster-cidr", &cidrs, &flag])?;
        let seen = answers(&cluster, "h1")?;
        ensure!(seen == *expected, "a host process with {flag}: {seen:?}");
        let seen = answers(&cluster, "a")?;
        ensure!(seen == no, "a pod with {flag}: {seen:?}");
    }
    Ok(())
}

//! `healthCheckNodePort`: what a load balancer learns of a node, while the node serves on.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::manifests::Phase;
use proxy_tests::object::{Object, Publish};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Server, eventually, get};
use proxy_tests::test_cluster::PodNetwork;

use crate::common::{ip, manifests, two_nodes, vips, web};

const SOON: Duration = Duration::from_secs(10);
const CHECK: u16 = 30_999;
const NODE_PORT: u16 = 30_080;

/// What the port answers: `None` when nobody listens.
fn asked(client: &Place, to: SocketAddr) -> Result<Option<String>> {
    let ask = || -> std::io::Result<Option<String>> {
        let mut stream = match TcpStream::connect_timeout(&to, SOON) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(None),
            other => other?,
        };
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        Ok(Some(response))
    };
    client.netns.run_in(ask)?.with_context(|| format!("asking {to} from {}", client.name))
}

/// Waits until the port answers with this code and weight, in both families.
fn expect(client: &Place, node: &Place, code: &str, weight: usize) -> Result<()> {
    for to in node.at(CHECK) {
        eventually(SOON, || {
            let response = asked(client, to)?.with_context(|| format!("{to} is closed"))?;
            let has = |part: &str| response.contains(part);
            ensure!(
                response.starts_with(&format!("HTTP/1.1 {code} "))
                    && has(&format!("x-load-balancing-endpoint-weight: {weight}\r\n"))
                    && has(&format!("\t\"localEndpoints\": {weight},\n\t\"serviceProxyHealthy\": true\n}}")),
                "{to} says {response}, not {code} and {weight}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

fn expect_closed(client: &Place, node: &Place) -> Result<()> {
    node.at(CHECK).into_iter().try_for_each(|to| {
        eventually(SOON, || {
            let response = asked(client, to)?;
            ensure!(response.is_none(), "{to} still answers: {response:?}");
            Ok(())
        })
    })
}

#[test]
fn a_load_balancer_is_sent_away_before_the_last_endpoint_has_gone() -> Result<()> {
    let cluster = two_nodes(PodNetwork::Routed)?;
    let dir = manifests()?;
    let _servers = ["a", "b", "c"]
        .map(|pod| Server::start(cluster.place(pod), &[8080]))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let local = |plan: proxy_tests::manifests::ServicePlan| {
        plan.node_port(NODE_PORT).load_balancer(&[ip("203.0.113.7")]).external_local(Some(CHECK))
    };
    // The NodePort stands on the last port, which is UDP.
    let mut web = web(&dir, &cluster, "web", 1, &["a", "b", "c"], local)?;
    let cidrs = proxy_tests::test_cluster::TestCluster::CLUSTER_CIDRS.join(",");
    // The directory has no Node object: NodePorts, and health checks, at all addresses (H-15).
    let agent = Agent::start(&cluster, "node1", &dir, &["--cluster-cidr", &cidrs])?;
    let (outside, node1) = (cluster.place("outside"), cluster.place("node1"));

    // H-20: two pods here, each behind two ports of the Service; the third is elsewhere.
    expect(outside, node1, "200", 2)?;
    // H-24: from a pod of the node, too.
    expect(cluster.place("a"), node1, "200", 2)?;
    web.set(cluster.place("a"), Phase::Terminating)?;
    expect(outside, node1, "200", 1)?;
    web.set(cluster.place("b"), Phase::Terminating)?;
    expect(outside, node1, "503", 0)?;
    // H-20, P-6: the node goes on serving whom the balancer has sent so far.
    for to in node1.at(NODE_PORT) {
        for _ in 0..5 {
            let answer = get(outside, &Ask::udp(to))?;
            ensure!(["a", "b"].contains(&answer.name.as_str()), "{to}: {answer:?}");
        }
    }
    web.remove("a")?;
    web.remove("b")?;
    expect(outside, node1, "503", 0)?;

    // H-18, H-25: with policy Cluster nobody listens; back again, the same port serves.
    let plan = || {
        let ports = proxy_tests::manifests::ServicePlan::new("web", &vips(1));
        ports.port("tcp", "TCP", 80, 8080).port("udp", "UDP", 80, 8080)
    };
    let everywhere = plan().node_port(NODE_PORT).load_balancer(&[ip("203.0.113.7")]);
    dir.publish(&Object::from(&everywhere.build()))?;
    expect_closed(outside, node1)?;
    web.set(cluster.place("b"), Phase::Ready)?;
    dir.publish(&Object::from(&local(plan()).build()))?;
    expect(outside, node1, "200", 1)?;

    // H-16: a second Service with the same port is warned of, and the first one answers on.
    let other = proxy_tests::manifests::ServicePlan::new("zweb", &vips(2))
        .port("tcp", "TCP", 80, 8080)
        .load_balancer(&[ip("203.0.113.8")])
        .external_local(Some(CHECK));
    dir.publish(&Object::from(&other.build()))?;
    eventually(SOON, || {
        let status = agent.status_json()?.to_string();
        ensure!(status.contains("Service default/zweb: healthCheckNodePort 30999"), "no warning in {status}");
        Ok(())
    })?;
    expect(outside, node1, "200", 1)
}

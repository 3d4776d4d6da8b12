//! What is new beside connections that a kube-proxy has begun.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::{Agent, FLAGS};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Remote, eventually};
use proxy_tests::reference::{self, Door};
use proxy_tests::test_cluster::PodNetwork;

use crate::common::{manifests, two_nodes, vips};
use crate::endpoint_loss::{self, goes_on};
use crate::life::SOON;
use crate::scene::{at, servers, service};

/// The only port that the pod's kernel may give out: towards each address that is asked for once.
const PORT: u16 = 41_000;

/// A connection from that port.
fn connected(from: &Place, to: SocketAddr) -> Result<Remote> {
    let mut socket = endpoint_loss::connected(from, to)?;
    let own = socket.done("peer", "")?.local;
    ensure!(own.is_some_and(|own| own.port() == PORT), "{} → {to} comes from {own:?}", from.name);
    Ok(socket)
}

#[test]
fn new_connections_of_a_pod_may_have_the_port_of_one_that_was_taken_over() -> Result<()> {
    let cluster = two_nodes(PodNetwork::Routed)?;
    let dir = manifests()?;
    let _servers = servers(&cluster, &["b"])?;
    // One endpoint for all of them. The port is kept from each address for a while by who has used it last.
    let names = ["s1", "s2", "s3", "s4"];
    let services =
        (1..).zip(names).map(|(n, name)| service(&dir, &cluster, (name, n, 0), &["b"], |plan| plan));
    let _services = services.collect::<Result<Vec<_>>>()?;
    let (node, a, b) = (cluster.place("node1"), cluster.place("a"), cluster.place("b"));
    // What netfilter is to translate has to have a route first.
    node.netns.ip("route add 10.96.0.0/16 dev eth0\nroute add fd00:10:96::/112 dev eth0\n")?;
    a.netns.sysctls(&[("ipv4/ip_local_port_range", "41000 41000")])?;
    let doors: Vec<_> = at(vips(1), 80).map(Door::Address).into_iter().zip(b.at(8080)).collect();
    reference::load_as("kube-proxy", &node.netns, &doors)?;
    let mut held = at(vips(1), 80).into_iter().map(|to| connected(a, to)).collect::<Result<Vec<_>>>()?;
    let mut agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let says = |agent: &Agent, words: &str, times: usize| {
        eventually(SOON, || {
            let log = agent.log_text();
            ensure!(log.matches(words).count() == times, "not {times} times {words:?}: {log}");
            Ok(())
        })
    };
    says(&agent, "are translated by this proxy now", 1)?;
    let by_packet = "sockets of pods are translated by their packets";
    says(&agent, by_packet, 1)?;
    let beside = |n: u8, held: &mut [Remote]| -> Result<()> {
        let mut new = at(vips(n), 80).into_iter().map(|to| connected(a, to)).collect::<Result<Vec<_>>>()?;
        held.iter_mut().chain(&mut new).try_for_each(goes_on)
    };
    beside(2, &mut held).with_context(|| agent.log_text())?;
    // The next agent knows of them, too.
    agent.stop()?;
    agent.spawn()?;
    agent.wait_ready()?;
    says(&agent, by_packet, 2)?;
    beside(3, &mut held).with_context(|| agent.log_text())?;
    drop(held);
    says(&agent, "sockets of pods are translated when they connect", 1)?;
    beside(4, &mut [])
}

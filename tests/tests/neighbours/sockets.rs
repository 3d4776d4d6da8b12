//! UDP sockets of host processes that are connected while a kube-proxy serves the node, and those that are when it comes back.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::answer::Hold;
use proxy_tests::manifests::{EndpointController, Phase};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Remote, Runner, eventually};
use proxy_tests::test_cluster::{Plan, PodNetwork, TestCluster};

use crate::common::{PORT, Proxy, Serving, Web, leave_rules, servers, soon};

/// Leads to a pod of another node at first.
const WEB: Web = Web::new(1, 30200, "c");
/// Longer than it takes until a socket counts as one that rests, and is found.
const RESTED: Duration = Duration::from_secs(30);

fn cluster() -> Result<TestCluster> {
    let cluster = Plan::default()
        .node("node1", &["a", "b"])
        .node("node2", &["c"])
        .network(PodNetwork::Routed)
        .raise()?;
    cluster
        .place("node1")
        .netns
        .ip("route add 10.96.0.0/16 dev eth0\nroute add fd00:10:96::/112 dev eth0\n")?;
    Ok(cluster)
}

/// A connected UDP socket of a process of the node.
struct Client {
    socket: Remote,
    to: SocketAddr,
    local: SocketAddr,
}

impl Client {
    fn connect(node: &Place, to: SocketAddr, server: &str) -> Result<Self> {
        let mut socket = Remote::open(node, if to.is_ipv4() { "inet" } else { "inet6" }, "udp")?;
        socket.done("connect", &to.to_string())?;
        let local = socket.done("send", "")?.local.context("no address of its own")?;
        let mut client = Self { socket, to, local };
        client.receives(server)?;
        Ok(client)
    }

    fn asks(&mut self, server: &str) -> Result<()> {
        let sent = self.socket.done("send", "")?;
        ensure!(sent.local == Some(self.local), "from {:?}, and from {} before", sent.local, self.local);
        self.receives(server)
    }

    fn receives(&mut self, server: &str) -> Result<()> {
        let received = self.socket.done("receive", "")?;
        let name = received.answer.as_ref().map(|answer| answer.name.as_str());
        ensure!(name == Some(server), "asks {}: not from {server}: {received:?}", self.to);
        ensure!(received.received_from == Some(self.to), "asks {}: {received:?}", self.to);
        Ok(())
    }
}

fn clients(node: &Place, server: &str) -> Result<Vec<Client>> {
    let targets = WEB.cluster_ips().into_iter().chain(node.at(WEB.node_port));
    targets.map(|to| Client::connect(node, to, server).with_context(|| to.to_string())).collect()
}

/// A socket that is never at rest.
fn busy(node: &Place) -> Result<Vec<Runner<Hold>>> {
    let ask = |to| Ask::udp(to).timeout(Duration::from_millis(500));
    let hold = |to| Runner::hold(node, &ask(to), Duration::from_millis(10), Duration::from_secs(90));
    WEB.cluster_ips().into_iter().map(hold).collect()
}

/// Waits until the socket's last answer came from this server.
fn now_from(held: &mut Runner<Hold>, server: &str) -> Result<()> {
    let before = held.report()?.made;
    soon(|| {
        let report = held.report()?;
        let last = report.last.as_ref().map(|answer| answer.name.as_str());
        ensure!(report.made > before && last == Some(server), "not from {server}: {report:?}");
        Ok(())
    })
}

/// Has the agent lead to this pod alone.
fn lead_to(serving: &Serving, cluster: &TestCluster, pod: &str) -> Result<()> {
    let ports = [("tcp", "TCP", PORT), ("udp", "UDP", PORT)];
    EndpointController::new(serving.dir(), &WEB.name(), &ports)?.set(cluster.place(pod), Phase::Ready)
}

#[test]
fn what_was_connected_before_the_agent_came_is_its_own_when_it_rests_or_its_endpoint_goes() -> Result<()> {
    // C-13.
    let cluster = cluster()?;
    let node1 = cluster.place("node1");
    leave_rules(&cluster, "node1", &[WEB])?;
    let _servers = servers(&cluster, &["b", "c"])?;
    let (mut idle, mut busy) = (clients(node1, "c")?, busy(node1)?);
    let serving = Proxy::Agent.serve(&cluster, "node1", &[WEB], &[])?;
    let agent = serving.agent.as_ref().context("an agent")?;
    eventually(RESTED, || {
        let log = agent.log_text();
        let led =
            log.lines().filter_map(|line| line.split_once("before this proxy came: ")?.1.split(' ').next());
        let led: usize = led.filter_map(|count| count.parse::<usize>().ok()).sum();
        ensure!(led == idle.len(), "{led} of {}: {log}", idle.len());
        Ok(())
    })?;
    for client in &mut idle {
        client.asks("c").with_context(|| agent.log_text())?;
    }
    for held in &mut busy {
        let report = held.report()?;
        ensure!(report.failed == 0 && report.made > 100, "{report:?}");
    }
    // A firewall is loaded again: nobody else leads those that rest, and the others not for a moment.
    node1.netns.output("nft", &["flush", "ruleset"])?;
    for client in &mut idle {
        client.asks("c").context("without any rules")?;
    }
    busy.iter_mut().try_for_each(|held| now_from(held, "c"))?;
    let failed = busy.iter_mut().map(|held| Ok(held.report()?.failed)).collect::<Result<Vec<_>>>()?;
    lead_to(&serving, &cluster, "b")?;
    busy.iter_mut().try_for_each(|held| now_from(held, "b"))?;
    for client in &mut idle {
        client.asks("b").with_context(|| agent.log_text())?;
    }
    for (held, failed) in busy.into_iter().zip(failed) {
        let report = held.stop()?;
        // What was under way when the endpoint went.
        ensure!(report.failed <= failed + 2 && report.names.len() == 2, "{failed} failed before: {report:?}");
    }
    Ok(())
}

#[test]
fn what_was_connected_through_the_agent_is_kube_proxy_s_when_that_has_come_back() -> Result<()> {
    let cluster = cluster()?;
    let node1 = cluster.place("node1");
    let mut serving = Proxy::Agent.serve(&cluster, "node1", &[WEB], &[])?;
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut idle = clients(node1, "c")?;
    leave_rules(&cluster, "node1", &[WEB])?;
    let agent = serving.agent.as_mut().context("an agent")?;
    let (status, said) = agent.ask(&["retire"])?;
    ensure!(status.success(), "{said}");
    for client in &mut idle {
        client.asks("c")?;
    }
    agent.stop()?;
    let (status, said) = agent.ask(&["cleanup"])?;
    ensure!(status.success() && said.contains("the endpoints of 4 UDP sockets"), "{said}");
    // Another endpoint, which only rules know.
    let moved = Web::new(1, 30200, "b");
    node1.netns.output("nft", &["flush", "ruleset"])?;
    leave_rules(&cluster, "node1", &[moved])?;
    for client in &mut idle {
        client.asks("b")?;
    }
    Ok(())
}

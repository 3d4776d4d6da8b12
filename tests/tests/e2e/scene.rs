//! A cluster with Services and agents, and the questions that tests ask in it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::answer::Answer;
use proxy_tests::manifests::{EndpointController, ManifestDir, Phase, ServicePlan};
use proxy_tests::object::{Object, Publish};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Server, eventually, get, request};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};

use crate::common::{ip, two_nodes, vips};

/// How soon a change must show.
pub(crate) const SOON: Duration = Duration::from_secs(5);
/// How long a client waits for an answer that is not to come.
pub(crate) const SHORT: Duration = Duration::from_millis(300);

/// The pod ranges, as every agent here gets them.
const CLUSTER_CIDR: [&str; 2] = ["--cluster-cidr", "10.244.0.0/16,fd00:244::/32"];

/// Starts the agent of a node.
pub(crate) fn agent(cluster: &TestCluster, node: &str, dir: &ManifestDir, flags: &[&str]) -> Result<Agent> {
    Agent::start(cluster, node, dir, &[&CLUSTER_CIDR[..], flags].concat())
}

/// Servers on port 8080 of these places.
pub(crate) fn servers(cluster: &TestCluster, places: &[&str]) -> Result<Vec<Server>> {
    places.iter().map(|place| Server::start(cluster.place(place), &[8080])).collect()
}

/// A Service of the port 80 with TCP and UDP and a NodePort for both, dual-stack, and its endpoints.
pub(crate) fn service<'a>(
    to: &'a dyn Publish,
    cluster: &TestCluster,
    (name, n, node_port): (&str, u8, u16),
    pods: &[&str],
    change: impl Fn(ServicePlan) -> ServicePlan,
) -> Result<EndpointController<'a>> {
    let mut plan = ServicePlan::new(name, &vips(n));
    for (port, protocol) in [("tcp", "TCP"), ("udp", "UDP")] {
        plan = plan.port(port, protocol, 80, 8080);
        if node_port != 0 {
            plan = plan.node_port(node_port);
        }
    }
    to.publish(&Object::from(&change(plan).build()))?;
    let mut controller = EndpointController::new(to, name, &[("tcp", "TCP", 8080), ("udp", "UDP", 8080)])?;
    for pod in pods {
        controller.set(cluster.place(pod), Phase::Ready)?;
    }
    Ok(controller)
}

/// Both families of an address by its last number: 203.0.113.`n` and 2001:db8::`n`.
pub(crate) fn public(n: u8) -> [IpAddr; 2] {
    [ip(&format!("203.0.113.{n}")), ip(&format!("2001:db8::{n}"))]
}

/// Both addresses with a port.
pub(crate) fn at(addresses: [IpAddr; 2], port: u16) -> [SocketAddr; 2] {
    addresses.map(|address| SocketAddr::new(address, port))
}

/// TCP, connected UDP, unconnected UDP.
pub(crate) fn ways(to: SocketAddr) -> [Ask; 3] {
    [Ask::tcp(to), Ask::udp(to), Ask::unconnected(to)]
}

/// Every way in both families gets an answer from `server`; `check` looks at each.
pub(crate) fn answers(
    client: &Place,
    targets: [SocketAddr; 2],
    server: &str,
    check: impl Fn(&Answer) -> Result<()>,
) -> Result<()> {
    for ask in targets.into_iter().flat_map(ways) {
        let request = request(client, &ask)?;
        let context = || format!("{} {ask:?} got {request:?}", client.name);
        let answer = request.answer.as_ref().with_context(context)?;
        ensure!(answer.name == server, "not from {server}: {}", context());
        check(answer).with_context(context)?;
    }
    Ok(())
}

/// The same without a look at the answers.
pub(crate) fn is_served(client: &Place, targets: [SocketAddr; 2], server: &str) -> Result<()> {
    answers(client, targets, server, |_| Ok(()))
}

/// An answer's client is one of these addresses.
pub(crate) fn seen_as(answer: &Answer, addresses: [IpAddr; 2]) -> Result<()> {
    ensure!(addresses.contains(&answer.peer.ip()), "the server saw {}, not {addresses:?}", answer.peer);
    Ok(())
}

/// Each way in both families reaches exactly these servers, and nothing is lost on the way.
pub(crate) fn spreads(client: &Place, targets: [SocketAddr; 2], servers: &[&str]) -> Result<()> {
    let wanted: BTreeSet<String> = servers.iter().map(ToString::to_string).collect();
    for ask in targets.into_iter().flat_map(ways) {
        let mut seen = BTreeSet::new();
        // Of two servers one is missed in 40 fair draws once in 10^12 runs.
        for n in 0..40 {
            seen.insert(get(client, &ask)?.name);
            if n >= 5 && seen == wanted {
                break;
            }
        }
        ensure!(seen == wanted, "{} {ask:?}: {seen:?} answered, not {wanted:?}", client.name);
    }
    Ok(())
}

/// A request fails, in this way.
pub(crate) fn fails(client: &Place, ask: &Ask, failures: &[&str]) -> Result<()> {
    let request = request(client, &ask.clone().timeout(SHORT))?;
    let failure = request.failure.as_deref().unwrap_or("no failure");
    ensure!(failures.contains(&failure), "{} {ask:?}: {failure}, not {failures:?}: {request:?}", client.name);
    Ok(())
}

/// TCP and connected UDP are refused at once in both families: with `ECONNREFUSED` where the kernel can tell.
pub(crate) fn is_refused(client: &Place, targets: [SocketAddr; 2]) -> Result<()> {
    for to in targets {
        fails(client, &Ask::tcp(to), &["connect ECONNREFUSED"])?;
        fails(client, &Ask::udp(to), &["connect ECONNREFUSED", "receive ECONNREFUSED"])?;
    }
    Ok(())
}

/// Nothing comes back, neither answer nor rejection.
pub(crate) fn is_dropped(client: &Place, targets: [SocketAddr; 2]) -> Result<()> {
    for to in targets {
        fails(client, &Ask::tcp(to), &["connect timeout"])?;
        fails(client, &Ask::udp(to), &["receive timeout"])?;
    }
    Ok(())
}

/// Waits until a check holds.
pub(crate) fn soon(check: impl FnMut() -> Result<()>) -> Result<()> {
    eventually(SOON, check)
}

/// How often a reason was counted, by `status`.
pub(crate) fn counted(agent: &Agent, reason: &str) -> Result<u64> {
    let status = agent.status_json()?;
    let reasons = status["reasons"].as_array().with_context(|| format!("no reasons in {status}"))?;
    let found = reasons.iter().find(|entry| entry["reason"] == reason);
    Ok(found.and_then(|entry| entry["count"].as_u64()).unwrap_or(0))
}

/// The usual cluster.
pub(crate) fn in_network(network: PodNetwork, play: impl FnOnce(TestCluster) -> Result<()>) -> Result<()> {
    play(two_nodes(network)?).with_context(|| format!("with {network:?} pods"))
}

/// The usual cluster for each kind of pod network between which packets take different ways.
pub(crate) fn in_every_network(play: impl Fn(TestCluster) -> Result<()>) -> Result<()> {
    let networks = [PodNetwork::Routed, PodNetwork::Bridged, PodNetwork::Overlay];
    networks.into_iter().try_for_each(|network| in_network(network, &play))
}

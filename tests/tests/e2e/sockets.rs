//! What a process sees of its socket, whatever it does with it.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use proxy_tests::agent::Agent;
use proxy_tests::apiserver::ApiServer;
use proxy_tests::manifests::{EndpointController, ManifestDir, Phase, ServicePlan};
use proxy_tests::object::{Object, Publish as _};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Remote, Server, request};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};

use crate::common::{manifests, two_nodes, vips, web};
use crate::life::FLAGS;
use crate::scene::{agent, at, is_served, servers, soon, ways};

/// An address as a socket of a family names it.
fn named(to: SocketAddr, family: &str) -> String {
    match (family, to.ip()) {
        ("inet6", IpAddr::V4(ip)) => SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()).to_string(),
        _ => to.to_string(),
    }
}

/// Ways to write an address: family of the socket, and which of the two addresses it can name.
const WAYS: [(&str, usize); 3] = [("inet", 0), ("inet6", 0), ("inet6", 1)];

/// A datagram and its answer, which comes from this server and shows this address.
fn answered(socket: &mut Remote, step: (&str, &str), shows: SocketAddr, server: &str) -> Result<()> {
    let asked = || format!("{} {}", step.0, step.1);
    socket.done(step.0, step.1)?;
    let received = socket.done("receive", "").with_context(asked)?;
    let (from, name) = (received.received_from, received.answer.map(|answer| answer.name));
    ensure!(from == Some(shows), "{}: the answer shows {from:?}, not {shows}", asked());
    ensure!(name.as_deref() == Some(server), "{}: {name:?} answered, not {server}", asked());
    Ok(())
}

#[test]
fn a_connected_udp_socket_that_names_its_peer_again_is_answered() -> Result<()> {
    // Java connects an IPv6 socket over IPv4; the kernel then names the peer with each datagram.
    let (cluster, dir) = (two_nodes(PodNetwork::Routed)?, manifests()?);
    let _servers = servers(&cluster, &["b", "c"])?;
    let _b = web(&dir, &cluster, "b", 1, &["b"], |plan| plan)?;
    let _c = web(&dir, &cluster, "c", 2, &["c"], |plan| plan)?;
    let _agent = agent(&cluster, "node1", &dir, &[])?;
    for place in ["a", "h1"] {
        for (family, ip) in WAYS {
            let [first, second] = [1, 2].map(|n| SocketAddr::new(vips(n)[ip], 80));
            let context = || format!("{place}, {family} to {first}");
            let (first_name, second_name) = (named(first, family), named(second, family));
            let mut socket = Remote::open(cluster.place(place), family, "udp")?;
            let peer = socket.done("connect", &first_name)?.peer_name;
            ensure!(peer == Some(first), "{}: connected to {peer:?}", context());
            for step in [("send", ""), ("send-to", &*first_name), ("send", "")] {
                answered(&mut socket, step, first, "b").with_context(context)?;
            }
            // Another address in between changes nothing; nor does a life without connection.
            socket.done("send-to", &second_name)?;
            answered(&mut socket, ("send", ""), first, "b").with_context(context)?;
            socket.done("disconnect", "")?;
            if first.is_ipv4() {
                // Over IPv6 the kernel goes on to receive from the old peer alone.
                answered(&mut socket, ("send-to", &second_name), second, "c").with_context(context)?;
            }
            answered(&mut socket, ("send-to", &first_name), first, "b").with_context(context)?;
            socket.done("connect", &second_name)?;
            for step in [("send", ""), ("send-to", &*second_name)] {
                answered(&mut socket, step, second, "c").with_context(context)?;
            }
            let peer = socket.done("peer", "")?.peer_name;
            ensure!(peer == Some(second), "{}: then connected to {peer:?}", context());
        }
    }
    Ok(())
}

#[test]
fn one_udp_socket_asks_any_number_of_services_before_it_reads() -> Result<()> {
    const SERVICES: u8 = 12;
    let (cluster, dir) = (two_nodes(PodNetwork::Routed)?, manifests()?);
    let ports: Vec<u16> = (0..u16::from(SERVICES)).map(|n| 8000 + n).collect();
    let _server = Server::start(cluster.place("c"), &ports)?;
    let mut services: Vec<EndpointController<'_>> = Vec::new();
    for n in 1..=SERVICES {
        services.push(on_a_port(&dir, &cluster, n, 7999 + u16::from(n))?);
    }
    let _agent = agent(&cluster, "node1", &dir, &[])?;
    for place in ["a", "h1"] {
        for (family, ip) in WAYS {
            let targets: Vec<_> = (1..=SERVICES).map(|n| SocketAddr::new(vips(n)[ip], 80)).collect();
            let mut socket = Remote::open(cluster.place(place), family, "udp")?;
            for round in 0..3 {
                for to in &targets {
                    socket.done("send-to", &named(*to, family))?;
                }
                let mut missing = targets.clone();
                for _ in 0..SERVICES {
                    let received = socket.done("receive", "")?;
                    let from = received.received_from.context("an address")?;
                    let port = received.answer.context("an answer")?.local.port();
                    let asked = missing.iter().position(|to| *to == from);
                    let place = asked.with_context(|| format!("{place}, {family}, round {round}: {from}"))?;
                    missing.remove(place);
                    let n = targets.iter().position(|to| *to == from).context("a Service")?;
                    ensure!(ports[n] == port, "{from} was answered by port {port}");
                }
            }
        }
    }
    Ok(())
}

/// Service number `n`: port 80 to this port of the pod `c`.
fn on_a_port<'a>(
    dir: &'a ManifestDir,
    cluster: &TestCluster,
    n: u8,
    port: u16,
) -> Result<EndpointController<'a>> {
    let name = format!("s{n}");
    let plan = ServicePlan::new(&name, &vips(n)).port("udp", "UDP", 80, port);
    dir.publish(&Object::from(&plan.build()))?;
    let mut controller = EndpointController::new(dir, &name, &[("udp", "UDP", port)])?;
    controller.set(cluster.place("c"), Phase::Ready)?;
    Ok(controller)
}

#[test]
fn a_socket_that_turns_from_a_service_to_a_pod_shows_the_pod() -> Result<()> {
    let (cluster, dir) = (two_nodes(PodNetwork::Routed)?, manifests()?);
    let _servers = servers(&cluster, &["c"])?;
    let _web = web(&dir, &cluster, "web", 1, &["c"], |plan| plan)?;
    let _agent = agent(&cluster, "node1", &dir, &[])?;
    for place in ["a", "h1"] {
        for (family, ip) in WAYS {
            let service = SocketAddr::new(vips(1)[ip], 80);
            let pod = SocketAddr::new(cluster.place("c").addresses()[ip], 8080);
            let (service_name, pod_name) = (named(service, family), named(pod, family));
            for kind in ["tcp", "udp", "mptcp"] {
                let context = || format!("{place}, {family} {kind} to {service}");
                let mut socket = Remote::open(cluster.place(place), family, kind)?;
                for (to, shows) in [(&service_name, service), (&pod_name, pod), (&service_name, service)] {
                    let peer = socket.done("connect", to).with_context(context)?.peer_name;
                    ensure!(peer == Some(shows), "{}: connected to {peer:?}, not {shows}", context());
                    socket.done("send", "")?;
                    let received = socket.done("receive", "").with_context(context)?;
                    ensure!(
                        kind != "udp" || received.received_from == Some(shows),
                        "{}: received {received:?}, not from {shows}",
                        context()
                    );
                    socket.done("disconnect", "").with_context(context)?;
                }
            }
            // The same without connecting at all, and after it.
            let mut socket = Remote::open(cluster.place(place), family, "udp")?;
            for (to, shows) in [(&service_name, service), (&pod_name, pod)] {
                answered(&mut socket, ("send-to", to), shows, "c")?;
            }
            answered(&mut socket, ("send-to", &service_name), service, "c")?;
            socket.done("connect", &pod_name)?;
            answered(&mut socket, ("send", ""), pod, "c")?;
        }
    }
    Ok(())
}

/// A pod with a server of its own, to which its own rules lead what goes to the first Service: it sees an answer from
/// itself where nothing is translated before its packets leave, and else one from the pod `c`.
fn translates_itself(place: &Place, itself: bool) -> Result<()> {
    let _own = Server::named(place, "inner", &[9090])?;
    let rules = format!(
        "table ip inner {{ chain out {{ type nat hook output priority -100; \
         ip daddr 10.96.0.1 meta l4proto {{ tcp, udp }} th dport 80 dnat to {}:9090; }}; }}",
        place.v4
    );
    place.netns.output("nft", &[&rules])?;
    let wanted = if itself { "inner" } else { "c" };
    soon(|| {
        let [tcp, connected, unconnected] = ways(SocketAddr::new(vips(1)[0], 80));
        // Connected UDP goes by packet in any pod.
        for (ask, wanted) in [(tcp, wanted), (connected, "inner"), (unconnected, wanted)] {
            let request = request(place, &ask)?;
            let name = request.answer.as_ref().map(|answer| answer.name.as_str());
            ensure!(name == Some(wanted), "{} {ask:?}: {name:?} answered, not {wanted}", place.name);
        }
        Ok(())
    })?;
    // Without rules of its own its packets are translated as they leave.
    place.netns.output("nft", &["delete table ip inner"])?;
    is_served(place, at(vips(1), 80), "c").with_context(|| place.name.clone())
}

#[test]
fn a_pod_whose_cgroup_is_named_is_left_to_its_packets_and_others_are_not() -> Result<()> {
    // A cluster inside a pod translates Service addresses of its own, before they leave the pod.
    let (mut cluster, dir) = (two_nodes(PodNetwork::Routed)?, manifests()?);
    let _servers = servers(&cluster, &["c"])?;
    let _web = web(&dir, &cluster, "web", 1, &["c"], |plan| plan)?;
    let _agent = agent(&cluster, "node1", &dir, &["--socket-lb-exclude-cgroups", "a,**/late*"])?;
    translates_itself(cluster.place("a"), true)?;
    translates_itself(cluster.place("b"), false)?;
    translates_itself(&cluster.add_pod("node1", "late")?, true)
}

#[test]
fn a_pod_that_says_so_is_left_to_its_packets_until_it_says_so_no_more() -> Result<()> {
    let mut cluster = two_nodes(PodNetwork::Routed)?;
    let server = crate::api_server::server(&cluster)?;
    let _servers = servers(&cluster, &["c"])?;
    let _web = web(&server, &cluster, "web", 1, &["c"], |plan| plan)?;
    let pod = |name: &str, node: &str, word: &str| -> Result<Object> {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": "default", "uid": name.strip_prefix("pod"),
                "annotations": { "ebpf-proxy/socket-lb": word },
            },
            "spec": { "nodeName": node, "containers": [] },
        }))?;
        Ok(Object::from(&pod))
    };
    // The cgroup of a pod is named after its UID.
    for name in ["poda-1", "podb-2", "podc-3"] {
        cluster.add_pod("node1", name)?;
    }
    server.publish(&pod("poda-1", "node1", "false")?)?;
    server.publish(&pod("podb-2", "node1", "true")?)?;
    server.publish(&pod("podc-3", "node2", "false")?)?;
    let mut agent = agent_of(&cluster, &server)?;
    translates_itself(cluster.place("poda-1"), true)?;
    for other in ["podb-2", "podc-3"] {
        translates_itself(cluster.place(other), false)?;
    }
    // What an agent has marked stays marked without it.
    agent.kill()?;
    translates_itself(cluster.place("poda-1"), true)?;
    agent.spawn()?;
    agent.wait_ready()?;
    translates_itself(cluster.place("poda-1"), true)?;
    server.publish(&pod("poda-1", "node1", "true")?)?;
    translates_itself(cluster.place("poda-1"), false)
}

fn agent_of(cluster: &TestCluster, server: &ApiServer) -> Result<Agent> {
    Agent::start(cluster, "node1", server, &[&FLAGS[..], &["--socket-lb-pod-annotations"]].concat())
}

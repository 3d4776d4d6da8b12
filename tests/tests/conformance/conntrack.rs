//! `network/conntrack.go`: UDP from a fixed port follows its Service, in both families at once.
//!
//! Upstream asks every five seconds, these clients five times a second, each time with a new socket of the same port.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use proxy_tests::answer::{Hold, Load};
use proxy_tests::manifests::{Phase, ServicePlan};
use proxy_tests::packet::{Sum, protocol};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Runner, Server, get};
use proxy_tests::test_cluster::PodNetwork;
use socket2::{Domain, Protocol, Socket, Type};

use crate::cluster::{Cluster, READY, expose, service, vips, web};
use crate::reach::{LIMIT, datagrams, follows, soon};

const NODE_PORT: u16 = 30_090;
/// Upstream's source port.
const SOURCE: u16 = 12_345;

/// A Service over UDP with a NodePort.
fn plan() -> ServicePlan {
    ServicePlan::new("svc-udp", &vips(1)).port("udp", "UDP", 80, 8080).node_port(NODE_PORT)
}

/// A client for each family.
fn clients(client: &Place, targets: [SocketAddr; 2]) -> Result<Vec<Runner<Load>>> {
    targets.into_iter().map(|to| datagrams(client, to, SOURCE)).collect()
}

fn follow(clients: &mut [Runner<Load>], server: &str) -> Result<()> {
    clients.iter_mut().try_for_each(|client| follows(client, server))
}

/// The server pod `old` is deleted and a new one made on the same node while the client goes on.
fn cycles(
    cluster: &mut Cluster,
    plan: &ServicePlan,
    (client, targets): (&str, [SocketAddr; 2]),
    old: &str,
) -> Result<()> {
    let Cluster { api, test_cluster, .. } = cluster;
    let mut endpoints = expose(api, test_cluster, plan, &[])?;
    let mut clients = clients(test_cluster.place(client), targets)?;
    let server = Server::start(test_cluster.place(old), &[8080])?;
    endpoints.set(test_cluster.place(old), Phase::Ready)?;
    follow(&mut clients, old)?;
    let node = test_cluster.place(old).node.clone().context("a pod is on a node")?;
    let new = test_cluster.add_pod(&node, "new")?;
    let _next = Server::start(&new, &[8080])?;
    endpoints.set(&new, Phase::Ready)?;
    // Deleted without grace: process, interface and endpoint go at once.
    drop(server);
    test_cluster.remove_pod(old)?;
    endpoints.remove(old)?;
    follow(&mut clients, "new")
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_node_port_service() -> Result<()> {
    // conntrack.go:140; C-4…C-13
    let mut cluster = Cluster::raise(PodNetwork::Routed)?;
    let node_port = cluster.place("node2").at(NODE_PORT);
    cycles(&mut cluster, &plan(), ("a", node_port), "c")
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_cluster_ip_service() -> Result<()> {
    // conntrack.go:218; C-4…C-13
    cycles(&mut Cluster::raise(PodNetwork::Overlay)?, &plan(), ("a", service(1)), "c")
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_for_a_cluster_ip_service_with_internal_policy_local()
-> Result<()> {
    // conntrack.go:297; C-13, P-15
    let mut cluster = Cluster::raise(PodNetwork::Bridged)?;
    cycles(&mut cluster, &plan().internal_local(), ("a", service(1)), "b")
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_and_client_is_host_network() -> Result<()> {
    // conntrack.go:391; C-13, D-11
    cycles(&mut Cluster::raise(PodNetwork::RoutedOverlay)?, &plan(), ("h1", service(1)), "c")
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_initial_unready_endpoints_get_ready() -> Result<()> {
    // conntrack.go:481; C-8, C-15
    let cluster = Cluster::raise(PodNetwork::Bridged)?;
    let mut endpoints = cluster.expose(&plan(), &[])?;
    endpoints.set(cluster.place("c"), Phase::Starting)?;
    let mut all = clients(cluster.place("a"), cluster.place("node2").at(NODE_PORT))?;
    all.extend(clients(cluster.place("b"), service(1))?);
    all.extend(clients(cluster.place("outside"), cluster.place("node1").at(NODE_PORT))?);
    let _server = cluster.serve(&["c"])?;
    for client in &mut all {
        soon(|| {
            let report = client.report()?;
            ensure!(report.failed > 1 && report.made == 0, "{report:?}");
            Ok(())
        })?;
    }
    endpoints.set(cluster.place("c"), Phase::Ready)?;
    follow(&mut all, "c")
}

#[test]
fn should_be_able_to_cleanup_conntrack_entries_when_udp_service_target_port_changes_for_a_node_port_service()
-> Result<()> {
    // conntrack.go:673; C-8
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    let _servers = [("first", 8080), ("second", 9090)]
        .map(|(name, port)| Server::named(cluster.place("c"), name, &[port]))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    cluster.apply(plan());
    cluster.slices("svc-udp", "all", &[("udp", "UDP", 8080)], &[("c", READY)]);
    let mut clients = clients(cluster.place("a"), cluster.place("node2").at(NODE_PORT))?;
    follow(&mut clients, "first")?;
    let changed = ServicePlan::new("svc-udp", &vips(1)).port("udp", "UDP", 80, 9090).node_port(NODE_PORT);
    cluster.apply(changed);
    cluster.slices("svc-udp", "all", &[("udp", "UDP", 9090)], &[("c", READY)]);
    follow(&mut clients, "second")
}

/// Segments that the server injects into each connection.
const INJECTED: u32 = 200;

#[test]
fn proxy_implementation_should_not_be_vulnerable_to_the_invalid_conntrack_state_bug() -> Result<()> {
    // conntrack.go:552; D-9: translated packet by packet, which is where a segment could slip through.
    for (network, mode) in
        [(PodNetwork::Routed, "host"), (PodNetwork::Overlay, "host"), (PodNetwork::Bridged, "all")]
    {
        let flag = format!("--socket-lb={mode}");
        let cluster = Cluster::with(network, ["zone1", "zone2", "zone3"], &[&flag])?;
        let _server = cluster.serve(&["c"])?;
        cluster.expose(&web("boom-server", 1), &["c"])?;
        for to in service(1) {
            injected(&cluster, to)
                .with_context(|| format!("{to} with {network:?} pods, --socket-lb={mode}"))?;
        }
    }
    Ok(())
}

/// A connection goes on while the server injects segments far outside of the client's window.
fn injected(cluster: &Cluster, to: SocketAddr) -> Result<()> {
    let (client, server) = (cluster.place("a"), cluster.place("c"));
    let every = std::time::Duration::from_millis(10);
    // The connection that is held is to begin when the node serves the Service, not while it is about to.
    soon(|| get(client, &Ask::tcp(to)))?;
    let mut held = Runner::hold(client, &Ask::tcp(to), every, LIMIT)?;
    let before = more(&mut held, 0)?;
    let peer = before.last.context("nobody has answered")?.peer;
    let discarded = out_of_window(client)?;
    inject(server, peer)?;
    soon(|| {
        let now = out_of_window(client)?;
        ensure!(now >= discarded + u64::from(INJECTED) / 4, "{now} segments arrived, {discarded} before");
        Ok(())
    })?;
    let after = more(&mut held, before.made)?;
    ensure!(after.failed == 0, "the connection broke: {after:?}");
    Ok(())
}

/// Waits until the connection has carried ten more answers.
fn more(held: &mut Runner<Hold>, than: u64) -> Result<Hold> {
    soon(|| {
        let report = held.report()?;
        ensure!(report.made >= than + 10, "{report:?}");
        Ok(report)
    })
}

/// Sends segments with data from port 8080 to a client's connection, all over the space of sequence numbers.
fn inject(server: &Place, to: SocketAddr) -> Result<()> {
    let from = SocketAddr::new(server.address_like(to.ip()), 8080);
    let send = || -> Result<()> {
        let socket = Socket::new(Domain::for_address(to), Type::RAW, Some(Protocol::TCP))?;
        socket.bind(&SocketAddr::new(from.ip(), 0).into())?;
        for n in 0..INJECTED {
            let bytes = segment(from, to, n.wrapping_mul(u32::MAX / INJECTED));
            socket.send_to(&bytes, &SocketAddr::new(to.ip(), 0).into())?;
        }
        Ok(())
    };
    server.netns.run_in(send)?.context("injecting segments")
}

/// A TCP segment with one byte of data, PSH and ACK.
fn segment(from: SocketAddr, to: SocketAddr, sequence: u32) -> Vec<u8> {
    let mut segment = Vec::with_capacity(21);
    segment.extend(from.port().to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend(sequence.to_be_bytes());
    segment.extend([0; 4]);
    // Five words of header; PSH, ACK; a window; checksum and urgent pointer.
    segment.extend([0x50, 0x18, 0x10, 0x00, 0, 0, 0, 0, b'!']);
    let sum = Sum::default().pseudo(from.ip(), to.ip(), protocol::TCP, segment.len()).bytes(&segment);
    segment[16..18].copy_from_slice(&sum.checksum().to_be_bytes());
    segment
}

/// Segments with old data that TCP of a place has thrown away (`DelayedACKLost`): of those injected about half.
fn out_of_window(place: &Place) -> Result<u64> {
    let read = || std::fs::read_to_string("/proc/thread-self/net/netstat");
    let text = place.netns.run_in(read)?.context("reading netstat")?;
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = lines.next().zip(lines.next()).context("no TcpExt in netstat")?;
    let at = names.split(' ').position(|name| name == "DelayedACKLost").context("no DelayedACKLost")?;
    values.split(' ').nth(at).and_then(|value| value.parse().ok()).context("no number for DelayedACKLost")
}

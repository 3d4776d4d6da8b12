//! Endpoints come and go under traffic: UDP follows its Service, TCP stays where it is.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::answer::Hold;
use proxy_tests::manifests::Phase;
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Remote, Runner, eventually};

use crate::common::{ip, manifests, two_nodes, vips};
use crate::health::http;
use crate::scene::{SOON, agent, at, in_network, is_refused, is_served, servers, service, soon, spreads};
use proxy_tests::test_cluster::PodNetwork;

const EVERY: Duration = Duration::from_millis(10);
const LIMIT: Duration = Duration::from_secs(60);

/// A socket in use: one exchange every ten milliseconds.
fn hold(client: &Place, ask: &Ask) -> Result<Runner<Hold>> {
    Runner::hold(client, &ask.clone().timeout(Duration::from_millis(200)), EVERY, LIMIT)
}

/// Waits until the socket's last answer came from this server.
fn now_from(hold: &mut Runner<Hold>, server: &str) -> Result<Hold> {
    let before = hold.report()?.made;
    eventually(SOON, || {
        let report = hold.report()?;
        let last = report.last.as_ref().map(|answer| answer.name.as_str());
        ensure!(report.made > before && last == Some(server), "not from {server}: {report:?}");
        Ok(report)
    })
}

#[test]
fn a_udp_socket_follows_its_service_when_the_endpoint_is_replaced() -> Result<()> {
    // C-4 to C-8, C-13: fixed source ports, connected and not, through every kind of address.
    in_network(PodNetwork::Bridged, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["b", "c"])?;
        let mut web = service(&dir, &cluster, ("web", 1, 30001), &["b"], |plan| plan)?;
        let _agent = agent(&cluster, "node1", &dir, &[])?;
        let mut holds = Vec::new();
        for family in [0, 1] {
            let vip = SocketAddr::new(vips(1)[family], 80);
            let node_port = cluster.place("node1").at(30001)[family];
            let (a, node1, outside) = (cluster.place("a"), cluster.place("node1"), cluster.place("outside"));
            holds.push(hold(a, &Ask::udp(vip).from_port(40_000))?);
            holds.push(hold(a, &Ask::unconnected(vip).from_port(40_001))?);
            holds.push(hold(a, &Ask::udp(node_port).from_port(40_002))?);
            holds.push(hold(node1, &Ask::unconnected(vip).from_port(40_003))?);
            holds.push(hold(outside, &Ask::udp(node_port).from_port(40_004))?);
        }
        for held in &mut holds {
            now_from(held, "b")?;
        }
        web.replace(&[cluster.place("c")])?;
        for held in &mut holds {
            now_from(held, "c")?;
        }
        for held in holds {
            let report = held.stop()?;
            ensure!(report.names.len() == 2, "{report:?}");
        }
        Ok(())
    })
}

/// No error has reached the process, and at most the answers that were under way when it was led on are lost.
fn unharmed(report: &Hold) -> Result<()> {
    let lost = report.reasons.get("receive timeout").copied().unwrap_or(0);
    ensure!(report.failed == lost && lost <= 2, "{report:?}");
    Ok(())
}

#[test]
fn a_connected_udp_socket_of_the_host_goes_on_to_another_endpoint() -> Result<()> {
    // C-13: it was translated once, at connect; its process does not notice being led on.
    let cluster = two_nodes(PodNetwork::Routed)?;
    let dir = manifests()?;
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut web = service(&dir, &cluster, ("web", 1, 30_080), &["b"], |plan| plan)?;
    let _other = service(&dir, &cluster, ("other", 2, 0), &["b"], |plan| plan)?;
    let agent = agent(&cluster, "node1", &dir, &[])?;
    let node1 = cluster.place("node1");
    let direct = cluster.place("b").at(8080);
    let mut through = Vec::new();
    let mut others = Vec::new();
    for n in 0..2 {
        let node_ports = [at(node1.addresses(), 30_080), at([ip("127.0.0.1"), ip("::1")], 30_080)];
        for to in [at(vips(1), 80)].into_iter().chain(node_ports) {
            through.push((to[n], hold(node1, &Ask::udp(to[n]))?));
        }
        others.push((at(vips(2), 80)[n], hold(node1, &Ask::udp(at(vips(2), 80)[n]))?));
        others.push((direct[n], hold(node1, &Ask::udp(direct[n]))?));
    }
    // One that Java would make.
    let mut java = Remote::open(node1, "inet6", "udp")?;
    java.done("connect", "[::ffff:10.96.0.1]:80")?;
    // One that only sends.
    let mut sends = Remote::open(node1, "inet", "udp")?;
    sends.done("connect", "10.96.0.1:80")?;
    let own = sends.done("send", "")?.local;
    for (_, held) in through.iter_mut().chain(&mut others) {
        now_from(held, "b")?;
    }
    web.replace(&[cluster.place("c")])?;
    for (to, held) in &mut through {
        now_from(held, "c")?;
        let report = held.report()?;
        unharmed(&report).with_context(|| to.to_string())?;
        ensure!(report.peer_name == Some(*to), "{to}: its peer is {:?}", report.peer_name);
    }
    java.done("send", "")?;
    let received = java.done("receive", "")?;
    ensure!(received.answer.is_some_and(|answer| answer.name == "c"), "an IPv6 socket stays with b");
    ensure!(received.received_from == Some(at(vips(1), 80)[0]), "it shows {:?}", received.received_from);
    let sent = sends.done("send", "")?;
    ensure!(sent.local == own && sent.peer_name == Some(at(vips(1), 80)[0]), "{sent:?}, from {own:?} before");
    // What was asked of b before comes first.
    let names =
        [sends.done("receive", "")?, sends.done("receive", "")?].map(|got| got.answer.map(|a| a.name));
    ensure!(names == [Some("b".to_owned()), Some("c".to_owned())], "{names:?} answered");

    // Without endpoints there is nowhere to go to; when one comes, there is.
    web.replace(&[])?;
    soon(|| is_refused(node1, at(vips(1), 80)))?;
    for (to, held) in &mut through {
        let report = held.report()?;
        ensure!(report.peer_name == Some(*to), "{to}: its peer is {:?}", report.peer_name);
    }
    web.replace(&[cluster.place("b")])?;
    for (_, held) in &mut through {
        now_from(held, "b")?;
    }
    for (to, held) in through.into_iter().chain(others) {
        let report = held.stop()?;
        unharmed(&report).with_context(|| to.to_string())?;
        ensure!(report.peer_name == Some(to), "{to}: {report:?}");
    }
    // H-45, C-17.
    soon(|| {
        let metrics = http(node1, "127.0.0.1:10249", "/metrics")?.1;
        for (family, count) in [("IPv4", 10), ("IPv6", 6)] {
            let led = format!(
                "kubeproxy_conntrack_reconciler_deleted_entries_total{{ip_family=\"{family}\"}} {count}"
            );
            ensure!(metrics.lines().any(|line| line == led), "no {led} in {metrics}");
        }
        Ok(())
    })?;
    drop(agent);
    Ok(())
}

#[test]
fn udp_that_began_before_there_was_an_endpoint_is_served_when_one_comes() -> Result<()> {
    // C-15, C-8.
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        let mut web = service(&dir, &cluster, ("web", 1, 30001), &[], |plan| plan)?;
        let _agent = agent(&cluster, "node1", &dir, &[])?;
        let mut holds = Vec::new();
        for n in [1, 2] {
            // The second Service is not there at all.
            for to in at(vips(n), 80) {
                holds.push(hold(cluster.place("a"), &Ask::udp(to).from_port(40_000 + u16::from(n)))?);
                holds.push(hold(cluster.place("a"), &Ask::unconnected(to).from_port(40_010 + u16::from(n)))?);
            }
        }
        for to in cluster.place("node1").at(30001) {
            holds.push(hold(cluster.place("outside"), &Ask::udp(to).from_port(40_003))?);
        }
        for held in &mut holds {
            soon(|| {
                let report = held.report()?;
                ensure!(report.failed > 1 && report.made == 0, "{report:?}");
                Ok(())
            })?;
        }
        web.set(cluster.place("c"), Phase::Ready)?;
        service(&dir, &cluster, ("late", 2, 0), &["c"], |plan| plan)?;
        for held in &mut holds {
            now_from(held, "c")?;
        }
        Ok(())
    })
}

#[test]
fn a_connection_stays_on_its_endpoint_while_that_drains_and_new_ones_go_elsewhere() -> Result<()> {
    // C-1, C-2, P-1, P-4, P-5, P-18, P-28.
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["b", "c", "d"])?;
        let mut web = service(&dir, &cluster, ("web", 1, 30001), &["b"], |plan| plan)?;
        let pods = [agent(&cluster, "node1", &dir, &["--socket-lb", "host"])?];
        let (a, node1, outside) = (cluster.place("a"), cluster.place("node1"), cluster.place("outside"));
        let (b, c, d) = (cluster.place("b"), cluster.place("c"), cluster.place("d"));
        let clients = [(a, at(vips(1), 80)), (node1, at(vips(1), 80)), (outside, node1.at(30001))];
        let mut holds = Vec::new();
        for (client, targets) in clients {
            for to in targets {
                holds.push(hold(client, &Ask::tcp(to))?);
            }
        }
        for held in &mut holds {
            now_from(held, "b")?;
        }
        web.set(c, Phase::Ready)?;
        web.set(b, Phase::Terminating)?;
        for (client, targets) in clients {
            soon(|| spreads(client, targets, &["c"]))?;
        }
        web.set(d, Phase::Ready)?;
        soon(|| spreads(a, at(vips(1), 80), &["c", "d"]))?;
        web.remove("d")?;
        // Nobody is ready, and who is asked to end still answers: better than nobody (P-4).
        web.set(c, Phase::Terminating)?;
        soon(|| spreads(outside, node1.at(30001), &["b", "c"]))?;
        web.remove("b")?;
        soon(|| spreads(outside, node1.at(30001), &["c"]))?;
        web.set(c, Phase::Stopped)?;
        for (client, targets) in clients {
            soon(|| is_refused(client, targets))?;
        }
        for held in &mut holds {
            now_from(held, "b").context("the connection did not outlive its endpoint's listing")?;
        }
        for held in holds {
            let report = held.stop()?;
            ensure!(report.failed == 0 && report.names.len() == 1, "{report:?}");
        }
        drop(pods);
        web.set(c, Phase::Ready)
    })
}

#[test]
fn connections_made_at_the_socket_stay_too_and_survive_the_service() -> Result<()> {
    // P-18, C-2.
    let cluster = two_nodes(PodNetwork::Routed)?;
    let dir = manifests()?;
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut web = service(&dir, &cluster, ("web", 1, 0), &["b"], |plan| plan)?;
    let _agent = agent(&cluster, "node1", &dir, &[])?;
    let mut holds = Vec::new();
    for client in ["a", "node1"] {
        for to in at(vips(1), 80) {
            holds.push(hold(cluster.place(client), &Ask::tcp(to))?);
        }
    }
    for held in &mut holds {
        now_from(held, "b")?;
    }
    web.replace(&[cluster.place("c")])?;
    for client in ["a", "node1"] {
        soon(|| is_served(cluster.place(client), at(vips(1), 80), "c"))?;
    }
    for held in &mut holds {
        let report = now_from(held, "b")?;
        ensure!(report.failed == 0, "{report:?}");
    }
    Ok(())
}

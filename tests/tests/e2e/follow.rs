//! Endpoints come and go under traffic: UDP follows its Service, TCP stays where it is.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::answer::Hold;
use proxy_tests::manifests::Phase;
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Runner, eventually, get};

use crate::common::{manifests, two_nodes, vips};
use crate::health::http;
use crate::scene::{SOON, agent, at, in_network, is_refused, is_served, servers, service, soon, spreads};
use proxy_tests::town::PodNetwork;

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
    in_network(PodNetwork::Bridged, |town| {
        let dir = manifests()?;
        let _servers = servers(&town, &["b", "c"])?;
        let mut web = service(&dir, &town, ("web", 1, 30001), &["b"], |plan| plan)?;
        let _agent = agent(&town, "node1", &dir, &[])?;
        let mut holds = Vec::new();
        for family in [0, 1] {
            let vip = SocketAddr::new(vips(1)[family], 80);
            let node_port = town.place("node1").at(30001)[family];
            let (a, node1, outside) = (town.place("a"), town.place("node1"), town.place("outside"));
            holds.push(hold(a, &Ask::udp(vip).from_port(40_000))?);
            holds.push(hold(a, &Ask::unconnected(vip).from_port(40_001))?);
            holds.push(hold(a, &Ask::udp(node_port).from_port(40_002))?);
            holds.push(hold(node1, &Ask::unconnected(vip).from_port(40_003))?);
            holds.push(hold(outside, &Ask::udp(node_port).from_port(40_004))?);
        }
        for held in &mut holds {
            now_from(held, "b")?;
        }
        web.replace(&[town.place("c")])?;
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

#[test]
fn a_connected_udp_socket_of_the_host_hears_that_its_endpoint_has_gone() -> Result<()> {
    // C-13: it was translated once, at connect; an error makes its process connect again.
    let town = two_nodes(PodNetwork::Routed)?;
    let dir = manifests()?;
    let _servers = servers(&town, &["b", "c"])?;
    let mut web = service(&dir, &town, ("web", 1, 0), &["b"], |plan| plan)?;
    let _agent = agent(&town, "node1", &dir, &[])?;
    let node1 = town.place("node1");
    for (to, server) in at(vips(1), 80).into_iter().zip([["b", "c"], ["c", "b"]]) {
        let mut held = hold(node1, &Ask::udp(to))?;
        now_from(&mut held, server[0])?;
        web.replace(&[town.place(server[1])])?;
        let report = eventually(SOON, || {
            let report = held.report()?;
            ensure!(report.failed > 0, "{report:?}");
            Ok(report)
        })?;
        // The destroyed socket has no peer any more: a process that waits hears the first, one that sends the second.
        let told = ["receive ECONNABORTED", "send ECONNABORTED", "send EDESTADDRREQ"];
        ensure!(
            report.names.len() == 1 && report.reasons.keys().all(|reason| told.contains(&reason.as_str())),
            "{report:?}"
        );
        ensure!(get(node1, &Ask::udp(to))?.name == server[1], "a new socket does not reach {}", server[1]);
    }
    // H-45, C-17.
    let metrics = http(node1, "127.0.0.1:10249", "/metrics")?.1;
    for family in ["IPv4", "IPv6"] {
        let closed =
            format!("kubeproxy_conntrack_reconciler_deleted_entries_total{{ip_family=\"{family}\"}} 1");
        ensure!(metrics.lines().any(|line| line == closed), "no {closed} in {metrics}");
    }
    Ok(())
}

#[test]
fn udp_that_began_before_there_was_an_endpoint_is_served_when_one_comes() -> Result<()> {
    // C-15, C-8.
    in_network(PodNetwork::Routed, |town| {
        let dir = manifests()?;
        let _servers = servers(&town, &["c"])?;
        let mut web = service(&dir, &town, ("web", 1, 30001), &[], |plan| plan)?;
        let _agent = agent(&town, "node1", &dir, &[])?;
        let mut holds = Vec::new();
        for n in [1, 2] {
            // The second Service is not there at all.
            for to in at(vips(n), 80) {
                holds.push(hold(town.place("a"), &Ask::udp(to).from_port(40_000 + u16::from(n)))?);
                holds.push(hold(town.place("a"), &Ask::unconnected(to).from_port(40_010 + u16::from(n)))?);
            }
        }
        for to in town.place("node1").at(30001) {
            holds.push(hold(town.place("outside"), &Ask::udp(to).from_port(40_003))?);
        }
        for held in &mut holds {
            soon(|| {
                let report = held.report()?;
                ensure!(report.failed > 1 && report.made == 0, "{report:?}");
                Ok(())
            })?;
        }
        web.set(town.place("c"), Phase::Ready)?;
        service(&dir, &town, ("late", 2, 0), &["c"], |plan| plan)?;
        for held in &mut holds {
            now_from(held, "c")?;
        }
        Ok(())
    })
}

#[test]
fn a_connection_stays_on_its_endpoint_while_that_drains_and_new_ones_go_elsewhere() -> Result<()> {
    // C-1, C-2, P-1, P-4, P-5, P-18, P-28.
    in_network(PodNetwork::Routed, |town| {
        let dir = manifests()?;
        let _servers = servers(&town, &["b", "c", "d"])?;
        let mut web = service(&dir, &town, ("web", 1, 30001), &["b"], |plan| plan)?;
        let pods = [agent(&town, "node1", &dir, &["--socket-lb", "host"])?];
        let (a, node1, outside) = (town.place("a"), town.place("node1"), town.place("outside"));
        let (b, c, d) = (town.place("b"), town.place("c"), town.place("d"));
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
        // Nobody is ready, and who is told to end still answers: better than nobody (P-4).
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
    let town = two_nodes(PodNetwork::Routed)?;
    let dir = manifests()?;
    let _servers = servers(&town, &["b", "c"])?;
    let mut web = service(&dir, &town, ("web", 1, 0), &["b"], |plan| plan)?;
    let _agent = agent(&town, "node1", &dir, &[])?;
    let mut holds = Vec::new();
    for client in ["a", "node1"] {
        for to in at(vips(1), 80) {
            holds.push(hold(town.place(client), &Ask::tcp(to))?);
        }
    }
    for held in &mut holds {
        now_from(held, "b")?;
    }
    web.replace(&[town.place("c")])?;
    for client in ["a", "node1"] {
        soon(|| is_served(town.place(client), at(vips(1), 80), "c"))?;
    }
    for held in &mut holds {
        let report = now_from(held, "b")?;
        ensure!(report.failed == 0, "{report:?}");
    }
    Ok(())
}

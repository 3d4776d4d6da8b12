//! Where there is nobody to answer, clients learn it at once.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use proxy_tests::manifests::Phase;
use proxy_tests::pod::Place;
use proxy_tests::probe::Ask;
use proxy_tests::test_cluster::PodNetwork;

use crate::common::{manifests, two_nodes, vips};
use crate::scene::{agent, at, fails, is_dropped, is_refused, is_served, public, servers, service, soon};

#[test]
fn a_service_without_endpoints_and_an_undefined_port_are_refused_at_once() -> Result<()> {
    // P-14, P-19, P-20, P-21, D-18, C-15.
    for (network, mode, clients) in [
        (PodNetwork::Bridged, "all", &["a", "node1", "outside"][..]),
        (PodNetwork::Routed, "off", &["a", "outside"]),
    ] {
        let cluster = two_nodes(network)?;
        let dir = manifests()?;
        let _servers = servers(&cluster, &["b"])?;
        service(&dir, &cluster, ("web", 1, 0), &["b"], |plan| plan)?;
        let mut empty =
            service(&dir, &cluster, ("empty", 2, 30002), &[], |plan| plan.external_ips(&public(2)))?;
        // An endpoint that does not serve yet is none (P-2).
        empty.set(cluster.place("b"), Phase::Starting)?;
        let _agent = agent(&cluster, "node1", &dir, &["--socket-lb", mode])?;
        let nodes = cluster.place("node1").at(30002);
        let clients = || clients.iter().map(|name| cluster.place(name));
        for client in clients() {
            for targets in [at(vips(2), 80), at(public(2), 80), nodes, at(vips(1), 81)] {
                is_refused(client, targets).with_context(|| format!("{mode}, {network:?}"))?;
            }
            is_served(client, at(vips(1), 80), "b")?;
            is_none_of_ours(client, at(public(2), 81))?;
        }
        empty.set(cluster.place("b"), Phase::Ready)?;
        for client in clients() {
            soon(|| is_served(client, nodes, "b"))?;
        }
        empty.set(cluster.place("b"), Phase::Stopped)?;
        for client in clients() {
            soon(|| is_refused(client, at(vips(2), 80)))?;
        }
    }
    Ok(())
}

/// Another port of an external address goes on as if there were no Service (P-23): nobody here knows the way.
fn is_none_of_ours(client: &Place, targets: [SocketAddr; 2]) -> Result<()> {
    for to in targets {
        let lost = &["connect timeout", "connect ENETUNREACH", "connect EHOSTUNREACH"];
        fails(client, &Ask::tcp(to), lost)?;
    }
    Ok(())
}

#[test]
fn a_blocked_client_is_dropped_even_where_others_would_be_refused() -> Result<()> {
    // V-21.
    let cluster = two_nodes(PodNetwork::Routed)?;
    let dir = manifests()?;
    service(&dir, &cluster, ("empty", 1, 0), &[], |plan| {
        plan.load_balancer(&public(1)).source_ranges(&["10.244.1.11/32", "fd00:244:1::11/128"])
    })?;
    let _agent = agent(&cluster, "node1", &dir, &["--socket-lb", "host"])?;
    is_refused(cluster.place("a"), at(public(1), 80))?;
    is_dropped(cluster.place("b"), at(public(1), 80))?;
    is_dropped(cluster.place("outside"), at(public(1), 80))
}

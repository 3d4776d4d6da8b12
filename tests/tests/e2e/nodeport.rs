//! NodePorts, from wherever they can be asked.

use anyhow::{Result, ensure};
use proxy_tests::object::{Key, Kind, Publish};
use proxy_tests::town::{PodNetwork, Town};

use crate::common::manifests;
use crate::scene::{agent, answers, at, in_network, is_refused, is_served, seen_as, servers, service, soon};

/// The endpoints, by where they are seen from `node1`, and the NodePorts that lead to them.
const PLACES: [(&str, u16); 4] = [("b", 30001), ("c", 30002), ("h1", 30003), ("h2", 30004)];

#[test]
fn a_node_port_serves_outside_pods_and_hosts_and_a_local_endpoint_sees_the_client() -> Result<()> {
    // V-32, M-8, M-15, D-12, D-13; a local endpoint sees the client's address though the policy is Cluster.
    in_network(PodNetwork::Bridged, |town| {
        let dir = manifests()?;
        let _servers = servers(&town, &PLACES.map(|(place, _)| place))?;
        for (n, (place, port)) in (1..).zip(PLACES) {
            service(&dir, &town, (place, n, port), &[place], |plan| plan)?;
        }
        let agents = [agent(&town, "node1", &dir, &[])?, agent(&town, "node2", &dir, &[])?];
        let (node1, outside) = (town.place("node1"), town.place("outside"));
        for (place, port) in PLACES {
            let near = town.place(place).node == node1.node;
            let seen = if near { outside.addresses() } else { node1.addresses() };
            answers(outside, node1.at(port), place, |answer| seen_as(answer, seen))?;
            for client in ["a", "node1", "h1"] {
                for node in ["node1", "node2"] {
                    is_served(town.place(client), town.place(node).at(port), place)?;
                }
            }
        }
        drop(agents);
        Ok(())
    })
}

#[test]
fn without_socket_translation_a_node_port_serves_outside_and_pods() -> Result<()> {
    // V-3, V-42, M-8: packets only.
    in_network(PodNetwork::Routed, |town| {
        let dir = manifests()?;
        let _servers = servers(&town, &PLACES.map(|(place, _)| place))?;
        for (n, (place, port)) in (1..).zip(PLACES) {
            service(&dir, &town, (place, n, port), &[place], |plan| plan)?;
        }
        let _agents = ["node1", "node2"]
            .map(|node| agent(&town, node, &dir, &["--socket-lb", "off"]))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        let (a, node1) = (town.place("a"), town.place("node1"));
        for (place, port) in PLACES {
            let near = town.place(place).node == node1.node;
            let seen = if near { a.addresses() } else { node1.addresses() };
            answers(a, node1.at(port), place, |answer| seen_as(answer, seen))?;
            is_served(a, town.place("node2").at(port), place)?;
            is_served(town.place("outside"), node1.at(port), place)?;
            // The other node is beyond an interface; the own one is not.
            is_served(node1, town.place("node2").at(port), place)?;
        }
        Ok(())
    })
}

#[test]
fn after_the_service_is_deleted_its_node_port_is_refused_and_nobody_listens() -> Result<()> {
    // V-39, V-37.
    in_network(PodNetwork::Routed, |town| {
        let dir = manifests()?;
        let _servers = servers(&town, &["b"])?;
        let controller = service(&dir, &town, ("web", 1, 30001), &["b"], |plan| plan)?;
        let _agent = agent(&town, "node1", &dir, &[])?;
        let (node1, outside) = (town.place("node1"), town.place("outside"));
        is_served(outside, node1.at(30001), "b")?;
        ensure!(!listens(&town, 30001)?, "somebody listens on a NodePort");
        controller.withdraw()?;
        let key = Key { kind: Kind::Service, namespace: "default".into(), name: "web".into() };
        dir.retract(&key)?;
        for client in ["outside", "a", "node1"] {
            soon(|| is_refused(town.place(client), node1.at(30001)))?;
        }
        ensure!(!listens(&town, 30001)?, "somebody listens on a NodePort");
        // The same number can be had again.
        service(&dir, &town, ("other", 2, 30001), &["b"], |plan| plan)?;
        soon(|| is_served(outside, at(node1.addresses(), 30001), "b"))
    })
}

/// Whether a socket of the node is bound to a port.
fn listens(town: &Town, port: u16) -> Result<bool> {
    let tables = town.place("node1").netns.run_in(|| {
        ["tcp", "tcp6", "udp", "udp6"]
            .map(|table| std::fs::read_to_string(format!("/proc/thread-self/net/{table}")))
    })?;
    let own = format!(":{port:04X} ");
    for table in tables {
        // The second field of a line is the own address, the third the peer's.
        let table = table?;
        let bound = |line: &str| {
            line.split_whitespace()
                .nth(1)
                .is_some_and(|own_address| format!("{own_address} ").ends_with(&own))
        };
        if table.lines().any(bound) {
            return Ok(true);
        }
    }
    Ok(false)
}

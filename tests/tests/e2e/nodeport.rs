//! NodePorts, from wherever they can be asked.

use anyhow::Result;
use proxy_tests::test_cluster::PodNetwork;

use crate::common::manifests;
use crate::scene::{agent, answers, in_network, is_served, seen_as, servers, service};

/// The endpoints, by where they are seen from `node1`, and the NodePorts that lead to them.
const PLACES: [(&str, u16); 4] = [("b", 30001), ("c", 30002), ("h1", 30003), ("h2", 30004)];

#[test]
fn a_node_port_serves_outside_pods_and_hosts_and_a_local_endpoint_sees_the_client() -> Result<()> {
    // V-32, M-8, M-15, D-12, D-13; a local endpoint sees the client's address though the policy is Cluster.
    in_network(PodNetwork::Bridged, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &PLACES.map(|(place, _)| place))?;
        for (n, (place, port)) in (1..).zip(PLACES) {
            service(&dir, &cluster, (place, n, port), &[place], |plan| plan)?;
        }
        let agents = [agent(&cluster, "node1", &dir, &[])?, agent(&cluster, "node2", &dir, &[])?];
        let (node1, outside) = (cluster.place("node1"), cluster.place("outside"));
        for (place, port) in PLACES {
            let near = cluster.place(place).node == node1.node;
            let seen = if near { outside.addresses() } else { node1.addresses() };
            answers(outside, node1.at(port), place, |answer| seen_as(answer, seen))?;
            for client in ["a", "node1", "h1"] {
                for node in ["node1", "node2"] {
                    is_served(cluster.place(client), cluster.place(node).at(port), place)?;
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
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &PLACES.map(|(place, _)| place))?;
        for (n, (place, port)) in (1..).zip(PLACES) {
            service(&dir, &cluster, (place, n, port), &[place], |plan| plan)?;
        }
        let _agents = ["node1", "node2"]
            .map(|node| agent(&cluster, node, &dir, &["--socket-lb", "off"]))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        let (a, node1) = (cluster.place("a"), cluster.place("node1"));
        for (place, port) in PLACES {
            let near = cluster.place(place).node == node1.node;
            let seen = if near { a.addresses() } else { node1.addresses() };
            answers(a, node1.at(port), place, |answer| seen_as(answer, seen))?;
            is_served(a, cluster.place("node2").at(port), place)?;
            is_served(cluster.place("outside"), node1.at(port), place)?;
            // The other node is beyond an interface; the own one is not.
            is_served(node1, cluster.place("node2").at(port), place)?;
        }
        Ok(())
    })
}

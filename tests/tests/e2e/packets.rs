//! Pods whose sockets are left alone: everything is translated packet by packet.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use proxy_tests::answer::Hold;
use proxy_tests::manifests::{EndpointController, Phase, ServicePlan};
use proxy_tests::object::{Object, Publish};
use proxy_tests::probe::{Ask, Runner, Server, eventually, get, request, roam, transfer};

use proxy_tests::test_cluster::{PodNetwork, TestCluster};

use crate::common::{ip, manifests, vips};
use crate::scene::{
    SHORT, SOON, agent, answers, at, counted, in_every_network, in_network, is_served, seen_as, servers,
    service, spreads,
};

#[test]
fn with_socket_translation_for_the_host_alone_pods_go_by_packet_and_keep_their_address() -> Result<()> {
    // M-6, M-17.
    in_every_network(|cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["b", "c"])?;
        service(&dir, &cluster, ("near", 1, 0), &["b"], |plan| plan)?;
        service(&dir, &cluster, ("far", 2, 0), &["c"], |plan| plan)?;
        service(&dir, &cluster, ("both", 3, 0), &["b", "c"], |plan| plan)?;
        let agent = agent(&cluster, "node1", &dir, &["--socket-lb", "host"])?;
        let a = cluster.place("a");
        for (n, server) in [(1, "b"), (2, "c")] {
            answers(a, at(vips(n), 80), server, |answer| seen_as(answer, a.addresses()))?;
        }
        ensure!(counted(&agent, "socket_translated")? == 0, "a pod's socket was translated");
        spreads(a, at(vips(3), 80), &["b", "c"])?;
        for client in ["node1", "h1"] {
            for to in at(vips(2), 80) {
                for ask in [Ask::tcp(to), Ask::udp(to)] {
                    let request = request(cluster.place(client), &ask)?;
                    ensure!(
                        request.answer.is_some() && request.peer_name == Some(to),
                        "{client}: {request:?}"
                    );
                }
            }
            is_served(cluster.place(client), at(vips(1), 80), "b")?;
        }
        ensure!(counted(&agent, "socket_translated")? > 0, "no host socket was translated");
        Ok(())
    })
}

#[test]
fn however_much_a_connection_has_carried_its_end_is_noticed() -> Result<()> {
    // D-6: what is over is kept for two minutes, not for a day. Ends are judged by what has been acknowledged, which
    // goes on far more quickly than flows are looked at.
    const BULK: u64 = 48 << 20;
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["b", "c", "h1"])?;
        service(&dir, &cluster, ("near", 1, 30_001), &["b"], |plan| plan)?;
        service(&dir, &cluster, ("far", 2, 30_002), &["c"], |plan| plan)?;
        let node1 = cluster.place("node1");
        // A Service that is its own endpoint.
        let own =
            ServicePlan::new("own", &vips(3)).external_ips(&node1.addresses()).port("", "TCP", 8080, 8080);
        dir.publish(&Object::from(&own.build()))?;
        let mut host = EndpointController::new(&dir, "own", &[("", "TCP", 8080)])?;
        host.set(cluster.place("h1"), Phase::Ready)?;
        let agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off"])?;
        let doors = [
            ("a", at(vips(1), 80)),
            ("a", at(vips(2), 80)),
            ("outside", node1.at(30_001)),
            ("outside", node1.at(30_002)),
            ("outside", node1.at(8080)),
        ];
        for (client, door) in doors {
            for to in door {
                transfer(cluster.place(client), &Ask::tcp(to), BULK)?;
            }
        }
        eventually(SOON, || {
            let flows = agent.json(&["conntrack", "list", "--output", "json"])?;
            let flows = flows.as_array().cloned().unwrap_or_default();
            let states: Vec<&str> = flows.iter().filter_map(|flow| flow["state"].as_str()).collect();
            ensure!(states == vec!["closed"; doors.len() * 2], "{states:?}: {flows:#?}");
            Ok(())
        })
    })
}

#[test]
fn one_client_port_talks_to_two_services_of_the_same_endpoint() -> Result<()> {
    // D-5: the tuples behind the Services would be the same.
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        service(&dir, &cluster, ("one", 1, 0), &["c"], |plan| plan)?;
        service(&dir, &cluster, ("two", 2, 0), &["c"], |plan| plan)?;
        let agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off"])?;
        let a = cluster.place("a");
        for family in [0, 1] {
            let [one, two] = [1, 2].map(|n| SocketAddr::new(vips(n)[family], 80));
            for (port, way) in [(40_000, Ask::tcp as fn(SocketAddr) -> Ask), (40_001, Ask::udp)] {
                let every = Duration::from_millis(5);
                let hold = |to| Runner::hold(a, &way(to).from_port(port), every, Duration::from_secs(30));
                let mut holds = [hold(one)?, hold(two)?];
                for hold in &mut holds {
                    goes_on(hold)?;
                }
                for hold in holds {
                    let report = hold.stop()?;
                    ensure!(report.failed == 0 && report.names.len() == 1, "{report:?}");
                }
            }
        }
        ensure!(counted(&agent, "flow_collision")? == 4, "{}", agent.status_json()?);
        Ok(())
    })
}

#[test]
fn a_port_that_was_used_for_a_service_reaches_its_endpoint_directly() -> Result<()> {
    // D-5, D-19: answers to the second connection are not translated for the first, which is over.
    in_network(PodNetwork::Bridged, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["b"])?;
        service(&dir, &cluster, ("web", 1, 30001), &["b"], |plan| plan)?;
        let _agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off"])?;
        let (b, node1) = (cluster.place("b"), cluster.place("node1"));
        for (client, door, port) in [("a", at(vips(1), 80), 40_000), ("c", node1.at(30001), 40_001)] {
            for (through, direct) in door.into_iter().zip(b.at(8080)) {
                for way in [Ask::tcp as fn(SocketAddr) -> Ask, Ask::udp] {
                    let ask = |to| get(cluster.place(client), &way(to).from_port(port).timeout(SHORT));
                    ensure!(ask(through)?.name == "b");
                    // UDP says nothing of an end: the client must have been silent for a while.
                    eventually(SOON, || {
                        ensure!(ask(direct)?.name == "b");
                        Ok(())
                    })?;
                }
                let again = Ask::udp(through).from_port(port).timeout(SHORT);
                ensure!(get(cluster.place(client), &again)?.name == "b");
            }
        }
        Ok(())
    })
}

fn goes_on(hold: &mut Runner<Hold>) -> Result<()> {
    eventually(SOON, || {
        let report = hold.report()?;
        ensure!(report.made > 10, "{report:?}");
        Ok(())
    })
}

#[test]
fn strict_reverse_path_checks_take_no_translated_packet_for_a_martian() -> Result<()> {
    // D-14: RFC 3704 §2.2 on every interface of both nodes. (A pod's own packet to another node fails these checks
    // in an overlay without our doing, unless the CNI masquerades it.)
    let checked = |cluster: TestCluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["a", "b", "c"])?;
        service(&dir, &cluster, ("itself", 1, 30001), &["a"], |plan| plan)?;
        service(&dir, &cluster, ("near", 2, 30002), &["b"], |plan| plan)?;
        service(&dir, &cluster, ("far", 3, 30003), &["c"], |plan| plan)?;
        let agents = ["node1", "node2"].map(|node| agent(&cluster, node, &dir, &["--socket-lb", "off"]));
        let _agents = agents.into_iter().collect::<Result<Vec<_>>>()?;
        for node in ["node1", "node2"] {
            cluster.place(node).netns.sysctls(&[("ipv4/conf/all/rp_filter", "1")])?;
        }
        for (n, server) in [(1, "a"), (2, "b"), (3, "c")] {
            is_served(cluster.place("a"), at(vips(n), 80), server)?;
            is_served(cluster.place("outside"), at(vips(n), 80), server)?;
            for client in ["a", "d", "outside"] {
                is_served(cluster.place(client), cluster.place("node1").at(30000 + u16::from(n)), server)?;
            }
        }
        Ok(())
    };
    in_network(PodNetwork::Routed, checked)?;
    in_network(PodNetwork::Bridged, checked)
}

#[test]
fn a_pod_that_appears_is_translated_while_it_starts() -> Result<()> {
    // D-17: a container takes longer to start than this. A UDP socket that was quicker is not lost for good.
    in_every_network(|mut cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        service(&dir, &cluster, ("web", 1, 0), &["c"], |plan| plan)?;
        let _agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off"])?;
        for n in 0..4 {
            let pod = cluster.add_pod("node1", &format!("new{n}"))?;
            let every = Duration::from_millis(5);
            let to = at(vips(1), 80)[n % 2];
            let eager = Ask::udp(to).from_port(40_000).timeout(Duration::from_millis(50));
            let mut eager = Runner::hold(&pod, &eager, every, Duration::from_secs(30))?;
            eventually(Duration::from_secs(1), || {
                get(&pod, &Ask::tcp(to).timeout(Duration::from_millis(50)))
            })?;
            answers(&pod, at(vips(1), 80), "c", |answer| seen_as(answer, pod.addresses()))?;
            goes_on(&mut eager)?;
        }
        Ok(())
    })
}

#[test]
fn one_unconnected_socket_talks_to_more_services_than_it_can_remember() -> Result<()> {
    // D-1: what does not fit into the socket's memory is left to packets, and every answer has the right name.
    in_network(PodNetwork::Bridged, |cluster| {
        let dir = manifests()?;
        let services: Vec<u8> = (1..=7).collect();
        let port = |n: u8| 8080 + u16::from(n);
        let ports: Vec<_> = services.iter().map(|n| port(*n)).collect();
        let _servers =
            [Server::start(cluster.place("b"), &ports)?, Server::start(cluster.place("c"), &ports)?];
        for n in &services {
            let (name, server) = (format!("s{n}"), if n % 2 == 0 { "b" } else { "c" });
            let plan = ServicePlan::new(&name, &vips(*n)).port("udp", "UDP", 80, port(*n));
            dir.publish(&Object::from(&plan.build()))?;
            EndpointController::new(&dir, &name, &[("udp", "UDP", port(*n))])?
                .set(cluster.place(server), Phase::Ready)?;
        }
        let _agent = agent(&cluster, "node1", &dir, &[])?;
        for client in ["a", "node1"] {
            for family in [0, 1] {
                let targets: Vec<_> =
                    services.iter().map(|n| SocketAddr::new(vips(*n)[family], 80)).collect();
                let answers = roam(cluster.place(client), &targets)?;
                for (answer, (n, to)) in answers.iter().zip(services.iter().zip(&targets).cycle()) {
                    let server = if n % 2 == 0 { "b" } else { "c" };
                    ensure!(
                        answer.received_from == Some(*to)
                            && answer.answer.as_ref().is_some_and(|answer| answer.name == server),
                        "{client} asked {to} of {server}: {answer:?}"
                    );
                }
            }
        }
        Ok(())
    })
}

#[test]
fn traffic_that_is_for_no_service_is_left_alone() -> Result<()> {
    // D-19, D-20: also neighbour discovery, from scratch.
    in_every_network(|cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["a", "b", "c", "h1", "h2"])?;
        service(&dir, &cluster, ("web", 1, 30001), &["b", "c"], |plan| plan)?;
        let agent = agent(&cluster, "node1", &dir, &[])?;
        for place in ["a", "b", "c", "node1", "node2", "outside"] {
            for family in ["-4", "-6"] {
                cluster.place(place).netns.output("ip", &[family, "neigh", "flush", "all"])?;
            }
        }
        for client in ["a", "node2", "outside"] {
            let client = cluster.place(client);
            for server in ["b", "c", "h1", "h2"] {
                // A node reaches pods of other nodes from its own address, or from its tunnel's in an overlay.
                let tunnel = ["10.244.2.0", "fd00:244:2::"].map(ip);
                let tunnelled = client.name == "node2" && cluster.place(server).host_interface.is_some();
                // And its own pods from the pod network's.
                let own = client.node == cluster.place(server).node && client.host_interface.is_none();
                answers(client, cluster.place(server).at(8080), server, |answer| {
                    let from_tunnel = tunnelled && seen_as(answer, tunnel).is_ok();
                    if own || from_tunnel { Ok(()) } else { seen_as(answer, client.addresses()) }
                })?;
            }
        }
        for reason in ["new_flow", "socket_translated", "malformed", "undefined_port", "no_endpoint"] {
            ensure!(counted(&agent, reason)? == 0, "{reason}: {}", agent.status_json()?);
        }
        Ok(())
    })
}

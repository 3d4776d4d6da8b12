//! What leaves a node from the number of a NodePort gets its answers; Services are for those who ask the node.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::answer::Hold;
use proxy_tests::packet::{Packet, TcpFlags, View, protocol};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Runner, Server, request};
use proxy_tests::test_cluster::{Plan, PodNetwork, TestCluster};
use proxy_tests::wire::Wire;

use crate::common::{MOMENT, PORT, Proxy, WAYS, Web, answer, is_served, servers, soon, with_either};
use crate::talk::{Talk, Way};

/// One Service leads to a pod of the node itself, one to a pod of another.
const NEAR: Web = Web::new(1, 30200, "b");
const FAR: Web = Web::new(2, 30201, "c");

/// Two machines outside know the node, and nothing of pods and Services.
fn cluster(network: PodNetwork) -> Result<TestCluster> {
    Plan::default()
        .node("node1", &["a", "b"])
        .node("node2", &["c"])
        .host_pod("h2")
        .client("server")
        .client("other")
        .network(network)
        .raise()
}

/// The CNI gives what pods send to the world this one port of the node: any is as likely as another.
fn masquerade_to(node: &Place, port: u16) -> Result<()> {
    node.netns.nft(&format!(
        "table inet cni {{
            chain postrouting {{
                type nat hook postrouting priority srcnat;
                oifname eth0 ip saddr 10.244.0.0/16 ip daddr 192.168.10.0/24 meta l4proto {{ tcp, udp }} masquerade to :{port}
                oifname eth0 ip6 saddr fd00:244::/32 ip6 daddr fd00:10::/64 meta l4proto {{ tcp, udp }} masquerade to :{port}
            }}
        }}\n"
    ))
}

/// One more way: questions and answers that come in fragments.
const ALL_WAYS: [fn(SocketAddr) -> Ask; 4] =
    [Ask::tcp, Ask::udp, Ask::unconnected, |to| Ask::udp(to).payload(4000)];

/// A server's machine that listens nowhere near says so.
fn is_refused(client: &Place, to: SocketAddr, from: impl Fn(Ask) -> Ask) -> Result<()> {
    for (way, failure) in
        [(Ask::tcp as fn(SocketAddr) -> Ask, "connect ECONNREFUSED"), (Ask::udp, "receive ECONNREFUSED")]
    {
        let request = request(client, &from(way(to)))?;
        ensure!(request.failure.as_deref() == Some(failure), "{} asks {to}: {request:?}", client.name);
    }
    Ok(())
}

/// Another socket, another port of the server: two conversations cannot share all of addresses and ports.
fn server_ports() -> impl Iterator<Item = u16> {
    8081..
}

/// The clients outside reach both NodePorts, also the machine that the node or its pods are talking to.
fn node_ports_serve(cluster: &TestCluster) -> Result<()> {
    let node1 = cluster.place("node1");
    for client in ["server", "other", "node2"] {
        for web in [NEAR, FAR] {
            is_served(cluster.place(client), node1.at(web.node_port), web.endpoint)?;
        }
    }
    Ok(())
}

/// An answer of a server outside, from one of these ports, of which endpoints are to receive nothing.
fn strays(cluster: &TestCluster, ports: impl Fn(u16) -> bool) -> impl Fn(&View) -> bool {
    let servers = ["server", "h2"].map(|name| cluster.place(name).addresses()).concat();
    move |view| servers.contains(&view.source) && view.ports.is_some_and(|(source, _)| ports(source))
}

#[test]
fn a_host_process_connects_out_from_the_number_of_a_node_port() -> Result<()> {
    with_either(|proxy| {
        let cluster = cluster(PodNetwork::Routed)?;
        let _servers = servers(&cluster, &["b", "c"])?;
        let ports: Vec<u16> = server_ports().take(16).collect();
        let _outside =
            [Server::start(cluster.place("server"), &ports)?, Server::start(cluster.place("h2"), &ports)?];
        let _serving = proxy.serve(&cluster, "node1", &[NEAR, FAR], &[])?;
        let endpoints = ["b", "c"].map(|pod| Wire::tap(&cluster.place(pod).netns, "eth0"));
        let node1 = cluster.place("node1");
        let mut server_port = server_ports();
        for web in [NEAR, FAR] {
            for way in ALL_WAYS {
                let port = server_port.next().context("no port is left")?;
                let targets = ["server", "h2"].map(|name| cluster.place(name).at(port).map(|to| (name, to)));
                for (name, to) in targets.concat() {
                    let answer = answer(node1, &way(to).from_port(web.node_port), name)?;
                    ensure!(answer.peer.port() == web.node_port, "{answer:?}");
                    ensure!(node1.addresses().contains(&answer.peer.ip()), "{answer:?}");
                }
            }
            // Endpoints are asked directly, too.
            let targets = ["b", "c"].map(|name| cluster.place(name).at(PORT).map(|to| (name, to)));
            for (name, to) in targets.concat() {
                for way in [Ask::tcp as fn(SocketAddr) -> Ask, Ask::udp] {
                    let answer = answer(node1, &way(to).from_port(web.node_port), name)?;
                    ensure!(answer.peer.port() == web.node_port, "{answer:?}");
                }
            }
            for to in cluster.place("server").at(9) {
                is_refused(node1, to, |ask| ask.from_port(web.node_port))?;
            }
        }
        node_ports_serve(&cluster)?;
        for endpoint in endpoints {
            endpoint?.silent(MOMENT, strays(&cluster, |port| ports.contains(&port)))?;
        }
        Ok(())
    })
}

#[test]
fn a_host_process_connects_out_from_the_port_of_a_service_at_the_node_s_address() -> Result<()> {
    let cluster = cluster(PodNetwork::Routed)?;
    let (node1, server) = (cluster.place("node1"), cluster.place("server"));
    let _servers = servers(&cluster, &["b"])?;
    let _outside = Server::start(server, &[8081])?;
    let serving = Proxy::Agent.serve(&cluster, "node1", &[], &[])?;
    serving.add(&cluster, &NEAR, |plan| plan.external_ips(&node1.addresses()))?;
    soon(|| is_served(server, node1.at(80), "b"))?;
    for to in server.at(8081) {
        for way in WAYS {
            let answer = answer(node1, &way(to).from_port(80), "server")?;
            ensure!(answer.peer == SocketAddr::new(node1.address_like(to.ip()), 80), "{answer:?}");
        }
    }
    is_served(server, node1.at(80), "b")
}

#[test]
fn a_pod_that_the_cni_masquerades_to_the_number_of_a_node_port_gets_its_answers() -> Result<()> {
    with_either(|proxy| {
        for (network, web) in [(PodNetwork::Routed, NEAR), (PodNetwork::Bridged, FAR)] {
            let cluster = cluster(network)?;
            let _servers = servers(&cluster, &["b", "c"])?;
            let ports: Vec<u16> = server_ports().take(16).collect();
            let _outside = [Server::start(cluster.place("server"), &ports)?];
            let node1 = cluster.place("node1");
            masquerade_to(node1, web.node_port)?;
            let _serving = proxy.serve(&cluster, "node1", &[NEAR, FAR], &[])?;
            let endpoints = ["b", "c"].map(|pod| Wire::tap(&cluster.place(pod).netns, "eth0"));
            let mut server_port = server_ports();
            // The Service's own endpoint is a pod like the others.
            for pod in ["a", "b"] {
                for way in ALL_WAYS {
                    let port = server_port.next().context("no port is left")?;
                    for to in cluster.place("server").at(port) {
                        let answer = answer(cluster.place(pod), &way(to), "server")
                            .with_context(|| format!("{network:?} pods"))?;
                        ensure!(
                            answer.peer == SocketAddr::new(node1.address_like(to.ip()), web.node_port),
                            "{answer:?}"
                        );
                    }
                }
            }
            for to in cluster.place("server").at(9) {
                is_refused(cluster.place("a"), to, |ask| ask)?;
            }
            node_ports_serve(&cluster)?;
            let [b, c] = endpoints;
            // What `b` has asked, after `a`, it has been answered.
            let asked_by_a = &ports[..ALL_WAYS.len()];
            b?.silent(MOMENT, strays(&cluster, |port| asked_by_a.contains(&port)))?;
            c?.silent(MOMENT, strays(&cluster, |port| ports.contains(&port)))?;
        }
        Ok(())
    })
}

#[test]
fn conversations_from_the_number_of_a_node_port_go_on_while_that_is_served() -> Result<()> {
    with_either(|proxy| {
        let cluster = cluster(PodNetwork::Bridged)?;
        let (node1, a, server) = (cluster.place("node1"), cluster.place("a"), cluster.place("server"));
        let _servers = servers(&cluster, &["b", "c"])?;
        let ports: Vec<u16> = server_ports().take(16).collect();
        let _outside = [Server::start(server, &ports)?];
        masquerade_to(node1, NEAR.node_port)?;
        let mut server_port = server_ports();
        let mut hold = || -> Result<Vec<Runner<Hold>>> {
            let mut holds = Vec::new();
            for way in [Ask::tcp as fn(SocketAddr) -> Ask, Ask::udp] {
                for (place, from) in [(node1, NEAR.node_port), (node1, FAR.node_port), (a, 0)] {
                    let port = server_port.next().context("no port is left")?;
                    for to in server.at(port) {
                        let ask = if from == 0 { way(to) } else { way(to).from_port(from) };
                        let every = Duration::from_millis(20);
                        holds.push(Runner::hold(place, &ask, every, Duration::from_secs(60))?);
                    }
                }
            }
            holds.iter_mut().try_for_each(goes_on)?;
            Ok(holds)
        };
        // Some are there before the Service, some come while it is served.
        let mut holds = hold()?;
        let serving = proxy.serve(&cluster, "node1", &[NEAR, FAR], &[])?;
        holds.extend(hold()?);
        node_ports_serve(&cluster)?;
        holds.iter_mut().try_for_each(goes_on)?;
        if let Some(mut agent) = serving.agent {
            agent.kill()?;
            agent.spawn()?;
            agent.wait_ready()?;
            holds.iter_mut().try_for_each(goes_on)?;
            node_ports_serve(&cluster)?;
        }
        for hold in holds {
            let report = hold.stop()?;
            let only_server = report.names.keys().eq(["server"]);
            // A datagram's answer may have been on its way when the Service came.
            ensure!(report.broke.is_none() && report.failed <= 1 && only_server, "{report:?}");
        }
        Ok(())
    })
}

fn goes_on(hold: &mut Runner<Hold>) -> Result<()> {
    let before = hold.report()?.made;
    soon(|| {
        let report = hold.report()?;
        ensure!(report.made > before + 3, "{report:?}");
        Ok(())
    })
}

#[test]
fn a_server_outside_may_speak_first_on_a_connection_older_than_the_service() -> Result<()> {
    with_either(|proxy| {
        let cluster = cluster(PodNetwork::Routed)?;
        let (node1, server) = (cluster.place("node1"), cluster.place("server"));
        masquerade_to(node1, FAR.node_port)?;
        let mut talks = Vec::new();
        for at in server.at(8081) {
            talks.push(Talk::begin(Way::Tcp, (&node1.netns, NEAR.node_port), at, (&server.netns, at))?);
        }
        for at in server.at(8082) {
            talks.push(Talk::begin(Way::Tcp, (&cluster.place("a").netns, 0), at, (&server.netns, at))?);
        }
        let _servers = servers(&cluster, &["b", "c"])?;
        let _serving = proxy.serve(&cluster, "node1", &[NEAR, FAR], &[])?;
        for talk in &talks {
            talk.push()?;
            talk.exchange()?;
        }
        node_ports_serve(&cluster)?;
        talks.iter().try_for_each(Talk::exchange)
    })
}

#[test]
fn what_begins_no_connection_is_the_node_s_own_and_no_service_s() -> Result<()> {
    let cluster = cluster(PodNetwork::Routed)?;
    let _servers = servers(&cluster, &["b", "c"])?;
    let _serving = Proxy::Agent.serve(&cluster, "node1", &[NEAR, FAR], &[])?;
    let (node1, other) = (cluster.place("node1"), cluster.place("other"));
    is_served(other, node1.at(NEAR.node_port), "b")?;
    let door = node1.netns.mac("eth0")?;
    let wire = Wire::tap(&other.netns, "eth0")?;
    let endpoints = ["b", "c"].map(|pod| Wire::tap(&cluster.place(pod).netns, "eth0"));
    let [ack, syn, fin, psh] = [TcpFlags::ACK, TcpFlags::SYN, TcpFlags::FIN, TcpFlags::PSH];
    let mut port = 20_000;
    for web in [NEAR, FAR] {
        for flags in [syn.and(ack), ack, psh.and(ack), fin.and(ack)] {
            for (from, to) in other.at(0).into_iter().zip(node1.at(web.node_port)) {
                port += 1;
                let from = SocketAddr::new(from.ip(), port);
                wire.send(&Packet::tcp(from, to, flags).ethernet(door, wire.mac()).build())?;
                // The node itself knows of no such connection, and says so.
                let reset = wire.next(Duration::from_secs(2), |view| {
                    view.ports == Some((to.port(), port)) && view.transport[13] & TcpFlags::RST.0 != 0
                })?;
                ensure!(reset.is_some(), "{flags:?} from {from} to {to} was not reset by the node");
            }
        }
    }
    for endpoint in endpoints {
        endpoint?.silent(MOMENT, |view| {
            view.protocol == protocol::TCP && view.ports.is_some_and(|(_, to)| to == PORT)
        })?;
    }
    Ok(())
}

#[test]
fn what_carries_pods_packets_to_another_node_is_nobody_s_masquerade() -> Result<()> {
    // The packets of a tunnel to a node that is an endpoint's, too, belong to the sockets of what they carry.
    let cluster = cluster(PodNetwork::Overlay)?;
    let node1 = cluster.place("node1");
    // Every port may be one to masquerade with.
    node1.netns.sysctls(&[("ipv4/ip_local_port_range", "1024 65535")])?;
    let serving = Proxy::Agent.serve(&cluster, "node1", &[Web::new(3, 30202, "h2")], &[])?;
    let agent = serving.agent.as_ref().context("an agent")?;
    let c = cluster.place("c");
    let mut talks = Vec::new();
    for way in [Way::Tcp, Way::Udp] {
        for to in c.at(PORT) {
            for _ in 0..8 {
                talks.push(Talk::begin(way, (&node1.netns, 0), to, (&c.netns, to))?);
            }
        }
    }
    talks.iter().try_for_each(Talk::exchange)?;
    let status = agent.status_json()?;
    let noted =
        status["reasons"].as_array().context("reasons")?.iter().find(|one| one["reason"] == "node_traffic");
    ensure!(noted.is_none(), "{noted:?}");
    Ok(())
}

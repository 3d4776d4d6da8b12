//! The CNI masquerades, too: what the node makes of a flow in between does not make it a lesser one.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use proxy_tests::netns::Netns;
use proxy_tests::packet::{Packet, TcpFlags, View};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Server, wait};
use proxy_tests::test_cluster::{Plan, PodNetwork, TestCluster};
use proxy_tests::wire::Wire;

use crate::common::{MOMENT, PORT, Proxy, Web, is_served, is_served_as, servers, with_either};
use crate::talk::{Talk, Way};

/// To pods of the other node, one of which never answers, and to a server outside the cluster.
const FAR: Web = Web::new(1, 30200, "c");
const SILENT: Web = Web::new(2, 30201, "d");
const BEYOND: Web = Web::new(3, 30202, "server");
const WEBS: [Web; 3] = [FAR, SILENT, BEYOND];

/// More new connections than agents of tests have room for.
const FLOOD: u16 = 20_000;

fn cluster(network: PodNetwork) -> Result<TestCluster> {
    let cluster = Plan::default()
        .node("node1", &["a"])
        .node("node2", &["c", "d"])
        .client("outside")
        .client("server")
        .client("flood")
        .network(network)
        .raise()?;
    let d = cluster.place("d");
    d.netns.nft(
        "table inet silent {
            chain input {
                type filter hook input priority filter;
                meta l4proto { tcp, udp } drop
            }
        }\n",
    )?;
    Ok(cluster)
}

/// The rules that Flannel adds behind source translation: from pods to anywhere, from anywhere to pods.
fn flannel(cluster: &TestCluster, node: &str) -> Result<()> {
    let mut rules = String::new();
    let families = [("ip", "224.0.0.0/4"), ("ip6", "ff00::/8")];
    for (((family, multicast), pods), own) in
        families.into_iter().zip(TestCluster::CLUSTER_CIDRS).zip(cluster.pod_cidrs(node))
    {
        writeln!(
            rules,
            "table {family} flannel {{
                chain postrouting {{
                    type nat hook postrouting priority srcnat;
                    {family} saddr {own} {family} daddr {pods} return
                    {family} saddr {pods} {family} daddr {own} return
                    {family} saddr != {pods} {family} daddr {own} return
                    {family} saddr {pods} {family} daddr != {multicast} masquerade fully-random
                    {family} saddr != {pods} {family} daddr {pods} masquerade fully-random
                }}
            }}"
        )?;
    }
    cluster.place(node).netns.nft(&rules)
}

/// Talks from outside through the NodePort, and from a pod to the server beyond, both families.
fn talks(cluster: &TestCluster, way: Way) -> Result<Vec<Talk>> {
    let [node1, c, a, outside, server] =
        ["node1", "c", "a", "outside", "server"].map(|name| cluster.place(name));
    let mut talks = Vec::new();
    let families = node1.at(FAR.node_port).into_iter().zip(BEYOND.cluster_ips());
    for ((door, cluster_ip), (at_c, at_server)) in families.zip(c.at(PORT).into_iter().zip(server.at(PORT))) {
        talks.push(Talk::begin(way, (&outside.netns, 0), door, (&c.netns, at_c))?);
        talks.push(Talk::begin(way, (&a.netns, 0), cluster_ip, (&server.netns, at_server))?);
    }
    Ok(talks)
}

/// Begins so many connections that nobody answers, and asks for each of them again after so many others.
fn flood(
    cluster: &TestCluster,
    targets: &[SocketAddr],
    again: &[u16],
    each: impl Fn() -> Result<()>,
) -> Result<()> {
    let place = cluster.place("flood");
    let wire = Wire::tap(&place.netns, "eth0")?;
    let door = cluster.place("node1").netns.mac("eth0")?;
    for number in 0..FLOOD {
        for to in targets {
            for ago in [&[0], again].concat() {
                let from = SocketAddr::new(place.address_like(to.ip()), 10_000 + number.saturating_sub(ago));
                let syn = Packet::tcp(from, *to, TcpFlags::SYN);
                wire.send(&syn.ethernet(door, wire.mac()).build())?;
            }
        }
        if number % 512 == 0 {
            each()?;
        }
    }
    each()
}

#[test]
fn everybody_is_served_beside_the_rules_of_the_cni() -> Result<()> {
    with_either(|proxy| {
        for network in [PodNetwork::Routed, PodNetwork::Overlay] {
            let cluster = cluster(network)?;
            let _servers = servers(&cluster, &["c", "server"])?;
            flannel(&cluster, "node1")?;
            flannel(&cluster, "node2")?;
            let _serving = proxy.serve(&cluster, "node1", &WEBS, &["--socket-lb=host"])?;
            let [node1, a, outside] = ["node1", "a", "outside"].map(|name| cluster.place(name));
            is_served(outside, node1.at(FAR.node_port), "c")?;
            is_served(outside, node1.at(BEYOND.node_port), "server")?;
            is_served_as(a, FAR.cluster_ips(), "c", a.addresses())?;
            is_served_as(a, BEYOND.cluster_ips(), "server", node1.addresses())?;
            is_served(a, node1.at(BEYOND.node_port), "server")?;
        }
        Ok(())
    })
}

#[test]
fn after_a_long_silence_a_server_speaks_first_through_the_masquerade_of_the_cni() -> Result<()> {
    with_either(|proxy| {
        let cluster = cluster(PodNetwork::Routed)?;
        flannel(&cluster, "node1")?;
        let _serving = proxy.serve(
            &cluster,
            "node1",
            &WEBS,
            &["--conntrack-udp-timeout=2s", "--conntrack-udp-timeout-stream=60s"],
        )?;
        let talks = talks(&cluster, Way::Udp)?;
        // Traffic both ways for more than two seconds makes a stream of it.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(3) {
            talks.iter().try_for_each(Talk::exchange)?;
            std::thread::sleep(Duration::from_millis(300));
        }
        wait(Duration::from_secs(6), "what is unanswered is forgotten after two seconds, and a sweep");
        talks.iter().try_for_each(Talk::push)?;
        talks.iter().try_for_each(Talk::exchange)
    })
}

#[test]
fn a_port_that_somebody_else_has_given_a_connection_is_not_given_to_another() -> Result<()> {
    with_either(|proxy| {
        for later in [false, true] {
            // Rules are written once.
            if later && proxy == Proxy::Rules {
                continue;
            }
            let cluster = cluster(PodNetwork::Routed)?;
            let [node1, a, outside, server] =
                ["node1", "a", "outside", "server"].map(|name| cluster.place(name));
            // Four ports are left for masquerading, of which others have two.
            node1.netns.sysctls(&[("ipv4/ip_local_reserved_ports", "1024-1999,2004-65535")])?;
            node1.netns.nft(
                "table inet cni {
                    chain postrouting {
                        type nat hook postrouting priority srcnat;
                        meta l4proto { tcp, udp } th sport 7777 th dport 8080 masquerade to :2000
                        meta l4proto { tcp, udp } th sport 7778 th dport 8080 masquerade to :2001
                    }
                }\n",
            )?;
            let talk_all = |from: (&Netns, u16), to: [SocketAddr; 2]| {
                let mut talks = Vec::new();
                for way in [Way::Tcp, Way::Udp] {
                    for (to, at) in to.into_iter().zip(server.at(PORT)) {
                        talks.push(Talk::begin(way, from, to, (&server.netns, at))?);
                    }
                }
                anyhow::Ok(talks)
            };
            // Silent from here on.
            let mut theirs = talk_all((&a.netns, 7777), server.at(PORT))?;
            let serving = proxy.serve(&cluster, "node1", if later { &[FAR] } else { &[BEYOND] }, &[])?;
            if later {
                serving.add(&cluster, &BEYOND, |plan| plan)?;
                serving.knows(&server.addresses().map(|addr| addr.to_string()).each_ref().map(|s| &**s))?;
                wait(Duration::from_secs(2), "connection tracking is read again soon after");
            }
            theirs.extend(talk_all((&node1.netns, 7778), server.at(PORT))?);
            let mut ours = Vec::new();
            for _ in 0..2 {
                ours.extend(talk_all((&outside.netns, 0), node1.at(BEYOND.node_port))?);
            }
            for talk in theirs.iter().chain(&ours) {
                talk.exchange().with_context(|| format!("endpoint later: {later}"))?;
            }
        }
        Ok(())
    })
}

#[test]
fn a_flood_costs_a_connection_through_the_masquerade_of_the_cni_nothing() -> Result<()> {
    with_either(|proxy| {
        for with_cni in [true, false] {
            let cluster = cluster(PodNetwork::Routed)?;
            if with_cni {
                flannel(&cluster, "node1")?;
            }
            let _serving = proxy.serve(&cluster, "node1", &WEBS, &[])?;
            // Without the CNI's rules the server beyond does not know the way to a pod.
            let talks = if with_cni { talks(&cluster, Way::Tcp)? } else { through_the_node_port(&cluster)? };
            talks.iter().try_for_each(Talk::exchange)?;
            flood(&cluster, &cluster.place("node1").at(SILENT.node_port)[..1], &[0], || Ok(()))?;
            for talk in &talks {
                talk.push().with_context(|| format!("with rules of the CNI: {with_cni}"))?;
                talk.exchange()?;
            }
        }
        Ok(())
    })
}

fn through_the_node_port(cluster: &TestCluster) -> Result<Vec<Talk>> {
    let (node1, c, outside) = (cluster.place("node1"), cluster.place("c"), cluster.place("outside"));
    let doors = node1.at(FAR.node_port).into_iter().zip(c.at(PORT));
    doors.map(|(door, at)| Talk::begin(Way::Tcp, (&outside.netns, 0), door, (&c.netns, at))).collect()
}

#[test]
fn under_a_flood_nothing_leaves_under_the_client_s_own_address() -> Result<()> {
    let cluster = cluster(PodNetwork::Routed)?;
    let _servers = [Server::start(cluster.place("c"), &[PORT])?];
    let _serving = Proxy::Agent.serve(&cluster, "node1", &[FAR, SILENT], &[])?;
    let node1 = cluster.place("node1");
    let cable = Wire::tap(&cluster.place("node2").netns, "eth0")?;
    let clients: Vec<&Place> = ["flood", "outside"].into_iter().map(|name| cluster.place(name)).collect();
    let bare = |view: &View| {
        let own = clients.iter().any(|client| client.addresses().contains(&view.source));
        own && view.ports.is_some_and(|(_, to)| to == PORT)
    };
    // Some of what is asked for again is just being forgotten.
    for again in [&[500, 1000, 2000][..], &[2500, 3000], &[700, 1700, 4500]] {
        flood(&cluster, &node1.at(SILENT.node_port)[..1], again, || cable.silent(Duration::ZERO, bare))?;
        for client in &clients {
            is_served(client, node1.at(FAR.node_port), "c")?;
        }
    }
    cable.silent(MOMENT, bare)
}

//! Answers find their way back to the client also where the endpoint's own packets go another way.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use proxy_tests::netns::Netns;
use proxy_tests::pod::Place;
use proxy_tests::test_cluster::{Plan, PodNetwork, TestCluster};
use proxy_tests::wire::Wire;

use crate::common::{MOMENT, Proxy, Web, is_served, servers, soon};

const WEB: Web = Web::new(1, 30200, "b");

/// To the same pod, and to none of another node.
const LOCAL: Web = Web::new(2, 30201, "b");

/// Addresses of a load balancer that leads to the node.
fn public() -> [IpAddr; 2] {
    ["203.0.113.1", "2001:db8::1"].map(|text| text.parse().expect("an address"))
}

/// Routes through a node.
fn via(node: &Place, to: &[IpAddr]) -> String {
    to.iter().map(|address| format!("route add {address} via {}\n", node.address_like(*address))).collect()
}

/// As clouds wire pods of a second interface: what such a pod sends to the world leaves by `eth1`, whose router takes
/// nothing but that pod's own address.
fn second_interface(node: &Place, pod: &Place) -> Result<Netns> {
    let router = Netns::new("router")?;
    node.netns.join("eth1", &router, "eth0")?;
    router.ip("addr add 10.9.0.1/24 dev eth0\naddr add fd00:9::1/64 dev eth0 nodad\n")?;
    router.nft(&format!(
        "table inet strict {{
            chain prerouting {{
                type filter hook prerouting priority raw;
                ip saddr != {{ 10.9.0.0/24, {} }} drop
                ip6 saddr != {{ fd00:9::/64, fe80::/10, {} }} drop
            }}
        }}\n",
        pod.v4, pod.v6
    ))?;
    node.netns.ip("addr add 10.9.0.11/24 dev eth1\naddr add fd00:9::11/64 dev eth1 nodad\n")?;
    node.netns.ip(
        "route add default via 10.9.0.1 dev eth1 table 100\nroute add default via fd00:9::1 dev eth1 table 100\n",
    )?;
    for (family, pods, address) in [
        ("-4", TestCluster::CLUSTER_CIDRS[0], pod.v4.to_string()),
        ("-6", TestCluster::CLUSTER_CIDRS[1], pod.v6.to_string()),
    ] {
        for rule in [["900", "to", pods, "main"], ["1000", "from", &address, "100"]] {
            let [pref, which, address, table] = rule;
            node.netns
                .output("ip", &[family, "rule", "add", "pref", pref, which, address, "lookup", table])?;
        }
    }
    Ok(router)
}

/// What such a CNI does for proxies that translate after it has looked: connections from the first interface to an
/// address of the node are marked, and their answers take the routes of the node.
fn mark_connections(node: &Place) -> Result<()> {
    node.netns.nft(
        "table inet cni {
            chain prerouting {
                type filter hook prerouting priority mangle;
                iifname eth0 fib daddr type local ct mark set ct mark | 0x80
                iifname { \"v-*\", cni0 } meta mark set ct mark & 0x80
            }
        }\n",
    )?;
    ["-4", "-6"].into_iter().try_for_each(|family| {
        let rule = ["rule", "add", "pref", "800", "fwmark", "0x80/0x80", "lookup", "main"];
        node.netns.output("ip", &[&[family][..], &rule].concat()).map(drop)
    })
}

fn cluster(network: PodNetwork) -> Result<TestCluster> {
    Plan::default()
        .node("node1", &["a", "b"])
        .node("node2", &["c"])
        .client("outside")
        .client("gate")
        .network(network)
        .raise()
}

/// A client behind a router of the underlay: nodes know the way to it.
fn beyond(cluster: &TestCluster) -> Result<Place> {
    let gate = cluster.place("gate");
    let netns = Netns::new("beyond")?;
    gate.netns.sysctls(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
    gate.netns.join("eth1", &netns, "eth0")?;
    gate.netns.ip("addr add 172.20.0.1/24 dev eth1\naddr add fd00:20::1/64 dev eth1 nodad\n")?;
    netns.ip("addr add 172.20.0.9/24 dev eth0\naddr add fd00:20::9/64 dev eth0 nodad\n\
         route add default via 172.20.0.1\nroute add default via fd00:20::1\n")?;
    for node in ["node1", "node2"] {
        cluster.place(node).netns.ip(&format!(
            "route add 172.20.0.0/24 via {}\nroute add fd00:20::/64 via {}\n",
            gate.v4, gate.v6
        ))?;
    }
    Ok(Place {
        name: "beyond".into(),
        netns: netns.into(),
        v4: [172, 20, 0, 9].into(),
        v6: "fd00:20::9".parse()?,
        ..gate.clone()
    })
}

fn plays(proxy: Proxy, network: PodNetwork, marked: bool, flags: &[&str]) -> Result<()> {
    let cluster = cluster(network)?;
    let _servers = servers(&cluster, &["b"])?;
    let (node1, b) = (cluster.place("node1"), cluster.place("b"));
    let router = second_interface(node1, b)?;
    if marked {
        mark_connections(node1)?;
    }
    let beyond = beyond(&cluster)?;
    let tap = Wire::tap(&router, "eth0")?;
    let serving = proxy.serve(&cluster, "node1", &[WEB], flags)?;
    for client in [cluster.place("outside"), cluster.place("node2"), &beyond] {
        is_served(client, node1.at(WEB.node_port), "b")?;
    }
    // `a` keeps its own way.
    is_served(cluster.place("a"), node1.at(WEB.node_port), "b")?;
    is_served(cluster.place("a"), WEB.cluster_ips(), "b")?;
    if proxy == Proxy::Agent {
        // For the address of a balancer the CNI's marks do nothing: rules would send the answer the pod's way.
        serving.add(&cluster, &LOCAL, |plan| plan.external_local(None).load_balancer(&public()))?;
        let balancer = public().map(|address| SocketAddr::new(address, 80));
        let gate = cluster.place("gate");
        gate.netns.ip(&via(node1, &public()))?;
        for (client, targets) in [
            (cluster.place("outside"), node1.at(LOCAL.node_port)),
            (&beyond, node1.at(LOCAL.node_port)),
            (&beyond, balancer),
        ] {
            soon(|| is_served(client, targets, "b"))?;
        }
    }
    tap.silent(MOMENT, |view| node1.addresses().contains(&view.source))
}

#[test]
fn a_pod_with_a_route_table_of_its_own_answers_where_the_question_came_in() -> Result<()> {
    // The rules of netfilter need the CNI's help for it.
    plays(Proxy::Rules, PodNetwork::Routed, true, &[]).context("served by rules")?;
    for (network, marked) in
        [(PodNetwork::Routed, true), (PodNetwork::Routed, false), (PodNetwork::Bridged, false)]
    {
        plays(Proxy::Agent, network, marked, &[])
            .with_context(|| format!("{network:?} pods, marked: {marked}"))?;
    }
    Ok(())
}

#[test]
fn the_same_pod_answers_a_client_whose_address_is_hidden_from_it() -> Result<()> {
    for marked in [true, false] {
        plays(Proxy::Agent, PodNetwork::Routed, marked, &["--masquerade-local", "--socket-lb=off"])
            .with_context(|| format!("marked: {marked}"))?;
    }
    plays(Proxy::Agent, PodNetwork::Bridged, false, &["--masquerade-local"])
}

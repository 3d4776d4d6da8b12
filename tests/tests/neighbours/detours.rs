//! Devices that packets only pass on their way: each packet is translated once.

use anyhow::{Context, Result};
use proxy_tests::pod::Place;
use proxy_tests::test_cluster::{Plan, PodNetwork, TestCluster};

use crate::common::{PORT, Proxy, Web, is_served, servers};

/// To the pod whose packets make a detour, to one beside it, and to one of the other node.
const OWN: Web = Web::new(1, 30200, "b");
const NEAR: Web = Web::new(2, 30201, "a");
const FAR: Web = Web::new(3, 30202, "c");

fn cluster(network: PodNetwork) -> Result<TestCluster> {
    Plan::default()
        .node("node1", &["a", "b"])
        .node("node2", &["c"])
        .client_via("outside", "node1")
        .network(network)
        .raise()
}

/// Sends all that enters and all that leaves by an interface through an `ifb` of its own with a limit on its rate, as
/// the bandwidth plugin and shapers of whole nodes do.
fn detour(node: &Place, interface: &str) -> Result<()> {
    for direction in ["ingress", "egress"] {
        let ifb = format!("{}-{interface}", &direction[..2]);
        node.netns.ip(&format!("link add {ifb} type ifb\nlink set {ifb} up\n"))?;
        node.netns.tc(&format!(
            "qdisc add dev {ifb} root tbf rate 500mbit burst 1mb latency 50ms\n\
             qdisc replace dev {interface} clsact\n\
             filter add dev {interface} {direction} protocol all prio 1 u32 match u32 0 0 \
             action mirred egress redirect dev {ifb}\n"
        ))?;
    }
    Ok(())
}

/// All ways that lead to or from the pod, or past it.
fn everybody_is_served(cluster: &TestCluster) -> Result<()> {
    let node1 = cluster.place("node1");
    for web in [OWN, NEAR, FAR] {
        for client in ["a", "b", "outside"] {
            is_served(cluster.place(client), web.cluster_ips(), web.endpoint)?;
            is_served(cluster.place(client), node1.at(web.node_port), web.endpoint)?;
        }
        is_served(cluster.place("c"), node1.at(web.node_port), web.endpoint)?;
    }
    // And past every Service.
    for (client, server) in [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")] {
        is_served(cluster.place(client), cluster.place(server).at(PORT), server)?;
    }
    Ok(())
}

fn plays(proxy: Proxy, network: PodNetwork, interface: &str, flags: &[&str], first: bool) -> Result<()> {
    let cluster = cluster(network)?;
    let _servers = servers(&cluster, &["a", "b", "c"])?;
    let node1 = cluster.place("node1");
    if first {
        detour(node1, interface)?;
    }
    let _serving = proxy.serve(&cluster, "node1", &[OWN, NEAR, FAR], flags)?;
    if !first {
        everybody_is_served(&cluster).context("before the detour")?;
        detour(node1, interface)?;
    }
    everybody_is_served(&cluster)
        .with_context(|| format!("{network:?} pods, {interface}, {flags:?}, detour first: {first}"))
}

/// What rules of netfilter do for pods of one bridge depends on settings of the bridge.
const ROUTED: (Proxy, PodNetwork) = (Proxy::Rules, PodNetwork::Routed);

#[test]
fn a_pod_with_a_limited_bandwidth_is_served_and_serves_packet_by_packet() -> Result<()> {
    for (proxy, network) in [ROUTED, (Proxy::Agent, PodNetwork::Routed), (Proxy::Agent, PodNetwork::Bridged)]
    {
        plays(proxy, network, "v-b", &["--socket-lb=off"], true).with_context(|| format!("{proxy:?}"))?;
    }
    Ok(())
}

#[test]
fn a_pod_with_a_limited_bandwidth_is_served_and_serves_by_sockets() -> Result<()> {
    // Connected UDP of pods goes by packet all the same.
    for network in [PodNetwork::Routed, PodNetwork::Bridged] {
        plays(Proxy::Agent, network, "v-b", &[], true)?;
    }
    Ok(())
}

#[test]
fn a_limit_that_comes_while_the_agent_runs_changes_nothing() -> Result<()> {
    plays(Proxy::Agent, PodNetwork::Routed, "v-b", &["--socket-lb=off"], false)?;
    plays(Proxy::Agent, PodNetwork::Bridged, "v-b", &["--masquerade-local"], false)
}

#[test]
fn a_node_whose_uplink_is_shaped_serves() -> Result<()> {
    for (proxy, network) in [ROUTED, (Proxy::Agent, PodNetwork::Routed), (Proxy::Agent, PodNetwork::Bridged)]
    {
        plays(proxy, network, "eth0", &["--socket-lb=off"], true).with_context(|| format!("{proxy:?}"))?;
    }
    Ok(())
}

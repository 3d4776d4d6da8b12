//! Frames that are not for this node, though they pass it: what `ip_rcv` would not take is nobody's business here.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::manifests::ServicePlan;
use proxy_tests::netns::Netns;
use proxy_tests::packet::{Packet, TcpFlags, View};
use proxy_tests::pod::Place;
use proxy_tests::probe::Server;
use proxy_tests::test_cluster::{Plan, PodNetwork, TestCluster};
use proxy_tests::wire::{Wire, tagged};

use crate::common::{MOMENT, PORT, Proxy, Serving, WAYS, Web, answer, is_served, servers, with_either};

/// What leads to a pod of the node.
const WEB: Web = Web::new(1, 30200, "b");

fn cluster(network: PodNetwork) -> Result<TestCluster> {
    Plan::default()
        .node("node1", &["a", "b"])
        .node("node2", &["c"])
        .client("outside")
        .network(network)
        .raise()
}

/// Addresses of load balancers that somebody else holds, by what `node1` makes of them: it has an endpoint, it has
/// none, it lets nobody in.
const HELD: [[&str; 2]; 3] = [
    ["192.168.10.200", "fd00:10::200"],
    ["192.168.10.201", "fd00:10::201"],
    ["192.168.10.202", "fd00:10::202"],
];

fn ips(pair: [&str; 2]) -> [IpAddr; 2] {
    pair.map(|text| text.parse().expect("an address"))
}

fn at(pair: [&str; 2], port: u16) -> [SocketAddr; 2] {
    ips(pair).map(|address| SocketAddr::new(address, port))
}

/// Publishes the Services of these addresses to `node1`.
fn balanced(cluster: &TestCluster, serving: &Serving) -> Result<()> {
    let balancer = |n: usize| move |plan: ServicePlan| plan.load_balancer(&ips(HELD[n]));
    serving.add(cluster, &Web::new(11, 30211, "b"), balancer(0))?;
    serving.add_empty(&Web::new(12, 30212, "b"), balancer(1))?;
    let nobody = ["198.51.100.0/24", "2001:db8:ffff::/48"];
    serving.add(cluster, &Web::new(13, 30213, "b"), |plan| balancer(2)(plan).source_ranges(&nobody))?;
    serving.knows(&HELD.concat())
}

/// A place holds the addresses and answers at all of them.
fn hold(holder: &Place, interface: &str) -> Result<Vec<Server>> {
    let mut servers = Vec::new();
    for [v4, v6] in HELD {
        holder
            .netns
            .ip(&format!("addr add {v4}/32 dev {interface}\naddr add {v6}/128 dev {interface} nodad\n"))?;
        let at = Place { v4: v4.parse()?, v6: v6.parse()?, host_interface: None, ..holder.clone() };
        servers.push(Server::named(&at, "holder", &[80])?);
    }
    Ok(servers)
}

/// Has a place no longer hold the addresses, and the others forget who did.
fn release(holder: &Place, clients: &[&Place]) -> Result<()> {
    for [v4, v6] in HELD {
        holder.netns.ip(&format!("addr del {v4}/32 dev eth0\naddr del {v6}/128 dev eth0\n"))?;
    }
    for client in clients {
        for family in ["-4", "-6"] {
            client.netns.output("ip", &[family, "neigh", "flush", "all"])?;
        }
    }
    Ok(())
}

/// A client reaches the holder itself at each of the addresses, whatever the node thinks of them.
fn reaches_the_holder(client: &Place) -> Result<()> {
    for pair in HELD {
        for to in at(pair, 80) {
            for way in WAYS {
                let answer = answer(client, &way(to), "holder")?;
                ensure!(client.addresses().contains(&answer.peer.ip()), "{answer:?}");
            }
        }
    }
    Ok(())
}

/// A machine that is no part of the cluster on a device of the node, with addresses of the underlay.
fn machine(cluster: &TestCluster, label: &str, host: u8) -> Result<Place> {
    let place = cluster.place("outside");
    Ok(Place {
        name: label.into(),
        netns: Netns::new(label)?.into(),
        v4: [192, 168, 10, host].into(),
        v6: format!("fd00:10::{host}").parse()?,
        host_interface: Some(label.into()),
        ..place.clone()
    })
}

fn address(machine: &Place) -> Result<()> {
    let (v4, v6) = (machine.v4, machine.v6);
    machine
        .netns
        .ip(&format!("link set eth0 up\naddr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\n"))
}

/// Makes the node's uplink a port of a bridge that has the node's addresses, and plugs a machine into it.
fn bridged(cluster: &TestCluster) -> Result<Place> {
    let (node1, node2) = (cluster.place("node1"), cluster.place("node2"));
    let mac = node1.netns.mac("eth0")?.map(|byte| format!("{byte:02x}")).join(":");
    let (v4, v6) = (node1.v4, node1.v6);
    node1.netns.ip(&format!(
        "link add br-ex address {mac} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
         addr del {v4}/24 dev eth0\naddr del {v6}/64 dev eth0\n\
         link set eth0 master br-ex\nlink set br-ex up\n\
         addr add {v4}/24 dev br-ex\naddr add {v6}/64 dev br-ex nodad\n\
         route replace 10.244.2.0/24 via {}\nroute replace fd00:244:2::/64 via {}\n",
        node2.v4, node2.v6
    ))?;
    let vm = machine(cluster, "vm", 77)?;
    node1.netns.join("tap0", &vm.netns, "eth0")?;
    node1.netns.ip("link set tap0 master br-ex\n")?;
    address(&vm)?;
    Ok(vm)
}

/// A machine with an address of its own on the node's uplink.
fn macvlan(cluster: &TestCluster) -> Result<Place> {
    let machine = machine(cluster, "mv", 78)?;
    let node1 = &cluster.place("node1").netns;
    node1.ip(&format!(
        "link add link eth0 name mv0 type macvlan mode bridge\nlink set mv0 netns {}\n",
        machine.netns.name()
    ))?;
    machine.netns.ip("link set mv0 name eth0\n")?;
    address(&machine)?;
    Ok(machine)
}

#[test]
fn what_a_machine_on_the_node_s_bridge_sends_to_another_node_passes_untouched() -> Result<()> {
    let cluster = cluster(PodNetwork::Routed)?;
    let _servers = servers(&cluster, &["b"])?;
    let vm = bridged(&cluster)?;
    let _holding = hold(cluster.place("node2"), "eth0")?;
    reaches_the_holder(&vm).context("without a proxy")?;
    let serving = Proxy::Agent.serve(&cluster, "node1", &[WEB], &[])?;
    balanced(&cluster, &serving)?;
    let inside = Wire::tap(&cluster.place("b").netns, "eth0")?;
    reaches_the_holder(&vm)?;
    inside.silent(MOMENT, |view| vm.addresses().contains(&view.source))?;
    // What it asks of the node itself is served.
    let node1 = cluster.place("node1");
    is_served(&vm, node1.at(WEB.node_port), "b")?;
    vm.netns.ip(&format!(
        "route add 10.96.0.0/16 via {}\nroute add fd00:10:96::/112 via {}\n",
        node1.v4, node1.v6
    ))?;
    is_served(&vm, WEB.cluster_ips(), "b")?;
    is_served(cluster.place("outside"), node1.at(WEB.node_port), "b")
}

#[test]
fn what_others_send_to_a_machine_on_the_node_s_bridge_passes_untouched() -> Result<()> {
    let cluster = cluster(PodNetwork::Routed)?;
    let _servers = servers(&cluster, &["b"])?;
    let vm = bridged(&cluster)?;
    let _holding = hold(&vm, "eth0")?;
    reaches_the_holder(cluster.place("outside")).context("without a proxy")?;
    let serving = Proxy::Agent.serve(&cluster, "node1", &[WEB], &[])?;
    balanced(&cluster, &serving)?;
    reaches_the_holder(cluster.place("outside"))?;
    reaches_the_holder(cluster.place("node2"))
}

#[test]
fn what_passes_between_a_machine_above_the_uplink_and_others_is_untouched() -> Result<()> {
    let cluster = cluster(PodNetwork::Routed)?;
    let _servers = servers(&cluster, &["b"])?;
    let (above, outside, node2) = (macvlan(&cluster)?, cluster.place("outside"), cluster.place("node2"));
    let mut serving: Option<Serving> = None;
    // Without a proxy, and then with it.
    for _ in 0..2 {
        let holding = hold(&above, "eth0")?;
        reaches_the_holder(outside)
            .with_context(|| format!("from outside, served: {}", serving.is_some()))?;
        drop(holding);
        release(&above, &[outside, &above])?;
        let holding = hold(node2, "eth0")?;
        reaches_the_holder(&above).with_context(|| format!("from above, served: {}", serving.is_some()))?;
        drop(holding);
        release(node2, &[outside, &above])?;
        if serving.is_none() {
            let served = Proxy::Agent.serve(&cluster, "node1", &[WEB], &[])?;
            balanced(&cluster, &served)?;
            serving = Some(served);
        }
    }
    Ok(())
}

#[test]
fn what_a_pod_sends_to_another_pod_s_ethernet_address_passes_untouched() -> Result<()> {
    let cluster = cluster(PodNetwork::Bridged)?;
    let (a, b) = (cluster.place("a"), cluster.place("b"));
    let _holding = hold(b, "eth0")?;
    for [v4, v6] in HELD {
        a.netns.ip(&format!("route add {v4} via {}\nroute add {v6} via {}\n", b.v4, b.v6))?;
    }
    reaches_the_holder(a).context("without a proxy")?;
    let serving = Proxy::Agent.serve(&cluster, "node1", &[WEB], &["--socket-lb=off"])?;
    balanced(&cluster, &serving)?;
    reaches_the_holder(a)
}

/// What may come to the node's uplink without being for it, and what of it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frame {
    /// To the node, as it should be.
    Own,
    /// With the tag that says a priority and no network.
    Priority,
    /// To a machine that nobody knows.
    Stranger,
    /// To everybody.
    Broadcast,
    /// To a group.
    Group,
    /// Of a network that the node has no part in.
    Tagged,
}

impl Frame {
    fn dress(self, packet: &Packet, to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
        let to_ethernet = |to| packet.clone().ethernet(to, from).build();
        match self {
            Self::Own => to_ethernet(to),
            Self::Priority => tagged(&to_ethernet(to), 5, 0),
            Self::Stranger => to_ethernet([2, 0, 0, 0, 0x99, 0x99]),
            Self::Broadcast => to_ethernet([0xff; 6]),
            Self::Group => to_ethernet([0x01, 0, 0x5e, 0, 0, 0x42]),
            Self::Tagged => tagged(&to_ethernet(to), 0, 7),
        }
    }

    fn is_for_the_node(self) -> bool {
        matches!(self, Self::Own | Self::Priority)
    }
}

const FRAMES: [Frame; 6] =
    [Frame::Own, Frame::Priority, Frame::Stranger, Frame::Broadcast, Frame::Group, Frame::Tagged];

#[test]
fn a_frame_that_is_not_for_the_node_is_neither_translated_nor_answered() -> Result<()> {
    with_either(|proxy| {
        let cluster = cluster(PodNetwork::Routed)?;
        let _servers = servers(&cluster, &["b"])?;
        let (node1, outside) = (cluster.place("node1"), cluster.place("outside"));
        let serving = proxy.serve(&cluster, "node1", &[WEB], &[])?;
        if proxy == Proxy::Agent {
            balanced(&cluster, &serving)?;
        }
        // Now the neighbours know each other.
        is_served(outside, node1.at(WEB.node_port), "b")?;
        let door = node1.netns.mac("eth0")?;
        let (mut source, mut flows) = (20_000, Vec::new());
        for frame in FRAMES {
            let mut doors = vec![node1.at(WEB.node_port), WEB.cluster_ips()];
            if proxy == Proxy::Agent {
                // The first leads to an endpoint, the second to a rejection, the third nowhere.
                doors.extend(HELD.map(|pair| at(pair, 80)).into_iter().take(2));
            }
            for (number, targets) in doors.into_iter().enumerate() {
                for to in targets {
                    let (cable, inside) =
                        (Wire::tap(&outside.netns, "eth0")?, Wire::tap(&cluster.place("b").netns, "eth0")?);
                    source += 1;
                    let from = SocketAddr::new(outside.address_like(to.ip()), source);
                    for packet in [Packet::tcp(from, to, TcpFlags::SYN), Packet::udp(from, to).payload(b"x")]
                    {
                        cable.send(&frame.dress(&packet, door, cable.mac()))?;
                    }
                    let refused = number == 3;
                    // A segment to its port, or an ICMP message about it.
                    let answers = |view: &View| {
                        let ports = view.ports.is_none_or(|ports| ports == (to.port(), from.port()));
                        (view.source, view.destination) == (to.ip(), from.ip()) && ports
                    };
                    let arrives = |view: &View| view.ports.is_some_and(|(_, port)| port == PORT);
                    let what = || format!("{frame:?} from {from} to {to}");
                    flows.push((source, frame.is_for_the_node() && !refused));
                    if frame.is_for_the_node() {
                        let patience = Duration::from_secs(2);
                        ensure!(cable.next(patience, answers)?.is_some(), "no answer: {}", what());
                        ensure!(
                            refused || inside.next(patience, arrives)?.is_some(),
                            "not received: {}",
                            what()
                        );
                    } else {
                        let wait = Duration::from_millis(60);
                        inside.silent(wait, arrives).with_context(what)?;
                        cable.silent(Duration::ZERO, answers).with_context(what)?;
                    }
                }
            }
        }
        let Some(agent) = serving.agent else { return Ok(()) };
        let listed = agent.json(&["conntrack", "list", "--output", "json"])?.to_string();
        for (source, wanted) in flows {
            ensure!(
                listed.contains(&format!(":{source}\"")) == wanted,
                "port {source}: {wanted}, in {listed}"
            );
        }
        Ok(())
    })
}

#[test]
fn a_machine_that_routes_for_others_does_so_through_the_node_s_bridge() -> Result<()> {
    let cluster = cluster(PodNetwork::Routed)?;
    let _servers = servers(&cluster, &["b"])?;
    let vm = bridged(&cluster)?;
    // Another cluster has the same Service addresses, and the machine is one of its nodes.
    let [v4, v6] = WEB.cluster_ips();
    vm.netns.ip(&format!("addr add {}/32 dev eth0\naddr add {}/128 dev eth0 nodad\n", v4.ip(), v6.ip()))?;
    let (IpAddr::V4(ip4), IpAddr::V6(ip6)) = (v4.ip(), v6.ip()) else { anyhow::bail!("two families") };
    let other = Place { v4: ip4, v6: ip6, host_interface: None, ..vm.clone() };
    let _server = Server::named(&other, "other-cluster", &[80])?;
    let outside = cluster.place("outside");
    outside.netns.ip(&format!(
        "route add {} via {}\nroute add {} via {}\n",
        v4.ip(),
        vm.v4,
        v6.ip(),
        vm.v6
    ))?;
    let reaches_the_other_cluster = || is_served(outside, [v4, v6], "other-cluster");
    reaches_the_other_cluster().context("without a proxy")?;
    let _serving = Proxy::Agent.serve(&cluster, "node1", &[WEB], &[])?;
    reaches_the_other_cluster()
}

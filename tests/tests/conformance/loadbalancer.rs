//! `network/loadbalancer.go`, with a load balancer that is emulated: the client outside routes its addresses to nodes.
//!
//! Not mirrored: 610 (the finalizer is the cloud controller's).

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use proxy_tests::answer::Load;
use proxy_tests::manifests::{Phase, ServicePlan};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Runner, Server, eventually};
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, NODES, at, everywhere, expose, ip, service, vips, web, web_node_port};
use crate::http;
use crate::reach::{
    SOON, connections, datagrams, dial, dial_all, down, follows, refuses, seen_as, soon, sticks, ways,
};

const NODE_PORT: u16 = 30_080;
const HEALTH: u16 = 30_999;

/// The addresses of the load balancer.
fn ingress() -> [IpAddr; 2] {
    [ip("203.0.113.10"), ip("2001:db8::10")]
}

fn door() -> [SocketAddr; 2] {
    at(ingress(), 80)
}

/// A Service of type LoadBalancer with NodePorts.
fn plan() -> ServicePlan {
    web_node_port("lb", 1, NODE_PORT).load_balancer(&ingress())
}

/// The load balancer, played by the client's own rules: it picks a node for each connection and keeps to it, whatever
/// becomes of the choice meanwhile.
struct Balancer<'a> {
    cluster: &'a Cluster,
}

/// Makes the balancer, which sends to these nodes.
fn balance<'a>(cluster: &'a Cluster, nodes: &[&str]) -> Result<Balancer<'a>> {
    let outside = &cluster.place("outside").netns;
    outside.sysctls(&[
        // It knows its nodes, and does not let one of them send it elsewhere.
        ("ipv4/conf/all/accept_redirects", "0"),
        ("ipv4/conf/eth0/accept_redirects", "0"),
        ("ipv6/conf/eth0/accept_redirects", "0"),
    ])?;
    // A connection's mark is the number of its node, and of the table that leads there. Before it has one, it is looked
    // up in the main table.
    for (number, node) in (1..).zip(NODES) {
        let place = cluster.place(node);
        let number = number.to_string();
        for (door, hop) in ingress().into_iter().zip([IpAddr::from(place.v4), place.v6.into()]) {
            outside.ip(&format!(
                "route add {door} via {hop} dev eth0 table {number}\nroute replace {door} via {hop} dev eth0\n"
            ))?;
            let family = if door.is_ipv4() { "-4" } else { "-6" };
            outside.output("ip", &[family, "rule", "add", "fwmark", &number, "table", &number])?;
        }
    }
    let balancer = Balancer { cluster };
    balancer.send_to(nodes)?;
    Ok(balancer)
}

impl Balancer<'_> {
    /// New connections go to these nodes from now on.
    fn send_to(&self, nodes: &[&str]) -> Result<()> {
        let numbers = (1..).zip(NODES).filter(|(_, node)| nodes.contains(node)).map(|(number, _)| number);
        let picks: Vec<String> =
            numbers.enumerate().map(|(n, number): (_, u32)| format!("{n} : {number}")).collect();
        let [v4, v6] = ingress();
        self.cluster.place("outside").netns.nft(&format!(
            "table inet balancer\n\
             delete table inet balancer\n\
             table inet balancer {{\n\
                chain pick {{\n\
                    ct mark 0 ct mark set numgen random mod {} map {{ {} }}\n\
                    meta mark set ct mark\n\
                }}\n\
                chain output {{\n\
                    type route hook output priority mangle\n\
                    ip daddr {v4} jump pick\n\
                    ip6 daddr {v6} jump pick\n\
                }}\n\
             }}\n",
            picks.len(),
            picks.join(", ")
        ))
    }
}

/// What the health check of a node says to who asks at its internal address: whether to send traffic there.
fn healthy(client: &Place, node: &Place) -> Result<bool> {
    let mut said = Vec::new();
    for to in node.at(HEALTH) {
        let response = http::get(client, to, "/healthz")?;
        said.push(match response.split(' ').nth(1) {
            Some("200") => true,
            Some("503") => false,
            _ => anyhow::bail!("{to} says {response}"),
        });
    }
    ensure!(said[0] == said[1], "the families differ: {said:?}");
    Ok(said[0])
}

/// Waits until exactly these nodes are healthy, asked from a pod of another.
fn until_healthy(cluster: &Cluster, wanted: &[&str]) -> Result<()> {
    soon(|| {
        for node in NODES {
            let healthy = healthy(cluster.place("b"), cluster.place(node))?;
            ensure!(healthy == wanted.contains(&node), "{node} is healthy: {healthy}, wanted: {wanted:?}");
        }
        Ok(())
    })
}

#[test]
fn should_only_allow_access_from_service_loadbalancer_source_ranges() -> Result<()> {
    // loadbalancer.go:422; V-14…V-19
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    let _servers = cluster.serve(&["e"])?;
    cluster.expose(&plan(), &["e"])?;
    balance(&cluster, &["node1"])?;
    let [accepted, dropped, outside] = cluster.places(["a", "c", "outside"]);
    let open = |client: &Place| soon(|| dial_all(client, door(), &["e"]));
    for client in [accepted, dropped, outside] {
        open(client)?;
    }
    let one = accepted.addresses().map(|own| format!("{own}/{}", if own.is_ipv4() { 32 } else { 128 }));
    cluster.apply(plan().source_ranges(&one.each_ref().map(String::as_str)));
    down([dropped, outside], door())?;
    open(accepted)?;
    cluster.apply(plan().source_ranges(&["0.0.0.0/0", "::/0"]));
    for client in [accepted, dropped, outside] {
        open(client)?;
    }
    // Nobody has these.
    cluster.apply(plan().source_ranges(&["192.0.2.1/32", "2001:db8:ffff::1/128"]));
    down([accepted, dropped, outside], door())?;
    cluster.apply(plan());
    for client in [accepted, dropped, outside] {
        open(client)?;
    }
    Ok(())
}

/// One or many endpoints for a client outside, as affinity is switched.
fn affinity(network: PodNetwork, local: bool, switch: bool) -> Result<()> {
    let cluster = Cluster::raise(network)?;
    let pods = ["a", "b", "c"];
    let _servers = cluster.serve(&pods)?;
    let base = || if local { plan().external_local(Some(HEALTH)) } else { plan() };
    cluster.expose(&base().affinity(10_800), &pods)?;
    balance(&cluster, &["node1"])?;
    let expect = |wanted: bool| {
        ways(door()).iter().try_for_each(|ask| {
            soon(|| {
                let sticky = sticks(cluster.place("outside"), ask)?.is_some();
                ensure!(sticky == wanted, "{ask:?}: sticky is {sticky}");
                Ok(())
            })
        })
    };
    expect(true)?;
    if switch {
        cluster.apply(base());
        expect(false)?;
        cluster.apply(base().affinity(10_800));
        expect(true)?;
    }
    Ok(())
}

#[test]
fn should_have_session_affinity_work_for_load_balancer_service_with_local_traffic_policy() -> Result<()> {
    // loadbalancer.go:565
    affinity(PodNetwork::Bridged, true, false)
}

#[test]
fn should_be_able_to_switch_session_affinity_for_load_balancer_service_with_local_traffic_policy()
-> Result<()> {
    // loadbalancer.go:575; A-9
    affinity(PodNetwork::Routed, true, true)
}

#[test]
fn should_have_session_affinity_work_for_load_balancer_service_with_cluster_traffic_policy() -> Result<()> {
    // loadbalancer.go:585
    affinity(PodNetwork::Overlay, false, false)
}

#[test]
fn should_be_able_to_switch_session_affinity_for_load_balancer_service_with_cluster_traffic_policy()
-> Result<()> {
    // loadbalancer.go:595; A-9
    affinity(PodNetwork::Bridged, false, true)
}

/// A client outside with a fixed port goes on while the server pod `c` on `node2` is deleted and another made.
fn cycles(network: PodNetwork, node: &str) -> Result<()> {
    let mut cluster = Cluster::raise(network)?;
    balance(&cluster, &["node1"])?;
    let Cluster { api, test_cluster, .. } = &mut cluster;
    let mut endpoints = expose(api, test_cluster, &plan(), &["c"])?;
    let server = Server::start(test_cluster.place("c"), &[8080])?;
    let mut clients = door()
        .into_iter()
        .map(|to| datagrams(test_cluster.place("outside"), to, 12_345))
        .collect::<Result<Vec<_>>>()?;
    let mut follow = |server| clients.iter_mut().try_for_each(|client| follows(client, server));
    follow("c")?;
    let new = test_cluster.add_pod(node, "new")?;
    let _next = Server::start(&new, &[8080])?;
    endpoints.set(&new, Phase::Ready)?;
    drop(server);
    test_cluster.remove_pod("c")?;
    endpoints.remove("c")?;
    follow("new")
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_on_different_nodes() -> Result<()> {
    // loadbalancer.go:707; C-4…C-13
    cycles(PodNetwork::Overlay, "node3")
}

#[test]
fn should_be_able_to_preserve_udp_traffic_when_server_pod_cycles_on_the_same_nodes() -> Result<()> {
    // loadbalancer.go:841; C-4…C-13
    cycles(PodNetwork::Bridged, "node2")
}

/// A DaemonSet's rolling update under load: on one node after the other the pod ends while it serves on, and then a new
/// one takes its place. The load balancer asks the nodes' health, and sends where it is good.
fn rolling_update(network: PodNetwork, plan: &ServicePlan, local: bool) -> Result<()> {
    let cluster = Cluster::raise(network)?;
    let (old, new) = (["a", "c", "e"], ["b", "d", "f"]);
    let mut servers: Vec<Option<Server>> = cluster.serve(&old)?.into_iter().map(Some).collect();
    let mut endpoints = cluster.expose(plan, &old)?;
    let balancer = balance(&cluster, &NODES)?;
    let rebalance = |wanted: &[&str]| -> Result<()> {
        if local {
            until_healthy(&cluster, wanted)?;
            balancer.send_to(wanted)?;
        }
        Ok(())
    };
    rebalance(&NODES)?;
    let outside = cluster.place("outside");
    soon(|| dial_all(outside, door(), &old))?;
    let mut loads = door().into_iter().map(|to| connections(outside, to)).collect::<Result<Vec<_>>>()?;
    // There and back: two updates.
    for (before, after) in [(old, new), (new, old)] {
        for (n, (going, coming)) in before.into_iter().zip(after).enumerate() {
            endpoints.set(cluster.place(going), Phase::Terminating)?;
            // The node still serves those whom the balancer has not yet sent elsewhere.
            answered(&mut loads, 10)?;
            let others: Vec<&str> = NODES.into_iter().filter(|node| *node != NODES[n]).collect();
            rebalance(&others)?;
            let ended = servers[n].take();
            servers[n] = Some(Server::start(cluster.place(coming), &[8080])?);
            endpoints.set(cluster.place(coming), Phase::Ready)?;
            rebalance(&NODES)?;
            // Within its grace the old pod has served until everybody has observed the new one.
            without(&mut loads, going)?;
            drop(ended);
            endpoints.remove(going)?;
            answered(&mut loads, 10)?;
        }
    }
    for load in loads {
        let load = load.stop()?;
        // Upstream is content with 95 of 100; here nobody needs to notice.
        ensure!(load.failed == 0, "{load:?}");
        ensure!(load.names.len() == 6, "not every pod has answered: {load:?}");
    }
    Ok(())
}

/// Waits until each load has been answered this many times more.
fn answered(loads: &mut [Runner<Load>], times: u64) -> Result<()> {
    for load in loads {
        let before = load.report()?.made;
        soon(|| {
            let now = load.report()?;
            ensure!(now.made >= before + times, "{now:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Waits until ten answers in a row are not this pod's.
fn without(loads: &mut [Runner<Load>], pod: &str) -> Result<()> {
    for load in loads {
        soon(|| {
            let before = load.report()?;
            let after = eventually(SOON, || {
                let now = load.report()?;
                ensure!(now.made >= before.made + 10, "{now:?}");
                Ok(now)
            })?;
            ensure!(before.names.get(pod) == after.names.get(pod), "{pod} still answers: {after:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn should_not_have_connectivity_disruption_during_rolling_update_with_external_traffic_policy_cluster()
-> Result<()> {
    // loadbalancer.go:975; C-3, P-4
    rolling_update(PodNetwork::Overlay, &plan(), false)
}

#[test]
fn should_not_have_connectivity_disruption_during_rolling_update_with_external_traffic_policy_local()
-> Result<()> {
    // loadbalancer.go:984; P-6, H-20
    rolling_update(PodNetwork::Bridged, &plan().external_local(Some(HEALTH)), true)
}

#[test]
fn should_work_for_type_load_balancer() -> Result<()> {
    // loadbalancer.go:1016; V-26, H-18
    everywhere(|cluster| {
        let _servers = cluster.serve(&["c"])?;
        cluster.expose(&plan().external_local(Some(HEALTH)), &["c"])?;
        balance(cluster, &["node2"])?;
        let outside = cluster.place("outside");
        soon(|| seen_as(outside, door(), outside.addresses()))?;
        until_healthy(cluster, &["node2"])?;
        cluster.apply(web("lb", 1));
        for to in NODES.into_iter().flat_map(|node| cluster.place(node).at(HEALTH)) {
            soon(|| {
                let response = http::try_get(outside, to, "/healthz")?;
                ensure!(response.is_none(), "{to} still answers: {response:?}");
                Ok(())
            })?;
        }
        down([outside], door())
    })
}

#[test]
fn should_only_target_nodes_with_endpoints() -> Result<()> {
    // loadbalancer.go:1081; H-20, H-24
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    let pods = ["a", "c", "e"];
    let _servers = cluster.serve(&pods)?;
    let mut endpoints = cluster.expose(&plan().external_local(Some(HEALTH)), &[])?;
    let outside = cluster.place("outside");
    until_healthy(&cluster, &[])?;
    let balancer = balance(&cluster, &NODES)?;
    for (n, pod) in pods.into_iter().enumerate() {
        endpoints.replace(&[cluster.place(pod)])?;
        until_healthy(&cluster, &[NODES[n]])?;
        balancer.send_to(&[NODES[n]])?;
        soon(|| dial_all(outside, door(), &[pod]))?;
        balancer.send_to(&[NODES[(n + 1) % 3]])?;
        down([outside], door())?;
    }
    Ok(())
}

#[test]
fn should_target_all_nodes_with_endpoints() -> Result<()> {
    // loadbalancer.go:1174; V-26
    let cluster = Cluster::raise(PodNetwork::RoutedOverlay)?;
    let _servers = cluster.serve(&["a", "c"])?;
    cluster.expose(&plan().external_local(Some(HEALTH)), &["a", "c"])?;
    until_healthy(&cluster, &["node1", "node2"])?;
    balance(&cluster, &["node1", "node2"])?;
    soon(|| dial_all(cluster.place("outside"), door(), &["a", "c"]))
}

#[test]
fn should_work_from_pods() -> Result<()> {
    // loadbalancer.go:1221; V-24
    everywhere(|cluster| {
        let _servers = cluster.serve(&["c"])?;
        cluster.expose(&plan().external_local(Some(HEALTH)), &["c"])?;
        // Of the endpoint's node, and of others.
        for client in cluster.places(["d", "a", "e"]) {
            soon(|| seen_as(client, door(), client.addresses()))?;
        }
        Ok(())
    })
}

/// ClusterIP, NodePort, LoadBalancer, another NodePort, another port, no endpoint, one again, ClusterIP.
fn changes_type_and_ports(network: PodNetwork, protocol: &str) -> Result<()> {
    let cluster = Cluster::raise(network)?;
    let _servers = cluster.serve(&["c"])?;
    balance(&cluster, &["node1"])?;
    let (pod, outside) = (cluster.place("a"), cluster.place("outside"));
    let way = if protocol == "TCP" { Ask::tcp } else { Ask::udp };
    let works = |client: &Place, targets: [SocketAddr; 2]| {
        targets.into_iter().try_for_each(|to| soon(|| dial(client, &way(to), &["c"])))
    };
    let port = |port: u16| ServicePlan::new("mutability-test", &vips(1)).port("", protocol, port, 8080);
    let node = |number: u16| cluster.place("node2").at(number);
    let mut endpoints = cluster.expose(&port(80), &["c"])?;
    works(pod, service(1))?;
    cluster.apply(port(80).node_port(NODE_PORT));
    works(pod, service(1))?;
    works(outside, node(NODE_PORT))?;
    cluster.apply(port(80).node_port(NODE_PORT).load_balancer(&ingress()));
    works(outside, node(NODE_PORT))?;
    works(outside, door())?;
    cluster.apply(port(80).node_port(NODE_PORT + 1).load_balancer(&ingress()));
    works(outside, node(NODE_PORT + 1))?;
    down([outside], node(NODE_PORT))?;
    works(outside, door())?;
    cluster.apply(port(81).node_port(NODE_PORT + 1).load_balancer(&ingress()));
    works(outside, at(ingress(), 81))?;
    works(pod, at(vips(1), 81))?;
    works(outside, node(NODE_PORT + 1))?;
    endpoints.remove("c")?;
    for to in at(ingress(), 81).into_iter().chain(node(NODE_PORT + 1)) {
        soon(|| refuses(outside, &way(to)))?;
    }
    endpoints.set(cluster.place("c"), Phase::Ready)?;
    works(outside, at(ingress(), 81))?;
    works(outside, node(NODE_PORT + 1))?;
    cluster.apply(port(81));
    works(pod, at(vips(1), 81))?;
    down([outside], node(NODE_PORT + 1))?;
    down([outside], at(ingress(), 81))
}

#[test]
fn should_be_able_to_change_the_type_and_ports_of_a_tcp_service() -> Result<()> {
    // loadbalancer.go:132; S-24, P-14
    changes_type_and_ports(PodNetwork::Routed, "TCP")
}

#[test]
fn should_be_able_to_change_the_type_and_ports_of_a_udp_service() -> Result<()> {
    // loadbalancer.go:270; S-24, C-4
    changes_type_and_ports(PodNetwork::Overlay, "UDP")
}

#[test]
fn should_be_able_to_create_load_balancer_service_without_node_port_and_change_it() -> Result<()> {
    // loadbalancer.go:642; V-13
    let cluster = Cluster::raise(PodNetwork::Bridged)?;
    let _servers = cluster.serve(&["c"])?;
    balance(&cluster, &["node1"])?;
    let outside = cluster.place("outside");
    cluster.expose(&web("lb", 1).load_balancer(&ingress()), &["c"])?;
    soon(|| dial_all(outside, door(), &["c"]))?;
    cluster.apply(plan());
    soon(|| dial_all(outside, cluster.place("node3").at(NODE_PORT), &["c"]))?;
    soon(|| dial_all(outside, door(), &["c"]))
}

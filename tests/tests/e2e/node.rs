//! The rest of the node: more addresses and devices than one, and what is not a Service's.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use proxy_tests::manifests::{ManifestDir, ServicePlan};
use proxy_tests::object::{Object, Publish};
use proxy_tests::probe::{Ask, Server, get, request};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};
use serde_json::Value;

use crate::common::{ip, manifests, vips};
use crate::scene::{agent, answers, at, in_network, is_served, seen_as, servers, service, soon};

#[test]
fn masqueraded_flows_leave_under_the_address_that_the_route_prefers() -> Result<()> {
    // M-13 with a first address that the other node has no way back to, and an IPv6 address newer than the one it
    // knows; followed when routes change.
    in_network(PodNetwork::Routed, |cluster| {
        let node1 = cluster.place("node1").clone();
        let (v4, v6) = (node1.v4, node1.v6);
        node1.netns.ip(&format!(
            "addr del {v4}/24 dev eth0\n\
             addr add 203.0.113.11/24 dev eth0\n\
             addr add {v4}/24 dev eth0\n\
             addr add 2001:db8:7::11/64 dev eth0 nodad\n\
             route add 10.244.2.0/24 via 192.168.10.12\n"
        ))?;
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c", "h2"])?;
        service(&dir, &cluster, ("remote", 1, 30001), &["c"], |plan| plan)?;
        service(&dir, &cluster, ("host", 2, 30002), &["h2"], |plan| plan)?;
        let agent = agent(&cluster, "node1", &dir, &[])?;
        for (port, server) in [(30001, "c"), (30002, "h2")] {
            answers(cluster.place("outside"), node1.at(port), server, |answer| {
                seen_as(answer, [v4.into(), v6.into()])
            })?;
        }
        // A route that asks for another address is followed.
        let other = [ip("192.168.10.77"), ip("fd00:10::77")];
        let [v4, v6] = other;
        node1.netns.ip(&format!(
            "addr add {v4}/24 dev eth0\n\
             addr add {v6}/64 dev eth0 nodad\n\
             route replace 10.244.2.0/24 via 192.168.10.12 src {v4}\n\
             route replace fd00:244:2::/64 via fd00:10::2 src {v6}\n"
        ))?;
        soon(|| answers(cluster.place("outside"), node1.at(30001), "c", |answer| seen_as(answer, other)))?;
        drop(agent);
        Ok(())
    })
}

#[test]
fn flows_that_leave_by_a_second_interface_bear_its_address_or_a_borrowed_one() -> Result<()> {
    // M-13: the other node's pods are behind a second link, with addresses and without.
    in_network(PodNetwork::Routed, |cluster| {
        let (node1, node2) = (cluster.place("node1").clone(), cluster.place("node2").clone());
        let peer = node2.netns.name();
        node1
            .netns
            .ip(&format!("link add eth1 type veth peer name eth1 netns {peer}\nlink set eth1 up\n"))?;
        node2.netns.ip("link set eth1 up\n\
             addr add 172.31.0.2/24 dev eth1\n\
             addr add fd00:31::2/64 dev eth1 nodad\n\
             route add 192.168.10.11/32 dev eth1\n\
             route add fd00:10::1/128 dev eth1\n")?;
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        service(&dir, &cluster, ("remote", 1, 30001), &["c"], |plan| plan)?;
        let _agent = agent(&cluster, "node1", &dir, &[])?;
        node1.netns.ip("route replace 10.244.2.0/24 via 172.31.0.2 dev eth1 onlink\n\
             route replace fd00:244:2::/64 via fd00:31::2 dev eth1 onlink\n")?;
        // Without an address it borrows one, as the kernel would: the first, and the one most like the destination.
        let borrowed = [node1.v4.into(), ip("fd00:244:1::1")];
        soon(|| answers(cluster.place("outside"), node1.at(30001), "c", |answer| seen_as(answer, borrowed)))?;
        node1.netns.ip("addr add 172.31.0.1/24 dev eth1\naddr add fd00:31::1/64 dev eth1 nodad\n")?;
        let own = ["172.31.0.1", "fd00:31::1"].map(ip);
        soon(|| answers(cluster.place("outside"), node1.at(30001), "c", |answer| seen_as(answer, own)))
    })
}

#[test]
fn an_uplink_may_be_a_port_of_a_bridge_or_carry_a_macvlan() -> Result<()> {
    // A packet is translated once, at whichever of the two devices.
    for own_mac in [true, false] {
        in_network(PodNetwork::Routed, |cluster| {
            let node1 = cluster.place("node1").clone();
            let (v4, v6) = (node1.v4, node1.v6);
            let upper = if own_mac {
                "link add up0 address 02:00:00:00:77:01 type bridge stp_state 0 forward_delay 0\n\
                 link set eth0 master up0\n"
            } else {
                "link add up0 link eth0 type macvlan mode bridge\n"
            };
            node1.netns.ip(&format!(
                "addr flush dev eth0\n{upper}link set up0 up\n\
                 addr add {v4}/24 dev up0\naddr add {v6}/64 dev up0 nodad\n\
                 route replace 10.244.2.0/24 via 192.168.10.12 dev up0\n\
                 route del fd00:244:2::/64\nroute add fd00:244:2::/64 via fd00:10::2 dev up0\n"
            ))?;
            // The others learn the new link address.
            for other in ["outside", "node2"] {
                cluster.place(other).netns.ip("neigh flush dev eth0\n")?;
            }
            let dir = manifests()?;
            let _servers = servers(&cluster, &["b", "c"])?;
            for (name, n, port, pod) in [("near", 1, 30001, "b"), ("far", 2, 30002, "c")] {
                service(&dir, &cluster, (name, n, port), &[pod], |plan| plan)?;
            }
            let _agent = agent(&cluster, "node1", &dir, &["--socket-lb", "off"])?;
            for (n, port, pod) in [(1, 30001, "b"), (2, 30002, "c")] {
                is_served(cluster.place("outside"), node1.at(port), pod)?;
                is_served(cluster.place("outside"), at(vips(n), 80), pod)?;
                is_served(cluster.place("a"), at(vips(n), 80), pod)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_device_that_packets_are_only_queued_at_takes_no_part() -> Result<()> {
    // The bandwidth plugin: what leaves the pod is redirected through an ifb: NodePort, hairpin, connected UDP.
    for network in [PodNetwork::Routed, PodNetwork::Bridged] {
        in_network(network, |cluster| {
            let dir = manifests()?;
            let _servers = servers(&cluster, &["b"])?;
            service(&dir, &cluster, ("web", 1, 30001), &["b"], |plan| plan)?;
            let node1 = cluster.place("node1");
            node1.netns.ip("link add ifb7 type ifb\nlink set ifb7 up\n")?;
            for pod in ["a", "b"] {
                let interface = cluster.place(pod).host_interface.clone().context("a pod's interface")?;
                redirect(&cluster, &interface, "ifb7")?;
            }
            for flags in [&[][..], &["--socket-lb", "off"]] {
                let agent = agent(&cluster, "node1", &dir, flags)?;
                ensure!(!carries(&cluster, &agent.status_json()?, "ifb7")?, "the ifb carries programs");
                is_served(cluster.place("outside"), node1.at(30001), "b")?;
                for client in ["a", "b"] {
                    is_served(cluster.place(client), at(vips(1), 80), "b")?;
                    is_served(cluster.place(client), node1.at(30001), "b")?;
                }
            }
            let seen = node1.netns.output("tc", &["-s", "qdisc", "show", "dev", "ifb7"])?;
            let passed = seen.split_whitespace().skip_while(|word| *word != "Sent").nth(1);
            ensure!(passed.is_some_and(|bytes| bytes != "0"), "nothing passed the ifb: {seen}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Sends what a pod sends through a device of its own, as the bandwidth plugin does.
fn redirect(cluster: &TestCluster, interface: &str, through: &str) -> Result<()> {
    let netns = &cluster.place("node1").netns;
    netns.output(
        "tc",
        &[
            "qdisc", "replace", "dev", through, "root", "tbf", "rate", "1gbit", "burst", "1mb", "latency",
            "100ms",
        ],
    )?;
    netns.output("tc", &["qdisc", "add", "dev", interface, "ingress"])?;
    let filter =
        "filter add dev {} parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev";
    let words: Vec<&str> =
        filter.split(' ').map(|word| if word == "{}" { interface } else { word }).collect();
    netns.output("tc", &[&words[..], &[through]].concat()).map(drop)
}

/// Whether a program is attached to an interface of `node1`.
fn carries(cluster: &TestCluster, status: &Value, interface: &str) -> Result<bool> {
    let shown = cluster.place("node1").netns.output("ip", &["-o", "link", "show", "dev", interface])?;
    let index = shown.split(':').next().context("an index")?;
    let links = status["links"].as_array().context("links")?;
    let of = |link: &Value| link["name"].as_str().is_some_and(|name| name.contains(&format!("_{index}_")));
    Ok(links.iter().any(of))
}

#[test]
fn what_belongs_to_the_node_or_its_pods_is_not_a_services() -> Result<()> {
    // A ClusterIP that is the node's or a pod's address, and a NodePort that is the agent's.
    in_network(PodNetwork::Bridged, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["a", "b", "c"])?;
        let (node1, outside) = (cluster.place("node1").clone(), cluster.place("outside"));
        let _host = Server::start(&node1, &[8081])?;
        service(&dir, &cluster, ("others", 9, 30009), &["a", "b", "c"], |plan| plan)?;
        for (name, address, n) in [
            ("node", node1.addresses(), 1_u8),
            ("near", cluster.place("a").addresses(), 2),
            ("far", cluster.place("c").addresses(), 3),
        ] {
            publish_own(&dir, name, &address, n)?;
        }
        let agent = agent(&cluster, "node1", &dir, &["--healthz-bind-address", "0.0.0.0:10256"])?;
        // Nothing is refused or dropped at these addresses, though the Services have neither endpoint nor such ports.
        is_served(outside, node1.at(8081), "node1")?;
        is_served(cluster.place("b"), node1.at(8081), "node1")?;
        node1.at(30009).into_iter().try_for_each(|to| get(outside, &Ask::tcp(to)).map(drop))?;
        for (client, server) in [("b", "a"), ("a", "c"), ("node1", "a"), ("node1", "c"), ("outside", "a")] {
            is_served(cluster.place(client), cluster.place(server).at(8080), server)?;
        }
        let said = agent.status_json()?["object_warnings"].to_string();
        for part in
            ["Service default/node", "Service default/near", "Service default/far", "is not served, because"]
        {
            ensure!(said.contains(part), "{part} is not in {said}");
        }
        // The health port: plain HTTP answers where the Service would reject.
        let asked = request(outside, &Ask::tcp(node1.at(10256)[0]))?;
        ensure!(asked.failure.as_deref() != Some("connect ECONNREFUSED"), "{asked:?}");
        Ok(())
    })
}

/// A Service of port 80 at these ClusterIPs, with a NodePort at the agent's health port and without endpoints.
fn publish_own(dir: &ManifestDir, name: &str, addresses: &[IpAddr; 2], n: u8) -> Result<()> {
    let mut plan = ServicePlan::new(name, addresses).port("tcp", "TCP", 80, 8080);
    if n == 1 {
        plan = plan.node_port(10256);
    }
    dir.publish(&Object::from(&plan.build()))
}

#[test]
fn a_cache_on_the_node_keeps_its_queries_and_the_service_takes_over_when_it_goes() -> Result<()> {
    // NodeLocal DNSCache, here with a veth of its device's name where the kernel has no dummy devices.
    for flags in [&[][..], &["--socket-lb", "off"]] {
        in_network(PodNetwork::Routed, |cluster| {
            let dir = manifests()?;
            let _servers = servers(&cluster, &["c"])?;
            service(&dir, &cluster, ("dns", 1, 0), &["c"], |plan| plan)?;
            let agent = agent(&cluster, "node1", &dir, flags)?;
            let (node1, targets) = (cluster.place("node1").clone(), at(vips(1), 80));
            let mut clients = vec!["a", "b"];
            if flags.is_empty() {
                clients.push("h1"); // Without sockets the host's own packets pass no hook.
            }
            let all_by = |server: &str| {
                clients.iter().try_for_each(|client| is_served(cluster.place(client), targets, server))
            };
            all_by("c")?;
            let [v4, v6] = vips(1);
            let kind = |kind: &str| {
                node1.netns.ip(&format!(
                    "link add nodelocaldns type {kind}\naddr add {v4}/32 dev nodelocaldns\n\
                     addr add {v6}/128 dev nodelocaldns nodad\nlink set nodelocaldns up\n"
                ))
            };
            kind("dummy").or_else(|_| kind("veth peer name cache-end"))?;
            let mut cache = node1.clone();
            (cache.name, cache.v4, cache.v6) =
                ("cache".into(), v4.to_string().parse()?, v6.to_string().parse()?);
            let server = Server::start(&cache, &[80])?;
            soon(|| all_by("cache"))?;
            let status = agent.status_json()?;
            ensure!(
                status["healthy"] == true && status["object_warnings"].as_array().is_some_and(Vec::is_empty),
                "{status}"
            );
            ensure!(status["notes"].to_string().contains("nodelocaldns"), "{status}");
            // Its upstream queries are for another Service; others are as before.
            drop(server);
            node1.netns.ip("link del nodelocaldns\n")?;
            soon(|| all_by("c"))?;
            ensure!(agent.status_json()?["notes"].as_array().is_some_and(Vec::is_empty));
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn node_ports_outside_the_usual_range_and_a_wide_port_range_of_the_host_leave_ports_to_masquerade_with()
-> Result<()> {
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        service(&dir, &cluster, ("web", 1, 20001), &["c"], |plan| plan)?;
        let node1 = cluster.place("node1");
        node1.netns.sysctls(&[
            ("ipv4/ip_local_port_range", "1024 65535"),
            ("ipv4/ip_local_reserved_ports", "1024-19999,20500-65000"),
        ])?;
        let agent = agent(&cluster, "node1", &dir, &[])?;
        for _ in 0..20 {
            let answer = get(cluster.place("outside"), &Ask::tcp(node1.at(20001)[0]))?;
            let port = answer.peer.port();
            ensure!((20_002..20_500).contains(&port) || port == 20_000 || port > 65_000, "from port {port}");
        }
        is_served(cluster.place("outside"), node1.at(20001), "c")?;
        drop(agent);
        Ok(())
    })
}

//! Under which address of the node a masqueraded client comes to its endpoint.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use proxy_tests::manifests::node;
use proxy_tests::object::Object;
use proxy_tests::pod::Place;
use proxy_tests::test_cluster::{Plan, TestCluster};

use crate::common::{Proxy, Web, is_served_as, servers, soon, with_either};

/// A pod of the other node, reached through it, and a process of the other node itself.
const WEBS: [Web; 2] = [Web::new(1, 30200, "c"), Web::new(2, 30201, "h2")];
/// What the nodes' own subnets do not know the way to.
const FOREIGN: [&str; 2] = ["203.0.113.11", "2001:db8:1::11"];

fn cluster() -> Result<TestCluster> {
    Plan::default().node("node1", &["a"]).node("node2", &["c"]).host_pod("h2").client("outside").raise()
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Gives an interface of the node these addresses in this order, whatever it had, and the way to the other pods.
fn readdress(node: &Place, interface: &str, addresses: &[String], via: [IpAddr; 2]) -> Result<()> {
    let mut batch = String::new();
    for family in ["-4", "-6"] {
        node.netns.output("ip", &[family, "addr", "flush", "dev", interface, "scope", "global"])?;
    }
    for address in addresses {
        let nodad = if address.contains(':') { " nodad" } else { "" };
        batch.push_str(&format!("addr add {address} dev {interface}{nodad}\n"));
    }
    let [v4, v6] = via;
    batch
        .push_str(&format!("route replace 10.244.2.0/24 via {v4}\nroute replace fd00:244:2::/64 via {v6}\n"));
    node.netns.ip(&batch)
}

fn sees_the_client_as(cluster: &TestCluster, seen: [IpAddr; 2]) -> Result<()> {
    for web in WEBS {
        let to = cluster.place("node1").at(web.node_port);
        is_served_as(cluster.place("outside"), to, web.endpoint, seen)?;
    }
    Ok(())
}

#[test]
fn of_several_addresses_that_of_the_next_hop_s_subnet_is_used_whatever_their_order() -> Result<()> {
    with_either(|proxy| {
        for foreign_first in [true, false] {
            let cluster = cluster()?;
            let _servers = servers(&cluster, &["c", "h2"])?;
            let node1 = cluster.place("node1");
            let own = [format!("{}/24", node1.v4), format!("{}/64", node1.v6)];
            let foreign = [format!("{}/24", FOREIGN[0]), format!("{}/64", FOREIGN[1])];
            let order = if foreign_first { [foreign, own].concat() } else { [own, foreign].concat() };
            readdress(node1, "eth0", &order, cluster.place("node2").addresses())?;
            let _serving = proxy.serve(&cluster, "node1", &WEBS, &[])?;
            sees_the_client_as(&cluster, node1.addresses()).with_context(|| format!("{order:?}"))?;
        }
        Ok(())
    })
}

#[test]
fn an_address_that_comes_later_is_not_used_for_endpoints_that_do_not_know_it() -> Result<()> {
    with_either(|proxy| {
        let cluster = cluster()?;
        let _servers = servers(&cluster, &["c", "h2"])?;
        let node1 = cluster.place("node1");
        let _serving = proxy.serve(&cluster, "node1", &WEBS, &[])?;
        sees_the_client_as(&cluster, node1.addresses())?;
        node1.netns.ip(&format!(
            "addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n",
            FOREIGN[0], FOREIGN[1]
        ))?;
        for _ in 0..5 {
            sees_the_client_as(&cluster, node1.addresses())?;
        }
        Ok(())
    })
}

#[test]
fn another_interface_has_several_addresses_too() -> Result<()> {
    with_either(|proxy| {
        for foreign_first in [true, false] {
            let cluster = cluster()?;
            let _servers = servers(&cluster, &["c", "h2"])?;
            let (node1, node2) = (cluster.place("node1"), cluster.place("node2"));
            node1.netns.join("eth1", &node2.netns, "eth1")?;
            node2.netns.ip("addr add 10.9.0.12/24 dev eth1\naddr add fd00:9::12/64 dev eth1 nodad\n")?;
            let (own, foreign) =
                (["10.9.0.11/24", "fd00:9::11/64"], ["198.51.100.11/24", "2001:db8:2::11/64"]);
            let order = if foreign_first { [foreign, own] } else { [own, foreign] }.concat();
            let order: Vec<String> = order.into_iter().map(ToOwned::to_owned).collect();
            readdress(node1, "eth1", &order, ["10.9.0.12", "fd00:9::12"].map(ip))?;
            let _serving = proxy.serve(&cluster, "node1", &WEBS, &[])?;
            // The other node itself is reached by the first interface.
            let seen = [["10.9.0.11", "fd00:9::11"].map(ip), node1.addresses()];
            for (web, seen) in WEBS.iter().zip(seen) {
                let to = node1.at(web.node_port);
                is_served_as(cluster.place("outside"), to, web.endpoint, seen)
                    .with_context(|| format!("{order:?}"))?;
            }
        }
        Ok(())
    })
}

#[test]
fn the_source_that_a_route_names_is_used() -> Result<()> {
    // Rules of netfilter do not look at it for IPv4.
    let cluster = cluster()?;
    let _servers = servers(&cluster, &["c", "h2"])?;
    let (node1, node2) = (cluster.place("node1"), cluster.place("node2"));
    let [v4, v6] = FOREIGN;
    node1.netns.ip(&format!("addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\n"))?;
    node2.netns.ip(&format!("route add {v4} via {}\nroute add {v6} via {}\n", node1.v4, node1.v6))?;
    let route = |source: [String; 2]| {
        let [source4, source6] = source;
        node1.netns.ip(&format!(
            "route replace 10.244.2.0/24 via {} {source4}\nroute replace fd00:244:2::/64 via {} {source6}\n",
            node2.v4, node2.v6
        ))
    };
    route([format!("src {v4}"), format!("src {v6}")])?;
    let _serving = Proxy::Agent.serve(&cluster, "node1", &WEBS, &[])?;
    let pod = |seen| is_served_as(cluster.place("outside"), node1.at(WEBS[0].node_port), "c", seen);
    pod(FOREIGN.map(ip))?;
    // A route that changes changes what is new from then on.
    route(["".into(), "".into()])?;
    soon(|| pod(node1.addresses()))?;
    route([format!("src {v4}"), format!("src {v6}")])?;
    soon(|| pod(FOREIGN.map(ip)))
}

#[test]
fn neither_a_service_s_own_address_nor_a_deprecated_or_temporary_one_is_used() -> Result<()> {
    let cluster = cluster()?;
    let _servers = servers(&cluster, &["c", "h2"])?;
    let node1 = cluster.place("node1");
    let serving = Proxy::Agent.serve(&cluster, "node1", &WEBS, &[])?;
    let balanced = Web::new(3, 30203, "c");
    let vips = ["192.168.10.200", "fd00:10::200"].map(ip);
    serving.add(&cluster, &balanced, |plan| plan.load_balancer(&vips))?;
    node1.netns.sysctls(&[("ipv6/conf/eth0/use_tempaddr", "2")])?;
    let temporary = format!("addr change {}/64 dev eth0 mngtmpaddr nodad", node1.v6);
    let more = [
        &temporary,
        "addr add 192.168.10.200/32 dev eth0",
        "addr add fd00:10::200/128 dev eth0 nodad",
        "addr add fd00:10::50/64 dev eth0 nodad preferred_lft 0",
    ];
    for address in more {
        node1.netns.ip(&format!("{address}\n"))?;
        for _ in 0..3 {
            sees_the_client_as(&cluster, node1.addresses()).with_context(|| address.to_owned())?;
        }
    }
    let listed = node1.netns.output("ip", &["-6", "addr", "show", "dev", "eth0", "temporary"])?;
    ensure!(listed.contains("temporary"), "the kernel has made no temporary address: {listed:?}");
    let outside = cluster.place("outside");
    let to = vips.map(|vip| SocketAddr::new(vip, 80));
    soon(|| is_served_as(outside, to, "c", node1.addresses()))
}

#[test]
fn of_several_addresses_that_fit_that_of_the_node_object_is_used() -> Result<()> {
    for other_first in [true, false] {
        let cluster = cluster()?;
        let _servers = servers(&cluster, &["c", "h2"])?;
        let node1 = cluster.place("node1");
        let own = [format!("{}/24", node1.v4), format!("{}/64", node1.v6)];
        let other = ["192.168.10.50/24".to_owned(), "fd00:10::50/64".to_owned()];
        let order = if other_first { [other, own] } else { [own, other] }.concat();
        readdress(node1, "eth0", &order, cluster.place("node2").addresses())?;
        let object = Object::from(&node("node1", &node1.addresses(), &cluster.pod_cidrs("node1"), &[]));
        let _serving = Proxy::Agent.serve_and(&cluster, "node1", &WEBS, &[], &[object])?;
        sees_the_client_as(&cluster, node1.addresses()).with_context(|| format!("{order:?}"))?;
    }
    Ok(())
}

//! Sources of masqueraded flows, uplinks, and what belongs to the node and its pods.

use std::net::IpAddr;

use proxy_common::abi::{RouteKey, address};
use proxy_common::addr::Addr;
use proxy_common::testing::MemoryTables;

use super::*;
use crate::model::{Change, Kind};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn link(index: u32, name: &str, addresses: &str) -> Link {
    Link {
        index,
        name: name.into(),
        loopback: name == "lo",
        up: true,
        device: match name {
            "vxlan0" | "wg0" => Device::Tunnel,
            "dummy0" | "kube-ipvs0" => Device::Holder,
            "ifb0" => Device::Detour,
            _ => Device::Wire,
        },
        addresses: addresses.split_whitespace().map(|text| text.parse().unwrap()).collect(),
        ..Link::default()
    }
}

/// `10.244.2.0/24 via 192.168.10.12 dev 2 src 192.168.10.11 table 100 connected`.
fn route(text: &str) -> Route {
    let words: Vec<&str> = text.split_whitespace().collect();
    let after = |word: &str| words.iter().position(|w| *w == word).map(|at| words[at + 1]);
    Route {
        dst: words[0].parse().unwrap(),
        link: after("dev").unwrap().parse().unwrap(),
        gateway: after("via").map(ip),
        source: after("src").map(ip),
        connected: words.contains(&"connected"),
        table: after("table").map_or(254, |table| table.parse().unwrap()),
    }
}

fn node(ips: &[&str], pod_cidrs: &[&str]) -> Node {
    Node {
        ips: ips.iter().map(|text| ip(text)).collect(),
        pod_cidrs: pod_cidrs.iter().map(|text| text.parse().unwrap()).collect(),
        ..Node::default()
    }
}

fn world(node: Node, links: Vec<Link>, routes: &[&str]) -> World {
    let mut settings = Settings::of_node("n1");
    settings.own_ports = vec![10256];
    let mut world = World::new(settings);
    world.apply(Change::Node(Some(node)));
    world.apply(Change::Routes(routes.iter().map(|text| route(text)).collect()));
    world.apply(Change::Links(links));
    for kind in [Kind::Service, Kind::Slice, Kind::Node] {
        world.apply(Change::Synced(kind));
    }
    world
}

fn service(cluster_ip: &str) -> Service {
    let port = Port { name: "dns".into(), proto: proxy_common::addr::Proto::TCP, port: 53, node_port: 0 };
    Service {
        cluster_ips: vec![ip(cluster_ip)],
        ports: vec![port],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        internal_local: false,
        external_local: false,
        affinity: Affinity::None,
        health_check_node_port: 0,
        reset_on_loss: false,
        mode: None,
        created: 0,
    }
}

fn name(text: &str) -> ObjectName {
    ObjectName { namespace: "default".into(), name: text.into() }
}

/// What a flow to `dst` by a link leaves under.
fn source(world: &World, link: u32, dst: &str) -> String {
    let masquerade = world.node().routes.into_iter().collect();
    let tables = MemoryTables { masquerade, ..MemoryTables::default() };
    let dst = ip(dst).into();
    proxy_common::lb::Tables::masquerade_address(&tables, link, &dst)
        .map_or("none".into(), |ip| ip.to_string())
}

fn entries(world: &World) -> usize {
    world.node().routes.len()
}

#[test]
fn flows_leave_under_the_address_that_their_next_hop_knows() {
    // The first address of the interface is not the one that the other nodes can answer.
    let links = || vec![link(2, "eth0", "203.0.113.11/24 192.168.10.11/24 192.168.10.13/24")];
    let routes = [
        "203.0.113.0/24 dev 2 src 203.0.113.11 connected",
        "192.168.10.0/24 dev 2 src 192.168.10.11 connected",
        "10.244.2.0/24 via 192.168.10.12 dev 2",
        "10.244.3.0/24 via 192.168.10.14 dev 2 src 192.168.10.13",
        "10.244.4.0/24 via 203.0.113.9 dev 2",
        "0.0.0.0/0 via 203.0.113.1 dev 2",
    ];
    let unnamed = world(node(&[], &[]), links(), &routes);
    for (dst, from) in [
        ("192.168.10.12", "192.168.10.11"),
        ("10.244.2.7", "192.168.10.11"),
        ("10.244.3.7", "192.168.10.13"),
        ("10.244.4.7", "203.0.113.11"),
        ("8.8.8.8", "203.0.113.11"),
    ] {
        assert_eq!(source(&unnamed, 2, dst), from, "{dst}");
    }
    // The Node object's address where both fit.
    let named = world(node(&["192.168.10.13"], &[]), links(), &routes);
    assert_eq!(source(&named, 2, "10.244.2.7"), "192.168.10.13");
    assert_eq!(source(&named, 2, "192.168.10.12"), "192.168.10.13");
    assert_eq!(source(&named, 2, "8.8.8.8"), "203.0.113.11");
}

#[test]
fn a_virtual_address_of_a_service_is_nobodys_source() {
    let links = vec![link(2, "eth0", "192.168.10.200/24 192.168.10.11/24"), link(3, "eth1", "10.9.0.1/32")];
    let routes = ["192.168.10.0/24 dev 2 src 192.168.10.200 connected", "10.9.8.0/24 dev 3 src 10.9.0.1"];
    let mut world = world(node(&[], &[]), links, &routes);
    assert_eq!(source(&world, 2, "192.168.10.12"), "192.168.10.200");
    assert_eq!(source(&world, 3, "10.9.8.1"), "10.9.0.1");
    let mut web = service("10.96.0.1");
    web.external_ips = vec![ip("192.168.10.200")];
    web.load_balancer_ips = vec![ip("10.9.0.1")];
    world.apply(Change::Service(name("web"), Some(web)));
    assert_eq!(source(&world, 2, "192.168.10.12"), "192.168.10.11");
    assert_eq!(source(&world, 3, "10.9.8.1"), "192.168.10.11");
    world.apply(Change::Service(name("web"), None));
    assert_eq!(source(&world, 3, "10.9.8.1"), "10.9.0.1");
}

#[test]
fn ipv6_flows_leave_under_an_address_of_the_kind_of_their_destination() {
    let links = || vec![link(2, "eth0", "2001:db8::5/64 fd00:10::1/64 fe80::1/64")];
    let routes = [
        "2001:db8::/64 dev 2 connected",
        "fd00:10::/64 dev 2 connected",
        "fd00:244:2::/64 via fd00:10::2 dev 2",
        "fd00:244:3::/64 via fe80::2 dev 2",
        "::/0 via fe80::9 dev 2",
    ];
    let unnamed = world(node(&[], &[]), links(), &routes);
    for (dst, from) in [
        ("fd00:10::2", "fd00:10::1"),
        ("fd00:244:2::7", "fd00:10::1"),
        ("fd00:244:3::7", "fd00:10::1"),
        ("fd77::1", "fd00:10::1"),
        ("2001:db8::9", "2001:db8::5"),
        ("2600::1", "2001:db8::5"),
    ] {
        assert_eq!(source(&unnamed, 2, dst), from, "{dst}");
    }
    // One entry says it of all private destinations.
    assert_eq!(entries(&unnamed), 3, "{:?}", unnamed.node().routes);
    // And by a router that has no address but a link-local one the Node object's address does not outweigh that.
    let named = world(node(&["2001:db8::5"], &[]), links(), &routes);
    assert_eq!(source(&named, 2, "fd00:244:3::7"), "fd00:10::1");
}

#[test]
fn an_interface_without_an_address_borrows_the_nodes_and_a_tunnels_own_is_used() {
    let links = vec![
        link(1, "lo", "127.0.0.1/8 198.51.100.1/32"),
        link(2, "eth0", "203.0.113.11/24 192.168.10.11/24"),
        link(3, "vxlan0", "10.244.1.0/32"),
        link(4, "wg0", ""),
        link(5, "cali1", "fe80::5/64"),
    ];
    let routes = ["10.244.2.0/24 via 10.244.2.0 dev 3", "10.244.3.0/24 dev 4", "10.244.1.12/32 dev 5"];
    let world_with = |ips: &[&str]| world(node(ips, &[]), links.clone(), &routes);
    let named = world_with(&["192.168.10.11"]);
    assert_eq!(source(&named, 3, "10.244.2.5"), "10.244.1.0");
    assert_eq!(source(&named, 4, "10.244.3.5"), "192.168.10.11");
    assert_eq!(source(&named, 5, "10.244.1.12"), "192.168.10.11");
    let unnamed = world_with(&[]);
    assert_eq!(source(&unnamed, 4, "10.244.3.5"), "203.0.113.11");
    // The Node object's address, where that is all there is: a node that is known by its loopback address.
    let on_loopback = world(node(&["198.51.100.1"], &[]), links, &routes);
    assert_eq!(source(&on_loopback, 4, "10.244.3.5"), "198.51.100.1");
}

#[test]
fn the_tables_that_rules_lead_to_count_after_the_main_one() {
    let links = vec![link(2, "eth0", "10.0.0.5/24 10.1.0.5/24")];
    let routes = [
        "10.7.0.0/16 via 10.1.0.1 dev 2 table 100",
        "10.8.0.0/16 via 10.1.0.1 dev 2 table 100",
        "10.8.0.0/16 via 10.0.0.1 dev 2",
        "10.9.0.0/16 via 10.1.0.1 dev 2 src 10.77.0.1",
    ];
    let world = world(node(&[], &[]), links, &routes);
    assert_eq!(source(&world, 2, "10.7.0.1"), "10.1.0.5");
    assert_eq!(source(&world, 2, "10.8.0.1"), "10.0.0.5");
    // What the route asks for has gone.
    assert_eq!(source(&world, 2, "10.9.0.1"), "10.1.0.5");
}

#[test]
fn thousands_of_routes_that_say_the_same_are_one_entry() {
    let links = vec![link(2, "eth0", "10.0.0.5/24 10.1.0.5/24")];
    let mut routes: Vec<String> =
        (0..4_000).map(|n| format!("10.{}.{}.0/24 via 10.0.0.1 dev 2", 128 + n / 256, n % 256)).collect();
    routes.push("10.128.0.0/9 via 10.1.0.1 dev 2".to_owned());
    routes.push("10.128.0.128/25 via 10.1.0.1 dev 2".to_owned());
    let routes: Vec<&str> = routes.iter().map(String::as_str).collect();
    let world = world(node(&[], &[]), links.clone(), &routes);
    // Both defaults, the wide one, its exceptions, and the exception of one of these.
    assert_eq!(entries(&world), 2 + 1 + 4_000 + 1);
    assert_eq!(source(&world, 2, "10.128.0.5"), "10.0.0.5");
    assert_eq!(source(&world, 2, "10.128.0.129"), "10.1.0.5");
    assert_eq!(source(&world, 2, "10.200.0.1"), "10.1.0.5");
    let world = world_without_the_wide(links, &routes);
    assert_eq!(entries(&world), 2 + 1);
}

fn world_without_the_wide(links: Vec<Link>, routes: &[&str]) -> World {
    let routes: Vec<&str> = routes.iter().filter(|text| !text.contains("/9")).copied().collect();
    world(node(&[], &[]), links, &routes)
}

#[test]
fn devices_that_carry_no_programs_are_not_in_the_tables() {
    let links =
        vec![link(1, "lo", "127.0.0.1/8"), link(2, "ifb0", ""), link(3, "dummy0", ""), link(4, "eth0", "")];
    let node = world(node(&[], &[]), links, &[]).node();
    assert_eq!(node.ifaces.keys().collect::<Vec<_>>(), [&4]);
    let keys = [Addr::ANY_V6, Addr::ANY_V4].map(|any| RouteKey::range(4, any, 0));
    assert!(node.routes.keys().all(|key| keys.contains(key)));
}

#[test]
fn uplinks_have_an_address_under_which_others_know_the_node() {
    let port = |index, name: &str, master| Link { master: Some(master), ..link(index, name, "") };
    let links = vec![
        link(1, "lo", "198.51.100.1/32"),
        link(2, "eth0", "192.168.10.11/24"),
        link(3, "eth1", "10.128.0.5/32"),
        link(4, "eth2", "10.128.0.6/32"),
        link(5, "cni0", "10.244.1.1/24 fd00:244:1::1/64"),
        port(6, "v-a", 5),
        link(7, "v-b", "10.244.1.1/32"),
        link(8, "vxlan0", "10.9.0.1/24"),
        link(9, "br0", "fd00:10::1/64"),
        port(10, "eth3", 9),
        link(11, "eth4", "fe80::1/64"),
        link(12, "eth5", "172.31.0.1/32"),
        link(13, "eth6", "203.0.113.7/24"),
    ];
    let routes = ["0.0.0.0/0 via 10.128.0.1 dev 3", "10.244.1.12/32 dev 7"];
    let mut world = world(node(&["172.31.0.1"], &["10.244.1.0/24", "fd00:244:1::/64"]), links, &routes);
    let uplinks = |world: &World| -> Vec<(u32, u32)> {
        let ifaces = world.node().ifaces;
        ifaces.iter().filter(|(_, iface)| iface.uplink != 0).map(|(index, i)| (*index, i.uplink)).collect()
    };
    assert_eq!(uplinks(&world), [(2, 2), (3, 3), (9, 9), (10, 9), (12, 12), (13, 13)]);
    // What holds nothing but a Service's address is none.
    let mut web = service("10.96.0.1");
    web.load_balancer_ips = vec![ip("203.0.113.7")];
    world.apply(Change::Service(name("web"), Some(web)));
    assert_eq!(uplinks(&world), [(2, 2), (3, 3), (9, 9), (10, 9), (12, 12)]);
}

fn frontends(world: &mut World, of: &str) -> Vec<String> {
    let desired = world.take_desired().services;
    let ports = desired.iter().filter(|(port, _)| port.service == name(of));
    ports
        .flat_map(|(_, service)| &service.frontends)
        .map(|f| format!("{}:{}", f.key.addr, f.key.port))
        .collect()
}

fn warnings(world: &World) -> Vec<String> {
    world.warnings().iter().map(|warning| format!("{}: {}", warning.object, warning.line)).collect()
}

fn slice(service: &str, ips: &[&str], node: Option<&str>) -> Slice {
    let endpoint = |text: &&str| Endpoint {
        ip: ip(text),
        ready: true,
        serving: true,
        terminating: false,
        node: node.map(Into::into),
        hints: None,
    };
    Slice {
        service: name(service),
        family: Family::V4,
        ports: Vec::new(),
        endpoints: ips.iter().map(endpoint).collect(),
    }
}

#[test]
fn addresses_of_the_node_and_of_pods_win_over_cluster_ips() {
    let links = vec![link(2, "eth0", "192.168.10.11/24"), link(3, "kube-ipvs0", "10.96.0.9/32")];
    for (cluster_ip, why) in [
        ("192.168.10.11", "on eth0"),
        ("203.0.113.5", "Node object"),
        ("10.244.1.77", "pod range 10.244.1.0/24"),
        ("10.244.2.7", "that of a pod"),
    ] {
        let mut world = world(node(&["203.0.113.5"], &["10.244.1.0/24"]), links.clone(), &[]);
        world.apply(Change::Slice(name("others-1"), Some(slice("others", &["10.244.2.7"], Some("n2")))));
        let mut web = service(cluster_ip);
        web.external_ips = vec![ip("192.168.10.11"), ip("198.51.100.1")];
        web.ports[0].node_port = 30053;
        world.apply(Change::Service(name("web"), Some(web)));
        let served = frontends(&mut world, "web");
        assert!(!served.contains(&format!("{cluster_ip}:53")) || cluster_ip == "192.168.10.11", "{served:?}");
        assert!(
            served.contains(&"198.51.100.1:53".to_owned()) && served.contains(&"0.0.0.0:30053".to_owned())
        );
        let said = warnings(&world);
        assert!(
            said.iter().any(|line| line.starts_with("Service default/web: ") && line.contains(why)),
            "{said:?}"
        );
    }
    let mut world = world(node(&[], &[]), links, &[]);
    // Not those that IPVS left behind, nor those of endpoints that somebody has written by hand.
    world.apply(Change::Slice(name("others-1"), Some(slice("others", &["10.96.0.8"], None))));
    for cluster_ip in ["10.96.0.9", "10.96.0.8"] {
        world.apply(Change::Service(name("web"), Some(service(cluster_ip))));
        assert_eq!(frontends(&mut world, "web"), [format!("{cluster_ip}:53")]);
    }
    assert_eq!(warnings(&world), Vec::<String>::new());
    let own: Vec<String> = world.node().addresses.keys().map(ToString::to_string).collect();
    assert_eq!(own, ["192.168.10.11"]);
}

#[test]
fn a_cluster_ip_is_served_again_when_its_pod_or_address_has_gone() {
    let mut world = world(node(&[], &[]), vec![link(2, "eth0", "192.168.10.11/24")], &[]);
    world.apply(Change::Service(name("web"), Some(service("10.244.2.7"))));
    assert_eq!(frontends(&mut world, "web"), ["10.244.2.7:53"]);
    let one = |n: &str| Change::Slice(name(n), Some(slice("others", &["10.244.2.7"], Some("n2"))));
    let deleted = |n: &str| Change::Slice(name(n), None);
    for (change, served) in [
        (one("s1"), false),
        (one("s2"), false),
        (deleted("s1"), false),
        (one("s2"), false),
        (deleted("s2"), true),
    ] {
        world.apply(change);
        world.take_dirty();
        assert_eq!(warnings(&world).is_empty(), served);
        assert_eq!(!frontends(&mut world, "web").is_empty(), served);
    }
    world.apply(Change::Links(vec![link(2, "eth0", "192.168.10.11/24 10.244.2.7/32")]));
    assert_eq!(world.take_dirty().len(), 1);
    assert_eq!(warnings(&world).len(), 1);
    world.apply(Change::Links(vec![link(2, "eth0", "192.168.10.11/24")]));
    assert_eq!(world.take_dirty().len(), 1);
    assert_eq!(warnings(&world).len(), 0);
}

#[test]
fn an_endpoint_slice_takes_no_cluster_ip_from_its_service() {
    let links = vec![link(2, "eth0", "192.168.10.11/24")];
    let ranges = |texts: &[&str]| Some(texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>());
    let ranges_of = |texts: &[&str]| Change::ServiceRanges("kubernetes".to_owned(), ranges(texts));
    let mut world = world(node(&[], &["10.244.1.0/24"]), links.clone(), &[]);
    world.apply(Change::Service(name("web"), Some(service("10.96.0.8"))));
    // Somebody's slice says that a pod has the address.
    world.apply(Change::Slice(name("others-1"), Some(slice("others", &["10.96.0.8"], Some("n2")))));
    let served = |world: &mut World| !frontends(world, "web").is_empty();
    assert!(!served(&mut world), "nothing says otherwise");
    for (range, wanted) in [
        (ranges_of(&["10.96.0.0/16"]), true),
        (ranges_of(&["10.97.0.0/16"]), false),
        // The range holds pods as well: a mistake, and pods are real.
        (ranges_of(&["10.0.0.0/8"]), false),
        (ranges_of(&["10.96.0.0/16"]), true),
    ] {
        world.apply(range);
        assert_eq!(served(&mut world), wanted);
    }
    // So it is with an address of the node's in it.
    world.apply(Change::Links(vec![link(2, "eth0", "192.168.10.11/24 10.96.0.77/16")]));
    assert!(!served(&mut world));
    world.apply(Change::Links(links));
    assert!(served(&mut world));
    world.apply(Change::ServiceRanges("kubernetes".to_owned(), None));
    assert!(!served(&mut world));
}

#[test]
fn pods_of_the_node_win_over_external_addresses_and_the_nodes_own_do_not() {
    let mut world = world(node(&[], &["10.244.1.0/24"]), vec![link(2, "cni0", "10.244.1.1/24")], &[]);
    let mut web = service("10.96.0.1");
    web.load_balancer_ips = vec![ip("10.244.1.7"), ip("10.244.1.1"), ip("10.244.9.9")];
    world.apply(Change::Service(name("web"), Some(web)));
    assert_eq!(frontends(&mut world, "web"), ["10.96.0.1:53", "10.244.1.1:53", "10.244.9.9:53"]);
    assert!(warnings(&world)[0].contains("10.244.1.7:53/TCP is not served"));
}

#[test]
fn the_agents_own_ports_are_no_node_ports() {
    let mut world = world(node(&[], &[]), vec![link(2, "eth0", "192.168.10.11/24")], &[]);
    let mut web = service("10.96.0.1");
    web.ports[0].node_port = 10256;
    let udp = Port { proto: proxy_common::addr::Proto::UDP, name: "udp".into(), ..web.ports[0].clone() };
    web.ports.push(udp);
    world.apply(Change::Service(name("web"), Some(web)));
    assert_eq!(frontends(&mut world, "web"), ["10.96.0.1:53", "0.0.0.0:10256", "10.96.0.1:53"]);
    let said = warnings(&world);
    assert!(
        said.len() == 1 && said[0].contains("NodePort 10256/TCP is not served, because the agent"),
        "{said:?}"
    );
}

#[test]
fn a_local_cache_keeps_its_cluster_ip_while_its_device_has_it() {
    for device in ["nodelocaldns", "dummy0"] {
        let eth0 = || link(2, "eth0", "192.168.10.11/24");
        let mut world = world(node(&[], &[]), vec![eth0()], &[]);
        world.apply(Change::Service(name("dns"), Some(service("10.96.0.10"))));
        assert_eq!(frontends(&mut world, "dns").len(), 1);
        world.apply(Change::Links(vec![eth0(), link(3, device, "10.96.0.10/32 169.254.20.10/32")]));
        assert_eq!(world.take_dirty().len(), 1);
        assert_eq!(frontends(&mut world, "dns").len(), 0);
        assert_eq!(warnings(&world), Vec::<String>::new());
        let notes = world.notes();
        assert!(
            notes.len() == 1 && notes[0].line.contains(device) && notes[0].object == "Service default/dns"
        );
        assert_eq!(world.node().addresses[&ip("10.96.0.10").into()] & address::NODE, address::NODE);
        world.apply(Change::Links(vec![eth0()]));
        assert_eq!(world.take_dirty().len(), 1);
        assert_eq!((frontends(&mut world, "dns").len(), world.notes().len()), (1, 0));
    }
}

#[test]
fn a_range_of_cluster_ips_with_pods_or_nodes_in_it_is_not_enforced() {
    let ranges = |world: &mut World, range: &str| {
        let ranges = vec![range.parse().unwrap()];
        world.apply(Change::ServiceRanges("mine".into(), Some(ranges)));
        (world.node().config.service_range_count, warnings(world).len())
    };
    let eth0 = || vec![link(2, "eth0", "10.0.0.5/8"), link(3, "nodelocaldns", "10.96.0.10/32")];
    let mut plain = world(node(&[], &["10.244.1.0/24"]), eth0(), &[]);
    for (range, enforced) in [
        ("10.96.0.0/12", true),
        ("10.244.0.0/16", false),
        ("10.244.1.128/25", false),
        ("10.0.0.0/16", false),
        ("10.240.0.0/14", true),
    ] {
        assert_eq!(ranges(&mut plain, range), if enforced { (1, 0) } else { (0, 1) }, "{range}");
    }
    plain.apply(Change::Slice(name("s"), Some(slice("others", &["10.241.0.9"], Some("n2")))));
    assert_eq!((plain.node().config.service_range_count, warnings(&plain).len()), (0, 1));
    plain.apply(Change::Slice(name("s"), None));
    assert_eq!((plain.node().config.service_range_count, warnings(&plain).len()), (1, 0));
    // A pod range around everything says nothing against Services in it.
    let mut settings = Settings::of_node("n1");
    settings.cluster_cidrs = vec!["10.0.0.0/8".parse().unwrap()];
    assert_eq!(ranges(&mut World::new(settings), "10.96.0.0/12"), (1, 0));
}

#[test]
fn masquerade_ports_leave_out_node_ports_of_any_range() {
    let mut settings = Settings::of_node("n1");
    settings.snat_ports = vec![proxy_common::abi::PortRange { first: 1024, count: 28_976 }];
    let mut world = World::new(settings);
    let ports = |world: &World| -> Vec<(u16, u16)> {
        let ranges = world.node().config.snat_ports;
        ranges.iter().filter(|range| range.count != 0).map(|range| (range.first, range.count)).collect()
    };
    let with = |node_port| {
        let mut web = service("10.96.0.1");
        web.ports[0].node_port = node_port;
        web
    };
    world.apply(Change::Service(name("a"), Some(with(30_080))));
    assert_eq!(ports(&world), [(1024, 28_976)]);
    world.apply(Change::Service(
        name("b"),
        Some(Service { cluster_ips: vec![ip("10.96.0.2")], ..with(20_000) }),
    ));
    assert_eq!(ports(&world), [(1024, 18_976), (20_001, 9_999)]);
    world.apply(Change::Service(name("b"), None));
    assert_eq!(ports(&world), [(1024, 28_976)]);
}

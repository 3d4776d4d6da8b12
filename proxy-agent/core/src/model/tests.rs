//! The world as a whole: vectors T-1…T-35, T-59…T-82, contested destinations, what is handed on and when.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use proptest::prelude::*;
use proxy_common::abi::{PortRange, RouteKey, address, backend, config, frontend, iface};
use proxy_common::addr::{Addr, Port as Number, Proto};

use super::*;
use crate::model::{Change, Kind};

pub(super) fn settings() -> Settings {
    Settings {
        host_netns: 1,
        snat_ports: vec![PortRange { first: 61_000, count: 1_000 }],
        seed: 7,
        ..Settings::of_node("n1")
    }
}

pub(super) fn name(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn service(cluster_ip: &str) -> Service {
    Service {
        cluster_ips: vec![ip(cluster_ip)],
        ports: vec![Port { name: "".into(), proto: Proto::TCP, port: 80, node_port: 0 }],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        affinity: Affinity::None,
        internal_local: false,
        external_local: false,
        health_check_node_port: 0,
        reset_on_loss: false,
        mode: None,
        created: 0,
    }
}

fn node(zone: Option<&str>, ips: &[&str]) -> Node {
    Node {
        ips: ips.iter().map(|text| ip(text)).collect(),
        pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()],
        zone: zone.map(Into::into),
        eligible: true,
    }
}

/// `3 Z=a,b N=n1 L R`: last octet, hints, `L` for local, then the state of section 14.1.
pub(super) fn endpoint(text: &str, node: &str) -> Endpoint {
    let mut words = text.split_whitespace();
    let last = words.next().unwrap();
    let mut endpoint = Endpoint {
        ip: ip(&format!("10.244.0.{last}")),
        ready: false,
        serving: false,
        terminating: false,
        node: Some("elsewhere".into()),
        hints: None,
    };
    let (mut zones, mut nodes) = (Vec::new(), Vec::new());
    let list = |text: &str| text.split(',').map(Arc::from).collect::<Vec<Arc<str>>>();
    for word in words {
        match word {
            "L" => endpoint.node = Some(node.into()),
            "R" => (endpoint.ready, endpoint.serving) = (true, true),
            "ST" => (endpoint.serving, endpoint.terminating) = (true, true),
            "T" => endpoint.terminating = true,
            "NR" => {}
            "RT" => (endpoint.ready, endpoint.terminating) = (true, true), // publishNotReadyAddresses
            "S" => endpoint.serving = true,
            _ if word.starts_with("Z=") => zones = list(&word[2..]),
            _ if word.starts_with("N=") => nodes = list(&word[2..]),
            _ => panic!("unknown word {word:?} in {text:?}"),
        }
    }
    endpoint.hints = Hints::new(zones, nodes);
    endpoint
}

pub(super) fn slice(service: &str, endpoints: &str) -> Slice {
    let endpoints = endpoints.split(';').filter(|text| !text.trim().is_empty());
    Slice {
        service: name(service),
        family: Family::V4,
        ports: vec![SlicePort { name: "".into(), proto: Proto::TCP, port: 8080 }],
        endpoints: endpoints.map(|text| endpoint(text, "n1")).collect(),
    }
}

fn world(changes: impl IntoIterator<Item = Change>) -> World {
    let mut world = World::new(settings());
    for change in changes {
        world.apply(change);
    }
    world
}

pub(super) fn only(world: &World) -> DesiredService {
    let desired = world.desired().services;
    assert_eq!(desired.len(), 1, "{desired:?}");
    desired.into_values().next().unwrap()
}

pub(super) fn octets(set: &[(Addr, Number)]) -> String {
    let last = |addr: &Addr| IpAddr::from(*addr).to_string().rsplit('.').next().unwrap().to_owned();
    set.iter().map(|(addr, _)| last(addr)).collect::<Vec<_>>().join(" ")
}

fn flags(desired: &DesiredService, addr: &str, port: u16) -> Option<u32> {
    let key = (Addr::from(ip(addr)), Number::new(port));
    desired.frontends.iter().find(|f| (f.key.addr, f.key.port) == key).map(|f| f.flags)
}

const FOUR: &str = "3 Z=a R; 4 Z=b R; 5 Z=c R; 6 Z=a R";
const NODES: &str = "3 Z=a N=n1 R; 4 Z=b N=n2 R; 5 Z=c N=n3 R; 6 Z=a N=n4 R";

/// (vector, traits, node, zone, endpoints, CL, LO, ANY); traits: i = iTP Local, e = eTP Local, n = nodePort,
/// v = load-balancer IP.
type Vector =
    (&'static str, &'static str, &'static str, Option<&'static str>, &'static str, [&'static str; 2], bool);

#[rustfmt::skip]
const SELECTION: &[Vector] = &[
    ("T-1", "", "n1", Some("a"), FOUR, ["3 6", ""], true),
    ("T-2", "en", "n1", Some("a"), "3 Z=a L R; 4 Z=b L R; 5 Z=c R; 6 Z=a R", ["3 6", "3 4"], true),
    ("T-3", "in", "n1", Some("a"), "3 Z=a L R; 4 Z=b L R; 5 Z=c R; 6 Z=a R", ["3 6", "3 4"], true),
    ("T-4", "", "n1", None, "3 Z=a R", ["3", ""], true),
    ("T-5", "", "n1", Some(""), "3 Z=a R", ["3", ""], true),
    ("T-6", "", "n1", Some("b"), "3 Z=a R", ["3", ""], true),
    ("T-7", "", "n1", Some("a"), "3 Z=a R; 4 Z=b R; 5 Z=c R; 6 Z=a NR", ["3", ""], true),
    ("T-8", "", "n1", Some("a"), "3 Z=a NR; 4 Z=b R; 5 Z=c R; 6 Z=a NR", ["4 5", ""], true),
    ("T-9", "", "n1", Some("a"), "3 Z=a R; 4 Z=b R; 5 R; 6 Z=a R", ["3 4 5 6", ""], true),
    ("T-10", "", "n1", Some("c"), "3 Z=a,b,c R; 4 Z=b,c R; 5 Z=b,d R; 6 Z=c R", ["3 4 6", ""], true),
    ("T-11", "", "n1", Some("a"), NODES, ["3", ""], true),
    ("T-12", "", "n1", Some("a"), "3 Z=a N=n1 R; 4 R; 5 Z=c N=n3 R; 6 Z=a N=n4 R", ["3 4 5 6", ""], true),
    ("T-13", "", "n0", Some("a"), NODES, ["3 6", ""], true),
    ("T-14", "", "n1", Some("a"), "3 Z=a N=n1 R; 4 Z=b R; 5 Z=c N=n3 R; 6 Z=a N=n4 R", ["3 6", ""], true),
    ("T-15", "en", "n1", Some("a"), "10 Z=a L R; 11 Z=b L R; 12 Z=a R; 13 Z=b R", ["10 12", "10 11"], true),
    ("T-16", "i", "n1", Some("a"), "", ["", ""], false),
    ("T-17", "i", "n1", Some("a"), "10 R; 11 R", ["", ""], true),
    ("T-18", "i", "n1", Some("a"), "10 L R; 11 R", ["", "10"], true),
    ("T-19", "", "n1", Some("a"), "10 NR; 11 NR", ["", ""], false),
    ("T-20", "", "n1", Some("a"), "10 NR; 11 R", ["11", ""], true),
    ("T-21", "", "n1", Some("a"), "10 L ST; 11 ST", ["10 11", ""], true),
    ("T-22", "in", "n1", Some("a"), "10 L R; 11 R", ["10 11", "10"], true),
    ("T-23", "ien", "n1", Some("a"), "10 R; 11 R", ["10 11", ""], true),
    ("T-24", "ien", "n1", Some("a"), "10 ST; 11 ST", ["10 11", ""], true),
    ("T-25", "en", "n1", Some("a"), "10 R; 11 L NR; 12 L ST; 13 ST", ["10", "12"], true),
    ("T-26", "e", "n1", Some("a"), "10 R; 11 L R", ["10 11", ""], true),
    ("T-27", "", "n1", Some("a"), "10 T; 11 NR", ["", ""], false),
    ("T-28", "ev", "n1", Some("a"), "1 L R; 2 L R; 3 L ST; 4 L T; 5 R", ["1 2 5", "1 2"], true),
    ("T-29", "ev", "n1", Some("a"), "2 L ST; 3 L ST; 4 L T; 5 R", ["5", "2 3"], true),
    ("T-30", "ev", "n1", Some("a"), "5 ST", ["5", ""], true),
    ("T-31", "v", "n1", Some("a"), "2 L ST; 3 L ST; 4 T; 5 ST", ["2 3 5", ""], true),
    ("T-32", "ev", "n1", Some("a"), "1 L T; 2 T", ["", ""], false),
    ("T-33", "en", "n1", Some("a"), "1 L RT", ["1", "1"], true),
    ("T-34", "", "n1", Some("a"), "1 ST", ["1", ""], true),
    ("T-35", "", "n1", Some("a"), "1 S", ["", ""], false),
    ("hints of endpoints that are not ready do not count", "", "n1", Some("a"),
        "1 Z=a R; 2 Z=a R; 3 NR; 4 ST", ["1 2", ""], true),
    ("terminating endpoints are taken without the topology filter", "", "n1", Some("a"),
        "1 Z=a ST; 2 Z=b ST; 3 ST", ["1 2 3", ""], true),
    ("one endpoint that serves but is not ready is never used", "en", "n1", Some("a"),
        "1 L S; 2 S", ["", ""], false),
];

#[test]
fn endpoints_are_chosen_as_the_vectors_say() {
    // P-1…P-8, P-11…P-13.
    for (vector, traits, own, zone, endpoints, [cluster, local], any) in SELECTION {
        let mut service = service("10.96.0.1");
        service.internal_local = traits.contains('i');
        service.external_local = traits.contains('e');
        if traits.contains('n') {
            service.ports[0].node_port = 30_080;
        }
        if traits.contains('v') {
            service.load_balancer_ips = vec![ip("203.0.113.1")];
        }
        let mut slice = slice("web", "");
        slice.endpoints =
            endpoints.split(';').filter(|e| !e.is_empty()).map(|text| endpoint(text, own)).collect();
        let mut world = World::new(Settings { node_name: (*own).into(), ..settings() });
        world.apply(Change::Node(Some(node(*zone, &[]))));
        world.apply(Change::Service(name("web"), Some(service)));
        world.apply(Change::Slice(name("web-1"), Some(slice)));
        let desired = only(&world);
        assert_eq!(octets(&desired.cluster), *cluster, "CL of {vector}");
        assert_eq!(octets(&desired.local), *local, "LO of {vector}");
        for found in &desired.frontends {
            assert_eq!(found.flags & frontend::ANY != 0, *any, "ANY of {vector}");
        }
        for chosen in desired.cluster.iter().chain(&desired.local) {
            assert_eq!(desired.backends[chosen].flags & backend::DRAINING, 0, "{vector}");
        }
    }
}

#[test]
fn each_destination_gets_its_own_policy() {
    let mut both = service("10.96.0.1");
    both.internal_local = true;
    both.external_ips = vec![ip("198.51.100.1")];
    both.load_balancer_ips = vec![ip("203.0.113.1")];
    both.ports[0].node_port = 30_080;
    both.affinity = Affinity::ClientIp(60);
    let mut world = world([Change::Service(name("web"), Some(both.clone()))]);
    let desired = only(&world);
    let sticky = frontend::AFFINITY;
    assert_eq!(desired.affinity_secs, 60);
    assert_eq!(flags(&desired, "10.96.0.1", 80), Some(frontend::INTERNAL | frontend::LOCAL | sticky));
    assert_eq!(flags(&desired, "198.51.100.1", 80), Some(sticky));
    assert_eq!(flags(&desired, "203.0.113.1", 80), Some(sticky));
    assert_eq!(flags(&desired, "0.0.0.0", 30_080), Some(frontend::NODE_PORT | sticky));

    both.internal_local = false;
    both.external_local = true;
    world.apply(Change::Service(name("web"), Some(both)));
    let desired = only(&world);
    assert_eq!(flags(&desired, "10.96.0.1", 80), Some(frontend::INTERNAL | sticky));
    assert_eq!(flags(&desired, "198.51.100.1", 80), Some(frontend::LOCAL | sticky));
    assert_eq!(flags(&desired, "0.0.0.0", 30_080), Some(frontend::LOCAL | frontend::NODE_PORT | sticky));
}

#[test]
fn a_family_without_cluster_ip_is_not_proxied_and_two_families_do_not_mix() {
    let mut web = service("10.96.0.1");
    web.ports[0].node_port = 30_080;
    web.external_ips = vec![ip("2001:db8::1"), ip("198.51.100.1")];
    let mut world = world([
        Change::Service(name("web"), Some(web.clone())),
        Change::Slice(name("web-4"), Some(slice("web", "1 R"))),
        Change::Slice(
            name("web-6"),
            Some(Slice {
                family: Family::V6,
                endpoints: vec![Endpoint { ip: ip("fd00::1"), ..endpoint("1 R", "n1") }],
                ..slice("web", "")
            }),
        ),
    ]);
    let desired = only(&world);
    assert_eq!(desired.frontends.len(), 3);
    assert!(desired.frontends.iter().all(|frontend| frontend.key.addr.is_v4()));
    assert_eq!(desired.cluster, [(ip("10.244.0.1").into(), Number::new(8080))]);

    web.cluster_ips.push(ip("fd00:96::1"));
    world.apply(Change::Service(name("web"), Some(web)));
    let desired = world.desired().services;
    assert_eq!(desired.len(), 2);
    let v6 = desired.iter().find(|(port, _)| port.family == Family::V6).unwrap().1;
    assert_eq!(v6.cluster, [(ip("fd00::1").into(), Number::new(8080))]);
    assert_eq!(flags(v6, "::", 30_080), Some(frontend::NODE_PORT | frontend::ANY));
    assert_eq!(flags(v6, "2001:db8::1", 80), Some(frontend::ANY));
}

#[test]
fn source_ranges_restrict_load_balancer_addresses_alone() {
    let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>();
    let net = |text: &str, bits: u32| (Addr::from(ip(text)), bits);
    let mut web = service("10.96.0.1");
    web.external_ips = vec![ip("198.51.100.1"), ip("203.0.113.202")];
    web.load_balancer_ips = vec![ip("203.0.113.201"), ip("203.0.113.202")];
    web.ports[0].node_port = 30_080;
    web.source_ranges = ranges(&["192.168.0.0/24", "203.0.113.0/25"]);
    let mut world = world([
        Change::Node(Some(node(None, &["192.168.0.2"]))),
        Change::Service(name("web"), Some(web.clone())),
    ]);
    let desired = only(&world);
    // T-59, T-62: the node is inside a range, so the Service's own addresses may be sources (V-18).
    let own = [net("203.0.113.201", 32), net("203.0.113.202", 32)];
    let listed = [net("192.168.0.0", 24), net("203.0.113.0", 25)];
    assert_eq!(desired.source_ranges, [listed, own].concat());
    // T-60, T-61.
    assert_eq!(flags(&desired, "203.0.113.201", 80), Some(frontend::SOURCE_RANGES));
    assert_eq!(flags(&desired, "198.51.100.1", 80), Some(0));
    assert_eq!(flags(&desired, "0.0.0.0", 30_080), Some(frontend::NODE_PORT));
    assert_eq!(flags(&desired, "10.96.0.1", 80), Some(frontend::INTERNAL));
    // V-20: listed as an external IP, too.
    assert_eq!(flags(&desired, "203.0.113.202", 80), Some(frontend::SOURCE_RANGES));

    world.apply(Change::Node(Some(node(None, &["10.0.0.2"]))));
    assert_eq!(only(&world).source_ranges, listed);

    // T-63.
    for open in [&["2001:db8::/32"][..], &["0.0.0.0/0", "1.2.3.4/32"], &[]] {
        web.source_ranges = ranges(open);
        world.apply(Change::Service(name("web"), Some(web.clone())));
        let desired = only(&world);
        assert_eq!(flags(&desired, "203.0.113.201", 80), Some(0), "{open:?}");
        assert!(desired.source_ranges.is_empty(), "{open:?}");
    }
}

#[test]
fn slices_are_merged_as_the_vectors_say() {
    let two_ports = |ports: &[(&str, Proto, u16)], endpoints: &str| Slice {
        ports: ports
            .iter()
            .map(|(n, proto, port)| SlicePort { name: (*n).into(), proto: *proto, port: *port })
            .collect(),
        ..slice("web", endpoints)
    };
    let mut web = service("10.96.0.1");
    web.ports = [("http", 80), ("https", 443)]
        .map(|(name, port)| Port { name: name.into(), proto: Proto::TCP, port, node_port: 0 })
        .to_vec();
    let counts = |world: &World| -> Vec<usize> {
        world.desired().services.values().map(|desired| desired.cluster.len()).collect()
    };
    let with = |slices: &[(&str, Slice)]| {
        let mut world = world([Change::Service(name("web"), Some(web.clone()))]);
        for (slice_name, slice) in slices {
            world.apply(Change::Slice(name(slice_name), Some(slice.clone())));
        }
        world
    };
    let http = |port| [("http", Proto::TCP, port)];
    let t70 =
        with(&[("a", two_ports(&[("http", Proto::TCP, 80), ("https", Proto::TCP, 443)], "1 R; 2 R; 3 R"))]);
    assert_eq!(counts(&t70), [3, 3], "T-70");
    let t71 = with(&[("a", two_ports(&http(80), "1 R; 2 R")), ("b", two_ports(&http(80), "3 R"))]);
    assert_eq!(counts(&t71), [3, 0], "T-71");
    let t72 = with(&[("a", two_ports(&http(80), "1 R; 2 R")), ("b", two_ports(&http(8080), "1 R; 2 R"))]);
    assert_eq!(counts(&t72), [4, 0], "T-72");
    let t73 = with(&[("a", two_ports(&http(80), "1 R; 2 R")), ("a", two_ports(&http(80), "3 R"))]);
    assert_eq!(counts(&t73), [1, 0], "T-73");
    let other = Slice { service: ObjectName::new("other", "web"), ..two_ports(&http(80), "4 R") };
    let foreign = Slice { service: name("web2"), ..two_ports(&http(80), "5 R") };
    let t74 = with(&[("a", two_ports(&http(80), "1 R")), ("b", other), ("c", foreign)]);
    assert_eq!(counts(&t74), [1, 0], "T-74");
    let t75 = with(&[("a", two_ports(&[], "1 R"))]);
    assert_eq!(counts(&t75), [0, 0], "T-75");
    let t81 = with(&[("a", two_ports(&[("http", Proto::UDP, 80)], "1 R"))]);
    assert_eq!(counts(&t81), [0, 0], "T-81");
}

#[test]
fn of_duplicates_the_one_that_is_not_terminating_stays() {
    for (vector, endpoints, cluster) in [
        ("T-76", ["1 ST", "1 R", "1 T"], "1"),
        ("T-77", ["1 R", "1 T", ""], "1"),
        ("not ready replaces terminating", ["1 ST", "1 NR", ""], ""),
        ("ready beats not ready", ["1 NR", "1 R", ""], "1"),
    ] {
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
            let mut spread = world([Change::Service(name("web"), Some(service("10.96.0.1")))]);
            for i in order {
                spread.apply(Change::Slice(name(&format!("s{i}")), Some(slice("web", endpoints[i]))));
            }
            assert_eq!(octets(&only(&spread).cluster), cluster, "{vector}, in three slices, {order:?}");
            let together = order.map(|i| endpoints[i]).join(";");
            let one = world([
                Change::Service(name("web"), Some(service("10.96.0.1"))),
                Change::Slice(name("s"), Some(slice("web", &together))),
            ]);
            assert_eq!(octets(&only(&one).cluster), cluster, "{vector}, in one slice, {order:?}");
        }
    }
}

#[test]
fn only_what_differs_is_handed_on() {
    // S-22, E-8.
    let mut world = world([
        Change::Service(name("web"), Some(service("10.96.0.1"))),
        Change::Slice(name("web-1"), Some(slice("web", "1 R; 2 R Z=a"))),
        Change::Service(name("api"), Some(service("10.96.0.2"))),
    ]);
    let first = world.take_dirty();
    assert_eq!(first.len(), 2);
    assert!(world.take_dirty().is_empty());

    let reordered = Change::Slice(name("web-1"), Some(slice("web", "2 R Z=a; 1 R")));
    assert_eq!(world.apply(reordered), None);
    assert_eq!(world.apply(Change::Slice(name("none"), None)), None, "T-78");
    assert_eq!(world.apply(Change::Service(name("web"), Some(service("10.96.0.1")))), None);
    assert!(world.take_dirty().is_empty());

    // T-79, and a change that is taken back.
    assert!(world.apply(Change::Slice(name("web-2"), Some(slice("web", "3 R")))).is_some());
    assert!(world.apply(Change::Slice(name("web-2"), None)).is_some());
    assert!(world.take_dirty().is_empty());

    // The same endpoints, cut into slices another way.
    world.apply(Change::Slice(name("web-2"), Some(slice("web", "2 R Z=a"))));
    world.apply(Change::Slice(name("web-1"), Some(slice("web", "1 R"))));
    assert!(world.take_dirty().is_empty());

    world.apply(Change::Slice(name("web-2"), None));
    let dirty = world.take_dirty();
    assert_eq!(dirty.len(), 1);
    assert_eq!(&*dirty[0].0.service.name, "web");
    assert_eq!(octets(&dirty[0].1.as_ref().unwrap().cluster), "1");

    // T-80, E-9: the Service stays, without endpoints.
    world.apply(Change::Slice(name("web-1"), None));
    let dirty = world.take_dirty();
    assert_eq!(octets(&dirty[0].1.as_ref().unwrap().cluster), "");
    assert_eq!(dirty[0].1.as_ref().unwrap().frontends[0].flags, frontend::INTERNAL);

    world.apply(Change::Service(name("web"), None));
    let dirty = world.take_dirty();
    assert_eq!((dirty.len(), dirty[0].1.as_ref()), (1, None));
}

#[test]
fn a_full_pass_is_where_the_differences_start_from() {
    let mut world = world([
        Change::Service(name("web"), Some(service("10.96.0.1"))),
        Change::Slice(name("web-1"), Some(slice("web", "1 R"))),
    ]);
    let desired = world.take_desired();
    assert_eq!(desired, world.desired());
    assert_eq!(desired.services.len(), 1);
    assert!(world.take_dirty().is_empty());
    world.apply(Change::Service(name("web"), None));
    assert_eq!(world.take_dirty().len(), 1);
}

#[test]
fn a_slice_can_change_hands() {
    let mut world = world([
        Change::Service(name("web"), Some(service("10.96.0.1"))),
        Change::Service(name("api"), Some(service("10.96.0.2"))),
        Change::Slice(name("s"), Some(slice("web", "1 R"))),
    ]);
    world.take_dirty();
    world.apply(Change::Slice(name("s"), Some(slice("api", "1 R"))));
    let dirty: BTreeMap<String, String> = world
        .take_dirty()
        .into_iter()
        .map(|(port, desired)| (port.service.to_string(), octets(&desired.unwrap().cluster)))
        .collect();
    let expected = [("default/api", "1"), ("default/web", "")].map(|(a, b)| (a.to_owned(), b.to_owned()));
    assert_eq!(dirty, expected.into());
}

#[test]
fn the_zone_of_the_node_concerns_every_service() {
    let mut world = world([
        Change::Node(Some(node(Some("a"), &[]))),
        Change::Service(name("web"), Some(service("10.96.0.1"))),
        Change::Slice(name("web-1"), Some(slice("web", "1 Z=a R; 2 Z=b R"))),
    ]);
    assert_eq!(octets(&world.take_dirty()[0].1.as_ref().unwrap().cluster), "1");
    assert!(world.apply(Change::Node(Some(node(Some("b"), &[])))).is_some());
    assert_eq!(octets(&world.take_dirty()[0].1.as_ref().unwrap().cluster), "2");
    world.apply(Change::Node(Some(Node { eligible: false, ..node(Some("b"), &[]) })));
    assert!(world.take_dirty().is_empty());
    world.apply(Change::Node(None));
    assert!(world.take_dirty().is_empty(), "a deleted Node changes nothing");
    assert_eq!(world.node_object(), None);
}

#[test]
fn endpoints_that_still_serve_keep_their_flows() {
    let world = world([
        Change::Node(Some(node(Some("a"), &[]))),
        Change::Service(name("web"), Some(service("10.96.0.1"))),
        Change::Slice(name("w"), Some(slice("web", "1 Z=a L R; 2 Z=b R; 3 S; 4 ST; 5 T; 6 NR"))),
    ]);
    let found: Vec<(String, u16)> =
        only(&world).backends.iter().map(|(key, backend)| (octets(&[*key]), backend.flags)).collect();
    let drain = backend::DRAINING;
    let expected = [("1", backend::LOCAL | backend::IN_CLUSTER), ("2", drain), ("3", drain), ("4", drain)];
    assert_eq!(found, expected.map(|(octet, flags)| (octet.to_owned(), flags)));
}

#[test]
fn an_endpoint_without_node_at_an_own_address_is_local_to_its_flows_but_not_to_the_policy() {
    let mut web = service("10.96.0.1");
    web.internal_local = true;
    let mut nowhere = slice("web", "1 R");
    nowhere.endpoints[0].node = None;
    let mut world = world([
        Change::Links(vec![link(2, "eth0", &["192.168.0.2/24"])]),
        Change::Service(name("web"), Some(web)),
        Change::Slice(name("w"), Some(nowhere)),
    ]);
    let key = (Addr::from(ip("10.244.0.1")), Number::new(8080));
    assert_eq!(only(&world).backends[&key].flags, backend::DRAINING);
    world.take_dirty();
    world.apply(Change::Links(vec![link(2, "eth0", &["192.168.0.2/24", "10.244.0.1/32"])]));
    let dirty = world.take_dirty();
    assert_eq!(dirty[0].1.as_ref().unwrap().backends[&key].flags, backend::LOCAL | backend::DRAINING);
    assert!(dirty[0].1.as_ref().unwrap().local.is_empty(), "E-19");
}

fn contender(created: i64, external_ip: &str) -> Service {
    let mut service = service(&format!("10.96.1.{created}"));
    service.created = created;
    service.external_ips = vec![ip(external_ip)];
    service.ports[0].node_port = 30_000;
    service
}

fn holders(world: &World) -> BTreeMap<String, String> {
    let mut holders = BTreeMap::new();
    for (port, desired) in world.desired().services {
        for DesiredFrontend { key, .. } in desired.frontends {
            let known = holders
                .insert(format!("{}:{}/{}", key.addr, key.port, key.proto), port.service.name.to_string());
            assert_eq!(known, None, "{key:?} has two holders");
        }
    }
    holders
}

#[test]
fn a_contested_destination_has_one_holder_whatever_the_order_and_is_handed_over_at_once() {
    let old = Change::Service(name("old"), Some(contender(10, "198.51.100.1")));
    let young = Change::Service(name("a-young"), Some(contender(20, "198.51.100.1")));
    for order in [[old.clone(), young.clone()], [young, old]] {
        let mut world = world(order);
        let found = holders(&world);
        assert_eq!(found["198.51.100.1:80/TCP"], "old");
        assert_eq!(found["0.0.0.0:30000/TCP"], "old");
        assert_eq!(found["10.96.1.20:80/TCP"], "a-young");
        let warnings = world.warnings();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings.iter().all(|c| c.object == "Service default/a-young"), "{warnings:?}");
        assert!(warnings.iter().all(|c| c.line.contains("Service default/old")), "{warnings:?}");

        world.take_dirty();
        world.apply(Change::Service(name("old"), None));
        let dirty = world.take_dirty();
        assert_eq!(dirty.len(), 2, "{dirty:?}");
        let (_, taken_over) = dirty.iter().find(|(port, _)| &*port.service.name == "a-young").unwrap();
        assert_eq!(taken_over.as_ref().unwrap().frontends.len(), 3);
        assert!(dirty.iter().any(|(port, desired)| &*port.service.name == "old" && desired.is_none()));
        assert!(world.warnings().is_empty());
    }
}

#[test]
fn a_cluster_ip_comes_before_an_older_external_ip() {
    let mut external = service("10.96.0.9");
    external.created = 1;
    external.external_ips = vec![ip("10.96.0.1")];
    let mut cluster = service("10.96.0.1");
    cluster.created = 100;
    let cluster = Change::Service(name("cluster"), Some(cluster));
    let external = Change::Service(name("external"), Some(external));
    for order in [[cluster.clone(), external.clone()], [external, cluster]] {
        assert_eq!(holders(&world(order))["10.96.0.1:80/TCP"], "cluster");
    }
}

#[test]
fn a_reused_cluster_ip_ends_with_the_one_that_is_left() {
    let before = Change::Service(name("before"), Some(service("10.96.0.1")));
    let after = Change::Service(name("after"), Some(Service { created: 50, ..service("10.96.0.1") }));
    let gone = Change::Service(name("before"), None);
    for order in [
        [before.clone(), gone.clone(), after.clone()],
        [before.clone(), after.clone(), gone.clone()],
        [after, before, gone],
    ] {
        assert_eq!(holders(&world(order)), [("10.96.0.1:80/TCP".to_owned(), "after".to_owned())].into());
    }
}

fn link(index: u32, name: &str, addresses: &[&str]) -> Link {
    Link {
        index,
        name: name.into(),
        loopback: name == "lo",
        up: true,
        layer3: name.starts_with("wg"),
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        ..Link::default()
    }
}

fn links() -> Vec<Link> {
    vec![
        link(5, "wg0", &[]),
        link(1, "lo", &["127.0.0.1/8", "::1/128", "192.0.2.1/32"]),
        link(3, "eth1", &["203.0.113.1/32", "10.0.0.3/24", "fe80::2/64"]),
        link(2, "eth0", &["192.168.0.2/24", "192.168.0.3/24", "fe80::1/64", "2001:db8::2/64"]),
        link(4, "cni0", &["10.244.1.1/24", "169.254.1.1/16"]),
    ]
}

#[test]
fn masquerading_uses_an_address_of_the_interface_the_nodes_first() {
    let mut web = service("10.96.0.1");
    web.load_balancer_ips = vec![ip("203.0.113.1")]; // Bound on eth1, but not ours to use (M-13).
    let mut world = world([
        Change::Links(links()),
        Change::Node(Some(node(None, &["192.168.0.3"]))),
        Change::Service(name("web"), Some(web)),
    ]);
    let sources = |world: &World| -> Vec<(u32, String, String)> {
        let node = world.node();
        let source = |index, any| node.routes[&RouteKey::range(index, any, 0)].to_string();
        let ifaces = node.ifaces.keys();
        ifaces.map(|i| (*i, source(*i, Addr::ANY_V4), source(*i, Addr::ANY_V6))).collect()
    };
    let row = |index, v4: &str| (index, v4.to_owned(), "2001:db8::2".to_owned());
    let expected = [row(2, "192.168.0.3"), row(3, "10.0.0.3"), row(4, "10.244.1.1"), row(5, "192.168.0.3")];
    assert_eq!(
        world.node().ifaces.values().map(|iface| iface.flags).collect::<Vec<_>>(),
        [0, 0, 0, iface::L3]
    );
    assert_eq!(sources(&world), expected);

    world.apply(Change::Service(name("web"), None));
    assert_eq!(sources(&world)[1], row(3, "203.0.113.1"));

    world.apply(Change::Links(vec![link(7, "eth0", &["fe80::1/64", "169.254.0.1/16"])]));
    assert!(world.node().routes.values().all(Addr::is_unspecified));
}

#[test]
fn node_ports_are_accepted_where_the_setting_says() {
    // V-33, V-34.
    let accepted = |setting: NodePortAddresses, ips: &[&str]| -> Vec<String> {
        let mut world = World::new(Settings { nodeport_addresses: setting, ..settings() });
        world.apply(Change::Links(links()));
        world.apply(Change::Node(Some(node(None, ips))));
        let addresses = world.node().addresses;
        assert_eq!(addresses.len(), 7, "{addresses:?}");
        assert!(addresses.values().all(|flags| flags & address::NODE != 0));
        let mut found: Vec<String> = addresses
            .iter()
            .filter(|(_, flags)| *flags & address::NODE_PORT != 0)
            .map(|(addr, _)| addr.to_string())
            .collect();
        found.sort();
        found
    };
    let ranges =
        |texts: &[&str]| NodePortAddresses::Ranges(texts.iter().map(|text| text.parse().unwrap()).collect());
    let all_v4 = ["10.0.0.3", "10.244.1.1", "192.0.2.1", "192.168.0.2", "192.168.0.3", "203.0.113.1"];
    // T-65: not at the secondary address; and not at IPv6, whose primary address nobody has named.
    assert_eq!(accepted(NodePortAddresses::Primary, &["192.168.0.2"]), ["192.168.0.2"]);
    assert_eq!(
        accepted(NodePortAddresses::Primary, &["192.168.0.2", "2001:db8::2"]),
        ["192.168.0.2", "2001:db8::2"]
    );
    assert_eq!(accepted(NodePortAddresses::Primary, &[]).len(), 7);
    // T-66.
    assert_eq!(
        accepted(ranges(&["192.168.0.0/24", "192.168.1.0/24", "2001:db8:1::/64"]), &[]),
        ["192.168.0.2", "192.168.0.3"]
    );
    // T-67.
    assert_eq!(accepted(ranges(&["10.20.30.0/24"]), &[]), ["2001:db8::2"]);
    // T-68.
    assert_eq!(accepted(ranges(&["1.2.3.0/24", "0.0.0.0/0", "fd00::/8"]), &[]), all_v4);
}

#[test]
fn the_pod_range_is_the_clusters_else_the_nodes() {
    let own = world([Change::Node(Some(node(None, &[])))]).node().config;
    assert!(own.is_pod(&ip("10.244.1.9").into()) && !own.is_pod(&ip("10.244.2.9").into()));
    assert!(!own.knows_pods(&ip("fd00::1").into()));
    let host = config::SOCKET_HOST | config::LOCALHOST_NODE_PORTS;
    assert_eq!(own.flags, config::SOCKET_PODS | host | config::POD_RANGE_V4);

    let cidrs = vec!["10.128.0.0/9".parse().unwrap(), "fd00:10::/48".parse().unwrap()];
    let set =
        Settings { cluster_cidrs: cidrs, socket_lb: SocketLb::Host, masquerade_all: true, ..settings() };
    let mut world = World::new(set);
    world.apply(Change::Node(Some(node(None, &[]))));
    let table = world.node().config;
    assert!(table.is_pod(&ip("10.244.2.9").into()) && !table.is_pod(&ip("10.1.0.1").into()));
    assert!(table.is_pod(&ip("fd00:10::7:1").into()) && !table.is_pod(&ip("fd00:11::1").into()));
    let ranges = config::POD_RANGE_V4 | config::POD_RANGE_V6;
    assert_eq!(table.flags, host | config::MASQUERADE_ALL | ranges);
    assert_eq!(
        (table.snat_port(0).number(), table.snat_total, table.seed, table.host_netns),
        (61_000, 1_000, 7, 1)
    );
}

#[test]
fn interfaces_of_pods_are_marked_where_the_mode_goes_by_them() {
    let port = |index, name: &str, master| Link { master: Some(master), ..link(index, name, &[]) };
    let links = vec![
        link(2, "eth0", &["192.168.0.2/24"]),
        link(4, "cni0", &["10.244.1.1/24"]),
        port(6, "veth1", 4),
        port(7, "eth1", 9),
        link(8, "cali1", &[]),
        link(9, "br0", &[]),
    ];
    let pods = |mode: DetectLocal| -> Vec<u32> {
        let mut world = World::new(Settings { detect_local: mode, ..settings() });
        world.apply(Change::Links(links.clone()));
        world.apply(Change::Node(Some(node(None, &[]))));
        let tables = world.node();
        assert_eq!(
            tables.config.flags & config::POD_INTERFACES != 0,
            tables.config.flags & config::POD_RANGE_V4 == 0
        );
        let marked = tables.ifaces.iter().filter(|(_, iface)| iface.flags & iface::POD != 0);
        marked.map(|(index, _)| *index).collect()
    };
    // M-1: the bridge and what is plugged into it; by prefix every interface of that name.
    assert_eq!(pods(DetectLocal::Bridge("cni0".into())), [4, 6]);
    assert_eq!(pods(DetectLocal::InterfacePrefix("cali".into())), [8]);
    assert_eq!(pods(DetectLocal::InterfacePrefix("veth".into())), [6]);
    assert_eq!(pods(DetectLocal::InterfacePrefix("cni".into())), [4, 6]);
    // M-4.
    assert_eq!(pods(DetectLocal::Bridge("a-name-that-is-too-long".into())), Vec::<u32>::new());
    assert_eq!(pods(DetectLocal::AnyRange), Vec::<u32>::new());
}

#[test]
fn ranges_of_cluster_ips_are_united_until_the_last_service_cidr_has_gone() {
    // P-22, Y-16.
    let ranges = |texts: &[&str]| Some(texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>());
    let ranges_of = |name: &str, texts: &[&str]| Change::ServiceRanges(name.to_owned(), ranges(texts));
    let inside = |world: &World| {
        let config = world.node().config;
        ["10.96.0.9", "10.97.0.9", "10.98.0.9", "fd00:96::9"]
            .map(|text| config.is_service_range(&ip(text).into()))
    };
    let mut world = World::new(settings());
    assert_eq!(inside(&world), [false; 4]);
    assert!(world.apply(ranges_of("kubernetes", &["10.96.0.0/16", "fd00:96::/108"])).is_some());
    assert!(world.apply(ranges_of("more", &["10.97.0.0/16", "10.96.0.0/16"])).is_some());
    assert_eq!(world.apply(ranges_of("more", &["10.97.0.0/16", "10.96.0.0/16"])), None);
    assert_eq!(inside(&world), [true, true, false, true]);
    assert_eq!(world.node().config.service_range_count, 2, "adjacent ranges are one");
    world.apply(Change::ServiceRanges("kubernetes".into(), None));
    assert_eq!(inside(&world), [true, true, false, false]);
    world.apply(Change::ServiceRanges("more".into(), None));
    assert_eq!(inside(&world), [false; 4]);

    // More than there is room for: those that are known are right.
    let many: Vec<String> = (0..20).map(|n| format!("10.96.{}.0/24", n * 2)).collect();
    world.apply(ranges_of("many", &many.iter().map(String::as_str).collect::<Vec<_>>()));
    assert_eq!(world.node().config.service_range_count, 8);
    assert_eq!(inside(&world), [true, false, false, false]);

    let mut world = World::new(Settings { drop_unallocated: false, ..settings() });
    world.apply(ranges_of("kubernetes", &["10.96.0.0/16"]));
    assert_eq!(inside(&world), [false; 4]);
}

#[test]
fn a_detection_mode_names_the_one_range_that_counts() {
    let known = |mode: DetectLocal, cidrs: &[&str], pod_cidrs: &[&str]| {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let mut world = World::new(Settings { detect_local: mode, cluster_cidrs: nets(cidrs), ..settings() });
        world.apply(Change::Node(Some(Node { pod_cidrs: nets(pod_cidrs), ..node(None, &[]) })));
        let table = world.node().config;
        let pods = ["10.1.0.9", "10.2.0.9", "fd00:1::9", "fd00:2::9"];
        pods.map(|pod| table.is_pod(&ip(pod).into()))
    };
    let (cluster, own): (&[&str], &[&str]) =
        (&["10.1.0.0/16", "fd00:1::/64"], &["10.2.0.0/24", "fd00:2::/64"]);
    // M-1: by mode; M-5: a mode without its range knows no pods, whatever the other one says.
    let (by_cluster, by_node, no_op) = ([true, false, true, false], [false, true, false, true], [false; 4]);
    assert_eq!(known(DetectLocal::ClusterCidr, cluster, own), by_cluster);
    assert_eq!(known(DetectLocal::ClusterCidr, &[], own), no_op);
    assert_eq!(known(DetectLocal::NodeCidr, cluster, own), by_node);
    assert_eq!(known(DetectLocal::NodeCidr, cluster, &[]), no_op);
    assert_eq!(known(DetectLocal::AnyRange, cluster, own), by_cluster);
    assert_eq!(known(DetectLocal::AnyRange, &[], own), by_node);
    // M-1: the first of a family counts; M-3: families do not depend on each other, nor on the order.
    let mixed: &[&str] = &["fd00:2::/64", "10.2.0.0/24", "10.1.0.0/24", "fd00:1::/64"];
    assert_eq!(known(DetectLocal::NodeCidr, &[], mixed), by_node);
    assert_eq!(known(DetectLocal::NodeCidr, &[], &mixed[..1]), [false, false, false, true]);
}

#[test]
fn services_do_not_wait_for_pod_cidrs_and_follow_them() {
    // Y-9, Y-12.
    let mut world = World::new(Settings { detect_local: DetectLocal::NodeCidr, ..settings() });
    world.apply(Change::Links(links()));
    world.apply(Change::Service(name("web"), Some(service("10.96.0.1"))));
    for kind in [Kind::Service, Kind::Slice, Kind::Node] {
        world.apply(Change::Synced(kind));
    }
    let pods = ["10.1.0.9", "10.2.0.9"];
    let known = |world: &World| pods.map(|pod| world.node().config.is_pod(&ip(pod).into()));
    assert!(world.synced() && !world.desired().services.is_empty());
    assert_eq!(known(&world), [false, false]);
    let warns = |world: &World| world.warnings().iter().any(|said| said.line.contains("has no podCIDRs"));
    assert!(warns(&world));
    for (cidrs, expected) in
        [(&[][..], [false, false]), (&["10.1.0.0/24"], [true, false]), (&["10.2.0.0/24"], [false, true])]
    {
        let pod_cidrs = cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
        world.apply(Change::Node(Some(Node { pod_cidrs, ..node(None, &[]) })));
        assert_eq!(known(&world), expected);
        assert_eq!(warns(&world), cidrs.is_empty());
    }
}

#[test]
fn localhost_node_ports_need_the_switch_and_socket_programs() {
    let on = |localhost_node_ports: bool, socket_lb: SocketLb| {
        let world = World::new(Settings { localhost_node_ports, socket_lb, ..settings() });
        world.node().config.flags & config::LOCALHOST_NODE_PORTS != 0
    };
    // V-36, as an offer beyond the baseline.
    assert!(on(true, SocketLb::All) && on(true, SocketLb::Host));
    assert!(!on(true, SocketLb::Off) && !on(false, SocketLb::All) && !on(false, SocketLb::Host));
}

#[test]
fn external_ips_and_a_family_can_be_switched_off() {
    let mut web = service("10.96.0.1");
    web.cluster_ips.push(ip("fd00::1"));
    web.external_ips = vec![ip("203.0.113.1"), ip("2001:db8::7")];
    web.load_balancer_ips = vec![ip("203.0.113.2"), ip("2001:db8::8")];
    let frontends = |settings: Settings| {
        let mut world = World::new(settings);
        world.apply(Change::Service(name("web"), Some(web.clone())));
        let mut found: Vec<String> = world
            .desired()
            .services
            .values()
            .flat_map(|desired| &desired.frontends)
            .map(|frontend| frontend.key.addr.to_string())
            .collect();
        found.sort();
        found
    };
    let all = ["10.96.0.1", "2001:db8::7", "2001:db8::8", "203.0.113.1", "203.0.113.2", "fd00::1"];
    assert_eq!(frontends(settings()), all);
    // V-8.
    let without = ["10.96.0.1", "2001:db8::8", "203.0.113.2", "fd00::1"];
    assert_eq!(frontends(Settings { external_ips: false, ..settings() }), without);
    // S-12, Y-11.
    let v4 = ["10.96.0.1", "203.0.113.1", "203.0.113.2"];
    assert_eq!(frontends(Settings { ipv6: false, ..settings() }), v4);
}

#[test]
fn the_bind_address_stands_for_the_node_and_changes_of_the_node_are_followed() {
    // Y-10, Y-13, V-18, V-33.
    let bound = Settings { bind_address: Some(ip("192.168.0.3")), ..settings() };
    let mut world = World::new(bound);
    world.apply(Change::Links(links()));
    let mut web = service("10.96.0.1");
    web.load_balancer_ips = vec![ip("203.0.113.1")];
    web.source_ranges = vec!["192.168.0.3/32".parse().unwrap()];
    world.apply(Change::Service(name("web"), Some(web)));
    let node_port_addresses = |world: &World| -> Vec<String> {
        let accepted = [Family::V4, Family::V6].map(|family| world.node_port_addresses(family));
        let lists = accepted.into_iter().map(|at| if let Accepted::At(ips) = at { ips } else { vec![] });
        lists.flatten().map(|ip| ip.to_string()).collect()
    };
    let own_vip_allowed = |world: &World| only(world).source_ranges.len() == 2;
    // Before the Node is known.
    assert_eq!(node_port_addresses(&world), ["192.168.0.3"]);
    assert_eq!((own_vip_allowed(&world), world.primary_family()), (true, Family::V4));
    world.apply(Change::Node(Some(node(None, &["2001:db8::2", "192.168.0.2"]))));
    assert_eq!(node_port_addresses(&world), ["192.168.0.3", "2001:db8::2"]);
    assert_eq!((own_vip_allowed(&world), world.primary_family()), (true, Family::V4));

    let mut world = World::new(settings());
    world.apply(Change::Links(links()));
    for (ips, expected, primary) in [
        (&["2001:db8::2", "192.168.0.2"][..], &["192.168.0.2", "2001:db8::2"][..], Family::V6),
        (&["192.168.0.3"], &["192.168.0.3"], Family::V4),
    ] {
        world.apply(Change::Node(Some(node(None, ips))));
        assert_eq!(
            (node_port_addresses(&world), world.primary_family()),
            (expected.iter().map(|ip| (*ip).to_owned()).collect(), primary)
        );
    }
    // Y-13: a Node that goes leaves its addresses.
    world.apply(Change::Node(None));
    assert_eq!(node_port_addresses(&world), ["192.168.0.3"]);
}

#[test]
fn health_checks_are_served_where_node_ports_are_accepted() {
    let accepted = |setting: NodePortAddresses, ips: &[&str]| {
        let mut world = World::new(Settings { nodeport_addresses: setting, ..settings() });
        world.apply(Change::Links(links()));
        world.apply(Change::Node(Some(node(None, ips))));
        [Family::V4, Family::V6].map(|family| match world.node_port_addresses(family) {
            Accepted::Everywhere => "everywhere".to_owned(),
            Accepted::At(ips) => ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" "),
        })
    };
    let ranges =
        |texts: &[&str]| NodePortAddresses::Ranges(texts.iter().map(|text| text.parse().unwrap()).collect());
    // H-15; T-67 and T-68 on the way.
    assert_eq!(accepted(NodePortAddresses::Primary, &[]), ["everywhere", "everywhere"]);
    assert_eq!(accepted(NodePortAddresses::Primary, &["192.168.0.3"]), ["192.168.0.3", ""]);
    assert_eq!(accepted(ranges(&["10.20.30.0/24"]), &[]), ["", "everywhere"]);
    assert_eq!(accepted(ranges(&["0.0.0.0/0", "2001:db8::/64"]), &[]), ["everywhere", "2001:db8::2"]);
}

#[test]
fn nothing_is_known_until_every_kind_has_been_listed() {
    let mut world = World::new(settings());
    for change in [
        Change::Synced(Kind::Slice),
        Change::Links(Vec::new()),
        Change::Synced(Kind::Node),
        Change::Connected(true),
    ] {
        world.apply(change);
        assert!(!world.synced());
    }
    world.apply(Change::Synced(Kind::Service));
    assert!(world.synced() && world.connected());
}

#[test]
fn local_ready_addresses_are_counted_once_for_the_health_check() {
    // T-82.
    let mut web = service("10.96.0.1");
    web.health_check_node_port = 32_000;
    web.external_local = true;
    web.ports = [("http", 80), ("https", 443)]
        .map(|(name, port)| Port { name: name.into(), proto: Proto::TCP, port, node_port: 0 })
        .to_vec();
    let mut both = slice("web", "1 L R; 2 L ST; 3 R");
    both.ports = [("http", 80), ("https", 443)]
        .map(|(name, port)| SlicePort { name: name.into(), proto: Proto::TCP, port })
        .to_vec();
    let world = world([Change::Service(name("web"), Some(web)), Change::Slice(name("web-1"), Some(both))]);
    let expected = HealthCheck { service: name("web"), family: Family::V4, port: 32_000, local_endpoints: 1 };
    assert_eq!(world.health_checks(), [expected]);
}

#[test]
fn health_checks_of_a_change_are_those_of_its_services_and_add_up_to_all() {
    // Y-24, Y-25: what a change costs is counted here, beside a thousand Services that it does not touch.
    let balanced = |ip: &str, port| Service { health_check_node_port: port, ..service(ip) };
    let mut world = World::new(settings());
    for n in 0..1_000_u16 {
        let (other, ip) = (format!("other-{n}"), format!("10.97.{}.{}", n / 250, n % 250 + 1));
        world.apply(Change::Service(name(&other), Some(balanced(&ip, 20_000 + n))));
        world.apply(Change::Slice(name(&format!("{other}-1")), Some(slice(&other, "9 L R"))));
    }
    world.apply(Change::Service(name("none"), Some(service("10.96.0.9"))));
    let mut known: BTreeMap<_, _> = world.take_health_checks().into_iter().collect();
    assert_eq!(known.len(), 1_000, "only Services that have one");
    let steps = [
        (Change::Service(name("web"), Some(balanced("10.96.0.1", 32_000))), 1),
        (Change::Slice(name("web-1"), Some(slice("web", "1 L R; 2 R"))), 1),
        (Change::Slice(name("web-1"), Some(slice("web", "1 L R; 2 L R"))), 1),
        // It changes hands (E-7).
        (Change::Slice(name("web-1"), Some(slice("other-7", "1 L R; 2 L R"))), 2),
        (Change::Slice(name("none-1"), Some(slice("none", "3 L R"))), 0),
        (Change::Slice(name("nobody-1"), Some(slice("nobody", "3 L R"))), 0),
        (Change::Service(name("web"), Some(service("10.96.0.1"))), 1),
        (Change::Slice(name("web-2"), Some(slice("web", "4 L R"))), 0),
        (Change::Service(name("other-8"), None), 1),
        (Change::Service(name("other-8"), Some(balanced("10.98.0.8", 20_008))), 1),
    ];
    for (change, services) in steps {
        let context = format!("{change:?}");
        world.apply(change);
        let changed = world.take_health_checks();
        assert_eq!(changed.len(), services, "{context}");
        known.extend(changed);
        let mut all: Vec<HealthCheck> = known.values().flatten().cloned().collect();
        all.sort();
        let mut expected = world.health_checks();
        expected.sort();
        assert_eq!(all, expected, "{context}");
        assert_eq!(world.take_health_checks(), [], "{context}: once");
    }
}

#[test]
fn endpoints_are_counted_as_they_come_and_go() {
    let mut world = world([]);
    for (slice_name, endpoints, count) in
        [("a", "1 R; 2 R", 2), ("b", "1 R", 3), ("a", "1 R; 2 R; 3 R", 4), ("b", "", 3), ("a", "3 R", 1)]
    {
        world.apply(Change::Slice(name(slice_name), Some(slice("web", endpoints))));
        assert_eq!(world.endpoint_count(), count, "{slice_name}: {endpoints}");
    }
    world.apply(Change::Slice(name("a"), None));
    world.apply(Change::Slice(name("none"), None));
    assert_eq!(world.endpoint_count(), 0);
}

#[test]
fn what_only_adds_goes_at_once_and_what_may_be_half_of_a_move_settles() {
    // Y-18.
    use Urgency::{AtOnce, Settled};
    let of_service = |service: Service| Change::Service(name("web"), Some(service));
    let of_slice = |text: &str| Change::Slice(name("web-1"), Some(slice("web", text)));
    let resetting = || Service { reset_on_loss: true, ..service("10.96.0.1") };
    let more_ports = || {
        let port = |name: &str, port| Port { name: name.into(), proto: Proto::TCP, port, node_port: 0 };
        Service { ports: vec![port("", 80), port("more", 81)], ..service("10.96.0.1") }
    };
    let renamed = || Slice {
        ports: vec![SlicePort { name: "http".into(), proto: Proto::TCP, port: 8080 }],
        ..slice("web", "1 R")
    };
    let story = [
        ("a Service before its slices serves nobody yet", of_service(service("10.96.0.1")), Settled),
        ("a slice", of_slice("1 R; 2 R"), AtOnce),
        ("an endpoint more", of_slice("1 R; 2 R; 3 R"), AtOnce),
        ("one is not ready", of_slice("1 R; 2 R; 3 NR"), AtOnce),
        ("one terminates", of_slice("1 R; 2 R; 3 ST"), AtOnce),
        ("one leaves where there is no slice to move to", of_slice("1 R; 2 R"), AtOnce),
        ("one is replaced there", of_slice("1 R; 4 R"), AtOnce),
        ("all leave", of_slice(""), Settled),
        ("and are back", of_slice("1 R; 2 R"), AtOnce),
        ("another slice", Change::Slice(name("web-2"), Some(slice("web", "5 R"))), AtOnce),
        ("one leaves, perhaps to there", of_slice("1 R"), Settled),
        ("the other slice goes", Change::Slice(name("web-2"), None), Settled),
        ("a port more", of_service(more_ports()), AtOnce),
        ("a port less", of_service(service("10.96.0.1")), Settled),
        ("another address", of_service(service("10.96.0.2")), Settled),
        ("who loses an endpoint is reset from now on", of_service(resetting()), Settled),
        ("so it is not lost in haste", of_slice("2 R"), Settled),
        ("one more is", of_slice("2 R; 3 R"), AtOnce),
        ("the port gets another name", Change::Slice(name("web-1"), Some(renamed())), Settled),
        ("the slice changes hands", Change::Slice(name("web-1"), Some(slice("api", "1 R"))), Settled),
        ("a slice of no Service", Change::Slice(name("api-2"), Some(slice("api", "2 R"))), Settled),
        ("its Service", Change::Service(name("api"), Some(service("10.96.0.3"))), AtOnce),
        ("it goes", Change::Service(name("api"), None), Settled),
        ("an interface", Change::Links(vec![link(2, "eth0", &["192.168.0.2/24"])]), Settled),
        ("all are known", Change::Synced(Kind::Service), Settled),
    ];
    let mut world = world([]);
    for (what, change, urgency) in story {
        assert_eq!(world.apply(change), Some(urgency), "{what}");
    }
}

#[test]
fn an_endpoint_that_moves_to_another_slice_is_never_gone_from_what_is_written() {
    // Y-18, C-1: whichever half of the move comes first.
    let of_slice = |name_of: &str, text: &str| Change::Slice(name(name_of), Some(slice("web", text)));
    let gone = |name_of: &str| Change::Slice(name(name_of), None);
    // Of who need not be reset, one that leaves the only slice for a new one is gone until that is there.
    let (both, to_reset) = (&[true, false][..], &[true][..]);
    let moves = [
        (
            "to one that is there",
            both,
            ["1 R; 2 R", "3 R"],
            [of_slice("a", "2 R"), of_slice("b", "1 R; 3 R")],
        ),
        ("and was the last one here", both, ["1 R", "3 R"], [of_slice("a", ""), of_slice("b", "1 R; 3 R")]),
        ("to a new one", both, ["1 R; 2 R", ""], [of_slice("b", "1 R"), of_slice("a", "2 R")]),
        ("to one that comes later", both, ["1 R", ""], [of_slice("a", ""), of_slice("b", "1 R")]),
        ("from one that goes", both, ["1 R", "3 R"], [gone("a"), of_slice("b", "1 R; 3 R")]),
        ("from the only one", both, ["1 R", ""], [gone("a"), of_slice("b", "1 R")]),
        ("and others stay", to_reset, ["1 R; 2 R", ""], [of_slice("a", "2 R"), of_slice("b", "1 R")]),
    ];
    let cases = moves.into_iter().flat_map(|(what, resets, slices, halves)| {
        resets.iter().map(move |reset| (what, *reset, slices, halves.clone()))
    });
    let owner = ServicePort { service: name("web"), port: "".into(), proto: Proto::TCP, family: Family::V4 };
    for (what, reset_on_loss, [a, b], [first, second]) in cases {
        let context = format!("{what}, reset: {reset_on_loss}");
        let web = Service { reset_on_loss, ..service("10.96.0.1") };
        let mut world = world([Change::Service(name("web"), Some(web)), of_slice("a", a)]);
        if !b.is_empty() {
            world.apply(of_slice("b", b));
        }
        world.take_dirty();
        let sync = |world: &mut World| {
            assert!(!world.has_left(&owner, (ip("10.244.0.1"), 8080)), "{context}");
            for (_, desired) in world.take_dirty() {
                let octets = octets(&desired.unwrap().cluster);
                assert!(octets.split(' ').any(|octet| octet == "1"), "{context}: {octets:?}");
            }
        };
        // What settles waits for the other half.
        if world.apply(first) == Some(Urgency::AtOnce) {
            sync(&mut world);
        }
        world.apply(second);
        sync(&mut world);
    }
}

#[test]
fn service_ports_without_an_endpoint_here_add_up_whatever_comes_and_goes() {
    // H-42.
    let local = |ip: &str| Service { internal_local: true, ..service(ip) };
    let mut world = world([]);
    let mut expect = |change: Change, internal: u64| {
        let context = format!("{change:?}");
        world.apply(change);
        world.take_dirty();
        let v4 = NoLocal { internal, external: 0 };
        assert_eq!(
            world.without_local_endpoints(),
            NoLocalByFamily { v4, ..Default::default() },
            "{context}"
        );
        world.take_desired();
        assert_eq!(world.without_local_endpoints().v4, v4, "{context}, all of it");
    };
    let slice_of = |service: &str, text: &str| Change::Slice(name(service), Some(slice(service, text)));
    expect(Change::Service(name("a"), Some(local("10.96.0.1"))), 0);
    expect(slice_of("a", "1 R"), 1);
    expect(Change::Service(name("b"), Some(local("10.96.0.2"))), 1);
    expect(slice_of("b", "1 R"), 2);
    expect(slice_of("b", "1 L R"), 1);
    expect(Change::Service(name("a"), Some(service("10.96.0.1"))), 0);
    expect(Change::Service(name("a"), Some(local("10.96.0.1"))), 1);
    expect(Change::Service(name("a"), None), 0);
}

#[test]
fn warnings_are_kept_by_object_until_taken_back() {
    let warn = |lines: &[&str]| Change::Warnings {
        object: "Service default/web".to_owned(),
        lines: lines.iter().map(|line| (*line).to_owned()).collect(),
    };
    let mut world = world([warn(&["spec.externalIPs[0] is wrong"])]);
    assert_eq!(world.apply(warn(&["spec.externalIPs[0] is wrong"])), None);
    assert_eq!(world.warnings().len(), 1);
    assert!(world.apply(warn(&[])).is_some());
    assert!(world.warnings().is_empty());
    let many: Vec<String> = (0..50).map(|i| i.to_string()).collect();
    world.apply(Change::Warnings { object: "x".to_owned(), lines: many });
    assert_eq!(world.warnings().len(), 16);
    assert!(world.warnings().iter().any(|warning| warning.line == "… and 35 more"));
}

/// Few names and addresses, so that Services collide often.
fn any_service() -> impl Strategy<Value = Service> {
    let ports = prop::collection::vec((0..3_u16, prop::bool::ANY, 0..3_u16), 1..3);
    (0..4_u8, ports, prop::collection::vec(0..4_u8, 0..3), 0..3_i64, prop::bool::ANY, prop::bool::ANY)
        .prop_map(|(own, ports, external, created, internal_local, external_local)| {
            let mut service = service(&format!("10.96.0.{own}"));
            service.ports = ports
                .into_iter()
                .map(|(n, udp, node_port)| Port {
                    name: format!("p{n}").into(),
                    proto: if udp { Proto::UDP } else { Proto::TCP },
                    port: 80 + n,
                    node_port: if node_port == 0 { 0 } else { 30_000 + node_port },
                })
                .collect();
            service.external_ips = external.into_iter().map(|n| ip(&format!("10.96.0.{n}"))).collect();
            Service { created, internal_local, external_local, ..service }
        })
}

fn any_slice() -> impl Strategy<Value = Slice> {
    let endpoints = prop::collection::vec((1..5_u8, 0..6_usize), 0..4);
    (0..4_u8, endpoints, 0..3_u16).prop_map(|(owner, endpoints, port)| {
        let states = ["R", "L R", "ST", "L ST Z=a", "R Z=a", "NR"];
        let texts: Vec<String> =
            endpoints.into_iter().map(|(octet, state)| format!("{octet} {}", states[state])).collect();
        Slice {
            ports: vec![SlicePort { name: format!("p{port}").into(), proto: Proto::TCP, port: 8080 }],
            ..slice(&format!("s{owner}"), &texts.join(";"))
        }
    })
}

fn any_changes() -> impl Strategy<Value = Vec<Change>> {
    let services = prop::collection::btree_map(0..4_u8, any_service(), 0..5);
    let slices = prop::collection::btree_map(0..6_u8, any_slice(), 0..6);
    (services, slices).prop_map(|(services, slices)| {
        let services = services.into_iter().map(|(n, s)| Change::Service(name(&format!("s{n}")), Some(s)));
        let slices = slices.into_iter().map(|(n, s)| Change::Slice(name(&format!("e{n}")), Some(s)));
        let node = [Change::Node(Some(node(Some("a"), &["192.168.0.2"]))), Change::Links(links())];
        services.chain(slices).chain(node).collect()
    })
}

proptest! {
    #[test]
    fn any_order_of_the_same_changes_gives_the_same_tables(
        (sorted, shuffled) in any_changes().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle())),
    ) {
        let (a, b) = (world(sorted), world(shuffled));
        prop_assert_eq!(a.desired(), b.desired());
        prop_assert_eq!(a.warnings(), b.warnings());
    }

    #[test]
    fn what_is_handed_on_piece_by_piece_is_the_whole(
        changes in (any_changes(), any_changes(), any_changes()).prop_map(|(a, b, c)| [a, b, c].concat()),
        removed in prop::collection::vec((prop::bool::ANY, 0..6_u8), 0..8),
        every in 1..5_usize,
    ) {
        let removals = removed.into_iter().map(|(is_service, n)| if is_service {
            Change::Service(name(&format!("s{n}")), None)
        } else {
            Change::Slice(name(&format!("e{n}")), None)
        });
        let mut world = World::new(settings());
        let mut held = BTreeMap::new();
        for (i, change) in changes.into_iter().chain(removals).enumerate() {
            world.apply(change);
            if i % every == 0 {
                for (port, desired) in world.take_dirty() {
                    prop_assert_ne!(held.get(&port), desired.as_ref());
                    match desired {
                        Some(desired) => held.insert(port, desired),
                        None => held.remove(&port),
                    };
                }
                prop_assert_eq!(&held, &world.desired().services);
                holders(&world);
            }
        }
    }
}

#[test]
fn who_is_to_be_reset_is_known_until_it_leaves_or_terminates() {
    let wishing = Service { reset_on_loss: true, ..service("10.96.0.1") };
    let ends = "1 R; 2 NR; 3 ST; 4 T; 5 RT";
    let world = world([
        Change::Service(name("web"), Some(wishing)),
        Change::Slice(name("web-1"), Some(slice("web", ends))),
    ]);
    let flags = |last: u8| {
        let at = (ip(&format!("10.244.0.{last}")).into(), proxy_common::addr::Port::new(8080));
        only(&world).backends.get(&at).map(|end| end.flags & (backend::RESET | backend::DRAINING))
    };
    assert_eq!(flags(1), Some(backend::RESET));
    assert_eq!(flags(2), Some(backend::RESET | backend::DRAINING));
    assert_eq!(flags(3), Some(backend::DRAINING));
    assert_eq!([flags(4), flags(5)], [None, Some(0)]);

    let owner = world.desired().services.into_keys().next().unwrap();
    assert!(
        world.has_left(&owner, (ip("10.244.0.9"), 8080)) && world.has_left(&owner, (ip("10.244.0.1"), 80))
    );
    assert!(!world.has_left(&owner, (ip("10.244.0.4"), 8080)), "it is still named");
    let other = ServicePort { port: "gone".into(), ..owner };
    assert!(!world.has_left(&other, (ip("10.244.0.9"), 8080)), "its port has gone, not the endpoint");
}

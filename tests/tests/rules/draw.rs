//! Drawing clusters and edits.

use ipnet::IpNet;
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;

use agent_core::model::{LoadBalancerMode, SocketLb};

use super::facts::{
    Detect, Edit, EndpointFacts, Facts, Hints, NodeFacts, Operator, ServiceFacts, SliceFacts,
};

/// Numbers of endpoints there are.
const ENDPOINTS: usize = 11;

fn policy() -> impl Strategy<Value = Option<&'static str>> {
    prop_oneof![3 => Just(Some("Cluster")), 3 => Just(Some("Local")), 1 => Just(None)]
}

fn service() -> impl Strategy<Value = ServiceFacts> {
    let kind = prop_oneof![
        4 => Just("ClusterIP"), 3 => Just("NodePort"), 5 => Just("LoadBalancer"), 1 => Just("ExternalName")
    ];
    let cluster_ip = prop_oneof![12 => (1_u8..=4).prop_map(Some), 1 => Just(None)];
    let families = prop_oneof![1 => Just([true, false]), 1 => Just([false, true]), 3 => Just([true, true])];
    let node_port = prop_oneof![1 => Just(0_u16), 2 => Just(30_001), 2 => Just(30_002), 1 => Just(30_003)];
    let mode = prop_oneof![3 => Just(Some("VIP")), 1 => Just(Some("Proxy")), 1 => Just(None)];
    let addresses = (
        kind,
        cluster_ip,
        families,
        btree_map(0_usize..4, node_port, 1..4),
        prop_oneof![2 => Just(Vec::new()), 1 => vec(1_u8..=5, 1..3)],
        prop_oneof![1 => Just(Vec::new()), 1 => vec((1_u8..=3, mode), 1..3)],
    );
    let rules = (
        prop_oneof![2 => Just(Vec::new()), 1 => vec(0_u8..7, 1..3)],
        option::weighted(0.3, option::weighted(0.7, prop_oneof![Just(60_u32), Just(300)])),
        policy(),
        policy(),
        0_u8..3,
        prop::bool::weighted(0.05),
        prop_oneof![2 => Just(None), 1 => Just(Some("dsr")), 1 => Just(Some("snat"))],
    );
    (addresses, rules).prop_map(|(addresses, rules)| {
        let (kind, cluster_ip, families, ports, external_ips, ingress) = addresses;
        let (ranges, affinity, internal, external, day, foreign, mode) = rules;
        ServiceFacts {
            kind,
            cluster_ip,
            families,
            ports,
            external_ips,
            ingress,
            ranges,
            affinity,
            internal,
            external,
            day,
            foreign,
            mode,
        }
    })
}

fn conditions() -> impl Strategy<Value = [Option<bool>; 3]> {
    prop_oneof![
        3 => Just([Some(true), Some(true), Some(false)]),
        1 => Just([Some(false), Some(true), Some(true)]),
        3 => prop::array::uniform3(option::of(any::<bool>())),
    ]
}

fn slice() -> impl Strategy<Value = SliceFacts> {
    let endpoint = (0..ENDPOINTS as u8, prop::bool::weighted(0.05), conditions())
        .prop_map(|(n, stray, conditions)| EndpointFacts { n, stray, conditions });
    (0_u8..4, any::<bool>(), vec(prop_oneof![4 => 0_usize..4, 1 => 4_usize..9], 1..5), vec(endpoint, 0..6))
        .prop_map(|(service, six, ports, endpoints)| SliceFacts { service, six, ports, endpoints })
}

fn hints() -> impl Strategy<Value = Vec<Hints>> {
    let some = || (vec(0_u8..3, 1..3), vec(0_u8..3, 1..3));
    let any = (vec(0_u8..3, 0..2), vec(0_u8..3, 0..2));
    prop_oneof![
        2 => vec(some(), ENDPOINTS),
        1 => vec(some().prop_map(|(zones, _)| (zones, Vec::new())), ENDPOINTS),
        1 => vec(any, ENDPOINTS),
        2 => Just(vec![(Vec::new(), Vec::new()); ENDPOINTS]),
    ]
}

fn node() -> impl Strategy<Value = NodeFacts> {
    (option::weighted(0.8, 0_u8..3), 0_usize..2).prop_map(|(zone, primary)| NodeFacts { zone, primary })
}

fn ranges(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().expect("a range")).collect()
}

/// ServiceCIDRs: none, both families, and one that not all ClusterIPs are in.
fn service_ranges() -> impl Strategy<Value = Vec<IpNet>> {
    prop_oneof![
        2 => Just(Vec::new()),
        2 => Just(ranges(&["10.96.0.0/16", "fd00:96::/112"])),
        1 => Just(ranges(&["10.96.0.0/30"])),
        1 => Just(ranges(&["10.96.0.0/31", "10.96.0.4/32", "fd00:96::/126"])),
    ]
}

fn operator() -> impl Strategy<Value = Operator> {
    let cluster = prop_oneof![
        3 => Just(ranges(&["10.244.0.0/16", "fd00:244::/32"])),
        1 => Just(ranges(&["10.244.0.0/16"])),
        2 => Just(Vec::new()),
    ];
    let pods = prop_oneof![2 => Just(ranges(&["10.244.1.0/24", "fd00:244:1::/64"])), 1 => Just(Vec::new())];
    let node_ports = prop_oneof![
        1 => Just(None),
        1 => Just(Some(ranges(&["192.168.10.0/24"]))),
        1 => Just(Some(ranges(&["0.0.0.0/0", "fd00:10::/64"]))),
        1 => Just(Some(ranges(&["10.20.30.0/24", "fd00:16::/64"]))),
    ];
    let sockets = prop_oneof![4 => Just(SocketLb::All), 1 => Just(SocketLb::Host), 1 => Just(SocketLb::Off)];
    let detect = prop_oneof![
        4 => Just(Detect::Range), 1 => Just(Detect::Bridge), 1 => Just(Detect::Prefix), 1 => Just(Detect::Nothing)
    ];
    let modes = prop_oneof![Just(LoadBalancerMode::Snat), Just(LoadBalancerMode::Dsr)];
    let masquerade = (prop::bool::weighted(0.2), prop::bool::weighted(0.3), modes);
    let switches = [0.8, 0.8, 0.9, 0.9].map(prop::bool::weighted);
    (cluster, pods, masquerade, node_ports, sockets, detect, switches).prop_map(
        |(cluster_cidrs, pod_cidrs, masquerade, node_port_ranges, socket_lb, detect, switches)| Operator {
            cluster_cidrs,
            pod_cidrs,
            masquerade_all: masquerade.0,
            masquerade_local: masquerade.1,
            loadbalancer_mode: masquerade.2,
            node_port_ranges,
            detect,
            drop_unallocated: switches[0],
            socket_lb,
            localhost_node_ports: switches[1],
            ipv6: switches[2],
            external_ips: switches[3],
        },
    )
}

fn has() -> impl Strategy<Value = [bool; 3]> {
    (prop::bool::weighted(0.8), prop::bool::weighted(0.8)).prop_map(|(second, bridge)| [true, second, bridge])
}

/// A cluster.
pub(crate) fn facts() -> impl Strategy<Value = Facts> {
    let services = btree_map(0_u8..4, service(), 2..5);
    let slices = btree_map(0_u8..16, slice(), 6..16);
    (operator(), services, slices, hints(), option::weighted(0.8, node()), has(), service_ranges()).prop_map(
        |(operator, services, slices, hints, node, has, ranges)| Facts {
            operator,
            services,
            slices,
            hints,
            node,
            has,
            ranges,
        },
    )
}

/// A burst of edits that are written together.
pub(crate) fn burst() -> impl Strategy<Value = Vec<Edit>> {
    let edit = prop_oneof![
        4 => (0_u8..4, option::weighted(0.8, service())).prop_map(|(n, s)| Edit::Service(n, s)),
        3 => (0_u8..16, option::weighted(0.8, slice())).prop_map(|(n, s)| Edit::Slice(n, s)),
        5 => (0_u8..16, 0_usize..8, conditions()).prop_map(|(n, at, c)| Edit::Conditions(n, at, c)),
        1 => hints().prop_map(Edit::Hints),
        1 => node().prop_map(Edit::Node),
        1 => has().prop_map(Edit::Links),
        1 => service_ranges().prop_map(Edit::Ranges),
        1 => Just(Edit::Restart),
        1 => prop_oneof![Just(43_u32), Just(79), Just(410), Just(11_000)].prop_map(Edit::Rest),
    ];
    vec(edit, 1..4)
}

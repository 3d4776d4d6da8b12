//! Packet outcomes, row by row: sections 4, 5 and 14.2 of docs/service-semantics.md.

use std::collections::BTreeSet;

use proxy_common::addr::Proto;
use serde_json::{Value, json};

use super::objects::links;
use super::scene::{
    BRIDGE, Column, Got, LOCAL, NODE, OUTSIDE, POD, REMOTE, REMOTE_POD, SECOND, Scene, balancer, ip, local,
    port, reached, remote, service, slice, word,
};
use super::system::{Caller, Observed, Programs};
use agent_core::model::Change;

const ALL: &[&str] = &[LOCAL, REMOTE];
const HERE: &[&str] = &[LOCAL];

/// Three load-balancer Services: as it comes, with external Local, with internal Local.
const DEFAULT: u8 = 1;
const EXTERNAL: u8 = 2;
const INTERNAL: u8 = 3;

fn three(slices: &Value) -> Vec<Change> {
    let mut all = vec![
        balancer("s1", DEFAULT, &json!({})),
        balancer("s2", EXTERNAL, &json!({ "externalTrafficPolicy": "Local", "healthCheckNodePort": 31_000 })),
        balancer("s3", INTERNAL, &json!({ "internalTrafficPolicy": "Local" })),
    ];
    all.extend(["s1", "s2", "s3"].map(|of| slice(of, &port(8080), slices)));
    all
}

/// How a Service is addressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    Cluster,
    NodePort,
    Balancer,
    ExternalIp,
}

fn address(to: To, n: u8) -> (String, u16) {
    match to {
        To::Cluster => (format!("10.96.0.{n}"), 80),
        To::NodePort => (NODE.into(), 30_000 + u16::from(n)),
        To::Balancer => (format!("203.0.113.10{n}"), 80),
        To::ExternalIp => (format!("203.0.113.{n}"), 80),
    }
}

/// Endpoints and masquerading in one column.
type Cell = (&'static [&'static str], bool);
type Row = (&'static str, &'static str, &'static [To], &'static [u8], [Cell; 3]);

const VIPS: &[To] = &[To::NodePort, To::Balancer];
const EVERY: &[To] = &[To::NodePort, To::Balancer, To::ExternalIp];

/// T-40…T-50: from, to, which Services; then the columns ClusterCIDR, no detector, masquerade-all.
const TABLE: [Row; 11] = [
    ("T-40", POD, &[To::Cluster], &[DEFAULT, EXTERNAL], [(ALL, false), (ALL, false), (ALL, true)]),
    ("T-41", POD, &[To::Cluster], &[INTERNAL], [(HERE, false), (HERE, false), (HERE, true)]),
    ("T-42", POD, VIPS, &[DEFAULT, INTERNAL], [(ALL, true), (ALL, true), (ALL, true)]),
    ("T-43", POD, VIPS, &[EXTERNAL], [(ALL, false), (HERE, false), (ALL, false)]),
    ("T-44", NODE, &[To::Cluster], &[DEFAULT, EXTERNAL], [(ALL, true), (ALL, false), (ALL, true)]),
    ("T-45", NODE, &[To::Cluster], &[INTERNAL], [(HERE, true), (HERE, false), (HERE, true)]),
    ("T-46", NODE, VIPS, &[DEFAULT, EXTERNAL, INTERNAL], [(ALL, true), (ALL, true), (ALL, true)]),
    ("T-47", OUTSIDE, &[To::Cluster], &[DEFAULT, EXTERNAL], [(ALL, true), (ALL, false), (ALL, true)]),
    ("T-48", OUTSIDE, &[To::Cluster], &[INTERNAL], [(HERE, true), (HERE, false), (HERE, true)]),
    ("T-49", OUTSIDE, VIPS, &[DEFAULT, INTERNAL], [(ALL, true), (ALL, true), (ALL, true)]),
    ("T-50", OUTSIDE, EVERY, &[EXTERNAL], [(HERE, false), (HERE, false), (HERE, false)]),
];

/// T-40…T-50; M-11, V-27, V-29, V-31, D-10, M-17: the stack and policies in it see the pod and the endpoint.
pub(crate) fn packet_outcomes<P: Programs>(programs: &mut P) {
    for (at, column) in
        [Column::ClusterCidr, Column::NoDetector, Column::MasqueradeAll].into_iter().enumerate()
    {
        let mut scene = Scene::new(programs, column, three(&json!([local(), remote()])));
        for (id, from, kinds, services, cells) in TABLE {
            let (endpoints, masqueraded) = cells[at];
            for (to, n) in kinds.iter().flat_map(|to| services.iter().map(move |n| (*to, *n))) {
                let (addr, number) = address(to, n);
                let got = scene.packets(from, (&addr, number), Proto::TCP);
                assert_eq!(got, reached(endpoints, masqueraded), "{id}, {column:?}: to {to:?} of s{n}");
                if from == NODE {
                    let got = scene.calls((&addr, number), Proto::TCP);
                    assert_eq!(got, reached(endpoints, false), "{id}, {column:?}: a call to {to:?} of s{n}");
                }
            }
        }
    }
}

/// V-28, V-26, P-16: without an endpoint here the short cut stays, and everybody else is dropped. V-30: so is
/// a remote pod, where only pods of this node count as pods. M-2: a bridge address inside the range counts as a
/// pod's, any other address of the node does not.
pub(crate) fn short_cuts<P: Programs>(programs: &mut P) {
    for column in [Column::ClusterCidr, Column::NodeCidr] {
        let mut scene = Scene::new(programs, column, three(&json!([remote()])));
        let node_port = (NODE, 30_000 + u16::from(EXTERNAL));
        let elsewhere = reached(&[REMOTE], false);
        assert_eq!(scene.packets(POD, node_port, Proto::TCP), elsewhere, "{column:?}");
        assert_eq!(scene.packets(OUTSIDE, node_port, Proto::TCP), Got::Drop, "{column:?}");
        let remote_pod = if column == Column::NodeCidr { Got::Drop } else { elsewhere };
        assert_eq!(scene.packets(REMOTE_POD, node_port, Proto::TCP), remote_pod, "{column:?}");
        assert_eq!(
            scene.packets(SECOND, ("10.96.0.1", 80), Proto::TCP),
            reached(&[REMOTE], true),
            "{column:?}"
        );
        assert_eq!(
            scene.packets(BRIDGE, ("10.96.0.1", 80), Proto::TCP),
            reached(&[REMOTE], false),
            "{column:?}"
        );
    }
}

/// T-55.
pub(crate) fn refused_everywhere<P: Programs>(programs: &mut P) {
    let mut scene = Scene::new(programs, Column::ClusterCidr, three(&json!([])));
    for n in [DEFAULT, EXTERNAL, INTERNAL] {
        for to in [To::Cluster, To::NodePort, To::Balancer, To::ExternalIp] {
            let (addr, number) = address(to, n);
            for from in [POD, OUTSIDE, REMOTE_POD] {
                assert_eq!(
                    scene.packets(from, (&addr, number), Proto::TCP),
                    Got::Refuse,
                    "{from}, {to:?} of s{n}"
                );
            }
            assert_eq!(scene.calls((&addr, number), Proto::TCP), Got::Refuse, "a call to {to:?} of s{n}");
        }
    }
}

/// T-56, S-13. V-40, V-41, M-16, V-37: what is nobody's goes on untouched, at the node's addresses as well.
pub(crate) fn other_ports<P: Programs>(programs: &mut P) {
    let entry =
        |name: &str, proto: &str, number: u16| json!({ "name": name, "protocol": proto, "port": number });
    let spec = |n: u8, ports: Value| {
        let ip = format!("10.96.0.{n}");
        json!({ "type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"], "ports": ports })
    };
    let two = [
        ("a", "TCP", 80, 80),
        ("b", "TCP", 443, 8443),
        ("c", "UDP", 53, 53),
        ("d", "TCP", 53, 5353),
        ("e", "SCTP", 53, 53),
    ];
    let (front, back): (Vec<_>, Vec<_>) = two
        .iter()
        .map(|(name, proto, number, there)| (entry(name, proto, *number), entry(name, proto, *there)))
        .unzip();
    let mut objects = vec![
        service("svc1", &spec(1, json!([entry("p", "TCP", 80)])), &json!({})),
        slice("svc1", &port(80), &json!([local()])),
        service("svc2", &spec(2, json!(front)), &json!({})),
        slice("svc2", &json!(back), &json!([remote()])),
    ];
    objects.push(balancer("s3", 3, &json!({})));
    objects.push(slice("s3", &port(8080), &json!([local()])));
    let mut scene = Scene::new(programs, Column::ClusterCidr, objects);
    for (_, proto, number, there) in two {
        let proto = match proto {
            "TCP" => Proto::TCP,
            "UDP" => Proto::UDP,
            _ => Proto::SCTP,
        };
        let (_, observed) = scene.flow(POD, ("10.96.0.2", number), proto);
        assert_eq!(observed, Observed::Forward((ip(REMOTE), there), None), "{number}");
    }
    assert_eq!(scene.packets(POD, ("10.96.0.2", 80), Proto::UDP), Got::Refuse);
    assert_eq!(scene.packets(POD, ("10.96.0.1", 443), Proto::TCP), Got::Refuse);
    for (to, number, proto) in [
        (NODE, 30_003, Proto::UDP),
        (NODE, 8080, Proto::TCP),
        (SECOND, 30_003, Proto::TCP),
        ("203.0.113.3", 8080, Proto::TCP),
        ("198.51.100.99", 80, Proto::TCP),
        ("198.51.100.99", 30_003, Proto::TCP),
    ] {
        assert_eq!(scene.packets(POD, (to, number), proto), Got::Pass, "{to}:{number}");
    }
    assert_eq!(scene.packets(OUTSIDE, (NODE, 30_003), Proto::TCP), reached(&[LOCAL], true));
}

/// the endpoint of one Service is the address of another.
pub(crate) fn no_second_translation<P: Programs>(programs: &mut P) {
    let mut scene = Scene::new(
        programs,
        Column::ClusterCidr,
        vec![
            balancer("s1", 1, &json!({})),
            slice("s1", &port(80), &json!([{ "addresses": ["10.96.0.2"] }])),
            balancer("s2", 2, &json!({})),
            slice("s2", &port(8080), &json!([remote()])),
        ],
    );
    let (_, observed) = scene.flow(POD, ("10.96.0.1", 80), Proto::TCP);
    assert_eq!(observed, Observed::Forward((ip("10.96.0.2"), 80), None));
    let observed = scene.system.call((ip("10.96.0.1"), 80), Proto::TCP, Caller::Host, true);
    assert_eq!(observed, Some(Observed::Forward((ip("10.96.0.2"), 80), None)));
}

/// M-14, D-5: clients with one source port, masqueraded towards one endpoint, stay apart; their answers find
/// each of them.
pub(crate) fn masqueraded_ports_are_unique<P: Programs>(programs: &mut P) {
    for proto in [Proto::TCP, Proto::UDP, Proto::SCTP] {
        let ports = json!([{ "name": "p", "protocol": word(proto), "port": 80, "nodePort": 30_001 }]);
        let back = json!([{ "name": "p", "protocol": word(proto), "port": 8080 }]);
        let objects =
            vec![balancer("s1", 1, &json!({ "ports": ports })), slice("s1", &back, &json!([remote()]))];
        let mut scene = Scene::new(programs, Column::ClusterCidr, objects);
        let mut seen = BTreeSet::new();
        for n in 1..=250 {
            scene.next_port = 40_000;
            let open = scene.open(&format!("198.51.100.{n}"), (NODE, 30_001), proto);
            assert_eq!(open.client.1, 40_001);
            assert!(seen.insert(open.seen), "{proto:?}: {:?} twice", open.seen);
        }
    }
}

/// T-57, P-22, P-21, Y-16: inside a ServiceCIDR what is no Service's vanishes, for packets and calls alike; a headless
/// Service's address is no Service's. Without a range of the family nothing does.
pub(crate) fn unallocated_cluster_ips<P: Programs>(programs: &mut P) {
    let mut scene = Scene::new(programs, Column::ClusterCidr, three(&json!([local(), remote()])));
    let unused = [("10.96.0.77", 80), ("10.96.255.1", 53)];
    for to in unused {
        assert_eq!(scene.packets(POD, to, Proto::TCP), Got::Pass, "{to:?}");
        assert_eq!(scene.calls(to, Proto::TCP), Got::Pass, "{to:?}");
    }
    let range = |text: &str| Some(vec![text.parse().expect("a range")]);
    scene.system.apply([Change::ServiceRanges("kubernetes".into(), range("10.96.0.0/16"))]);
    for to in unused {
        for from in [POD, OUTSIDE, REMOTE_POD] {
            assert_eq!(scene.packets(from, to, Proto::TCP), Got::Drop, "{from} to {to:?}");
            assert_eq!(scene.packets(from, to, Proto::UDP), Got::Drop, "{from} to {to:?}");
        }
        assert_eq!(scene.calls(to, Proto::TCP), Got::Drop, "{to:?}");
        assert_eq!(scene.calls(to, Proto::UDP), Got::Drop, "{to:?}");
    }
    assert_eq!(scene.packets(POD, ("10.96.0.1", 81), Proto::TCP), Got::Refuse);
    assert_eq!(scene.packets(POD, ("10.97.0.1", 80), Proto::TCP), Got::Pass);
    scene.system.apply([Change::ServiceRanges("kubernetes".into(), range("fd00:96::/112"))]);
    assert_eq!(scene.packets(POD, unused[0], Proto::TCP), Got::Pass);
}

const V1: (&str, u16) = ("203.0.113.101", 80);
const V2: (&str, u16) = ("203.0.113.102", 80);

/// A Service with two balancer IPs of which the first is an external IP, too.
fn restricted(ranges: &Value) -> Change {
    let ports = json!([{ "name": "p", "protocol": "TCP", "port": 80, "nodePort": 30_001 }]);
    let spec = json!({
        "type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ipFamilies": ["IPv4"],
        "externalIPs": [V1.0, "203.0.113.1"], "ports": ports, "loadBalancerSourceRanges": ranges,
    });
    service("s1", &spec, &json!({ "loadBalancer": { "ingress": [{ "ip": V1.0 }, { "ip": V2.0 }] } }))
}

/// T-59…T-63; V-14…V-21, V-38: source ranges are about balancer IPs and nothing else.
pub(crate) fn source_ranges<P: Programs>(programs: &mut P) {
    let ranges = json!(["192.168.10.0/24", " 198.51.100.0/25"]);
    let objects = vec![restricted(&ranges), slice("s1", &port(8080), &json!([remote()]))];
    let mut scene = Scene::new(programs, Column::ClusterCidr, objects);
    let (listed, other) = ("198.51.100.2", "198.51.100.130");
    let through = reached(&[REMOTE], true);
    for to in [V1, V2] {
        assert_eq!(scene.packets(listed, to, Proto::TCP), through, "T-59");
        assert_eq!(scene.packets(other, to, Proto::TCP), Got::Drop, "T-60");
        assert_eq!(scene.packets(POD, to, Proto::TCP), Got::Drop, "T-60");
        assert_eq!(scene.packets(to.0, to, Proto::TCP), through, "T-62");
        assert_eq!(scene.packets(NODE, to, Proto::TCP), through, "T-62");
        assert_eq!(scene.packets(SECOND, to, Proto::TCP), Got::Drop, "V-19");
        assert_eq!(scene.calls(to, Proto::TCP), reached(&[REMOTE], false), "T-62");
    }
    assert_eq!(scene.packets(other, (NODE, 30_001), Proto::TCP), through, "T-61");
    assert_eq!(scene.packets(other, ("203.0.113.1", 80), Proto::TCP), through, "V-14");
    assert_eq!(scene.packets(POD, ("10.96.0.1", 80), Proto::TCP), reached(&[REMOTE], false), "T-61");

    scene.system.apply([slice("s1", &port(8080), &json!([]))]);
    assert_eq!(scene.packets(other, V1, Proto::TCP), Got::Drop, "V-21");
    assert_eq!(scene.packets(listed, V1, Proto::TCP), Got::Refuse, "V-21");
    scene.system.apply([slice("s1", &port(8080), &json!([remote()]))]);

    for open in
        [json!(["2001:db8::/32"]), json!(["0.0.0.0/0", "1.2.3.4/32"]), json!(["garbage"]), json!([" "])]
    {
        scene.system.apply([restricted(&open)]);
        assert_eq!(scene.packets(other, V1, Proto::TCP), through, "T-63: {open}");
        assert_eq!(scene.packets(POD, V2, Proto::TCP), through, "T-63: {open}");
    }
}

/// V-4: whether somebody has bound the address to an interface changes nothing, and it is never a new source
/// (M-13, which every flow here is held to).
pub(crate) fn bound_or_not<P: Programs>(programs: &mut P) {
    let mut scene = Scene::new(programs, Column::ClusterCidr, three(&json!([local(), remote()])));
    let unbound = links([true; 3]);
    let mut bound = unbound.clone();
    if let Change::Links(all) = &mut bound {
        all[0].addresses.insert(0, "203.0.113.101/32".parse().expect("an address"));
    }
    for links in [unbound.clone(), bound, unbound] {
        scene.system.apply([links]);
        for from in [POD, OUTSIDE] {
            assert_eq!(scene.packets(from, V1, Proto::TCP), reached(ALL, true), "{from}");
            assert_eq!(scene.packets(from, ("203.0.113.101", 30_001), Proto::TCP), Got::Pass, "{from}");
        }
        assert_eq!(scene.calls(V1, Proto::TCP), reached(ALL, false));
    }
}

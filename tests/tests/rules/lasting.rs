//! What lasts, vector by vector: answered flows whose endpoints change (section 14.4), and affinity (section 6).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use agent_core::model::Change;
use proxy_common::addr::Proto;
use serde_json::{Value, json};

use super::oracle::Target;
use super::scene::{
    Column, Got, NODE, OUTSIDE, Open, POD, REMOTE, Scene, balancer, ip, local, name, reached, remote, slice,
};
use super::system::{ACK, Observed, Programs};

/// The Service of the UDP vectors, with a second port, for both protocols.
pub(crate) fn reconciled() -> Change {
    let entry = |name: &str, proto: &str, number: u16, node_port: u16| json!({ "name": name, "protocol": proto, "port": number, "nodePort": node_port });
    balancer(
        "dns",
        1,
        &json!({ "ports": [
        entry("u", "UDP", 8000, 32_000), entry("t", "TCP", 8000, 32_000), entry("s", "SCTP", 8000, 32_000),
        entry("other", "UDP", 3000, 0),
    ] }),
    )
}

/// Its endpoints: those of port 8000, and one for port 3000, which does not serve any more in the end.
pub(crate) fn endpoints(target: u16, serving: &[(&str, bool)]) -> [Change; 2] {
    let all: Vec<Value> = serving.iter().map(|(ip, serving)| {
        json!({ "addresses": [ip], "conditions": { "ready": serving, "serving": serving }, "nodeName": "n2" })
    }).collect();
    let entry = |name: &str, proto: &str| json!({ "name": name, "protocol": proto, "port": target });
    let other = json!([{ "name": "other", "protocol": "UDP", "port": 3000 }]);
    let mut second = slice("dns", &other, &json!([{ "addresses": ["10.244.2.99"], "nodeName": "n2" }]));
    if let Change::Slice(its, _) = &mut second {
        *its = name("dns-other");
    }
    [slice("dns", &json!([entry("u", "UDP"), entry("t", "TCP"), entry("s", "SCTP")]), &json!(all)), second]
}

pub(crate) const A: &str = "10.244.2.1";
pub(crate) const B: &str = "10.244.2.2";
const D: &str = "10.244.2.3";

/// T-85…T-89, T-91; C-4…C-9, C-14: answered flows to every endpoint, then B does not serve any more and D has gone.
/// Flows of our own table take the place of the entries; where the vector says "delete", the next packet finds
/// an endpoint anew. T-91 is the deliberate difference: where nobody serves, UDP is refused.
pub(crate) fn flows_follow_their_endpoints<P: Programs>(programs: &mut P) {
    let objects =
        [reconciled()].into_iter().chain(endpoints(9090, &[(A, true), (B, true), (D, true)])).collect();
    let mut scene = Scene::new(programs, Column::ClusterCidr, objects);
    let mut flows = Vec::new();
    for proto in [Proto::UDP, Proto::TCP, Proto::SCTP] {
        let destinations =
            [("10.96.0.1", 8000), ("203.0.113.1", 8000), ("203.0.113.101", 8000), (NODE, 32_000)];
        for to in destinations {
            let all: Vec<Open> = (0..20).map(|_| scene.open(OUTSIDE, to, proto)).collect();
            let met: BTreeSet<IpAddr> = all.iter().map(|open| open.endpoint.0).collect();
            assert_eq!(met, [A, B, D].map(ip).into(), "{to:?}");
            flows.extend(all);
        }
    }
    let other: Vec<Open> = (0..5).map(|_| scene.open(POD, ("10.96.0.1", 3000), Proto::UDP)).collect();
    // C-10: the number of a NodePort at an address that is not the node's is nothing to us.
    assert_eq!(scene.packets(POD, ("198.51.100.99", 32_000), Proto::UDP), Got::Pass);

    scene.system.apply(endpoints(9090, &[(A, true), (B, false)]));
    for open in &flows {
        let next = scene.next(open);
        let kept = open.proto != Proto::UDP || open.endpoint.0 == ip(A); // T-85; T-87, T-89
        let expected = if kept { open.endpoint } else { (ip(A), 9090) };
        assert_eq!(next, Some(expected), "{open:?}");
    }
    for open in &other {
        assert_eq!(scene.next(open), Some(open.endpoint), "T-88");
    }
    assert_eq!(scene.packets(POD, ("198.51.100.99", 32_000), Proto::UDP), Got::Pass);

    // T-86: the endpoints keep their addresses and change their port.
    scene.system.apply(endpoints(9191, &[(A, true)]));
    for open in &flows {
        let expected = if open.proto == Proto::UDP { (ip(A), 9191) } else { open.endpoint };
        assert_eq!(scene.next(open), Some(expected), "T-86: {open:?}");
    }

    // T-91, C-1, P-18.
    scene.system.apply(endpoints(9191, &[]));
    for open in &flows {
        let expected = (open.proto != Proto::UDP).then_some(open.endpoint);
        assert_eq!(scene.next(open), expected, "T-91: {open:?}");
    }
    for open in &other {
        assert_eq!(scene.next(open), Some(open.endpoint), "T-88");
    }
}

/// T-90, C-15: a UDP flow that is older than its Service is translated as soon as that serves. D-8: so is a TCP flow, the
/// deliberate difference that lets a flow whose entry was lost go on.
pub(crate) fn older_than_the_service<P: Programs>(programs: &mut P) {
    let mut scene = Scene::new(programs, Column::ClusterCidr, Vec::new());
    let packet = |scene: &mut Scene<'_, P>, proto: Proto| {
        let (client, to) = ((ip(POD), 4_000), (ip("203.0.113.1"), 8000));
        scene.system.packet(client, to, proto, ACK).expect("a packet")
    };
    for proto in [Proto::UDP, Proto::TCP] {
        assert_eq!(packet(&mut scene, proto), Observed::Pass);
    }
    scene.system.apply([reconciled()]);
    assert_eq!(packet(&mut scene, Proto::UDP), Observed::Refuse);
    scene.system.apply(endpoints(9090, &[(A, true)]));
    for proto in [Proto::UDP, Proto::TCP] {
        let seen = packet(&mut scene, proto);
        assert!(matches!(seen, Observed::Forward((addr, 9090), _) if addr == ip(A)), "{proto:?}: {seen:?}");
    }
}

/// A Service with affinity and its four endpoints, for every protocol.
pub(crate) fn sticky(secs: u32, endpoints: &Value) -> Vec<Change> {
    let config = json!({ "clientIP": { "timeoutSeconds": secs } });
    let entry =
        |name: &str, proto: &str, number: u16| json!({ "name": name, "protocol": proto, "port": number });
    let ports =
        |of: [u16; 3]| json!([entry("t", "TCP", of[0]), entry("u", "UDP", of[1]), entry("s", "SCTP", of[2])]);
    let more = json!({ "sessionAffinity": "ClientIP", "sessionAffinityConfig": config, "ports": ports([80, 81, 82]) });
    vec![balancer("s1", 1, &more), slice("s1", &ports([8080; 3]), endpoints)]
}

pub(crate) fn four() -> Value {
    [A, B, D, REMOTE].iter().map(|ip| json!({ "addresses": [ip], "nodeName": "n2" })).collect()
}

/// clients behind different addresses have a record each, although the endpoints see
/// the node; it lasts while new flows come, and not while only old ones go on.
pub(crate) fn affinity_lasts_its_time<P: Programs>(programs: &mut P) {
    for (proto, number) in [(Proto::TCP, 80), (Proto::UDP, 81), (Proto::SCTP, 82)] {
        let mut scene = Scene::new(programs, Column::ClusterCidr, sticky(100, &four()));
        let to = ("203.0.113.1", number);
        let mut chosen = BTreeMap::new();
        for n in 1..=40 {
            let client = format!("198.51.100.{n}");
            let open = scene.open(&client, to, proto);
            assert_ne!(open.seen.0, open.client.0, "masqueraded");
            chosen.insert(client, open);
        }
        let met: BTreeSet<Target> = chosen.values().map(|open| open.endpoint).collect();
        assert_eq!(met.len(), 4, "{proto:?}");
        // Each new flow begins the time anew.
        for _ in 0..4 {
            scene.system.rest(60);
            for (client, open) in &chosen {
                assert_eq!(scene.open(client, to, proto).endpoint, open.endpoint, "{proto:?}");
            }
        }
        // Packets of flows that are there do not.
        scene.system.rest(60);
        for open in chosen.values() {
            assert_eq!(scene.next(open), Some(open.endpoint), "{proto:?}");
        }
        scene.system.rest(60);
        let moved: Vec<_> = chosen
            .iter()
            .filter(|(client, open)| scene.open(client, to, proto).endpoint != open.endpoint)
            .collect();
        assert!(!moved.is_empty(), "{proto:?}: 40 clients stay although their time is over");
    }
}

/// a record does not keep an endpoint that has gone, nor a Service that has none.
pub(crate) fn affinity_needs_endpoints<P: Programs>(programs: &mut P) {
    let mut scene = Scene::new(programs, Column::ClusterCidr, sticky(100, &json!([local(), remote()])));
    let clients: Vec<String> = (1..=10).map(|n| format!("198.51.100.{n}")).collect();
    for client in &clients {
        scene.open(client, ("203.0.113.1", 80), Proto::TCP);
    }
    scene.system.apply(sticky(100, &json!([remote()])));
    for client in &clients {
        assert_eq!(scene.packets(client, ("203.0.113.1", 80), Proto::TCP), reached(&[REMOTE], true));
    }
    scene.system.apply(sticky(100, &json!([])));
    for client in &clients {
        assert_eq!(scene.packets(client, ("203.0.113.1", 80), Proto::TCP), Got::Refuse);
    }
}

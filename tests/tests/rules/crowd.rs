//! Many flows, and two nodes: what the tables themselves are asked about, on the host.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use proxy_common::abi::{Flow, FlowKey, Hook, Leg};
use proxy_common::addr::{Port, Proto};
use proxy_common::lb::FlowTable;

use super::host::Host;
use super::lasting::{A, B, endpoints, four, reconciled, sticky};
use super::oracle::Target;
use super::scene::{Column, OUTSIDE, Open, Scene, ip};

/// Flows of others.
const MANY: u32 = 1_000_000;

/// Leg `n` of a flow to a Service that nobody has told us of.
fn other(n: u32) -> ((FlowTable, FlowKey), Flow) {
    let addr = |text: &str| ip(text).into();
    let key = FlowKey {
        src: IpAddr::from(Ipv4Addr::from_bits(0x0b00_0000 + n)).into(),
        dst: addr("203.0.113.200"),
        sport: Port::new(4_000),
        dport: Port::new(53),
        proto: Proto::UDP,
        hook: Hook::INGRESS,
        pad: 0,
    };
    let flow = Flow {
        addr: addr("10.244.9.9"),
        port: Port::new(53),
        other_port: Port(0),
        leg: Leg::DNAT,
        seen: 0,
        pad: 0,
        backend: 1 + n % 1_000,
        generation: n,
        service: 9,
        pad2: 0,
        last_seen: 0,
    };
    ((FlowTable::Established, key), flow)
}

/// T-92, C-9, C-12: among a million flows of others the stale one is found, by its next packet, and no other is touched.
#[test]
fn one_stale_flow_among_a_million() {
    let mut host = Host::default();
    let objects = [reconciled()].into_iter().chain(endpoints(9090, &[(A, true), (B, true)])).collect();
    let mut scene = Scene::new(&mut host, Column::ClusterCidr, objects);
    let stale: Open = loop {
        let open = scene.open(OUTSIDE, ("10.96.0.1", 8000), Proto::UDP);
        if open.endpoint.0 == ip(B) {
            break open;
        }
    };
    scene.system.hear(endpoints(9090, &[(A, true)]));
    scene.system.programs.flows().borrow_mut().extend((0..MANY).map(other));
    assert_eq!(scene.next(&stale), Some((ip(A), 9090)));
    let flows = scene.system.programs.flows().borrow();
    assert!((0..MANY).map(other).all(|(key, flow)| flows.get(&key) == Some(&flow)));
    assert!(!flows.values().any(|flow| flow.addr == ip(B).into()), "a leg of the stale flow is left");
}

/// what one node remembers of a client is nothing to another.
#[test]
fn each_node_remembers_for_itself() {
    let (mut here, mut there) = (Host::default(), Host::default());
    let mut first = Scene::new(&mut here, Column::ClusterCidr, sticky(100, &four()));
    let mut second = Scene::new(&mut there, Column::ClusterCidr, sticky(100, &four()));
    second.next_port = 20_000;
    let mut chosen: BTreeSet<(Target, Target)> = BTreeSet::new();
    for n in 1..=40 {
        let client = format!("198.51.100.{n}");
        let on_first = first.open(&client, ("10.96.0.1", 80), Proto::TCP).endpoint;
        let on_second = second.open(&client, ("10.96.0.1", 80), Proto::TCP).endpoint;
        chosen.insert((on_first, on_second));
        assert_eq!(first.open(&client, ("10.96.0.1", 80), Proto::TCP).endpoint, on_first);
        assert_eq!(second.open(&client, ("10.96.0.1", 80), Proto::TCP).endpoint, on_second);
    }
    assert!(chosen.iter().any(|(first, second)| first != second), "40 clients chose alike on both nodes");
}

//! Many flows, and two nodes: what the tables themselves are asked about, on the host.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use proxy_common::abi::{Flow, FlowId, Key, Leg, Pair, Role, State, Tuple};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::testing::SECRET;

use super::host::Host;
use super::lasting::{A, B, endpoints, four, reconciled, sticky};
use super::oracle::Target;
use super::scene::{Column, OUTSIDE, Open, Scene, ip};

/// Flows of others.
const MANY: u32 = 1_000_000;

/// Flow `n` to a Service that nobody knows, in record `index`; the leg of its client.
fn other(n: u32, index: usize) -> (Flow, Key, Leg) {
    let addr = |text: &str| Addr::from(ip(text));
    let port = Port::new(53);
    let client = IpAddr::from(Ipv4Addr::from_bits(0x0b00_0000 + n)).into();
    let asks = |to: Addr| Tuple::new(client, Port::new(4_000), to, port, Proto::UDP);
    let (outer, middle) = (asks(addr("203.0.113.200")).pair(), asks(addr("10.244.9.9")).pair());
    let id = FlowId(index as u64).next();
    let flow = Flow {
        id,
        service: 9,
        backend: 1 + n % 1_000,
        generation: n,
        state: State::LIVE,
        old: 1,
        legs: 2,
        seen: [1, 1],
        pairs: [outer, middle, Pair::NONE],
        ..Flow::EMPTY
    };
    let key = outer.key(|| Some(&SECRET));
    (flow, key, flow.leg(Role::OUTER).sealed(&key))
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
    scene.system.apply(endpoints(9090, &[(A, true)]));
    let first = scene.system.programs.tables().records.borrow().len();
    let others = || (0..MANY).zip(first..).map(|(n, index)| other(n, index));
    let tables = scene.system.programs.tables();
    tables.records.borrow_mut().extend(others().map(|(flow, ..)| flow));
    tables.flows.borrow_mut().extend(others().map(|(_, key, leg)| (key, leg)));
    assert_eq!(scene.next(&stale), Some((ip(A), 9090)));
    let tables = scene.system.programs.tables();
    let (records, flows) = (tables.records.borrow(), tables.flows.borrow());
    for (index, (flow, key, leg)) in (first..).zip(others()) {
        assert!(records[index] == flow && flows.get(&key) == Some(&leg), "{flow:?}");
    }
    let leads = |leg: &Leg| {
        let flow = records[leg.id.index() as usize];
        flow.is(leg.id) && *flow.endpoint().0 != ip(B).into()
    };
    assert!(flows.values().all(leads), "a leg of the stale flow is left");
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

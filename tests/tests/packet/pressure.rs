//! What is used up, missing, or being rewritten: counted and dropped, never corrupted.

use proxy_common::abi::frontend::INTERNAL;
use proxy_common::abi::{Flow, FlowKey, Hook, Leg, Reason};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::lb::FlowTable;

use crate::node::{ACK, FAMILIES, NEW, Node, SYN, SYN_ACK, V4, V6, addr, tcp};
use crate::nodeport::node_port;
use crate::real::FLOWS;
use crate::stage::story;

/// What is done to a node.
type Spoil = fn(&mut Node);

#[test]
fn a_flow_that_finds_no_free_source_port_is_dropped_and_the_others_live() {
    for cast in FAMILIES {
        let (node, endpoint) = ((cast.node, 30_200), (cast.remote, 8080));
        story(
            || node_port(cast, Proto::TCP, cast.remote),
            |stage| {
                let (first, second) = ((cast.client, 5555), (cast.client, 5556));
                stage.ingress(&tcp(first, node, SYN)).becomes(&tcp(first, endpoint, SYN));
                stage.egress(&tcp(first, endpoint, SYN)).becomes(&tcp((cast.node, 2000), endpoint, SYN));
                stage.ingress(&tcp(second, node, SYN)).becomes(&tcp(second, endpoint, SYN));
                stage.counted(&[(Reason::NewFlow, 2)]);
                stage.egress(&tcp(second, endpoint, SYN)).dropped();
                stage.counted(&[(Reason::NoSourcePort, 1)]);
                stage.egress(&tcp(first, endpoint, ACK)).becomes(&tcp((cast.node, 2000), endpoint, ACK));
            },
        );
    }
}

#[test]
fn one_source_port_serves_many_endpoints() {
    // The tuple must be unique, not the port.
    for cast in FAMILIES {
        story(
            || {
                node_port(cast, Proto::TCP, cast.remote).with(
                    (cast.external, 80),
                    Proto::TCP,
                    0,
                    &[(cast.other, 8080)],
                )
            },
            |stage| {
                for (to, endpoint) in [((cast.node, 30_200), cast.remote), ((cast.external, 80), cast.other)]
                {
                    let (client, endpoint) = ((cast.client, 5555), (endpoint, 8080));
                    stage.ingress(&tcp(client, to, SYN)).becomes(&tcp(client, endpoint, SYN));
                    stage.egress(&tcp(client, endpoint, SYN)).becomes(&tcp((cast.node, 2000), endpoint, SYN));
                    stage.counted(NEW);
                }
            },
        );
    }
}

#[test]
fn without_source_ports_or_addresses_masquerading_is_refused() {
    for cast in FAMILIES {
        let (client, node, endpoint) = ((cast.client, 5555), (cast.node, 30_200), (cast.remote, 8080));
        let cases: [(Reason, Spoil); 3] = [
            (Reason::NoSourcePort, |node| node.tables.config.as_mut().unwrap().snat_count = 0),
            (Reason::NoSourceAddress, |node| node.tables.ifaces.clear()),
            (Reason::NoSourceAddress, |node| {
                for iface in node.tables.ifaces.values_mut() {
                    (iface.snat_v4, iface.snat_v6) = (Addr::ANY_V4, Addr::ANY_V6);
                }
            }),
        ];
        for (reason, break_it) in cases {
            story(
                || {
                    let mut node = node_port(cast, Proto::TCP, cast.remote);
                    break_it(&mut node);
                    node
                },
                |stage| {
                    stage.ingress(&tcp(client, node, SYN)).becomes(&tcp(client, endpoint, SYN));
                    stage.counted(NEW);
                    stage.egress(&tcp(client, endpoint, SYN)).dropped();
                    stage.counted(&[(reason, 1)]);
                },
            );
        }
    }
}

#[test]
fn an_interface_with_one_family_masquerades_that_one() {
    story(
        || {
            let mut node = node_port(V4, Proto::TCP, V4.remote).with(
                (V6.any, 30_200),
                Proto::TCP,
                proxy_common::abi::frontend::NODE_PORT,
                &[(V6.remote, 8080)],
            );
            node.tables.ifaces.values_mut().for_each(|iface| iface.snat_v6 = Addr::ANY_V6);
            node
        },
        |stage| {
            for (cast, works) in [(V4, true), (V6, false)] {
                let (client, endpoint) = ((cast.client, 5555), (cast.remote, 8080));
                stage.ingress(&tcp(client, (cast.node, 30_200), SYN)).becomes(&tcp(client, endpoint, SYN));
                stage.counted(NEW);
                if works {
                    stage.egress(&tcp(client, endpoint, SYN)).becomes(&tcp((cast.node, 2000), endpoint, SYN));
                } else {
                    stage.egress(&tcp(client, endpoint, SYN)).dropped();
                    stage.counted(&[(Reason::NoSourceAddress, 1)]);
                }
            }
        },
    );
}

#[test]
fn before_the_agent_has_written_its_settings_everything_is_left_alone() {
    for cast in FAMILIES {
        story(
            || {
                let mut node = Node::new().with((cast.vip, 80), Proto::TCP, INTERNAL, &[(cast.remote, 8080)]);
                node.tables.config = None;
                node
            },
            |stage| {
                stage.ingress(&tcp((cast.pod, 40_000), (cast.vip, 80), SYN)).passes();
                stage.counted(&[(Reason::ConfigMissing, 1)]);
            },
        );
    }
}

#[test]
fn a_full_flow_table_keeps_what_it_has_and_lets_the_new_flow_live_half_open() {
    for cast in FAMILIES {
        let (pod, vip, endpoint) = ((cast.pod, 40_000), (cast.vip, 80), (cast.remote, 8080));
        // No room at all, and room for one of two legs: a flow is in one table or the other, never in both.
        for free in [0, 1] {
            story(
                || {
                    let node = Node::new().with((cast.vip, 80), Proto::TCP, INTERNAL, &[(cast.remote, 8080)]);
                    node.tables.flows.borrow_mut().extend(foreign(FLOWS - free));
                    node
                },
                |stage| {
                    stage.ingress(&tcp(pod, vip, SYN)).becomes(&tcp(pod, endpoint, SYN));
                    stage.counted(NEW);
                    for _ in 0..2 {
                        stage.egress(&tcp(endpoint, pod, SYN_ACK)).becomes(&tcp(vip, pod, SYN_ACK));
                        stage.counted(&[(Reason::FlowTableFull, 1)]);
                        assert_eq!(stage.legs(FlowTable::Established), FLOWS - free);
                        assert_eq!(stage.legs(FlowTable::HalfOpen), 2);
                        stage.ingress(&tcp(pod, vip, ACK)).becomes(&tcp(pod, endpoint, ACK));
                    }
                },
            );
        }
    }
}

/// So many legs of flows that nobody asks for.
fn foreign(count: usize) -> impl Iterator<Item = ((FlowTable, FlowKey), Flow)> {
    (0..count as u16).map(|n| {
        let key = FlowKey {
            src: addr("172.16.0.1"),
            dst: addr("172.16.0.2"),
            sport: Port::new(n),
            dport: Port::new(80),
            proto: Proto::TCP,
            hook: Hook::INGRESS,
            pad: 0,
        };
        let flow = Flow {
            addr: addr("172.16.0.3"),
            port: Port::new(80),
            other_port: Port(0),
            leg: Leg::DNAT,
            seen: 0,
            pad: 0,
            backend: 1,
            generation: 1,
            service: 1,
            pad2: 0,
            last_seen: 0,
        };
        ((FlowTable::Established, key), flow)
    })
}

#[test]
fn a_frontend_that_is_torn_whenever_it_is_read_drops() {
    for cast in FAMILIES {
        story(
            || {
                let mut node = Node::new().with((cast.vip, 80), Proto::TCP, INTERNAL, &[(cast.remote, 8080)]);
                node.tables.frontends.values_mut().for_each(|value| value.seal ^= 1);
                node
            },
            |stage| {
                stage.ingress(&tcp((cast.pod, 40_000), (cast.vip, 80), SYN)).dropped();
                stage.counted(&[(Reason::TornFrontend, 1)]);
            },
        );
    }
}

#[test]
fn a_slot_without_a_living_backend_drops() {
    for cast in FAMILIES {
        let spoil: [Spoil; 4] = [
            |node| node.retire(100),
            |node| *node.tables.slots.get_mut(&100).unwrap() = 0,
            // Beyond the end of BACKENDS.
            |node| *node.tables.slots.get_mut(&100).unwrap() = u32::MAX,
            // Another Service's.
            |node| node.tables.backends.get_mut(&100).unwrap().service = 2,
        ];
        for spoil in spoil {
            story(
                || {
                    let mut node =
                        Node::new().with((cast.vip, 80), Proto::TCP, INTERNAL, &[(cast.remote, 80)]);
                    spoil(&mut node);
                    node
                },
                |stage| {
                    stage.ingress(&tcp((cast.pod, 40_000), (cast.vip, 80), SYN)).dropped();
                    stage.counted(&[(Reason::BadSlot, 1)]);
                },
            );
        }
    }
}

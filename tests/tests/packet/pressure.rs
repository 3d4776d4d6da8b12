//! What is used up, missing, or being rewritten: counted and dropped, never corrupted.

use std::net::SocketAddr;

use proxy_common::abi::frontend::INTERNAL;
use proxy_common::abi::{Reason, Role, Tuple, config};
use proxy_common::addr::{Port, Proto};
use proxy_tests::packet::{Packet, Transport};

use crate::node::{
    ACK, Cast, FAMILIES, FIN_ACK, NEW, Node, SYN, SYN_ACK, V4, V6, addr, at, packet, tcp, udp,
};
use crate::nodeport::{node_port, one_port};
use crate::real::{PLACES, RECORDS};
use crate::stage::{Stage, story};

/// What is done to a node.
type Spoil = fn(&mut Node);

#[test]
fn a_flow_that_finds_no_free_source_port_is_dropped_and_the_others_live() {
    for cast in FAMILIES {
        let (node, endpoint) = ((cast.node, 30_200), (cast.remote, 8080));
        story(
            || node_port(cast, Proto::TCP, cast.remote),
            |stage| {
                let [spoofed, first, second] = [5554, 5555, 5556].map(|port| (cast.client, port));
                let masqueraded = (cast.node, 2000);
                stage.ingress(&tcp(spoofed, node, SYN)).becomes(&tcp(spoofed, endpoint, SYN));
                stage.egress(&tcp(spoofed, endpoint, SYN)).becomes(&tcp(masqueraded, endpoint, SYN));
                stage.ingress(&tcp(first, node, SYN)).becomes(&tcp(first, endpoint, SYN));
                stage.counted(&[(Reason::NewFlow, 2)]);
                // A flow that is only young holds no port against others.
                stage.egress(&tcp(first, endpoint, SYN)).becomes(&tcp(masqueraded, endpoint, SYN));
                stage.counted(&[(Reason::Displaced, 1)]);
                assert_eq!((stage.flows(), stage.legs()), ((1, 0), 3));
                stage.ingress(&tcp(endpoint, masqueraded, SYN_ACK)).becomes(&tcp(endpoint, first, SYN_ACK));
                stage.egress(&tcp(endpoint, first, SYN_ACK)).becomes(&tcp(node, first, SYN_ACK));
                stage.ingress(&tcp(first, node, ACK)).becomes(&tcp(first, endpoint, ACK));
                assert_eq!(stage.flows(), (0, 1));
                stage.ingress(&tcp(second, node, SYN)).becomes(&tcp(second, endpoint, SYN));
                stage.counted(NEW);
                stage.egress(&tcp(second, endpoint, SYN)).dropped();
                stage.counted(&[(Reason::NoSourcePort, 1)]);
                stage.egress(&tcp(first, endpoint, ACK)).becomes(&tcp((cast.node, 2000), endpoint, ACK));
            },
        );
    }
}

#[test]
fn of_many_source_ports_the_last_one_is_found_and_none_that_connection_tracking_uses() {
    const ALL: u16 = 5_000;
    for cast in FAMILIES {
        let (node, endpoint) = ((cast.node, 30_200), (cast.remote, 8080));
        let last = 2000 + 4_321;
        story(
            || {
                let mut made = node_port(cast, Proto::TCP, cast.remote);
                made.ports(2000, ALL);
                let used = (2000..2000 + ALL).filter(|port| *port != last);
                let tuple = |port| {
                    let (from, to) = (addr(cast.node), addr(cast.remote));
                    Tuple::new(from, Port::new(port), to, Port::new(8080), Proto::TCP)
                };
                made.tables.taken = used.map(tuple).collect();
                made
            },
            |stage| {
                let [first, second] = [5555, 5556].map(|port| (cast.client, port));
                let masqueraded = (cast.node, last);
                stage.ingress(&tcp(first, node, SYN)).becomes(&tcp(first, endpoint, SYN));
                stage.egress(&tcp(first, endpoint, SYN)).becomes(&tcp(masqueraded, endpoint, SYN));
                stage.ingress(&tcp(endpoint, masqueraded, SYN_ACK)).becomes(&tcp(endpoint, first, SYN_ACK));
                stage.egress(&tcp(endpoint, first, SYN_ACK)).becomes(&tcp(node, first, SYN_ACK));
                stage.ingress(&tcp(first, node, ACK)).becomes(&tcp(first, endpoint, ACK));
                stage.ingress(&tcp(second, node, SYN)).becomes(&tcp(second, endpoint, SYN));
                stage.counted(&[(Reason::NewFlow, 2)]);
                stage.egress(&tcp(second, endpoint, SYN)).dropped();
                stage.counted(&[(Reason::NoSourcePort, 1)]);
                // When that is over, its port is to be had again.
                stage.ingress(&tcp(first, node, FIN_ACK)).becomes(&tcp(first, endpoint, FIN_ACK));
                stage.egress(&tcp(first, endpoint, FIN_ACK)).becomes(&tcp(masqueraded, endpoint, FIN_ACK));
                stage.ingress(&tcp(endpoint, masqueraded, FIN_ACK)).becomes(&tcp(endpoint, first, FIN_ACK));
                stage.egress(&tcp(endpoint, first, FIN_ACK)).becomes(&tcp(node, first, FIN_ACK));
                stage.egress(&tcp(second, endpoint, SYN)).becomes(&tcp(masqueraded, endpoint, SYN));
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
            (Reason::NoSourcePort, |node| node.ports(0, 0)),
            (Reason::NoSourceAddress, |node| node.tables.masquerade.clear()),
            (Reason::NoSourceAddress, |node| {
                for (key, source) in &mut node.tables.masquerade {
                    *source = key.dst;
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
            node.tables.masquerade.retain(|key, _| key.dst.is_v4());
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

/// The pod opens a flow to port 80 of the VIP from this port.
fn knock(stage: &mut Stage, cast: Cast, proto: Proto, port: u16) {
    let (pod, vip, endpoint) = (at(cast.pod, port), at(cast.vip, 80), at(cast.remote, 8080));
    stage.ingress(&packet(proto, pod, vip, SYN)).becomes(&packet(proto, pod, endpoint, SYN));
}

/// It is answered and goes on, until the flow is old.
fn establish(stage: &mut Stage, cast: Cast, proto: Proto, port: u16) {
    let (pod, vip, endpoint) = (at(cast.pod, port), at(cast.vip, 80), at(cast.remote, 8080));
    stage.egress(&packet(proto, endpoint, pod, SYN_ACK)).becomes(&packet(proto, vip, pod, SYN_ACK));
    if proto != Proto::TCP {
        stage.rest(2_500);
    }
    stage.ingress(&packet(proto, pod, vip, ACK)).becomes(&packet(proto, pod, endpoint, ACK));
}

fn cluster_ips(cast: Cast) -> Node {
    [Proto::TCP, Proto::UDP]
        .into_iter()
        .fold(Node::new(), |node, proto| node.with((cast.vip, 80), proto, INTERNAL, &[(cast.remote, 8080)]))
}

#[test]
fn a_flood_displaces_its_own_kind_the_oldest_first_and_no_flow_that_is_old() {
    for cast in FAMILIES {
        for (kind, other) in [(Proto::TCP, Proto::UDP), (Proto::UDP, Proto::TCP)] {
            let places = PLACES as u16;
            let answer = |port| packet(kind, at(cast.remote, 8080), at(cast.pod, port), SYN_ACK);
            let answered = |port| packet(kind, at(cast.vip, 80), at(cast.pod, port), SYN_ACK);
            story(
                || cluster_ips(cast),
                |stage| {
                    knock(stage, cast, kind, 1);
                    establish(stage, cast, kind, 1);
                    knock(stage, cast, other, 2);
                    assert_eq!(stage.flows(), (1, 1));
                    // The old one has had the first place of this ring; all others are filled.
                    stage.hurry(|stage| (1000..999 + places).for_each(|port| knock(stage, cast, kind, port)));
                    assert_eq!(stage.flows(), (PLACES, 1));
                    stage.counted(&[(Reason::NewFlow, 1 + u64::from(places))]);
                    // The next one comes to the place of the old flow, which stays; then the oldest young one goes.
                    knock(stage, cast, kind, 5000);
                    stage.counted(NEW);
                    stage.egress(&answer(1000)).becomes(&answered(1000));
                    knock(stage, cast, kind, 5001);
                    stage.counted(&[(Reason::NewFlow, 1), (Reason::Displaced, 1)]);
                    stage.egress(&answer(1000)).passes();
                    stage.egress(&answer(1001)).becomes(&answered(1001));
                    assert_eq!((stage.flows(), stage.legs()), ((PLACES + 1, 1), 2 * (PLACES + 2)));
                    stage.egress(&answer(1)).becomes(&answered(1));
                    let udp_or_tcp = packet(other, at(cast.remote, 8080), at(cast.pod, 2), SYN_ACK);
                    let back = packet(other, at(cast.vip, 80), at(cast.pod, 2), SYN_ACK);
                    stage.egress(&udp_or_tcp).becomes(&back);
                    // Who was displaced and is meant comes again.
                    knock(stage, cast, kind, 1000);
                    stage.counted(&[(Reason::NewFlow, 1), (Reason::Displaced, 1)]);
                },
            );
        }
    }
}

#[test]
fn a_spoofed_handshake_without_the_endpoint_s_number_stays_young() {
    for cast in FAMILIES {
        let (pod, vip, endpoint) = (at(cast.pod, 1), at(cast.vip, 80), at(cast.remote, 8080));
        let guess = |to, acknowledged| {
            let transport = Transport::Tcp {
                source: 1,
                destination: SocketAddr::port(&to),
                sequence: 1001,
                acknowledged,
                flags: ACK,
                options: Vec::new(),
            };
            Packet::new(pod.ip(), to.ip(), transport)
        };
        story(
            || cluster_ips(cast),
            |stage| {
                knock(stage, cast, Proto::TCP, 1);
                stage.egress(&packet(Proto::TCP, endpoint, pod, SYN_ACK)).becomes(&packet(
                    Proto::TCP,
                    vip,
                    pod,
                    SYN_ACK,
                ));
                for number in [0, 999, 1000, 1002, 2000, 0x8000_03e9, u32::MAX] {
                    stage.ingress(&guess(vip, number)).becomes(&guess(endpoint, number));
                    assert_eq!(stage.flows(), (1, 0), "{number}");
                }
                stage.ingress(&guess(vip, 1001)).becomes(&guess(endpoint, 1001));
                assert_eq!(stage.flows(), (0, 1));
                stage.counted(NEW);
            },
        );
    }
}

#[test]
fn without_a_free_record_a_new_flow_is_dropped_and_old_ones_live() {
    for cast in FAMILIES {
        // The first record is never used.
        let all = RECORDS as u16 - 1;
        story(
            || cluster_ips(cast),
            |stage| {
                stage.hurry(|stage| {
                    for port in 1..=all {
                        knock(stage, cast, Proto::TCP, port);
                        establish(stage, cast, Proto::TCP, port);
                    }
                });
                stage.counted(&[(Reason::NewFlow, all.into())]);
                assert_eq!(stage.flows(), (0, all.into()));
                let datagram = udp((cast.pod, 5000), (cast.vip, 80));
                for _ in 0..2 {
                    stage.ingress(&datagram).dropped();
                    stage.ingress(&tcp((cast.pod, 5000), (cast.vip, 80), SYN)).dropped();
                    stage.counted(&[(Reason::FlowTableFull, 2)]);
                }
                let (pod, vip, endpoint) = ((cast.pod, 77), (cast.vip, 80), (cast.remote, 8080));
                stage.ingress(&tcp(pod, vip, ACK)).becomes(&tcp(pod, endpoint, ACK));
                stage.egress(&tcp(endpoint, pod, ACK)).becomes(&tcp(vip, pod, ACK));
                // One that is over makes room.
                stage.ingress(&tcp(pod, vip, FIN_ACK)).becomes(&tcp(pod, endpoint, FIN_ACK));
                stage.egress(&tcp(endpoint, pod, FIN_ACK)).becomes(&tcp(vip, pod, FIN_ACK));
                stage.rest(121_000);
                assert_eq!(stage.sweep(), 1);
                stage.ingress(&datagram).becomes(&udp((cast.pod, 5000), (cast.remote, 8080)));
                stage.counted(NEW);
            },
        );
    }
}

#[test]
fn a_flow_whose_legs_find_no_room_is_dropped_whole() {
    for cast in FAMILIES {
        // No room at all, and room for one of two legs.
        for free in [0, 1] {
            story(
                || cluster_ips(cast),
                |stage| {
                    knock(stage, cast, Proto::TCP, 1);
                    establish(stage, cast, Proto::TCP, 1);
                    stage.counted(NEW);
                    stage.leave_room_for(free);
                    let before = stage.legs();
                    for port in [2, 3] {
                        stage.ingress(&tcp((cast.pod, port), (cast.vip, 80), SYN)).dropped();
                        stage.counted(&[(Reason::FlowTableFull, 1)]);
                        assert_eq!((stage.flows(), stage.legs()), ((0, 1), before));
                    }
                    stage.ingress(&tcp((cast.pod, 1), (cast.vip, 80), ACK)).becomes(&tcp(
                        (cast.pod, 1),
                        (cast.remote, 8080),
                        ACK,
                    ));
                },
            );
        }
    }
}

#[test]
fn legs_are_counted_as_long_as_they_are_there() {
    const MORE: u64 = 20;
    for cast in FAMILIES {
        story(
            || cluster_ips(cast),
            |stage| {
                let before = stage.counted_legs();
                let ports = 1..=PLACES as u16 + MORE as u16;
                stage.hurry(|stage| ports.for_each(|port| knock(stage, cast, Proto::TCP, port)));
                stage.counted(&[(Reason::NewFlow, PLACES as u64 + MORE), (Reason::Displaced, MORE)]);
                assert_eq!(stage.legs(), 2 * PLACES);
                assert_eq!(stage.counted_legs(), before.map(|before| before + 2 * PLACES as u64));
            },
        );
    }
}

#[test]
fn a_young_flow_makes_room_for_a_leg() {
    for cast in FAMILIES {
        story(
            || cluster_ips(cast),
            |stage| {
                // Some young flows, and their places at the end of the ring.
                stage
                    .hurry(|stage| (1..=PLACES as u16).for_each(|port| knock(stage, cast, Proto::TCP, port)));
                stage.counted(&[(Reason::NewFlow, PLACES as u64)]);
                stage.leave_room_for(0);
                let syn = tcp((cast.pod, 5000), (cast.vip, 80), SYN);
                stage.ingress(&syn).dropped();
                stage.counted(&[(Reason::FlowTableFull, 1), (Reason::Displaced, 1)]);
                stage.ingress(&syn).becomes(&tcp((cast.pod, 5000), (cast.remote, 8080), SYN));
                stage.counted(&[(Reason::NewFlow, 1), (Reason::Displaced, 1)]);
            },
        );
    }
}

#[test]
fn a_leg_that_is_lost_comes_back_with_the_client_s_next_packet() {
    for cast in FAMILIES {
        let (pod, vip) = (at(cast.pod, 5555), at(cast.vip, 80));
        let (endpoint, masqueraded) = (at(cast.remote, 8080), at(cast.node, 2000));
        for (role, counted) in [(Role::OUTER, 0), (Role::MIDDLE, 1), (Role::INNER, 1)] {
            let node = || one_port().with((cast.vip, 80), Proto::TCP, INTERNAL, &[(cast.remote, 8080)]);
            story(
                || node().config(|config| config.flags |= config::MASQUERADE_ALL),
                |stage| {
                    let one = |from, to, flags| packet(Proto::TCP, from, to, flags);
                    let there_and_back = |stage: &mut Stage, there, back| {
                        stage.ingress_at_last(&one(pod, vip, there)).becomes(&one(pod, endpoint, there));
                        stage.egress(&one(pod, endpoint, there)).becomes(&one(masqueraded, endpoint, there));
                        stage.ingress(&one(endpoint, masqueraded, back)).becomes(&one(endpoint, pod, back));
                        stage.egress(&one(endpoint, pod, back)).becomes(&one(vip, pod, back));
                    };
                    there_and_back(stage, SYN, SYN_ACK);
                    there_and_back(stage, ACK, ACK);
                    stage.counted(NEW);
                    stage.lose_leg(Some(role), 0);
                    assert_eq!((stage.flows(), stage.legs()), ((0, 1), 2));
                    // Legs are looked after once a second. Without its outer one the flow is joined by way of the others.
                    stage.rest(1_500);
                    there_and_back(stage, ACK, ACK);
                    assert_eq!((stage.flows(), stage.legs()), ((0, 1), 3), "{role:?}");
                    let restored: &[_] = if counted > 0 { &[(Reason::EntryRestored, counted)] } else { &[] };
                    stage.counted(restored);
                },
            );
        }
    }
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

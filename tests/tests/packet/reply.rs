//! Flows: how answers find back, what is kept apart, and when a flow ends or moves.

use proxy_common::abi::Reason;
use proxy_common::abi::frontend::INTERNAL;
use proxy_common::addr::Proto;
use proxy_tests::packet::{Packet, Transport, View};

use crate::node::{ACK, Cast, FAMILIES, FIN_ACK, NEW, Node, RST, SYN, SYN_ACK, at, ip, packet, tcp, udp};
use crate::nodeport::{node_port, one_port};
use crate::stage::{Stage, story};

/// Two Services with one endpoint between them.
fn twins(cast: Cast, proto: Proto) -> Node {
    let ends = [(cast.remote, 8080)];
    one_port().with((cast.vip, 80), proto, INTERNAL, &ends).with((cast.vip, 81), proto, INTERNAL, &ends)
}

/// Opens a flow from the pod and lets it be answered.
fn open(stage: &mut Stage, cast: Cast, proto: Proto) {
    let (pod, vip, endpoint) = (at(cast.pod, 40_000), at(cast.vip, 80), at(cast.remote, 8080));
    stage.ingress(&packet(proto, pod, vip, SYN)).becomes(&packet(proto, pod, endpoint, SYN));
    stage.egress(&packet(proto, endpoint, pod, SYN_ACK)).becomes(&packet(proto, vip, pod, SYN_ACK));
    stage.counted(NEW);
    establish(stage, cast, proto);
}

/// The client goes on, until the flow is old: a TCP segment that acknowledges what the endpoint said, or a datagram after
/// two seconds.
fn establish(stage: &mut Stage, cast: Cast, proto: Proto) {
    let (pod, vip, endpoint) = (at(cast.pod, 40_000), at(cast.vip, 80), at(cast.remote, 8080));
    if proto != Proto::TCP {
        stage.rest(2_500);
    }
    let (_, before) = stage.flows();
    stage.ingress(&packet(proto, pod, vip, ACK)).becomes(&packet(proto, pod, endpoint, ACK));
    assert_eq!(stage.flows().1, before + 1);
}

fn one_endpoint(cast: Cast, proto: Proto) -> Node {
    Node::new().with((cast.vip, 80), proto, INTERNAL, &[(cast.remote, 8080)])
}

/// The endpoint goes and another takes its place.
fn replace(stage: &mut Stage, cast: Cast, proto: Proto) {
    stage.change(|node| {
        node.retire(100);
        node.serve((cast.vip, 80), proto, INTERNAL, &[(cast.other, 8080)]);
    });
}

#[test]
fn one_client_port_to_two_services_with_one_endpoint_is_kept_apart() {
    // D-5.
    for cast in FAMILIES {
        for proto in [Proto::TCP, Proto::UDP] {
            let (pod, endpoint) = (at(cast.pod, 40_000), at(cast.remote, 8080));
            let moved = at(cast.pod, 2000);
            story(
                || twins(cast, proto),
                |stage| {
                    open(stage, cast, proto);
                    let second = at(cast.vip, 81);
                    stage
                        .ingress(&packet(proto, pod, second, SYN))
                        .becomes(&packet(proto, moved, endpoint, SYN));
                    stage.counted(&[(Reason::NewFlow, 1), (Reason::FlowCollision, 1)]);
                    stage
                        .egress(&packet(proto, endpoint, moved, SYN_ACK))
                        .becomes(&packet(proto, second, pod, SYN_ACK));
                    stage.egress(&packet(proto, endpoint, pod, ACK)).becomes(&packet(
                        proto,
                        at(cast.vip, 80),
                        pod,
                        ACK,
                    ));
                    stage
                        .ingress(&packet(proto, pod, second, ACK))
                        .becomes(&packet(proto, moved, endpoint, ACK));
                    assert_eq!(
                        (stage.flows(), stage.legs()),
                        (if proto == Proto::TCP { (0, 2) } else { (1, 1) }, 4)
                    );
                },
            );
        }
    }
}

#[test]
fn a_third_flow_on_a_tuple_that_cannot_be_had_is_dropped() {
    for cast in FAMILIES {
        story(
            || twins(cast, Proto::TCP).with((cast.vip, 82), Proto::TCP, INTERNAL, &[(cast.remote, 8080)]),
            |stage| {
                open(stage, cast, Proto::TCP);
                stage.ingress(&tcp((cast.pod, 40_000), (cast.vip, 81), SYN)).becomes_some();
                stage.ingress(&tcp((cast.pod, 40_000), (cast.vip, 82), SYN)).dropped();
                stage.counted(&[
                    (Reason::NewFlow, 1),
                    (Reason::FlowCollision, 1),
                    (Reason::CollisionUnresolved, 1),
                ]);
            },
        );
    }
}

#[test]
fn a_collision_prefers_another_endpoint_to_another_port() {
    for cast in FAMILIES {
        let ends = [(cast.remote, 8080), (cast.other, 8080), (cast.router, 8080), (cast.client, 8080)];
        story(
            || {
                Node::new().with((cast.vip, 80), Proto::TCP, INTERNAL, &ends[..1]).with(
                    (cast.vip, 81),
                    Proto::TCP,
                    INTERNAL,
                    &ends,
                )
            },
            |stage| {
                let mut collisions = 0;
                for port in 5000..5032 {
                    stage.ingress(&tcp((cast.pod, port), (cast.vip, 80), SYN)).becomes_some();
                    let (source, destination) =
                        stage.ingress(&tcp((cast.pod, port), (cast.vip, 81), SYN)).becomes_some();
                    let moved = source != at(cast.pod, port).to_string();
                    // Whoever is moved has met its first flow at every endpoint that was tried.
                    assert!(
                        !moved || destination == at(cast.remote, 8080).to_string(),
                        "{source} {destination}"
                    );
                    collisions += u64::from(moved);
                }
                assert!(collisions < 4, "{collisions} of 32");
                let mut reasons = vec![(Reason::NewFlow, 64)];
                reasons.extend((collisions > 0).then_some((Reason::FlowCollision, collisions)));
                stage.counted(&reasons);
            },
        );
    }
}

#[test]
fn a_closed_flow_makes_room_for_a_new_one_on_the_same_port() {
    // P-26.
    for cast in FAMILIES {
        let (pod, vip) = ((cast.pod, 40_000), (cast.vip, 80));
        for (client_ends, last) in [(true, FIN_ACK), (true, RST), (false, FIN_ACK), (false, RST)] {
            story(
                || one_endpoint(cast, Proto::TCP),
                |stage| {
                    open(stage, cast, Proto::TCP);
                    if client_ends {
                        stage.ingress(&tcp(pod, vip, last)).becomes(&tcp(pod, (cast.remote, 8080), last));
                    } else {
                        stage.egress(&tcp((cast.remote, 8080), pod, last)).becomes(&tcp(vip, pod, last));
                    }
                    stage.ingress(&tcp(pod, vip, SYN)).becomes(&tcp(pod, (cast.remote, 8080), SYN));
                    stage.egress(&tcp((cast.remote, 8080), pod, SYN_ACK)).becomes(&tcp(vip, pod, SYN_ACK));
                    // A client that has not closed its own side cannot mean a new connection.
                    let anew = client_ends || last == RST;
                    stage.counted(if anew { NEW } else { &[] });
                    assert_eq!((stage.flows(), stage.legs()), (if anew { (1, 0) } else { (0, 1) }, 2));
                    if anew {
                        establish(stage, cast, Proto::TCP);
                    }
                },
            );
        }
    }
}

#[test]
fn a_closed_flow_gives_its_tuple_to_another_service_s() {
    for cast in FAMILIES {
        let (pod, endpoint) = ((cast.pod, 40_000), (cast.remote, 8080));
        story(
            || twins(cast, Proto::TCP),
            |stage| {
                open(stage, cast, Proto::TCP);
                stage.egress(&tcp(endpoint, pod, RST)).becomes(&tcp((cast.vip, 80), pod, RST));
                // After a second of silence it is certain that the reset was meant.
                stage.rest(1_500);
                stage.ingress(&tcp(pod, (cast.vip, 81), SYN)).becomes(&tcp(pod, endpoint, SYN));
                stage.egress(&tcp(endpoint, pod, SYN_ACK)).becomes(&tcp((cast.vip, 81), pod, SYN_ACK));
                stage.counted(NEW);
            },
        );
        story(
            || twins(cast, Proto::TCP),
            |stage| {
                open(stage, cast, Proto::TCP);
                stage.egress(&tcp(endpoint, pod, RST)).becomes(&tcp((cast.vip, 80), pod, RST));
                let moved = (cast.pod, 2000);
                stage.ingress(&tcp(pod, (cast.vip, 81), SYN)).becomes(&tcp(moved, endpoint, SYN));
                stage.counted(&[(Reason::NewFlow, 1), (Reason::FlowCollision, 1)]);
                // The first one goes on: somebody else had sent the reset.
                stage.ingress(&tcp(pod, (cast.vip, 80), ACK)).becomes(&tcp(pod, endpoint, ACK));
                stage.egress(&tcp(endpoint, pod, ACK)).becomes(&tcp((cast.vip, 80), pod, ACK));
            },
        );
    }
}

#[test]
fn a_retransmitted_syn_of_a_living_flow_stays_where_it_was() {
    // D-6.
    for cast in FAMILIES {
        story(
            || one_endpoint(cast, Proto::TCP),
            |stage| {
                let (syn, entered) = (
                    tcp((cast.pod, 40_000), (cast.vip, 80), SYN),
                    tcp((cast.pod, 40_000), (cast.remote, 8080), SYN),
                );
                stage.ingress(&syn).becomes(&entered);
                stage.ingress(&syn).becomes(&entered);
                stage.counted(NEW);
            },
        );
    }
}

#[test]
fn a_reset_without_a_flow_opens_none() {
    for cast in FAMILIES {
        story(
            || one_endpoint(cast, Proto::TCP),
            |stage| {
                stage.ingress(&tcp((cast.pod, 40_000), (cast.vip, 80), RST)).passes();
                stage.ingress(&tcp((cast.pod, 40_000), (cast.vip, 80), RST.and(ACK))).passes();
                stage.egress(&tcp((cast.remote, 8080), (cast.pod, 40_000), RST)).passes();
                assert_eq!(stage.legs(), 0);
            },
        );
    }
}

#[test]
fn a_refusal_by_the_endpoint_reaches_the_client_and_keeps_no_flow() {
    for cast in FAMILIES {
        let (pod, endpoint) = ((cast.pod, 40_000), (cast.remote, 8080));
        story(
            || one_endpoint(cast, Proto::TCP),
            |stage| {
                stage.ingress(&tcp(pod, (cast.vip, 80), SYN)).becomes(&tcp(pod, endpoint, SYN));
                let reset = RST.and(ACK);
                stage.egress(&tcp(endpoint, pod, reset)).becomes(&tcp((cast.vip, 80), pod, reset));
                assert_eq!(stage.flows(), (1, 0));
                stage.counted(NEW);
            },
        );
    }
}

#[test]
fn udp_moves_at_once_when_its_endpoint_goes() {
    // C-4…C-8.
    for cast in FAMILIES {
        story(
            || one_endpoint(cast, Proto::UDP),
            |stage| {
                open(stage, cast, Proto::UDP);
                replace(stage, cast, Proto::UDP);
                let pod = (cast.pod, 40_000);
                stage.ingress(&udp(pod, (cast.vip, 80))).becomes(&udp(pod, (cast.other, 8080)));
                stage.counted(&[(Reason::NewFlow, 1), (Reason::Reselected, 1)]);
                stage.egress(&udp((cast.other, 8080), pod)).becomes(&udp((cast.vip, 80), pod));
                // What the old one still sends is nobody's.
                stage.egress(&udp((cast.remote, 8080), pod)).passes();
            },
        );
    }
}

#[test]
fn young_tcp_moves_and_established_tcp_stays_when_the_endpoint_goes() {
    // P-18.
    for cast in FAMILIES {
        let (pod, vip) = ((cast.pod, 40_000), (cast.vip, 80));
        story(
            || one_endpoint(cast, Proto::TCP),
            |stage| {
                stage.ingress(&tcp(pod, vip, SYN)).becomes(&tcp(pod, (cast.remote, 8080), SYN));
                stage.counted(NEW);
                replace(stage, cast, Proto::TCP);
                stage.ingress(&tcp(pod, vip, SYN)).becomes(&tcp(pod, (cast.other, 8080), SYN));
                stage.counted(&[(Reason::NewFlow, 1), (Reason::Reselected, 1)]);
            },
        );
        story(
            || one_endpoint(cast, Proto::TCP),
            |stage| {
                open(stage, cast, Proto::TCP);
                replace(stage, cast, Proto::TCP);
                stage.ingress(&tcp(pod, vip, ACK)).becomes(&tcp(pod, (cast.remote, 8080), ACK));
                stage.egress(&tcp((cast.remote, 8080), pod, FIN_ACK)).becomes(&tcp(vip, pod, FIN_ACK));
                stage.ingress(&tcp(pod, vip, FIN_ACK)).becomes(&tcp(pod, (cast.remote, 8080), FIN_ACK));
                stage.ingress(&tcp(pod, vip, SYN)).becomes(&tcp(pod, (cast.other, 8080), SYN));
                stage.counted(NEW);
            },
        );
    }
}

#[test]
fn sctp_is_translated_where_the_port_stays() {
    for cast in FAMILIES {
        let (pod, vip, endpoint) = (at(cast.pod, 40_000), at(cast.vip, 80), at(cast.remote, 80));
        story(
            || Node::new().with((cast.vip, 80), Proto::SCTP, INTERNAL, &[(cast.remote, 80)]),
            |stage| {
                let one = |from, to| packet(Proto::SCTP, from, to, SYN);
                stage.ingress(&one(pod, vip)).becomes(&one(pod, endpoint));
                stage.egress(&one(endpoint, pod)).becomes(&one(vip, pod));
                stage.counted(NEW);
            },
        );
    }
}

#[test]
fn a_datagram_without_checksum_keeps_none() {
    // IPv4 only (RFC 768); IPv6 forbids it.
    let cast = FAMILIES[0];
    let bare = |from: (&str, u16), to: (&str, u16)| {
        let ports = Transport::Udp { source: from.1, destination: to.1, checksum: false };
        Packet::new(ip(from.0), ip(to.0), ports).payload(b"unchecked")
    };
    story(
        || node_port(cast, Proto::UDP, cast.remote),
        |stage| {
            let (client, node, endpoint) = ((cast.client, 5555), (cast.node, 30_200), (cast.remote, 8080));
            stage.ingress(&bare(client, node)).becomes(&bare(client, endpoint));
            stage.egress(&bare(client, endpoint)).becomes(&bare((cast.node, 2000), endpoint));
            stage.ingress(&bare(endpoint, (cast.node, 2000))).becomes(&bare(endpoint, client));
            stage.egress(&bare(endpoint, client)).becomes(&bare(node, client));
            stage.counted(NEW);
        },
    );
}

#[test]
fn a_checksum_that_becomes_zero_is_sent_as_all_ones() {
    // RFC 768: zero would say that there is none.
    for cast in FAMILIES {
        let (pod, vip, endpoint) = (at(cast.pod, 40_000), at(cast.vip, 80), at(cast.remote, 8080));
        let zero = |payload: &u16| {
            let bytes = Packet::udp(pod, endpoint).payload(&payload.to_be_bytes()).build();
            let view = View::ethernet(&bytes).unwrap();
            view.transport[6..8] == [0xff, 0xff]
        };
        let payload = (0..=u16::MAX).find(zero).expect("one of all sums is zero").to_be_bytes();
        story(
            || one_endpoint(cast, Proto::UDP),
            |stage| {
                let sent = Packet::udp(pod, vip).payload(&payload);
                stage.ingress(&sent).becomes(&Packet::udp(pod, endpoint).payload(&payload));
                stage.counted(NEW);
            },
        );
    }
}

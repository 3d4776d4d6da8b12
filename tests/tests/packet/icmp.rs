//! ICMP errors about translated flows: whoever gets one must recognise its own packet inside (D-2, RFC 5508).

use proxy_common::abi::frontend::INTERNAL;
use proxy_common::abi::{Hook, Reason};
use proxy_common::addr::Proto;
use proxy_tests::packet::{Packet, View};

use crate::node::{Cast, FAMILIES, NEW, Node, SYN, SYN_ACK, V4, at, ip, packet};
use crate::nodeport::{Masqueraded, node_port, one_port};
use crate::stage::{Stage, story};

/// One error was translated.
const ICMP: &[(Reason, u64)] = &[(Reason::IcmpTranslated, 1)];

/// Types and codes of errors in each family: unreachable of several kinds, too big, expired, bad parameter,
/// and IPv4's source quench. Redirects are left alone: see below.
fn kinds(cast: Cast) -> &'static [(u8, u8)] {
    if cast.vip == V4.vip {
        &[(3, 0), (3, 1), (3, 3), (3, 4), (3, 13), (4, 0), (11, 0), (11, 1), (12, 0)]
    } else {
        &[(1, 0), (1, 1), (1, 4), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1)]
    }
}

/// An error from `from` to `to`, about a packet that reads like `shown` but left as `sent`: the embedded
/// transport checksum is the sender's, whatever the addresses around it have become.
fn error(from: &str, to: &str, shown: &Packet, sent: &Packet, kind: (u8, u8), length: usize) -> Packet {
    let mut embedded = shown.clone().without_ethernet().build();
    let original = sent.clone().without_ethernet().build();
    let view = View::network(&original).unwrap();
    let l4 = original.len() - view.transport.len();
    let at = l4 + if view.protocol == 6 { 16 } else { 6 };
    embedded[at..at + 2].copy_from_slice(&original[at..at + 2]);
    embedded.truncate(length);
    Packet::icmp(ip(from), ip(to), kind.0, kind.1, [0, 0, 5, 120]).payload(&embedded)
}

/// From the IP header on: all there is, and the least that RFC 792 demands (IPv6: a little more than ports).
const LENGTHS: [usize; 2] = [1000, 48];

#[test]
fn an_error_from_a_router_about_the_client_s_packet_names_the_service() {
    for cast in FAMILIES {
        for proto in [Proto::TCP, Proto::UDP] {
            let (pod, vip, endpoint) = (at(cast.pod, 40_000), at(cast.vip, 80), at(cast.remote, 8080));
            let (asked, sent) = (packet(proto, pod, vip, SYN), packet(proto, pod, endpoint, SYN));
            for (kind, length) in kinds(cast).iter().flat_map(|kind| LENGTHS.map(|length| (*kind, length))) {
                story(
                    || Node::new().with((cast.vip, 80), proto, INTERNAL, &[(cast.remote, 8080)]),
                    |stage| {
                        stage.ingress(&asked).becomes(&sent);
                        stage.counted(NEW);
                        let arrives = error(cast.router, cast.pod, &sent, &sent, kind, length);
                        stage.ingress(&arrives).passes();
                        stage.egress(&arrives).becomes(&error(
                            cast.router,
                            cast.pod,
                            &asked,
                            &sent,
                            kind,
                            length,
                        ));
                        stage.counted(ICMP);
                        // The endpoint's own error comes from the Service.
                        stage
                            .egress(&error(cast.remote, cast.pod, &sent, &sent, kind, length))
                            .becomes(&error(cast.vip, cast.pod, &asked, &sent, kind, length));
                        stage.counted(ICMP);
                    },
                );
            }
        }
    }
}

#[test]
fn an_error_about_a_masqueraded_packet_finds_the_client() {
    for cast in FAMILIES {
        for proto in [Proto::TCP, Proto::UDP] {
            let flow = Masqueraded::node_port(cast, proto);
            let asked = packet(proto, flow.client, flow.service, SYN);
            let inside = packet(proto, flow.client, flow.endpoint, SYN);
            let sent = packet(proto, flow.node, flow.endpoint, SYN);
            for kind in kinds(cast) {
                for answered in [false, true] {
                    story(
                        || node_port(cast, proto, cast.remote),
                        |stage| {
                            flow.goes(stage, SYN);
                            if answered {
                                flow.comes_back(stage, SYN_ACK);
                            }
                            stage.counted(NEW);
                            let one = |from, to, shown| error(from, to, shown, &sent, *kind, 1000);
                            stage.ingress(&one(cast.router, cast.node, &sent)).becomes(&one(
                                cast.router,
                                cast.client,
                                &inside,
                            ));
                            stage.egress(&one(cast.router, cast.client, &inside)).becomes(&one(
                                cast.router,
                                cast.client,
                                &asked,
                            ));
                            stage.counted(&[(Reason::IcmpTranslated, 2)]);
                        },
                    );
                }
            }
        }
    }
}

#[test]
fn an_error_from_the_client_about_an_answer_finds_the_endpoint() {
    for cast in FAMILIES {
        for proto in [Proto::TCP, Proto::UDP] {
            let (pod, vip, endpoint) = (at(cast.pod, 40_000), at(cast.vip, 80), at(cast.remote, 8080));
            let answer = packet(proto, endpoint, pod, SYN_ACK);
            let shown = packet(proto, vip, pod, SYN_ACK);
            for kind in kinds(cast) {
                story(
                    || Node::new().with((cast.vip, 80), proto, INTERNAL, &[(cast.remote, 8080)]),
                    |stage| {
                        stage
                            .ingress(&packet(proto, pod, vip, SYN))
                            .becomes(&packet(proto, pod, endpoint, SYN));
                        stage.egress(&answer).becomes(&shown);
                        stage.counted(NEW);
                        let entered = error(cast.pod, cast.remote, &answer, &shown, *kind, 1000);
                        stage
                            .ingress(&error(cast.pod, cast.vip, &shown, &shown, *kind, 1000))
                            .becomes(&entered);
                        stage.counted(ICMP);
                        stage.egress(&entered).passes();
                    },
                );
            }
        }
    }
}

#[test]
fn an_error_from_a_masqueraded_client_leaves_with_the_node_s_address() {
    for cast in FAMILIES {
        let proto = Proto::UDP;
        let flow = Masqueraded::node_port(cast, proto);
        let answer = packet(proto, flow.endpoint, flow.node, SYN);
        let inside = packet(proto, flow.endpoint, flow.client, SYN);
        let shown = packet(proto, flow.service, flow.client, SYN);
        for kind in kinds(cast) {
            story(
                || node_port(cast, proto, cast.remote),
                |stage| {
                    flow.goes(stage, SYN);
                    flow.comes_back(stage, SYN);
                    stage.counted(NEW);
                    let one = |from, to, about| error(from, to, about, &shown, *kind, 1000);
                    stage.ingress(&one(cast.client, cast.node, &shown)).becomes(&one(
                        cast.client,
                        cast.remote,
                        &inside,
                    ));
                    stage.egress(&one(cast.client, cast.remote, &inside)).becomes(&one(
                        cast.node,
                        cast.remote,
                        &answer,
                    ));
                    stage.counted(&[(Reason::IcmpTranslated, 2)]);
                },
            );
        }
    }
}

#[test]
fn an_error_about_a_flow_with_another_source_port_shows_the_client_its_own() {
    // D-2 with D-5.
    for cast in FAMILIES {
        let proto = Proto::UDP;
        let (pod, endpoint, moved) = (at(cast.pod, 40_000), at(cast.remote, 8080), at(cast.pod, 2000));
        let asked = packet(proto, pod, at(cast.vip, 81), SYN);
        let sent = packet(proto, moved, endpoint, SYN);
        let answer = packet(proto, endpoint, moved, SYN);
        let shown = packet(proto, at(cast.vip, 81), pod, SYN);
        let ends = [(cast.remote, 8080)];
        for kind in kinds(cast) {
            story(
                || {
                    one_port().with((cast.vip, 80), proto, INTERNAL, &ends).with(
                        (cast.vip, 81),
                        proto,
                        INTERNAL,
                        &ends,
                    )
                },
                |stage| {
                    stage
                        .ingress(&packet(proto, pod, at(cast.vip, 80), SYN))
                        .becomes(&packet(proto, pod, endpoint, SYN));
                    stage.ingress(&asked).becomes(&sent);
                    stage.counted(&[(Reason::NewFlow, 2), (Reason::FlowCollision, 1)]);
                    stage.egress(&error(cast.router, cast.pod, &sent, &sent, *kind, 1000)).becomes(&error(
                        cast.router,
                        cast.pod,
                        &asked,
                        &sent,
                        *kind,
                        1000,
                    ));
                    // And the other way round, about an answer.
                    stage.ingress(&error(cast.pod, cast.vip, &shown, &shown, *kind, 1000)).becomes(&error(
                        cast.pod,
                        cast.remote,
                        &answer,
                        &shown,
                        *kind,
                        1000,
                    ));
                    stage.counted(&[(Reason::IcmpTranslated, 2)]);
                },
            );
        }
    }
}

#[test]
fn an_error_with_less_than_the_ports_is_left_alone() {
    for cast in FAMILIES {
        let (pod, vip, endpoint) = (at(cast.pod, 40_000), at(cast.vip, 80), at(cast.remote, 8080));
        let (asked, sent) = (packet(Proto::UDP, pod, vip, SYN), packet(Proto::UDP, pod, endpoint, SYN));
        let ports = if cast.vip == V4.vip { 24 } else { 44 };
        story(
            || Node::new().with((cast.vip, 80), Proto::UDP, INTERNAL, &[(cast.remote, 8080)]),
            |stage| {
                stage.ingress(&asked).becomes(&sent);
                let kind = kinds(cast)[0];
                for length in 0..ports + 10 {
                    let arrives = error(cast.router, cast.pod, &sent, &sent, kind, length);
                    if length < ports {
                        stage.egress(&arrives).passes();
                    } else {
                        let due = error(cast.router, cast.pod, &asked, &sent, kind, length);
                        stage.egress(&arrives).becomes(&due);
                    }
                }
                stage.counted(&[(Reason::NewFlow, 1), (Reason::IcmpTranslated, 10)]);
            },
        );
    }
}

#[test]
fn an_error_about_nobody_s_flow_passes() {
    for cast in FAMILIES {
        let about = packet(Proto::TCP, at(cast.pod, 40_000), at(cast.remote, 8080), SYN);
        let ends = [(cast.remote, 8080)];
        story(
            || Node::new().with((cast.vip, 80), Proto::TCP, INTERNAL, &ends),
            |stage| {
                for kind in kinds(cast) {
                    let error = error(cast.router, cast.pod, &about, &about, *kind, 1000);
                    stage.ingress(&error).passes();
                    stage.egress(&error).passes();
                    // Not even when it comes to the Service's address.
                    let stray = Packet::icmp(ip(cast.router), ip(cast.vip), kind.0, kind.1, [0; 4]);
                    stage.ingress(&stray.payload(&about.clone().without_ethernet().build())).passes();
                }
            },
        );
    }
}

#[test]
fn a_redirect_is_left_alone() {
    // RFC 1122 §3.2.2.2: it is about the route to the endpoint. As one about the Service it would send the
    // client round the node that translates.
    let (pod, vip, endpoint) = (at(V4.pod, 40_000), at(V4.vip, 80), at(V4.remote, 8080));
    let sent = packet(Proto::UDP, pod, endpoint, SYN);
    story(
        || Node::new().with((V4.vip, 80), Proto::UDP, INTERNAL, &[(V4.remote, 8080)]),
        |stage| {
            stage.ingress(&packet(Proto::UDP, pod, vip, SYN)).becomes(&sent);
            stage.counted(NEW);
            for code in 0..4 {
                stage.egress(&error(V4.router, V4.pod, &sent, &sent, (5, code), 1000)).passes();
            }
        },
    );
}

#[test]
fn an_error_opens_refreshes_and_establishes_no_flow() {
    for cast in FAMILIES {
        let (pod, vip, endpoint) = (at(cast.pod, 40_000), at(cast.vip, 80), at(cast.remote, 8080));
        let sent = packet(Proto::UDP, pod, endpoint, SYN);
        story(
            || Node::new().with((cast.vip, 80), Proto::UDP, INTERNAL, &[(cast.remote, 8080)]),
            |stage| {
                stage.ingress(&packet(Proto::UDP, pod, vip, SYN)).becomes(&sent);
                stage.counted(NEW);
                let error = error(cast.remote, cast.pod, &sent, &sent, kinds(cast)[2], 1000);
                let bytes = stage.bytes(&error);
                stage.frame(Hook::EGRESS, bytes).becomes_some_error();
                stage.counted(ICMP);
                assert_eq!((stage.flows(), stage.legs()), ((1, 0), 2));
            },
        );
    }
}

#[test]
fn an_error_about_a_packet_with_more_headers_is_translated_inside() {
    for cast in FAMILIES {
        let (pod, vip, endpoint) = (at(cast.pod, 40_000), at(cast.vip, 80), at(cast.remote, 8080));
        let dressed = |packet: Packet| {
            if cast.vip == V4.vip {
                packet.options(&[1; 12])
            } else {
                packet.extension(0, &[1, 4, 0, 0, 0, 0])
            }
        };
        let (asked, sent) =
            (dressed(packet(Proto::UDP, pod, vip, SYN)), dressed(packet(Proto::UDP, pod, endpoint, SYN)));
        story(
            || Node::new().with((cast.vip, 80), Proto::UDP, INTERNAL, &[(cast.remote, 8080)]),
            |stage: &mut Stage| {
                stage.ingress(&asked).becomes(&sent);
                let kind = kinds(cast)[1];
                stage
                    .egress(&dressed(error(cast.router, cast.pod, &sent, &sent, kind, 1000)))
                    .becomes(&dressed(error(cast.router, cast.pod, &asked, &sent, kind, 1000)));
                stage.counted(&[(Reason::NewFlow, 1), (Reason::IcmpTranslated, 1)]);
            },
        );
    }
}

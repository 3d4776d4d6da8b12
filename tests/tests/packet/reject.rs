//! What has no endpoint or no such port is refused at once, with an answer that the client understands.

use proxy_common::abi::Reason;
use proxy_common::abi::frontend::{INTERNAL, NODE_PORT};
use proxy_common::addr::Proto;
use proxy_tests::packet::{Packet, Sum, TcpFlags, Transport, View, protocol};

use crate::node::{ACK, FAMILIES, FIN_ACK, NEW, Node, RST, SYN, V4, V6, at, ip, packet, tcp};
use crate::stage::{Stage, story};

/// Ethernet addresses turned round.
fn back(packet: Packet) -> Packet {
    packet.ethernet([2, 0, 0, 0, 0, 2], [0; 6]).identification(0)
}

/// The RST that answers a segment of the builder's (RFC 9293 §3.5.2), built from scratch.
fn reset(refused: &Packet, sequence: u32, acknowledged: u32, flags: TcpFlags) -> Vec<u8> {
    let sent = refused.build();
    let view = View::ethernet(&sent).unwrap();
    let (source, destination) = view.ports.unwrap();
    let transport = Transport::Tcp {
        source: destination,
        destination: source,
        sequence,
        acknowledged,
        flags,
        options: Vec::new(),
    };
    let mut bytes = back(Packet::new(view.destination, view.source, transport)).build();
    // No window: there is nothing to send to.
    let l4 = bytes.len() - 20;
    bytes[l4 + 14..l4 + 18].fill(0);
    let sum = Sum::default().pseudo(view.destination, view.source, protocol::TCP, 20);
    let sum = sum.bytes(&bytes[l4..]).checksum();
    bytes[l4 + 16..l4 + 18].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// The "port unreachable" that answers a packet, with its IP header and eight bytes (RFC 792, RFC 4443 §3.1).
fn unreachable(stage: &Stage, refused: &Packet) -> Vec<u8> {
    let sent = stage.framed(&stage.bytes(refused));
    let view = View::ethernet(&sent).unwrap();
    let (kind, code, length) = if view.source.is_ipv4() { (3, 3, 28) } else { (1, 4, 48) };
    let error = Packet::icmp(view.destination, view.source, kind, code, [0; 4]);
    back(error.payload(&sent[14..14 + length])).build()
}

#[test]
fn a_service_without_endpoints_resets_tcp() {
    // P-14, P-19.
    let reset_ack = RST.and(ACK);
    for cast in FAMILIES {
        let vip = (cast.vip, 80);
        story(
            || Node::new().with(vip, Proto::TCP, INTERNAL, &[]),
            |stage| {
                let pod = (cast.pod, 40_000);
                let syn = tcp(pod, vip, SYN);
                stage.ingress(&syn).answered_with(&reset(&syn, 0, 1001, reset_ack));
                let ack = tcp(pod, vip, ACK).payload(b"data");
                stage.ingress(&ack).answered_with(&reset(&ack, 1001, 0, RST));
                let fin = tcp(pod, vip, FIN_ACK);
                stage.ingress(&fin).answered_with(&reset(&fin, 1001, 0, RST));
                // Data and FIN count (RFC 9293 §3.4).
                let late = tcp(pod, vip, TcpFlags::FIN).payload(b"bytes");
                stage.ingress(&late).answered_with(&reset(&late, 0, 1007, reset_ack));
                stage.counted(&[(Reason::NoEndpoint, 4)]);
                // An RST is never answered.
                stage.ingress(&tcp(pod, vip, RST)).passes();
                stage.ingress(&tcp(pod, vip, reset_ack)).passes();
            },
        );
    }
}

#[test]
fn a_service_without_endpoints_is_unreachable_for_udp_and_sctp() {
    for cast in FAMILIES {
        for proto in [Proto::UDP, Proto::SCTP] {
            for (vip, flags, place) in [
                (cast.vip, INTERNAL, cast.vip),
                (cast.external, 0, cast.external),
                (cast.node, NODE_PORT, cast.any),
            ] {
                story(
                    || Node::new().with((place, 80), proto, flags, &[]),
                    |stage| {
                        let sent = packet(proto, at(cast.client, 40_000), at(vip, 80), SYN);
                        let answer = unreachable(stage, &sent);
                        stage.ingress(&sent).answered_with(&answer);
                        stage.counted(&[(Reason::NoEndpoint, 1)]);
                    },
                );
            }
        }
    }
}

#[test]
fn a_port_that_a_cluster_ip_lacks_is_refused() {
    // P-21.
    for cast in FAMILIES {
        story(
            || Node::new().with((cast.vip, 80), Proto::TCP, INTERNAL, &[(cast.remote, 8080)]),
            |stage| {
                let syn = tcp((cast.pod, 40_000), (cast.vip, 81), SYN);
                stage.ingress(&syn).answered_with(&reset(&syn, 0, 1001, RST.and(ACK)));
                // The port, but not the protocol.
                let datagram = packet(Proto::UDP, at(cast.pod, 40_000), at(cast.vip, 80), SYN);
                let answer = unreachable(stage, &datagram);
                stage.ingress(&datagram).answered_with(&answer);
                stage.counted(&[(Reason::UndefinedPort, 2)]);
            },
        );
    }
}

/// V-6, P-21.
#[test]
fn an_echo_request_to_a_cluster_ip_is_refused_and_its_answer_is_not() {
    for (cast, request, reply) in [(V4, 8, 0), (V6, 128, 129)] {
        story(
            || Node::new().with((cast.vip, 80), Proto::TCP, INTERNAL, &[(cast.remote, 8080)]),
            |stage| {
                let echo =
                    |kind| Packet::icmp(ip(cast.pod), ip(cast.vip), kind, 0, [0, 7, 0, 1]).payload(b"ping");
                let answer = unreachable(stage, &echo(request));
                stage.ingress(&echo(request)).answered_with(&answer);
                stage.counted(&[(Reason::UndefinedPort, 1)]);
                // RFC 1122 §3.2.2: answers to answers never end.
                stage.ingress(&echo(reply)).passes();
            },
        );
    }
}

#[test]
fn a_protocol_without_ports_is_refused_at_a_cluster_ip() {
    for cast in FAMILIES {
        story(
            || Node::new().with((cast.vip, 80), Proto::TCP, INTERNAL, &[(cast.remote, 8080)]),
            |stage| {
                let gre = Packet::new(ip(cast.pod), ip(cast.vip), Transport::Other(47)).payload(&[0; 16]);
                let answer = unreachable(stage, &gre);
                stage.ingress(&gre).answered_with(&answer);
                stage.counted(&[(Reason::UndefinedPort, 1)]);
            },
        );
    }
}

#[test]
fn a_port_that_an_external_ip_lacks_is_left_alone() {
    // P-23: the address may be a host's.
    for cast in FAMILIES {
        story(
            || Node::new().with((cast.external, 80), Proto::TCP, 0, &[(cast.remote, 8080)]),
            |stage| {
                stage.ingress(&tcp((cast.client, 40_000), (cast.external, 81), SYN)).passes();
                let echo = if cast.vip == V4.vip { 8 } else { 128 };
                stage
                    .ingress(&Packet::icmp(ip(cast.client), ip(cast.external), echo, 0, [0, 7, 0, 1]))
                    .passes();
            },
        );
    }
}

#[test]
fn a_refused_packet_with_options_gets_its_reset_but_no_icmp_error() {
    story(
        || {
            Node::new().with((V4.vip, 80), Proto::TCP, INTERNAL, &[]).with(
                (V4.vip, 80),
                Proto::UDP,
                INTERNAL,
                &[],
            )
        },
        |stage| {
            let syn = tcp((V4.pod, 40_000), (V4.vip, 80), SYN).options(&[1, 1, 1, 0]);
            stage.ingress(&syn).answered_with(&reset(&syn, 0, 1001, RST.and(ACK)));
            // The answer has one size, and the embedded header would not fit it.
            let datagram = packet(Proto::UDP, at(V4.pod, 40_000), at(V4.vip, 80), SYN).options(&[1, 1, 1, 0]);
            stage.ingress(&datagram).dropped();
            stage.counted(&[(Reason::NoEndpoint, 2)]);
        },
    );
}

#[test]
fn a_service_that_loses_its_last_endpoint_refuses_and_serves_again() {
    for cast in FAMILIES {
        let vip = (cast.vip, 80);
        story(
            || Node::new().with(vip, Proto::TCP, INTERNAL, &[(cast.remote, 8080)]),
            |stage| {
                stage.ingress(&tcp((cast.pod, 1), vip, SYN)).becomes(&tcp(
                    (cast.pod, 1),
                    (cast.remote, 8080),
                    SYN,
                ));
                stage.counted(NEW);
                stage.change(|node| {
                    node.retire(100);
                    node.serve(vip, Proto::TCP, INTERNAL, &[]);
                });
                let syn = tcp((cast.pod, 2), vip, SYN);
                stage.ingress(&syn).answered_with(&reset(&syn, 0, 1001, RST.and(ACK)));
                stage.counted(&[(Reason::NoEndpoint, 1)]);
                // The unanswered flow has nobody to lose.
                let again = tcp((cast.pod, 1), vip, SYN);
                stage.ingress(&again).answered_with(&reset(&again, 0, 1001, RST.and(ACK)));
                stage.counted(&[(Reason::NoEndpoint, 1), (Reason::Reselected, 1)]);
                stage.change(|node| {
                    node.serve(vip, Proto::TCP, INTERNAL, &[(cast.other, 8080)]);
                });
                stage.ingress(&syn).becomes(&tcp((cast.pod, 2), (cast.other, 8080), SYN));
                stage.counted(NEW);
            },
        );
    }
}

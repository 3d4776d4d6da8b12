//! Packets that are cut, contradict themselves, or are not for us: left alone, never half translated.

use proxy_common::abi::frontend::{INTERNAL, NODE_PORT};
use proxy_common::abi::{Hook, address};
use proxy_common::addr::Proto;
use proxy_common::testing::Outcome;
use proxy_tests::packet::Packet;

use crate::node::{Cast, FAMILIES, NEW, Node, SYN, SYN_ACK, V4, V6, addr, at, ip, packet, tcp, udp};
use crate::stage::{Form, Stage, story};

fn cluster_ip(cast: Cast) -> Node {
    Node::new().with((cast.vip, 80), Proto::TCP, INTERNAL, &[(cast.remote, 8080)]).with(
        (cast.vip, 80),
        Proto::UDP,
        INTERNAL,
        &[(cast.remote, 8080)],
    )
}

#[test]
fn a_packet_cut_anywhere_is_translated_whole_or_not_at_all() {
    for cast in FAMILIES {
        for (proto, header) in [(Proto::TCP, 20), (Proto::UDP, 8)] {
            let sent = packet(proto, at(cast.pod, 40_000), at(cast.vip, 80), SYN).payload(&[7; 9]);
            let due = packet(proto, at(cast.pod, 40_000), at(cast.remote, 8080), SYN).payload(&[7; 9]);
            story(
                || cluster_ip(cast),
                |stage| {
                    let (sent, due) = (stage.bytes(&sent), stage.bytes(&due));
                    let l4 = sent.len() - 9 - header;
                    for length in 0..=sent.len() {
                        let cut = stage.frame(Hook::INGRESS, sent[..length].to_vec());
                        // The transport header decides: without it there are no ports, or not all to update.
                        if length < l4 + header {
                            cut.passes();
                        } else {
                            cut.becomes_bytes(due[..length].to_vec());
                        }
                    }
                    stage.counted(NEW);
                },
            );
        }
    }
}

/// One packet of each sort that is parsed, with the flow that the answers and errors belong to.
fn sorts(cast: Cast) -> Vec<(Hook, Packet)> {
    let (pod, vip, endpoint) = ((cast.pod, 40_000), (cast.vip, 80), (cast.remote, 8080));
    let about = udp(pod, endpoint);
    let kind = if cast.vip == V4.vip { 3 } else { 1 };
    let more = |packet: Packet| {
        if cast.vip == V4.vip {
            packet.options(&[1; 8])
        } else {
            packet.extension(0, &[0; 6]).extension(60, &[0; 6])
        }
    };
    let embedded = more(about).without_ethernet().build();
    let from = ip(cast.router);
    let error = Packet::icmp(from, ip(cast.pod), kind, 0, [0; 4]).payload(&embedded);
    vec![
        (Hook::INGRESS, tcp(pod, vip, SYN)),
        (Hook::INGRESS, more(udp(pod, vip))),
        (Hook::EGRESS, tcp(endpoint, pod, SYN_ACK)),
        (Hook::EGRESS, more(error)),
    ]
}

#[test]
fn every_sort_of_packet_cut_anywhere_and_with_any_bit_wrong_means_one_thing() {
    // Host and kernel agree on each, or the step fails; here only that the sorts are what they should be.
    for (cast, form) in FAMILIES.into_iter().flat_map(|cast| [(cast, Form::Ethernet), (cast, Form::Plain)]) {
        for (hook, packet) in sorts(cast) {
            let whole = flowing(cast, form).bytes(&packet);
            let cut = (0..whole.len()).map(|length| whole[..length].to_vec());
            let bent = (0..whole.len() * 8).map(|bit| {
                let mut bent = whole.clone();
                bent[bit / 8] ^= 1 << (bit % 8);
                bent
            });
            let all: Vec<Vec<u8>> = cut.chain(bent).chain([whole.clone()]).collect();
            let (mut rewritten, mut others) = (0, 0);
            // Many of them open flows, and all flows are compared after each packet: begin anew now and then.
            for some in all.chunks(32) {
                let mut stage = flowing(cast, form);
                for bytes in some {
                    match stage.step(hook, bytes) {
                        Ok(Outcome::Rewritten(_)) => rewritten += 1,
                        Ok(_) => others += 1,
                        Err(report) => panic!("{report}"),
                    }
                }
                stage.end();
            }
            assert!(rewritten > 50 && others > 50, "{packet:?}: {rewritten} {others}");
        }
    }
}

/// A node with a TCP and a UDP flow.
fn flowing(cast: Cast, form: Form) -> Stage {
    let mut stage = Stage::new(form, cluster_ip(cast).tables);
    stage.ingress(&tcp((cast.pod, 40_000), (cast.vip, 80), SYN)).becomes_some();
    stage.ingress(&udp((cast.pod, 40_000), (cast.vip, 80))).becomes_some();
    stage
}

#[test]
fn what_is_not_ip_is_left_alone() {
    story(
        || cluster_ip(V4),
        |stage| {
            let whole = tcp((V4.pod, 40_000), (V4.vip, 80), SYN).build();
            for (high, low) in [(0x08, 0x06), (0x88, 0xcc), (0x81, 0x00), (0x88, 0xa8), (0x00, 0x26), (0, 0)]
            {
                let mut frame = whole.clone();
                frame[12..14].copy_from_slice(&[high, low]);
                // Without an Ethernet header there is no EtherType to be wrong: the version is.
                frame[14] = 0x05 | (low & 0x10);
                let frame = stage.reform(&frame);
                stage.frame(Hook::INGRESS, frame.clone()).passes();
                stage.frame(Hook::EGRESS, frame).passes();
            }
        },
    );
}

#[test]
fn a_header_that_contradicts_itself_is_left_alone() {
    // No version, another version, the other family's, and a header shorter than the shortest. Without an
    // EtherType the version is all there is, so that a packet of the other family is one: it is no Service's.
    for (cast, firsts) in [(V4, [0x05, 0xf5, 0x65, 0x44]), (V6, [0x00, 0xf0, 0x44, 0x50])] {
        story(
            || cluster_ip(cast),
            |stage| {
                for first in firsts {
                    let mut frame = tcp((cast.pod, 40_000), (cast.vip, 80), SYN).build();
                    frame[14] = first;
                    let frame = stage.reform(&frame);
                    stage.frame(Hook::INGRESS, frame).passes();
                }
            },
        );
    }
}

#[test]
fn options_of_ipv4_are_stepped_over() {
    for options in [&[1_u8][..], &[7, 7, 4, 0, 0, 0, 0], &[1; 40]] {
        story(
            || cluster_ip(V4),
            |stage| {
                for proto in [Proto::TCP, Proto::UDP] {
                    let one = |to| packet(proto, at(V4.pod, 40_000), to, SYN).options(options);
                    stage.ingress(&one(at(V4.vip, 80))).becomes(&one(at(V4.remote, 8080)));
                    stage.counted(NEW);
                }
            },
        );
    }
}

#[test]
fn up_to_four_extension_headers_are_stepped_over() {
    // D-20: hop-by-hop options, routing, destination options (RFC 8200 §4.1).
    let body = [1, 4, 0, 0, 0, 0];
    for chain in [&[0_u8][..], &[43], &[60], &[0, 60], &[0, 60, 43], &[0, 60, 43, 60]] {
        let with =
            |packet: Packet| chain.iter().fold(packet, |packet, number| packet.extension(*number, &body));
        story(
            || cluster_ip(V6),
            |stage| {
                for proto in [Proto::TCP, Proto::UDP] {
                    let one = |to| with(packet(proto, at(V6.pod, 40_000), to, SYN));
                    stage.ingress(&one(at(V6.vip, 80))).becomes(&one(at(V6.remote, 8080)));
                    stage.counted(NEW);
                }
            },
        );
    }
}

#[test]
fn more_extension_headers_or_one_that_is_cut_are_left_alone() {
    story(
        || cluster_ip(V6),
        |stage| {
            let five =
                (0..5).fold(udp((V6.pod, 40_000), (V6.vip, 80)), |packet, _| packet.extension(60, &[0; 6]));
            stage.ingress(&five).passes();
            let long = udp((V6.pod, 40_000), (V6.vip, 80)).extension(60, &[0; 14]);
            let bytes = stage.bytes(&long);
            let l4 = bytes.len() - 13;
            for length in l4 - 16..l4 + 8 {
                stage.frame(Hook::INGRESS, bytes[..length].to_vec()).passes();
            }
        },
    );
}

#[test]
fn an_ipv6_packet_with_mapped_addresses_is_left_alone() {
    // It would read as IPv4: found by the fuzzer, which saw half an IPv4 header written into it.
    let mapped = "::ffff:10.96.0.1";
    story(
        || cluster_ip(V4).with((V6.vip, 80), Proto::TCP, INTERNAL, &[(V6.remote, 8080)]),
        |stage| {
            stage.ingress(&tcp((V6.pod, 40_000), (mapped, 80), SYN)).passes();
            stage.ingress(&tcp((mapped, 40_000), (V6.vip, 80), SYN)).passes();
            stage.ingress(&tcp(("::ffff:10.244.1.5", 40_000), (mapped, 80), SYN)).passes();
            // Nor does an error about such a packet find an IPv4 flow.
            stage.ingress(&tcp((V4.pod, 40_000), (V4.vip, 80), SYN)).becomes(&tcp(
                (V4.pod, 40_000),
                (V4.remote, 8080),
                SYN,
            ));
            stage.counted(NEW);
            let about = tcp((mapped, 80), ("::ffff:10.244.1.5", 40_000), SYN);
            let embedded = about.without_ethernet().build();
            let from = ip(V6.router);
            let error = Packet::icmp(from, ip(V6.pod), 2, 0, [0, 0, 5, 120]).payload(&embedded);
            stage.ingress(&error).passes();
        },
    );
}

#[test]
fn broadcast_multicast_and_loopback_are_never_translated() {
    // D-16, even where tables say otherwise.
    for (destination, cast) in [
        ("255.255.255.255", V4),
        ("224.0.0.251", V4),
        ("239.1.2.3", V4),
        ("127.0.0.1", V4),
        ("127.3.2.1", V4),
        ("0.0.0.0", V4),
        ("ff02::1", V6),
        ("::1", V6),
        ("::", V6),
    ] {
        story(
            || {
                let mut node = Node::new()
                    .with((cast.any, 30_200), Proto::UDP, NODE_PORT, &[(cast.remote, 8080)])
                    .with((destination, 30_200), Proto::UDP, 0, &[(cast.remote, 8080)]);
                node.tables.addresses.insert(addr(destination), address::NODE | address::NODE_PORT);
                node
            },
            |stage| stage.ingress(&udp((cast.client, 5555), (destination, 30_200))).passes(),
        );
    }
}

#[test]
fn a_packet_longer_than_it_says_keeps_its_tail() {
    for cast in FAMILIES {
        story(
            || cluster_ip(cast),
            |stage| {
                let mut sent = stage.bytes(&tcp((cast.pod, 40_000), (cast.vip, 80), SYN));
                let mut due = stage.bytes(&tcp((cast.pod, 40_000), (cast.remote, 8080), SYN));
                // Padding to the shortest Ethernet frame.
                sent.extend([0xee; 6]);
                due.extend([0xee; 6]);
                stage.frame(Hook::INGRESS, sent).becomes_bytes(due);
                stage.counted(NEW);
            },
        );
    }
}

#[test]
fn a_frame_for_another_machine_passes_untouched() {
    // A bridge may forward it; and the stack forwards nothing that came to a group of machines.
    for cast in FAMILIES {
        let mut stage = Stage::new(Form::Ethernet, cluster_ip(cast).tables);
        let (pod, vip, endpoint) = ((cast.pod, 40_000), (cast.vip, 80), (cast.remote, 8080));
        let to = |machine, packet: Packet| packet.ethernet(machine, [2, 0, 0, 0, 0, 2]);
        for other in [[2, 0, 0, 0, 0, 9], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
            stage.ingress(&to(other, tcp(pod, vip, SYN))).passes();
        }
        assert_eq!((stage.flows(), stage.legs()), ((0, 0), 0));
        stage.ingress(&to([0; 6], tcp(pod, vip, SYN))).becomes(&to([0; 6], tcp(pod, endpoint, SYN)));
        stage.counted(NEW);
        stage.end();
    }
}

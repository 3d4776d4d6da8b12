//! Direct server return: packets go to the endpoint's node in a packet of their own, and come out of it there.

use proxy_common::abi::frontend::{DSR, NODE_PORT};
use proxy_common::abi::tunnel::READY;
use proxy_common::abi::{Frontend, FrontendKey, Hook, Reason, Run, Tunnel, TunnelKey, config};
use proxy_common::addr::{Port, Proto};
use proxy_common::wire::wrap;
use proxy_tests::packet::Packet;

use crate::node::{ACK, Cast, FAMILIES, NEW, Node, RST, SYN, SYN_ACK, V4, addr, at, ip, packet};
use crate::real::{IFACE, direct_places};
use crate::stage::{Stage, framed_story, whole_story};

/// The number of the other node.
const OTHER: u32 = 7;
const MTU: u32 = 1500;
const PORT: u16 = 30_200;

/// Another node's address.
fn other(cast: Cast) -> &'static str {
    if cast.client == V4.client { "192.168.10.2" } else { "fd00:10::2" }
}

/// A node that serves an external address and a NodePort with direct server return, to an endpoint there or (with `+`) here.
fn node(cast: Cast, endpoint: &str) -> Node {
    let mut node = Node::new();
    node.ports(2000, 1);
    for proto in [Proto::TCP, Proto::UDP] {
        for (vip, port, flags) in [(cast.external, 80, 0), (cast.any, PORT, NODE_PORT)] {
            let service = node.serve((vip, port), proto, flags | DSR, &[(endpoint, 8080)]);
            let near = endpoint.starts_with('+');
            node.tables.backends.get_mut(&(service * 100)).unwrap().node = if near { 0 } else { OTHER };
        }
    }
    let (to, from) = (addr(other(cast)), addr(cast.node));
    let tunnel = Tunnel { to, from, ifindex: IFACE, mtu: MTU, flags: READY, pad: 0 };
    node.tables.tunnels.insert(TunnelKey::new(OTHER, &to), tunnel);
    node
}

/// A packet inside one from node to node, in the form of the story; the hint names an endpoint.
fn inside(stage: &Stage, of: &[u8], from: &str, to: &str, class: u8, endpoint: (&str, u16)) -> Vec<u8> {
    let framed = stage.framed(of);
    let v4 = framed[12] == 8;
    let hint = wrap::hint(&addr(endpoint.0), Port::new(endpoint.1)).to_be_bytes();
    let length = u16::try_from(framed.len() - 14).unwrap();
    let mut header = Vec::new();
    if v4 {
        header.extend([0x45, class]);
        header.extend((length + 20).to_be_bytes());
        header.extend(hint);
        header.extend([0x40, 0, 64, 4, 0, 0]);
    } else {
        header.extend([0x60 | class >> 4, class << 4]);
        header.extend(hint);
        header.extend(length.to_be_bytes());
        header.extend([41, 64]);
    }
    for end in [from, to] {
        match ip(end) {
            std::net::IpAddr::V4(addr) => header.extend(addr.octets()),
            std::net::IpAddr::V6(addr) => header.extend(addr.octets()),
        }
    }
    if v4 {
        let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    stage.reform(&[&framed[..14], &header, &framed[14..]].concat())
}

#[test]
fn a_clients_packets_go_to_the_endpoints_node_as_they_are() {
    for cast in FAMILIES {
        for (proto, first, next) in [(Proto::TCP, SYN, ACK), (Proto::UDP, ACK, ACK)] {
            for (vip, port) in [(cast.external, 80), (cast.node, PORT)] {
                framed_story(
                    || node(cast, cast.remote),
                    |stage| {
                        for flags in [first, next, next] {
                            let sent = packet(proto, at(cast.client, 5555), at(vip, port), flags)
                                .traffic_class(0xb8);
                            let bytes = stage.bytes(&sent);
                            let wrapped =
                                inside(stage, &bytes, cast.node, other(cast), 0xb8, (cast.remote, 8080));
                            stage.ingress(&sent).becomes_wrapped(wrapped);
                        }
                        stage.counted(&[(Reason::NewFlow, 1), (Reason::Wrapped, 3)]);
                    },
                );
            }
        }
    }
}

#[test]
fn they_come_out_there_and_answers_leave_under_the_services_address() {
    for cast in FAMILIES {
        for (proto, first, back, next) in [(Proto::TCP, SYN, SYN_ACK, ACK), (Proto::UDP, ACK, ACK, ACK)] {
            for (vip, port) in [(cast.external, 80), (other(cast), PORT)] {
                whole_story(
                    || node(cast, &["+", cast.pod].concat()).config(|c| c.flags |= config::MASQUERADE_LOCAL),
                    |stage| {
                        let (client, service) = (at(cast.client, 5555), at(vip, port));
                        let endpoint = at(cast.pod, 8080);
                        for flags in [first, next] {
                            let sent = stage.bytes(&packet(proto, client, service, flags));
                            let wrapped = inside(stage, &sent, other(cast), cast.node, 0, (cast.pod, 8080));
                            let inside = packet(proto, client, endpoint, flags);
                            stage.frame(Hook::INGRESS, wrapped).becomes(&inside);
                            stage.egress(&inside).passes();
                        }
                        let answer = packet(proto, endpoint, client, back);
                        stage.ingress(&answer).passes();
                        stage.egress(&answer).becomes(&packet(proto, service, client, back));
                        stage.counted(&[(Reason::NewFlow, 1), (Reason::Unwrapped, 2)]);
                    },
                );
            }
        }
    }
}

#[test]
fn the_endpoint_is_the_one_that_the_other_node_means() {
    let pods = ["10.244.1.5", "10.244.1.6", "10.244.1.7", "10.244.1.8"];
    for meant in pods {
        whole_story(
            || {
                let near: Vec<String> = pods.iter().map(|pod| format!("+{pod}")).collect();
                let ends: Vec<(&str, u16)> = near.iter().map(|pod| (pod.as_str(), 8080)).collect();
                Node::new().with((V4.external, 80), Proto::TCP, DSR, &ends)
            },
            |stage| {
                for port in 5000..5010 {
                    let sent =
                        stage.bytes(&packet(Proto::TCP, at(V4.client, port), at(V4.external, 80), SYN));
                    let wrapped = inside(stage, &sent, other(V4), V4.node, 0, (meant, 8080));
                    let inside = packet(Proto::TCP, at(V4.client, port), at(meant, 8080), SYN);
                    stage.frame(Hook::INGRESS, wrapped).becomes(&inside);
                }
                stage.counted(&[(Reason::NewFlow, 10), (Reason::Unwrapped, 10)]);
            },
        );
    }
}

#[test]
fn without_a_way_that_is_ready_flows_are_masqueraded() {
    for cast in FAMILIES {
        framed_story(
            || {
                let mut node = node(cast, cast.remote);
                node.tables.tunnels.values_mut().for_each(|tunnel| tunnel.flags = 0);
                node
            },
            |stage| {
                let (client, service) = (at(cast.client, 5555), at(cast.external, 80));
                let inside = packet(Proto::TCP, client, at(cast.remote, 8080), SYN);
                stage.ingress(&packet(Proto::TCP, client, service, SYN)).becomes(&inside);
                let left = packet(Proto::TCP, at(cast.node, 2000), at(cast.remote, 8080), SYN);
                stage.egress(&inside).becomes(&left);
                stage.counted(NEW);
            },
        );
    }
}

#[test]
fn what_becomes_too_long_is_answered_by_the_length_that_fits() {
    for (cast, header, kind, code) in [(FAMILIES[0], 20, 3, 4), (FAMILIES[1], 40, 2, 0)] {
        whole_story(
            || node(cast, cast.remote),
            |stage| {
                let (client, service) = (at(cast.client, 5555), at(cast.external, 80));
                let room = MTU - header;
                let long = |length: u32| {
                    let payload = vec![7; length as usize - header as usize - 8];
                    Packet::udp(client, service).payload(&payload)
                };
                let bytes = stage.bytes(&long(room));
                let wrapped = inside(stage, &bytes, cast.node, other(cast), 0, (cast.remote, 8080));
                stage.ingress(&long(room)).becomes_wrapped(wrapped);
                // Of an ICMP error about it no more is embedded than the header and eight bytes.
                let sent = long(room + 1);
                let about = sent.clone().build()[..14 + header as usize + 8].to_vec();
                let reply = too_big(cast, &about, kind, code, room);
                stage.ingress(&sent).answered_with(&reply);
                stage.counted(&[(Reason::NewFlow, 1), (Reason::Wrapped, 1), (Reason::TooBig, 1)]);
            },
        );
    }
}

/// What a router says about a packet, of which it embeds the beginning, as an Ethernet frame.
fn too_big(cast: Cast, about: &[u8], kind: u8, code: u8, room: u32) -> Vec<u8> {
    let (from, to) = (ip(cast.external), ip(cast.client));
    let reply =
        Packet::icmp(from, to, kind, code, room.to_be_bytes()).payload(&about[14..]).identification(0);
    let mut bytes = reply.build();
    bytes[..6].copy_from_slice(&about[6..12]);
    bytes[6..12].copy_from_slice(&about[..6]);
    bytes
}

#[test]
fn a_tunnel_of_somebody_else_and_what_is_no_services_stay_as_they_are() {
    for cast in FAMILIES {
        whole_story(
            || node(cast, &["+", cast.pod].concat()).with((cast.vip, 80), Proto::TCP, 1, &[(cast.pod, 8080)]),
            |stage| {
                let client = at(cast.client, 5555);
                for to in [
                    at(cast.vip, 80),
                    at(cast.pod, 8080),
                    at(cast.remote, PORT),
                    at(cast.node, PORT),
                    at(cast.external, 81),
                ] {
                    let sent = stage.bytes(&packet(Proto::TCP, client, to, SYN));
                    let wrapped = inside(stage, &sent, other(cast), cast.node, 0, (cast.pod, 8080));
                    stage.frame(Hook::INGRESS, wrapped).passes();
                }
                let sent = stage.bytes(&packet(Proto::TCP, client, at(cast.external, 80), SYN));
                let wrapped = inside(stage, &sent, other(cast), cast.remote, 0, (cast.pod, 8080));
                stage.frame(Hook::INGRESS, wrapped).passes();
                stage.counted(&[]);
                // It would come back by the routes.
                let sent = stage.bytes(&packet(Proto::TCP, client, at(cast.external, 80), RST));
                let wrapped = inside(stage, &sent, other(cast), cast.node, 0, (cast.pod, 8080));
                stage.frame(Hook::INGRESS, wrapped).dropped();
                stage.counted(&[(Reason::Unwrapped, 1), (Reason::WrapFailed, 1)]);
            },
        );
    }
}

#[test]
fn an_agents_question_comes_out_for_the_node() {
    for cast in FAMILIES {
        whole_story(
            || node(cast, cast.remote).config(|config| config.probe_port = Port::new(10_261)),
            |stage| {
                let probe = Packet::udp(at(other(cast), 10_261), at(cast.node, 10_261)).payload(b"question");
                let bytes = stage.bytes(&probe);
                let wrapped = inside(stage, &bytes, other(cast), cast.node, 0, (cast.pod, 8080));
                stage.frame(Hook::INGRESS, wrapped).becomes(&probe);
                stage.counted(&[]);
            },
        );
    }
}

#[test]
fn a_place_of_an_old_flow_is_not_given_away() {
    framed_story(
        || node(V4, V4.remote),
        |stage| {
            let sent = |port, flags| packet(Proto::TCP, at(V4.client, port), at(V4.external, 80), flags);
            // All places are of flows that go on.
            let places = u16::try_from(direct_places()).unwrap();
            for port in 5000..5000 + places {
                for flags in [SYN, ACK] {
                    let bytes = stage.bytes(&sent(port, flags));
                    let wrapped = inside(stage, &bytes, V4.node, other(V4), 0, (V4.remote, 8080));
                    stage.ingress(&sent(port, flags)).becomes_wrapped(wrapped);
                }
            }
            let inside = packet(Proto::TCP, at(V4.client, 6000), at(V4.remote, 8080), SYN);
            stage.ingress(&sent(6000, SYN)).becomes(&inside);
            let places = u64::from(places);
            stage.counted(&[(Reason::NewFlow, places + 1), (Reason::Wrapped, 2 * places)]);
        },
    );
}

#[test]
fn where_the_endpoint_has_gone_the_node_leads_on_masqueraded() {
    for cast in FAMILIES {
        whole_story(
            || {
                let mut node = node(cast, cast.remote);
                let key = FrontendKey::new(addr(cast.external), Port::new(80), Proto::TCP);
                let value = node.tables.frontends[&key];
                node.tables.frontends.insert(key, Frontend { local: Run::EMPTY, ..value }.sealed(&key));
                node
            },
            |stage| {
                let client = at(cast.client, 5555);
                let sent = stage.bytes(&packet(Proto::TCP, client, at(cast.external, 80), SYN));
                let wrapped = inside(stage, &sent, other(cast), cast.node, 0, (cast.pod, 8080));
                let on = packet(Proto::TCP, client, at(cast.remote, 8080), SYN);
                stage.frame(Hook::INGRESS, wrapped).becomes(&on);
                let left = packet(Proto::TCP, at(cast.node, 2000), at(cast.remote, 8080), SYN);
                stage.egress(&on).becomes(&left);
                stage.counted(&[(Reason::NewFlow, 1), (Reason::Unwrapped, 1)]);
            },
        );
    }
}

//! Two nodes: one that the client finds, and the endpoint's, which answers.

use std::collections::BTreeSet;
use std::string::ToString;
use std::vec::Vec;

use super::tests::{ETH, Node, addr, answer, key, shown};
use crate::abi::tunnel::READY;
use crate::abi::{
    Frontend, FrontendKey, Hook, Iface, Reason, RouteKey, Run, Tunnel, TunnelKey, backend, config, frontend,
};
use crate::addr::{Addr, Port, Proto};
use crate::testing::{ByteFrame, Outcome, frame, icmp_error, run, run_through, segment, tuple, verify};
use crate::wire::{Packet, wrap};

/// A Service's address, a client, the two nodes, an endpoint on the second and one on a third, by family.
struct Family {
    vip: &'static str,
    client: &'static str,
    nodes: [&'static str; 2],
    endpoint: &'static str,
    third: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        vip: "203.0.113.1",
        client: "198.51.100.9",
        nodes: ["192.168.10.1", "192.168.10.2"],
        endpoint: "10.244.2.7",
        third: "10.244.3.7",
    },
    Family {
        vip: "2001:db8::1",
        client: "2001:db8:9::9",
        nodes: ["fd00:10::1", "fd00:10::2"],
        endpoint: "fd00:244:0:2::7",
        third: "fd00:244:0:3::7",
    },
];
/// The number of the second node.
const SECOND: u32 = 9;
const MTU: u32 = 1500;
const NODE_PORT: u16 = 30_080;
const PROTOCOLS: [Proto; 2] = [Proto::TCP, Proto::UDP];

/// The node that clients find, and the one with the endpoint.
struct Pair {
    a: Node,
    b: Node,
}

/// A Service with DSR: `endpoints` of the node come first, and begin with `+`. Where it is served, and by which slots.
fn serve(node: &mut Node, vip: &str, port: u16, proto: Proto, flags: u32, endpoints: &[(&str, u16)]) -> u32 {
    let service = node.service((vip, port), proto, flags | frontend::DSR, endpoints);
    let near = endpoints.iter().filter(|(endpoint, _)| endpoint.starts_with('+')).count() as u32;
    let key = FrontendKey::new(addr(vip), Port::new(port), proto);
    let value = node.tables.frontends[&key];
    let local = Run { first: service * 100, count: near };
    node.tables.frontends.insert(key, Frontend { local, ..value }.sealed(&key));
    for (_, backend) in node.tables.backends.iter_mut().filter(|(_, backend)| backend.service == service) {
        backend.node = if backend.flags & backend::LOCAL != 0 { 0 } else { SECOND };
    }
    service
}

impl Pair {
    /// Both nodes serve VIP and NodePort over TCP and UDP in both families.
    fn new() -> Self {
        let (mut a, mut b) = (Node::new(), Node::new());
        for family in &FAMILIES {
            let any = addr(family.vip).wildcard().to_string();
            let known = b.tables.addresses.remove(&addr(family.nodes[0])).unwrap();
            b.tables.addresses.insert(addr(family.nodes[1]), known);
            b.tables.masquerade.insert(RouteKey::range(ETH, addr(&any), 0), addr(family.nodes[1]));
            let far = [(family.endpoint, 8080)];
            let near = ["+", family.endpoint].concat();
            for proto in PROTOCOLS {
                serve(&mut a, family.vip, 80, proto, 0, &far);
                serve(&mut a, &any, NODE_PORT, proto, frontend::NODE_PORT, &far);
                serve(&mut b, family.vip, 80, proto, 0, &[(&near, 8080)]);
                serve(&mut b, &any, NODE_PORT, proto, frontend::NODE_PORT, &[(&near, 8080)]);
            }
            let [from, to] = family.nodes.map(addr);
            let tunnel = Tunnel { to, from, ifindex: ETH, mtu: MTU, flags: READY, pad: 0 };
            a.tables.tunnels.insert(TunnelKey::new(SECOND, &to), tunnel);
        }
        Self { a, b }
    }

    /// Whether new flows may go to the second node.
    fn ready(&mut self, ready: bool) {
        for tunnel in self.a.tables.tunnels.values_mut() {
            tunnel.flags = if ready { READY } else { 0 };
        }
    }
}

/// A client's packet.
fn ask(client: (&str, u16), to: (&str, u16), proto: Proto, flags: u8) -> ByteFrame {
    frame(&key(client, to, proto), flags, b"question", false)
}

/// What the first node makes of a packet: it in a packet of its own.
#[track_caller]
fn wrapped(node: &Node, frame: &ByteFrame) -> ByteFrame {
    assert_eq!(run_through(&node.tables, frame, ETH, ETH), None, "not at the driver");
    match run(&node.tables, frame, Hook::INGRESS, ETH) {
        Outcome::Wrapped(out) => {
            let header = out.bytes.len() - frame.bytes.len();
            assert_eq!(out.bytes[14 + header..], frame.bytes[14..], "the packet inside is as it came");
            out
        }
        other => panic!("not wrapped: {other:?}"),
    }
}

/// What the endpoint gets of a packet that was wrapped.
#[track_caller]
fn unwrapped(node: &Node, frame: &ByteFrame) -> ByteFrame {
    let before = node.tables.counted(Reason::Unwrapped);
    let out = node.enter(frame);
    assert_eq!(node.tables.counted(Reason::Unwrapped), before + 1);
    out
}

fn masqueraded(node: &Node, frame: &ByteFrame) -> bool {
    let left = node.leave(&node.enter(frame));
    tuple(&left).unwrap().tuple.src.same(&addr(FAMILIES[usize::from(frame.bytes[12] != 8)].nodes[0]))
}

#[test]
fn the_endpoints_node_answers_the_client_itself() {
    for family in &FAMILIES {
        for (proto, flags) in PROTOCOLS.into_iter().zip([Packet::SYN, 0]) {
            for (to, from) in [((family.vip, 80), 0), ((family.nodes[0], NODE_PORT), 0)] {
                for local in [0, config::MASQUERADE_LOCAL] {
                    let mut pair = Pair::new();
                    pair.b.tables.config.as_mut().unwrap().flags |= local;
                    // Answers go by the routes, whatever uplink the wrapping came in by.
                    pair.b.tables.ifaces.insert(ETH, Iface::new(0, ETH));
                    let client = (family.client, 40_000);
                    let sent = ask(client, to, proto, flags);
                    let on_wire = wrapped(&pair.a, &sent);
                    let outer = tuple(&on_wire).unwrap().tuple;
                    assert_eq!([outer.src, outer.dst], family.nodes.map(addr), "{from}");
                    let got = unwrapped(&pair.b, &on_wire);
                    let (endpoint, vip) = (family.endpoint, std::format!("{}|{}", to.0, to.1));
                    assert_eq!(shown(&got), std::format!("{}|40000 > {endpoint}|8080", family.client));
                    assert_eq!(pair.b.leave(&got), got, "the client keeps its address");
                    let back = pair.b.leave(&answer(&got, flags | Packet::ACK));
                    assert_eq!(shown(&back), std::format!("{vip} > {}|40000", family.client));
                    assert!(pair.b.tables.live().iter().all(|flow| flow.uplink == 0));
                    // The next one takes the same way.
                    let next = ask(client, to, proto, if flags == 0 { 0 } else { Packet::ACK });
                    assert_eq!(shown(&unwrapped(&pair.b, &wrapped(&pair.a, &next))), shown(&got));
                    assert_eq!(pair.a.tables.counted(Reason::NewFlow), 1);
                    assert_eq!(pair.a.tables.counted(Reason::Wrapped), 2);
                }
            }
        }
    }
}

#[test]
fn the_endpoint_is_the_one_that_the_first_node_has_chosen() {
    let family = &FAMILIES[0];
    let ends: Vec<_> = (1..=40).map(|n| (std::format!("10.244.2.{n}"), 8080)).collect();
    let far: Vec<_> = ends.iter().map(|(ip, port)| (ip.as_str(), *port)).collect();
    let near: Vec<_> = ends.iter().map(|(ip, port)| (std::format!("+{ip}"), *port)).collect();
    let near: Vec<_> = near.iter().map(|(ip, port)| (ip.as_str(), *port)).collect();
    let mut pair = Pair::new();
    serve(&mut pair.a, "203.0.113.2", 80, Proto::TCP, frontend::AFFINITY, &far);
    // In another order, as another agent may have it.
    let turned: Vec<_> = near.iter().rev().copied().collect();
    serve(&mut pair.b, "203.0.113.2", 80, Proto::TCP, frontend::AFFINITY, &turned);
    let mut seen = BTreeSet::new();
    for port in 40_000..40_200 {
        let client = std::format!("198.51.100.{}", port % 200);
        let sent = ask((&client, port), ("203.0.113.2", 80), Proto::TCP, Packet::SYN);
        let got = tuple(&unwrapped(&pair.b, &wrapped(&pair.a, &sent))).unwrap().tuple.dst;
        let flow = *pair.a.tables.live().iter().find(|flow| flow.client().1 == Port::new(port)).unwrap();
        assert_eq!(got, pair.a.tables.backends[&flow.backend].addr);
        seen.insert(got);
    }
    assert!(seen.len() > 30, "{} of 40", seen.len());
    // One that is not there (yet): any other.
    let mut lost = wrapped(&pair.a, &ask((family.client, 1), ("203.0.113.2", 80), Proto::TCP, Packet::SYN));
    lost.bytes[18..20].copy_from_slice(&[0, 1]);
    assert!(far.iter().all(|(ip, port)| wrap::hint(&addr(ip), Port::new(*port)) != 1));
    assert!(shown(&unwrapped(&pair.b, &lost)).contains("> 10.244.2."));
}

#[test]
fn where_wrapped_packets_do_not_get_through_flows_are_masqueraded() {
    for family in &FAMILIES {
        for (proto, flags) in PROTOCOLS.into_iter().zip([Packet::SYN, 0]) {
            let mut pair = Pair::new();
            let vip = (family.vip, 80);
            let old = ask((family.client, 40_000), vip, proto, flags);
            let _ = wrapped(&pair.a, &old);
            pair.ready(false);
            assert!(masqueraded(&pair.a, &ask((family.client, 40_001), vip, proto, flags)));
            let _ = wrapped(&pair.a, &ask((family.client, 40_000), vip, proto, flags & Packet::ACK));
            pair.ready(true);
            let _ = wrapped(&pair.a, &ask((family.client, 40_002), vip, proto, flags));
            assert!(
                masqueraded(&pair.a, &ask((family.client, 40_001), vip, proto, flags)),
                "as it has begun"
            );
            // The node itself would take it for its own packet.
            assert!(masqueraded(&pair.a, &ask((family.nodes[1], 40_000), vip, proto, flags)));
            // No way at all any more.
            pair.a.tables.tunnels.clear();
            assert!(masqueraded(&pair.a, &old), "it begins anew");
            assert_eq!(pair.a.tables.counted(Reason::WrapFailed), 0);
            assert!(masqueraded(&pair.a, &ask((family.client, 40_003), vip, proto, flags)));
        }
    }
}

#[test]
fn other_traffic_is_not_wrapped() {
    let family = &FAMILIES[0];
    let mut pair = Pair::new();
    // Of pods, of the node, to endpoints on this node, SCTP, and Services without it.
    let pod = ask(("10.244.1.5", 40_000), (family.vip, 80), Proto::TCP, Packet::SYN);
    assert!(matches!(run(&pair.a.tables, &pod, Hook::INGRESS, ETH), Outcome::Rewritten(_)));
    serve(&mut pair.a, "203.0.113.3", 80, Proto::TCP, 0, &[("+10.244.1.7", 8080)]);
    let near = ask((family.client, 40_000), ("203.0.113.3", 80), Proto::TCP, Packet::SYN);
    assert_eq!(shown(&pair.a.enter(&near)), "198.51.100.9|40000 > 10.244.1.7|8080");
    serve(&mut pair.a, "203.0.113.4", 80, Proto::SCTP, 0, &[(family.endpoint, 8080)]);
    assert!(masqueraded(&pair.a, &ask((family.client, 40_000), ("203.0.113.4", 80), Proto::SCTP, 0)));
    let plain = pair.a.service(("203.0.113.5", 80), Proto::TCP, 0, &[(family.endpoint, 8080)]);
    pair.a.tables.backends.get_mut(&(plain * 100)).unwrap().node = SECOND;
    assert!(masqueraded(
        &pair.a,
        &ask((family.client, 40_000), ("203.0.113.5", 80), Proto::TCP, Packet::SYN)
    ));
    assert_eq!(pair.a.tables.counted(Reason::Wrapped), 0);
}

#[test]
fn a_node_without_the_endpoint_leads_on_masqueraded() {
    let family = &FAMILIES[0];
    let mut pair = Pair::new();
    serve(&mut pair.b, family.vip, 80, Proto::TCP, 0, &[(family.third, 8080)]);
    let to = Tunnel {
        ifindex: ETH,
        mtu: MTU,
        flags: READY,
        to: addr("192.168.10.3"),
        ..pair.a.tables.tunnels[&TunnelKey::new(SECOND, &Addr::ANY_V4)]
    };
    pair.b.tables.tunnels.insert(TunnelKey::new(SECOND, &Addr::ANY_V4), to);
    let sent = ask((family.client, 40_000), (family.vip, 80), Proto::TCP, Packet::SYN);
    let got = unwrapped(&pair.b, &wrapped(&pair.a, &sent));
    assert_eq!(shown(&got), "198.51.100.9|40000 > 10.244.3.7|8080", "it is not wrapped once more");
    let left = pair.b.leave(&got);
    assert!(shown(&left).starts_with("192.168.10.2|"), "{}", shown(&left));
    let back = pair.b.leave(&pair.b.enter(&answer(&left, Packet::SYN | Packet::ACK)));
    assert_eq!(shown(&back), "203.0.113.1|80 > 198.51.100.9|40000");
}

#[test]
fn an_old_connection_keeps_its_node_and_what_is_new_follows_its_endpoint() {
    for family in &FAMILIES {
        let mut pair = Pair::new();
        let (vip, any) = ((family.vip, 80), family.third);
        let [old, young] = [40_000, 40_001].map(|port| (family.client, port));
        for client in [old, young] {
            let _ = wrapped(&pair.a, &ask(client, vip, Proto::TCP, Packet::SYN));
            let _ = wrapped(&pair.a, &ask(client, vip, Proto::UDP, 0));
        }
        let _ = wrapped(&pair.a, &ask(old, vip, Proto::TCP, Packet::ACK));
        assert_eq!(pair.a.flows(), [3, 1]);
        // The endpoint has moved to the third node, of which no way is known.
        for proto in PROTOCOLS {
            let service =
                pair.a.tables.frontends[&FrontendKey::new(addr(vip.0), Port::new(80), proto)].service;
            let index = service * 100;
            let was = pair.a.tables.backends[&index];
            pair.a.retire(index);
            let now = crate::abi::Backend { addr: addr(any), node: 0, ..was };
            pair.a.tables.backends.insert(index + 1, now);
            pair.a.tables.slots.insert(service * 100, index + 1);
        }
        let _ = wrapped(&pair.a, &ask(old, vip, Proto::TCP, Packet::ACK));
        for (proto, flags) in PROTOCOLS.into_iter().zip([Packet::SYN, 0]) {
            let got = pair.a.enter(&ask(young, vip, proto, flags));
            assert!(shown(&got).contains(any), "{}", shown(&got));
        }
        assert!(shown(&pair.a.enter(&ask(old, vip, Proto::UDP, 0))).contains(any));
        assert_eq!(pair.a.tables.counted(Reason::Reselected), 3);
    }
}

#[test]
fn one_side_says_how_long_a_connection_lasts() {
    let family = &FAMILIES[0];
    let pair = Pair::new();
    let tcp = |flags, seq| {
        let tuple = key((family.client, 40_000), (family.vip, 80), Proto::TCP);
        segment(&tuple, flags, [seq, 5000], b"", false)
    };
    let idle = || crate::abi::Timeouts::CONNTRACK.idle(&pair.a.tables.live()[0]);
    let _ = wrapped(&pair.a, &tcp(Packet::SYN, 1000));
    assert_eq!(idle(), 60, "nobody has answered");
    let _ = wrapped(&pair.a, &tcp(Packet::ACK, 1001));
    assert_eq!(idle(), 8_100, "the client goes on");
    let _ = wrapped(&pair.a, &tcp(Packet::FIN | Packet::ACK, 0x4000_0000));
    assert_eq!(idle(), 8_100, "a FIN from nowhere");
    let _ = wrapped(&pair.a, &tcp(Packet::RST, 0x4000_0000));
    assert_eq!(idle(), 8_100, "a RST from nowhere");
    let _ = wrapped(&pair.a, &tcp(Packet::FIN | Packet::ACK, 1001));
    assert_eq!(idle(), 120, "the other end's is not seen");
    // Whether a SYN begins anew the endpoint's node knows.
    let _ = wrapped(&pair.a, &tcp(Packet::SYN, 90_000));
    assert_eq!(pair.a.tables.counted(Reason::NewFlow), 1);
    assert_eq!(idle(), 8_100, "what begins there is not over");
    let _ = wrapped(&pair.a, &tcp(Packet::RST, 90_001));
    assert_eq!(idle(), 10);
}

#[test]
fn datagrams_grow_old_on_one_side() {
    let family = &FAMILIES[0];
    let pair = Pair::new();
    let sent = ask((family.client, 40_000), (family.vip, 80), Proto::UDP, 0);
    let _ = wrapped(&pair.a, &sent);
    let _ = wrapped(&pair.a, &sent);
    assert_eq!(pair.a.flows(), [1, 0]);
    pair.a.wait(2_000);
    let _ = wrapped(&pair.a, &sent);
    assert_eq!(pair.a.flows(), [0, 1]);
}

#[test]
fn a_flood_leaves_old_flows_alone_and_is_masqueraded_in_the_end() {
    let family = &FAMILIES[0];
    let mut pair = Pair::new();
    pair.a.tables.places = Some(6);
    let vip = (family.vip, 80);
    let client = |n: u16| (family.client, 40_000 + n);
    for n in 0..4 {
        let _ = wrapped(&pair.a, &ask(client(n), vip, Proto::TCP, Packet::SYN));
        let _ = wrapped(&pair.a, &ask(client(n), vip, Proto::TCP, Packet::ACK));
    }
    let mut other = 0;
    for n in 100..200 {
        let sent = ask(client(n), vip, Proto::TCP, Packet::SYN);
        match run(&pair.a.tables, &sent, Hook::INGRESS, ETH) {
            Outcome::Wrapped(_) => {}
            Outcome::Rewritten(_) => other += 1,
            outcome => panic!("{outcome:?}"),
        }
    }
    assert_eq!(other, 33, "four old ones in a row, and each time two places that are free");
    for n in 0..4 {
        let _ = wrapped(&pair.a, &ask(client(n), vip, Proto::TCP, Packet::ACK));
    }
    assert_eq!(pair.a.flows()[1], 4);
}

#[test]
fn what_is_too_long_with_its_wrapping_is_answered_as_by_a_router() {
    for (family, (header, proto)) in FAMILIES.iter().zip([(20, Proto::ICMP), (40, Proto::ICMPV6)]) {
        for protocol in PROTOCOLS {
            let pair = Pair::new();
            let (client, vip) = ((family.client, 40_000), (family.vip, 80));
            let headers = header + if protocol == Proto::TCP { 20 } else { 8 };
            let payload = |len: usize| {
                let tuple = key(client, vip, protocol);
                frame(&tuple, Packet::ACK, &std::vec![7; len - headers], false)
            };
            let fits = MTU as usize - header;
            let _ = wrapped(&pair.a, &payload(fits));
            let Outcome::Rejected(reply) = run(&pair.a.tables, &payload(fits + 1), Hook::INGRESS, ETH) else {
                panic!("it would be {} bytes long", fits + 1 + header);
            };
            assert_eq!(verify(&reply), Ok(()));
            let about = tuple(&reply).unwrap();
            assert_eq!(about.kind, crate::wire::Kind::IcmpError);
            assert_eq!(about.tuple, key(vip, client, protocol), "about the client's packet, as its answer");
            let icmp = &reply.bytes[14 + header..];
            let code = if proto == Proto::ICMP { [3, 4] } else { [2, 0] };
            assert_eq!(icmp[..2], code);
            assert_eq!(u32::from_be_bytes(icmp[4..8].try_into().unwrap()), fits as u32);
            assert_eq!(pair.a.tables.counted(Reason::TooBig), 1);
        }
    }
}

#[test]
fn errors_about_answers_find_the_endpoint() {
    for family in &FAMILIES {
        for (to, proto) in [((family.vip, 80), Proto::TCP), ((family.nodes[0], NODE_PORT), Proto::UDP)] {
            let pair = Pair::new();
            let client = (family.client, 40_000);
            let flags = if proto == Proto::TCP { Packet::SYN } else { 0 };
            let got = unwrapped(&pair.b, &wrapped(&pair.a, &ask(client, to, proto, flags)));
            let back = pair.b.leave(&answer(&got, Packet::ACK));
            // A router between says that it is too long; that comes to whoever has the address.
            let router = if addr(family.vip).is_v4() { "198.51.100.1" } else { "2001:db8:9::1" };
            let error = icmp_error(addr(router), addr(to.0), &back);
            let at_endpoint = unwrapped(&pair.b, &wrapped(&pair.a, &error));
            let about = tuple(&at_endpoint).unwrap().tuple;
            assert_eq!((about.dst, about.src), (addr(family.endpoint), addr(family.client)));
            // Without a flow it goes no further: it would come back by the routes.
            let (a, b) = (Pair::new().a, Pair::new().b);
            let _ = wrapped(&a, &ask(client, to, proto, flags));
            assert_eq!(run(&b.tables, &wrapped(&a, &error), Hook::INGRESS, ETH), Outcome::Dropped);
            assert_eq!(run(&a.tables, &error, Hook::INGRESS, 77), run(&a.tables, &error, Hook::INGRESS, ETH));
        }
    }
}

#[test]
fn fragments_are_wrapped_one_by_one() {
    let family = &FAMILIES[0];
    let pair = Pair::new();
    let fragment = |offset: u16, more: bool| {
        let mut bytes = ask((family.client, 5353), (family.vip, 80), Proto::UDP, 0);
        let field = u16::from(more) << 13 | offset;
        bytes.bytes[20..22].copy_from_slice(&field.to_be_bytes());
        bytes.bytes[24..26].copy_from_slice(&[0, 0]);
        let sum: u32 = bytes.bytes[14..34].chunks(2).map(|b| u32::from(b[0]) << 8 | u32::from(b[1])).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        bytes.bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        bytes
    };
    // One that begins with a fragment is masqueraded: it would be too long.
    let began = Pair::new();
    assert!(matches!(run(&began.a.tables, &fragment(0, true), Hook::INGRESS, ETH), Outcome::Rewritten(_)));
    let whole = ask((family.client, 5353), (family.vip, 80), Proto::UDP, 0);
    let _ = unwrapped(&pair.b, &wrapped(&pair.a, &whole));
    let first = unwrapped(&pair.b, &wrapped(&pair.a, &fragment(0, true)));
    assert_eq!(shown(&first), "198.51.100.9|5353 > 10.244.2.7|8080");
    let later = wrapped(&pair.a, &fragment(2, false));
    let Outcome::Rewritten(out) = run(&pair.b.tables, &later, Hook::INGRESS, ETH) else {
        panic!("the later fragment does not get through")
    };
    assert_eq!(tuple(&out).unwrap().tuple.dst, addr(family.endpoint));
    // One whose first does not come is not sent on as it is.
    let other = Pair::new();
    assert_eq!(
        run(&other.b.tables, &later, Hook::INGRESS, ETH),
        Outcome::Dropped,
        "it would come again unwrapped"
    );
    // Nor does one wait that comes in a pause.
    other.b.tables.paused_until.set(other.b.tables.now.get() + 1_000_000);
    assert_eq!(run(&other.b.tables, &wrapped(&other.a, &whole), Hook::INGRESS, ETH), Outcome::Dropped);
}

/// A packet inside another one from `from` to `to`.
fn inside(of: &ByteFrame, from: &str, to: &str) -> ByteFrame {
    let v4 = addr(from).is_v4();
    let mut words = [0; wrap::WORDS];
    let len = of.bytes.len() as u32 - 14;
    wrap::write(&mut words, v4, 0, len, (&addr(from), &addr(to)), 1);
    let header = words.iter().flat_map(|word| word.to_ne_bytes()).take(wrap::length(v4));
    let mut out = of.clone();
    out.bytes.splice(14..14, header);
    if v4 {
        out.bytes[12..14].copy_from_slice(&[8, 0]);
    } else {
        out.bytes[12..14].copy_from_slice(&[0x86, 0xdd]);
    }
    out
}

#[test]
fn nothing_is_unwrapped_that_could_not_have_come_as_it_is() {
    for family in &FAMILIES {
        let mut pair = Pair::new();
        let [a, b] = family.nodes;
        let cluster_ip = if addr(a).is_v4() { "10.96.0.1" } else { "fd00:96::1" };
        pair.b.service((cluster_ip, 80), Proto::TCP, frontend::INTERNAL, &[(family.endpoint, 8080)]);
        let client = (family.client, 40_000);
        for (to, port) in [
            (cluster_ip, 80),
            (family.endpoint, 8080),
            // NodePorts of a third, and of the node itself, which is not what the wrapping comes from.
            (family.third, NODE_PORT),
            (b, NODE_PORT),
            (b, 22),
            (family.vip, 81),
        ] {
            let sent = inside(&ask(client, (to, port), Proto::TCP, Packet::SYN), a, b);
            assert_eq!(run(&pair.b.tables, &sent, Hook::INGRESS, ETH), Outcome::Passed, "{to} {port}");
        }
        // To others than the node, a protocol that is never wrapped, the other family, and no IP at all.
        let right = ask(client, (family.vip, 80), Proto::TCP, Packet::SYN);
        let sctp = ask(client, (family.vip, 80), Proto::SCTP, 0);
        let other = &FAMILIES[usize::from(addr(a).is_v4())];
        let foreign = ask((other.client, 40_000), (other.vip, 80), Proto::TCP, Packet::SYN);
        let mut bent = inside(&right, a, b);
        let at = 14 + wrap::length(addr(a).is_v4());
        bent.bytes[at] = 0;
        for sent in [inside(&right, a, family.third), inside(&sctp, a, b), inside(&foreign, a, b), bent] {
            assert_eq!(run(&pair.b.tables, &sent, Hook::INGRESS, ETH), Outcome::Passed);
        }
        assert_eq!(pair.b.tables.counted(Reason::Unwrapped), 0);
        // Something of no flow that opens none is dropped: it would come back by the routes.
        let reset = inside(&ask(client, (family.vip, 80), Proto::TCP, Packet::RST), a, b);
        assert_eq!(run(&pair.b.tables, &reset, Hook::INGRESS, ETH), Outcome::Dropped);
        assert_eq!(pair.b.tables.counted(Reason::WrapFailed), 1);
        // A pod wraps nothing that counts.
        let pod = if addr(a).is_v4() { "10.244.7.7" } else { "fd00:244::77" };
        assert_eq!(run(&pair.b.tables, &inside(&right, pod, b), Hook::INGRESS, ETH), Outcome::Passed);
        // What is the other proxy's goes on to it, unless it knows no such address.
        pair.b.tables.config.as_mut().unwrap().flags |= config::LEAVE_NEW;
        let Outcome::Rewritten(out) = run(&pair.b.tables, &inside(&right, a, b), Hook::INGRESS, ETH) else {
            panic!("not led on");
        };
        assert_eq!(out, right);
        let node_port = inside(&ask(client, (a, NODE_PORT), Proto::TCP, Packet::SYN), a, b);
        assert_eq!(run(&pair.b.tables, &node_port, Hook::INGRESS, ETH), Outcome::Dropped);
    }
}

#[test]
fn a_flow_outlives_its_service_at_both_ends() {
    let family = &FAMILIES[0];
    let mut pair = Pair::new();
    let (client, vip) = ((family.client, 40_000), (family.vip, 80));
    let got = unwrapped(&pair.b, &wrapped(&pair.a, &ask(client, vip, Proto::TCP, Packet::SYN)));
    let _ = pair.b.leave(&answer(&got, Packet::SYN | Packet::ACK));
    let _ = unwrapped(&pair.b, &wrapped(&pair.a, &ask(client, vip, Proto::TCP, Packet::ACK)));
    for node in [&mut pair.a, &mut pair.b] {
        let key = FrontendKey::new(addr(vip.0), Port::new(80), Proto::TCP);
        let service = node.tables.frontends.remove(&key).unwrap().service;
        node.retire(service * 100);
        node.tables.addresses.remove(&key.addr);
    }
    let more = unwrapped(&pair.b, &wrapped(&pair.a, &ask(client, vip, Proto::TCP, Packet::ACK)));
    assert_eq!(shown(&more), shown(&got));
}

#[test]
fn the_question_of_an_agent_comes_out_for_the_node() {
    for family in &FAMILIES {
        let mut pair = Pair::new();
        let [a, b] = family.nodes;
        let probe = ask((a, 10_261), (b, 10_261), Proto::UDP, 0);
        assert_eq!(run(&pair.b.tables, &inside(&probe, a, b), Hook::INGRESS, ETH), Outcome::Passed);
        pair.b.tables.config.as_mut().unwrap().probe_port = Port::new(10_261);
        assert_eq!(
            run(&pair.b.tables, &inside(&probe, a, b), Hook::INGRESS, ETH),
            Outcome::Rewritten(probe.clone())
        );
        let other = ask((a, 10_261), (b, 10_262), Proto::UDP, 0);
        assert_eq!(run(&pair.b.tables, &inside(&other, a, b), Hook::INGRESS, ETH), Outcome::Passed);
        let tcp = ask((a, 10_261), (b, 10_261), Proto::TCP, Packet::SYN);
        assert_eq!(run(&pair.b.tables, &inside(&tcp, a, b), Hook::INGRESS, ETH), Outcome::Passed);
        assert_eq!(pair.b.tables.counted(Reason::Unwrapped), 0, "it is no packet of a Service");
        // Who leaves what is new to another proxy does not answer.
        pair.b.tables.config.as_mut().unwrap().flags |= config::LEAVE_NEW;
        assert_eq!(run(&pair.b.tables, &inside(&probe, a, b), Hook::INGRESS, ETH), Outcome::Passed);
    }
}

#[test]
fn what_has_been_wrapped_is_not_wrapped_again() {
    // The address moves from one node to the other, each of which sends the client's packets to the other.
    let family = &FAMILIES[0];
    let mut pair = Pair::new();
    let (client, vip) = ((family.client, 40_000), (family.vip, 80));
    serve(&mut pair.b, family.vip, 80, Proto::TCP, 0, &[(family.third, 8080)]);
    let tunnel = pair.a.tables.tunnels[&TunnelKey::new(SECOND, &addr(family.vip))];
    let back = Tunnel { to: tunnel.from, from: tunnel.to, ..tunnel };
    pair.b.tables.tunnels.insert(TunnelKey::new(SECOND, &addr(family.vip)), back);
    let at_b = wrapped(&pair.b, &ask(client, vip, Proto::TCP, Packet::SYN));
    assert_eq!(tuple(&at_b).unwrap().tuple.dst, addr(family.nodes[0]));
    let on_wire = wrapped(&pair.a, &ask(client, vip, Proto::TCP, Packet::SYN));
    let error =
        icmp_error(addr("198.51.100.1"), addr(family.vip), &ask((family.vip, 80), client, Proto::TCP, 0));
    assert_eq!(run(&pair.b.tables, &wrapped(&pair.a, &error), Hook::INGRESS, ETH), Outcome::Dropped);
    let got = unwrapped(&pair.b, &on_wire);
    assert!(shown(&got).ends_with("> 10.244.3.7|8080"), "{}", shown(&got));
    assert_eq!(pair.b.tables.live().iter().filter(|flow| flow.is_direct()).count(), 0);
}

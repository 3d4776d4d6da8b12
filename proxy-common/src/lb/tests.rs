//! Stories of packets through one node, told over tables in memory.

use std::net::IpAddr;
use std::string::{String, ToString};
use std::vec::Vec;

use super::{FlowTable, socket};
use crate::abi::{
    Backend, Config, FlowKey, Frontend, FrontendKey, Hook, Iface, Range, Reason, Run, SocketState, address,
    backend, config, frontend,
};
use crate::addr::{Addr, Port, Proto};
use crate::testing::{ByteFrame, MemoryTables, Outcome, frame, icmp_error, run, tuple, verify};
use crate::wire::Packet;

const ETH: u32 = 2;

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().expect("an address").into()
}

fn key(src: (&str, u16), dst: (&str, u16), proto: Proto) -> FlowKey {
    FlowKey {
        src: addr(src.0),
        dst: addr(dst.0),
        sport: Port::new(src.1),
        dport: Port::new(dst.1),
        proto,
        hook: Hook::INGRESS,
        pad: 0,
    }
}

/// A node with address 192.168.10.1 / fd00:10::1 whose pods are 10.244.1.0/24 / fd00:244::/64.
struct Node {
    tables: MemoryTables,
    next: u32,
}

impl Node {
    fn new() -> Self {
        let mut tables = MemoryTables {
            config: Some(Config {
                pod_v4: addr("10.244.0.0"),
                pod_v4_mask: u32::from_ne_bytes([255, 255, 0, 0]),
                pod_v6: addr("fd00:244::"),
                pod_v6_mask: addr("ffff:ffff:ffff:ffff::"),
                flags: config::POD_RANGE_V4
                    | config::POD_RANGE_V6
                    | config::SOCKET_HOST
                    | config::SOCKET_PODS,
                snat_first: 1024,
                snat_count: 28_976,
                host_netns: 1,
                seed: 7,
                ..Config::EMPTY
            }),
            ..MemoryTables::default()
        };
        for node in ["192.168.10.1", "fd00:10::1"] {
            tables.addresses.insert(addr(node), address::NODE | address::NODE_PORT);
        }
        let iface = Iface { snat_v4: addr("192.168.10.1"), snat_v6: addr("fd00:10::1"), flags: 0, pad: 0 };
        tables.ifaces.insert(ETH, iface);
        Self { tables, next: 1 }
    }

    /// A Service port; endpoints that begin with `+` are on this node. Returns its id.
    fn service(&mut self, vip: (&str, u16), proto: Proto, flags: u32, endpoints: &[(&str, u16)]) -> u32 {
        let service = self.next;
        let first = service * 100;
        for (n, (ip, port)) in endpoints.iter().enumerate() {
            let index = first + n as u32;
            let local = if ip.starts_with('+') { backend::LOCAL | backend::IN_LOCAL } else { 0 };
            let backend = Backend {
                addr: addr(ip.trim_start_matches('+')),
                port: Port::new(*port),
                flags: local | backend::IN_CLUSTER,
                generation: 1,
                service,
                pad: 0,
            };
            self.tables.backends.insert(index, backend);
            self.tables.slots.insert(index, index);
        }
        let key = FrontendKey::new(addr(vip.0), Port::new(vip.1), proto);
        let any = if endpoints.is_empty() { 0 } else { frontend::ANY };
        let value = Frontend {
            service,
            cluster: Run { first, count: endpoints.len() as u32 },
            local: Run::EMPTY,
            flags: flags | any,
            affinity_secs: 10_800,
            seal: 0,
        };
        self.tables.frontends.insert(key, value.sealed(&key));
        let known = if flags & frontend::INTERNAL != 0 { address::CLUSTER_IP } else { address::EXTERNAL };
        if flags & frontend::NODE_PORT == 0 {
            *self.tables.addresses.entry(key.addr).or_default() |= known;
        }
        self.next += 1;
        service
    }

    fn retire(&mut self, index: u32) {
        let backend = self.tables.backends[&index];
        self.tables.backends.insert(index, Backend::retired(backend.generation + 1));
    }

    /// Through ingress: the frame as the stack sees it.
    #[track_caller]
    fn enter(&self, frame: &ByteFrame) -> ByteFrame {
        match run(&self.tables, frame, Hook::INGRESS, ETH) {
            Outcome::Rewritten(out) => {
                assert_eq!(verify(&out), Ok(()));
                out
            }
            Outcome::Passed => frame.clone(),
            other => panic!("at ingress: {other:?}"),
        }
    }

    /// Through egress: the frame as the wire sees it.
    #[track_caller]
    fn leave(&self, frame: &ByteFrame) -> ByteFrame {
        match run(&self.tables, frame, Hook::EGRESS, ETH) {
            Outcome::Rewritten(out) => {
                assert_eq!(verify(&out), Ok(()));
                out
            }
            Outcome::Passed => frame.clone(),
            other => panic!("at egress: {other:?}"),
        }
    }

    fn flows(&self, table: FlowTable) -> usize {
        self.tables.flows.borrow().keys().filter(|(t, _)| *t == table).count()
    }
}

#[track_caller]
fn shown(frame: &ByteFrame) -> String {
    let key = tuple(frame, Hook::INGRESS).expect("a packet").key;
    std::format!("{}|{} > {}|{}", key.src, key.sport, key.dst, key.dport)
}

/// The answer of whoever got `frame`, with TCP flags.
fn answer(frame: &ByteFrame, flags: u8) -> ByteFrame {
    let got = tuple(frame, Hook::INGRESS).expect("a packet").key;
    crate::testing::frame(&got.reversed(Hook::INGRESS), flags, b"answer", frame.partial)
}

#[test]
fn a_pod_reaches_a_cluster_ip_and_sees_it_answer() {
    for (client, vip, endpoint) in
        [("10.244.1.5", "10.96.0.1", "10.244.2.7"), ("fd00:244::5", "fd00:96::1", "fd00:244::2:7")]
    {
        for (proto, syn, ack) in
            [(Proto::TCP, Packet::SYN, Packet::SYN | Packet::ACK), (Proto::UDP, 0, 0), (Proto::SCTP, 0, 0)]
        {
            for partial in [false, true] {
                let mut node = Node::new();
                node.service((vip, 80), proto, frontend::INTERNAL, &[(endpoint, 8080)]);
                let sent = frame(&key((client, 40000), (vip, 80), proto), syn, b"", partial);
                let entered = node.enter(&sent);
                assert_eq!(shown(&entered), std::format!("{client}|40000 > {endpoint}|8080"));
                // A pod keeps its address (M-6, M-17): nothing more happens on the way out.
                assert_eq!(node.leave(&entered), entered);
                assert_eq!((node.flows(FlowTable::HalfOpen), node.flows(FlowTable::Established)), (2, 0));
                let back = node.leave(&node.enter(&answer(&entered, ack)));
                assert_eq!(shown(&back), std::format!("{vip}|80 > {client}|40000"));
                assert_eq!((node.flows(FlowTable::HalfOpen), node.flows(FlowTable::Established)), (0, 2));
                assert_eq!(node.tables.counted(Reason::NewFlow), 1);
            }
        }
    }
}

#[test]
fn outside_traffic_to_a_remote_endpoint_is_masqueraded_and_comes_back() {
    // M-8, D-1, D-13.
    let mut node = Node::new();
    let flags = frontend::NODE_PORT;
    node.service(("0.0.0.0", 30200), Proto::TCP, flags, &[("10.244.2.7", 8080)]);
    let sent =
        frame(&key(("203.0.113.9", 5555), ("192.168.10.1", 30200), Proto::TCP), Packet::SYN, b"", false);
    let entered = node.enter(&sent);
    assert_eq!(shown(&entered), "203.0.113.9|5555 > 10.244.2.7|8080");
    let left = node.leave(&entered);
    let snat = tuple(&left, Hook::EGRESS).unwrap().key;
    assert_eq!((snat.src, snat.dst), (addr("192.168.10.1"), addr("10.244.2.7")));
    assert!((1024..30_000).contains(&snat.sport.number()), "{}", snat.sport);
    let back = node.enter(&answer(&left, Packet::SYN | Packet::ACK));
    assert_eq!(shown(&back), "10.244.2.7|8080 > 203.0.113.9|5555");
    assert_eq!(shown(&node.leave(&back)), "192.168.10.1|30200 > 203.0.113.9|5555");
    assert_eq!((node.flows(FlowTable::HalfOpen), node.flows(FlowTable::Established)), (0, 4));
    // The second packet takes the same way.
    let data =
        frame(&key(("203.0.113.9", 5555), ("192.168.10.1", 30200), Proto::TCP), Packet::ACK, b"x", false);
    let again = tuple(&node.leave(&node.enter(&data)), Hook::EGRESS).unwrap().key;
    assert_eq!((again.src, again.sport), (snat.src, snat.sport));
}

#[test]
fn outside_traffic_to_a_local_endpoint_keeps_its_source() {
    // M-8, with the switch that restores it.
    let mut node = Node::new();
    node.service(("0.0.0.0", 30200), Proto::TCP, frontend::NODE_PORT, &[("+10.244.1.7", 8080)]);
    let sent =
        frame(&key(("203.0.113.9", 5555), ("192.168.10.1", 30200), Proto::TCP), Packet::SYN, b"", false);
    let entered = node.enter(&sent);
    assert_eq!(node.leave(&entered), entered);
    node.tables.config.as_mut().unwrap().flags |= config::MASQUERADE_LOCAL;
    let sent =
        frame(&key(("203.0.113.9", 5556), ("192.168.10.1", 30200), Proto::TCP), Packet::SYN, b"", false);
    assert!(shown(&node.leave(&node.enter(&sent))).starts_with("192.168.10.1|"));
}

#[test]
fn a_pod_reaches_itself() {
    // T-58.
    // M-10: hairpin.
    let mut node = Node::new();
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("+10.244.1.5", 8080)]);
    let sent = frame(&key(("10.244.1.5", 40000), ("10.96.0.1", 80), Proto::TCP), Packet::SYN, b"", true);
    let left = node.leave(&node.enter(&sent));
    assert!(shown(&left).starts_with("192.168.10.1|"), "{}", shown(&left));
    let back = node.leave(&node.enter(&answer(&left, Packet::SYN | Packet::ACK)));
    assert_eq!(shown(&back), "10.96.0.1|80 > 10.244.1.5|40000");
}

#[test]
fn a_service_without_endpoints_refuses_at_once() {
    // P-14, P-19.
    for (client, vip) in [("10.244.1.5", "10.96.0.1"), ("fd00:244::5", "fd00:96::1")] {
        for proto in [Proto::TCP, Proto::UDP] {
            let mut node = Node::new();
            node.service((vip, 80), proto, frontend::INTERNAL, &[]);
            let sent = frame(&key((client, 40000), (vip, 80), proto), Packet::SYN, b"hello", false);
            let Outcome::Refused(back) = run(&node.tables, &sent, Hook::INGRESS, ETH) else {
                panic!("not refused");
            };
            assert_eq!(verify(&back), Ok(()));
            let packet = tuple(&back, Hook::INGRESS).unwrap();
            if proto == Proto::TCP {
                assert_eq!(shown(&back), std::format!("{vip}|80 > {client}|40000"));
                assert_eq!(packet.tcp_flags, Packet::RST | Packet::ACK);
            } else {
                // The error is about the client's packet: its tuple reads as that packet reversed.
                assert_eq!(packet.kind, crate::wire::Kind::IcmpError);
                assert_eq!(shown(&back), std::format!("{vip}|80 > {client}|40000"));
            }
            assert_eq!(node.tables.counted(Reason::Refused), 1);
            assert_eq!(node.flows(FlowTable::HalfOpen), 0);
        }
    }
}

#[test]
fn an_undefined_port_of_a_cluster_ip_is_refused_and_of_an_external_ip_left_alone() {
    // P-21, P-23.
    let mut node = Node::new();
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 80)]);
    node.service(("203.0.113.1", 80), Proto::TCP, 0, &[("10.244.2.7", 80)]);
    let to = |vip| frame(&key(("10.244.1.5", 40000), (vip, 81), Proto::TCP), Packet::SYN, b"", false);
    assert!(matches!(run(&node.tables, &to("10.96.0.1"), Hook::INGRESS, ETH), Outcome::Refused(_)));
    assert_eq!(run(&node.tables, &to("203.0.113.1"), Hook::INGRESS, ETH), Outcome::Passed);
    assert_eq!(run(&node.tables, &to("198.51.100.1"), Hook::INGRESS, ETH), Outcome::Passed);
}

#[test]
fn policy_local_without_local_endpoint_drops() {
    // P-15, P-16.
    let mut node = Node::new();
    let flags = frontend::INTERNAL | frontend::LOCAL;
    node.service(("10.96.0.1", 80), Proto::TCP, flags, &[("10.244.2.7", 80)]);
    let sent = frame(&key(("10.244.1.5", 40000), ("10.96.0.1", 80), Proto::TCP), Packet::SYN, b"", false);
    assert_eq!(run(&node.tables, &sent, Hook::INGRESS, ETH), Outcome::Dropped);
    assert_eq!(node.tables.counted(Reason::NoLocalEndpoint), 1);
    node.service(("203.0.113.1", 80), Proto::TCP, frontend::LOCAL, &[("10.244.2.7", 80)]);
    let outside =
        frame(&key(("198.51.100.1", 40000), ("203.0.113.1", 80), Proto::TCP), Packet::SYN, b"", false);
    assert_eq!(run(&node.tables, &outside, Hook::INGRESS, ETH), Outcome::Dropped);
    // V-24: a pod takes the short cut, with its own address.
    let pod = frame(&key(("10.244.1.5", 40001), ("203.0.113.1", 80), Proto::TCP), Packet::SYN, b"", false);
    let entered = node.enter(&pod);
    assert_eq!(node.leave(&entered), entered);
}

#[test]
fn udp_follows_its_service_when_the_endpoint_goes() {
    // C-4…C-8 without a scan: the flow remembers the backend's generation.
    let mut node = Node::new();
    let service = node.service(("10.96.0.10", 53), Proto::UDP, frontend::INTERNAL, &[("10.244.2.7", 53)]);
    let query = frame(&key(("10.244.1.5", 12345), ("10.96.0.10", 53), Proto::UDP), 0, b"?", false);
    let first = node.enter(&query);
    node.leave(&node.enter(&answer(&first, 0)));
    assert_eq!(node.flows(FlowTable::Established), 2);
    node.retire(service * 100);
    node.service(("10.96.0.10", 53), Proto::UDP, frontend::INTERNAL, &[("10.244.2.8", 53)]);
    let second = node.enter(&query);
    assert_eq!(shown(&second), "10.244.1.5|12345 > 10.244.2.8|53");
    assert_eq!(shown(&node.leave(&answer(&second, 0))), "10.96.0.10|53 > 10.244.1.5|12345");
    assert_eq!(node.tables.counted(Reason::Reselected), 1);
}

#[test]
fn an_answered_tcp_flow_stays_with_its_endpoint_and_a_new_syn_moves() {
    // P-18, P-26.
    let mut node = Node::new();
    let service = node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 80)]);
    let tuple = key(("10.244.1.5", 40000), ("10.96.0.1", 80), Proto::TCP);
    let entered = node.enter(&frame(&tuple, Packet::SYN, b"", false));
    node.leave(&answer(&entered, Packet::SYN | Packet::ACK));
    node.retire(service * 100);
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.8", 80)]);
    let data = node.enter(&frame(&tuple, Packet::ACK, b"x", false));
    assert_eq!(shown(&data), "10.244.1.5|40000 > 10.244.2.7|80");
    node.enter(&frame(&tuple, Packet::FIN | Packet::ACK, b"", false));
    let fresh = node.enter(&frame(&tuple, Packet::SYN, b"", false));
    assert_eq!(shown(&fresh), "10.244.1.5|40000 > 10.244.2.8|80");
}

#[test]
fn a_retransmitted_syn_stays_unless_its_endpoint_has_gone() {
    // D-6.
    let mut node = Node::new();
    let ends = [("10.244.2.7", 80), ("10.244.2.8", 80), ("10.244.2.9", 80)];
    let service = node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &ends);
    let syn = frame(&key(("10.244.1.5", 40000), ("10.96.0.1", 80), Proto::TCP), Packet::SYN, b"", false);
    let first = node.enter(&syn);
    assert_eq!(node.enter(&syn), first);
    let dst = tuple(&first, Hook::INGRESS).unwrap().key.dst;
    let index = ends.iter().position(|(ip, _)| addr(ip).same(&dst)).unwrap() as u32;
    node.retire(service * 100 + index);
    let rest: Vec<_> = ends.iter().enumerate().filter(|(n, _)| *n as u32 != index).map(|(_, e)| *e).collect();
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &rest);
    assert_ne!(tuple(&node.enter(&syn), Hook::INGRESS).unwrap().key.dst, dst);
}

#[test]
fn one_client_port_to_two_services_with_one_endpoint_does_not_collide() {
    // D-5.
    let mut node = Node::new();
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 8080)]);
    node.service(("10.96.0.2", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 8080)]);
    let syn = |vip| frame(&key(("10.244.1.5", 40000), (vip, 80), Proto::TCP), Packet::SYN, b"", false);
    let (one, two) = (node.enter(&syn("10.96.0.1")), node.enter(&syn("10.96.0.2")));
    assert_ne!(shown(&one), shown(&two));
    assert_eq!(node.tables.counted(Reason::FlowCollision), 1);
    for (sent, vip) in [(one, "10.96.0.1"), (two, "10.96.0.2")] {
        let back = node.leave(&answer(&sent, Packet::SYN | Packet::ACK));
        assert_eq!(shown(&back), std::format!("{vip}|80 > 10.244.1.5|40000"));
    }
    assert_eq!((node.flows(FlowTable::HalfOpen), node.flows(FlowTable::Established)), (0, 4));
}

#[test]
fn a_redirect_about_an_endpoint_does_not_become_one_about_its_service() {
    let mut node = Node::new();
    node.service(("10.96.0.1", 80), Proto::UDP, frontend::INTERNAL, &[("10.244.1.7", 8080)]);
    let sent = node.enter(&frame(&key(("10.244.1.5", 40000), ("10.96.0.1", 80), Proto::UDP), 0, b"", false));
    // What the kernel tells a pod whose packets leave by the bridge they came in from: type 5, code 1.
    let mut redirect = icmp_error(addr("10.244.1.1"), addr("10.244.1.5"), &sent);
    redirect.bytes[34..36].copy_from_slice(&[5, 1]);
    assert_eq!(node.leave(&redirect).bytes, redirect.bytes);
    assert_eq!(node.enter(&redirect).bytes, redirect.bytes);
    assert_eq!(node.tables.counted(Reason::IcmpTranslated), 0);
}

#[test]
fn icmp_errors_reach_whoever_the_flow_s_packets_came_from() {
    // D-2, both directions, with and without masquerading.
    for (client, node_ip, vip, endpoint, router, nodeport) in [
        ("10.244.1.5", "192.168.10.1", "10.96.0.1", "10.244.2.7", "192.168.99.1", false),
        ("203.0.113.9", "192.168.10.1", "192.168.10.1", "10.244.2.7", "192.168.99.1", true),
        ("fd00:244::5", "fd00:10::1", "fd00:96::1", "fd00:244::2:7", "fd00:99::1", false),
        ("2001:db8::9", "fd00:10::1", "fd00:10::1", "fd00:244::2:7", "fd00:99::1", true),
    ] {
        let mut node = Node::new();
        let any = if addr(vip).is_v4() { "0.0.0.0" } else { "::" };
        if nodeport {
            node.service((any, 80), Proto::TCP, frontend::NODE_PORT, &[(endpoint, 8080)]);
        } else {
            node.service((vip, 80), Proto::TCP, frontend::INTERNAL, &[(endpoint, 8080)]);
        }
        let syn = frame(&key((client, 40000), (vip, 80), Proto::TCP), Packet::SYN, b"", false);
        let wire = node.leave(&node.enter(&syn));
        let back = node.leave(&node.enter(&answer(&wire, Packet::SYN | Packet::ACK)));
        assert_eq!(node.flows(FlowTable::HalfOpen), 0);

        // A router beyond the node cannot pass a packet on to the endpoint: the client must hear of it.
        let to = tuple(&wire, Hook::EGRESS).unwrap().key.src;
        let error = icmp_error(addr(router), to, &wire);
        let heard = node.leave(&node.enter(&error));
        assert_eq!(verify(&heard), Ok(()));
        assert_eq!(shown(&heard), std::format!("{vip}|80 > {client}|40000"));
        assert_outer(&heard, router, client);

        // A router on the client's side cannot pass an answer on: the endpoint must hear of it.
        let error = icmp_error(addr(router), addr(vip), &back);
        let heard = node.leave(&node.enter(&error));
        assert_eq!(verify(&heard), Ok(()));
        let snat = tuple(&wire, Hook::EGRESS).unwrap().key;
        assert_eq!(shown(&heard), std::format!("{}|{} > {endpoint}|8080", snat.src, snat.sport));
        assert_outer(&heard, router, endpoint);

        // The endpoint itself refuses: the client hears it from the Service.
        let error = icmp_error(addr(endpoint), to, &wire);
        let heard = node.leave(&node.enter(&error));
        assert_outer(&heard, vip, client);
        let _ = node_ip;
    }
}

#[track_caller]
fn assert_outer(frame: &ByteFrame, src: &str, dst: &str) {
    use crate::wire::Frame as _;
    let (s, d) = if addr(src).is_v4() {
        (Addr::v4(frame.load(26).unwrap()), Addr::v4(frame.load(30).unwrap()))
    } else {
        (Addr(frame.load(22).unwrap()), Addr(frame.load(38).unwrap()))
    };
    assert_eq!((s.to_string(), d.to_string()), (src.to_string(), dst.to_string()));
}

#[test]
fn later_fragments_follow_the_first() {
    // D-3.
    let mut node = Node::new();
    node.service(("0.0.0.0", 30053), Proto::UDP, frontend::NODE_PORT, &[("10.244.2.7", 53)]);
    let tuple = key(("203.0.113.9", 5555), ("192.168.10.1", 30053), Proto::UDP);
    let fragment = |offset: u16, more: bool| {
        let mut part = frame(&tuple, 0, &[7; 64], false);
        let field = offset | if more { 0x2000 } else { 0 };
        part.bytes[20..22].copy_from_slice(&field.to_be_bytes());
        part.bytes[24..26].copy_from_slice(&[0, 0]);
        let mut sum: u32 = part.bytes[14..34].chunks(2).map(|b| u32::from(b[0]) << 8 | u32::from(b[1])).sum();
        sum = (sum & 0xffff) + (sum >> 16);
        part.bytes[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        part
    };
    // Out of order it waits, a few times; then it is the stack's, since it is for the node's own address.
    for _ in 0..4 {
        assert_eq!(run(&node.tables, &fragment(9, false), Hook::INGRESS, ETH), Outcome::Waits);
    }
    assert_eq!(run(&node.tables, &fragment(9, false), Hook::INGRESS, ETH), Outcome::Passed);
    let Outcome::Rewritten(first) = run(&node.tables, &fragment(0, true), Hook::INGRESS, ETH) else {
        panic!("the first fragment is not translated");
    };
    let Outcome::Rewritten(later) = run(&node.tables, &fragment(9, false), Hook::INGRESS, ETH) else {
        panic!("the later fragment is not translated");
    };
    assert_eq!(first.bytes[30..34], later.bytes[30..34]);
    assert_eq!(
        later.bytes[34..],
        fragment(9, false).bytes[34..],
        "only the IP header of a later fragment changes"
    );
    let Outcome::Rewritten(first_out) = run(&node.tables, &first, Hook::EGRESS, ETH) else {
        panic!("the first fragment is not masqueraded");
    };
    let Outcome::Rewritten(later_out) = run(&node.tables, &later, Hook::EGRESS, ETH) else {
        panic!("the later fragment is not masqueraded");
    };
    assert_eq!(first_out.bytes[26..34], later_out.bytes[26..34]);
}

#[test]
fn what_is_known_of_a_fragmented_datagram_does_not_count_for_a_later_one_of_its_number() {
    // RFC 791 §3.2: the identification comes round again.
    let mut node = Node::new();
    node.service(("10.96.0.1", 53), Proto::UDP, frontend::INTERNAL, &[("10.244.2.7", 53)]);
    let mut first = frame(&key(("10.244.1.5", 5555), ("10.96.0.1", 53), Proto::UDP), 0, &[7; 64], false);
    first.bytes[20..22].copy_from_slice(&0x2000_u16.to_be_bytes());
    let mut later = first.clone();
    later.bytes[20..22].copy_from_slice(&9_u16.to_be_bytes());
    let enter = |frame: &ByteFrame| run(&node.tables, frame, Hook::INGRESS, ETH);
    assert!(matches!(enter(&first), Outcome::Rewritten(_)));
    assert!(matches!(enter(&later), Outcome::Rewritten(_)));
    node.tables.now.set(6_000_000_000);
    assert_eq!(enter(&later), Outcome::Waits);
    assert!(matches!(enter(&first), Outcome::Rewritten(_)));
    assert!(matches!(enter(&later), Outcome::Rewritten(_)));
}

#[test]
fn a_client_port_that_is_used_past_the_service_gets_untranslated_answers_once_the_flow_is_over() {
    // D-5, D-19.
    for proto in [Proto::TCP, Proto::UDP] {
        let mut node = Node::new();
        node.service(("10.96.0.1", 80), proto, frontend::INTERNAL, &[("10.244.2.7", 8080)]);
        let (pod, endpoint) = (("10.244.1.5", 40_000), ("10.244.2.7", 8080));
        let ask = frame(&key(pod, ("10.96.0.1", 80), proto), Packet::SYN, b"x", false);
        let answer = frame(&key(endpoint, pod, proto), Packet::SYN | Packet::ACK, b"x", false);
        let direct = frame(&key(pod, endpoint, proto), Packet::SYN, b"x", false);
        node.enter(&ask);
        assert_ne!(node.leave(&answer), answer);
        // While the flow lives it has the tuple: what it was translated to is no sign of its end.
        assert_eq!(run(&node.tables, &direct, Hook::INGRESS, ETH), Outcome::Passed);
        assert_ne!(node.leave(&answer), answer, "{proto}");
        if proto == Proto::TCP {
            node.leave(&frame(&key(endpoint, pod, proto), Packet::FIN | Packet::ACK, b"", false));
        } else {
            node.tables.now.set(1_100_000_000);
        }
        assert_eq!(run(&node.tables, &direct, Hook::INGRESS, ETH), Outcome::Passed);
        assert_eq!(node.leave(&answer), answer, "{proto}");
        // The Service is there as before.
        node.enter(&ask);
        assert_ne!(node.leave(&answer), answer, "{proto}");
    }
}

#[test]
fn a_new_connection_shares_no_leg_with_one_of_its_tuple_that_is_over() {
    // D-5, D-6: they would end when the rest of the old one is swept.
    let mut node = Node::new();
    for vip in ["203.0.113.1", "203.0.113.2"] {
        node.service((vip, 80), Proto::TCP, 0, &[("10.244.2.7", 8080)]);
    }
    let (client, endpoint) = (("198.51.100.9", 40_000), ("10.244.2.7", 8080));
    let packet = |src, dst, flags| frame(&key(src, dst, Proto::TCP), flags, b"", false);
    let through = |node: &Node, vip: &'static str| {
        let left = node.leave(&node.enter(&packet(client, (vip, 80), Packet::SYN)));
        let source = tuple(&left, Hook::EGRESS).unwrap().key;
        assert_eq!(source.src, addr("192.168.10.1"));
        source.sport.number()
    };
    let answer =
        |node: &Node, port, flags| node.leave(&node.enter(&packet(endpoint, ("192.168.10.1", port), flags)));
    let legs = |node: &Node| [FlowTable::Established, FlowTable::HalfOpen].map(|table| node.flows(table));
    let port = through(&node, "203.0.113.1");
    answer(&node, port, Packet::SYN | Packet::ACK);
    assert_eq!(legs(&node), [4, 0]);
    answer(&node, port, Packet::FIN | Packet::ACK);
    let port = through(&node, "203.0.113.2");
    assert_eq!(legs(&node), [2, 4], "the old one's client and its way back to it are nobody else's");
    let seen = answer(&node, port, Packet::SYN | Packet::ACK);
    assert_eq!(tuple(&seen, Hook::EGRESS).unwrap().key.src, addr("203.0.113.2"));
    assert_eq!(legs(&node), [6, 0]);
}

#[test]
fn a_full_flow_table_harms_nobody() {
    // D-7.
    let mut node = Node::new();
    node.tables.max_flows = Some(1);
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 80)]);
    let tuple = key(("10.244.1.5", 40000), ("10.96.0.1", 80), Proto::TCP);
    let entered = node.enter(&frame(&tuple, Packet::SYN, b"", false));
    for flags in [Packet::SYN | Packet::ACK, Packet::ACK] {
        let back = node.leave(&answer(&entered, flags));
        assert_eq!(shown(&back), "10.96.0.1|80 > 10.244.1.5|40000");
        assert_eq!(node.enter(&frame(&tuple, Packet::ACK, b"", false)).bytes[30..34], entered.bytes[30..34]);
    }
    assert_eq!((node.flows(FlowTable::HalfOpen), node.flows(FlowTable::Established)), (2, 0));
    assert_eq!(node.tables.counted(Reason::FlowTableFull), 2);
}

#[test]
fn affinity_holds_until_it_is_idle_or_its_backend_goes() {
    //
    let mut node = Node::new();
    let ends = [("10.244.2.1", 80), ("10.244.2.2", 80), ("10.244.2.3", 80), ("10.244.2.4", 80)];
    let flags = frontend::INTERNAL | frontend::AFFINITY;
    let service = node.service(("10.96.0.1", 80), Proto::TCP, flags, &ends);
    let dst = |node: &Node, port: u16| {
        let syn = frame(&key(("10.244.1.5", port), ("10.96.0.1", 80), Proto::TCP), Packet::SYN, b"", false);
        tuple(&node.enter(&syn), Hook::INGRESS).unwrap().key.dst
    };
    let first = dst(&node, 40000);
    assert!((40001..40040).all(|port| dst(&node, port) == first));
    node.tables.now.set(10_801 * 1_000_000_000);
    assert!((50000..50040).any(|port| {
        node.tables.affinity.borrow_mut().clear();
        dst(&node, port) != first
    }));
    node.tables.affinity.borrow_mut().clear();
    let bound = dst(&node, 41000);
    let index = ends.iter().position(|(ip, _)| addr(ip).same(&bound)).unwrap() as u32;
    node.tables.backends.get_mut(&(service * 100 + index)).unwrap().flags &= !backend::IN_CLUSTER;
    assert!(
        (42000..42040).map(|port| dst(&node, port)).any(|d| d != bound),
        "left the set, still remembered"
    );
}

#[test]
fn new_flows_spread_over_all_endpoints() {
    // P-24, P-25.
    let mut node = Node::new();
    let ends = [("10.244.2.1", 80), ("10.244.2.2", 80), ("10.244.2.3", 80)];
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &ends);
    let mut counts = std::collections::HashMap::new();
    for port in 32768..35768 {
        let syn = frame(&key(("10.244.1.5", port), ("10.96.0.1", 80), Proto::TCP), Packet::SYN, b"", false);
        *counts.entry(tuple(&node.enter(&syn), Hook::INGRESS).unwrap().key.dst).or_insert(0) += 1;
    }
    assert_eq!(counts.len(), 3);
    assert!(counts.values().all(|n| (900..1100).contains(n)), "{counts:?}");
}

#[test]
fn a_socket_is_translated_once_and_shows_what_was_asked_for() {
    let mut node = Node::new();
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 8080)]);
    node.service(("10.96.0.10", 53), Proto::UDP, frontend::INTERNAL, &[("10.244.2.8", 53)]);
    let call = |dst: &str, port, proto, netns, connect| socket::Call {
        dst: addr(dst),
        dport: Port::new(port),
        proto,
        netns,
        connect,
    };
    let (host, pod) = (1, 99);
    for netns in [host, pod] {
        let tcp = call("10.96.0.1", 80, Proto::TCP, netns, true);
        let socket::Answer::Use(entry) = socket::decide(&node.tables, &tcp) else {
            panic!("not translated");
        };
        assert_eq!((entry.addr, entry.port), (addr("10.244.2.7"), Port::new(8080)));
        let mut state = SocketState::EMPTY;
        assert!(state.remember(&entry, true));
        let peer = state.original(&entry.addr, entry.port, Proto::TCP);
        assert_eq!(peer, Some((addr("10.96.0.1"), Port::new(80))));
    }
    // A pod's connected UDP socket is left to TC; its unconnected one and the host's are translated.
    let udp =
        |netns, connect| socket::decide(&node.tables, &call("10.96.0.10", 53, Proto::UDP, netns, connect));
    assert_eq!(udp(pod, true), socket::Answer::Leave);
    assert!(matches!(udp(pod, false), socket::Answer::Use(_)));
    assert!(matches!(udp(host, true), socket::Answer::Use(_)));
    // No Service, undefined port, loopback.
    let tcp = |dst: &str, port| socket::decide(&node.tables, &call(dst, port, Proto::TCP, pod, true));
    assert_eq!(tcp("198.51.100.1", 80), socket::Answer::Leave);
    assert_eq!(tcp("10.96.0.1", 81), socket::Answer::Refuse);
    assert_eq!(tcp("127.0.0.1", 80), socket::Answer::Leave);
}

#[test]
fn a_pod_s_socket_leaves_to_its_packets_what_counts_there() {
    // M-6, M-8: with the switches that hide pods; V-24, V-27: under an external Local policy it is the detector that
    // tells pods from others. A host process has no such packets.
    let decide = |switch: u32, dst: &str, netns: u64| {
        let mut node = Node::new();
        node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 8080)]);
        node.service(("203.0.113.1", 80), Proto::TCP, 0, &[("10.244.2.7", 8080)]);
        node.service(("203.0.113.2", 80), Proto::TCP, frontend::LOCAL, &[("10.244.2.7", 8080)]);
        if let Some(config) = &mut node.tables.config {
            config.flags |= switch;
        }
        let call =
            socket::Call { dst: addr(dst), dport: Port::new(80), proto: Proto::TCP, netns, connect: true };
        !matches!(socket::decide(&node.tables, &call), socket::Answer::Use(_))
    };
    let (host, pod) = (1, 99);
    let left = |switch| ["10.96.0.1", "203.0.113.1", "203.0.113.2"].map(|dst| decide(switch, dst, pod));
    assert_eq!(left(0), [false, false, true]);
    assert_eq!(left(config::MASQUERADE_ALL), [true, false, true]);
    assert_eq!(left(config::MASQUERADE_LOCAL), [false, true, true]);
    assert!(!decide(config::MASQUERADE_ALL, "10.96.0.1", host));
    assert!(!decide(0, "203.0.113.2", host));
}

#[test]
fn a_socket_to_nobody_s_cluster_ip_fails_at_once() {
    // P-22.
    let mut node = Node::new();
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 8080)]);
    let ask = |node: &Node, netns| {
        let call = socket::Call {
            dst: addr("10.96.0.77"),
            dport: Port::new(80),
            proto: Proto::TCP,
            netns,
            connect: true,
        };
        socket::decide(&node.tables, &call)
    };
    assert_eq!(ask(&node, 1), socket::Answer::Leave);
    if let Some(config) = &mut node.tables.config {
        config.service_range_count = 1;
        config.service_ranges[0] =
            Range { first: addr("10.96.0.0"), mask: addr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:0") };
    }
    assert_eq!(ask(&node, 1), socket::Answer::Deny);
    assert_eq!(node.tables.counted(Reason::UnallocatedClusterIp), 1);
    // Sockets that are left alone are left alone.
    if let Some(config) = &mut node.tables.config {
        config.flags &= !config::SOCKET_PODS;
    }
    assert_eq!(ask(&node, 99), socket::Answer::Leave);
}

#[test]
fn a_socket_remembers_several_services_and_forgets_the_oldest() {
    let entry = |n: u8| crate::abi::SocketEntry {
        vip: Addr::v4(u32::from(n)),
        addr: Addr::v4(1000 + u32::from(n)),
        backend: u32::from(n),
        proto: Proto::UDP,
        ..crate::abi::SocketEntry::EMPTY
    };
    let mut state = SocketState::EMPTY;
    for n in 1..=5 {
        assert!(state.remember(&entry(n), true));
        assert!(state.remember(&entry(n), true));
    }
    let known = |n: u8| state.original(&entry(n).addr, Port(0), Proto::UDP).is_some();
    assert_eq!([1, 2, 3, 4, 5].map(known), [false, true, true, true, true]);
}

#[test]
fn a_packet_cut_anywhere_is_left_alone_or_dropped() {
    let mut node = Node::new();
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 8080)]);
    let whole = frame(&key(("10.244.1.5", 40000), ("10.96.0.1", 80), Proto::TCP), Packet::SYN, b"", false);
    for len in 0..whole.bytes.len() {
        let cut = ByteFrame { bytes: whole.bytes[..len].to_vec(), partial: false };
        assert_eq!(run(&node.tables, &cut, Hook::INGRESS, ETH), Outcome::Passed, "{len} bytes");
    }
}

#[test]
fn host_processes_reach_node_ports_at_loopback_and_pods_do_not() {
    // V-36.
    let mut node = Node::new();
    node.tables.config.as_mut().unwrap().flags |= config::LOCALHOST_NODE_PORTS;
    node.service(("0.0.0.0", 30200), Proto::TCP, frontend::NODE_PORT, &[("10.244.2.7", 8080)]);
    node.service(("::", 30200), Proto::TCP, frontend::NODE_PORT, &[("fd00:244::2:7", 8080)]);
    let decide = |node: &Node, dst: &str, port, netns| {
        let call =
            socket::Call { dst: addr(dst), dport: Port::new(port), proto: Proto::TCP, netns, connect: true };
        socket::decide(&node.tables, &call)
    };
    for dst in ["127.0.0.1", "127.1.2.3", "::1"] {
        assert!(matches!(decide(&node, dst, 30200, 1), socket::Answer::Use(_)), "{dst}");
        assert_eq!(decide(&node, dst, 30201, 1), socket::Answer::Leave);
        assert_eq!(decide(&node, dst, 30200, 99), socket::Answer::Leave);
        assert_eq!(decide(&node, dst, 30200, 0), socket::Answer::Leave);
    }
    node.tables.config.as_mut().unwrap().flags &= !config::LOCALHOST_NODE_PORTS;
    assert_eq!(decide(&node, "127.0.0.1", 30200, 1), socket::Answer::Leave);
}

#[test]
fn an_ipv6_packet_with_mapped_addresses_is_nobody_s() {
    // It would read as IPv4, and half an IPv4 header would be written into it.
    let mut node = Node::new();
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 8080)]);
    let mut sent =
        frame(&key(("fd00:244::5", 40000), ("fd00:96::1", 80), Proto::TCP), Packet::SYN, b"", false);
    let IpAddr::V4(vip) = IpAddr::from(addr("10.96.0.1")) else { panic!("IPv4") };
    for at in [14 + 8, 14 + 24] {
        sent.bytes[at..at + 16].copy_from_slice(&vip.to_ipv6_mapped().octets());
        assert!(tuple(&sent, Hook::INGRESS).is_none());
        assert_eq!(run(&node.tables, &sent, Hook::INGRESS, ETH), Outcome::Passed);
    }
}

#[test]
fn four_extension_headers_are_walked_and_five_are_not() {
    // D-20.
    let whole = frame(&key(("fd00:244::5", 40000), ("fd00:96::1", 80), Proto::UDP), 0, b"", false);
    for count in 0..6 {
        let mut bytes = whole.bytes.clone();
        for _ in 0..count {
            // Destination options: what was first comes next, no length beyond the first eight bytes.
            let next = std::mem::replace(&mut bytes[14 + 6], 60);
            bytes.splice(14 + 40..14 + 40, [next, 0, 1, 4, 0, 0, 0, 0]);
        }
        let packet = tuple(&ByteFrame { bytes, partial: false }, Hook::INGRESS);
        assert_eq!(packet.map(|packet| packet.key.dport.number()), (count <= 4).then_some(80), "{count}");
    }
}

#[test]
fn two_services_with_one_endpoint_are_not_mixed_up_at_a_socket() {
    // D-1: an answer must come from the address that was asked.
    let entry = |vip: u32| crate::abi::SocketEntry {
        vip: Addr::v4(vip),
        addr: Addr::v4(1000),
        port: Port::new(53),
        backend: vip,
        proto: Proto::UDP,
        ..crate::abi::SocketEntry::EMPTY
    };
    let shown =
        |state: &SocketState| state.original(&Addr::v4(1000), Port::new(53), Proto::UDP).map(|(a, _)| a);
    let mut pod = SocketState::EMPTY;
    assert!(pod.remember(&entry(1), true));
    assert!(!pod.remember(&entry(2), true), "the second is left to the interface program");
    assert_eq!(shown(&pod), Some(Addr::v4(1)));
    let mut host = SocketState::EMPTY;
    assert!(host.remember(&entry(1), false));
    assert!(host.remember(&entry(2), false));
    assert_eq!(shown(&host), Some(Addr::v4(2)));
}

//! Stories of packets through one node, over tables in memory.

use std::net::IpAddr;
use std::string::{String, ToString};
use std::vec::Vec;

use crate::abi::{
    Backend, Config, Frontend, FrontendKey, Hook, Iface, PortRange, Reason, RouteKey, Run, Tuple, address,
    backend, config, frontend,
};
use crate::addr::{Addr, Port, Proto};
use crate::testing::{
    ByteFrame, MemoryTables, Outcome, frame, icmp_error, run, run_through, segment, tuple, verify,
};
use crate::wire::{Packet, lower_hops};

pub(super) const ETH: u32 = 2;

pub(super) fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().expect("an address").into()
}

pub(super) fn key(src: (&str, u16), dst: (&str, u16), proto: Proto) -> Tuple {
    Tuple::new(addr(src.0), Port::new(src.1), addr(dst.0), Port::new(dst.1), proto)
}

/// A node with address 192.168.10.1 / fd00:10::1 whose pods are 10.244.1.0/24 / fd00:244::/64.
pub(super) struct Node {
    pub(super) tables: MemoryTables,
    next: u32,
}

impl Node {
    pub(super) fn new() -> Self {
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
                host_netns: 1,
                seed: 7,
                ..Config::EMPTY.with_snat_ports(&[PortRange { first: 1024, count: 28_976 }])
            }),
            ..MemoryTables::default()
        };
        for node in ["192.168.10.1", "fd00:10::1"] {
            tables.addresses.insert(addr(node), address::NODE | address::NODE_PORT);
        }
        tables.ifaces.insert(ETH, Iface::new(0, 0));
        for (any, node) in [(Addr::ANY_V4, "192.168.10.1"), (Addr::ANY_V6, "fd00:10::1")] {
            tables.masquerade.insert(RouteKey::range(ETH, any, 0), addr(node));
        }
        // Nothing has ever happened at 0.
        tables.now.set(1_000_000_000_000);
        Self { tables, next: 1 }
    }

    /// Lets time pass, in milliseconds.
    pub(super) fn wait(&self, ms: u64) {
        self.tables.now.set(self.tables.now.get() + ms * 1_000_000);
    }

    /// A Service port; endpoints that begin with `+` are on this node. Returns its id.
    pub(super) fn service(
        &mut self,
        vip: (&str, u16),
        proto: Proto,
        flags: u32,
        endpoints: &[(&str, u16)],
    ) -> u32 {
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
                node: 0,
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

    pub(super) fn retire(&mut self, index: u32) {
        let backend = self.tables.backends[&index];
        self.tables.backends.insert(index, Backend::retired(backend.generation + 1));
    }

    /// Through ingress: the frame as the stack sees it.
    #[track_caller]
    pub(super) fn enter(&self, frame: &ByteFrame) -> ByteFrame {
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
    pub(super) fn leave(&self, frame: &ByteFrame) -> ByteFrame {
        match run(&self.tables, frame, Hook::EGRESS, ETH) {
            Outcome::Rewritten(out) => {
                assert_eq!(verify(&out), Ok(()));
                out
            }
            Outcome::Passed => frame.clone(),
            other => panic!("at egress: {other:?}"),
        }
    }

    /// Through both, with the answer of the program at the driver, which must be the same.
    #[track_caller]
    pub(super) fn pass(&self, frame: &ByteFrame) -> (ByteFrame, bool) {
        let through = run_through(&self.tables, frame, ETH, ETH);
        let left = self.leave(&self.enter(frame));
        if let Some(through) = &through {
            let mut routed = left.clone();
            assert!(lower_hops(&mut routed, &tuple(&left).expect("a packet")));
            assert_eq!(through, &routed, "{} as {} and {}", shown(frame), shown(through), shown(&routed));
            assert_eq!(verify(through), Ok(()));
        }
        (left, through.is_some())
    }

    /// How many flows are young, and how many old.
    pub(super) fn flows(&self) -> [usize; 2] {
        let live = self.tables.live();
        [0, 1].map(|old| live.iter().filter(|flow| flow.old == old).count())
    }
}

/// Whatever the story, it leaves sound tables behind.
impl Drop for Node {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.tables.broken_flows(), [""; 0]);
        }
    }
}

/// A TCP connection through the node, with sequence numbers that fit.
pub(super) struct Talk<'a> {
    pub(super) node: &'a Node,
    /// As its client sends.
    pub(super) ask: Tuple,
    /// As its endpoint receives it.
    pub(super) received: Tuple,
}

impl<'a> Talk<'a> {
    /// First sequence number of the client.
    pub(super) const CLIENT: u32 = 0xffff_fff0;
    /// First sequence number of the endpoint.
    pub(super) const ENDPOINT: u32 = 5_000;

    /// The client's SYN has passed.
    #[track_caller]
    pub(super) fn begin(node: &'a Node, client: (&str, u16), vip: (&str, u16)) -> Self {
        let ask = key(client, vip, Proto::TCP);
        let mut talk = Self { node, ask, received: ask };
        let left = talk.asks(Packet::SYN, Self::CLIENT, 0);
        talk.received = tuple(&left).expect("a packet").tuple;
        talk
    }

    /// The handshake is complete.
    #[track_caller]
    pub(super) fn open(node: &'a Node, client: (&str, u16), vip: (&str, u16)) -> Self {
        let talk = Self::begin(node, client, vip);
        talk.answered();
        talk.goes_on();
        talk
    }

    /// A segment of the client's, as it leaves towards the endpoint.
    #[track_caller]
    pub(super) fn asks(&self, flags: u8, seq: u32, ack: u32) -> ByteFrame {
        self.node.pass(&segment(&self.ask, flags, [seq, ack], b"", false)).0
    }

    /// A segment of the endpoint's, as it leaves towards the client.
    #[track_caller]
    pub(super) fn answers(&self, flags: u8, seq: u32, ack: u32) -> ByteFrame {
        self.node.pass(&segment(&self.received.reversed(), flags, [seq, ack], b"", false)).0
    }

    /// The SYN-ACK reaches the client.
    #[track_caller]
    pub(super) fn answered(&self) {
        let back = self.answers(Packet::SYN | Packet::ACK, Self::ENDPOINT, Self::CLIENT.wrapping_add(1));
        assert_eq!(tuple(&back).unwrap().tuple, self.ask.reversed());
    }

    /// The client acknowledges all it has got, which reaches the endpoint.
    #[track_caller]
    pub(super) fn goes_on(&self) {
        let left = self.asks(Packet::ACK, Self::CLIENT.wrapping_add(1), Self::ENDPOINT + 1);
        assert_eq!(tuple(&left).unwrap().tuple, self.received);
    }

    /// An end says something that fits: the client or the endpoint.
    pub(super) fn says(&self, flags: u8, client: bool) -> ByteFrame {
        let (seq, ack) = (Self::CLIENT.wrapping_add(1), Self::ENDPOINT + 1);
        if client { self.asks(flags, seq, ack) } else { self.answers(flags, ack, seq) }
    }
}

#[track_caller]
pub(super) fn shown(frame: &ByteFrame) -> String {
    let key = tuple(frame).expect("a packet").tuple;
    std::format!("{}|{} > {}|{}", key.src, key.sport, key.dst, key.dport)
}

/// The answer of whoever got `frame`, with TCP flags.
pub(super) fn answer(frame: &ByteFrame, flags: u8) -> ByteFrame {
    let got = tuple(frame).expect("a packet").tuple;
    crate::testing::frame(&got.reversed(), flags, b"answer", frame.partial)
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
                let back = node.leave(&node.enter(&answer(&entered, ack)));
                assert_eq!(shown(&back), std::format!("{vip}|80 > {client}|40000"));
                assert_eq!(node.flows(), [1, 0], "an answer alone proves nothing");
                node.wait(2_000);
                let next = segment(
                    &key((client, 40000), (vip, 80), proto),
                    ack & Packet::ACK,
                    [1001; 2],
                    b"",
                    partial,
                );
                assert_eq!(shown(&node.enter(&next)), shown(&entered));
                assert_eq!(node.flows(), [0, 1]);
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
    let snat = tuple(&left).unwrap().tuple;
    assert_eq!((snat.src, snat.dst), (addr("192.168.10.1"), addr("10.244.2.7")));
    assert!((1024..30_000).contains(&snat.sport.number()), "{}", snat.sport);
    let back = node.enter(&answer(&left, Packet::SYN | Packet::ACK));
    assert_eq!(shown(&back), "10.244.2.7|8080 > 203.0.113.9|5555");
    assert_eq!(shown(&node.leave(&back)), "192.168.10.1|30200 > 203.0.113.9|5555");
    // The second packet takes the same way.
    let data =
        frame(&key(("203.0.113.9", 5555), ("192.168.10.1", 30200), Proto::TCP), Packet::ACK, b"x", false);
    let again = tuple(&node.leave(&node.enter(&data))).unwrap().tuple;
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
fn a_service_without_endpoints_rejects_at_once() {
    // P-14, P-19.
    for (client, vip) in [("10.244.1.5", "10.96.0.1"), ("fd00:244::5", "fd00:96::1")] {
        for proto in [Proto::TCP, Proto::UDP] {
            let mut node = Node::new();
            node.service((vip, 80), proto, frontend::INTERNAL, &[]);
            let sent = frame(&key((client, 40000), (vip, 80), proto), Packet::SYN, b"hello", false);
            let Outcome::Rejected(back) = run(&node.tables, &sent, Hook::INGRESS, ETH) else {
                panic!("not rejected");
            };
            assert_eq!(verify(&back), Ok(()));
            let packet = tuple(&back).unwrap();
            if proto == Proto::TCP {
                assert_eq!(shown(&back), std::format!("{vip}|80 > {client}|40000"));
                assert_eq!(packet.tcp_flags, Packet::RST | Packet::ACK);
            } else {
                // The error is about the client's packet: its tuple reads as that packet reversed.
                assert_eq!(packet.kind, crate::wire::Kind::IcmpError);
                assert_eq!(shown(&back), std::format!("{vip}|80 > {client}|40000"));
            }
            assert_eq!(node.tables.counted(Reason::NoEndpoint), 1);
            assert_eq!(node.flows(), [0, 0]);
        }
    }
}

#[test]
fn an_undefined_port_of_a_cluster_ip_is_rejected_and_of_an_external_ip_ignored() {
    // P-21, P-23.
    let mut node = Node::new();
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 80)]);
    node.service(("203.0.113.1", 80), Proto::TCP, 0, &[("10.244.2.7", 80)]);
    let to = |vip| frame(&key(("10.244.1.5", 40000), (vip, 81), Proto::TCP), Packet::SYN, b"", false);
    assert!(matches!(run(&node.tables, &to("10.96.0.1"), Hook::INGRESS, ETH), Outcome::Rejected(_)));
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
    node.wait(2_000);
    // The flow becomes old, its leg hears of it, and speaks for it in this moment.
    for _ in 0..3 {
        node.enter(&query);
    }
    assert_eq!(node.flows(), [0, 1]);
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
    let (client, vip) = (("10.244.1.5", 40000), ("10.96.0.1", 80));
    Talk::begin(&node, client, vip).answered();
    node.retire(service * 100);
    node.service(vip, Proto::TCP, frontend::INTERNAL, &[("10.244.2.8", 80)]);
    let old = key(client, ("10.244.2.7", 80), Proto::TCP);
    let talk = Talk { node: &node, ask: key(client, vip, Proto::TCP), received: old };
    // The endpoint was removed while the last part of the handshake was under way.
    talk.goes_on();
    talk.goes_on();
    talk.says(Packet::FIN | Packet::ACK, true);
    assert_eq!(Talk::begin(&node, client, vip).received, key(client, ("10.244.2.8", 80), Proto::TCP));
}

#[test]
fn a_retransmitted_syn_stays_unless_its_endpoint_is_removed() {
    // D-6.
    let mut node = Node::new();
    let ends = [("10.244.2.7", 80), ("10.244.2.8", 80), ("10.244.2.9", 80)];
    let service = node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &ends);
    let syn = frame(&key(("10.244.1.5", 40000), ("10.96.0.1", 80), Proto::TCP), Packet::SYN, b"", false);
    let first = node.enter(&syn);
    assert_eq!(node.enter(&syn), first);
    let dst = tuple(&first).unwrap().tuple.dst;
    let index = ends.iter().position(|(ip, _)| addr(ip).same(&dst)).unwrap() as u32;
    node.retire(service * 100 + index);
    let rest: Vec<_> = ends.iter().enumerate().filter(|(n, _)| *n as u32 != index).map(|(_, e)| *e).collect();
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &rest);
    assert_ne!(tuple(&node.enter(&syn)).unwrap().tuple.dst, dst);
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
    assert_eq!(node.flows(), [2, 0]);
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
        // A router beyond the node cannot pass a packet on to the endpoint: the client must be notified.
        let to = tuple(&wire).unwrap().tuple.src;
        let error = icmp_error(addr(router), to, &wire);
        let received = node.leave(&node.enter(&error));
        assert_eq!(verify(&received), Ok(()));
        assert_eq!(shown(&received), std::format!("{vip}|80 > {client}|40000"));
        assert_outer(&received, router, client);

        // A router on the client's side cannot pass an answer on: the endpoint must be notified.
        let error = icmp_error(addr(router), addr(vip), &back);
        let received = node.leave(&node.enter(&error));
        assert_eq!(verify(&received), Ok(()));
        let snat = tuple(&wire).unwrap().tuple;
        assert_eq!(shown(&received), std::format!("{}|{} > {endpoint}|8080", snat.src, snat.sport));
        assert_outer(&received, router, endpoint);

        // The endpoint itself rejects: to the client it comes from the Service.
        let error = icmp_error(addr(endpoint), to, &wire);
        let received = node.leave(&node.enter(&error));
        assert_outer(&received, vip, client);
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
    node.wait(6_000);
    assert_eq!(enter(&later), Outcome::Waits);
    assert!(matches!(enter(&first), Outcome::Rewritten(_)));
    assert!(matches!(enter(&later), Outcome::Rewritten(_)));
}

#[test]
fn a_client_port_that_is_used_to_reach_the_endpoint_directly_gets_untranslated_replies_once_the_flow_has_ended()
 {
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
            node.wait(1_100);
        }
        assert_eq!(run(&node.tables, &direct, Hook::INGRESS, ETH), Outcome::Passed);
        assert_eq!(node.leave(&answer), answer, "{proto}");
        // The Service is there as before.
        node.enter(&ask);
        assert_ne!(node.leave(&answer), answer, "{proto}");
    }
}

#[test]
fn a_new_connection_shares_no_leg_with_one_of_its_tuple_that_is_closed() {
    // D-5, D-6: they would end when the rest of the old one is swept.
    let mut node = Node::new();
    for vip in ["203.0.113.1", "203.0.113.2"] {
        node.service((vip, 80), Proto::TCP, 0, &[("10.244.2.7", 8080)]);
    }
    let client = ("198.51.100.9", 40_000);
    let first = Talk::open(&node, client, ("203.0.113.1", 80));
    assert_eq!(first.received.src, addr("192.168.10.1"));
    first.says(Packet::FIN | Packet::ACK, false);
    assert_eq!(node.flows(), [0, 1]);
    let second = Talk::open(&node, client, ("203.0.113.2", 80));
    assert_ne!(second.received.sport, first.received.sport);
    assert_eq!(node.flows(), [0, 2]);
    first.says(Packet::FIN | Packet::ACK, true);
    second.goes_on();
    second.answered();
}

#[test]
fn a_full_flow_table_harms_nobody() {
    // D-7.
    let mut node = Node::new();
    node.tables.max_flows = Some(2);
    node.tables.places = Some(2);
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 80)]);
    let talk = Talk::open(&node, ("10.244.1.5", 40000), ("10.96.0.1", 80));
    let other = frame(&key(("10.244.1.6", 40000), ("10.96.0.1", 80), Proto::TCP), Packet::SYN, b"", false);
    for n in 1..8 {
        assert_eq!(run(&node.tables, &other, Hook::INGRESS, ETH), Outcome::Dropped);
        assert_eq!(node.tables.counted(Reason::FlowTableFull), n);
        talk.goes_on();
    }
    // Young flows make room.
    talk.says(Packet::RST, true);
    node.wait(1_100);
    let young = Talk::begin(&node, ("10.244.1.5", 40000), ("10.96.0.1", 80));
    young.answered();
    assert!((0..3).any(|_| run(&node.tables, &other, Hook::INGRESS, ETH) != Outcome::Dropped));
    assert_eq!((node.flows(), node.tables.counted(Reason::Displaced)), ([1, 0], 1));
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
        tuple(&node.enter(&syn)).unwrap().tuple.dst
    };
    let first = dst(&node, 40000);
    assert!((40001..40040).all(|port| dst(&node, port) == first));
    node.wait(10_801_000);
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
        *counts.entry(tuple(&node.enter(&syn)).unwrap().tuple.dst).or_insert(0) += 1;
    }
    assert_eq!(counts.len(), 3);
    assert!(counts.values().all(|n| (900..1100).contains(n)), "{counts:?}");
}

#[test]
fn a_packet_cut_anywhere_is_ignored_or_dropped() {
    let mut node = Node::new();
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[("10.244.2.7", 8080)]);
    let whole = frame(&key(("10.244.1.5", 40000), ("10.96.0.1", 80), Proto::TCP), Packet::SYN, b"", false);
    for len in 0..whole.bytes.len() {
        let cut = ByteFrame { bytes: whole.bytes[..len].to_vec(), partial: false };
        assert_eq!(run(&node.tables, &cut, Hook::INGRESS, ETH), Outcome::Passed, "{len} bytes");
    }
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
        assert!(tuple(&sent).is_none());
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
        let packet = tuple(&ByteFrame { bytes, partial: false });
        assert_eq!(packet.map(|packet| packet.tuple.dport.number()), (count <= 4).then_some(80), "{count}");
    }
}

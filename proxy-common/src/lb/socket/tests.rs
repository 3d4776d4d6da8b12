//! Stories of sockets on one node, over tables in memory.

use std::net::IpAddr;
use std::string::String;
use std::vec::Vec;

use super::{Call, Decision};
use crate::abi::socket::EXCLUDED;
use crate::abi::{
    Backend, Config, Frontend, FrontendKey, Range, Reason, Run, address, backend, config, frontend,
};
use crate::addr::{Addr, Port, Proto};
use crate::testing::{MemorySocket, MemoryTables};

const HOST: u64 = 1;
const POD: u64 = 99;

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().expect("an address").into()
}

/// A node with pods 10.244.0.0/16.
fn node() -> MemoryTables {
    MemoryTables {
        config: Some(Config {
            flags: config::SOCKET_HOST | config::SOCKET_PODS,
            host_netns: HOST,
            ..Config::EMPTY
        }),
        ..MemoryTables::default()
    }
}

/// Service port number `n` with one endpoint, whose backend index is `n`, too.
fn service(tables: &mut MemoryTables, n: u32, vip: (&str, u16), proto: Proto, flags: u32, end: (&str, u16)) {
    let backend = Backend {
        addr: addr(end.0),
        port: Port::new(end.1),
        flags: backend::IN_CLUSTER,
        generation: 1,
        service: n,
        node: 0,
    };
    tables.backends.insert(n, backend);
    tables.slots.insert(n, n);
    let key = FrontendKey::new(addr(vip.0), Port::new(vip.1), proto);
    let value = Frontend {
        service: n,
        cluster: Run { first: n, count: 1 },
        local: Run::EMPTY,
        flags: flags | frontend::ANY,
        affinity_secs: 0,
        seal: 0,
    };
    tables.frontends.insert(key, value.sealed(&key));
    if flags & frontend::NODE_PORT == 0 {
        let known = if flags & frontend::INTERNAL != 0 { address::CLUSTER_IP } else { address::EXTERNAL };
        tables.addresses.insert(key.addr, known);
    }
}

/// DNS number `n`: 10.96.0.`n`:53 over UDP, with the endpoint 10.244.2.`n`:5353.
fn dns(tables: &mut MemoryTables, n: u32) {
    let (vip, end) = (format_ip("10.96.0", n), format_ip("10.244.2", n));
    service(tables, n, (&vip, 53), Proto::UDP, frontend::INTERNAL, (&end, 5353));
}

fn format_ip(prefix: &str, n: u32) -> String {
    std::format!("{prefix}.{n}")
}

fn connect(to: (&str, u16), proto: Proto, netns: u64) -> Call {
    Call {
        dst: addr(to.0),
        dport: Port::new(to.1),
        proto,
        netns,
        connect: true,
        peer: Addr::ANY_V6,
        peer_port: Port(0),
    }
}

fn send(to: (&str, u16), netns: u64) -> Call {
    Call { connect: false, ..connect(to, Proto::UDP, netns) }
}

/// The same on a socket that the kernel has connected.
fn connected(call: Call, peer: (&str, u16)) -> Call {
    Call { peer: addr(peer.0), peer_port: Port::new(peer.1), ..call }
}

/// Where a call goes.
fn goes(socket: &mut MemorySocket, tables: &MemoryTables, call: &Call) -> (Addr, Port) {
    match socket.call(tables, call) {
        (Decision::Translate, entry) => (entry.addr, entry.port),
        (Decision::Pass, _) => (call.dst, call.dport),
        other => panic!("{call:?}: {other:?}"),
    }
}

fn at(to: (&str, u16)) -> (Addr, Port) {
    (addr(to.0), Port::new(to.1))
}

fn once(tables: &MemoryTables, call: &Call) -> Decision {
    MemorySocket::default().call(tables, call).0
}

#[test]
fn a_socket_is_translated_once_and_shows_what_was_asked_for() {
    let mut tables = node();
    service(&mut tables, 1, ("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, ("10.244.2.7", 8080));
    dns(&mut tables, 10);
    for netns in [HOST, POD] {
        let mut socket = MemorySocket::default();
        let call = connect(("10.96.0.1", 80), Proto::TCP, netns);
        assert_eq!(goes(&mut socket, &tables, &call), at(("10.244.2.7", 8080)));
        let (addr, port) = at(("10.244.2.7", 8080));
        assert_eq!(socket.shown(addr, port, Proto::TCP), at(("10.96.0.1", 80)));
    }
    // A pod's connected UDP socket is left to TC; its unconnected one and the host's are translated.
    let to = ("10.96.0.10", 53);
    assert_eq!(once(&tables, &connect(to, Proto::UDP, POD)), Decision::Pass);
    assert!(matches!(once(&tables, &send(to, POD)), Decision::Translate));
    assert!(matches!(once(&tables, &connect(to, Proto::UDP, HOST)), Decision::Translate));
    // No Service, undefined port, loopback.
    let tcp = |dst, port| once(&tables, &connect((dst, port), Proto::TCP, POD));
    assert_eq!(tcp("198.51.100.1", 80), Decision::Pass);
    assert_eq!(tcp("10.96.0.1", 81), Decision::Reject);
    assert_eq!(tcp("127.0.0.1", 80), Decision::Pass);
}

#[test]
fn what_the_kernel_has_connected_a_socket_to_is_not_decided_again() {
    // The kernel names the peer of an IPv6 socket that is connected over IPv4 with each datagram.
    let mut tables = node();
    dns(&mut tables, 1);
    dns(&mut tables, 2);
    let (one, two) = (("10.96.0.1", 53), ("10.96.0.2", 53));
    let mut pod = MemorySocket::default();
    assert_eq!(goes(&mut pod, &tables, &connect(one, Proto::UDP, POD)), at(one));
    assert_eq!(goes(&mut pod, &tables, &connected(send(one, POD), one)), at(one));
    // The same with storage from an earlier life without connection.
    assert_eq!(goes(&mut pod, &tables, &send(one, POD)), at(("10.244.2.1", 5353)));
    assert_eq!(goes(&mut pod, &tables, &connected(send(one, POD), one)), at(one));
    // An IPv6 socket receives from its old peer alone even after a disconnect.
    let once_connected = Call { peer: addr(one.0), ..send(one, POD) };
    assert_eq!(goes(&mut pod, &tables, &once_connected), at(one));
    // A socket of the node: the peer is the endpoint, whether it is named by its address or by the Service's.
    let mut host = MemorySocket::default();
    let end = ("10.244.2.1", 5353);
    assert_eq!(goes(&mut host, &tables, &connect(one, Proto::UDP, HOST)), at(end));
    for to in [one, end] {
        assert_eq!(goes(&mut host, &tables, &connected(send(to, HOST), end)), at(end));
    }
    // What it sends elsewhere meanwhile, or with its endpoint removed, does not change what its peer is called.
    assert_eq!(goes(&mut host, &tables, &connected(send(two, HOST), end)), at(("10.244.2.2", 5353)));
    tables.backends.get_mut(&1).expect("a backend").generation += 1;
    service(&mut tables, 3, one, Proto::UDP, frontend::INTERNAL, ("10.244.2.3", 5353));
    assert_eq!(goes(&mut host, &tables, &connected(send(one, HOST), end)), at(("10.244.2.3", 5353)));
    let (addr, port) = at(end);
    assert_eq!(host.shown(addr, port, Proto::UDP), at(one));
}

#[test]
fn an_unconnected_socket_of_the_node_asks_any_number_of_services() {
    let mut tables = node();
    (1..=40).for_each(|n| dns(&mut tables, n));
    let mut socket = MemorySocket::default();
    for _ in 0..2 {
        for n in 1..=40 {
            let (vip, end) = (format_ip("10.96.0", n), format_ip("10.244.2", n));
            assert_eq!(goes(&mut socket, &tables, &send((&vip, 53), HOST)), at((&end, 5353)));
        }
    }
    for n in 1..=40 {
        let (addr, port) = at((&format_ip("10.244.2", n), 5353));
        assert_eq!(socket.shown(addr, port, Proto::UDP), at((&format_ip("10.96.0", n), 53)), "{n}");
    }
    // The way back of one has been evicted, and the endpoint of another was removed.
    socket.peers.borrow_mut().retain(|key, _| key.endpoint == 0);
    tables.backends.get_mut(&39).expect("a backend").generation += 1;
    service(&mut tables, 50, ("10.96.0.39", 53), Proto::UDP, frontend::INTERNAL, ("10.244.2.50", 5353));
    for (vip, end) in [("10.96.0.40", "10.244.2.40"), ("10.96.0.39", "10.244.2.50")] {
        assert_eq!(goes(&mut socket, &tables, &send((vip, 53), HOST)), at((end, 5353)));
        let (addr, port) = at((end, 5353));
        assert_eq!(socket.shown(addr, port, Proto::UDP), at((vip, 53)));
    }
}

#[test]
fn what_a_pod_s_socket_cannot_remember_goes_by_packet_and_stays_there() {
    let mut tables = node();
    (1..=6).for_each(|n| dns(&mut tables, n));
    let mut socket = MemorySocket::default();
    let vips: Vec<_> = (1..=6).map(|n| format_ip("10.96.0", n)).collect();
    let ends: Vec<_> = (1..=6).map(|n| format_ip("10.244.2", n)).collect();
    for _ in 0..2 {
        for n in 0..6 {
            let wanted = if n < 4 { at((&ends[n], 5353)) } else { at((&vips[n], 53)) };
            assert_eq!(goes(&mut socket, &tables, &send((&vips[n], 53), POD)), wanted, "{n}");
        }
    }
    for n in 0..4 {
        let (addr, port) = at((&ends[n], 5353));
        assert_eq!(socket.shown(addr, port, Proto::UDP), at((&vips[n], 53)));
    }
    assert!(socket.peers.borrow().is_empty());
    // Room that comes later does not take a Service from its packets: they have an endpoint already.
    tables.backends.get_mut(&1).expect("a backend").generation += 1;
    assert_eq!(goes(&mut socket, &tables, &send((&vips[4], 53), POD)), at((&vips[4], 53)));
    // Room of an endpoint that was removed is used again as long as nothing went by packet.
    let mut socket = MemorySocket::default();
    for n in [1, 2, 3, 4] {
        assert_eq!(goes(&mut socket, &tables, &send((&vips[n], 53), POD)), at((&ends[n], 5353)));
    }
    tables.backends.get_mut(&3).expect("a backend").generation += 1;
    assert_eq!(goes(&mut socket, &tables, &send((&vips[5], 53), POD)), at((&ends[5], 5353)));
}

#[test]
fn two_services_with_one_endpoint_are_not_mixed_up_at_a_socket() {
    // D-1: an answer must come from the address that was asked.
    let mut tables = node();
    let end = ("10.244.2.1", 5353);
    service(&mut tables, 1, ("10.96.0.1", 53), Proto::UDP, frontend::INTERNAL, end);
    service(&mut tables, 2, ("10.96.0.2", 53), Proto::UDP, frontend::INTERNAL, end);
    let (one, two) = (("10.96.0.1", 53), ("10.96.0.2", 53));
    let shown = |socket: &MemorySocket| {
        let (addr, port) = at(end);
        socket.shown(addr, port, Proto::UDP)
    };
    let mut pod = MemorySocket::default();
    assert_eq!(goes(&mut pod, &tables, &send(one, POD)), at(end));
    assert_eq!(goes(&mut pod, &tables, &send(two, POD)), at(two), "left to the interface program");
    assert_eq!(shown(&pod), at(one));
    // A socket of the node has no such way: the latest counts. A connected one has one peer only.
    let mut host = MemorySocket::default();
    assert_eq!(goes(&mut host, &tables, &send(one, HOST)), at(end));
    assert_eq!(goes(&mut host, &tables, &send(two, HOST)), at(end));
    assert_eq!(shown(&host), at(two));
    service(&mut tables, 3, ("10.96.0.1", 53), Proto::TCP, frontend::INTERNAL, end);
    service(&mut tables, 4, ("10.96.0.2", 53), Proto::TCP, frontend::INTERNAL, end);
    let mut pod = MemorySocket::default();
    for vip in [one, two] {
        assert_eq!(goes(&mut pod, &tables, &connect(vip, Proto::TCP, POD)), at(end));
        let (addr, port) = at(end);
        assert_eq!(pod.shown(addr, port, Proto::TCP), at(vip));
    }
}

#[test]
fn a_socket_that_turns_to_a_pod_shows_the_pod() {
    // A disconnect passes no hook; the next connect does.
    let mut tables = node();
    let (vip, end) = (("10.96.0.1", 53), ("10.244.2.1", 5353));
    dns(&mut tables, 1);
    service(&mut tables, 2, vip, Proto::TCP, frontend::INTERNAL, end);
    let (addr, port) = at(end);
    for netns in [HOST, POD] {
        let mut stories = Vec::from([
            [connect(vip, Proto::TCP, netns), connect(end, Proto::TCP, netns)],
            [send(vip, netns), send(end, netns)],
        ]);
        stories.push([send(vip, netns), connect(end, Proto::UDP, netns)]);
        stories.push([connect(vip, Proto::UDP, HOST), connect(end, Proto::UDP, HOST)]);
        for [first, second] in stories {
            let mut socket = MemorySocket::default();
            assert_eq!(goes(&mut socket, &tables, &first), at(end));
            assert_eq!(socket.shown(addr, port, first.proto), at(vip));
            assert_eq!(goes(&mut socket, &tables, &second), at(end));
            assert_eq!(socket.shown(addr, port, first.proto), at(end), "{second:?}");
        }
    }
    // Also what was put aside.
    (2..=9).for_each(|n| dns(&mut tables, n));
    let mut socket = MemorySocket::default();
    for n in 1..=9 {
        let _ = goes(&mut socket, &tables, &send((&format_ip("10.96.0", n), 53), HOST));
    }
    let (addr, port) = at(("10.244.2.9", 5353));
    assert_eq!(socket.shown(addr, port, Proto::UDP), at(("10.96.0.9", 53)));
    let _ = goes(&mut socket, &tables, &send(("10.244.2.9", 5353), HOST));
    assert_eq!(socket.shown(addr, port, Proto::UDP), at(("10.244.2.9", 5353)));
}

#[test]
fn a_socket_of_the_node_that_connects_over_udp_can_be_found() {
    let mut tables = node();
    dns(&mut tables, 1);
    service(&mut tables, 2, ("10.96.0.1", 53), Proto::TCP, frontend::INTERNAL, ("10.244.2.1", 53));
    let cookie = |call: &Call| {
        let mut socket = MemorySocket::default();
        let _ = goes(&mut socket, &tables, call);
        socket.state.cookie
    };
    let to = ("10.96.0.1", 53);
    assert_eq!(cookie(&connect(to, Proto::UDP, HOST)), MemorySocket::COOKIE);
    assert_eq!(cookie(&connect(to, Proto::UDP, POD)), 0);
    assert_eq!(cookie(&connect(to, Proto::TCP, HOST)), 0);
    assert_eq!(cookie(&send(to, HOST)), 0);
}

#[test]
fn a_socket_of_a_pod_that_is_left_to_its_packets_is_left() {
    let mut tables = node();
    dns(&mut tables, 1);
    service(&mut tables, 2, ("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, ("10.244.2.1", 80));
    let config = tables.config.as_mut().expect("settings");
    config.service_range_count = 1;
    config.service_ranges[0] =
        Range { first: addr("10.96.0.0"), mask: addr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:0") };
    for call in [
        connect(("10.96.0.1", 80), Proto::TCP, POD),
        send(("10.96.0.1", 53), POD),
        // Also what would be rejected.
        connect(("10.96.0.1", 81), Proto::TCP, POD),
        connect(("10.96.0.77", 81), Proto::TCP, POD),
    ] {
        let mut socket = MemorySocket { has_state: true, ..MemorySocket::default() };
        socket.state.flags = EXCLUDED;
        assert_eq!(socket.call(&tables, &call).0, Decision::Pass, "{call:?}");
        assert_ne!(once(&tables, &call), Decision::Pass, "{call:?}");
    }
}

#[test]
fn without_memory_a_pod_s_socket_goes_by_packet_and_the_node_s_unseen() {
    let mut tables = node();
    dns(&mut tables, 1);
    let end = at(("10.244.2.1", 5353));
    for (netns, wanted) in [(HOST, end), (POD, at(("10.96.0.1", 53)))] {
        let mut socket = MemorySocket { room: false, ..MemorySocket::default() };
        assert_eq!(goes(&mut socket, &tables, &send(("10.96.0.1", 53), netns)), wanted);
    }
    assert_eq!(tables.counted(Reason::SocketStorage), 2);
}

#[test]
fn a_pod_s_socket_leaves_to_its_packets_what_counts_there() {
    // M-6, M-8: with the switches that hide pods; V-24, V-27: under an external Local policy it is the
    // detector that tells pods from others. A host process has no such packets.
    let decide = |switch: u32, dst: &str, netns: u64| {
        let mut tables = node();
        let end = ("10.244.2.7", 8080);
        service(&mut tables, 1, ("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, end);
        service(&mut tables, 2, ("203.0.113.1", 80), Proto::TCP, 0, end);
        service(&mut tables, 3, ("203.0.113.2", 80), Proto::TCP, frontend::LOCAL, end);
        if let Some(config) = &mut tables.config {
            config.flags |= switch;
        }
        !matches!(once(&tables, &connect((dst, 80), Proto::TCP, netns)), Decision::Translate)
    };
    let left = |switch| ["10.96.0.1", "203.0.113.1", "203.0.113.2"].map(|dst| decide(switch, dst, POD));
    assert_eq!(left(0), [false, false, true]);
    assert_eq!(left(config::MASQUERADE_ALL), [true, false, true]);
    assert_eq!(left(config::MASQUERADE_LOCAL), [false, true, true]);
    assert!(!decide(config::MASQUERADE_ALL, "10.96.0.1", HOST));
    assert!(!decide(0, "203.0.113.2", HOST));
}

#[test]
fn a_socket_to_nobody_s_cluster_ip_fails_at_once() {
    // P-22.
    let mut tables = node();
    service(&mut tables, 1, ("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, ("10.244.2.7", 8080));
    let ask = |tables: &MemoryTables, netns| once(tables, &connect(("10.96.0.77", 80), Proto::TCP, netns));
    assert_eq!(ask(&tables, HOST), Decision::Pass);
    if let Some(config) = &mut tables.config {
        config.service_range_count = 1;
        config.service_ranges[0] =
            Range { first: addr("10.96.0.0"), mask: addr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:0") };
    }
    assert_eq!(ask(&tables, HOST), Decision::Deny);
    assert_eq!(tables.counted(Reason::UnallocatedClusterIp), 1);
    // Sockets that are ignored stay ignored.
    if let Some(config) = &mut tables.config {
        config.flags &= !config::SOCKET_PODS;
    }
    assert_eq!(ask(&tables, POD), Decision::Pass);
}

#[test]
fn host_processes_reach_node_ports_at_loopback_and_pods_do_not() {
    // V-36.
    let mut tables = node();
    tables.config.as_mut().unwrap().flags |= config::LOCALHOST_NODE_PORTS;
    service(&mut tables, 1, ("0.0.0.0", 30200), Proto::TCP, frontend::NODE_PORT, ("10.244.2.7", 8080));
    service(&mut tables, 2, ("::", 30200), Proto::TCP, frontend::NODE_PORT, ("fd00:244::2:7", 8080));
    let decide = |tables: &MemoryTables, dst: &str, port, netns| {
        once(tables, &connect((dst, port), Proto::TCP, netns))
    };
    for dst in ["127.0.0.1", "127.1.2.3", "::1"] {
        assert!(matches!(decide(&tables, dst, 30200, HOST), Decision::Translate), "{dst}");
        assert_eq!(decide(&tables, dst, 30201, HOST), Decision::Pass);
        assert_eq!(decide(&tables, dst, 30200, POD), Decision::Pass);
        assert_eq!(decide(&tables, dst, 30200, 0), Decision::Pass);
    }
    tables.config.as_mut().unwrap().flags &= !config::LOCALHOST_NODE_PORTS;
    assert_eq!(decide(&tables, "127.0.0.1", 30200, HOST), Decision::Pass);
}

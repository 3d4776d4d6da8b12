//! What fuzz targets do with their bytes. `proxy-common/tests/fuzz.rs` does the same with random ones.

use std::collections::HashMap;
use std::net::IpAddr;

use proxy_common::abi::{
    Backend, Config, Frontend, FrontendKey, Hook, Iface, PortRange, Reason, RouteKey, Run, Tuple, address,
    backend, config, frontend,
};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::testing::{
    ByteFrame, MemoryTables, Outcome, icmp_error, run, run_on, segment, tuple, verify,
};

const INTERFACE: u32 = 2;
const PORTS: [u16; 8] = [80, 53, 8080, 30_080, 40_000, 40_001, 1024, 0];
const PROTOS: [Proto; 4] = [Proto::TCP, Proto::UDP, Proto::SCTP, Proto::ICMP];
/// Of each family: ClusterIP, external address, node, pod here, pod elsewhere, client, nobody, loopback.
const ADDRESSES: [[&str; 8]; 2] = [
    [
        "10.96.0.1",
        "203.0.113.1",
        "192.168.10.1",
        "10.244.1.5",
        "10.244.2.7",
        "198.51.100.9",
        "0.0.0.0",
        "127.0.0.1",
    ],
    [
        "fd00:96::1",
        "2001:db8:1::1",
        "fd00:10::1",
        "fd00:244:1::5",
        "fd00:244:2::7",
        "2001:db8:9::9",
        "::",
        "::1",
    ],
];

/// A node with a few Services, to which packets come that the bytes describe: made up, bent, answered, sent on, in
/// error, or not packets at all.
///
/// Whatever comes, nothing panics, the flow tables are sound after each packet, a packet that was right stays right when it
/// is translated, and none changes its length. Returns what was counted.
pub fn packets(bytes: &[u8]) -> HashMap<Reason, u64> {
    let tables = node();
    let mut bytes = Bytes(bytes);
    let mut last = ByteFrame { bytes: Vec::new(), partial: false };
    let mut last_hook = Hook::EGRESS;
    while let Some(act) = bytes.next() {
        let hook = if act & 0x80 == 0 { Hook::INGRESS } else { Hook::EGRESS };
        let (hook, mut sent) = match act & 7 {
            0 | 1 => (hook, bytes.packet()),
            2 => (if last_hook == Hook::INGRESS { Hook::EGRESS } else { Hook::INGRESS }, last.clone()),
            3 => (hook, answer(&last, bytes.next().unwrap_or(0x12)).unwrap_or_else(|| bytes.packet())),
            4 => (hook, error(&last, bytes.address()).unwrap_or_else(|| bytes.packet())),
            5 => {
                let after = u64::from(bytes.next().unwrap_or(1)).pow(3);
                tables.now.set(tables.now.get() + after * 1_000_000);
                continue;
            }
            6 => (hook, last.clone()),
            _ => (hook, ByteFrame { bytes: bytes.take(usize::from(act >> 3) * 8).to_vec(), partial: false }),
        };
        if act & 0x40 != 0 {
            for _ in 0..bytes.next().unwrap_or(0) % 4 {
                bytes.bend(&mut sent.bytes);
            }
        }
        last = pass(&tables, hook, &sent, act & 0x20 != 0);
        last_hook = hook;
    }
    tables.reasons.take()
}

/// One packet through a hook, as a frame or as a bare packet, and what there is to say of it; returns what came out.
fn pass(tables: &MemoryTables, hook: Hook, sent: &ByteFrame, bare: bool) -> ByteFrame {
    let was_right = is_right(sent);
    let (head, outcome) = match sent.bytes.split_at_checked(14) {
        Some((head, packet)) if bare => {
            let packet = ByteFrame { bytes: packet.to_vec(), partial: sent.partial };
            (head, run_on::<false>(tables, &packet, hook, INTERFACE))
        }
        _ => (&[][..], run(tables, sent, hook, INTERFACE)),
    };
    let broken = tables.broken_flows();
    assert!(broken.is_empty(), "{broken:?} after {sent:?}");
    let whole = |out: ByteFrame| {
        // Nobody has looked at the head of a bare packet: it may have been bent.
        let kind =
            if out.bytes.first().is_some_and(|first| first >> 4 == 6) { [0x86, 0xdd] } else { [0x08, 0x00] };
        match head.get(..12) {
            Some(head) => ByteFrame { bytes: [head, &kind, &out.bytes].concat(), ..out },
            None => out,
        }
    };
    match outcome {
        Outcome::Rewritten(out) => {
            let out = whole(out);
            assert_eq!(out.bytes.len(), sent.bytes.len(), "{sent:?} became {out:?}");
            assert!(!was_right || is_right(&out), "{:?}: {sent:?} became {out:?}", verify(&out));
            out
        }
        Outcome::Rejected(reply) => {
            assert!(hook == Hook::INGRESS, "rejected where it leaves: {sent:?}");
            let reply = whole(reply);
            assert!(is_right(&reply), "{:?}: {sent:?} was answered by {reply:?}", verify(&reply));
            reply
        }
        Outcome::Wrapped(out) => {
            assert!(hook == Hook::INGRESS, "wrapped where it leaves: {sent:?}");
            let more = out.bytes.len() - (sent.bytes.len() - if head.is_empty() { 0 } else { 14 });
            assert!(
                more == 20 || more == 40 || more == 14 + 20 || more == 14 + 40,
                "{sent:?} became {out:?}"
            );
            sent.clone()
        }
        Outcome::Passed | Outcome::Waits | Outcome::Dropped => sent.clone(),
    }
}

/// Whether it is a packet whose checksums are right, as far as [`verify`] can say: it takes the length of a packet from its
/// header, and what is shorter than that must not be asked about.
fn is_right(frame: &ByteFrame) -> bool {
    frame.bytes.len() >= 14 + 40 && verify(frame) == Ok(())
}

/// What whoever got this packet says.
fn answer(to: &ByteFrame, flags: u8) -> Option<ByteFrame> {
    let Tuple { src, sport, dst, dport, proto, .. } = tuple(to)?.tuple;
    Some(segment(&Tuple::new(dst, dport, src, sport, proto), flags, [2000, 1001], b"answer", false))
}

/// What a router says of it.
fn error(about: &ByteFrame, from: [Addr; 2]) -> Option<ByteFrame> {
    let src = tuple(about)?.tuple.src;
    let [v4, v6] = from;
    Some(icmp_error(if src.is_v4() { v4 } else { v6 }, src, about))
}

/// What is left to read; short input ends in zeros.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::from(self.next().unwrap_or(0)) % all.len()]
    }

    fn address(&mut self) -> [Addr; 2] {
        let n = usize::from(self.next().unwrap_or(0)) % 8;
        ADDRESSES.map(|family| addr(family[n]))
    }

    fn packet(&mut self) -> ByteFrame {
        let shape = self.next().unwrap_or(0);
        let family = usize::from(shape & 1);
        let (src, dst) = (self.address()[family], self.address()[family]);
        let (sport, dport) = (self.one_of(&PORTS), self.one_of(&PORTS));
        let proto = self.one_of(&PROTOS);
        let flags = self.next().unwrap_or(2);
        let key = Tuple::new(src, Port::new(sport), dst, Port::new(dport), proto);
        let payload = vec![0x5a; usize::from(shape >> 2)];
        segment(&key, flags, [1000, 2000], &payload, shape & 2 != 0)
    }

    fn bend(&mut self, frame: &mut Vec<u8>) {
        let (what, at, value) =
            (self.next().unwrap_or(0), self.next().unwrap_or(0), self.next().unwrap_or(0));
        let at = usize::from(at);
        match what % 4 {
            0 => frame.truncate(at),
            1 => frame.resize(frame.len() + at, value),
            2 => frame.iter_mut().skip(at).take(1).for_each(|byte| *byte = value),
            _ => frame.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (value % 8)),
        }
    }
}

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().expect("an address").into()
}

/// Services of each family at port 80 and 53 of the ClusterIP and the external address, and at a NodePort.
fn node() -> MemoryTables {
    let ports = [PortRange { first: 1024, count: 28_976 }];
    let config = Config {
        pod_v4: addr("10.244.0.0"),
        pod_v4_mask: u32::from_ne_bytes([255, 255, 0, 0]),
        pod_v6: addr("fd00:244::"),
        pod_v6_mask: addr("ffff:ffff::"),
        flags: config::POD_RANGE_V4 | config::POD_RANGE_V6,
        host_netns: 1,
        seed: 7,
        ..Config::EMPTY.with_snat_ports(&ports)
    };
    let mut tables = MemoryTables { config: Some(config), ..MemoryTables::default() };
    tables.ifaces.insert(INTERFACE, Iface::new(0, 0));
    let mut service = 0;
    for [cluster_ip, external, node, here, elsewhere, ..] in ADDRESSES {
        let any = if addr(node).is_v4() { Addr::ANY_V4 } else { Addr::ANY_V6 };
        tables.masquerade.insert(RouteKey::range(INTERFACE, any, 0), addr(node));
        tables.addresses.insert(addr(node), address::NODE | address::NODE_PORT);
        tables.addresses.insert(addr(cluster_ip), address::CLUSTER_IP);
        tables.addresses.insert(addr(external), address::EXTERNAL);
        let at = [
            (addr(cluster_ip), 80, frontend::INTERNAL),
            (addr(cluster_ip), 53, frontend::INTERNAL | frontend::AFFINITY),
            (addr(external), 80, 0),
            (addr(external), 53, frontend::LOCAL),
            (any, 30_080, frontend::NODE_PORT),
        ];
        for (vip, port, flags) in at {
            for proto in [Proto::TCP, Proto::UDP, Proto::SCTP] {
                service += 1;
                // One of five has nobody to go to.
                let endpoints = if service % 5 == 0 { &[][..] } else { &[here, elsewhere] };
                serve(&mut tables, service, FrontendKey::new(vip, Port::new(port), proto), flags, endpoints);
            }
        }
    }
    // Nothing has ever happened at 0.
    tables.now.set(1_000_000_000_000);
    tables
}

fn serve(tables: &mut MemoryTables, service: u32, key: FrontendKey, flags: u32, endpoints: &[&str]) {
    let first = service * 100;
    for (index, endpoint) in (first..).zip(endpoints) {
        let flags = backend::IN_CLUSTER | if index == first { backend::LOCAL | backend::IN_LOCAL } else { 0 };
        let (addr, port) = (addr(endpoint), Port::new(8080));
        tables.backends.insert(index, Backend { addr, port, flags, generation: 1, service, node: 0 });
        tables.slots.insert(index, index);
    }
    let count = u32::try_from(endpoints.len()).unwrap_or(0);
    let value = Frontend {
        service,
        cluster: Run { first, count },
        local: Run { first, count: count.min(1) },
        flags: flags | if count > 0 { frontend::ANY } else { 0 },
        affinity_secs: 10_800,
        seal: 0,
    };
    tables.frontends.insert(key, value.sealed(&key));
}

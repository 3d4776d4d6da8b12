//! Stories made up: random tables, random packets bent at random, answers and errors to what came out. Host
//! and kernel must agree after every packet. What fails is shrunk and printed, and `PROPTEST_CASES` makes the
//! run longer. A story that once failed stands among the vectors with a name.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config as Settings, TestError, TestRunner};
use proxy_common::abi::tunnel::READY;
use proxy_common::abi::{
    Hook, PortRange, Range, Reason, RouteKey, Tunnel, TunnelKey, config, frontend, iface,
};
use proxy_common::addr::Proto;
use proxy_common::testing::Outcome;
use proxy_common::wire::wrap;
use proxy_tests::packet::{Packet, Sum, TcpFlags, Transport, View, protocol};

use crate::node::{Node, addr};
use crate::real::IFACE;
use crate::stage::{Form, Stage};

/// Who is on stage: pods here, pods elsewhere, a client, the node, a router, Services, nobody.
const ADDRESSES: [[&str; 14]; 2] = [
    [
        "10.96.0.1",
        "10.244.1.5",
        "203.0.113.1",
        "192.168.10.1",
        "10.244.2.7",
        "198.51.100.9",
        "10.96.0.2",
        "10.244.1.7",
        "10.244.2.8",
        "192.168.10.254",
        "127.0.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "0.0.0.0",
    ],
    [
        "fd00:96::1",
        "fd00:244::5",
        "2001:db8:1::1",
        "fd00:10::1",
        "fd00:244::2:7",
        "2001:db8:9::9",
        "fd00:96::2",
        "fd00:244::7",
        "fd00:244::2:8",
        "fe80::254",
        "::1",
        "ff02::1",
        "::",
        // Mapped: an IPv6 packet that reads like an IPv4 one.
        "::ffff:10.96.0.1",
    ],
];
/// Where Services stand and where their endpoints are, by index into [`ADDRESSES`].
const VIPS: [usize; 4] = [0, 6, 2, 13];
const ENDPOINTS: [usize; 5] = [4, 8, 7, 1, 3];
const PORTS: [u16; 8] = [80, 40_000, 8080, 30_200, 53, 40_001, 1024, 1025];
/// The number of another node.
const OTHER: u32 = 7;
const PROTOS: [Proto; 3] = [Proto::TCP, Proto::UDP, Proto::SCTP];

/// A Service by numbers.
#[derive(Clone, Debug)]
struct Service {
    v6: bool,
    vip: usize,
    port: usize,
    proto: usize,
    flags: u32,
    endpoints: Vec<(usize, usize)>,
    /// The seal does not fit.
    torn: bool,
}

#[derive(Clone, Debug)]
struct World {
    services: Vec<Service>,
    flags: u32,
    snat_count: u16,
    seed: u32,
    has_iface: bool,
    has_config: bool,
    /// The ranges that ClusterIPs are from are known.
    has_ranges: bool,
}

/// A change of bytes behind every builder's back.
#[derive(Clone, Debug)]
enum Bend {
    Flip(usize),
    Set(usize, u8),
    Cut(usize),
    Grow(usize),
    /// The checksum of the IPv4 header made right again.
    Checksum,
}

/// What happens next.
#[derive(Clone, Debug)]
enum Event {
    /// A packet out of the blue.
    Packet { v6: bool, ends: [usize; 4], proto: u8, flags: u8, dress: Dress },
    /// A packet to the n-th Service, from this address and port.
    Call { service: usize, from: usize, port: usize, flags: u8, dress: Dress },
    /// What came out last enters the other hook.
    Onward,
    /// What was sent last comes from another node, or whoever has this address, in a packet for this node.
    Wrapped { from: usize },
    /// The last packet that was sent is sent again.
    Again,
    /// Whoever got the last packet answers, with these TCP flags.
    Answer(u8),
    /// An ICMP error about what came out last, from whoever has this address, with so many bytes of it.
    Error { from: usize, kind: u8, code: u8, cut: usize },
    /// An endpoint goes.
    Retire(usize, usize),
    /// Somebody deletes an entry of FLOWS.
    LoseLeg(usize),
    /// The agent ends a flow.
    EndFlow(usize),
    /// So many milliseconds pass, and the agent looks through the flows.
    Rest(u64),
}

/// What else a packet has on.
#[derive(Clone, Debug)]
enum Dress {
    Plain,
    /// IPv4 options or IPv6 extension headers.
    Headers(Vec<u8>),
    /// The n-th fragment.
    Fragment(usize),
    /// A UDP datagram without checksum.
    Unchecked,
}

#[derive(Clone, Debug)]
struct Act {
    egress: bool,
    /// What leaves has come in by an interface.
    forwarded: bool,
    event: Event,
    bends: Vec<Bend>,
}

fn service() -> impl Strategy<Value = Service> {
    let flags = prop_oneof![
        4 => Just(0),
        1 => Just(frontend::LOCAL),
        1 => Just(frontend::AFFINITY),
        1 => Just(frontend::SOURCE_RANGES),
        3 => Just(frontend::DSR),
        1 => Just(frontend::DSR | frontend::AFFINITY),
        1 => Just(frontend::LOCAL | frontend::AFFINITY | frontend::SOURCE_RANGES)
    ];
    let vip = prop_oneof![4 => Just(0_usize), 1 => Just(1), 2 => Just(2), 2 => Just(3)];
    (
        any::<bool>(),
        vip,
        prop_oneof![4 => Just(0_usize), 1 => 0..PORTS.len()],
        prop_oneof![3 => Just(0_usize), 3 => Just(1), 1 => Just(2)],
        flags,
        prop_oneof![
            1 => Just(vec![]),
            // The same for many, so that tuples meet.
            3 => Just(vec![(0, 2)]),
            4 => vec((0..ENDPOINTS.len(), prop_oneof![1 => Just(0_usize), 3 => Just(2)]), 1..4),
        ],
        prop::bool::weighted(0.02),
    )
        .prop_map(|(v6, vip, port, proto, flags, endpoints, torn)| Service {
            v6,
            vip,
            port,
            proto,
            flags,
            endpoints,
            torn,
        })
}

fn world() -> impl Strategy<Value = World> {
    let flag = |bit: u32, weight: f64| prop::bool::weighted(weight).prop_map(move |on| u32::from(on) * bit);
    (
        vec(service(), 1..7),
        (
            flag(config::POD_RANGE_V4, 0.8),
            flag(config::POD_RANGE_V6, 0.8),
            flag(config::MASQUERADE_ALL, 0.2),
            flag(config::MASQUERADE_LOCAL, 0.2),
            flag(config::POD_INTERFACES, 0.2),
        ),
        prop_oneof![Just(0_u16), Just(1), Just(2), Just(9), Just(28_976), Just(28_976), Just(28_976)],
        any::<u32>(),
        prop::bool::weighted(0.9),
        prop::bool::weighted(0.97),
        any::<bool>(),
    )
        .prop_map(|(services, (a, b, c, d, e), snat_count, seed, has_iface, has_config, has_ranges)| {
            World { services, flags: a | b | c | d | e, snat_count, seed, has_iface, has_config, has_ranges }
        })
}

fn act() -> impl Strategy<Value = Act> {
    let end = || prop_oneof![8 => 0_usize..6, 1 => 0_usize..14];
    let port = || prop_oneof![4 => Just(0_usize), 4 => Just(1), 1 => 0..PORTS.len()];
    let dress = || {
        let number = prop_oneof![Just(0_u8), Just(43), Just(60), Just(44), Just(51)];
        prop_oneof![
            20 => Just(Dress::Plain),
            2 => vec(number, 1..6).prop_map(Dress::Headers),
            3 => (0_usize..3).prop_map(Dress::Fragment),
            1 => Just(Dress::Unchecked),
        ]
    };
    let flags = || {
        let common =
            [SYN, ACK, SYN | ACK, FIN | ACK, RST, RST | ACK].map(|flags| (4, Just(flags).boxed())).to_vec();
        let mut all = common;
        all.push((1, any::<u8>().boxed()));
        prop::strategy::Union::new_weighted(all)
    };
    let proto = prop_oneof![
        6 => Just(protocol::TCP),
        6 => Just(protocol::UDP),
        2 => Just(protocol::SCTP),
        1 => Just(protocol::ICMP),
        1 => any::<u8>()
    ];
    let ends = (end(), prop_oneof![6 => Just(0_usize), 6 => end()], port(), port());
    let packet =
        (any::<bool>(), ends, proto, flags(), dress()).prop_map(|(v6, (a, b, c, d), proto, flags, dress)| {
            Event::Packet { v6, ends: [a, b, c, d], proto, flags, dress }
        });
    let kind = prop_oneof![Just(3_u8), Just(1), Just(2), Just(4), Just(5), Just(11), Just(12), any::<u8>()];
    let error = (end(), kind, 0_u8..5, prop_oneof![4 => Just(1000_usize), 1 => 0_usize..90])
        .prop_map(|(from, kind, code, cut)| Event::Error { from, kind, code, cut });
    let from = prop_oneof![3 => Just(1_usize), 3 => Just(5), 1 => 0_usize..9];
    let opening = prop_oneof![3 => Just(SYN), 1 => flags()];
    let call = (0_usize..6, from, prop_oneof![9 => Just(1_usize), 1 => Just(5)], opening, dress())
        .prop_map(|(service, from, port, flags, dress)| Event::Call { service, from, port, flags, dress });
    let event = prop_oneof![
        10 => call,
        3 => packet,
        5 => Just(Event::Onward),
        2 => Just(Event::Again),
        3 => prop_oneof![3 => Just(9_usize), 1 => Just(3), 1 => end()].prop_map(|from| Event::Wrapped { from }),
        5 => flags().prop_map(Event::Answer),
        2 => error,
        1 => (0_usize..6, 0_usize..4).prop_map(|(service, endpoint)| Event::Retire(service, endpoint)),
        1 => (0_usize..20).prop_map(Event::LoseLeg),
        1 => (0_usize..8).prop_map(Event::EndFlow),
        1 => prop_oneof![Just(1_500), Just(2_500), Just(45_500), Just(200_500)].prop_map(Event::Rest),
    ];
    let bend = prop_oneof![
        4 => (0_usize..1200).prop_map(Bend::Flip),
        3 => (0_usize..120, any::<u8>()).prop_map(|(at, byte)| Bend::Set(at, byte)),
        2 => (0_usize..160).prop_map(Bend::Cut),
        1 => (0_usize..1500).prop_map(Bend::Grow),
        2 => Just(Bend::Checksum),
    ];
    let bends = prop_oneof![7 => Just(Vec::new()), 3 => vec(bend, 1..4)];
    (prop::bool::weighted(0.3), prop::bool::weighted(0.3), event, bends)
        .prop_map(|(egress, forwarded, event, bends)| Act { egress, forwarded, event, bends })
}

/// What no made-up story meets, or hardly one: reasons of sockets, of full tables, of helpers that fail, and
/// of tuples that meet; of what happens only after many packets or much time (see the stories of pressure); and at drivers.
const ELSEWHERE: [Reason; 13] = [
    Reason::EndpointLost,
    Reason::SocketTranslated,
    Reason::SocketStorage,
    Reason::FlowTableFull,
    Reason::FlowInsert,
    Reason::RejectFailed,
    Reason::CollisionUnresolved,
    Reason::FlowCollision,
    Reason::Displaced,
    Reason::EntryRestored,
    Reason::FlowBusy,
    Reason::ReplyRedirected,
    Reason::PassedThrough,
];

const SYN: u8 = TcpFlags::SYN.0;
const ACK: u8 = TcpFlags::ACK.0;
const FIN: u8 = TcpFlags::FIN.0;
const RST: u8 = TcpFlags::RST.0;

impl World {
    fn build(&self) -> Node {
        let mut node = Node::new().config(|config| {
            config.flags = self.flags;
            let ports = PortRange { first: 1024, count: self.snat_count };
            *config = config.with_snat_ports(&[ports]);
            config.seed = self.seed;
            if self.has_ranges {
                config.service_range_count = 2;
                let v4 = addr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ff00");
                config.service_ranges[0] = Range { first: addr("10.96.0.0"), mask: v4 };
                config.service_ranges[1] = Range { first: addr("fd00:96::"), mask: addr("ffff:ffff::") };
            }
        });
        // Half of the worlds know the interface as a pod's.
        if self.seed % 2 == 1 {
            node.tables.ifaces.values_mut().for_each(|iface| iface.flags |= iface::POD);
        }
        for service in &self.services {
            let of = ADDRESSES[usize::from(service.v6)];
            let vip = match service.vip {
                3 if service.v6 => "::",
                n => of[VIPS[n].min(of.len() - 1)],
            };
            let kind = match service.vip {
                0 | 1 => frontend::INTERNAL,
                2 => 0,
                _ => frontend::NODE_PORT,
            };
            let endpoints: Vec<(String, u16)> = service
                .endpoints
                .iter()
                .map(|(ip, port)| {
                    // Those of this node are marked: two of five.
                    let near = if [2, 3].contains(ip) { "+" } else { "" };
                    (format!("{near}{}", of[ENDPOINTS[*ip]]), PORTS[*port])
                })
                .collect();
            let endpoints: Vec<(&str, u16)> =
                endpoints.iter().map(|(ip, port)| (ip.as_str(), *port)).collect();
            let port = PORTS[service.port];
            let id = node.serve((vip, port), PROTOS[service.proto], kind | service.flags, &endpoints);
            if service.flags & frontend::DSR != 0 {
                for backend in node.tables.backends.values_mut().filter(|backend| backend.service == id) {
                    backend.node = if backend.is_local() { 0 } else { OTHER };
                }
            }
            node = node.allow(id, of[5], if service.v6 { 64 } else { 24 });
            if service.torn {
                for value in node.tables.frontends.values_mut().filter(|value| value.service == id) {
                    value.seal ^= 1;
                }
            }
        }
        // What is for the router's part comes wrapped; some ways are short, some not to be used.
        for (family, of) in ADDRESSES.iter().enumerate() {
            let [to, from] = [of[9], of[3]].map(addr);
            let mtu = [1500, 1500, 1500, 50][self.seed as usize / 8 % 4];
            let flags = u32::from(!(self.seed as usize / 32 + family).is_multiple_of(5)) * READY;
            let tunnel = Tunnel { to, from, ifindex: IFACE, mtu, flags, pad: 0 };
            node.tables.tunnels.insert(TunnelKey::new(OTHER, &to), tunnel);
        }
        // Some know a route with a source of its own.
        if self.seed.is_multiple_of(3) {
            for of in ADDRESSES {
                let route = RouteKey::exact(IFACE, addr(of[ENDPOINTS[0]]));
                node.tables.masquerade.insert(route, addr(of[VIPS[2]]));
            }
        }
        if !self.has_iface {
            node.tables.ifaces.clear();
            node.tables.masquerade.clear();
        }
        if !self.has_config {
            node.tables.config = None;
        }
        node
    }
}

fn built(v6: bool, ends: [usize; 4], proto: u8, flags: u8, dress: &Dress) -> Vec<u8> {
    let [source, destination, sport, dport] = ends;
    let ip = |n: usize| -> IpAddr { ADDRESSES[usize::from(v6)][n].parse().unwrap() };
    let at = |ip, port: usize| SocketAddr::new(ip, PORTS[port]);
    let (source, destination) = (at(ip(source), sport), at(ip(destination), dport));
    let mut packet = match proto {
        protocol::TCP => Packet::tcp(source, destination, TcpFlags(flags)),
        protocol::UDP => {
            let checksum = !matches!(dress, Dress::Unchecked);
            let ports = Transport::Udp { source: source.port(), destination: destination.port(), checksum };
            Packet::new(source.ip(), destination.ip(), ports)
        }
        protocol::SCTP => Packet::sctp(source, destination),
        // Echo requests, in the family's own numbers.
        protocol::ICMP => {
            Packet::icmp(source.ip(), destination.ip(), if v6 { 128 } else { 8 }, 0, [0, 1, 0, 1])
        }
        other => Packet::new(source.ip(), destination.ip(), Transport::Other(other)),
    };
    packet = packet.payload(&[0x5a; 40]);
    match dress {
        Dress::Headers(numbers) if v6 => {
            for number in numbers {
                packet = packet.extension(*number, &[0, 0, 0, 0, 0, 7]);
            }
        }
        Dress::Headers(numbers) => packet = packet.options(numbers),
        Dress::Fragment(n) => {
            let fragments = packet.may_fragment().identification(9).fragments(24);
            return fragments[(*n).min(fragments.len() - 1)].clone();
        }
        Dress::Plain | Dress::Unchecked => {}
    }
    packet.build()
}

/// Whoever got this packet answers it.
fn answer(frame: &[u8], flags: u8) -> Option<Vec<u8>> {
    let view = View::ethernet(frame).ok()?;
    let (source, destination) = view.ports?;
    let (source, destination) =
        (SocketAddr::new(view.destination, destination), SocketAddr::new(view.source, source));
    let packet = match view.protocol {
        protocol::TCP => Packet::tcp(source, destination, TcpFlags(flags)),
        protocol::UDP => Packet::udp(source, destination),
        _ => Packet::sctp(source, destination),
    };
    Some(packet.payload(b"answer").build())
}

fn error(frame: &[u8], from: usize, kind: u8, code: u8, cut: usize) -> Option<Vec<u8>> {
    let view = View::ethernet(frame).ok()?;
    let from: IpAddr = ADDRESSES[usize::from(view.source.is_ipv6())][from].parse().unwrap();
    let embedded = &frame[14..frame.len().min(14 + cut)];
    Some(Packet::icmp(from, view.source, kind, code, [0, 0, 5, 120]).payload(embedded).build())
}

/// A frame's packet inside one of its family, from this address to the node.
fn wrapped(frame: &[u8], from: usize) -> Option<Vec<u8>> {
    let family = match frame.get(12..14)? {
        [8, 0] => 0,
        [0x86, 0xdd] => 1,
        _ => return None,
    };
    let of = ADDRESSES[family];
    let length = u32::try_from(frame.len() - 14).ok()?;
    let mut words = [0; wrap::WORDS];
    let ends = [of[from], of[3]].map(addr);
    wrap::write(&mut words, family == 0, 0, length, (&ends[0], &ends[1]), 7);
    let header: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    Some([&frame[..14], &header[..wrap::length(family == 0)], &frame[14..]].concat())
}

fn bend(bytes: &mut Vec<u8>, bend: &Bend, ethernet: bool) {
    match bend {
        Bend::Flip(bit) if bit / 8 < bytes.len() => bytes[bit / 8] ^= 1 << (bit % 8),
        Bend::Set(at, byte) if *at < bytes.len() => bytes[*at] = *byte,
        Bend::Cut(length) => bytes.truncate((*length).max(14)),
        Bend::Grow(length) => bytes.resize(bytes.len() + length, 0xa5),
        Bend::Checksum => update_checksum(bytes, if ethernet { 14 } else { 0 }),
        Bend::Flip(_) | Bend::Set(..) => {}
    }
    // A test run takes no more than a page with its head and tail.
    bytes.truncate(3000);
}

/// Makes the checksum of an IPv4 header right, if there is one.
fn update_checksum(bytes: &mut [u8], l3: usize) {
    let length = bytes.get(l3).map_or(0, |first| usize::from(first & 0xf) * 4);
    if let Some(header) = bytes.get_mut(l3..l3 + length)
        && length >= 20
        && header[0] >> 4 == 4
    {
        header[10..12].fill(0);
        let sum = Sum::default().bytes(header).checksum();
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

/// A story being made up: what was sent and what came out, as Ethernet frames.
#[derive(Default)]
struct Memory {
    sent: Vec<u8>,
    came: Vec<u8>,
    egress: bool,
}

/// Tells it; the reasons that it met go to `met`.
fn tell(world: &World, form: Form, acts: &[Act], met: &RefCell<BTreeMap<Reason, u64>>) -> Result<(), String> {
    let mut tables = world.build().tables;
    if form != Form::Ethernet {
        // See `framed_story`.
        tables.tunnels.clear();
    }
    let mut stage = Stage::new(form, tables);
    let mut memory = Memory::default();
    for (n, act) in acts.iter().enumerate() {
        let mut egress = act.egress;
        let frame = match &act.event {
            Event::Packet { v6, ends, proto, flags, dress } => Some(built(*v6, *ends, *proto, *flags, dress)),
            Event::Call { service, from, port, flags, dress } => {
                egress = false;
                let service = &world.services[service % world.services.len()];
                let to = if service.vip == 3 { 3 } else { VIPS[service.vip] };
                let proto = PROTOS[service.proto].0;
                Some(built(service.v6, [*from, to, *port, service.port], proto, *flags, dress))
            }
            Event::Onward => {
                egress = !memory.egress;
                Some(memory.came.clone())
            }
            Event::Again => {
                egress = memory.egress;
                Some(memory.sent.clone())
            }
            Event::Wrapped { from } => {
                egress = false;
                (form == Form::Ethernet).then(|| wrapped(&memory.sent, *from)).flatten()
            }
            Event::Answer(flags) => answer(&memory.came, *flags),
            Event::Error { from, kind, code, cut } => error(&memory.came, *from, *kind, *code, *cut),
            Event::Retire(service, endpoint) => {
                let n = service % world.services.len();
                let endpoint = endpoint % world.services[n].endpoints.len().max(1);
                let index = (n as u32 + 1) * 100 + endpoint as u32;
                stage.change(|node| {
                    if node.tables.backends.contains_key(&index) {
                        node.retire(index);
                    }
                });
                None
            }
            Event::LoseLeg(n) => {
                stage.lose_leg(None, *n);
                None
            }
            Event::EndFlow(n) => {
                stage.end_flow(*n);
                None
            }
            Event::Rest(milliseconds) => {
                stage.rest(*milliseconds);
                stage.sweep();
                None
            }
        };
        stage.came_by = if act.forwarded { IFACE } else { 0 };
        let Some(frame) = frame.filter(|frame| frame.len() >= 14 + 20) else { continue };
        let mut bytes = stage.reform(&frame);
        act.bends.iter().for_each(|one| bend(&mut bytes, one, form != Form::Plain));
        let hook = if egress { Hook::EGRESS } else { Hook::INGRESS };
        let mut step = || stage.step(hook, &bytes).map_err(|report| format!("packet {n}: {report}"));
        let mut outcome = step()?;
        // What was put at the end of the queue comes again.
        while outcome == Outcome::Waits {
            outcome = step()?;
        }
        memory.sent = stage.framed(&bytes);
        memory.egress = egress;
        memory.came = match outcome {
            Outcome::Rewritten(frame) | Outcome::Rejected(frame) | Outcome::Wrapped(frame) => {
                stage.framed(&frame.bytes)
            }
            Outcome::Passed | Outcome::Waits | Outcome::Dropped => memory.sent.clone(),
        };
    }
    for (reason, count) in stage.met() {
        *met.borrow_mut().entry(reason).or_default() += count;
    }
    stage.end();
    Ok(())
}

#[test]
fn host_and_kernel_agree_on_stories_made_up() {
    let plain = Settings::default();
    let plain_cases = plain.cases;
    // Within ten seconds; `PROPTEST_CASES` scales it.
    let settings = Settings { cases: plain.cases * 12, failure_persistence: None, ..plain };
    let stories = (world(), prop_oneof![Just(Form::Ethernet), Just(Form::Plain)], vec(act(), 1..14));
    let met = RefCell::default();
    let outcome = TestRunner::new(settings)
        .run(&stories, |(world, form, acts)| tell(&world, form, &acts, &met).map_err(TestCaseError::fail));
    match outcome {
        // Agreement about nothing would prove nothing.
        Ok(()) => {
            let met = met.into_inner();
            let never: Vec<Reason> = Reason::ALL
                .iter()
                .filter(|r| !ELSEWHERE.contains(r) && !met.contains_key(r))
                .copied()
                .collect();
            assert!(never.is_empty() || plain_cases < 256, "never met: {never:?} of {met:?}");
        }
        Err(TestError::Fail(report, (world, form, acts))) => {
            panic!("{report}\nthe shortest story that shows it: {world:?} {form:?} {acts:?}")
        }
        Err(TestError::Abort(report)) => panic!("{report}"),
    }
}

#[test]
fn a_flow_that_has_lost_legs_is_told_from_the_next_with_its_ends() {
    let service =
        Service { v6: false, vip: 0, port: 0, proto: 0, flags: 0, endpoints: vec![(0, 2)], torn: false };
    let world = World {
        services: vec![service],
        flags: config::POD_RANGE_V4 | config::MASQUERADE_ALL,
        snat_count: 28_976,
        seed: 0,
        has_iface: true,
        has_config: true,
        has_ranges: false,
    };
    let act = |event| Act { egress: false, forwarded: true, event, bends: vec![] };
    let call =
        || act(Event::Call { service: 0, from: 1, port: 1, flags: TcpFlags::SYN.0, dress: Dress::Plain });
    let met = RefCell::default();
    for (first, second) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)] {
        let lost = [Event::LoseLeg(first), Event::LoseLeg(second)].map(act);
        let acts = [vec![call(), act(Event::Onward)], lost.into(), vec![call(), act(Event::Onward)]].concat();
        tell(&world, Form::Ethernet, &acts, &met).unwrap();
    }
}

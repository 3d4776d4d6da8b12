//! The real programs in the real kernel: load, pin, attach, write, read, clean up.
//!
//! Each test has a network namespace, a cgroup and a bpffs of its own, and removes them even when it fails.
//! Root and the BPF object are needed; without them the tests fail and say so.
#![expect(clippy::unwrap_used, reason = "all of this file is tests, helpers included")]

#[path = "kernel/generation.rs"]
mod generation;
#[path = "kernel/repair.rs"]
mod repair;
#[path = "kernel/tunnel.rs"]
mod tunnel;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

use agent_core::datapath::Datapath;
use agent_core::model::Change;
use agent_core::model::{AtDriver, Link, Route, Settings, World};
use agent_core::plan::{Actual, Step};
use agent_kernel::datapath::attach::{AttachError, Attached, Direction};
use agent_kernel::datapath::flow::sockets::{LedOn, Storage, lead_on};
use agent_kernel::datapath::flow::{Flows, Sweeper, Timeouts, now};
use agent_kernel::datapath::load::remove::{Removed, remove_all};
use agent_kernel::datapath::load::{self, Capacities, LoadError, Loaded, ProgramLog};
use agent_kernel::datapath::pinned::{Pinned, PinnedError, Place};
use agent_kernel::datapath::probe::netns;
use agent_kernel::datapath::probe::{Features, cgroup2_mount};
use agent_kernel::datapath::store::pin::BpfRoot;
use agent_kernel::datapath::store::table::TableError;
use agent_kernel::datapath::tables::kernel::Kernel;
use agent_kernel::datapath::tables::taken::Taken;
use agent_kernel::netlink::{self, Devices};
use nix::sched::{CloneFlags, setns, unshare};
use proxy_common::abi::{
    Affinity, AffinityKey, AgentState, Backend, Config, Device, Flow, FlowId, Frontend, FrontendKey, Iface,
    Key, Leg, PortRange, Role, RouteKey, Run, Secret, ServiceName, SocketEntry, SocketState, SourceKey,
    State, Tuple, maps, text,
};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::lb::Tables as _;
use proxy_common::testing::MemoryTables;

/// Small tables: the tests fill them.
const SMALL: Capacities = Capacities {
    frontends: 64,
    slots: 10_000,
    backends: 10_000,
    addresses: 64,
    sources: 64,
    ifaces: 16,
    services: 64,
    flows: 1024,
    young_flows: 1024,
    fragments: 64,
    affinity: 64,
};

/// The maps of a generation: those of the programs, and what is said of their layout.
const ALL_MAPS: usize = maps::ALL.len() + 1;

/// A namespace, a cgroup and a bpffs; the test's thread lives in the namespace.
struct Room {
    directory: tempfile::TempDir,
    cgroup: PathBuf,
    name: String,
    root: BpfRoot,
}

impl Room {
    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests load BPF programs: run them as root");
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ebpx-k{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        ip(&["link", "set", "lo", "up"]);
        let directory = tempfile::tempdir().expect("a directory for bpffs");
        let root = BpfRoot::new(directory.path().join("bpf"));
        let cgroup = cgroup2_mount().expect("cgroup v2 is mounted").join(&name);
        fs::create_dir(&cgroup).expect("a cgroup");
        Self { directory, cgroup, name, root }
    }

    fn load(&self) -> Loaded {
        self.try_load(&SMALL, true).expect("the programs load")
    }

    fn try_load(&self, capacities: &Capacities, tcx: bool) -> Result<Loaded, LoadError> {
        let features = Features { tcx, ..Features::probe() };
        Loaded::open(&self.root, &features, capacities, ProgramLog::Off)
    }

    fn veth(&self, name: &str, peer: &str) {
        ip(&["link", "add", name, "type", "veth", "peer", "name", peer]);
        ip(&["link", "set", name, "up"]);
        ip(&["link", "set", peer, "up"]);
    }

    /// The pins of programs at hooks.
    fn hooks(&self) -> Vec<String> {
        self.root.link_names().unwrap()
    }

    fn program_ids(&self) -> Vec<(String, u32)> {
        let links = Pinned::open(&self.root).unwrap().links().unwrap();
        links.into_iter().map(|link| (link.name, link.program_id)).collect()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        remove_all(&self.root).ok();
        nix::mount::umount2(self.root.path(), nix::mount::MntFlags::MNT_DETACH).ok();
        // Those that a test has made inside stand in the way if it failed before it took them away.
        for inner in fs::read_dir(&self.cgroup).into_iter().flatten().flatten() {
            fs::remove_dir(inner.path()).ok();
        }
        fs::remove_dir(&self.cgroup).ok();
        assert!(thread::panicking() || !self.cgroup.exists(), "the cgroup of {} is left behind", self.name);
    }
}

fn ip(args: &[&str]) {
    let done = Command::new("ip").args(args).output().expect("ip of iproute2 runs");
    assert!(done.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

fn output(program: &str, args: &[&str]) -> String {
    let done = Command::new(program).args(args).output().expect("the tool runs");
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// The interfaces of this thread's namespace that carry programs.
fn interfaces() -> Vec<Link> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let links = runtime.block_on(netlink::links()).expect("links can be listed");
    Devices::new::<&str>(&[]).unwrap().choose(&links)
}

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

fn done(results: Vec<(std::sync::Arc<str>, Result<Attached, AttachError>)>) -> Vec<(String, Attached)> {
    let each = |(name, result): (std::sync::Arc<str>, Result<_, _>)| (name.to_string(), result.unwrap());
    let mut found: Vec<_> = results.into_iter().map(each).collect();
    found.sort();
    found
}

fn frontend(key: &FrontendKey, service: u32) -> Frontend {
    let cluster = Run { first: 1, count: 2 };
    Frontend { service, cluster, local: Run::EMPTY, flags: 1, affinity_secs: 0, seal: 0 }.sealed(key)
}

fn backend(n: u32) -> Backend {
    Backend { addr: addr("10.244.0.7"), port: Port::new(8080), flags: 1, generation: n, service: 1, node: 0 }
}

/// What SERVICES holds of port `http` of Service `default/web`.
fn web_http() -> ServiceName {
    ServiceName {
        namespace: text("default"),
        name: text("web"),
        port: text("http"),
        proto: Proto::TCP,
        family: 4,
        pad: [0; 2],
    }
}

#[test]
fn this_kernel_is_probed_without_a_side_effect() {
    let _room = Room::new();
    let features = Features::probe();
    assert!(features.bpf && features.cgroup2.is_some());
    assert_eq!(features, Features::probe());
    assert!(features.host_netns || !features.netns_cookie, "one of the two ways tells it");
}

#[test]
fn the_cookie_of_a_namespace_is_the_same_by_a_socket_and_by_a_program_in_every_namespace() {
    let _room = Room::new();
    let (by_option, by_program) = (netns::by_option(), netns::by_program());
    assert!(by_program.is_some());
    // Before 5.14 only the program tells it.
    assert!(by_option.is_none() || by_option == by_program, "{by_option:?} {by_program:?}");
    assert_eq!(netns::cookie(), netns::by_program(), "it stays the same");
    // No address, and loopback is down.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let other = netns::by_program();
    assert!(other.is_some() && other != by_program, "another namespace has another cookie: {other:?}");
    assert!(netns::by_option().is_none() || netns::by_option() == other);
}

#[test]
fn every_step_comes_back_as_it_was_written_and_goes_when_deleted() {
    let room = Room::new();
    drop(room.load());
    let mut kernel = Kernel::open(&room.root).unwrap();
    assert_eq!(kernel.read().unwrap(), Actual::default());

    let keys = ["10.96.0.1", "fd00::1"].map(|a| FrontendKey::new(addr(a), Port::new(80), Proto::TCP));
    let config =
        Config { seed: 7, ..Config::EMPTY }.with_snat_ports(&[PortRange { first: 61000, count: 100 }]);
    let iface = Iface::new(0, 3);
    let routes =
        [(Addr::ANY_V4, 0, "10.0.0.1"), (addr("10.8.0.0"), 16, "10.8.0.1"), (Addr::ANY_V6, 0, "fd00::9")]
            .map(|(dst, bits, source)| (RouteKey::range(3, dst, bits), addr(source)));
    let name = web_http();
    let sources = [SourceKey::range(1, addr("10.0.0.0"), 8), SourceKey::range(1, addr("fd00::"), 16)];
    let mut steps =
        vec![Step::PutConfig(Box::new(config)), Step::PutIface(3, iface), Step::PutService(1, name.into())];
    // More than one chunk, so that batches are split.
    steps.extend((1..9_000).map(|n| Step::PutBackend(n, backend(n))));
    steps.extend((1..9_000).map(|n| Step::PutSlot(n, n)));
    steps.extend(sources.map(Step::PutSource));
    steps.extend(routes.map(|(key, source)| Step::PutRoute(key, source)));
    steps.push(Step::PutServicePorts(1023, 1 << 63));
    steps.extend(keys.map(|key| Step::PutFrontend(key, frontend(&key, 1))));
    steps.push(Step::PutAddress(addr("10.96.0.1"), 1));
    kernel.apply(&steps).map_err(|(done, error)| (done, error.to_string())).unwrap();

    let actual = Kernel::open(&room.root).unwrap().read().unwrap();
    assert_eq!(actual.config, config);
    assert_eq!(actual.ifaces, [(3, iface)].into());
    assert_eq!(actual.routes, routes.into());
    assert_eq!(actual.service_ports, [(1023, 1 << 63)].into_iter().collect());
    assert_eq!(actual.services, [(1, name.into())].into());
    assert_eq!(actual.backends, (1..9_000).map(|n| (n, backend(n))).collect());
    assert_eq!(actual.slots, (1..9_000).map(|n| (n, n)).collect());
    assert_eq!(actual.sources, sources.into());
    assert_eq!(actual.frontends, keys.map(|key| (key, frontend(&key, 1))).into());
    assert_eq!(actual.addresses, [(addr("10.96.0.1"), 1)].into());

    let mut back = vec![Step::DeleteIface(3), Step::DeleteService(1), Step::DeleteAddress(addr("10.96.0.1"))];
    back.extend(keys.map(Step::DeleteFrontend));
    back.extend(sources.map(Step::DeleteSource));
    back.extend(routes.map(|(key, _)| Step::DeleteRoute(key)));
    back.push(Step::PutServicePorts(1023, 0));
    back.extend((1..9_000).map(|n| Step::PutSlot(n, 0)));
    for _ in 0..2 {
        // Once more: applying twice is the same as applying once.
        kernel.apply(&back).map_err(|(done, error)| (done, error.to_string())).unwrap();
    }
    let rest = kernel.read().unwrap();
    let want = Actual { config, backends: actual.backends, ..Actual::default() };
    assert_eq!(rest, want);
}

/// The words of one of the tables of bits.
fn words(room: &Room, map: &str) -> Vec<u64> {
    let map = aya::maps::MapData::from_pin(room.root.map(map)).unwrap();
    let words: aya::maps::Array<_, u64> = aya::maps::Map::Array(map).try_into().unwrap();
    words.iter().map(Result::unwrap).collect()
}

/// Has connection tracking know connections of the first tuple that are answered by the second one, or forget them.
fn track(connections: &[(Tuple, Tuple)], known: bool) {
    use netlink_packet_netfilter::conntrack::{
        ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Tuple as Part,
    };
    use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
    use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage};

    let parts = |tuple: &Tuple| {
        let ends = [IPTuple::SourceAddress(tuple.src.into()), IPTuple::DestinationAddress(tuple.dst.into())];
        let ports = [
            ProtoTuple::Protocol(tuple.proto.0.into()),
            ProtoTuple::SourcePort(tuple.sport.number()),
            ProtoTuple::DestinationPort(tuple.dport.number()),
        ];
        vec![Part::Ip(ends.to_vec()), Part::Proto(ports.to_vec())]
    };
    let socket = netlink_sys::Socket::new(netlink_sys::protocols::NETLINK_NETFILTER).unwrap();
    socket.connect(&netlink_sys::SocketAddr::new(0, 0)).unwrap();
    for (asked, answered) in connections {
        let mut attributes = vec![ConntrackAttribute::CtaTupleOrig(parts(asked))];
        if known {
            attributes.push(ConntrackAttribute::CtaTupleReply(parts(answered)));
            attributes.push(ConntrackAttribute::CtaTimeout(600));
        }
        let family = if asked.src.is_v4() { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 };
        let act =
            if known { ConntrackMessage::New(attributes) } else { ConntrackMessage::Delete(attributes) };
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | if known { NLM_F_CREATE } else { 0 };
        let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), act);
        let mut message = NetlinkMessage::new(header, message.into());
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        socket.send(&bytes, 0).unwrap();
        let mut answer = [0; 1024];
        socket.recv(&mut &mut answer[..], 0).unwrap();
        assert_eq!(answer[16..20], [0; 4], "{asked:?} {answered:?}");
    }
}

/// A connection of a pod that somebody has given another source: as it is asked, as it is answered.
fn masqueraded(pod: &str, from: (&str, u16), to: (&str, u16), proto: Proto) -> (Tuple, Tuple) {
    let (to, port) = (addr(to.0), Port::new(to.1));
    let seen = Tuple::new(addr(from.0), Port::new(from.1), to, port, proto);
    (Tuple::new(addr(pod), Port::new(7777), to, port, proto), seen.reversed())
}

#[test]
fn what_connection_tracking_has_between_endpoints_and_our_addresses_is_taken_while_it_has_it() {
    let room = Room::new();
    drop(room.load());
    let mut kernel = Kernel::open(&room.root).unwrap();
    let route = |text: &str| {
        let source = addr(text);
        Step::PutRoute(RouteKey::exact(7, source), source)
    };
    let at = |text: &str| Backend { addr: addr(text), ..backend(1) };
    let ports = [PortRange { first: 2000, count: 2 }, PortRange { first: 7777, count: 1 }];
    let steps = [
        Step::PutConfig(Box::new(Config::EMPTY.with_snat_ports(&ports))),
        Step::PutBackend(1, at("203.0.113.7")),
        Step::PutBackend(2, at("2001:db8::7")),
        route("192.168.10.1"),
        route("fd00::1"),
    ];
    kernel.apply(&steps).unwrap();
    let (node, endpoint) = ("192.168.10.1", "203.0.113.7");
    let taken = [
        masqueraded("10.244.1.5", (node, 2000), (endpoint, 8080), Proto::TCP),
        masqueraded("10.244.1.5", (node, 2000), (endpoint, 8080), Proto::UDP),
        // Whatever its port is: it may become an endpoint's.
        masqueraded("10.244.1.6", (node, 2001), (endpoint, 9), Proto::SCTP),
        masqueraded("fd00:244::5", ("fd00::1", 2000), ("2001:db8::7", 8080), Proto::TCP),
        // The node itself.
        masqueraded(node, (node, 7777), (endpoint, 8080), Proto::UDP),
    ];
    // The endpoint has begun it: what it sends to a port of the node goes to a pod.
    let sent = Tuple::new(addr(endpoint), Port::new(5060), addr(node), Port::new(2001), Proto::UDP);
    let pod = Tuple::new(addr("10.244.1.5"), Port::new(8888), sent.src, sent.sport, Proto::UDP);
    let begun = [(sent, pod)];
    let others = [
        masqueraded("10.244.1.5", (node, 2000), ("203.0.113.8", 8080), Proto::UDP),
        masqueraded("10.244.1.5", ("192.168.11.1", 2000), (endpoint, 8080), Proto::UDP),
        masqueraded("10.244.1.7", ("10.244.1.7", 7777), (endpoint, 8080), Proto::UDP),
        // No port that we masquerade with.
        masqueraded("10.244.1.5", (node, 2002), (endpoint, 8081), Proto::UDP),
    ];
    let map = aya::maps::MapData::from_pin(room.root.map(maps::TAKEN)).unwrap();
    let map: aya::maps::HashMap<_, Tuple, u32> = aya::maps::Map::HashMap(map).try_into().unwrap();
    let is_taken = |expected: &[(Tuple, Tuple)]| {
        let mut expected: Vec<_> = expected.iter().map(|(_, answered)| answered.reversed()).collect();
        let mut found: Vec<_> = map.keys().map(Result::unwrap).collect();
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected);
    };
    let mut agent = Taken::open(&room.root).unwrap();
    assert_eq!(agent.follow().unwrap(), 0);
    track(&taken, true);
    track(&others, true);
    assert_eq!(agent.follow().unwrap(), 5);
    is_taken(&taken);
    track(&begun, true);
    assert_eq!(agent.follow().unwrap(), 6);
    is_taken(&[&taken[..], &[(pod, sent)]].concat());
    track(&begun, false);
    track(&taken[1..3], false);
    assert_eq!(agent.follow().unwrap(), 3);
    is_taken(&[taken[0], taken[3], taken[4]]);
    // The next agent finds what is there.
    track(&taken[3..], false);
    track(&taken[1..2], true);
    assert_eq!(Taken::open(&room.root).unwrap().follow().unwrap(), 2);
    is_taken(&taken[..2]);
    // With the endpoint goes the interest in it.
    kernel.apply(&[Step::PutBackend(1, Backend::retired(2))]).unwrap();
    Kernel::open(&room.root).unwrap().read().unwrap();
    assert_eq!(Taken::open(&room.root).unwrap().follow().unwrap(), 0);
    is_taken(&[]);
}

#[test]
fn of_more_connections_than_there_is_room_for_as_many_as_fit_are_taken_and_the_rest_is_named() {
    let room = Room::new();
    drop(room.load());
    let mut kernel = Kernel::open(&room.root).unwrap();
    let (node, endpoint) = (addr("192.168.10.1"), addr("203.0.113.7"));
    let route = Step::PutRoute(RouteKey::exact(7, node), node);
    let config = Config::EMPTY.with_snat_ports(&[PortRange { first: 1, count: u16::MAX }]);
    let endpoint_step = Step::PutBackend(1, Backend { addr: endpoint, ..backend(1) });
    kernel.apply(&[Step::PutConfig(Box::new(config)), endpoint_step, route]).unwrap();
    let connection = |n: u16| {
        let seen = Tuple::new(node, Port::new(n), endpoint, Port::new(8080), Proto::UDP);
        (seen, seen.reversed())
    };
    let other = |n: u16| {
        let seen = Tuple::new(node, Port::new(n), endpoint, Port::new(8081), Proto::UDP);
        (seen, seen.reversed())
    };
    let all: Vec<_> = (1..=u16::MAX).map(connection).chain((1..=100).map(other)).collect();
    track(&all, true);
    let mut agent = Taken::open(&room.root).unwrap();
    for _ in 0..2 {
        let error = agent.follow().unwrap_err().to_string();
        assert!(error.contains("TAKEN is full (65536 entries): no room for 99 more"), "{error}");
    }
    track(&all[..200], false);
    assert_eq!(agent.follow().unwrap(), all.len() - 200);
}

fn address_bits(room: &Room) -> Vec<u64> {
    words(room, maps::ADDRESS_BITS)
}

/// What the words are when these addresses have their bits.
fn bits(addrs: &[Addr]) -> Vec<u64> {
    let mut words = vec![0_u64; 4_096];
    addrs.iter().for_each(|addr| words[addr.place() as usize / 64] |= 1 << (addr.place() % 64));
    words
}

#[test]
fn the_bit_of_an_endpoint_is_there_before_it_and_counted_again_by_the_next_agent() {
    let room = Room::new();
    drop(room.load());
    let mut kernel = Kernel::open(&room.root).unwrap();
    let [one, two, other] = [addr("10.244.1.5"), addr("fd00:244::5"), addr("10.244.1.6")];
    let at = |addr| Backend { addr, ..backend(1) };
    kernel.apply(&[Step::PutBackend(1, at(one)), Step::PutBackend(2, at(two))]).unwrap();
    assert_eq!(words(&room, maps::ENDPOINT_BITS), bits(&[one, two]));
    kernel.apply(&[Step::PutBackend(1, Backend::retired(2)), Step::PutBackend(3, at(other))]).unwrap();
    assert_eq!(words(&room, maps::ENDPOINT_BITS), bits(&[one, two, other]), "what was there may be there");
    Kernel::open(&room.root).unwrap().read().unwrap();
    assert_eq!(words(&room, maps::ENDPOINT_BITS), bits(&[two, other]));
    // One that cannot be written has its bit already.
    let last = addr("10.244.9.9");
    kernel.apply(&[Step::PutBackend(u32::MAX, at(last))]).unwrap_err();
    assert_eq!(words(&room, maps::ENDPOINT_BITS), bits(&[two, other, last]));
}

#[test]
fn the_bit_of_an_address_stands_as_long_as_the_address_and_is_taken_away_when_many_have_gone() {
    let room = Room::new();
    drop(room.load());
    let mut kernel = Kernel::open(&room.root).unwrap();
    let one = |n: u32| Addr::from(std::net::Ipv4Addr::from(0x0a60_0000 + n));
    let stays = [addr("192.168.0.1"), addr("fd00::1"), one(0)];
    kernel.apply(&stays.map(|addr| Step::PutAddress(addr, 1))).unwrap();
    assert_eq!(address_bits(&room), bits(&stays));
    // As many as the table holds, one after the other.
    for n in 1..=1_023 {
        kernel.apply(&[Step::PutAddress(one(n), 1)]).unwrap();
        assert_ne!(address_bits(&room)[one(n).place() as usize / 64] >> (one(n).place() % 64) & 1, 0);
        kernel.apply(&[Step::DeleteAddress(one(n))]).unwrap();
    }
    let left = address_bits(&room);
    assert!(left != bits(&stays) && left.iter().zip(bits(&stays)).all(|(left, stays)| left & stays == stays));
    // Another agent counts when it begins.
    assert_eq!(Kernel::open(&room.root).unwrap().read().unwrap().addresses.len(), 3);
    assert_eq!(address_bits(&room), bits(&stays));
    let mut kernel = Kernel::open(&room.root).unwrap();
    for n in 1..=1_024 {
        kernel.apply(&[Step::PutAddress(one(n), 1)]).unwrap();
        kernel.apply(&[Step::DeleteAddress(one(n))]).unwrap();
    }
    assert_eq!(address_bits(&room), bits(&stays), "and this one by itself");
}

#[test]
fn a_full_table_names_the_object_and_the_flag_and_keeps_what_was_done() {
    let room = Room::new();
    drop(room.load());
    let mut kernel = Kernel::open(&room.root).unwrap();
    let key = |n: u16| FrontendKey::new(addr("10.96.0.1"), Port::new(n), Proto::TCP);
    let steps: Vec<Step> = (1..=80).map(|n| Step::PutFrontend(key(n), frontend(&key(n), 1))).collect();
    let (done, error) = kernel.apply(&steps).unwrap_err();
    let said = error.to_string();
    assert!(matches!(error, TableError::Full { map: maps::FRONTENDS, max: 64, .. }), "{said}");
    assert!(said.contains(&format!("10.96.0.1:{}/TCP", done + 1)), "{done}: {said}");
    assert!(said.contains("--max-frontends"), "{said}");
    assert_eq!(kernel.read().unwrap().frontends.len(), done);

    let (done, error) = kernel.apply(&[Step::PutSlot(1, 1), Step::PutSlot(10_000, 1)]).unwrap_err();
    assert_eq!(done, 1);
    assert!(error.to_string().contains("--max-slots"), "{error}");
}

#[test]
fn a_restart_with_the_same_object_changes_nothing() {
    let room = Room::new();
    room.veth("v0", "v1");
    let mut first = room.load();
    assert_eq!(first.attach_cgroup(&room.cgroup).unwrap(), Attached::New);
    let new = [("v0".to_owned(), Attached::New), ("v1".to_owned(), Attached::New)];
    assert_eq!(done(first.sync_interfaces(&interfaces())), new);
    drop(first);
    let before = room.program_ids();
    assert_eq!(before.len(), 12, "{before:?}");

    let mut second = room.load();
    assert!(second.warnings().is_empty(), "{:?}", second.warnings());
    assert_eq!(second.attach_cgroup(&room.cgroup).unwrap(), Attached::Kept);
    let kept = [("v0".to_owned(), Attached::Kept), ("v1".to_owned(), Attached::Kept)];
    assert_eq!(done(second.sync_interfaces(&interfaces())), kept);
    drop(second);
    assert_eq!(room.program_ids(), before);
}

#[test]
fn programs_with_other_constants_replace_the_older_ones_in_place() {
    let room = Room::new();
    room.veth("v0", "v1");
    let mut first = room.load();
    first.attach_cgroup(&room.cgroup).unwrap();
    done(first.sync_interfaces(&interfaces()));
    drop(first);
    let before = room.program_ids();

    let probed = Features::probe();
    let features = Features { coarse_clock: !probed.coarse_clock, ..probed };
    let mut second = Loaded::open(&room.root, &features, &SMALL, ProgramLog::Off).unwrap();
    assert_eq!(second.attach_cgroup(&room.cgroup).unwrap(), Attached::Updated);
    let updated = [("v0".to_owned(), Attached::Updated), ("v1".to_owned(), Attached::Updated)];
    assert_eq!(done(second.sync_interfaces(&interfaces())), updated);
    let after = room.program_ids();
    assert_eq!(after.len(), before.len());
    for (old, new) in before.iter().zip(&after) {
        assert_eq!(old.0, new.0);
        // A program that does not look at the constant is left alone.
        if old.0.starts_with("tc_") || old.0.contains("connect") {
            assert_ne!(old.1, new.1, "{} has a new program", old.0);
        }
    }
}

#[test]
fn another_cgroup_root_takes_the_place_of_the_first() {
    let room = Room::new();
    let mut loaded = room.load();
    loaded.attach_cgroup(&room.cgroup).unwrap();
    let other = room.cgroup.join("inner");
    fs::create_dir(&other).unwrap();
    assert_eq!(loaded.attach_cgroup(&other).unwrap(), Attached::New);
    let id = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&other).unwrap());
    let links = Pinned::open(&room.root).unwrap().links().unwrap();
    assert_eq!(links.len(), 8);
    assert!(links.iter().all(|link| link.place == Place::Cgroup(id)), "{links:?}");
    assert_eq!(output("bpftool", &["cgroup", "list", room.cgroup.to_str().unwrap()]).lines().count(), 0);
    assert_eq!(loaded.detach_cgroup().unwrap(), 8);
    fs::remove_dir(&other).unwrap();
    let error = loaded.attach_cgroup(Path::new("/ebpx-none")).unwrap_err().to_string();
    assert!(error.contains("--cgroup-root"), "{error}");
}

#[test]
fn interfaces_that_go_lose_their_pins_and_those_that_come_get_programs() {
    // D-17.
    let room = Room::new();
    room.veth("v0", "v1");
    let mut loaded = room.load();
    done(loaded.sync_interfaces(&interfaces()));
    let first = interfaces();
    ip(&["link", "del", "v0"]);
    assert!(done(loaded.sync_interfaces(&interfaces())).is_empty());
    assert_eq!(room.hooks(), Vec::<String>::new());

    // The same index again, and the pins of the older interface still there: severed links are made anew.
    room.veth("v0", "v1");
    done(loaded.sync_interfaces(&interfaces()));
    ip(&["link", "del", "v0"]);
    let index = first.iter().find(|link| &*link.name == "v0").unwrap().index + 100;
    ip(&["link", "add", "v0", "index", &index.to_string(), "type", "veth", "peer", "name", "v1"]);
    let links = interfaces();
    assert!(done(loaded.sync_interfaces(&links)).iter().all(|(_, how)| *how == Attached::New));
    ip(&["link", "del", "v0"]);
    ip(&["link", "add", "v0", "index", &index.to_string(), "type", "veth", "peer", "name", "v1"]);
    let mut links = interfaces();
    links.iter_mut().for_each(|link| link.born += 1);
    let again = done(loaded.sync_interfaces(&links));
    assert_eq!(again.iter().find(|(name, _)| name == "v0").unwrap().1, Attached::New);
    let places: Vec<Place> =
        Pinned::open(&room.root).unwrap().links().unwrap().into_iter().map(|l| l.place).collect();
    assert!(places.contains(&Place::Interface(index, Direction::Ingress)), "{places:?}");
    assert!(!places.contains(&Place::Nowhere), "{places:?}");
}

#[test]
fn an_interface_that_is_not_there_is_an_error_by_name_and_carries_nothing() {
    let room = Room::new();
    room.veth("v0", "v1");
    let mut loaded = room.load();
    let mut links = interfaces();
    links.push(Link { index: 4_000, name: "ghost".into(), ..links[0].clone() });
    let results = loaded.sync_interfaces(&links);
    assert_eq!(results.iter().filter(|(_, result)| result.is_ok()).count(), 2);
    let (name, error) = results.iter().find_map(|(n, r)| r.as_ref().err().map(|e| (n, e))).unwrap();
    assert_eq!(&**name, "ghost");
    assert!(error.to_string().contains("tc_egress to interface ghost"), "{error}");
    assert_eq!(room.hooks().len(), 4);
}

#[test]
fn filters_take_the_place_of_links_where_there_is_no_tcx() {
    let room = Room::new();
    room.veth("v0", "v1");
    let mut first = room.try_load(&SMALL, false).unwrap();
    assert!(done(first.sync_interfaces(&interfaces())).iter().all(|(_, how)| *how == Attached::New));
    assert!(done(first.sync_interfaces(&interfaces())).is_empty());
    let shown = || output("tc", &["filter", "show", "dev", "v0", "ingress"]);
    assert!(shown().contains("tc_ingress"), "{}", shown());
    drop(first);
    assert!(shown().contains("tc_ingress"), "a filter outlives the agent");

    let mut second = room.try_load(&SMALL, false).unwrap();
    assert!(done(second.sync_interfaces(&interfaces())).iter().all(|(_, how)| *how == Attached::Updated));
    assert_eq!(shown().matches("handle 0xeb").count(), 1, "{}", shown());
    assert!(room.program_ids().iter().any(|(name, _)| name.ends_with("_egress")));
    drop(second);
    assert_eq!(remove_all(&room.root).unwrap(), Removed { links: 4, maps: ALL_MAPS });
    assert_eq!(shown(), "");
    assert!(!output("tc", &["qdisc", "show", "dev", "v0"]).contains("clsact"));
}

#[test]
fn programs_without_ethernet_header_are_loaded_for_the_first_interface_and_before_those_of_an_older_agent_go()
{
    for tcx in [true, false] {
        let room = Room::new();
        room.veth("v0", "v1");
        let mut links = interfaces();
        let with_header = |loaded: &Loaded, header: bool| {
            let name = if header { "tc_ingress" } else { "tc_ingress_l3" };
            loaded.classifier(name).unwrap().fd().is_ok()
        };
        let mut first = room.try_load(&SMALL, tcx).unwrap();
        done(first.sync_interfaces(&links));
        assert!(with_header(&first, true) && !with_header(&first, false));

        // v0 has come again as another one.
        let v0 = links.iter_mut().find(|link| &*link.name == "v0").unwrap();
        (v0.layer3, v0.born) = (true, v0.born + 1);
        let index = v0.index;
        assert_eq!(done(first.sync_interfaces(&links)).len(), 1);
        let at_v0 = || {
            let links = Pinned::open(&room.root).unwrap().links().unwrap();
            let mut found: Vec<_> = links
                .into_iter()
                .filter(|link| matches!(link.place, Place::Interface(at, _) if at == index))
                .map(|link| (link.program, link.program_id))
                .collect();
            found.sort();
            found
        };
        let names = |found: &[(String, u32)]| found.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        let before = at_v0();
        assert_eq!(names(&before), ["tc_egress_l3", "tc_ingress_l3"]);
        drop(first);

        // The next agent's programs are in the kernel before it looks at an interface, and take the place of these.
        let larger = Capacities { flows: SMALL.flows * 2, ..SMALL };
        let second = room.try_load(&larger, tcx).unwrap();
        assert!(with_header(&second, false));
        assert_eq!(second.changed().unwrap().hooks, 4);
        let after = at_v0();
        assert_eq!(names(&after), names(&before));
        assert!(before.iter().zip(&after).all(|((_, old), (_, new))| old != new), "{before:?} {after:?}");
    }
}

#[test]
fn a_program_at_a_driver_stays_over_a_restart_moves_to_larger_tables_and_goes_when_it_is_not_wanted() {
    let room = Room::new();
    room.veth("v0", "v1");
    let links = interfaces();
    let at = |name: &str| {
        let link = links.iter().find(|link| &*link.name == name).unwrap();
        AtDriver { index: link.index, name: link.name.clone(), born: link.born, mac: link.mac, is_pair: true }
    };
    let (v0, v1) = (at("v0"), at("v1"));
    let devices = || {
        let map = aya::maps::MapData::from_pin(room.root.map(maps::DEVICES)).unwrap();
        let map: aya::maps::HashMap<_, u32, Device> = aya::maps::Map::HashMap(map).try_into().unwrap();
        let mut found: Vec<_> =
            map.iter().map(Result::unwrap).map(|(index, device)| (index, device.mac)).collect();
        found.sort();
        found
    };
    let pinned = || -> Vec<u32> {
        let links = Pinned::open(&room.root).unwrap().links().unwrap();
        links
            .into_iter()
            .filter(|link| matches!(link.place, Place::Driver(_)))
            .map(|link| link.program_id)
            .collect()
    };
    let mut first = room.load();
    // Without the programs that begin flows there is nothing to do for one.
    assert!(first.sync_drivers(std::slice::from_ref(&v0)).is_empty());
    done(first.sync_interfaces(&links));
    // The other end is not ready, and that is said; it is not asked again at once.
    let refused = first.sync_drivers(std::slice::from_ref(&v0));
    assert!(matches!(&refused[..], [(_, Err(AttachError::SendsNothing { .. }))]), "{refused:?}");
    assert!(first.sync_drivers(std::slice::from_ref(&v0)).is_empty());
    assert!(first.refusing().is_empty(), "nobody lacks anything");
    assert_eq!(devices(), [(0, [0; 6]); 0]);
    // Each end makes the other ready.
    let both = [AtDriver { is_pair: false, ..v0.clone() }, AtDriver { is_pair: false, ..v1.clone() }];
    assert_eq!(done(first.sync_drivers(&both)).len(), 2);
    assert!(first.sync_drivers(&both).is_empty());
    let mut known = [(v0.index, v0.mac), (v1.index, v1.mac)];
    known.sort_unstable();
    assert_eq!(devices(), known);
    let before = pinned();
    drop(first);

    let mut second = room.load();
    done(second.sync_interfaces(&links));
    assert!(done(second.sync_drivers(&both)).iter().all(|(_, how)| *how == Attached::Kept));
    assert_eq!(pinned(), before);
    drop(second);

    let larger = Capacities { flows: SMALL.flows * 2, ..SMALL };
    let mut third = room.try_load(&larger, true).unwrap();
    assert_eq!(third.changed().unwrap().hooks, 6);
    assert_eq!(devices(), known, "what is known of drivers is carried over");
    let after = pinned();
    assert!(after.len() == 2 && !after.iter().any(|id| before.contains(id)), "{before:?} {after:?}");
    done(third.sync_interfaces(&links));
    // Not wanted any more, as far as this agent can know: by its pin, and after it has attached it itself.
    assert!(done(third.sync_drivers(&both[..1])).iter().all(|(_, how)| *how == Attached::Kept));
    assert_eq!((pinned().len(), devices().len()), (1, 1));
    assert!(third.sync_drivers(&[]).is_empty());
    assert_eq!((pinned().len(), devices().len()), (0, 0));
    // With its interface it goes, too.
    done(third.sync_drivers(&both[1..]));
    let rest: Vec<_> = links.iter().filter(|link| link.index != v1.index).cloned().collect();
    third.sync_interfaces(&rest);
    assert_eq!((pinned().len(), devices().len()), (0, 0));
    assert_eq!(room.hooks().len(), 2);
}

#[test]
fn a_qdisc_that_others_use_stays() {
    let room = Room::new();
    room.veth("v0", "v1");
    let mut loaded = room.try_load(&SMALL, false).unwrap();
    done(loaded.sync_interfaces(&interfaces()));
    let names = room.root.link_names().unwrap();
    let pin = room.root.link(names.iter().find(|name| name.ends_with("_ingress")).unwrap());
    let pin = pin.to_str().unwrap();
    let added = ["filter", "add", "dev", "v0", "ingress", "prio", "9", "bpf", "da", "object-pinned", pin];
    assert!(Command::new("tc").args(added).status().unwrap().success());
    remove_all(&room.root).unwrap();
    let shown = output("tc", &["filter", "show", "dev", "v0", "ingress"]);
    assert!(shown.contains("pref 9 ") && !shown.contains("handle 0xeb"), "{shown}");
}

#[test]
fn what_the_agent_says_of_itself_is_read_back() {
    let room = Room::new();
    let error = Pinned::open(&room.root).unwrap_err();
    assert!(matches!(error, PinnedError::NoAgent { .. }), "{error}");
    drop(room.load());
    let pinned = Pinned::open(&room.root).unwrap();
    let state = AgentState { pid: 42, version: text("1.2.3"), node: text("n1"), ..pinned.agent().unwrap() };
    pinned.write_agent(&state).unwrap();
    assert_eq!(pinned.agent().unwrap(), state);

    assert_eq!(pinned.warnings().unwrap(), Vec::<String>::new());
    let lines: Vec<String> = (0..70).map(|n| format!("Service default/web{n}: no")).collect();
    pinned.write_warnings(&lines).unwrap();
    assert_eq!(pinned.warnings().unwrap(), lines[6..]);
    pinned.write_warnings(&lines[..1]).unwrap();
    assert_eq!(pinned.warnings().unwrap(), lines[..1]);

    assert!(pinned.reasons().unwrap().len() > 10);
    assert!(pinned.service_stats().unwrap().is_empty());
    let fill = pinned.fill().unwrap();
    assert!(fill.iter().all(|map| map.used == 0 && map.max > 0), "{fill:?}");
}

#[test]
fn cleanup_leaves_nothing_and_can_be_done_twice() {
    let room = Room::new();
    room.veth("v0", "v1");
    let mut loaded = room.load();
    loaded.attach_cgroup(&room.cgroup).unwrap();
    done(loaded.sync_interfaces(&interfaces()));
    assert_eq!(remove_all(&room.root).unwrap(), Removed { links: 12, maps: ALL_MAPS });
    assert_eq!(remove_all(&room.root).unwrap(), Removed::default());
    assert_eq!(room.root.generations().unwrap(), [0; 0]);
    // Detached although the agent still lives.
    assert!(!output("bpftool", &["net", "list"]).contains("tc_ingress"));
    assert_eq!(output("bpftool", &["cgroup", "list", room.cgroup.to_str().unwrap()]).lines().count(), 0);
    drop(loaded);
    assert!(room.directory.path().exists());
}

/// A socket's storage, as the programs write it.
fn remembers(socket: &UdpSocket, vip: &str, end: SocketAddr, connected: bool) -> SocketState {
    let entry = SocketEntry {
        vip: addr(vip),
        vport: Port::new(53),
        addr: end.ip().to_canonical().into(),
        port: Port::new(end.port()),
        backend: 1,
        generation: 1,
        proto: Proto::UDP,
        pad: [0; 3],
    };
    let mut cookie = [0; 8];
    cookie.copy_from_slice(&socket2::SockRef::from(socket).cookie().unwrap().to_ne_bytes());
    let cookie = if connected { u64::from_ne_bytes(cookie) } else { 0 };
    let mut state = SocketState { cookie, ..SocketState::EMPTY };
    state.entries[2] = entry;
    state
}

#[test]
fn a_socket_that_came_through_a_service_is_found_led_on_or_destroyed_and_no_other_one() {
    let room = Room::new();
    let loaded = room.load();
    let map = aya::maps::MapData::from_pin(room.root.map(maps::SOCKETS)).unwrap();
    let mut storage: aya::maps::SkStorage<_, SocketState> =
        aya::maps::Map::SkStorage(map).try_into().unwrap();
    let at = |text: &str| text.parse::<SocketAddr>().unwrap();
    let connected = |to: &str| {
        let socket = UdpSocket::bind(if to.starts_with('[') { "[::]:0" } else { "127.0.0.1:0" }).unwrap();
        socket.connect(to).unwrap();
        socket
    };
    let (v4, v6, mapped) =
        (connected("127.0.0.1:5300"), connected("[::1]:5300"), connected("[::ffff:127.0.0.1]:5300"));
    let mut through = |socket: &UdpSocket, vip, end, connected| {
        storage.insert(socket, remembers(socket, vip, at(end), connected), 0).unwrap();
    };
    through(&v4, "10.96.0.1", "127.0.0.1:5300", true);
    through(&v6, "fd00::1", "[::1]:5300", true);
    through(&mapped, "10.96.0.1", "127.0.0.1:5300", true);
    // Directly; not by a connect; from somewhere else by now.
    let direct = connected("127.0.0.1:5300");
    let unconnected = connected("127.0.0.1:5300");
    through(&unconnected, "10.96.0.1", "127.0.0.1:5300", false);
    let elsewhere = connected("127.0.0.1:5301");
    through(&elsewhere, "10.96.0.1", "127.0.0.1:5300", true);

    let found = Storage::open(&room.root).unwrap().connected().unwrap();
    let mut named: Vec<String> = found.iter().map(|socket| socket.named().to_string()).collect();
    named.sort();
    assert_eq!(named, ["10.96.0.1:53", "10.96.0.1:53", "[fd00::1]:53"]);

    // No hook shows the Service: for whoever looks the process has connected elsewhere.
    let done = lead_on(&found, Path::new("/proc")).unwrap();
    assert_eq!(done, LedOn { left: 3, ..LedOn::default() });
    // No process in sight.
    let done = lead_on(&found, room.directory.path()).unwrap();
    assert_eq!(done, LedOn { destroyed: 3, ..LedOn::default() });
    for socket in [v4, v6, mapped] {
        let error = socket.take_error().unwrap().expect("the process is told");
        assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED));
        assert_eq!(socket.send(b"x").unwrap_err().raw_os_error(), Some(libc::EDESTADDRREQ));
    }
    for socket in [direct, unconnected, elsewhere] {
        assert!(socket.peer_addr().is_ok());
    }
    assert_eq!(Storage::open(&room.root).unwrap().connected().unwrap(), []);
    drop(loaded);
}

/// The flow tables, to be written by hand before the first sweep: after it every other record is free.
struct FlowTables {
    legs: aya::maps::HashMap<aya::maps::MapData, Key, Leg>,
    records: aya::maps::Array<aya::maps::MapData, Flow>,
    secret: Secret,
    used: u32,
}

impl FlowTables {
    fn open(room: &Room) -> Self {
        let map = |name| aya::maps::MapData::from_pin(room.root.map(name)).unwrap();
        let legs = aya::maps::Map::HashMap(map(maps::FLOWS)).try_into().unwrap();
        let records = aya::maps::Map::Array(map(maps::RECORDS)).try_into().unwrap();
        let secret: aya::maps::Array<_, Secret> =
            aya::maps::Map::Array(map(maps::SECRET)).try_into().unwrap();
        Self { legs, records, secret: secret.get(&0, 0).unwrap(), used: 0 }
    }

    /// A UDP flow from this port that was last seen at this time.
    fn add(&mut self, port: u16, old: bool, seen: u64) -> Flow {
        self.add_of(Proto::UDP, port, old, seen, 0)
    }

    /// The same of a protocol and a backend.
    fn add_of(&mut self, proto: Proto, port: u16, old: bool, seen: u64, backend: u32) -> Flow {
        self.used += 1;
        let id = FlowId(self.used.into()).next();
        let (client, vip, endpoint) = (addr("10.0.0.9"), addr("10.96.0.1"), addr("10.244.1.5"));
        let mut flow = Flow {
            id,
            state: State::LIVE,
            old: old.into(),
            legs: 2,
            seen: [seen; 2],
            born: seen,
            backend,
            ..Flow::EMPTY
        };
        for (role, to, service) in [(Role::OUTER, vip, 80), (Role::MIDDLE, endpoint, 8080)] {
            let at = role.index();
            let tuple = Tuple::new(client, Port::new(port), to, Port::new(service), proto);
            flow.near[at] = tuple.write_pair(&mut flow.pairs[at]) as u8;
        }
        for role in [Role::OUTER, Role::MIDDLE] {
            self.enter(&flow, role);
        }
        self.records.set(self.used, flow, 0).unwrap();
        flow
    }

    fn enter(&mut self, flow: &Flow, role: Role) {
        let key = flow.pairs[role.index()].key(|| Some(&self.secret));
        self.legs.insert(key, flow.leg(role).sealed(&key), 0).unwrap();
    }

    fn legs(&self) -> usize {
        self.legs.keys().count()
    }

    fn leads(&self, flow: &Flow) -> bool {
        let there: Vec<bool> = flow.pairs[..2]
            .iter()
            .map(|pair| self.legs.get(&pair.key(|| Some(&self.secret)), 0).is_ok())
            .collect();
        assert_eq!(there[0], there[1], "a flow goes with all its legs");
        there[0]
    }
}

fn flows(room: &Room) -> usize {
    let mut seen = 0;
    Flows::open(&room.root).unwrap().scan(|_| seen += 1).unwrap();
    seen
}

/// Long ago, in any time-out of seconds; and so late that no time-out ever ends.
const LONG_AGO: u64 = 1;
const NEVER: u64 = u64::MAX / 2;

/// T-92, C-12: full tables are looked through to their end, and what has not ended stays.
#[test]
fn among_as_many_flows_as_there_may_be_one_has_ended() {
    let most = Capacities::DEFAULT.flows;
    let room = Room::new();
    drop(room.try_load(&Capacities { flows: most, ..SMALL }, true).unwrap());
    let mut tables = FlowTables::open(&room);
    let lives = tables.add(1, true, NEVER);
    // Of most only the first leg is of account here.
    let vip = Tuple::new(addr("10.0.0.9"), Port::new(1), addr("10.96.0.1"), Port::new(80), Proto::UDP);
    while tables.used < most - 2 {
        tables.used += 1;
        let mut flow = Flow { id: FlowId(tables.used.into()).next(), ..lives };
        let client = std::net::Ipv4Addr::from(0x0b00_0000 + tables.used).into();
        let at = Role::OUTER.index();
        flow.near[at] = Tuple { src: client, ..vip }.write_pair(&mut flow.pairs[at]) as u8;
        tables.enter(&flow, Role::OUTER);
        tables.records.set(tables.used, flow, 0).unwrap();
    }
    let ended = tables.add(7, true, LONG_AGO);
    assert_eq!(flows(&room), most as usize - 1, "the first record is never used");
    let timeouts = Timeouts { udp_stream: 2, ..Timeouts::CONNTRACK };
    let mut sweeper = Sweeper::open(&room.root, timeouts).unwrap();
    assert_eq!(sweeper.all().unwrap(), 1);
    assert!(tables.leads(&lives) && !tables.leads(&ended));
    assert_eq!(flows(&room), most as usize - 2);
    assert_eq!(sweeper.all().unwrap(), 0);
}

#[test]
fn flows_that_are_silent_too_long_go_with_all_their_legs_and_others_stay() {
    // C-12, C-16.
    let room = Room::new();
    drop(room.load());
    let mut tables = FlowTables::open(&room);
    let silent: Vec<Flow> = (1..=100).map(|port| tables.add(port, true, LONG_AGO)).collect();
    let talking: Vec<Flow> = (101..=200).map(|port| tables.add(port, true, NEVER)).collect();
    let silent_young = tables.add(1000, false, LONG_AGO);
    let talking_young = tables.add(1001, false, NEVER);
    let orphan = tables.add(2000, false, LONG_AGO);
    tables.legs.remove(&orphan.pairs[0].key(|| Some(&tables.secret))).unwrap();
    assert_eq!((flows(&room), tables.legs()), (203, 405));

    // Old flows have more time than young ones.
    let timeouts = Timeouts { udp: 2, udp_stream: u32::MAX, ..Timeouts::CONNTRACK };
    let mut sweeper = Sweeper::open(&room.root, timeouts).unwrap();
    assert_eq!(sweeper.all().unwrap(), 2);
    assert_eq!((flows(&room), tables.legs()), (201, 402));
    assert!(!tables.leads(&silent_young) && tables.leads(&silent[0]));
    let timeouts = Timeouts { udp_stream: 2, ..timeouts };
    let mut sweeper = Sweeper::open(&room.root, timeouts).unwrap();
    assert_eq!(sweeper.all().unwrap(), 100);
    assert!(silent.iter().all(|flow| !tables.leads(flow)));
    assert!(talking.iter().chain([&talking_young]).all(|flow| tables.leads(flow)));
    assert_eq!(sweeper.all().unwrap(), 0);

    // The agent and the command line end flows by their ids; who comes twice finds nothing.
    let pinned = Pinned::open(&room.root).unwrap();
    let fill = pinned.fill().unwrap();
    assert_eq!(fill.iter().find(|map| map.name == maps::RECORDS).unwrap().used, 101);
    let ids: Vec<FlowId> = talking.iter().map(|flow| flow.id).collect();
    assert_eq!(pinned.end_flows(&ids[..70]).unwrap(), 70, "more than fit into one question");
    assert_eq!(pinned.end_flows(&ids[70..71]).unwrap(), 1);
    assert_eq!((flows(&room), tables.legs()), (30, 60));
    pinned.end_flows(&ids).unwrap();
    assert_eq!((flows(&room), tables.legs()), (1, 2));
    assert!(tables.leads(&talking_young));
    assert!(now().unwrap() > 0);
}

#[test]
fn a_refused_program_is_named_in_three_lines_with_a_file_for_the_log_and_nothing_is_left_pinned() {
    use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
    let room = Room::new();
    let path = option_env!("PROXY_EBPF_OBJECT")
        .unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/bpf/proxy-ebpf"));
    let mut elf = fs::read(path).expect("run `cargo xtask build-ebpf` first");
    let at = {
        let file = object::File::parse(&*elf).unwrap();
        let program = file.symbols().find(|symbol| symbol.name() == Ok("tc_egress")).unwrap();
        let section = file.section_by_index(program.section_index().unwrap()).unwrap();
        (section.file_range().unwrap().0 + program.address() - section.address()) as usize
    };
    // Its first instruction becomes `exit`, with no value to return.
    elf[at..at + 8].copy_from_slice(&[0x95, 0, 0, 0, 0, 0, 0, 0]);
    let error =
        Loaded::open_object(elf.leak(), &room.root, &Features::probe(), &SMALL, ProgramLog::Off).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("program tc_egress: unreachable insn 1 (") && said.lines().count() == 3, "{said}");
    // Nor does any of it come along with the causes behind it.
    assert!(std::error::Error::source(&error).is_none());
    let LoadError::Refused(refusal) = error else { panic!("{said}") };
    let log = refusal.log.unwrap().unwrap();
    let kept = fs::read_to_string(&log).unwrap();
    fs::remove_file(&log).unwrap();
    assert!(kept.contains("program tc_egress") && kept.contains("unreachable insn 1"), "{kept}");
    assert_eq!(room.root.generations().unwrap(), [0; 0]);
    assert!(!room.root.path().join("new").exists());
    assert!(matches!(
        Loaded::open_object(b"no object", &room.root, &Features::probe(), &SMALL, ProgramLog::Off),
        Err(LoadError::Parse(_))
    ));
}

#[test]
fn a_trial_loads_every_program_and_leaves_nothing() {
    let _room = Room::new();
    let probed = Features::probe();
    assert_ne!(load::trial(&probed).unwrap(), 0);
    // A kernel without any of what is optional takes them, too.
    let bare = Features {
        coarse_clock: false,
        set_retval: false,
        csum_ipv6: false,
        netns_cookie: false,
        ..probed.clone()
    };
    assert_eq!(load::trial(&bare).unwrap(), load::trial(&probed).unwrap());
}

#[test]
fn a_sweep_of_empty_tables_ends() {
    let room = Room::new();
    drop(room.load());
    let mut sweeper = Sweeper::open(&room.root, Timeouts::CONNTRACK).unwrap();
    for _ in 0..3 {
        assert_eq!(sweeper.tick(Duration::from_millis(62)).unwrap(), 0);
    }
    assert_eq!(
        sweeper.flows().end(&[FlowId::NONE, FlowId(7).next()]).unwrap(),
        2,
        "what is gone counts as ended"
    );
    assert_eq!(flows(&room), 0);
}

#[test]
fn a_new_interface_is_heard_of_at_once() {
    // D-17.
    let _room = Room::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (sender, mut changes) = tokio::sync::mpsc::channel(8);
        let watching = tokio::spawn(netlink::watch(sender));
        let mut received = async || {
            loop {
                let next = tokio::time::timeout(Duration::from_secs(10), changes.recv());
                match next.await.expect("a change within ten seconds") {
                    Some(Change::Links(links)) => return links,
                    Some(Change::Routes(_)) => {}
                    other => panic!("{other:?}"),
                }
            }
        };
        let first = received().await;
        assert!(first.iter().all(|link| link.loopback), "{first:?}");
        ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
        ip(&["address", "add", "10.1.2.3/24", "dev", "v0"]);
        loop {
            let links = received().await;
            if let Some(v0) = links.iter().find(|link| &*link.name == "v0")
                && v0.addresses == ["10.1.2.3/24".parse().unwrap()]
            {
                assert!(!v0.up && !v0.layer3 && !v0.loopback);
                break;
            }
        }
        ip(&["link", "del", "v0"]);
        while received().await.iter().any(|link| &*link.name == "v0") {}
        watching.abort();
    });
}

#[test]
fn routes_are_known_before_links_and_followed() {
    // M-13.
    let _room = Room::new();
    for batch in [
        "link add v0 type veth peer name v1",
        "link set v0 up",
        "link set v1 up",
        "address add 192.168.10.11/24 dev v0",
        "address add fd00:10::1/64 dev v0 nodad",
    ] {
        ip(&batch.split(' ').collect::<Vec<_>>());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (sender, mut changes) = tokio::sync::mpsc::channel(8);
        let watching = tokio::spawn(netlink::watch(sender));
        let mut received = async || {
            let next = tokio::time::timeout(Duration::from_secs(10), changes.recv());
            next.await.expect("a change within ten seconds")
        };
        let first = received().await;
        let Some(Change::Routes(mut routes)) = first else { panic!("{first:?}") };
        let has = |routes: &[Route], dst: &str, gateway: Option<&str>, table: u32| {
            let (dst, gateway) = (dst.parse().unwrap(), gateway.map(|ip| ip.parse().unwrap()));
            routes.iter().any(|r| r.dst == dst && r.gateway == gateway && r.table == table && r.link != 0)
        };
        assert!(has(&routes, "192.168.10.0/24", None, 254), "{routes:?}");
        assert!(has(&routes, "fd00:10::/64", None, 254), "{routes:?}");
        ip(&["route", "add", "10.244.2.0/24", "via", "192.168.10.12"]);
        ip(&["route", "add", "default", "via", "192.168.10.1", "dev", "v0", "table", "1000"]);
        ip(&["route", "add", "fd00:244:2::/64", "via", "fd00:10::2"]);
        let mut links_heard = false;
        while !(has(&routes, "10.244.2.0/24", Some("192.168.10.12"), 254)
            && has(&routes, "0.0.0.0/0", Some("192.168.10.1"), 1000)
            && has(&routes, "fd00:244:2::/64", Some("fd00:10::2"), 254))
        {
            match received().await {
                Some(Change::Routes(new)) => routes = new,
                Some(Change::Links(_)) => links_heard = true,
                other => panic!("{other:?}"),
            }
        }
        // With an address its routes go, of which the kernel says nothing.
        ip(&["address", "del", "192.168.10.11/24", "dev", "v0"]);
        while !links_heard || routes.iter().any(|route| route.dst.addr().is_ipv4()) {
            match received().await {
                Some(Change::Routes(new)) => routes = new,
                Some(Change::Links(_)) => links_heard = true,
                other => panic!("{other:?}"),
            }
        }
        watching.abort();
    });
}

/// What the kernel gives a packet of its own to `dst` by a device.
fn kernels_source(dst: &str, device: &str) -> String {
    let output = Command::new("ip").args(["-j", "route", "get", dst, "oif", device]).output().unwrap();
    assert!(output.status.success(), "{dst} by {device}: {}", String::from_utf8_lossy(&output.stderr));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    answer[0]["prefsrc"].as_str().unwrap_or("none").to_owned()
}

#[test]
#[expect(clippy::too_many_lines, reason = "the node is described line by line")]
fn masqueraded_flows_leave_under_the_address_that_the_kernel_would_choose() {
    // M-13, for a node of which nothing is known but its interfaces and routes.
    let _room = Room::new();
    for line in [
        "link add v0 type veth peer name w0",
        "link add v1 type veth peer name w1",
        "link add v2 type veth peer name w2",
        "link add v3 type veth peer name w3",
        "link add x0 type vxlan id 7 dev v0 dstport 4789",
        "address add 203.0.113.11/24 dev v0",
        "address add 192.168.10.11/24 dev v0",
        "address add 192.168.10.12/24 dev v0",
        "address add 192.168.10.200/32 dev v0",
        "address add 10.7.0.1/32 dev v1",
        "address add 10.9.0.5/16 dev v2",
        "address add 10.244.1.0/32 dev x0",
        "address add 2001:db8:7::11/64 dev v0 nodad",
        "address add fd00:10::1/64 dev v0 nodad",
        "address add fd00:11::1/64 dev v2 nodad",
        "address add 2001:db8:8::1/64 dev v2 nodad",
        "link set lo up",
        "link set v0 up",
        "link set w0 up",
        "link set v1 up",
        "link set w1 up",
        "link set v2 up",
        "link set w2 up",
        "link set v3 up",
        "link set w3 up",
        "link set x0 up",
        "route add default via 203.0.113.1",
        "route add default via 10.9.0.1 dev v2 metric 100",
        "route add 10.244.2.0/24 via 192.168.10.13",
        "route add 10.244.3.0/24 via 192.168.10.13 src 192.168.10.12",
        "route add 10.244.4.0/24 via 203.0.113.9",
        "route add 10.244.4.128/25 via 10.9.0.9",
        "route add 10.244.5.0/24 via 10.244.5.0 dev x0 onlink",
        "route add 10.244.6.5/32 dev v3",
        "route add 10.244.7.0/24 via 10.7.0.9 dev v1 onlink",
        "route add 172.16.0.0/16 dev v0",
        "route add 198.18.0.0/16 nexthop via 192.168.10.13 nexthop via 10.9.0.9",
        "route add default via fe80::9 dev v0",
        "route add fd00:244:2::/64 via fd00:10::2",
        "route add fd00:244:3::/64 via 2001:db8:7::2",
        "route add fd00:244:4::/64 via fd00:10::2 src fd00:11::1",
        "route add 2001:db8:9::/64 via fd00:10::2",
        "route add 2001:db8:a::/64 via 2001:db8:8::9",
    ] {
        ip(&line.split(' ').collect::<Vec<_>>());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (links, routes) =
        runtime.block_on(async { (netlink::links().await.unwrap(), netlink::routes().await.unwrap()) });
    let mut world = World::new(Settings::of_node("n1"));
    world.apply(Change::Routes(routes));
    world.apply(Change::Links(links.clone()));
    let masquerade = world.node().routes.into_iter().collect();
    let tables = MemoryTables { masquerade, ..MemoryTables::default() };
    for (device, destinations) in [
        (
            "v0",
            &[
                "8.8.8.8",
                "192.168.10.99",
                "203.0.113.99",
                "10.244.2.9",
                "10.244.3.9",
                "10.244.4.9",
                "172.16.5.5",
                "198.18.0.1",
                "2600::1",
                "fd00:10::99",
                "2001:db8:7::99",
                "fd00:244:2::9",
                "fd00:244:3::9",
                "fd00:244:4::9",
                "2001:db8:9::9",
                "fd77::1",
            ][..],
        ),
        ("v1", &["10.244.7.9"]),
        ("v2", &["8.8.8.8", "10.9.3.3", "10.244.4.129", "198.18.0.1", "2001:db8:8::7", "2001:db8:a::7"]),
        ("v3", &["10.244.6.5"]),
        ("x0", &["10.244.5.9"]),
    ] {
        let index = links.iter().find(|link| &*link.name == device).unwrap().index;
        for dst in destinations {
            let ours =
                tables.masquerade_address(index, &addr(dst)).map_or("none".into(), |ip| ip.to_string());
            assert_eq!(ours, kernels_source(dst, device), "to {dst} by {device}: {:?}", world.node().routes);
        }
    }
}

#[test]
fn one_agent_at_a_time_holds_a_root() {
    let room = Room::new();
    drop(room.load());
    let held = room.root.lock().unwrap();
    assert!(held.is_some());
    assert!(room.root.lock().unwrap().is_none());
    let here = fs::File::open("/proc/thread-self/ns/net").unwrap();
    setns(here, CloneFlags::CLONE_NEWNET).unwrap();
}
#[test]
fn programs_that_log_are_replaced_at_every_start_because_each_agent_has_its_own_log() {
    let room = Room::new();
    let load = || Loaded::open(&room.root, &Features::probe(), &SMALL, ProgramLog::Warn).unwrap();
    assert_eq!(load().attach_cgroup(&room.cgroup).unwrap(), Attached::New);
    let mut second = load();
    assert_eq!(second.attach_cgroup(&room.cgroup).unwrap(), Attached::Updated);
    if let Some(mut logger) = second.logger() {
        logger.drain();
    }
    drop(second);
    assert_eq!(room.load().attach_cgroup(&room.cgroup).unwrap(), Attached::Updated);
    assert_eq!(room.load().attach_cgroup(&room.cgroup).unwrap(), Attached::Kept);
}

#[test]
fn maps_that_were_removed_by_hand_come_back_and_running_programs_move_to_them() {
    let room = Room::new();
    room.load().attach_cgroup(&room.cgroup).unwrap();
    let before = room.program_ids();
    fs::remove_file(room.root.map(maps::FRONTENDS)).unwrap();
    let mut second = room.load();
    assert!(before.iter().zip(&room.program_ids()).all(|((_, old), (_, new))| old != new));
    assert_eq!(second.attach_cgroup(&room.cgroup).unwrap(), Attached::Kept);
}

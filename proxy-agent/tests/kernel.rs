//! The real programs in the real kernel: load, pin, attach, write, read, clean up.
//!
//! Each test has a network namespace, a cgroup and a bpffs of its own, and removes them even when it fails.
//! Root and the BPF object are needed; without them the tests fail and say so.
#![expect(clippy::unwrap_used, reason = "all of this file is tests, helpers included")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{fs, thread};

use nix::sched::{CloneFlags, setns, unshare};
use proxy_agent::datapath::attach::{AttachError, Attached, Direction};
use proxy_agent::datapath::flow::{FlowTable, Sweeper, Timeouts};
use proxy_agent::datapath::kernel::Kernel;
use proxy_agent::datapath::load::{Capacities, LoadError, Loaded, ProgramLog};
use proxy_agent::datapath::pin::BpfRoot;
use proxy_agent::datapath::pinned::{Pinned, PinnedError, Place};
use proxy_agent::datapath::probe::{Features, cgroup2_mount, host_netns_cookie};
use proxy_agent::datapath::remove::{Removed, remove_all};
use proxy_agent::datapath::sockets::destroy_udp;
use proxy_agent::datapath::{Datapath, TableError};
use proxy_agent::model::Link;
use proxy_agent::netlink::{self, Devices};
use proxy_agent::plan::{Actual, Step};
use proxy_agent::source::Change;
use proxy_common::abi::{
    ABI_VERSION, AgentState, Backend, Config, Flow, FlowKey, Frontend, FrontendKey, Hook, Iface, Leg, Run,
    ServiceName, SourceKey, maps, text,
};
use proxy_common::addr::{Addr, Port, Proto};

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
    half_open: 1024,
    fragments: 64,
    affinity: 64,
};

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

    fn program_ids(&self) -> Vec<(String, u32)> {
        let links = Pinned::open(&self.root).unwrap().links().unwrap();
        links.into_iter().map(|link| (link.name, link.program_id)).collect()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = remove_all(&self.root);
        let _ = nix::mount::umount(self.root.path());
        let _ = fs::remove_dir(&self.cgroup);
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
    Backend { addr: addr("10.244.0.7"), port: Port::new(8080), flags: 1, generation: n, service: 1, pad: 0 }
}

#[test]
fn this_kernel_is_probed_without_a_side_effect() {
    let _room = Room::new();
    let features = Features::probe();
    assert!(features.bpf && features.cgroup2.is_some());
    assert_eq!(features, Features::probe());
    assert_eq!(host_netns_cookie(), host_netns_cookie());
    let here = host_netns_cookie();
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    assert!(here == 0 || here != host_netns_cookie(), "another namespace has another cookie");
}

#[test]
fn every_step_comes_back_as_it_was_written_and_goes_when_deleted() {
    let room = Room::new();
    drop(room.load());
    let mut kernel = Kernel::open(&room.root).unwrap();
    assert_eq!(kernel.read().unwrap(), Actual::default());

    let keys = ["10.96.0.1", "fd00::1"].map(|a| FrontendKey::new(addr(a), Port::new(80), Proto::TCP));
    let config = Config { seed: 7, snat_first: 61000, snat_count: 100, ..Config::EMPTY };
    let iface = Iface { snat_v4: addr("10.0.0.1"), snat_v6: addr("fd00::9"), flags: 0, pad: 0 };
    let name = ServiceName {
        namespace: text("default"),
        name: text("web"),
        port: text("http"),
        proto: Proto::TCP,
        family: 4,
        pad: [0; 2],
    };
    let sources = [SourceKey::range(1, addr("10.0.0.0"), 8), SourceKey::range(1, addr("fd00::"), 16)];
    let mut steps = vec![Step::PutConfig(config), Step::PutIface(3, iface), Step::PutService(1, name)];
    // More than one chunk, so that batches are split.
    steps.extend((1..9_000).map(|n| Step::PutBackend(n, backend(n))));
    steps.extend((1..9_000).map(|n| Step::PutSlot(n, n)));
    steps.extend(sources.map(Step::PutSource));
    steps.extend(keys.map(|key| Step::PutFrontend(key, frontend(&key, 1))));
    steps.push(Step::PutAddress(addr("10.96.0.1"), 1));
    kernel.apply(&steps).map_err(|(done, error)| (done, error.to_string())).unwrap();

    let actual = Kernel::open(&room.root).unwrap().read().unwrap();
    assert_eq!(actual.config, config);
    assert_eq!(actual.ifaces, [(3, iface)].into());
    assert_eq!(actual.services, [(1, name)].into());
    assert_eq!(actual.backends, (1..9_000).map(|n| (n, backend(n))).collect());
    assert_eq!(actual.slots, (1..9_000).map(|n| (n, n)).collect());
    assert_eq!(actual.sources, sources.into());
    assert_eq!(actual.frontends, keys.map(|key| (key, frontend(&key, 1))).into());
    assert_eq!(actual.addresses, [(addr("10.96.0.1"), 1)].into());

    let mut back = vec![Step::DeleteIface(3), Step::DeleteService(1), Step::DeleteAddress(addr("10.96.0.1"))];
    back.extend(keys.map(Step::DeleteFrontend));
    back.extend(sources.map(Step::DeleteSource));
    back.extend((1..9_000).map(|n| Step::PutSlot(n, 0)));
    for _ in 0..2 {
        // Once more: applying twice is the same as applying once.
        kernel.apply(&back).map_err(|(done, error)| (done, error.to_string())).unwrap();
    }
    let rest = kernel.read().unwrap();
    let want = Actual { config, backends: actual.backends, ..Actual::default() };
    assert_eq!(rest, want);
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
    assert!(room.root.link_names().unwrap().is_empty());

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
    let again = done(loaded.sync_interfaces(&interfaces()));
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
    assert_eq!(room.root.link_names().unwrap().len(), 4);
}

#[test]
fn filters_take_the_place_of_links_where_there_is_no_tcx() {
    let room = Room::new();
    room.veth("v0", "v1");
    let mut first = room.try_load(&SMALL, false).unwrap();
    assert!(done(first.sync_interfaces(&interfaces())).iter().all(|(_, how)| *how == Attached::New));
    assert!(done(first.sync_interfaces(&interfaces())).iter().all(|(_, how)| *how == Attached::Kept));
    let shown = || output("tc", &["filter", "show", "dev", "v0", "ingress"]);
    assert!(shown().contains("tc_ingress"), "{}", shown());
    drop(first);
    assert!(shown().contains("tc_ingress"), "a filter outlives the agent");

    let mut second = room.try_load(&SMALL, false).unwrap();
    assert!(done(second.sync_interfaces(&interfaces())).iter().all(|(_, how)| *how == Attached::Updated));
    assert_eq!(shown().matches("handle 0xeb").count(), 1, "{}", shown());
    assert!(room.program_ids().iter().any(|(name, _)| name.ends_with("_egress")));
    drop(second);
    assert_eq!(remove_all(&room.root).unwrap(), Removed { links: 4, maps: maps::ALL.len() });
    assert_eq!(shown(), "");
    assert!(!output("tc", &["qdisc", "show", "dev", "v0"]).contains("clsact"));
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
fn pinned_maps_keep_their_size_and_refuse_another_layout() {
    let room = Room::new();
    drop(room.load());
    let larger = Capacities { flows: 2048, ..SMALL };
    let loaded = room.try_load(&larger, true).unwrap();
    assert_eq!(loaded.warnings().len(), 1);
    assert!(loaded.warnings()[0].contains("FLOWS keeps its 1024"), "{:?}", loaded.warnings());
    drop(loaded);

    fs::remove_file(room.root.map(maps::SLOTS)).unwrap();
    fs::rename(room.root.map(maps::AGENT), room.root.map(maps::SLOTS)).unwrap();
    let error = room.try_load(&SMALL, true).unwrap_err().to_string();
    assert!(error.contains("maps/SLOTS") && error.contains("proxy-agent cleanup"), "{error}");
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

    assert_eq!(pinned.complaints().unwrap(), Vec::<String>::new());
    let lines: Vec<String> = (0..70).map(|n| format!("Service default/web{n}: no")).collect();
    pinned.write_complaints(&lines).unwrap();
    assert_eq!(pinned.complaints().unwrap(), lines[6..]);
    pinned.write_complaints(&lines[..1]).unwrap();
    assert_eq!(pinned.complaints().unwrap(), lines[..1]);

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
    assert_eq!(remove_all(&room.root).unwrap(), Removed { links: 12, maps: maps::ALL.len() });
    assert_eq!(remove_all(&room.root).unwrap(), Removed::default());
    assert!(!room.root.path().join(format!("v{ABI_VERSION}")).exists());
    // Detached although the agent still lives.
    assert!(!output("bpftool", &["net", "list"]).contains("tc_ingress"));
    assert_eq!(output("bpftool", &["cgroup", "list", room.cgroup.to_str().unwrap()]).lines().count(), 0);
    drop(loaded);
    assert!(room.directory.path().exists());
    assert!(room.root.maps().ends_with(format!("v{ABI_VERSION}/maps")));
}

#[test]
fn sockets_connected_to_an_endpoint_that_has_gone_are_destroyed_and_no_others() {
    let _room = Room::new();
    let gone: SocketAddr = "127.0.0.1:5300".parse().unwrap();
    let gone_v6: SocketAddr = "[::1]:5300".parse().unwrap();
    let connected = |to: SocketAddr| {
        let socket = UdpSocket::bind(SocketAddr::new(to.ip(), 0)).unwrap();
        socket.connect(to).unwrap();
        socket
    };
    let (first, second) = (connected(gone), connected(gone_v6));
    let other = connected("127.0.0.1:5301".parse().unwrap());
    let mapped = UdpSocket::bind("[::]:0").unwrap();
    mapped.connect("[::ffff:127.0.0.1]:5300").unwrap();

    assert_eq!(destroy_udp(&[]).unwrap(), 0);
    assert_eq!(destroy_udp(&[gone, gone_v6]).unwrap(), 3);
    for socket in [first, second, mapped] {
        let error = socket.take_error().unwrap().expect("the process is told");
        assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED));
        assert!(socket.send(b"x").is_err());
    }
    assert!(other.peer_addr().is_ok());
    assert_eq!(destroy_udp(&[gone, gone_v6]).unwrap(), 0);
}

fn flow_entry(
    table: &mut aya::maps::HashMap<aya::maps::MapData, FlowKey, Flow>,
    n: u16,
    seen: u64,
) -> [FlowKey; 2] {
    let (client, vip, endpoint) = (addr("10.0.0.9"), addr("10.96.0.1"), addr("10.244.1.5"));
    let dnat = FlowKey {
        src: client,
        dst: vip,
        sport: Port::new(n),
        dport: Port::new(80),
        proto: Proto::UDP,
        hook: Hook::INGRESS,
        pad: 0,
    };
    let reply = FlowKey { src: endpoint, dst: client, sport: Port::new(8080), dport: Port::new(n), ..dnat };
    let reply = FlowKey { hook: Hook::EGRESS, ..reply };
    let flow = |addr, port, leg| Flow {
        addr,
        port: Port::new(port),
        other_port: Port(0),
        leg,
        seen: 0,
        pad: 0,
        backend: 1,
        generation: 1,
        service: 1,
        pad2: 0,
        last_seen: seen,
    };
    table.insert(dnat, flow(endpoint, 8080, Leg::DNAT), 0).unwrap();
    table.insert(reply, flow(vip, 80, Leg::UNDNAT), 0).unwrap();
    [dnat, reply]
}

fn flow_table(room: &Room, name: &str) -> aya::maps::HashMap<aya::maps::MapData, FlowKey, Flow> {
    let map = aya::maps::MapData::from_pin(room.root.map(name)).unwrap();
    let map =
        if name == maps::FLOWS { aya::maps::Map::HashMap(map) } else { aya::maps::Map::LruHashMap(map) };
    map.try_into().unwrap()
}

/// T-92, C-12: a full table of a million legs is looked through to its end, and what has not ended stays.
#[test]
fn among_a_million_legs_one_flow_has_ended() {
    const LEGS: usize = 1_000_000;
    let room = Room::new();
    drop(room.try_load(&Capacities { flows: LEGS as u32, ..SMALL }, true).unwrap());
    let mut flows = flow_table(&room, maps::FLOWS);
    let now = 1_000_000_000_000;
    let ended = flow_entry(&mut flows, 7, 1);
    let (mut key, value) = (ended[1], flows.get(&ended[1], 0).unwrap());
    for n in 0..LEGS - 2 {
        key.dst.0[3] = (n as u32).to_be();
        flows.insert(key, Flow { last_seen: now, ..value }, 0).unwrap();
    }
    let mut sweeper = Sweeper::open(&room.root, Timeouts::CONNTRACK).unwrap();
    let swept = sweeper.tick_at(usize::MAX, now).unwrap();
    // The second leg may go with the first, before its own turn.
    assert!(swept.deleted == 2 && swept.seen + 1 >= LEGS, "{swept:?}");
    assert!(ended.iter().all(|key| flows.get(key, 0).is_err()));
    assert_eq!(sweeper.tick_at(usize::MAX, now).unwrap().deleted, 0);
}

#[test]
fn flows_that_are_silent_too_long_go_with_all_their_legs_and_others_stay() {
    // C-12, C-16.
    let room = Room::new();
    drop(room.load());
    let (mut flows, mut half_open) = (flow_table(&room, maps::FLOWS), flow_table(&room, maps::HALF_OPEN));
    let second = 1_000_000_000;
    let now = 1_000 * second;
    for n in 1..=200 {
        flow_entry(&mut flows, n, if n <= 100 { now - 121 * second } else { now - 119 * second });
    }
    flow_entry(&mut half_open, 1000, now - 31 * second);
    flow_entry(&mut half_open, 1001, now - 29 * second);
    let [orphan, reply] = flow_entry(&mut flows, 2000, now - 31 * second);
    flows.remove(&orphan).unwrap();

    let mut sweeper = Sweeper::open(&room.root, Timeouts::CONNTRACK).unwrap();
    let swept = sweeper.tick_at(100, now).unwrap();
    assert_eq!((swept.seen, swept.deleted), (405, 203));
    assert!(flows.get(&reply, 0).is_err(), "a leg without its flow goes");
    assert_eq!(flows.keys().count(), 200);
    assert_eq!(half_open.keys().count(), 2);
    assert_eq!(sweeper.tick_at(100, now).unwrap().deleted, 0);

    let pinned = Pinned::open(&room.root).unwrap();
    let mut seen = 0;
    pinned.flows(&mut |_, _, _| seen += 1).unwrap();
    assert_eq!(seen, 202);
    let fill = pinned.fill().unwrap();
    assert_eq!(fill.iter().find(|map| map.name == maps::FLOWS).unwrap().used, 200);
    let swept = sweeper.purge(|_, legs| legs.legs[0].0.sport.number() > 150).unwrap();
    assert_eq!(swept.deleted, 102);
    let [key, _] = flow_entry(&mut flows, 101, now);
    assert!(pinned.delete_flow(FlowTable::Established, &key).unwrap());
    assert!(!pinned.delete_flow(FlowTable::Established, &key).unwrap());
}

#[test]
fn a_refused_program_is_named_with_the_end_of_the_log_and_nothing_is_left_pinned() {
    use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
    let room = Room::new();
    let path = option_env!("PROXY_EBPF_OBJECT")
        .unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/proxy-ebpf"));
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
        Loaded::open_object(&elf, &room.root, &Features::probe(), &SMALL, ProgramLog::Off).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("program tc_egress") && said.contains("unreachable insn 1"), "{said}");
    assert_eq!(fs::read_dir(room.root.maps()).unwrap().count(), 0);
    assert!(matches!(
        Loaded::open_object(b"no object", &room.root, &Features::probe(), &SMALL, ProgramLog::Off),
        Err(LoadError::Parse(_))
    ));
}

#[test]
fn a_sweep_of_empty_tables_ends() {
    let room = Room::new();
    drop(room.load());
    let mut sweeper = Sweeper::open(&room.root, Timeouts::CONNTRACK).unwrap();
    for _ in 0..3 {
        let swept = sweeper.tick(4).unwrap();
        assert_eq!((swept.seen, swept.deleted), (0, 0));
    }
    assert_eq!(sweeper.purge(|table, _| table == FlowTable::Established).unwrap().seen, 0);
}

#[test]
fn a_new_interface_is_heard_of_at_once() {
    // D-17.
    let _room = Room::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (sender, mut changes) = tokio::sync::mpsc::channel(8);
        let watching = tokio::spawn(netlink::watch(sender));
        let mut heard = async || {
            let next = tokio::time::timeout(Duration::from_secs(10), changes.recv());
            match next.await.expect("a change within ten seconds") {
                Some(Change::Links(links)) => links,
                other => panic!("{other:?}"),
            }
        };
        let first = heard().await;
        assert!(first.iter().all(|link| link.loopback), "{first:?}");
        ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
        ip(&["address", "add", "10.1.2.3/24", "dev", "v0"]);
        loop {
            let links = heard().await;
            if let Some(v0) = links.iter().find(|link| &*link.name == "v0")
                && v0.addresses == ["10.1.2.3/24".parse().unwrap()]
            {
                assert!(!v0.up && !v0.layer3 && !v0.loopback);
                break;
            }
        }
        ip(&["link", "del", "v0"]);
        while heard().await.iter().any(|link| &*link.name == "v0") {}
        watching.abort();
    });
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
    fs::remove_file(room.root.map(maps::FRONTENDS)).unwrap();
    assert_eq!(room.load().attach_cgroup(&room.cgroup).unwrap(), Attached::Updated);
}

//! Tables that become larger, or are met by another agent: everything in them goes on.

use super::*;

/// How large a map is in the newest generation.
fn size(room: &Room, name: &str) -> u32 {
    aya::maps::MapData::from_pin(room.root.map(name)).unwrap().info().unwrap().max_entries()
}

/// Everything that two generations of tables may be told apart by, and that must be the same in both: what the agent writes,
/// which clients are bound, and counters.
type Content = (Actual, Vec<(AffinityKey, Affinity)>, Vec<(proxy_common::abi::Reason, u64)>, u64);

fn content(room: &Room) -> Content {
    let map = aya::maps::MapData::from_pin(room.root.map(maps::AFFINITY)).unwrap();
    let affinity: aya::maps::HashMap<_, AffinityKey, Affinity> =
        aya::maps::Map::LruHashMap(map).try_into().unwrap();
    let pinned = Pinned::open(&room.root).unwrap();
    let chosen = pinned.service_stats().unwrap().values().map(|stats| stats.chosen).sum();
    let mut bound: Vec<_> = affinity.iter().map(Result::unwrap).collect();
    bound.sort();
    (pinned.actual().unwrap(), bound, pinned.reasons().unwrap(), chosen)
}

/// Something in every table that programs or the agent fill.
fn fill(room: &Room) -> Vec<Flow> {
    let key = FrontendKey::new(addr("10.96.0.1"), Port::new(80), Proto::TCP);
    let name = web_http();
    let steps = [
        Step::PutConfig(Box::new(Config { seed: 77, ..Config::EMPTY })),
        Step::PutService(3, name.into()),
        Step::PutBackend(5, backend(5)),
        Step::PutSlot(9, 5),
        Step::PutSource(SourceKey::range(3, addr("10.0.0.0"), 8)),
        Step::PutFrontend(key, frontend(&key, 3)),
        Step::PutAddress(key.addr, 1),
        Step::PutIface(7, Iface::new(1, 7)),
        Step::PutRoute(RouteKey::range(7, addr("10.0.0.0"), 8), addr("10.0.0.1")),
    ];
    Kernel::open(&room.root).unwrap().apply(&steps).unwrap();
    let map = |name| aya::maps::MapData::from_pin(room.root.map(name)).unwrap();
    let mut affinity: aya::maps::HashMap<_, AffinityKey, Affinity> =
        aya::maps::Map::LruHashMap(map(maps::AFFINITY)).try_into().unwrap();
    for n in 1..20 {
        let client = AffinityKey { client: std::net::Ipv4Addr::from(n).into(), service: 3 };
        affinity.insert(client, Affinity { backend: 5, generation: n, last_seen: n.into() }, 0).unwrap();
    }
    let cpus = aya::util::nr_cpus().unwrap();
    fn each<T: aya::Pod>(value: T, cpus: usize) -> aya::maps::PerCpuValues<T> {
        vec![value; cpus].try_into().unwrap()
    }
    let mut reasons: aya::maps::PerCpuArray<_, u64> =
        aya::maps::Map::PerCpuArray(map(maps::REASONS)).try_into().unwrap();
    reasons.set(2, each(1_000_u64 << 32, cpus), 0).unwrap();
    let mut stats: aya::maps::Array<_, proxy_common::abi::ServiceStats> =
        aya::maps::Map::Array(map(maps::SERVICE_STATS)).try_into().unwrap();
    let counted = proxy_common::abi::ServiceStats { chosen: 11, refused: 12, dropped: 13 };
    stats.set(3, counted, 0).unwrap();
    let mut tables = FlowTables::open(room);
    let mut flows: Vec<Flow> = (1..=300).map(|port| tables.add(port, port % 3 != 0, NEVER)).collect();
    // One that is over, whose record is free: nobody is to find it again.
    let gone = flows.swap_remove(17);
    Flows::open(&room.root).unwrap().end(&[gone.id]).unwrap();
    flows
}

/// What flows are, whatever records they have.
fn shown(room: &Room) -> Vec<(Tuple, u8, [u64; 2], u32)> {
    let mut found = Vec::new();
    let see = |flow: &Flow| found.push((flow.pairs[0].tuple(0), flow.old, flow.seen, flow.backend));
    Flows::open(&room.root).unwrap().scan(see).unwrap();
    found.sort();
    found
}

#[test]
fn tables_of_another_size_take_over_everything_that_is_in_them_and_programs_move_to_them() {
    let room = Room::new();
    room.veth("v0", "v1");
    let mut first = room.load();
    first.attach_cgroup(&room.cgroup).unwrap();
    done(first.sync_interfaces(&interfaces()));
    fill(&room);
    let (before, flows_before, programs) = (content(&room), shown(&room), room.program_ids());
    assert_eq!(flows_before.len(), 299);
    drop(first);
    let larger =
        Capacities { flows: 2048, affinity: 128, services: 128, frontends: 65, slots: 10_001, ..SMALL };
    let mut second = room.try_load(&larger, true).unwrap();
    let change = second.changed().unwrap();
    assert_eq!((change.flows, change.no_room, change.hooks), (299, 0, 12), "{change}");
    assert_eq!(room.root.generations().unwrap(), [2]);
    assert_eq!((size(&room, maps::RECORDS), size(&room, maps::AFFINITY)), (2048, 128));
    assert_eq!(content(&room), before);
    assert_eq!(shown(&room), flows_before);
    // Each leg leads to its flow, and a sweep finds nothing wrong.
    assert_eq!(FlowTables::open(&room).legs(), 2 * 299);
    assert_eq!(Sweeper::open(&room.root, Timeouts::CONNTRACK).unwrap().all().unwrap(), 0);
    assert_eq!(shown(&room), flows_before);
    // The young ones can be displaced: they stand in the ring.
    let places = words(&room, maps::RING);
    let ring: Vec<u64> = places.iter().copied().filter(|id| *id != 0).collect();
    assert_eq!(ring.len(), flows_before.iter().filter(|(_, old, ..)| *old == 0).count());
    // But not while there are free places, of which a half comes first.
    let half = larger.places() as usize / 2;
    assert!(places.chunks(larger.places() as usize).all(|ring| ring[..half].iter().all(|id| *id == 0)));
    // Every program has been exchanged, at the hook where it was.
    let now = room.program_ids();
    assert_eq!(now.len(), programs.len());
    for ((name, id), (same, new)) in programs.iter().zip(&now) {
        assert!(name == same && id != new, "{name}: {id} {new}");
    }
    assert!(done(second.sync_interfaces(&interfaces())).iter().all(|(_, how)| *how == Attached::Kept));
    assert_eq!(second.attach_cgroup(&room.cgroup).unwrap(), Attached::Kept);
    drop(second);

    // They become no smaller, and say so.
    let third = room.load();
    assert_eq!((room.root.generations().unwrap(), size(&room, maps::RECORDS)), (vec![2], 2048));
    let warning = third.warnings().iter().find(|line| line.contains("RECORDS")).unwrap();
    assert!(warning.contains("2048 entries (1024 asked for)") && warning.contains("cleanup"), "{warning}");
    assert_eq!(content(&room), before);
}

#[test]
fn filters_are_exchanged_where_there_is_no_tcx() {
    let room = Room::new();
    room.veth("v0", "v1");
    let mut first = room.try_load(&SMALL, false).unwrap();
    done(first.sync_interfaces(&interfaces()));
    drop(first);
    let id = || {
        let shown = output("tc", &["filter", "show", "dev", "v0", "egress"]);
        assert_eq!(shown.matches("handle 0xeb").count(), 1, "{shown}");
        shown.split(" id ").nth(1).and_then(|rest| rest.split(' ').next()).map(ToOwned::to_owned).unwrap()
    };
    let before = id();
    drop(room.try_load(&Capacities { flows: 2048, ..SMALL }, false).unwrap());
    assert_ne!(id(), before);
    assert_eq!(room.root.generations().unwrap(), [2]);
    // The pins are of the programs that run now.
    let map = size(&room, maps::RECORDS);
    assert_eq!(map, 2048);
}

/// Pins the maps of a generation once more, as if nobody had removed them.
fn save(room: &Room) -> Vec<(String, aya::maps::MapData)> {
    let names = fs::read_dir(room.root.maps()).unwrap();
    names
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, aya::maps::MapData::from_pin(entry.path()).unwrap())
        })
        .collect()
}

#[test]
fn what_an_agent_has_left_to_do_that_died_over_a_change_the_next_one_does() {
    let room = Room::new();
    room.veth("v0", "v1");
    // Killed before the new tables were whole.
    let mut first = room.load();
    first.attach_cgroup(&room.cgroup).unwrap();
    done(first.sync_interfaces(&interfaces()));
    fill(&room);
    let saved = save(&room);
    fs::create_dir_all(room.root.path().join("new/maps")).unwrap();
    for (name, map) in &saved {
        let map = aya::maps::MapData::from_id(map.info().unwrap().id()).unwrap();
        map.pin(room.root.path().join("new/maps").join(name)).unwrap();
    }
    let flows_before = shown(&room);
    let larger = Capacities { flows: 2048, ..SMALL };
    drop(room.try_load(&larger, true).unwrap());
    assert!(!room.root.path().join("new").exists());
    assert_eq!((room.root.generations().unwrap(), shown(&room)), (vec![2], flows_before.clone()));

    // Killed when they were whole: the hooks are with the old ones, and a flow begins there.
    let old = room.root.path().join("g1/maps");
    fs::create_dir_all(&old).unwrap();
    for (name, map) in &saved {
        let map = aya::maps::MapData::from_id(map.info().unwrap().id()).unwrap();
        map.pin(old.join(name)).unwrap();
    }
    // It takes the newer programs for somebody else's.
    assert_ne!(first.look(Instant::now() + Duration::from_secs(5)).0.len(), 0);
    let hooks = room.program_ids();
    fs::rename(room.root.path().join("g2"), room.root.path().join("x")).unwrap();
    let mut tables = FlowTables::open(&room);
    tables.used = 900;
    tables.add(5_000, true, NEVER);
    fs::rename(room.root.path().join("x"), room.root.path().join("g2")).unwrap();
    drop(first);
    drop(room.try_load(&larger, true).unwrap());
    assert_eq!(room.root.generations().unwrap(), [2]);
    assert_eq!(
        shown(&room).len(),
        flows_before.len() + 1,
        "the one that has begun is carried over, no other twice"
    );
    assert!(room.program_ids().iter().zip(&hooks).all(|((_, new), (_, old))| new != old));
}

#[test]
fn what_an_agent_before_generations_has_left_goes() {
    let room = Room::new();
    room.root.prepare().unwrap();
    drop(room.load());
    fs::create_dir_all(room.root.path().join("v5/maps")).unwrap();
    fs::create_dir_all(room.root.path().join("v5/links")).unwrap();
    fs::rename(room.root.map(maps::FRAGMENTS), room.root.path().join("v5/maps/FRAGMENTS")).unwrap();
    drop(room.load());
    assert!(!room.root.path().join("v5").exists());
    assert_eq!(fs::read_dir(room.root.maps()).unwrap().count(), ALL_MAPS, "what is missing is made again");
}

#[test]
fn flows_that_have_lost_their_endpoint_are_the_same_ones_in_larger_tables_and_no_other_is_taken_for_one() {
    let room = Room::new();
    drop(room.load());
    let mut tables = FlowTables::open(&room);
    let ended = (1..=40).map(|port| tables.add(port, true, NEVER).id).collect::<Vec<_>>();
    for port in 100..140 {
        tables.add_of(Proto::TCP, port, true, NEVER, 5 + u32::from(port % 2));
    }
    let lose = |flows: &Flows| {
        let lost = flows.lose(|backend, generation| (backend, generation) == (5, 0)).unwrap();
        let port = |id: &FlowId| {
            let flow = flows.lost(*id).unwrap().expect("it is lost");
            flow.pairs[0].tuple(flow.near[0].into()).sport.number()
        };
        let mut ports: Vec<u16> = lost.iter().map(port).collect();
        ports.sort_unstable();
        (lost, ports)
    };
    let flows = Flows::open(&room.root).unwrap();
    // Records in front of them are free now: in other tables they will have others.
    assert_eq!(flows.end(&ended).unwrap(), 40);
    let (before, ports) = lose(&flows);
    assert_eq!(ports, (100..140).step_by(2).collect::<Vec<_>>());
    drop(room.try_load(&Capacities { flows: 2048, ..SMALL }, true).unwrap());
    let flows = Flows::open(&room.root).unwrap();
    let (after, same) = lose(&flows);
    assert!(same == ports && after.iter().all(|id| !before.contains(id)), "{before:?} {after:?}");
    let mut living = Vec::new();
    flows.scan(|flow| living.push(flow.backend)).unwrap();
    assert_eq!(living, [6; 20]);
}

/// What the kernel says that the tables take.
fn taken(room: &Room) -> u64 {
    use std::os::fd::{AsFd as _, AsRawFd as _};
    let each = fs::read_dir(room.root.maps()).unwrap().map(|entry| {
        let map = aya::maps::MapData::from_pin(entry.unwrap().path()).unwrap();
        let fd = map.fd().as_fd().as_raw_fd();
        let facts = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let taken = facts.lines().find_map(|line| line.strip_prefix("memlock:")).unwrap();
        taken.trim().parse::<u64>().unwrap()
    });
    each.sum()
}

#[test]
fn tables_take_about_as_much_memory_as_is_reckoned() {
    let room = Room::new();
    let reckoned = agent_kernel::datapath::tables::memory::bytes;
    drop(room.load());
    let small = taken(&room);
    // What the agent writes takes its memory as it comes; of that there is none yet.
    assert!(small <= reckoned(&SMALL), "{small} of {}", reckoned(&SMALL));
    let sizes = Capacities { flows: 16_384, affinity: 16_384, fragments: 16_384, slots: 65_536, ..SMALL };
    drop(room.try_load(&sizes, true).unwrap());
    let (more, expected) = (taken(&room) - small, reckoned(&sizes) - reckoned(&SMALL));
    assert!((expected * 95 / 100..=expected * 105 / 100).contains(&more), "{more}, not {expected}");
}

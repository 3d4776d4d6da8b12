//! What somebody else does to hooks, pins and tables is found by a look and undone.

use std::time::{Duration, Instant};

use agent_kernel::datapath::attach::look::Repair;
use agent_kernel::datapath::attach::others::{Company, others};
use agent_kernel::datapath::tables::compare::{Comparison, Found};
use aya::programs::{SchedClassifier, TcAttachType};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

use super::*;

/// Looks at everything once: what was found amiss, kind and object. All of it must have been undone.
fn look(loaded: &mut Loaded) -> Vec<(&'static str, String)> {
    let mut found = Vec::new();
    loop {
        let (repairs, ended) = loaded.look(Instant::now());
        found.extend(repairs.into_iter().map(|Repair { what, object, result }| {
            result.unwrap_or_else(|error| panic!("{what} {object}: {error}"));
            (what, object)
        }));
        if ended {
            return found;
        }
    }
}

fn kinds(loaded: &mut Loaded) -> Vec<&'static str> {
    look(loaded).into_iter().map(|(what, _)| what).collect()
}

/// A node of two interfaces with everything attached.
fn attached(room: &Room) -> Loaded {
    room.veth("v0", "v1");
    let mut loaded = room.load();
    loaded.attach_cgroup(&room.cgroup).unwrap();
    done(loaded.sync_interfaces(&interfaces()));
    assert_eq!(kinds(&mut loaded), Vec::<&str>::new(), "what was just attached is as it should be");
    loaded
}

fn bpftool(args: &[&str]) {
    let done = Command::new("bpftool").args(args).output().unwrap();
    assert!(done.status.success(), "bpftool {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// The programs at the hooks of an interface in their order, ingress and egress, as anybody sees them.
fn at_interface(name: &str) -> Vec<(&'static str, u32)> {
    let of = |way, hook| {
        let (_, programs) = SchedClassifier::query_tcx(name, hook).unwrap();
        programs.into_iter().map(move |program| (way, program.id()))
    };
    of("ingress", TcAttachType::Ingress).chain(of("egress", TcAttachType::Egress)).collect()
}

#[test]
fn a_detached_link_is_made_again_and_a_removed_pin_comes_back_to_the_same_link() {
    // Y-20.
    let room = Room::new();
    let mut loaded = attached(&room);
    let (before, names) = (room.program_ids(), room.hooks());
    for name in &names {
        bpftool(&["link", "detach", "pinned", room.root.link(name).to_str().unwrap()]);
    }
    assert_eq!(kinds(&mut loaded), vec!["link"; names.len()]);
    assert_eq!(room.program_ids(), before);
    assert_eq!(look(&mut loaded), []);

    let links = || {
        let shown = output("bpftool", &["-f", "link", "show"]);
        let ours = names.iter().filter(|name| shown.contains(room.root.link(name).to_str().unwrap())).count();
        (ours, at_interface("v0"))
    };
    let attached = links();
    assert_eq!(attached.0, names.len());
    for name in &names {
        fs::remove_file(room.root.link(name)).unwrap();
    }
    assert_eq!(at_interface("v0"), attached.1, "the agent holds what has lost its pin");
    assert_eq!(kinds(&mut loaded), vec!["pin"; names.len()]);
    assert_eq!(links(), attached, "the very same links");
    assert_eq!(room.hooks(), names);
}

/// Commands of `bpf` with which the kernel is asked for what there is, and errors of theirs on a machine without descriptors,
/// files or memory.
const QUESTIONS: [(u64, i32); 4] = [
    (7, libc::EMFILE),   // BPF_OBJ_GET
    (13, libc::ENFILE),  // BPF_PROG_GET_FD_BY_ID
    (15, libc::ENOMEM),  // BPF_OBJ_GET_INFO_BY_FD
    (29, libc::ENOBUFS), // BPF_LINK_UPDATE
];

/// Does something where the kernel answers this command with an error.
fn refused<T: Send>(command: u64, error: i32, act: impl FnOnce() -> T + Send) -> T {
    let is_command = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, command).unwrap();
    let rules = vec![SeccompRule::new(vec![is_command]).unwrap()];
    let filter = SeccompFilter::new(
        [(libc::SYS_bpf, rules)].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(error.cast_unsigned()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let filter: BpfProgram = filter.unwrap().try_into().unwrap();
    // Only the thread that sets it is bound by a filter.
    let act = || {
        apply_filter(&filter).unwrap();
        act()
    };
    thread::scope(|scope| scope.spawn(act).join().unwrap())
}

/// What was refused is done when its pause has passed.
fn tried_again(loaded: &mut Loaded) {
    thread::sleep(Duration::from_millis(600));
    for (name, result) in loaded.retry() {
        assert!(result.is_ok(), "{name}: {result:?}");
    }
}

#[test]
fn what_carries_programs_goes_on_when_the_next_agent_cannot_look_at_it() {
    for (command, error) in QUESTIONS {
        let room = Room::new();
        let mut first = attached(&room);
        // Without its pin, a program would go with the agent.
        // Which program it is does not matter: one that cannot be compared is exchanged.
        let ways = || at_interface("v0").into_iter().map(|(way, _)| way).collect::<Vec<_>>();
        let (hooks, names) = (ways(), room.hooks());
        let found = refused(command, error, || {
            let (repairs, _) = first.look(Instant::now() + Duration::from_secs(10));
            repairs.into_iter().map(|repair| repair.what).collect::<Vec<_>>()
        });
        assert_eq!((ways(), room.hooks()), (hooks.clone(), names.clone()), "{command}: {found:?}");
        drop(first);
        let mut next = room.load();
        // Programs of another object would be exchanged.
        let failed = refused(command, error, || {
            let sockets = next.attach_cgroup(&room.cgroup).is_err();
            let interfaces = next.sync_interfaces(&interfaces());
            usize::from(sockets) + interfaces.iter().filter(|(_, result)| result.is_err()).count()
        });
        assert_eq!((ways(), room.hooks()), (hooks.clone(), names.clone()), "{command}");
        assert_eq!(next.refusing().len(), failed, "{command}");
        tried_again(&mut next);
        assert_eq!((next.refusing(), kinds(&mut next)), (vec![], vec![]), "{command}");
        assert_eq!((ways(), room.hooks()), (hooks, names), "{command}");
    }
}

#[test]
fn a_link_that_has_lost_its_pin_is_held_until_it_can_be_pinned() {
    const OBJ_PIN: u64 = 6;
    let room = Room::new();
    let mut loaded = attached(&room);
    let (hooks, names) = (at_interface("v0"), room.hooks());
    names.iter().for_each(|name| fs::remove_file(room.root.link(name)).unwrap());
    for _ in 0..2 {
        let failed = refused(OBJ_PIN, libc::EIO, || {
            let (repairs, _) = loaded.look(Instant::now() + Duration::from_secs(10));
            repairs.into_iter().filter(|repair| repair.result.is_err()).count()
        });
        assert_eq!(failed, names.len());
        assert_eq!(at_interface("v0"), hooks);
    }
    assert_eq!(kinds(&mut loaded), vec!["pin"; names.len()]);
    assert_eq!((at_interface("v0"), room.hooks()), (hooks, names));
}

#[test]
fn half_an_interface_carries_nothing() {
    const LINK_CREATE: u64 = 28;
    let room = Room::new();
    let mut loaded = attached(&room);
    let (hooks, names) = (at_interface("v0"), room.hooks());
    let egress = names.iter().find(|name| name.ends_with("_egress")).unwrap();
    bpftool(&["link", "detach", "pinned", room.root.link(egress).to_str().unwrap()]);
    let failed = refused(LINK_CREATE, libc::ENOMEM, || {
        let (repairs, _) = loaded.look(Instant::now() + Duration::from_secs(10));
        repairs.into_iter().filter(|repair| repair.result.is_err()).count()
    });
    assert_eq!((failed, room.hooks().len()), (1, names.len() - 2), "it goes on in one direction");
    tried_again(&mut loaded);
    assert_eq!((at_interface("v0").len(), room.hooks()), (hooks.len(), names));
}

#[test]
fn everything_that_was_pinned_comes_back_after_all_of_it_was_removed_or_unmounted() {
    let room = Room::new();
    let mut loaded = attached(&room);
    let (before, hooks) = (room.program_ids(), at_interface("v1"));
    let map = |name| output("bpftool", &["map", "show", "pinned", room.root.map(name).to_str().unwrap()]);
    let flows = map(maps::FLOWS);
    assert!(flows.contains("FLOWS"), "{flows}");
    let away: [&dyn Fn(); 3] = [
        &|| {
            fs::remove_dir_all(room.root.links()).unwrap();
            fs::remove_dir_all(room.root.generation()).unwrap();
        },
        &|| nix::mount::umount2(room.root.path(), nix::mount::MntFlags::MNT_DETACH).unwrap(),
        &|| {
            let none: Option<&str> = None;
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(Some("bpf"), room.root.path(), Some("bpf"), flags, none).unwrap();
        },
    ];
    for (n, take_away) in away.into_iter().enumerate() {
        take_away();
        assert_eq!(at_interface("v1"), hooks, "case {n}: nothing is detached");
        let found = kinds(&mut loaded);
        assert_eq!(found, vec!["pin"; 12 + maps::ALL.len() + 2], "case {n}");
        assert_eq!((room.program_ids(), map(maps::FLOWS)), (before.clone(), flows.clone()), "case {n}");
        assert_eq!(look(&mut loaded), [], "case {n}");
    }
    drop(loaded); // The next agent finds all that it needs.
    drop(room.load());
    nix::mount::umount(room.root.path()).unwrap();
}

#[test]
fn what_has_gone_before_it_was_first_looked_at_comes_back() {
    let room = Room::new();
    let mut loaded = room.load();
    loaded.attach_cgroup(&room.cgroup).unwrap();
    fs::remove_dir_all(room.root.generation()).unwrap();
    assert_eq!(kinds(&mut loaded), vec!["pin"; maps::ALL.len() + 2]);
    assert_eq!(look(&mut loaded), []);
    drop(loaded);
    drop(room.load());
}

#[test]
fn another_map_at_the_place_of_ours_gives_way() {
    let room = Room::new();
    let mut loaded = attached(&room);
    let show =
        || output("bpftool", &["map", "show", "pinned", room.root.map(maps::BACKENDS).to_str().unwrap()]);
    let ours = show();
    let other = room.root.map("other");
    let other = other.to_str().unwrap();
    bpftool(&[
        "map", "create", other, "type", "array", "key", "4", "value", "4", "entries", "1", "name", "x",
    ]);
    fs::rename(other, room.root.map(maps::BACKENDS)).unwrap();
    assert_ne!(show(), ours);
    assert_eq!(look(&mut loaded), [("pin", format!("map {}", maps::BACKENDS))]);
    assert_eq!(show(), ours);
}

#[test]
fn filters_and_their_qdisc_come_back_and_one_of_somebody_else_in_their_place_goes() {
    let room = Room::new();
    room.veth("v0", "v1");
    let mut loaded = room.try_load(&SMALL, false).unwrap();
    done(loaded.sync_interfaces(&interfaces()));
    assert_eq!(look(&mut loaded), []);
    let shown = || {
        ["ingress", "egress"]
            .map(|way| output("tc", &["filter", "show", "dev", "v0", way]).replace("v0 ", ""))
    };
    let before = shown();
    assert!(before[0].contains("tc_ingress") && before[1].contains("tc_egress"), "{before:?}");
    let tc = |args: &[&str]| assert!(Command::new("tc").args(args).status().unwrap().success(), "{args:?}");
    let index = interfaces().iter().find(|link| &*link.name == "v0").unwrap().index;
    let egress = room.root.link(&format!("clsact_{index}_egress"));
    let hurt: [&dyn Fn(); 5] = [
        &|| tc(&["filter", "del", "dev", "v0", "ingress", "prio", "1"]),
        &|| tc(&["filter", "del", "dev", "v0", "egress"]),
        &|| tc(&["qdisc", "del", "dev", "v0", "clsact"]),
        // Another program under our handle.
        &|| {
            let program = egress.to_str().unwrap();
            let place = ["filter", "replace", "dev", "v0", "ingress", "prio", "1", "handle", "0xeb"];
            tc(&[&place[..], &["bpf", "da", "object-pinned", program]].concat());
        },
        &|| fs::remove_file(&egress).unwrap(),
    ];
    for (n, hurt) in hurt.into_iter().enumerate() {
        hurt();
        assert_eq!(look(&mut loaded), [("filter", "filters of interface v0".to_owned())], "case {n}");
        assert_eq!(shown(), before, "case {n}");
        assert_eq!(look(&mut loaded), [], "case {n}");
    }
    assert!(room.root.link_names().unwrap().iter().any(|name| name.ends_with("_qdisc")));
}

#[test]
fn an_interface_that_was_away_or_is_another_one_of_the_same_index_carries_programs_again() {
    let room = Room::new();
    let mut loaded = attached(&room);
    let index = interfaces().iter().find(|link| &*link.name == "v0").unwrap().index;
    ip(&["link", "del", "v0"]);
    ip(&["link", "add", "v0", "index", &index.to_string(), "type", "veth", "peer", "name", "v1"]);
    // Nobody has heard of it yet.
    assert_eq!(at_interface("v0"), []);
    let found = look(&mut loaded);
    let of_v0 = found.iter().filter(|(what, object)| *what == "link" && object.contains("v0"));
    assert_eq!(of_v0.count(), 2, "{found:?}");
    assert_eq!(at_interface("v0").len(), 2);
    // Heard of, it is attached to at once.
    ip(&["link", "del", "v0"]);
    ip(&["link", "add", "v0", "index", &index.to_string(), "type", "veth", "peer", "name", "v1"]);
    let mut links = interfaces();
    links.iter_mut().for_each(|link| link.born += 1);
    done(loaded.sync_interfaces(&links));
    assert_eq!(at_interface("v0").len(), 2);
}

#[test]
fn one_interface_more_costs_nothing_for_those_that_are_there() {
    // D-17.
    let room = Room::new();
    let mut loaded = attached(&room);
    let names = room.hooks();
    // Whoever looked at the others would see that.
    for name in names.iter().filter(|name| name.starts_with("tc_")) {
        fs::remove_file(room.root.link(name)).unwrap();
    }
    room.veth("v2", "v3");
    let new = [("v2".to_owned(), Attached::New), ("v3".to_owned(), Attached::New)];
    assert_eq!(done(loaded.sync_interfaces(&interfaces())), new);
    assert_eq!(room.hooks().iter().filter(|name| names.contains(name)).count(), 8);
    assert_eq!(kinds(&mut loaded), ["pin"; 4]);
}

#[test]
fn what_is_refused_is_tried_again_after_a_pause_and_others_are_not_held_up() {
    let room = Room::new();
    room.veth("v0", "v1");
    let mut loaded = room.load();
    let mut links = interfaces();
    let ghost = Link { index: 4_000, name: "ghost".into(), ..links[0].clone() };
    links.push(ghost);
    let results = loaded.sync_interfaces(&links);
    assert_eq!(results.iter().filter(|(_, result)| result.is_err()).count(), 1);
    assert_eq!(loaded.interfaces(), (2, 0), "one that has just gone is nothing to be told");
    assert!(loaded.retry().is_empty(), "not at once");
    assert!(loaded.sync_interfaces(&links).is_empty(), "nor when something else changes");
    let (begun, mut tries) = (Instant::now(), 0);
    while begun.elapsed() < Duration::from_secs(4) {
        tries += loaded.retry().len();
        thread::sleep(Duration::from_millis(20));
    }
    assert!((2..=3).contains(&tries), "{tries} tries: pauses double from half a second");
    ip(&["link", "add", "ghost", "index", "4000", "type", "veth", "peer", "name", "other"]);
    let begun = Instant::now();
    let results = loop {
        let results = loaded.retry();
        if !results.is_empty() {
            break results;
        }
        assert!(begun.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(20));
    };
    assert!(matches!(&results[..], [(name, Ok(Attached::New))] if name == "interface ghost"), "{results:?}");
    assert_eq!(loaded.interfaces(), (3, 0));
}

/// Compares everything once, whatever it takes, so many entries at a time.
fn compare(comparison: &mut Comparison, kernel: &mut Kernel, actual: &Actual, slice: usize) -> Found {
    let mut all = comparison.settings(kernel, actual).unwrap();
    loop {
        let found = comparison.go_on(kernel, actual, slice).unwrap();
        all.steps.extend(found.steps);
        all.words += found.words;
        if found.ended {
            return all;
        }
    }
}

#[test]
fn every_entry_that_somebody_changes_deletes_or_adds_is_found_with_the_write_that_undoes_it() {
    // Y-20.
    let room = Room::new();
    drop(room.load());
    let mut kernel = Kernel::open(&room.root).unwrap();
    let key = |n: u8| FrontendKey::new(addr(&format!("10.96.0.{n}")), Port::new(80), Proto::TCP);
    let name = web_http();
    let mut wanted = Actual::default();
    let config = Config { seed: 7, ..Config::EMPTY };
    let wide = SourceKey::range(1, addr("10.0.0.0"), 8);
    let narrow = SourceKey::range(1, addr("10.1.0.0"), 16);
    let route = |bits| RouteKey::range(3, addr("10.0.0.0"), bits);
    let mut steps = vec![
        Step::PutConfig(Box::new(config)),
        Step::PutIface(3, Iface::new(0, 3)),
        Step::PutService(1, name.into()),
        Step::PutSource(wide),
        Step::PutSource(narrow),
        Step::PutRoute(route(8), addr("10.0.0.1")),
        Step::PutRoute(route(16), addr("10.0.0.1")),
        Step::PutServicePorts(469, 1 << 14),
        Step::PutAddress(addr("10.96.0.1"), 1),
    ];
    // More than one chunk, a retired one that keeps its generation, and slots that rest.
    steps.extend((1..9_000).map(|n| Step::PutBackend(n, backend(n))));
    steps.push(Step::PutBackend(8, Backend::retired(77)));
    steps.extend((1..9_000).map(|n| Step::PutSlot(n, n)));
    steps.extend((1..40).map(|n| Step::PutFrontend(key(n), frontend(&key(n), 1))));
    kernel.apply(&steps).unwrap();
    steps.iter().for_each(|step| wanted.apply(step));

    let mut comparison = Comparison::open(&room.root).unwrap();
    for slice in [1, 100, 1_000_000] {
        let found = compare(&mut comparison, &mut kernel, &wanted, slice);
        assert_eq!((found.steps, found.words), (Vec::new(), 0), "{slice}");
    }
    // Somebody else: by the same steps, but behind the planner's back.
    let mut other = Kernel::open(&room.root).unwrap();
    let stranger = FrontendKey::new(addr("192.0.2.1"), Port::new(1), Proto::UDP);
    other
        .apply(&[
            Step::PutConfig(Box::new(Config::EMPTY)),
            Step::DeleteIface(3),
            Step::PutIface(9, Iface::new(0, 9)),
            Step::DeleteService(1),
            // Hidden by the wider one for whoever asks.
            Step::DeleteSource(narrow),
            Step::PutSource(SourceKey::range(2, addr("10.0.0.0"), 8)),
            Step::DeleteRoute(route(16)),
            Step::PutRoute(route(8), addr("10.0.0.9")),
            Step::PutServicePorts(469, 1 << 15),
            Step::PutBackend(8_999, Backend::retired(0)),
            Step::PutSlot(8_999, 1),
            Step::PutSlot(5, 0),
            Step::DeleteFrontend(key(1)),
            Step::PutFrontend(key(2), Frontend { service: 9, ..frontend(&key(2), 1) }),
            Step::PutFrontend(stranger, frontend(&stranger, 4)),
            Step::DeleteAddress(addr("10.96.0.1")),
            Step::PutAddress(addr("192.0.2.1"), 3),
        ])
        .unwrap();
    let found = compare(&mut comparison, &mut kernel, &wanted, 500);
    let lines: Vec<String> = found.steps.iter().map(ToString::to_string).collect();
    assert_eq!(found.steps.len(), 17, "{lines:#?}");
    // The bit of a stranger's address.
    assert_eq!(found.words, 1);
    kernel.apply(&found.steps).unwrap();
    assert_eq!(kernel.actual().unwrap(), wanted);
    let again = compare(&mut comparison, &mut kernel, &wanted, 500);
    assert_eq!((again.steps, again.words), (Vec::new(), 0));
    assert_eq!(address_bits(&room), bits(&[addr("10.96.0.1")]));
}

#[test]
fn the_random_numbers_that_keys_are_made_with_stay_what_they_are() {
    let room = Room::new();
    drop(room.load());
    let mut kernel = Kernel::open(&room.root).unwrap();
    let mut comparison = Comparison::open(&room.root).unwrap();
    let pin = room.root.map(maps::SECRET);
    let dump = || output("bpftool", &["map", "dump", "pinned", pin.to_str().unwrap()]);
    let before = dump();
    let zeros = ["0"; 144];
    bpftool(
        &[
            &["map", "update", "pinned", pin.to_str().unwrap(), "key", "0", "0", "0", "0", "value"][..],
            &zeros,
        ]
        .concat(),
    );
    assert_ne!(dump(), before);
    assert_eq!(compare(&mut comparison, &mut kernel, &Actual::default(), 1_000_000).words, 1);
    assert_eq!(dump(), before);
}

#[test]
fn a_pause_that_somebody_else_has_begun_is_ended() {
    let room = Room::new();
    drop(room.load());
    let mut kernel = Kernel::open(&room.root).unwrap();
    let pin = room.root.map(maps::PAUSE);
    let set = |value: [&str; 8]| {
        let key = ["map", "update", "pinned", pin.to_str().unwrap(), "key", "0", "0", "0", "0", "value"];
        bpftool(&[&key[..], &value].concat());
    };
    let dump = || output("bpftool", &["map", "dump", "pinned", pin.to_str().unwrap()]);
    let (never, far) = (dump(), ["255", "255", "255", "255", "255", "255", "255", "127"]);
    // What an agent that died has left is nobody else's.
    set(far);
    let mut comparison = Comparison::open(&room.root).unwrap();
    assert_eq!(dump(), never);
    let mut words = || compare(&mut comparison, &mut kernel, &Actual::default(), 1_000_000).words;
    assert_eq!(words(), 0);
    set(far);
    assert_eq!(words(), 1);
    assert_eq!(dump(), never);
    // One that is over stops nobody.
    set(["1", "0", "0", "0", "0", "0", "0", "0"]);
    assert_eq!(words(), 0);
}

#[test]
fn programs_of_others_are_named_in_their_order_at_interfaces_and_in_cgroups() {
    let room = Room::new();
    let loaded = attached(&room);
    assert_eq!(others(&room.root).company, []);
    // Another agent's programs are others', too: at ingress it comes first, at egress last, as it wants to.
    let (second, inner) = (tempfile::tempdir().unwrap(), room.cgroup.join("inner"));
    fs::create_dir(&inner).unwrap();
    let root = BpfRoot::new(second.path().join("bpf"));
    let mut other = Loaded::open(&root, &Features::probe(), &SMALL, ProgramLog::Off).unwrap();
    let links: Vec<Link> = interfaces().into_iter().filter(|link| &*link.name == "v0").collect();
    done(other.sync_interfaces(&links));
    other.attach_cgroup(&inner).unwrap();
    let own = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    let company = |hook, before: &[&str], after: &[&str], place: &str| Company {
        hook,
        before: own(before),
        after: own(after),
        places: own(&[place]),
    };
    let found = others(&room.root);
    let inner = inner.to_str().unwrap();
    assert!(found.company.contains(&company("ingress", &["tc_ingress"], &[], "v0")), "{found:?}");
    assert!(found.company.contains(&company("egress", &[], &["tc_egress"], "v0")), "{found:?}");
    assert!(found.company.contains(&company("connect4", &["connect4"], &[], inner)), "{found:?}");
    assert_eq!((found.company.len(), found.unknown.len()), (10, 0), "{found:?}");
    remove_all(&root).unwrap();
    // The other agent's bpffs, which it has mounted there.
    nix::mount::umount2(root.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    // A filter comes after what is attached by a link, whatever its priority.
    let program = room.root.generation().join("flows");
    let tc = |args: &[&str]| assert!(Command::new("tc").args(args).status().unwrap().success(), "{args:?}");
    tc(&["qdisc", "add", "dev", "v1", "clsact"]);
    let place = ["filter", "add", "dev", "v1", "ingress", "prio", "3"];
    tc(&[&place[..], &["bpf", "da", "object-pinned", program.to_str().unwrap()]].concat());
    let found = others(&room.root).company;
    assert!(
        matches!(&found[..], [Company { hook: "ingress", before, after, places }]
            if before.is_empty() && after[0].contains("priority 3") && places[..] == ["v1"]),
        "{found:?}"
    );
    drop(loaded);
}

//! Nanoseconds a packet in the real programs, over an empty program, by `BPF_PROG_TEST_RUN`.
//!
//! A run finds the packet as the one before has left it, so what rewrites a packet is measured on a ring: the address
//! that is written makes the packet one of the next flow, the last flow leads back to the first. Every run is a
//! hit with a real rewrite, and over many flows every look-up meets another entry. First packets are made by a program
//! before the one that is measured, whose own time is taken off.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use agent_kernel::datapath::load::OBJECT;
use agent_kernel::datapath::probe::Features;
use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, MapData};
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader, Pod};
use proxy_common::abi::{
    Backend, Config, Flow, FlowId, Frontend, FrontendKey, Leg, PortRange, Role, Run, Secret, State, Timeouts,
    Tuple, address, ask, backend, capacity, frontend, maps,
};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_tests::packet::{Packet, TcpFlags};

use crate::figure::{Figures, progress};
use crate::raw;

/// Runs of a measurement.
const REPEAT: u32 = 100_000;
/// Flows and Services in the large cases.
const MANY: u32 = 10_000;
/// Floors of parse, one hash look-up and rewrite, measured with hand-written programs on this kind of kernel over an
/// empty program: 28-43 ns with one flow, 53-69 ns over 10,000 flows; 1,075 ns with two insertions into LRU maps for
/// a new flow. What is held against them is twice their upper end.
const TWICE_FLOOR_ONE: f64 = 2.0 * 43.0;
const TWICE_FLOOR_MANY: f64 = 2.0 * 69.0;
const TWICE_FLOOR_NEW: f64 = 2.0 * 1075.0;

/// Records for first packets; those of the rings stand behind them.
const FRESH: u32 = 20 * ask::MOST * 2;

/// What a program returns that lets the packet go on (TCX_NEXT).
const NEXT: u32 = u32::MAX;

struct Case {
    name: &'static str,
    egress: bool,
    packet: Vec<u8>,
    repeat: u32,
    /// Each packet is another one's first.
    fresh: bool,
    limit: Option<f64>,
    /// How the packet has to come out: same or changed.
    changes: bool,
}

pub(crate) fn measure(figures: &mut Figures, rounds: usize) -> Result<()> {
    progress("packet: programs on synthetic packets");
    let mut ebpf = load()?;
    fill_tables(&mut ebpf)?;
    let empty = raw::load_empty().context("loading an empty program")?;
    let [feeder, feeder_alone, _array] =
        raw::load_feeders(program(&ebpf, "tc_ingress")?).context("loading a program that makes packets")?;
    let [wiper, wiper_alone, _other_array] =
        raw::load_wipers(program(&ebpf, "tc_egress")?).context("loading a program that wipes marks")?;
    let cases = cases();
    let mut all = vec![Vec::new(); cases.len()];
    // Two rounds more than counted: the first ones meet cold caches.
    for round in 0..rounds.max(3) + 2 {
        let nothing =
            raw::test_run(empty.as_fd(), &cases[0].packet, REPEAT).context("running an empty program")?;
        for (case, times) in cases.iter().zip(&mut all) {
            let (measured, nothing) = if case.fresh {
                sweep(&ebpf)?;
                let alone = raw::test_run(feeder_alone.as_fd(), &case.packet, case.repeat)?;
                (feeder.as_fd(), alone.nanoseconds)
            } else if case.egress {
                let alone = raw::test_run(wiper_alone.as_fd(), &case.packet, case.repeat)?;
                (wiper.as_fd(), alone.nanoseconds)
            } else {
                (program(&ebpf, "tc_ingress")?, nothing.nanoseconds)
            };
            let time = run(measured, case).with_context(|| case.name)?;
            if round >= 2 {
                times.push((time - nothing).max(0.0));
            }
        }
    }
    let opened = sweep(&ebpf)?;
    ensure!(opened == MANY, "{opened} of {MANY} first packets have opened a flow");
    for (case, times) in cases.iter().zip(&all) {
        match case.limit {
            Some(limit) => {
                figures.against(format!("packet: {} vs twice the floor", case.name), "ns", times, limit);
            }
            None => figures.value(format!("packet: {}", case.name), "ns", times),
        }
    }
    Ok(())
}

/// Ends all flows that first packets have opened, and makes records free; how many flows there were.
fn sweep(ebpf: &Ebpf) -> Result<u32> {
    let mut ended = 0;
    // The clock of the programs goes in steps.
    std::thread::sleep(Duration::from_millis(20));
    for from in (0..FRESH).step_by(ask::MOST as usize) {
        // Whoever has been silent for more than no time is over.
        let mut question = vec![0; ask::BODY + size_of::<Timeouts>()];
        let words = [ask::SWEEP, from, ask::MOST].map(u32::to_ne_bytes).concat();
        question[ask::OFFSET..][..words.len()].copy_from_slice(&words);
        ended += raw::test_run(program(ebpf, "flows")?, &question, 1).context("ending flows")?.returned;
    }
    Ok(ended)
}

fn run(program: BorrowedFd<'_>, case: &Case) -> Result<f64> {
    // An odd number of steps round a ring never ends where it began.
    let run = raw::test_run(program, &case.packet, if case.fresh { case.repeat } else { case.repeat - 1 })?;
    ensure!(
        run.returned == NEXT,
        "the program returned {} instead of letting the packet go on",
        run.returned
    );
    ensure!(
        (run.packet != case.packet) == case.changes,
        "the packet was{} rewritten",
        if case.changes { " not" } else { "" }
    );
    Ok(run.nanoseconds)
}

fn cases() -> Vec<Case> {
    let established = |name, ring, egress, limit| {
        let packet = if egress {
            tcp(ring_addr(ring, 0), client(true))
        } else {
            tcp(client(false), ring_addr(ring, 0))
        };
        Case { name, egress, packet, repeat: REPEAT, fresh: false, limit: Some(limit), changes: true }
    };
    let other = |name, egress| {
        let packet = tcp(socket([172, 16, 0, 1], 4000), socket([172, 16, 0, 2], 80));
        Case {
            name,
            egress,
            packet,
            repeat: REPEAT,
            fresh: false,
            limit: Some(TWICE_FLOOR_ONE),
            changes: false,
        }
    };
    vec![
        established("established TCP flow, client to endpoint, 1 flow", Ring::Two, false, TWICE_FLOOR_ONE),
        established("established TCP flow, endpoint to client, 1 flow", Ring::Two, true, TWICE_FLOOR_ONE),
        // Its checksum covers no addresses: what is missing here is what updating one costs.
        Case {
            packet: Packet::sctp(client(false), ring_addr(Ring::Two, 0)).payload(&[0; 64]).build(),
            limit: None,
            ..established("established SCTP flow, no checksum to update, 1 flow", Ring::Two, false, 0.0)
        },
        established(
            "established TCP flow, client to endpoint, 10,000 flows",
            Ring::Many,
            false,
            TWICE_FLOOR_MANY,
        ),
        established(
            "established TCP flow, endpoint to client, 10,000 flows",
            Ring::Many,
            true,
            TWICE_FLOOR_MANY,
        ),
        other("packet that is no Service's, ingress", false),
        other("packet that is no Service's, egress", true),
        Case {
            name: "new TCP flow, 10,000 Services",
            egress: false,
            packet: syn(),
            repeat: MANY,
            fresh: true,
            limit: Some(TWICE_FLOOR_NEW),
            changes: true,
        },
    ]
}

/// The rings of flows. Each leads to the next station, whose own flow begins there.
#[derive(Clone, Copy)]
enum Ring {
    Two,
    Many,
}

impl Ring {
    fn len(self) -> u32 {
        match self {
            Self::Two => 2,
            Self::Many => MANY,
        }
    }
}

/// Station `n` of a ring; the order of the addresses is not the order of the ring.
fn ring_addr(ring: Ring, n: u32) -> SocketAddr {
    let shuffled = (n % ring.len()) * 7919 % ring.len();
    let [_, _, high, low] = shuffled.to_be_bytes();
    match ring {
        Ring::Two => socket([10, 1, high, low], 80),
        Ring::Many => socket([10, 2, high, low], 80),
    }
}

/// Service `n`, and its only endpoint.
fn service_addr(n: u32) -> [SocketAddr; 2] {
    let [_, _, high, low] = n.to_be_bytes();
    [socket([10, 3, high, low], 80), socket([10, 4, high, low], 80)]
}

/// Those who ask, and those who are answered.
fn client(answered: bool) -> SocketAddr {
    socket([10, 244, 1, 11], 40_000 + u16::from(answered))
}

fn socket(address: [u8; 4], port: u16) -> SocketAddr {
    (Ipv4Addr::from(address), port).into()
}

fn tcp(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    Packet::tcp(from, to, TcpFlags::ACK).payload(&[0; 64]).build()
}

fn syn() -> Vec<u8> {
    let [service, _] = service_addr(0);
    Packet::tcp(socket([10, 244, 1, 12], 40_000), service, TcpFlags::SYN).identification(0).build()
}

/// The embedded programs and maps of their default sizes, not pinned.
fn load() -> Result<Ebpf> {
    ensure!(!OBJECT.is_empty(), "no BPF object inside: run `cargo xtask build-ebpf`, then build again");
    let (bits, quiet) = (Features::probe().bits(), 0_u8);
    let cpus = u32::try_from(aya::util::nr_cpus().map_or(1, |n| n))?;
    let mut ebpf = EbpfLoader::new()
        .override_global("FEATURES", &bits, false)
        .override_global("CPUS", &cpus, false)
        .map_max_entries(maps::RING, capacity::RING as u32 * cpus)
        .override_global("AYA_LOG_LEVEL", &quiet, false)
        .load(OBJECT)
        .context("loading the BPF object")?;
    for name in ["tc_ingress", "tc_egress", "flows"] {
        let program =
            ebpf.program_mut(name).with_context(|| format!("the BPF object has no program {name}"))?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load().with_context(|| format!("loading {name}"))?;
    }
    Ok(ebpf)
}

fn program<'e>(ebpf: &'e Ebpf, name: &str) -> Result<BorrowedFd<'e>> {
    let program = ebpf.program(name).with_context(|| format!("the BPF object has no program {name}"))?;
    let program: &SchedClassifier = program.try_into()?;
    Ok(program.fd()?.as_fd())
}

fn hash<'e, K: Pod, V: Pod>(ebpf: &'e mut Ebpf, name: &str) -> Result<HashMap<&'e mut MapData, K, V>> {
    let map = ebpf.map_mut(name).with_context(|| format!("the BPF object has no map {name}"))?;
    map.try_into().with_context(|| format!("opening the map {name}"))
}

fn array<'e, V: Pod>(ebpf: &'e mut Ebpf, name: &str) -> Result<Array<&'e mut MapData, V>> {
    let map = ebpf.map_mut(name).with_context(|| format!("the BPF object has no map {name}"))?;
    map.try_into().with_context(|| format!("opening the map {name}"))
}

fn fill_tables(ebpf: &mut Ebpf) -> Result<()> {
    let config =
        Config { seed: 7, ..Config::EMPTY }.with_snat_ports(&[PortRange { first: 61_000, count: 1_000 }]);
    array(ebpf, maps::CONFIG)?.set(0, config, 0)?;
    let mut first = FRESH;
    for ring in [Ring::Two, Ring::Many] {
        let kinds: &[_] = match ring {
            Ring::Two => &[(Role::OUTER, Proto::TCP), (Role::MIDDLE, Proto::TCP), (Role::OUTER, Proto::SCTP)],
            Ring::Many => &[(Role::OUTER, Proto::TCP), (Role::MIDDLE, Proto::TCP)],
        };
        for n in 0..ring.len() {
            for (kind, (role, proto)) in (0..).zip(kinds) {
                // The records of a ring stand together, as those of flows do that began one after the other.
                let index = first + kind * ring.len() + n;
                let id = FlowId(index.into()).next();
                let (flow, leg) = flow(id, *role, *proto, ring_addr(ring, n), ring_addr(ring, n + 1));
                // The keys of IPv4 know no secret.
                let key = flow.pairs[role.index()].key(|| Some(&Secret::NONE));
                hash(ebpf, maps::FLOWS)?.insert(key, leg.sealed(&key), 0)?;
                array(ebpf, maps::RECORDS)?.set(index, flow, 0)?;
            }
        }
        first += kinds.len() as u32 * ring.len();
    }
    fill_services(ebpf)
}

fn fill_services(ebpf: &mut Ebpf) -> Result<()> {
    let mut bits = vec![0_u64; capacity::ADDRESS_BITS];
    let mut endpoint_bits = vec![0_u64; capacity::ENDPOINT_BITS];
    // Packets are counted from one.
    for id in 1..=MANY {
        let [here, next] = service_addr(id);
        let key = FrontendKey::new(here.ip().into(), Port::new(here.port()), Proto::TCP);
        let run = Run { first: id, count: 1 };
        let value = Frontend {
            service: id,
            cluster: run,
            local: Run::EMPTY,
            flags: frontend::INTERNAL | frontend::ANY,
            affinity_secs: 0,
            seal: 0,
        };
        let endpoint = Backend {
            addr: next.ip().into(),
            port: Port::new(next.port()),
            flags: backend::IN_CLUSTER,
            generation: 1,
            service: id,
            pad: 0,
        };
        array(ebpf, maps::BACKENDS)?.set(id, endpoint, 0)?;
        array(ebpf, maps::SLOTS)?.set(id, id, 0)?;
        hash(ebpf, maps::FRONTENDS)?.insert(key, value.sealed(&key), 0)?;
        let addr = Addr::from(here.ip());
        hash(ebpf, maps::ADDRESSES)?.insert(addr, address::CLUSTER_IP, 0)?;
        for (bits, addr) in [(&mut bits, addr), (&mut endpoint_bits, endpoint.addr)] {
            bits[addr.place() as usize / 64] |= 1 << (addr.place() % 64);
        }
    }
    for (map, bits) in [(maps::ADDRESS_BITS, bits), (maps::ENDPOINT_BITS, endpoint_bits)] {
        for (word, bits) in (0..).zip(bits) {
            array(ebpf, map)?.set(word, bits, 0)?;
        }
    }
    Ok(())
}

/// An established flow of which only one leg is there: from `here` it leads to `next`, where another one begins.
fn flow(id: FlowId, role: Role, proto: Proto, here: SocketAddr, next: SocketAddr) -> (Flow, Leg) {
    let client = client(role == Role::MIDDLE);
    let tuple = |to: SocketAddr| {
        let port = |end: SocketAddr| Port::new(end.port());
        Tuple::new(client.ip().into(), port(client), to.ip().into(), port(to), proto)
    };
    // Nobody ever looks after its legs.
    let (seen, checked) = ([1; 2], i64::MAX as u64);
    let mut flow = Flow { id, state: State::LIVE, old: 1, legs: 2, seen, checked, ..Flow::EMPTY };
    for (end, place) in [(here, role), (next, Role(role.0 ^ 1))] {
        flow.near[place.index()] = tuple(end).write_pair(&mut flow.pairs[place.index()]) as u8;
    }
    (flow, flow.leg(role))
}

//! Nanoseconds a packet in the real programs, over an empty program, by `BPF_PROG_TEST_RUN`.
//!
//! A run finds the packet as the one before has left it, so what rewrites a packet is measured on a ring: the address
//! that is written makes the packet one of the next flow, the last flow leads back to the first. Every run is a
//! hit with a real rewrite, and over many flows every look-up meets another entry.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, MapData};
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader, Pod};
use proxy_agent::datapath::load::OBJECT;
use proxy_agent::datapath::probe::Features;
use proxy_common::abi::{
    Backend, Config, Flow, FlowKey, Frontend, FrontendKey, Hook, Leg, Run, address, backend, frontend, maps,
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

/// What a program returns that lets the packet go on (TCX_NEXT).
const NEXT: u32 = u32::MAX;

struct Case {
    name: &'static str,
    egress: bool,
    packet: Vec<u8>,
    repeat: u32,
    /// Each round is run from a client port of its own: for flows that must be new.
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
    let cases = cases();
    let mut all = vec![Vec::new(); cases.len()];
    // Two rounds more than counted: the first ones meet cold caches.
    for round in 0..rounds.max(3) + 2 {
        let nothing =
            raw::test_run(empty.as_fd(), &cases[0].packet, REPEAT).context("running an empty program")?;
        for (case, times) in cases.iter().zip(&mut all) {
            let name = if case.egress { "tc_egress" } else { "tc_ingress" };
            let time = run(program(&ebpf, name)?, case, round).with_context(|| case.name)?;
            if round >= 2 {
                times.push((time - nothing.nanoseconds).max(0.0));
            }
        }
    }
    for (case, times) in cases.iter().zip(&all) {
        match case.limit {
            Some(limit) => {
                figures.against(format!("packet: {} vs twice the floor", case.name), "ns", times, limit)
            }
            None => figures.value(format!("packet: {}", case.name), "ns", times),
        }
    }
    Ok(())
}

fn run(program: BorrowedFd<'_>, case: &Case, round: usize) -> Result<f64> {
    let mut packet = case.packet.clone();
    if case.fresh {
        packet = syn(u16::try_from(10_000 + round).context("too many rounds")?);
    }
    // An odd number of steps round a ring never ends where it began.
    let run = raw::test_run(program, &packet, case.repeat - 1)?;
    ensure!(
        run.returned == NEXT,
        "the program returned {} instead of letting the packet go on",
        run.returned
    );
    ensure!(
        (run.packet != packet) == case.changes,
        "the packet was{} rewritten",
        if case.changes { " not" } else { "" }
    );
    Ok(run.nanoseconds)
}

fn cases() -> Vec<Case> {
    let established = |name, ring, egress, limit| {
        let packet =
            if egress { tcp(ring_addr(ring, 0), client()) } else { tcp(client(), ring_addr(ring, 0)) };
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
        // Its checksum covers no addresses: what is missing here is what mending one costs.
        Case {
            packet: Packet::sctp(client(), ring_addr(Ring::Two, 0)).payload(&[0; 64]).build(),
            limit: None,
            ..established("established SCTP flow, no checksum to mend, 1 flow", Ring::Two, false, 0.0)
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
            packet: syn(9_999),
            repeat: MANY,
            fresh: true,
            limit: Some(TWICE_FLOOR_NEW),
            changes: true,
        },
    ]
}

/// The rings of flows. Two entries are one flow and its way back, so that there is something to rewrite each time.
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

/// Service `n`, whose only endpoint is Service `n + 1`.
fn service_addr(n: u32) -> SocketAddr {
    let [_, _, high, low] = ((n % MANY) * 7919 % MANY).to_be_bytes();
    socket([10, 3, high, low], 80)
}

fn client() -> SocketAddr {
    socket([10, 244, 1, 11], 40_000)
}

fn socket(address: [u8; 4], port: u16) -> SocketAddr {
    (Ipv4Addr::from(address), port).into()
}

fn tcp(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    Packet::tcp(from, to, TcpFlags::ACK).payload(&[0; 64]).build()
}

fn syn(port: u16) -> Vec<u8> {
    Packet::tcp(socket([10, 244, 1, 12], port), service_addr(0), TcpFlags::SYN).build()
}

/// The embedded programs and maps of their default sizes, not pinned.
fn load() -> Result<Ebpf> {
    ensure!(!OBJECT.is_empty(), "no BPF object inside: run `cargo xtask build-ebpf`, then build again");
    let (bits, quiet) = (Features::probe().bits(), 0u8);
    let mut ebpf = EbpfLoader::new()
        .override_global("FEATURES", &bits, false)
        .override_global("AYA_LOG_LEVEL", &quiet, false)
        .load(OBJECT)
        .context("loading the BPF object")?;
    for name in ["tc_ingress", "tc_egress"] {
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
    let config = Config { seed: 7, snat_first: 61_000, snat_count: 1_000, ..Config::EMPTY };
    array(ebpf, maps::CONFIG)?.set(0, config, 0)?;
    let mut flows = hash(ebpf, maps::FLOWS)?;
    for ring in [Ring::Two, Ring::Many] {
        for n in 0..ring.len() {
            let (here, next) = (ring_addr(ring, n), ring_addr(ring, n + 1));
            let there = flow_key(client(), here, Hook::INGRESS);
            let back = flow_key(here, client(), Hook::EGRESS);
            flows.insert(there, flow(next, Leg::DNAT), 0)?;
            flows.insert(back, flow(next, Leg::UNDNAT), 0)?;
            if matches!(ring, Ring::Two) {
                flows.insert(FlowKey { proto: Proto::SCTP, ..there }, flow(next, Leg::DNAT), 0)?;
            }
        }
    }
    fill_services(ebpf)
}

/// Each Service leads to the next one: what opens a flow to one is at once the first packet to another.
fn fill_services(ebpf: &mut Ebpf) -> Result<()> {
    for n in 0..MANY {
        let (here, next, id) = (service_addr(n), service_addr(n + 1), n + 1);
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
        hash(ebpf, maps::ADDRESSES)?.insert(Addr::from(here.ip()), address::CLUSTER_IP, 0)?;
    }
    Ok(())
}

fn flow_key(from: SocketAddr, to: SocketAddr, hook: Hook) -> FlowKey {
    FlowKey {
        src: from.ip().into(),
        dst: to.ip().into(),
        sport: Port::new(from.port()),
        dport: Port::new(to.port()),
        proto: Proto::TCP,
        hook,
        pad: 0,
    }
}

fn flow(to: SocketAddr, leg: Leg) -> Flow {
    Flow {
        addr: to.ip().into(),
        port: Port::new(to.port()),
        other_port: Port::new(0),
        leg,
        seen: 0,
        pad: 0,
        backend: 1,
        generation: 1,
        service: 1,
        pad2: 0,
        last_seen: 0,
    }
}

//! Two CPUs against each other in the kernel, at full speed, and somebody who ends flows, sweeps, and deletes legs: what
//! the race tests of `proxy-common` play step by step. Whatever comes of it, a flow is never half.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use proxy_common::abi::{Hook, Role, config, frontend::INTERNAL};
use proxy_common::addr::Proto;
use proxy_common::testing::{ByteFrame, Outcome, tuple};
use proxy_tests::packet::{Packet, TcpFlags};
use proxy_tests::programs::Programs;

use crate::node::{ACK, Cast, FAMILIES, FIN_ACK, Node, RST, SYN, SYN_ACK, at, packet};
use crate::real::{IFACE, real};

/// How long they are at it.
const LONG: Duration = Duration::from_secs(3);

/// Numbers as good as any.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        // A linear congruential generator (Knuth, MMIX): the high bits are the good ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// The CPUs that this process may use.
fn cpus() -> Vec<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true)).collect()
}

fn stay_on(cpu: usize) {
    let mut one = CpuSet::new();
    one.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &one).unwrap();
}

/// Source ports for masquerading.
const PORTS: std::ops::Range<u16> = 2000..2024;

/// Both families, TCP and UDP, two remote endpoints, everything masqueraded with few ports.
fn node() -> Node {
    let mut node = Node::new().config(|config| config.flags |= config::MASQUERADE_ALL);
    node.ports(PORTS.start, PORTS.end - PORTS.start);
    for cast in FAMILIES {
        for proto in [Proto::TCP, Proto::UDP] {
            node.serve((cast.vip, 80), proto, INTERNAL, &[(cast.remote, 8080), (cast.other, 8080)]);
        }
    }
    node
}

/// Sends packets of the same few clients, and answers to what comes out; how many were translated.
fn talk(programs: &Programs, seed: u64, ended: &AtomicBool) -> u64 {
    let mut chance = Chance(seed);
    let mut translated = 0;
    let run = |packet: &Packet, hook| -> Option<ByteFrame> {
        match programs.run(&packet.clone().build(), hook, true, IFACE).unwrap() {
            Some(Outcome::Rewritten(frame)) => Some(frame),
            _ => None,
        }
    };
    while !ended.load(Ordering::Relaxed) {
        let cast: &Cast = &FAMILIES[chance.below(2) as usize];
        let proto = if chance.below(3) == 0 { Proto::UDP } else { Proto::TCP };
        let client = at(cast.pod, 5000 + chance.below(12) as u16);
        let flags = [SYN, SYN, ACK, ACK, ACK, FIN_ACK, RST][chance.below(7) as usize];
        let Some(entered) = run(&packet(proto, client, at(cast.vip, 80), flags), Hook::INGRESS) else {
            continue;
        };
        translated += 1;
        let ends = |frame: &ByteFrame| {
            let tuple = tuple(frame).unwrap().tuple;
            let end = |addr: proxy_common::addr::Addr, port: proxy_common::addr::Port| {
                std::net::SocketAddr::new(addr.into(), port.number())
            };
            (end(tuple.src, tuple.sport), end(tuple.dst, tuple.dport))
        };
        let (from, to) = ends(&entered);
        let Some(left) = run(&packet(proto, from, to, flags), Hook::EGRESS) else { continue };
        let (masqueraded, endpoint) = ends(&left);
        assert_eq!(masqueraded.ip(), at(cast.node, 0).ip(), "what leaves is masqueraded: {left:?}");
        let flags: TcpFlags =
            if flags == SYN { SYN_ACK } else { [ACK, FIN_ACK, RST][chance.below(3) as usize] };
        let Some(back) = run(&packet(proto, endpoint, masqueraded, flags), Hook::INGRESS) else { continue };
        let (endpoint, client) = ends(&back);
        assert_eq!(client.ip(), at(cast.pod, 0).ip(), "an answer goes to some client: {back:?}");
        if let Some(answer) = run(&packet(proto, endpoint, client, flags), Hook::EGRESS) {
            let (service, asked) = ends(&answer);
            // Where its tuple behind the Service was taken, by a leg that is left behind, a flow has another port there.
            let asked_by = if PORTS.contains(&client.port()) { asked.port() } else { client.port() };
            assert_eq!(
                (service, asked),
                (at(cast.vip, 80), at(cast.pod, asked_by)),
                "under the Service's name"
            );
        }
    }
    translated
}

/// Lets two CPUs talk while the test's own thread ends flows, and deletes legs if it is to; what is left must be whole.
fn play(deletes: bool) {
    let all = cpus();
    assert!(
        all.len() > 1,
        "this test needs two CPUs, and there is {} here: run it on a larger machine",
        all.len()
    );
    let mut kernel = real();
    kernel.begin(&node().tables);
    let (ended, translated) = (AtomicBool::new(false), AtomicU64::new(0));
    let (mut chance, mut finished, mut lost) = (Chance(7), 0, 0);
    let (programs, mut legs) = kernel.split();
    std::thread::scope(|scope| {
        for (seed, cpu) in (1..).zip([all[0], all[1]]) {
            let (ended, translated) = (&ended, &translated);
            scope.spawn(move || {
                stay_on(cpu);
                translated.fetch_add(talk(programs, seed, ended), Ordering::Relaxed);
            });
        }
        let begun = Instant::now();
        while begun.elapsed() < LONG {
            let flows = programs.flows().unwrap();
            match chance.below(4) {
                0 if !flows.is_empty() => {
                    let flow = flows[chance.below(flows.len() as u64) as usize];
                    finished += programs.end_ids(&[flow.id]).unwrap();
                }
                1 => finished += programs.sweep().unwrap(),
                2 if deletes && !flows.is_empty() => {
                    let flow = flows[chance.below(flows.len() as u64) as usize];
                    let role = [Role::OUTER, Role::MIDDLE, Role::INNER][chance.below(3) as usize];
                    lost += u32::from(legs.lose(&flow.pairs[role.index()]));
                }
                _ => std::thread::sleep(Duration::from_micros(200)),
            }
        }
        ended.store(true, Ordering::Relaxed);
    });
    let translated = translated.into_inner();
    assert!(translated > 1_000 && finished > 10 && (lost > 10) == deletes, "{translated} {finished} {lost}");
    if deletes {
        // Flows that have lost a leg are repaired by their client's next packet or found by the sweep; all of them end whole.
        programs.end_flows(|_| true).unwrap();
    }
    assert_eq!(
        kernel.broken_flows(),
        Vec::<String>::new(),
        "{translated} packets, {finished} flows ended, {lost} legs lost"
    );
}

#[test]
fn two_cpus_leave_every_flow_whole() {
    play(false);
}

#[test]
fn two_cpus_and_somebody_who_deletes_legs_leave_nothing_half() {
    play(true);
}

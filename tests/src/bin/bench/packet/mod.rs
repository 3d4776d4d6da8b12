//! Nanoseconds a packet in the real programs of TC, over an empty program, by `BPF_PROG_TEST_RUN`; beside them what a
//! hand-written program needs for flows.
//!
//! Before each run the packet is restored and becomes one of the next flow (`stage.rs`), so that over many
//! flows every look-up meets another entry, as far from the last one as they come. A row's three programs,
//! with the same packets: the empty one, the hand-written one (`ideal.rs`) and ours, right after each other
//! in every round; a row's ratio is the median of its rounds' ratios. The hand-written one knows TCP over
//! IPv4 only: rows of others are compared with what it takes for that, at the same end of the packet and with
//! as many flows.
//!
//! A test run has a processor's caches and its branch prediction for itself: on the wire a packet costs a
//! multiple, most of which is code and data that others have displaced.

mod case;
mod flows;
mod ideal;
mod stage;

use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use agent_kernel::datapath::flow::SWEPT_A_SECOND;
use anyhow::{Context, Result, ensure};
use aya::Ebpf;
use aya::maps::{Array, MapData};
use proxy_common::abi::{Config, Timeouts, ask, maps};
use proxy_common::wire::End;
use proxy_tests::packet::check;

use self::case::{Case, Outcome};
use self::flows::FRESH;
use self::ideal::Ideal;
use self::stage::Stage;
use crate::figure::{Figures, Goal, progress};
use crate::object::classifier;
use crate::tables::{self, MANY};
use crate::{object, raw};

/// Runs of a measurement, unless they open flows.
const REPEAT: u32 = 100_000;
/// Rounds at the beginning that do not count: they meet cold caches.
const WARM_UP: usize = 2;

/// What a program returns that lets the packet go on (TCX_NEXT).
const NEXT: u32 = u32::MAX;

/// A program, and the empty one, on the same packets.
struct Lane {
    measured: Stage,
    empty: Stage,
}

/// What the rounds of a case came to.
#[derive(Default)]
struct Times {
    ours: Vec<f64>,
    floor: Vec<f64>,
}

pub(crate) fn measure(figures: &mut Figures, rounds: usize) -> Result<()> {
    progress("packet: programs on synthetic packets");
    let mut ebpf = object::load()?;
    object::load_classifiers(&mut ebpf, &["tc_ingress", "tc_egress", "flows"])?;
    let ideal = Ideal::load()?;
    tables::fill(&mut ebpf)?;
    flows::fill(&mut ebpf, &ideal)?;
    let settings = ebpf.take_map(maps::CONFIG).context("the BPF object has no map CONFIG")?;
    let mut settings: Array<MapData, Config> = settings.try_into()?;
    settings.set(0, tables::config(true, 0), 0)?;
    let cases = case::all();
    for case in &cases {
        try_once(&ebpf, &ideal, &cases, case).with_context(|| case.name.clone())?;
    }
    let empty = raw::load_empty().context("loading an empty program")?;
    let lane = |case: &Case, program: BorrowedFd<'_>| -> Result<Lane> {
        let measured = Stage::new(&case.frame, program)?;
        Ok(Lane { measured, empty: Stage::new(&case.frame, empty.as_fd())? })
    };
    let mut lanes = Vec::new();
    for case in &cases {
        let floor = match case.floor.map(|at| &cases[at]) {
            Some(of) => Some((of, lane(of, ideal.program(of.end))?)),
            None => None,
        };
        lanes.push((case, lane(case, ours(&ebpf, case.end)?)?, floor, Times::default()));
    }
    sweep(&ebpf)?;
    let mut looks = Vec::new();
    for round in 0..rounds + WARM_UP {
        let look = look_through(&ebpf)?;
        if round >= WARM_UP {
            looks.push(look);
        }
        for (case, lane, floor, times) in &mut lanes {
            settings.set(0, tables::config(case.ranges, 0), 0)?;
            let ours = lane.time(case).with_context(|| case.name.clone())?;
            if case.outcome == Outcome::Opens {
                let opened = sweep(&ebpf)?;
                ensure!(opened == MANY, "{opened} of {MANY} first packets have opened a flow");
            }
            let floor = match floor {
                Some((of, lane)) => Some(lane.time(of).context("the hand-written program")?),
                None => None,
            };
            if round >= WARM_UP {
                times.ours.push(ours);
                times.floor.extend(floor);
            }
        }
    }
    for (case, _, _, times) in &lanes {
        if times.floor.is_empty() {
            figures.value(case.name.clone(), "ns", &times.ours).within(case.goal);
        } else {
            figures.pair(case.name.clone(), "ns", &times.ours, &times.floor).within(case.goal);
        }
    }
    figures.value("sweep, a record of a living flow", "ns", &looks);
    let share: Vec<f64> = looks.iter().map(|look| look * f64::from(SWEPT_A_SECOND) / 1e7).collect();
    figures.value("sweep, all flows alive, however many", "% of a CPU", &share).within(Goal::Value(2.0));
    Ok(())
}

impl Lane {
    /// Nanoseconds over an empty program.
    fn time(&self, case: &Case) -> Result<f64> {
        let repeat = if case.outcome == Outcome::Opens { MANY } else { REPEAT };
        let empty = raw::test_run(self.empty.program(), &case.frame.packet, repeat)?;
        let run = raw::test_run(self.measured.program(), &case.frame.packet, repeat)?;
        ensure!(empty.returned == NEXT, "the packet could not be restored");
        came_to(&run, case)?;
        Ok(run.nanoseconds - empty.nanoseconds)
    }
}

/// Fails unless the packet has become what it has to.
fn came_to(run: &raw::Run, case: &Case) -> Result<()> {
    ensure!(run.returned == NEXT, "the program returned {} and not TCX_NEXT", run.returned);
    let network = case.network.clone();
    let changed = run.packet[network.clone()] != case.frame.packet[network];
    let wanted = case.outcome != Outcome::Passes;
    ensure!(changed == wanted, "the packet was{} rewritten", if wanted { " not" } else { "" });
    Ok(())
}

/// One run of our program without a stage: the packet must come out true, and as the floor makes it where it
/// knows how.
fn try_once(ebpf: &Ebpf, ideal: &Ideal, cases: &[Case], case: &Case) -> Result<()> {
    if case.outcome == Outcome::Opens {
        return Ok(());
    }
    let run = raw::test_run(ours(ebpf, case.end)?, &case.frame.packet, 1)?;
    came_to(&run, case)?;
    check(&run.packet)?;
    if case.floor.is_some_and(|at| cases[at].name == case.name) {
        let same = raw::test_run(ideal.program(case.end), &case.frame.packet, 1)?;
        ensure!(same.packet == run.packet, "the hand-written program makes another packet");
    }
    Ok(())
}

fn ours(ebpf: &Ebpf, end: End) -> Result<BorrowedFd<'_>> {
    classifier(ebpf, if end == End::Dst { "tc_ingress" } else { "tc_egress" })
}

/// Nanoseconds that a look at a record takes whose flow is alive.
fn look_through(ebpf: &Ebpf) -> Result<f64> {
    let (mut nanoseconds, mut looks) = (0.0, 0.0);
    for from in (FRESH..FRESH + flows::count() - ask::MOST).step_by(ask::MOST as usize) {
        let question = question(from, [u8::MAX; size_of::<Timeouts>()]);
        let run = raw::test_run(classifier(ebpf, "flows")?, &question, 1).context("looking at flows")?;
        ensure!(run.returned == 0, "{} flows that are alive have ended", run.returned);
        nanoseconds += run.nanoseconds;
        looks += f64::from(ask::MOST);
    }
    Ok(nanoseconds / looks)
}

/// What `flows` is asked: to sweep from a record on, with these time-outs.
fn question(from: u32, timeouts: [u8; size_of::<Timeouts>()]) -> Vec<u8> {
    let mut question = vec![0; ask::BODY];
    let words = [ask::SWEEP, from, ask::MOST].map(u32::to_ne_bytes).concat();
    question[ask::OFFSET..][..words.len()].copy_from_slice(&words);
    question.extend(timeouts);
    question
}

/// Ends all flows that first packets have opened, and makes records free; how many flows there were.
fn sweep(ebpf: &Ebpf) -> Result<u32> {
    let mut ended = 0;
    // The clock of the programs goes in steps.
    std::thread::sleep(Duration::from_millis(20));
    for from in (0..FRESH).step_by(ask::MOST as usize) {
        // Whoever has been silent for more than no time is over.
        let question = question(from, [0; size_of::<Timeouts>()]);
        ended += raw::test_run(classifier(ebpf, "flows")?, &question, 1).context("ending flows")?.returned;
    }
    Ok(ended)
}

//! From objects to tables: 50,000 Services with one endpoint each, as a first list brings them.
//!
//! The objects are those of Kubernetes, decoded, one after the other as they come off a watch; making them is not counted.
//! What follows is an agent's way: they are converted, applied, planned and written to the kernel's maps. Not in it are the
//! connection, the decoding and the list's own book-keeping: those are in `coldstart`. Each round is a process of its own,
//! whose memory is therefore that of one round.

use std::io::Write as _;
use std::process::Command;

use agent_core::model::{Change, Kind, World};
use agent_core::plan::{Actual, Capacity, Planner};
use agent_kernel::datapath::load::Capacities;
use agent_kernel::datapath::tables::kernel::Kernel;
use agent_source::convert;
use anyhow::{Context, Result, ensure};

use crate::cluster;
use crate::empty::{Empty, apply, settings};
use crate::figure::{Figures, Goal, progress};
use crate::process::{Clock, Memory};

const SERVICES: u32 = 50_000;
/// Half of what Cilium publishes for its own benchmark of this shape: 708 ms and 172 MB.
const TOOK_MS: f64 = 354.0;
const PEAK_MIB: f64 = 82.0;
/// Figures of a round, in the order in which it tells them.
const FIGURES: [(&str, &str); 8] = [
    ("from objects to tables", "ms"),
    ("the same, processor time", "ms"),
    ("of that converting and applying", "ms"),
    ("of that planning", "ms"),
    ("of that writing to the kernel's maps", "ms"),
    ("peak resident memory", "MiB"),
    ("resident memory before the first object", "MiB"),
    ("writes", "writes"),
];

pub(crate) fn measure(figures: &mut Figures, rounds: usize) -> Result<()> {
    progress(&format!("controlplane: {SERVICES} Services with one endpoint each"));
    let rounds = (0..rounds).map(|_| round()).collect::<Result<Vec<_>>>()?;
    for (at, (name, unit)) in FIGURES.into_iter().enumerate() {
        let values: Vec<f64> = rounds.iter().map(|round| round[at]).collect();
        let figure = figures.value(format!("{SERVICES} Services x 1: {name}"), unit, &values);
        match at {
            0 | 1 => figure.within(Goal::Value(TOOK_MS)),
            5 => figure.within(Goal::Value(PEAK_MIB)),
            _ => {}
        }
    }
    Ok(())
}

/// The figures of a process that is started for them.
fn round() -> Result<Vec<f64>> {
    let this = std::env::current_exe().context("finding this program")?;
    let output = Command::new(&this).args(["controlplane", "--alone"]).output();
    let output = output.with_context(|| format!("starting {}", this.display()))?;
    let (told, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "a round ended with {}: {errors}", output.status);
    let values = told.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?;
    ensure!(values.len() == FIGURES.len(), "a round told {told:?}");
    Ok(values)
}

/// One round in this process; tells its figures.
pub(crate) fn alone() -> Result<()> {
    agent_kernel::share_memory();
    let sizes = Capacities {
        frontends: 2 * SERVICES,
        slots: 4 * SERVICES,
        backends: 2 * SERVICES,
        services: 2 * SERVICES,
        addresses: 2 * SERVICES,
        ..Capacities::DEFAULT
    };
    let tables = Empty::new(&sizes)?;
    let mut kernel = Kernel::open(&tables.root)?;
    let before = Memory::of(std::process::id())?.resident;

    let mut world = World::new(settings());
    let services = (0..SERVICES).try_fold([0.0; 2], |sum, n| {
        let object = cluster::service(n).build();
        let clock = Clock::start()?;
        let (service, warnings) = convert::service(&object);
        ensure!(warnings.is_empty(), "{warnings:?}");
        world.apply(Change::Service(convert::object_name(&object.metadata), service));
        drop(object);
        clock.stop().map(|time| both(sum, time))
    })?;
    let applying = (0..SERVICES).try_fold(services, |sum, n| {
        let object = cluster::lone_slice(n).build();
        let clock = Clock::start()?;
        let (slice, warnings) = convert::slice(&object);
        ensure!(warnings.is_empty(), "{warnings:?}");
        world.apply(Change::Slice(convert::object_name(&object.metadata), slice));
        drop(object);
        clock.stop().map(|time| both(sum, time))
    })?;
    world.apply(Change::Links(Vec::new()));
    for kind in [Kind::Service, Kind::Slice, Kind::Node] {
        world.apply(Change::Synced(kind));
    }
    let clock = Clock::start()?;
    let pass = Planner::new(&Actual::default(), Capacity::from(&sizes)).full(&world.take_desired(), 0);
    let planning = clock.stop()?;
    ensure!(pass.plan.warnings.is_empty(), "the plan found no room: {:?}", pass.plan.warnings);
    let clock = Clock::start()?;
    apply(&mut kernel, &pass.plan.steps)?;
    let writing = clock.stop()?;
    let steps = pass.plan.steps.len() as f64;
    drop(pass.applied(0).0);

    let peak = Memory::of(std::process::id())?.peak;
    cluster::is_there(tables.root.path(), SERVICES)?;
    let [all, cpu] = both(both(applying, planning), writing);
    let [[_, applying], [_, planning], [_, writing]] = [applying, planning, writing];
    writeln!(std::io::stdout(), "{all} {cpu} {applying} {planning} {writing} {peak} {before} {steps}")?;
    Ok(())
}

fn both([one, other]: [f64; 2], [more, further]: [f64; 2]) -> [f64; 2] {
    [one + more, other + further]
}

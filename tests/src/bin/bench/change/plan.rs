//! What a change costs by itself, the first one included: from what is known to the list of writes, and the writes
//! themselves on real maps.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use agent_core::datapath::Datapath as _;
use agent_core::model::{Affinity, Endpoint, Family, ObjectName, Port, Service, Slice, SlicePort, World};
use agent_core::model::{Change, Kind};
use agent_core::plan::{Actual, Capacity, Planner, Proposal};
use agent_kernel::datapath::load::Capacities;
use agent_kernel::datapath::tables::compare::Comparison;
use agent_kernel::datapath::tables::kernel::Kernel;
use anyhow::{Result, ensure};
use proxy_common::addr::Proto;

use crate::cluster::ENDPOINTS;
use crate::empty::{Empty, apply, settings};
use crate::figure::{Figures, progress};

/// Services of the large cluster.
const LARGE: u32 = 10_000;
/// Services of the small one, to see what a change costs there.
const SMALL: u32 = 100;
/// Entries that are compared at once, as the agent does it.
const COMPARED: usize = 128;
/// One-endpoint changes of one round.
const CHANGES: u32 = 50;

pub(super) fn measure(figures: &mut Figures, rounds: usize) -> Result<()> {
    progress(&format!(
        "change: {LARGE} Services with {ENDPOINTS} endpoints each, in memory and in real maps"
    ));
    let mut times = Times::default();
    for _ in 0..rounds.clamp(1, 5) {
        one_round(SMALL, &mut times.small)?;
        one_round(LARGE, &mut times.large)?;
    }
    let Times { small, large } = times;
    figures.value("full plan, 10,000 Services x 10 endpoints", "ms", &large.full_ms);
    figures.value("writing all of it to the kernel's maps", "ms", &large.write_ms);
    figures.value("reading all of it back, as after a restart", "ms", &large.read_ms);
    figures.value("comparing all of it in slices, twice a minute", "ms", &large.compare_ms);
    figures.value("finding that nothing differs, as after a restart", "ms", &large.restart_ms);
    figures.pair(
        "one endpoint changes, of 10,000 Services vs of 100",
        "us",
        &large.change_us,
        &small.change_us,
    );
    figures.pair(
        "writing that change, of 10,000 Services vs of 100",
        "us",
        &large.change_write_us,
        &small.change_write_us,
    );
    figures.value("writes of one changed endpoint of ten", "writes", &large.change_steps);
    Ok(())
}

#[derive(Default)]
struct Times {
    small: Sizes,
    large: Sizes,
}

/// A value a round.
#[derive(Default)]
struct Sizes {
    full_ms: Vec<f64>,
    write_ms: Vec<f64>,
    read_ms: Vec<f64>,
    restart_ms: Vec<f64>,
    compare_ms: Vec<f64>,
    change_us: Vec<f64>,
    change_write_us: Vec<f64>,
    change_steps: Vec<f64>,
}

fn one_round(services: u32, times: &mut Sizes) -> Result<()> {
    let tables = Empty::new(&Capacities::DEFAULT)?;
    let mut kernel = Kernel::open(&tables.root)?;
    let mut world = world(services);
    let capacity = Capacity::default();
    let begun = Instant::now();
    let pass = Planner::new(&Actual::default(), capacity).full(&world.take_desired(), 0);
    times.full_ms.push(begun.elapsed().as_secs_f64() * 1e3);
    ensure!(pass.plan.warnings.is_empty(), "the plan found no room: {:?}", pass.plan.warnings);
    let begun = Instant::now();
    apply(&mut kernel, &pass.plan.steps)?;
    times.write_ms.push(begun.elapsed().as_secs_f64() * 1e3);
    let mut planner = pass.applied(0).0;

    let begun = Instant::now();
    let found = kernel.read()?;
    times.read_ms.push(begun.elapsed().as_secs_f64() * 1e3);
    let begun = Instant::now();
    let again = Planner::new(&found, capacity).full(&world.take_desired(), 0);
    times.restart_ms.push(begun.elapsed().as_secs_f64() * 1e3);
    ensure!(again.plan.steps.is_empty(), "a restart would write {} entries again", again.plan.steps.len());

    let mut comparison = Comparison::open(&tables.root)?;
    let begun = Instant::now();
    loop {
        let found = comparison.go_on(&mut kernel, planner.actual(), COMPARED)?;
        ensure!(found.steps.is_empty() && found.words == 0, "{found:?}");
        if found.ended {
            break;
        }
    }
    times.compare_ms.push(begun.elapsed().as_secs_f64() * 1e3);

    let (mut planned, mut written, mut steps) = (0.0, 0.0, 0);
    for change in 0..CHANGES {
        let now = u64::from(change) * 10_000;
        let begun = Instant::now();
        let pass = change_one(&mut world, planner, change * (services / CHANGES), now);
        planned += begun.elapsed().as_secs_f64() * 1e6;
        ensure!(!pass.plan.steps.is_empty(), "a changed endpoint changed nothing");
        steps += pass.plan.steps.len();
        let begun = Instant::now();
        apply(&mut kernel, &pass.plan.steps)?;
        written += begun.elapsed().as_secs_f64() * 1e6;
        planner = pass.applied(now).0;
    }
    times.change_us.push(planned / f64::from(CHANGES));
    times.change_write_us.push(written / f64::from(CHANGES));
    times.change_steps.push(f64::from(u32::try_from(steps)?) / f64::from(CHANGES));
    Ok(())
}

/// One endpoint of a Service has been replaced by another.
fn change_one(world: &mut World, planner: Planner, service: u32, now_ms: u64) -> Proposal {
    world.apply(Change::Slice(slice_name(service), Some(slice(service, 1))));
    let dirty = world.take_dirty();
    planner.dirty(&dirty, None, now_ms)
}

/// A world in which everything is known.
fn world(services: u32) -> World {
    let mut world = World::new(settings());
    for n in 0..services {
        world.apply(Change::Service(name(n), Some(service(n))));
        world.apply(Change::Slice(slice_name(n), Some(slice(n, 0))));
    }
    world.apply(Change::Links(Vec::new()));
    for kind in [Kind::Service, Kind::Slice, Kind::Node] {
        world.apply(Change::Synced(kind));
    }
    world
}

fn name(n: u32) -> ObjectName {
    ObjectName::new("default", &format!("service-{n}"))
}

fn slice_name(n: u32) -> ObjectName {
    ObjectName::new("default", &format!("service-{n}-1"))
}

fn service(n: u32) -> Service {
    let [_, _, high, low] = n.to_be_bytes();
    Service {
        cluster_ips: vec![IpAddr::from([10, 100, high, low])],
        ports: vec![Port { name: "http".into(), proto: Proto::TCP, port: 80, node_port: 0 }],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        affinity: Affinity::None,
        internal_local: false,
        external_local: false,
        health_check_node_port: 0,
        reset_on_loss: false,
        mode: None,
        created: 0,
    }
}

/// Ten endpoints; of a later version the last one is another.
fn slice(n: u32, version: u32) -> Slice {
    let endpoint = |k: u32| {
        let number = n * (ENDPOINTS + 1) + k;
        Endpoint {
            ip: Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 1)) + number).into(),
            ready: true,
            serving: true,
            terminating: false,
            node: Some(format!("node{}", number % 100).into()),
            hints: None,
        }
    };
    Slice {
        service: name(n),
        family: Family::V4,
        ports: vec![SlicePort { name: "http".into(), proto: Proto::TCP, port: 8080 }],
        endpoints: (0..ENDPOINTS - 1).chain([ENDPOINTS - 1 + version]).map(endpoint).collect(),
    }
}

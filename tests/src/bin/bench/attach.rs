//! Attaching to interfaces by the hundred, to one more of them, and looking at all of them.

use std::time::Instant;

use agent_core::model::Link;
use agent_kernel::datapath::load::remove::remove_all;
use agent_kernel::datapath::load::{Capacities, Loaded, ProgramLog};
use agent_kernel::datapath::probe::Features;
use agent_kernel::datapath::store::pin::BpfRoot;
use agent_kernel::netlink;
use anyhow::{Context, Result, ensure};
use proxy_tests::netns::Netns;

use crate::figure::{Figures, Goal, progress};

/// Interfaces of a crowded node: two ends of as many pairs.
const INTERFACES: usize = 600;
/// What attaching to one may take.
const LIMIT_MS: f64 = 10.0;
/// Rounds at most: to make and to remove so many interfaces takes longer than what is measured.
const ROUNDS: usize = 3;

#[derive(Default)]
struct Times {
    all: Vec<f64>,
    one: Vec<f64>,
    look: Vec<f64>,
    again: Vec<f64>,
}

pub(crate) fn measure(figures: &mut Figures, rounds: usize) -> Result<()> {
    progress(&format!("attach: {INTERFACES} interfaces"));
    let mut times = Times::default();
    for _ in 0..rounds.min(ROUNDS) {
        let netns = Netns::new("attach")?;
        netns.run_in(|| one_round(&netns, &mut times))??;
    }
    let goal = Goal::Value(LIMIT_MS);
    figures.value(format!("each of {INTERFACES} interfaces"), "ms", &times.all).within(goal);
    figures.value(format!("one more beside {INTERFACES}"), "ms", &times.one).within(goal);
    figures.value("each of them after a restart, when all carry programs", "ms", &times.again);
    figures.value(format!("looking at the hooks of {INTERFACES} interfaces"), "ms", &times.look);
    Ok(())
}

fn one_round(netns: &Netns, times: &mut Times) -> Result<()> {
    let directory = tempfile::Builder::new()
        .prefix(&format!("{}-bench-", proxy_tests::unique()))
        .tempdir()
        .context("making a directory for bpffs")?;
    let root = BpfRoot::new(directory.path().join("bpf"));
    let measured = attach(netns, &root, times);
    // What cannot be removed now is swept by the next run.
    remove_all(&root).ok();
    nix::mount::umount2(root.path(), nix::mount::MntFlags::MNT_DETACH).ok();
    measured
}

fn attach(netns: &Netns, root: &BpfRoot, times: &mut Times) -> Result<()> {
    let pair = |n: usize| format!("link add v{n} type veth peer name w{n}\n");
    netns.ip(&(0..INTERFACES / 2).map(pair).collect::<String>())?;
    let mut loaded = Loaded::open(root, &Features::probe(), &Capacities::DEFAULT, ProgramLog::Off)?;
    let links = links()?;
    ensure!(links.len() == INTERFACES, "{} interfaces", links.len());
    times.all.push(sync(&mut loaded, &links)? / f64::from(u32::try_from(INTERFACES)?));
    netns.ip(&pair(INTERFACES))?;
    let links = self::links()?;
    times.one.push(sync(&mut loaded, &links)? / 2.0);
    // The first look opens the maps.
    while !loaded.look(Instant::now()).1 {}
    let begun = Instant::now();
    while !loaded.look(Instant::now()).1 {}
    times.look.push(begun.elapsed().as_secs_f64() * 1e3);
    drop(loaded);
    let mut loaded = Loaded::open(root, &Features::probe(), &Capacities::DEFAULT, ProgramLog::Off)?;
    times.again.push(sync(&mut loaded, &links)? / f64::from(u32::try_from(links.len())?));
    Ok(())
}

fn links() -> Result<Vec<Link>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let links = runtime.block_on(netlink::links())?;
    Ok(links.into_iter().filter(Link::carries_programs).collect())
}

/// Milliseconds.
fn sync(loaded: &mut Loaded, links: &[Link]) -> Result<f64> {
    let begun = Instant::now();
    let results = loaded.sync_interfaces(links);
    let took = begun.elapsed().as_secs_f64() * 1e3;
    for (name, result) in results {
        result.with_context(|| name.to_string())?;
    }
    Ok(took)
}

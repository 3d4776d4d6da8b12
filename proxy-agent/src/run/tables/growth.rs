//! Tables that become larger under way. Programs for them are loaded by a thread, which takes seconds; what is in the tables is
//! carried over by the loop, which meanwhile writes nothing.

use std::collections::BTreeMap;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use proxy_common::abi::maps;

use agent_core::plan::{Actual, Planner};
use agent_kernel::datapath::load::{Capacities, LoadError, Loaded, Prepared, ProgramLog};
use agent_kernel::datapath::pinned::Pinned;
use agent_kernel::datapath::probe::Features;
use agent_kernel::datapath::store::pin::BpfRoot;
use agent_kernel::datapath::tables::growth::{Against, Larger, Limits, Standing};

/// How long nothing is tried again that has failed.
const PAUSE: Duration = Duration::from_secs(60);

/// How large the tables are, and what becomes of them.
pub(in crate::run) struct Growth {
    limits: Limits,
    sizes: Capacities,
    features: Features,
    log: ProgramLog,
    /// Flows that were alive when they were counted last.
    living: u64,
    /// Clients that were bound to an endpoint at the last beat.
    bound: u64,
    /// Tables that have found no room for something since they last grew.
    short: Vec<&'static str>,
    at_work: Option<(Capacities, JoinHandle<Result<Prepared, LoadError>>)>,
    /// What memory or the kernel forbids.
    warnings: Vec<String>,
    /// Warnings that an Event is still to tell.
    news: Vec<String>,
    standing: Standing,
    failed: Option<Instant>,
}

impl Growth {
    pub(in crate::run) fn new(
        limits: Limits,
        sizes: Capacities,
        features: Features,
        log: ProgramLog,
    ) -> Self {
        Self {
            limits,
            sizes,
            features,
            log,
            living: 0,
            bound: 0,
            short: Vec::new(),
            at_work: None,
            warnings: Vec::new(),
            news: Vec::new(),
            standing: limits.standing(&sizes),
            failed: None,
        }
    }

    /// A plan has found these tables too small.
    pub(in crate::run) fn short(&mut self, tables: impl IntoIterator<Item = &'static str>) {
        for table in tables {
            if !self.short.contains(&table) {
                self.short.push(table);
            }
        }
    }

    /// What stands in the way.
    pub(in crate::run) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What has come to stand in the way since this was asked last.
    pub(in crate::run) fn news(&mut self) -> Option<String> {
        let news = std::mem::take(&mut self.news);
        (!news.is_empty()).then(|| news.join("; "))
    }

    /// How it stands.
    pub(in crate::run) fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Looks whether a table is so full that it is to grow, and begins with that; once it is ready, programs and tables have
    /// been exchanged and are returned.
    pub(in crate::run) fn go_on(
        &mut self,
        root: &BpfRoot,
        planner: &Planner,
        pinned: &Pinned,
        beat: bool,
    ) -> Result<Option<Loaded>> {
        if let Some((sizes, thread)) = self.at_work.take() {
            if !thread.is_finished() {
                self.at_work = Some((sizes, thread));
                return Ok(None);
            }
            let done = thread.join().map_err(|_| anyhow!("the thread that loads programs has panicked"));
            let done = done.and_then(|prepared| Ok(prepared?.finish()?));
            let Standing { done: times, failed, .. } = self.standing;
            return match done {
                Ok(loaded) => {
                    self.sizes = sizes;
                    self.short.clear();
                    self.standing = Standing { done: times + 1, failed, ..self.limits.standing(&sizes) };
                    Ok(Some(loaded))
                }
                Err(error) => {
                    self.failed = Some(Instant::now());
                    let now = self.limits.standing(&self.sizes);
                    self.standing = Standing { done: times, failed: failed + 1, ..now };
                    self.warnings = vec![format!("tables stay as large as they are: {error:#}")];
                    self.news.clone_from(&self.warnings);
                    Err(error.context("larger tables"))
                }
            };
        }
        if self.failed.is_some_and(|failed| failed.elapsed() < PAUSE) {
            return Ok(None);
        }
        let mut used = by_agent(planner.actual());
        // Flows come quickly, but to count takes a look at each record: often only where it may lead to something.
        if beat || self.sizes.flows < self.limits.each.flows {
            keep(&mut self.living, pinned.living());
        }
        if beat {
            let secs = planner.affinity_secs();
            // Where nobody asks for it there is nothing to look for in a large table.
            keep(&mut self.bound, if secs.is_empty() { Ok(0) } else { pinned.bound(secs) });
        }
        used.extend([(maps::RECORDS, self.living), (maps::AFFINITY, self.bound)]);
        let (sizes, said) = self.limits.next(&self.sizes, &used, &self.short);
        self.say(&said);
        if let Some(sizes) = sizes {
            self.failed = None;
            let (root, features, log) = (root.clone(), self.features.clone(), self.log);
            let work = move || Loaded::prepare(&root, &features, &sizes, log);
            let thread = std::thread::Builder::new().name("tables".into()).spawn(work);
            self.at_work = Some((sizes, thread.context("starting a thread that loads programs")?));
        }
        Ok(None)
    }

    /// Tells it before it happens, and keeps telling what cannot happen.
    fn say(&mut self, said: &[Larger]) {
        self.standing.planned.clear();
        self.standing.blocked.clear();
        let mut lines = Vec::new();
        for larger in said {
            match larger.against {
                None => {
                    tracing::info!("{larger}");
                    self.standing.planned.insert(larger.map, larger.to);
                    continue;
                }
                // `status` tells it of each table that is nearly full.
                Some(Against::Limit) => {}
                Some(Against::Memory(_)) => lines.push(larger.to_string()),
            }
            self.standing.blocked.extend(larger.against.map(|against| (larger.map, against)));
        }
        let table = |line: &String| line.split(" has ").next().map(ToOwned::to_owned);
        let known: Vec<_> = self.warnings.iter().map(table).collect();
        let new = lines.iter().filter(|line| !known.contains(&table(line))).cloned();
        self.news.extend(new.inspect(|line| tracing::warn!("{line}")));
        self.warnings = lines;
    }
}

/// Takes over a count. Where it cannot be made, because somebody has taken a pin away that is about to be restored, the last one
/// holds: that is no reason to open tables anew, which might be somebody else's at this moment.
fn keep<E: std::fmt::Display>(known: &mut u64, counted: Result<u64, E>) {
    match counted {
        Ok(count) => *known = count,
        Err(error) => tracing::debug!("entries are not counted: {error}"),
    }
}

/// How many entries the tables have that the agent fills. Arrays are used from their beginning.
fn by_agent(actual: &Actual) -> BTreeMap<&'static str, u64> {
    let end = |last: Option<u32>| last.map_or(0, |last| u64::from(last) + 1);
    BTreeMap::from([
        (maps::FRONTENDS, actual.frontends.len() as u64),
        (maps::SLOTS, end(actual.slots.last())),
        (maps::BACKENDS, end(actual.backends.last())),
        (maps::ADDRESSES, actual.addresses.len() as u64),
        (maps::SOURCES, actual.sources.len() as u64),
        (maps::IFACES, actual.ifaces.len() as u64),
        (maps::SERVICES, end(actual.services.keys().next_back().copied())),
    ])
}

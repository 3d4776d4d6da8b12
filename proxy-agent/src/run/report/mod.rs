//! What the loop tells: the log, the record for the command line, health and metrics.

mod latency;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use jiff::Timestamp;
use proxy_common::abi::{AgentState, NOTE, PROBLEM, text};
use tokio::sync::mpsc;

use crate::config::{Config, SourceConfig};
use crate::logging;
use crate::serve::health::{Health, SystemClock};
use crate::serve::service_health::Wanted;
use crate::serve::{self, Connections, Limits, Metrics, ServiceHealth, Snapshot};
use agent_core::model::{Change, Kind};
use agent_core::model::{Family, ObjectName, World};
use agent_core::plan::{Actual, Plan};
use agent_kernel::datapath::attach::{AttachError, Attached};
use agent_kernel::datapath::pinned::Pinned;
use agent_kernel::datapath::probe::Features;
use agent_kernel::datapath::store::pin::BpfRoot;
use agent_kernel::datapath::tables::growth::Standing;
use agent_kernel::kube_proxy::TakeOver;
use agent_source::events::{Event, Events};
use agent_source::requests::Requests;

use self::latency::Latency;

/// How often progress is logged while the first lists come in.
const PROGRESS: Duration = Duration::from_secs(2);

/// Everything that others may want to know of the loop.
pub(super) struct Report {
    /// The families that are served.
    families: &'static [Family],
    pinned: Pinned,
    /// The same for who scrapes.
    scraped: Arc<Mutex<Pinned>>,
    /// Tables that should be larger.
    cramped: Vec<String>,
    state: AgentState,
    health: Arc<Health>,
    service_health: ServiceHealth,
    metrics: Arc<Metrics>,
    connections: Connections,
    snapshot: Arc<Mutex<Snapshot>>,
    /// What is left of kube-proxy.
    take_over: TakeOver,
    latency: Latency,
    /// Services with changes that are not programmed yet (H-38).
    pending: std::collections::BTreeSet<ObjectName>,
    /// What was wrong from the start: flags, pins.
    warnings: Vec<String>,
    /// What found no room.
    refused: Vec<String>,
    /// Hooks that refuse their programs.
    refusing: Vec<String>,
    /// What somebody else has last removed or changed, and when it was restored; and how often there was something.
    restored: Option<(u64, String)>,
    /// What connection tracking does not tell.
    untracked: Option<String>,
    /// Whether what is new is left to another proxy.
    retired: bool,
    /// Warnings that have been logged: each is logged once.
    logged: std::collections::BTreeSet<String>,
    /// Why the last sync failed.
    failure: Option<String>,
    started: Instant,
    told: Instant,
    /// Whether the Node object that was seen last wants traffic (H-8); before any was seen, whether the source knows no
    /// Nodes.
    eligible: bool,
}

/// Says that an address is not served.
async fn lost(failing: &mpsc::Sender<Event>, event: Event) {
    // An error: the loop has ended, and with it the agent.
    let _ = failing.send(event).await;
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Report {
    /// `started` is when the agent was: loading comes before there is anywhere to report to.
    pub(super) fn open(
        config: &Config,
        root: &BpfRoot,
        features: &Features,
        warnings: &[String],
        requests: &Requests,
        started: Instant,
    ) -> Result<Self> {
        let now = unix_ms();
        let state = AgentState {
            pid: std::process::id().into(),
            started_ms: now.saturating_sub(u64::try_from(started.elapsed().as_millis()).unwrap_or(0)),
            beat_ms: now,
            synced_ms: 0,
            queued_ms: 0,
            generation: 0,
            services: 0,
            endpoints: 0,
            complaints: 0,
            synced: 0,
            connected: 0,
            interfaces: 0,
            interfaces_failed: 0,
            absent: features.absent(),
            version: text(env!("CARGO_PKG_VERSION")),
            node: text(&config.settings.node_name),
            source: text(&config.source.to_string()),
        };
        let families = config.settings.families();
        let health = Arc::new(Health::new(SystemClock).with_timeout(config.sync_period.saturating_mul(2))); // H-4
        for family in families {
            health.started(*family);
        }
        let snapshot =
            Arc::new(Mutex::new(Snapshot { source: config.source.to_string(), ..Snapshot::default() }));
        let scraped = Arc::new(Mutex::new(Pinned::open(root)?));
        let (shared, connections) = (snapshot.clone(), Connections::new(Limits::of_process()));
        let (tables, counted) = (scraped.clone(), connections.clone());
        let snapshots = move || {
            let mut now = shared.lock().unwrap_or_else(PoisonError::into_inner).clone();
            now.connections = counted.counts();
            let tables = tables.lock().unwrap_or_else(PoisonError::into_inner);
            match (tables.reasons(), tables.fill_by_traffic(&now.affinity_secs)) {
                (Ok(reasons), Ok(fill)) => {
                    now.reasons = reasons;
                    now.tables.extend(fill);
                }
                (Err(error), _) | (_, Err(error)) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "counters cannot be read");
                }
            }
            now
        };
        let metrics = Arc::new(Metrics::new(Box::new(snapshots), health.clone(), requests));
        let mut all = config.warnings.clone();
        all.extend_from_slice(warnings);
        let report = Self {
            families,
            pinned: Pinned::open(root)?,
            scraped,
            cramped: Vec::new(),
            state,
            health,
            service_health: ServiceHealth::default(),
            metrics,
            connections,
            snapshot,
            take_over: TakeOver::default(),
            latency: Latency::new(Timestamp::now()),
            pending: std::collections::BTreeSet::new(),
            warnings: all,
            refused: Vec::new(),
            refusing: Vec::new(),
            restored: None,
            untracked: None,
            retired: false,
            logged: std::collections::BTreeSet::new(),
            failure: None,
            started,
            told: Instant::now(),
            eligible: matches!(config.source, SourceConfig::Manifests(_)),
        };
        report.pinned.write_agent(&report.state)?;
        Ok(report)
    }

    /// Serves health and metrics from a thread of their own, so that neither waits for a sync.
    ///
    /// With `--bind-address-hard-fail` the event says why the agent must end.
    pub(super) fn serve(&self, config: &Config, events: &Events) -> Result<mpsc::Receiver<Event>> {
        let (failing, failed) = mpsc::channel(2);
        let hard = config.hard_fail;
        let (health, metrics) = (self.health.clone(), self.metrics.clone());
        let service_health = self.service_health.server(
            self.health.clone(),
            config.settings.node_name.clone(),
            events.clone(),
            self.connections.clone(),
        );
        let connections = self.connections.clone();
        let (at_health, at_metrics) = (config.healthz, config.metrics);
        let configz = serve::configz::router(config.configz());
        let (begun, begins) = std::sync::mpsc::sync_channel(1);
        let serve = move || {
            // Made here: it must not be dropped where the loop runs, which it would be if there were no thread for it.
            let made =
                tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(2).build();
            let runtime = match made {
                Ok(runtime) => {
                    let _ = begun.send(Ok(()));
                    runtime
                }
                // Nobody waits who is not there.
                Err(error) => return drop(begun.send(Err(error))),
            };
            runtime.block_on(async {
                let health = async {
                    let Some(at) = at_health else { return };
                    if let Err(error) =
                        serve::serve("health", at, hard, serve::health::router(health), &connections).await
                    {
                        lost(&failing, Event::NoHealth(format!("cannot serve health at {at}: {error}")))
                            .await;
                    }
                };
                let metrics = async {
                    let (at, router) = (at_metrics, serve::metrics::router(metrics).merge(configz));
                    if let Err(error) = serve::serve("metrics", at, hard, router, &connections).await {
                        lost(&failing, Event::NoMetrics(format!("cannot serve metrics at {at}: {error}")))
                            .await;
                    }
                };
                tokio::join!(health, metrics, service_health.run());
            });
        };
        std::thread::Builder::new().name("serve".into()).spawn(serve).context("cannot start a thread")?;
        begins
            .recv()
            .context("the thread of the HTTP servers has ended")?
            .context("cannot start the HTTP servers")?;
        Ok(failed)
    }

    /// One more thing to be said as long as the agent runs.
    pub(super) fn warn(&mut self, line: String) {
        tracing::warn!("{line}");
        self.warnings.push(line);
    }

    /// What is done without, for want of a right or of memory.
    pub(super) fn without(&mut self, lines: impl IntoIterator<Item = String>) {
        self.warnings.extend(lines.into_iter().map(|line| format!("{NOTE}this agent: {line}")));
    }

    /// To be told of each change before `world` is.
    pub(super) fn heard(&mut self, change: &Change, world: &World) {
        self.latency.heard(change, |name| world.slice(name));
        let mut snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        match change {
            // H-49: a Service is a change for each family, a slice for its own.
            Change::Service(name, _) => {
                snapshot.service_changes += self.families.len() as u64;
                self.pending.insert(name.clone());
                snapshot.service_changes_pending = self.pending.len() as u64;
            }
            Change::Slice(..) => {
                snapshot.endpoint_changes += 1;
                snapshot.endpoint_changes_pending += 1;
            }
            Change::Repeated(Kind::Service) => snapshot.service_changes += self.families.len() as u64,
            Change::Repeated(Kind::Slice) => snapshot.endpoint_changes += 1,
            Change::Connected(connected) => {
                if snapshot.connected != *connected {
                    snapshot.connected = *connected;
                    if *connected {
                        tracing::info!("{} answers", snapshot.source);
                    } else {
                        tracing::warn!(
                            "{} does not answer: trying again; the tables stay as they are",
                            snapshot.source
                        );
                    }
                }
            }
            Change::Warnings { object, lines } => {
                for line in lines {
                    if self.logged.insert(format!("{object}: {line}")) {
                        tracing::warn!("{object}: {line}");
                    }
                }
            }
            Change::Node(_)
            | Change::Links(_)
            | Change::Routes(_)
            | Change::ServiceRanges(..)
            | Change::Synced(_)
            | Change::Whole(_)
            | Change::Triggered(..)
            | Change::Excluded(..)
            | Change::Repeated(Kind::Node | Kind::ServiceCidr | Kind::Pod) => {}
        }
    }

    /// Services work from here on without a kube-proxy: what it has left may go (Z-2).
    pub(super) fn take_over(&self, config: &Config) {
        if let Err(error) = self.take_over.begin(config.remove_kube_proxy_rules) {
            tracing::warn!("nobody looks after what kube-proxy has left: cannot start a thread: {error}");
        }
    }

    /// The tables.
    pub(super) fn pinned(&self) -> &Pinned {
        &self.pinned
    }

    /// Others are at work from now on.
    pub(super) fn moved(&mut self, root: &BpfRoot) -> Result<()> {
        self.pinned = Pinned::open(root)?;
        *self.scraped.lock().unwrap_or_else(PoisonError::into_inner) = Pinned::open(root)?;
        Ok(())
    }

    /// How tables grow, and which of them should and cannot.
    pub(super) fn growth(&mut self, standing: &Standing, lines: &[String]) {
        self.cramped = lines.to_vec();
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).growth.clone_from(standing);
    }

    /// Whether what is new is left to another proxy.
    pub(super) fn retired(&mut self, retired: bool) {
        self.retired = retired;
    }

    /// So many connections of a kube-proxy's are netfilter's still.
    pub(super) fn left_to_netfilter(&self, count: usize) {
        self.take_over.left(count);
    }

    /// Whether rules of a kube-proxy are to be left alone.
    pub(super) fn keep_rules(&self, keep: bool) {
        self.take_over.keep(keep);
    }

    /// Whether no hook refuses its programs.
    pub(super) fn is_attached(&self) -> bool {
        self.refusing.is_empty()
    }

    /// Counts what is in the tables, for metrics.
    pub(super) fn count(&self, actual: &Actual) {
        let (tables, affinity_secs) = (self.pinned.fill_by_agent(actual), actual.affinity_secs());
        let mut snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        snapshot.frontends = actual.frontends.len() as u64;
        snapshot.tables = tables;
        snapshot.affinity_secs = affinity_secs;
    }

    pub(super) fn queued(&self) {
        for family in self.families {
            self.health.queued(*family);
        }
    }

    /// While the first lists come in: how far it is.
    pub(super) fn progress(&mut self, world: &World) {
        if self.told.elapsed() >= PROGRESS {
            self.told = Instant::now();
            tracing::info!(
                "loading from {}: {} Services, {} endpoints so far",
                self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).source,
                world.service_count(),
                world.endpoint_count()
            );
        }
    }

    pub(super) fn interfaces(
        &mut self,
        results: Vec<(Arc<str>, std::result::Result<Attached, AttachError>)>,
    ) {
        let results = results.into_iter().map(|(name, result)| (format!("interface {name}"), result));
        self.retried(results.collect());
    }

    /// What came of attaching programs, to interfaces and to the cgroup root.
    pub(super) fn retried(&mut self, results: Vec<(String, std::result::Result<Attached, AttachError>)>) {
        for (hook, result) in results {
            match result {
                Ok(Attached::Kept) => {}
                Ok(Attached::New) if self.refusing.iter().any(|line| line.starts_with(&hook)) => {
                    tracing::info!("{hook}: programs attached at last");
                }
                Ok(Attached::New) => tracing::debug!("{hook}: programs attached"),
                Ok(Attached::Updated) => tracing::info!("{hook}: programs replaced"),
                Err(error) if error.is_of_something_gone() => tracing::debug!("{hook}: it has gone"),
                Err(error) => {
                    let line = format!("{hook}: {:#}", anyhow::Error::from(error));
                    if self.logged.insert(line.clone()) {
                        tracing::error!("{line}; trying again");
                    }
                }
            }
        }
    }

    /// How many interfaces carry programs and how many refuse them; and which hooks refuse, and why.
    pub(super) fn hooks(&mut self, (carry, refuse): (usize, usize), refusing: &[String]) {
        self.state.interfaces = u32::try_from(carry).unwrap_or(u32::MAX);
        self.state.interfaces_failed = u32::try_from(refuse).unwrap_or(u32::MAX);
        self.health.unserved(!refusing.is_empty());
        if self.refusing != refusing {
            self.refusing = refusing.to_vec();
        }
    }

    /// So much of a kind that somebody else had removed or changed was restored.
    pub(super) fn repaired(&self, what: &'static str, number: usize) {
        self.metrics.repairs().count(what, number);
    }

    /// What that was, in words.
    pub(super) fn restored(&mut self, line: &str) {
        let times = self.restored.take().map_or(0, |(times, _)| times) + 1;
        let at = Timestamp::now().strftime("%Y-%m-%d %H:%M:%SZ");
        self.restored = Some((times, format!("{at}: {line}")));
    }

    /// Cgroups whose sockets are left to their packets.
    pub(super) fn excluded(&mut self, results: Vec<(PathBuf, std::result::Result<Attached, AttachError>)>) {
        for (cgroup, result) in results {
            let cgroup = cgroup.display();
            match result {
                Ok(Attached::Kept | Attached::Updated) => {}
                Ok(Attached::New) => {
                    tracing::info!("new sockets in cgroup {cgroup} are left to their packets")
                }
                Err(error) => {
                    let line = format!(
                        "sockets in cgroup {cgroup} are not left to their packets: {:#}",
                        anyhow::Error::from(error)
                    );
                    if self.logged.insert(line.clone()) {
                        tracing::warn!("{line}");
                    }
                }
            }
        }
    }

    /// What connection tracking does not tell; it has been logged.
    pub(super) fn untracked(&mut self, warning: Option<String>) {
        self.untracked = warning;
    }

    pub(super) fn wrote(&mut self, world: &World, plan: &Plan, full: bool, took: Duration) {
        for family in self.families {
            self.health.synced(*family);
            self.metrics.syncs().took(*family, full, took);
        }
        for (family, seconds) in self.latency.programmed(Timestamp::now()) {
            self.metrics.syncs().programmed(family, seconds);
        }
        self.eligible = world.node_object().map_or(self.eligible, |node| node.eligible);
        self.health.node_eligible(self.eligible);
        self.service_health.want(Wanted::of(world)); // Y-25: after success only.
        self.failure = None;
        self.state.synced_ms = unix_ms();
        self.refused.clone_from(&plan.warnings);
        for line in &plan.warnings {
            if self.logged.insert(line.clone()) {
                tracing::error!("{line}");
            }
        }
        if !plan.steps.is_empty() {
            self.state.generation += 1;
            tracing::info!(
                "sync {}: {} writes in {:.1} ms{}",
                self.state.generation,
                plan.steps.len(),
                took.as_secs_f64() * 1000.0,
                if full { ", everything compared" } else { "" }
            );
        }
        let mut snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        self.pending.clear();
        snapshot.service_changes_pending = 0;
        snapshot.without_local = world.without_local_endpoints();
        snapshot.endpoint_changes_pending = 0;
    }

    /// What is counted, for who works beside the loop.
    pub(super) fn counters(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    pub(super) fn failed(&mut self, world: &World, error: &anyhow::Error, full: bool, took: Duration) {
        for family in self.families {
            self.metrics.syncs().took(*family, full, took);
        }
        tracing::error!("{error:#}; reading the tables and trying again");
        self.failure = Some(format!("the last sync failed: {error:#}"));
        self.write(world, true);
    }

    /// The one line that says it is done.
    pub(super) fn ready(&self, world: &World, plan: &Plan) {
        tracing::info!(
            "ready after {:.2} s: {} Services, {} endpoints, {} interfaces, {} writes{}",
            self.started.elapsed().as_secs_f64(),
            world.service_count(),
            world.endpoint_count(),
            self.state.interfaces,
            plan.steps.len(),
            match world.warnings().len() {
                0 => String::new(),
                n => format!("; {n} objects need attention, see `proxy-agent status`"),
            }
        );
    }

    /// Renews the record that the command line reads, and what metrics show.
    pub(super) fn write(&mut self, world: &World, pending: bool) {
        let mut lines: Vec<String> = self.failure.iter().cloned().collect();
        lines.extend(self.refusing.iter().map(|line| format!("{PROBLEM}{line}; trying again")));
        lines.extend(self.refused.iter().cloned());
        lines.extend(self.untracked.iter().cloned());
        lines.extend(self.cramped.iter().cloned());
        let not_served = self.service_health.warnings();
        lines.extend(not_served.iter().cloned());
        let warnings = world.warnings();
        lines.extend(warnings.iter().map(|c| format!("{}: {}", c.object, c.line)));
        lines.extend(self.take_over.warnings());
        if let lost @ 1.. = logging::lost() {
            lines.push(format!(
                "the log: {lost} lines were lost: is the disk of stderr full, or does nobody read it?"
            ));
        }
        let retired = "this node: retired, so what is new is left to another proxy; `proxy-agent retire --undo` takes it back";
        lines.extend(self.retired.then(|| format!("{NOTE}{retired}")));
        lines.extend(world.notes().iter().map(|note| format!("{NOTE}{}: {}", note.object, note.line)));
        lines.extend(self.restored.iter().map(|(times, line)| {
            format!("{NOTE}hooks, pins or tables were removed or changed by somebody else and restored, {times} times; last {line}")
        }));
        lines.extend(self.warnings.iter().cloned());
        let now = unix_ms();
        self.state.beat_ms = now;
        self.state.queued_ms = match (pending, self.state.queued_ms) {
            (false, _) => 0,
            (true, 0) => now,
            (true, since) => since,
        };
        self.state.services = u32::try_from(world.service_count()).unwrap_or(u32::MAX);
        self.state.endpoints = u32::try_from(world.endpoint_count()).unwrap_or(u32::MAX);
        self.state.complaints =
            u32::try_from(warnings.len() + self.refused.len() + not_served.len()).unwrap_or(u32::MAX);
        self.state.synced = u32::from(world.synced() && self.state.synced_ms != 0);
        self.state.connected = u32::from(world.connected());
        if let Err(error) =
            self.pinned.write_warnings(&lines).and_then(|()| self.pinned.write_agent(&self.state))
        {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "`proxy-agent status` will show old facts"
            );
        }
        let mut snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        snapshot.services = self.state.services.into();
        snapshot.endpoints = self.state.endpoints.into();
        snapshot.interfaces = self.state.interfaces.into();
        snapshot.interfaces_failed = self.state.interfaces_failed.into();
        snapshot.generation = self.state.generation;
        snapshot.warnings = self.state.complaints.into();
    }
}

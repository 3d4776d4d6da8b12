//! What the loop reports: the log, the record for the command line, health and metrics.

mod direct;
mod hooks;
mod latency;
mod server;
mod syncs;

use std::collections::{BTreeMap, HashSet};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use jiff::Timestamp;
use proxy_common::abi::{AgentState, NOTE, PROBLEM, text};

use crate::config::{Config, SourceConfig};
use crate::logging;
use crate::serve::health::{Health, SystemClock};
use crate::serve::{Connections, Limits, Metrics, ServiceHealth, Snapshot};
use agent_core::model::{Change, Kind};
use agent_core::model::{Family, ObjectName, World};
use agent_core::plan::Planner;
use agent_kernel::datapath::pinned::Pinned;
use agent_kernel::datapath::probe::Features;
use agent_kernel::datapath::store::pin::BpfRoot;
use agent_kernel::datapath::tables::growth::Standing;
use agent_kernel::kube_proxy::TakeOver;
use agent_source::api::Requests;

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
    /// Drivers that refuse theirs, by interface, and why.
    refusing_drivers: BTreeMap<Arc<str>, String>,
    /// What is to be known of drivers.
    at_drivers: Vec<String>,
    /// What somebody else has last removed or changed, and when it was restored; and how often there was something.
    restored: Option<(u64, String)>,
    /// What connection tracking does not show.
    untracked: Option<String>,
    /// Which nodes are reached directly, and which are not.
    nodes: Vec<String>,
    /// Whether what is new is left to another proxy.
    retired: bool,
    logged: Logged,
    /// What was last written for the command line to show: most syncs have nothing new to say.
    shown: Option<Vec<String>>,
    /// Why the last sync failed.
    failure: Option<String>,
    started: Instant,
    reported: Instant,
    /// Whether the Node object that was seen last wants traffic (H-8); before any was seen, whether the source knows no
    /// Nodes.
    eligible: bool,
}

/// Warnings that have been logged: each is logged once. While tables grow there are some about each Service, so of their text
/// only a hash is kept.
#[derive(Default)]
struct Logged {
    hasher: RandomState,
    seen: HashSet<u64>,
}

impl Logged {
    fn is_new(&mut self, line: &str) -> bool {
        self.seen.insert(self.hasher.hash_one(line))
    }
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
            refusing_drivers: BTreeMap::new(),
            at_drivers: Vec::new(),
            restored: None,
            untracked: None,
            nodes: Vec::new(),
            retired: false,
            logged: Logged::default(),
            shown: None,
            failure: None,
            started,
            reported: Instant::now(),
            eligible: matches!(config.source, SourceConfig::Manifests(_)),
        };
        report.pinned.write_agent(&report.state)?;
        Ok(report)
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

    /// Takes each change before `world` does.
    pub(super) fn observe(&mut self, change: &Change, world: &World) {
        self.latency.observe(change, |name| world.slice(name));
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
                    if self.logged.is_new(&format!("{object}: {line}")) {
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
        self.shown = None;
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
    pub(super) fn count(&self, planner: &Planner) {
        let (actual, affinity_secs) = (planner.actual(), planner.affinity_secs().clone());
        let tables = self.pinned.fill_by_agent(actual, planner.used_slots(), planner.live_backends());
        let mut snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        snapshot.frontends = actual.frontends.len() as u64;
        snapshot.tables = tables;
        snapshot.affinity_secs = affinity_secs;
    }

    /// What connection tracking does not show; it has been logged.
    pub(super) fn untracked(&mut self, warning: Option<String>) {
        self.untracked = warning;
    }

    /// What is counted, for who works beside the loop.
    pub(super) fn counters(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    /// Renews the record that the command line reads, and what metrics show.
    pub(super) fn write(&mut self, world: &World, pending: bool) {
        let mut lines: Vec<String> = self.failure.iter().cloned().collect();
        lines.extend(self.refusing.iter().map(|line| format!("{PROBLEM}{line}; trying again")));
        lines.extend(self.refused.iter().cloned());
        lines.extend(self.untracked.iter().cloned());
        lines.extend(self.cramped.iter().cloned());
        lines.extend(self.nodes.iter().cloned());
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
        lines.extend(self.at_drivers.iter().cloned());
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
        let shown = if self.shown.as_ref() == Some(&lines) {
            Ok(())
        } else {
            self.shown = None;
            self.pinned.write_warnings(&lines).map(|()| self.shown = Some(lines))
        };
        if let Err(error) = shown.and_then(|()| self.pinned.write_agent(&self.state)) {
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

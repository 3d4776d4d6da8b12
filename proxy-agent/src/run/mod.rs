//! The loop: changes in, plan, write, report.
//!
//! One thread owns everything; sources, netlink and the HTTP servers only send or read. The kernel works on
//! without it: ending this loop, in whatever way, changes nothing in the tables (Y-22).

mod attach;
mod dsr;
mod host;
mod lost;
mod report;
mod server_cache;
mod sockets;
mod sync;
mod tables;
mod takeover;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use crate::config::{Config, SourceConfig};
use crate::sync_runner::{Limits, SyncRunner};
use agent_core::model::{Change, Kind, World};
use agent_core::plan::{Capacity, Planner};
use agent_kernel::datapath::attach::exclude::Excluded;
use agent_kernel::datapath::attach::grace;
use agent_kernel::datapath::flow::Sweeper;
use agent_kernel::datapath::load::{Loaded, ProgramLog};
use agent_kernel::datapath::probe::Features;
use agent_kernel::datapath::store::note::Note;
use agent_kernel::datapath::store::pin::{BpfRoot, RootLock};
use agent_kernel::datapath::store::retired::Retired;
use agent_kernel::datapath::tables::kernel::Kernel;
use agent_kernel::netlink;
use agent_source::api::Requests;
use agent_source::api::events::{Event, EventPublisher, Events};
use agent_source::api::{ClientConfig, Cluster};
use agent_source::manifests;
use report::Report;
use tables::repair::COMPARE_EVERY;

/// Once an hour everything is compared with what is really in the kernel (Y-20).
const MAX_GAP_MS: u64 = 3_600_000;

/// How often the flow tables are swept a little, and the record for the command line is renewed.
const TICK: Duration = Duration::from_millis(500);
/// Ticks from one heartbeat to the next.
const BEAT: u64 = 8;
/// How long another agent that ends may take to let go of the pins.
const CLAIM: Duration = Duration::from_secs(2);
/// How long a thread that has resolved a name stays: always.
const THREADS_STAY: Duration = Duration::from_secs(365 * 24 * 3600);
/// Changes that may wait for the loop.
const QUEUE: usize = 4096;

/// Runs the agent until it is told to end.
pub fn run(config: Config) -> Result<()> {
    agent_kernel::share_memory();
    let without = host::require::rights()?;
    let conntrack = host::tune(&config)?;
    let root = BpfRoot::new(&config.bpf_root);
    root.prepare()?;
    if config.init_only {
        return Ok(());
    }
    let cgroup_root = host::require::cgroup_root(&config)?;
    let few_descriptors = host::descriptors::raise();
    let Some(lock) = root.lock_within(CLAIM)? else {
        bail!(
            "another agent runs with --bpf-root {}: stop it first, or give this one a root of its own",
            root.path().display()
        );
    };
    let mut agent = Agent::open(config, cgroup_root, &root, lock)?;
    agent.conntrack = conntrack;
    few_descriptors.into_iter().for_each(|line| agent.report.warn(line));
    agent.report.without(without.into_iter().chain(grace::slow(Path::new("/"))));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Names are resolved on threads of its own, and it panics where none can be had: one that there was stays.
        .thread_keep_alive(THREADS_STAY)
        .build()
        .context("cannot start the event loop")?;
    let result = runtime.block_on(agent.run());
    // Whoever still resolves a name is not waited for.
    runtime.shutdown_background();
    result
}

/// When syncs are made: a change that comes alone at once, one that may be half of another a moment later, and those of a
/// burst together (Y-18, Y-19).
fn limits(config: &Config) -> Limits {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Limits {
        settle_ms: 5,
        min_gap_ms: config.min_sync_period.map_or(10, millis),
        max_gap_ms: MAX_GAP_MS,
        retry_first_ms: 100,
        retry_max_ms: millis(config.sync_period),
    }
}

struct Agent {
    config: Config,
    /// `None` without socket programs.
    cgroup_root: Option<PathBuf>,
    world: World,
    /// `None` only between a failed sync and the reading that follows.
    planner: Option<Planner>,
    capacity: Capacity,
    growth: tables::growth::Growth,
    kernel: Kernel,
    loaded: Loaded,
    sweeper: Sweeper,
    sockets: sockets::Sockets,
    untranslated: sockets::untranslated::Untranslated,
    lost: lost::Lost,
    taken: tables::taken::Follower,
    direct: dsr::Direct,
    /// Whether programs of ours have served this node before this agent.
    served: bool,
    /// `None` before the first sync.
    adoption: Option<takeover::adopt::Adoption>,
    /// Source ports of ours that another proxy is told of.
    reserve: takeover::reserve::Reserve,
    /// Whether kube-proxy's rules are looked after.
    taken_over: bool,
    retired: Retired,
    /// Whether the operator wanted so before the tables were planned.
    retired_early: bool,
    repairs: tables::repair::Repairs,
    excluded: Excluded,
    /// Whether all pods have been listed that say that they are to be left to their packets.
    pods_known: bool,
    runner: SyncRunner,
    report: Report,
    requests: Requests,
    clock: Instant,
    /// Whether the tables have been brought in line once and the programs are attached.
    ready: bool,
    /// The next sync reads the kernel and compares everything.
    full: bool,
    full_at_ms: u64,
    /// Whether much memory has been freed.
    freed: bool,
    /// Whether the kernel's connection tracking has been set; it comes with the first rule that needs it.
    conntrack: bool,
    /// Whether what was set has been compared with what the node is.
    fitted: bool,
}

impl Agent {
    fn open(config: Config, cgroup_root: Option<PathBuf>, root: &BpfRoot, lock: RootLock) -> Result<Self> {
        let started = Instant::now();
        let features = Features::probe();
        let served = root.has_hooks()?;
        let log = if tracing::enabled!(tracing::Level::TRACE) { ProgramLog::Debug } else { ProgramLog::Off };
        let most = config.capacities.limits();
        let (sizes, remarks) = most.start(root)?;
        let loaded = Loaded::open(root, &features, &sizes, log)?;
        for warning in loaded.warnings() {
            tracing::warn!("{warning}");
        }
        if let Some(change) = loaded.changed().filter(|change| change.hooks != 0) {
            tracing::info!("{change}");
        }
        let kernel = Kernel::open(root)?;
        let capacity = Capacity::of_maps(&kernel.sizes());
        let requests = Requests::default();
        let mut report = Report::open(&config, root, &features, loaded.warnings(), &requests, started)?;
        remarks.iter().for_each(|line| tracing::info!("{line}"));
        report.without(remarks);
        let mut sweeper = Sweeper::open(root, config.flow_timeouts)?;
        // Before the first packet comes: records that have never been used are to be free.
        sweeper.all().context("looking through the flows")?;
        let (excluded, pods_known) = (config.excluded.clone(), !config.pod_annotations);
        let sockets = sockets::Sockets::new(root.clone(), report.counters());
        let lost = lost::Lost::new(root.clone());
        let taken = tables::taken::Follower::open(root, &config.flow_timeouts)?;
        Ok(Self {
            world: World::new(config.settings.clone()),
            runner: SyncRunner::new(limits(&config), 0),
            config,
            cgroup_root,
            planner: None,
            capacity,
            growth: tables::growth::Growth::new(most, sizes, features, log),
            kernel,
            loaded,
            sweeper,
            sockets,
            untranslated: sockets::untranslated::Untranslated::default(),
            lost,
            taken,
            direct: dsr::Direct::new(),
            served,
            adoption: None,
            reserve: takeover::reserve::Reserve::default(),
            taken_over: false,
            retired: Retired::open(root)?,
            retired_early: false,
            repairs: tables::repair::Repairs::open(root, lock)?,
            excluded,
            pods_known,
            report,
            requests,
            clock: Instant::now(),
            ready: false,
            full: true,
            full_at_ms: 0,
            freed: false,
            conntrack: false,
            fitted: false,
        })
    }

    async fn run(mut self) -> Result<()> {
        let (tx, mut changes) = mpsc::channel(QUEUE);
        let (events, publisher) = Events::new();
        events.record(Event::Starting); // H-29.
        self.repairs.events = Some(events.clone());
        let mut source = tokio::spawn(watch_source(
            self.config.source.clone(),
            self.node_name(),
            self.config.pod_annotations,
            self.requests.clone(),
            Note::new(self.loaded.root(), Note::SERVERS),
            publisher,
            tx.clone(),
        ));
        tokio::spawn(netlink::watch(tx));
        let mut not_served = self.report.serve(&self.config, &events)?;
        let mut file = tokio::spawn(host::file_changed(self.config.file.clone()));
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut slices = interval(COMPARE_EVERY);
        slices.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
        let mut beats = 0_u64;
        let signal = loop {
            let due = self.world.synced().then(|| Duration::from_millis(self.runner.wait_ms(self.now_ms())));
            tokio::select! {
                biased;
                _ = terminate.recv() => break "SIGTERM",
                _ = interrupt.recv() => break "SIGINT",
                ended = &mut source => return Err(match ended {
                    Ok(Err(error)) => error,
                    Ok(Ok(())) => anyhow!("the source of Services ended by itself"),
                    Err(error) => anyhow!(error).context("the source of Services"),
                }),
                changed = &mut file => return Err(changed.unwrap_or_else(|e| anyhow!(e).context("watching --config"))),
                Some(event) = not_served.recv() => {
                    let why = anyhow!("{event}; free the address, or start without --bind-address-hard-fail");
                    events.record_last(event).await;
                    return Err(why);
                }
                () = pass(due.unwrap_or(Duration::MAX)), if due.is_some() => self.sync()?,
                Some(change) = changes.recv() => {
                    self.apply(change);
                    // A burst is taken in at once: the sync looks at its end.
                    while let Ok(change) = changes.try_recv() {
                        self.apply(change);
                    }
                }
                _ = ticks.tick() => {
                    beats += 1;
                    self.tick(beats.is_multiple_of(BEAT));
                }
                _ = slices.tick(), if self.repairs.compares() => self.compare(),
            }
        };
        // Nothing is touched.
        tracing::info!("{signal}: leaving; the kernel goes on with the tables as they are");
        Ok(())
    }

    fn node_name(&self) -> Arc<str> {
        self.config.settings.node_name.clone()
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn apply(&mut self, change: Change) {
        if let Change::Excluded(pod, uid) = change {
            self.excluded.set_pod(pod.to_string().into(), uid.as_deref());
            return self.excluded_changed();
        }
        if matches!(change, Change::Synced(Kind::Pod)) {
            self.pods_known = true;
            self.excluded_changed();
        }
        self.report.observe(&change, &self.world);
        let links = matches!(change, Change::Links(_));
        // What was kept on the suspicion that it is only unreadable can be compared now.
        self.full |= matches!(change, Change::Whole(true));
        let Some(urgency) = self.world.apply(change) else { return };
        if links && self.ready {
            // A new pod's first packet must find the programs there (D-17): they do not wait for a sync.
            self.attach_interfaces();
        }
        let now = self.now_ms();
        self.runner.request(now, urgency);
        self.report.queued();
    }

    fn tick(&mut self, beat: bool) {
        if let Some(mut log) = self.loaded.logger() {
            log.drain();
        }
        if self.ready {
            self.look_at_settings();
        }
        match self.sweeper.tick(TICK) {
            Ok(0) => {}
            Ok(ended) => tracing::debug!("{ended} flows had ended"),
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "flows are not swept"),
        }
        if !self.ready {
            self.report.progress(&self.world);
        }
        if self.ready && !self.excluded.is_empty() {
            self.exclude();
        }
        self.grow(beat);
        if beat && std::mem::take(&mut self.freed) {
            agent_kernel::trim();
        }
        if self.ready {
            self.repair();
        }
        self.follow_retirement();
        self.reserve_ports();
        if self.adoption.as_ref().is_some_and(|adoption| self.ready && adoption.leave() != 0) {
            self.adopt();
        }
        if let Some(adoption) = &mut self.adoption {
            adoption.take(self.sweeper.flows());
            if beat {
                adoption.tidy(self.sweeper.flows());
            }
            self.report.left_to_netfilter(adoption.left());
        }
        if beat {
            self.lead_in();
            self.lead_pods();
            self.set_conntrack();
            self.count();
            self.report.untracked(self.taken.warning());
            self.tell_nodes();
            self.report.write(&self.world, self.runner.queued_ms().is_some());
        }
    }
}

/// A time passes. None needs no timer: that would take its next tick, a millisecond, all the same.
async fn pass(time: Duration) {
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}

/// Hears from the source until the receiver has gone; an error is final.
async fn watch_source(
    source: SourceConfig,
    node: Arc<str>,
    pods: bool,
    requests: Requests,
    cache: Note,
    events: EventPublisher,
    tx: mpsc::Sender<Change>,
) -> Result<()> {
    let config = match source {
        SourceConfig::Manifests(path) => {
            tokio::spawn(events.publish(None, node.clone()));
            return Ok(manifests::run(path, node, tx).await?);
        }
        SourceConfig::Kubeconfig { file, servers } => ClientConfig { kubeconfig: Some(file), servers },
        SourceConfig::ApiServer(servers) => ClientConfig { kubeconfig: None, servers },
        SourceConfig::InCluster => ClientConfig { kubeconfig: None, servers: Vec::new() },
    };
    let cluster = Cluster::open(config, &requests, Box::new(server_cache::CachedServers(cache))).await?;
    tokio::spawn(events.publish(Some(cluster.client()), node.clone()));
    cluster.run(node, pods, tx).await;
    Ok(())
}

//! The loop: hear, know, wish, plan, write, tell.
//!
//! One thread owns everything; sources, netlink and the HTTP servers only send or read. The kernel works on
//! without it: ending this loop, in whatever way, changes nothing in the tables (Y-22).

mod adopt;
mod descriptors;
mod follow;
mod growth;
mod latency;
mod learnt;
mod lost;
mod repair;
mod report;
mod require;
mod reserve;
mod segments;
mod sockets;
mod sysctl;
mod taken;
mod untranslated;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use proxy_common::abi::config::{LEAVE_MIDDLE, LEAVE_NEW};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use crate::config::{Config, ConfigFile, SourceConfig};
use crate::pace::{Limits, Pace};
use agent_core::datapath::Datapath;
use agent_core::model::World;
use agent_core::model::{Change, Kind};
use agent_core::plan::{Capacity, Plan, Planner, Step};
use agent_kernel::datapath::attach::AttachError;
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
use agent_source::directory;
use agent_source::events::{Event, Events, Untold};
use agent_source::kubernetes::{Account, Cluster};
use agent_source::requests::Requests;
use report::Report;

/// Once an hour everything is compared with what is really in the kernel (Y-20).
const MAX_GAP_MS: u64 = 3_600_000;

/// How often the flow tables are swept a little, and the record for the command line is renewed.
const TICK: Duration = Duration::from_millis(500);
/// Runs of 512 records that one sweep looks at: the default table is looked through in five seconds.
const SWEEP_RUNS: u32 = 32;
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
    let without = require::rights()?;
    let conntrack = tune(&config)?;
    let root = BpfRoot::new(&config.bpf_root);
    root.prepare()?;
    if config.init_only {
        return Ok(());
    }
    let cgroup_root = require::cgroup_root(&config)?;
    lift_memlock();
    let few_descriptors = descriptors::raise();
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

/// Sets what the node is expected to have set, before anything else (Z-7); says whether connection tracking was
/// there to be set.
fn tune(config: &Config) -> Result<bool> {
    let root = Path::new("/");
    if let Err(error) = sysctl::oom_score_adj(root, config.oom_score_adj) {
        tracing::warn!("oom_score_adj is not set to {}: {error}", config.oom_score_adj);
    }
    set_conntrack(config)
}

fn set_conntrack(config: &Config) -> Result<bool> {
    match sysctl::apply(Path::new("/"), &config.sysctls)? {
        sysctl::Applied::Done(notes) => {
            notes.into_iter().for_each(|note| tracing::warn!("{note}"));
            Ok(true)
        }
        sysctl::Applied::Absent => Ok(false),
    }
}

/// When passes are made: bursts are taken together, and nothing waits longer than a few milliseconds unless it is to
/// (Y-18, Y-19).
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

/// Before 5.11 maps count against this limit; where it cannot be raised the kernel says so at the first map.
fn lift_memlock() {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        tracing::debug!("RLIMIT_MEMLOCK stays as it is: {error}");
    }
}

struct Agent {
    config: Config,
    /// `None` without socket programs.
    cgroup_root: Option<PathBuf>,
    world: World,
    /// `None` only between a failed pass and the reading that follows.
    planner: Option<Planner>,
    capacity: Capacity,
    growth: growth::Growth,
    kernel: Kernel,
    loaded: Loaded,
    sweeper: Sweeper,
    sockets: sockets::Sockets,
    untranslated: untranslated::Untranslated,
    lost: lost::Lost,
    taken: taken::Follower,
    /// Whether programs of ours have served this node before this agent.
    served: bool,
    /// `None` before the first pass.
    adoption: Option<adopt::Adoption>,
    /// Source ports of ours that another proxy is told of.
    reserve: reserve::Reserve,
    /// Whether kube-proxy's rules are looked after.
    taken_over: bool,
    retired: Retired,
    /// Whether the operator wanted so before the tables were planned.
    retired_early: bool,
    repairs: repair::Repairs,
    excluded: Excluded,
    /// Whether all pods have been listed that say that they are to be left to their packets.
    pods_known: bool,
    pace: Pace,
    report: Report,
    requests: Requests,
    clock: Instant,
    /// Whether the tables have been brought in line once and the programs are attached.
    ready: bool,
    /// The next pass reads the kernel and compares everything.
    full: bool,
    full_at_ms: u64,
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
        let capacity = capacity_of(&kernel);
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
        let taken = taken::Follower::open(root, &config.flow_timeouts)?;
        Ok(Self {
            world: World::new(config.settings.clone()),
            pace: Pace::new(limits(&config), 0),
            config,
            cgroup_root,
            planner: None,
            capacity,
            growth: growth::Growth::new(most, sizes, features, log),
            kernel,
            loaded,
            sweeper,
            sockets,
            untranslated: untranslated::Untranslated::default(),
            lost,
            taken,
            served,
            adoption: None,
            reserve: reserve::Reserve::default(),
            taken_over: false,
            retired: Retired::open(root)?,
            retired_early: false,
            repairs: repair::Repairs::open(root, lock)?,
            excluded,
            pods_known,
            report,
            requests,
            clock: Instant::now(),
            ready: false,
            full: true,
            full_at_ms: 0,
            conntrack: false,
            fitted: false,
        })
    }

    async fn run(mut self) -> Result<()> {
        let (tx, mut changes) = mpsc::channel(QUEUE);
        let (events, untold) = Events::new();
        events.tell(Event::Starting); // H-29.
        self.repairs.events = Some(events.clone());
        let mut source = tokio::spawn(hear(
            self.config.source.clone(),
            self.node_name(),
            self.config.pod_annotations,
            self.requests.clone(),
            Note::new(self.loaded.root(), Note::SERVERS),
            untold,
            tx.clone(),
        ));
        tokio::spawn(netlink::watch(tx));
        let mut not_served = self.report.serve(&self.config, &events)?;
        let mut file = tokio::spawn(file_changed(self.config.file.clone()));
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
        let mut beats = 0_u64;
        loop {
            let due = self.world.synced().then(|| Duration::from_millis(self.pace.wait_ms(self.now_ms())));
            tokio::select! {
                biased;
                _ = terminate.recv() => return self.leave("SIGTERM"),
                _ = interrupt.recv() => return self.leave("SIGINT"),
                ended = &mut source => return Err(match ended {
                    Ok(Err(error)) => error,
                    Ok(Ok(())) => anyhow!("the source of Services ended by itself"),
                    Err(error) => anyhow!(error).context("the source of Services"),
                }),
                changed = &mut file => return Err(changed.unwrap_or_else(|e| anyhow!(e).context("watching --config"))),
                Some(event) = not_served.recv() => {
                    let why = anyhow!("{event}; free the address, or start without --bind-address-hard-fail");
                    events.tell_last(event).await;
                    return Err(why);
                }
                () = tokio::time::sleep(due.unwrap_or(Duration::MAX)), if due.is_some() => self.pass()?,
                Some(change) = changes.recv() => {
                    self.hear(change);
                    // A burst is taken in at once: the pass looks at its end.
                    while let Ok(change) = changes.try_recv() {
                        self.hear(change);
                    }
                }
                _ = ticks.tick() => {
                    beats += 1;
                    self.tick(beats.is_multiple_of(BEAT));
                }
            }
        }
    }

    /// Ends without touching anything.
    fn leave(&mut self, why: &str) -> Result<()> {
        tracing::info!("{why}: leaving; the kernel goes on with the tables as they are");
        Ok(())
    }

    fn node_name(&self) -> Arc<str> {
        self.config.settings.node_name.clone()
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn hear(&mut self, change: Change) {
        if let Change::Excluded(pod, uid) = change {
            self.excluded.set_pod(pod.to_string().into(), uid.as_deref());
            return self.excluded_changed();
        }
        if matches!(change, Change::Synced(Kind::Pod)) {
            self.pods_known = true;
            self.excluded_changed();
        }
        self.report.heard(&change, &self.world);
        let links = matches!(change, Change::Links(_));
        // What was kept on the suspicion that it is only unreadable can be compared now.
        self.full |= matches!(change, Change::Whole(true));
        if !self.world.hear(change) {
            return;
        }
        if links && self.ready {
            // A new pod's first packet must find the programs there (D-17): they do not wait for a pass.
            self.attach_interfaces();
        }
        let now = self.now_ms();
        self.pace.request(now);
        self.report.queued();
    }

    fn tick(&mut self, beat: bool) {
        if let Some(mut log) = self.loaded.logger() {
            log.drain();
        }
        if self.ready {
            self.look_at_settings();
        }
        match self.sweeper.tick(SWEEP_RUNS) {
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
            self.report.write(&self.world, self.pace.queued_ms().is_some());
        }
    }

    /// Tables that are nearly full become larger.
    fn grow(&mut self, beat: bool) {
        // While connections of another proxy are adopted the loop holds flows of these tables.
        let adopting = self.adoption.as_ref().is_none_or(|adoption| adoption.leave() != 0);
        let (Some(planner), false, true) = (&self.planner, adopting, self.ready) else { return };
        let root = self.loaded.root().clone();
        let grown = self.growth.go_on(&root, planner.actual(), self.report.pinned(), beat);
        let grown = grown.and_then(|loaded| loaded.map_or(Ok(()), |loaded| self.move_to(loaded)));
        if let Err(error) = grown {
            tracing::error!("tables do not grow: {error:#}");
            // Whatever counts now is what is written; what is left to do of the exchange the next start does.
            if let Err(error) = self.open_tables(&root) {
                tracing::error!("the tables cannot be opened again: {error:#}");
            }
        }
        if let Some(news) = self.growth.news() {
            self.repairs.tell(Event::NotGrown(news));
        }
        self.report.growth(self.growth.standing(), self.growth.warnings());
    }

    /// From now on these programs and their tables are at work.
    fn move_to(&mut self, loaded: Loaded) -> Result<()> {
        if let Some(change) = loaded.changed() {
            tracing::info!("{change}");
        }
        self.loaded = loaded;
        let root = self.loaded.root().clone();
        self.open_tables(&root)
    }

    /// Works with the newest tables from now on.
    fn open_tables(&mut self, root: &BpfRoot) -> Result<()> {
        self.kernel = Kernel::open(root)?;
        self.capacity = capacity_of(&self.kernel);
        self.sweeper = Sweeper::open(root, self.config.flow_timeouts)?;
        self.report.moved(root)?;
        if self.ready {
            // The links are the same, and are held by these programs from now on.
            self.attach()?;
        }
        if let Some(adoption) = &mut self.adoption
            && adoption.move_on()
        {
            self.world.set_leave(adoption.leave());
            self.taken_over = false;
        }
        // What found no room is planned again.
        self.full = true;
        let now = self.now_ms();
        self.pace.request(now);
        Ok(())
    }

    /// Where connection tracking was not there at the start, it is set when it comes.
    fn set_conntrack(&mut self) {
        if self.conntrack {
            return;
        }
        self.conntrack = set_conntrack(&self.config).unwrap_or_else(|error| {
            self.report.warn(format!("{error:#}"));
            true
        });
    }

    /// Compares what was set with what the node is, once it is known (F-13).
    fn fit(&mut self) -> Result<()> {
        let node = self.world.node_object();
        if self.fitted || node.is_none() && self.config.settings.bind_address.is_none() {
            return Ok(());
        }
        let pod_cidrs = node.map_or(&[][..], |node| &node.pod_cidrs);
        let misfits = self.config.misfits(self.world.primary_family(), pod_cidrs);
        if !misfits.errors.is_empty() {
            bail!("the settings do not fit this node: {}", misfits.errors.join("; "));
        }
        misfits.warnings.into_iter().for_each(|line| self.report.warn(line));
        self.fitted = true;
        Ok(())
    }

    /// Counting takes a walk through all endpoints: now and then, not with each pass.
    fn count(&self) {
        if let Some(planner) = &self.planner {
            self.report.count(planner.actual());
        }
    }

    /// Brings the tables in line with the world.
    fn pass(&mut self) -> Result<()> {
        self.fit()?;
        let started = Instant::now();
        let now = self.now_ms();
        if now.saturating_sub(self.full_at_ms) >= MAX_GAP_MS {
            self.full = true;
        }
        self.pace.begin();
        let full = self.full;
        match self.write(now) {
            Ok(Written { plan, retired }) => {
                self.pace.succeeded(self.now_ms());
                if let Some(at) = plan.retry_at_ms {
                    self.pace.request_at(at);
                }
                if full {
                    self.full_at_ms = now;
                }
                self.taken.wrote(self.kernel.take_news());
                if !self.ready {
                    self.attach()?;
                }
                let first = !std::mem::replace(&mut self.ready, true);
                self.report.wrote(&self.world, &plan, full, started.elapsed());
                self.follow_sockets(retired, first || !plan.steps.is_empty()); // Y-25: last, and only after success.
                if retired {
                    self.lead_in();
                }
                self.report.write(&self.world, false);
                if first {
                    self.count();
                    self.report.ready(&self.world, &plan);
                }
                self.adopt();
            }
            Err(error) => {
                self.pace.failed(self.now_ms());
                self.full = true;
                self.report.failed(&self.world, &error, full, started.elapsed());
            }
        }
        Ok(())
    }

    /// Does what the operator has said with `proxy-agent retire`.
    fn follow_retirement(&mut self) {
        let Some(adoption) = &mut self.adoption else { return self.retire_early() };
        match self.retired.get() {
            Ok(retired) if retired != adoption.is_retired() => {
                tracing::info!(
                    "{}",
                    if retired {
                        "retired: what is new is left to another proxy"
                    } else {
                        "retired no longer"
                    }
                );
                adoption.retire(retired);
                let leave = adoption.leave();
                // Before anybody else begins something, and again when that is in the kernel.
                self.reserve_ports();
                self.world.set_leave(leave);
                // Rules serve the node from now on, or until what they have begun has been taken over.
                self.report.keep_rules(true);
                self.taken_over = false;
                let now = self.now_ms();
                self.pace.request(now);
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot see whether to retire")
            }
        }
        self.report.retired(self.adoption.as_ref().is_some_and(adopt::Adoption::is_retired));
    }

    /// The same before the tables are planned for the first time, which may take as long as no server answers: those of an
    /// agent that ran before are at work.
    fn retire_early(&mut self) {
        let done = self.retired.get().and_then(|retired| {
            if retired && !self.retired_early {
                self.kernel.leave_new()?;
            }
            Ok(retired)
        });
        match done {
            Ok(retired) => {
                if retired && !self.retired_early {
                    tracing::info!("retired: what is new is left to another proxy");
                }
                self.retired_early = retired;
            }
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "cannot retire yet"),
        }
        self.report.retired(self.retired_early);
    }

    /// While another proxy serves what is new, it is told which source ports are ours.
    fn reserve_ports(&mut self) {
        let leaves = self.adoption.as_ref().is_some_and(|adoption| adoption.leave() & LEAVE_NEW != 0);
        if leaves || self.retired_early {
            let written = self.retired_early || planner_flags(self.planner.as_ref()) & LEAVE_NEW != 0;
            match self.reserve.keep_up(self.sweeper.flows(), written) {
                Ok(0) => {}
                Ok(count) => tracing::debug!("{count} source ports are held in connection tracking"),
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "another proxy may masquerade with source ports of flows that go on"
                ),
            }
        }
    }

    /// Goes on with taking over connections from a kube-proxy; when that is done its rules may go.
    fn adopt(&mut self) {
        let (Some(adoption), Some(planner)) = (&mut self.adoption, &self.planner) else { return };
        match adoption.go_on(self.sweeper.flows(), planner.actual(), self.report.is_attached()) {
            Ok(false) => {}
            Ok(true) => {
                self.world.set_leave(adoption.leave());
                self.lead_pods();
                let now = self.now_ms();
                self.pace.request(now);
            }
            Err(error) => {
                tracing::warn!("connections of kube-proxy's rules are not taken over yet: {error:#}")
            }
        }
        let left = planner_flags(self.planner.as_ref());
        let done = left == 0 && self.adoption.as_ref().is_some_and(|adoption| adoption.leave() == 0);
        if done && !std::mem::replace(&mut self.taken_over, true) {
            self.report.left_to_netfilter(self.adoption.as_ref().map_or(0, adopt::Adoption::left));
            self.report.keep_rules(false);
            self.report.take_over(&self.config);
        }
    }

    /// Sockets of pods are translated by their packets as long as connections live that another proxy has begun.
    fn lead_pods(&mut self) {
        match self.sweeper.flows().has_adopted_streams() {
            Ok(any) => {
                if self.world.set_pods_by_packet(any) {
                    let how = if any {
                        "by their packets, as long as connections live that another proxy has begun"
                    } else {
                        "when they connect"
                    };
                    tracing::info!("sockets of pods are translated {how}");
                    let now = self.now_ms();
                    self.pace.request(now);
                }
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "cannot see whether connections live that another proxy has begun"
            ),
        }
    }

    /// Plans and writes. After an error the kernel must be read again.
    fn write(&mut self, now: u64) -> Result<Written> {
        let pass = if self.full || self.planner.is_none() {
            let actual = self.kernel.read().context("reading the tables")?;
            if self.adoption.is_none() {
                let mut adoption = adopt::Adoption::plan(self.served, &actual);
                if self.retired.get()? {
                    adoption.retire(true);
                }
                self.retired_early = false;
                self.world.set_leave(adoption.leave());
                self.adoption = Some(adoption);
                // An agent may have taken them over that ran before.
                self.lead_pods();
            }
            let planner = Planner::new(&actual, self.capacity);
            let desired = self.world.take_desired();
            if self.world.whole() { planner.full(&desired, now) } else { planner.full_keeping(&desired, now) }
        } else {
            let dirty = self.world.take_dirty();
            let node = self.world.node();
            match self.planner.take() {
                Some(planner) => planner.dirty(&dirty, Some(&node), now),
                None => bail!("no planner between two passes"),
            }
        };
        let retired = sockets::retires_udp(pass.before(), &pass.plan.steps);
        let lost = lost::lost(&self.world, pass.before(), &pass.plan.steps);
        if let Err((done, error)) = self.kernel.apply(&pass.plan.steps) {
            let failed = pass.plan.steps.get(done).map(Step::to_string).unwrap_or_default();
            return Err(anyhow!(error).context(format!(
                "step {} of {} was not done: {failed}",
                done + 1,
                pass.plan.steps.len()
            )));
        }
        let plan = pass.plan.clone();
        self.growth.short(plan.short.iter().copied());
        self.planner = Some(pass.applied(self.now_ms()));
        self.full = false;
        self.lost.reset(lost);
        Ok(Written { plan, retired })
    }

    /// Attaches the programs for the first time in this process.
    fn attach(&mut self) -> Result<()> {
        // First: what is to be left must not be translated in between.
        self.exclude();
        match &self.cgroup_root {
            Some(cgroup) => {
                // Everything else is tried again, and told meanwhile.
                if let Err(error @ (AttachError::CgroupRoot { .. } | AttachError::Missing { .. })) =
                    self.loaded.attach_cgroup(cgroup)
                {
                    return Err(error.into());
                }
            }
            None => drop(self.loaded.detach_cgroup()?),
        }
        self.attach_interfaces();
        Ok(())
    }

    fn excluded_changed(&mut self) {
        if self.ready {
            self.exclude();
        }
    }

    /// Pods come and go, and their cgroups some time after we hear of them.
    fn exclude(&mut self) {
        let Some(cgroup) = &self.cgroup_root else { return };
        match self.loaded.sync_excluded(cgroup, &self.excluded, self.pods_known) {
            Ok(results) => self.report.excluded(results),
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "pods are not left to their packets, or no longer"
            ),
        }
    }

    fn attach_interfaces(&mut self) {
        let links = self.config.devices.choose(self.world.links());
        let results = self.loaded.sync_interfaces(&links);
        self.report.interfaces(results);
        self.tell_hooks();
    }

    /// Host processes whose UDP socket was connected before this proxy came are led through it.
    fn lead_in(&mut self) {
        let ours = self.adoption.as_ref().is_some_and(|adoption| adoption.leave() == 0);
        if let (true, Some(_), Some(planner)) = (ours, &self.cgroup_root, &self.planner) {
            self.untranslated.look(planner.actual());
        }
    }

    /// Host processes whose connected UDP socket leads to an endpoint that has gone are led on; flows that pass an
    /// interface need no such thing.
    fn follow_sockets(&mut self, retired: bool, changed: bool) {
        if let Some(planner) = &self.planner {
            self.sockets.follow(planner.actual(), retired, changed);
        }
    }
}

/// What is left to another proxy, as it stands in the kernel.
fn planner_flags(planner: Option<&Planner>) -> u32 {
    planner.map_or(0, |planner| planner.actual().config.flags & (LEAVE_NEW | LEAVE_MIDDLE))
}

struct Written {
    plan: Plan,
    retired: bool,
}

fn capacity_of(kernel: &Kernel) -> Capacity {
    use proxy_common::abi::maps;
    let sizes = kernel.sizes();
    let size = |name: &str, default: u32| {
        sizes.iter().find(|(map, _)| *map == name).map_or(default, |(_, size)| *size)
    };
    let default = Capacity::default();
    Capacity {
        frontends: size(maps::FRONTENDS, default.frontends),
        slots: size(maps::SLOTS, default.slots),
        backends: size(maps::BACKENDS, default.backends),
        addresses: size(maps::ADDRESSES, default.addresses),
        sources: size(maps::SOURCES, default.sources),
        services: size(maps::SERVICES, default.services),
        ifaces: size(maps::IFACES, default.ifaces),
        routes: size(maps::MASQUERADE, default.routes),
    }
}

/// Ends when the configuration file says something else; without one, never.
async fn file_changed(file: Option<ConfigFile>) -> anyhow::Error {
    match file {
        Some(file) => follow::changed(file).await,
        None => std::future::pending().await,
    }
}

/// Hears from the source until the receiver has gone; an error is final.
async fn hear(
    source: SourceConfig,
    node: Arc<str>,
    pods: bool,
    requests: Requests,
    learnt: Note,
    events: Untold,
    tx: mpsc::Sender<Change>,
) -> Result<()> {
    let account = match source {
        SourceConfig::Manifests(path) => {
            tokio::spawn(events.publish(None, node.clone()));
            return Ok(directory::run(path, node, tx).await?);
        }
        SourceConfig::Kubeconfig { file, servers } => Account { kubeconfig: Some(file), servers },
        SourceConfig::ApiServer(servers) => Account { kubeconfig: None, servers },
        SourceConfig::InCluster => Account { kubeconfig: None, servers: Vec::new() },
    };
    let cluster = Cluster::open(account, &requests, Box::new(learnt::Learnt(learnt))).await?;
    tokio::spawn(events.publish(Some(cluster.client()), node.clone()));
    cluster.run(node, pods, tx).await;
    Ok(())
}

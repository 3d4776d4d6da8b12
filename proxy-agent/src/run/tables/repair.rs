//! What somebody else has done to our hooks, pins and tables is noticed, undone, counted and reported.
//!
//! Hooks and pins are looked at twice a second, or as often as a small share of the time allows where there are very many;
//! settings before each sweep of the flows; entries of tables within a minute.
//! Hooks that refuse their programs are tried again. Meanwhile `/healthz`, `status`, the metrics and an Event say so.

use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use super::super::Agent;
use agent_core::datapath::Datapath as _;
use agent_core::plan::Step;
use agent_kernel::datapath::store::pin::{BpfRoot, RootLock};
use agent_kernel::datapath::tables::compare::{Comparison, Found};
use agent_kernel::datapath::tables::kernel::KernelError;
use agent_source::api::events::{Event, Events};

/// What one tick may take for a look at hooks: some 1,000 of them. Where there are more the next tick goes on.
const SLICE: Duration = Duration::from_millis(2);
/// How long one tick may restore hooks: a link takes milliseconds, and until the last one is back packets are lost.
const RESTORE: Duration = Duration::from_millis(200);
/// From the beginning of a comparison of all tables to the next.
const COMPARE: Duration = Duration::from_secs(30);
/// From one slice of it to the next, and how long a slice may take: a change that comes meanwhile waits for no more than that.
/// The tables of 50,000 Services with ten endpoints take some hundred slices.
pub(in crate::run) const COMPARE_EVERY: Duration = Duration::from_millis(10);
const COMPARE_SLICE: Duration = Duration::from_micros(500);
/// One that lasts longer than this takes larger slices. An entry that is hurt just after its turn is found within a minute.
const COMPARE_LASTS: Duration = Duration::from_secs(20);
/// Entries that are looked at between two looks at the clock.
const FEW: usize = 128;
/// From one Event about what was restored to the next: whoever fights with us is not told twice a second.
const EVENTS: Duration = Duration::from_secs(30);
/// Objects that one line names.
const NAMED: usize = 3;

/// Something that is begun every so often and done in slices.
#[derive(Debug, Default)]
struct Round {
    begun: Option<Instant>,
    under_way: bool,
}

impl Round {
    /// Begins if it is time.
    fn begin(&mut self, every: Duration) {
        if !self.under_way && self.begun.is_none_or(|begun| begun.elapsed() >= every) {
            self.begun = Some(Instant::now());
            self.under_way = true;
        }
    }
}

/// How far looking is, and what has been reported.
pub(in crate::run) struct Repairs {
    compare: Round,
    comparison: Comparison,
    claim: Claim,
    /// What was last told of hooks that refuse.
    refusing: Vec<String>,
    /// When an Event last told of what was restored.
    reported: Option<Instant>,
    /// Whether the tables could not be compared, which is told once.
    blind: bool,
    /// `None` before the loop runs.
    pub(in crate::run) events: Option<Events>,
}

/// The claim on the root, and the directory that it is on.
struct Claim {
    _lock: RootLock,
    on: Option<(u64, u64)>,
}

impl Claim {
    fn directory(root: &BpfRoot) -> Option<(u64, u64)> {
        root.path().metadata().ok().map(|found| (found.dev(), found.ino()))
    }

    /// A root that was removed and made again, or that another file system was mounted over, has to be claimed anew.
    fn renew(&mut self, root: &BpfRoot) {
        let now = Self::directory(root);
        if now.is_none() || now == self.on {
            return;
        }
        match root.lock() {
            Ok(Some(lock)) => *self = Self { _lock: lock, on: now },
            Ok(None) => tracing::error!(
                "another agent has claimed {}, which was made anew: stop one of the two",
                root.path().display()
            ),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the root cannot be claimed anew");
            }
        }
    }
}

impl Repairs {
    pub(in crate::run) fn open(root: &BpfRoot, lock: RootLock) -> Result<Self, KernelError> {
        Ok(Self {
            compare: Round::default(),
            comparison: Comparison::open(root)?,
            claim: Claim { _lock: lock, on: Claim::directory(root) },
            refusing: Vec::new(),
            reported: None,
            blind: false,
            events: None,
        })
    }

    /// Whether tables are being compared.
    pub(in crate::run) fn compares(&self) -> bool {
        self.compare.under_way
    }

    pub(in crate::run) fn emit(&self, event: Event) {
        if let Some(events) = &self.events {
            events.record(event);
        }
    }
}

impl Agent {
    /// A little of everything, with each tick once the programs are attached.
    pub(in crate::run) fn repair(&mut self) {
        let retried = self.loaded.retry();
        self.report.retried(retried);
        self.attach_drivers();
        self.look();
        self.repairs.compare.begin(COMPARE);
        self.tell_hooks();
    }

    fn look(&mut self) {
        let begun = Instant::now();
        let (mut found, mut ended) = self.loaded.look(begun + SLICE);
        let mut amiss = found.len();
        while amiss != 0 && !ended && begun.elapsed() < RESTORE {
            let (more, whole) = self.loaded.look(Instant::now() + SLICE);
            (amiss, ended) = (more.len(), whole);
            found.extend(more);
        }
        let mut done = Vec::new();
        for repair in found {
            let object = format!("{} {}", repair.what, repair.object);
            match repair.result {
                Ok(()) => {
                    self.report.repaired(repair.what, 1);
                    done.push(object);
                }
                Err(error) => tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "{object} was removed or replaced by somebody else and cannot be restored yet"
                ),
            }
        }
        self.tell_repaired(&done);
        if ended {
            self.repairs.claim.renew(self.loaded.root());
        }
    }

    /// One slice of a comparison. Between two syncs the planner's copy is what must stand in the tables; after a failed one
    /// there is none.
    pub(in crate::run) fn compare(&mut self) {
        let begun = Instant::now();
        let late = self.repairs.compare.begun.is_some_and(|begun| begun.elapsed() >= COMPARE_LASTS);
        let until = begun + if late { COMPARE_SLICE * 8 } else { COMPARE_SLICE };
        while self.repairs.compare.under_way && Instant::now() < until {
            let Some(planner) = &self.planner else { return };
            let found = self.repairs.comparison.go_on(&mut self.kernel, planner.actual(), FEW);
            self.repairs.compare.under_way = found.as_ref().is_ok_and(|found| !found.ended);
            self.undo(found);
        }
    }

    /// What the next sweep hangs on, before it.
    pub(in crate::run) fn look_at_settings(&mut self) {
        let Some(planner) = &self.planner else { return };
        let found = self.repairs.comparison.settings(&self.kernel, planner.actual());
        self.undo(found);
    }

    fn undo(&mut self, found: Result<Found, KernelError>) {
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                if !std::mem::replace(&mut self.repairs.blind, true) {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "tables are not compared with what was written to them"
                    );
                }
                return;
            }
        };
        self.repairs.blind &= !found.ended;
        if found.steps.is_empty() && found.words == 0 {
            return;
        }
        let mut done: Vec<String> = found.steps.iter().take(NAMED).map(Step::to_string).collect();
        if found.words != 0 {
            done.push(format!("{} words of ADDRESS_BITS, ENDPOINT_BITS, SECRET or PAUSE", found.words));
        }
        match self.kernel.apply(&found.steps) {
            Ok(()) => {
                self.report.repaired("entry", found.steps.len() + found.words);
                let more = found.steps.len().saturating_sub(NAMED);
                done.extend((more != 0).then(|| format!("{more} more entries")));
                self.tell_repaired(&done);
            }
            Err((_, error)) => tracing::error!(
                error = &error as &dyn std::error::Error,
                "entries of tables were changed by somebody else and cannot be restored yet"
            ),
        }
    }

    pub(in crate::run) fn tell_repaired(&mut self, objects: &[String]) {
        if objects.is_empty() {
            return;
        }
        let more = objects.len().saturating_sub(NAMED + 1);
        let mut line = objects.iter().take(NAMED + 1).cloned().collect::<Vec<_>>().join(", ");
        if more != 0 {
            line += &format!(" and {more} more");
        }
        tracing::warn!("removed or changed by somebody else, and restored: {line}");
        self.report.restored(&line);
        if self.repairs.reported.is_none_or(|at| at.elapsed() >= EVENTS) {
            self.repairs.reported = Some(Instant::now());
            let note = format!("removed or changed by somebody else, and restored: {line}");
            self.repairs.emit(Event::Restored(note));
        }
    }

    /// Whether all hooks carry their programs, for everybody who asks; an Event when that changes.
    pub(in crate::run) fn tell_hooks(&mut self) {
        let refusing = self.loaded.refusing();
        self.report.hooks(self.loaded.interfaces(), &refusing);
        if refusing == self.repairs.refusing {
            return;
        }
        self.repairs.emit(match refusing.split_first() {
            None => Event::Attached,
            Some((first, [])) => Event::NotAttached(first.clone()),
            Some((first, more)) => Event::NotAttached(format!("{first}; and {} more", more.len())),
        });
        self.repairs.refusing = refusing;
        self.report.write(&self.world, self.runner.queued_ms().is_some());
    }
}

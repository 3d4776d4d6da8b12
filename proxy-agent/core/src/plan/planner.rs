//! The planner: knows what is, is given what should be, and says what to write.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use proxy_common::abi::{FrontendKey, Run};
use proxy_common::addr::{Addr, Port};

use super::batch::{Batch, Released};
use super::capacity::{Capacity, Refusal};
use super::mirror::Mirror;
use super::name::{describe, service_name};
use super::pool::{GRACE_MS, IdPool, RunPool};
use super::{Actual, Plan};
use crate::model::{Desired, DesiredService, NodeTables, ServicePort};

/// What is in the tables, what is free in them, and what did not fit.
///
/// Planning takes the planner; [`Proposal::applied`] gives it back. Whoever could not carry out a plan to its
/// end has no planner any more, and can only read the tables and begin again with [`Planner::new`] and
/// [`Planner::full`]: a planner that is wrong about the tables does not exist.
#[derive(Debug)]
pub struct Planner {
    pub(super) mirror: Mirror,
    pub(super) capacity: Capacity,
    pub(super) ids: IdPool,
    pub(super) indices: IdPool,
    pub(super) runs: RunPool,
    /// Runs found at the start that are not to be trusted: they overlap others or leave the table. They are
    /// replaced, and their slots lie idle until the next start.
    pub(super) tainted: BTreeSet<Run>,
    /// What found no room; tried again with every plan.
    refused: BTreeMap<ServicePort, DesiredService>,
    node_refused: Option<NodeTables>,
}

/// A plan, and the planner that made it.
#[must_use = "a plan that is not carried out leaves the tables as they are"]
#[derive(Debug)]
pub struct Proposal {
    planner: Planner,
    released: Released,
    /// What to write and what to say.
    pub plan: Plan,
}

impl Proposal {
    /// The tables as they are before the plan is carried out.
    #[must_use]
    pub fn before(&self) -> &Actual {
        self.planner.actual()
    }

    /// Where a Service port is asked for before the plan is carried out, by its id.
    pub fn frontends_of(&self, id: u32) -> impl Iterator<Item = &FrontendKey> {
        self.planner.mirror.held(id).into_iter().flat_map(|held| &held.frontends)
    }

    /// To be called when all steps of the plan have been done, with the time after the last of them: from
    /// then on what the plan released rests.
    #[must_use = "the planner is needed for the next plan"]
    pub fn applied(self, now_ms: u64) -> (Planner, Plan) {
        let Self { mut planner, released, plan } = self;
        for step in &plan.steps {
            planner.mirror.apply(step);
        }
        released.services.into_iter().for_each(|id| planner.ids.release(id, now_ms));
        released.backends.into_iter().for_each(|index| planner.indices.release(index, now_ms));
        released.runs.into_iter().for_each(|run| planner.runs.release(run, now_ms));
        (planner, plan)
    }
}

impl Planner {
    /// Adopts what is in the tables. Whatever nothing refers to is free: who reads them waits until no program follows
    /// it any more ([`crate::datapath::Datapath::read`]).
    #[must_use]
    pub fn new(actual: &Actual, capacity: Capacity) -> Self {
        let mirror = Mirror::new(actual);
        let (used, tainted) = used_runs(&mirror, capacity.slots);
        let live = actual.backends.iter().filter(|(_, backend)| backend.is_live()).map(|(index, _)| index);
        Self {
            ids: IdPool::new(capacity.services, &mirror.ids()),
            indices: IdPool::new(capacity.backends, &live.collect()),
            runs: RunPool::new(capacity.slots, &used),
            mirror,
            capacity,
            tainted,
            refused: BTreeMap::new(),
            node_refused: None,
        }
    }

    /// The tables as this planner knows them.
    #[must_use]
    pub fn actual(&self) -> &Actual {
        self.mirror.actual()
    }

    /// Slots in use. To see it from the tables takes a walk through them.
    #[must_use]
    pub fn used_slots(&self) -> usize {
        self.runs.used()
    }

    /// Backends that are live. The same.
    #[must_use]
    pub fn live_backends(&self) -> usize {
        self.indices.used()
    }

    /// For each Service with session affinity, how long its clients are remembered, in seconds.
    #[must_use]
    pub fn affinity_secs(&self) -> &BTreeMap<u32, u32> {
        self.mirror.affinity_secs()
    }

    /// The live endpoints of a Service port, by its id.
    pub fn endpoints_of(&self, id: u32) -> impl Iterator<Item = (Addr, Port)> {
        self.mirror.endpoints(id).into_keys()
    }

    /// Compares everything, and removes what is not desired: to be called only when every source has
    /// delivered its first complete list (Y-17).
    pub fn full(self, desired: &Desired, now_ms: u64) -> Proposal {
        self.compare(desired, true, now_ms)
    }

    /// The same for a source of which a part could never be read: what is missing may only be unreadable, so
    /// no Service is removed, and none loses its last endpoint.
    pub fn full_keeping(self, desired: &Desired, now_ms: u64) -> Proposal {
        self.compare(desired, false, now_ms)
    }

    fn compare(mut self, desired: &Desired, whole: bool, now_ms: u64) -> Proposal {
        self.settle(now_ms);
        self.refused.clear();
        self.node_refused = None;
        let mut batch = Batch::default();
        self.node(&mut batch, &desired.node);
        let mut wanted = HashSet::new();
        for port in desired.services.keys() {
            wanted.extend(service_name(port).and_then(|name| self.mirror.id(&name)));
        }
        if whole {
            for id in self.mirror.ids().difference(&wanted.into_iter().collect()) {
                self.remove(&mut batch, *id);
            }
        }
        for (port, service) in &desired.services {
            let empty = service.cluster.is_empty() && service.local.is_empty();
            if whole || !empty || !self.serves(port) {
                self.update(&mut batch, port, service);
            }
        }
        self.propose(batch, Some(&desired.node), true, now_ms)
    }

    /// Compares the Services given (`None`: removed) and, if given, the node. Costs what they cost, whatever
    /// else there is. When a destination changes hands, both Services belong in one call.
    pub fn dirty(
        mut self,
        services: &[(ServicePort, Option<DesiredService>)],
        node: Option<&NodeTables>,
        now_ms: u64,
    ) -> Proposal {
        self.settle(now_ms);
        let mut batch = Batch::default();
        let waiting = self.node_refused.take();
        let node = node.or(waiting.as_ref());
        if let Some(node) = node {
            self.node(&mut batch, node);
        }
        let mut again = std::mem::take(&mut self.refused);
        for (port, service) in services {
            again.remove(port);
            let id = service_name(port).and_then(|name| self.mirror.id(&name));
            if let (None, Some(id)) = (service, id) {
                self.remove(&mut batch, id);
            }
        }
        for (port, service) in services {
            if let Some(service) = service {
                self.update(&mut batch, port, service);
            }
        }
        for (port, service) in &again {
            self.update(&mut batch, port, service);
        }
        self.propose(batch, node, false, now_ms)
    }

    /// Whether a Service port has endpoints in the tables.
    fn serves(&self, port: &ServicePort) -> bool {
        let id = service_name(port).and_then(|name| self.mirror.id(&name));
        id.is_some_and(|id| self.mirror.runs(id).into_iter().any(|run| run.count != 0))
    }

    fn settle(&mut self, now_ms: u64) {
        self.ids.settle(now_ms);
        self.indices.settle(now_ms);
        self.runs.settle(now_ms);
    }

    fn node(&mut self, batch: &mut Batch, node: &NodeTables) {
        if !batch.plan_node(&self.mirror, &self.capacity, node) {
            self.node_refused = Some(node.clone());
        }
    }

    fn update(&mut self, batch: &mut Batch, port: &ServicePort, service: &DesiredService) {
        let Err(why) = self.compile(batch, port, service) else { return };
        if let Refusal::Full(shortage) = &why {
            batch.short.push(shortage.table());
        }
        batch.warnings.push(format!("{}: {why}; until then it stays as it is", describe(port)));
        self.refused.insert(port.clone(), service.clone());
    }

    fn propose(self, mut batch: Batch, node: Option<&NodeTables>, everything: bool, now_ms: u64) -> Proposal {
        let short = std::mem::take(&mut batch.short);
        let (steps, mut released, warnings) = batch.finish(&self.mirror, node, everything);
        released.runs.retain(|run| !self.tainted.contains(run));
        let waits = !self.refused.is_empty() || self.node_refused.is_some();
        let comes_free =
            !steps.is_empty() || self.ids.resting() + self.indices.resting() + self.runs.resting() != 0;
        let retry_at_ms = (waits && comes_free).then_some(now_ms.saturating_add(GRACE_MS));
        Proposal { planner: self, released, plan: Plan { steps, warnings, short, retry_at_ms } }
    }
}

/// The runs that frontends show, and those of them that cannot be kept.
fn used_runs(mirror: &Mirror, limit: u32) -> (BTreeSet<Run>, BTreeSet<Run>) {
    let mut owned: BTreeSet<(Run, u32)> = BTreeSet::new();
    for id in mirror.ids() {
        owned.extend(mirror.runs(id).into_iter().map(|run| (run, id)));
    }
    let mut tainted = BTreeSet::new();
    let mut widest: Option<Run> = None;
    for (run, _) in &owned {
        let end = run.first.checked_add(run.count);
        if run.first == 0 || end.is_none_or(|end| end > limit) {
            tainted.insert(*run);
        }
        if let Some(before) = widest
            && before.first.saturating_add(before.count) > run.first
        {
            tainted.extend([before, *run]);
        }
        if widest.is_none_or(|before| end.is_none_or(|end| end > before.first.saturating_add(before.count))) {
            widest = Some(*run);
        }
    }
    (owned.into_iter().map(|(run, _)| run).collect(), tainted)
}

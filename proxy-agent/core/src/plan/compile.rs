//! One Service port: what it needs, whether that fits, and the steps.

use std::collections::{BTreeMap, BTreeSet};

use proxy_common::abi::{Backend, Frontend, FrontendKey, Run, SourceKey, backend, frontend};
use proxy_common::addr::{Addr, Port};

use super::batch::Batch;
use super::capacity::{Refusal, Shortage};
use super::name::{describe, service_name};
use super::planner::Planner;
use super::step::Step;
use crate::model::{DesiredBackend, DesiredService, ServicePort};

impl From<Shortage> for Refusal {
    fn from(shortage: Shortage) -> Self {
        Self::Full(shortage)
    }
}

/// Where the two slot lists of a Service will stand.
struct Runs {
    cluster: Run,
    local: Run,
    /// Those of them that have yet to be written.
    new_cluster: bool,
    new_local: bool,
}

impl Planner {
    /// Plans one Service port: whole or not at all.
    pub(super) fn compile(
        &mut self,
        batch: &mut Batch,
        port: &ServicePort,
        want: &DesiredService,
    ) -> Result<(), Refusal> {
        let name = service_name(port).ok_or(Refusal::Name)?;
        let known = self.mirror.id(&name);
        let held = known.map(|id| self.mirror.endpoints(id)).unwrap_or_default();
        let frontends = without_owner(batch, port, want);
        let endpoints = endpoints(want);
        batch.check_frontends(&self.mirror, &self.capacity, &frontends)?;
        let ranges = ranges(want, &frontends);
        let new = endpoints.keys().filter(|endpoint| !held.contains_key(endpoint)).count();
        self.check(batch, known, new, &ranges)?;
        // Last, because it takes the slots: nothing can fail after it.
        let runs = self.runs(known, &held, want, !frontends.is_empty())?;

        let id = match known {
            Some(id) => id,
            None => {
                let id = self.ids.take().expect("a free service id has been counted");
                batch.names.push(Step::PutService(id, name.into()));
                id
            }
        };
        let indices = self.backends(batch, id, &held, &endpoints);
        for (new, run, list) in
            [(runs.new_cluster, runs.cluster, &want.cluster), (runs.new_local, runs.local, &want.local)]
        {
            if new {
                let slots = (run.first..).zip(list.iter().filter_map(|endpoint| indices.get(endpoint)));
                batch.slots.extend(slots.map(|(slot, index)| Step::PutSlot(slot, *index)));
            }
        }
        self.sources(batch, id, &ranges);
        self.frontends(batch, id, want, &frontends, &runs);
        Ok(())
    }

    /// Plans the removal of everything that bears an id.
    pub(super) fn remove(&mut self, batch: &mut Batch, id: u32) {
        let Some(held) = self.mirror.held(id) else { return };
        held.frontends.iter().for_each(|key| batch.drop_frontend(id, *key));
        let endpoints = self.mirror.endpoints(id);
        for index in endpoints.values().chain(&self.mirror.strays(id, &endpoints)) {
            batch.retire_backend(&self.mirror, *index);
        }
        batch.late_sources.extend(held.sources.iter().map(|key| Step::DeleteSource(*key)));
        if self.mirror.actual().services.contains_key(&id) {
            batch.late_names.push(Step::DeleteService(id));
        }
        batch.released.services.push(id);
    }

    /// Whether the id, so many indices and the sources that are missing are there to be had.
    fn check(
        &self,
        batch: &Batch,
        known: Option<u32>,
        needed: usize,
        ranges: &BTreeSet<(Addr, u32)>,
    ) -> Result<(), Shortage> {
        if known.is_none() && self.ids.available() == 0 {
            return Err(Shortage::services(0, self.ids.resting()));
        }
        if needed > self.indices.available() {
            return Err(Shortage::backends(needed, self.indices.available(), self.indices.resting()));
        }
        let held = known.and_then(|id| self.mirror.held(id));
        let has = |key: &SourceKey| held.is_some_and(|held| held.sources.contains(key));
        let key = |(addr, bits): &(Addr, u32)| SourceKey::range(known.unwrap_or(0), *addr, *bits);
        let needed = ranges.iter().filter(|range| !has(&key(range))).count();
        let free = batch.free_sources(&self.mirror, &self.capacity);
        if needed > free {
            return Err(Shortage::sources(needed, free));
        }
        Ok(())
    }

    /// Finds runs that hold the lists already, or takes free ones.
    fn runs(
        &mut self,
        known: Option<u32>,
        held: &BTreeMap<(Addr, Port), u32>,
        want: &DesiredService,
        shown: bool,
    ) -> Result<Runs, Shortage> {
        let mut runs = Runs { cluster: Run::EMPTY, local: Run::EMPTY, new_cluster: false, new_local: false };
        if !shown {
            return Ok(runs); // A run that no frontend shows would be lost at the next start.
        }
        let shared = want.cluster == want.local;
        let cluster = self.run_with(known, held, &want.cluster);
        let local = if shared { cluster } else { self.run_with(known, held, &want.local) };
        runs.new_cluster = cluster.is_none();
        runs.new_local = local.is_none() && !shared;
        let full = |pool: &super::pool::RunPool, list: &[(Addr, Port)]| {
            Shortage::slots(list.len(), pool.available(), pool.resting())
        };
        runs.cluster = match cluster {
            Some(run) => run,
            None => {
                let run = self.runs.take(want.cluster.len());
                run.ok_or_else(|| full(&self.runs, &want.cluster))?
            }
        };
        runs.local = match local {
            Some(run) => run,
            None if shared => runs.cluster,
            None => match self.runs.take(want.local.len()) {
                Some(run) => run,
                None => {
                    let shortage = full(&self.runs, &want.local);
                    if runs.new_cluster {
                        self.runs.give(runs.cluster);
                    }
                    return Err(shortage);
                }
            },
        };
        Ok(runs)
    }

    /// The run of a Service that holds exactly this list; the empty run for an empty list.
    fn run_with(
        &self,
        known: Option<u32>,
        held: &BTreeMap<(Addr, Port), u32>,
        list: &[(Addr, Port)],
    ) -> Option<Run> {
        if list.is_empty() {
            return Some(Run::EMPTY);
        }
        let indices: Option<Vec<u32>> = list.iter().map(|endpoint| held.get(endpoint).copied()).collect();
        let indices = indices?;
        self.mirror.runs(known?).into_iter().find(|run| {
            run.count as usize == indices.len()
                && !self.tainted.contains(run)
                && self.mirror.actual().run(*run).eq(indices.iter().copied())
        })
    }

    /// Plans the backends; gives the index of each endpoint.
    fn backends(
        &mut self,
        batch: &mut Batch,
        id: u32,
        held: &BTreeMap<(Addr, Port), u32>,
        endpoints: &BTreeMap<(Addr, Port), DesiredBackend>,
    ) -> BTreeMap<(Addr, Port), u32> {
        let known = &self.mirror.actual().backends;
        let mut indices = BTreeMap::new();
        for (endpoint @ (addr, port), DesiredBackend { flags, node }) in endpoints {
            let index = match held.get(endpoint) {
                Some(index) => *index,
                None => self.indices.take().expect("free backend indices have been counted"),
            };
            indices.insert(*endpoint, index);
            let old = known.get(index);
            let generation = old.map_or(0, |old| old.generation);
            let new =
                Backend { addr: *addr, port: *port, flags: *flags, generation, service: id, node: *node };
            if old == Some(&new) {
                continue;
            }
            // Whoever still shows it must not see it draining.
            let late = new.flags & backend::DRAINING != 0 && old.is_some_and(Backend::is_live);
            let phase = if late { &mut batch.late_backends } else { &mut batch.backends };
            phase.push(Step::PutBackend(index, new));
        }
        let removed = held.iter().filter(|(endpoint, _)| !indices.contains_key(endpoint));
        for index in removed.map(|(_, index)| index).chain(&self.mirror.strays(id, held)) {
            batch.retire_backend(&self.mirror, *index);
        }
        indices
    }

    fn sources(&self, batch: &mut Batch, id: u32, ranges: &BTreeSet<(Addr, u32)>) {
        let keys: BTreeSet<SourceKey> =
            ranges.iter().map(|(addr, bits)| SourceKey::range(id, *addr, *bits)).collect();
        let none = BTreeSet::new();
        let held = self.mirror.held(id).map_or(&none, |held| &held.sources);
        keys.difference(held).for_each(|key| batch.put_source(Step::PutSource(*key)));
        batch.late_sources.extend(held.difference(&keys).map(|key| Step::DeleteSource(*key)));
    }

    fn frontends(
        &self,
        batch: &mut Batch,
        id: u32,
        want: &DesiredService,
        frontends: &[(FrontendKey, u32)],
        runs: &Runs,
    ) {
        for (key, flags) in frontends {
            let value = Frontend {
                service: id,
                cluster: runs.cluster,
                local: runs.local,
                flags: *flags,
                affinity_secs: want.affinity_secs,
                seal: 0,
            };
            batch.put_frontend(&self.mirror, *key, value);
        }
        let held = self.mirror.held(id).into_iter().flat_map(|held| &held.frontends);
        let wanted: BTreeSet<&FrontendKey> = frontends.iter().map(|(key, _)| key).collect();
        held.filter(|key| !wanted.contains(key)).for_each(|key| batch.drop_frontend(id, *key));
    }
}

/// The frontends of a Service that no other one has in this plan. The model has settled who gets what
/// where it has not, the first keeps it.
fn without_owner(batch: &mut Batch, port: &ServicePort, want: &DesiredService) -> Vec<(FrontendKey, u32)> {
    let mut frontends: BTreeMap<FrontendKey, u32> = BTreeMap::new();
    for wanted in &want.frontends {
        if batch.has_owner(&wanted.key) {
            batch.warn_of_owner(&describe(port), &wanted.key);
        } else {
            frontends.entry(wanted.key).or_insert(wanted.flags);
        }
    }
    frontends.into_iter().collect()
}

/// Every endpoint with its flags and node; one that only a slot list names has none of either.
fn endpoints(want: &DesiredService) -> BTreeMap<(Addr, Port), DesiredBackend> {
    let mut endpoints = want.backends.clone();
    for endpoint in want.cluster.iter().chain(&want.local) {
        endpoints.entry(*endpoint).or_default();
    }
    endpoints
}

/// The source ranges, if a frontend asks for them.
fn ranges(want: &DesiredService, frontends: &[(FrontendKey, u32)]) -> BTreeSet<(Addr, u32)> {
    let used = frontends.iter().any(|(_, flags)| flags & frontend::SOURCE_RANGES != 0);
    if used { want.source_ranges.iter().copied().collect() } else { BTreeSet::new() }
}

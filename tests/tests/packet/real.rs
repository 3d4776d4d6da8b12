//! The real programs, loaded once for the whole run, as a story's second audience.
//!
//! The bpffs they are pinned in lives in a mount namespace that ends with the loading: what is left are file
//! descriptors, so nothing outlives the process, however it ends.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use aya::maps::{HashMap, MapData, PerCpuArray};
use proxy_agent::datapath::load::Capacities;
use proxy_agent::plan::Step;
use proxy_common::abi::{
    Affinity, AffinityKey, Config, Flow, FlowKey, Fragment, FragmentKey, Hook, Reason, ServiceStats, maps,
};
use proxy_common::addr::Addr;
use proxy_common::lb::FlowTable;
use proxy_common::testing::{MemoryTables, Outcome};
use proxy_tests::programs::{Programs, clear, entries, with_own_mounts};

/// Ids of Services that are counted.
pub(crate) const SERVICES: u32 = 32;
/// Legs that fit into FLOWS.
pub(crate) const FLOWS: usize = 512;
/// The interface of every test run: loopback.
pub(crate) const IFACE: u32 = 1;

/// Large enough that no LRU evicts anything, small enough to be looked through after every packet.
const CAPACITIES: Capacities = Capacities {
    frontends: 256,
    slots: 8_192,
    backends: 8_192,
    addresses: 256,
    sources: 256,
    ifaces: 16,
    services: SERVICES,
    flows: FLOWS as u32,
    half_open: 2_048,
    fragments: 1_024,
    affinity: 1_024,
};

/// What packets leave behind: the same of host and kernel, without the times.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traces {
    pub(crate) reasons: BTreeMap<Reason, u64>,
    pub(crate) stats: BTreeMap<u32, [u64; 3]>,
    pub(crate) flows: BTreeMap<(FlowTable, FlowKey), Flow>,
    pub(crate) fragments: BTreeMap<FragmentKey, Fragment>,
    pub(crate) affinity: BTreeMap<AffinityKey, Affinity>,
}

impl Traces {
    pub(crate) fn of_host(tables: &MemoryTables) -> Self {
        let mut traces = Self {
            reasons: tables.reasons.borrow().iter().map(|(k, v)| (*k, *v)).collect(),
            stats: tables.stats.borrow().iter().map(|(k, v)| (*k, *v)).collect(),
            flows: tables.flows.borrow().iter().map(|(k, v)| (*k, *v)).collect(),
            fragments: tables.fragments.borrow().iter().map(|(k, v)| (*k, *v)).collect(),
            affinity: tables.affinity.borrow().iter().map(|(k, v)| (*k, *v)).collect(),
        };
        traces.forget_times();
        traces
    }

    /// The clock of the kernel is real, the host's stands still.
    fn forget_times(&mut self) {
        self.flows.values_mut().for_each(|flow| flow.last_seen = 0);
        self.affinity.values_mut().for_each(|affinity| affinity.last_seen = 0);
        self.fragments.values_mut().for_each(|fragment| fragment.since = 0);
    }
}

/// Programs and maps.
pub(crate) struct Real {
    programs: Programs,
    established: HashMap<MapData, FlowKey, Flow>,
    half_open: HashMap<MapData, FlowKey, Flow>,
    fragments: HashMap<MapData, FragmentKey, Fragment>,
    affinity: HashMap<MapData, AffinityKey, Affinity>,
    reasons: PerCpuArray<MapData, u64>,
    stats: PerCpuArray<MapData, ServiceStats>,
    /// Counters when the story began.
    before: (BTreeMap<Reason, u64>, BTreeMap<u32, [u64; 3]>),
}

/// The programs, empty tables around them. One story at a time: the maps are shared.
///
/// # Panics
/// When they cannot be loaded, with one line that says why.
#[track_caller]
pub(crate) fn real() -> MutexGuard<'static, Real> {
    static REAL: OnceLock<Result<Mutex<Real>, String>> = OnceLock::new();
    match REAL.get_or_init(|| load().map(Mutex::new).map_err(|error| format!("{error:#}"))) {
        // A story that failed has left nothing that the next does not clear.
        Ok(real) => real.lock().unwrap_or_else(PoisonError::into_inner),
        Err(error) => panic!("{error}"),
    }
}

fn load() -> anyhow::Result<Real> {
    with_own_mounts(|directory| {
        let programs = Programs::load(directory, &CAPACITIES)?;
        Ok(Real {
            established: programs.hash(maps::FLOWS)?,
            half_open: programs.hash(maps::HALF_OPEN)?,
            fragments: programs.hash(maps::FRAGMENTS)?,
            affinity: programs.hash(maps::AFFINITY)?,
            reasons: programs.counters(maps::REASONS)?,
            stats: programs.counters(maps::SERVICE_STATS)?,
            programs,
            before: Default::default(),
        })
    })
}

/// Differences of counters that are not zero.
fn since<K: Ord + Copy, V: PartialEq>(
    now: BTreeMap<K, V>,
    before: &BTreeMap<K, V>,
    less: impl Fn(&V, &V) -> V,
    zero: &V,
) -> BTreeMap<K, V> {
    now.into_iter()
        .map(|(key, value)| (key, before.get(&key).map_or_else(|| less(&value, zero), |b| less(&value, b))))
        .filter(|(_, value)| value != zero)
        .collect()
}

impl Real {
    /// Forgets every story and writes `tables`, flows included.
    pub(crate) fn begin(&mut self, tables: &MemoryTables) {
        clear(&mut self.established).unwrap();
        clear(&mut self.half_open).unwrap();
        clear(&mut self.fragments).unwrap();
        clear(&mut self.affinity).unwrap();
        self.configure(tables);
        for ((table, key), flow) in tables.flows.borrow().iter() {
            let map = match table {
                FlowTable::Established => &mut self.established,
                FlowTable::HalfOpen => &mut self.half_open,
            };
            map.insert(key, flow, 0).unwrap();
        }
        self.before = (self.reasons(), self.stats());
    }

    /// Writes the configuration of `tables` in place of the last.
    pub(crate) fn configure(&mut self, tables: &MemoryTables) {
        self.programs.empty().unwrap();
        let mut steps = Vec::new();
        steps.extend(tables.backends.iter().map(|(index, backend)| Step::PutBackend(*index, *backend)));
        steps.extend(tables.slots.iter().map(|(slot, backend)| Step::PutSlot(*slot, *backend)));
        steps.extend(tables.sources.iter().map(|source| Step::PutSource(*source)));
        steps.extend(tables.ifaces.iter().map(|(index, iface)| Step::PutIface(*index, *iface)));
        steps.extend(tables.addresses.iter().map(|(addr, bits)| Step::PutAddress(*addr, *bits)));
        steps.extend(tables.frontends.iter().map(|(key, frontend)| Step::PutFrontend(*key, *frontend)));
        // An array of one is never absent: it is all zeros before it is written.
        let unwritten = Config { pod_v4: Addr::ANY_V6, node_v4: Addr::ANY_V6, ..Config::EMPTY };
        steps.push(Step::PutConfig(tables.config.unwrap_or(unwritten)));
        self.programs.apply(&steps).unwrap();
    }

    /// What packets have left behind since [`Self::begin`].
    pub(crate) fn traces(&self) -> Traces {
        let (reasons, stats) = &self.before;
        let established =
            entries(&self.established).unwrap().into_iter().map(|(k, v)| ((FlowTable::Established, k), v));
        let half_open =
            entries(&self.half_open).unwrap().into_iter().map(|(k, v)| ((FlowTable::HalfOpen, k), v));
        let mut traces = Traces {
            reasons: since(self.reasons(), reasons, |a, b| a - b, &0),
            stats: since(self.stats(), stats, |a, b| [a[0] - b[0], a[1] - b[1], a[2] - b[2]], &[0; 3]),
            flows: established.chain(half_open).collect(),
            fragments: entries(&self.fragments).unwrap(),
            affinity: entries(&self.affinity).unwrap(),
        };
        traces.forget_times();
        traces
    }

    fn reasons(&self) -> BTreeMap<Reason, u64> {
        let count = |reason: &Reason| self.reasons.get(&(*reason as u32), 0).unwrap().iter().sum();
        Reason::ALL.iter().map(|reason| (*reason, count(reason))).collect()
    }

    fn stats(&self) -> BTreeMap<u32, [u64; 3]> {
        let count = |id: u32| {
            let cpus = self.stats.get(&id, 0).unwrap();
            cpus.iter().fold([0; 3], |sum: [u64; 3], one| {
                [sum[0] + one.chosen, sum[1] + one.refused, sum[2] + one.dropped]
            })
        };
        (0..SERVICES).map(|id| (id, count(id))).collect()
    }

    /// Runs the program of a hook on a packet. `None` when the kernel does not take so short a packet.
    pub(crate) fn run(&self, bytes: &[u8], hook: Hook, ethernet: bool) -> Option<Outcome> {
        self.programs.run(bytes, hook, ethernet, IFACE).unwrap()
    }
}

/// A line for each difference between two tables.
pub(crate) fn differences<K: Ord + Debug, V: PartialEq + Debug>(
    what: &str,
    host: &BTreeMap<K, V>,
    kernel: &BTreeMap<K, V>,
) -> String {
    let mut text = String::new();
    for (key, value) in host {
        if kernel.get(key) != Some(value) {
            text.push_str(&format!("{what} {key:?}: host {value:?}, kernel {:?}\n", kernel.get(key)));
        }
    }
    for (key, value) in kernel.iter().filter(|(key, _)| !host.contains_key(key)) {
        text.push_str(&format!("{what} {key:?}: host has none, kernel {value:?}\n"));
    }
    text
}

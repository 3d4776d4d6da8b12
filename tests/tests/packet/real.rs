//! The real programs and their maps in this kernel, loaded once for the whole run and never attached.
//!
//! The bpffs they are pinned in lives in a mount namespace that ends with the loading: what is left are file
//! descriptors, so nothing outlives the process, however it ends.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::{io, thread};

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use proxy_agent::datapath::Datapath as _;
use proxy_agent::datapath::kernel::Kernel;
use proxy_agent::datapath::load::{Capacities, Loaded, ProgramLog};
use proxy_agent::datapath::pin::BpfRoot;
use proxy_agent::datapath::probe::Features;
use proxy_agent::plan::Step;
use proxy_common::abi::{
    Affinity, AffinityKey, Backend, Config, Flow, FlowKey, Fragment, FragmentKey, Hook, Reason, ServiceStats,
    maps,
};
use proxy_common::addr::Addr;
use proxy_common::lb::FlowTable;
use proxy_common::testing::{ByteFrame, MemoryTables, Outcome};

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
    loaded: Loaded,
    kernel: Kernel,
    established: HashMap<MapData, FlowKey, Flow>,
    half_open: HashMap<MapData, FlowKey, Flow>,
    fragments: HashMap<MapData, FragmentKey, Fragment>,
    affinity: HashMap<MapData, AffinityKey, Affinity>,
    reasons: PerCpuArray<MapData, u64>,
    stats: PerCpuArray<MapData, ServiceStats>,
    /// What takes the configuration back.
    undo: Vec<Step>,
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
    match REAL.get_or_init(|| load().map(Mutex::new)) {
        // A story that failed has left nothing that the next does not clear.
        Ok(real) => real.lock().unwrap_or_else(PoisonError::into_inner),
        Err(error) => panic!("{error}"),
    }
}

fn load() -> Result<Real, String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("packet vectors run the real programs: run them as root".into());
    }
    let directory = tempfile::Builder::new().prefix("ebpx-").tempdir().map_err(|error| error.to_string())?;
    let root = BpfRoot::new(directory.path().join("bpf"));
    let loading = move || -> Result<Real, String> {
        let failed = |what: &str, error: &dyn std::error::Error| format!("{what}: {error}");
        unshare(CloneFlags::CLONE_NEWNS).map_err(|error| failed("making a mount namespace", &error))?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .map_err(|error| failed("keeping mounts to ourselves", &error))?;
        let loaded = Loaded::open(&root, &Features::probe(), &CAPACITIES, ProgramLog::Off)
            .map_err(|error| error.to_string())?;
        let kernel = Kernel::open(&root).map_err(|error| error.to_string())?;
        Ok(Real {
            established: hash(&root, maps::FLOWS),
            half_open: hash(&root, maps::HALF_OPEN),
            fragments: hash(&root, maps::FRAGMENTS),
            affinity: hash(&root, maps::AFFINITY),
            reasons: Map::from_map_data(open(&root, maps::REASONS)).unwrap().try_into().unwrap(),
            stats: Map::from_map_data(open(&root, maps::SERVICE_STATS)).unwrap().try_into().unwrap(),
            loaded,
            kernel,
            undo: Vec::new(),
            before: Default::default(),
        })
    };
    thread::spawn(loading).join().map_err(|_| "loading the programs panicked".to_owned())?
}

fn open(root: &BpfRoot, name: &str) -> MapData {
    MapData::from_pin(root.map(name)).expect("the map has just been pinned")
}

fn hash<K: Pod, V: Pod>(root: &BpfRoot, name: &str) -> HashMap<MapData, K, V> {
    Map::from_map_data(open(root, name)).unwrap().try_into().expect("a hash map")
}

fn clear<K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>) {
    let keys: Vec<K> = map.keys().map(|key| key.unwrap()).collect();
    for key in keys {
        map.remove(&key).unwrap();
    }
}

fn entries<K: Pod + Ord, V: Pod>(map: &HashMap<MapData, K, V>) -> BTreeMap<K, V> {
    map.iter().map(|entry| entry.unwrap()).collect()
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
        clear(&mut self.established);
        clear(&mut self.half_open);
        clear(&mut self.fragments);
        clear(&mut self.affinity);
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
        let undo = std::mem::take(&mut self.undo);
        self.apply(&undo);
        let mut steps = Vec::new();
        for (index, backend) in &tables.backends {
            steps.push(Step::PutBackend(*index, *backend));
            self.undo.push(Step::PutBackend(*index, Backend::retired(0)));
        }
        for (slot, backend) in &tables.slots {
            steps.push(Step::PutSlot(*slot, *backend));
            self.undo.push(Step::PutSlot(*slot, 0));
        }
        for source in &tables.sources {
            steps.push(Step::PutSource(*source));
            self.undo.push(Step::DeleteSource(*source));
        }
        for (index, iface) in &tables.ifaces {
            steps.push(Step::PutIface(*index, *iface));
            self.undo.push(Step::DeleteIface(*index));
        }
        for (addr, bits) in &tables.addresses {
            steps.push(Step::PutAddress(*addr, *bits));
            self.undo.push(Step::DeleteAddress(*addr));
        }
        for (key, frontend) in &tables.frontends {
            steps.push(Step::PutFrontend(*key, *frontend));
            self.undo.push(Step::DeleteFrontend(*key));
        }
        // An array of one is never absent: it is all zeros before it is written.
        let unwritten = Config { pod_v4: Addr::ANY_V6, node_v4: Addr::ANY_V6, ..Config::EMPTY };
        steps.push(Step::PutConfig(tables.config.unwrap_or(unwritten)));
        self.apply(&steps);
    }

    fn apply(&mut self, steps: &[Step]) {
        self.kernel.apply(steps).map_err(|(done, error)| format!("{}: {error}", steps[done])).unwrap();
    }

    /// What packets have left behind since [`Self::begin`].
    pub(crate) fn traces(&self) -> Traces {
        let (reasons, stats) = &self.before;
        let established =
            entries(&self.established).into_iter().map(|(k, v)| ((FlowTable::Established, k), v));
        let half_open = entries(&self.half_open).into_iter().map(|(k, v)| ((FlowTable::HalfOpen, k), v));
        let mut traces = Traces {
            reasons: since(self.reasons(), reasons, |a, b| a - b, &0),
            stats: since(self.stats(), stats, |a, b| [a[0] - b[0], a[1] - b[1], a[2] - b[2]], &[0; 3]),
            flows: established.chain(half_open).collect(),
            fragments: entries(&self.fragments),
            affinity: entries(&self.affinity),
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

    fn classifier(&self, hook: Hook, ethernet: bool) -> &SchedClassifier {
        let name = match (hook, ethernet) {
            (Hook::INGRESS, true) => "tc_ingress",
            (Hook::INGRESS, false) => "tc_ingress_l3",
            (_, true) => "tc_egress",
            (_, false) => "tc_egress_l3",
        };
        self.loaded.classifier(name).unwrap_or_else(|| panic!("the BPF object has no program {name}"))
    }

    /// Runs the program of a hook on a packet. `None` when the kernel does not take so short a packet.
    pub(crate) fn run(&self, bytes: &[u8], hook: Hook, ethernet: bool) -> Option<Outcome> {
        let mut out = vec![0; 4096];
        let options = TestRunOptions { data_in: Some(bytes), data_out: Some(&mut out), ..Default::default() };
        let done = match self.classifier(hook, ethernet).test_run(options) {
            Ok(done) => done,
            // Without an Ethernet header, or with nothing behind it, there is no skb.
            Err(error) if is_invalid(&error) && bytes.len() < 14 + 40 => return None,
            Err(error) => panic!("a test run with {} bytes: {error:?}", bytes.len()),
        };
        out.truncate(done.data_size_out as usize);
        let changed = out != bytes;
        let frame = ByteFrame { bytes: out, partial: false };
        Some(match (done.return_value as i32, changed) {
            (-1, false) => Outcome::Passed,
            (-1, true) => Outcome::Rewritten(frame),
            (2, _) => Outcome::Dropped,
            (7, true) => Outcome::Refused(frame),
            (7, false) => Outcome::Waits,
            (other, _) => panic!("the program returned {other}"),
        })
    }
}

fn is_invalid(error: &ProgramError) -> bool {
    let ProgramError::SyscallError(error) = error else { return false };
    error.io_error.kind() == io::ErrorKind::InvalidInput
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

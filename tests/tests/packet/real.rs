//! The real programs, loaded once for the whole run, as a story's second audience.
//!
//! The bpffs they are pinned in lives in a mount namespace that ends with the loading: what is left are file
//! descriptors, so nothing outlives the process, however it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::stage::NOBODY;
use agent_core::plan::Step;
use agent_kernel::datapath::load::Capacities;
use aya::maps::{Array, HashMap, MapData, PerCpuArray, Queue};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use proxy_common::abi::{
    Affinity, AffinityKey, Config, FORWARD, Flow, FlowId, Fragment, FragmentKey, Hook, Key, Leg, Pair, REPLY,
    Reason, Role, ServiceStats, Tunnel, TunnelKey, Tuple, frontend, maps,
};
use proxy_common::addr::Addr;
use proxy_common::lb::Ring;
use proxy_common::testing::{MemoryTables, Outcome, SECRET};
use proxy_tests::programs::{Programs, clear, entries, with_own_mounts};

/// Ids of Services that are counted.
pub(crate) const SERVICES: u32 = 32;
/// Records there are; the first is never used.
pub(crate) const RECORDS: usize = 256;
/// Legs that fit into FLOWS: three a record.
pub(crate) const LEGS: usize = 3 * RECORDS;
/// Places in a ring of young flows.
pub(crate) const PLACES: usize = 128;
/// Places in the ring of flows whose packets are wrapped: all CPUs together have a quarter of the records.
pub(crate) fn direct_places() -> usize {
    let cpus = aya::util::nr_cpus().unwrap();
    PLACES.min(RECORDS / (4 * cpus)).max(1)
}
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
    flows: RECORDS as u32,
    young_flows: (PLACES * Ring::COUNT as usize) as u32,
    fragments: 1_024,
    affinity: 1_024,
};

/// What packets leave behind: the same of host and kernel, without the times and the ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traces {
    pub(crate) reasons: BTreeMap<Reason, u64>,
    pub(crate) stats: BTreeMap<u32, [u64; 3]>,
    /// Living flows.
    pub(crate) flows: BTreeMap<Name, Flow>,
    /// Legs, what has been acknowledged there, and whose they are: a living flow's, or nobody's.
    pub(crate) legs: BTreeMap<Key, (Role, usize, Option<u32>, Option<Name>)>,
    pub(crate) fragments: BTreeMap<FragmentKey, Fragment>,
    pub(crate) affinity: BTreeMap<AffinityKey, Affinity>,
}

impl Traces {
    pub(crate) fn of_host(tables: &MemoryTables) -> Self {
        let mut traces = Self {
            reasons: tables.reasons.borrow().iter().map(|(k, v)| (*k, *v)).collect(),
            stats: tables.stats.borrow().iter().map(|(k, v)| (*k, *v)).collect(),
            fragments: tables.fragments.borrow().iter().map(|(k, v)| (*k, *v)).collect(),
            affinity: tables.affinity.borrow().iter().map(|(k, v)| (*k, *v)).collect(),
            ..Self::default()
        };
        traces.see_flows(&tables.live(), tables.flows.borrow().iter().map(|(key, leg)| (*key, *leg)));
        traces.forget_times();
        traces
    }

    fn see_flows(&mut self, flows: &[Flow], legs: impl Iterator<Item = (Key, Leg)>) {
        let legs: Vec<(Key, Leg)> = legs.collect();
        // A flow all of whose legs somebody has deleted is nobody's, until the sweep finds it; another one may have its
        // name by then.
        let known: BTreeSet<FlowId> = legs.iter().map(|(_, leg)| leg.id).collect();
        let flows: Vec<&Flow> = flows.iter().filter(|flow| known.contains(&flow.id)).collect();
        let owners: BTreeMap<FlowId, Name> =
            flows.iter().map(|flow| (flow.id, name(flow.id, &legs))).collect();
        self.flows = flows.iter().map(|flow| (owners[&flow.id].clone(), shown(flow))).collect();
        assert_eq!(self.flows.len(), flows.len(), "two flows are one: {flows:#?}");
        let shown = |(key, leg): (Key, Leg)| {
            let acked = key.is_v4().then(|| leg.notes().acked);
            (key, (leg.role(), leg.near(), acked, owners.get(&leg.id).cloned()))
        };
        self.legs = legs.into_iter().map(shown).collect();
    }

    /// The clocks of both are not quite the same.
    fn forget_times(&mut self) {
        self.affinity.values_mut().for_each(|affinity| affinity.last_seen = 0);
        self.fragments.values_mut().for_each(|fragment| fragment.since = 0);
    }
}

/// What tells a flow from others: the keys of those of its legs that are there. The ends that its record names may be
/// another flow's as well, once somebody has deleted a leg.
pub(crate) type Name = Vec<Key>;

/// A flow's name among these legs.
pub(crate) fn name(flow: FlowId, legs: &[(Key, Leg)]) -> Name {
    let mut name: Name = legs.iter().filter(|(_, leg)| leg.id == flow).map(|(key, _)| *key).collect();
    name.sort();
    name
}

/// What host and kernel must have in common of a flow: of times whether there is one, and nothing of what is left of the
/// flow that had the record before.
fn shown(flow: &Flow) -> Flow {
    let mut shown = Flow {
        id: FlowId::NONE,
        claims: 0,
        seen: flow.seen.map(|time| u64::from(time != 0)),
        rst: flow.rst.map(|time| u64::from(time != 0)),
        born: 0,
        checked: 0,
        source: u32::from(flow.has_source()),
        ..*flow
    };
    // Legs of IPv4 know better, and when they tell the record is a matter of the clock.
    for (direction, role) in [(FORWARD, Role::OUTER), (REPLY, Role::MIDDLE)] {
        if flow.has(role) && flow.pairs[role.index()].ends[0].is_v4() {
            shown.acked[direction] = 0;
        }
    }
    for (role, there) in [(Role::MIDDLE, !flow.is_own()), (Role::INNER, flow.has_source())] {
        if !there {
            shown.pairs[role.index()] = Pair::NONE;
            shown.near[role.index()] = 0;
        }
    }
    shown
}

/// Programs and maps.
pub(crate) struct Real {
    programs: Programs,
    legs: HashMap<MapData, Key, Leg>,
    filter: Array<MapData, u64>,
    records: Array<MapData, Flow>,
    free: Queue<MapData, u32>,
    endpoint_bits: Array<MapData, u64>,
    /// The words of it that may not be 0.
    used_bits: BTreeSet<u32>,
    taken: HashMap<MapData, Tuple, u32>,
    tunnels: HashMap<MapData, TunnelKey, Tunnel>,
    fragments: HashMap<MapData, FragmentKey, Fragment>,
    affinity: HashMap<MapData, AffinityKey, Affinity>,
    reasons: PerCpuArray<MapData, u64>,
    stats: Array<MapData, ServiceStats>,
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
    stay_on_one_cpu();
    match REAL.get_or_init(|| load().map(Mutex::new).map_err(|error| format!("{error:#}"))) {
        // A story that failed has left nothing that the next does not clear.
        Ok(real) => real.lock().unwrap_or_else(PoisonError::into_inner),
        Err(error) => panic!("{error}"),
    }
}

/// Young flows stand in a ring of the CPU that they are opened on: all of a story's in one.
fn stay_on_one_cpu() {
    let this_thread = Pid::from_raw(0);
    let allowed = sched_getaffinity(this_thread).unwrap();
    let first = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu) == Ok(true)).unwrap();
    let mut one = CpuSet::new();
    one.set(first).unwrap();
    sched_setaffinity(this_thread, &one).unwrap();
}

fn load() -> anyhow::Result<Real> {
    with_own_mounts(|directory| {
        let programs = Programs::load(directory, &CAPACITIES)?;
        // The host's, so that the keys are the same.
        programs.array(maps::SECRET)?.set(0, SECRET, 0)?;
        Ok(Real {
            legs: programs.hash(maps::FLOWS)?,
            filter: programs.array(maps::FLOW_FILTER)?,
            records: programs.array(maps::RECORDS)?,
            free: programs.queue(maps::FREE)?,
            endpoint_bits: programs.array(maps::ENDPOINT_BITS)?,
            used_bits: BTreeSet::new(),
            taken: programs.hash(maps::TAKEN)?,
            tunnels: programs.hash(maps::TUNNELS)?,
            fragments: programs.hash(maps::FRAGMENTS)?,
            affinity: programs.hash(maps::AFFINITY)?,
            reasons: programs.counters(maps::REASONS)?,
            stats: programs.array(maps::SERVICE_STATS)?,
            programs,
            before: Default::default(),
        })
    })
}

/// FLOWS.
pub(crate) struct Legs<'a>(&'a mut HashMap<MapData, Key, Leg>);

impl Legs<'_> {
    /// Deletes the leg of a pair if it is there; whether it was.
    pub(crate) fn lose(&mut self, pair: &Pair) -> bool {
        self.0.remove(&pair.key(|| Some(&SECRET))).is_ok()
    }
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
    /// Forgets every story and writes `tables`, which have no flows yet.
    pub(crate) fn begin(&mut self, tables: &MemoryTables) {
        assert!(
            tables.flows.borrow().is_empty() && tables.records.borrow().is_empty(),
            "flows begin with packets"
        );
        clear(&mut self.fragments).unwrap();
        clear(&mut self.affinity).unwrap();
        // A story that failed may have left anything.
        if self.programs.end_flows(|_| true).is_err() || !self.broken_flows().is_empty() {
            self.mend_flows();
        }
        self.configure(tables);
        self.before = (self.reasons(), self.stats());
    }

    /// Makes all flow tables as they are at the beginning, except that the ids go on.
    fn mend_flows(&mut self) {
        clear(&mut self.legs).unwrap();
        while self.free.pop(0).is_ok() {}
        for index in 0..RECORDS as u32 {
            let id = self.records.get(&index, 0).unwrap().id;
            self.records.set(index, Flow { id, ..Flow::EMPTY }, 0).unwrap();
        }
        self.programs.sweep().unwrap();
        assert_eq!(self.broken_flows(), Vec::<String>::new(), "flow tables made anew");
    }

    /// What [`MemoryTables::broken_flows`] would say of the maps.
    pub(crate) fn broken_flows(&mut self) -> Vec<String> {
        let copy = MemoryTables::default();
        *copy.flows.borrow_mut() = entries(&self.legs).unwrap().into_iter().collect();
        *copy.records.borrow_mut() =
            (0..RECORDS as u32).map(|index| self.records.get(&index, 0).unwrap()).collect();
        // A queue can only be read by emptying it.
        let free: Vec<u32> = std::iter::from_fn(|| self.free.pop(0).ok()).collect();
        free.iter().for_each(|index| self.free.push(*index, 0).unwrap());
        *copy.free.borrow_mut() = free.into();
        let mut wrong = copy.broken_flows();
        wrong.extend(self.uncounted_legs(copy.flows.borrow().keys()));
        wrong
    }

    /// What is wrong with FLOW_FILTER: packets of a leg that is not counted would pass untranslated. Legs that somebody has
    /// deleted stay counted.
    fn uncounted_legs<'a>(&self, keys: impl Iterator<Item = &'a Key>) -> Vec<String> {
        let mut places = BTreeMap::<(u32, u32), u64>::new();
        for place in keys.map(|key| key.place(&SECRET)) {
            *places.entry((place.word, place.shift)).or_default() += 1;
        }
        let counted = |(word, shift): (u32, u32)| self.filter.get(&word, 0).unwrap() >> shift & 0xff;
        let short = places.into_iter().filter(|(place, legs)| counted(*place) < *legs);
        short.map(|(place, legs)| format!("{legs} legs at {place:?}, {} counted", counted(place))).collect()
    }

    /// Legs that FLOW_FILTER counts.
    pub(crate) fn counted_legs(&self) -> u64 {
        self.filter.iter().map(|word| word.unwrap().to_ne_bytes().map(u64::from).iter().sum::<u64>()).sum()
    }

    /// Ends a flow.
    pub(crate) fn end(&self, ended: &Name) {
        let legs = entries(&self.legs).unwrap().into_iter().collect::<Vec<(Key, Leg)>>();
        self.programs.end_flows(|flow| name(flow.id, &legs) == *ended).unwrap();
    }

    /// The port of a node or client that one of the legs which are not `known` begins with.
    pub(crate) fn new_source_port(&self, known: &std::collections::HashMap<Key, Leg>) -> Option<u16> {
        let flows = self.programs.flows().unwrap();
        let source = |flow: &Flow| {
            let roles = [Role::INNER, Role::MIDDLE].into_iter();
            let new = roles
                .filter(|role| flow.has(*role))
                .find(|role| !known.contains_key(&flow.pairs[role.index()].key(|| Some(&SECRET))))?;
            Some(flow.end(new.index(), true).1.number())
        };
        flows.iter().find_map(source)
    }

    /// Ends all flows.
    pub(crate) fn end_all(&self) {
        self.programs.end_flows(|_| true).unwrap();
    }

    /// Looks through all records; how many flows were over.
    pub(crate) fn sweep(&self) -> u32 {
        self.programs.sweep().unwrap()
    }

    /// The programs, and apart from them what deletes legs: for those who use both at once.
    pub(crate) fn split(&mut self) -> (&Programs, Legs<'_>) {
        (&self.programs, Legs(&mut self.legs))
    }

    /// Deletes a leg.
    pub(crate) fn lose(&mut self, key: &Key) {
        self.legs.remove(key).unwrap();
    }

    /// Inserts a leg.
    pub(crate) fn plant(&mut self, key: &Key, leg: &Leg) {
        self.legs.insert(key, leg, 0).unwrap();
        self.count(key, 1);
    }

    /// Removes all legs of nobody.
    pub(crate) fn weed(&mut self) {
        for (key, leg) in entries(&self.legs).unwrap() {
            if leg.id == NOBODY {
                self.legs.remove(&key).unwrap();
                self.count(&key, -1);
            }
        }
    }

    /// Counts a leg as the programs do, while none is at work.
    fn count(&mut self, key: &Key, by: i64) {
        let place = key.place(&SECRET);
        let word = self.filter.get(&place.word, 0).unwrap();
        self.filter.set(place.word, word.wrapping_add_signed(by * place.one()), 0).unwrap();
    }

    /// Changes every living flow.
    pub(crate) fn change_flows(&mut self, change: impl Fn(&mut Flow)) {
        for mut flow in self.programs.flows().unwrap() {
            change(&mut flow);
            self.records.set(flow.id.index(), flow, 0).unwrap();
        }
    }

    /// Changes every leg.
    pub(crate) fn change_legs(&mut self, change: impl Fn(&Key, &mut Leg)) {
        for (key, mut leg) in entries(&self.legs).unwrap() {
            change(&key, &mut leg);
            self.legs.insert(key, leg, 0).unwrap();
        }
    }

    /// Writes the configuration of `tables` in place of the last.
    pub(crate) fn configure(&mut self, tables: &MemoryTables) {
        self.programs.empty().unwrap();
        let mut steps = Vec::new();
        steps.extend(tables.backends.iter().map(|(index, backend)| Step::PutBackend(*index, *backend)));
        steps.extend(tables.slots.iter().map(|(slot, backend)| Step::PutSlot(*slot, *backend)));
        steps.extend(tables.sources.iter().map(|source| Step::PutSource(*source)));
        steps.extend(tables.ifaces.iter().map(|(index, iface)| Step::PutIface(*index, *iface)));
        steps.extend(tables.masquerade.iter().map(|(key, source)| Step::PutRoute(*key, *source)));
        steps.extend(service_ports(tables));
        steps.extend(tables.addresses.iter().map(|(addr, bits)| Step::PutAddress(*addr, *bits)));
        steps.extend(tables.frontends.iter().map(|(key, frontend)| Step::PutFrontend(*key, *frontend)));
        // An array of one is never absent: it is all zeros before it is written.
        let unwritten = Config { pod_v4: Addr::ANY_V6, node_v4: Addr::ANY_V6, ..Config::EMPTY };
        steps.push(Step::PutConfig(Box::new(tables.config.unwrap_or(unwritten))));
        self.programs.apply(&steps).unwrap();
        self.follow(tables);
    }

    /// Makes exactly what the agent lets follow from other tables, or reads elsewhere.
    fn follow(&mut self, tables: &MemoryTables) {
        let mut bits = BTreeMap::new();
        for endpoint in tables.backends.values().filter(|backend| backend.is_live()) {
            let place = endpoint.addr.place();
            *bits.entry(place / 64).or_insert(0_u64) |= 1 << (place % 64);
        }
        let used = bits.keys().copied().collect();
        for word in std::mem::replace(&mut self.used_bits, used).iter().chain(bits.keys()) {
            self.endpoint_bits.set(*word, bits.get(word).copied().unwrap_or(0), 0).unwrap();
        }
        if !tables.taken.is_empty() || self.taken.keys().next().is_some() {
            clear(&mut self.taken).unwrap();
        }
        if !tables.tunnels.is_empty() || self.tunnels.keys().next().is_some() {
            clear(&mut self.tunnels).unwrap();
        }
        for (key, tunnel) in &tables.tunnels {
            self.tunnels.insert(key, tunnel, 0).unwrap();
        }
        for tuple in &tables.taken {
            self.taken.insert(tuple, 1, 0).unwrap();
        }
    }

    /// What packets have left behind since [`Self::begin`].
    pub(crate) fn traces(&self) -> Traces {
        let (reasons, stats) = &self.before;
        let mut traces = Traces {
            reasons: since(self.reasons(), reasons, |a, b| a - b, &0),
            stats: since(self.stats(), stats, |a, b| [a[0] - b[0], a[1] - b[1], a[2] - b[2]], &[0; 3]),
            fragments: entries(&self.fragments).unwrap(),
            affinity: entries(&self.affinity).unwrap(),
            ..Traces::default()
        };
        traces.see_flows(&self.programs.flows().unwrap(), entries(&self.legs).unwrap().into_iter());
        traces.forget_times();
        traces
    }

    fn reasons(&self) -> BTreeMap<Reason, u64> {
        let count = |reason: &Reason| self.reasons.get(&(*reason as u32), 0).unwrap().iter().sum();
        Reason::ALL.iter().map(|reason| (*reason, count(reason))).collect()
    }

    fn stats(&self) -> BTreeMap<u32, [u64; 3]> {
        let count = |id: u32| {
            let ServiceStats { chosen, refused, dropped, .. } = self.stats.get(&id, 0).unwrap();
            [chosen, refused, dropped]
        };
        (0..SERVICES).map(|id| (id, count(id))).collect()
    }

    /// Runs the program of a hook on a packet that has come in by the interface `from`, if not 0. `None` when the kernel
    /// does not take so short a packet.
    pub(crate) fn run(&self, from: u32, bytes: &[u8], hook: Hook, ethernet: bool) -> Option<Outcome> {
        self.programs.run_from(from, bytes, hook, ethernet, IFACE).unwrap()
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

/// SERVICE_PORTS as the agent would write them.
fn service_ports(tables: &MemoryTables) -> impl Iterator<Item = Step> {
    let external = tables.frontends.iter().filter(|(_, value)| value.flags & frontend::INTERNAL == 0);
    let mut words = BTreeMap::new();
    for (key, _) in external {
        let port = u32::from(key.port.number());
        *words.entry(port / 64).or_insert(0) |= 1 << (port % 64);
    }
    words.into_iter().map(|(word, bits)| Step::PutServicePorts(word, bits))
}

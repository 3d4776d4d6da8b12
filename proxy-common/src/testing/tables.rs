//! Tables over hash maps.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::string::String;
use std::vec::Vec;

use crate::abi::{
    Affinity, AffinityKey, Backend, Config, Flow, FlowId, Fragment, FragmentKey, Frontend, FrontendKey,
    Iface, Key, Leg, Notes, Pair, Reason, Role, RouteKey, Secret, SourceKey, State, Tunnel, TunnelKey, Tuple,
    frontend,
};
use crate::addr::{Addr, Port};
use crate::lb::masquerade::Allowance;
use crate::lb::{Inserted, Ring, Stat, Subprograms, Tables};
use crate::wire::Packet;

/// [`Tables`] over hash maps.
#[derive(Default)]
pub struct MemoryTables {
    /// CONFIG.
    pub config: Option<Config>,
    /// The clock, in nanoseconds.
    pub now: Cell<u64>,
    /// PAUSE.
    pub paused_until: Cell<u64>,
    /// The next random word; each call adds a large odd number.
    pub random: Cell<u32>,
    /// ADDRESSES.
    pub addresses: HashMap<Addr, u32>,
    /// FRONTENDS.
    pub frontends: HashMap<FrontendKey, Frontend>,
    /// SLOTS.
    pub slots: HashMap<u32, u32>,
    /// BACKENDS.
    pub backends: HashMap<u32, Backend>,
    /// SOURCES.
    pub sources: Vec<SourceKey>,
    /// IFACES.
    pub ifaces: HashMap<u32, Iface>,
    /// MASQUERADE.
    pub masquerade: HashMap<RouteKey, Addr>,
    /// TUNNELS.
    pub tunnels: HashMap<TunnelKey, Tunnel>,
    /// AFFINITY.
    pub affinity: RefCell<HashMap<AffinityKey, Affinity>>,
    /// FLOWS; the keys are made with [`SECRET`].
    pub flows: RefCell<HashMap<Key, Leg>>,
    /// Entries FLOWS may hold; `None` is no limit.
    pub max_flows: Option<usize>,
    /// RECORDS; grows when a record is taken and none is free. The first is never used.
    pub records: RefCell<Vec<Flow>>,
    /// Records there may be, the first included; `None` is no limit.
    pub max_records: Option<usize>,
    /// FREE.
    pub free: RefCell<VecDeque<u32>>,
    /// RING: the next place in each, and who stands there.
    pub rings: RefCell<[(usize, Vec<FlowId>); Ring::COUNT as usize]>,
    /// Places in a ring; `None` stands for so many that no flow is displaced.
    pub places: Option<usize>,
    /// Of them those that may be used in the ring of flows whose packets are wrapped; `None` stands for all.
    pub direct_places: Option<usize>,
    /// Tuples that sockets of the node hold, as they send.
    pub sockets: HashSet<Tuple>,
    /// TAKEN.
    pub taken: HashSet<Tuple>,
    /// Whether packets at egress have come in by an interface.
    pub forwarded: Cell<bool>,
    /// How far searches for source ports may still go.
    pub allowance: Cell<Allowance>,
    /// How often TAKEN was asked.
    pub looked: Cell<u32>,
    /// FRAGMENTS.
    pub fragments: RefCell<HashMap<FragmentKey, Fragment>>,
    /// REASONS.
    pub reasons: RefCell<HashMap<Reason, u64>>,
    /// SERVICE_STATS: chosen, rejected, dropped.
    pub stats: RefCell<HashMap<u32, [u64; 3]>>,
}

/// What the keys of flows are made with here: numbers as good as any.
pub const SECRET: Secret = {
    let mut secret = Secret::NONE;
    let mut n = 0;
    while n < 18 {
        secret.factors[n / 9][n % 9] =
            0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(n as u64 * 2 + 0x1_0001) ^ 0x5bf0_3635 << n;
        n += 1;
    }
    secret
};

impl MemoryTables {
    /// Every living flow.
    pub fn live(&self) -> Vec<Flow> {
        self.records.borrow().iter().filter(|flow| flow.lives(flow.id)).copied().collect()
    }

    /// What is wrong with the flow tables between two packets: every living flow has all its legs (one that
    /// is left to netfilter at least the outer one) and every leg a living flow, nothing is claimed, and each
    /// record is free once or in use.
    pub fn broken_flows(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let records = self.records.borrow();
        let mut legs = self.flows.borrow().clone();
        let mut free = HashMap::new();
        for index in self.free.borrow().iter() {
            *free.entry(*index as usize).or_insert(0) += 1;
        }
        for (index, flow) in records.iter().enumerate().skip(1) {
            if flow.claims != 0 || flow.id.index() as usize != index {
                wrong.push(std::format!("record {index}: {flow:?}"));
            }
            let times = free.get(&index).copied().unwrap_or(0);
            if times != i32::from(flow.state == State::FREE) || flow.state == State::ENDED {
                wrong.push(std::format!("record {index} is {times} times free: {flow:?}"));
            }
            if !flow.lives(flow.id) && flow.state != State::LOST {
                continue;
            }
            for role in [Role::OUTER, Role::MIDDLE, Role::INNER, Role::OWN] {
                let pair = flow.pairs[role.index()];
                let key = pair.key(|| Some(&SECRET));
                let leg = flow.leg(role).sealed(&key);
                let without_notes =
                    |there: Leg| if pair.ends[0].is_v4() { Leg { upper: leg.upper, ..there } } else { there };
                let optional = flow.state == State::LEFT && role != Role::OUTER;
                if optional && legs.get(&key).is_none_or(|there| there.id != flow.id) {
                    continue;
                }
                if flow.has(role) && legs.remove(&key).map(without_notes) != Some(leg) {
                    wrong.push(std::format!("leg {role:?} of {flow:?} is missing"));
                }
            }
        }
        wrong.extend(legs.iter().map(|leg| std::format!("a leg without a flow {leg:?}")));
        wrong
    }

    /// How often a reason was counted.
    pub fn counted(&self, reason: Reason) -> u64 {
        self.reasons.borrow().get(&reason).copied().unwrap_or(0)
    }
}

impl Tables for MemoryTables {
    type Place = Key;

    fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    fn now(&self) -> u64 {
        self.now.get()
    }

    fn paused_until(&self) -> u64 {
        self.paused_until.get()
    }

    fn random(&self) -> u32 {
        let word = self.random.get();
        self.random.set(word.wrapping_add(0x9e37_79b9));
        word
    }

    fn address(&self, addr: &Addr) -> u32 {
        self.addresses.get(addr).copied().unwrap_or(0)
    }

    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.frontends.get(key).copied()
    }

    fn slot(&self, slot: u32) -> Option<u32> {
        Some(self.slots.get(&slot).copied().unwrap_or(0))
    }

    fn backend(&self, index: u32) -> Option<Backend> {
        Some(self.backends.get(&index).copied().unwrap_or(Backend::retired(0)))
    }

    fn source_allowed(&self, key: &SourceKey) -> bool {
        self.sources
            .iter()
            .any(|range| is_prefix(range.prefix_len, range.service, &range.addr, key.service, &key.addr))
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.affinity.borrow().get(key).copied()
    }

    fn set_affinity(&self, key: &AffinityKey, value: &Affinity) {
        self.affinity.borrow_mut().insert(*key, *value);
    }

    fn iface(&self, ifindex: u32) -> Option<Iface> {
        self.ifaces.get(&ifindex).copied()
    }

    fn masquerade_address(&self, ifindex: u32, dst: &Addr) -> Option<Addr> {
        let fits = |key: &RouteKey| is_prefix(key.prefix_len, key.ifindex, &key.dst, ifindex.to_be(), dst);
        let longest = self.masquerade.keys().filter(|key| fits(key)).max_by_key(|key| key.prefix_len)?;
        self.masquerade.get(longest).copied().filter(|addr| addr.is_v4() == dst.is_v4())
    }

    fn tunnel(&self, key: &TunnelKey) -> Option<Tunnel> {
        self.tunnels.get(key).copied()
    }

    /// What the agent keeps in SERVICE_PORTS follows from FRONTENDS.
    fn is_service_port(&self, port: Port) -> bool {
        self.frontends.iter().any(|(key, value)| key.port == port && value.flags & frontend::INTERNAL == 0)
    }

    fn is_socket(&self, tuple: &Tuple) -> bool {
        self.sockets.contains(tuple)
    }

    fn is_of_others(&self, _tuple: &Tuple) -> bool {
        self.forwarded.get()
    }

    /// What the agent keeps in ENDPOINT_BITS follows from BACKENDS; addresses may share a bit.
    fn is_endpoint(&self, addr: &Addr) -> bool {
        self.backends.values().any(|backend| backend.is_live() && backend.addr.place() == addr.place())
    }

    fn is_taken(&self, tuple: &Tuple) -> bool {
        self.looked.set(self.looked.get() + 1);
        self.taken.contains(tuple)
    }

    fn may_search_on(&self) -> bool {
        let mut allowance = self.allowance.get();
        let may = allowance.take(self.now());
        self.allowance.set(allowance);
        may
    }

    fn leg(&self, pair: &Pair) -> Option<Leg> {
        let key = pair.key(|| Some(&SECRET));
        self.flows.borrow().get(&key).copied().filter(|leg| leg.is_of(&key))
    }

    fn key_of(&self, packet: &Packet) -> (Key, usize) {
        packet.tuple.key(packet.v4, || Some(&SECRET))
    }

    /// What the programs keep in FLOW_FILTER follows from FLOWS; keys may share a place.
    fn may_have_leg(&self, key: &Key) -> bool {
        self.flows.borrow().keys().any(|other| other.place(&SECRET) == key.place(&SECRET))
    }

    fn leg_at(&self, key: &Key) -> Option<(Leg, Key)> {
        self.flows.borrow().get(key).filter(|leg| leg.is_of(key)).map(|leg| (*leg, *key))
    }

    fn note(&self, place: Key, id: FlowId, notes: Notes) {
        if let Some(leg) = self.flows.borrow_mut().get_mut(&place).filter(|leg| leg.id == id) {
            leg.upper = notes.word();
        }
    }

    fn is_broken(&self, pair: &Pair) -> bool {
        let key = pair.key(|| Some(&SECRET));
        self.flows.borrow().get(&key).is_some_and(|leg| !leg.is_of(&key))
    }

    fn insert_leg(&self, flow: &Flow, role: Role) -> Inserted {
        let key = flow.pairs[role.index()].key(|| Some(&SECRET));
        let mut flows = self.flows.borrow_mut();
        if flows.contains_key(&key) {
            return Inserted::Exists;
        }
        if self.max_flows.is_some_and(|max| flows.len() >= max) {
            return Inserted::Full;
        }
        flows.insert(key, flow.leg(role).sealed(&key));
        Inserted::Done
    }

    fn delete_leg(&self, pair: &Pair) {
        self.flows.borrow_mut().remove(&pair.key(|| Some(&SECRET)));
    }

    fn record<R>(&self, index: u32, f: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        // Held while `f` runs: what is done to a record is done between two looks of others.
        self.records.borrow_mut().get_mut(index as usize).map(f)
    }

    fn claim(&self, index: u32) -> bool {
        let alone = |flow: &mut Flow| {
            let alone = flow.claims == 0;
            flow.claims += u64::from(alone);
            alone
        };
        self.record(index, alone) == Some(true)
    }

    fn unclaim(&self, index: u32) {
        self.record(index, |flow| flow.claims -= 1);
    }

    fn take_record(&self) -> Option<u32> {
        if let Some(index) = self.free.borrow_mut().pop_front() {
            return Some(index);
        }
        let mut records = self.records.borrow_mut();
        if records.is_empty() {
            records.push(Flow::EMPTY);
        }
        if self.max_records.is_some_and(|max| records.len() >= max) {
            return None;
        }
        let index = records.len() as u32;
        records.push(Flow { id: FlowId(u64::from(index)).next(), state: State::FREE, ..Flow::EMPTY });
        Some(index)
    }

    fn give_record(&self, index: u32) -> bool {
        self.free.borrow_mut().push_back(index);
        true
    }

    fn put_in_ring(&self, ring: Ring, id: FlowId) -> FlowId {
        let mut rings = self.rings.borrow_mut();
        let (next, places) = &mut rings[ring.0 as usize];
        match self.places {
            Some(size) => {
                places.resize(size, FlowId::NONE);
                let stood = core::mem::replace(&mut places[*next], id);
                let turn = if ring == Ring::DIRECT { self.direct_places.unwrap_or(size) } else { size };
                *next = (*next + 1) % turn;
                stood
            }
            None => {
                places.push(id);
                FlowId::NONE
            }
        }
    }

    fn next_in_ring(&self, ring: Ring) -> FlowId {
        let rings = self.rings.borrow();
        let (next, places) = &rings[ring.0 as usize];
        if self.places.is_none() { FlowId::NONE } else { places.get(*next).copied().unwrap_or(FlowId::NONE) }
    }

    fn any_in_rings(&self) -> FlowId {
        let at = self.random() as usize;
        let rings = self.rings.borrow();
        let all = rings.iter().map(|(_, places)| places.len()).sum::<usize>().max(1);
        rings.iter().flat_map(|(_, places)| places).nth(at % all).copied().unwrap_or(FlowId::NONE)
    }

    fn with_fragment<R>(&self, key: &FragmentKey, f: impl FnOnce(&mut Fragment) -> R) -> Option<R> {
        self.fragments.borrow_mut().get_mut(key).map(f)
    }

    fn set_fragment(&self, key: &FragmentKey, value: &Fragment, replace: bool) {
        let mut fragments = self.fragments.borrow_mut();
        if replace || !fragments.contains_key(key) {
            fragments.insert(*key, *value);
        }
    }

    fn count(&self, reason: Reason) {
        *self.reasons.borrow_mut().entry(reason).or_default() += 1;
    }

    fn count_service(&self, service: u32, stat: Stat) {
        self.stats.borrow_mut().entry(service).or_default()[stat as usize] += 1;
    }
}

impl Subprograms for MemoryTables {}

/// Whether the first `bits` bits of a word and an address are those of another word and address.
fn is_prefix(bits: u32, word: u32, addr: &Addr, other_word: u32, other_addr: &Addr) -> bool {
    let bytes = |word: u32, addr: &Addr| {
        let words = std::iter::once(word).chain(addr.0);
        words.flat_map(u32::to_ne_bytes).collect::<Vec<u8>>()
    };
    bytes(word, addr).iter().zip(bytes(other_word, other_addr)).enumerate().all(|(n, (a, b))| {
        let left = (bits as usize).saturating_sub(n * 8).min(8);
        let mask = if left == 0 { 0 } else { 0xff_u8 << (8 - left) };
        (a ^ b) & mask == 0
    })
}

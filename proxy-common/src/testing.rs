//! Tables and packets in memory: what unit tests, fuzzing and the end-to-end tests share.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::string::String;
use std::vec::Vec;

use crate::abi::{
    Affinity, AffinityKey, Backend, Config, Flow, FlowId, Fragment, FragmentKey, Frontend, FrontendKey, Hook,
    Iface, Key, Leg, Notes, Pair, PeerKey, Reason, Role, RouteKey, Secret, SocketEntry, SocketState,
    SourceKey, State, Tuple, frontend,
};
use crate::addr::{Addr, Port, Proto};
use crate::lb::masquerade::Allowance;
use crate::lb::socket::{self, Call, Memory};
use crate::lb::{Inserted, Ring, Stat, Subprograms, Tables, Verdict, egress, ingress};
use crate::wire::answer::{self, Answer};
use crate::wire::{
    Edit, End, Frame, Kind, MAX_OFFSET, Packet, Words, checksum, mend, parse, rewrite, rewrite_error,
};

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
    /// Places in a ring; `None` stands for so many that nobody is displaced.
    pub places: Option<usize>,
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
    /// SERVICE_STATS: chosen, refused, dropped.
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

    /// What is wrong with the flow tables between two packets: every living flow has all its legs (one that is left to
    /// netfilter at least the outer one) and every leg a living flow, nothing is claimed, and each record is free once or in
    /// use.
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
        wrong.extend(legs.iter().map(|leg| std::format!("nobody's leg {leg:?}")));
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

    /// What the agent keeps in ENDPOINT_BITS follows from BACKENDS.
    fn is_endpoint(&self, addr: &Addr) -> bool {
        self.backends.values().any(|backend| backend.is_live() && backend.addr.same(addr))
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

    fn leg_of(&self, packet: &Packet) -> (usize, Option<(Leg, Key)>) {
        let (key, source) = packet.tuple.key(packet.v4, || Some(&SECRET));
        (source, self.flows.borrow().get(&key).filter(|leg| leg.is_of(&key)).map(|leg| (*leg, key)))
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

    fn stand(&self, ring: Ring, id: FlowId) -> FlowId {
        let mut rings = self.rings.borrow_mut();
        let (next, places) = &mut rings[ring.0 as usize];
        match self.places {
            Some(size) => {
                places.resize(size, FlowId::NONE);
                let stood = core::mem::replace(&mut places[*next], id);
                *next = (*next + 1) % size;
                stood
            }
            None => {
                places.push(id);
                FlowId::NONE
            }
        }
    }

    fn anybody(&self) -> FlowId {
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

/// A [`Frame`] over bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ByteFrame {
    /// The bytes from the first header on.
    pub bytes: Vec<u8>,
    /// Whether the transport checksum is still to be finished by hardware: it holds the folded sum of the
    /// pseudo header.
    pub partial: bool,
}

impl Frame for ByteFrame {
    fn update<T: Words>(&mut self, off: usize, f: impl FnOnce(&mut T)) -> bool {
        let Some(mut value) = self.load::<T>(off) else { return false };
        f(&mut value);
        self.store(off, value)
    }

    fn load<T: Words>(&self, off: usize) -> Option<T> {
        if off > MAX_OFFSET {
            return None;
        }
        let bytes = self.bytes.get(off..off + size_of::<T>())?;
        #[expect(unsafe_code, reason = "words of any alignment")]
        // SAFETY: `bytes` is as long as T, and every T is made of integers.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    fn store<T: Words>(&mut self, off: usize, value: T) -> bool {
        if off > MAX_OFFSET {
            return false;
        }
        let Some(bytes) = self.bytes.get_mut(off..off + size_of::<T>()) else {
            return false;
        };
        #[expect(unsafe_code, reason = "words of any alignment")]
        // SAFETY: `bytes` is as long as T.
        unsafe {
            bytes.as_mut_ptr().cast::<T>().write_unaligned(value);
        }
        true
    }

    fn mend(&mut self, off: usize, pseudo: u32, body: u32, flags: u32) -> bool {
        let Some(field) = self.load::<u16>(off) else {
            return false;
        };
        if flags & mend::UDP != 0 && field == 0 {
            return true;
        }
        if self.partial {
            let sum = checksum::fold(checksum::add(u32::from(field), pseudo));
            return self.store(off, sum);
        }
        let mut mended = checksum::apply(field, checksum::add(pseudo, body));
        if flags & mend::UDP != 0 && mended == 0 {
            mended = 0xffff;
        }
        self.store(off, mended)
    }
}

/// The one's complement sum of bytes, from scratch (RFC 1071 §3).
fn sum(bytes: &[u8]) -> u32 {
    let mut total = 0_u64;
    for pair in bytes.chunks(2) {
        total += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u32
}

/// The CRC of SCTP, bit by bit (RFC 9260 appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |mut crc, byte| {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
        crc
    })
}

/// The bytes of an address in its own family.
fn octets(addr: &Addr) -> Vec<u8> {
    match IpAddr::from(*addr) {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn pseudo(src: &Addr, dst: &Addr, proto: Proto, len: usize) -> u32 {
    let mut bytes = octets(src);
    bytes.extend(octets(dst));
    bytes.extend((len as u32).to_be_bytes());
    bytes.extend([0, 0, 0, proto.0]);
    sum(&bytes)
}

/// An IP header with a correct checksum, 64 hops.
fn ip_header(src: &Addr, dst: &Addr, proto: Proto, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    if src.is_v4() {
        bytes.extend([0x45, 0]);
        bytes.extend(((20 + len) as u16).to_be_bytes());
        bytes.extend([0x12, 0x34, 0x40, 0, 64, proto.0, 0, 0]);
        bytes.extend(octets(src));
        bytes.extend(octets(dst));
        let check = !(sum(&bytes) as u16);
        bytes[10..12].copy_from_slice(&check.to_be_bytes());
    } else {
        bytes.extend([0x60, 0, 0, 0]);
        bytes.extend((len as u16).to_be_bytes());
        bytes.extend([proto.0, 64]);
        bytes.extend(octets(src));
        bytes.extend(octets(dst));
    }
    bytes
}

/// An Ethernet frame with a TCP, UDP or SCTP packet of the given tuple, checksums from scratch; with `partial` the
/// transport checksum is left to the hardware.
pub fn frame(key: &Tuple, tcp_flags: u8, payload: &[u8], partial: bool) -> ByteFrame {
    segment(key, tcp_flags, [1000, 2000], payload, partial)
}

/// The same; `numbers` are the TCP sequence and acknowledgement numbers.
pub fn segment(key: &Tuple, tcp_flags: u8, numbers: [u32; 2], payload: &[u8], partial: bool) -> ByteFrame {
    let mut l4 = Vec::new();
    l4.extend(key.sport.number().to_be_bytes());
    l4.extend(key.dport.number().to_be_bytes());
    let at = match key.proto {
        Proto::TCP => {
            l4.extend(numbers.into_iter().flat_map(u32::to_be_bytes));
            l4.extend([0x50, tcp_flags, 0xff, 0xff, 0, 0, 0, 0]);
            16
        }
        Proto::SCTP => {
            l4.extend([0, 0, 0, 9, 0, 0, 0, 0]);
            0
        }
        _ => {
            l4.extend(((8 + payload.len()) as u16).to_be_bytes());
            l4.extend([0, 0]);
            6
        }
    };
    l4.extend(payload);
    let pseudo = pseudo(&key.src, &key.dst, key.proto, l4.len());
    let check = match !checksum::fold(pseudo + sum(&l4)) {
        _ if partial => pseudo as u16,
        0 if key.proto == Proto::UDP => 0xffff, // Zero would say that there is none (RFC 768).
        check => check,
    };
    if key.proto == Proto::SCTP {
        let crc = crc32c(&l4);
        l4[8..12].copy_from_slice(&crc.to_le_bytes());
    } else {
        l4[at..at + 2].copy_from_slice(&check.to_be_bytes());
    }
    let mut bytes = ethernet(&key.src);
    bytes.extend(ip_header(&key.src, &key.dst, key.proto, l4.len()));
    bytes.extend(l4);
    ByteFrame { bytes, partial }
}

fn ethernet(of_family: &Addr) -> Vec<u8> {
    let mut bytes = Vec::from([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    bytes.extend(if of_family.is_v4() { [0x08, 0x00] } else { [0x86, 0xdd] });
    bytes
}

/// An Ethernet frame with an ICMP error from `from` to `to` about the packet in `about`: "fragmentation
/// needed" or "packet too big", with an MTU of 1400.
pub fn icmp_error(from: Addr, to: Addr, about: &ByteFrame) -> ByteFrame {
    let inner = &about.bytes[14..about.bytes.len().min(14 + 48)];
    let (proto, mut l4) = if from.is_v4() {
        (Proto::ICMP, Vec::from([3, 4, 0, 0, 0, 0, 0x05, 0x78]))
    } else {
        (Proto::ICMPV6, Vec::from([2, 0, 0, 0, 0, 0, 0x05, 0x78]))
    };
    l4.extend(inner);
    let mut total = sum(&l4);
    if !from.is_v4() {
        total += pseudo(&from, &to, proto, l4.len());
    }
    let check = !(checksum::fold(total));
    l4[2..4].copy_from_slice(&check.to_be_bytes());
    let mut bytes = ethernet(&from);
    bytes.extend(ip_header(&from, &to, proto, l4.len()));
    bytes.extend(l4);
    ByteFrame { bytes, partial: false }
}

/// Checks every checksum of a frame from scratch; says what is wrong.
pub fn verify(frame: &ByteFrame) -> Result<(), &'static str> {
    let mut packet = Packet::at(0);
    parse::<_, true>(frame, &mut packet).ok_or("does not parse")?;
    let (l3, l4) = (usize::from(packet.l3), usize::from(packet.l4));
    let (src, dst, proto, end) = if frame.bytes[l3] >> 4 == 4 {
        if sum(&frame.bytes[l3..l4]) != 0xffff {
            return Err("IP header checksum");
        }
        let len = u16::from_be_bytes([frame.bytes[l3 + 2], frame.bytes[l3 + 3]]);
        let word = |at: usize| Addr::v4(frame.load::<u32>(at).unwrap_or(0));
        (word(l3 + 12), word(l3 + 16), Proto(frame.bytes[l3 + 9]), l3 + usize::from(len))
    } else {
        let len = u16::from_be_bytes([frame.bytes[l3 + 4], frame.bytes[l3 + 5]]);
        let words = |at: usize| Addr(frame.load::<[u32; 4]>(at).unwrap_or([0; 4]));
        (words(l3 + 8), words(l3 + 24), Proto(frame.bytes[l3 + 6]), l3 + 40 + usize::from(len))
    };
    let body = frame.bytes.get(l4..end).ok_or("shorter than its length field")?;
    let pseudo = pseudo(&src, &dst, proto, body.len());
    if proto == Proto::SCTP {
        let mut zeroed = body.to_vec();
        let field: Vec<u8> = zeroed.splice(8..12, [0; 4]).collect();
        return if crc32c(&zeroed).to_le_bytes()[..] == field { Ok(()) } else { Err("SCTP CRC") };
    }
    let at = match proto {
        Proto::TCP => 16,
        Proto::UDP => 6,
        _ => 2,
    };
    let field = u32::from(u16::from_be_bytes([body[at], body[at + 1]]));
    let right = match proto {
        Proto::UDP if field == 0 => src.is_v4(),
        Proto::ICMP => sum(body) == 0xffff,
        _ if frame.partial => field == pseudo,
        _ => checksum::fold(sum(body) + pseudo) == 0xffff,
    };
    if right { Ok(()) } else { Err("transport checksum") }
}

/// The tuple of a frame.
pub fn tuple(frame: &ByteFrame) -> Option<Packet> {
    let mut packet = Packet::at(0);
    parse::<_, true>(frame, &mut packet)?;
    Some(packet)
}

/// What became of a frame at a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Went on unchanged.
    Passed,
    /// Went on changed.
    Rewritten(ByteFrame),
    /// Was answered.
    Refused(ByteFrame),
    /// Was put at the end of the queue, to come again.
    Waits,
    /// Was discarded.
    Dropped,
}

/// Runs an Ethernet frame through the decision of a hook and applies it, as the kernel programs do.
pub fn run(tables: &impl Subprograms, frame: &ByteFrame, hook: Hook, ifindex: u32) -> Outcome {
    run_on::<true>(tables, frame, hook, ifindex)
}

/// The same; with `ETHERNET` false the frame begins at the IP header.
pub fn run_on<const ETHERNET: bool>(
    tables: &impl Subprograms,
    frame: &ByteFrame,
    hook: Hook,
    ifindex: u32,
) -> Outcome {
    let mut packet = Packet::at(ifindex);
    if parse::<_, ETHERNET>(frame, &mut packet).is_none() {
        return Outcome::Passed;
    }
    let mut edit = Edit::NONE;
    let (verdict, end) = if hook == Hook::INGRESS {
        (ingress::ingress(tables, &mut packet, &mut edit), End::Dst)
    } else {
        (egress::egress(tables, &mut packet, &mut edit), End::Src)
    };
    match verdict {
        Verdict::Pass => Outcome::Passed,
        Verdict::Rewrite => {
            let mut out = frame.clone();
            let done = match packet.kind {
                Kind::IcmpError => rewrite_error(&mut out, &packet, end, &edit),
                _ => rewrite(&mut out, &packet, end, &edit),
            };
            if done {
                return Outcome::Rewritten(out);
            }
            tables.count(Reason::RewriteFailed);
            Outcome::Dropped
        }
        Verdict::Refuse if hook == Hook::INGRESS => {
            let mut answer = Answer { words: [0; 24], len: 0 };
            if !answer::build(frame, &packet, &mut answer) {
                return Outcome::Dropped;
            }
            let mut bytes = Vec::new();
            if ETHERNET {
                bytes.extend(&frame.bytes[6..12]);
                bytes.extend(&frame.bytes[..6]);
                bytes.extend(&frame.bytes[12..14]);
            }
            bytes.extend(answer.words.iter().take(answer.len).flat_map(|w| w.to_ne_bytes()));
            Outcome::Refused(ByteFrame { bytes, partial: false })
        }
        Verdict::Wait if hook == Hook::INGRESS => Outcome::Waits,
        Verdict::Refuse | Verdict::Wait | Verdict::Drop => Outcome::Dropped,
    }
}

/// A socket, as far as it remembers something.
pub struct MemorySocket {
    /// Its storage.
    pub state: SocketState,
    /// Whether it has any.
    pub has_state: bool,
    /// Whether it can get some.
    pub room: bool,
    /// PEERS.
    pub peers: RefCell<HashMap<PeerKey, SocketEntry>>,
}

impl Default for MemorySocket {
    fn default() -> Self {
        Self { state: SocketState::EMPTY, has_state: false, room: true, peers: RefCell::default() }
    }
}

/// What a call can get from outside the socket's storage.
struct Beside<'a> {
    storage: Cell<Option<&'a mut SocketState>>,
    used: &'a Cell<bool>,
    peers: &'a RefCell<HashMap<PeerKey, SocketEntry>>,
}

impl MemorySocket {
    /// The cookie of all such sockets.
    pub const COOKIE: u64 = 77;

    /// A call of this socket, and where it leads.
    pub fn call(&mut self, tables: &MemoryTables, call: &Call) -> (socket::Answer, SocketEntry) {
        let used = Cell::new(self.has_state);
        let (old, new) = match self.has_state {
            true => (Some(&mut self.state), None),
            false => (None, self.room.then_some(&mut self.state)),
        };
        let beside = Beside { storage: Cell::new(new), used: &used, peers: &self.peers };
        let mut entry = SocketEntry::EMPTY;
        let answer = socket::translate(tables, &beside, old, call, &mut entry);
        self.has_state = used.get();
        (answer, entry)
    }

    /// What the process is shown of a peer.
    pub fn shown(&self, addr: Addr, port: Port, proto: Proto) -> (Addr, Port) {
        let used = Cell::new(false);
        let beside = Beside { storage: Cell::new(None), used: &used, peers: &self.peers };
        let original = self.has_state.then(|| socket::original(&beside, &self.state, &addr, port, proto));
        original.flatten().unwrap_or((addr, port))
    }
}

impl<'a> Memory<'a> for Beside<'a> {
    fn new_state(&self) -> Option<&'a mut SocketState> {
        let storage = self.storage.take();
        self.used.set(self.used.get() || storage.is_some());
        storage
    }

    fn cookie(&self) -> u64 {
        MemorySocket::COOKIE
    }

    fn peer<R>(&self, key: &PeerKey, see: impl FnOnce(&SocketEntry) -> R) -> Option<R> {
        self.peers.borrow().get(key).map(see)
    }

    fn set_peer(&self, key: &PeerKey, entry: &SocketEntry) -> bool {
        self.peers.borrow_mut().insert(*key, *entry);
        true
    }

    fn forget_peer(&self, key: &PeerKey) {
        self.peers.borrow_mut().remove(key);
    }
}

//! Tables and packets in memory: what unit tests, fuzzing and the end-to-end tests share.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::IpAddr;
use std::vec::Vec;

use crate::abi::{
    Affinity, AffinityKey, Backend, Config, Flow, FlowKey, Fragment, FragmentKey, Frontend, FrontendKey,
    Hook, Iface, Reason, SourceKey,
};
use crate::addr::{Addr, Proto};
use crate::lb::{FlowTable, Inserted, Stat, Tables, Verdict, egress, ingress};
use crate::wire::answer::{self, Answer};
use crate::wire::{Edit, Frame, MAX_OFFSET, Packet, Words, checksum, mend, parse, rewrite};

/// [`Tables`] over hash maps.
#[derive(Default)]
pub struct MemoryTables {
    /// CONFIG.
    pub config: Option<Config>,
    /// The clock, in nanoseconds.
    pub now: Cell<u64>,
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
    /// AFFINITY.
    pub affinity: RefCell<HashMap<AffinityKey, Affinity>>,
    /// FLOWS and HALF_OPEN.
    pub flows: RefCell<HashMap<(FlowTable, FlowKey), Flow>>,
    /// Entries FLOWS may hold; `None` is no limit.
    pub max_flows: Option<usize>,
    /// FRAGMENTS.
    pub fragments: RefCell<HashMap<FragmentKey, Fragment>>,
    /// REASONS.
    pub reasons: RefCell<HashMap<Reason, u64>>,
    /// SERVICE_STATS: chosen, refused, dropped.
    pub stats: RefCell<HashMap<u32, [u64; 3]>>,
}

impl MemoryTables {
    /// How often a reason was counted.
    pub fn counted(&self, reason: Reason) -> u64 {
        self.reasons.borrow().get(&reason).copied().unwrap_or(0)
    }
}

impl Tables for MemoryTables {
    fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    fn now(&self) -> u64 {
        self.now.get()
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
        let bits = |k: &SourceKey| {
            let mut bytes = k.service.to_ne_bytes().to_vec();
            bytes.extend(k.addr.0.iter().flat_map(|w| w.to_ne_bytes()));
            bytes
        };
        let wanted = bits(key);
        self.sources.iter().any(|range| {
            bits(range).iter().zip(&wanted).enumerate().all(|(n, (a, b))| {
                let left = (range.prefix_len as usize).saturating_sub(n * 8).min(8);
                let mask = if left == 0 { 0 } else { 0xff_u8 << (8 - left) };
                (a ^ b) & mask == 0
            })
        })
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

    fn with_flow<R>(&self, table: FlowTable, key: &FlowKey, f: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        // Copied out and back: `f` may look at other flows.
        let mut flow = *self.flows.borrow().get(&(table, *key))?;
        let result = f(&mut flow);
        self.flows.borrow_mut().insert((table, *key), flow);
        Some(result)
    }

    fn insert_flow(&self, table: FlowTable, key: &FlowKey, flow: &Flow, replace: bool) -> Inserted {
        let mut flows = self.flows.borrow_mut();
        let there = flows.contains_key(&(table, *key));
        if there && !replace {
            return Inserted::Exists;
        }
        let used = flows.keys().filter(|(t, _)| *t == table).count();
        if !there && table == FlowTable::Established && self.max_flows.is_some_and(|max| used >= max) {
            return Inserted::Full;
        }
        flows.insert((table, *key), *flow);
        Inserted::Done
    }

    fn delete_flow(&self, table: FlowTable, key: &FlowKey) {
        self.flows.borrow_mut().remove(&(table, *key));
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
pub fn frame(key: &FlowKey, tcp_flags: u8, payload: &[u8], partial: bool) -> ByteFrame {
    let mut l4 = Vec::new();
    l4.extend(key.sport.number().to_be_bytes());
    l4.extend(key.dport.number().to_be_bytes());
    let at = match key.proto {
        Proto::TCP => {
            l4.extend(1000_u32.to_be_bytes());
            l4.extend(2000_u32.to_be_bytes());
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
    let mut packet = Packet::at(Hook::INGRESS, 0);
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
pub fn tuple(frame: &ByteFrame, hook: Hook) -> Option<Packet> {
    let mut packet = Packet::at(hook, 0);
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
pub fn run(tables: &MemoryTables, frame: &ByteFrame, hook: Hook, ifindex: u32) -> Outcome {
    run_on::<true>(tables, frame, hook, ifindex)
}

/// The same; with `ETHERNET` false the frame begins at the IP header.
pub fn run_on<const ETHERNET: bool>(
    tables: &MemoryTables,
    frame: &ByteFrame,
    hook: Hook,
    ifindex: u32,
) -> Outcome {
    let mut packet = Packet::at(hook, ifindex);
    if parse::<_, ETHERNET>(frame, &mut packet).is_none() {
        return Outcome::Passed;
    }
    let mut edit = Edit::NONE;
    let verdict = if hook == Hook::INGRESS {
        ingress::ingress(tables, &mut packet, &mut edit)
    } else {
        egress::egress(tables, &mut packet, &mut edit)
    };
    match verdict {
        Verdict::Pass => Outcome::Passed,
        Verdict::Rewrite => {
            let mut out = frame.clone();
            if rewrite(&mut out, &packet, &edit) {
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

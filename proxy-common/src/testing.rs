//! Tables and packets in memory: what unit tests, fuzzing and the end-to-end tests share.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::vec::Vec;

use crate::abi::{
    Affinity, AffinityKey, Backend, Config, Flow, FlowKey, Fragment, FragmentKey, Frontend, FrontendKey,
    Iface, Reason, SourceKey,
};
use crate::addr::Addr;
use crate::lb::{FlowTable, Inserted, Stat, Tables};
use crate::wire::{Frame, Words, checksum, mend};

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

    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        self.fragments.borrow().get(key).copied()
    }

    fn set_fragment(&self, key: &FragmentKey, value: &Fragment) {
        self.fragments.borrow_mut().insert(*key, *value);
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
        let bytes = self.bytes.get(off..off + size_of::<T>())?;
        #[expect(unsafe_code, reason = "words of any alignment")]
        // SAFETY: `bytes` is as long as T, and every T is made of integers.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    fn store<T: Words>(&mut self, off: usize, value: T) -> bool {
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

//! [`Tables`] over the maps: the only reader of configuration, the only writer of flows.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::generated::{
    bpf_get_prandom_u32, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns, bpf_map_lookup_elem,
};
use proxy_common::abi::{
    Affinity, AffinityKey, Backend, Config, Flow, FlowKey, Fragment, FragmentKey, Frontend, FrontendKey,
    Iface, Reason, SourceKey, feature,
};
use proxy_common::addr::{Addr, Port};
use proxy_common::lb::{Choice, FlowTable, Inserted, Recalled, Stat, Tables, Verdict};
use proxy_common::wire::{Edit, Packet};

use crate::{cut, maps};

/// The maps of the kernel.
pub struct Kernel;

const EEXIST: i32 = -17;

/// Whether the kernel has a feature; folded by the verifier.
#[inline(always)]
pub fn has(bit: u32) -> bool {
    maps::FEATURES.load() & bit != 0
}

impl Tables for Kernel {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        // Rewritten in place: a packet may see a mixture of two settings, never a torn word.
        maps::CONFIG.get(0).filter(|config| config.is_written())
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        if has(feature::COARSE_CLOCK) {
            // SAFETY: takes no arguments.
            unsafe { bpf_ktime_get_coarse_ns() }
        } else {
            // SAFETY: takes no arguments.
            unsafe { bpf_ktime_get_ns() }
        }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: takes no arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn address(&self, addr: &Addr) -> u32 {
        // SAFETY: a word, replaced whole; a stale one is as good as a look a moment earlier.
        unsafe { maps::ADDRESSES.get(addr) }.copied().unwrap_or(0)
    }

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        // SAFETY: the memory may be given to another key while it is copied: the seal tells.
        unsafe { maps::FRONTENDS.get(key) }.copied()
    }

    #[inline(always)]
    fn slot(&self, slot: u32) -> Option<u32> {
        maps::SLOTS.get(slot).copied()
    }

    #[inline(always)]
    fn backend(&self, index: u32) -> Option<Backend> {
        maps::BACKENDS.get(index).copied()
    }

    #[inline(always)]
    fn source_allowed(&self, key: &SourceKey) -> bool {
        // SAFETY: the key is as large as the map's, and lives on the stack.
        !unsafe {
            bpf_map_lookup_elem((&raw const maps::SOURCES).cast_mut().cast(), (&raw const *key).cast())
        }
        .is_null()
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        // SAFETY: what is read is checked against the backend's generation before use.
        unsafe { maps::AFFINITY.get(key) }.copied()
    }

    #[inline(always)]
    fn set_affinity(&self, key: &AffinityKey, value: &Affinity) {
        // An LRU takes every key; a failure under memory pressure costs the client its affinity only.
        let _ = maps::AFFINITY.insert(key, value, BPF_ANY.into());
    }

    #[inline(always)]
    fn iface(&self, ifindex: u32) -> Option<Iface> {
        // SAFETY: replaced whole and rarely; a stale copy is as good as a look a moment earlier.
        unsafe { maps::IFACES.get(ifindex) }.copied()
    }

    #[inline(always)]
    fn with_flow<R>(&self, table: FlowTable, key: &FlowKey, f: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        let flow = match table {
            FlowTable::Established => maps::FLOWS.get_ptr_mut(key),
            FlowTable::HalfOpen => maps::HALF_OPEN.get_ptr_mut(key),
        }?;
        // SAFETY: the element stays mapped while the program runs. Packets of one flow on two CPUs may both
        // write `last_seen` and `seen`; a lost bit is set again by the next packet.
        Some(f(unsafe { &mut *flow }))
    }

    #[inline(always)]
    fn insert_flow(&self, table: FlowTable, key: &FlowKey, flow: &Flow, replace: bool) -> Inserted {
        let mode = if replace { BPF_ANY } else { BPF_NOEXIST }.into();
        let done = match table {
            FlowTable::Established => maps::FLOWS.insert(key, flow, mode),
            FlowTable::HalfOpen => maps::HALF_OPEN.insert(key, flow, mode),
        };
        match done {
            Ok(()) => Inserted::Done,
            Err(EEXIST) => Inserted::Exists,
            Err(_) => Inserted::Full,
        }
    }

    #[inline(always)]
    fn delete_flow(&self, table: FlowTable, key: &FlowKey) {
        // An absent key is what was wanted.
        let _ = match table {
            FlowTable::Established => maps::FLOWS.remove(key),
            FlowTable::HalfOpen => maps::HALF_OPEN.remove(key),
        };
    }

    #[inline(always)]
    fn with_fragment<R>(&self, key: &FragmentKey, f: impl FnOnce(&mut Fragment) -> R) -> Option<R> {
        let fragment = maps::FRAGMENTS.get_ptr_mut(key)?;
        // SAFETY: the element stays mapped while the program runs. Two fragments on two CPUs may count one wait
        // for both; the ports come with a new element.
        Some(f(unsafe { &mut *fragment }))
    }

    #[inline(always)]
    fn set_fragment(&self, key: &FragmentKey, value: &Fragment, replace: bool) {
        let mode = if replace { BPF_ANY } else { BPF_NOEXIST }.into();
        // A failure under memory pressure shows as `fragment_unknown` with a later fragment.
        let _ = maps::FRAGMENTS.insert(key, value, mode);
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        if let Some(count) = maps::REASONS.get_ptr_mut(reason as u32) {
            // SAFETY: this CPU's own counter.
            unsafe { *count += 1 };
        }
    }

    #[inline(always)]
    fn count_service(&self, service: u32, stat: Stat) {
        if let Some(stats) = maps::SERVICE_STATS.get_ptr_mut(service) {
            // SAFETY: this CPU's own counters.
            let stats = unsafe { &mut *stats };
            match stat {
                Stat::Chosen => stats.chosen += 1,
                Stat::Refused => stats.refused += 1,
                Stat::Dropped => stats.dropped += 1,
            }
        }
    }

    #[inline(always)]
    fn ingress_slow(&self, packet: &Packet, known: u32, edit: &mut Edit) -> Verdict {
        Verdict::from_number(cut::cut_slow((&raw const *packet).cast_mut(), known, edit))
    }

    #[inline(always)]
    fn past(&self, packet: &mut Packet, known: u32) -> Verdict {
        Verdict::from_number(cut::cut_past(packet, known))
    }

    #[inline(always)]
    fn choose(&self, packet: &Packet, known: u32, attempt: u32, choice: &mut Choice) -> Verdict {
        Verdict::from_number(cut::cut_choose((&raw const *packet).cast_mut(), known, attempt, choice))
    }

    #[inline(always)]
    fn write_flow(&self, key: &FlowKey, choice: &Choice, client_port: Port, edit: &mut Edit) -> Inserted {
        Inserted::from_number(cut::cut_write(
            (&raw const *key).cast_mut(),
            (&raw const *choice).cast_mut(),
            client_port.0.into(),
            edit,
        ))
    }

    #[inline(always)]
    fn revive(&self, key: &FlowKey) -> u32 {
        cut::cut_revive((&raw const *key).cast_mut())
    }

    #[inline(always)]
    fn promote(&self, key: &FlowKey) -> u32 {
        cut::cut_promote((&raw const *key).cast_mut())
    }

    #[inline(always)]
    fn forget(&self, key: &FlowKey) -> u32 {
        cut::cut_forget((&raw const *key).cast_mut())
    }

    #[inline(always)]
    fn superseded(&self, key: &mut FlowKey) -> u32 {
        cut::cut_superseded(key)
    }

    #[inline(always)]
    fn recall_fragment(&self, packet: &mut Packet) -> Recalled {
        Recalled::from_number(cut::cut_recall(packet))
    }

    #[inline(always)]
    fn remember_fragment(&self, packet: &Packet) -> u32 {
        cut::cut_remember((&raw const *packet).cast_mut())
    }

    #[inline(always)]
    fn choose_source(&self, key: &FlowKey, ifindex: u32, edit: &mut Edit) -> Verdict {
        Verdict::from_number(cut::cut_source((&raw const *key).cast_mut(), ifindex, edit))
    }
}

/// The cookie of the network namespace that a socket call is made in; 0 when the kernel does not tell it.
#[inline(always)]
pub fn netns_cookie(ctx: &aya_ebpf::programs::SockAddrContext) -> u64 {
    if has(feature::NETNS_COOKIE) {
        // SAFETY: the context is the one the program was called with.
        unsafe { aya_ebpf::helpers::generated::bpf_get_netns_cookie(ctx.as_ptr()) }
    } else {
        0
    }
}

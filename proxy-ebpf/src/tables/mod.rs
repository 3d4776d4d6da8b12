//! [`Tables`] over the maps: the only reader of configuration, the only writer of flows.

mod leg;
mod ring;
mod socket;

use core::arch::asm;

use aya_ebpf::bindings::{__sk_buff, BPF_ANY, BPF_NOEXIST};
use aya_ebpf::btf_maps::Array;
use aya_ebpf::helpers::generated::{
    bpf_get_prandom_u32, bpf_jiffies64, bpf_map_lookup_elem, bpf_map_pop_elem, bpf_map_push_elem,
};
use proxy_common::abi::{
    Affinity, AffinityKey, Backend, Config, Flow, FlowId, Fragment, FragmentKey, Frontend, FrontendKey,
    Iface, Key, Leg, Notes, Pair, Reason, Role, RouteKey, SourceKey, Tunnel, TunnelKey, Tuple, capacity,
    feature,
};
use proxy_common::addr::{Addr, Port};
use proxy_common::lb::{Inserted, Ring, Stat, Tables};
use proxy_common::wire::Packet;

use crate::feature::{clock, has};
use crate::maps;
use crate::scratch::{Scratch, scratch};

/// The maps of the kernel, and the context of the TC program at work, or none (also XDP). With `PACKET` the programs
/// have the working storage [`Scratch`]: the packet that the functions are given is always the one in there,
/// and so are edit and choice, and subprograms find them; keys are made up there, too.
pub struct MapTables<const PACKET: bool>(pub *mut __sk_buff);

/// What TC programs work with.
pub type TcTables = MapTables<true>;
/// What socket programs work with. They may be interrupted by their like, and keep everything on the stack.
pub type SocketTables = MapTables<false>;

impl<const PACKET: bool> MapTables<PACKET> {
    /// Without a packet.
    pub const NO_PACKET: Self = Self(core::ptr::null_mut());

    /// With the packet of a TC program.
    #[inline(always)]
    pub const fn new(ctx: *mut __sk_buff) -> Self {
        Self(ctx)
    }

    /// Adds to the record's claims and says how many there are a moment later; 0 past the end.
    #[inline(always)]
    fn add_claim(index: u32, change: i64) -> u64 {
        let Some(flow) = maps::RECORDS.get_ptr_mut(index) else { return 0 };
        // SAFETY: the element stays mapped, and the field is touched nowhere else. An atomic addition without
        // the old value, which kernels before 5.12 do not give.
        unsafe {
            let claims = &raw mut (*flow).claims;
            asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) claims, in(reg) change, options(nostack));
            claims.read_volatile()
        }
    }
}

impl<const PACKET: bool> Tables for MapTables<PACKET> {
    type Place = *mut Leg;

    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        // Rewritten in place: a packet may see a mixture of two settings, never a torn word.
        maps::CONFIG.get(0).filter(|config| config.is_written())
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        if !PACKET {
            return clock();
        }
        let Some(scratch) = scratch() else { return clock() };
        // The tick costs next to nothing, since it is read in place; the clock goes on with it.
        // SAFETY: takes no arguments.
        let tick = unsafe { bpf_jiffies64() };
        if scratch.tick != tick {
            scratch.now = clock();
            scratch.tick = tick;
        }
        scratch.now
    }

    #[inline(always)]
    fn window(&self) -> u32 {
        // SAFETY: takes no arguments.
        (unsafe { bpf_jiffies64() } >> maps::WINDOW_SHIFT.load()) as u32
    }

    #[inline(always)]
    fn paused_until(&self) -> u64 {
        maps::PAUSE.get(0).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: takes no arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn is_known(&self, addr: &Addr) -> bool {
        is_set(&maps::ADDRESS_BITS, addr)
    }

    #[inline(always)]
    fn address(&self, addr: &Addr) -> u32 {
        // Most packets are for addresses without an entry, and a bit is cheaper to look at than a hash table.
        if !self.is_known(addr) {
            return 0;
        }
        // SAFETY: a word, replaced whole; a stale one is as good as a look a moment earlier.
        unsafe { maps::ADDRESSES.get(addr) }.copied().unwrap_or(0)
    }

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        let key = keep::<PACKET, _>(key, |scratch| &mut scratch.frontend);
        // SAFETY: the memory may be given to another key while it is copied: the seal shows it.
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
        let key = keep::<PACKET, _>(key, |scratch| &mut scratch.source);
        // SAFETY: the key is as large as the map's, and lives on the stack or in the working storage.
        !unsafe {
            bpf_map_lookup_elem((&raw const maps::SOURCES).cast_mut().cast(), (&raw const *key).cast())
        }
        .is_null()
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        let key = keep::<PACKET, _>(key, |scratch| &mut scratch.client);
        // SAFETY: what is read is checked against the backend's generation before use.
        unsafe { maps::AFFINITY.get(key) }.copied()
    }

    #[inline(always)]
    fn set_affinity(&self, key: &AffinityKey, value: &Affinity) {
        let key = keep::<PACKET, _>(key, |scratch| &mut scratch.client);
        // An LRU takes every key; a failure under memory pressure costs the client its affinity only.
        let _ = maps::AFFINITY.insert(key, value, BPF_ANY.into());
    }

    #[inline(always)]
    fn iface(&self, ifindex: u32) -> Option<Iface> {
        // SAFETY: replaced whole and rarely; a stale copy is as good as a look a moment earlier.
        unsafe { maps::IFACES.get(ifindex) }.copied()
    }

    #[inline(always)]
    fn masquerade_address(&self, ifindex: u32, dst: &Addr) -> Option<Addr> {
        let key = &mut scratch()?.route;
        *key = RouteKey::exact(ifindex, *dst);
        // SAFETY: the key is as large as the map's, and lives in the working storage.
        let found = unsafe {
            bpf_map_lookup_elem((&raw const maps::MASQUERADE).cast_mut().cast(), (&raw const *key).cast())
        };
        // SAFETY: a value of this map; an entry that is replaced keeps its bytes until this program has ended.
        let addr = unsafe { found.cast::<Addr>().as_ref() }?;
        // The default route of IPv6 covers IPv4-mapped addresses, too.
        (addr.is_v4() == dst.is_v4()).then_some(*addr)
    }

    #[inline(always)]
    fn wraps(&self) -> bool {
        has(feature::WRAP)
    }

    #[inline(always)]
    fn tunnel(&self, key: &TunnelKey) -> Option<Tunnel> {
        // SAFETY: replaced whole, and rarely; of a copy that is torn at that moment one packet may go astray.
        unsafe { maps::TUNNELS.get(key) }.copied()
    }

    #[inline(always)]
    fn is_service_port(&self, port: Port) -> bool {
        let number = u32::from(port.number());
        maps::SERVICE_PORTS.get(number / 64).is_some_and(|word| word >> (number % 64) & 1 != 0)
    }

    #[inline(always)]
    fn is_socket(&self, tuple: &Tuple) -> bool {
        socket::is_there(self.0, tuple)
    }

    #[inline(always)]
    fn is_of_others(&self, tuple: &Tuple) -> bool {
        // Without a packet that is not to be known.
        !self.0.is_null() && socket::is_of_others(self.0, tuple)
    }

    #[inline(always)]
    fn is_endpoint(&self, addr: &Addr) -> bool {
        is_set(&maps::ENDPOINT_BITS, addr)
    }

    #[inline(always)]
    fn is_taken(&self, tuple: &Tuple) -> bool {
        // SAFETY: only its being there counts.
        unsafe { maps::TAKEN.get(tuple) }.is_some()
    }

    #[inline(always)]
    fn may_search_on(&self) -> bool {
        scratch().is_some_and(|scratch| scratch.allowance.take(self.now()))
    }

    #[inline(always)]
    fn leg(&self, pair: &Pair) -> Option<Leg> {
        leg::at(&pair.key(leg::secret)).map(|(found, _)| found)
    }

    #[inline(always)]
    fn key_of(&self, packet: &Packet) -> (Key, usize) {
        packet.tuple.key(packet.v4, leg::secret)
    }

    #[inline(always)]
    fn may_have_leg(&self, key: &Key) -> bool {
        leg::may_be_at(key)
    }

    #[inline(always)]
    fn leg_at(&self, key: &Key) -> Option<(Leg, *mut Leg)> {
        leg::at(key)
    }

    #[inline(always)]
    fn note(&self, place: *mut Leg, id: FlowId, notes: Notes) {
        // SAFETY: a value of FLOWS, which stays memory of that map. If it becomes another pair's between look
        // and write, that one's record is not asked for the rest of a window, and a FIN of its may not be
        // believed; if it becomes one of IPv6, its seal does not fit any more: its flow loses a leg, as if it
        // had been deleted.
        unsafe {
            if (&raw const (*place).id).read_volatile() == id {
                (&raw mut (*place).upper).write_volatile(notes.word());
            }
        }
    }

    #[inline(always)]
    fn is_broken(&self, pair: &Pair) -> bool {
        let key = pair.key(leg::secret);
        // SAFETY: as in `leg::at`.
        unsafe { maps::FLOWS.get(&key) }.copied().is_some_and(|leg| !leg.is_of(&key))
    }

    #[inline(always)]
    fn insert_leg(&self, flow: &Flow, role: Role) -> Inserted {
        let key = flow.pairs[role.index()].key(leg::secret);
        if PACKET {
            let Some(scratch) = scratch() else { return Inserted::Full };
            leg::insert(&key, flow, role, &mut scratch.leg)
        } else {
            leg::insert(&key, flow, role, &mut Leg { ..Leg::NONE })
        }
    }

    #[inline(always)]
    fn delete_leg(&self, pair: &Pair) {
        leg::delete(&pair.key(leg::secret));
    }

    #[inline(always)]
    fn record<R>(&self, index: u32, f: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        let flow = maps::RECORDS.get_ptr_mut(index)?;
        // SAFETY: the element stays mapped while the program runs. Who writes which field is said there;
        // `claims` is never touched this way.
        Some(f(unsafe { &mut *flow }))
    }

    #[inline(always)]
    fn claim(&self, index: u32) -> bool {
        // Of several that add, at most the first can read that it is alone.
        if Self::add_claim(index, 1) == 1 {
            return true;
        }
        Self::add_claim(index, -1);
        false
    }

    #[inline(always)]
    fn unclaim(&self, index: u32) {
        Self::add_claim(index, -1);
    }

    #[inline(always)]
    fn take_record(&self) -> Option<u32> {
        let mut index = 0_u32;
        // SAFETY: the value is as large as the map's.
        let failed =
            unsafe { bpf_map_pop_elem((&raw const maps::FREE).cast_mut().cast(), (&raw mut index).cast()) };
        (failed == 0).then_some(index)
    }

    #[inline(always)]
    fn give_record(&self, index: u32) -> bool {
        // SAFETY: as above.
        let failed = unsafe {
            bpf_map_push_elem((&raw const maps::FREE).cast_mut().cast(), (&raw const index).cast(), 0)
        };
        failed == 0
    }

    #[inline(always)]
    fn put_in_ring(&self, ring: Ring, id: FlowId) -> FlowId {
        ring::put(ring, id)
    }

    #[inline(always)]
    fn next_in_ring(&self, ring: Ring) -> FlowId {
        ring::next(ring)
    }

    #[inline(always)]
    fn any_in_rings(&self) -> FlowId {
        ring::any(self.random())
    }

    #[inline(always)]
    fn with_fragment<R>(&self, key: &FragmentKey, f: impl FnOnce(&mut Fragment) -> R) -> Option<R> {
        let key = keep::<PACKET, _>(key, |scratch| &mut scratch.fragment);
        let fragment = maps::FRAGMENTS.get_ptr_mut(key)?;
        // SAFETY: the element stays mapped while the program runs. Two fragments on two CPUs may count one wait
        // for both; the ports come with a new element.
        Some(f(unsafe { &mut *fragment }))
    }

    #[inline(always)]
    fn set_fragment(&self, key: &FragmentKey, value: &Fragment, replace: bool) {
        let mode = if replace { BPF_ANY } else { BPF_NOEXIST }.into();
        let key = keep::<PACKET, _>(key, |scratch| &mut scratch.fragment);
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
        let Some(stats) = maps::SERVICE_STATS.get_ptr_mut(service) else { return };
        // SAFETY: places in an element of the map, which is there.
        let counter = unsafe {
            match stat {
                Stat::Chosen => &raw mut (*stats).chosen,
                Stat::Rejected => &raw mut (*stats).refused,
                Stat::Dropped => &raw mut (*stats).dropped,
            }
        };
        // SAFETY: all CPUs count here, each in one instruction.
        unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) 1_u64, options(nostack)) };
    }
}

/// The key, in its place in the working storage if there is one.
#[inline(always)]
fn keep<'a, const PACKET: bool, K: Copy + 'static>(
    key: &'a K,
    place: impl FnOnce(&'static mut Scratch) -> &'static mut K,
) -> &'a K {
    if PACKET && let Some(scratch) = scratch() {
        let place = place(scratch);
        *place = *key;
        return place;
    }
    key
}

/// Whether the bit of an address is set.
#[inline(always)]
fn is_set(bits: &Array<u64, { capacity::ADDRESS_BITS }>, addr: &Addr) -> bool {
    let place = addr.place();
    bits.get(place / 64).is_some_and(|word| word >> (place % 64) & 1 != 0)
}

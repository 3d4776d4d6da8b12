//! RING: places for young flows, and for those of which one side alone is seen.

use core::arch::asm;

use aya_ebpf::helpers::generated::bpf_get_smp_processor_id;
use proxy_common::abi::FlowId;
use proxy_common::lb::Ring;

use crate::maps;
use crate::scratch::scratch;

/// Puts a flow, or none, into the next place of this CPU's ring; the one that stood there.
#[inline(always)]
pub(super) fn put(ring: Ring, id: FlowId) -> FlowId {
    let Some((next, at, turn)) = whose_turn(ring) else { return FlowId::NONE };
    *next = if at + 1 < turn { at + 1 } else { 0 };
    let Some(stands) = maps::RING.get_ptr_mut(first(ring) + at) else { return FlowId::NONE };
    // SAFETY: the element stays mapped; only this CPU writes it, and a flow's id is checked before it is used.
    unsafe { core::mem::replace(&mut *stands, id) }
}

/// Who stands there.
#[inline(always)]
pub(super) fn next(ring: Ring) -> FlowId {
    let Some((_, at, _)) = whose_turn(ring) else { return FlowId::NONE };
    maps::RING.get(first(ring) + at).copied().unwrap_or(FlowId::NONE)
}

/// The flow at some place of some ring.
#[inline(always)]
pub(super) fn any(random: u32) -> FlowId {
    let all = maps::PLACES.load() * Ring::COUNT * maps::CPUS.load();
    let at = (u64::from(random) * u64::from(all)) >> 32;
    maps::RING.get(at as u32).copied().unwrap_or(FlowId::NONE)
}

/// Where the number of the next place of this CPU's ring is kept, that place, and how many there are.
#[inline(always)]
fn whose_turn(ring: Ring) -> Option<(&'static mut u32, u32, u32)> {
    const _: () = assert!(Ring::COUNT == 4);
    let mut index = ring.0 as usize;
    // SAFETY: changes no ring's number. The verifier loses the bound of a number that is kept on the stack: here it sees
    // one at the register that is used.
    unsafe { asm!("{0} &= 3", inout(reg) index, options(pure, nomem, nostack)) };
    let next = scratch()?.places.get_mut(index)?;
    let turn = if ring.0 == Ring::DIRECT.0 { maps::DIRECT_PLACES.load() } else { maps::PLACES.load() };
    let at = if *next < turn { *next } else { 0 };
    Some((next, at, turn))
}

/// The first place of this CPU's ring.
#[inline(always)]
fn first(ring: Ring) -> u32 {
    // SAFETY: takes no arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    (cpu * Ring::COUNT + ring.0) * maps::PLACES.load()
}

//! Legs in FLOWS.

use core::arch::asm;

use aya_ebpf::bindings::BPF_NOEXIST;
use proxy_common::abi::{Flow, Key, Leg, Role, Secret};
use proxy_common::lb::Inserted;

use crate::maps;

const EEXIST: i32 = -17;

/// Inserts a leg that is made up in its place.
#[inline(always)]
pub(super) fn insert(key: &Key, flow: &Flow, role: Role, leg: &mut Leg) -> Inserted {
    flow.write_leg(role, leg);
    leg.seal(key);
    // Counted before it is there, and given up after it is gone: what is counted is never less than what is there.
    count(key, 1);
    match maps::FLOWS.insert(key, &*leg, BPF_NOEXIST.into()) {
        Ok(()) => Inserted::Done,
        Err(error) => {
            count(key, -1);
            if error == EEXIST { Inserted::Exists } else { Inserted::Full }
        }
    }
}

/// Deletes a leg if it is there.
#[inline(always)]
pub(super) fn delete(key: &Key) {
    // An absent key is what was wanted; one that stays behind counts no more after its window, and its place is taken
    // when needed.
    if maps::FLOWS.remove(key).is_ok() {
        count(key, -1);
    }
}

/// Counts legs at the place of a key: one more or, with -1, one less.
#[inline(always)]
fn count(key: &Key, by: i64) {
    // Both are always there.
    let Some(place) = secret().map(|secret| key.place(secret)) else { return };
    let Some(word) = maps::FLOW_FILTER.get_ptr_mut(place.word) else { return };
    // SAFETY: the element stays mapped, and is only ever added to.
    unsafe {
        asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) word, in(reg) by * place.one(), options(nostack));
    }
}

/// Whether a leg may stand at a key.
#[inline(always)]
pub(super) fn may_be_at(key: &Key) -> bool {
    let Some(place) = secret().map(|secret| key.place(secret)) else { return true };
    // SAFETY: the element stays mapped; volatile, since others add to it.
    maps::FLOW_FILTER.get_ptr(place.word).is_none_or(|word| place.is_taken(unsafe { word.read_volatile() }))
}

/// What keys are made with.
#[inline(always)]
pub(super) fn secret() -> Option<&'static Secret> {
    maps::SECRET.get(0)
}

#[inline(always)]
pub(super) fn at(key: &Key) -> Option<(Leg, *mut Leg)> {
    let place = maps::FLOWS.get_ptr_mut(key)?;
    // SAFETY: the memory may be given to another key while it is copied: the seal shows it.
    let leg = unsafe { place.read() };
    leg.is_of(key).then_some((leg, place))
}

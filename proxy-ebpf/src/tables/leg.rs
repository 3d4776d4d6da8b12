//! Legs in FLOWS.

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
    match maps::FLOWS.insert(key, &*leg, BPF_NOEXIST.into()) {
        Ok(()) => Inserted::Done,
        Err(EEXIST) => Inserted::Exists,
        Err(_) => Inserted::Full,
    }
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

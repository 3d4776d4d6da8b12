//! The cut points of `proxy_common::lb::Tables` as global functions: the verifier checks each once, whatever
//! its callers know, and the callers see only its arguments' types.

use proxy_common::abi::FlowKey;
use proxy_common::addr::Port;
use proxy_common::lb::{self, Choice, Inserted, Verdict, ingress, masquerade, open, track};
use proxy_common::wire::{Edit, Packet, crc32c};

use crate::tables::Kernel;

/// Turns the pointers of a global function into references, or returns `$else`: the verifier demands the
/// check, since such a function could be called with anything.
macro_rules! references {
    ($else:expr; $($pointer:ident),+) => {
        // SAFETY: the caller passes a reference to a live value; the verifier knows its size from its type.
        $(let Some($pointer) = (unsafe { $pointer.as_mut() }) else { return $else };)+
    };
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_slow(packet: *mut Packet, known: u32, edit: *mut Edit) -> u32 {
    references!(Verdict::Drop as u32; packet, edit);
    ingress::slow(&Kernel, packet, known, edit) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_past(packet: *mut Packet, known: u32) -> u32 {
    references!(Verdict::Drop as u32; packet);
    ingress::past(&Kernel, packet, known) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_choose(packet: *mut Packet, known: u32, attempt: u32, choice: *mut Choice) -> u32 {
    references!(Verdict::Drop as u32; packet, choice);
    open::choose(&Kernel, packet, known, attempt, choice) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_write(
    key: *mut FlowKey,
    choice: *mut Choice,
    client_port: u32,
    edit: *mut Edit,
) -> u32 {
    references!(Inserted::Full as u32; key, choice, edit);
    open::write_flow(&Kernel, key, choice, Port(client_port as u16), edit) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_revive(key: *mut FlowKey) -> u32 {
    references!(0; key);
    open::revive(&Kernel, key)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_promote(key: *mut FlowKey) -> u32 {
    references!(0; key);
    track::promote(&Kernel, key)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_forget(key: *mut FlowKey) -> u32 {
    references!(0; key);
    track::forget(&Kernel, key)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_superseded(key: *mut FlowKey) -> u32 {
    references!(0; key);
    track::superseded(&Kernel, key)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_recall(packet: *mut Packet) -> u32 {
    references!(0; packet);
    lb::recall_fragment(&Kernel, packet) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_remember(packet: *mut Packet) -> u32 {
    references!(0; packet);
    lb::remember_fragment(&Kernel, packet)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_source(key: *mut FlowKey, ifindex: u32, edit: *mut Edit) -> u32 {
    references!(Verdict::Drop as u32; key, edit);
    masquerade::choose_source(&Kernel, key, ifindex, edit) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_crc(diff: u32, following: u32) -> u32 {
    crc32c::difference(diff, following)
}

//! Packet hooks on interfaces.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, TC_ACT_REDIRECT};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_redirect_neigh};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use proxy_common::abi::{Hook, Reason, feature};
use proxy_common::lb::quick::{Quick, quick};
use proxy_common::lb::{Tables as _, Verdict, direct, egress, ingress};
use proxy_common::wire::{Edit, End, Kind, Packet, parse, peek, reject, rewrite};

use super::direct::{FAILED, OTHER, OURS, TOO_BIG, subprog_unwrap, subprog_wrap};
use crate::feature::has;
use crate::scratch::{Scratch, scratch};
use crate::skb::Skb;
use crate::subprog::{subprog_parse, subprog_rewrite_error};
use crate::tables::TcTables;

/// Go on with the next program, or the stack: TCX_NEXT, which clsact calls TC_ACT_UNSPEC.
const NEXT: i32 = -1;
/// Drop: TCX_DROP, TC_ACT_SHOT.
pub const DROP: i32 = 2;
/// Nothing has been decided yet; no program returns this.
const ASK: i32 = 0xa5c;
/// The packet is to go to the endpoint's node, in one of its own; likewise.
const WRAP: i32 = 0x3a9;
/// What `tc_index` says of a packet whose source has been rewritten: other interfaces that it leaves through
/// on its way (a bridge's port, a VLAN's parent) ignore it. Every ingress hook clears it.
const LEFT: u16 = 0xeb9f;

#[classifier]
pub fn tc_ingress(ctx: TcContext) -> i32 {
    enter::<true>(&ctx)
}

#[classifier]
pub fn tc_egress(ctx: TcContext) -> i32 {
    leave::<true>(&ctx)
}

#[classifier]
pub fn tc_ingress_l3(ctx: TcContext) -> i32 {
    enter::<false>(&ctx)
}

#[classifier]
pub fn tc_egress_l3(ctx: TcContext) -> i32 {
    leave::<false>(&ctx)
}

// A program is two functions and more, called one after the other: what most packets need is small, and lies in one piece; the
// frames of both do not add up.

#[inline(always)]
fn enter<const ETHERNET: bool>(ctx: &TcContext) -> i32 {
    let ctx = ctx.as_ptr().cast();
    let done = enter_quickly::<ETHERNET>(Skb(ctx));
    if done != ASK {
        return done;
    }
    let done = enter_reading::<ETHERNET>(Skb(ctx));
    if done != ASK {
        return done;
    }
    let done = enter_asking::<ETHERNET>(Skb(ctx));
    if done == WRAP { wrapping::<ETHERNET>(ctx) } else { done }
}

/// To the endpoint's node, in a packet of its own.
#[inline(never)]
fn wrapping<const ETHERNET: bool>(ctx: *mut __sk_buff) -> i32 {
    let done = subprog_wrap(ctx);
    if done != TOO_BIG {
        return done;
    }
    let Some(Scratch { edit, .. }) = scratch() else { return DROP };
    subprog_reject(ctx, ETHERNET.into(), edit.out)
}

#[inline(always)]
fn leave<const ETHERNET: bool>(ctx: &TcContext) -> i32 {
    let ctx = ctx.as_ptr().cast();
    let done = leave_quickly::<ETHERNET>(Skb(ctx));
    if done == ASK { leave_asking::<ETHERNET>(Skb(ctx)) } else { done }
}

#[inline(never)]
fn enter_quickly<const ETHERNET: bool>(mut skb: Skb) -> i32 {
    skb.set_mark(0);
    if ETHERNET && !skb.is_addressed_here() {
        return ASK;
    }
    quickly::<ETHERNET>(&mut skb, Hook::INGRESS, End::Dst)
}

#[inline(never)]
fn leave_quickly<const ETHERNET: bool>(mut skb: Skb) -> i32 {
    if skb.mark() == LEFT {
        return NEXT;
    }
    quickly::<ETHERNET>(&mut skb, Hook::EGRESS, End::Src)
}

#[inline(always)]
fn quickly<const ETHERNET: bool>(skb: &mut Skb, hook: Hook, end: End) -> i32 {
    let Some(packet) = peek::<_, ETHERNET>(skb) else { return ASK };
    let mut edit = Edit::NONE;
    match quick(&TcTables::new(skb.0), hook, &packet, &mut edit) {
        Quick::Pass => NEXT,
        Quick::Rewrite => {
            let done = finish(rewrite(skb, &packet, end, &edit));
            if hook == Hook::EGRESS {
                skb.set_mark(LEFT);
            }
            done
        }
        Quick::Ask => ASK,
    }
}

/// Reads a packet that is to be asked about, and unwraps it if another node had wrapped it. A function of its own: what
/// ways lead to the end of it does not multiply the work of verifiers with those of the next.
#[inline(never)]
fn enter_reading<const ETHERNET: bool>(skb: Skb) -> i32 {
    // What the stack would not take is not ours either: frames for other machines, which a bridge may
    // forward, and those of a VLAN, which come again at its own interface.
    if ETHERNET && !skb.is_for_this_host() {
        return NEXT;
    }
    let Some(Scratch { packet, .. }) = scratch() else { return NEXT };
    if !read::<ETHERNET>(&skb, packet) {
        return NEXT;
    }
    if !has(feature::WRAP) || !direct::may_wrap(packet) {
        return ASK;
    }
    match subprog_unwrap(skb.0) {
        OTHER | OURS => ASK,
        FAILED => DROP,
        // For the agent.
        _ => NEXT,
    }
}

#[inline(never)]
fn enter_asking<const ETHERNET: bool>(mut skb: Skb) -> i32 {
    let Some(Scratch { packet, edit, .. }) = scratch() else { return NEXT };
    match ingress::ingress(&TcTables::new(skb.0), packet, edit) {
        Verdict::Pass => NEXT,
        Verdict::Rewrite => apply(&mut skb, packet, End::Dst, edit),
        Verdict::Reject => subprog_reject(skb.0, ETHERNET.into(), 0),
        Verdict::Wrap if has(feature::WRAP) => WRAP,
        Verdict::Wrap => DROP,
        Verdict::Wait => skb.wait(),
        Verdict::Drop => DROP,
    }
}

#[inline(never)]
fn leave_asking<const ETHERNET: bool>(mut skb: Skb) -> i32 {
    let Some(Scratch { packet, edit, .. }) = scratch() else { return NEXT };
    if !read::<ETHERNET>(&skb, packet) {
        return NEXT;
    }
    match egress::egress(&TcTables::new(skb.0), packet, edit) {
        Verdict::Pass => NEXT,
        Verdict::Rewrite => {
            let done = apply(&mut skb, packet, End::Src, edit);
            skb.set_mark(LEFT);
            if edit.out != 0 && done == NEXT { send_back(edit.out) } else { done }
        }
        // Nothing is rejected behind the stack, nothing waits there, and nothing is wrapped.
        Verdict::Reject | Verdict::Wait | Verdict::Wrap | Verdict::Drop => DROP,
    }
}

/// Reads the packet's headers; false for what is not ours to read.
#[inline(always)]
fn read<const ETHERNET: bool>(skb: &Skb, packet: &mut Packet) -> bool {
    skb.pull();
    packet.begin(skb.ifindex());
    parse::<_, ETHERNET>(skb, packet).is_some()
        || skb.has_more() && subprog_parse(skb.0, ETHERNET.into()) != 0
}

/// In place, not a function of its own: a call and reading everything back costs an established flow 15 ns.
#[inline(always)]
fn apply(skb: &mut Skb, packet: &Packet, end: End, edit: &Edit) -> i32 {
    finish(if !matches!(packet.kind, Kind::IcmpError) {
        rewrite(skb, packet, end, edit)
    } else {
        subprog_rewrite_error(skb.0, matches!(end, End::Dst).into()) != 0
    })
}

#[inline(always)]
fn finish(done: bool) -> i32 {
    if done {
        NEXT
    } else {
        TcTables::NO_PACKET.count(Reason::RewriteFailed);
        DROP
    }
}

/// Out of another interface, to the neighbour that its routes name.
#[inline(always)]
fn send_back(ifindex: u32) -> i32 {
    // SAFETY: takes numbers, and no parameters of the neighbour.
    let done = unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 };
    if done == TC_ACT_REDIRECT as i32 { done } else { NEXT }
}

/// Sends a reject reply out of the interface the packet came in by; or, with `room` other than 0, that the packet is too
/// long, and may have so many bytes. A global function, since few packets come
/// here.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_reject(ctx: *mut __sk_buff, ethernet: u32, room: u32) -> i32 {
    let mut skb = Skb(ctx);
    let Some(scratch) = scratch() else { return DROP };
    let (packet, reply) = (&scratch.packet, &mut scratch.reply);
    debug!(
        TcContext::new(ctx),
        "rejected: protocol {} port {} on interface {}",
        packet.tuple.proto.0,
        packet.tuple.dport.number(),
        skb.ifindex()
    );
    reply.len = 0;
    let built = if room == 0 {
        reject::build(&skb, packet, reply)
    } else {
        reject::build_too_big(&skb, packet, room, reply)
    };
    if !built {
        return DROP;
    }
    let replied = if ethernet != 0 {
        skb.become_reject_reply::<true>(reply)
    } else {
        skb.become_reject_reply::<false>(reply)
    };
    if !replied {
        TcTables::NO_PACKET.count(Reason::RejectFailed);
        return DROP;
    }
    // SAFETY: takes numbers. The reply leaves by the same interface, straight to who asked.
    unsafe { bpf_redirect(skb.ifindex(), 0) as i32 }
}

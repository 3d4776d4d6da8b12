//! Packet hooks on interfaces.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use proxy_common::abi::{Hook, Reason};
use proxy_common::lb::{Tables as _, Verdict, egress, ingress};
use proxy_common::wire::answer::{self, Answer};
use proxy_common::wire::{Edit, Kind, Packet, parse, rewrite};

use crate::skb::Skb;
use crate::tables::Kernel;

/// Go on with the next program, or the stack: TCX_NEXT, which clsact calls TC_ACT_UNSPEC.
const NEXT: i32 = -1;
/// Drop: TCX_DROP, TC_ACT_SHOT.
const DROP: i32 = 2;

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

#[inline(always)]
fn enter<const ETHERNET: bool>(ctx: &TcContext) -> i32 {
    let mut skb = Skb(ctx.as_ptr().cast());
    skb.pull();
    let mut packet = Packet::at(Hook::INGRESS, skb.ifindex());
    if parse::<_, ETHERNET>(&skb, &mut packet).is_none() {
        return NEXT;
    }
    let mut edit = Edit::NONE;
    match ingress::ingress(&Kernel, &mut packet, &mut edit) {
        Verdict::Pass => NEXT,
        Verdict::Rewrite => apply(&mut skb, &packet, &edit),
        Verdict::Refuse => refuse::<ETHERNET>(&skb, &packet),
        Verdict::Wait => skb.wait(),
        Verdict::Drop => DROP,
    }
}

#[inline(always)]
fn leave<const ETHERNET: bool>(ctx: &TcContext) -> i32 {
    let mut skb = Skb(ctx.as_ptr().cast());
    skb.pull();
    let mut packet = Packet::at(Hook::EGRESS, skb.ifindex());
    if parse::<_, ETHERNET>(&skb, &mut packet).is_none() {
        return NEXT;
    }
    let mut edit = Edit::NONE;
    match egress::egress(&Kernel, &mut packet, &mut edit) {
        Verdict::Pass => NEXT,
        Verdict::Rewrite => apply(&mut skb, &packet, &edit),
        // Nothing is refused behind the stack, and nothing waits there.
        Verdict::Refuse | Verdict::Wait | Verdict::Drop => DROP,
    }
}

/// In place, not a function of its own: a call and reading everything back costs an established flow 15 ns.
#[inline(always)]
fn apply(skb: &mut Skb, packet: &Packet, edit: &Edit) -> i32 {
    if matches!(packet.kind, Kind::IcmpError) {
        skb.pull_more();
    }
    if rewrite(skb, packet, edit) {
        NEXT
    } else {
        Kernel.count(Reason::RewriteFailed);
        DROP
    }
}

/// Answers the packet with a refusal, out of the interface it came in by.
#[inline(always)]
fn refuse<const ETHERNET: bool>(skb: &Skb, packet: &Packet) -> i32 {
    cut_refuse(skb.0, (&raw const *packet).cast_mut(), ETHERNET.into())
}

/// A global function: the answer's bytes need a stack frame of their own.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn cut_refuse(ctx: *mut __sk_buff, packet: *mut Packet, ethernet: u32) -> i32 {
    let mut skb = Skb(ctx);
    // SAFETY: the callers pass a reference.
    let Some(packet) = (unsafe { packet.as_ref() }) else { return DROP };
    debug!(
        TcContext::new(ctx),
        "refused: protocol {} port {} on interface {}",
        packet.key.proto.0,
        packet.key.dport.number(),
        skb.ifindex()
    );
    let mut answer = Answer { words: [0; 24], len: 0 };
    if !answer::build(&skb, packet, &mut answer) {
        return DROP;
    }
    let answered =
        if ethernet != 0 { skb.become_answer::<true>(&answer) } else { skb.become_answer::<false>(&answer) };
    if !answered {
        Kernel.count(Reason::AnswerFailed);
        return DROP;
    }
    // SAFETY: takes numbers. The answer leaves by the same interface, straight to who asked.
    unsafe { bpf_redirect(skb.ifindex(), 0) as i32 }
}

//! The hook at the driver of interfaces to the outside: packets that only pass the node are sent on from here. Whatever
//! is in doubt goes on to the stack as it came, where TC does the same for it.

use aya_ebpf::bindings::{bpf_fib_lookup as Route, xdp_md};
use aya_ebpf::helpers::generated::{bpf_fib_lookup, bpf_redirect};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use proxy_common::abi::device::SENDS;
use proxy_common::abi::{Device, Reason};
use proxy_common::lb::Tables as _;
use proxy_common::lb::through::{self, Passage};
use proxy_common::wire::{End, Frame as _, lower_hops, peek, peek_v6, rewrite};

use crate::maps;
use crate::scratch::{Scratch, scratch};
use crate::tables::TcTables;
use crate::xdp::Xdp;

/// Into the trash.
const DROP: u32 = 1;
/// On to the stack.
const PASS: u32 = 2;
/// Out of the interface that it has come in by.
const TX: u32 = 3;

/// `AF_INET`.
const AF_INET: u8 = 2;
/// `AF_INET6`.
const AF_INET6: u8 = 10;
/// `BPF_FIB_LKUP_RET_SUCCESS`.
const FOUND: i64 = 0;

#[xdp]
pub fn xdp_ingress(ctx: XdpContext) -> u32 {
    pass_through(ctx.ctx)
}

/// The same where packets may lie in several pieces (Linux 5.18): with large frames drivers take no other.
#[xdp(frags)]
pub fn xdp_ingress_sg(ctx: XdpContext) -> u32 {
    pass_through(ctx.ctx)
}

// Three functions, called one after the other: their frames do not add up.

#[inline(always)]
fn pass_through(ctx: *mut xdp_md) -> u32 {
    let passage = enter(ctx);
    if passage == Passage::NONE || !route(ctx) {
        return PASS;
    }
    leave(ctx, passage)
}

/// Reads the packet and finds out where it is to go; [`Passage::NONE`] if it is not to be sent on here.
#[inline(never)]
fn enter(ctx: *mut xdp_md) -> u64 {
    let frame = Xdp(ctx);
    let ifindex = frame.ifindex();
    let Some(device) = device_of(ifindex) else { return Passage::NONE };
    // A driver shows what is for others as well where the interface is to hear everything.
    let Some(ethernet) = frame.load_at::<[u32; 2], 0>() else { return Passage::NONE };
    let mac = device.mac_words();
    if ethernet[0] != mac[0] || (ethernet[1] ^ mac[1]) & FIRST_HALF != 0 {
        return Passage::NONE;
    }
    let Some(scratch) = scratch() else { return Passage::NONE };
    let Some(read) = peek::<_, true>(&frame).or_else(|| peek_v6::<_, true>(&frame)) else {
        return Passage::NONE;
    };
    let packet = &mut scratch.packet;
    *packet = read;
    packet.ifindex = ifindex;
    let Some(passage) = through::enter(&TcTables::NO_PACKET, packet, &mut scratch.enters) else {
        return Passage::NONE;
    };
    scratch.arrived = *packet;
    packet.apply(End::Dst, &scratch.enters);
    passage.number()
}

/// Sends the packet on.
#[inline(never)]
fn leave(ctx: *mut xdp_md, passage: u64) -> u32 {
    let mut frame = Xdp(ctx);
    let Some(scratch) = scratch() else { return PASS };
    let Scratch { packet, arrived, enters, edit, .. } = scratch;
    let tables = TcTables::NO_PACKET;
    if !through::leave(&tables, packet, Passage::from_number(passage), edit)
        || !lower_hops(&mut frame, packet)
    {
        return PASS;
    }
    // It is changed from here on.
    if !rewrite(&mut frame, arrived, End::Dst, enters)
        || !rewrite(&mut frame, packet, End::Src, edit)
        || !frame.store(0, scratch.ethernet)
    {
        tables.count(Reason::RewriteFailed);
        return DROP;
    }
    tables.count(Reason::PassedThrough);
    // SAFETY: takes numbers.
    if packet.ifindex == arrived.ifindex { TX } else { unsafe { bpf_redirect(packet.ifindex, 0) as u32 } }
}

/// The first two bytes of a word in memory.
const FIRST_HALF: u32 = u32::from_ne_bytes([0xff, 0xff, 0, 0]);

/// What is known of an interface that has a program at its driver.
#[inline(always)]
fn device_of(ifindex: u32) -> Option<Device> {
    // SAFETY: replaced whole and rarely; a stale copy is as good as a look a moment earlier.
    unsafe { maps::DEVICES.get(ifindex) }.copied()
}

/// Finds out where the stack would send the packet, and to which neighbour. False where that is not to be said at once: it
/// is for this node, too long for where it goes, not to be routed, or the neighbour is not known yet.
#[inline(never)]
fn route(ctx: *mut xdp_md) -> bool {
    let frame = Xdp(ctx);
    let Some(Scratch { packet, ethernet, .. }) = scratch() else { return false };
    // IPv4: version, type of service, length. IPv6: version, class and label; the length follows.
    let (Some(head), Some(payload)) = (frame.load_at::<u32, 14>(), frame.load_at::<u16, 18>()) else {
        return false;
    };
    let v4 = packet.v4;
    let [_, tos, length @ ..] = head.to_ne_bytes();
    let total = if v4 { u16::from_be_bytes(length) } else { u16::from_be(payload).saturating_add(40) };
    // A packet in several pieces is the stack's: not every interface can send such.
    if 14 + usize::from(total) > frame.len() {
        return false;
    }
    // SAFETY: made of integers alone.
    let mut asked: Route = unsafe { core::mem::zeroed() };
    asked.family = if v4 { AF_INET } else { AF_INET6 };
    asked.l4_protocol = packet.tuple.proto.0;
    (asked.sport, asked.dport) = (packet.tuple.sport.0, packet.tuple.dport.0);
    asked.ifindex = packet.ifindex;
    asked.__bindgen_anon_1.tot_len = total;
    let (src, dst) = (&packet.tuple.src, &packet.tuple.dst);
    if v4 {
        asked.__bindgen_anon_2.tos = tos;
        asked.__bindgen_anon_3.ipv4_src = src.word_v4();
        asked.__bindgen_anon_4.ipv4_dst = dst.word_v4();
    } else {
        asked.__bindgen_anon_2.flowinfo = head & 0x0fff_ffff_u32.to_be();
        asked.__bindgen_anon_3.ipv6_src = src.0;
        asked.__bindgen_anon_4.ipv6_dst = dst.0;
    }
    let size = size_of::<Route>() as i32;
    // SAFETY: the context is the one the program was called with, and the question as large as is said.
    if unsafe { bpf_fib_lookup(ctx.cast(), &raw mut asked, size, 0) } != FOUND {
        return false;
    }
    let back = asked.ifindex == packet.ifindex;
    if !back && device_of(asked.ifindex).is_none_or(|device| device.flags & SENDS == 0) {
        return false;
    }
    packet.ifindex = asked.ifindex;
    *ethernet = ethernet_of(&asked);
    true
}

/// The Ethernet addresses of a packet that goes to a neighbour: to, from.
#[inline(always)]
fn ethernet_of(route: &Route) -> [u32; 3] {
    let [a, b, c, d, e, f] = route.dmac;
    let [g, h, i, j, k, l] = route.smac;
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]), u32::from_ne_bytes([i, j, k, l])]
}

//! Direct server return: packets are wrapped on their way to the endpoint's node, and unwrapped there.

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_FIXED_GSO,
    TC_ACT_REDIRECT,
};
use aya_ebpf::helpers::generated::{
    bpf_csum_update, bpf_redirect_neigh, bpf_skb_adjust_room, bpf_skb_store_bytes,
};
use proxy_common::abi::{Reason, Tunnel, feature};
use proxy_common::addr::Proto;
use proxy_common::lb::Tables as _;
use proxy_common::lb::direct::{self, Inside, Wrapping};
use proxy_common::wire::{Frame as _, Packet, checksum, parse, wrap};

use super::tc::DROP;
use crate::feature::has;
use crate::scratch::{Scratch, scratch};
use crate::skb::Skb;
use crate::tables::TcTables;

/// `BPF_ADJ_ROOM_MAC`: room behind the Ethernet header, if there is one.
const BEHIND_ETHERNET: u32 = 1;

/// What [`subprog_unwrap`] says: nothing of ours is inside.
pub const OTHER: u32 = Inside::Other as u32;
/// The packet is unwrapped, and has been read anew.
pub const OURS: u32 = Inside::Ours as u32;
/// It could not be unwrapped.
pub const FAILED: u32 = 3;

/// What [`subprog_wrap`] says of a packet that is too long; no program returns this.
pub const TOO_BIG: i32 = 0xb16;

/// Unwraps the packet, if it is one of another node's agent or programs.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_unwrap(ctx: *mut __sk_buff) -> u32 {
    if !has(feature::WRAP) {
        return OTHER;
    }
    let Some(Scratch { packet, arrived, .. }) = scratch() else { return OTHER };
    let skb = Skb(ctx);
    skb.pull_more();
    *arrived = *packet;
    packet.begin(arrived.ifindex);
    let found = if parse::<_, false>(&wrap::Inside(&skb, arrived.l4.into()), packet).is_some() {
        direct::inside(&TcTables::NO_PACKET, arrived, wrap::hint_in(&skb, arrived), packet)
    } else {
        Inside::Other
    };
    if found == Inside::Other {
        *packet = *arrived;
        return OTHER;
    }
    let less = -(wrap::length(arrived.v4) as i32);
    // SAFETY: the context is valid; pointers into the packet are derived afresh after.
    if unsafe { bpf_skb_adjust_room(ctx, less, BEHIND_ETHERNET, BPF_F_ADJ_ROOM_FIXED_GSO.into()) } != 0 {
        TcTables::NO_PACKET.count(Reason::WrapFailed);
        return FAILED;
    }
    skb.pull_more();
    packet.come_out_of(arrived);
    if found == Inside::Ours {
        TcTables::NO_PACKET.count(Reason::Unwrapped);
    }
    found as u32
}

/// Sends the packet to its endpoint's node as the edit says. [`TOO_BIG`] if it is too long for that: then the edit says
/// in place of the interface how long it may be.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn subprog_wrap(ctx: *mut __sk_buff) -> i32 {
    if !has(feature::WRAP) {
        return DROP;
    }
    let Some(Scratch { packet, edit, .. }) = scratch() else { return DROP };
    let mut skb = Skb(ctx);
    let tables = TcTables::NO_PACKET;
    if let Some((len, longest)) = lengths(&skb, packet) {
        match direct::wrapping(&tables, packet, edit, longest) {
            Wrapping::By(tunnel) => {
                let done = wrap_up(&mut skb, packet, &tunnel, len, edit.port.0);
                if done == TC_ACT_REDIRECT as i32 {
                    tables.count(Reason::Wrapped);
                    return done;
                }
            }
            Wrapping::TooBig(room) => {
                tables.count(Reason::TooBig);
                edit.out = room;
                return TOO_BIG;
            }
            Wrapping::None => {}
        }
    }
    tables.count(Reason::WrapFailed);
    DROP
}

/// How long the IP packet is, and how long the longest one that will be made of it.
#[inline(always)]
fn lengths(skb: &Skb, packet: &Packet) -> Option<(u32, u32)> {
    let there = skb.len().saturating_sub(packet.l3.into());
    let size = skb.segment_size();
    if size != 0 {
        let udp = packet.tuple.proto == Proto::UDP;
        let transport = if udp { 8 } else { u32::from(packet.data_offset >> 4) * 4 };
        let whole = u32::from(packet.l4 - packet.l3) + transport + size;
        // Segments of TCP are cut shorter by what the header takes.
        let less = if udp { 0 } else { wrap::length(packet.v4) as u32 };
        return Some((there, whole.saturating_sub(less)));
    }
    let said = wrap::length_in(skb, packet, there)?;
    Some((said, said))
}

/// Puts a header before the packet and sends it; anything but `TC_ACT_REDIRECT` if that fails.
#[inline(always)]
fn wrap_up(skb: &mut Skb, packet: &Packet, tunnel: &Tunnel, len: u32, hint: u16) -> i32 {
    let longer = wrap::length(packet.v4) as u32;
    let Some(head) = skb.load::<u32>(packet.l3.into()) else { return DROP };
    if len + longer > u16::MAX.into() {
        return DROP;
    }
    // What is put together of TCP may be cut anew; datagrams must stay as they are.
    let fixed = if packet.tuple.proto == Proto::UDP { BPF_F_ADJ_ROOM_FIXED_GSO } else { 0 };
    let family = if packet.v4 { BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 } else { BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 };
    let mut words = [0; wrap::WORDS];
    wrap::write(&mut words, packet.v4, head, len, (&tunnel.from, &tunnel.to), hint);
    // SAFETY: the context is valid; pointers into the packet are derived afresh after.
    if unsafe { bpf_skb_adjust_room(skb.0, longer as i32, BEHIND_ETHERNET, (fixed | family).into()) } != 0 {
        return DROP;
    }
    let (at, from) = (u32::from(packet.l3), words.as_ptr().cast());
    // A constant length at each call, as the verifier wants it.
    // SAFETY: so many bytes of the words are initialised.
    let stored = unsafe {
        if packet.v4 {
            bpf_skb_store_bytes(skb.0, at, from, wrap::LENGTHS[0] as u32, 0)
        } else {
            bpf_skb_store_bytes(skb.0, at, from, wrap::LENGTHS[1] as u32, 0)
        }
    };
    if stored != 0 {
        return DROP;
    }
    // A sum over the whole packet, if the driver has made one, stays true: a header of IPv4 adds nothing to it.
    if !packet.v4 {
        // SAFETY: takes a number. Without such a sum it fails, and there is nothing to be done.
        unsafe { bpf_csum_update(skb.0, checksum::sum(&words)) };
    }
    // SAFETY: takes numbers, and no parameters of the neighbour.
    unsafe { bpf_redirect_neigh(tunnel.ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

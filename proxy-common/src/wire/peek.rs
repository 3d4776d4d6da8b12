//! A frame's headers with a few loads, where it is what most are: the quick way.

use core::mem::offset_of;

use network_types::eth::EthHdr;
use network_types::ip::Ipv4Hdr;

use super::parse::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, ports};
use super::{Frame, Packet};
use crate::abi::Tuple;
use crate::addr::{Addr, Proto};

/// Reads what most packets are, with a few loads: a whole datagram of IPv4 without options over TCP or UDP. `None`
/// for everything else, and where less can be read directly: that is left to [`parse`](super::parse()), which would say the same of
/// these. The interface is left out.
#[inline(always)]
pub fn peek<F: Frame, const ETHERNET: bool>(frame: &F) -> Option<Packet> {
    if !ETHERNET {
        return peek_v4::<_, 0, 20, 28>(frame);
    }
    match frame.load_at::<u16, { offset_of!(EthHdr, ether_type) }>()? {
        ETHERTYPE_IPV4 => peek_v4::<_, { EthHdr::LEN }, { EthHdr::LEN + 20 }, { EthHdr::LEN + 28 }>(frame),
        _ => None,
    }
}

/// `MORE` is where that begins of a TCP header which UDP does not have.
#[inline(always)]
fn peek_v4<F: Frame, const L3: usize, const L4: usize, const MORE: usize>(frame: &F) -> Option<Packet> {
    // With the first eight bytes of the transport header, which both have.
    let head: [u32; 7] = frame.load_at::<_, L3>()?;
    let (proto, fragment) = (Proto(head[2].to_ne_bytes()[offset_of!(Ipv4Hdr, proto) % 4]), head[1]);
    if head[0].to_ne_bytes()[0] != 0x45 || fragment & 0x3fff_u32.to_be() != 0 {
        return None;
    }
    let mut packet = Packet { v4: true, l3: L3 as u16, l4: L4 as u16, ..Packet::at(0) };
    let (sport, dport) = ports(head[5]);
    packet.tuple = Tuple::new(Addr::v4(head[3]), sport, Addr::v4(head[4]), dport, proto);
    match proto {
        Proto::TCP => {
            let more: [u32; 3] = frame.load_at::<_, MORE>()?;
            let total = u16::from_be_bytes([head[0].to_ne_bytes()[2], head[0].to_ne_bytes()[3]]);
            (packet.seq, packet.ack) = (u32::from_be(head[6]), u32::from_be(more[0]));
            [packet.data_offset, packet.tcp_flags, ..] = more[1].to_ne_bytes();
            packet.segment = i32::from(total) - 20;
        }
        Proto::UDP => {}
        _ => return None,
    }
    Some(packet)
}

/// [`peek`] for IPv6, without extension headers.
#[inline(always)]
pub fn peek_v6<F: Frame, const ETHERNET: bool>(frame: &F) -> Option<Packet> {
    if !ETHERNET {
        return peek_v6_at::<_, 0, 40, 48>(frame);
    }
    match frame.load_at::<u16, { offset_of!(EthHdr, ether_type) }>()? {
        ETHERTYPE_IPV6 => peek_v6_at::<_, { EthHdr::LEN }, { EthHdr::LEN + 40 }, { EthHdr::LEN + 48 }>(frame),
        _ => None,
    }
}

#[inline(always)]
fn peek_v6_at<F: Frame, const L3: usize, const L4: usize, const MORE: usize>(frame: &F) -> Option<Packet> {
    let head: [u32; 12] = frame.load_at::<_, L3>()?;
    let [payload @ .., proto, _] = head[1].to_ne_bytes();
    if head[0].to_ne_bytes()[0] >> 4 != 6 {
        return None;
    }
    let (src, dst) = (Addr([head[2], head[3], head[4], head[5]]), Addr([head[6], head[7], head[8], head[9]]));
    if src.is_v4() || dst.is_v4() {
        return None;
    }
    let mut packet = Packet { v4: false, l3: L3 as u16, l4: L4 as u16, ..Packet::at(0) };
    let (sport, dport) = ports(head[10]);
    packet.tuple = Tuple::new(src, sport, dst, dport, Proto(proto));
    match packet.tuple.proto {
        Proto::TCP => {
            let more: [u32; 3] = frame.load_at::<_, MORE>()?;
            (packet.seq, packet.ack) = (u32::from_be(head[11]), u32::from_be(more[0]));
            [packet.data_offset, packet.tcp_flags, ..] = more[1].to_ne_bytes();
            packet.segment = i32::from(u16::from_be_bytes(payload));
        }
        Proto::UDP => {}
        _ => return None,
    }
    Some(packet)
}

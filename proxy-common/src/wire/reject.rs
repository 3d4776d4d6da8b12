//! The reject reply: what a packet that is not served is answered with, built from the packet. An RST for TCP
//! (RFC 9293 §3.5.2), "port unreachable" for everything else (RFC 792, RFC 4443 §3.1), which a connected
//! client reads as "connection refused" (P-19).

use super::{Frame, Kind, Packet, checksum};
use crate::addr::Proto;

/// Words of the longest reply behind the link-layer header: IPv6, ICMPv6, and the rejected packet's IPv6
/// header with eight bytes more.
const MAX_WORDS: usize = 24;

/// A reply, ready to be stored behind the link-layer header.
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    /// Headers and body in memory order.
    pub words: [u32; MAX_WORDS],
    /// How many of the words count: one of [`Self::SIZES`].
    pub len: usize,
}

impl Reply {
    /// The lengths it can have, in words: RST and ICMP over IPv4, then over IPv6.
    pub const SIZES: [usize; 4] = [10, 14, 15, 24];
}

/// Builds the reply into `out`. False when the packet must not be answered (an RST, a truncated packet, an
/// IPv4 packet with options, a source that is no host's, RFC 1122 §3.2.2): it is dropped in silence.
#[inline(always)]
#[must_use]
pub fn build<F: Frame>(frame: &F, packet: &Packet, out: &mut Reply) -> bool {
    if packet.tuple.src.is_never_service() {
        return false;
    }
    let v4 = packet.tuple.src.is_v4();
    match (matches!(packet.tuple.proto, Proto::TCP), v4) {
        (true, _) if packet.tcp_flags & Packet::RST != 0 => false,
        (true, _) => reset(frame, packet, v4, out),
        (false, true) => icmp_v4(frame, packet, PORT_UNREACHABLE_V4, 0, out),
        (false, false) => icmp_v6(frame, packet, PORT_UNREACHABLE_V6, 0, out),
    }
}

/// Builds what a router answers to a packet that is too long for its way (RFC 1191 §4, RFC 4443 §3.2), which takes `room`
/// bytes at most. False when it must not be answered.
#[inline(always)]
#[must_use]
pub fn build_too_big<F: Frame>(frame: &F, packet: &Packet, room: u32, out: &mut Reply) -> bool {
    if packet.tuple.src.is_never_service() || matches!(packet.kind, Kind::IcmpError | Kind::LaterFragment) {
        return false;
    }
    if packet.v4 {
        icmp_v4(frame, packet, FRAGMENTATION_NEEDED, room & 0xffff, out)
    } else {
        icmp_v6(frame, packet, PACKET_TOO_BIG, room, out)
    }
}

/// Types and codes of ICMP.
const PORT_UNREACHABLE_V4: [u8; 2] = [3, 3];
const FRAGMENTATION_NEEDED: [u8; 2] = [3, 4];
/// Types and codes of ICMPv6.
const PORT_UNREACHABLE_V6: [u8; 2] = [1, 4];
const PACKET_TOO_BIG: [u8; 2] = [2, 0];

#[inline(always)]
fn reset<F: Frame>(frame: &F, packet: &Packet, v4: bool, out: &mut Reply) -> bool {
    let Some(tcp) = frame.load::<[u32; 5]>(packet.l4.into()) else {
        return false;
    };
    let header = u32::from_be(tcp[3]);
    let ports = tcp[0].rotate_left(16);
    let words: [u32; 5] = if packet.tcp_flags & Packet::ACK != 0 {
        // <SEQ=SEG.ACK><CTL=RST>
        [ports, tcp[2], 0, (5_u32 << 28 | u32::from(Packet::RST) << 16).to_be(), 0]
    } else {
        // <SEQ=0><ACK=SEG.SEQ+SEG.LEN><CTL=RST,ACK>; SYN and FIN count as one.
        let syn_fin =
            u32::from(packet.tcp_flags & Packet::SYN != 0) + u32::from(packet.tcp_flags & Packet::FIN != 0);
        let Some(total) = payload_end(frame, packet, v4) else {
            return false;
        };
        let data = total.wrapping_sub((u32::from(packet.l4)) + (header >> 28) * 4);
        let len = if data > 0xffff { 0 } else { data };
        let ack = u32::from_be(tcp[1]).wrapping_add(len).wrapping_add(syn_fin);
        let flags = u32::from(Packet::RST | Packet::ACK);
        [ports, 0, ack.to_be(), (5_u32 << 28 | flags << 16).to_be(), 0]
    };
    let sum = checksum::add(pseudo(packet, Proto::TCP, 20), checksum::sum(&words));
    let at = if v4 { 5 } else { 10 };
    if v4 {
        head_v4(packet, 20, Proto::TCP, out);
    } else {
        head_v6(packet, 20, Proto::TCP, out);
    }
    let mut n = 0;
    while n < 5 {
        out.words[at + n] = words[n];
        n += 1;
    }
    out.words[at + 4] = halves(!checksum::fold(sum), 0);
    out.len = at + 5;
    true
}

/// Two 16-bit fields as a word in memory order.
#[inline(always)]
fn halves(first: u16, second: u16) -> u32 {
    let (a, b) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a[0], a[1], b[0], b[1]])
}

#[inline(always)]
fn icmp_v4<F: Frame>(frame: &F, packet: &Packet, what: [u8; 2], more: u32, out: &mut Reply) -> bool {
    // Without options the rejected packet's header has a fixed size, and so has the reply.
    if packet.l4 != packet.l3 + 20 {
        return false;
    }
    let Some(original) = frame.load::<[u32; 7]>(packet.l3.into()) else {
        return false;
    };
    let head = u32::from_ne_bytes([what[0], what[1], 0, 0]);
    let sum = checksum::add(checksum::add(head, more.to_be()), checksum::sum(&original));
    head_v4(packet, 36, Proto::ICMP, out);
    out.words[5] = head | halves(0, !checksum::fold(sum));
    out.words[6] = more.to_be();
    let mut n = 0;
    while n < 7 {
        out.words[7 + n] = original[n];
        n += 1;
    }
    out.len = 14;
    true
}

#[inline(always)]
fn icmp_v6<F: Frame>(frame: &F, packet: &Packet, what: [u8; 2], more: u32, out: &mut Reply) -> bool {
    let Some(original) = frame.load::<[u32; 12]>(packet.l3.into()) else {
        return false;
    };
    let head = u32::from_ne_bytes([what[0], what[1], 0, 0]);
    let body = checksum::add(checksum::add(head, more.to_be()), checksum::sum(&original));
    let sum = checksum::add(pseudo(packet, Proto::ICMPV6, 56), body);
    head_v6(packet, 56, Proto::ICMPV6, out);
    out.words[10] = head | halves(0, !checksum::fold(sum));
    out.words[11] = more.to_be();
    let mut n = 0;
    while n < 12 {
        out.words[12 + n] = original[n];
        n += 1;
    }
    out.len = 24;
    true
}

/// Offset at which the IP packet ends, by its own length field.
#[inline(always)]
fn payload_end<F: Frame>(frame: &F, packet: &Packet, v4: bool) -> Option<u32> {
    if v4 {
        let len = u16::from_be(frame.load::<u16>(usize::from(packet.l3) + 2)?);
        Some(u32::from(packet.l3) + u32::from(len))
    } else {
        let len = u16::from_be(frame.load::<u16>(usize::from(packet.l3) + 4)?);
        Some(u32::from(packet.l3) + 40 + u32::from(len))
    }
}

/// The pseudo header's sum (RFC 9293 §3.1, RFC 8200 §8.1): the same for both families, since the mapped
/// prefix of IPv4 is left out and the other fields differ only in their place.
#[inline(always)]
fn pseudo(packet: &Packet, proto: Proto, len: u32) -> u32 {
    let (s, d) = (&packet.tuple.src.0, &packet.tuple.dst.0);
    let mut sum = checksum::add(s[3], d[3]);
    if !packet.tuple.src.is_v4() {
        sum = checksum::add(sum, checksum::add(checksum::add(s[0], s[1]), s[2]));
        sum = checksum::add(sum, checksum::add(checksum::add(d[0], d[1]), d[2]));
    }
    checksum::add(sum, checksum::add(len.to_be(), u32::from(proto.0).to_be()))
}

/// An IPv4 header from the rejected packet's destination to its source, `len` bytes of payload behind it.
#[inline(always)]
fn head_v4(packet: &Packet, len: u32, proto: Proto, out: &mut Reply) {
    let mut ip = [
        (0x4500_0000 | (20 + len)).to_be(),
        // Don't fragment.
        0x4000_u32.to_be(),
        u32::from_ne_bytes([64, proto.0, 0, 0]),
        packet.tuple.dst.word_v4(),
        packet.tuple.src.word_v4(),
    ];
    ip[2] |= halves(0, !checksum::fold(checksum::sum(&ip)));
    let mut n = 0;
    while n < 5 {
        out.words[n] = ip[n];
        n += 1;
    }
}

/// An IPv6 header from the rejected packet's destination to its source.
#[inline(always)]
fn head_v6(packet: &Packet, len: u32, proto: Proto, out: &mut Reply) {
    out.words[0] = 0x6000_0000_u32.to_be();
    out.words[1] = (len << 16 | u32::from(proto.0) << 8 | 64).to_be();
    let mut n = 0;
    while n < 4 {
        out.words[2 + n] = packet.tuple.dst.0[n];
        out.words[6 + n] = packet.tuple.src.0[n];
        n += 1;
    }
}

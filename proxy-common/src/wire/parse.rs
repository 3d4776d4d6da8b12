//! A frame's headers in one pass, both families in one place.

use core::mem::offset_of;

use network_types::eth::EthHdr;
use network_types::ip::Ipv4Hdr;

use super::Frame;
use crate::abi::{FlowKey, Hook};
use crate::addr::{Addr, Port, Proto};

const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
const ETHERTYPE_IPV6: u16 = 0x86dd_u16.to_be();

/// IPv6 extension headers that are walked before a packet is left alone (D-20).
const MAX_EXTENSIONS: usize = 4;

/// What kind of packet it is, as far as translation cares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A whole datagram whose transport header was read.
    Whole,
    /// The first fragment of a datagram: it carries the ports of all.
    FirstFragment,
    /// A fragment without transport header: its ports are zero until looked up.
    LaterFragment,
    /// An ICMP error about a packet; the tuple is that packet's reversed, as if the error were its answer.
    IcmpError,
    /// Anything else over IP (ICMP echo, other protocols): the tuple has addresses only.
    Other,
}

/// A parsed packet.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// The tuple at this hook.
    pub key: FlowKey,
    /// What kind of packet it is.
    pub kind: Kind,
    /// TCP flags (RFC 9293 §3.1); zero for other protocols.
    pub tcp_flags: u8,
    /// Type of an ICMP message that is no error; zero otherwise.
    pub icmp_type: u8,
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of the transport or ICMP header.
    pub l4: usize,
    /// In an ICMP error, the offset of the embedded IP header.
    pub inner_l3: usize,
    /// In an ICMP error, the offset of the embedded transport header.
    pub inner_l4: usize,
    /// Identification of a fragmented datagram.
    pub fragment_id: u32,
}

impl Packet {
    /// FIN.
    pub const FIN: u8 = 1 << 0;
    /// SYN.
    pub const SYN: u8 = 1 << 1;
    /// RST.
    pub const RST: u8 = 1 << 2;
    /// ACK.
    pub const ACK: u8 = 1 << 4;

    /// Whether this packet opens a TCP connection.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        self.tcp_flags & (Self::SYN | Self::ACK | Self::RST) == Self::SYN
    }

    /// Whether the transport header, or that of the embedded packet, is there to be rewritten.
    #[inline(always)]
    pub fn has_ports(&self) -> bool {
        self.key.proto.has_ports() && !matches!(self.kind, Kind::LaterFragment | Kind::Other)
    }
}

/// Parses the frame; with `ETHERNET` false it begins at the IP header. `None` for what is not IP, or is
/// cut off or contradicts itself: such frames are nobody's to translate.
#[inline(always)]
pub fn parse<F: Frame, const ETHERNET: bool>(frame: &F, hook: Hook) -> Option<Packet> {
    if ETHERNET {
        match frame.load::<u16>(offset_of!(EthHdr, ether_type))? {
            ETHERTYPE_IPV4 => parse_v4(frame, EthHdr::LEN, hook),
            ETHERTYPE_IPV6 => parse_v6(frame, EthHdr::LEN, hook),
            _ => None,
        }
    } else {
        // Two bytes and not one: a one-byte read at the very start of a packet confuses old verifiers.
        let first = frame.load::<u16>(0)?.to_ne_bytes()[0];
        match first >> 4 {
            4 => parse_v4(frame, 0, hook),
            6 => parse_v6(frame, 0, hook),
            _ => None,
        }
    }
}

#[inline(always)]
fn parse_v4<F: Frame>(frame: &F, l3: usize, hook: Hook) -> Option<Packet> {
    let ip: [u32; 5] = frame.load(l3)?;
    let [vihl, ..] = ip[0].to_ne_bytes();
    if vihl >> 4 != 4 || vihl & 0xf < 5 {
        return None;
    }
    let l4 = l3 + (vihl & 0xf) as usize * 4;
    // RFC 791 §3.1: identification, then 3 flag bits (the last is "more fragments") and the offset.
    let fragment = u32::from_be(ip[1]);
    let proto = Proto(ip[2].to_ne_bytes()[offset_of!(Ipv4Hdr, proto) % 4]);
    let packet = Packet {
        key: FlowKey {
            src: Addr::v4(ip[3]),
            dst: Addr::v4(ip[4]),
            sport: Port(0),
            dport: Port(0),
            proto,
            hook,
            pad: 0,
        },
        kind: if fragment & 0x1fff != 0 {
            Kind::LaterFragment
        } else if fragment & 0x2000 != 0 {
            Kind::FirstFragment
        } else {
            Kind::Whole
        },
        tcp_flags: 0,
        icmp_type: 0,
        l3,
        l4,
        inner_l3: 0,
        inner_l4: 0,
        fragment_id: fragment >> 16,
    };
    if matches!(proto, Proto::ICMP) && !matches!(packet.kind, Kind::LaterFragment) {
        return icmp_v4(frame, packet);
    }
    transport(frame, packet)
}

#[inline(always)]
fn parse_v6<F: Frame>(frame: &F, l3: usize, hook: Hook) -> Option<Packet> {
    let ip: [u32; 10] = frame.load(l3)?;
    if ip[0].to_ne_bytes()[0] >> 4 != 6 {
        return None;
    }
    let mut packet = Packet {
        key: FlowKey {
            src: Addr([ip[2], ip[3], ip[4], ip[5]]),
            dst: Addr([ip[6], ip[7], ip[8], ip[9]]),
            sport: Port(0),
            dport: Port(0),
            proto: Proto(0),
            hook,
            pad: 0,
        },
        kind: Kind::Whole,
        tcp_flags: 0,
        icmp_type: 0,
        l3,
        l4: 0,
        inner_l3: 0,
        inner_l4: 0,
        fragment_id: 0,
    };
    let (proto, l4) = extensions(frame, ip[1].to_ne_bytes()[2], l3 + 40, &mut packet)?;
    packet.key.proto = proto;
    packet.l4 = l4;
    if matches!(proto, Proto::ICMPV6) && !matches!(packet.kind, Kind::LaterFragment) {
        return icmp_v6(frame, packet);
    }
    transport(frame, packet)
}

/// Walks extension headers (RFC 8200 §4) to the transport header: its protocol and offset.
#[inline(always)]
fn extensions<F: Frame>(
    frame: &F,
    mut next: u8,
    mut off: usize,
    packet: &mut Packet,
) -> Option<(Proto, usize)> {
    for _ in 0..MAX_EXTENSIONS {
        match next {
            // Hop-by-hop, routing, destination options: length in 8-byte units, the first not counted.
            0 | 43 | 60 => {
                let head = frame.load::<u16>(off)?.to_ne_bytes();
                next = head[0];
                off += (head[1] as usize + 1) * 8;
            }
            // Fragment (RFC 8200 §4.5): 13 bits of offset, 2 reserved, "more fragments", identification.
            44 => {
                let head: [u32; 2] = frame.load(off)?;
                next = head[0].to_ne_bytes()[0];
                let place = u32::from_be(head[0]) & 0xffff;
                packet.fragment_id = head[1];
                off += 8;
                if place & 0xfff8 != 0 {
                    packet.kind = Kind::LaterFragment;
                    return Some((Proto(next), off));
                }
                if place & 1 != 0 {
                    packet.kind = Kind::FirstFragment;
                }
            }
            _ => return Some((Proto(next), off)),
        }
    }
    None
}

/// Ports and TCP flags of a packet that has them; anything else becomes [`Kind::Other`].
#[inline(always)]
fn transport<F: Frame>(frame: &F, mut packet: Packet) -> Option<Packet> {
    if matches!(packet.kind, Kind::LaterFragment) {
        return Some(packet);
    }
    match packet.key.proto {
        Proto::TCP => {
            let head: [u32; 5] = frame.load(packet.l4)?;
            (packet.key.sport, packet.key.dport) = ports(head[0]);
            packet.tcp_flags = head[3].to_ne_bytes()[1];
        }
        Proto::UDP => {
            let head: [u32; 2] = frame.load(packet.l4)?;
            (packet.key.sport, packet.key.dport) = ports(head[0]);
        }
        Proto::SCTP => {
            let head: [u32; 3] = frame.load(packet.l4)?;
            (packet.key.sport, packet.key.dport) = ports(head[0]);
        }
        _ => packet.kind = Kind::Other,
    }
    Some(packet)
}

#[inline(always)]
fn ports(word: u32) -> (Port, Port) {
    let b = word.to_ne_bytes();
    (Port(u16::from_ne_bytes([b[0], b[1]])), Port(u16::from_ne_bytes([b[2], b[3]])))
}

/// Errors are types 3, 4, 5, 11 and 12 (RFC 1122 §3.2.2).
#[inline(always)]
fn icmp_v4<F: Frame>(frame: &F, mut packet: Packet) -> Option<Packet> {
    let head: [u32; 2] = frame.load(packet.l4)?;
    let kind = head[0].to_ne_bytes()[0];
    if !matches!(kind, 3 | 4 | 5 | 11 | 12) {
        packet.kind = Kind::Other;
        packet.icmp_type = kind;
        return Some(packet);
    }
    packet.inner_l3 = packet.l4 + 8;
    let ip: [u32; 5] = frame.load(packet.inner_l3)?;
    let vihl = ip[0].to_ne_bytes()[0];
    if vihl >> 4 != 4 || vihl & 0xf < 5 || u32::from_be(ip[1]) & 0x1fff != 0 {
        packet.kind = Kind::Other;
        return Some(packet);
    }
    packet.inner_l4 = packet.inner_l3 + (vihl & 0xf) as usize * 4;
    let proto = Proto(ip[2].to_ne_bytes()[offset_of!(Ipv4Hdr, proto) % 4]);
    about(frame, packet, Addr::v4(ip[3]), Addr::v4(ip[4]), proto)
}

/// Errors are types below 128 (RFC 4443 §2.1).
#[inline(always)]
fn icmp_v6<F: Frame>(frame: &F, mut packet: Packet) -> Option<Packet> {
    let head: [u32; 2] = frame.load(packet.l4)?;
    let kind = head[0].to_ne_bytes()[0];
    if kind >= 128 {
        packet.kind = Kind::Other;
        packet.icmp_type = kind;
        return Some(packet);
    }
    packet.inner_l3 = packet.l4 + 8;
    let ip: [u32; 10] = frame.load(packet.inner_l3)?;
    let mut inner = packet;
    inner.kind = Kind::Whole;
    let (proto, inner_l4) = extensions(frame, ip[1].to_ne_bytes()[2], packet.inner_l3 + 40, &mut inner)?;
    if matches!(inner.kind, Kind::LaterFragment) {
        packet.kind = Kind::Other;
        return Some(packet);
    }
    packet.inner_l4 = inner_l4;
    about(frame, packet, Addr([ip[2], ip[3], ip[4], ip[5]]), Addr([ip[6], ip[7], ip[8], ip[9]]), proto)
}

/// Makes `packet` an error about the packet `src` → `dst`: the tuple is that packet's, reversed.
#[inline(always)]
fn about<F: Frame>(frame: &F, mut packet: Packet, src: Addr, dst: Addr, proto: Proto) -> Option<Packet> {
    if !proto.has_ports() {
        packet.kind = Kind::Other;
        return Some(packet);
    }
    let (sport, dport) = ports(frame.load::<u32>(packet.inner_l4)?);
    packet.kind = Kind::IcmpError;
    packet.key.src = dst;
    packet.key.dst = src;
    packet.key.sport = dport;
    packet.key.dport = sport;
    packet.key.proto = proto;
    Some(packet)
}

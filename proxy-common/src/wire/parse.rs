//! A frame's headers in one pass, both families in one place.

use core::mem::offset_of;

use network_types::eth::EthHdr;
use network_types::ip::Ipv4Hdr;

use super::Frame;
use crate::abi::Tuple;
use crate::addr::{Addr, Port, Proto};

pub(super) const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd_u16.to_be();

/// IPv6 extension headers that are walked before a packet is ignored (D-20).
const MAX_EXTENSIONS: usize = 4;

/// What kind of packet it is, as far as translation cares.
#[repr(u8)]
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
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// The tuple at this hook.
    pub tuple: Tuple,
    /// Whether its addresses are IPv4 ones: they have one family.
    pub v4: bool,
    /// What kind of packet it is.
    pub kind: Kind,
    /// TCP flags (RFC 9293 §3.1); zero for other protocols.
    pub tcp_flags: u8,
    /// Type of an ICMP message that is no error; zero otherwise.
    pub icmp_type: u8,
    /// Offset of the IP header.
    pub l3: u16,
    /// Offset of the transport or ICMP header.
    pub l4: u16,
    /// In an ICMP error, the offset of the embedded IP header.
    pub inner_l3: u16,
    /// In an ICMP error, the offset of the embedded transport header.
    pub inner_l4: u16,
    /// Identification of a fragmented datagram.
    pub fragment_id: u32,
    /// Index of the interface it is seen at.
    pub ifindex: u32,
    /// TCP sequence number; these four only of a [`Kind::Whole`] TCP packet or first fragment.
    pub seq: u32,
    /// TCP acknowledgement number.
    pub ack: u32,
    /// Bytes of the segment with its header, as the IP header says, which may be wrong and even negative.
    pub segment: i32,
    /// The first byte of TCP flags: its upper half is the length of the TCP header in words.
    pub data_offset: u8,
    /// Bits of [`crate::lb::direct`] if another node had wrapped it; else 0.
    pub wrapped: u8,
    /// With that: the [hint](super::wrap::hint) of the endpoint that the other node means; 0 for none.
    pub hint: u16,
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

    /// Whether it is whole, and of TCP neither opens nor ends a connection.
    #[inline(always)]
    pub const fn goes_on(&self) -> bool {
        matches!(self.kind, Kind::Whole) && self.tcp_flags & (Self::SYN | Self::FIN | Self::RST) == 0
    }

    /// How many sequence numbers the segment takes: its payload, SYN and FIN.
    #[inline(always)]
    pub const fn seq_len(&self) -> u32 {
        let ends = (self.tcp_flags & Self::SYN != 0) as u32 + (self.tcp_flags & Self::FIN != 0) as u32;
        let payload = self.segment - (self.data_offset >> 4) as i32 * 4;
        if payload > 0 { payload as u32 + ends } else { ends }
    }

    /// Whether this is a TCP packet that does not open a connection.
    #[inline(always)]
    pub const fn is_answer(&self) -> bool {
        matches!(self.tuple.proto, Proto::TCP) && !self.is_syn()
    }

    /// Whether the transport header, or that of the embedded packet, is there to be rewritten.
    #[inline(always)]
    pub fn has_ports(&self) -> bool {
        self.tuple.proto.has_ports() && !matches!(self.kind, Kind::LaterFragment | Kind::Other)
    }
}

impl Packet {
    /// Nothing parsed yet, at an interface.
    #[inline(always)]
    pub const fn at(ifindex: u32) -> Self {
        Self {
            tuple: Tuple::new(Addr::ANY_V6, Port(0), Addr::ANY_V6, Port(0), Proto(0)),
            v4: false,
            kind: Kind::Whole,
            tcp_flags: 0,
            icmp_type: 0,
            l3: 0,
            l4: 0,
            inner_l3: 0,
            inner_l4: 0,
            fragment_id: 0,
            ifindex,
            seq: 0,
            ack: 0,
            segment: 0,
            data_offset: 0,
            wrapped: 0,
            hint: 0,
        }
    }
}

impl Packet {
    /// Begins anew, at an interface. What [`parse`] writes in any case, or nobody reads before it is written,
    /// stays as it is: the kernel's programs do this for each packet.
    #[inline(always)]
    pub const fn begin(&mut self, ifindex: u32) {
        self.tuple.sport = Port(0);
        self.tuple.dport = Port(0);
        self.kind = Kind::Whole;
        self.tcp_flags = 0;
        self.icmp_type = 0;
        self.l3 = 0;
        self.wrapped = 0;
        self.ifindex = ifindex;
    }
}

/// Parses the frame into `packet`; with `ETHERNET` false it begins at the IP header. `None` for what is not
/// IP, or is cut off or contradicts itself: such frames are not translated.
#[inline(always)]
pub fn parse<F: Frame, const ETHERNET: bool>(frame: &F, packet: &mut Packet) -> Option<()> {
    if ETHERNET {
        packet.l3 = EthHdr::LEN as u16;
        match frame.load_at::<u16, { offset_of!(EthHdr, ether_type) }>()? {
            ETHERTYPE_IPV4 => parse_v4::<_, { EthHdr::LEN }>(frame, packet),
            ETHERTYPE_IPV6 => parse_v6::<_, { EthHdr::LEN }>(frame, packet),
            _ => None,
        }
    } else {
        // Two bytes and not one: a one-byte read at the very start of a packet confuses old verifiers.
        let first = frame.load::<u16>(0)?.to_ne_bytes()[0];
        match first >> 4 {
            4 => parse_v4::<_, 0>(frame, packet),
            6 => parse_v6::<_, 0>(frame, packet),
            _ => None,
        }
    }
}

#[inline(always)]
fn parse_v4<F: Frame, const L3: usize>(frame: &F, packet: &mut Packet) -> Option<()> {
    let ip: [u32; 5] = frame.load_at::<_, L3>()?;
    let vihl = ip[0].to_ne_bytes()[0];
    if vihl >> 4 != 4 || vihl & 0xf < 5 {
        return None;
    }
    let l4 = L3 + usize::from(vihl & 0xf) * 4;
    packet.l4 = l4 as u16;
    packet.v4 = true;
    packet.tuple.src = Addr::v4(ip[3]);
    packet.tuple.dst = Addr::v4(ip[4]);
    packet.tuple.proto = proto_v4(&ip);
    // RFC 791 §3.1: identification, then 3 flag bits (the last is "more fragments") and the offset.
    if ip[1] & 0x3fff_u32.to_be() != 0 {
        packet.fragment_id = u32::from_be(ip[1]) >> 16;
        if ip[1] & 0x1fff_u32.to_be() != 0 {
            packet.kind = Kind::LaterFragment;
            return Some(());
        }
        packet.kind = Kind::FirstFragment;
    }
    if packet.tuple.proto == Proto::ICMP {
        icmp_v4(frame, l4, packet)
    } else {
        let total = u16::from_be_bytes([ip[0].to_ne_bytes()[2], ip[0].to_ne_bytes()[3]]);
        transport(frame, l4, L3 + usize::from(total), packet)
    }
}

#[inline(always)]
fn proto_v4(ip: &[u32; 5]) -> Proto {
    Proto(ip[2].to_ne_bytes()[offset_of!(Ipv4Hdr, proto) % 4])
}

#[inline(always)]
fn parse_v6<F: Frame, const L3: usize>(frame: &F, packet: &mut Packet) -> Option<()> {
    let ip: [u32; 10] = frame.load_at::<_, L3>()?;
    if ip[0].to_ne_bytes()[0] >> 4 != 6 {
        return None;
    }
    packet.v4 = false;
    packet.tuple.src = Addr([ip[2], ip[3], ip[4], ip[5]]);
    packet.tuple.dst = Addr([ip[6], ip[7], ip[8], ip[9]]);
    // Mapped addresses have no place on the wire, and would read as IPv4 from here on.
    if packet.tuple.src.is_v4() || packet.tuple.dst.is_v4() {
        return None;
    }
    let next = extensions(frame, ip[1].to_ne_bytes()[2], L3 + 40)?;
    packet.l4 = next.off as u16;
    packet.tuple.proto = Proto(next.proto);
    packet.kind = next.kind;
    packet.fragment_id = next.fragment_id;
    match packet.kind {
        Kind::LaterFragment => Some(()),
        _ if packet.tuple.proto == Proto::ICMPV6 => icmp_v6(frame, next.off, packet),
        _ => {
            let payload = u16::from_be_bytes([ip[1].to_ne_bytes()[0], ip[1].to_ne_bytes()[1]]);
            transport(frame, next.off, L3 + 40 + usize::from(payload), packet)
        }
    }
}

/// Where the extension headers end.
struct Next {
    proto: u8,
    off: usize,
    kind: Kind,
    fragment_id: u32,
}

/// Walks extension headers (RFC 8200 §4) to the transport header.
#[inline(always)]
fn extensions<F: Frame>(frame: &F, proto: u8, off: usize) -> Option<Next> {
    let mut next = Next { proto, off, kind: Kind::Whole, fragment_id: 0 };
    // Once more than there may be headers: the last look finds the transport.
    for _ in 0..=MAX_EXTENSIONS {
        match next.proto {
            // Hop-by-hop, routing, destination options: length in 8-byte units, the first not counted.
            0 | 43 | 60 => {
                let head = frame.load::<u16>(next.off)?.to_ne_bytes();
                next.proto = head[0];
                next.off += (usize::from(head[1]) + 1) * 8;
            }
            // Fragment (RFC 8200 §4.5): 13 bits of offset, 2 reserved, "more fragments", identification.
            44 => {
                let head: [u32; 2] = frame.load(next.off)?;
                next.proto = head[0].to_ne_bytes()[0];
                let place = u32::from_be(head[0]) & 0xffff;
                next.fragment_id = head[1];
                next.off += 8;
                if place & 0xfff8 != 0 {
                    next.kind = Kind::LaterFragment;
                    return Some(next);
                }
                if place & 1 != 0 {
                    next.kind = Kind::FirstFragment;
                }
            }
            _ => return Some(next),
        }
    }
    None
}

/// Ports, TCP flags and numbers of a packet that has them; anything else becomes [`Kind::Other`]. `end` is
/// where the IP packet ends.
#[inline(always)]
fn transport<F: Frame>(frame: &F, l4: usize, end: usize, packet: &mut Packet) -> Option<()> {
    match packet.tuple.proto {
        Proto::TCP => {
            let head: [u32; 5] = frame.load(l4)?;
            (packet.tuple.sport, packet.tuple.dport) = ports(head[0]);
            [packet.data_offset, packet.tcp_flags, ..] = head[3].to_ne_bytes();
            packet.seq = u32::from_be(head[1]);
            packet.ack = u32::from_be(head[2]);
            packet.segment = end as i32 - l4 as i32;
        }
        Proto::UDP => {
            let head: [u32; 2] = frame.load(l4)?;
            (packet.tuple.sport, packet.tuple.dport) = ports(head[0]);
        }
        Proto::SCTP => {
            let head: [u32; 3] = frame.load(l4)?;
            (packet.tuple.sport, packet.tuple.dport) = ports(head[0]);
        }
        _ => packet.kind = Kind::Other,
    }
    Some(())
}

#[inline(always)]
pub(super) fn ports(word: u32) -> (Port, Port) {
    let b = word.to_ne_bytes();
    (Port(u16::from_ne_bytes([b[0], b[1]])), Port(u16::from_ne_bytes([b[2], b[3]])))
}

/// Errors are types 3, 4, 11 and 12 (RFC 1122 §3.2.2). A redirect (5) is about the route to an endpoint: shown
/// to the client as one about the VIP it would send the client round the node that translates for it.
#[inline(always)]
fn icmp_v4<F: Frame>(frame: &F, l4: usize, packet: &mut Packet) -> Option<()> {
    let head: [u32; 2] = frame.load(l4)?;
    packet.kind = Kind::Other;
    packet.icmp_type = head[0].to_ne_bytes()[0];
    if !matches!(packet.icmp_type, 3 | 4 | 11 | 12) {
        return Some(());
    }
    let inner = l4 + 8;
    packet.inner_l3 = inner as u16;
    let ip: [u32; 5] = frame.load(inner)?;
    let vihl = ip[0].to_ne_bytes()[0];
    if vihl >> 4 != 4 || vihl & 0xf < 5 || u32::from_be(ip[1]) & 0x1fff != 0 {
        return Some(());
    }
    let inner_l4 = inner + usize::from(vihl & 0xf) * 4;
    if proto_v4(&ip).has_ports() {
        packet.tuple.src = Addr::v4(ip[4]);
        packet.tuple.dst = Addr::v4(ip[3]);
        packet.tuple.proto = proto_v4(&ip);
        return about(frame, inner_l4, packet);
    }
    Some(())
}

/// Errors are types below 128 (RFC 4443 §2.1).
#[inline(always)]
fn icmp_v6<F: Frame>(frame: &F, l4: usize, packet: &mut Packet) -> Option<()> {
    let head: [u32; 2] = frame.load(l4)?;
    packet.kind = Kind::Other;
    packet.icmp_type = head[0].to_ne_bytes()[0];
    if packet.icmp_type >= 128 {
        return Some(());
    }
    let inner = l4 + 8;
    packet.inner_l3 = inner as u16;
    let ip: [u32; 10] = frame.load(inner)?;
    let next = extensions(frame, ip[1].to_ne_bytes()[2], inner + 40)?;
    if next.kind != Kind::LaterFragment && Proto(next.proto).has_ports() {
        let (src, dst) = (Addr([ip[6], ip[7], ip[8], ip[9]]), Addr([ip[2], ip[3], ip[4], ip[5]]));
        if src.is_v4() || dst.is_v4() {
            return Some(());
        }
        packet.tuple.src = src;
        packet.tuple.dst = dst;
        packet.tuple.proto = Proto(next.proto);
        return about(frame, next.off, packet);
    }
    Some(())
}

/// Makes the packet an error about an embedded one, whose addresses, reversed, are in the tuple already.
#[inline(always)]
fn about<F: Frame>(frame: &F, inner_l4: usize, packet: &mut Packet) -> Option<()> {
    (packet.tuple.dport, packet.tuple.sport) = ports(frame.load::<u32>(inner_l4)?);
    packet.inner_l4 = inner_l4 as u16;
    packet.kind = Kind::IcmpError;
    Some(())
}

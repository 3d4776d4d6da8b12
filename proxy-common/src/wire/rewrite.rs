//! An address and its port exchanged in a packet, checksums updated: the one place that writes headers.

use super::{Frame, Kind, Packet, checksum};
use crate::addr::{Addr, Port, Proto};

/// Which end of the tuple gets a new address.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The source.
    Src,
    /// The destination.
    Dst,
}

/// A change of one end of a packet's tuple, and perhaps of the other end's port. Which end it is, the hook says.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Edit {
    /// The new address; of the packet's family.
    pub addr: Addr,
    /// The new port.
    pub port: Port,
    /// The other end's new port; zero keeps it.
    pub other_port: Port,
    /// The interface that the packet leaves by instead; zero leaves that to the routes.
    pub out: u32,
}

impl Edit {
    /// Changes nothing yet.
    pub const NONE: Self = Self { addr: Addr::ANY_V6, port: Port(0), other_port: Port(0), out: 0 };
}

/// Applies `edit` to a packet that is no ICMP error. False when a write fails: the packet may be half written
/// and must be dropped.
#[inline(always)]
#[must_use]
pub fn rewrite<F: Frame>(frame: &mut F, packet: &Packet, end: End, edit: &Edit) -> bool {
    let old = match end {
        End::Src => &packet.tuple.src,
        End::Dst => &packet.tuple.dst,
    };
    let diff = addr_diff(packet, old, &edit.addr);
    if !replace_addr(frame, packet.l3.into(), end, packet.v4, diff, &edit.addr) {
        return false;
    }
    if !packet.has_ports() {
        return true;
    }
    let Some(ports) =
        replace_ports(frame, packet.l4.into(), packet.tuple.sport, packet.tuple.dport, end, edit)
    else {
        return false;
    };
    let (field, flags) = match packet.tuple.proto {
        Proto::TCP => (16, 0),
        Proto::UDP => (6, checksum::UDP),
        Proto::SCTP => return ports == 0 || patch_sctp(frame, packet, end, edit),
        _ => return true,
    };
    let v6 = if packet.v4 { 0 } else { checksum::IPV6 };
    frame.update_checksum(usize::from(packet.l4) + field, diff, ports, flags | v6)
}

/// What a router does to a packet that goes on (RFC 1812 §5.3.1, RFC 8200 §3): it has one hop less. False for one
/// that has none to spare, and is left as it is.
#[inline(always)]
#[must_use]
pub fn lower_hops<F: Frame>(frame: &mut F, packet: &Packet) -> bool {
    let (at, hops) = if packet.v4 { (8, 0) } else { (4, 3) };
    let at = usize::from(packet.l3) + at;
    let Some(word) = frame.load::<u32>(at) else { return false };
    let mut bytes = word.to_ne_bytes();
    if bytes[hops] <= 1 {
        return false;
    }
    bytes[hops] -= 1;
    if packet.v4 {
        // In the same word, behind the protocol, stands the header's checksum.
        let [hops, proto, field @ ..] = bytes;
        let diff = checksum::diff(
            u16::from_ne_bytes([hops + 1, proto]).into(),
            u16::from_ne_bytes([hops, proto]).into(),
        );
        let [first, second] = checksum::apply(u16::from_ne_bytes(field), diff).to_ne_bytes();
        bytes = [hops, proto, first, second];
    }
    frame.store(at, u32::from_ne_bytes(bytes))
}

/// The difference that replacing an address of the packet's makes.
#[inline(always)]
fn addr_diff(packet: &Packet, old: &Addr, new: &Addr) -> u32 {
    if packet.v4 { checksum::diff(old.word_v4(), new.word_v4()) } else { checksum::addr_diff(old, new) }
}

/// The CRC of SCTP covers ports but no addresses (RFC 9260 §6.8). In the first fragment of a datagram it
/// covers what has not been seen: false.
#[inline(always)]
fn patch_sctp<F: Frame>(frame: &mut F, packet: &Packet, end: End, edit: &Edit) -> bool {
    if !matches!(packet.kind, Kind::Whole) {
        return false;
    }
    let (l3, l4) = (usize::from(packet.l3), usize::from(packet.l4));
    let length = if packet.v4 {
        frame.load::<u16>(l3 + 2).map(|len| l3 + usize::from(u16::from_be(len)))
    } else {
        frame.load::<u16>(l3 + 4).map(|len| l3 + 40 + usize::from(u16::from_be(len)))
    };
    let (Some(length), Some(field)) = (length, frame.load::<u32>(l4 + 8)) else {
        return false;
    };
    // Ports are the first four bytes of the message.
    let Some(following) = length.checked_sub(l4 + 4) else {
        return false;
    };
    let (new_src, new_dst) = match end {
        End::Src => (edit.port, replaced(packet.tuple.dport, edit.other_port)),
        End::Dst => (replaced(packet.tuple.sport, edit.other_port), edit.port),
    };
    let diff = word(packet.tuple.sport, packet.tuple.dport) ^ word(new_src, new_dst);
    let patched = field ^ frame.crc_difference(diff, following as u32);
    frame.store(l4 + 8, patched)
}

#[inline(always)]
fn replaced(old: Port, new: Port) -> Port {
    if new.0 == 0 { old } else { new }
}

/// Two ports as they lie in memory.
#[inline(always)]
fn word(first: Port, second: Port) -> u32 {
    let (a, b) = (first.0.to_ne_bytes(), second.0.to_ne_bytes());
    u32::from_ne_bytes([a[0], a[1], b[0], b[1]])
}

/// An error travels against the packet it is about, so the end that `edit` names is the other end of the
/// embedded packet. The outer address goes along when it is that end's own: always at the destination, and
/// at the source when the error comes from the endpoint itself and not from a router in between (RFC 5508 §4).
#[inline(always)]
#[must_use]
pub fn rewrite_error<F: Frame>(frame: &mut F, packet: &Packet, end: End, edit: &Edit) -> bool {
    let (inner_end, old) = match end {
        End::Src => (End::Dst, packet.tuple.src),
        End::Dst => (End::Src, packet.tuple.dst),
    };
    let v4 = packet.v4;
    let diff = addr_diff(packet, &old, &edit.addr);
    // In IPv4 the embedded header's own checksum balances the address in the ICMP checksum.
    let mut body = if v4 { 0 } else { diff };
    if !replace_addr(frame, packet.inner_l3.into(), inner_end, v4, diff, &edit.addr) {
        return false;
    }
    // The embedded packet is the tuple reversed: its source port is the tuple's destination port.
    let Some(ports) =
        replace_ports(frame, packet.inner_l4.into(), packet.tuple.dport, packet.tuple.sport, inner_end, edit)
    else {
        return false;
    };
    body = checksum::add(body, ports);

    let Some(outer) = load_addr(frame, packet.l3.into(), end, v4) else {
        return false;
    };
    let mut pseudo = 0;
    if outer.same(&old) {
        if !replace_addr(frame, packet.l3.into(), end, v4, diff, &edit.addr) {
            return false;
        }
        if !v4 {
            pseudo = diff;
        }
    }
    frame.update_checksum(usize::from(packet.l4) + 2, pseudo, body, if v4 { 0 } else { checksum::IPV6 })
}

#[inline(always)]
fn load_addr<F: Frame>(frame: &F, l3: usize, end: End, v4: bool) -> Option<Addr> {
    if v4 {
        frame.load(l3 + if matches!(end, End::Src) { 12 } else { 16 }).map(Addr::v4)
    } else {
        frame.load(l3 + if matches!(end, End::Src) { 8 } else { 24 }).map(Addr)
    }
}

/// Writes one address of an IP header and, in IPv4, the header's checksum, for which the change makes the
/// difference `diff`.
#[inline(always)]
fn replace_addr<F: Frame>(frame: &mut F, l3: usize, end: End, v4: bool, diff: u32, new: &Addr) -> bool {
    if v4 {
        frame.update(l3, |ip: &mut [u32; 5]| {
            // Time to live, protocol, checksum (RFC 791 §3.1).
            let [ttl, proto, a, b] = ip[2].to_ne_bytes();
            let [a, b] = checksum::apply(u16::from_ne_bytes([a, b]), diff).to_ne_bytes();
            ip[2] = u32::from_ne_bytes([ttl, proto, a, b]);
            ip[if matches!(end, End::Src) { 3 } else { 4 }] = new.word_v4();
        })
    } else {
        frame.store(l3 + if matches!(end, End::Src) { 8 } else { 24 }, new.0)
    }
}

/// Writes the ports of a transport header; the difference they make, or `None` when a write fails.
#[inline(always)]
fn replace_ports<F: Frame>(
    frame: &mut F,
    l4: usize,
    sport: Port,
    dport: Port,
    end: End,
    edit: &Edit,
) -> Option<u32> {
    let (old, at, other_old, other_at) = match end {
        End::Src => (sport, l4, dport, l4 + 2),
        End::Dst => (dport, l4 + 2, sport, l4),
    };
    let mut diff = 0;
    if old != edit.port {
        if !frame.store(at, edit.port.0) {
            return None;
        }
        diff = checksum::port_diff(old, edit.port);
    }
    if edit.other_port.0 != 0 && other_old != edit.other_port {
        if !frame.store(other_at, edit.other_port.0) {
            return None;
        }
        diff = checksum::add(diff, checksum::port_diff(other_old, edit.other_port));
    }
    Some(diff)
}

//! Packets built and checked from scratch, by nothing that the programs use.

use std::net::IpAddr;
use std::vec::Vec;

use super::ByteFrame;
use crate::abi::Tuple;
use crate::addr::{Addr, Proto};
use crate::wire::{Frame as _, Packet, checksum, parse};

/// The one's complement sum of bytes, from scratch (RFC 1071 §3).
fn sum(bytes: &[u8]) -> u32 {
    let mut total = 0_u64;
    for pair in bytes.chunks(2) {
        total += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u32
}

/// The CRC of SCTP, bit by bit (RFC 9260 appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |mut crc, byte| {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
        crc
    })
}

/// The bytes of an address in its own family.
fn octets(addr: &Addr) -> Vec<u8> {
    match IpAddr::from(*addr) {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn pseudo(src: &Addr, dst: &Addr, proto: Proto, len: usize) -> u32 {
    let mut bytes = octets(src);
    bytes.extend(octets(dst));
    bytes.extend((len as u32).to_be_bytes());
    bytes.extend([0, 0, 0, proto.0]);
    sum(&bytes)
}

/// An IP header with a correct checksum, 64 hops.
fn ip_header(src: &Addr, dst: &Addr, proto: Proto, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    if src.is_v4() {
        bytes.extend([0x45, 0]);
        bytes.extend(((20 + len) as u16).to_be_bytes());
        bytes.extend([0x12, 0x34, 0x40, 0, 64, proto.0, 0, 0]);
        bytes.extend(octets(src));
        bytes.extend(octets(dst));
        let check = !(sum(&bytes) as u16);
        bytes[10..12].copy_from_slice(&check.to_be_bytes());
    } else {
        bytes.extend([0x60, 0, 0, 0]);
        bytes.extend((len as u16).to_be_bytes());
        bytes.extend([proto.0, 64]);
        bytes.extend(octets(src));
        bytes.extend(octets(dst));
    }
    bytes
}

/// An Ethernet frame with a TCP, UDP or SCTP packet of the given tuple, checksums from scratch; with
/// `partial` the transport checksum is left to the hardware.
pub fn frame(key: &Tuple, tcp_flags: u8, payload: &[u8], partial: bool) -> ByteFrame {
    segment(key, tcp_flags, [1000, 2000], payload, partial)
}

/// The same; `numbers` are the TCP sequence and acknowledgement numbers.
pub fn segment(key: &Tuple, tcp_flags: u8, numbers: [u32; 2], payload: &[u8], partial: bool) -> ByteFrame {
    let mut l4 = Vec::new();
    l4.extend(key.sport.number().to_be_bytes());
    l4.extend(key.dport.number().to_be_bytes());
    let at = match key.proto {
        Proto::TCP => {
            l4.extend(numbers.into_iter().flat_map(u32::to_be_bytes));
            l4.extend([0x50, tcp_flags, 0xff, 0xff, 0, 0, 0, 0]);
            16
        }
        Proto::SCTP => {
            l4.extend([0, 0, 0, 9, 0, 0, 0, 0]);
            0
        }
        _ => {
            l4.extend(((8 + payload.len()) as u16).to_be_bytes());
            l4.extend([0, 0]);
            6
        }
    };
    l4.extend(payload);
    let pseudo = pseudo(&key.src, &key.dst, key.proto, l4.len());
    let check = match !checksum::fold(pseudo + sum(&l4)) {
        _ if partial => pseudo as u16,
        0 if key.proto == Proto::UDP => 0xffff, // Zero would say that there is none (RFC 768).
        check => check,
    };
    if key.proto == Proto::SCTP {
        let crc = crc32c(&l4);
        l4[8..12].copy_from_slice(&crc.to_le_bytes());
    } else {
        l4[at..at + 2].copy_from_slice(&check.to_be_bytes());
    }
    let mut bytes = ethernet(&key.src);
    bytes.extend(ip_header(&key.src, &key.dst, key.proto, l4.len()));
    bytes.extend(l4);
    ByteFrame { bytes, partial }
}

fn ethernet(of_family: &Addr) -> Vec<u8> {
    let mut bytes = Vec::from([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    bytes.extend(if of_family.is_v4() { [0x08, 0x00] } else { [0x86, 0xdd] });
    bytes
}

/// An Ethernet frame with an ICMP error from `from` to `to` about the packet in `about`: "fragmentation
/// needed" or "packet too big", with an MTU of 1400.
pub fn icmp_error(from: Addr, to: Addr, about: &ByteFrame) -> ByteFrame {
    let inner = &about.bytes[14..about.bytes.len().min(14 + 48)];
    let (proto, mut l4) = if from.is_v4() {
        (Proto::ICMP, Vec::from([3, 4, 0, 0, 0, 0, 0x05, 0x78]))
    } else {
        (Proto::ICMPV6, Vec::from([2, 0, 0, 0, 0, 0, 0x05, 0x78]))
    };
    l4.extend(inner);
    let mut total = sum(&l4);
    if !from.is_v4() {
        total += pseudo(&from, &to, proto, l4.len());
    }
    let check = !(checksum::fold(total));
    l4[2..4].copy_from_slice(&check.to_be_bytes());
    let mut bytes = ethernet(&from);
    bytes.extend(ip_header(&from, &to, proto, l4.len()));
    bytes.extend(l4);
    ByteFrame { bytes, partial: false }
}

/// Checks every checksum of a frame from scratch; says what is wrong.
pub fn verify(frame: &ByteFrame) -> Result<(), &'static str> {
    let mut packet = Packet::at(0);
    parse::<_, true>(frame, &mut packet).ok_or("does not parse")?;
    let (l3, l4) = (usize::from(packet.l3), usize::from(packet.l4));
    let (src, dst, proto, end) = if frame.bytes[l3] >> 4 == 4 {
        if sum(frame.bytes.get(l3..l4).ok_or("shorter than its IP header")?) != 0xffff {
            return Err("IP header checksum");
        }
        let len = u16::from_be_bytes([frame.bytes[l3 + 2], frame.bytes[l3 + 3]]);
        let word = |at: usize| Addr::v4(frame.load::<u32>(at).unwrap_or(0));
        (word(l3 + 12), word(l3 + 16), Proto(frame.bytes[l3 + 9]), l3 + usize::from(len))
    } else {
        let len = u16::from_be_bytes([frame.bytes[l3 + 4], frame.bytes[l3 + 5]]);
        let words = |at: usize| Addr(frame.load::<[u32; 4]>(at).unwrap_or([0; 4]));
        (words(l3 + 8), words(l3 + 24), Proto(frame.bytes[l3 + 6]), l3 + 40 + usize::from(len))
    };
    let body = frame.bytes.get(l4..end).ok_or("shorter than its length field")?;
    if body.len() < 8 || proto == Proto::TCP && body.len() < 20 || proto == Proto::SCTP && body.len() < 12 {
        return Err("shorter than its header");
    }
    let pseudo = pseudo(&src, &dst, proto, body.len());
    if proto == Proto::SCTP {
        let mut zeroed = body.to_vec();
        let field: Vec<u8> = zeroed.splice(8..12, [0; 4]).collect();
        return if crc32c(&zeroed).to_le_bytes()[..] == field { Ok(()) } else { Err("SCTP CRC") };
    }
    let at = match proto {
        Proto::TCP => 16,
        Proto::UDP => 6,
        _ => 2,
    };
    let field = u32::from(u16::from_be_bytes([body[at], body[at + 1]]));
    let right = match proto {
        Proto::UDP if field == 0 => src.is_v4(),
        Proto::ICMP => sum(body) == 0xffff,
        _ if frame.partial => field == pseudo,
        _ => checksum::fold(sum(body) + pseudo) == 0xffff,
    };
    if right { Ok(()) } else { Err("transport checksum") }
}

/// The tuple of a frame.
pub fn tuple(frame: &ByteFrame) -> Option<Packet> {
    let mut packet = Packet::at(0);
    parse::<_, true>(frame, &mut packet)?;
    Some(packet)
}

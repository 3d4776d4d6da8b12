//! A packet in a packet: IPv4 in IPv4 (RFC 2003), IPv6 in IPv6 (RFC 2473). The one inside stays as it is.

use super::{Frame, Packet, checksum};
use crate::addr::{Addr, Port, Proto};

/// Bytes of the header that is put before a packet, of IPv4 and of IPv6. It is an option-less IP header.
pub const LENGTHS: [usize; 2] = [20, 40];
/// Words of the longer one.
pub const WORDS: usize = LENGTHS[1] / 4;

/// What names an endpoint to its node, in sixteen bits that are never all zero: a sum over its address and port.
#[inline(always)]
#[must_use]
pub const fn hint(addr: &Addr, port: Port) -> u16 {
    let [a, b, c, d] = addr.0;
    let sum = a ^ b.rotate_left(5) ^ c.rotate_left(11) ^ d.rotate_left(19) ^ port.0 as u32;
    let mixed = sum.wrapping_mul(0x9e37_79b1);
    let half = (mixed >> 16) as u16;
    if half == 0 { 1 } else { half }
}

/// The protocol of a packet in a packet of the same family.
#[inline(always)]
#[must_use]
pub const fn protocol(v4: bool) -> Proto {
    if v4 { Proto::IPV4 } else { Proto::IPV6 }
}

/// How many bytes the header before a packet takes.
#[inline(always)]
#[must_use]
pub const fn length(v4: bool) -> usize {
    if v4 { LENGTHS[0] } else { LENGTHS[1] }
}

/// How many bytes a packet is long, from its IP header on, as that says; `None` if there are less. Behind a short packet a
/// frame is filled up.
#[inline(always)]
pub fn length_in<F: Frame>(frame: &F, packet: &Packet, there: u32) -> Option<u32> {
    let at = usize::from(packet.l3) + if packet.v4 { 2 } else { 4 };
    let said =
        u32::from(u16::from_be(frame.load::<u16>(at)?)) + if packet.v4 { 0 } else { LENGTHS[1] as u32 };
    (said <= there).then_some(said)
}

/// Writes the header for a packet of `len` bytes (of which `head` is the first word) to `words`. It is not to be
/// fragmented, so its identification (RFC 6864), or the lower half of its flow label, is free for the hint.
#[inline(always)]
pub fn write(words: &mut [u32; WORDS], v4: bool, head: u32, len: u32, (from, to): (&Addr, &Addr), hint: u16) {
    let head = head.to_ne_bytes();
    if v4 {
        let total = (20 + len) as u16;
        words[0] = u32::from_be_bytes([0x45, head[1], (total >> 8) as u8, total as u8]).to_be();
        words[1] = (u32::from(hint) << 16 | 0x4000).to_be();
        words[2] = u32::from_ne_bytes([64, Proto::IPV4.0, 0, 0]);
        words[3] = from.word_v4();
        words[4] = to.word_v4();
        let mut sum = 0;
        let mut n = 0;
        while n < 5 {
            sum = checksum::add(sum, words[n]);
            n += 1;
        }
        let [a, b] = (!checksum::fold(sum)).to_ne_bytes();
        words[2] = u32::from_ne_bytes([64, Proto::IPV4.0, a, b]);
    } else {
        let class = u32::from_be_bytes([head[0], head[1], 0, 0]) & 0x0ff0_0000;
        words[0] = (0x6000_0000 | class | u32::from(hint)).to_be();
        words[1] = ((len & 0xffff) << 16 | u32::from(Proto::IPV6.0) << 8 | 64).to_be();
        let mut n = 0;
        while n < 4 {
            words[2 + n] = from.0[n];
            words[6 + n] = to.0[n];
            n += 1;
        }
    }
}

/// The hint in the header of `packet`, which has another one inside; 0 for none.
#[inline(always)]
pub fn hint_in<F: Frame>(frame: &F, packet: &Packet) -> u16 {
    let at = usize::from(packet.l3) + if packet.v4 { 4 } else { 2 };
    frame.load::<u16>(at).map_or(0, u16::from_be)
}

/// The packet inside another one, whose header ends at an offset.
pub struct Inside<'a, F>(pub &'a F, pub usize);

impl<F: Frame> Frame for Inside<'_, F> {
    #[inline(always)]
    fn load<T: super::Words>(&self, off: usize) -> Option<T> {
        self.0.load(self.1 + off)
    }

    #[inline(always)]
    fn store<T: super::Words>(&mut self, _off: usize, _value: T) -> bool {
        false
    }

    #[inline(always)]
    fn update<T: super::Words>(&mut self, _off: usize, _f: impl FnOnce(&mut T)) -> bool {
        false
    }

    #[inline(always)]
    fn update_checksum(&mut self, _off: usize, _pseudo: u32, _body: u32, _flags: u32) -> bool {
        false
    }
}

impl Packet {
    /// A packet that [`Inside`] has read, as it stands once the header of `outer` has been taken away.
    #[inline(always)]
    pub const fn come_out_of(&mut self, outer: &Self) {
        self.l3 = outer.l3;
        self.l4 += outer.l3;
        self.inner_l3 += outer.l3;
        self.inner_l4 += outer.l3;
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().expect("an address").into()
    }

    #[test]
    fn the_header_of_ipv4_is_that_of_rfc_2003() {
        let mut words = [0; WORDS];
        let head = u32::from_ne_bytes([0x45, 0xb8, 0, 60]);
        write(&mut words, true, head, 60, (&addr("10.0.0.1"), &addr("10.0.0.2")), 0xabcd);
        let bytes: Vec<u8> = words[..5].iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(bytes[..10], [0x45, 0xb8, 0, 80, 0xab, 0xcd, 0x40, 0, 64, 4], "class of service is kept");
        assert_eq!(bytes[12..], [10, 0, 0, 1, 10, 0, 0, 2]);
        let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "its checksum is right");
    }

    #[test]
    fn the_header_of_ipv6_is_that_of_rfc_2473() {
        let mut words = [0; WORDS];
        let head = u32::from_ne_bytes([0x6b, 0x81, 0x23, 0x45]);
        write(&mut words, false, head, 100, (&addr("fd00::1"), &addr("fd00::2")), 0xabcd);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(
            bytes[..8],
            [0x6b, 0x80, 0xab, 0xcd, 0, 100, 41, 64],
            "the class is kept, the label is the hint"
        );
        assert_eq!(bytes[8..24], [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(bytes[24..], [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    }

    #[test]
    fn hints_tell_endpoints_of_a_node_apart() {
        let mut hints = std::collections::BTreeSet::new();
        for last in 1..=250 {
            for port in [80, 8080, 8443] {
                let hint = hint(&addr(&std::format!("10.244.3.{last}")), Port::new(port));
                assert_ne!(hint, 0);
                hints.insert(hint);
            }
        }
        assert!(hints.len() > 735, "750 in 65,535 places: some four pairs share one; {}", hints.len());
        assert_ne!(hint(&addr("fd00::1"), Port::new(80)), hint(&addr("fd00::2"), Port::new(80)));
    }
}

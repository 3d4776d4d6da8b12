//! One 16-byte address for both families, ports in network order, protocol numbers.
//!
//! An IPv4 address is kept IPv4-mapped (`::ffff:a.b.c.d`, RFC 4291 §2.5.5.2), so every table and decision
//! has one lane; only header parsing and rewriting know the difference.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv4 (mapped) or IPv6 address as four words in network byte order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Addr(pub [u32; 4]);

/// The third word of an IPv4-mapped address.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Addr {
    /// `::`, and in a key the wildcard for "any IPv6 address of this node".
    pub const ANY_V6: Self = Self([0; 4]);
    /// `::ffff:0.0.0.0`, and in a key the wildcard for "any IPv4 address of this node".
    pub const ANY_V4: Self = Self([0, 0, MAPPED, 0]);

    /// From an IPv4 address in network byte order.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    /// Whether this is an IPv4 (mapped) address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        (self.0[0] | self.0[1] | (self.0[2] ^ MAPPED)) == 0
    }

    /// The IPv4 address in network byte order; meaningful when [`Self::is_v4`].
    #[inline(always)]
    pub const fn word_v4(&self) -> u32 {
        self.0[3]
    }

    /// The wildcard of this address's family, under which NodePorts stand.
    #[inline(always)]
    pub const fn wildcard(&self) -> Self {
        if self.is_v4() { Self::ANY_V4 } else { Self::ANY_V6 }
    }

    /// Equality without a byte loop: 16-byte array comparison costs the verifier a hundred instructions.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        ((self.0[0] ^ other.0[0])
            | (self.0[1] ^ other.0[1])
            | (self.0[2] ^ other.0[2])
            | (self.0[3] ^ other.0[3]))
            == 0
    }

    /// A number below 262,144 that goes with the address: the place of its bit in ADDRESS_BITS and
    /// ENDPOINT_BITS.
    #[inline(always)]
    pub const fn place(&self) -> u32 {
        let a = &self.0;
        // Multiplicative hashing (Knuth, TAOCP 6.4), by 2^32 over the golden ratio and another odd number.
        let upper = (a[0] ^ a[1].wrapping_shl(7) ^ a[2].wrapping_shl(13)).wrapping_mul(0x85eb_ca6b);
        let folded = a[3] ^ upper ^ upper >> 15;
        (folded ^ folded >> 16).wrapping_mul(0x9e37_79b1) >> 14
    }

    /// Whether no address is set (`::` or `0.0.0.0`).
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        (self.0[0] | self.0[1] | self.0[3]) == 0 && (self.0[2] == 0 || self.0[2] == MAPPED)
    }

    /// Whether this is a loopback address (127.0.0.0/8, ::1).
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.0[3]) >> 24 == 127
        } else {
            (self.0[0] | self.0[1] | self.0[2]) == 0 && u32::from_be(self.0[3]) == 1
        }
    }

    /// Loopback, multicast, IPv4 broadcast and unspecified: never a destination to translate (D-16).
    #[inline(always)]
    pub const fn is_never_service(&self) -> bool {
        if self.is_v4() {
            let first = u32::from_be(self.0[3]) >> 24;
            first == 127 || first >= 224 || first == 0
        } else {
            let first = u32::from_be(self.0[0]);
            first >> 24 == 0xff || (self.0[0] | self.0[1] | self.0[2]) == 0 && u32::from_be(self.0[3]) <= 1
        }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => Self::v4(u32::from_ne_bytes(v4.octets())),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        Self::v4(u32::from_ne_bytes(ip.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Self {
        let octets = ip.octets();
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(octets.chunks_exact(4)) {
            *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Self(words)
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        if addr.is_v4() {
            return Self::V4(Ipv4Addr::from(addr.0[3].to_ne_bytes()));
        }
        let mut octets = [0; 16];
        for (bytes, word) in octets.chunks_exact_mut(4).zip(addr.0) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        Self::V6(Ipv6Addr::from(octets))
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&IpAddr::from(*self), f)
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A transport port in network byte order, as it stands in a header.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Port(pub u16);

impl Port {
    /// From the number a person reads.
    #[inline(always)]
    pub const fn new(number: u16) -> Self {
        Self(number.to_be())
    }

    /// The number a person reads.
    #[inline(always)]
    pub const fn number(self) -> u16 {
        u16::from_be(self.0)
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.number(), f)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An IP protocol number. A number and not an enum: it comes from a packet.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Proto(pub u8);

impl Proto {
    /// ICMP for IPv4 (RFC 792).
    pub const ICMP: Self = Self(1);
    /// TCP (RFC 9293).
    pub const TCP: Self = Self(6);
    /// IPv4 in a packet (RFC 2003).
    pub const IPV4: Self = Self(4);
    /// IPv6 in a packet (RFC 2473).
    pub const IPV6: Self = Self(41);
    /// UDP (RFC 768).
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6 (RFC 4443).
    pub const ICMPV6: Self = Self(58);
    /// SCTP (RFC 9260).
    pub const SCTP: Self = Self(132);

    /// Whether Services can have ports of this protocol.
    #[inline(always)]
    pub const fn has_ports(self) -> bool {
        matches!(self, Self::TCP | Self::UDP | Self::SCTP)
    }
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ICMP => f.write_str("ICMP"),
            Self::TCP => f.write_str("TCP"),
            Self::UDP => f.write_str("UDP"),
            Self::ICMPV6 => f.write_str("ICMPv6"),
            Self::SCTP => f.write_str("SCTP"),
            Self(other) => write!(f, "protocol {other}"),
        }
    }
}

impl fmt::Debug for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_round_trip() {
        for text in ["10.96.0.10", "255.255.255.255", "::", "fd00:10:96::a", "2001:db8::1"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Addr::from(ip)), ip);
            assert_eq!(Addr::from(ip).to_string(), text);
        }
    }

    #[test]
    fn loopback_multicast_and_broadcast_are_never_services() {
        for text in ["127.0.0.1", "224.0.0.1", "255.255.255.255", "0.0.0.0", "::", "::1", "ff02::1"] {
            assert!(Addr::from(text.parse::<IpAddr>().unwrap()).is_never_service(), "{text}");
        }
        for text in ["10.96.0.1", "223.255.255.255", "fd00::1", "fe80::1", "::2"] {
            assert!(!Addr::from(text.parse::<IpAddr>().unwrap()).is_never_service(), "{text}");
        }
    }

    #[test]
    fn ports_are_kept_in_network_order() {
        assert_eq!(Port::new(80).0.to_ne_bytes(), [0, 80]);
        assert_eq!(Port::new(30200).number(), 30200);
    }
}

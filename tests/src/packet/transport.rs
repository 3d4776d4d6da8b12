//! The transports: their headers as bytes.

use network_types::icmp::{Icmpv4Hdr, Icmpv6Hdr};
use network_types::udp::UdpHdr;

use super::protocol;

/// Flags of a TCP segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// FIN.
    pub const FIN: Self = Self(0x01);
    /// SYN.
    pub const SYN: Self = Self(0x02);
    /// RST.
    pub const RST: Self = Self(0x04);
    /// PSH.
    pub const PSH: Self = Self(0x08);
    /// ACK.
    pub const ACK: Self = Self(0x10);

    /// Both sets of flags.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What the IP header carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A TCP segment.
    Tcp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// Sequence number.
        sequence: u32,
        /// Acknowledgment number.
        acknowledged: u32,
        /// Flags.
        flags: TcpFlags,
        /// Options, padded to four bytes.
        options: Vec<u8>,
    },
    /// A UDP datagram.
    Udp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// Off sends zero, which IPv4 allows.
        checksum: bool,
    },
    /// An SCTP packet; the payload is its chunks.
    Sctp {
        /// Source port.
        source: u16,
        /// Destination port.
        destination: u16,
        /// Verification tag.
        tag: u32,
    },
    /// An ICMP or ICMPv6 message, by the packet's family; the payload is what it embeds.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// The second four bytes.
        rest: [u8; 4],
    },
    /// Any other protocol; the payload is all there is.
    Other(u8),
}

impl Transport {
    /// Its number in an IP header of the family.
    pub(super) fn protocol(&self, v4: bool) -> u8 {
        match self {
            Self::Tcp { .. } => protocol::TCP,
            Self::Udp { .. } => protocol::UDP,
            Self::Sctp { .. } => protocol::SCTP,
            Self::Icmp { .. } if v4 => protocol::ICMP,
            Self::Icmp { .. } => protocol::ICMPV6,
            Self::Other(number) => *number,
        }
    }

    /// The header with a checksum of zero, and where the checksum goes.
    pub(super) fn header(&self, v4: bool, payload: usize) -> (Vec<u8>, Option<usize>) {
        match self {
            Self::Tcp { source, destination, sequence, acknowledged, flags, options } => {
                let options = padded(options, 4);
                let words = u8::try_from((20 + options.len()) / 4).expect("at most 15 words");
                // The type's bit field has another layout on each byte order; these are its bytes on the wire.
                let mut bytes = [source.to_be_bytes(), destination.to_be_bytes()].concat();
                bytes.extend(sequence.to_be_bytes());
                bytes.extend(acknowledged.to_be_bytes());
                bytes.extend([words << 4, flags.0]);
                bytes.extend([0xff, 0xff, 0, 0, 0, 0]);
                bytes.extend(options);
                (bytes, Some(16))
            }
            Self::Udp { source, destination, checksum } => {
                let UdpHdr { src, dst, len, check } = UdpHdr {
                    src: source.to_be_bytes(),
                    dst: destination.to_be_bytes(),
                    len: short(8 + payload).to_be_bytes(),
                    check: [0; 2],
                };
                ([src, dst, len, check].concat(), checksum.then_some(6))
            }
            Self::Sctp { source, destination, tag } => {
                let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
                ([&ports[..], &tag.to_be_bytes()[..], &[0; 4][..]].concat(), Some(8))
            }
            Self::Icmp { kind, code, rest } if v4 => {
                let Icmpv4Hdr { type_, code, check, data } =
                    Icmpv4Hdr { type_: *kind, code: *code, check: [0; 2], data: *rest };
                ([&[type_, code][..], &check[..], &data[..]].concat(), Some(2))
            }
            Self::Icmp { kind, code, rest } => {
                let Icmpv6Hdr { type_, code, check, data } =
                    Icmpv6Hdr { type_: *kind, code: *code, check: [0; 2], data: *rest };
                ([&[type_, code][..], &check[..], &data[..]].concat(), Some(2))
            }
            Self::Other(_) => (Vec::new(), None),
        }
    }
}

pub(super) fn padded(bytes: &[u8], unit: usize) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(bytes.len().next_multiple_of(unit), 0);
    padded
}

pub(super) fn short(length: usize) -> u16 {
    u16::try_from(length).expect("a packet is shorter than 64 KiB")
}

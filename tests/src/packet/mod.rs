//! Packets for tests: built header by header, checked and described byte by byte.
//!
//! The builder fills in lengths and checksums; the checker computes every checksum from scratch, so that a datapath
//! which patches checksums is judged by arithmetic it does not use. Parsing reads bytes, never header types:
//! `network-types` turns bytes into enums, and not every byte is one.

mod build;
mod check;
mod checksum;
mod transport;

pub use build::Packet;
pub use check::{View, check, describe};
pub use checksum::{Sum, crc32c};
pub use transport::{TcpFlags, Transport};

/// `IPPROTO_*` numbers that tests name.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// Fragment header of IPv6.
    pub const FRAGMENT: u8 = 44;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

//! As what a masqueraded flow leaves: the keys of an LPM trie.

use super::table_type;
use crate::addr::Addr;

table_type! {
    /// Destinations behind an interface. An LPM key begins with its prefix length in bits, counted from
    /// `ifindex` on: 32 bits of index, then those of the address (an IPv4 /n is 96 + n).
    pub struct RouteKey {
        /// Prefix length in bits.
        pub prefix_len: u32,
        /// Index of the interface, big-endian so that it is a prefix.
        pub ifindex: u32,
        /// Network address of the destinations.
        pub dst: Addr,
    }
}

impl RouteKey {
    /// The key that matches exactly one destination.
    #[inline(always)]
    pub const fn exact(ifindex: u32, dst: Addr) -> Self {
        Self { prefix_len: 160, ifindex: ifindex.to_be(), dst }
    }

    /// The key of a range whose prefix is `bits` long (IPv4: 0…32, IPv6: 0…128).
    pub const fn range(ifindex: u32, dst: Addr, bits: u32) -> Self {
        let mapped = if dst.is_v4() { 96 } else { 0 };
        Self { prefix_len: 32 + mapped + bits, ifindex: ifindex.to_be(), dst }
    }

    /// Length of the prefix in the address's own family.
    pub const fn bits(&self) -> u32 {
        self.prefix_len.saturating_sub(if self.dst.is_v4() { 128 } else { 32 })
    }
}

//! Who may open flows to a load-balancer address: the keys of an LPM trie.

use super::table_type;
use crate::addr::Addr;

table_type! {
    /// A source range of a Service port. An LPM key begins with its prefix length in bits, counted from
    /// `service` on: 32 bits of id, then those of the address (an IPv4 /n is 96 + n).
    pub struct SourceKey {
        /// Prefix length in bits.
        pub prefix_len: u32,
        /// Id of the Service port, big-endian so that it is a prefix.
        pub service: u32,
        /// Network address.
        pub addr: Addr,
    }
}

impl SourceKey {
    /// The key that matches exactly one source.
    #[inline(always)]
    pub const fn exact(service: u32, addr: Addr) -> Self {
        Self { prefix_len: 160, service: service.to_be(), addr }
    }

    /// The key of a range whose prefix is `bits` long (IPv4: 0…32, IPv6: 0…128).
    pub const fn range(service: u32, addr: Addr, bits: u32) -> Self {
        let mapped = if addr.is_v4() { 96 } else { 0 };
        Self { prefix_len: 32 + mapped + bits, service: service.to_be(), addr }
    }
}

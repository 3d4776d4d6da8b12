//! How other nodes are reached whose endpoints answer clients themselves (direct server return).

use super::table_type;
use crate::addr::Addr;

/// A flag of a [`Tunnel`]: wrapped packets get through to the node, as its agent has answered lately. New flows may go
/// that way. Those that do already go on without it.
pub const READY: u32 = 1 << 0;

/// [`TunnelKey::family`] of IPv4.
pub const V4: u32 = 4;
/// [`TunnelKey::family`] of IPv6.
pub const V6: u32 = 6;

table_type! {
    /// A node, and one family: packets are wrapped in packets of their own family.
    pub struct TunnelKey {
        /// A number for the node's name, never 0: [`Backend::node`](super::Backend::node).
        pub node: u32,
        /// [`V4`] or [`V6`].
        pub family: u32,
    }
}

impl TunnelKey {
    /// The key of a node for packets to or from `addr`.
    #[inline(always)]
    #[must_use]
    pub const fn new(node: u32, addr: &Addr) -> Self {
        Self { node, family: if addr.is_v4() { V4 } else { V6 } }
    }
}

table_type! {
    /// The way to a node.
    pub struct Tunnel {
        /// The node's address.
        pub to: Addr,
        /// This node's address as the other one knows it.
        pub from: Addr,
        /// The interface that leads there, which has an Ethernet header.
        pub ifindex: u32,
        /// How long a packet may be on the way there, its wrapping included, in bytes.
        pub mtu: u32,
        /// Bits of this module.
        pub flags: u32,
        /// Zero.
        pub pad: u32,
    }
}

impl Tunnel {
    /// Whether new flows may go this way.
    #[inline(always)]
    #[must_use]
    pub const fn is_ready(&self) -> bool {
        self.flags & READY != 0 && self.ifindex != 0
    }
}

//! Where a flow can go: backend index → [`Backend`].

#[cfg(feature = "next-layout")]
pub use super::next::Backend;
#[cfg(not(feature = "next-layout"))]
use super::table_type;
use crate::addr::{Addr, Port};

/// The endpoint runs on this node: replies are certain to pass here.
pub const LOCAL: u16 = 1 << 0;
/// Gets no new flows, but is still serving: its flows go on (P-2, C-5). Otherwise it is in use.
pub const DRAINING: u16 = 1 << 1;
/// Is among the slots of the Cluster set: an affinity may lead here under policy Cluster.
pub const IN_CLUSTER: u16 = 1 << 2;
/// Is among the slots of the Local set: an affinity may lead here under policy Local.
pub const IN_LOCAL: u16 = 1 << 3;
/// Is not terminating, and its Service wants connections to be reset when it leaves so.
pub const RESET: u16 = 1 << 4;

#[cfg(not(feature = "next-layout"))]
table_type! {
    /// One endpoint of one Service port. Index 0 is never used; a retired index has the zero address.
    pub struct Backend {
        /// Endpoint address.
        pub addr: Addr,
        /// Endpoint port.
        pub port: Port,
        /// Bits of this module.
        pub flags: u16,
        /// Raised each time the index is retired: a flow that remembers another one has lost its backend.
        pub generation: u32,
        /// Id of the Service port it belongs to.
        pub service: u32,
        /// Number of the node that the endpoint runs on, part of a [`TunnelKey`](super::TunnelKey); 0 for this node,
        /// one that is not known, and where no frontend of the Service has [`DSR`](super::frontend::DSR).
        pub node: u32,
    }
}

impl Backend {
    /// An index out of use that remembers its generation.
    #[must_use]
    pub const fn retired(generation: u32) -> Self {
        Self { addr: Addr::ANY_V6, port: Port(0), flags: 0, generation, service: 0, node: 0 }
    }

    /// Whether the index is in use.
    #[inline(always)]
    pub const fn is_live(&self) -> bool {
        self.port.0 != 0
    }

    /// Whether the endpoint runs on this node.
    #[inline(always)]
    pub const fn is_local(&self) -> bool {
        self.flags & LOCAL != 0
    }
}

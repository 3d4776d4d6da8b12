//! What a socket remembers about its Services: socket-local storage, and a table for what has no room there.

#[cfg(feature = "next-layout")]
pub use super::next::SocketState;
use super::table_type;
use crate::addr::{Addr, Port, Proto};

/// Services an unconnected UDP socket remembers in its own storage.
pub const SOCKET_ENTRIES: usize = 4;

/// Nothing of the socket is translated: it belongs to a pod that is left to its packets.
pub const EXCLUDED: u32 = 1 << 0;
/// Of an unconnected socket: what it does not remember goes by packet from now on.
pub const BY_PACKET: u32 = 1 << 1;
/// Something of it is in `PEERS`.
pub const MORE: u32 = 1 << 2;

table_type! {
    /// One destination of a socket, before and after translation.
    pub struct SocketEntry {
        /// The address the process named.
        pub vip: Addr,
        /// The endpoint's address.
        pub addr: Addr,
        /// The port the process named.
        pub vport: Port,
        /// The endpoint's port.
        pub port: Port,
        /// Backend index; 0 when the entry is empty.
        pub backend: u32,
        /// Its generation.
        pub generation: u32,
        /// Transport protocol.
        pub proto: Proto,
        /// Zero.
        pub pad: [u8; 3],
    }
}

#[cfg(not(feature = "next-layout"))]
table_type! {
    /// All a socket remembers. A TCP or connected UDP socket uses the first entry.
    pub struct SocketState {
        /// Cookie of a socket of the node itself that has connected to a Service over UDP, else 0: by it the
        /// agent finds the socket when its endpoint goes.
        pub cookie: u64,
        /// The entries.
        pub entries: [SocketEntry; SOCKET_ENTRIES],
        /// Bits of this module.
        pub flags: u32,
        /// Zero.
        pub pad: u32,
    }
}

table_type! {
    /// Key of what has no room in a socket's storage, once by what the process named and once by the endpoint.
    pub struct PeerKey {
        /// The socket's cookie.
        pub cookie: u64,
        /// The address.
        pub addr: Addr,
        /// The port.
        pub port: Port,
        /// Transport protocol.
        pub proto: Proto,
        /// 1 for an endpoint, 0 for what the process named.
        pub endpoint: u8,
        /// Zero.
        pub pad: u32,
    }
}

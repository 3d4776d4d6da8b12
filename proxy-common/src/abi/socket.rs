//! What a socket remembers about its Services: socket-local storage.

use super::table_type;
use crate::addr::{Addr, Port, Proto};

/// Services an unconnected UDP socket remembers at a time.
pub const SOCKET_ENTRIES: usize = 4;

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

table_type! {
    /// All a socket remembers. A TCP or connected UDP socket uses the first entry.
    pub struct SocketState {
        /// The entries.
        pub entries: [SocketEntry; SOCKET_ENTRIES],
        /// The entry to replace next.
        pub next: u32,
        /// Zero.
        pub pad: u32,
    }
}

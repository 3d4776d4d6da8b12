//! Ports for fragments that carry none: [`FragmentKey`] → [`Fragment`].

use super::table_type;
use crate::addr::{Addr, Port, Proto};

table_type! {
    /// A datagram in fragments, as seen at one hook (RFC 791 §3.2, RFC 8200 §4.5).
    pub struct FragmentKey {
        /// Source address.
        pub src: Addr,
        /// Destination address.
        pub dst: Addr,
        /// Identification; 16 bits of it in IPv4.
        pub id: u32,
        /// Transport protocol.
        pub proto: Proto,
        /// Zero.
        pub pad: [u8; 3],
    }
}

table_type! {
    /// What the first fragment said, or how often others have waited for it.
    pub struct Fragment {
        /// Source port.
        pub sport: Port,
        /// Destination port.
        pub dport: Port,
        /// How often a fragment has waited for the first one; 0 once that has come, and the ports count.
        pub waits: u32,
        /// When this was written.
        pub since: u64,
    }
}

//! The flow table: [`FlowKey`] → [`Flow`].
//!
//! A translated packet is seen under up to four tuples, and netfilter sees only the middle two:
//!
//! | leg | hook | tuple (source → destination) | what is rewritten |
//! |---|---|---|---|
//! | [`Leg::DNAT`] | ingress | client → VIP | destination := endpoint |
//! | [`Leg::SNAT`] | egress | client → endpoint | source := node address (only when masqueraded) |
//! | [`Leg::UNSNAT`] | ingress | endpoint → node address | destination := client (only when masqueraded) |
//! | [`Leg::UNDNAT`] | egress | endpoint → client | source := VIP |
//!
//! Each leg is found from any other: DNAT's value names the endpoint and the client port, so the SNAT key;
//! reversed that is the UNDNAT key, whose value names the VIP; SNAT's value names the node address, so the
//! UNSNAT key.

use super::table_type;
use crate::addr::{Addr, Port, Proto};

/// Which side of the node's stack a packet is at.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Hook(pub u8);

impl Hook {
    /// Before the stack: destinations are rewritten.
    pub const INGRESS: Self = Self(0);
    /// After the stack: sources are rewritten.
    pub const EGRESS: Self = Self(1);
}

/// Which of a flow's tuples an entry stands for.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Leg(pub u8);

impl Leg {
    /// Client → VIP, at ingress.
    pub const DNAT: Self = Self(1);
    /// Client → endpoint, at egress. A zero address means: masquerade, address not yet chosen.
    pub const SNAT: Self = Self(2);
    /// Endpoint → node address, at ingress.
    pub const UNSNAT: Self = Self(3);
    /// Endpoint → client, at egress.
    pub const UNDNAT: Self = Self(4);
}

table_type! {
    /// A packet's tuple at one hook.
    pub struct FlowKey {
        /// Source address.
        pub src: Addr,
        /// Destination address.
        pub dst: Addr,
        /// Source port; ICMP echo identifiers are never tracked.
        pub sport: Port,
        /// Destination port.
        pub dport: Port,
        /// Transport protocol.
        pub proto: Proto,
        /// Where the tuple is seen.
        pub hook: Hook,
        /// Zero.
        pub pad: u16,
    }
}

impl FlowKey {
    /// Becomes the tuple of the opposite direction, at the same hook; in place, since a copy takes stack.
    #[inline(always)]
    pub const fn turn(&mut self) {
        core::mem::swap(&mut self.src, &mut self.dst);
        core::mem::swap(&mut self.sport, &mut self.dport);
    }

    /// The tuple of the opposite direction, at `hook`.
    #[inline(always)]
    pub const fn reversed(&self, hook: Hook) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            proto: self.proto,
            hook,
            pad: 0,
        }
    }
}

table_type! {
    /// What to do with a packet of one tuple.
    pub struct Flow {
        /// Written over the destination (ingress) or the source (egress).
        pub addr: Addr,
        /// The port that goes with `addr`.
        pub port: Port,
        /// Written over the port of the other end; zero leaves it alone.
        pub other_port: Port,
        /// Which tuple of the flow this is.
        pub leg: Leg,
        /// TCP flags seen in packets of this tuple, or-ed together (RFC 9293 §3.1 bit positions).
        pub seen: u8,
        /// Zero.
        pub pad: u16,
        /// Index of the chosen backend.
        pub backend: u32,
        /// The backend's generation when it was chosen.
        pub generation: u32,
        /// Id of the Service port.
        pub service: u32,
        /// Zero.
        pub pad2: u32,
        /// When a packet of this tuple last passed.
        pub last_seen: u64,
    }
}

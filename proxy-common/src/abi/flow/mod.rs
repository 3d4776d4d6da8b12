//! Flows: [`Key`] of a [`Pair`] → [`Leg`] → [`Flow`].
//!
//! A translated packet is seen under up to three pairs of ends, and netfilter sees only the middle one:
//!
//! | leg | ends | at ingress | at egress |
//! |---|---|---|---|
//! | [`Role::OUTER`] | client ↔ Service | from the client: destination := endpoint | – |
//! | [`Role::MIDDLE`] | client ↔ endpoint | – | from the endpoint: source := Service; from the client, if masqueraded: source := node |
//! | [`Role::INNER`] | node ↔ endpoint, if masqueraded | from the endpoint: destination := client | – |
//!
//! A fourth role stands alone: [`Role::OWN`] marks a conversation of the node's own, in which nothing is
//! translated.
//!
//! The legs only point at the flow's record, which says everything about it. A leg counts while the record
//! carries the leg's id and is alive, or was in the running [`window`]: a flow is there as a whole or not at
//! all.

mod adopted;
pub mod ask;
mod key;
mod leg;
mod record;
mod timeouts;
mod tuple;

#[cfg(test)]
mod tests;

pub use key::{FilterPlace, Key, Secret};
pub use leg::{FlowId, Leg, Notes, window};
pub use record::{FORWARD, Flow, REPLY, SILENCE, State, TELL, flow_flags};
pub use timeouts::Timeouts;
pub use tuple::{Pair, Tuple};

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

/// Which of a flow's pairs of ends a leg stands for.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Role(pub u8);

impl Role {
    /// Client ↔ Service.
    pub const OUTER: Self = Self(0);
    /// Client ↔ endpoint.
    pub const MIDDLE: Self = Self(1);
    /// Node ↔ endpoint.
    pub const INNER: Self = Self(2);
    /// The node ↔ another end: not translated.
    pub const OWN: Self = Self(4);

    /// Which of [`Flow::pairs`] it is.
    #[inline(always)]
    #[must_use]
    pub const fn index(self) -> usize {
        // Two bits: the verifier follows a mask, and no remainder.
        match self.0 as usize & 3 {
            3 => 0,
            index => index,
        }
    }
}

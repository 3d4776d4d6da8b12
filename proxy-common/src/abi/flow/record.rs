//! The record of a flow: all there is to know about it.

use super::{FlowId, Leg, Notes, Pair, Role, Tuple};
#[cfg(feature = "next-layout")]
pub use crate::abi::next::Flow;
#[cfg(not(feature = "next-layout"))]
use crate::abi::table_type;
use crate::addr::{Addr, Port, Proto};

/// Where a flow is in its life.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct State(pub u8);

impl State {
    /// The record has never been used and is not in the queue of free ones yet.
    pub const NEW: Self = Self(0);
    /// No flow.
    pub const FREE: Self = Self(1);
    /// A flow whose packets are translated.
    pub const LIVE: Self = Self(2);
    /// Ended: its legs count no more and are about to be deleted.
    pub const ENDED: Self = Self(3);
    /// A connection that another proxy has begun, and that is still translated by netfilter: its packets
    /// pass. An answer that netfilter has not translated is.
    pub const LEFT: Self = Self(4);
    /// A TCP connection that has lost its endpoint, about which its ends are notified: who goes on gets a
    /// RST, for [`TELL`].
    pub const LOST: Self = Self(5);
}

/// Bits of [`Flow::flags`].
pub mod flow_flags {
    /// The source is rewritten when it leaves the node.
    pub const MASQUERADE: u8 = 1 << 0;
    /// A conversation of the node's own: nothing is translated.
    pub const OWN: u8 = 1 << 3;
    /// One that is not from a port of a Service: it stays displaceable for ever.
    pub const GUEST: u8 = 1 << 1;
    /// The endpoint's sequence numbers have been seen: `first` and `last` count.
    pub const WINDOW: u8 = 1 << 2;
    /// Another proxy has begun it: what its ends had acknowledged before is not known.
    pub const ADOPTED: u8 = 1 << 4;
    /// With that: its client is bound to its endpoint.
    pub const AFFINITY: u8 = 1 << 5;
    /// Its packets go to the endpoint's node wrapped, which answers the client itself (direct server return): answers
    /// do not pass here. There is the outer pair only; the middle one has the client, the node's address, and the
    /// endpoint's [hint](crate::wire::wrap::hint) as port.
    pub const DIRECT: u8 = 1 << 6;
}

/// How long an end must have been silent before what it did counts as its last word, in nanoseconds.
pub const SILENCE: u64 = 1_000_000_000;

/// How long the ends of a flow that has lost its endpoint are notified, in nanoseconds.
pub const TELL: u64 = 10_000_000_000;

/// Towards the endpoint: an index of [`Flow::seen`] and its like.
pub const FORWARD: usize = 0;
/// Towards the client.
pub const REPLY: usize = 1;

#[cfg(not(feature = "next-layout"))]
table_type! {
    /// All there is to know about a flow. Written by the program that opens it under its claim; afterwards
    /// each word has one writer, which is named.
    pub struct Flow {
        /// Which flow this is. Written when the record is made and when it is given back.
        pub id: FlowId,
        /// How many want to change the flow's legs or end it: the first one may (atomic additions only).
        pub claims: u64,
        /// When its legs were last looked after. The forward direction.
        pub checked: u64,
        /// When a packet of each direction that was no RST last passed, or up to a [`window`](super::window)
        /// before that; 0 for never. Each direction its own.
        pub seen: [u64; 2],
        /// Where it is in its life: who claims it.
        pub state: State,
        /// Bits of [`flow_flags`]. [`flow_flags::WINDOW`]: the reply direction.
        pub flags: u8,
        /// 0 while the flow is young, that is while its ends have not shown that they mean it, and a newer
        /// flow may displace it; then 1. The forward direction.
        pub old: u8,
        /// How many of `pairs` there are, the inner one not counted: 2, or 1 if the endpoint is the Service
        /// itself, packets are wrapped, or the flow is the node's own.
        pub legs: u8,
        /// At which place of each pair the end on the client's side stands.
        pub near: [u8; 3],
        /// 1 once a direction has sent a FIN; never taken back. Each direction its own.
        pub fin: [u8; 2],
        /// Zero.
        pub pad: [u8; 3],
        /// The uplink that the question came in by; 0 if it was none.
        pub uplink: u32,
        /// What each direction has last acknowledged; where it has a leg of its own, that one knows better.
        /// Each direction its own.
        pub acked: [u32; 2],
        /// The ends of the outer, middle and inner leg. The inner one: who claims it.
        pub pairs: [Pair; 3],
        /// The inner pair's seal, once it has been chosen: written after it (see [`Flow::has_source`]). Who
        /// claims it.
        pub source: u32,
        /// Id of the Service port.
        pub service: u32,
        /// Index of the chosen backend.
        pub backend: u32,
        /// The backend's generation when it was chosen.
        pub generation: u32,
        /// When each direction last reset the connection; 0 for never. Each direction its own.
        pub rst: [u64; 2],
        /// When the flow began.
        pub born: u64,
        /// The first sequence number of the endpoint's that the client can acknowledge. The reply direction,
        /// while young.
        pub first: u32,
        /// The last one. The reply direction, while young.
        pub last: u32,
        /// Of a flow with [`flow_flags::DIRECT`] the node that its packets go to: part of a
        /// [`TunnelKey`](crate::abi::TunnelKey). Who claims it.
        pub node: u32,
        /// Zero.
        pub spare: u32,
        /// Zero: a record begins where a cache line does, and its first one is all that a packet of an old
        /// flow needs.
        pub room: [u64; 2],
    }
}

/// Indices of [`Flow::pairs`].
pub(super) const OUTER: usize = Role::OUTER.index();
pub(super) const MIDDLE: usize = Role::MIDDLE.index();
pub(super) const INNER: usize = Role::INNER.index();

impl Flow {
    /// No flow in this record yet.
    pub const EMPTY: Self = Self {
        id: FlowId::NONE,
        claims: 0,
        service: 0,
        backend: 0,
        generation: 0,
        state: State::NEW,
        flags: 0,
        old: 0,
        legs: 0,
        seen: [0; 2],
        uplink: 0,
        source: 0,
        acked: [0; 2],
        near: [0; 3],
        fin: [0; 2],
        pad: [0; 3],
        pairs: [Pair::NONE; 3],
        rst: [0; 2],
        born: 0,
        checked: 0,
        first: 0,
        last: 0,
        node: 0,
        spare: 0,
        room: [0; 2],
        #[cfg(feature = "next-layout")]
        next: [0; 8],
    };

    /// Whether this is the flow `id`, and it has lost its endpoint.
    #[inline(always)]
    #[must_use]
    pub const fn is_lost(&self, id: FlowId) -> bool {
        self.id.0 == id.0 && self.state.0 == State::LOST.0
    }

    /// Whether this is the flow `id`, and netfilter translates its packets.
    #[inline(always)]
    #[must_use]
    pub const fn is_left(&self, id: FlowId) -> bool {
        self.id.0 == id.0 && self.state.0 == State::LEFT.0
    }

    /// Whether this is the flow `id`, and we or netfilter translate its packets.
    #[inline(always)]
    #[must_use]
    pub fn lives(&self, id: FlowId) -> bool {
        self.is(id) || self.is_left(id)
    }

    /// Whether this is the flow `id`, and its packets are translated.
    #[inline(always)]
    #[must_use]
    pub fn is(&self, id: FlowId) -> bool {
        self.id == id && self.state.0 == State::LIVE.0
    }

    /// Transport protocol.
    #[inline(always)]
    #[must_use]
    pub const fn proto(&self) -> Proto {
        self.pairs[OUTER].proto
    }

    /// The end of one of the pairs on the client's side, or the other one.
    #[inline(always)]
    #[must_use]
    pub const fn end(&self, pair: usize, near: bool) -> (&Addr, Port) {
        let place = (self.near[pair] ^ !near as u8) as usize & 1;
        (&self.pairs[pair].ends[place], self.pairs[pair].ports[place])
    }

    /// The client.
    #[inline(always)]
    #[must_use]
    pub const fn client(&self) -> (&Addr, Port) {
        self.end(OUTER, true)
    }

    /// The Service; of a conversation of the node's own the other end.
    #[inline(always)]
    #[must_use]
    pub const fn vip(&self) -> (&Addr, Port) {
        self.end(OUTER, false)
    }

    /// The endpoint.
    #[inline(always)]
    #[must_use]
    pub const fn endpoint(&self) -> (&Addr, Port) {
        self.end(MIDDLE, false)
    }

    /// The client's port towards the endpoint: another one than its own if that was taken.
    #[inline(always)]
    #[must_use]
    pub const fn middle_port(&self) -> Port {
        self.end(MIDDLE, true).1
    }

    /// The address and port that the client is masqueraded with; they count if [`Self::has_source`].
    #[inline(always)]
    #[must_use]
    pub const fn node(&self) -> (&Addr, Port) {
        self.end(INNER, true)
    }

    /// What each end of the flow is sent in the name of the other one: the client, and the endpoint.
    #[must_use]
    pub const fn between_ends(&self) -> (Tuple, Tuple) {
        let innermost = if self.has_source() { INNER } else { self.innermost().index() };
        let outer = self.pairs[OUTER].tuple(self.near[OUTER] as usize);
        (outer.reversed(), self.pairs[innermost].tuple(self.near[innermost] as usize))
    }

    /// Whether the flow is masqueraded.
    #[inline(always)]
    #[must_use]
    pub const fn is_masqueraded(&self) -> bool {
        self.flags & flow_flags::MASQUERADE != 0
    }

    /// Whether it is a conversation of the node's own, which has one pair only.
    #[inline(always)]
    #[must_use]
    pub const fn is_own(&self) -> bool {
        self.flags & flow_flags::OWN != 0
    }

    /// Whether its packets are wrapped and sent to the endpoint's node.
    #[inline(always)]
    #[must_use]
    pub const fn is_direct(&self) -> bool {
        self.flags & flow_flags::DIRECT != 0
    }

    /// Whether the endpoint has answered. Where answers do not pass here, the client has shown it by going on.
    #[inline(always)]
    #[must_use]
    pub const fn is_answered(&self) -> bool {
        self.seen[REPLY] != 0 || self.is_direct() && self.old != 0
    }

    /// Whether Service and endpoint are one, or packets are wrapped: nothing is translated, and there is only the outer
    /// pair.
    #[inline(always)]
    #[must_use]
    pub const fn is_identity(&self) -> bool {
        self.legs == 1
    }

    /// The leg that stands between client and endpoint.
    #[inline(always)]
    #[must_use]
    pub const fn innermost(&self) -> Role {
        if self.is_identity() { Role::OUTER } else { Role::MIDDLE }
    }

    /// Whether the masquerade address and port have been chosen. Half a choice does not fit its seal.
    #[inline(always)]
    #[must_use]
    pub const fn has_source(&self) -> bool {
        self.source != 0 && self.source == self.pairs[INNER].seal() | 1
    }

    /// The leg of a role, which its pair in this record leads to; not sealed yet.
    #[inline(always)]
    #[must_use]
    pub const fn leg(&self, role: Role) -> Leg {
        let mut leg = Leg::NONE;
        self.write_leg(role, &mut leg);
        leg
    }

    /// The same, written to its place.
    #[inline(always)]
    pub const fn write_leg(&self, role: Role, leg: &mut Leg) {
        let index = role.index();
        let own = self.client().1;
        let behind = if self.is_identity() { own } else { self.middle_port() };
        // The end that is written: the endpoint for the outer leg, the client for the inner one, else the
        // Service. An index and no choice of references, which would take the kernel's stack.
        let pair = matches!(role, Role::OUTER) as usize & !self.is_identity() as usize;
        let (addr, mut port) = self.end(pair & 1, matches!(role, Role::INNER));
        let [a, b, c, d] = addr.0;
        let acked = self.acked[if matches!(role, Role::MIDDLE) { REPLY } else { FORWARD }];
        let notes = Notes { asked: 0, acked };
        leg.upper = if addr.is_v4() { notes.word() } else { a as u64 | (b as u64) << 32 };
        leg.lower = c as u64 | (d as u64) << 32;
        let mut other_port = Port(0);
        match role {
            Role::INNER => port = behind,
            Role::OUTER if own.0 != behind.0 => other_port = behind,
            Role::MIDDLE if own.0 != behind.0 => other_port = own,
            _ => {}
        }
        leg.id = self.id;
        leg.rest = port.0 as u64
            | (other_port.0 as u64) << 16
            | (role.0 as u64) << 32
            | (self.near[index] as u64) << 40;
    }

    /// Whether the flow has a leg of this role (yet).
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, role: Role) -> bool {
        match role {
            Role::OUTER => !self.is_own(),
            Role::OWN => self.is_own(),
            Role::MIDDLE => self.legs > 1,
            _ => self.has_source(),
        }
    }

    /// When a packet last passed that was no RST.
    #[inline(always)]
    #[must_use]
    pub const fn last_seen(&self) -> u64 {
        if self.seen[FORWARD] > self.seen[REPLY] { self.seen[FORWARD] } else { self.seen[REPLY] }
    }

    /// When it was last reset.
    #[inline(always)]
    #[must_use]
    pub const fn last_reset(&self) -> u64 {
        if self.rst[FORWARD] > self.rst[REPLY] { self.rst[FORWARD] } else { self.rst[REPLY] }
    }

    /// Whether it has been reset. What was under way then may still pass; who goes on later has not been reset
    /// (RFC 5961 §3.2: a RST that does not fit is answered, and the connection stays).
    #[inline(always)]
    #[must_use]
    pub const fn is_reset(&self) -> bool {
        let reset = self.last_reset();
        reset != 0 && self.last_seen() < reset.saturating_add(SILENCE)
    }

    /// Whether the connection is closed, whoever asks: both ends have closed it, or it has been reset and
    /// there has been silence since. Only TCP says so.
    #[inline(always)]
    #[must_use]
    pub const fn is_closed(&self, now: u64) -> bool {
        self.fin[FORWARD] & self.fin[REPLY] != 0
            || self.is_reset() && now.saturating_sub(self.last_reset()) > SILENCE
    }

    /// Whether its client may use its port for a new connection to the same Service: a RST from either side,
    /// or a FIN of its own (P-26).
    #[inline(always)]
    #[must_use]
    pub const fn may_begin_anew(&self) -> bool {
        self.fin[FORWARD] != 0 || self.is_reset()
    }
}

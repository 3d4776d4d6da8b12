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
//! A fourth role stands alone: [`Role::OWN`] marks a conversation of the node's own, in which nothing is translated.
//!
//! The legs only point at the flow's record, which says everything about it. A leg counts while the record carries the
//! leg's id and is alive, or was in the running [`window`]: a flow is there as a whole or not at all.

#[cfg(feature = "next-layout")]
pub use super::next::{Flow, Leg};
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
    /// The node ↔ somebody: not translated.
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

table_type! {
    /// A packet's tuple: who sends to whom.
    pub struct Tuple {
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
        /// Zero.
        pub pad: [u8; 3],
    }
}

impl Tuple {
    /// From one end to the other.
    #[inline(always)]
    #[must_use]
    pub const fn new(src: Addr, sport: Port, dst: Addr, dport: Port, proto: Proto) -> Self {
        Self { src, dst, sport, dport, proto, pad: [0; 3] }
    }

    /// The tuple of the opposite direction.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self::new(self.dst, self.dport, self.src, self.sport, self.proto)
    }

    /// Whether the source is the lower of the two ends. The order is any that is the same everywhere: the last words
    /// come first because IPv4 addresses differ only there.
    #[inline(always)]
    #[must_use]
    pub const fn is_rising(&self) -> bool {
        let (s, d) = (&self.src.0, &self.dst.0);
        if s[3] != d[3] {
            s[3] < d[3]
        } else if s[2] != d[2] {
            s[2] < d[2]
        } else if s[1] != d[1] {
            s[1] < d[1]
        } else if s[0] != d[0] {
            s[0] < d[0]
        } else {
            self.sport.0 < self.dport.0
        }
    }

    /// Writes the two ends without direction to `pair`; says at which place the source is.
    #[inline(always)]
    pub const fn write_pair(&self, pair: &mut Pair) -> usize {
        let (s, d) = if self.is_rising() { (0, 1) } else { (1, 0) };
        pair.ends[s] = self.src;
        pair.ends[d] = self.dst;
        pair.ports[s] = self.sport;
        pair.ports[d] = self.dport;
        pair.proto = self.proto;
        pair.pad = [0; 3];
        s
    }

    /// The key of the two ends, which are of IPv4 or not, and at which place of their pair the source is.
    #[inline(always)]
    #[must_use]
    pub fn key<'s>(&self, v4: bool, secret: impl FnOnce() -> Option<&'s Secret>) -> (Key, usize) {
        if v4 {
            let (src, dst) = (end(self.src.word_v4(), self.sport), end(self.dst.word_v4(), self.dport));
            // Without a branch, which would be guessed wrong for every other packet: neither word has its highest bit set,
            // so the difference has it if the source is lower.
            let falls = (src.wrapping_sub(dst) >> 63) ^ 1;
            let exchange = (src ^ dst) & 0_u64.wrapping_sub(falls);
            (Key::v4(src ^ exchange, dst ^ exchange, self.proto), falls as usize)
        } else {
            let rises = self.is_rising();
            let (low, high) = if rises { (&self.src, &self.dst) } else { (&self.dst, &self.src) };
            let (low_port, high_port) =
                if rises { (self.sport, self.dport) } else { (self.dport, self.sport) };
            (Key::v6([low, high], [low_port, high_port], self.proto, secret), !rises as usize)
        }
    }

    /// The two ends without direction.
    #[must_use]
    pub const fn pair(&self) -> Pair {
        let mut pair = Pair::NONE;
        self.write_pair(&mut pair);
        pair
    }
}

table_type! {
    /// Two ends that talk, the lower one first: the same for both directions.
    pub struct Pair {
        /// The addresses.
        pub ends: [Addr; 2],
        /// The ports that go with them.
        pub ports: [Port; 2],
        /// Transport protocol.
        pub proto: Proto,
        /// Zero.
        pub pad: [u8; 3],
    }
}

impl Pair {
    /// Nobody.
    pub const NONE: Self =
        Self { ends: [Addr::ANY_V6; 2], ports: [Port(0); 2], proto: Proto(0), pad: [0; 3] };

    /// What the end at place `from` sends to the other one.
    #[inline(always)]
    #[must_use]
    pub const fn tuple(&self, from: usize) -> Tuple {
        let (from, to) = (from & 1, (from & 1) ^ 1);
        Tuple::new(self.ends[from], self.ports[from], self.ends[to], self.ports[to], self.proto)
    }

    /// A sum in which each word counts by its place: shifted, because the kernel's instructions have no rotation.
    #[inline(always)]
    #[must_use]
    pub const fn seal(&self) -> u32 {
        let (l, h) = (&self.ends[0].0, &self.ends[1].0);
        let ports = (self.ports[0].0 as u32) << 16 | self.ports[1].0 as u32;
        let low = l[3] ^ l[2] << 1 ^ l[1] << 2 ^ l[0] << 3;
        let high = h[3] << 4 ^ h[2] << 5 ^ h[1] << 6 ^ h[0] << 7;
        low ^ high ^ ports ^ (self.proto.0 as u32) << 24
    }

    /// What the pair is looked up by.
    #[inline(always)]
    #[must_use]
    pub fn key<'s>(&self, secret: impl FnOnce() -> Option<&'s Secret>) -> Key {
        let ([low, high], [low_port, high_port]) = (&self.ends, self.ports);
        if low.is_v4() {
            Key::v4(end(low.word_v4(), low_port), end(high.word_v4(), high_port), self.proto)
        } else {
            Key::v6([low, high], [low_port, high_port], self.proto, secret)
        }
    }
}

table_type! {
    /// What a [`Pair`] is looked up by: short, because hashing it is most of what a look-up costs. Of IPv4 it is the pair
    /// itself; of IPv6 the addresses are replaced by two sums over both of them, which nobody can foretell who does not
    /// know the node's [`Secret`].
    ///
    /// In words of 64 bits because a key is written right before it is read: a processor passes on what it has just
    /// written only if it is not read in larger pieces.
    pub struct Key {
        /// The lower end: its port; from the 16th bit its address, or a sum; from the 48th the transport protocol.
        pub low: u64,
        /// The higher end: likewise; from the 48th bit 1 for IPv6.
        pub high: u64,
    }
}

/// An end as a key has it. Ends of IPv4 are in the order of these words (see [`Tuple::is_rising`]).
#[inline(always)]
const fn end(word: u32, port: Port) -> u64 {
    (word as u64) << 16 | port.0 as u64
}

table_type! {
    /// Random numbers of the node's own, drawn when its tables are made. With such numbers two given pairs have the same
    /// two sums in one of 2^64 cases, whoever has chosen the pairs: a multilinear sum is strongly universal (Lemire and
    /// Kaser, "Strongly universal string hashing is fast", 2014, section 3).
    pub struct Secret {
        /// For each sum a start and a factor for each word of both addresses.
        pub factors: [[u64; 9]; 2],
    }
}

impl Secret {
    /// Not drawn yet.
    pub const NONE: Self = Self { factors: [[0; 9]; 2] };

    /// One of the two sums.
    #[inline(always)]
    const fn sum(&self, which: usize, low: &Addr, high: &Addr) -> u32 {
        let (f, l, h) = (&self.factors[which], &low.0, &high.0);
        let low = (l[0] as u64)
            .wrapping_mul(f[1])
            .wrapping_add((l[1] as u64).wrapping_mul(f[2]))
            .wrapping_add((l[2] as u64).wrapping_mul(f[3]))
            .wrapping_add((l[3] as u64).wrapping_mul(f[4]));
        let high = (h[0] as u64)
            .wrapping_mul(f[5])
            .wrapping_add((h[1] as u64).wrapping_mul(f[6]))
            .wrapping_add((h[2] as u64).wrapping_mul(f[7]))
            .wrapping_add((h[3] as u64).wrapping_mul(f[8]));
        (f[0].wrapping_add(low).wrapping_add(high) >> 32) as u32
    }
}

impl Key {
    /// Whether it is of IPv4.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.high >> 48 == 0
    }

    /// All bits, or none of IPv4.
    #[inline(always)]
    const fn if_v6(&self) -> u64 {
        0_u64.wrapping_sub(self.high >> 48)
    }

    #[inline(always)]
    const fn v4(low: u64, high: u64, proto: Proto) -> Self {
        Self { low: low | (proto.0 as u64) << 48, high }
    }

    #[inline(always)]
    fn v6<'s>(
        [low, high]: [&Addr; 2],
        [low_port, high_port]: [Port; 2],
        proto: Proto,
        secret: impl FnOnce() -> Option<&'s Secret>,
    ) -> Self {
        // The element is always there; a key without sums finds nothing.
        let (one, other) =
            secret().map_or((0, 0), |secret| (secret.sum(0, low, high), secret.sum(1, low, high)));
        let key = Self::v4(end(one, low_port), end(other, high_port), proto);
        Self { high: key.high | 1 << 48, ..key }
    }
}

/// What names a flow for ever: the index of its record in the low half, and how often the record has been used in the
/// high half.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FlowId(pub u64);

impl FlowId {
    /// No flow: index 0 is never used.
    pub const NONE: Self = Self(0);

    /// Where the record is.
    #[inline(always)]
    #[must_use]
    pub const fn index(self) -> u32 {
        self.0 as u32
    }

    /// The id of the next flow in the same record.
    #[inline(always)]
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.wrapping_add(1 << 32))
    }
}

#[cfg(not(feature = "next-layout"))]
table_type! {
    /// Where a pair of ends leads, and what is written over a packet there: everything that a packet of an old flow needs,
    /// so that it reads little of the record.
    pub struct Leg {
        /// The flow.
        pub id: FlowId,
        /// Of IPv6 the first half of the address that is written over the destination (ingress) or the source (egress). Of
        /// IPv4, whose addresses do without, [`Notes`]: the leg has to fit into few cache lines.
        pub upper: u64,
        /// The second half.
        pub lower: u64,
        /// The port that goes with it; from the 16th bit the port that is written over that of the other end (zero leaves
        /// it alone); from the 32nd which of its pairs this is; from the 40th at which place of the pair the end on the
        /// client's side (client or node) stands; from the 48th the seal, see [`Leg::is_of`].
        pub rest: u64,
    }
}

/// What packets write in place at a leg of IPv4.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Notes {
    /// In which [`window`] the record has said that an old flow goes on here.
    pub asked: u32,
    /// What the direction that counts at this leg has last acknowledged; only of TCP, and nothing at an inner leg.
    pub acked: u32,
}

impl Notes {
    /// As they stand in the leg.
    #[inline(always)]
    #[must_use]
    pub const fn word(self) -> u64 {
        self.asked as u64 | (self.acked as u64) << 32
    }
}

/// The clock in steps of 2^26 ns (67 ms): for the rest of one of them a leg speaks for its record (see [`Notes::asked`]).
#[inline(always)]
#[must_use]
pub const fn window(now: u64) -> u32 {
    (now >> 26) as u32
}

impl Leg {
    /// Nothing.
    pub const NONE: Self = Self {
        id: FlowId::NONE,
        upper: 0,
        lower: 0,
        rest: 0,
        #[cfg(feature = "next-layout")]
        next: 0,
    };

    /// The address that is written, of a leg of IPv4 or not.
    #[inline(always)]
    #[must_use]
    pub const fn addr(&self, v4: bool) -> Addr {
        let (upper, lower) = (self.upper, self.lower);
        if v4 {
            Addr::v4((lower >> 32) as u32)
        } else {
            Addr([upper as u32, (upper >> 32) as u32, lower as u32, (lower >> 32) as u32])
        }
    }

    /// What packets have written, of a leg of IPv4.
    #[inline(always)]
    #[must_use]
    pub const fn notes(&self) -> Notes {
        Notes { asked: self.upper as u32, acked: (self.upper >> 32) as u32 }
    }

    /// The port that goes with it.
    #[inline(always)]
    #[must_use]
    pub const fn port(&self) -> Port {
        Port(self.rest as u16)
    }

    /// Written over the port of the other end; zero leaves it alone.
    #[inline(always)]
    #[must_use]
    pub const fn other_port(&self) -> Port {
        Port((self.rest >> 16) as u16)
    }

    /// Which of its pairs this is.
    #[inline(always)]
    #[must_use]
    pub const fn role(&self) -> Role {
        Role((self.rest >> 32) as u8)
    }

    /// At which place of the pair the end on the client's side (client or node) stands.
    #[inline(always)]
    #[must_use]
    pub const fn near(&self) -> usize {
        (self.rest >> 40) as u8 as usize
    }

    /// Whether the leg was read whole and stands at `key`. A hash map may hand the memory of a deleted value to another
    /// key while a program still reads it, so the value carries a sum over its key and what never changes in it.
    #[inline(always)]
    #[must_use]
    pub const fn is_of(&self, key: &Key) -> bool {
        self.rest >> SEAL_AT == self.seal_at(key)
    }

    /// The leg as it stands at `key`.
    #[inline(always)]
    #[must_use]
    pub const fn sealed(mut self, key: &Key) -> Self {
        self.seal(key);
        self
    }

    /// The same in its place.
    #[inline(always)]
    pub const fn seal(&mut self, key: &Key) {
        self.rest = self.rest & UNSEALED | self.seal_at(key) << SEAL_AT;
    }

    /// A sum in which each word counts by its place, folded: its low bits know nothing of the high bits of the words, nor
    /// the high ones of the low ones.
    #[inline(always)]
    const fn seal_at(&self, key: &Key) -> u64 {
        let own = self
            .id
            .0
            .wrapping_mul(0x51ed_270b)
            .wrapping_add((self.upper & key.if_v6()).wrapping_mul(0x2c1b_3c6d))
            .wrapping_add(self.lower.wrapping_mul(0x7feb_352d))
            .wrapping_add((self.rest & UNSEALED).wrapping_mul(0x68e3_1da5));
        let keys = key.low.wrapping_mul(0x297a_2d39).wrapping_add(key.high.wrapping_mul(0x3c6e_f373));
        let sum = own.wrapping_add(keys);
        let half = sum ^ sum >> 32;
        (half ^ half >> 16) & 0xffff
    }
}

/// Where the seal begins in [`Leg::rest`].
const SEAL_AT: u32 = 48;
/// The rest of it.
const UNSEALED: u64 = (1 << SEAL_AT) - 1;

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
    /// Over: its legs count no more and are about to be deleted.
    pub const ENDED: Self = Self(3);
    /// A connection that another proxy has begun, and that is still translated by netfilter: its packets pass. An answer that
    /// netfilter has not translated is.
    pub const LEFT: Self = Self(4);
    /// A TCP connection that has lost its endpoint, about which its ends are to be told: who goes on is answered with a RST, for
    /// [`TELL`].
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
}

/// How long an end must have been silent before what it did counts as its last word, in nanoseconds.
pub const SILENCE: u64 = 1_000_000_000;

/// How long the ends of a flow that has lost its endpoint are told so, in nanoseconds.
pub const TELL: u64 = 10_000_000_000;

/// Towards the endpoint: an index of [`Flow::seen`] and its like.
pub const FORWARD: usize = 0;
/// Towards the client.
pub const REPLY: usize = 1;

#[cfg(not(feature = "next-layout"))]
table_type! {
    /// All there is to know about a flow. Written by the program that opens it under its claim; afterwards each word has
    /// one writer, which is named.
    pub struct Flow {
        /// Which flow this is. Written when the record is made and when it is given back.
        pub id: FlowId,
        /// How many want to change the flow's legs or end it: the first one may (atomic additions only).
        pub claims: u64,
        /// When its legs were last looked after. The forward direction.
        pub checked: u64,
        /// When a packet of each direction that was no RST last passed, or up to a [`window`] before that; 0 for never. Each
        /// direction its own.
        pub seen: [u64; 2],
        /// Where it is in its life: who claims it.
        pub state: State,
        /// Bits of [`flow_flags`]. [`flow_flags::WINDOW`]: the reply direction.
        pub flags: u8,
        /// 0 while the flow is young, that is while its ends have not shown that they mean it, and a newer flow may
        /// displace it; then 1. The forward direction.
        pub old: u8,
        /// How many of `pairs` there are, the inner one not counted: 2, or 1 if the endpoint is the Service itself, or the
        /// flow the node's own.
        pub legs: u8,
        /// At which place of each pair the end on the client's side stands.
        pub near: [u8; 3],
        /// 1 once a direction has sent a FIN; never taken back. Each direction its own.
        pub fin: [u8; 2],
        /// Zero.
        pub pad: [u8; 3],
        /// The uplink that the question came in by; 0 if it was none.
        pub uplink: u32,
        /// What each direction has last acknowledged; where it has a leg of its own, that one knows better. Each direction
        /// its own.
        pub acked: [u32; 2],
        /// The ends of the outer, middle and inner leg. The inner one: who claims it.
        pub pairs: [Pair; 3],
        /// The inner pair's seal, once it has been chosen: written after it (see [`Flow::has_source`]). Who claims it.
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
        /// The first sequence number of the endpoint's that the client can acknowledge. The reply direction, while young.
        pub first: u32,
        /// The last one. The reply direction, while young.
        pub last: u32,
        /// Zero: a record begins where a cache line does, and its first one is all that a packet of an old flow needs.
        pub room: [u64; 3],
    }
}

/// Indices of [`Flow::pairs`].
const OUTER: usize = Role::OUTER.index();
const MIDDLE: usize = Role::MIDDLE.index();
const INNER: usize = Role::INNER.index();

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
        room: [0; 3],
        #[cfg(feature = "next-layout")]
        next: [0; 8],
    };

    /// A connection from `client` to a Service (`asked`) that another proxy has led to `endpoint`, under the address and port
    /// `source` if it has masqueraded it: left to netfilter for now. `meant` says that both ends have shown that they mean it.
    #[must_use]
    pub const fn adopted(
        asked: &Tuple,
        endpoint: (Addr, Port),
        source: Option<(Addr, Port)>,
        [service, backend, generation]: [u32; 3],
        (answered, meant): (bool, bool),
        now: u64,
    ) -> Self {
        let mut flow = Self::EMPTY;
        let ((client, port), (to, to_port)) = ((asked.src, asked.sport), endpoint);
        let middle = Tuple::new(client, port, to, to_port, asked.proto);
        flow.near[OUTER] = asked.write_pair(&mut flow.pairs[OUTER]) as u8;
        flow.near[MIDDLE] = middle.write_pair(&mut flow.pairs[MIDDLE]) as u8;
        flow.flags = flow_flags::ADOPTED;
        if let Some((addr, port)) = source {
            let inner = Tuple::new(addr, port, to, to_port, asked.proto);
            flow.near[INNER] = inner.write_pair(&mut flow.pairs[INNER]) as u8;
            flow.flags |= flow_flags::MASQUERADE;
            flow.source = flow.pairs[INNER].seal() | 1;
        }
        (flow.service, flow.backend, flow.generation) = (service, backend, generation);
        flow.state = State::LEFT;
        (flow.old, flow.legs) = (meant as u8, 2);
        (flow.seen, flow.born, flow.checked) = ([now, if answered { now } else { 0 }], now, now);
        flow
    }

    /// The same of a connection that stays with netfilter, because another one has the same ends between client and endpoint, and
    /// netfilter tells them apart: nobody looks for it there.
    #[must_use]
    pub const fn known_by_its_service(mut self) -> Self {
        if !self.has_source() {
            (self.near[INNER], self.pairs[INNER]) = (self.near[MIDDLE], self.pairs[MIDDLE]);
            self.flags |= flow_flags::MASQUERADE;
            self.source = self.pairs[INNER].seal() | 1;
        }
        self
    }

    /// A connection that is translated by nobody, from one end to the other, and has lost the endpoint that it was given when
    /// its socket connected; `answered` unless it is still trying to.
    #[must_use]
    pub const fn lost(
        tuple: &Tuple,
        [service, backend, generation]: [u32; 3],
        answered: bool,
        now: u64,
    ) -> Self {
        let mut flow = Self::EMPTY;
        flow.near[OUTER] = tuple.write_pair(&mut flow.pairs[OUTER]) as u8;
        (flow.service, flow.backend, flow.generation) = (service, backend, generation);
        (flow.state, flow.old, flow.legs) = (State::LOST, 1, 1);
        (flow.seen, flow.born, flow.checked) = ([now, if answered { now } else { 0 }], now, now);
        flow
    }

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

    /// Whether this is the flow `id`, and somebody translates its packets.
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

    /// Whether Service and endpoint are one: nothing is translated, and there is only the outer pair.
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
        // The end that is written: the endpoint for the outer leg, the client for the inner one, else the Service. An
        // index and no choice of references, which would take the kernel's stack.
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

    /// Whether the connection is over, whoever asks: both ends have closed it, or it has been reset and there has been
    /// silence since. Only TCP tells.
    #[inline(always)]
    #[must_use]
    pub const fn is_over(&self, now: u64) -> bool {
        self.fin[FORWARD] & self.fin[REPLY] != 0
            || self.is_reset() && now.saturating_sub(self.last_reset()) > SILENCE
    }

    /// Whether its client may use its port for a new connection to the same Service: a RST from either side, or a FIN
    /// of its own (P-26).
    #[inline(always)]
    #[must_use]
    pub const fn may_begin_anew(&self) -> bool {
        self.fin[FORWARD] != 0 || self.is_reset()
    }
}

table_type! {
    /// How long a flow may be silent, in seconds (D-6, C-16).
    pub struct Timeouts {
        /// TCP, open.
        pub tcp_established: u32,
        /// TCP, one direction closed.
        pub tcp_half_closed: u32,
        /// TCP, both directions closed.
        pub tcp_closed: u32,
        /// TCP, reset.
        pub tcp_reset: u32,
        /// TCP, young: the client has not acknowledged the endpoint.
        pub tcp_syn: u32,
        /// UDP, young.
        pub udp: u32,
        /// UDP, old: traffic both ways after two seconds.
        pub udp_stream: u32,
        /// SCTP, old: its shutdown is not followed.
        pub sctp_established: u32,
        /// SCTP, young.
        pub sctp_init: u32,
        /// Zero.
        pub pad: u32,
    }
}

impl Timeouts {
    /// As the numbers that the agent tells the program which sweeps, in the order of the fields.
    #[must_use]
    pub const fn words(&self) -> [u32; 10] {
        [
            self.tcp_established,
            self.tcp_half_closed,
            self.tcp_closed,
            self.tcp_reset,
            self.tcp_syn,
            self.udp,
            self.udp_stream,
            self.sctp_established,
            self.sctp_init,
            self.pad,
        ]
    }

    /// What [`Self::words`] tells.
    #[must_use]
    #[inline(always)]
    pub const fn from_words(words: [u32; 10]) -> Self {
        let [tcp_established, tcp_half_closed, tcp_closed, tcp_reset, tcp_syn, ..] = words;
        let [.., udp, udp_stream, sctp_established, sctp_init, pad] = words;
        Self {
            tcp_established,
            tcp_half_closed,
            tcp_closed,
            tcp_reset,
            tcp_syn,
            udp,
            udp_stream,
            sctp_established,
            sctp_init,
            pad,
        }
    }

    /// The defaults of the kernel's connection tracking, except that an open TCP connection is kept for a day.
    pub const CONNTRACK: Self = Self {
        tcp_established: 86_400,
        tcp_half_closed: 3_600,
        tcp_closed: 120,
        tcp_reset: 10,
        tcp_syn: 60,
        udp: 30,
        udp_stream: 120,
        sctp_established: 86_400,
        sctp_init: 60,
        pad: 0,
    };

    /// Seconds of silence that end a flow.
    #[inline(always)]
    #[must_use]
    pub const fn idle(&self, flow: &Flow) -> u32 {
        let young = flow.old == 0;
        let fins = flow.fin[FORWARD] + flow.fin[REPLY];
        match flow.proto() {
            Proto::TCP if flow.is_reset() => self.tcp_reset,
            Proto::TCP if fins > 1 => self.tcp_closed,
            Proto::TCP if young => self.tcp_syn,
            Proto::TCP if fins == 1 => self.tcp_half_closed,
            Proto::TCP => self.tcp_established,
            Proto::SCTP if young => self.sctp_init,
            Proto::SCTP => self.sctp_established,
            _ if young => self.udp,
            _ => self.udp_stream,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self::CONNTRACK
    }
}

/// What the agent asks of the program `flows`, as bytes behind an Ethernet header: which work, its two numbers, and what goes
/// with it: the [`Timeouts`], ids, or a record. All words are in host order.
pub mod ask {
    /// Look through the records from the first number on, as many as the second says (at most [`MOST`]): free those that
    /// are new, take apart those that are over. The answer is how many were taken apart.
    pub const SWEEP: u32 = 1;
    /// Take apart the flows whose ids follow; the first number says how many (at most [`MOST_IDS`]). The answer is how
    /// many there were.
    pub const END: u32 = 2;
    /// Make a flow of the record that follows, but for its first [`RECORD_AT`] bytes, which are the record's own. The answer is
    /// its index; 0 if a flow of ours has its outer pair and is newer, or [`NO_ROOM`].
    pub const ADOPT: u32 = 3;
    /// See [`ADOPT`].
    pub const NO_ROOM: u32 = u32::MAX - 1;
    /// With an index: it had been adopted before.
    pub const KNOWN: u32 = 1 << 30;
    /// With an index: another flow has its middle pair, so it can only stay with netfilter.
    pub const ALONE: u32 = 1 << 29;
    /// The flow that has been adopted, whose id is both numbers (the lower half first), is translated by us from now on. The
    /// answer is 1 if it is.
    pub const TAKE: u32 = 4;
    /// The flows whose ids follow have lost their endpoint, and are to be reset if they are TCP's and have been answered; the
    /// first number says how many (at most [`MOST_IDS`]). What their ends have last acknowledged is written to their records.
    /// The answer is how many there were.
    pub const LOSE: u32 = 5;
    /// Make a flow of the record that follows, which comes from other tables, like [`ADOPT`]. If the first number is 1, who
    /// has one of its pairs here makes room: it is what the other tables had before. The answer is that of [`ADOPT`].
    pub const CARRY: u32 = 6;
    /// Count what other tables have counted since they were copied: the first number says which counter (a
    /// [`Reason`](crate::abi::Reason), or [`STATS`] plus four times the id of a Service port plus 0 to 2 for those of its
    /// [`ServiceStats`](crate::abi::ServiceStats), in their order); how often follows, in 64 bits. Whoever counts at the same moment
    /// loses nothing.
    pub const COUNT: u32 = 7;
    /// See [`COUNT`].
    pub const STATS: u32 = 1 << 16;
    /// Where the record's own part ends: identity and claims.
    pub const RECORD_AT: usize = 16;
    /// Where the question begins.
    pub const OFFSET: usize = 16;
    /// Where that begins.
    pub const BODY: usize = 32;
    /// Records one sweep looks at.
    pub const MOST: u32 = 512;
    /// Flows that are ended at once.
    pub const MOST_IDS: u32 = 64;
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::testing::SECRET;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn both_directions_have_one_pair() {
        let ends = [("10.0.0.1", 80), ("10.0.0.1", 81), ("10.0.0.2", 80), ("fd00::1", 80), ("fd01::1", 80)];
        for (a, p) in ends {
            for (b, q) in ends {
                let there = Tuple::new(addr(a), Port::new(p), addr(b), Port::new(q), Proto::TCP);
                let back = there.reversed();
                assert_eq!(there.pair(), back.pair(), "{a}:{p} {b}:{q}");
                assert_eq!(there.is_rising() == back.is_rising(), there == back, "{a}:{p} {b}:{q}");
                let from = usize::from(!there.is_rising());
                assert_eq!(there.pair().tuple(from), there);
            }
        }
    }

    fn some_tuples() -> Vec<Tuple> {
        let ends = ["10.0.0.1", "10.0.0.2", "10.1.0.1", "192.168.0.1", "255.255.255.255"];
        let ends6 = ["::1:0:0:1", "fd00::1", "fd00::2", "fd00:0:0:1::1", "fd00:1::1", "2001:db8::ffff:a00:1"];
        let ports = [0, 1, 80, 256, 65_535];
        let mut tuples = Vec::new();
        for family in [&ends[..], &ends6[..]] {
            for (a, b) in family.iter().flat_map(|a| family.iter().map(move |b| (a, b))) {
                for (p, q) in ports.iter().flat_map(|p| ports.iter().map(move |q| (p, q))) {
                    for proto in [Proto::TCP, Proto::UDP] {
                        tuples.push(Tuple::new(addr(a), Port::new(*p), addr(b), Port::new(*q), proto));
                    }
                }
            }
        }
        tuples
    }

    #[test]
    fn a_packet_finds_the_key_of_its_pair_and_no_other() {
        let mut keys = std::collections::HashMap::new();
        for tuple in some_tuples() {
            let pair = tuple.pair();
            let (key, source) = tuple.key(tuple.src.is_v4(), || Some(&SECRET));
            assert_eq!(key, pair.key(|| Some(&SECRET)), "{tuple:?}");
            assert_eq!(pair.tuple(source), tuple);
            assert_eq!(*keys.entry(key).or_insert(pair), pair, "two pairs have one key");
        }
        // Another node's keys of IPv6 are others.
        let mut other = SECRET;
        other.factors[1][0] ^= 1 << 40;
        let pair = some_tuples().pop().unwrap().pair();
        assert_ne!(pair.key(|| Some(&SECRET)), pair.key(|| Some(&other)));
    }

    #[test]
    fn a_leg_that_is_half_another_one_is_none() {
        let words = |leg: &Leg| [leg.id.0, leg.upper, leg.lower, leg.rest];
        let tuples = some_tuples();
        let (mut mixed, mut taken) = (0, 0);
        // Legs as alike as they come: of neighbouring records, that differ in an address or a port.
        for (n, pair) in tuples.windows(2).enumerate() {
            let leg = |n: usize, tuple: &Tuple| {
                let [a, b, c, d] = tuple.dst.0.map(u64::from);
                // What packets have noted is theirs.
                let upper = if tuple.dst.is_v4() { 0 } else { a | b << 32 };
                let (id, lower, rest) = (FlowId(n as u64).next(), c | d << 32, u64::from(tuple.dport.0));
                let key = tuple.pair().key(|| Some(&SECRET));
                (Leg { id, upper, lower, rest }.sealed(&key), key)
            };
            let ((one, key), (other, other_key)) = (leg(n, &pair[0]), leg(n + 1, &pair[1]));
            assert!(one.is_of(&key) && other.is_of(&other_key));
            for mask in 1..16 {
                let mut mix = words(&one);
                (0..4).filter(|bit| mask >> bit & 1 != 0).for_each(|bit| mix[bit] = words(&other)[bit]);
                let mix = Leg { id: FlowId(mix[0]), upper: mix[1], lower: mix[2], rest: mix[3] };
                if mix != one && key != other_key {
                    mixed += 1;
                    taken += usize::from(mix.is_of(&key));
                }
            }
        }
        assert!(mixed > 10_000 && taken < mixed / 10_000, "{taken} of {mixed} were taken for whole ones");
    }

    #[test]
    fn half_a_masquerade_choice_reads_as_none() {
        let pair =
            Tuple::new(addr("10.0.0.1"), Port::new(4000), addr("10.0.0.9"), Port::new(80), Proto::TCP).pair();
        let mut flow = Flow { source: pair.seal() | 1, ..Flow::EMPTY };
        assert!(!flow.has_source());
        flow.pairs[2] = pair;
        assert!(flow.has_source());
        flow.pairs[2].ports[0] = Port::new(4001);
        assert!(!flow.has_source());
        assert!(!Flow::EMPTY.has_source());
    }
}

//! Signposts from a pair of ends to the record of its flow.

use super::{Key, Role};
#[cfg(feature = "next-layout")]
pub use crate::abi::next::Leg;
#[cfg(not(feature = "next-layout"))]
use crate::abi::table_type;
use crate::addr::{Addr, Port};

/// What names a flow for ever: the index of its record in the low half, and how often the record has been
/// used in the high half.
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
    /// Where a pair of ends leads, and what is written over a packet there: everything that a packet of an
    /// old flow needs, so that it reads little of the record.
    pub struct Leg {
        /// The flow.
        pub id: FlowId,
        /// Of IPv6 the first half of the address that is written over the destination (ingress) or the source
        /// (egress). Of IPv4, whose addresses do without, [`Notes`]: the leg has to fit into few cache lines.
        pub upper: u64,
        /// The second half.
        pub lower: u64,
        /// The port that goes with it; from the 16th bit the port that is written over that of the other end
        /// (zero leaves it alone); from the 32nd which of its pairs this is; from the 40th at which place of
        /// the pair the end on the client's side (client or node) stands; from the 48th the seal, see
        /// [`Leg::is_of`].
        pub rest: u64,
    }
}

/// What packets write in place at a leg of IPv4.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Notes {
    /// In which [`window`] the record has said that an old flow goes on here.
    pub asked: u32,
    /// What the direction that counts at this leg has last acknowledged; of TCP, and nothing at an inner leg. At an
    /// outer leg of UDP, which acknowledges nothing, the index of the flow's backend.
    pub acked: u32,
}

impl Notes {
    /// The backend that an outer leg of UDP leads to.
    #[inline(always)]
    #[must_use]
    pub const fn backend(self) -> u32 {
        self.acked
    }

    /// The same of an outer leg of UDP that leads to a backend.
    #[inline(always)]
    #[must_use]
    pub const fn bound_to(self, backend: u32) -> Self {
        Self { acked: backend, ..self }
    }

    /// As they stand in the leg.
    #[inline(always)]
    #[must_use]
    pub const fn word(self) -> u64 {
        self.asked as u64 | (self.acked as u64) << 32
    }
}

/// The clock in steps of 2^26 ns (67 ms), where it is not counted in ticks of the kernel: for the rest of one of them a leg speaks for its record (see
/// [`Notes::asked`]).
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

    /// Written over the port of the other end; zero keeps it.
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

    /// Whether the leg was read whole and stands at `key`. A hash map may hand the memory of a deleted value
    /// to another key while a program still reads it, so the value carries a sum over its key and what never
    /// changes in it.
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

    /// A sum in which each word counts by its place, folded: its low bits know nothing of the high bits of
    /// the words, nor the high ones of the low ones.
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

//! What a pair of ends is looked up by.

use crate::abi::{capacity, table_type};
use crate::addr::{Addr, Port, Proto};

table_type! {
    /// What a [`Pair`](super::Pair) is looked up by: short, because hashing it is most of what a look-up
    /// costs. Of IPv4 it is the pair itself; of IPv6 the addresses are replaced by two sums over both of
    /// them, which nobody can foretell who does not know the node's [`Secret`].
    ///
    /// In words of 64 bits because a key is written right before it is read: a processor passes on what it
    /// has just written only if it is not read in larger pieces.
    pub struct Key {
        /// The lower end: its port; from the 16th bit its address, or a sum; from the 48th the transport
        /// protocol.
        pub low: u64,
        /// The higher end: likewise; from the 48th bit 1 for IPv6.
        pub high: u64,
    }
}

/// An end as a key has it. Ends of IPv4 are in the order of these words (see
/// [`Tuple::is_rising`](super::Tuple::is_rising)).
#[inline(always)]
pub(super) const fn end(word: u32, port: Port) -> u64 {
    (word as u64) << 16 | port.0 as u64
}

table_type! {
    /// Random numbers of the node's own, drawn when its tables are made. With such numbers two given pairs
    /// have the same two sums in one of 2^64 cases, whoever has chosen the pairs: a multilinear sum is
    /// strongly universal (Lemire and Kaser, "Strongly universal string hashing is fast", 2014, section 3).
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

/// Where the legs of a key are counted in FLOW_FILTER: in a byte of a word, so that the tables of a busy node still
/// lie in a processor's second cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FilterPlace {
    /// The word.
    pub word: u32,
    /// How far up in it the byte begins, in bits.
    pub shift: u32,
}

/// Places in FLOW_FILTER, as a power of two: as many as legs by default. With a hundred times as many legs, which is the
/// most that the agent allows, 256 in one place, which a byte cannot hold, are still out of the question.
const FILTER_BITS: u32 = 19;
const _: () = assert!(1 << FILTER_BITS == capacity::FLOW_FILTER * 8);

impl FilterPlace {
    /// One leg, as it is added to the word.
    #[inline(always)]
    #[must_use]
    pub const fn one(&self) -> i64 {
        1 << self.shift
    }

    /// Whether any leg is counted.
    #[inline(always)]
    #[must_use]
    pub const fn is_taken(&self, word: u64) -> bool {
        word >> self.shift & 0xff != 0
    }
}

impl Key {
    /// Whether it is of IPv4.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.high >> 48 == 0
    }

    /// Its place in [`FLOW_FILTER`](crate::abi::maps::FLOW_FILTER): the upper bits of a multilinear sum, as above, so that
    /// nobody can choose pairs that share a place.
    #[inline(always)]
    #[must_use]
    pub const fn place(&self, secret: &Secret) -> FilterPlace {
        let f = &secret.factors[0];
        let low =
            (self.low as u32 as u64).wrapping_mul(f[1]).wrapping_add((self.low >> 32).wrapping_mul(f[2]));
        let high =
            (self.high as u32 as u64).wrapping_mul(f[3]).wrapping_add((self.high >> 32).wrapping_mul(f[4]));
        let place = f[0].wrapping_add(low).wrapping_add(high) >> (64 - FILTER_BITS);
        FilterPlace { word: (place >> 3) as u32, shift: (place as u32 & 7) * 8 }
    }

    /// All bits, or none of IPv4.
    #[inline(always)]
    pub(super) const fn if_v6(&self) -> u64 {
        0_u64.wrapping_sub(self.high >> 48)
    }

    #[inline(always)]
    pub(super) const fn v4(low: u64, high: u64, proto: Proto) -> Self {
        Self { low: low | (proto.0 as u64) << 48, high }
    }

    #[inline(always)]
    pub(super) fn v6<'s>(
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

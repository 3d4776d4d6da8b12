//! Who sends to whom, and the two ends without direction.

use super::key::{Key, Secret, end};
use crate::abi::table_type;
use crate::addr::{Addr, Port, Proto};

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

    /// Whether the source is the lower of the two ends. The order is any that is the same everywhere: the
    /// last words come first because IPv4 addresses differ only there.
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
            // Without a branch, which would be guessed wrong for every other packet: neither word has its
            // highest bit set, so the difference has it if the source is lower.
            let falls = (src.wrapping_sub(dst) >> 63) ^ 1;
            let exchange = (src ^ dst) & 0_u64.wrapping_sub(falls);
            (Key::v4(src ^ exchange, dst ^ exchange, self.proto), falls as usize)
        } else {
            let rises = self.is_rising();
            let (low, high) = if rises { (&self.src, &self.dst) } else { (&self.dst, &self.src) };
            let (low_port, high_port) =
                if rises { (self.sport, self.dport) } else { (self.dport, self.sport) };
            (Key::v6([low, high], [low_port, high_port], self.proto, secret), usize::from(!rises))
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

//! What an address and port mean: [`FrontendKey`] → [`Frontend`].

#[cfg(feature = "next-layout")]
pub use super::next::Frontend;
use super::table_type;
use crate::addr::{Addr, Port, Proto};

/// A ClusterIP; otherwise an external destination (NodePort, external IP, load-balancer IP).
pub const INTERNAL: u32 = 1 << 0;
/// The traffic policy that applies to this destination is `Local` (P-9).
pub const LOCAL: u32 = 1 << 1;
/// Some endpoint in the cluster could serve: an empty set drops instead of rejecting (P-8, P-14…P-16).
pub const ANY: u32 = 1 << 2;
/// Session affinity `ClientIP`.
pub const AFFINITY: u32 = 1 << 3;
/// Only sources listed in `SOURCES` may open a flow (V-17).
pub const SOURCE_RANGES: u32 = 1 << 4;
/// Stands for a NodePort, under the wildcard address of its family.
pub const NODE_PORT: u32 = 1 << 5;
/// Direct server return: what comes from outside for an endpoint on another node goes there wrapped, and the answers
/// leave from that node, where a [`Tunnel`](super::Tunnel) leads there. Such a frontend has its local run filled, for
/// what comes wrapped.
pub const DSR: u32 = 1 << 6;

table_type! {
    /// A destination as a packet or a socket names it. NodePorts stand under [`Addr::wildcard`].
    pub struct FrontendKey {
        /// Destination address.
        pub addr: Addr,
        /// Destination port.
        pub port: Port,
        /// Transport protocol.
        pub proto: Proto,
        /// Zero.
        pub pad: u8,
    }
}

impl FrontendKey {
    /// The key for a destination.
    #[inline(always)]
    pub const fn new(addr: Addr, port: Port, proto: Proto) -> Self {
        Self { addr, port, proto, pad: 0 }
    }
}

table_type! {
    /// A contiguous run in `SLOTS`.
    pub struct Run {
        /// First slot.
        pub first: u32,
        /// Number of slots; zero when nothing can be chosen.
        pub count: u32,
    }
}

impl Run {
    /// No slots.
    pub const EMPTY: Self = Self { first: 0, count: 0 };
}

#[cfg(not(feature = "next-layout"))]
table_type! {
    /// How a destination is served. Flipping this value is the only write of a plan that a packet notices.
    ///
    /// A hash map may hand the memory of a replaced value to another key while a program still reads it,
    /// so the value carries a seal over itself and its key; a reader whose seal does not fit looks again.
    pub struct Frontend {
        /// Id of the Service port: index into `SERVICE_STATS`, key of `SERVICES`, part of affinity keys.
        pub service: u32,
        /// Slots usable under the Cluster policy.
        pub cluster: Run,
        /// Slots usable under the Local policy.
        pub local: Run,
        /// Bits of this module.
        pub flags: u32,
        /// Idle time-out of session affinity in seconds; 0 without affinity.
        pub affinity_secs: u32,
        /// See [`Self::sealed`].
        pub seal: u32,
    }
}

impl Frontend {
    /// This value with the seal that fits `key`.
    #[must_use]
    pub fn sealed(mut self, key: &FrontendKey) -> Self {
        self.seal = self.seal_for(key);
        self
    }

    /// Whether the value was read whole and belongs to `key`.
    #[inline(always)]
    pub fn is_sealed_for(&self, key: &FrontendKey) -> bool {
        self.seal == self.seal_for(key)
    }

    #[inline(always)]
    fn seal_for(&self, key: &FrontendKey) -> u32 {
        let Self { service, cluster, local, flags, affinity_secs, seal: _ } = *self;
        // Rotations make the words count by position, so that two swapped words do not cancel out.
        let of_key = key.addr.0[0]
            ^ key.addr.0[1].rotate_left(3)
            ^ key.addr.0[2].rotate_left(5)
            ^ key.addr.0[3].rotate_left(7)
            ^ (u32::from(key.port.0) << 8 | u32::from(key.proto.0));
        0x5ea1_ed00
            ^ of_key
            ^ service.rotate_left(9)
            ^ cluster.first.rotate_left(11)
            ^ cluster.count.rotate_left(13)
            ^ local.first.rotate_left(15)
            ^ local.count.rotate_left(17)
            ^ flags.rotate_left(19)
            ^ affinity_secs.rotate_left(21)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_fits_one_key_and_one_value() {
        let key = FrontendKey::new(Addr::v4(0x0100_600a), Port::new(80), Proto::TCP);
        let value = Frontend {
            service: 7,
            cluster: Run { first: 10, count: 3 },
            local: Run::EMPTY,
            flags: INTERNAL | ANY,
            affinity_secs: 0,
            seal: 0,
        }
        .sealed(&key);
        assert!(value.is_sealed_for(&key));
        assert!(!value.is_sealed_for(&FrontendKey { port: Port::new(81), ..key }));
        assert!(!Frontend { cluster: Run { first: 3, count: 10 }, ..value }.is_sealed_for(&key));
        assert!(!Frontend { cluster: Run::EMPTY, local: value.cluster, ..value }.is_sealed_for(&key));
    }
}

//! A layout that never was: what the one after this might look like, made up so that a test can go from one to the other and
//! back under load. Nobody but that test builds it (feature `next-layout`).
//!
//! Fields stand elsewhere, and there are some that this layout does not know.

use super::config::{PORT_RANGES, SERVICE_RANGES};
use super::frontend::Run;
use super::{FlowId, Pair, PortRange, Range, SOCKET_ENTRIES, SocketEntry, State, table_type};
use crate::addr::{Addr, Port};

table_type! {
    /// See the real one.
    pub struct Flow {
        /// See the real one.
        pub id: FlowId,
        /// See the real one.
        pub claims: u64,
        /// New.
        pub next: [u64; 8],
        /// See the real one.
        pub born: u64,
        /// See the real one.
        pub rst: [u64; 2],
        /// See the real one.
        pub checked: u64,
        /// See the real one.
        pub room: [u64; 3],
        /// See the real one.
        pub seen: [u64; 2],
        /// See the real one.
        pub pad: [u8; 3],
        /// See the real one.
        pub near: [u8; 3],
        /// See the real one.
        pub fin: [u8; 2],
        /// See the real one.
        pub legs: u8,
        /// See the real one.
        pub old: u8,
        /// See the real one.
        pub flags: u8,
        /// See the real one.
        pub state: State,
        /// See the real one.
        pub pairs: [Pair; 3],
        /// See the real one.
        pub uplink: u32,
        /// See the real one.
        pub generation: u32,
        /// See the real one.
        pub backend: u32,
        /// See the real one.
        pub service: u32,
        /// See the real one.
        pub source: u32,
        /// See the real one.
        pub acked: [u32; 2],
        /// See the real one.
        pub last: u32,
        /// See the real one.
        pub first: u32,
    }
}

table_type! {
    /// See the real one.
    pub struct Leg {
        /// New.
        pub next: u64,
        /// See the real one.
        pub rest: u64,
        /// See the real one.
        pub lower: u64,
        /// See the real one.
        pub upper: u64,
        /// See the real one.
        pub id: FlowId,
    }
}

table_type! {
    /// See the real one.
    pub struct Frontend {
        /// See the real one.
        pub seal: u32,
        /// See the real one.
        pub affinity_secs: u32,
        /// See the real one.
        pub flags: u32,
        /// See the real one.
        pub local: Run,
        /// See the real one.
        pub cluster: Run,
        /// See the real one.
        pub service: u32,
    }
}

table_type! {
    /// See the real one.
    pub struct Backend {
        /// See the real one.
        pub pad: u32,
        /// See the real one.
        pub service: u32,
        /// See the real one.
        pub generation: u32,
        /// See the real one.
        pub flags: u16,
        /// See the real one.
        pub port: Port,
        /// See the real one.
        pub addr: Addr,
    }
}

table_type! {
    /// See the real one.
    pub struct Affinity {
        /// New.
        pub next: u64,
        /// See the real one.
        pub last_seen: u64,
        /// See the real one.
        pub generation: u32,
        /// See the real one.
        pub backend: u32,
    }
}

table_type! {
    /// See the real one.
    pub struct SocketState {
        /// New.
        pub next: [u64; 3],
        /// See the real one.
        pub pad: u32,
        /// See the real one.
        pub flags: u32,
        /// See the real one.
        pub entries: [SocketEntry; SOCKET_ENTRIES],
        /// See the real one.
        pub cookie: u64,
    }
}

table_type! {
    /// See the real one.
    pub struct ServiceStats {
        /// New.
        pub next: u64,
        /// See the real one.
        pub dropped: u64,
        /// See the real one.
        pub refused: u64,
        /// See the real one.
        pub chosen: u64,
    }
}

table_type! {
    /// See the real one.
    pub struct Config {
        /// New.
        pub next: [u64; 4],
        /// See the real one.
        pub service_ranges: [Range; SERVICE_RANGES],
        /// See the real one.
        pub snat_ports: [PortRange; PORT_RANGES],
        /// See the real one.
        pub pad: u32,
        /// See the real one.
        pub service_range_count: u32,
        /// See the real one.
        pub seed: u32,
        /// See the real one.
        pub snat_total: u32,
        /// See the real one.
        pub flags: u32,
        /// See the real one.
        pub pod_v4_mask: u32,
        /// See the real one.
        pub node_v6: Addr,
        /// See the real one.
        pub node_v4: Addr,
        /// See the real one.
        pub pod_v6_mask: Addr,
        /// See the real one.
        pub pod_v6: Addr,
        /// See the real one.
        pub pod_v4: Addr,
        /// See the real one.
        pub host_netns: u64,
    }
}

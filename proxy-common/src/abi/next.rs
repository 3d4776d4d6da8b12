//! A layout that never was: what the one after this might look like, made up so that a test can go from one
//! to the other and back under load. Nobody but that test builds it (feature `next-layout`).
//!
//! Fields stand elsewhere, and the fields `next` are new.
#![expect(missing_docs, reason = "fields mean what those of the real types mean")]

use super::config::{PORT_RANGES, SERVICE_RANGES};
use super::frontend::Run;
use super::{FlowId, Pair, PortRange, Range, SOCKET_ENTRIES, SocketEntry, State, table_type};
use crate::addr::{Addr, Port};

table_type! {
    pub struct Flow {
        pub id: FlowId,
        pub claims: u64,
        pub next: [u64; 8],
        pub born: u64,
        pub rst: [u64; 2],
        pub checked: u64,
        pub room: [u64; 2],
        pub spare: u32,
        pub node: u32,
        pub seen: [u64; 2],
        pub pad: [u8; 3],
        pub near: [u8; 3],
        pub fin: [u8; 2],
        pub legs: u8,
        pub old: u8,
        pub flags: u8,
        pub state: State,
        pub pairs: [Pair; 3],
        pub uplink: u32,
        pub generation: u32,
        pub backend: u32,
        pub service: u32,
        pub source: u32,
        pub acked: [u32; 2],
        pub last: u32,
        pub first: u32,
    }
}

table_type! {
    pub struct Leg {
        pub next: u64,
        pub rest: u64,
        pub lower: u64,
        pub upper: u64,
        pub id: FlowId,
    }
}

table_type! {
    pub struct Frontend {
        pub seal: u32,
        pub affinity_secs: u32,
        pub flags: u32,
        pub local: Run,
        pub cluster: Run,
        pub service: u32,
    }
}

table_type! {
    pub struct Backend {
        pub node: u32,
        pub service: u32,
        pub generation: u32,
        pub flags: u16,
        pub port: Port,
        pub addr: Addr,
    }
}

table_type! {
    pub struct Affinity {
        pub next: u64,
        pub last_seen: u64,
        pub generation: u32,
        pub backend: u32,
    }
}

table_type! {
    pub struct SocketState {
        pub next: [u64; 3],
        pub pad: u32,
        pub flags: u32,
        pub entries: [SocketEntry; SOCKET_ENTRIES],
        pub cookie: u64,
    }
}

table_type! {
    pub struct ServiceStats {
        pub next: u64,
        pub dropped: u64,
        pub refused: u64,
        pub chosen: u64,
    }
}

table_type! {
    pub struct Config {
        pub next: [u64; 4],
        pub service_ranges: [Range; SERVICE_RANGES],
        pub snat_ports: [PortRange; PORT_RANGES],
        pub probe_port: Port,
        pub pad: u16,
        pub service_range_count: u32,
        pub seed: u32,
        pub snat_total: u32,
        pub flags: u32,
        pub pod_v4_mask: u32,
        pub node_v6: Addr,
        pub node_v4: Addr,
        pub pod_v6_mask: Addr,
        pub pod_v6: Addr,
        pub pod_v4: Addr,
        pub host_netns: u64,
    }
}

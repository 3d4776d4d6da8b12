//! How much memory tables take.

use proxy_common::abi::{
    Affinity, AffinityKey, Backend, Flow, FlowId, Fragment, FragmentKey, Frontend, FrontendKey, Iface, Key,
    Leg, PeerKey, RouteKey, ServiceName, ServiceStats, SocketEntry, SourceKey, Tuple, capacity, maps,
};
use proxy_common::addr::Addr;

use agent_core::capacity::Capacities;

use super::cpus::cpus;

/// What the kernel keeps for an entry of a hash table besides key and value, its place among the buckets included.
const ENTRY: u64 = 64;
/// The same of a trie of prefixes.
const NODE: u64 = 56;

/// About how much memory tables of these sizes take when they are full, with those whose size nobody chooses.
#[must_use]
pub fn bytes(sizes: &Capacities) -> u64 {
    let hash =
        |key: usize, value: usize| (key.next_multiple_of(8) + value.next_multiple_of(8)) as u64 + ENTRY;
    let words =
        capacity::ENDPOINT_BITS + capacity::ADDRESS_BITS + capacity::SERVICE_PORTS + capacity::FLOW_FILTER;
    let fixed = hash(size_of::<Tuple>(), size_of::<u32>()) * capacity::TAKEN as u64
        + (size_of::<RouteKey>() as u64 + NODE) * capacity::MASQUERADE as u64
        + words as u64 * size_of::<u64>() as u64;
    let each = |map: &str| match map {
        maps::FRONTENDS => hash(size_of::<FrontendKey>(), size_of::<Frontend>()),
        // An element of an array takes whole words.
        maps::SLOTS => size_of::<u64>() as u64,
        maps::FREE => size_of::<u32>() as u64,
        maps::BACKENDS => size_of::<Backend>() as u64,
        maps::ADDRESSES => hash(size_of::<Addr>(), size_of::<u32>()),
        maps::SOURCES => size_of::<SourceKey>() as u64 + NODE,
        maps::IFACES => hash(size_of::<u32>(), size_of::<Iface>()),
        maps::SERVICES => hash(size_of::<u32>(), size_of::<ServiceName>()),
        maps::SERVICE_STATS => size_of::<ServiceStats>() as u64,
        maps::RECORDS => size_of::<Flow>() as u64,
        maps::FLOWS => hash(size_of::<Key>(), size_of::<Leg>()),
        maps::RING => size_of::<FlowId>() as u64,
        maps::FRAGMENTS => hash(size_of::<FragmentKey>(), size_of::<Fragment>()),
        maps::AFFINITY => hash(size_of::<AffinityKey>(), size_of::<Affinity>()),
        maps::PEERS => hash(size_of::<PeerKey>(), size_of::<SocketEntry>()),
        _ => 0,
    };
    fixed + sizes.each(cpus()).into_iter().map(|(map, size)| each(map) * u64::from(size)).sum::<u64>()
}

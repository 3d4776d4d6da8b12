//! What an agent would have written: 10,000 Services of both families, over TCP and UDP, with 10 endpoints of
//! IPv4 and one of IPv6 each.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use aya::Ebpf;
use proxy_common::abi::{
    Backend, Config, Frontend, FrontendKey, PortRange, Range, Run, address, backend, capacity, config,
    frontend, maps,
};
use proxy_common::addr::{Addr, Port, Proto};

use crate::object::{array, hash};

/// Services, and flows in the large cases.
pub(crate) const MANY: u32 = 10_000;
/// Endpoints of each Service, of IPv4.
const ENDPOINTS: u32 = 10;

/// Networks: of IPv4 10.N.0.0/16 (the endpoints take two of them), of IPv6 fd00:0:0:N::/64.
const SERVICES: u8 = 3;
const PODS: u8 = 4;
pub(crate) const CLIENTS: u8 = 244;
pub(crate) const NODES: u8 = 200;

/// A machine of a network.
pub(crate) fn place(v4: bool, network: u8, n: u32) -> IpAddr {
    if v4 {
        Ipv4Addr::from(u32::from_be_bytes([10, network, 0, 0]) + n).into()
    } else {
        Ipv6Addr::from(0xfd00_u128 << 112 | u128::from(network) << 64 | u128::from(n)).into()
    }
}

/// Service `n`.
pub(crate) fn service(v4: bool, n: u32) -> SocketAddr {
    (place(v4, SERVICES, n), 80).into()
}

/// The first endpoint of Service `n`.
pub(crate) fn endpoint(v4: bool, n: u32) -> SocketAddr {
    endpoint_of(v4, n, 0)
}

/// First endpoints are neighbours, as the Services are: packets are made by counting.
fn endpoint_of(v4: bool, n: u32, k: u32) -> SocketAddr {
    (place(v4, PODS, k * MANY + n), 8080).into()
}

fn endpoints(v4: bool) -> u32 {
    if v4 { ENDPOINTS } else { 1 }
}

/// The index of the first backend of Service `n`; those of its others follow. Index 0 is never used.
pub(crate) fn backend_index(v4: bool, n: u32) -> u32 {
    1 + if v4 { n * ENDPOINTS } else { MANY * ENDPOINTS + n }
}

/// The id of Service port `n`, the same over all protocols.
pub(crate) fn service_id(n: u32) -> u32 {
    1 + n
}

/// The node's settings, with the ranges of the Services or without.
pub(crate) fn config(ranges: bool, host_netns: u64) -> Config {
    let flags = config::SOCKET_HOST | config::SOCKET_PODS | config::POD_RANGE_V4 | config::POD_RANGE_V6;
    let v6_mask = Addr([u32::MAX, u32::MAX, 0, 0]);
    let mut config = Config {
        host_netns,
        flags,
        pod_v4: place(true, CLIENTS, 0).into(),
        pod_v4_mask: u32::from_ne_bytes([255, 255, 0, 0]),
        pod_v6: place(false, CLIENTS, 0).into(),
        pod_v6_mask: v6_mask,
        seed: 7,
        ..Config::EMPTY
    }
    .with_snat_ports(&[PortRange { first: 61_000, count: 1_000 }]);
    if ranges {
        let v4_mask = Addr([u32::MAX, u32::MAX, u32::MAX, u32::from_ne_bytes([255, 255, 0, 0])]);
        let range = |v4, mask| Range { first: place(v4, SERVICES, 0).into(), mask };
        (config.service_ranges[0], config.service_ranges[1]) = (range(true, v4_mask), range(false, v6_mask));
        config.service_range_count = 2;
    }
    config
}

/// Writes all Services.
pub(crate) fn fill(ebpf: &mut Ebpf) -> Result<()> {
    fill_backends(ebpf)?;
    let mut frontends = hash(ebpf, maps::FRONTENDS)?;
    for n in 0..MANY {
        for (v4, proto) in [(true, Proto::TCP), (true, Proto::UDP), (false, Proto::TCP), (false, Proto::UDP)]
        {
            let at = service(v4, n);
            let key = FrontendKey::new(at.ip().into(), Port::new(at.port()), proto);
            let value = Frontend {
                service: service_id(n),
                // Slots have the numbers of the backends that they hold.
                cluster: Run { first: backend_index(v4, n), count: endpoints(v4) },
                local: Run::EMPTY,
                flags: frontend::INTERNAL | frontend::ANY,
                affinity_secs: 0,
                seal: 0,
            };
            frontends.insert(key, value.sealed(&key), 0)?;
        }
    }
    let mut bits = vec![0_u64; capacity::ADDRESS_BITS];
    let mut addresses = hash(ebpf, maps::ADDRESSES)?;
    for at in [true, false].into_iter().flat_map(|v4| (0..MANY).map(move |n| service(v4, n))) {
        let addr = Addr::from(at.ip());
        addresses.insert(addr, address::CLUSTER_IP, 0)?;
        set_bit(&mut bits, &addr);
    }
    write_bits(ebpf, maps::ADDRESS_BITS, &bits)
}

fn fill_backends(ebpf: &mut Ebpf) -> Result<()> {
    let mut bits = vec![0_u64; capacity::ENDPOINT_BITS];
    let mut backends = array(ebpf, maps::BACKENDS)?;
    for v4 in [true, false] {
        for (n, k) in (0..MANY).flat_map(|n| (0..endpoints(v4)).map(move |k| (n, k))) {
            let at = endpoint_of(v4, n, k);
            let value = Backend {
                addr: at.ip().into(),
                port: Port::new(at.port()),
                flags: backend::IN_CLUSTER,
                generation: 1,
                service: service_id(n),
                node: 0,
            };
            backends.set(backend_index(v4, n) + k, value, 0)?;
            set_bit(&mut bits, &value.addr);
        }
    }
    write_bits(ebpf, maps::ENDPOINT_BITS, &bits)?;
    let mut slots = array(ebpf, maps::SLOTS)?;
    for index in backend_index(true, 0)..backend_index(false, MANY) {
        slots.set(index, index, 0)?;
    }
    Ok(())
}

fn set_bit(bits: &mut [u64], addr: &Addr) {
    bits[addr.place() as usize / 64] |= 1 << (addr.place() % 64);
}

fn write_bits(ebpf: &mut Ebpf, map: &str, bits: &[u64]) -> Result<()> {
    let mut words = array(ebpf, map)?;
    for (word, bits) in (0..).zip(bits) {
        words.set(word, *bits, 0)?;
    }
    Ok(())
}

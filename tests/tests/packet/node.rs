//! A node for stories: 192.168.10.1 and fd00:10::1, with the pods 10.244.0.0/16 and fd00:244::/64.

use std::net::{IpAddr, SocketAddr};

use proxy_common::abi::{
    Backend, Config, Frontend, FrontendKey, Iface, PortRange, Reason, RouteKey, Run, SourceKey, address,
    backend, config, frontend,
};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::testing::MemoryTables;
use proxy_tests::packet::{Packet, TcpFlags};

use crate::real::IFACE;

pub(crate) const SYN: TcpFlags = TcpFlags::SYN;
pub(crate) const ACK: TcpFlags = TcpFlags::ACK;
pub(crate) const RST: TcpFlags = TcpFlags::RST;
pub(crate) const SYN_ACK: TcpFlags = TcpFlags(TcpFlags::SYN.0 | TcpFlags::ACK.0);
pub(crate) const FIN_ACK: TcpFlags = TcpFlags(TcpFlags::FIN.0 | TcpFlags::ACK.0);

/// One new flow and nothing else.
pub(crate) const NEW: &[(Reason, u64)] = &[(Reason::NewFlow, 1)];

/// Addresses of the story in one family.
#[derive(Clone, Copy)]
pub(crate) struct Cast {
    /// A pod of this node.
    pub(crate) pod: &'static str,
    /// A ClusterIP.
    pub(crate) vip: &'static str,
    /// An external IP.
    pub(crate) external: &'static str,
    /// Endpoints on other nodes.
    pub(crate) remote: &'static str,
    pub(crate) other: &'static str,
    /// Somebody outside the cluster.
    pub(crate) client: &'static str,
    /// This node.
    pub(crate) node: &'static str,
    /// A router in between.
    pub(crate) router: &'static str,
    /// The wildcard under which NodePorts stand.
    pub(crate) any: &'static str,
}

pub(crate) const V4: Cast = Cast {
    pod: "10.244.1.5",
    vip: "10.96.0.1",
    external: "203.0.113.1",
    remote: "10.244.2.7",
    other: "10.244.2.8",
    client: "198.51.100.9",
    node: "192.168.10.1",
    router: "192.168.10.254",
    any: "0.0.0.0",
};

pub(crate) const V6: Cast = Cast {
    pod: "fd00:244::5",
    vip: "fd00:96::1",
    external: "2001:db8:1::1",
    remote: "fd00:244::2:7",
    other: "fd00:244::2:8",
    client: "2001:db8:9::9",
    node: "fd00:10::1",
    router: "fe80::254",
    any: "::",
};

pub(crate) const FAMILIES: [Cast; 2] = [V4, V6];

pub(crate) fn addr(text: &str) -> Addr {
    ip(text).into()
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// A packet of either protocol; the flags are TCP's.
pub(crate) fn packet(proto: Proto, source: SocketAddr, destination: SocketAddr, flags: TcpFlags) -> Packet {
    match proto {
        Proto::TCP => Packet::tcp(source, destination, flags),
        Proto::UDP => Packet::udp(source, destination).payload(b"hello"),
        Proto::SCTP => Packet::sctp(source, destination).payload(b"chunk..."),
        other => panic!("{other} has no ports"),
    }
}

pub(crate) fn tcp(source: (&str, u16), destination: (&str, u16), flags: TcpFlags) -> Packet {
    Packet::tcp(at(source.0, source.1), at(destination.0, destination.1), flags)
}

pub(crate) fn udp(source: (&str, u16), destination: (&str, u16)) -> Packet {
    Packet::udp(at(source.0, source.1), at(destination.0, destination.1)).payload(b"hello")
}

/// The tables, and the next Service's id.
pub(crate) struct Node {
    pub(crate) tables: MemoryTables,
    pub(crate) next: u32,
}

impl Node {
    pub(crate) fn new() -> Self {
        let mut tables = MemoryTables {
            config: Some(Config {
                pod_v4: addr("10.244.0.0"),
                pod_v4_mask: u32::from_ne_bytes([255, 255, 0, 0]),
                pod_v6: addr("fd00:244::"),
                pod_v6_mask: addr("ffff:ffff:ffff:ffff::"),
                node_v4: addr(V4.node),
                node_v6: addr(V6.node),
                flags: config::POD_RANGE_V4 | config::POD_RANGE_V6,
                seed: 7,
                ..Config::EMPTY.with_snat_ports(&[PortRange { first: 1024, count: 28_976 }])
            }),
            ..MemoryTables::default()
        };
        for cast in FAMILIES {
            tables.addresses.insert(addr(cast.node), address::NODE | address::NODE_PORT);
        }
        tables.ifaces.insert(IFACE, Iface::new(0, 0));
        for cast in FAMILIES {
            tables.masquerade.insert(RouteKey::range(IFACE, addr(cast.any), 0), addr(cast.node));
        }
        Self { tables, next: 1 }
    }

    /// Masquerades with these ports and no others.
    pub(crate) fn ports(&mut self, first: u16, count: u16) {
        let config = self.tables.config.as_mut().unwrap();
        *config = config.with_snat_ports(&[PortRange { first, count }]);
    }

    pub(crate) fn config(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(self.tables.config.as_mut().unwrap());
        self
    }

    pub(crate) fn with(
        mut self,
        vip: (&str, u16),
        proto: Proto,
        flags: u32,
        endpoints: &[(&str, u16)],
    ) -> Self {
        self.serve(vip, proto, flags, endpoints);
        self
    }

    /// A Service port; endpoints that begin with `+` are on this node. Returns its id, whose endpoints have
    /// the indices from 100 times the id on. Without endpoints there is none anywhere in the cluster.
    pub(crate) fn serve(
        &mut self,
        vip: (&str, u16),
        proto: Proto,
        flags: u32,
        endpoints: &[(&str, u16)],
    ) -> u32 {
        // Ids of Services that come in mid-story follow on those of the beginning.
        let service = if self.next < 100 { self.next } else { self.next % 100 + 16 };
        self.next += 1;
        let first = service * 100;
        let mut local = Run { first: first + 50, count: 0 };
        for (n, (ip, port)) in endpoints.iter().enumerate() {
            let index = first + n as u32;
            let near = ip.starts_with('+');
            self.tables.backends.insert(
                index,
                Backend {
                    addr: addr(ip.trim_start_matches('+')),
                    port: Port::new(*port),
                    flags: backend::IN_CLUSTER | if near { backend::LOCAL | backend::IN_LOCAL } else { 0 },
                    generation: 1,
                    service,
                    node: 0,
                },
            );
            self.tables.slots.insert(index, index);
            if near {
                self.tables.slots.insert(local.first + local.count, index);
                local.count += 1;
            }
        }
        let key = FrontendKey::new(addr(vip.0), Port::new(vip.1), proto);
        let any = if endpoints.is_empty() { 0 } else { frontend::ANY };
        let cluster = Run { first, count: endpoints.len() as u32 };
        let affinity_secs = if flags & frontend::AFFINITY != 0 { 10_800 } else { 0 };
        let value = Frontend { service, cluster, local, flags: flags | any, affinity_secs, seal: 0 };
        self.tables.frontends.insert(key, value.sealed(&key));
        if flags & frontend::NODE_PORT == 0 {
            let internal = flags & frontend::INTERNAL != 0;
            let known = if internal { address::CLUSTER_IP } else { address::EXTERNAL };
            *self.tables.addresses.entry(key.addr).or_default() |= known;
        }
        service
    }

    /// Lets a source range open flows to a Service.
    pub(crate) fn allow(mut self, service: u32, range: &str, bits: u32) -> Self {
        self.tables.sources.push(SourceKey::range(service, addr(range), bits));
        self
    }

    /// Takes an endpoint away.
    pub(crate) fn retire(&mut self, index: u32) {
        let generation = self.tables.backends[&index].generation + 1;
        self.tables.backends.insert(index, Backend::retired(generation));
    }
}

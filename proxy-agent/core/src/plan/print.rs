//! The one printer of table entries: goldens, the command line and failure messages all show these lines.
//!
//! A line shows everything that is written; two entries that differ have different lines.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use proxy_common::abi::{
    Backend, Config, Frontend, FrontendKey, Iface, PortRange, Range, RouteKey, Run, ServiceName, SourceKey,
    address, backend, config, frontend, iface, untext,
};
use proxy_common::addr::{Addr, Port};

use super::Step;

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PutConfig(config) => write_config(f, config),
            Self::PutIface(index, iface) => write_iface(f, *index, iface),
            Self::DeleteIface(index) => write!(f, "delete iface {index}"),
            Self::PutRoute(key, source) => write!(f, "masquerade {} -> {source}", Route(key)),
            Self::DeleteRoute(key) => write!(f, "delete masquerade {}", Route(key)),
            Self::PutServicePorts(word, bits) => write_ports(f, *word, *bits),
            Self::PutService(id, name) => write!(f, "service {id} = {}", Name(name)),
            Self::DeleteService(id) => write!(f, "delete service {id}"),
            Self::PutBackend(index, backend) => write_backend(f, *index, backend),
            Self::PutSlot(slot, backend) => write!(f, "slot {slot} -> backend {backend}"),
            Self::PutSource(key) => write!(f, "source {}", Source(key)),
            Self::DeleteSource(key) => write!(f, "delete source {}", Source(key)),
            Self::PutFrontend(key, value) => write_frontend(f, key, value),
            Self::DeleteFrontend(key) => write!(f, "delete frontend {}", Destination(key)),
            Self::PutAddress(addr, bits) => write!(f, "address {addr} = {}", Flags(*bits, ADDRESS_FLAGS)),
            Self::DeleteAddress(addr) => write!(f, "delete address {addr}"),
        }
    }
}

const FRONTEND_FLAGS: &[(u32, &str)] = &[
    (frontend::INTERNAL, "internal"),
    (frontend::LOCAL, "local"),
    (frontend::ANY, "any"),
    (frontend::AFFINITY, "affinity"),
    (frontend::SOURCE_RANGES, "source-ranges"),
    (frontend::NODE_PORT, "node-port"),
    (frontend::DSR, "dsr"),
];
const BACKEND_FLAGS: &[(u32, &str)] = &[
    (backend::LOCAL as u32, "local"),
    (backend::DRAINING as u32, "draining"),
    (backend::IN_CLUSTER as u32, "in-cluster"),
    (backend::IN_LOCAL as u32, "in-local"),
    (backend::RESET as u32, "reset"),
];
const ADDRESS_FLAGS: &[(u32, &str)] = &[
    (address::CLUSTER_IP, "cluster-ip"),
    (address::EXTERNAL, "external"),
    (address::NODE, "node"),
    (address::NODE_PORT, "node-port"),
];
const IFACE_FLAGS: &[(u32, &str)] = &[(iface::L3, "l3"), (iface::POD, "pod")];
const CONFIG_FLAGS: &[(u32, &str)] = &[
    (config::MASQUERADE_ALL, "masquerade-all"),
    (config::MASQUERADE_LOCAL, "masquerade-local"),
    (config::SOCKET_PODS, "socket-pods"),
    (config::SOCKET_HOST, "socket-host"),
    (config::POD_RANGE_V4, "pod-range-v4"),
    (config::POD_RANGE_V6, "pod-range-v6"),
    (config::LOCALHOST_NODE_PORTS, "localhost-node-ports"),
    (config::POD_INTERFACES, "pod-interfaces"),
    (config::LEAVE_NEW, "leave-new"),
    (config::LEAVE_MIDDLE, "leave-middle"),
];

/// The words for some bits: `internal,any`; `-` for none; bits without a word in hexadecimal.
struct Flags(u32, &'static [(u32, &'static str)]);

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(bits, words) = *self;
        let mut rest = bits;
        let mut separator = "";
        for (bit, word) in words.iter().filter(|(bit, _)| bits & bit != 0) {
            write!(f, "{separator}{word}")?;
            separator = ",";
            rest &= !bit;
        }
        match (rest, bits) {
            (0, 0) => f.write_str("-"),
            (0, _) => Ok(()),
            _ => write!(f, "{separator}{rest:#x}"),
        }
    }
}

/// `namespace/name:port TCP IPv4`.
pub(super) struct Name<'a>(pub(super) &'a ServiceName);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.0;
        write!(f, "{}/{}", untext(&name.namespace), untext(&name.name))?;
        match untext(&name.port) {
            "" => {}
            port => write!(f, ":{port}")?,
        }
        write!(f, " {} IPv{}", name.proto, name.family)
    }
}

/// `10.96.0.10:53/UDP`.
pub(super) struct Destination<'a>(pub(super) &'a FrontendKey);

impl fmt::Display for Destination<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", socket(self.0.addr, self.0.port), self.0.proto)
    }
}

/// `svc 3 10.0.0.0/8`.
struct Source<'a>(&'a SourceKey);

impl fmt::Display for Source<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = if self.0.addr.is_v4() { 128 } else { 32 };
        let bits = self.0.prefix_len.saturating_sub(before);
        write!(f, "svc {} {}/{bits}", u32::from_be(self.0.service), self.0.addr)
    }
}

/// `iface 2 10.0.0.0/8`.
struct Route<'a>(&'a RouteKey);

impl fmt::Display for Route<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "iface {} {}/{}", u32::from_be(self.0.ifindex), self.0.dst, self.0.bits())
    }
}

/// `service ports 30016-30079 = 30030 30043`.
fn write_ports(f: &mut fmt::Formatter<'_>, word: u32, bits: u64) -> fmt::Result {
    let first = word * 64;
    write!(f, "service ports {first}-{} =", first + 63)?;
    if bits == 0 {
        return f.write_str(" -");
    }
    (0..64).filter(|bit| bits >> bit & 1 != 0).try_for_each(|bit| write!(f, " {}", first + bit))
}

pub(super) fn socket(addr: Addr, port: Port) -> SocketAddr {
    SocketAddr::new(IpAddr::from(addr), port.number())
}

fn write_iface(f: &mut fmt::Formatter<'_>, index: u32, iface: &Iface) -> fmt::Result {
    let Iface { flags, uplink, bridge, pad: _ } = *iface;
    write!(f, "iface {index} = uplink {uplink} flags {}", Flags(flags, IFACE_FLAGS))?;
    if bridge != [0; 6] {
        let [a, b, c, d, e, g] = bridge;
        write!(f, " bridge {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")?;
    }
    Ok(())
}

fn write_backend(f: &mut fmt::Formatter<'_>, index: u32, backend: &Backend) -> fmt::Result {
    let Backend { addr, port, flags, generation, service, node } = *backend;
    if *backend == Backend::retired(generation) {
        return write!(f, "backend {index} retired gen {generation}");
    }
    write!(
        f,
        "backend {index} = {} of svc {service} gen {generation} flags {}",
        socket(addr, port),
        Flags(u32::from(flags), BACKEND_FLAGS)
    )?;
    if node != 0 { write!(f, " node {node:#x}") } else { Ok(()) }
}

fn write_frontend(f: &mut fmt::Formatter<'_>, key: &FrontendKey, value: &Frontend) -> fmt::Result {
    let Frontend { service, cluster, local, flags, affinity_secs, seal: _ } = *value;
    let Run { first, count } = cluster;
    write!(f, "frontend {} -> svc {service} cluster {first}+{count}", Destination(key))?;
    let Run { first, count } = local;
    write!(f, " local {first}+{count} flags {}", Flags(flags, FRONTEND_FLAGS))?;
    if affinity_secs != 0 {
        write!(f, " affinity {affinity_secs}s")?;
    }
    if !value.is_sealed_for(key) {
        f.write_str(" SEAL BROKEN")?;
    }
    Ok(())
}

fn write_config(f: &mut fmt::Formatter<'_>, config: &Config) -> fmt::Result {
    let Config {
        host_netns,
        pod_v4,
        pod_v6,
        pod_v6_mask,
        node_v4,
        node_v6,
        pod_v4_mask,
        flags,
        snat_total,
        seed,
        service_range_count,
        probe_port,
        pad: _,
        snat_ports,
        service_ranges,
        #[cfg(feature = "next-layout")]
            next: _,
    } = config;
    let (v4, v6) = (pod_v4_mask.count_ones(), ones(pod_v6_mask));
    write!(
        f,
        "config host-netns {host_netns} node {node_v4} {node_v6} pods {pod_v4}/{v4} {pod_v6}/{v6} snat"
    )?;
    let used: Vec<&PortRange> = snat_ports.iter().filter(|range| **range != PortRange::NONE).collect();
    if used.is_empty() {
        f.write_str(" -")?;
    }
    used.iter().try_for_each(|PortRange { first, count }| write!(f, " {first}+{count}"))?;
    let sum: u32 = used.iter().map(|range| u32::from(range.count)).sum();
    if sum != *snat_total {
        write!(f, " ({snat_total} IN ALL)")?;
    }
    write!(f, " ranges")?;
    let used: Vec<&Range> = service_ranges.iter().filter(|range| **range != Range::NONE).collect();
    if used.is_empty() {
        f.write_str(" -")?;
    }
    used.iter().try_for_each(|range| write!(f, " {}", AddressRange(range)))?;
    if used.len() != *service_range_count as usize {
        write!(f, " ({service_range_count} IN USE)")?;
    }
    write!(f, " seed {seed} flags {}", Flags(*flags, CONFIG_FLAGS))?;
    if probe_port.number() != 0 { write!(f, " probe-port {probe_port}") } else { Ok(()) }
}

fn ones(mask: &Addr) -> u32 {
    mask.0.iter().map(|word| word.count_ones()).sum()
}

/// `10.96.0.0/12`.
struct AddressRange<'a>(&'a Range);

impl fmt::Display for AddressRange<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { first, mask } = self.0;
        // An IPv4 range is an IPv4-mapped one.
        let before = if first.is_v4() { 96 } else { 0 };
        write!(f, "{first}/{}", ones(mask).saturating_sub(before))
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::text;
    use proxy_common::addr::Proto;

    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "one line for each kind of step")]
    fn every_step_is_one_readable_line() {
        let key = FrontendKey::new(addr("10.96.0.10"), Port::new(53), Proto::UDP);
        let value = Frontend {
            service: 3,
            cluster: Run { first: 17, count: 3 },
            local: Run::EMPTY,
            flags: frontend::INTERNAL | frontend::ANY,
            affinity_secs: 0,
            seal: 0,
        };
        let name = ServiceName {
            namespace: text("kube-system"),
            name: text("kube-dns"),
            port: text("dns"),
            proto: Proto::UDP,
            family: 4,
            pad: [0; 2],
        };
        let backend = Backend {
            addr: addr("fd00::5"),
            port: Port::new(53),
            flags: backend::LOCAL,
            generation: 2,
            service: 3,
            node: 0,
        };
        let iface = Iface::new(iface::L3, 2);
        let port = Iface { bridge: [2, 0, 0, 0xab, 0, 1], ..Iface::new(iface::POD, 0) };
        let ranges = [(1024, 28_976), (61_000, 4_536)].map(|(first, count)| PortRange { first, count });
        let mut node = Config::EMPTY.with_snat_ports(&ranges);
        node.flags = config::POD_INTERFACES | config::LEAVE_NEW;
        node.service_range_count = 2;
        node.service_ranges[0] = Range {
            first: addr("10.96.0.0"),
            mask: Addr([u32::MAX, u32::MAX, u32::MAX, 0xfff0_0000_u32.to_be()]),
        };
        node.service_ranges[1] = Range {
            first: addr("fd00:96::"),
            mask: Addr([u32::MAX, u32::MAX, u32::MAX, 0xfff0_0000_u32.to_be()]),
        };
        let lines = [
            (
                Step::PutFrontend(key, value.sealed(&key)),
                "frontend 10.96.0.10:53/UDP -> svc 3 cluster 17+3 local 0+0 flags internal,any",
            ),
            (
                Step::PutFrontend(key, Frontend { affinity_secs: 60, ..value }),
                "frontend 10.96.0.10:53/UDP -> svc 3 cluster 17+3 local 0+0 flags internal,any \
                 affinity 60s SEAL BROKEN",
            ),
            (
                Step::PutFrontend(
                    key,
                    Frontend { flags: frontend::ANY | frontend::DSR, ..value }.sealed(&key),
                ),
                "frontend 10.96.0.10:53/UDP -> svc 3 cluster 17+3 local 0+0 flags any,dsr",
            ),
            (Step::DeleteFrontend(key), "delete frontend 10.96.0.10:53/UDP"),
            (Step::PutService(3, name.into()), "service 3 = kube-system/kube-dns:dns UDP IPv4"),
            (Step::DeleteService(3), "delete service 3"),
            (Step::PutBackend(5, backend), "backend 5 = [fd00::5]:53 of svc 3 gen 2 flags local"),
            (Step::PutBackend(5, Backend::retired(3)), "backend 5 retired gen 3"),
            (
                Step::PutBackend(5, Backend { flags: backend::IN_CLUSTER, node: 0x735_e0b9, ..backend }),
                "backend 5 = [fd00::5]:53 of svc 3 gen 2 flags in-cluster node 0x735e0b9",
            ),
            (
                Step::PutBackend(5, Backend { flags: backend::RESET, ..Backend::retired(3) }),
                "backend 5 = [::]:0 of svc 0 gen 3 flags reset",
            ),
            (Step::PutSlot(17, 5), "slot 17 -> backend 5"),
            (Step::PutSource(SourceKey::range(3, addr("10.0.0.0"), 8)), "source svc 3 10.0.0.0/8"),
            (Step::DeleteSource(SourceKey::range(3, addr("fd00::"), 7)), "delete source svc 3 fd00::/7"),
            (Step::PutAddress(addr("10.96.0.10"), 1), "address 10.96.0.10 = cluster-ip"),
            (Step::PutAddress(addr("10.96.0.10"), 0x14), "address 10.96.0.10 = node,0x10"),
            (Step::DeleteAddress(addr("10.96.0.10")), "delete address 10.96.0.10"),
            (Step::PutIface(2, iface), "iface 2 = uplink 2 flags l3"),
            (Step::PutIface(3, port), "iface 3 = uplink 0 flags pod bridge 02:00:00:ab:00:01"),
            (Step::DeleteIface(2), "delete iface 2"),
            (
                Step::PutRoute(RouteKey::range(2, addr("10.0.0.0"), 8), addr("192.0.2.1")),
                "masquerade iface 2 10.0.0.0/8 -> 192.0.2.1",
            ),
            (
                Step::DeleteRoute(RouteKey::range(2, addr("fd00::"), 16)),
                "delete masquerade iface 2 fd00::/16",
            ),
            (Step::PutServicePorts(469, 1 << 14 | 1 << 27), "service ports 30016-30079 = 30030 30043"),
            (Step::PutServicePorts(0, 0), "service ports 0-63 = -"),
            (
                Step::PutConfig(Box::new(Config::EMPTY)),
                "config host-netns 0 node 0.0.0.0 :: pods 0.0.0.0/0 ::/0 snat - ranges - seed 0 flags -",
            ),
            (
                Step::PutConfig(Box::new(node)),
                "config host-netns 0 node 0.0.0.0 :: pods 0.0.0.0/0 ::/0 snat 1024+28976 61000+4536 \
                 ranges 10.96.0.0/12 fd00:96::/108 seed 0 flags pod-interfaces,leave-new",
            ),
            (
                Step::PutConfig(Box::new(Config { probe_port: Port::new(10_257), ..Config::EMPTY })),
                "config host-netns 0 node 0.0.0.0 :: pods 0.0.0.0/0 ::/0 snat - ranges - seed 0 flags - \
                 probe-port 10257",
            ),
            (
                Step::PutConfig(Box::new(Config { snat_total: 5, service_range_count: 1, ..node })),
                "config host-netns 0 node 0.0.0.0 :: pods 0.0.0.0/0 ::/0 snat 1024+28976 61000+4536 (5 IN ALL) \
                 ranges 10.96.0.0/12 fd00:96::/108 (1 IN USE) seed 0 flags pod-interfaces,leave-new",
            ),
        ];
        for (step, line) in lines {
            assert_eq!(step.to_string(), line);
        }
    }
}

//! One write to one table.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use proxy_common::abi::{
    Backend, Config, Frontend, FrontendKey, Iface, PortRange, RouteKey, Run, ServiceName, SourceKey, address,
    backend, config, frontend, iface, untext,
};
use proxy_common::addr::{Addr, Port};

/// One write or delete. Applying it twice is the same as applying it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write CONFIG.
    PutConfig(Config),
    /// Write an entry of IFACES.
    PutIface(u32, Iface),
    /// Delete an entry of IFACES.
    DeleteIface(u32),
    /// Write an entry of MASQUERADE.
    PutRoute(RouteKey, Addr),
    /// Delete an entry of MASQUERADE.
    DeleteRoute(RouteKey),
    /// Write a word of SERVICE_PORTS: 64 ports.
    PutServicePorts(u32, u64),
    /// Write an entry of SERVICES.
    PutService(u32, ServiceName),
    /// Delete an entry of SERVICES.
    DeleteService(u32),
    /// Write an entry of BACKENDS (a retired one is written, too: it keeps its generation).
    PutBackend(u32, Backend),
    /// Write an entry of SLOTS.
    PutSlot(u32, u32),
    /// Write an entry of SOURCES.
    PutSource(SourceKey),
    /// Delete an entry of SOURCES.
    DeleteSource(SourceKey),
    /// Write an entry of FRONTENDS.
    PutFrontend(FrontendKey, Frontend),
    /// Delete an entry of FRONTENDS.
    DeleteFrontend(FrontendKey),
    /// Write an entry of ADDRESSES.
    PutAddress(Addr, u32),
    /// Delete an entry of ADDRESSES.
    DeleteAddress(Addr),
}

/// The one printer of table entries: goldens, the command line and failure messages all show these lines.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PutConfig(config) => write_config(f, config),
            Self::PutIface(index, iface) => {
                write!(f, "iface {index} = uplink {} flags {}", iface.uplink, Flags(iface.flags, IFACE_FLAGS))
            }
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
];
const BACKEND_FLAGS: &[(u32, &str)] = &[
    (backend::LOCAL as u32, "local"),
    (backend::DRAINING as u32, "draining"),
    (backend::IN_CLUSTER as u32, "in-cluster"),
    (backend::IN_LOCAL as u32, "in-local"),
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

fn write_backend(f: &mut fmt::Formatter<'_>, index: u32, backend: &Backend) -> fmt::Result {
    if !backend.is_live() {
        return write!(f, "backend {index} retired gen {}", backend.generation);
    }
    write!(
        f,
        "backend {index} = {} of svc {} gen {} flags {}",
        socket(backend.addr, backend.port),
        backend.service,
        backend.generation,
        Flags(u32::from(backend.flags), BACKEND_FLAGS)
    )
}

fn write_frontend(f: &mut fmt::Formatter<'_>, key: &FrontendKey, value: &Frontend) -> fmt::Result {
    let Run { first, count } = value.cluster;
    write!(f, "frontend {} -> svc {} cluster {first}+{count}", Destination(key), value.service)?;
    let Run { first, count } = value.local;
    write!(f, " local {first}+{count} flags {}", Flags(value.flags, FRONTEND_FLAGS))?;
    if value.affinity_secs != 0 {
        write!(f, " affinity {}s", value.affinity_secs)?;
    }
    if !value.is_sealed_for(key) {
        f.write_str(" SEAL BROKEN")?;
    }
    Ok(())
}

fn write_config(f: &mut fmt::Formatter<'_>, config: &Config) -> fmt::Result {
    let v4 = config.pod_v4_mask.count_ones();
    let v6: u32 = config.pod_v6_mask.0.iter().map(|word| word.count_ones()).sum();
    write!(
        f,
        "config host-netns {} node {} {} pods {}/{v4} {}/{v6} snat",
        config.host_netns, config.node_v4, config.node_v6, config.pod_v4, config.pod_v6,
    )?;
    match config.snat_total {
        0 => f.write_str(" -")?,
        _ => {
            let ranges = config.snat_ports.iter().filter(|range| range.count != 0);
            ranges.into_iter().try_for_each(|PortRange { first, count }| write!(f, " {first}+{count}"))?;
        }
    }
    write!(f, " seed {} flags {}", config.seed, Flags(config.flags, CONFIG_FLAGS))
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
            pad: 0,
        };
        let iface = Iface::new(iface::L3, 2);
        let ranges = [(1024, 28_976), (61_000, 4_536)].map(|(first, count)| PortRange { first, count });
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
            (Step::DeleteFrontend(key), "delete frontend 10.96.0.10:53/UDP"),
            (Step::PutService(3, name), "service 3 = kube-system/kube-dns:dns UDP IPv4"),
            (Step::DeleteService(3), "delete service 3"),
            (Step::PutBackend(5, backend), "backend 5 = [fd00::5]:53 of svc 3 gen 2 flags local"),
            (Step::PutBackend(5, Backend::retired(3)), "backend 5 retired gen 3"),
            (Step::PutSlot(17, 5), "slot 17 -> backend 5"),
            (Step::PutSource(SourceKey::range(3, addr("10.0.0.0"), 8)), "source svc 3 10.0.0.0/8"),
            (Step::DeleteSource(SourceKey::range(3, addr("fd00::"), 7)), "delete source svc 3 fd00::/7"),
            (Step::PutAddress(addr("10.96.0.10"), 1), "address 10.96.0.10 = cluster-ip"),
            (Step::PutAddress(addr("10.96.0.10"), 0x14), "address 10.96.0.10 = node,0x10"),
            (Step::DeleteAddress(addr("10.96.0.10")), "delete address 10.96.0.10"),
            (Step::PutIface(2, iface), "iface 2 = uplink 2 flags l3"),
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
                Step::PutConfig(Config::EMPTY),
                "config host-netns 0 node 0.0.0.0 :: pods 0.0.0.0/0 ::/0 snat - seed 0 flags -",
            ),
            (
                Step::PutConfig(Config::EMPTY.with_snat_ports(&ranges)),
                "config host-netns 0 node 0.0.0.0 :: pods 0.0.0.0/0 ::/0 snat 1024+28976 61000+4536 seed 0 \
                 flags -",
            ),
        ];
        for (step, line) in lines {
            assert_eq!(step.to_string(), line);
        }
    }
}

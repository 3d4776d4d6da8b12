//! The destinations a Service asks for, and what its source ranges say.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use proxy_common::abi::{FrontendKey, frontend};
use proxy_common::addr::{self, Addr, Proto};

use super::topology::Uses;
use super::{Affinity, Family, LoadBalancerMode, ObjectName, Port, Service, ServicePort};

/// One Service port and the destinations it asks for, with every flag that the Service alone decides.
pub(super) struct Wanted {
    pub(super) owner: ServicePort,
    pub(super) frontends: BTreeMap<FrontendKey, u32>,
    pub(super) uses: Uses,
    /// Load-balancer IPs of the family; empty unless they are restricted to source ranges.
    pub(super) restricted: Vec<IpAddr>,
}

/// What a Service asks for, port by port and family by family (S-10, S-13).
pub(super) fn wanted(name: &ObjectName, service: &Service) -> Vec<Wanted> {
    let mut ports: BTreeMap<_, &Port> = BTreeMap::new();
    for port in &service.ports {
        ports.insert((&port.name, port.proto), port); // the last one wins.
    }
    let mut all = Vec::with_capacity(ports.len() * service.cluster_ips.len());
    for family in [Family::V4, Family::V6] {
        let Some(cluster_ip) = service.cluster_ips.iter().find(|ip| Family::of(ip) == family) else {
            continue;
        };
        all.extend(ports.values().map(|port| wanted_by_port(name, service, port, family, *cluster_ip)));
    }
    all
}

fn wanted_by_port(
    name: &ObjectName,
    service: &Service,
    port: &Port,
    family: Family,
    cluster_ip: IpAddr,
) -> Wanted {
    let of_family = |ips: &[IpAddr]| -> Vec<IpAddr> {
        ips.iter().copied().filter(|ip| Family::of(ip) == family).collect()
    };
    let external_ips = of_family(&service.external_ips);
    let load_balancer_ips = of_family(&service.load_balancer_ips);
    let restricted = !source_ranges(service, family).is_empty();

    let common = if matches!(service.affinity, Affinity::ClientIp(_)) { frontend::AFFINITY } else { 0 };
    let local = |is_local: bool| if is_local { frontend::LOCAL } else { 0 };
    let direct = is_direct(service, port);
    let external = common | local(service.external_local) | if direct { frontend::DSR } else { 0 };
    let number = addr::Port::new(port.port);
    let key = |ip: IpAddr| FrontendKey::new(ip.into(), number, port.proto);

    let mut frontends: BTreeMap<FrontendKey, u32> = BTreeMap::new();
    for ip in &external_ips {
        *frontends.entry(key(*ip)).or_default() |= external;
    }
    for ip in &load_balancer_ips {
        // V-20: an address that is an external IP as well is filtered all the same.
        *frontends.entry(key(*ip)).or_default() |=
            external | if restricted { frontend::SOURCE_RANGES } else { 0 };
    }
    if port.node_port != 0 {
        let key = FrontendKey::new(family.wildcard(), addr::Port::new(port.node_port), port.proto);
        frontends.insert(key, external | frontend::NODE_PORT);
    }
    frontends.insert(key(cluster_ip), common | frontend::INTERNAL | local(service.internal_local));

    let accessible = port.node_port != 0 || !external_ips.is_empty() || !load_balancer_ips.is_empty();
    Wanted {
        owner: ServicePort { service: name.clone(), port: port.name.clone(), proto: port.proto, family },
        frontends,
        uses: Uses {
            cluster: !service.internal_local || accessible,
            local: service.internal_local || (service.external_local || direct) && accessible,
        },
        restricted: if restricted { load_balancer_ips } else { Vec::new() },
    }
}

/// Whether what comes from outside to a port may go to its endpoint's node as it is. Under policy Local nothing goes to
/// another node, and SCTP is not wrapped.
fn is_direct(service: &Service, port: &Port) -> bool {
    service.mode == Some(LoadBalancerMode::Dsr)
        && !service.external_local
        && matches!(port.proto, Proto::TCP | Proto::UDP)
}

/// Whether other nodes answer what comes from outside to some port of a Service.
pub(super) fn has_direct(service: &Service) -> bool {
    let everywhere = !service.external_ips.is_empty() || !service.load_balancer_ips.is_empty();
    service.ports.iter().any(|port| is_direct(service, port) && (everywhere || port.node_port != 0))
}

/// The ranges that restrict the load-balancer IPs of a family; empty when nothing does (V-15, V-16).
pub(super) fn source_ranges(service: &Service, family: Family) -> Vec<IpNet> {
    let ranges: Vec<IpNet> =
        service.source_ranges.iter().filter(|range| Family::of(&range.addr()) == family).copied().collect();
    if ranges.iter().any(|range| range.prefix_len() == 0) { Vec::new() } else { ranges }
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub const fn of(ip: &IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The address under which the NodePorts of this family stand.
    #[must_use]
    pub const fn wildcard(self) -> Addr {
        match self {
            Self::V4 => Addr::ANY_V4,
            Self::V6 => Addr::ANY_V6,
        }
    }
}

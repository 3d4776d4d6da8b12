//! From one Service and its endpoints to what should be in the tables.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_common::abi::{FrontendKey, backend, frontend};
use proxy_common::addr::{Addr, Port, Proto};

use super::conflicts::Owners;
use super::frontends::{Wanted, source_ranges, wanted};
use super::local::{Local, UsedBy};
use super::merge::merge;
use super::topology::{Candidate, choose};
use super::{
    Affinity, DesiredBackend, DesiredFrontend, DesiredService, Endpoint, Family, NodeNumbers, ObjectName,
    Service, ServicePort, Slice,
};

/// Where we are: what the choice of endpoints depends on beside the Service.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Here {
    pub(super) node: Arc<str>,
    pub(super) zone: Option<Arc<str>>,
    /// The node's IPs by rank (Y-10).
    pub(super) ips: Vec<IpAddr>,
    /// Every global address of the node's links.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// What no Service gets.
    pub(super) local: Local,
    /// Other nodes with endpoints of Services with direct server return.
    pub(super) nodes: NodeNumbers,
}

impl Here {
    /// E-19: by node name, exactly.
    pub(super) fn is_local(&self, endpoint: &Endpoint) -> bool {
        !self.node.is_empty() && endpoint.node.as_ref() == Some(&self.node)
    }

    /// The number of the other node that an endpoint runs on; 0 for none.
    fn number_of(&self, endpoint: &Endpoint) -> u32 {
        let node = endpoint.node.as_ref().filter(|_| !self.is_local(endpoint));
        node.map_or(0, |node| self.nodes.number(node))
    }

    /// Whether replies are certain to pass here: the node says so, or the address is our own.
    fn replies_pass(&self, endpoint: &Endpoint) -> bool {
        match endpoint.node {
            Some(_) => self.is_local(endpoint),
            None => self.addresses.contains(&endpoint.ip),
        }
    }
}

/// Everything a Service should have in the tables, port by port.
pub(super) fn compile<'a>(
    name: &ObjectName,
    service: &Service,
    slices: impl Iterator<Item = &'a Slice> + Clone,
    here: &Here,
    owners: &Owners,
) -> BTreeMap<ServicePort, DesiredService> {
    wanted(name, service)
        .into_iter()
        .map(|wanted| {
            let desired = compile_port(&wanted, service, slices.clone(), here, owners);
            (wanted.owner, desired)
        })
        .collect()
}

/// The destinations that a Service asks for and does not get, because the node or its pods use them.
pub(super) fn destinations_in_use(
    name: &ObjectName,
    service: &Service,
    here: &Here,
) -> Vec<(FrontendKey, UsedBy)> {
    let wanted = wanted(name, service).into_iter().flat_map(|wanted| wanted.frontends);
    wanted.filter_map(|(key, flags)| Some((key, here.local.in_use(&key, flags)?))).collect()
}

fn compile_port<'a>(
    wanted: &Wanted,
    service: &Service,
    slices: impl Iterator<Item = &'a Slice>,
    here: &Here,
    owners: &Owners,
) -> DesiredService {
    let endpoints = merge(&wanted.owner, slices);
    let destinations: Vec<(Addr, Port)> =
        endpoints.keys().map(|(ip, port)| ((*ip).into(), Port::new(*port))).collect();
    let candidates: Vec<Candidate<'_>> =
        endpoints.values().map(|endpoint| candidate(endpoint, here)).collect();
    let chosen = choose(&candidates, wanted.uses, &here.node, here.zone.as_deref());

    let any = if chosen.any { frontend::ANY } else { 0 };
    let frontends: Vec<DesiredFrontend> = wanted
        .frontends
        .iter()
        .filter(|(key, flags)| {
            owners.owner(key) == Some(&wanted.owner) && here.local.in_use(key, **flags).is_none()
        })
        .map(|(key, flags)| DesiredFrontend { key: *key, flags: flags | any })
        .collect();
    let direct = frontends.iter().any(|frontend| frontend.flags & frontend::DSR != 0);
    let resets = |endpoint: &Endpoint| {
        service.reset_on_loss && wanted.owner.proto == Proto::TCP && !endpoint.terminating
    };
    let mut backends = BTreeMap::new();
    let members = |set: &[usize]| set.iter().copied().collect::<BTreeSet<usize>>();
    let (cluster, local) = (members(&chosen.cluster), members(&chosen.local));
    for (i, endpoint) in endpoints.values().enumerate() {
        let mut flags = if here.replies_pass(endpoint) { backend::LOCAL } else { 0 };
        flags |= if cluster.contains(&i) { backend::IN_CLUSTER } else { 0 };
        flags |= if local.contains(&i) { backend::IN_LOCAL } else { 0 };
        if flags & (backend::IN_CLUSTER | backend::IN_LOCAL) == 0 {
            // C-5: a flow may stay as long as its endpoint serves. Who is to be reset when it leaves is known until then.
            if !endpoint.serving && !resets(endpoint) {
                continue;
            }
            flags |= backend::DRAINING;
        }
        flags |= if resets(endpoint) { backend::RESET } else { 0 };
        let node = if direct { here.number_of(endpoint) } else { 0 };
        backends.insert(destinations[i], DesiredBackend { flags, node });
    }

    let pick = |set: &[usize]| set.iter().map(|i| destinations[*i]).collect();
    DesiredService {
        frontends,
        affinity_secs: match service.affinity {
            Affinity::None => 0,
            Affinity::ClientIp(secs) => secs,
        },
        backends,
        cluster: pick(&chosen.cluster),
        local: pick(&chosen.local),
        source_ranges: allowed_sources(wanted, service, here),
    }
}

fn candidate<'a>(endpoint: &'a Endpoint, here: &Here) -> Candidate<'a> {
    Candidate {
        ready: endpoint.ready,
        serving: endpoint.serving,
        terminating: endpoint.terminating,
        local: here.is_local(endpoint),
        zone_hints: endpoint.zone_hints(),
        node_hints: endpoint.node_hints(),
    }
}

/// The ranges, and the Service's own load-balancer IPs where the node may connect: a host process that
/// talks to an address bound on the node uses that address as its source (V-18).
fn allowed_sources(wanted: &Wanted, service: &Service, here: &Here) -> Vec<(Addr, u32)> {
    if wanted.restricted.is_empty() {
        return Vec::new();
    }
    let family = wanted.owner.family;
    let ranges = source_ranges(service, family);
    let mut allowed: BTreeSet<IpNet> = ranges.iter().map(IpNet::trunc).collect();
    let node_ip = here.ips.iter().find(|ip| Family::of(ip) == family);
    if node_ip.is_some_and(|ip| ranges.iter().any(|range| range.contains(ip))) {
        allowed.extend(wanted.restricted.iter().map(|ip| IpNet::from(*ip)));
    }
    allowed.into_iter().map(|range| (range.network().into(), u32::from(range.prefix_len()))).collect()
}

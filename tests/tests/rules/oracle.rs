//! What a new flow gets, read from the rules (docs/service-semantics.md) alone: slow, without tables, sharing no
//! decision with the proxy.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use agent_core::model::SocketLb;
use ipnet::IpNet;
use proxy_common::addr::Proto;

use super::facts::{
    Detect, EndpointFacts, FAMILIES, Facts, OWN_NODE, PORTS, SLICE_PORTS, ServiceFacts, ZONES, cluster_ip,
    endpoint_ip, endpoint_node, source_range, vip,
};

/// Address and port.
pub(crate) type Target = (IpAddr, u16);

/// A Service port of one family: number of the Service, index of the port, whether IPv6.
pub(crate) type PortId = (u8, usize, bool);

/// Where a flow comes from (section 0.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// A pod, as the detector says.
    Pod,
    /// This node itself.
    Host,
    /// Everything else.
    Outside,
}

/// What a new flow gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// It is no business of the proxy.
    Pass,
    /// It is answered with "refused".
    Refuse,
    /// It vanishes.
    Drop,
    /// It reaches one of these, with its source masqueraded or not.
    Forward(BTreeMap<Target, bool>),
}

/// What the rules say of a probe.
#[derive(Clone, Debug)]
pub(crate) struct Ruling {
    /// The outcome.
    pub(crate) expected: Expected,
    /// Whose port it is.
    pub(crate) port: Option<PortId>,
    /// Whether flows of a client stay together, and for how many idle seconds.
    pub(crate) affinity: Option<u32>,
    /// Whether the source of the flow matters (V-17).
    pub(crate) restricted: bool,
    /// Whether its class matters to where it goes (V-24, V-26).
    pub(crate) by_class: bool,
}

impl Ruling {
    const PASS: Self =
        Self { expected: Expected::Pass, port: None, affinity: None, restricted: false, by_class: false };
}

/// An endpoint of a Service port after E-21.
#[derive(Clone, Debug)]
struct Endpoint {
    n: u8,
    ready: bool,
    /// ST of section 0.2.
    fallback: bool,
    serving: bool,
}

/// CL, LO and ANY of a Service port.
pub(crate) struct Sets {
    /// CL.
    pub(crate) cluster: BTreeSet<Target>,
    /// LO.
    pub(crate) local: BTreeSet<Target>,
    /// ANY.
    pub(crate) any: bool,
}

/// How a Service port is addressed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Destination {
    ClusterIp,
    Vip,
    NodePort,
}

/// Whether the Service is proxied in the family (S-1, S-3, S-4, S-5, S-10).
fn proxied(service: &ServiceFacts, six: bool) -> bool {
    !service.foreign
        && service.cluster_ip.is_some()
        && service.kind != "ExternalName"
        && !service.ports.is_empty()
        && service.families[usize::from(six)]
}

/// S-9.
fn cluster_address(service: &ServiceFacts, six: bool) -> Option<IpAddr> {
    service.cluster_ip.filter(|_| proxied(service, six)).map(|n| cluster_ip(n, six))
}

/// V-9.
fn balancer_addresses(service: &ServiceFacts, six: bool) -> Vec<IpAddr> {
    let vips = service.ingress.iter().filter(|(_, mode)| matches!(mode, None | Some("VIP")));
    vips.map(|(n, _)| vip(*n, six)).collect()
}

/// S-18.
fn external_local(service: &ServiceFacts) -> bool {
    let takes = match service.kind {
        "LoadBalancer" | "NodePort" => true,
        "ClusterIP" => !service.external_ips.is_empty(),
        _ => false,
    };
    takes && service.external == Some("Local")
}

///
fn affinity(service: &ServiceFacts) -> Option<u32> {
    service.affinity.map(|secs| secs.unwrap_or(10_800))
}

/// S-17.
fn internal_local(service: &ServiceFacts) -> bool {
    service.internal == Some("Local")
}

impl Facts {
    /// The endpoints of a Service port by target: E-6, E-10 to E-18, E-21.
    fn endpoints(&self, (number, port, six): PortId) -> BTreeMap<Target, Endpoint> {
        let (name, proto, _) = PORTS[port];
        let mut entries: BTreeMap<Target, Vec<&EndpointFacts>> = BTreeMap::new();
        for slice in self.slices.values().filter(|slice| slice.service == number && slice.six == six) {
            for endpoint in slice.endpoints.iter().filter(|endpoint| !endpoint.stray) {
                for at in &slice.ports {
                    let (Some(its_name), its_proto, Some(its_port)) = SLICE_PORTS[*at] else {
                        continue;
                    };
                    if its_name == name && its_proto.unwrap_or(Proto::TCP) == proto {
                        entries.entry((endpoint_ip(endpoint.n, six), its_port)).or_default().push(endpoint);
                    }
                }
            }
        }
        entries.into_iter().map(|(target, entries)| (target, the_one(&entries))).collect()
    }

    /// P-11, P-12: the ready endpoints that topology leaves.
    fn near(&self, ready: BTreeMap<Target, u8>) -> BTreeSet<Target> {
        let zones = |n: u8| {
            self.hints[usize::from(n)].0.iter().map(|zone| ZONES[usize::from(*zone)]).collect::<Vec<_>>()
        };
        let nodes = |n: u8| {
            self.hints[usize::from(n)]
                .1
                .iter()
                .map(|node| super::facts::NODES[usize::from(*node)])
                .collect::<Vec<_>>()
        };
        let here: BTreeSet<_> =
            ready.iter().filter(|(_, n)| nodes(**n).contains(&OWN_NODE)).map(|(t, _)| *t).collect();
        if ready.values().all(|n| !nodes(*n).is_empty()) && !here.is_empty() {
            return here;
        }
        let zone = self.node.as_ref().and_then(|node| node.zone);
        if let Some(zone) = zone.map(|zone| ZONES[usize::from(zone)]) {
            let here: BTreeSet<_> =
                ready.iter().filter(|(_, n)| zones(**n).contains(&zone)).map(|(t, _)| *t).collect();
            if ready.values().all(|n| !zones(*n).is_empty()) && !here.is_empty() {
                return here;
            }
        }
        ready.into_keys().collect()
    }

    /// V-7; none where they are switched off (V-8).
    fn external_addresses(&self, service: &ServiceFacts, six: bool) -> Vec<IpAddr> {
        let numbers = service.external_ips.iter().filter(|_| self.operator.external_ips);
        numbers.map(|n| vip(*n, six)).collect()
    }

    /// P-4, P-6, P-8.
    pub(crate) fn sets(&self, id: PortId) -> Sets {
        let endpoints = self.endpoints(id);
        let local = |e: &Endpoint| endpoint_node(e.n) == Some(OWN_NODE);
        let pick = |f: &dyn Fn(&Endpoint) -> bool| -> BTreeSet<Target> {
            endpoints.iter().filter(|(_, e)| f(e)).map(|(t, _)| *t).collect()
        };
        let ready = endpoints.iter().filter(|(_, e)| e.ready).map(|(t, e)| (*t, e.n)).collect();
        let mut cluster = self.near(ready);
        if cluster.is_empty() {
            cluster = pick(&|e| e.fallback);
        }
        let mut own = pick(&|e| e.ready && local(e));
        if own.is_empty() {
            own = pick(&|e| e.fallback && local(e));
        }
        Sets { cluster, local: own, any: !pick(&|e| e.ready || e.fallback).is_empty() }
    }

    /// Whether this node takes NodePorts at the address (V-33, V-34).
    fn takes_node_ports(&self, addr: IpAddr) -> bool {
        let family = |range: &&IpNet| range.addr().is_ipv6() == addr.is_ipv6();
        self.own(addr.is_ipv6()).contains(&addr)
            && match &self.operator.node_port_ranges {
                None => self.node.is_none() || addr == self.primary(addr.is_ipv6()),
                Some(ranges) => {
                    let ranges: Vec<_> = ranges.iter().filter(family).collect();
                    ranges.is_empty() || ranges.iter().any(|range| range.contains(&addr))
                }
            }
    }

    /// The range by which pods are recognised, per family (M-1, M-3).
    fn pod_range(&self, six: bool) -> Option<&IpNet> {
        let operator = &self.operator;
        let of_node = || self.node.iter().flat_map(|_| &operator.pod_cidrs);
        let none = operator.cluster_cidrs.is_empty();
        let mut all = operator.cluster_cidrs.iter().chain(of_node().filter(|_| none));
        all.find(|range| range.addr().is_ipv6() == six)
    }

    /// Whether pods of a family can be told apart from others (M-5).
    fn knows_pods(&self, six: bool) -> bool {
        self.operator.detect != Detect::Range || self.pod_range(six).is_some()
    }

    /// The class of a source address; packets of pods of this node come in by the bridge (M-1, M-4).
    pub(crate) fn class(&self, source: IpAddr) -> Class {
        let pod = match self.operator.detect {
            Detect::Range => self.pod_range(source.is_ipv6()).is_some_and(|range| range.contains(&source)),
            Detect::Bridge | Detect::Prefix => (0..9)
                .any(|n| endpoint_ip(n, source.is_ipv6()) == source && endpoint_node(n) == Some(OWN_NODE)),
            Detect::Nothing => false,
        };
        if pod {
            Class::Pod
        } else if self.own(source.is_ipv6()).contains(&source) {
            Class::Host
        } else {
            Class::Outside
        }
    }

    /// P-22, Y-16: inside a ServiceCIDR, and neither the ClusterIP nor another address of a Service that is
    /// proxied, nor the node's own.
    pub(crate) fn unallocated(&self, dst: IpAddr) -> bool {
        let six = dst.is_ipv6();
        let used = self.services.values().filter(|service| proxied(service, six)).any(|service| {
            cluster_address(service, six) == Some(dst)
                || self.external_addresses(service, six).contains(&dst)
                || balancer_addresses(service, six).contains(&dst)
        });
        self.operator.drop_unallocated
            && self.ranges.iter().any(|range| range.contains(&dst))
            && !used
            && !self.own(six).contains(&dst)
    }

    /// V-1 step 3 and 4, X-17: who owns a destination, and as what.
    fn owner(&self, dst: IpAddr, proto: Proto, number: u16) -> Option<(PortId, Destination)> {
        let six = dst.is_ipv6();
        let mut owners = Vec::new();
        for (n, service) in self.services.iter().filter(|(_, service)| proxied(service, six)) {
            for (port, node_port) in &service.ports {
                let (_, its_proto, its_number) = PORTS[*port];
                if its_proto != proto {
                    continue;
                }
                let mut owns = |what| owners.push((what, service.day, *n, *port));
                if its_number == number {
                    if cluster_address(service, six) == Some(dst) {
                        owns(Destination::ClusterIp);
                    } else if self.external_addresses(service, six).contains(&dst)
                        || balancer_addresses(service, six).contains(&dst)
                    {
                        owns(Destination::Vip);
                    }
                }
                let accepted = dst.is_loopback() || self.takes_node_ports(dst);
                if *node_port != 0 && *node_port == number && accepted {
                    owns(Destination::NodePort);
                }
            }
        }
        owners.sort();
        owners.first().map(|(what, _, n, port)| ((*n, *port, six), *what))
    }

    /// Whether an address may stand for this node as a new source: its own, and no Service's (M-13).
    pub(crate) fn may_masquerade(&self, addr: IpAddr) -> bool {
        let six = addr.is_ipv6();
        let mut proxied = self.services.values().filter(|service| proxied(service, six));
        self.own(six).contains(&addr)
            && !proxied.any(|service| {
                self.external_addresses(service, six).contains(&addr)
                    || balancer_addresses(service, six).contains(&addr)
            })
    }

    /// V-15 to V-19: whether a source may use the load-balancer addresses of a Service; `None` when all may.
    fn allowed(&self, service: &ServiceFacts, source: IpAddr) -> Option<bool> {
        let six = source.is_ipv6();
        let ranges = service.ranges.iter().filter_map(|n| source_range(*n).trim().parse::<IpNet>().ok());
        let ranges: Vec<_> = ranges.filter(|range| range.addr().is_ipv6() == six).collect();
        if ranges.is_empty() || ranges.iter().any(|range| range.prefix_len() == 0) {
            return None;
        }
        let listed = |ip: &IpAddr| ranges.iter().any(|range| range.contains(ip));
        let itself = self.node.is_some()
            && listed(&self.primary(six))
            && balancer_addresses(service, six).contains(&source);
        Some(listed(&source) || itself)
    }

    /// M-6 to M-12. Flows to endpoints of this node keep their client unless the operator wants otherwise,
    /// since their answers pass here anyway: the one deliberate difference.
    fn masqueraded(
        &self,
        id: PortId,
        what: Destination,
        source: IpAddr,
        class: Class,
        target: Target,
    ) -> bool {
        if source == target.0 {
            return true; // M-10
        }
        let service = &self.services[&id.0];
        let by_rule = match what {
            Destination::ClusterIp if self.operator.masquerade_all => return true,
            Destination::ClusterIp => self.knows_pods(id.2) && class != Class::Pod,
            _ if external_local(service) => class == Class::Host,
            _ => true,
        };
        let here = self.endpoints(id).get(&target).is_some_and(|e| endpoint_node(e.n) == Some(OWN_NODE));
        by_rule && (!here || self.operator.masquerade_local)
    }

    /// What a new flow gets.
    pub(crate) fn ruling(
        &self,
        source: IpAddr,
        class: Class,
        dst: IpAddr,
        proto: Proto,
        number: u16,
    ) -> Ruling {
        let mut ruling = Ruling::PASS;
        // V-36; that host processes reach them all the same is a deliberate difference.
        if dst.is_loopback() && !(class == Class::Host && self.operator.localhost_node_ports) {
            return ruling;
        }
        if dst.is_ipv6() && !self.operator.ipv6 {
            return ruling; // S-12
        }
        let Some((id, what)) = self.owner(dst, proto, number) else {
            let six = dst.is_ipv6();
            if self.services.values().any(|service| cluster_address(service, six) == Some(dst)) {
                ruling.expected = Expected::Refuse; // P-21
            } else if self.unallocated(dst) {
                ruling.expected = Expected::Drop;
            }
            return ruling;
        };
        let service = &self.services[&id.0];
        ruling.port = Some(id);
        ruling.affinity = affinity(service);
        if what == Destination::Vip && balancer_addresses(service, id.2).contains(&dst) {
            let allowed = self.allowed(service, source);
            ruling.restricted = allowed.is_some();
            if allowed == Some(false) {
                ruling.expected = Expected::Drop; // V-17, V-21
                return ruling;
            }
        }
        ruling.by_class = what != Destination::ClusterIp && external_local(service);
        let sets = self.sets(id);
        let local = match what {
            Destination::ClusterIp => internal_local(service),
            _ => external_local(service) && class == Class::Outside,
        };
        let set = if local { sets.local } else { sets.cluster };
        ruling.expected = if !sets.any {
            Expected::Refuse // P-14
        } else if set.is_empty() {
            Expected::Drop // P-15, P-16
        } else {
            let with = |target: Target| (target, self.masqueraded(id, what, source, class, target));
            Expected::Forward(set.into_iter().map(with).collect())
        };
        ruling
    }

    /// What a call of a socket gets: as any other flow of its class, where sockets of the class are translated.
    pub(crate) fn call_ruling(&self, source: IpAddr, class: Class, to: Target, proto: Proto) -> Ruling {
        let translated = match self.operator.socket_lb {
            SocketLb::All => true,
            SocketLb::Host => class == Class::Host,
            SocketLb::Off => false,
        };
        // What a pod sends to a port of the node may be a server's answer to a process there: only packets tell.
        let answer = class != Class::Host && proto == Proto::UDP && self.own(to.0.is_ipv6()).contains(&to.0);
        let mut ruling = self.ruling(source, class, to.0, proto, to.1);
        if !translated || answer {
            ruling = Ruling::PASS;
        }
        ruling
    }

    /// Every Service port that keeps clients together, with its time-out and the endpoints a record may name
    ///
    pub(crate) fn sticky(&self) -> BTreeMap<PortId, (u32, BTreeSet<Target>)> {
        let mut all = BTreeMap::new();
        for (id, service) in self.proxied_ports() {
            if let Some(secs) = affinity(service) {
                all.insert(id, (secs, self.used(id)));
            }
        }
        all
    }

    fn proxied_ports(&self) -> impl Iterator<Item = (PortId, &ServiceFacts)> {
        self.services.iter().flat_map(|(n, service)| {
            let served = FAMILIES.into_iter().filter(|six| self.operator.ipv6 || !six); // S-12
            let families = served.filter(|six| proxied(service, *six));
            families.flat_map(move |six| service.ports.keys().map(move |port| ((*n, *port, six), service)))
        })
    }

    /// Whether a UDP flow must stay at its endpoint, because that serves (C-5); `None` leaves it open: new
    /// flows still go to an endpoint that says of itself that it does not serve.
    pub(crate) fn udp_stays(&self, id: PortId, target: Target) -> Option<bool> {
        if !self.proxied_ports().any(|(port, _)| port == id) {
            return Some(false);
        }
        if self.endpoints(id).get(&target).is_some_and(|endpoint| endpoint.serving) {
            return Some(true);
        }
        if self.used(id).contains(&target) { None } else { Some(false) }
    }

    /// CL where it is used, and LO where it is used (S-19).
    fn used(&self, id: PortId) -> BTreeSet<Target> {
        let (service, sets, six) = (&self.services[&id.0], self.sets(id), id.2);
        let port = id.1;
        let reachable = service.ports[&port] != 0
            || !balancer_addresses(service, six).is_empty()
            || !self.external_addresses(service, six).is_empty();
        let cluster = !internal_local(service) || reachable;
        let local = internal_local(service) || external_local(service) && reachable;
        let take = |wanted, set: &BTreeSet<Target>| if wanted { set.clone() } else { BTreeSet::new() };
        &take(cluster, &sets.cluster) | &take(local, &sets.local)
    }
}

/// E-18, E-21: one entry out of several for one target. Among those that are equal to the rule the most
/// usable one.
fn the_one(entries: &[&EndpointFacts]) -> Endpoint {
    let read = |e: &EndpointFacts| {
        let [ready, serving, terminating] = e.conditions;
        (ready.unwrap_or(true), serving.unwrap_or(true), terminating.unwrap_or(false))
    };
    let best = entries.iter().map(|e| (read(e), e.n)).max_by_key(|((r, s, t), _)| (!t, *r, *s));
    let ((ready, serving, terminating), n) = best.expect("a target comes from an entry");
    Endpoint { n, ready, fallback: !ready && serving && terminating, serving }
}

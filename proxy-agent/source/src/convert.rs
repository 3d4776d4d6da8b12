//! Converts Kubernetes objects into ours. It never fails: the valid parts of an object are used, and each invalid one gives
//! a warning (X-1…X-16).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proxy_common::addr::{Addr, Proto};

use super::address;
use agent_core::model::{
    Affinity, Endpoint, Family, Names, Node, ObjectName, Port, Service, Slice, SlicePort,
};

/// Whether a pod's sockets are translated at connect.
const ANNOTATION_SOCKET_LB: &str = "ebpf-proxy/socket-lb";
/// What happens to connections when an endpoint leaves a Service without terminating: `keep` or `reset`.
const ANNOTATION_ON_LOSS: &str = "ebpf-proxy/on-endpoint-loss";
/// The UID that kubelet gives a static pod.
const ANNOTATION_MIRROR: &str = "kubernetes.io/config.mirror";
/// A Service with this label belongs to another proxy, whatever the value (S-1).
pub const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// A slice with this label belongs to a headless Service (E-2).
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
const ANNOTATION_TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
const TAINT_TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// What the API server fills in when a Service asks for affinity without a time-out.
const DEFAULT_AFFINITY_SECS: u32 = 10_800;
const MAX_AFFINITY_SECS: i32 = 86_400;

/// Lines about parts of an object that could not be used.
#[derive(Debug, Default)]
struct Warnings(Vec<String>);

impl Warnings {
    fn add(&mut self, part: impl std::fmt::Display, why: impl std::fmt::Display) {
        self.0.push(format!("{part} {why}"));
    }

    /// The address in `text`, if it can be a Service's or an endpoint's.
    fn ip(&mut self, part: impl std::fmt::Display, text: &str) -> Option<IpAddr> {
        match address::ip(text) {
            Ok(ip) if Addr::from(ip).is_never_service() => {
                self.add(
                    part,
                    format_args!("{text:?} is a loopback, multicast or unspecified address: skipped"),
                );
                None
            }
            Ok(ip) => Some(ip),
            Err(fault) => {
                self.add(part, format_args!("{text:?} {fault}: skipped"));
                None
            }
        }
    }

    fn ranges(&mut self, part: &str, texts: &[String]) -> Vec<IpNet> {
        let mut ranges = Vec::new();
        for (i, text) in texts.iter().enumerate() {
            match address::range(text) {
                Ok(range) => ranges.push(range),
                Err(fault) => {
                    self.add(format_args!("{part}[{i}]"), format_args!("{text:?} {fault}: skipped"));
                }
            }
        }
        ranges
    }

    fn proto(&mut self, part: impl std::fmt::Display, text: Option<&str>) -> Option<Proto> {
        match text {
            None | Some("" | "TCP") => Some(Proto::TCP),
            Some("UDP") => Some(Proto::UDP),
            Some("SCTP") => Some(Proto::SCTP),
            Some(other) => {
                self.add(
                    part,
                    format_args!("has protocol {other:?}, which is not TCP, UDP or SCTP: skipped"),
                );
                None
            }
        }
    }

    fn port(&mut self, part: impl std::fmt::Display, number: i32) -> Option<u16> {
        match u16::try_from(number) {
            Ok(port) if port != 0 => Some(port),
            _ => {
                self.add(part, format_args!("has port {number}, which is not in 1…65535: skipped"));
                None
            }
        }
    }
}

/// Namespace and name. An object without a namespace is in `default`, as with `kubectl`.
#[must_use]
pub fn object_name(metadata: &ObjectMeta) -> ObjectName {
    let namespace = metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty());
    ObjectName::new(namespace.unwrap_or("default"), metadata.name.as_deref().unwrap_or_default())
}

/// A Service, or `None` if it is not to be proxied (S-1…S-5).
#[must_use]
pub fn service(object: &core::Service) -> (Option<Service>, Vec<String>) {
    let mut warnings = Warnings::default();
    let service = object.spec.as_ref().filter(|spec| is_proxied(object, spec)).map(|spec| {
        let local = |policy: &Option<String>| policy.as_deref() == Some("Local");
        let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
        let listed_external = spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty());
        let takes_external =
            matches!(kind, "LoadBalancer" | "NodePort") || kind == "ClusterIP" && listed_external;
        let external_local = local(&spec.external_traffic_policy) && takes_external; // S-18
        Service {
            cluster_ips: cluster_ips(spec, &mut warnings),
            ports: ports(spec, &mut warnings),
            external_ips: external_ips(spec, &mut warnings),
            load_balancer_ips: load_balancer_ips(object, &mut warnings),
            source_ranges: source_ranges(spec, &mut warnings),
            affinity: affinity(spec, &mut warnings),
            internal_local: local(&spec.internal_traffic_policy), // S-17
            external_local,
            health_check_node_port: health_check_node_port(spec, kind, external_local, &mut warnings),
            reset_on_loss: reset_on_loss(&object.metadata, &mut warnings),
            created: object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
        }
    });
    (service, warnings.0)
}

fn is_proxied(object: &core::Service, spec: &core::ServiceSpec) -> bool {
    let labelled =
        object.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(LABEL_PROXY_NAME));
    let has_ip = !matches!(spec.cluster_ip.as_deref(), None | Some("" | "None"));
    let has_ports = spec.ports.as_ref().is_some_and(|ports| !ports.is_empty());
    !labelled && has_ip && has_ports && spec.type_.as_deref() != Some("ExternalName")
}

/// At most one ClusterIP a family (S-9).
fn cluster_ips(spec: &core::ServiceSpec, warnings: &mut Warnings) -> Vec<IpAddr> {
    let families = spec.ip_families.as_deref().unwrap_or_default();
    if families.is_empty() {
        let text = spec.cluster_ip.as_deref().unwrap_or_default();
        return warnings.ip("spec.clusterIP", text).into_iter().collect();
    }
    let texts = spec.cluster_ips.as_deref().unwrap_or_default();
    let mut ips = Vec::new();
    for (name, family) in [("IPv4", Family::V4), ("IPv6", Family::V6)] {
        let Some(index) = families.iter().position(|listed| listed == name) else { continue };
        let Some(text) = texts.get(index) else { continue };
        let part = format!("spec.clusterIPs[{index}]");
        let Some(ip) = warnings.ip(&part, text) else { continue };
        if Family::of(&ip) == family {
            ips.push(ip);
        } else {
            //
            warnings.add(
                part,
                format_args!("{text:?} is not of family {name}, as spec.ipFamilies says: skipped"),
            );
        }
    }
    ips
}

fn ports(spec: &core::ServiceSpec, warnings: &mut Warnings) -> Vec<Port> {
    let mut seen = BTreeSet::new();
    let mut ports: Vec<Port> = Vec::new();
    for (i, port) in spec.ports.iter().flatten().enumerate() {
        let part = format!("spec.ports[{i}]");
        let name: Arc<str> = port.name.as_deref().unwrap_or_default().into();
        let Some(proto) = warnings.proto(&part, port.protocol.as_deref()) else { continue };
        let Some(number) = warnings.port(&part, port.port) else { continue };
        let node_port = match port.node_port {
            None | Some(0) => 0,
            Some(node_port) => warnings.port(format_args!("{part}.nodePort"), node_port).unwrap_or(0),
        };
        if !seen.insert((name.clone(), proto)) {
            warnings.add(&part, format_args!("repeats {proto} port {name:?}: the last one counts"));
            ports.retain(|known| known.name != name || known.proto != proto);
        }
        ports.push(Port { name, proto, port: number, node_port });
    }
    ports
}

fn external_ips(spec: &core::ServiceSpec, warnings: &mut Warnings) -> Vec<IpAddr> {
    let listed = spec.external_ips.iter().flatten().enumerate();
    let listed = listed.filter(|(_, text)| !text.trim().is_empty()); // blank ones give no warning.
    listed.filter_map(|(i, text)| warnings.ip(format_args!("spec.externalIPs[{i}]"), text)).collect()
}

fn load_balancer_ips(object: &core::Service, warnings: &mut Warnings) -> Vec<IpAddr> {
    let status = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.as_deref()).unwrap_or_default();
    // V-9: in any other mode traffic has to reach the load balancer itself.
    let vips = ingress.iter().enumerate().filter(|(_, i)| matches!(i.ip_mode.as_deref(), None | Some("VIP")));
    vips.filter_map(|(i, entry)| Some((i, entry.ip.as_deref().filter(|ip| !ip.is_empty())?)))
        .filter_map(|(i, text)| warnings.ip(format_args!("status.loadBalancer.ingress[{i}].ip"), text))
        .collect()
}

fn source_ranges(spec: &core::ServiceSpec, warnings: &mut Warnings) -> Vec<IpNet> {
    let mut ranges = Vec::new();
    for (i, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        let text = text.trim(); // V-15
        match address::range(text) {
            Ok(range) => ranges.push(range),
            Err(_) if text.is_empty() => {}
            Err(fault) => warnings.add(
                format_args!("spec.loadBalancerSourceRanges[{i}]"),
                format_args!("{text:?} {fault}: skipped"),
            ),
        }
    }
    ranges
}

fn affinity(spec: &core::ServiceSpec, warnings: &mut Warnings) -> Affinity {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => Affinity::None,
        Some("ClientIP") => {
            let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
            let secs = config.and_then(|config| config.timeout_seconds);
            Affinity::ClientIp(secs.map_or(DEFAULT_AFFINITY_SECS, |secs| {
                u32::try_from(secs.clamp(1, MAX_AFFINITY_SECS)).unwrap_or(DEFAULT_AFFINITY_SECS)
            }))
        }
        Some(other) => {
            warnings.add("spec.sessionAffinity", format_args!("{other:?} is not known: taken as None"));
            Affinity::None
        }
    }
}

fn health_check_node_port(
    spec: &core::ServiceSpec,
    kind: &str,
    external_local: bool,
    warnings: &mut Warnings,
) -> u16 {
    if kind != "LoadBalancer" || !external_local {
        return 0; // S-20
    }
    match spec.health_check_node_port {
        None | Some(0) => {
            warnings
                .add("spec.healthCheckNodePort", "is not set: load balancers cannot tell which nodes serve");
            0
        }
        Some(port) => warnings.port("spec.healthCheckNodePort", port).unwrap_or(0),
    }
}

fn reset_on_loss(metadata: &ObjectMeta, warnings: &mut Warnings) -> bool {
    match metadata.annotations.as_ref().and_then(|all| all.get(ANNOTATION_ON_LOSS)).map(String::as_str) {
        None | Some("keep") => false,
        Some("reset") => true,
        Some(other) => {
            warnings.add(
                format_args!("the annotation {ANNOTATION_ON_LOSS}"),
                format_args!("{other:?} is neither keep nor reset: taken as keep"),
            );
            false
        }
    }
}

/// An EndpointSlice, or `None` when it belongs to no Service that could be proxied (E-2, E-4, E-5).
#[must_use]
pub fn slice(object: &discovery::EndpointSlice) -> (Option<Slice>, Vec<String>) {
    let mut warnings = Warnings::default();
    let labels = object.metadata.labels.as_ref();
    if labels.is_some_and(|labels| labels.contains_key(LABEL_HEADLESS)) {
        return (None, warnings.0);
    }
    let owner = labels.and_then(|labels| labels.get(LABEL_SERVICE_NAME)).filter(|name| !name.is_empty());
    let Some(owner) = owner else {
        warnings
            .add("label", format_args!("{LABEL_SERVICE_NAME} is missing: the slice belongs to no Service"));
        return (None, warnings.0);
    };
    let family = match object.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        "FQDN" => return (None, warnings.0),
        other => {
            warnings.add("addressType", format_args!("{other:?} is not known: the slice is ignored"));
            return (None, warnings.0);
        }
    };
    let service = ObjectName { name: owner.as_str().into(), ..object_name(&object.metadata) };
    let ports = slice_ports(object, &mut warnings);
    let mut names = Names::default();
    let endpoints = object.endpoints.iter().flatten().enumerate();
    let endpoints = endpoints.filter_map(|(i, e)| slice_endpoint(i, e, family, &mut names, &mut warnings));
    let endpoints = endpoints.collect();
    (Some(Slice { service, family, ports, endpoints }), warnings.0)
}

/// When the endpoints of a slice changed, from its controller's annotation (E-24).
#[must_use]
pub fn triggered(object: &discovery::EndpointSlice) -> Option<Timestamp> {
    object.metadata.annotations.as_ref()?.get(ANNOTATION_TRIGGERED)?.parse().ok()
}

fn slice_ports(object: &discovery::EndpointSlice, warnings: &mut Warnings) -> Vec<SlicePort> {
    let mut ports = Vec::new();
    for (i, port) in object.ports.iter().flatten().enumerate() {
        let part = format!("ports[{i}]");
        let Some(name) = port.name.as_deref() else {
            warnings.add(part, "has no name: skipped"); // E-11
            continue;
        };
        let Some(number) = port.port else {
            warnings.add(part, "has no port number: skipped"); // E-12
            continue;
        };
        let Some(proto) = warnings.proto(&part, port.protocol.as_deref()) else { continue };
        let Some(port) = warnings.port(&part, number) else { continue };
        ports.push(SlicePort { name: name.into(), proto, port });
    }
    ports
}

fn slice_endpoint(
    i: usize,
    endpoint: &discovery::Endpoint,
    family: Family,
    names: &mut Names,
    warnings: &mut Warnings,
) -> Option<Endpoint> {
    let part = format!("endpoints[{i}].addresses");
    let Some(text) = endpoint.addresses.first() else {
        warnings.add(part, "is empty: skipped"); // E-16
        return None;
    };
    let ip = warnings.ip(format_args!("{part}[0]"), text)?;
    if Family::of(&ip) != family {
        warnings.add(part, format_args!("{text:?} is not of the slice's addressType: skipped"));
        return None;
    }
    let conditions = endpoint.conditions.as_ref();
    let hints = endpoint.hints.as_ref();
    let zones = hints.and_then(|hints| hints.for_zones.as_deref()).unwrap_or_default();
    let nodes = hints.and_then(|hints| hints.for_nodes.as_deref()).unwrap_or_default();
    Some(Endpoint {
        ip,
        ready: conditions.and_then(|c| c.ready).unwrap_or(true), // E-18
        serving: conditions.and_then(|c| c.serving).unwrap_or(true),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        node: endpoint.node_name.as_deref().map(|name| names.get(name)),
        zone_hints: zones.iter().map(|zone| names.get(&zone.name)).collect(),
        node_hints: nodes.iter().map(|node| names.get(&node.name)).collect(),
    })
}

/// A legacy `Endpoints` object: a slice for each subset and family with addresses.
#[must_use]
pub fn endpoints(object: &core::Endpoints) -> (Vec<Slice>, Vec<String>) {
    let mut warnings = Warnings::default();
    if object.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(LABEL_HEADLESS)) {
        return (Vec::new(), warnings.0);
    }
    let service = object_name(&object.metadata);
    let mut slices = Vec::new();
    for (i, subset) in object.subsets.iter().flatten().enumerate() {
        let mut ports = Vec::new();
        for (j, port) in subset.ports.iter().flatten().enumerate() {
            let part = format!("subsets[{i}].ports[{j}]");
            let Some(proto) = warnings.proto(&part, port.protocol.as_deref()) else { continue };
            let Some(number) = warnings.port(&part, port.port) else { continue };
            let name = port.name.as_deref().unwrap_or_default().into();
            ports.push(SlicePort { name, proto, port: number });
        }
        let endpoints = subset_endpoints(i, subset, &mut warnings);
        for family in [Family::V4, Family::V6] {
            let endpoints: Vec<Endpoint> =
                endpoints.iter().filter(|endpoint| Family::of(&endpoint.ip) == family).cloned().collect();
            if !endpoints.is_empty() {
                slices.push(Slice { service: service.clone(), family, ports: ports.clone(), endpoints });
            }
        }
    }
    (slices, warnings.0)
}

fn subset_endpoints(i: usize, subset: &core::EndpointSubset, warnings: &mut Warnings) -> Vec<Endpoint> {
    let mut names = Names::default();
    let lists =
        [("addresses", &subset.addresses, true), ("notReadyAddresses", &subset.not_ready_addresses, false)];
    let mut endpoints = Vec::new();
    for (list, addresses, ready) in lists {
        for (j, address) in addresses.iter().flatten().enumerate() {
            let Some(ip) = warnings.ip(format_args!("subsets[{i}].{list}[{j}].ip"), &address.ip) else {
                continue;
            };
            endpoints.push(Endpoint {
                ip,
                ready,
                serving: ready,
                terminating: false,
                node: address.node_name.as_deref().map(|name| names.get(name)),
                zone_hints: Vec::new(),
                node_hints: Vec::new(),
            });
        }
    }
    endpoints
}

/// Our own Node object.
#[must_use]
pub fn node(object: &core::Node) -> (Node, Vec<String>) {
    let mut warnings = Warnings::default();
    let labels = object.metadata.labels.as_ref();
    let zone = labels.and_then(|labels| labels.get(LABEL_ZONE)).filter(|zone| !zone.is_empty());
    let spec = object.spec.as_ref();
    let to_be_deleted = spec
        .and_then(|spec| spec.taints.as_deref())
        .is_some_and(|taints| taints.iter().any(|taint| taint.key == TAINT_TO_BE_DELETED));
    let node = Node {
        ips: node_ips(object, &mut warnings),
        pod_cidrs: spec.map(|spec| pod_cidrs(spec, &mut warnings)).unwrap_or_default(),
        zone: zone.map(|zone| zone.as_str().into()),
        eligible: !to_be_deleted && object.metadata.deletion_timestamp.is_none(),
    };
    (node, warnings.0)
}

/// The ranges of ClusterIPs in a ServiceCIDR, whatever its status (Y-16).
#[must_use]
pub fn service_cidr(object: &networking::ServiceCIDR) -> (Vec<IpNet>, Vec<String>) {
    let mut warnings = Warnings::default();
    let texts = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    (warnings.ranges("spec.cidrs", texts), warnings.0)
}

/// The UID after which a pod's cgroup is named, if its sockets are not to be translated at connect. Kubelet gives a static
/// pod another UID than its object has.
#[must_use]
pub fn excluded(object: &core::Pod) -> (Option<String>, Vec<String>) {
    let annotation = |name: &str| object.metadata.annotations.as_ref().and_then(|all| all.get(name));
    let host_network = object.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true));
    let warning = match annotation(ANNOTATION_SOCKET_LB).map(String::as_str) {
        None | Some("true") => return (None, Vec::new()),
        Some("false") if host_network => "cannot be: packets of the node's own network are not translated",
        Some("false") => {
            return (annotation(ANNOTATION_MIRROR).or(object.metadata.uid.as_ref()).cloned(), Vec::new());
        }
        Some(_) => "must be \"true\" or \"false\"",
    };
    (None, vec![format!("the annotation {ANNOTATION_SOCKET_LB} {warning}")])
}

/// InternalIPs first, then ExternalIPs (Y-10).
fn node_ips(object: &core::Node, warnings: &mut Warnings) -> Vec<IpAddr> {
    let addresses = object.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    let mut ips = Vec::new();
    for kind in ["InternalIP", "ExternalIP"] {
        for (i, address) in addresses.iter().enumerate().filter(|(_, address)| address.type_ == kind) {
            let ip = warnings.ip(format_args!("status.addresses[{i}]"), &address.address);
            ips.extend(ip.filter(|ip| !ips.contains(ip)));
        }
    }
    ips
}

fn pod_cidrs(spec: &core::NodeSpec, warnings: &mut Warnings) -> Vec<IpNet> {
    let listed = spec.pod_cidrs.as_deref().filter(|listed| !listed.is_empty());
    let texts = listed.or(spec.pod_cidr.as_ref().map(std::slice::from_ref)).unwrap_or_default();
    let mut ranges = warnings.ranges("spec.podCIDRs", texts);
    // A pod's address cannot be a Service's, so this range would disable all Services.
    ranges.retain(|range| {
        let some = range.prefix_len() > 0;
        if !some {
            warnings
                .add("spec.podCIDRs", format_args!("{range} is every address, and no node's own: skipped"));
        }
        some
    });
    ranges
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;

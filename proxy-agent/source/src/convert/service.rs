//! Services.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{LABEL_PROXY_NAME, Warnings, address};
use agent_core::model::{Affinity, Family, LoadBalancerMode, Port, Service};

/// What happens to connections when an endpoint leaves a Service without terminating: `keep` or `reset`.
pub(super) const ANNOTATION_ON_LOSS: &str = "ebpf-proxy/on-endpoint-loss";
/// What becomes of packets from outside for endpoints on other nodes: `snat` or `dsr`.
pub(super) const ANNOTATION_MODE: &str = "ebpf-proxy/loadbalancer-mode";
/// What the API server fills in when a Service asks for affinity without a time-out.
const DEFAULT_AFFINITY_SECS: u32 = 10_800;
const MAX_AFFINITY_SECS: i32 = 86_400;

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
            mode: mode(&object.metadata, &mut warnings),
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

fn annotation<'a>(metadata: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    metadata.annotations.as_ref().and_then(|all| all.get(name)).map(String::as_str)
}

fn mode(metadata: &ObjectMeta, warnings: &mut Warnings) -> Option<LoadBalancerMode> {
    match annotation(metadata, ANNOTATION_MODE)? {
        "snat" => Some(LoadBalancerMode::Snat),
        "dsr" => Some(LoadBalancerMode::Dsr),
        other => {
            warnings.add(
                format_args!("the annotation {ANNOTATION_MODE}"),
                format_args!("{other:?} is neither snat nor dsr: the agent's --loadbalancer-mode holds"),
            );
            None
        }
    }
}

fn reset_on_loss(metadata: &ObjectMeta, warnings: &mut Warnings) -> bool {
    match annotation(metadata, ANNOTATION_ON_LOSS) {
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

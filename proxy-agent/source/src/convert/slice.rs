//! EndpointSlices, and the legacy Endpoints that a manifest may hold.

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;

use super::{LABEL_HEADLESS, LABEL_SERVICE_NAME, Warnings, object_name};
use agent_core::model::{Endpoint, Family, Hints, Names, ObjectName, Slice, SlicePort};

const ANNOTATION_TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";

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
        hints: Hints::new(
            zones.iter().map(|zone| names.get(&zone.name)).collect(),
            nodes.iter().map(|node| names.get(&node.name)).collect(),
        ),
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
                hints: None,
            });
        }
    }
    endpoints
}

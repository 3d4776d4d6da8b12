//! The facts as Kubernetes objects, and those as changes for the agent.

use agent_core::model::Change;
use agent_core::model::{DetectLocal, Link, NodePortAddresses, ObjectName, Settings};
use agent_source::convert;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use proxy_common::abi::PortRange;
use proxy_common::addr::Proto;
use serde_json::{Value, json};

use super::facts::{
    Detect, FAMILIES, Facts, NODES, OWN_NODE, PORTS, SLICE_PORTS, ServiceFacts, SliceFacts, Stale, ZONES,
    cluster_ip, endpoint_ip, endpoint_node, own_addresses, source_range, vip,
};

/// The uplink.
pub(crate) const UPLINK: u32 = 102;
/// The bridge of the pods.
pub(crate) const BRIDGE: u32 = 103;

fn word(proto: Proto) -> &'static str {
    match proto {
        Proto::TCP => "TCP",
        Proto::UDP => "UDP",
        _ => "SCTP",
    }
}

fn day(n: u8) -> String {
    format!("2026-01-0{}T00:00:00Z", n + 1)
}

fn name_of(prefix: &str, n: u8) -> String {
    format!("{prefix}{n}")
}

fn both(numbers: impl Iterator<Item = u8> + Clone) -> Vec<String> {
    numbers.flat_map(|n| FAMILIES.map(|six| vip(n, six).to_string())).collect()
}

fn service(n: u8, facts: &ServiceFacts) -> Value {
    let families: Vec<bool> = FAMILIES.into_iter().filter(|six| facts.families[usize::from(*six)]).collect();
    let ips: Vec<String> = match facts.cluster_ip {
        Some(ip) => families.iter().map(|six| cluster_ip(ip, *six).to_string()).collect(),
        None => vec!["None".into()],
    };
    let ports: Vec<Value> = facts.ports.iter().map(|(port, node_port)| {
        let (name, proto, number) = PORTS[*port];
        json!({ "name": name, "protocol": word(proto), "port": number, "nodePort": node_port, "targetPort": 1 })
    }).collect();
    let ingress: Vec<Value> = facts
        .ingress
        .iter()
        .flat_map(|(n, mode)| FAMILIES.map(|six| json!({ "ip": vip(*n, six).to_string(), "ipMode": mode })))
        .collect();
    let labels =
        if facts.foreign { json!({ "service.kubernetes.io/service-proxy-name": "" }) } else { json!({}) };
    let annotations = facts.mode.map(|mode| json!({ "ebpf-proxy/loadbalancer-mode": mode }));
    json!({
        "metadata": { "name": name_of("s", n), "namespace": "default", "labels": labels,
            "annotations": annotations, "creationTimestamp": day(facts.day) },
        "spec": {
            "type": facts.kind,
            "clusterIP": ips.first(), "clusterIPs": ips,
            "ipFamilies": families.iter().map(|six| if *six { "IPv6" } else { "IPv4" }).collect::<Vec<_>>(),
            "ports": ports,
            "externalIPs": both(facts.external_ips.iter().copied()),
            "loadBalancerSourceRanges": facts.ranges.iter().map(|n| source_range(*n)).collect::<Vec<_>>(),
            "sessionAffinity": if facts.affinity.is_some() { "ClientIP" } else { "None" },
            "sessionAffinityConfig": facts.affinity.flatten().map(|secs| json!({ "clientIP": { "timeoutSeconds": secs } })),
            "internalTrafficPolicy": facts.internal,
            "externalTrafficPolicy": facts.external,
        },
        "status": { "loadBalancer": { "ingress": ingress } },
    })
}

fn slice(facts: &SliceFacts, n: u8, all: &Facts) -> Value {
    let endpoints: Vec<Value> = facts
        .endpoints
        .iter()
        .map(|endpoint| {
            let (zones, nodes) = &all.hints[usize::from(endpoint.n)];
            let [ready, serving, terminating] = endpoint.conditions;
            let named = |numbers: &[u8], names: [&str; 3]| -> Vec<Value> {
                numbers.iter().map(|n| json!({ "name": names[usize::from(*n)] })).collect()
            };
            json!({
                "addresses": [endpoint_ip(endpoint.n, facts.six != endpoint.stray).to_string(), "10.9.9.9"],
                "conditions": { "ready": ready, "serving": serving, "terminating": terminating },
                "nodeName": endpoint_node(endpoint.n),
                "hints": { "forZones": named(zones, ZONES), "forNodes": named(nodes, NODES) },
            })
        })
        .collect();
    let ports: Vec<Value> = facts
        .ports
        .iter()
        .map(|at| {
            let (name, proto, port) = SLICE_PORTS[*at];
            json!({ "name": name, "protocol": proto.map(word), "port": port })
        })
        .collect();
    json!({
        "metadata": { "name": name_of("e", n), "namespace": "default",
            "labels": { "kubernetes.io/service-name": name_of("s", facts.service) } },
        "addressType": if facts.six { "IPv6" } else { "IPv4" },
        "endpoints": endpoints, "ports": ports,
    })
}

/// A Service as it is observed now.
pub(crate) fn service_change(facts: &Facts, n: u8) -> Change {
    let object = facts.services.get(&n).and_then(|facts| {
        let object: core::Service = serde_json::from_value(service(n, facts)).expect("a Service");
        convert::service(&object).0
    });
    Change::Service(ObjectName::new("default", &name_of("s", n)), object)
}

/// A slice as it is observed now.
pub(crate) fn slice_change(facts: &Facts, n: u8) -> Change {
    let object = facts.slices.get(&n).and_then(|its| {
        let object: discovery::EndpointSlice =
            serde_json::from_value(slice(its, n, facts)).expect("an EndpointSlice");
        convert::slice(&object).0
    });
    Change::Slice(ObjectName::new("default", &name_of("e", n)), object)
}

/// The node as it is observed now.
pub(crate) fn node_change(facts: &Facts) -> Change {
    let Some(node) = &facts.node else { return Change::Node(None) };
    let primary = FAMILIES
        .map(|six| json!({ "type": "InternalIP", "address": own_addresses(six)[node.primary].to_string() }));
    let labels = match node.zone {
        Some(zone) => json!({ "topology.kubernetes.io/zone": ZONES[usize::from(zone)] }),
        None => json!({}),
    };
    let cidrs: Vec<String> = facts.operator.pod_cidrs.iter().map(ToString::to_string).collect();
    let object: core::Node = serde_json::from_value(json!({
        "metadata": { "name": OWN_NODE, "labels": labels },
        "spec": { "podCIDRs": cidrs },
        "status": { "addresses": primary },
    }))
    .expect("a Node");
    Change::Node(Some(convert::node(&object).0))
}

/// The ServiceCIDRs as they are observed now.
pub(crate) fn ranges_change(facts: &Facts) -> Change {
    let ranges = Some(facts.ranges.clone()).filter(|ranges| !ranges.is_empty());
    Change::ServiceRanges("kubernetes".into(), ranges)
}

/// The node's interfaces as they are observed now.
pub(crate) fn links_change(facts: &Facts) -> Change {
    links(facts.has)
}

/// The node's interfaces with those of [`own_addresses`] that it has.
pub(crate) fn links(has: [bool; 3]) -> Change {
    let link = |index, name: &str, at: &[usize]| Link {
        index,
        name: name.into(),
        loopback: false,
        up: true,
        layer3: false,
        addresses: FAMILIES
            .into_iter()
            .flat_map(|six| {
                let there = at.iter().filter(|n| has[**n]);
                there.map(move |n| format!("{}/{}", own_addresses(six)[*n], if six { 64 } else { 24 }))
            })
            .map(|text| text.parse().expect("an interface address"))
            .collect(),
        ..Link::default()
    };
    Change::Links(vec![link(UPLINK, "eth0", &[0, 1]), link(BRIDGE, "cni0", &[2])])
}

/// What has to be observed again after edits.
pub(crate) fn changes(facts: &Facts, stale: &Stale) -> Vec<Change> {
    let services = stale.services.iter().map(|n| service_change(facts, *n));
    let slices = stale.slices.iter().map(|n| slice_change(facts, *n));
    let node = stale.node.then(|| node_change(facts));
    let links = stale.links.then(|| links_change(facts));
    let ranges = stale.ranges.then(|| ranges_change(facts));
    services.chain(slices).chain(node).chain(links).chain(ranges).collect()
}

/// The operator's settings as the agent takes them.
pub(crate) fn settings(facts: &Facts, host_netns: u64) -> Settings {
    let operator = &facts.operator;
    Settings {
        node_name: OWN_NODE.into(),
        bind_address: None,
        ipv6: operator.ipv6,
        external_ips: operator.external_ips,
        cluster_cidrs: operator.cluster_cidrs.clone(),
        masquerade_all: operator.masquerade_all,
        masquerade_local: operator.masquerade_local,
        loadbalancer_mode: operator.loadbalancer_mode,
        nodeport_addresses: match &operator.node_port_ranges {
            None => NodePortAddresses::Primary,
            Some(ranges) => NodePortAddresses::Ranges(ranges.clone()),
        },
        detect_local: match operator.detect {
            Detect::Range => DetectLocal::AnyRange,
            Detect::Bridge => DetectLocal::Bridge("cni0".into()),
            Detect::Prefix => DetectLocal::InterfacePrefix("cn".into()),
            Detect::Nothing => DetectLocal::Bridge("cni0-but-longer".into()),
        },
        drop_unallocated: operator.drop_unallocated,
        localhost_node_ports: operator.localhost_node_ports,
        socket_lb: operator.socket_lb,
        host_netns,
        snat_ports: vec![PortRange { first: 20_000, count: 10_000 }],
        own_ports: Vec::new(),
        agents_service: ObjectName::new("kube-system", "ebpf-proxy"),
        probe_port: 0,
        seed: 7,
    }
}

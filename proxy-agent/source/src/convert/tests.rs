//! Tables of odd input: sections 1, 2 and 11 of docs/service-semantics.md.

use serde_json::{Value, json};

use super::*;
use agent_core::model::{Affinity, Family, LoadBalancerMode, Service, Slice, SlicePort};

#[test]
fn a_pod_says_by_annotation_that_its_sockets_are_left() {
    let excluded = |annotations: Value, host_network: bool| {
        let pod = json!({
            "metadata": { "name": "kind", "uid": "0a1b", "annotations": annotations },
            "spec": { "containers": [], "hostNetwork": host_network },
        });
        excluded(&serde_json::from_value(pod).unwrap())
    };
    let says = |word: &str| json!({ "ebpf-proxy/socket-lb": word });
    assert_eq!(excluded(json!({}), false), (None, vec![]));
    assert_eq!(excluded(says("true"), false), (None, vec![]));
    assert_eq!(excluded(says("false"), false), (Some("0a1b".into()), vec![]));
    let fixed = json!({ "ebpf-proxy/socket-lb": "false", "kubernetes.io/config.mirror": "c0ffee" });
    assert_eq!(excluded(fixed, false), (Some("c0ffee".into()), vec![]));
    for (word, host_network, warning) in
        [("off", false, "\"true\" or \"false\""), ("false", true, "node's own")]
    {
        let (uid, warnings) = excluded(says(word), host_network);
        assert!(uid.is_none() && warnings.len() == 1 && warnings[0].contains(warning), "{warnings:?}");
    }
}

/// A Service that is fine, with `spec` laid over it.
fn spec(overlay: &Value) -> Value {
    let mut object = json!({
        "metadata": {"namespace": "shop", "name": "web"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "10.96.0.1",
            "clusterIPs": ["10.96.0.1"],
            "ipFamilies": ["IPv4"],
            "ports": [{"port": 80}],
        },
    });
    merge(&mut object["spec"], overlay);
    object
}

fn merge(into: &mut Value, overlay: &Value) {
    for (key, value) in overlay.as_object().unwrap() {
        into[key] = value.clone();
    }
}

fn convert_service(object: Value) -> (Option<Service>, Vec<String>) {
    service(&serde_json::from_value(object).unwrap())
}

/// The Service and what was said, with this in the spec.
fn with(overlay: Value) -> (Service, Vec<String>) {
    let (service, warnings) = convert_service(spec(&overlay));
    (service.unwrap(), warnings)
}

fn texts<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

#[test]
fn services_that_are_not_ours_are_left_alone() {
    // S-1, S-3, S-4, S-5, S-7, S-8.
    for (overlay, proxied) in [
        (json!({}), true),
        (json!({"clusterIP": "None", "clusterIPs": ["None"]}), false),
        (json!({"clusterIP": ""}), false),
        (json!({"clusterIP": null}), false),
        (json!({"type": "ExternalName", "externalName": "example.org"}), false),
        (json!({"ports": []}), false),
        (json!({"ports": null}), false),
        (json!({"type": null}), true),
        (json!({"type": "LoadBalancer"}), true),
    ] {
        let (service, warnings) = convert_service(spec(&overlay));
        assert_eq!(service.is_some(), proxied, "{overlay}");
        assert!(warnings.is_empty(), "{overlay}: {warnings:?}");
    }
    for (label, proxied) in
        [("service.kubernetes.io/service-proxy-name", false), ("service.kubernetes.io/headless", true)]
    {
        let mut object = spec(&json!({}));
        object["metadata"]["labels"] = json!({ label: "" });
        assert_eq!(convert_service(object).0.is_some(), proxied, "{label}");
    }
    assert_eq!(convert_service(json!({"metadata": {"name": "bare"}})), (None, Vec::new()));
}

#[test]
fn a_service_has_at_most_one_cluster_ip_a_family() {
    // S-9, X-1, X-3, X-6.
    for (overlay, ips, warnings) in [
        (
            json!({"clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"]}),
            &["10.96.0.1", "fd00::1"][..],
            0,
        ),
        (
            json!({"clusterIPs": ["fd00::1", "10.96.0.1"], "ipFamilies": ["IPv6", "IPv4"]}),
            &["10.96.0.1", "fd00::1"],
            0,
        ),
        (json!({"clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4"]}), &["10.96.0.1"], 0),
        (json!({"clusterIPs": ["10.96.0.1"], "ipFamilies": ["IPv4", "IPv6"]}), &["10.96.0.1"], 0),
        (
            json!({"clusterIPs": ["10.96.0.1", "10.96.0.2"], "ipFamilies": ["IPv4", "IPv6"]}),
            &["10.96.0.1"],
            1,
        ),
        (json!({"clusterIP": "fd00::1", "clusterIPs": null, "ipFamilies": null}), &["fd00::1"], 0),
        (json!({"clusterIP": "172.30.0.041", "ipFamilies": []}), &["172.30.0.41"], 0),
        (json!({"clusterIP": "::ffff:10.0.0.1", "ipFamilies": []}), &["10.0.0.1"], 0),
        (json!({"clusterIP": "web", "ipFamilies": []}), &[], 1),
        (json!({"clusterIP": "127.0.0.1", "ipFamilies": []}), &[], 1),
    ] {
        let (service, found) = with(overlay.clone());
        assert_eq!(texts(&service.cluster_ips), ips, "{overlay}");
        assert_eq!(found.len(), warnings, "{overlay}: {found:?}");
    }
}

#[test]
fn bad_ports_are_skipped_alone() {
    // S-13, S-21, X-11, X-12.
    let (service, warnings) = with(json!({"ports": [
        {"name": "tcp", "port": 80},
        {"name": "udp", "port": 80, "protocol": "UDP", "nodePort": 30_080},
        {"name": "sctp", "port": 80, "protocol": "SCTP"},
        {"name": "odd", "port": 80, "protocol": "HTTP"},
        {"name": "zero", "port": 0},
        {"name": "big", "port": 65_536},
        {"name": "node", "port": 81, "nodePort": 70_000},
        {"name": "empty", "port": 82, "protocol": ""},
    ]}));
    let found: Vec<_> = service.ports.iter().map(|p| (&*p.name, p.proto, p.port, p.node_port)).collect();
    let expected = [
        ("tcp", Proto::TCP, 80, 0),
        ("udp", Proto::UDP, 80, 30_080),
        ("sctp", Proto::SCTP, 80, 0),
        ("node", Proto::TCP, 81, 0),
        ("empty", Proto::TCP, 82, 0),
    ];
    assert_eq!(found, expected);
    assert_eq!(
        warnings,
        [
            "spec.ports[3] has protocol \"HTTP\", which is not TCP, UDP or SCTP: skipped",
            "spec.ports[4] has port 0, which is not in 1…65535: skipped",
            "spec.ports[5] has port 65536, which is not in 1…65535: skipped",
            "spec.ports[6].nodePort has port 70000, which is not in 1…65535: skipped",
        ]
    );
    let (service, warnings) = with(json!({"ports": [{"port": 80}, {"port": 81}]}));
    assert_eq!((service.ports.len(), service.ports[0].port, warnings.len()), (1, 81, 1), "X-13");
}

#[test]
fn bad_addresses_are_skipped_alone() {
    //
    let (service, warnings) = with(json!({
        "externalIPs": ["192.168.099.022", " 1.2.3.4", "", "  ", "2001:db8::1", "fe80::1%eth0", "224.0.0.1"],
    }));
    assert_eq!(texts(&service.external_ips), ["192.168.99.22", "2001:db8::1"]);
    assert_eq!(
        warnings,
        [
            "spec.externalIPs[1] \" 1.2.3.4\" is not an IP address: skipped",
            "spec.externalIPs[5] \"fe80::1%eth0\" carries a zone index, which means nothing to other machines: skipped",
            "spec.externalIPs[6] \"224.0.0.1\" is a loopback, multicast or unspecified address: skipped",
        ]
    );
    let mut object = spec(&json!({"type": "LoadBalancer"}));
    object["status"] = json!({"loadBalancer": {"ingress": [
        {"ip": "1.2.3.004"},
        {"ip": "1.2.3.5", "ipMode": "VIP"},
        {"ip": "1.2.3.6", "ipMode": "Proxy"},
        {"ip": "1.2.3.7", "ipMode": "Other"},
        {"hostname": "lb.example.org"},
        {"ip": ""},
        {"ip": "garbage"},
        {"ip": "2001:db8::9"},
    ]}});
    let (service, warnings) = convert_service(object);
    // T-64, V-9, X-5.
    assert_eq!(texts(&service.unwrap().load_balancer_ips), ["1.2.3.4", "1.2.3.5", "2001:db8::9"]);
    assert_eq!(warnings, ["status.loadBalancer.ingress[6].ip \"garbage\" is not an IP address: skipped"]);
}

#[test]
fn source_ranges_are_trimmed_and_masked() {
    // V-15, X-2.
    let (service, warnings) = with(json!({"loadBalancerSourceRanges":
        ["192.168.0.0/24", " 203.0.113.000/025 ", "10.1.2.3/8", "garbage", "", " ", "2001:db8::/32", "1.2.3.4"]}));
    let expected = ["192.168.0.0/24", "203.0.113.0/25", "10.0.0.0/8", "2001:db8::/32"];
    assert_eq!(texts(&service.source_ranges), expected);
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].starts_with("spec.loadBalancerSourceRanges[3] \"garbage\""), "{warnings:?}");
}

#[test]
fn policies_count_where_they_are_honoured() {
    // S-17, S-18, S-20, X-14.
    for (overlay, internal, external) in [
        (json!({}), false, false),
        (json!({"internalTrafficPolicy": "Local"}), true, false),
        (json!({"internalTrafficPolicy": "local"}), false, false),
        (json!({"externalTrafficPolicy": "Local"}), false, false),
        (json!({"externalTrafficPolicy": "Local", "externalIPs": ["1.2.3.4"]}), false, true),
        (json!({"externalTrafficPolicy": "Local", "type": "NodePort"}), false, true),
        (json!({"externalTrafficPolicy": "Odd", "type": "NodePort"}), false, false),
        (
            json!({"externalTrafficPolicy": "Local", "type": "LoadBalancer", "healthCheckNodePort": 31_000}),
            false,
            true,
        ),
    ] {
        let (service, warnings) = with(overlay.clone());
        assert_eq!((service.internal_local, service.external_local), (internal, external), "{overlay}");
        assert!(warnings.is_empty(), "{overlay}: {warnings:?}");
    }
    for (overlay, port, warnings) in [
        (
            json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31_000}),
            31_000,
            0,
        ),
        (
            json!({"type": "LoadBalancer", "externalTrafficPolicy": "Cluster", "healthCheckNodePort": 31_000}),
            0,
            0,
        ),
        (json!({"type": "NodePort", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31_000}), 0, 0),
        (json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}), 0, 1),
    ] {
        let (service, found) = with(overlay.clone());
        assert_eq!((service.health_check_node_port, found.len()), (port, warnings), "{overlay}");
    }
}

#[test]
fn affinity_is_read_leniently() {
    // S-21, X-10.
    let config = |secs: i32| json!({"clientIP": {"timeoutSeconds": secs}});
    for (overlay, expected, warnings) in [
        (json!({}), Affinity::None, 0),
        (json!({"sessionAffinity": "None"}), Affinity::None, 0),
        (json!({"sessionAffinity": "ClientIP"}), Affinity::ClientIp(10_800), 0),
        (json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {}}), Affinity::ClientIp(10_800), 0),
        (
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config(60)}),
            Affinity::ClientIp(60),
            0,
        ),
        (
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config(-5)}),
            Affinity::ClientIp(1),
            0,
        ),
        (
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config(90_000)}),
            Affinity::ClientIp(86_400),
            0,
        ),
        (json!({"sessionAffinity": "Cookie"}), Affinity::None, 1),
    ] {
        let (service, found) = with(overlay.clone());
        assert_eq!((service.affinity, found.len()), (expected, warnings), "{overlay}");
    }
}

#[test]
fn what_does_not_count_changes_nothing() {
    // S-16, S-14, S-22; V-11, V-22; S-25: while it is being deleted it is still there.
    let plain = || {
        let mut object = spec(&json!({ "type": "LoadBalancer" }));
        object["status"] = json!({ "loadBalancer": { "ingress": [{ "ip": "203.0.113.1" }] } });
        object
    };
    let expected = convert_service(plain());
    assert_eq!(texts(&expected.0.as_ref().unwrap().load_balancer_ips), ["203.0.113.1"]);
    for (place, value) in [
        ("/metadata/deletionTimestamp", json!("2026-01-01T00:00:00Z")),
        ("/metadata/finalizers", json!(["service.kubernetes.io/load-balancer-cleanup"])),
        ("/metadata/resourceVersion", json!("77")),
        (
            "/metadata/annotations",
            json!({ "service.beta.kubernetes.io/load-balancer-source-ranges": "192.0.2.0/24" }),
        ),
        ("/metadata/annotations", json!({ "service.kubernetes.io/topology-mode": "Auto" })),
        ("/metadata/labels", json!({ "service.kubernetes.io/headless": "" })),
        ("/spec/publishNotReadyAddresses", json!(true)),
        ("/spec/trafficDistribution", json!("PreferClose")),
        ("/spec/loadBalancerClass", json!("example.org/lb")),
        ("/spec/loadBalancerIP", json!("192.0.2.1")),
        ("/spec/allocateLoadBalancerNodePorts", json!(false)),
        ("/spec/selector", json!({ "app": "web" })),
        ("/spec/ports/0/targetPort", json!("http")),
        ("/spec/ports/0/appProtocol", json!("kubernetes.io/h2c")),
        ("/status/loadBalancer/ingress/0/ports", json!([{ "port": 443, "protocol": "TCP" }])),
        (
            "/status/conditions",
            json!([{ "type": "x", "status": "True", "reason": "y", "message": "z",
            "lastTransitionTime": "2026-01-01T00:00:00Z" }]),
        ),
    ] {
        let mut object = plain();
        let (parent, key) = place.rsplit_once('/').unwrap();
        object.pointer_mut(parent).unwrap()[key] = value;
        assert_eq!(convert_service(object), expected, "{place}");
    }
}

#[test]
fn the_age_of_a_service_is_known() {
    let mut object = spec(&json!({}));
    object["metadata"]["creationTimestamp"] = json!("1970-01-02T00:00:00Z");
    assert_eq!(convert_service(object).0.unwrap().created, 86_400);
}

fn convert_slice(overlay: &Value) -> (Option<Slice>, Vec<String>) {
    let mut object = json!({
        "metadata": {"namespace": "shop", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": [],
    });
    merge(&mut object, overlay);
    slice(&serde_json::from_value(object).unwrap())
}

#[test]
fn slices_of_nobody_are_left_alone() {
    // E-2, E-3, E-4, E-5.
    let labels =
        |labels: Value| json!({"metadata": {"namespace": "shop", "name": "web-1", "labels": labels}});
    for (overlay, ours, warnings) in [
        (json!({}), true, 0),
        (labels(json!({})), false, 1),
        (labels(json!({"kubernetes.io/service-name": ""})), false, 1),
        (
            labels(json!({"kubernetes.io/service-name": "web", "service.kubernetes.io/headless": ""})),
            false,
            0,
        ),
        (
            labels(
                json!({"kubernetes.io/service-name": "web", "service.kubernetes.io/service-proxy-name": "x"}),
            ),
            true,
            0,
        ),
        (json!({"addressType": "FQDN"}), false, 0),
        (json!({"addressType": "IPX"}), false, 1),
        (json!({"addressType": "IPv6"}), true, 0),
    ] {
        let (slice, found) = convert_slice(&overlay);
        assert_eq!((slice.is_some(), found.len()), (ours, warnings), "{overlay}: {found:?}");
        assert!(slice.is_none_or(|slice| slice.service == ObjectName::new("shop", "web")));
    }
}

#[test]
fn conditions_that_are_not_set_have_their_defaults() {
    // E-18, T-35.
    for (conditions, expected) in [
        (json!(null), (true, true, false)),
        (json!({}), (true, true, false)),
        (json!({"ready": false}), (false, true, false)),
        (json!({"ready": false, "terminating": true}), (false, true, true)), // T-34
        (json!({"ready": true, "serving": false, "terminating": true}), (true, false, true)), // T-33
    ] {
        let endpoints = json!({"endpoints": [{"addresses": ["10.0.0.1"], "conditions": conditions}]});
        let endpoint = convert_slice(&endpoints).0.unwrap().endpoints.remove(0);
        assert_eq!((endpoint.ready, endpoint.serving, endpoint.terminating), expected, "{endpoints}");
    }
}

#[test]
fn bad_parts_of_a_slice_are_skipped_alone() {
    // E-11, E-12, E-13, E-16, E-17, E-20, X-7, X-11.
    let (slice, warnings) = convert_slice(&json!({
        "ports": [
            {"name": "http", "port": 80},
            {"port": 81},
            {"name": "all"},
            {"name": "zero", "port": 0},
            {"name": "odd", "port": 82, "protocol": "ICMP"},
        ],
        "endpoints": [
            {"addresses": ["10.180.00.001", "10.0.0.9"], "nodeName": "n1",
             "hints": {"forZones": [{"name": "a"}, {"name": "b"}], "forNodes": [{"name": "n1"}]}},
            {"addresses": []},
            {"addresses": ["fd00::1"]},
            {"addresses": ["web-0.example"]},
            {"addresses": ["::ffff:10.0.0.2"]},
            {"addresses": ["127.0.0.1"]},
        ],
    }));
    let slice = slice.unwrap();
    let expected = SlicePort { name: "http".into(), proto: Proto::TCP, port: 80 };
    assert_eq!(slice.ports, [expected]);
    let ips: Vec<IpAddr> = slice.endpoints.iter().map(|endpoint| endpoint.ip).collect();
    assert_eq!(texts(&ips), ["10.180.0.1", "10.0.0.2"]);
    assert_eq!(slice.endpoints[0].node.as_deref(), Some("n1"));
    assert_eq!(slice.endpoints[0].zone_hints(), ["a".into(), "b".into()]);
    assert_eq!(slice.endpoints[0].node_hints(), ["n1".into()]);
    let parts: Vec<&str> = warnings.iter().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(
        parts,
        [
            "ports[1]",
            "ports[2]",
            "ports[3]",
            "ports[4]",
            "endpoints[1].addresses",
            "endpoints[2].addresses",
            "endpoints[3].addresses[0]",
            "endpoints[5].addresses[0]",
        ],
        "{warnings:?}"
    );
}

#[test]
fn legacy_endpoints_become_slices() {
    let object = json!({
        "metadata": {"name": "web"},
        "subsets": [
            {"addresses": [{"ip": "10.0.0.1", "nodeName": "n1"}, {"ip": "fd00::1"}],
             "notReadyAddresses": [{"ip": "10.0.0.2"}, {"ip": "bad"}],
             "ports": [{"port": 8080}, {"name": "dns", "port": 53, "protocol": "UDP"}, {"port": 0}]},
            {"addresses": [{"ip": "10.0.0.3"}], "ports": [{"port": 9090}]},
        ],
    });
    let (slices, warnings) = endpoints(&serde_json::from_value(object).unwrap());
    let shape: Vec<_> =
        slices.iter().map(|slice| (slice.family, slice.ports.len(), slice.endpoints.len())).collect();
    assert_eq!(shape, [(Family::V4, 2, 2), (Family::V6, 2, 1), (Family::V4, 1, 1)]);
    assert!(slices.iter().all(|slice| slice.service == ObjectName::new("default", "web")));
    let not_ready = &slices[0].endpoints[1];
    assert_eq!((not_ready.ready, not_ready.serving, not_ready.terminating), (false, false, false));
    assert_eq!(warnings.len(), 2, "{warnings:?}");
}

#[test]
fn the_node_tells_its_addresses_by_rank() {
    // H-8, X-1, Y-10.
    let object = json!({
        "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64", "bad", "0.0.0.0/0", "::/0"]},
        "status": {"addresses": [
            {"type": "Hostname", "address": "n1"},
            {"type": "ExternalIP", "address": "203.0.113.1"},
            {"type": "InternalIP", "address": "192.168.0.02"},
            {"type": "InternalIP", "address": "odd"},
            {"type": "InternalIP", "address": "fd00::2"},
        ]},
    });
    let (found, warnings) = node(&serde_json::from_value(object).unwrap());
    assert_eq!(texts(&found.ips), ["192.168.0.2", "fd00::2", "203.0.113.1"]);
    assert_eq!(texts(&found.pod_cidrs), ["10.244.1.0/24", "fd00:1::/64"]);
    assert_eq!((found.zone.as_deref(), found.eligible), (Some("a"), true));
    assert_eq!(warnings.len(), 4, "{warnings:?}");

    for (object, eligible) in [
        (json!({"metadata": {"deletionTimestamp": "2024-01-01T00:00:00Z"}}), false),
        (
            json!({"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}}),
            false,
        ),
        (json!({"spec": {"taints": [{"key": "other", "effect": "NoSchedule"}]}}), true),
        (json!({"metadata": {"labels": {"topology.kubernetes.io/zone": ""}}}), true),
    ] {
        let (found, _) = node(&serde_json::from_value(object.clone()).unwrap());
        assert_eq!((found.eligible, found.zone), (eligible, None), "{object}");
    }
}

#[test]
fn a_service_says_by_annotation_what_becomes_of_connections_to_a_lost_endpoint() {
    let converted = |annotations: Value| {
        let (service, warnings) = convert_service(json!({
            "metadata": { "name": "web", "annotations": annotations },
            "spec": { "clusterIP": "10.96.0.1", "ports": [{ "port": 80 }] },
        }));
        (service.unwrap().reset_on_loss, warnings)
    };
    assert_eq!(converted(json!({})), (false, vec![]));
    assert_eq!(converted(json!({ "ebpf-proxy/on-endpoint-loss": "keep" })), (false, vec![]));
    assert_eq!(converted(json!({ "ebpf-proxy/on-endpoint-loss": "reset" })), (true, vec![]));
    let (reset, warnings) = converted(json!({ "ebpf-proxy/on-endpoint-loss": "close" }));
    let told =
        "the annotation ebpf-proxy/on-endpoint-loss \"close\" is neither keep nor reset: taken as keep";
    assert_eq!((reset, warnings), (false, vec![told.to_owned()]));
}

#[test]
fn a_service_says_by_annotation_who_answers_clients_from_outside() {
    let converted = |annotations: Value| {
        let (service, warnings) = convert_service(json!({
            "metadata": { "name": "web", "annotations": annotations },
            "spec": { "clusterIP": "10.96.0.1", "ports": [{ "port": 80 }] },
        }));
        (service.unwrap().mode, warnings)
    };
    let (snat, dsr) = (Some(LoadBalancerMode::Snat), Some(LoadBalancerMode::Dsr));
    assert_eq!(converted(json!({})), (None, vec![]));
    assert_eq!(converted(json!({ "ebpf-proxy/loadbalancer-mode": "snat" })), (snat, vec![]));
    assert_eq!(converted(json!({ "ebpf-proxy/loadbalancer-mode": "dsr" })), (dsr, vec![]));
    for other in ["DSR", ""] {
        let (mode, warnings) = converted(json!({ "ebpf-proxy/loadbalancer-mode": other }));
        let told = format!(
            "the annotation ebpf-proxy/loadbalancer-mode {other:?} is neither snat nor dsr: the agent's \
             --loadbalancer-mode holds"
        );
        assert_eq!((mode, warnings), (None, vec![told]));
    }
}

#[test]
fn the_annotations_of_the_proxy_are_documented() {
    let page = include_str!("../../../../docs/metrics.md");
    for annotation in [service::ANNOTATION_MODE, service::ANNOTATION_ON_LOSS, node::ANNOTATION_SOCKET_LB] {
        assert!(page.contains(&format!("\n| `{annotation}` |")), "docs/metrics.md lacks {annotation}");
    }
}

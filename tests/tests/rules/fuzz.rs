//! Objects as nobody should write them, beside a good Service: manifests mutated at random go the real way from a
//! directory to the tables.
//!
//! E-5, E-16: whatever is in one object, nothing breaks, a warning says so, and no other Service
//! notices. When the object has gone everything is as it was.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use agent_core::datapath::Datapath as _;
use agent_core::datapath::memory::Memory;
use agent_core::model::{Change, Kind};
use agent_core::model::{
    DetectLocal, Link, LoadBalancerMode, NodePortAddresses, ObjectName, Settings, SocketLb, World,
};
use agent_core::plan::{Capacity, Planner, lint};
use agent_source::manifests::ManifestStore;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::Config;
use proxy_common::abi::{PortRange, untext};
use serde_json::{Value, json};

const NODE: &str = "n1";
const GOOD: &str = "good.json";

/// The Service that must not notice anything, and its endpoints.
fn good() -> String {
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "good", "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00:96::10"],
            "ipFamilies": ["IPv4", "IPv6"], "externalIPs": ["203.0.113.10"], "sessionAffinity": "ClientIP",
            "externalTrafficPolicy": "Local", "healthCheckNodePort": 30090,
            "loadBalancerSourceRanges": ["198.51.100.0/24"],
            "ports": [{ "name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP" }],
        },
        "status": { "loadBalancer": { "ingress": [{ "ip": "203.0.113.11" }] } },
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "name": "good-1", "namespace": "shop", "labels": { "kubernetes.io/service-name": "good" } },
        "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        "endpoints": [{ "addresses": ["10.244.1.10"], "nodeName": NODE }, { "addresses": ["10.244.2.10"] }],
    });
    format!("{service}{slice}")
}

/// Objects to be spoilt; they share no address, port or name with the good ones.
fn originals() -> [Value; 5] {
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "bad", "namespace": "yard", "labels": { "a": "b" }, "annotations": { "ebpf-proxy/loadbalancer-mode": "dsr" },
            "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.7.7", "clusterIPs": ["10.96.7.7", "fd00:96::77"],
            "ipFamilies": ["IPv4", "IPv6"], "externalIPs": ["192.0.2.7", "2001:db8::7"],
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 60 } },
            "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31090,
            "loadBalancerSourceRanges": ["192.0.2.0/24", "2001:db8::/32"], "selector": { "app": "bad" },
            "ports": [
                { "name": "http", "port": 90, "nodePort": 31080, "protocol": "TCP", "targetPort": "web" },
                { "name": "dns", "port": 53, "nodePort": 31053, "protocol": "UDP", "targetPort": 5353 },
            ],
        },
        "status": { "loadBalancer": { "ingress": [
            { "ip": "192.0.2.8", "ipMode": "VIP", "ports": [{ "port": 90, "protocol": "TCP" }] }, { "hostname": "lb" },
        ] } },
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "name": "bad-1", "namespace": "yard", "labels": { "kubernetes.io/service-name": "bad" } },
        "ports": [{ "name": "http", "port": 9080, "protocol": "TCP" }, { "name": "dns", "port": 5353, "protocol": "UDP" }],
        "endpoints": [
            { "addresses": ["10.244.7.7"], "nodeName": NODE, "zone": "a",
                "conditions": { "ready": true, "serving": true, "terminating": false },
                "hints": { "forZones": [{ "name": "a" }], "forNodes": [{ "name": NODE }] } },
            { "addresses": ["10.244.7.8", "10.244.7.9"] },
        ],
    });
    let endpoints = json!({
        "apiVersion": "v1", "kind": "Endpoints", "metadata": { "name": "bad", "namespace": "yard" },
        "subsets": [{
            "addresses": [{ "ip": "10.244.7.7", "nodeName": NODE }], "notReadyAddresses": [{ "ip": "10.244.7.8" }],
            "ports": [{ "name": "http", "port": 9080, "protocol": "TCP" }],
        }],
    });
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": NODE, "labels": { "topology.kubernetes.io/zone": "a" } },
        "spec": { "podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"],
            "taints": [{ "key": "k", "effect": "NoSchedule" }] },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.168.10.1" }] },
    });
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": [service.clone(), slice.clone()] });
    [service, slice, endpoints, node, list]
}

/// What may stand where something else should.
fn oddities() -> Vec<Value> {
    let deep = |depth| (0..depth).fold(json!(1), |inner, _| json!([inner]));
    let mut all = vec![
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(65_536),
        json!(1.5),
        json!(1e300),
        json!(u64::MAX),
        json!(i64::MIN),
        json!([]),
        json!({}),
        json!([null]),
        json!({ "": null }),
        deep(60),
        deep(200),
        json!("x".repeat(10_000)),
    ];
    let words = [
        "",
        " ",
        "None",
        "TCP",
        "tcp",
        "SCTP",
        "IPv4",
        "IPv6",
        "FQDN",
        "Local",
        "ClientIP",
        "Proxy",
        "ExternalName",
        "192.0.2.256",
        "192.0.2.077",
        "::ffff:192.0.2.9",
        "fe80::1%eth0",
        "0.0.0.0",
        "::",
        "127.0.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "0.0.0.0/0",
        "192.0.2.0/33",
        "999999999999999999999",
        "a\u{0}b\u{7}\u{1b}[2J\nc",
        "\u{202e}\u{1f4a5}",
        "service.kubernetes.io/service-proxy-name",
        "List",
        "v1",
        "Node",
    ];
    all.extend(words.map(|word| json!(word)));
    all
}

/// Something done to a place in an object.
#[derive(Clone, Debug)]
enum Spoil {
    Remove,
    Put(Value),
    Rename(String),
    /// The first of a list so often; anything else becomes a list of itself.
    Repeat(usize),
    /// What stands at another place.
    Like(prop::sample::Index),
}

fn spoil() -> impl Strategy<Value = Spoil> {
    prop_oneof![
        3 => Just(Spoil::Remove),
        6 => prop::sample::select(oddities()).prop_map(Spoil::Put),
        1 => prop::sample::select(vec!["", "kind", "spec", "ports", "\u{0}"]).prop_map(|key| Spoil::Rename(key.into())),
        1 => (2_usize..300).prop_map(Spoil::Repeat),
        2 => any::<prop::sample::Index>().prop_map(Spoil::Like),
    ]
}

/// Something done to the text of a file: a key given twice, characters that do not belong, an end too early.
#[derive(Clone, Debug)]
enum Scratch {
    None,
    Twice(&'static str, Value),
    Insert(char),
    End,
}

fn scratch() -> impl Strategy<Value = Scratch> {
    let keys = vec!["metadata", "spec", "kind", "name", "clusterIP", "ports", "addresses", "endpoints"];
    prop_oneof![
        6 => Just(Scratch::None),
        2 => (prop::sample::select(keys), prop::sample::select(oddities())).prop_map(|(key, v)| Scratch::Twice(key, v)),
        1 => prop::sample::select(vec!['\u{0}', '\u{7f}', '{', '"', '\t', '\u{feff}', '&']).prop_map(Scratch::Insert),
        1 => Just(Scratch::End),
    ]
}

/// Every place in an object, the whole of it first.
fn places(value: &Value) -> Vec<String> {
    let mut all = vec![String::new()];
    let mut under = |key: &str, inner: &Value| {
        let key = key.replace('~', "~0").replace('/', "~1");
        all.extend(places(inner).into_iter().map(|place| format!("/{key}{place}")));
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, inner)| under(key, inner)),
        Value::Array(list) => list.iter().enumerate().for_each(|(n, inner)| under(&n.to_string(), inner)),
        _ => {}
    }
    all
}

fn apply(object: &mut Value, at: &prop::sample::Index, spoil: &Spoil) {
    let all = places(object);
    let place = at.get(&all);
    let there = |object: &Value, place: &String| object.pointer(place).cloned().unwrap_or_default();
    let new = match spoil {
        Spoil::Put(value) => value.clone(),
        Spoil::Like(other) => there(object, other.get(&all)),
        Spoil::Repeat(times) => match there(object, place) {
            Value::Array(list) => {
                list.first().map_or(json!([]), |first| Value::Array(vec![first.clone(); *times]))
            }
            other => json!([other]),
        },
        Spoil::Remove | Spoil::Rename(_) => {
            let Some((parent, key)) = place.rsplit_once('/') else { return };
            let key = key.replace("~1", "/").replace("~0", "~");
            match (object.pointer_mut(parent), key.parse::<usize>()) {
                (Some(Value::Object(map)), _) => {
                    let value = map.remove(&key);
                    if let (Spoil::Rename(name), Some(value)) = (spoil, value) {
                        map.insert(name.clone(), value);
                    }
                }
                (Some(Value::Array(list)), Ok(n)) if n < list.len() => drop(list.remove(n)),
                _ => {}
            }
            return;
        }
    };
    if let Some(old) = object.pointer_mut(place) {
        *old = new;
    }
}

fn write(object: &Value, scratch: &Scratch, at: &prop::sample::Index) -> String {
    let mut text = object.to_string();
    let bounds: Vec<usize> = (0..=text.len()).filter(|n| text.is_char_boundary(*n)).collect();
    let anywhere = *at.get(&bounds);
    match scratch {
        Scratch::None => {}
        Scratch::Twice(key, value) => {
            let braces: Vec<usize> = text.match_indices('{').map(|(n, _)| n + 1).collect();
            if !braces.is_empty() {
                let place = *at.get(&braces);
                let comma = if text[place..].starts_with('}') { "" } else { "," };
                text.insert_str(place, &format!("{}:{value}{comma}", json!(key)));
            }
        }
        Scratch::Insert(c) => text.insert(anywhere, *c),
        Scratch::End => text.truncate(anywhere),
    }
    text
}

/// An agent that reads a directory.
struct Agent {
    store: ManifestStore,
    world: World,
    planner: Option<Planner>,
    memory: Memory,
    warned: BTreeMap<String, Vec<String>>,
    now_ms: u64,
}

impl Agent {
    fn new(directory: &Path) -> Self {
        let settings = Settings {
            node_name: NODE.into(),
            bind_address: None,
            ipv6: true,
            external_ips: true,
            drop_unallocated: true,
            cluster_cidrs: Vec::new(),
            masquerade_all: false,
            masquerade_local: false,
            loadbalancer_mode: LoadBalancerMode::Snat,
            nodeport_addresses: NodePortAddresses::Primary,
            detect_local: DetectLocal::AnyRange,
            localhost_node_ports: true,
            socket_lb: SocketLb::All,
            host_netns: 1,
            snat_ports: vec![PortRange { first: 20_000, count: 10_000 }],
            own_ports: Vec::new(),
            agents_service: ObjectName::new("kube-system", "ebpf-proxy"),
            probe_port: 0,
            seed: 7,
        };
        let mut world = World::new(settings);
        let uplink = Link {
            index: 2,
            name: "eth0".into(),
            loopback: false,
            up: true,
            layer3: false,
            addresses: vec!["192.168.10.1/24".parse().expect("an interface address")],
            ..Link::default()
        };
        world.apply(Change::Links(vec![uplink]));
        for kind in [Kind::Service, Kind::Slice, Kind::Node] {
            world.apply(Change::Synced(kind));
        }
        let memory = Memory::new(Capacity::default());
        let planner = Some(Planner::new(&memory.actual, Capacity::default()));
        let store = ManifestStore::new(directory.to_owned(), NODE.into());
        Self { store, world, planner, memory, warned: BTreeMap::new(), now_ms: 0 }
    }

    /// Reads the directory and writes what follows.
    fn look(&mut self) {
        for change in self.store.refresh().expect("a directory") {
            if let Change::Warnings { object, lines } = &change {
                self.warned.insert(object.clone(), lines.clone());
            }
            self.world.apply(change);
        }
        self.warned.retain(|_, lines| !lines.is_empty());
        self.now_ms += 5_000;
        let dirty = self.world.take_dirty();
        let planner = self.planner.take().expect("a planner is always put back");
        let pass = planner.dirty(&dirty, Some(&self.world.node()), self.now_ms);
        self.memory.apply(&pass.plan.steps).expect("room in the tables");
        self.planner = Some(pass.applied(self.now_ms).0);
    }

    /// What stands in the tables for a Service, or for all: without the numbers that are given out anew.
    fn shown(&self, namespace: Option<&str>) -> Vec<String> {
        let actual = &self.memory.actual;
        let mut all = Vec::new();
        for (key, frontend) in &actual.frontends {
            let name = &actual.services[&frontend.service];
            let its = untext(&name.namespace);
            if namespace.is_none_or(|namespace| namespace == its) {
                let cluster: Vec<_> = actual.endpoints(frontend.cluster).collect();
                let local: Vec<_> = actual.endpoints(frontend.local).collect();
                let ranges =
                    actual.sources.iter().filter(|key| u32::from_be(key.service) == frontend.service);
                let ranges: Vec<_> = ranges.map(|key| (key.prefix_len, key.addr)).collect();
                let (flags, secs) = (frontend.flags, frontend.affinity_secs);
                all.push(format!("{its} {key:?} {flags} {secs} {cluster:?} {local:?} {ranges:?}"));
            }
        }
        all
    }
}

/// Whether the text holds objects of which each can be decoded, and so may be silent.
fn is_legible(text: &str) -> bool {
    use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
    fn reads<K: serde::de::DeserializeOwned>(value: &Value) -> bool {
        let name = value.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
        !name.is_empty() && serde_json::from_value::<K>(value.clone()).is_ok()
    }
    let Ok(value) = serde_json::from_str::<Value>(text) else { return text.trim().is_empty() };
    match (value["apiVersion"].as_str(), value["kind"].as_str()) {
        (_, None) => value.is_null(),
        (Some("v1"), Some("Service")) => reads::<core::Service>(&value),
        (Some("discovery.k8s.io/v1"), Some("EndpointSlice")) => reads::<discovery::EndpointSlice>(&value),
        (Some("v1"), Some("Endpoints")) => reads::<core::Endpoints>(&value),
        _ => true,
    }
}

proptest! {
    #![proptest_config(Config {
        cases: Config::default().cases * 4,
        failure_persistence: None,
        max_shrink_iters: 400,
        ..Config::default()
    })]

    #[test]
    fn one_bad_object_is_named_and_harms_no_other(
        which in 0_usize..5,
        spoils in vec((any::<prop::sample::Index>(), spoil()), 1..6),
        scratch in scratch(),
        at in any::<prop::sample::Index>(),
        before in any::<bool>(),
    ) {
        let mut object = originals()[which].clone();
        spoils.iter().for_each(|(place, spoil)| apply(&mut object, place, spoil));
        let text = write(&object, &scratch, &at);
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join(GOOD), good()).expect("a file");
        let mut agent = Agent::new(directory.path());
        agent.look();
        let (alone, desired) = (agent.shown(Some("shop")), agent.world.desired().services);
        prop_assert_eq!(alone.len(), 6, "{:?}", agent.shown(None));

        // What was read before what is bad was written may stay: another object of the same name.
        let bad = directory.path().join("bad.json");
        if before {
            fs::write(&bad, originals()[which].to_string()).expect("a file");
            agent.look();
        }
        fs::write(&bad, &text).expect("a file");
        agent.look();
        prop_assert_eq!(agent.shown(Some("shop")), alone.clone());
        let found = lint(&agent.memory.actual);
        prop_assert!(found.is_empty(), "{:?}", found);
        let names = |object: &str| object.starts_with("bad.json:") || !object.contains("shop/");
        for (object, lines) in &agent.warned {
            prop_assert!(names(object), "{} is to blame: {:?}", object, lines);
            prop_assert!(lines.iter().all(|line| !line.contains('\n')), "{:?}", lines);
        }
        if !is_legible(&text) {
            let named = agent.warned.keys().any(|object| object.starts_with("bad.json:"));
            prop_assert!(named, "nobody warns: {:?}", agent.warned);
        }

        fs::remove_file(&bad).expect("the file");
        agent.look();
        prop_assert_eq!(agent.shown(None), alone);
        // Of the Node what was last seen counts (Y-13).
        prop_assert_eq!(agent.world.desired().services, desired);
        prop_assert_eq!(&agent.warned, &BTreeMap::new());
        prop_assert_eq!(agent.world.warnings(), Vec::new());
    }
}

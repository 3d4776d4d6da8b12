//! A node for vectors: objects as one writes them down, flows of one kind, and what they got.

use std::collections::BTreeSet;
use std::net::IpAddr;

use agent_core::model::Change;
use agent_core::model::{DetectLocal, LoadBalancerMode, NodePortAddresses, ObjectName, Settings, SocketLb};
use agent_source::convert;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use proxy_common::abi::PortRange;
use proxy_common::addr::Proto;
use serde_json::{Value, json};

use super::facts::{OWN_NODE, own_addresses};
use super::objects::links;
use super::oracle::Target;
use super::system::{ACK, Caller, Observed, Programs, SYN, SYN_ACK, System};

/// Flows that are tried until every endpoint is certain to have been met (P-25).
pub(crate) const TRIES: u16 = 50;

/// Addresses of the play: a pod here and one elsewhere, both of them endpoints; two more pods; somebody outside;
/// this node.
pub(crate) const LOCAL: &str = "10.244.1.11";
pub(crate) const REMOTE: &str = "10.244.2.10";
pub(crate) const POD: &str = "10.244.1.10";
pub(crate) const REMOTE_POD: &str = "10.244.3.10";
pub(crate) const OUTSIDE: &str = "198.51.100.7";
pub(crate) const NODE: &str = "192.168.10.1";
pub(crate) const SECOND: &str = "172.16.0.1";
pub(crate) const BRIDGE: &str = "10.244.1.254";

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// How pods are recognised, and whether everything is masqueraded: the columns of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    ClusterCidr,
    NodeCidr,
    NoDetector,
    MasqueradeAll,
}

/// As kube-proxy masquerades: flows to endpoints of this node, too.
pub(crate) fn settings(column: Column, host_netns: u64) -> Settings {
    let cluster = match column {
        Column::ClusterCidr | Column::MasqueradeAll => vec!["10.244.0.0/16".parse().expect("a range")],
        Column::NodeCidr | Column::NoDetector => Vec::new(),
    };
    Settings {
        node_name: OWN_NODE.into(),
        bind_address: None,
        ipv6: true,
        external_ips: true,
        drop_unallocated: true,
        cluster_cidrs: cluster,
        masquerade_all: column == Column::MasqueradeAll,
        masquerade_local: true,
        loadbalancer_mode: LoadBalancerMode::Snat,
        nodeport_addresses: NodePortAddresses::Primary,
        detect_local: if column == Column::NodeCidr {
            DetectLocal::NodeCidr
        } else {
            DetectLocal::ClusterCidr
        },
        localhost_node_ports: true,
        socket_lb: SocketLb::All,
        host_netns,
        snat_ports: vec![PortRange { first: 20_000, count: 10_000 }],
        own_ports: Vec::new(),
        agents_service: ObjectName::new("kube-system", "ebpf-proxy"),
        probe_port: 0,
        seed: 7,
    }
}

pub(crate) fn name(text: &str) -> ObjectName {
    ObjectName::new("default", text)
}

pub(crate) fn service(of: &str, spec: &Value, status: &Value) -> Change {
    let object =
        json!({ "metadata": { "name": of, "namespace": "default" }, "spec": spec, "status": status });
    let object: core::Service = serde_json::from_value(object).expect("a Service");
    Change::Service(name(of), convert::service(&object).0)
}

/// A load-balancer Service with all kinds of addresses, numbered from 1.
pub(crate) fn balancer(of: &str, n: u8, more: &Value) -> Change {
    let mut spec = json!({
        "type": "LoadBalancer", "clusterIP": format!("10.96.0.{n}"), "clusterIPs": [format!("10.96.0.{n}")],
        "ipFamilies": ["IPv4"], "externalIPs": [format!("203.0.113.{n}")],
        "ports": [{ "name": "p", "protocol": "TCP", "port": 80, "nodePort": 30_000 + u16::from(n) }],
    });
    let more = more.as_object().into_iter().flatten();
    more.for_each(|(key, value)| spec[key] = value.clone());
    service(of, &spec, &json!({ "loadBalancer": { "ingress": [{ "ip": format!("203.0.113.10{n}") }] } }))
}

pub(crate) fn slice(of: &str, ports: &Value, endpoints: &Value) -> Change {
    let object = json!({
        "metadata": { "name": of, "namespace": "default", "labels": { "kubernetes.io/service-name": of } },
        "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
    });
    let object: discovery::EndpointSlice = serde_json::from_value(object).expect("an EndpointSlice");
    Change::Slice(name(of), convert::slice(&object).0)
}

pub(crate) fn port(number: u16) -> Value {
    json!([{ "name": "p", "protocol": "TCP", "port": number }])
}

pub(crate) fn local() -> Value {
    json!({ "addresses": [LOCAL], "nodeName": OWN_NODE })
}

pub(crate) fn remote() -> Value {
    json!({ "addresses": [REMOTE], "nodeName": "n2" })
}

pub(crate) fn node() -> Vec<Change> {
    let object = json!({
        "metadata": { "name": OWN_NODE }, "spec": { "podCIDRs": ["10.244.1.0/24"] },
        "status": { "addresses": [{ "type": "InternalIP", "address": NODE }] },
    });
    let object: core::Node = serde_json::from_value(object).expect("a Node");
    vec![links([true; 3]), Change::Node(Some(convert::node(&object).0))]
}

/// What all flows of a kind got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Got {
    Pass,
    Refuse,
    Drop,
    /// These endpoints, and whether masqueraded.
    Reached(BTreeSet<IpAddr>, bool),
}

pub(crate) fn reached(endpoints: &[&str], masqueraded: bool) -> Got {
    Got::Reached(endpoints.iter().map(|text| ip(text)).collect(), masqueraded)
}

/// A node on which vectors are tried.
pub(crate) struct Scene<'a, P> {
    pub(crate) system: System<'a, P>,
    pub(crate) next_port: u16,
}

impl<'a, P: Programs> Scene<'a, P> {
    pub(crate) fn new(programs: &'a mut P, column: Column, objects: Vec<Change>) -> Self {
        let settings = settings(column, programs.host_netns());
        let system = System::with_changes(programs, settings, node().into_iter().chain(objects).collect());
        Self { system, next_port: 10_000 }
    }

    pub(crate) fn fresh(&mut self) -> u16 {
        self.next_port += 1;
        self.next_port
    }

    /// One new flow.
    pub(crate) fn flow(&mut self, from: &str, to: (&str, u16), proto: Proto) -> (Target, Observed) {
        let client = (ip(from), self.fresh());
        let seen = self.system.packet(client, (ip(to.0), to.1), proto, SYN);
        (client, seen.unwrap_or_else(|fault| panic!("{from} to {to:?}: {fault}")))
    }

    /// What flows from an address get: all the same.
    #[track_caller]
    pub(crate) fn packets(&mut self, from: &str, to: (&str, u16), proto: Proto) -> Got {
        let all: Vec<Observed> = (0..TRIES).map(|_| self.flow(from, to, proto).1).collect();
        gather(&all)
    }

    /// What calls of a host process get: the kernel chooses their source behind the translation, so it is the
    /// right one for the way (D-11).
    #[track_caller]
    pub(crate) fn calls(&mut self, to: (&str, u16), proto: Proto) -> Got {
        let target = (ip(to.0), to.1);
        let call = |_| self.system.call(target, proto, Caller::Host, true).expect("a socket");
        let all: Vec<Observed> = (0..TRIES).map(call).collect();
        gather(&all)
    }

    /// An answered flow.
    pub(crate) fn open(&mut self, from: &str, to: (&str, u16), proto: Proto) -> Open {
        let (client, observed) = self.flow(from, to, proto);
        let Observed::Forward(endpoint, source) = observed else { panic!("{from} to {to:?}: {observed:?}") };
        let open =
            Open { client, service: (ip(to.0), to.1), proto, endpoint, seen: source.unwrap_or(client) };
        let said = self.system.answer(open.endpoint, open.seen, (open.client, open.service), proto, SYN_ACK);
        said.unwrap_or_else(|fault| panic!("{open:?}: {fault}"));
        assert_eq!(self.next(&open), Some(endpoint), "{open:?}");
        open
    }

    /// The endpoint that the next packet of an answered flow goes to.
    pub(crate) fn next(&mut self, open: &Open) -> Option<Target> {
        match self.system.packet(open.client, open.service, open.proto, ACK) {
            Ok(Observed::Forward(endpoint, _)) => Some(endpoint),
            Ok(_) => None,
            Err(fault) => panic!("{open:?}: {fault}"),
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Open {
    pub(crate) client: Target,
    pub(crate) service: Target,
    pub(crate) proto: Proto,
    pub(crate) endpoint: Target,
    pub(crate) seen: Target,
}

#[track_caller]
pub(crate) fn gather(all: &[Observed]) -> Got {
    let mut endpoints = BTreeSet::new();
    let mut masqueraded = BTreeSet::new();
    for observed in all {
        match observed {
            Observed::Forward(endpoint, source) => {
                let own = own_addresses(false);
                assert!(source.is_none_or(|source| own.contains(&source.0)), "M-13: {source:?}");
                endpoints.insert(endpoint.0);
                masqueraded.insert(source.is_some());
            }
            other => assert_eq!(other, &all[0], "not all alike"),
        }
    }
    match (&all[0], masqueraded.len()) {
        (Observed::Forward(..), 1) => Got::Reached(endpoints, masqueraded.contains(&true)),
        (Observed::Forward(..), _) => panic!("some masqueraded, some not: {all:?}"),
        (Observed::Pass, _) => Got::Pass,
        (Observed::Refuse, _) => Got::Refuse,
        (Observed::Drop, _) => Got::Drop,
    }
}

pub(crate) fn word(proto: Proto) -> &'static str {
    match proto {
        Proto::TCP => "TCP",
        Proto::UDP => "UDP",
        _ => "SCTP",
    }
}

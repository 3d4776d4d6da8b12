//! Three nodes, each with a real agent, fed by one API server.
//!
//! | node | pods | host-network pod |
//! |---|---|---|
//! | `node1` | `a`, `b` | `h1` |
//! | `node2` | `c`, `d` | `h2` |
//! | `node3` | `e`, `f` | `h3` |
//!
//! The client `outside` knows no address but the nodes'. Pods are processes that start and end; where upstream deletes
//! a pod and makes another, another of these places is used.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{EndpointConditions, EndpointSlice};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proxy_tests::agent::{Agent, FLAGS};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::manifests::{EndpointController, Family, Phase, ServicePlan, SlicePlan, node};
use proxy_tests::object::{Key, Kind};
use proxy_tests::pod::Place;
use proxy_tests::probe::Server;
use proxy_tests::require;
use proxy_tests::test_cluster::{Plan, PodNetwork, TestCluster};

/// The nodes.
pub(crate) const NODES: [&str; 3] = ["node1", "node2", "node3"];

/// The clusters between which packets take different ways: how pods are joined, and whose sockets are translated. With
/// `host` pods go by packet.
pub(crate) const GROUNDS: [(PodNetwork, &str); 4] = [
    (PodNetwork::Routed, "all"),
    (PodNetwork::Bridged, "all"),
    (PodNetwork::Overlay, "all"),
    (PodNetwork::RoutedOverlay, "host"),
];

/// The same in each of these clusters.
pub(crate) fn everywhere(play: impl Fn(&Cluster) -> Result<()>) -> Result<()> {
    GROUNDS.into_iter().try_for_each(|ground| {
        play(&Cluster::on(ground)?).with_context(|| format!("with network and socket LB {ground:?}"))
    })
}

/// A running cluster. Fields are dropped in order: agents, what they watch, the nodes.
pub(crate) struct Cluster {
    /// The agents in the order of the nodes.
    pub(crate) agents: Vec<Agent>,
    /// What they watch.
    pub(crate) api: ApiServer,
    /// Nodes, pods, clients.
    pub(crate) test_cluster: TestCluster,
    /// How its pods are joined.
    pub(crate) network: PodNetwork,
}

impl Cluster {
    /// One of [`GROUNDS`].
    pub(crate) fn on((network, socket_lb): (PodNetwork, &str)) -> Result<Self> {
        Self::with(network, ["zone1", "zone2", "zone3"], &["--socket-lb", socket_lb])
    }

    /// A cluster with this pod network, each node in a zone of its own.
    pub(crate) fn raise(network: PodNetwork) -> Result<Self> {
        Self::with(network, ["zone1", "zone2", "zone3"], &[])
    }

    /// A cluster whose nodes are in these zones, and whose agents have these further flags.
    pub(crate) fn with(network: PodNetwork, zones: [&str; 3], flags: &[&str]) -> Result<Self> {
        let test_cluster = Plan::default()
            .gateway()
            .network(network)
            .node("node1", &["a", "b"])
            .host_pod("h1")
            .node("node2", &["c", "d"])
            .host_pod("h2")
            .node("node3", &["e", "f"])
            .host_pod("h3")
            .client("outside")
            .raise()?;
        let api = ApiServer::start_in(test_cluster.underlay(), SocketAddr::from(([192, 168, 10, 1], 6443)))?;
        for (name, zone) in NODES.iter().zip(zones) {
            let labels = [("kubernetes.io/hostname", *name), ("topology.kubernetes.io/zone", zone)];
            api.put(&node(
                name,
                &test_cluster.place(name).addresses(),
                &test_cluster.pod_cidrs(name),
                &labels,
            ));
        }
        let binary = require::agent_binary()?;
        let mut agents = NODES
            .iter()
            .map(|node| Agent::prepare(&binary, &test_cluster, node, &api, &[&FLAGS, flags].concat()))
            .collect::<Result<Vec<_>>>()?;
        agents.iter_mut().try_for_each(Agent::spawn)?;
        agents.iter_mut().try_for_each(Agent::wait_ready)?;
        Ok(Self { agents, api, test_cluster, network })
    }

    /// A node, pod or client.
    pub(crate) fn place(&self, name: &str) -> &Place {
        self.test_cluster.place(name)
    }

    /// Several of them.
    pub(crate) fn places<const N: usize>(&self, names: [&str; N]) -> [&Place; N] {
        names.map(|name| self.place(name))
    }

    /// Servers on port 8080 of these places.
    pub(crate) fn serve(&self, places: &[&str]) -> Result<Vec<Server>> {
        places.iter().map(|place| Server::start(self.place(place), &[8080])).collect()
    }

    /// Creates or replaces a Service.
    pub(crate) fn apply(&self, service: impl Into<Service>) {
        self.api.put(&service.into());
    }

    /// A Service with these pods behind it, all ready.
    pub(crate) fn expose<'a>(&'a self, plan: &ServicePlan, pods: &[&str]) -> Result<EndpointController<'a>> {
        expose(&self.api, &self.test_cluster, plan, pods)
    }

    /// Deletes a Service and the slices of [`Self::expose`], as the garbage collector does.
    pub(crate) fn delete(&self, name: &str) {
        self.api.delete(&key(Kind::Service, name));
        for suffix in ["v4", "v6"] {
            // A Service of one family has one of them.
            self.api.delete(&key(Kind::EndpointSlice, &format!("{name}-{suffix}")));
        }
    }

    /// Writes a Service's slices by hand, one a family: what stands in them under `suffix` is replaced.
    pub(crate) fn slices(
        &self,
        service: &str,
        suffix: &str,
        ports: &[(&str, &str, u16)],
        pods: &[(&str, Conditions)],
    ) {
        for slice in self.written(service, suffix, ports, pods) {
            self.api.put(&slice);
        }
    }

    /// The slices of [`Self::slices`], to be changed before they are published.
    pub(crate) fn written(
        &self,
        service: &str,
        suffix: &str,
        ports: &[(&str, &str, u16)],
        pods: &[(&str, Conditions)],
    ) -> [EndpointSlice; 2] {
        Family::ALL.map(|family| {
            let mut plan = SlicePlan::new(service, &format!("{suffix}-{}", family.api_name()), family);
            for (name, protocol, number) in ports {
                plan = plan.port(name, protocol, *number);
            }
            for (pod, _) in pods {
                let place = self.place(pod);
                let own = place.addresses().into_iter().find(|address| Family::of(*address) == family);
                let own = own.expect("a place has an address in each family");
                plan = plan.endpoint(pod, own, place.node.as_deref(), Phase::Ready);
            }
            let mut slice = plan.build();
            for (endpoint, (_, (ready, serving, terminating))) in
                slice.endpoints.iter_mut().flatten().zip(pods)
            {
                endpoint.conditions = Some(EndpointConditions {
                    ready: Some(*ready),
                    serving: Some(*serving),
                    terminating: Some(*terminating),
                });
            }
            slice
        })
    }
}

/// Ready, serving, terminating.
pub(crate) type Conditions = (bool, bool, bool);

/// What an endpoint in good health shows.
pub(crate) const READY: Conditions = (true, true, false);

/// A Service with these pods behind it, all ready.
pub(crate) fn expose<'a>(
    api: &'a ApiServer,
    test_cluster: &TestCluster,
    plan: &ServicePlan,
    pods: &[&str],
) -> Result<EndpointController<'a>> {
    let service = plan.build();
    api.put(&service);
    let (name, spec) = (service.metadata.name.unwrap_or_default(), service.spec.unwrap_or_default());
    let ports: Vec<(String, String, u16)> = spec
        .ports
        .into_iter()
        .flatten()
        .map(|port| {
            let Some(IntOrString::Int(target)) = port.target_port else {
                panic!("a target port is a number")
            };
            let target = target.try_into().expect("a port number");
            (port.name.unwrap_or_default(), port.protocol.unwrap_or_default(), target)
        })
        .collect();
    let ports: Vec<_> = ports.iter().map(|(name, protocol, port)| (&**name, &**protocol, *port)).collect();
    let pods: Vec<&Place> = pods.iter().map(|pod| test_cluster.place(pod)).collect();
    let has = |family: &Family| spec.ip_families.iter().flatten().any(|name| name == family.api_name());
    let families: Vec<Family> = Family::ALL.into_iter().filter(has).collect();
    EndpointController::adopt(api, &name, &ports, &families, &pods)
}

/// A Service of the port 80 over TCP and UDP with ClusterIPs by its number, port 8080 at the pods.
pub(crate) fn web(name: &str, n: u8) -> ServicePlan {
    ServicePlan::new(name, &vips(n)).port("tcp", "TCP", 80, 8080).port("udp", "UDP", 80, 8080)
}

/// The same with a NodePort of the same number for both protocols.
pub(crate) fn web_node_port(name: &str, n: u8, number: u16) -> ServicePlan {
    ServicePlan::new(name, &vips(n))
        .port("tcp", "TCP", 80, 8080)
        .node_port(number)
        .port("udp", "UDP", 80, 8080)
        .node_port(number)
}

/// The ClusterIPs of a Service by its number: 10.96.0.`n` and fd00:10:96::`n`.
pub(crate) fn vips(n: u8) -> [IpAddr; 2] {
    [ip(&format!("10.96.0.{n}")), ip(&format!("fd00:10:96::{n}"))]
}

/// The ClusterIPs of a Service with port 80.
pub(crate) fn service(n: u8) -> [SocketAddr; 2] {
    at(vips(n), 80)
}

/// Both addresses with a port.
pub(crate) fn at(addresses: [IpAddr; 2], port: u16) -> [SocketAddr; 2] {
    addresses.map(|address| SocketAddr::new(address, port))
}

/// An address that is written correctly.
pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn key(kind: Kind, name: &str) -> Key {
    Key { kind, namespace: "default".into(), name: name.into() }
}

//! A cluster on one kernel from a short description: nodes, pods, host-network pods, clients outside.
//!
//! Nodes and clients are joined by a bridge in a namespace of its own, the underlay. No namespace has a route to the
//! machine's own network. Addresses follow from the order of the description:
//!
//! | what | IPv4 | IPv6 |
//! |---|---|---|
//! | node *i* (from 1) | 192.168.10.(10+i) | `fd00:10::(i)` |
//! | client *c* (from 1) | 192.168.10.(100+c) | `fd00:10::1:(c)` |
//! | underlay, with [`Plan::gateway`] | 192.168.10.1 | `fd00:10::ffff` |
//! | pods of node *i* | 10.244.i.0/24 | `fd00:244:i::/64` |
//! | pod *j* (from 1) of node *i* | 10.244.i.(10+j) | `fd00:244:i::(10+j)` |
//! | tunnel of node *i*, in an overlay | 10.244.i.0 | `fd00:244:i::` |

mod plan;
mod wiring;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

pub use self::plan::{Plan, PodNetwork};
use crate::cgroup::Tree;
use crate::netns::Netns;
use crate::pod::Place;

#[derive(Debug)]
struct Node {
    name: String,
    /// Number of the highest pod ever made here: an address is not used twice.
    pods: u8,
}

/// A running cluster. Dropping it kills its processes and removes its namespaces and cgroups.
///
/// Fields are dropped in order: namespaces lose their names before the processes in them die with the cgroups.
#[derive(Debug)]
pub struct TestCluster {
    name: String,
    places: BTreeMap<String, Place>,
    nodes: Vec<Node>,
    clients: u8,
    mtu: u16,
    network: PodNetwork,
    cgroups: Tree,
    underlay: Arc<Netns>,
}

impl TestCluster {
    /// The cluster's name, with which the names of its namespaces and its cgroup begin.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A node (its host side), a pod or a client by its name.
    ///
    /// # Panics
    /// When there is none of that name: the test is wrong.
    #[must_use]
    pub fn place(&self, name: &str) -> &Place {
        self.places.get(name).unwrap_or_else(|| panic!("no {name} in this cluster: {:?}", self.places.keys()))
    }

    /// The cgroup below which all processes of a node are: the `--cgroup-root` of its agent.
    #[must_use]
    pub fn cgroup_root(&self, node: &str) -> &Path {
        self.place(node).cgroup.parent().expect("a place's cgroup lies inside its node's")
    }

    /// The pod networks of a node, as `--cluster-cidr` and Node objects write them.
    #[must_use]
    pub fn pod_cidrs(&self, node: &str) -> [String; 2] {
        let number = self.number(node);
        [format!("10.244.{number}.0/24"), format!("fd00:244:{number}::/64")]
    }

    /// The ranges that hold all pod networks.
    pub const CLUSTER_CIDRS: [&str; 2] = ["10.244.0.0/16", "fd00:244::/32"];

    /// The namespace that joins nodes and clients.
    #[must_use]
    pub fn underlay(&self) -> &Netns {
        &self.underlay
    }

    /// Adds a pod to a node while the cluster lives.
    pub fn add_pod(&mut self, node: &str, pod: &str) -> Result<Place> {
        let number = self.number(node);
        let next = self.nodes[usize::from(number) - 1].pods.checked_add(11).context("the node is full")?;
        self.add_pod_at(node, pod, next)
    }

    /// Adds a pod with the address 10.244.i.`host`: where manifests already say it. Pods added later come after it.
    pub fn add_pod_at(&mut self, node: &str, pod: &str, host: u8) -> Result<Place> {
        let number = self.number(node);
        let entry = &mut self.nodes[usize::from(number) - 1];
        ensure!((11..250).contains(&host), "no pod can have the address 10.244.{number}.{host}");
        entry.pods = entry.pods.max(host - 10);
        let interface = format!("v-{pod}");
        ensure!(interface.len() <= 15, "pod name {pod} is too long for an interface name");
        let place = Place {
            name: pod.into(),
            node: Some(node.into()),
            netns: Arc::new(Netns::named(format!("{}-{pod}", self.name))?),
            cgroup: self.cgroups.cgroup(Path::new(node).join(pod))?,
            v4: Ipv4Addr::new(10, 244, number, host),
            // The digits of the address are those of the IPv4 one, read as hexadecimal.
            v6: format!("fd00:244:{number}::{host}").parse().context("a pod's IPv6 address")?,
            host_interface: Some(interface.clone()),
        };
        let batches = if self.network.is_bridged() {
            self.bridged(number, &place, &interface)
        } else {
            self.routed(number, &place, &interface)
        };
        self.place(node).netns.ip(&batches.0)?;
        place.netns.ip(&batches.1)?;
        self.insert(place)
    }

    /// Adds a pod that uses its node's own network.
    pub fn add_host_pod(&mut self, node: &str, pod: &str) -> Result<Place> {
        let host = self.place(node).clone();
        let cgroup = self.cgroups.cgroup(Path::new(node).join(pod))?;
        self.insert(Place { name: pod.into(), cgroup, ..host })
    }

    /// Takes a pod away with its processes; its address is not used again.
    pub fn remove_pod(&mut self, pod: &str) -> Result<()> {
        let place = self.places.remove(pod).with_context(|| format!("no pod {pod} in this cluster"))?;
        crate::cgroup::remove_tree(&place.cgroup);
        if let (Some(interface), Some(node)) = (&place.host_interface, &place.node) {
            // With the namespace the veth goes too, but later, when the kernel gets to it.
            self.place(node).netns.ip(&format!("link del {interface}\n"))?;
        }
        Ok(())
    }

    fn insert(&mut self, place: Place) -> Result<Place> {
        let taken = self.places.insert(place.name.clone(), place.clone());
        ensure!(taken.is_none(), "two places of the name {}", place.name);
        Ok(place)
    }

    fn number(&self, node: &str) -> u8 {
        let index = self.nodes.iter().position(|known| known.name == node);
        let index = index.unwrap_or_else(|| panic!("no node {node} in this cluster"));
        u8::try_from(index + 1).expect("few nodes")
    }
}

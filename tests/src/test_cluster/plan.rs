//! What a cluster is to consist of.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;

use super::TestCluster;
use crate::cgroup::Tree;
use crate::netns::Netns;

/// How pods are joined to their node, and nodes to the pods of others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PodNetwork {
    /// A veth with a /32 and a /128 route each, as the `ptp` plugin makes them; the underlay routes pods' packets.
    #[default]
    Routed,
    /// Ports of a bridge `cni0` that carries the node's address in the pod network; the underlay routes pods' packets.
    Bridged,
    /// Bridged, and VXLAN between the nodes, as Flannel does it.
    Overlay,
    /// Routed, and VXLAN between the nodes, as Calico does it.
    RoutedOverlay,
}

impl PodNetwork {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Routed, Self::Bridged, Self::Overlay, Self::RoutedOverlay];

    pub(super) fn is_bridged(self) -> bool {
        matches!(self, Self::Bridged | Self::Overlay)
    }

    pub(super) fn is_overlay(self) -> bool {
        matches!(self, Self::Overlay | Self::RoutedOverlay)
    }
}

/// The description of a cluster.
#[derive(Clone, Debug)]
pub struct Plan {
    nodes: Vec<(String, Vec<String>, Vec<String>)>,
    clients: Vec<(String, Option<String>)>,
    network: PodNetwork,
    mtu: u16,
    gateway: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            clients: Vec::new(),
            network: PodNetwork::Routed,
            mtu: 1500,
            gateway: false,
        }
    }
}

impl Plan {
    /// A node with these pods.
    #[must_use]
    pub fn node(mut self, name: &str, pods: &[&str]) -> Self {
        self.nodes.push((name.into(), pods.iter().map(ToString::to_string).collect(), Vec::new()));
        self
    }

    /// A host-network pod of the node described last.
    #[must_use]
    pub fn host_pod(mut self, name: &str) -> Self {
        self.nodes.last_mut().expect("a host-network pod needs a node before it").2.push(name.into());
        self
    }

    /// A client outside the cluster that knows no route but the underlay.
    #[must_use]
    pub fn client(mut self, name: &str) -> Self {
        self.clients.push((name.into(), None));
        self
    }

    /// A client outside the cluster that sends everything through a node.
    #[must_use]
    pub fn client_via(mut self, name: &str, node: &str) -> Self {
        self.clients.push((name.into(), Some(node.into())));
        self
    }

    /// How pods are joined to their nodes; routed by default.
    #[must_use]
    pub fn network(mut self, network: PodNetwork) -> Self {
        self.network = network;
        self
    }

    /// The MTU of every link; 1500 by default.
    #[must_use]
    pub fn mtu(mut self, mtu: u16) -> Self {
        self.mtu = mtu;
        self
    }

    /// Gives nodes a default route to the underlay, which forwards nothing: what goes there is lost in silence.
    #[must_use]
    pub fn gateway(mut self) -> Self {
        self.gateway = true;
        self
    }

    /// Builds the cluster.
    pub fn raise(self) -> Result<TestCluster> {
        crate::require::world()?;
        crate::sweep::once();
        let name = crate::unique();
        let underlay = Arc::new(Netns::named(format!("{name}-underlay"))?);
        let cgroups = Tree::new(&name)?;
        let mut cluster = TestCluster {
            name,
            places: BTreeMap::new(),
            nodes: Vec::new(),
            clients: 0,
            mtu: self.mtu,
            network: self.network,
            cgroups,
            underlay,
        };
        cluster.raise_underlay(self.gateway)?;
        for (node, _, _) in &self.nodes {
            cluster.add_node(node, self.gateway)?;
        }
        cluster.join_pod_networks()?;
        for (node, pods, host_pods) in &self.nodes {
            pods.iter().try_for_each(|pod| cluster.add_pod(node, pod).map(drop))?;
            host_pods.iter().try_for_each(|pod| cluster.add_host_pod(node, pod).map(drop))?;
        }
        for (client, via) in &self.clients {
            cluster.add_client(client, via.as_deref())?;
        }
        Ok(cluster)
    }
}

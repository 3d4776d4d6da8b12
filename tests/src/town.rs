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

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use crate::cgroup::Tree;
use crate::netns::Netns;
use crate::pod::Place;

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

    fn is_bridged(self) -> bool {
        matches!(self, Self::Bridged | Self::Overlay)
    }

    fn is_overlay(self) -> bool {
        matches!(self, Self::Overlay | Self::RoutedOverlay)
    }
}

/// What VXLAN puts before a pod's frame: outer IPv4 and UDP headers, its own, and the inner Ethernet header.
const VXLAN_OVERHEAD: u16 = 20 + 8 + 8 + 14;

/// The description of a town.
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

    /// How pods are joined to their nodes; routed unless told.
    #[must_use]
    pub fn network(mut self, network: PodNetwork) -> Self {
        self.network = network;
        self
    }

    /// The MTU of every link; 1500 unless told.
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

    /// Builds the town.
    pub fn raise(self) -> Result<Town> {
        crate::require::world()?;
        crate::sweep::once();
        let name = crate::unique();
        let underlay = Arc::new(Netns::named(format!("{name}-underlay"))?);
        let cgroups = Tree::new(&name)?;
        let mut town = Town {
            name,
            places: BTreeMap::new(),
            nodes: Vec::new(),
            clients: 0,
            mtu: self.mtu,
            network: self.network,
            cgroups,
            underlay,
        };
        town.raise_underlay(self.gateway)?;
        for (node, _, _) in &self.nodes {
            town.add_node(node, self.gateway)?;
        }
        town.join_pod_networks()?;
        for (node, pods, host_pods) in &self.nodes {
            pods.iter().try_for_each(|pod| town.add_pod(node, pod).map(drop))?;
            host_pods.iter().try_for_each(|pod| town.add_host_pod(node, pod).map(drop))?;
        }
        for (client, via) in &self.clients {
            town.add_client(client, via.as_deref())?;
        }
        Ok(town)
    }
}

#[derive(Debug)]
struct Node {
    name: String,
    /// Number of the highest pod ever made here: an address is not used twice.
    pods: u8,
}

/// A running town. Dropping it kills its processes and removes its namespaces and cgroups.
///
/// Fields are dropped in order: namespaces lose their names before the processes in them die with the cgroups.
#[derive(Debug)]
pub struct Town {
    name: String,
    places: BTreeMap<String, Place>,
    nodes: Vec<Node>,
    clients: u8,
    mtu: u16,
    network: PodNetwork,
    cgroups: Tree,
    underlay: Arc<Netns>,
}

impl Town {
    /// The town's name, with which the names of its namespaces and its cgroup begin.
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
        self.places.get(name).unwrap_or_else(|| panic!("no {name} in this town: {:?}", self.places.keys()))
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

    /// Adds a pod to a node while the town lives.
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
        let place = self.places.remove(pod).with_context(|| format!("no pod {pod} in this town"))?;
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
        let index = index.unwrap_or_else(|| panic!("no node {node} in this town"));
        u8::try_from(index + 1).expect("few nodes")
    }

    fn raise_underlay(&self, gateway: bool) -> Result<()> {
        let mtu = self.mtu;
        let mut batch = format!(
            "link add br0 mtu {mtu} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\nlink set br0 up\n"
        );
        if gateway {
            batch.push_str("addr add 192.168.10.1/24 dev br0\naddr add fd00:10::ffff/64 dev br0 nodad\n");
        }
        self.underlay.ip(&batch)
    }

    /// Joins a namespace to the underlay with an interface `eth0`.
    fn plug(&self, netns: &Netns, label: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<()> {
        ensure!(label.len() <= 13, "{label} is too long for an interface name");
        let (port, peer, mtu) = (format!("u-{label}"), netns.name(), self.mtu);
        self.underlay.ip(&format!(
            "link add {port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {peer}\n\
             link set {port} master br0 up\n"
        ))?;
        netns.ip(&format!("link set eth0 up\naddr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\n"))
    }

    fn add_node(&mut self, node: &str, gateway: bool) -> Result<()> {
        let number = u8::try_from(self.nodes.len() + 1).context("too many nodes")?;
        ensure!(number < 90, "too many nodes");
        let netns = Netns::named(format!("{}-{node}", self.name))?;
        netns.sysctls(&[
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
        ])?;
        let (v4, v6) = (Ipv4Addr::new(192, 168, 10, 10 + number), underlay_v6(0, number));
        self.plug(&netns, node, v4, v6)?;
        let mut batch = String::new();
        if gateway {
            batch.push_str("route add default via 192.168.10.1\nroute add default via fd00:10::ffff\n");
        }
        if self.network.is_bridged() {
            // An address of its own, as CNI plugins give it: else it is that of a port, and changes when that goes.
            let (mtu, mac) = (self.pod_mtu(), mac(number, 1));
            let _ = writeln!(
                batch,
                "link add cni0 address {mac} mtu {mtu} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
                 addr add 10.244.{number}.1/24 dev cni0\n\
                 addr add fd00:244:{number}::1/64 dev cni0 nodad\n\
                 link set cni0 up"
            );
        }
        netns.ip(&batch)?;
        self.nodes.push(Node { name: node.into(), pods: 0 });
        let cgroup = self.cgroups.cgroup(Path::new(node).join("host"))?;
        let place = Place {
            name: node.into(),
            node: Some(node.into()),
            netns: Arc::new(netns),
            cgroup,
            v4,
            v6,
            host_interface: None,
        };
        self.insert(place).map(drop)
    }

    /// The MTU of pods' links: what an overlay adds must fit into the underlay's.
    fn pod_mtu(&self) -> u16 {
        if self.network.is_overlay() { self.mtu - VXLAN_OVERHEAD } else { self.mtu }
    }

    /// Tells every node the way to the pods of the others.
    fn join_pod_networks(&self) -> Result<()> {
        if self.network.is_overlay() {
            return self.nodes.iter().try_for_each(|node| self.tunnel(node));
        }
        for node in &self.nodes {
            let mut batch = String::new();
            for other in self.nodes.iter().filter(|other| other.name != node.name) {
                let [v4, v6] = self.pod_cidrs(&other.name);
                let via = self.place(&other.name);
                let _ = writeln!(batch, "route add {v4} via {}\nroute add {v6} via {}", via.v4, via.v6);
            }
            self.place(&node.name).netns.ip(&batch)?;
        }
        Ok(())
    }

    /// Gives a node one VXLAN device without learning: routes, neighbours and forwarding entries for every other node
    /// are written down, as Flannel and Calico do it.
    fn tunnel(&self, node: &Node) -> Result<()> {
        let (number, mtu) = (self.number(&node.name), self.pod_mtu());
        let place = self.place(&node.name);
        let mut batch = format!(
            "link add vxlan0 address {} mtu {mtu} type vxlan id 1 local {} dev eth0 dstport 4789 nolearning\n\
             addr add 10.244.{number}.0/32 dev vxlan0\n\
             addr add fd00:244:{number}::/128 dev vxlan0 nodad\n\
             link set vxlan0 up\n",
            mac(number, 0),
            place.v4
        );
        let mut forwarding = String::new();
        for other in self.nodes.iter().filter(|other| other.name != node.name) {
            let far = self.number(&other.name);
            let [v4, v6] = self.pod_cidrs(&other.name);
            let (mac, outer) = (mac(far, 0), self.place(&other.name).v4);
            let _ = writeln!(
                batch,
                "neigh add 10.244.{far}.0 lladdr {mac} dev vxlan0 nud permanent\n\
                 neigh add fd00:244:{far}:: lladdr {mac} dev vxlan0 nud permanent\n\
                 route add {v4} via 10.244.{far}.0 dev vxlan0 onlink\n\
                 route add {v6} via fd00:244:{far}:: dev vxlan0 onlink"
            );
            let _ = writeln!(forwarding, "fdb append {mac} dev vxlan0 dst {outer}");
        }
        place.netns.ip(&batch)?;
        place.netns.bridge(&forwarding)
    }

    fn add_client(&mut self, client: &str, via: Option<&str>) -> Result<()> {
        self.clients += 1;
        let netns = Netns::named(format!("{}-{client}", self.name))?;
        let (v4, v6) = (Ipv4Addr::new(192, 168, 10, 100 + self.clients), underlay_v6(1, self.clients));
        self.plug(&netns, client, v4, v6)?;
        if let Some(node) = via {
            let node = self.place(node);
            netns.ip(&format!("route add default via {}\nroute add default via {}\n", node.v4, node.v6))?;
        }
        let cgroup = self.cgroups.cgroup(Path::new("outside").join(client))?;
        let place = Place {
            name: client.into(),
            node: None,
            netns: Arc::new(netns),
            cgroup,
            v4,
            v6,
            host_interface: None,
        };
        self.insert(place).map(drop)
    }

    /// The node's and the pod's half of a routed pod's wiring.
    fn routed(&self, number: u8, pod: &Place, interface: &str) -> (String, String) {
        let (v4, v6, peer, mtu) = (pod.v4, pod.v6, pod.netns.name(), self.pod_mtu());
        let node = format!(
            "link add {interface} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {peer}\n\
             addr add 10.244.{number}.1/32 dev {interface}\n\
             addr add fd00:244:{number}::1/128 dev {interface} nodad\n\
             link set {interface} up\n\
             route add {v4}/32 dev {interface}\n\
             route add {v6}/128 dev {interface}\n"
        );
        let inside = format!(
            "addr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad\nlink set eth0 up\n\
             route add default via 10.244.{number}.1 dev eth0 onlink\n\
             route add default via fd00:244:{number}::1 dev eth0 onlink\n"
        );
        (node, inside)
    }

    /// The node's and the pod's half of a bridged pod's wiring.
    fn bridged(&self, number: u8, pod: &Place, interface: &str) -> (String, String) {
        let (v4, v6, peer, mtu) = (pod.v4, pod.v6, pod.netns.name(), self.pod_mtu());
        let node = format!(
            "link add {interface} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {peer}\n\
             link set {interface} master cni0 up\n"
        );
        let inside = format!(
            "addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n\
             route add default via 10.244.{number}.1\n\
             route add default via fd00:244:{number}::1\n"
        );
        (node, inside)
    }
}

/// The address of a node's VXLAN device (0), which the other nodes write down, or of its bridge (1).
fn mac(number: u8, device: u8) -> String {
    format!("02:00:0a:f4:{number:02x}:{device:02x}")
}

fn underlay_v6(group: u16, number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, group, number.into())
}

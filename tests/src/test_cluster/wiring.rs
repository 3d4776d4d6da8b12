//! How nodes, pods and clients are joined: veths, bridges, tunnels, routes.

use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::{Node, TestCluster};
use crate::netns::Netns;
use crate::pod::Place;

/// What VXLAN puts before a pod's frame: outer IPv4 and UDP headers, its own, and the inner Ethernet header.
const VXLAN_OVERHEAD: u16 = 20 + 8 + 8 + 14;

impl TestCluster {
    pub(super) fn raise_underlay(&self, gateway: bool) -> Result<()> {
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

    pub(super) fn add_node(&mut self, node: &str, gateway: bool) -> Result<()> {
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
            writeln!(
                batch,
                "link add cni0 address {mac} mtu {mtu} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
                 addr add 10.244.{number}.1/24 dev cni0\n\
                 addr add fd00:244:{number}::1/64 dev cni0 nodad\n\
                 link set cni0 up"
            ).ok();
        }
        netns.ip(&batch)?;
        self.nodes.push(Node { name: node.into(), pods: 0 });
        let cgroup = self.cgroups.cgroup(Path::new(node).join("host"))?;
        self.insert_machine(node, Some(node), netns, cgroup, (v4, v6))
    }

    /// A place with a network of its own on the underlay.
    fn insert_machine(
        &mut self,
        name: &str,
        node: Option<&str>,
        netns: Netns,
        cgroup: PathBuf,
        (v4, v6): (Ipv4Addr, Ipv6Addr),
    ) -> Result<()> {
        let (node, netns) = (node.map(Into::into), Arc::new(netns));
        self.insert(Place { name: name.into(), node, netns, cgroup, v4, v6, host_interface: None }).map(drop)
    }

    /// The MTU of pods' links: what an overlay adds must fit into the underlay's.
    fn pod_mtu(&self) -> u16 {
        if self.network.is_overlay() { self.mtu - VXLAN_OVERHEAD } else { self.mtu }
    }

    /// Tells every node the way to the pods of the others.
    pub(super) fn join_pod_networks(&self) -> Result<()> {
        if self.network.is_overlay() {
            return self.nodes.iter().try_for_each(|node| self.tunnel(node));
        }
        for node in &self.nodes {
            let mut batch = String::new();
            for other in self.nodes.iter().filter(|other| other.name != node.name) {
                let [v4, v6] = self.pod_cidrs(&other.name);
                let via = self.place(&other.name);
                writeln!(batch, "route add {v4} via {}\nroute add {v6} via {}", via.v4, via.v6).ok();
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
            writeln!(
                batch,
                "neigh add 10.244.{far}.0 lladdr {mac} dev vxlan0 nud permanent\n\
                 neigh add fd00:244:{far}:: lladdr {mac} dev vxlan0 nud permanent\n\
                 route add {v4} via 10.244.{far}.0 dev vxlan0 onlink\n\
                 route add {v6} via fd00:244:{far}:: dev vxlan0 onlink"
            )
            .ok();
            writeln!(forwarding, "fdb append {mac} dev vxlan0 dst {outer}").ok();
        }
        place.netns.ip(&batch)?;
        place.netns.bridge(&forwarding)
    }

    pub(super) fn add_client(&mut self, client: &str, via: Option<&str>) -> Result<()> {
        self.clients += 1;
        let netns = Netns::named(format!("{}-{client}", self.name))?;
        let (v4, v6) = (Ipv4Addr::new(192, 168, 10, 100 + self.clients), underlay_v6(1, self.clients));
        self.plug(&netns, client, v4, v6)?;
        if let Some(node) = via {
            let node = self.place(node);
            netns.ip(&format!("route add default via {}\nroute add default via {}\n", node.v4, node.v6))?;
        }
        let cgroup = self.cgroups.cgroup(Path::new("outside").join(client))?;
        self.insert_machine(client, None, netns, cgroup, (v4, v6))
    }

    /// The node's and the pod's half of a routed pod's wiring.
    pub(super) fn routed(&self, number: u8, pod: &Place, interface: &str) -> (String, String) {
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
    pub(super) fn bridged(&self, number: u8, pod: &Place, interface: &str) -> (String, String) {
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

//! Who we are, as the Node object says.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;

use super::Family;

/// The node's own object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Node {
    /// InternalIPs, then ExternalIPs, in order (Y-10).
    pub ips: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// Label `topology.kubernetes.io/zone`; empty is none.
    pub zone: Option<Arc<str>>,
    /// False with a `deletionTimestamp` or the taint `ToBeDeletedByClusterAutoscaler` (H-8).
    pub eligible: bool,
}

/// The one address of the node in each family (Y-10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeIps {
    /// The family that comes first.
    pub primary: Family,
    /// IPv4; a loopback address when none is known.
    pub v4: Ipv4Addr,
    /// IPv6; a loopback address when none is known.
    pub v6: Ipv6Addr,
}

impl NodeIps {
    /// From the Node's addresses by rank and `--bind-address`, which replaces the one of its family.
    #[must_use]
    pub fn new(known: &[IpAddr], bind_address: Option<IpAddr>) -> Self {
        let bound = bind_address.filter(|ip| !ip.is_unspecified());
        let ranked = || bound.iter().chain(known);
        let v4 = ranked().find_map(|ip| if let IpAddr::V4(v4) = ip { Some(*v4) } else { None });
        let v6 = ranked().find_map(|ip| if let IpAddr::V6(v6) = ip { Some(*v6) } else { None });
        Self {
            primary: ranked().next().map_or(Family::V4, Family::of),
            v4: v4.unwrap_or(Ipv4Addr::LOCALHOST),
            v6: v6.unwrap_or(Ipv6Addr::LOCALHOST),
        }
    }

    /// Those that mean this node to others, the primary one first.
    #[must_use]
    pub fn known(&self) -> Vec<IpAddr> {
        let mut ips = vec![IpAddr::V4(self.v4), IpAddr::V6(self.v6)];
        ips.sort_by_key(|ip| Family::of(ip) != self.primary);
        ips.retain(|ip| !ip.is_loopback());
        ips
    }
}

/// What a network interface is to packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Device {
    /// Packets enter and leave the node's stack here.
    #[default]
    Wire,
    /// The same, wrapped into other packets.
    Tunnel,
    /// Packets only pass by on their way to another device, or are none of ours.
    Detour,
    /// It holds addresses, and no packet comes here.
    Holder,
}

/// A network interface of the node's namespace, as rtnetlink describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: Arc<str>,
    /// Whether it is the loopback interface.
    pub loopback: bool,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether its frames have no Ethernet header (WireGuard, IPIP, tun).
    pub layer3: bool,
    /// What it is to packets.
    pub device: Device,
    /// The kernel's word for what kind of device it is; empty for hardware.
    pub kind: Arc<str>,
    /// Index of the interface that it is made on top of, such as a VLAN's parent.
    pub lower: Option<u32>,
    /// Its Ethernet address; zero when it has none.
    pub mac: [u8; 6],
    /// Index of the bridge or bond that it is a port of.
    pub master: Option<u32>,
    /// How many interfaces of this index have gone since we listen: what was attached to an earlier one is no more.
    pub born: u32,
    /// Its addresses, in the kernel's order, without deprecated, tentative-duplicate and temporary ones.
    pub addresses: Vec<IpNet>,
}

impl Link {
    /// Whether packets are to be met here.
    #[must_use]
    pub fn carries_programs(&self) -> bool {
        !self.loopback && matches!(self.device, Device::Wire | Device::Tunnel)
    }

    /// Whether it holds every ClusterIP for a proxy that works with IPVS (kube-proxy's, kube-router's) and may be left
    /// behind by it: what stands here is nobody's address.
    #[must_use]
    pub fn holds_cluster_ips(&self) -> bool {
        matches!(&*self.name, "kube-ipvs0" | "kube-dummy-if")
    }

    /// Whether it holds addresses for a cache of name-server answers or its like, which takes over ClusterIPs on this
    /// node on purpose: NodeLocal DNSCache calls its device so, others make devices of the same kind.
    #[must_use]
    pub fn holds_local_services(&self) -> bool {
        !self.holds_cluster_ips() && (self.device == Device::Holder || &*self.name == "nodelocaldns")
    }
}

/// A route that leads out of the node by an interface.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Route {
    /// Where to.
    pub dst: IpNet,
    /// Index of the interface.
    pub link: u32,
    /// The router.
    pub gateway: Option<IpAddr>,
    /// The source that it asks for.
    pub source: Option<IpAddr>,
    /// Whether the kernel made it for an address of the interface.
    pub connected: bool,
    /// Number of its table.
    pub table: u32,
}

/// Whether an address means this node to others: neither loopback nor link-local, nor no address at all.
pub(super) fn is_global(ip: &IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !link_local && !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_has_one_address_in_each_family() {
        // Y-10, T-110…T-119.
        const NONE: [&str; 2] = ["127.0.0.1", "::1"];
        for (known, bind, primary, ips) in [
            ("", "10.0.0.1", Family::V4, ["10.0.0.1", NONE[1]]),
            ("", "fd00:4321::2", Family::V6, [NONE[0], "fd00:4321::2"]),
            ("", "0.0.0.0", Family::V4, NONE),
            ("", "", Family::V4, NONE),
            ("192.168.1.1", "0.0.0.0", Family::V4, ["192.168.1.1", NONE[1]]),
            ("192.168.1.1", "::", Family::V4, ["192.168.1.1", NONE[1]]),
            ("fd00:1234::1", "0.0.0.0", Family::V6, [NONE[0], "fd00:1234::1"]),
            ("fd00:1234::1", "::", Family::V6, [NONE[0], "fd00:1234::1"]),
            ("90.90.90.90 2001:db8::2", "::", Family::V4, ["90.90.90.90", "2001:db8::2"]),
            ("2001:db8::2 90.90.90.90", "0.0.0.0", Family::V6, ["90.90.90.90", "2001:db8::2"]),
            ("2001:db8::2 90.90.90.90", "80.80.80.80", Family::V4, ["80.80.80.80", "2001:db8::2"]),
            ("90.90.90.90 2001:db8::2", "2001:db8::555", Family::V6, ["90.90.90.90", "2001:db8::555"]),
            ("90.90.90.90 2001:db8::2", "::1", Family::V6, ["90.90.90.90", "::1"]),
            ("10.0.0.9 10.0.0.1 fd00::9 fd00::1", "", Family::V4, ["10.0.0.9", "fd00::9"]),
        ] {
            let known: Vec<IpAddr> = known.split_whitespace().map(|ip| ip.parse().unwrap()).collect();
            let found = NodeIps::new(&known, bind.parse().ok());
            let expected = NodeIps { primary, v4: ips[0].parse().unwrap(), v6: ips[1].parse().unwrap() };
            assert_eq!(found, expected, "{known:?} {bind}");
        }
    }

    #[test]
    fn loopback_means_this_node_to_nobody_else() {
        // V-33, T-119.
        let known: Vec<IpAddr> = ["90.90.90.90", "2001:db8::2"].map(|ip| ip.parse().unwrap()).into();
        assert_eq!(NodeIps::new(&known, None).known(), known);
        assert_eq!(NodeIps::new(&known, "::1".parse().ok()).known(), known[..1]);
        assert_eq!(NodeIps::new(&known[1..], None).known(), known[1..]);
        assert_eq!(NodeIps::new(&[], None).known(), Vec::<IpAddr>::new());
    }
}

//! What should be in the tables for the node itself: settings, interfaces, addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use proxy_common::abi::{Config, Iface, PortRange, Range, RouteKey, address, config, iface};
use proxy_common::addr::{Addr, Port};

use super::conflicts::Owners;
use super::node::is_global;
use super::{
    DetectLocal, Family, Link, Node, NodePortAddresses, NodeTables, Route, Settings, SocketLb, masquerade,
    ports, uplinks,
};

/// What follows from links and routes: only to be looked at again when one of them changes.
#[derive(Clone, Debug, Default)]
pub(super) struct Around {
    pub(super) sources: BTreeMap<RouteKey, Addr>,
    pub(super) uplinks: BTreeSet<u32>,
}

impl Around {
    pub(super) fn look(
        settings: &Settings,
        node: &Node,
        links: &[Link],
        routes: &[Route],
        owners: &Owners,
    ) -> Self {
        Self {
            sources: masquerade::sources(node, links, routes, owners),
            uplinks: uplinks::uplinks(settings, node, links, routes, owners),
        }
    }
}

/// The tables of the node. `links` are in order of their index.
pub(super) fn node_tables(
    settings: &Settings,
    node: &Node,
    links: &[Link],
    around: &Around,
    owners: &Owners,
    service_ranges: &BTreeSet<IpNet>,
) -> NodeTables {
    let families = settings.families(); // S-12
    let mut config = node_config(settings, node, links).with_snat_ports(&snat_ports(settings, owners));
    if settings.drop_unallocated {
        let served = service_ranges.iter().filter(|range| families.contains(&Family::of(&range.addr())));
        put_service_ranges(&mut config, served.copied());
    }
    NodeTables {
        config,
        ifaces: ifaces(settings, links, &around.uplinks),
        routes: around.sources.clone(),
        addresses: addresses(settings, node, links),
    }
}

/// The global addresses of links.
pub(super) fn global_addresses(links: &[Link]) -> impl Iterator<Item = IpAddr> {
    let own = links.iter().filter(|link| !link.holds_cluster_ips());
    own.flat_map(|link| &link.addresses).map(IpNet::addr).filter(is_global)
}

/// The API server's default `--service-node-port-range`.
pub const NODE_PORTS: RangeInclusive<u16> = 30000..=32767;

/// The ports to masquerade with: none that a NodePort has, whatever the API server's range for them is.
fn snat_ports(settings: &Settings, owners: &Owners) -> Vec<PortRange> {
    let taken = ports::spans(owners.node_ports_outside(&NODE_PORTS));
    if taken.is_empty() {
        return settings.snat_ports.clone();
    }
    let last = |range: &PortRange| range.first.saturating_add(range.count.saturating_sub(1));
    let all = settings.snat_ports.iter().map(|range| range.first..=last(range));
    ports::largest(ports::without(all.collect(), &taken))
}

fn node_config(settings: &Settings, node: &Node, links: &[Link]) -> Config {
    let mut flags = 0;
    let mut set = |condition: bool, flag: u32| flags |= if condition { flag } else { 0 };
    set(settings.masquerade_all, config::MASQUERADE_ALL);
    set(settings.masquerade_local, config::MASQUERADE_LOCAL);
    set(settings.socket_lb == SocketLb::All, config::SOCKET_PODS);
    set(settings.socket_lb != SocketLb::Off, config::SOCKET_HOST);
    set(settings.socket_lb != SocketLb::Off && settings.localhost_node_ports, config::LOCALHOST_NODE_PORTS);

    let mut table = Config {
        host_netns: settings.host_netns,
        seed: settings.seed,
        probe_port: Port::new(settings.probe_port),
        ..Config::EMPTY
    };
    // M-3: a setting for one family alone means that pods of the other are not told apart.
    let ranges: &[IpNet] = match settings.detect_local {
        DetectLocal::AnyRange if settings.cluster_cidrs.is_empty() => &node.pod_cidrs,
        DetectLocal::AnyRange | DetectLocal::ClusterCidr => &settings.cluster_cidrs,
        DetectLocal::NodeCidr => &node.pod_cidrs,
        DetectLocal::Bridge(_) | DetectLocal::InterfacePrefix(_) => {
            flags |= config::POD_INTERFACES;
            &[]
        }
    };
    let first = |family| ranges.iter().find(|range| Family::of(&range.addr()) == family);
    if let Some(range) = first(Family::V4) {
        flags |= config::POD_RANGE_V4;
        table.pod_v4 = range.network().into();
        table.pod_v4_mask = Addr::from(range.netmask()).word_v4();
    }
    if let Some(range) = first(Family::V6) {
        flags |= config::POD_RANGE_V6;
        table.pod_v6 = range.network().into();
        table.pod_v6_mask = range.netmask().into();
    }
    table.flags = flags;
    let primary = |family: Family| {
        let mut known = node.ips.iter().copied().chain(global_addresses(links));
        known.find(|ip| Family::of(ip) == family).map_or(family.wildcard(), Addr::from)
    };
    (table.node_v4, table.node_v6) = (primary(Family::V4), primary(Family::V6));
    table
}

/// The ranges of ClusterIPs that there is room for; adjacent ones are one.
fn put_service_ranges(config: &mut Config, ranges: impl Iterator<Item = IpNet>) {
    let ranges = IpNet::aggregate(&ranges.collect());
    config.service_range_count = 0;
    for (place, range) in config.service_ranges.iter_mut().zip(&ranges) {
        let mask = match range.netmask() {
            // The first 96 bits of an IPv4-mapped address are the same for all.
            IpAddr::V4(mask) => Addr([u32::MAX, u32::MAX, u32::MAX, Addr::from(IpAddr::V4(mask)).word_v4()]),
            mask @ IpAddr::V6(_) => mask.into(),
        };
        *place = Range { first: range.network().into(), mask };
        config.service_range_count += 1;
    }
}

/// Whether what comes in by `link` comes from a pod, in the modes that tell by interface (M-1). A bridge's port counts
/// as the bridge: that is where the rules look, but the programs see the packet before.
fn is_pods(mode: &DetectLocal, link: &Link, links: &[Link]) -> bool {
    let master = master_of(link, links);
    let matches = |link: &Link| match mode {
        DetectLocal::Bridge(name) => link.name == *name,
        DetectLocal::InterfacePrefix(prefix) => link.name.starts_with(&**prefix),
        DetectLocal::AnyRange | DetectLocal::ClusterCidr | DetectLocal::NodeCidr => false,
    };
    matches(link) || master.is_some_and(matches)
}

/// The bridge, or its like, that a link is a port of.
fn master_of<'a>(link: &Link, links: &'a [Link]) -> Option<&'a Link> {
    link.master.and_then(|index| links.iter().find(|link| link.index == index))
}

fn ifaces(settings: &Settings, links: &[Link], uplinks: &BTreeSet<u32>) -> BTreeMap<u32, Iface> {
    let carrying = links.iter().filter(|link| link.carries_programs());
    carrying
        .map(|link| {
            let layer3 = if link.layer3 { iface::L3 } else { 0 };
            let pods = if is_pods(&settings.detect_local, link, links) { iface::POD } else { 0 };
            let uplink = if pods == 0 { uplinks::uplink_of(link, uplinks) } else { 0 };
            let bridge = master_of(link, links).map_or([0; 6], |master| master.mac);
            (link.index, Iface { bridge, ..Iface::new(layer3 | pods, uplink) })
        })
        .collect()
}

fn addresses(settings: &Settings, node: &Node, links: &[Link]) -> BTreeMap<Addr, u32> {
    let accepted = NodePorts::of(settings, node, links);
    global_addresses(links)
        .map(|ip| {
            let node_port = if accepted.at(&ip) { address::NODE_PORT } else { 0 };
            (ip.into(), address::NODE | node_port)
        })
        .collect()
}

/// The addresses of one family at which NodePorts are accepted, for who listens there (H-15).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// All that the node has and will have.
    Everywhere,
    /// These.
    At(Vec<IpAddr>),
}

/// Where to listen for what is served beside NodePorts.
pub(super) fn accepted(settings: &Settings, node: &Node, links: &[Link], family: Family) -> Accepted {
    let accepted = NodePorts::of(settings, node, links);
    if accepted.everywhere(family) {
        return Accepted::Everywhere;
    }
    let at: BTreeSet<IpAddr> =
        global_addresses(links).filter(|ip| Family::of(ip) == family && accepted.at(ip)).collect();
    Accepted::At(at.into_iter().collect())
}

/// Where NodePorts are accepted (V-33).
enum NodePorts<'a> {
    Everywhere,
    At(Vec<IpAddr>),
    Inside(&'a [IpNet]),
}

impl<'a> NodePorts<'a> {
    fn of(settings: &'a Settings, node: &Node, links: &[Link]) -> Self {
        match &settings.nodeport_addresses {
            NodePortAddresses::Ranges(ranges) => Self::Inside(ranges),
            NodePortAddresses::Primary if node.ips.is_empty() => Self::Everywhere,
            // V-33 leaves a family without a known primary open to all; here it is closed, because nobody
            // who names the IPv4 address of a node means "and every IPv6 address".
            NodePortAddresses::Primary => {
                let own: Vec<IpAddr> = global_addresses(links).collect();
                let primary =
                    |family| node.ips.iter().copied().find(|ip| Family::of(ip) == family && own.contains(ip));
                Self::At([primary(Family::V4), primary(Family::V6)].into_iter().flatten().collect())
            }
        }
    }

    fn at(&self, ip: &IpAddr) -> bool {
        let named = match self {
            Self::Everywhere => true,
            Self::At(ips) => ips.contains(ip),
            Self::Inside(ranges) => ranges.iter().any(|range| range.contains(ip)),
        };
        named || self.everywhere(Family::of(ip))
    }

    /// Whether every address of a family will do: nothing was said of it, or a range that holds them all.
    fn everywhere(&self, family: Family) -> bool {
        match self {
            Self::Everywhere => true,
            Self::At(_) => false,
            Self::Inside(ranges) => {
                let mut of_family =
                    ranges.iter().filter(|range| Family::of(&range.addr()) == family).peekable();
                of_family.peek().is_none() || of_family.any(|range| range.prefix_len() == 0)
            }
        }
    }
}

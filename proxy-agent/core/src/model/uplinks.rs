//! Which interfaces are uplinks: an answer to what came in by one has to leave by it again.
//!
//! An uplink is an interface that leads out of the node with an address under which others know the node: a global
//! one that is no Service's and lies in no pods' range, and has a network (or a route through a router, where clouds
//! hand out single addresses). An address that the Node object names is one in any case. So neither pods' interfaces
//! (no address, or one of the pods' range) are uplinks, nor their bridge, nor tunnels. A port of a bridge or bond
//! that is an uplink stands for that.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::conflicts::Owners;
use super::node::is_global;
use super::{Device, Family, Link, Node, Route, Settings};

/// The indices of interfaces that are uplinks.
pub(super) fn uplinks(
    settings: &Settings,
    node: &Node,
    links: &[Link],
    routes: &[Route],
    owners: &Owners,
) -> BTreeSet<u32> {
    let routed: BTreeSet<(u32, Family)> = routes
        .iter()
        .filter(|route| route.gateway.is_some())
        .map(|route| (route.link, Family::of(&route.dst.addr())))
        .collect();
    let is_pods = |net: &IpNet| {
        node.pod_cidrs.iter().chain(&settings.cluster_cidrs).any(|range| range.contains(&net.addr()))
    };
    let names_node = |link: &Link, net: &IpNet| {
        let ip = net.addr();
        let whole_network = net.prefix_len() < net.max_prefix_len();
        is_global(&ip)
            && !owners.is_service_address(&ip.into())
            && (node.ips.contains(&ip)
                || !is_pods(net) && (whole_network || routed.contains(&(link.index, Family::of(&ip)))))
    };
    links
        .iter()
        .filter(|link| link.device == Device::Wire && !link.loopback)
        .filter(|link| link.addresses.iter().any(|net| names_node(link, net)))
        .map(|link| link.index)
        .collect()
}

/// The uplink that a link belongs to: itself, or what it is a port of; 0 is none.
pub(super) fn uplink_of(link: &Link, uplinks: &BTreeSet<u32>) -> u32 {
    let master = link.master.unwrap_or(0);
    [link.index, master].into_iter().find(|index| uplinks.contains(index)).unwrap_or(0)
}

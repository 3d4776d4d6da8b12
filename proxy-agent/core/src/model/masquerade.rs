//! Which address masqueraded flows leave under: by interface and destination, as the kernel would choose for a packet
//! of the node's own (M-13).
//!
//! For IPv4 that is the `src` of the route, else the first address of the interface in whose network the next hop
//! lies, else its first one (`inet_select_addr`). For IPv6 it is the `src` of the route, else an address of the kind
//! of the destination, private (fc00::/7) or not, and of these the one that has most in common with it (RFC 6724).
//! Where more than one address fits, the Node object's comes first. An interface without an address borrows one:
//! the Node object's, else that of another interface. Service addresses, deprecated and temporary ones are never chosen.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv6Net};
use proxy_common::abi::RouteKey;
use proxy_common::addr::Addr;

use super::conflicts::Owners;
use super::node::is_global;
use super::{Family, Link, Node, Route};

/// A way out of the node, as far as the choice of a source depends on it.
#[derive(Clone, Copy)]
struct Way<'a> {
    link: &'a Link,
    dst: IpNet,
    /// The router, or where there is none the destination itself.
    next_hop: Option<IpAddr>,
    /// What the route says.
    source: Option<IpAddr>,
}

/// The sources of all links: one for each family, and those routes that ask for another than the route around them.
pub(super) fn sources(
    node: &Node,
    links: &[Link],
    routes: &[Route],
    owners: &Owners,
) -> BTreeMap<RouteKey, Addr> {
    let choice = Choice::new(node, links, owners);
    let carrying: HashMap<u32, &Link> =
        links.iter().filter(|link| link.carries_programs()).map(|link| (link.index, link)).collect();
    let mut all = BTreeMap::new();
    for link in carrying.values().copied() {
        for family in [Family::V4, Family::V6] {
            let dst = IpNet::new(family.wildcard().into(), 0).expect("a prefix of no length");
            let source = choice.of(Way { link, dst, next_hop: None, source: None });
            let source = source.map_or(family.wildcard(), Addr::from);
            all.insert(RouteKey::range(link.index, family.wildcard(), 0), source);
        }
    }
    let mut ways: BTreeMap<(u32, IpNet), (u32, Way<'_>)> = BTreeMap::new();
    for route in routes {
        let Some(link) = carrying.get(&route.link).copied() else { continue };
        let gateway = route.gateway.filter(|ip| Family::of(ip) == Family::of(&route.dst.addr()));
        let next_hop = match route.gateway {
            Some(_) => gateway,
            None => (route.dst.prefix_len() != 0).then(|| route.dst.addr()),
        };
        // What the kernel has written beside a connected network is its first address, and no wish.
        let source = route.source.filter(|_| !route.connected);
        let mut add = |dst: IpNet, rank| {
            let way = Way { link, dst, next_hop, source };
            // The main table comes first, then the others by their numbers.
            let entry = ways.entry((route.link, dst)).or_insert((rank, way));
            if rank < entry.0 {
                *entry = (rank, way);
            }
        };
        let rank = if route.table == MAIN { 0 } else { route.table.max(1) };
        add(route.dst, rank);
        if let IpNet::V6(dst) = route.dst
            && dst.prefix_len() < PRIVATE_BITS
            && dst.contains(&private())
        {
            // Private destinations ask for a private source: a part of the route that stands behind all real ones.
            add(private().into(), u32::MAX);
        }
    }
    // Wide ones first: a narrow one that asks for the same as the one around it is no entry.
    let mut ways: Vec<_> = ways.into_values().map(|(_, way)| way).collect();
    ways.sort_by_key(|way| (way.link.index, way.dst.prefix_len()));
    let mut lengths: BTreeSet<(u32, Family, u8)> = BTreeSet::new();
    for way in ways {
        let (index, family) = (way.link.index, Family::of(&way.dst.addr()));
        let Some(source) = choice.of(way) else { continue };
        let around = lengths.range((index, family, 0)..(index, family, way.dst.prefix_len())).rev();
        let around = around.filter_map(|(_, _, bits)| {
            let net = IpNet::new(way.dst.addr(), *bits).ok()?.trunc();
            all.get(&key(index, net))
        });
        let default = all.get(&RouteKey::range(index, family.wildcard(), 0));
        let source = Addr::from(source);
        if way.dst.prefix_len() != 0 && around.into_iter().next().or(default) == Some(&source) {
            continue;
        }
        all.insert(key(index, way.dst), source);
        lengths.insert((index, family, way.dst.prefix_len()));
    }
    all
}

/// `RT_TABLE_MAIN`.
const MAIN: u32 = 254;
/// Length of the prefix of private IPv6 addresses (RFC 4193).
const PRIVATE_BITS: u8 = 7;

fn private() -> Ipv6Net {
    Ipv6Net::new_assert([0xfc00, 0, 0, 0, 0, 0, 0, 0].into(), PRIVATE_BITS)
}

fn is_private(ip: &IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unique_local())
}

fn key(link: u32, net: IpNet) -> RouteKey {
    RouteKey::range(link, net.addr().into(), net.prefix_len().into())
}

/// The addresses that flows may leave under (M-13).
struct Choice<'a> {
    node: &'a Node,
    /// By the index of their link, in the kernel's order.
    by_link: HashMap<u32, Vec<IpNet>>,
    /// All of them, with their link; those of loopback are the last.
    all: Vec<(&'a Link, IpNet)>,
    known: HashSet<IpAddr>,
}

impl<'a> Choice<'a> {
    fn new(node: &'a Node, links: &'a [Link], owners: &Owners) -> Self {
        let usable = |net: &&IpNet| is_global(&net.addr()) && !owners.is_service_address(&net.addr().into());
        let own = links.iter().filter(|link| !link.holds_cluster_ips());
        let mut all: Vec<(&Link, IpNet)> =
            own.flat_map(|link| link.addresses.iter().filter(usable).map(move |net| (link, *net))).collect();
        // What is bound to loopback is more often somebody's virtual address.
        all.sort_by_key(|(link, _)| link.loopback);
        let mut by_link: HashMap<u32, Vec<IpNet>> = HashMap::new();
        for (link, net) in &all {
            by_link.entry(link.index).or_default().push(*net);
        }
        let known = all.iter().map(|(_, net)| net.addr()).collect();
        Self { node, by_link, all, known }
    }

    fn of(&self, way: Way<'_>) -> Option<IpAddr> {
        let family = Family::of(&way.dst.addr());
        if let Some(source) = way.source.filter(|ip| self.known.contains(ip)) {
            return Some(source);
        }
        self.on_link(way, family).or_else(|| {
            let mut of_node = self.node.ips.iter().copied().filter(|ip| Family::of(ip) == family);
            of_node.find(|ip| self.known.contains(ip)).or_else(|| self.borrowed(way, family))
        })
    }

    fn on_link(&self, way: Way<'_>, family: Family) -> Option<IpAddr> {
        let own = || {
            let all = self.by_link.get(&way.link.index).into_iter().flatten();
            all.filter(|net| Family::of(&net.addr()) == family)
        };
        let near = |net: &&IpNet| way.next_hop.is_some_and(|hop| net.contains(&hop));
        let of_node = |net: &&IpNet| self.node.ips.contains(&net.addr());
        own()
            .find(|net| of_node(net) && near(net))
            .or_else(|| match family {
                Family::V4 => own().find(near).or_else(|| own().find(of_node)).or_else(|| own().next()),
                Family::V6 => nearest(own(), way, near, of_node),
            })
            .map(IpNet::addr)
    }

    /// For an interface without addresses: those of its VRF come first.
    fn borrowed(&self, way: Way<'_>, family: Family) -> Option<IpAddr> {
        let domain = way.link.master;
        let here = |link: &Link| link.master == domain || Some(link.index) == domain;
        let part = |near: bool| self.all.iter().filter(move |(link, _)| here(link) == near);
        let all = part(true).chain(part(false)).map(|(_, net)| net);
        let mut all = all.filter(|net| Family::of(&net.addr()) == family);
        match family {
            Family::V4 => all.next(),
            Family::V6 => nearest(all, way, |_| false, |_| false),
        }
        .map(IpNet::addr)
    }
}

/// Of IPv6 addresses the one to use: of the destination's kind, then the Node's, then in the next hop's network, then
/// with most bits in common, then the first.
fn nearest<'a>(
    all: impl Iterator<Item = &'a IpNet>,
    way: Way<'_>,
    near: impl Fn(&&IpNet) -> bool,
    of_node: impl Fn(&&IpNet) -> bool,
) -> Option<&'a IpNet> {
    let dst = way.dst.addr();
    let private = is_private(&dst);
    all.min_by_key(|net| {
        let common = common_bits(&net.addr(), &dst).min(net.prefix_len().min(way.dst.prefix_len()).into());
        (is_private(&net.addr()) != private, !of_node(net), !near(net), 128 - common)
    })
}

fn common_bits(a: &IpAddr, b: &IpAddr) -> u32 {
    match (a, b) {
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        _ => 0,
    }
}

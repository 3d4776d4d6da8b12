//! The way to an address, as the kernel would send a packet there now, for packets that programs wrap and hand to an interface
//! themselves.

use std::io;
use std::net::IpAddr;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteMetric, RouteType};
use rtnetlink::packet_core::{DecodeError, Emitable, Parseable};

use super::kinds::{Frames, frames};
use super::request::{Flags, Protocol, exchange};
use super::routes::address;
use agent_core::model::tunnels::Way;

/// `RTM_GETROUTE`.
const GET_ROUTE: u16 = 26;
/// `RTM_GETLINK`.
const GET_LINK: u16 = 18;

/// Why there is no way that could be used.
#[derive(Debug, thiserror::Error)]
pub enum WayError {
    /// The kernel has none.
    #[error("no route to {to}")]
    None { to: IpAddr, source: io::Error },
    /// It leads nowhere.
    #[error("the route to {to} is none that packets are sent by ({kind:?})")]
    Kind { to: IpAddr, kind: RouteType },
    /// Nothing is sent to another machine there.
    #[error("{to} is an address of this node")]
    Own { to: IpAddr },
    /// Programs hand on frames with an Ethernet header.
    #[error("the route to {to} leads to {name}, whose frames have no Ethernet header")]
    NoEthernet { to: IpAddr, name: String },
    /// An answer could not come back.
    #[error("the route to {to} names no address of this node")]
    NoSource { to: IpAddr },
    /// The interface has just gone.
    #[error("the route to {to} leads to interface {index}, which cannot be looked at")]
    Link { to: IpAddr, index: u32, source: io::Error },
    /// The kernel speaks otherwise than is known.
    #[error("cannot read what the kernel says of the way to {to}")]
    Unread { to: IpAddr, source: DecodeError },
}

/// Looks it up: two questions to the kernel.
pub fn way(to: IpAddr) -> Result<Way, WayError> {
    let unread = |source| WayError::Unread { to, source };
    let answers = exchange(Protocol::Route, GET_ROUTE, Flags::Ack, &bytes(&question(to)))
        .map_err(|source| WayError::None { to, source })?;
    let route = RouteMessage::parse(answers.first().map_or(&[][..], Vec::as_slice)).map_err(unread)?;
    let found = read(to, &route)?;
    let failed = |source| WayError::Link { to, index: found.link, source };
    let mut asked = LinkMessage::default();
    asked.header.index = found.link;
    let answers = exchange(Protocol::Route, GET_LINK, Flags::Ack, &bytes(&asked)).map_err(failed)?;
    let link = LinkMessage::parse(answers.first().map_or(&[][..], Vec::as_slice)).map_err(unread)?;
    through(to, found, &link)
}

fn question(to: IpAddr) -> RouteMessage {
    let mut asked = RouteMessage::default();
    (asked.header.address_family, asked.header.destination_prefix_length) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    asked.attributes.push(RouteAttribute::Destination(to.into()));
    asked
}

fn bytes(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

/// What the route says; its MTU is as large as can be where it says nothing.
fn read(to: IpAddr, route: &RouteMessage) -> Result<Way, WayError> {
    let (mut from, mut link, mut mtu) = (None, 0, u32::MAX);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = *index,
            RouteAttribute::PrefSource(source) => from = address(source),
            RouteAttribute::Metrics(all) => {
                let said = all.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) if *mtu != 0 => Some(*mtu),
                    _ => None,
                });
                mtu = said.unwrap_or(mtu);
            }
            _ => {}
        }
    }
    match route.header.kind {
        RouteType::Unicast => {}
        RouteType::Local => return Err(WayError::Own { to }),
        kind => return Err(WayError::Kind { to, kind }),
    }
    let from = from.ok_or(WayError::NoSource { to })?;
    Ok(Way { from, link, mtu })
}

/// The same with what the interface says.
fn through(to: IpAddr, way: Way, link: &LinkMessage) -> Result<Way, WayError> {
    if link.header.flags.contains(LinkFlags::Loopback) {
        return Err(WayError::Own { to });
    }
    if frames(link.header.link_layer_type) != Frames::Ethernet {
        let name = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
        return Err(WayError::NoEthernet { to, name: name.unwrap_or_default() });
    }
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    Ok(Way { mtu: way.mtu.min(mtu.unwrap_or(u32::MAX)), ..way })
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::LinkLayerType;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn route(kind: RouteType, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.kind = kind;
        message.attributes = attributes;
        message
    }

    fn link(layer: LinkLayerType, flags: LinkFlags, mtu: u32) -> LinkMessage {
        let mut message = LinkMessage::default();
        (message.header.link_layer_type, message.header.flags) = (layer, flags);
        message.attributes = vec![LinkAttribute::IfName("dev0".into()), LinkAttribute::Mtu(mtu)];
        message
    }

    /// The kernel that runs the test says itself whether the question is understood.
    #[test]
    fn an_address_of_this_node_is_no_way() {
        let error = way(ip("127.0.0.1")).unwrap_err();
        assert!(matches!(error, WayError::Own { .. }), "{error}");
    }

    #[test]
    fn the_smaller_length_counts() {
        let to = ip("10.0.0.2");
        let said = |mtu: Option<u32>| {
            let source = RouteAttribute::PrefSource(ip("10.0.0.1").into());
            let mut attributes = vec![RouteAttribute::Oif(7), source];
            attributes.extend(mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
            let found = read(to, &route(RouteType::Unicast, attributes)).unwrap();
            through(to, found, &link(LinkLayerType::Ether, LinkFlags::Up, 1500)).unwrap()
        };
        let is = |mtu| Way { from: ip("10.0.0.1"), link: 7, mtu };
        let found = [said(None), said(Some(1400)), said(Some(9000)), said(Some(0))];
        assert_eq!(found, [1500, 1400, 1500, 1500].map(is));
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        let to = ip("fd00::2");
        let source = || RouteAttribute::PrefSource(ip("fd00::1").into());
        let said = |route: &RouteMessage, link: &LinkMessage| {
            read(to, route).and_then(|way| through(to, way, link)).unwrap_err().to_string()
        };
        let ether = link(LinkLayerType::Ether, LinkFlags::Up, 1500);
        let bare = link(LinkLayerType::None, LinkFlags::Up, 1420);
        let loopback = link(LinkLayerType::Loopback, LinkFlags::Loopback, 65536);
        let good = route(RouteType::Unicast, vec![RouteAttribute::Oif(7), source()]);
        for (said, part) in [
            (said(&route(RouteType::Unicast, vec![RouteAttribute::Oif(7)]), &ether), "names no address"),
            (said(&route(RouteType::Local, vec![source()]), &ether), "is an address of this node"),
            (said(&route(RouteType::BlackHole, vec![source()]), &ether), "BlackHole"),
            (said(&good, &bare), "dev0, whose frames have no Ethernet"),
            (said(&good, &loopback), "is an address of this node"),
        ] {
            assert!(said.contains(part) && said.contains("fd00::2"), "{said}");
        }
    }
}

//! Routes of the node, as far as the source of masqueraded flows follows from them.
//!
//! They change more often than interfaces, and there may be many: they are followed on a connection of their own, and
//! between two lists there is at least ten times the time that a list takes.

use std::net::IpAddr;
use std::time::Duration;

use futures::StreamExt;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType, RouteVia,
};
use rtnetlink::{Handle, MulticastGroup, new_multicast_connection};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::{AGAIN, Messages, NetlinkError};
use agent_core::model::Change;
use agent_core::model::Route;

/// A burst of changes has ended when nothing came for this long.
const QUIET: Duration = Duration::from_millis(20);
/// A burst that does not end is answered all the same.
const LONGEST: Duration = Duration::from_millis(200);
/// Routes of one family that are looked at: the rest leave as their interface's other flows do.
const MOST: usize = 100_000;
/// `RT_TABLE_LOCAL`: the node's own addresses.
const LOCAL: u32 = 255;

/// Sends the complete list of routes at once and after every change, until the receiver has gone. `first` is notified
/// when the first list has been sent, or could not be had.
pub(super) async fn watch(changes: mpsc::Sender<Change>, first: tokio::sync::oneshot::Sender<()>) {
    let mut last = None;
    let mut first = Some(first);
    while !changes.is_closed() {
        if let Err(error) = follow(&changes, &mut last, &mut first).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "routes cannot be followed");
        }
        notify(&mut first);
        sleep(AGAIN).await;
    }
}

fn notify(first: &mut Option<tokio::sync::oneshot::Sender<()>>) {
    if let Some(first) = first.take() {
        // Nobody waits any more when the other side has ended.
        first.send(()).ok();
    }
}

async fn follow(
    changes: &mpsc::Sender<Change>,
    last: &mut Option<Vec<Route>>,
    first: &mut Option<tokio::sync::oneshot::Sender<()>>,
) -> Result<(), NetlinkError> {
    // When an address or a device goes, the kernel takes its routes along without a word.
    let groups = [
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
    ];
    let (connection, handle, mut messages) =
        new_multicast_connection(&groups).map_err(NetlinkError::Connect)?;
    let speaking = tokio::spawn(connection);
    let result = answer_bursts(&handle, &mut messages, changes, last, first).await;
    speaking.abort();
    result
}

async fn answer_bursts(
    handle: &Handle,
    messages: &mut Messages,
    changes: &mpsc::Sender<Change>,
    last: &mut Option<Vec<Route>>,
    first: &mut Option<tokio::sync::oneshot::Sender<()>>,
) -> Result<(), NetlinkError> {
    loop {
        let begun = Instant::now();
        let found = list(handle).await?;
        let took = begun.elapsed();
        if last.as_ref() != Some(&found) {
            *last = Some(found.clone());
            if changes.send(Change::Routes(found)).await.is_err() {
                return Ok(());
            }
        }
        notify(first);
        sleep(took * 10).await;
        let next = tokio::select! {
            message = messages.next() => message,
            () = changes.closed() => None,
        };
        if next.is_none() || !super::wait_out(messages, QUIET, LONGEST, drop).await {
            return Ok(());
        }
    }
}

/// Every route that leads out by an interface, in all tables.
pub(super) async fn list(handle: &Handle) -> Result<Vec<Route>, NetlinkError> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        let mut answers = Box::pin(handle.route().get(message).execute());
        let end = found.len() + MOST;
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(message) if found.len() < end => found.extend(routes(&message)),
                Ok(_) => {
                    tracing::warn!(
                        "more than {MOST} routes of one family: flows by the rest of them are masqueraded as others \
                         of their interface"
                    );
                    break;
                }
                // A node without IPv6 has none of its routes.
                Err(_) if family == AddressFamily::Inet6 => break,
                Err(source) => return Err(NetlinkError::List { what: "routes", source }),
            }
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// A route by each of its next hops.
fn routes(message: &RouteMessage) -> Vec<Route> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let (mut dst, mut source, mut single, mut hops) = (None, None, Hop::default(), Vec::new());
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(to) => dst = address(to),
            RouteAttribute::PrefSource(from) => source = address(from),
            RouteAttribute::MultiPath(all) => {
                hops = all
                    .iter()
                    .map(|hop| {
                        let mut found = Hop { link: hop.interface_index, gateway: None };
                        hop.attributes.iter().for_each(|attribute| found.take(attribute));
                        found
                    })
                    .collect();
            }
            other => single.take(other),
        }
    }
    if hops.is_empty() {
        hops.push(single);
    }
    let any = match header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        _ => IpAddr::from([0_u16; 8]),
    };
    let Ok(dst) = IpNet::new(dst.unwrap_or(any), header.destination_prefix_length) else { return Vec::new() };
    if header.kind != RouteType::Unicast || table == LOCAL || dst.addr().is_multicast() || is_link_local(&dst)
    {
        return Vec::new();
    }
    let connected = header.protocol == RouteProtocol::Kernel;
    let route = |Hop { link, gateway }| Route { dst: dst.trunc(), link, gateway, source, connected, table };
    hops.into_iter().filter(|hop| hop.link != 0).map(route).collect()
}

fn is_link_local(dst: &IpNet) -> bool {
    matches!(dst.addr(), IpAddr::V6(ip) if ip.is_unicast_link_local() && dst.prefix_len() >= 10)
}

#[derive(Clone, Copy, Debug, Default)]
struct Hop {
    link: u32,
    gateway: Option<IpAddr>,
}

impl Hop {
    fn take(&mut self, attribute: &RouteAttribute) {
        match attribute {
            RouteAttribute::Oif(index) => self.link = *index,
            RouteAttribute::Gateway(gateway) => self.gateway = address(gateway),
            RouteAttribute::Via(RouteVia::Inet(gateway)) => self.gateway = Some((*gateway).into()),
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => self.gateway = Some((*gateway).into()),
            _ => {}
        }
    }
}

pub(super) fn address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::route::RouteNextHop;

    use super::*;

    fn message(dst: &str, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let net: IpNet = dst.parse().unwrap();
        let mut message = RouteMessage::default();
        message.header.address_family =
            if net.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.destination_prefix_length = net.prefix_len();
        message.header.table = 254;
        message.header.kind = RouteType::Unicast;
        if net.prefix_len() != 0 {
            message.attributes.push(RouteAttribute::Destination(net.addr().into()));
        }
        message.attributes.extend(attributes);
        message
    }

    fn gateway(ip: &str) -> RouteAttribute {
        RouteAttribute::Gateway(ip.parse::<IpAddr>().unwrap().into())
    }

    fn said(message: &RouteMessage) -> Vec<String> {
        routes(message)
            .iter()
            .map(|r| {
                format!("{} dev {} via {:?} src {:?} table {}", r.dst, r.link, r.gateway, r.source, r.table)
            })
            .collect()
    }

    #[test]
    fn a_route_is_read_once_for_each_of_its_next_hops() {
        let plain = message("10.244.2.0/24", vec![gateway("192.168.10.12"), RouteAttribute::Oif(2)]);
        assert_eq!(said(&plain), ["10.244.2.0/24 dev 2 via Some(192.168.10.12) src None table 254"]);
        let hop = |index, ip| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = index;
            hop.attributes.push(gateway(ip));
            hop
        };
        let many = vec![
            RouteAttribute::Table(1000),
            RouteAttribute::MultiPath(vec![hop(2, "10.0.0.1"), hop(3, "10.1.0.1")]),
        ];
        assert_eq!(
            said(&message("0.0.0.0/0", many)),
            [
                "0.0.0.0/0 dev 2 via Some(10.0.0.1) src None table 1000",
                "0.0.0.0/0 dev 3 via Some(10.1.0.1) src None table 1000",
            ]
        );
        let via = RouteAttribute::Via(RouteVia::Inet6("fe80::1".parse().unwrap()));
        let source = RouteAttribute::PrefSource("10.0.0.9".parse::<IpAddr>().unwrap().into());
        let other = message("10.9.0.0/16", vec![via, source, RouteAttribute::Oif(4)]);
        assert_eq!(said(&other), ["10.9.0.0/16 dev 4 via Some(fe80::1) src Some(10.0.0.9) table 254"]);
    }

    #[test]
    fn what_leads_nowhere_or_home_is_no_route() {
        let mut blackhole = message("10.0.0.0/8", vec![]);
        blackhole.header.kind = RouteType::BlackHole;
        let local = message("10.0.0.1/32", vec![RouteAttribute::Oif(1), RouteAttribute::Table(LOCAL)]);
        let link_local = message("fe80::/64", vec![RouteAttribute::Oif(2)]);
        for message in [blackhole, local, link_local, message("10.0.0.0/8", vec![])] {
            assert_eq!(routes(&message), [], "{message:?}");
        }
    }
}

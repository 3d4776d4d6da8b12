//! Links and addresses of the node, as rtnetlink reports them.
//!
//! What messages say of links is taken at its word, so that a new pod's interface is known without asking for all others;
//! of addresses they only say that something has changed, since their order matters, and all are listed again. Each burst of
//! messages is answered with one complete list. Everything is listed anew once a minute, and when a connection
//! breaks, so a lost message costs no more than that. New pods' interfaces must be noticed at once (D-17), so a burst is
//! waited out for milliseconds, not seconds.

mod choose;
pub mod conntrack;
pub(crate) mod devices;
pub(crate) mod driver;
pub(crate) mod ipvs;
mod kinds;
pub(crate) mod nf_make;
pub(crate) mod nf_tables;
pub(crate) mod request;
mod routes;
pub mod sock_diag;
mod way;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::{Handle, MulticastGroup, new_multicast_connection};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

pub use choose::{Devices, DevicesError};
pub use nf_tables::is_absent;
pub use way::{WayError, way};

use agent_core::model::Change;
use agent_core::model::{Link, Route};

/// A burst has ended when nothing came for this long.
const QUIET: Duration = Duration::from_millis(3);
/// A burst that does not end is answered all the same.
const LONGEST: Duration = Duration::from_millis(50);
/// Pause before a broken connection is made anew.
const AGAIN: Duration = Duration::from_millis(500);
/// After this long everything is listed, whatever has come.
const ANEW: Duration = Duration::from_secs(60);

/// Why interfaces cannot be listed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No connection.
    #[error("cannot open a netlink socket for news of interfaces (CAP_NET_ADMIN, or too many open files)")]
    Connect(#[source] io::Error),
    /// No list.
    #[error("cannot list {what} through netlink")]
    List {
        /// Links or addresses.
        what: &'static str,
        source: rtnetlink::Error,
    },
}

type Messages = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, rtnetlink::sys::SocketAddr)>;

/// Sends the complete lists of routes and links at once and after every change, until the receiver has gone. When the
/// first links come, the first routes have. Failures are logged and tried again.
///
/// Hears of the network namespace of the thread that polls it first.
pub async fn watch(changes: mpsc::Sender<Change>) {
    let (first, routes_known) = oneshot::channel();
    let links = async {
        // An error: routes are not followed any more, because the receiver has gone.
        routes_known.await.ok();
        watch_links(changes.clone()).await;
    };
    tokio::join!(routes::watch(changes.clone(), first), links);
}

async fn watch_links(changes: mpsc::Sender<Change>) {
    let mut known = Known::default();
    while !changes.is_closed() {
        if let Err(error) = follow(&changes, &mut known).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "interfaces cannot be followed");
        }
        sleep(AGAIN).await;
    }
}

/// Every link with its addresses, once.
pub async fn links() -> Result<Vec<Link>, NetlinkError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Connect)?;
    let speaking = tokio::spawn(connection);
    let found = list(&handle).await;
    speaking.abort();
    found
}

/// Every route that leads out by an interface, once.
pub async fn routes() -> Result<Vec<Route>, NetlinkError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Connect)?;
    let speaking = tokio::spawn(connection);
    let found = routes::list(&handle).await;
    speaking.abort();
    found
}

/// One connection's life: returns when it ends or the receiver has gone.
async fn follow(changes: &mpsc::Sender<Change>, known: &mut Known) -> Result<(), NetlinkError> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, handle, mut messages) =
        new_multicast_connection(&groups).map_err(NetlinkError::Connect)?;
    let speaking = tokio::spawn(connection);
    let result = answer_bursts(&handle, &mut messages, changes, known).await;
    speaking.abort();
    result
}

async fn answer_bursts(
    handle: &Handle,
    messages: &mut Messages,
    changes: &mpsc::Sender<Change>,
    known: &mut Known,
) -> Result<(), NetlinkError> {
    let mut listed = Instant::now();
    // The groups were joined before this list, so nothing falls between the two.
    known.links = by_index(list_links(handle).await?);
    known.addresses = list_addresses(handle).await?;
    loop {
        let found = known.assemble();
        if known.sent.as_ref() != Some(&found) {
            known.sent = Some(found.clone());
            if changes.send(Change::Links(found)).await.is_err() {
                return Ok(());
            }
        }
        let first = tokio::select! {
            message = messages.next() => message,
            () = changes.closed() => None,
            () = sleep_until(listed + ANEW) => {
                listed = Instant::now();
                known.links = by_index(list_links(handle).await?);
                known.addresses = list_addresses(handle).await?;
                continue;
            }
        };
        let Some((first, _)) = first else { return Ok(()) };
        known.apply(first);
        if !wait_out(messages, QUIET, LONGEST, |message| known.apply(message)).await {
            return Ok(());
        }
        if std::mem::take(&mut known.moved) {
            known.addresses = list_addresses(handle).await?;
        }
    }
}

/// What is known of links and addresses.
#[derive(Debug, Default)]
struct Known {
    links: BTreeMap<u32, LinkMessage>,
    addresses: Vec<AddressMessage>,
    /// How many links of an index have gone.
    gone: BTreeMap<u32, u32>,
    /// Whether addresses have changed since they were listed.
    moved: bool,
    /// What was last sent.
    sent: Option<Vec<Link>>,
}

impl Known {
    fn apply(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) {
        let NetlinkPayload::InnerMessage(message) = message.payload else { return };
        match message {
            // Bridges and wireless devices send messages of this kind, too, that tell next to nothing of the link.
            RouteNetlinkMessage::NewLink(link) if is_whole(&link) => {
                self.links.insert(link.header.index, link);
            }
            RouteNetlinkMessage::DelLink(link) if is_whole(&link) => {
                self.links.remove(&link.header.index);
                *self.gone.entry(link.header.index).or_default() += 1;
            }
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => self.moved = true,
            _ => {}
        }
    }

    fn assemble(&self) -> Vec<Link> {
        let mut found = assemble(self.links.values(), &self.addresses);
        for link in &mut found {
            link.born = self.gone.get(&link.index).copied().unwrap_or(0);
        }
        found
    }
}

fn is_whole(link: &LinkMessage) -> bool {
    link.header.interface_family == AddressFamily::Unspec
        && link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::Mtu(_)))
}

fn by_index(links: Vec<LinkMessage>) -> BTreeMap<u32, LinkMessage> {
    links.into_iter().map(|link| (link.header.index, link)).collect()
}

/// Waits until a burst has ended, and shows each message to `see`; false when the connection has ended.
async fn wait_out(
    messages: &mut Messages,
    quiet: Duration,
    longest: Duration,
    mut see: impl FnMut(NetlinkMessage<RouteNetlinkMessage>),
) -> bool {
    let end = Instant::now() + longest;
    while let Ok(next) = timeout_at(end, timeout(quiet, messages.next())).await {
        match next {
            Ok(Some((message, _))) => see(message),
            Ok(None) => return false,
            Err(_) => break,
        }
    }
    true
}

async fn list(handle: &Handle) -> Result<Vec<Link>, NetlinkError> {
    let (links, addresses) = (list_links(handle).await?, list_addresses(handle).await?);
    Ok(assemble(&links, &addresses))
}

async fn list_links(handle: &Handle) -> Result<Vec<LinkMessage>, NetlinkError> {
    let failed = |source| NetlinkError::List { what: "links", source };
    handle.link().get().execute().try_collect().await.map_err(failed)
}

async fn list_addresses(handle: &Handle) -> Result<Vec<AddressMessage>, NetlinkError> {
    let failed = |source| NetlinkError::List { what: "addresses", source };
    handle.address().get().execute().try_collect().await.map_err(failed)
}

/// Links by index, each with its addresses in the kernel's order.
fn assemble<'a, L>(links: L, addresses: &[AddressMessage]) -> Vec<Link>
where
    L: IntoIterator<Item = &'a LinkMessage> + Clone,
{
    let kinds: BTreeMap<u32, String> =
        links.clone().into_iter().map(|message| (message.header.index, kind(message))).collect();
    let mut found: BTreeMap<u32, Link> = links
        .into_iter()
        .filter_map(|message| link(message, &kinds))
        .map(|link| (link.index, link))
        .collect();
    for message in addresses {
        if let (Some(link), Some(address)) = (found.get_mut(&message.header.index), address(message)) {
            link.addresses.push(address);
        }
    }
    found.into_values().collect()
}

/// The kernel's word for what kind of device it is; empty for hardware.
fn kind(message: &LinkMessage) -> String {
    let infos = message.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let kind = infos.flatten().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    });
    kind.unwrap_or_default()
}

fn link(message: &LinkMessage, kinds: &BTreeMap<u32, String>) -> Option<Link> {
    let name = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(Arc::from(name.as_str())),
        _ => None,
    })?;
    let header = &message.header;
    let master = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    });
    let mac = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
        _ => None,
    });
    let lower = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    });
    let kind = kind(message);
    let of_master = master.and_then(|index| kinds.get(&index)).map(String::as_str);
    Some(Link {
        index: header.index,
        name,
        loopback: header.flags.contains(LinkFlags::Loopback),
        up: header.flags.contains(LinkFlags::Up),
        layer3: kinds::frames(header.link_layer_type) == kinds::Frames::Network,
        device: kinds::device(&kind, header.link_layer_type, of_master),
        kind: kind.into(),
        lower,
        mac: mac.unwrap_or_default(),
        master,
        born: 0,
        addresses: Vec::new(),
    })
}

/// An address that packets may come from: neither deprecated, nor a duplicate or perhaps one, nor temporary
/// (RFC 8981).
fn address(message: &AddressMessage) -> Option<IpNet> {
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    let (mut own, mut peer) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Local(ip) => own = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            _ => {}
        }
    }
    let of_ipv6 = message.header.family == AddressFamily::Inet6;
    // On IPv4 the bit of temporary addresses means "secondary", which is an address like others.
    let unusable = flags.intersects(AddressFlags::Deprecated | AddressFlags::Dadfailed)
        || flags.intersects(AddressFlags::Tentative) && !flags.intersects(AddressFlags::Optimistic)
        || of_ipv6 && flags.intersects(AddressFlags::Secondary);
    // IPv4 point-to-point links name the peer as the address and their own as the local one.
    let ip: IpAddr = own.or(peer)?;
    if unusable {
        return None;
    }
    IpNet::new(ip, message.header.prefix_len).ok()
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{InfoKind, LinkLayerType};

    use super::*;
    use agent_core::model::Device;

    fn link_message(index: u32, name: &str, kind: LinkLayerType, flags: LinkFlags) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.link_layer_type = kind;
        message.header.flags = flags;
        message.attributes.push(LinkAttribute::IfName(name.into()));
        message
    }

    fn address_message(index: u32, attributes: Vec<AddressAttribute>) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = 24;
        message.header.family = AddressFamily::Inet;
        if attributes.iter().any(|a| matches!(a, AddressAttribute::Address(ip) if ip.is_ipv6())) {
            message.header.family = AddressFamily::Inet6;
            message.header.prefix_len = 64;
        }
        message.attributes = attributes;
        message
    }

    #[test]
    fn links_carry_their_addresses_and_kinds() {
        let links = [
            link_message(3, "wg0", LinkLayerType::None, LinkFlags::Up),
            link_message(1, "lo", LinkLayerType::Loopback, LinkFlags::Loopback | LinkFlags::Up),
            link_message(2, "eth0", LinkLayerType::Ether, LinkFlags::empty()),
        ];
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let addresses = [
            address_message(2, vec![AddressAttribute::Local(ip("10.0.0.5"))]),
            address_message(2, vec![AddressAttribute::Address(ip("fd00::5"))]),
            address_message(
                3,
                vec![AddressAttribute::Address(ip("10.9.0.2")), AddressAttribute::Local(ip("10.9.0.1"))],
            ),
            address_message(9, vec![AddressAttribute::Local(ip("10.7.0.1"))]),
        ];
        let found = assemble(&links, &addresses);
        let names: Vec<_> =
            found.iter().map(|link| (&*link.name, link.layer3, link.loopback, link.up)).collect();
        assert_eq!(
            names,
            [("lo", false, true, true), ("eth0", false, false, false), ("wg0", true, false, true)]
        );
        assert_eq!(found[1].addresses, ["10.0.0.5/24".parse().unwrap(), "fd00::5/64".parse().unwrap()]);
        assert_eq!(found[2].addresses, ["10.9.0.1/24".parse().unwrap()]);
    }

    #[test]
    fn a_port_is_told_by_the_kind_of_its_master() {
        let kind = |kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]);
        let ether = |index, name, kind, master: Option<u32>| {
            let mut message = link_message(index, name, LinkLayerType::Ether, LinkFlags::Up);
            message.attributes.extend(kind);
            message.attributes.extend(master.map(LinkAttribute::Controller));
            message
        };
        let links = [
            ether(2, "eth0", None, Some(4)),
            ether(3, "eth1", None, Some(5)),
            ether(4, "bond0", Some(kind(InfoKind::Bond)), Some(5)),
            ether(5, "br0", Some(kind(InfoKind::Bridge)), None),
            ether(6, "ifb0", Some(kind(InfoKind::Ifb)), None),
            ether(7, "nodelocaldns", Some(kind(InfoKind::Dummy)), None),
        ];
        let found = assemble(&links, &[]);
        let devices: Vec<Device> = found.iter().map(|link| link.device).collect();
        use Device::{Detour, Holder, Wire};
        assert_eq!(devices, [Detour, Wire, Wire, Wire, Detour, Holder]);
    }

    #[test]
    fn deprecated_duplicate_and_temporary_addresses_are_left_out() {
        let ip: IpAddr = "fd00::5".parse().unwrap();
        let with = |flags| {
            address(&address_message(1, vec![AddressAttribute::Address(ip), AddressAttribute::Flags(flags)]))
        };
        assert!(with(AddressFlags::Permanent).is_some());
        for flags in [
            AddressFlags::Deprecated,
            AddressFlags::Dadfailed,
            AddressFlags::Secondary,
            AddressFlags::Tentative,
        ] {
            assert_eq!(with(flags), None, "{flags:?}");
        }
        let second: IpAddr = "10.0.0.6".parse().unwrap();
        let secondary = AddressAttribute::Flags(AddressFlags::Secondary);
        assert!(address(&address_message(1, vec![AddressAttribute::Local(second), secondary])).is_some());
    }
}

//! The kernel's connection tracking, read and changed through ctnetlink.

use std::io;
use std::net::IpAddr;
use std::path::Path;

pub use netlink_packet_netfilter::conntrack::Status;
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use proxy_common::abi;
use proxy_common::addr::{Port, Proto};
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, Nla as _,
};

use super::request::{Protocol, each};

/// `IP_CT_TCP_FLAG_BE_LIBERAL`: segments outside the window are no reason to refuse them, since it is not known.
const LIBERAL: u8 = 0x08;
/// `CTA_PROTOINFO_TCP_FLAGS_ORIGINAL` and `…_REPLY`: flags and a mask of those that are meant.
const FLAGS: [u16; 2] = [4, 5];
/// `CTA_ZONE`.
const ZONE: u16 = 18;

/// `TCP_CONNTRACK_ESTABLISHED` of `nf_conntrack_tcp.h`, and what follows it.
pub const ESTABLISHED: u8 = 3;
/// `TCP_CONNTRACK_FIN_WAIT`: one end has closed it.
pub const FIN_WAIT: u8 = 4;
/// `TCP_CONNTRACK_CLOSE_WAIT`: that has been acknowledged.
pub const CLOSE_WAIT: u8 = 5;
/// `TCP_CONNTRACK_LAST_ACK`: both ends have.
pub const LAST_ACK: u8 = 6;
/// `TCP_CONNTRACK_TIME_WAIT`: from here on a connection is over, up to [`OVER_TO`].
pub const OVER_FROM: u8 = 7;
/// `TCP_CONNTRACK_CLOSE`.
pub const OVER_TO: u8 = 8;

/// A connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// As whoever has begun it sends its packets.
    pub asked: abi::Tuple,
    /// As they are answered, after all rewriting.
    pub answered: abi::Tuple,
    /// What has happened to it.
    pub status: Status,
    /// The state of a TCP connection.
    pub tcp: Option<u8>,
    /// Seconds until it is forgotten.
    pub timeout: u32,
    /// `ct mark`.
    pub mark: u32,
    /// In a zone other than the one that all have that are in none: the same tuple may be there more than once.
    pub zoned: bool,
}

/// There while this kernel tracks connections.
const THERE: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

impl Connection {
    /// Whether somebody leads it to another end than was asked for. IPVS sets no `IPS_DST_NAT`.
    pub fn is_rewritten(&self) -> bool {
        (self.answered.src, self.answered.sport) != (self.asked.dst, self.asked.dport)
    }
}

/// Shows every connection of a protocol that has ports; none where none are tracked. How many entries could not be read.
pub fn connections(mut see: impl FnMut(&Connection)) -> io::Result<usize> {
    if !Path::new(THERE).exists() {
        return Ok(0);
    }
    let mut unread = 0;
    each(Protocol::Netfilter, &question(), |message| match NetlinkMessage::<NetfilterMessage>::deserialize(
        message,
    )
    .map(|message| message.payload)
    {
        Ok(NetlinkPayload::InnerMessage(NetfilterMessage {
            inner: NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)),
            ..
        })) => {
            if let Some(connection) = connection(&attributes) {
                see(&connection);
            }
        }
        _ => unread += 1,
    })?;
    Ok(unread)
}

/// Has connection tracking forget connections that were begun so.
pub fn forget<'a>(asked: impl Iterator<Item = &'a abi::Tuple>) -> io::Result<()> {
    change(asked.map(|tuple| {
        (0, ConntrackMessage::Delete(vec![ConntrackAttribute::CtaTupleOrig(parts(tuple))]), tuple)
    }))
}

/// Has connection tracking know each connection between these two ends and without any rewriting, too, with all it knows of
/// it. Where packets have made such an entry meanwhile it stays.
pub fn add_plain<'a>(connections: impl Iterator<Item = &'a (Connection, abi::Tuple)>) -> io::Result<()> {
    change(connections.map(|(known, between)| {
        let kept = Status::SeenReply | Status::Assured;
        let mut attributes = vec![
            ConntrackAttribute::CtaTupleOrig(parts(between)),
            ConntrackAttribute::CtaTupleReply(parts(&between.reversed())),
            ConntrackAttribute::CtaStatus(Status::Confirmed | known.status & kept),
            ConntrackAttribute::CtaTimeout(known.timeout.max(1)),
        ];
        if let Some(state) = known.tcp {
            let liberal = |direction| ProtoInfoTCP::Other(DefaultNla::new(direction, vec![LIBERAL; 2]));
            // In the middle of a handshake that an entry has not seen, it would take what follows for invalid.
            let state = if matches!(state, ESTABLISHED..=LAST_ACK) { state } else { ESTABLISHED };
            let tcp = vec![ProtoInfoTCP::State(state), liberal(FLAGS[0]), liberal(FLAGS[1])];
            attributes.push(ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(tcp)]));
        }
        if known.mark != 0 {
            attributes.push(ConntrackAttribute::CtaMark(known.mark));
        }
        (NLM_F_CREATE, ConntrackMessage::New(attributes), between)
    }))
}

/// Sends changes at once. Each is done or not by itself: one that is not, because somebody was faster, does not stop the others.
fn change<'a>(changes: impl Iterator<Item = (u16, ConntrackMessage, &'a abi::Tuple)>) -> io::Result<()> {
    let mut messages = Vec::new();
    let mut changes = changes.peekable();
    while let Some((flags, inner, tuple)) = changes.next() {
        let ack = if changes.peek().is_none() { NLM_F_ACK } else { 0 };
        let family = match tuple.src.is_v4() {
            true => NetfilterProtoFamily::IPv4,
            false => NetfilterProtoFamily::IPv6,
        };
        messages.extend(message(NLM_F_REQUEST | flags | ack, family, inner));
    }
    if messages.is_empty() {
        return Ok(());
    }
    match each(Protocol::Netfilter, &messages, |_| {}) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EEXIST | libc::EBUSY)) => {
            Ok(())
        }
        done => done,
    }
}

/// The request for all connections of both families.
fn question() -> Vec<u8> {
    message(NLM_F_REQUEST | NLM_F_DUMP, NetfilterProtoFamily::Unspec, ConntrackMessage::Get(Vec::new()))
}

fn message(flags: u16, family: NetfilterProtoFamily, inner: ConntrackMessage) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), inner);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len().next_multiple_of(4)];
    message.serialize(&mut bytes);
    bytes
}

/// `None` without ports.
fn connection(attributes: &[ConntrackAttribute]) -> Option<Connection> {
    let (mut asked, mut answered, mut tcp) = (None, None, None);
    let (mut status, mut timeout, mut mark, mut zoned) = (Status::empty(), 0, 0, false);
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(parts) => asked = tuple(parts),
            ConntrackAttribute::CtaTupleReply(parts) => answered = tuple(parts),
            ConntrackAttribute::CtaStatus(bits) => status = *bits,
            ConntrackAttribute::CtaTimeout(seconds) => timeout = *seconds,
            ConntrackAttribute::CtaMark(number) => mark = *number,
            ConntrackAttribute::CtaProtoInfo(infos) => {
                tcp = infos.iter().find_map(|info| match info {
                    ProtoInfo::TCP(facts) => facts.iter().find_map(|fact| match fact {
                        ProtoInfoTCP::State(state) => Some(*state),
                        _ => None,
                    }),
                    _ => None,
                });
            }
            ConntrackAttribute::Other(other) => zoned |= other.kind() == ZONE,
            _ => {}
        }
    }
    Some(Connection { asked: asked?, answered: answered?, status, tcp, timeout, mark, zoned })
}

fn parts(tuple: &abi::Tuple) -> Vec<Tuple> {
    let ends = vec![IPTuple::SourceAddress(tuple.src.into()), IPTuple::DestinationAddress(tuple.dst.into())];
    let ports = vec![
        ProtoTuple::Protocol(tuple.proto.0.into()),
        ProtoTuple::SourcePort(tuple.sport.number()),
        ProtoTuple::DestinationPort(tuple.dport.number()),
    ];
    vec![Tuple::Ip(ends), Tuple::Proto(ports)]
}

/// `None` without ports.
fn tuple(parts: &[Tuple]) -> Option<abi::Tuple> {
    let (mut src, mut dst, mut sport, mut dport, mut proto) = (None, None, None, None, None);
    for part in parts {
        match part {
            Tuple::Ip(ends) => ends.iter().for_each(|end| match end {
                IPTuple::SourceAddress(addr) => src = Some(*addr),
                IPTuple::DestinationAddress(addr) => dst = Some(*addr),
                _ => {}
            }),
            Tuple::Proto(ends) => ends.iter().for_each(|end| match end {
                ProtoTuple::Protocol(number) => proto = Some(u8::from(*number)),
                ProtoTuple::SourcePort(port) => sport = Some(*port),
                ProtoTuple::DestinationPort(port) => dport = Some(*port),
                _ => {}
            }),
            _ => {}
        }
    }
    let addr = |addr: IpAddr| addr.into();
    let (sport, dport) = (Port::new(sport?), Port::new(dport?));
    Some(abi::Tuple::new(addr(src?), sport, addr(dst?), dport, Proto(proto?)))
}

//! The kernel's connection tracking, read through ctnetlink.

use std::io;
use std::net::IpAddr;

use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Tuple};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use proxy_common::abi;
use proxy_common::addr::{Port, Proto};
use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};

use super::request::{Protocol, each};

/// Shows to `see` as what the packets of each connection are known in both directions: as whoever has begun it sends them,
/// and as they are answered, after all rewriting. Protocols without ports are left out. How many entries could not be read.
pub(crate) fn connections(mut see: impl FnMut(abi::Tuple, abi::Tuple)) -> io::Result<usize> {
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
            let mut both = (None, None);
            for attribute in &attributes {
                match attribute {
                    ConntrackAttribute::CtaTupleOrig(parts) => both.0 = tuple(parts),
                    ConntrackAttribute::CtaTupleReply(parts) => both.1 = tuple(parts),
                    _ => {}
                }
            }
            if let (Some(asked), Some(answered)) = both {
                see(asked, answered);
            }
        }
        _ => unread += 1,
    })?;
    Ok(unread)
}

/// The request for all connections of both families.
fn question() -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let all = NetfilterMessage::new(
        NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0),
        ConntrackMessage::Get(Vec::new()),
    );
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(all));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
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

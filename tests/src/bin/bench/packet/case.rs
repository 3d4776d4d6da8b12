//! What is measured: a packet, the flows it turns to, and what it may cost.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;

use proxy_common::addr::Proto;
use proxy_common::wire::End;
use proxy_tests::packet::{Packet, TcpFlags};

use super::flows::{KINDS, Kind, RINGS, TCP4, Way};
use super::stage::Frame;
use crate::figure::Goal;
use crate::tables::{CLIENTS, MANY, place, service};

/// What has to become of the packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is rewritten.
    Rewritten,
    /// The same, by a flow that it opens: each packet is another flow's first.
    Opens,
    /// It passes as it is.
    Passes,
}

pub(super) struct Case {
    pub(super) name: String,
    /// Which end its program may rewrite: that of entering packets the destination, that of leaving ones the source.
    pub(super) end: End,
    pub(super) frame: Frame,
    /// Where the network of that end's address stands in the packet: another one behind each translation.
    pub(super) network: Range<usize>,
    pub(super) outcome: Outcome,
    /// Whether the programs know the ranges of the Services.
    pub(super) ranges: bool,
    /// The case whose packets the hand-written program is given to compare with.
    pub(super) floor: Option<usize>,
    pub(super) goal: Goal,
}

/// All of them. Those that the floor is measured with come first.
pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in &KINDS {
        let goal = if kind.name == TCP4.name { 1.5 } else { 2.0 };
        for flows in RINGS {
            let ways = Way::ALL.into_iter().filter(|way| kind.masqueraded || !way.is_masqueraded());
            cases.extend(ways.map(|way| established(kind, way, flows, goal)));
        }
    }
    let kinds = [("data", Some(TcpFlags::ACK)), ("SYN", Some(TcpFlags::SYN)), ("UDP", None)];
    for (end, ranges) in [(End::Dst, false), (End::Dst, true), (End::Src, false)] {
        for flows in RINGS {
            cases.extend(kinds.map(|(name, flags)| of_no_service(name, flags, end, ranges, flows)));
        }
    }
    let [one, other] = [service(true, 0), (place(true, CLIENTS, 0), 41_000).into()];
    cases.push(new_flow("new TCP4 flow, 1 Service x 10 endpoints", other, one, End::Src, 700.0));
    cases.push(new_flow("new TCP4 flow, 10,000 Services x 10 endpoints", other, one, End::Dst, 1000.0));
    cases
}

fn of_flows(flows: u32) -> &'static str {
    if flows == 1 { "1 flow" } else { "10,000 flows" }
}

/// Which of the first cases the floor of others is taken from.
fn floor(end: End, flows: u32) -> usize {
    usize::from(end == End::Src) + 2 * usize::from(flows != 1)
}

fn established(kind: &Kind, way: Way, flows: u32, goal: f64) -> Case {
    let (from, to) = way.of(&kind.ends(flows, 0));
    let packet = match kind.proto {
        Proto::UDP => Packet::udp(from, to),
        _ => Packet::tcp(from, to, TcpFlags::ACK),
    };
    Case {
        name: format!("{}, {}, {}", kind.name, way.name(), of_flows(flows)),
        end: way.end(),
        frame: frame(packet.payload(&[0; 64]).build(), from.is_ipv4(), kind.proto, way.turns(), flows),
        network: network(from.is_ipv4(), way.end()),
        outcome: Outcome::Rewritten,
        ranges: true,
        floor: Some(floor(way.end(), flows)),
        goal: Goal::Ratio(goal),
    }
}

/// From a pod to somewhere, or from somewhere to somewhere else.
fn of_no_service(what: &str, flags: Option<TcpFlags>, end: End, ranges: bool, flows: u32) -> Case {
    let outside = |address: [u8; 4], port: u16| SocketAddr::from((Ipv4Addr::from(address), port));
    let (from, way) = match end {
        End::Dst => (outside([172, 17, 0, 1], 40_000), "entering"),
        End::Src => ((place(true, CLIENTS, 268), 40_000).into(), "leaving"),
    };
    let to = outside([172, 16, 0, 0], 443);
    let packet = match flags {
        Some(TcpFlags::ACK) => Packet::tcp(from, to, TcpFlags::ACK).payload(&[0; 64]),
        Some(flags) => Packet::tcp(from, to, flags),
        None => Packet::udp(from, outside([172, 16, 0, 0], 53)).payload(&[0; 64]),
    };
    let proto = if flags.is_some() { Proto::TCP } else { Proto::UDP };
    let known = if ranges { ", ServiceCIDRs" } else { "" };
    Case {
        name: format!("of no Service: {what}, {way}{known}, {}", of_flows(flows)),
        end,
        frame: frame(packet.build(), true, proto, End::Dst, flows),
        network: network(true, end),
        outcome: Outcome::Passes,
        ranges,
        floor: None,
        goal: Goal::Value(if flows == 1 { 15.0 } else { 30.0 }),
    }
}

fn new_flow(name: &str, from: SocketAddr, to: SocketAddr, turns: End, goal: f64) -> Case {
    let packet = Packet::tcp(from, to, TcpFlags::SYN).build();
    Case {
        name: name.to_owned(),
        end: End::Dst,
        frame: frame(packet, true, Proto::TCP, turns, MANY),
        network: network(true, End::Dst),
        outcome: Outcome::Opens,
        ranges: true,
        floor: None,
        goal: Goal::Value(goal),
    }
}

/// Where an address stands behind Ethernet.
fn address(v4: bool, end: End) -> usize {
    match (v4, end) {
        (true, End::Src) => 14 + 12,
        (true, End::Dst) => 14 + 16,
        (false, End::Src) => 14 + 8,
        (false, End::Dst) => 14 + 24,
    }
}

fn network(v4: bool, end: End) -> Range<usize> {
    let at = address(v4, end);
    at..at + if v4 { 2 } else { 8 }
}

fn frame(packet: Vec<u8>, v4: bool, proto: Proto, turns: End, flows: u32) -> Frame {
    let transport = 14 + if v4 { 20 } else { 40 };
    Frame {
        packet,
        // From the word with the checksum of IPv4, or the first address of IPv6, to the ports.
        headers: 14 + 8..transport + 4,
        checksum: transport + if proto == Proto::UDP { 6 } else { 16 },
        turns: address(v4, turns) + if v4 { 0 } else { 12 },
        flows,
    }
}

//! The checker: reads a packet's bytes, computes every checksum from scratch, and says what it sees.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail, ensure};

use super::checksum::{Sum, crc32c};
use super::protocol;

/// Extension headers with a length byte in units of eight: hop-by-hop, routing, destination options, mobility.
const EXTENSIONS: [u8; 4] = [0, 43, 60, 135];

/// What a packet says, read from its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View<'a> {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// The transport protocol.
    pub protocol: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Offset in bytes and whether more follow, for a fragment.
    pub fragment: Option<(usize, bool)>,
    /// Source and destination port, where the protocol has them and this is no later fragment.
    pub ports: Option<(u16, u16)>,
    /// Transport header and payload.
    pub transport: &'a [u8],
    /// Whether all that the IP header announces is there: not so for what an ICMP error embeds.
    pub whole: bool,
}

impl<'a> View<'a> {
    /// Reads a packet that begins with an Ethernet header.
    pub fn ethernet(bytes: &'a [u8]) -> Result<Self> {
        match bytes.get(12..14).context("shorter than an Ethernet header")? {
            [0x08, 0x00] | [0x86, 0xdd] => Self::network(&bytes[14..]),
            other => bail!("EtherType {other:02x?} is not IP"),
        }
    }

    /// Reads a packet that begins with an IP header; verifies the checksum of an IPv4 header.
    pub fn network(bytes: &'a [u8]) -> Result<Self> {
        match bytes.first().context("an empty packet")? >> 4 {
            4 => Self::ipv4(bytes),
            6 => Self::ipv6(bytes),
            other => bail!("IP version {other}"),
        }
    }

    fn ipv4(bytes: &'a [u8]) -> Result<Self> {
        let header_length = usize::from(bytes[0] & 0x0f) * 4;
        ensure!(header_length >= 20, "an IPv4 header of {header_length} bytes");
        let header = bytes.get(..header_length).context("shorter than its IPv4 header")?;
        let sum = Sum::default().bytes(header).partial();
        ensure!(sum == 0xffff, "IPv4 header checksum {:#06x} is wrong", word(header, 10)?);
        let total = usize::from(word(header, 2)?);
        ensure!(total >= header_length, "IPv4 total length {total} is less than the header");
        let frags = word(header, 6)?;
        let (offset, more) = (usize::from(frags & 0x1fff) * 8, frags & 0x2000 != 0);
        let address = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
        let view = Self {
            source: address(12).into(),
            destination: address(16).into(),
            protocol: header[9],
            ttl: header[8],
            fragment: (offset > 0 || more).then_some((offset, more)),
            ports: None,
            transport: &bytes[header_length..bytes.len().min(total)],
            whole: bytes.len() >= total,
        };
        Ok(view.with_ports())
    }

    fn ipv6(bytes: &'a [u8]) -> Result<Self> {
        let header = bytes.get(..40).context("shorter than an IPv6 header")?;
        let total = 40 + usize::from(word(header, 4)?);
        let address =
            |at: usize| -> Result<Ipv6Addr> { Ok(<[u8; 16]>::try_from(&header[at..at + 16])?.into()) };
        let mut view = Self {
            source: address(8)?.into(),
            destination: address(24)?.into(),
            protocol: header[6],
            ttl: header[7],
            fragment: None,
            ports: None,
            transport: &bytes[40..bytes.len().min(total)],
            whole: bytes.len() >= total,
        };
        loop {
            let length = if EXTENSIONS.contains(&view.protocol) {
                (usize::from(*view.transport.get(1).context("a cut extension header")?) + 1) * 8
            } else if view.protocol == protocol::FRAGMENT {
                let place = word(view.transport, 2)?;
                view.fragment = Some((usize::from(place >> 3) * 8, place & 1 == 1));
                8
            } else {
                return Ok(view.with_ports());
            };
            view.protocol = *view.transport.first().context("a cut extension header")?;
            view.transport = view.transport.get(length..).context("a cut extension header")?;
            if view.fragment.is_some_and(|(offset, _)| offset > 0) {
                // What follows is the middle of something.
                return Ok(view);
            }
        }
    }

    fn with_ports(mut self) -> Self {
        let has_ports = [protocol::TCP, protocol::UDP, protocol::SCTP].contains(&self.protocol);
        if has_ports && !self.is_later_fragment() {
            self.ports =
                word(self.transport, 0).and_then(|source| Ok((source, word(self.transport, 2)?))).ok();
        }
        self
    }

    fn is_later_fragment(&self) -> bool {
        self.fragment.is_some_and(|(offset, _)| offset > 0)
    }

    /// Verifies the transport checksum of a whole packet; parts cannot be judged and pass.
    pub fn verify(&self) -> Result<()> {
        if self.fragment.is_some() || !self.whole {
            return Ok(());
        }
        let pseudo =
            Sum::default().pseudo(self.source, self.destination, self.protocol, self.transport.len());
        let right = |sum: Sum| sum.bytes(self.transport).partial() == 0xffff;
        let (name, good) = match self.protocol {
            protocol::TCP => {
                ensure!(self.transport.len() >= 20, "a cut TCP header");
                ("TCP", right(pseudo))
            }
            protocol::UDP => {
                let length = usize::from(word(self.transport, 4)?);
                ensure!(length == self.transport.len(), "UDP length {length} of {}", self.transport.len());
                let none = word(self.transport, 6)? == 0;
                ensure!(!none || self.source.is_ipv4(), "no UDP checksum, which IPv6 forbids");
                ("UDP", none || right(pseudo))
            }
            protocol::ICMP => ("ICMP", right(Sum::default())),
            protocol::ICMPV6 => ("ICMPv6", right(pseudo)),
            protocol::SCTP => {
                let mut zeroed = self.transport.to_vec();
                let field = zeroed.get_mut(8..12).context("a cut SCTP header")?;
                let stated = u32::from_le_bytes([field[0], field[1], field[2], field[3]]);
                field.fill(0);
                ("SCTP", crc32c(&zeroed) == stated)
            }
            _ => return Ok(()),
        };
        ensure!(good, "{name} checksum is wrong");
        Ok(())
    }

    /// What an ICMP error embeds, if this is one.
    pub fn embedded(&self) -> Option<Result<View<'a>>> {
        let kind = self.transport.first()?;
        // RFC 792: unreachable, quench, redirect, time exceeded, parameter problem; RFC 4443: all below 128.
        let error = match self.protocol {
            protocol::ICMP => [3, 4, 5, 11, 12].contains(kind),
            protocol::ICMPV6 => *kind < 128,
            _ => false,
        };
        (error && !self.is_later_fragment())
            .then(|| View::network(self.transport.get(8..).unwrap_or_default()))
    }

    fn text(&self) -> String {
        let name = match self.protocol {
            protocol::TCP => "TCP",
            protocol::UDP => "UDP",
            protocol::SCTP => "SCTP",
            protocol::ICMP => "ICMP",
            protocol::ICMPV6 => "ICMPv6",
            _ => "protocol",
        };
        let mut text = match self.ports {
            Some((source, destination)) => {
                format!("{name} {}.{source} > {}.{destination}", self.source, self.destination)
            }
            None => format!("{name} {} > {} ({})", self.source, self.destination, self.protocol),
        };
        if let (protocol::TCP, Some(flags), Some(_)) = (self.protocol, self.transport.get(13), self.ports) {
            let names = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];
            let set =
                names.iter().enumerate().filter(|(bit, _)| flags >> bit & 1 == 1).map(|(_, name)| *name);
            text.push_str(&format!(" [{}]", set.collect::<Vec<_>>().join(" ")));
        }
        if let (protocol::ICMP | protocol::ICMPV6, [kind, code, ..]) = (self.protocol, self.transport) {
            text.push_str(&format!(" type {kind} code {code}"));
        }
        if let Some((offset, more)) = self.fragment {
            text.push_str(&format!(" fragment at {offset}{}", if more { ", more" } else { "" }));
        }
        text.push_str(&format!(" ttl {} length {}", self.ttl, self.transport.len()));
        if let Some(inner) = self.embedded() {
            let inner = inner.map_or_else(|error| format!("unreadable: {error:#}"), |inner| inner.text());
            text.push_str(&format!(" {{{inner}}}"));
        }
        text
    }
}

/// Verifies every checksum of a packet with an Ethernet header, also of what an ICMP error embeds.
///
/// # Errors
/// What is wrong, with the packet's description.
pub fn check(bytes: &[u8]) -> Result<View<'_>> {
    let view = View::ethernet(bytes)?;
    let verified = view.verify().and_then(|()| match view.embedded() {
        Some(inner) => inner.and_then(|inner| inner.verify()).context("in the embedded packet"),
        None => Ok(()),
    });
    verified.with_context(|| view.text())?;
    Ok(view)
}

/// One line about a packet with an Ethernet header, for a person.
#[must_use]
pub fn describe(bytes: &[u8]) -> String {
    match View::ethernet(bytes) {
        Ok(view) => match check(bytes) {
            Ok(_) => view.text(),
            Err(error) => format!("{} — {}", view.text(), error.root_cause()),
        },
        Err(error) => format!("{} bytes, unreadable: {error:#}", bytes.len()),
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u16> {
    let pair = bytes.get(at..at + 2).context("a cut header")?;
    Ok(u16::from_be_bytes([pair[0], pair[1]]))
}

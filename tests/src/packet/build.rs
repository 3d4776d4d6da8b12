//! The builder: what is said is in the packet; lengths and checksums follow from it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use network_types::eth::{EthHdr, EtherType};
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use super::checksum::{Sum, crc32c};
use super::protocol;
use super::transport::{TcpFlags, Transport, padded, short};

/// Addresses and what else the IP header says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ip {
    source: IpAddr,
    destination: IpAddr,
    ttl: u8,
    traffic_class: u8,
    dont_fragment: bool,
    identification: u32,
    /// Options of IPv4, padded to four bytes.
    options: Vec<u8>,
    /// Extension headers of IPv6 before the transport: number and body without the first two bytes.
    extensions: Vec<(u8, Vec<u8>)>,
}

/// A packet that is being described.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    ethernet: Option<([u8; 6], [u8; 6])>,
    ip: Ip,
    transport: Transport,
    payload: Vec<u8>,
    partial: bool,
}

impl Packet {
    /// A packet with this transport, from here to there.
    ///
    /// # Panics
    /// When the addresses are of different families.
    #[must_use]
    pub fn new(source: IpAddr, destination: IpAddr, transport: Transport) -> Self {
        assert_eq!(source.is_ipv4(), destination.is_ipv4(), "one family a packet");
        let ip = Ip {
            source,
            destination,
            ttl: 64,
            traffic_class: 0,
            dont_fragment: true,
            identification: 0x1234,
            options: Vec::new(),
            extensions: Vec::new(),
        };
        // To loopback, at which test runs of programs take place: to another address it would be a frame for others.
        let ethernet = Some(([0; 6], [2, 0, 0, 0, 0, 2]));
        Self { ethernet, ip, transport, payload: Vec::new(), partial: false }
    }

    /// A TCP segment. Whoever sends it began with sequence number 1000, and so did the other end.
    #[must_use]
    pub fn tcp(source: SocketAddr, destination: SocketAddr, flags: TcpFlags) -> Self {
        let transport = Transport::Tcp {
            source: source.port(),
            destination: destination.port(),
            sequence: if flags.0 & TcpFlags::SYN.0 == 0 { 1001 } else { 1000 },
            acknowledged: if flags.0 & TcpFlags::ACK.0 == 0 { 0 } else { 1001 },
            flags,
            options: Vec::new(),
        };
        Self::new(source.ip(), destination.ip(), transport)
    }

    /// A UDP datagram.
    #[must_use]
    pub fn udp(source: SocketAddr, destination: SocketAddr) -> Self {
        let transport =
            Transport::Udp { source: source.port(), destination: destination.port(), checksum: true };
        Self::new(source.ip(), destination.ip(), transport)
    }

    /// An SCTP packet.
    #[must_use]
    pub fn sctp(source: SocketAddr, destination: SocketAddr) -> Self {
        let transport = Transport::Sctp { source: source.port(), destination: destination.port(), tag: 7 };
        Self::new(source.ip(), destination.ip(), transport)
    }

    /// An ICMP or ICMPv6 message.
    #[must_use]
    pub fn icmp(source: IpAddr, destination: IpAddr, kind: u8, code: u8, rest: [u8; 4]) -> Self {
        Self::new(source, destination, Transport::Icmp { kind, code, rest })
    }

    /// A router's or host's error about `about` (whose sender it goes to), with as much of it as RFC 1812 §4.3.2.3
    /// and RFC 4443 §2.4 say: up to 576 and 1280 bytes in all.
    #[must_use]
    pub fn icmp_error(from: IpAddr, about: &Self, kind: u8, code: u8, rest: [u8; 4]) -> Self {
        let mut embedded = about.clone().without_ethernet().build();
        embedded.truncate(if from.is_ipv4() { 576 - 28 } else { 1280 - 48 });
        Self::icmp(from, about.ip.source, kind, code, rest).payload(&embedded)
    }

    /// With these bytes after the headers.
    #[must_use]
    pub fn payload(mut self, bytes: &[u8]) -> Self {
        self.payload = bytes.to_vec();
        self
    }

    /// Without an Ethernet header, as on an L3 device.
    #[must_use]
    pub fn without_ethernet(mut self) -> Self {
        self.ethernet = None;
        self
    }

    /// With these Ethernet addresses, destination first.
    #[must_use]
    pub fn ethernet(mut self, destination: [u8; 6], source: [u8; 6]) -> Self {
        self.ethernet = Some((destination, source));
        self
    }

    /// With this TTL or hop limit.
    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ip.ttl = ttl;
        self
    }

    /// With this TOS or traffic class.
    #[must_use]
    pub fn traffic_class(mut self, class: u8) -> Self {
        self.ip.traffic_class = class;
        self
    }

    /// With these IPv4 options, padded with zeros to four bytes.
    #[must_use]
    pub fn options(mut self, bytes: &[u8]) -> Self {
        self.ip.options = padded(bytes, 4);
        assert!(
            self.ip.source.is_ipv4() && self.ip.options.len() <= 40,
            "at most 40 bytes of options, IPv4 only"
        );
        self
    }

    /// With one more IPv6 extension header before the transport; the body is padded to whole eight bytes.
    #[must_use]
    pub fn extension(mut self, number: u8, body: &[u8]) -> Self {
        assert!(self.ip.source.is_ipv6(), "extension headers are IPv6's");
        self.ip.extensions.push((number, body.to_vec()));
        self
    }

    /// Allows routers to fragment it (IPv4).
    #[must_use]
    pub fn may_fragment(mut self) -> Self {
        self.ip.dont_fragment = false;
        self
    }

    /// With this identification, for fragments.
    #[must_use]
    pub fn identification(mut self, number: u32) -> Self {
        self.ip.identification = number;
        self
    }

    /// With the transport checksum left to the device: the field holds the pseudo-header's sum.
    #[must_use]
    pub fn partial_checksum(mut self) -> Self {
        self.partial = true;
        self
    }

    /// The bytes.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let transport = self.transport();
        let mut bytes = self.link();
        bytes.extend(self.network(transport.len(), None));
        bytes.extend(transport);
        bytes
    }

    /// The packet as fragments whose IP payload is at most `size` bytes, a multiple of eight.
    #[must_use]
    pub fn fragments(&self, size: usize) -> Vec<Vec<u8>> {
        assert!(size > 0 && size.is_multiple_of(8), "fragments are cut at multiples of eight");
        let transport = self.transport();
        let count = transport.len().div_ceil(size);
        let cut = |(index, piece): (usize, &[u8])| {
            let mut bytes = self.link();
            bytes.extend(self.network(piece.len(), Some((index * size, index + 1 < count))));
            bytes.extend(piece);
            bytes
        };
        transport.chunks(size).enumerate().map(cut).collect()
    }

    fn link(&self) -> Vec<u8> {
        let Some((destination, source)) = self.ethernet else { return Vec::new() };
        let kind = if self.ip.source.is_ipv4() { EtherType::Ipv4 } else { EtherType::Ipv6 };
        let EthHdr { dst_addr, src_addr, ether_type } = EthHdr::new(destination, source, kind);
        // The field holds the number in network byte order already.
        [&dst_addr[..], &src_addr[..], &ether_type.to_ne_bytes()[..]].concat()
    }

    /// The IP header with its options or extensions, for a payload of this length; for a fragment also its offset
    /// in bytes and whether more follow.
    fn network(&self, length: usize, fragment: Option<(usize, bool)>) -> Vec<u8> {
        match (self.ip.source, self.ip.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => self.ipv4(source, destination, length, fragment),
            (IpAddr::V6(source), IpAddr::V6(destination)) => self.ipv6(source, destination, length, fragment),
            _ => unreachable!("`new` wants one family"),
        }
    }

    fn ipv4(
        &self,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        length: usize,
        fragment: Option<(usize, bool)>,
    ) -> Vec<u8> {
        let header_length = 20 + self.ip.options.len();
        let flags = match fragment {
            Some((offset, more)) => (u16::from(more) << 13) | short(offset / 8),
            None => u16::from(self.ip.dont_fragment) << 14,
        };
        let [_, _, id @ ..] = self.ip.identification.to_be_bytes();
        let mut header = Ipv4Hdr {
            vihl: 0x40 | u8::try_from(header_length / 4).expect("at most 15 words"),
            tos: self.ip.traffic_class,
            tot_len: short(header_length + length).to_be_bytes(),
            id,
            frags: flags.to_be_bytes(),
            ttl: self.ip.ttl,
            proto: self.protocol(),
            check: [0; 2],
            src_addr: source.octets(),
            dst_addr: destination.octets(),
        };
        header.check =
            Sum::default().bytes(&ipv4_bytes(&header)).bytes(&self.ip.options).checksum().to_be_bytes();
        [&ipv4_bytes(&header)[..], &self.ip.options[..]].concat()
    }

    fn ipv6(
        &self,
        source: Ipv6Addr,
        destination: Ipv6Addr,
        length: usize,
        fragment: Option<(usize, bool)>,
    ) -> Vec<u8> {
        let mut chain: Vec<(u8, Vec<u8>)> = Vec::new();
        for (number, body) in &self.ip.extensions {
            let body = padded(&[&[0, 0][..], body].concat(), 8);
            chain.push((*number, body));
        }
        if let Some((offset, more)) = fragment {
            let place = (short(offset / 8) << 3) | u16::from(more);
            let mut body = vec![0, 0];
            body.extend(place.to_be_bytes());
            body.extend(self.ip.identification.to_be_bytes());
            chain.push((protocol::FRAGMENT, body));
        }
        // Each header names the next; the last names the transport.
        let mut next = self.protocol();
        for (number, body) in chain.iter_mut().rev() {
            body[0] = next;
            if *number != protocol::FRAGMENT {
                body[1] = u8::try_from(body.len() / 8 - 1).expect("a short extension header");
            }
            next = *number;
        }
        let extensions: Vec<u8> = chain.into_iter().flat_map(|(_, body)| body).collect();
        let Ipv6Hdr { vcf, payload_len, next_hdr, hop_limit, src_addr, dst_addr } = Ipv6Hdr {
            vcf: ((6 << 28) | (u32::from(self.ip.traffic_class) << 20)).to_be_bytes(),
            payload_len: short(extensions.len() + length).to_be_bytes(),
            next_hdr: next,
            hop_limit: self.ip.ttl,
            src_addr: source.octets(),
            dst_addr: destination.octets(),
        };
        let header =
            [&vcf[..], &payload_len[..], &[next_hdr, hop_limit][..], &src_addr[..], &dst_addr[..]].concat();
        [header, extensions].concat()
    }

    fn protocol(&self) -> u8 {
        self.transport.protocol(self.ip.source.is_ipv4())
    }

    /// The transport header, its checksum and the payload.
    fn transport(&self) -> Vec<u8> {
        let (mut bytes, field) = self.transport.header(self.ip.source.is_ipv4(), self.payload.len());
        bytes.extend(&self.payload);
        let Some(at) = field else { return bytes };
        if let Transport::Sctp { .. } = self.transport {
            // RFC 9260 §6.8: least significant byte first.
            let crc = crc32c(&bytes).to_le_bytes();
            bytes[at..at + 4].copy_from_slice(&crc);
            return bytes;
        }
        let protocol = self.protocol();
        let sum = match protocol {
            protocol::ICMP => Sum::default(),
            _ => Sum::default().pseudo(self.ip.source, self.ip.destination, protocol, bytes.len()),
        };
        let checksum = match sum.bytes(&bytes).checksum() {
            _ if self.partial => sum.partial(),
            // RFC 768: zero means that there is none.
            0 if protocol == protocol::UDP => 0xffff,
            checksum => checksum,
        };
        bytes[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }
}

fn ipv4_bytes(header: &Ipv4Hdr) -> Vec<u8> {
    let Ipv4Hdr { vihl, tos, tot_len, id, frags, ttl, proto, check, src_addr, dst_addr } = header;
    [&[*vihl, *tos][..], tot_len, id, frags, &[*ttl, *proto], check, src_addr, dst_addr].concat()
}

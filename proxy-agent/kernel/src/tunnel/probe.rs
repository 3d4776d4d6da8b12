//! The form of questions and answers.

use std::io;
use std::net::{IpAddr, SocketAddr};

use etherparse::{IpNumber, PacketBuilder};

/// Bytes of an answer, and of a question before it is filled up: an answer is no longer than what it answers, so that nobody can
/// have somebody else flooded by it.
pub const LENGTH: usize = 24;
/// What they begin with.
const MAGIC: [u8; 8] = *b"ebpfprxy";
/// What follows: what wrapped packets are, as both ends must know them. Who has another one does not answer.
const VERSION: u8 = 1;
/// No question is longer than the longest frames that networks usually have, whatever an interface would take.
const LONGEST: u32 = 9_000;
/// Hops a packet may go.
const HOPS: u8 = 64;

/// A question, or the answer to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// With a number that nobody else knows.
    Question(u64),
    /// With the number of the question.
    Answer(u64),
}

impl Probe {
    /// As it is sent.
    #[must_use]
    pub fn bytes(self) -> [u8; LENGTH] {
        let (kind, number) = match self {
            Self::Question(number) => (1, number),
            Self::Answer(number) => (2, number),
        };
        let mut bytes = [0; LENGTH];
        bytes[..8].copy_from_slice(&MAGIC);
        (bytes[8], bytes[9]) = (VERSION, kind);
        bytes[16..].copy_from_slice(&number.to_be_bytes());
        bytes
    }

    /// What has come, if it is one of them to the byte. Behind a question there may be anything.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let (probe, behind) = bytes.split_at_checked(LENGTH)?;
        let number = u64::from_be_bytes(probe.get(16..)?.try_into().ok()?);
        let read = [Self::Question(number), Self::Answer(number)]
            .into_iter()
            .find(|known| known.bytes() == probe)?;
        (behind.is_empty() || matches!(read, Self::Question(_))).then_some(read)
    }
}

/// A question as long as packets may be on their way, when it is wrapped by [`wrapped`]: a path on which only short ones get
/// through is none. `mtu` is what the interface and the route say.
#[must_use]
pub fn question(number: u64, from: IpAddr, mtu: u32) -> Vec<u8> {
    let header = if from.is_ipv4() { 20 } else { 40 };
    let room = (mtu.min(LONGEST) as usize).saturating_sub(2 * header + 8);
    let mut bytes = Probe::Question(number).bytes().to_vec();
    bytes.resize(room.max(LENGTH), 0);
    bytes
}

/// A datagram from port `port` of `from`, in a packet of its own, in another packet between the same two addresses.
pub fn wrapped(from: IpAddr, port: u16, to: SocketAddr, payload: &[u8]) -> io::Result<Vec<u8>> {
    let builder = || match (from, to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => Ok(PacketBuilder::ipv4(from.octets(), to.octets(), HOPS)),
        (IpAddr::V6(from), IpAddr::V6(to)) => Ok(PacketBuilder::ipv6(from.octets(), to.octets(), HOPS)),
        _ => Err(io::Error::from(io::ErrorKind::InvalidInput)),
    };
    let inner = builder()?.udp(port, to.port());
    let mut inside = Vec::with_capacity(inner.size(payload.len()));
    inner.write(&mut inside, payload).map_err(io::Error::other)?;
    let (outer, protocol) = match from {
        IpAddr::V4(_) => (builder()?, IpNumber::IPV4),
        IpAddr::V6(_) => (builder()?, IpNumber::IPV6),
    };
    let mut packet = Vec::with_capacity(outer.size(inside.len()));
    outer.write(&mut packet, protocol, &inside).map_err(io::Error::other)?;
    Ok(packet)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        for probe in [Probe::Question(7), Probe::Answer(u64::MAX)] {
            let bytes = probe.bytes();
            assert_eq!(Probe::read(&bytes), Some(probe));
            assert_eq!(Probe::read(&bytes[..LENGTH - 1]), None, "shorter");
            let asks = matches!(probe, Probe::Question(_));
            assert_eq!(Probe::read(&[&bytes[..], &[0]].concat()), asks.then_some(probe), "longer");
            for at in 0..16 {
                let mut other = bytes;
                other[at] ^= 0x80;
                assert_eq!(Probe::read(&other), None, "byte {at}");
            }
        }
        assert_eq!(Probe::read(&[]), None);
    }

    #[test]
    fn a_question_fills_its_way() {
        for (from, to, mtu, length) in [
            ("10.0.0.1", "10.0.0.2", 1500, 1500),
            ("fd00::1", "fd00::2", 1500, 1500),
            ("10.0.0.1", "10.0.0.2", 65_536, 9_000),
            ("10.0.0.1", "10.0.0.2", 40, 48 + LENGTH),
        ] {
            let from: IpAddr = from.parse().unwrap();
            let asked = question(7, from, mtu);
            let packet = wrapped(from, 1, SocketAddr::new(to.parse().unwrap(), 2), &asked).unwrap();
            assert_eq!(
                (packet.len(), Probe::read(&asked)),
                (length, Some(Probe::Question(7))),
                "{from} {mtu}"
            );
        }
    }

    #[test]
    fn a_question_lies_in_two_packets_between_the_same_two_ends() {
        let to = SocketAddr::new("10.0.0.2".parse().unwrap(), 10_261);
        let packet = wrapped("10.0.0.1".parse().unwrap(), 10_261, to, b"abc").unwrap();
        assert_eq!(packet.len(), 20 + 20 + 8 + 3);
        assert_eq!((packet[0], packet[8], packet[9], packet[3]), (0x45, HOPS, 4, 51));
        assert_eq!(packet[12..20], [10, 0, 0, 1, 10, 0, 0, 2]);
        assert_eq!((packet[20], packet[28], packet[29], packet[23]), (0x45, HOPS, 17, 31));
        assert_eq!(packet[32..40], packet[12..20]);
        assert_eq!(packet[40..46], [0x28, 0x15, 0x28, 0x15, 0, 11]);
        assert_eq!(&packet[48..], b"abc");

        let to = SocketAddr::new("fd00::2".parse().unwrap(), 10_261);
        let packet = wrapped("fd00::1".parse().unwrap(), 999, to, b"abc").unwrap();
        assert_eq!(packet.len(), 40 + 40 + 8 + 3);
        assert_eq!((packet[0] >> 4, packet[6], packet[40] >> 4, packet[46]), (6, 41, 6, 17));
        assert_eq!(packet[48..80], packet[8..40]);
        assert_eq!(packet[80..84], [0x03, 0xe7, 0x28, 0x15]);
        assert_ne!(packet[86..88], [0, 0], "over IPv6 there must be a checksum");
        assert!(wrapped("10.0.0.1".parse().unwrap(), 999, to, b"abc").is_err());
    }
}

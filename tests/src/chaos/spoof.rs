//! Packets from sources that do not exist: whole frames, handed to an interface.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, bind, send, socket};

use crate::packet::{Packet, TcpFlags, Transport};
use crate::pod::Place;

/// What is sent from each source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A SYN.
    Syn,
    /// A SYN, and a little later an acknowledgment of a sequence number that was guessed.
    SynThenBlindAck,
    /// A datagram.
    Datagram,
}

/// Frames, ready to be sent.
#[derive(Debug)]
pub struct Flood {
    frames: Vec<Vec<u8>>,
    socket: OwnedFd,
}

/// What has been sent.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Packets.
    pub packets: u64,
    /// How long it took.
    pub took: Duration,
}

/// Sources: 198.18.0.0/15 and 2001:2::/48, which are for tests (RFC 2544, RFC 5180) and lead nowhere here.
const NETWORK: (u32, u128) = (0xc612_0000, 0x2001_0002 << 96);
/// Addresses used of them.
const ADDRESSES: u32 = 1 << 17;
/// Frames sent between two looks at the clock.
const BURST: usize = 500;
/// How many sources later a blind acknowledgment follows its SYN: the answer to the SYN has passed by then.
const LATER: u32 = 64;

impl Flood {
    /// Builds the frames of so many sources that a place outside sends through its interface `eth0` to a node. They
    /// are all different; `first` is the number of the first, so that another flood can go on with others.
    pub fn prepare(
        from: &Place,
        node: &Place,
        to: SocketAddr,
        kind: Kind,
        first: u32,
        sources: u32,
    ) -> Result<Self> {
        let node_mac = mac(&link(node)?, node)?;
        let socket = from
            .netns
            .run_in(|| socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None))?
            .with_context(|| format!("making a packet socket in {} (root is needed)", from.name))?;
        let own = link(from)?;
        let own_mac = mac(&own, from)?;
        // Bound to no protocol, it receives nothing.
        bind(socket.as_raw_fd(), &own)
            .with_context(|| format!("binding a packet socket to eth0 of {}", from.name))?;
        let mut frames = Vec::new();
        let mut add = |packet: Packet| frames.push(packet.ethernet(node_mac, own_mac).build());
        for n in 0..sources + LATER {
            let here = source(first + n, to);
            match kind {
                _ if n >= sources => {}
                Kind::Datagram => add(Packet::udp(here, to).payload(b"anything")),
                Kind::Syn | Kind::SynThenBlindAck => add(Packet::tcp(here, to, TcpFlags::SYN)),
            }
            if kind == Kind::SynThenBlindAck && n >= LATER {
                add(blind_ack(source(first + n - LATER, to), to));
            }
        }
        Ok(Self { frames, socket })
    }

    /// Sends them all, so many a second, or what can be sent in six times the time that this should take.
    pub fn send(&self, rate: f64) -> Result<Sent> {
        let should = Duration::from_secs_f64(f64::from(u32::try_from(self.frames.len())?) / rate);
        let begun = Instant::now();
        let deadline = begun + should * 6 + Duration::from_secs(2);
        let mut packets = 0;
        while packets < self.frames.len() {
            let now = Instant::now();
            if crate::stop::wanted() {
                bail!("interrupted");
            }
            if now >= deadline {
                break;
            }
            // What is due by now; a fraction of a packet is not.
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a small positive number"
            )]
            let due = ((now - begun).as_secs_f64() * rate) as usize;
            let end = due.min(packets + BURST).clamp(packets, self.frames.len());
            let mut full = false;
            for frame in &self.frames[packets..end] {
                match send(self.socket.as_raw_fd(), frame, MsgFlags::empty()) {
                    Ok(_) => packets += 1,
                    // The device's queue is full: what is due is due still.
                    Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR) => {
                        full = true;
                        break;
                    }
                    Err(error) => return Err(error).context("sending a frame with a spoofed source"),
                }
            }
            if full || due <= packets {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(Sent { packets: u64::try_from(packets)?, took: begun.elapsed() })
    }
}

/// The `n`th source, in the family of the target. Each is another pair of address and port.
fn source(n: u32, to: SocketAddr) -> SocketAddr {
    /// Ports 1024 to 65535.
    const PORTS: u32 = 64_512;
    /// A prime: the ports of one address follow each other with no pattern that a hash might like.
    const STEP: u32 = 7_919;
    let (host, round) = (n % ADDRESSES, n / ADDRESSES);
    let port = 1024 + (round * STEP + host % PORTS) % PORTS;
    let address = match to.ip() {
        IpAddr::V4(_) => IpAddr::from(Ipv4Addr::from(NETWORK.0 + host)),
        IpAddr::V6(_) => IpAddr::from(Ipv6Addr::from(NETWORK.1 + u128::from(host))),
    };
    SocketAddr::new(address, u16::try_from(port).expect("below 65536"))
}

/// What somebody sends who has not seen the answer to his SYN.
fn blind_ack(from: SocketAddr, to: SocketAddr) -> Packet {
    let transport = Transport::Tcp {
        source: from.port(),
        destination: to.port(),
        // One behind the SYN's.
        sequence: 1001,
        acknowledged: 0x5eed_1e55,
        flags: TcpFlags::ACK,
        options: Vec::new(),
    };
    Packet::new(from.ip(), to.ip(), transport)
}

/// The interface `eth0` of a place, as an address to bind to.
fn link(place: &Place) -> Result<LinkAddr> {
    let addresses = place
        .netns
        .run_in(|| {
            getifaddrs().map(|all| all.filter(|one| one.interface_name == "eth0").collect::<Vec<_>>())
        })?
        .with_context(|| format!("listing the interfaces of {}", place.name))?;
    addresses
        .iter()
        .find_map(|one| one.address.as_ref()?.as_link_addr().copied())
        .with_context(|| format!("{} has no interface eth0", place.name))
}

fn mac(link: &LinkAddr, place: &Place) -> Result<[u8; 6]> {
    let mac = link.addr().with_context(|| format!("eth0 of {} has no MAC address", place.name))?;
    ensure!(mac != [0; 6], "eth0 of {} has no MAC address", place.name);
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_spoofed_sources_are_the_same_and_all_are_of_networks_for_tests() {
        let v4 = "192.168.10.11:30200".parse().unwrap();
        let v6 = "[fd00:10::1]:30200".parse().unwrap();
        let sources: BTreeSet<SocketAddr> = (0..450_000).map(|n| source(n, v4)).collect();
        assert_eq!(sources.len(), 450_000);
        for source in sources {
            let IpAddr::V4(address) = source.ip() else { panic!("{source}") };
            assert!(matches!(address.octets(), [198, 18 | 19, ..]), "{source}");
            assert!(source.port() >= 1024);
        }
        assert_eq!(source(0, v6), "[2001:2::]:1024".parse().unwrap());
        assert_ne!(source(ADDRESSES, v6), source(0, v6));
    }
}

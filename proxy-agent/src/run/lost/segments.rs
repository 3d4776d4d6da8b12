//! TCP segments that the agent sends to the ends of a connection that has lost its endpoint, each in the name of the other end.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};

use etherparse::PacketBuilder;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use proxy_common::abi::Tuple;

/// Hops a segment may go.
const HOPS: u8 = 64;

/// Raw sockets of both families.
#[derive(Debug)]
pub(in crate::run) struct Segments {
    v4: OwnedFd,
    v6: OwnedFd,
}

impl Segments {
    /// Opens them, which takes `CAP_NET_RAW`.
    pub(in crate::run) fn open() -> io::Result<Self> {
        let open = |family| socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw);
        Ok(Self { v4: open(AddressFamily::Inet)?, v6: open(AddressFamily::Inet6)? })
    }

    /// Tells the destination of `tuple` that the connection is over. `acked` is what it has last acknowledged, and so the number
    /// that a RST has to have; if that is not known (0) it is asked instead, with a number that does not fit, and the answer is
    /// reset where it passes (RFC 9293 section 3.10.7.4). `other` is what the source has last acknowledged.
    pub(in crate::run) fn end(&self, tuple: &Tuple, acked: u32, other: u32) -> io::Result<()> {
        let (from, to) = (IpAddr::from(tuple.src), IpAddr::from(tuple.dst));
        let (socket, packet) = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                (&self.v4, PacketBuilder::ipv4(from.octets(), to.octets(), HOPS))
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                (&self.v6, PacketBuilder::ipv6(from.octets(), to.octets(), HOPS))
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let segment = packet.tcp(
            tuple.sport.number(),
            tuple.dport.number(),
            acked.wrapping_sub(u32::from(acked == 0)),
            0,
        );
        let segment = if acked == 0 { segment.ack(other) } else { segment.rst() };
        let mut bytes = Vec::with_capacity(segment.size(0));
        segment.write(&mut bytes, &[]).map_err(io::Error::other)?;
        let to = SockaddrStorage::from(SocketAddr::new(to, 0));
        sendto(socket.as_raw_fd(), &bytes, &to, MsgFlags::empty())?;
        Ok(())
    }
}

//! Sockets of this network namespace, listed and closed by the kernel (sock_diag(7)).

use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags};
use netlink_packet_sock_diag::{AF_INET, AF_INET6, SOCK_DESTROY, SOCK_DIAG_BY_FAMILY, TCP_LISTEN};
use rtnetlink::packet_core::{Emitable as _, Parseable as _};

use super::request::{Flags, Protocol, exchange};

/// A socket that is bound to no interface.
pub const ANY_DEVICE: u32 = 0;
/// The cookie of whatever socket has the ends.
const ANY_COOKIE: [u8; 8] = [0xff; 8];

/// A connected UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpSocket {
    family: u8,
    id: SocketId,
    /// The inode by which `/proc/PID/fd` names it.
    pub inode: u32,
}

impl UdpSocket {
    /// What the kernel knows it by, as long as it is there.
    #[must_use]
    pub fn cookie(&self) -> u64 {
        u64::from_ne_bytes(self.id.cookie)
    }

    /// Whether it was made for IPv6; it may be connected over IPv4 all the same.
    #[must_use]
    pub fn is_v6(&self) -> bool {
        self.family == AF_INET6
    }

    /// Its own end.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        SocketAddr::new(self.id.source_address.to_canonical(), self.id.source_port)
    }

    /// What it is connected to.
    #[must_use]
    pub fn peer(&self) -> SocketAddr {
        SocketAddr::new(self.id.destination_address.to_canonical(), self.id.destination_port)
    }

    /// Destroys it; `false` if it has been closed meanwhile.
    pub fn destroy(&self) -> io::Result<bool> {
        unless_late(destroy(self.family, libc::IPPROTO_UDP, &self.id))
    }
}

/// Every connected UDP socket.
pub fn connected_udp() -> io::Result<Vec<UdpSocket>> {
    let mut sockets = Vec::new();
    for (family, any) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        // What the state of a connected UDP socket is called.
        let request = request(family, libc::IPPROTO_UDP, StateFlags::ESTABLISHED, &any);
        let answers = exchange(Protocol::SockDiag, SOCK_DIAG_BY_FAMILY, Flags::Dump, &request)?;
        sockets.extend(answers.iter().filter_map(|answer| {
            let InetResponseHeader { family, socket_id: id, inode, .. } =
                InetResponseHeader::parse(answer).ok()?;
            Some(UdpSocket { family, id, inode })
        }));
    }
    Ok(sockets)
}

/// Closes the TCP socket with these ends, which is bound to interface `device` or to [`ANY_DEVICE`]; whether there is one.
pub fn close_tcp(own: SocketAddr, peer: SocketAddr, device: u32) -> io::Result<bool> {
    unless_late(find_tcp(own, peer, device).and_then(|found| match found {
        Some((family, id)) => destroy(family, libc::IPPROTO_TCP, &id),
        None => Ok(false),
    }))
}

/// Its family and identity. Where it is not the kernel finds who listens at its address, who must stay. A socket of IPv6
/// that is connected over IPv4 is found like others, and answers with mapped addresses.
fn find_tcp(own: SocketAddr, peer: SocketAddr, device: u32) -> io::Result<Option<(u8, SocketId)>> {
    let family = if peer.is_ipv4() { AF_INET } else { AF_INET6 };
    let id = SocketId {
        source_port: own.port(),
        destination_port: peer.port(),
        source_address: own.ip(),
        destination_address: peer.ip(),
        interface_id: device,
        cookie: ANY_COOKIE,
    };
    let request = request(family, libc::IPPROTO_TCP, StateFlags::all(), &id);
    let answers = exchange(Protocol::SockDiag, SOCK_DIAG_BY_FAMILY, Flags::Ack, &request)?;
    Ok(answers.iter().find_map(|answer| {
        let InetResponseHeader { family, state, socket_id: found, .. } =
            InetResponseHeader::parse(answer).ok()?;
        (state != TCP_LISTEN && ends(&found) == (own, peer)).then_some((family, found))
    }))
}

fn ends(id: &SocketId) -> (SocketAddr, SocketAddr) {
    let end = |ip: IpAddr, port| SocketAddr::new(ip.to_canonical(), port);
    (end(id.source_address, id.source_port), end(id.destination_address, id.destination_port))
}

fn destroy(family: u8, protocol: i32, id: &SocketId) -> io::Result<bool> {
    let request = request(family, protocol, StateFlags::all(), id);
    exchange(Protocol::SockDiag, SOCK_DESTROY, Flags::Ack, &request).map(|_| true)
}

/// `false` where the socket has been closed meanwhile, or its place taken by another.
fn unless_late(result: io::Result<bool>) -> io::Result<bool> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(false),
        result => result,
    }
}

fn request(family: u8, protocol: i32, states: StateFlags, id: &SocketId) -> Vec<u8> {
    let request = InetRequest {
        family,
        protocol: protocol as u8,
        extensions: ExtensionFlags::empty(),
        states,
        socket_id: id.clone(),
    };
    let mut bytes = vec![0; request.buffer_len()];
    request.emit(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket as Socket;

    use super::*;

    /// Sockets of the machine that runs the test, so that the kernel itself says whether requests and answers are understood.
    #[test]
    fn a_connected_socket_is_listed_with_both_its_ends() {
        let peer = Socket::bind("127.0.0.1:0").unwrap();
        let own = Socket::bind("127.0.0.1:0").unwrap();
        own.connect(peer.local_addr().unwrap()).unwrap();
        let listed = connected_udp().unwrap();
        let found = listed.iter().find(|socket| socket.local() == own.local_addr().unwrap()).unwrap();
        assert_eq!(found.peer(), peer.local_addr().unwrap());
        assert!(!found.is_v6() && found.inode != 0 && found.cookie() != 0);
    }

    #[test]
    fn a_socket_that_has_gone_is_no_failure() {
        let [own, peer] = ["127.0.0.1:9", "127.0.0.1:10"].map(|end| end.parse().unwrap());
        assert!(!close_tcp(own, peer, ANY_DEVICE).unwrap());
    }
}

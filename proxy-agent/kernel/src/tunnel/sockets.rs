//! The sockets: one of each family that hears questions and answers, and one that sends packets as they are.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType,
    SockaddrStorage, bind, recvmsg, sendmsg, sendto, setsockopt, socket, sockopt,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::probe::LENGTH;

/// A datagram that has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// What it says; one byte more of a longer one.
    pub bytes: Vec<u8>,
    /// Who has sent it.
    pub from: SocketAddr,
    /// The address of ours that it was sent to.
    pub at: IpAddr,
}

/// Sockets that datagrams come to, at any address of the node.
#[derive(Debug)]
pub struct Listener {
    port: u16,
    v4: UdpSocket,
    /// `None` where there is no IPv6.
    v6: Option<UdpSocket>,
}

impl Listener {
    /// Opens them, within a runtime of tokio.
    pub fn open(port: u16, ipv6: bool) -> io::Result<Self> {
        let v4 = datagrams(AddressFamily::Inet)?;
        setsockopt(&v4, sockopt::Ipv4PacketInfo, &true)?;
        bind(v4.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(IpAddr::from([0; 4]), port)))?;
        let v6 = ipv6.then(|| -> io::Result<_> {
            let v6 = datagrams(AddressFamily::Inet6)?;
            setsockopt(&v6, sockopt::Ipv6V6Only, &true)?;
            setsockopt(&v6, sockopt::Ipv6RecvPacketInfo, &true)?;
            bind(
                v6.as_raw_fd(),
                &SockaddrStorage::from(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)),
            )?;
            UdpSocket::from_std(v6.into())
        });
        Ok(Self { port, v4: UdpSocket::from_std(v4.into())?, v6: v6.transpose()? })
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Waits for the next datagram. To be given up at any time loses none.
    pub async fn hear(&self) -> io::Result<Heard> {
        match &self.v6 {
            None => hear(&self.v4).await,
            Some(v6) => tokio::select! {
                heard = hear(&self.v4) => heard,
                heard = hear(v6) => heard,
            },
        }
    }

    /// Answers a datagram from the address that it was sent to: who has asked one address knows no other.
    pub fn answer(&self, heard: &Heard, bytes: &[u8]) -> io::Result<()> {
        let to = SockaddrStorage::from(heard.from);
        let payload = [IoSlice::new(bytes)];
        match (heard.at, &self.v6) {
            (IpAddr::V4(at), _) => {
                let source = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(at.octets()) },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                let source = [ControlMessage::Ipv4PacketInfo(&source)];
                sendmsg(self.v4.as_raw_fd(), &payload, &source, MsgFlags::MSG_DONTWAIT, Some(&to))?;
            }
            (IpAddr::V6(at), Some(v6)) => {
                let source =
                    libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: at.octets() }, ipi6_ifindex: 0 };
                let source = [ControlMessage::Ipv6PacketInfo(&source)];
                sendmsg(v6.as_raw_fd(), &payload, &source, MsgFlags::MSG_DONTWAIT, Some(&to))?;
            }
            (IpAddr::V6(_), None) => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }
}

fn datagrams(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(family, SockType::Datagram, flags, SockProtocol::Udp)?)
}

async fn hear(socket: &UdpSocket) -> io::Result<Heard> {
    loop {
        if let Some(heard) = socket.async_io(Interest::READABLE, || receive(socket)).await? {
            return Ok(heard);
        }
    }
}

/// `None` for one that does not say where it comes from or was sent to.
fn receive(socket: &UdpSocket) -> io::Result<Option<Heard>> {
    let mut bytes = [0; LENGTH + 1];
    let mut room = nix::cmsg_space!(libc::in_pktinfo, libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut room), MsgFlags::MSG_DONTWAIT)?;
    let at = message.cmsgs()?.find_map(|info| match info {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(IpAddr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()))
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(IpAddr::from(info.ipi6_addr.s6_addr)),
        _ => None,
    });
    let from = message.address.and_then(|from| match (from.as_sockaddr_in(), from.as_sockaddr_in6()) {
        (Some(v4), _) => Some(SocketAddr::V4((*v4).into())),
        (None, Some(v6)) => Some(SocketAddr::V6((*v6).into())),
        (None, None) => None,
    });
    let length = message.bytes;
    let ends = from.zip(at);
    Ok(ends.map(|(from, at)| Heard { bytes: bytes.get(..length).unwrap_or(&bytes).to_vec(), from, at }))
}

/// Raw sockets of both families.
#[derive(Debug)]
pub struct Wrapper {
    v4: OwnedFd,
    /// `None` where there is no IPv6.
    v6: Option<OwnedFd>,
}

impl Wrapper {
    /// Opens them, which takes `CAP_NET_RAW`.
    pub fn open(ipv6: bool) -> io::Result<Self> {
        let open = |family| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            socket(family, SockType::Raw, flags, SockProtocol::Raw)
        };
        let v6 = ipv6.then(|| open(AddressFamily::Inet6)).transpose()?;
        Ok(Self { v4: open(AddressFamily::Inet)?, v6 })
    }

    /// Sends a packet, its header included, to where that says.
    pub fn send(&self, packet: &[u8], to: IpAddr) -> io::Result<()> {
        let socket = match (to, &self.v6) {
            (IpAddr::V4(_), _) => &self.v4,
            (IpAddr::V6(_), Some(v6)) => v6,
            (IpAddr::V6(_), None) => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let to = SockaddrStorage::from(SocketAddr::new(to, 0));
        sendto(socket.as_raw_fd(), packet, &to, MsgFlags::empty())?;
        Ok(())
    }
}

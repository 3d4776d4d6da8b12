//! TCP sockets that were translated at `connect`: which of them lead to an endpoint, and how one of the node itself is closed.
//!
//! Their packets belong to no flow, and those of the node pass no program where they enter. A socket's storage says which
//! endpoint it was given, whichever network namespace it is in; an iterator reads that (5.9), and with it the beginning of the
//! socket, where its ends stand. A socket of this namespace is destroyed: the kernel resets its peer, and its process hears
//! `ECONNABORTED`. One of a pod is reset by packets, see `proxy_common::lb::flow`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proxy_common::abi::{SocketEntry, SocketState, Tuple};
use proxy_common::addr::{Port, Proto};

use super::sockets::{SocketError, Storage};
use crate::datapath::store::pin::BpfRoot;
use crate::netlink::sock_diag;
use crate::sys;
use crate::sys::instruction::{
    DOUBLE, EXIT, Register, add, call, helper, load, move_register, set, skip_if_null,
};

/// How much of a socket is read: its `struct sock_common` as far as it is needed.
const SOCK: usize = 88;
/// Where things stand in there, on 64-bit machines with network namespaces: what a socket is connected to over IPv4, and its
/// own address behind that. A socket whose peer is not found where it should be is left alone.
const V4_AT: usize = 0;
/// The other's port in network order, its own in the host's.
const PORTS_AT: usize = 12;
/// Its state.
const STATE_AT: usize = 18;
/// The interface that it is bound to.
const DEVICE_AT: usize = 20;
/// Both addresses of IPv6.
const V6_AT: usize = 56;
/// What is written of each socket.
const LENGTH: usize = SOCK + size_of::<SocketState>();
/// `TCP_SYN_SENT` of `net/tcp_states.h`.
const CONNECTS: u8 = 2;
/// `TCP_CLOSE`.
const CLOSED: u8 = 7;

/// Writes to the reader the beginning of each socket and its storage. The context holds four pointers: `meta` (of which the
/// first word is the file), the map, the socket, the value.
const WRITE_SOCKETS: [u64; 23] = {
    let [first, second, third, ..] = Register::ARGUMENTS;
    let context = Register::KEPT;
    [
        move_register(context, first),
        load(DOUBLE, third, context, 24),
        skip_if_null(third, 18),
        load(DOUBLE, third, context, 16),
        skip_if_null(third, 16),
        move_register(first, Register::FRAME),
        add(first, -(SOCK as i32)),
        set(second, SOCK as u32),
        call(helper::PROBE_READ_KERNEL),
        load(DOUBLE, first, context, 0),
        load(DOUBLE, first, first, 0),
        move_register(second, Register::FRAME),
        add(second, -(SOCK as i32)),
        set(third, SOCK as u32),
        call(helper::SEQ_WRITE),
        load(DOUBLE, second, context, 24),
        skip_if_null(second, 4),
        load(DOUBLE, first, context, 0),
        load(DOUBLE, first, first, 0),
        set(third, size_of::<SocketState>() as u32),
        call(helper::SEQ_WRITE),
        set(Register::RESULT, 0),
        EXIT,
    ]
};

/// A TCP socket of this node or its pods that came to its peer through a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// What it remembers of that.
    pub entry: SocketEntry,
    /// Its own end.
    pub own: SocketAddr,
    state: u8,
    device: u32,
}

/// The way to them.
#[derive(Debug)]
pub struct Streams(Storage);

impl Streams {
    /// Opens the way to what is pinned under `root`.
    pub fn open(root: &BpfRoot) -> Result<Self, SocketError> {
        Storage::open_with(root, &WRITE_SOCKETS).map(Self)
    }

    /// All that are connected through a Service.
    pub fn connected(&self) -> Result<Vec<Stream>, SocketError> {
        Ok(self.0.read()?.chunks_exact(LENGTH).filter_map(read).collect())
    }
}

/// A socket as it was written.
fn read(bytes: &[u8]) -> Option<Stream> {
    let (sock, state) = bytes.split_at_checked(SOCK)?;
    let entry = sys::values::<SocketState>(state).first()?.entries[0];
    if entry.backend == 0 || entry.proto != Proto::TCP {
        return None;
    }
    let ip = |at: usize| -> Option<IpAddr> {
        Some(if entry.addr.is_v4() {
            Ipv4Addr::from(<[u8; 4]>::try_from(sock.get(V4_AT + at * 4..)?.get(..4)?).ok()?).into()
        } else {
            Ipv6Addr::from(<[u8; 16]>::try_from(sock.get(V6_AT + at * 16..)?.get(..16)?).ok()?).into()
        })
    };
    let ports = sock.get(PORTS_AT..PORTS_AT + 4)?;
    let peer = (ip(0)?, u16::from_be_bytes([ports[0], ports[1]]));
    let own = SocketAddr::new(ip(1)?, u16::from_ne_bytes([ports[2], ports[3]]));
    let device = u32::from_ne_bytes(sock.get(DEVICE_AT..DEVICE_AT + 4)?.try_into().ok()?);
    let state = *sock.get(STATE_AT)?;
    let connected = peer == (IpAddr::from(entry.addr), entry.port.number()) && state != CLOSED;
    connected.then_some(Stream { entry, own, state, device })
}

impl Stream {
    /// Whether nobody has answered it yet.
    #[must_use]
    pub fn is_connecting(&self) -> bool {
        self.state == CONNECTS
    }

    /// What it sends, as its packets have it.
    #[must_use]
    pub fn tuple(&self) -> Tuple {
        let Self { entry, own, .. } = self;
        Tuple::new(own.ip().into(), Port::new(own.port()), entry.addr, entry.port, Proto::TCP)
    }

    /// Closes it if it is one of this network namespace, which is what true says.
    pub fn close(&self) -> Result<bool, SocketError> {
        close(self.own, self.peer(), self.device)
    }

    fn peer(&self) -> SocketAddr {
        SocketAddr::new(self.entry.addr.into(), self.entry.port.number())
    }
}

/// Closes the TCP socket of this network namespace with these ends, which is bound to interface `device` or to
/// [`sock_diag::ANY_DEVICE`]; whether there is one.
pub fn close(own: SocketAddr, peer: SocketAddr, device: u32) -> Result<bool, SocketError> {
    sock_diag::close_tcp(own, peer, device).map_err(|source| SocketError::Destroy { endpoint: peer, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(family: &str) -> Vec<u8> {
        let (addr, own): (IpAddr, IpAddr) = if family == "v4" {
            ("10.244.0.7".parse().unwrap(), "10.244.1.2".parse().unwrap())
        } else {
            ("fd00::7".parse().unwrap(), "fd00::2".parse().unwrap())
        };
        let mut sock = [0; SOCK];
        match (addr, own) {
            (IpAddr::V4(addr), IpAddr::V4(own)) => {
                sock[..4].copy_from_slice(&addr.octets());
                sock[4..8].copy_from_slice(&own.octets());
            }
            (IpAddr::V6(addr), IpAddr::V6(own)) => {
                sock[V6_AT..V6_AT + 16].copy_from_slice(&addr.octets());
                sock[V6_AT + 16..].copy_from_slice(&own.octets());
            }
            _ => unreachable!("one family"),
        }
        sock[12..14].copy_from_slice(&8080_u16.to_be_bytes());
        sock[14..16].copy_from_slice(&40_000_u16.to_ne_bytes());
        sock[18] = 2;
        let mut state = SocketState::EMPTY;
        state.entries[0].backend = 3;
        state.entries[0].proto = Proto::TCP;
        state.entries[0].addr = addr.into();
        state.entries[0].port = Port::new(8080);
        [&sock[..], sys::bytes(&state)].concat()
    }

    #[test]
    fn a_socket_is_read_with_both_its_ends() {
        for (family, own) in [("v4", "10.244.1.2:40000"), ("v6", "[fd00::2]:40000")] {
            let stream = read(&written(family)).unwrap();
            assert_eq!((stream.own, stream.entry.backend), (own.parse().unwrap(), 3));
            assert!(stream.is_connecting());
        }
    }

    #[test]
    fn a_socket_that_looks_otherwise_is_left_alone() {
        let mut bytes = written("v6");
        bytes[V6_AT] ^= 1;
        assert_eq!(read(&bytes), None, "another peer, or another kernel");
        assert_eq!(read(&written("v4")[..SOCK]), None);
        let mut bytes = written("v4");
        bytes[18] = 7;
        assert_eq!(read(&bytes), None, "it is over, and kept by its process");
    }
}

//! Connected UDP sockets of host processes whose endpoint has gone: they are destroyed, so that the process
//! sees an error and connects again, this time to an endpoint that is there.
//!
//! Without that it would talk to nobody for ever: a socket is translated once, at `connect`. The kernel needs
//! `CONFIG_INET_DIAG_DESTROY`. TCP connections are left alone (C-1).

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::netlink::request::{Flags, Protocol, exchange};

/// `SOCK_DIAG_BY_FAMILY` of `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;
/// `SOCK_DESTROY`.
const DESTROY: u16 = 21;
/// `TCP_ESTABLISHED` of `net/tcp_states.h`: what a connected UDP socket's state is called.
const CONNECTED: u32 = 1 << 1;
/// Length of `struct inet_diag_sockid`.
const ID: usize = 48;
/// Where it stands in `struct inet_diag_msg`.
const ID_AT: usize = 4;

/// Why sockets could not be looked through or destroyed.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The list cannot be read.
    #[error("cannot list connected UDP sockets (CONFIG_INET_UDP_DIAG, module udp_diag)")]
    List(#[source] io::Error),
    /// A socket refused to go.
    #[error(
        "cannot destroy a UDP socket connected to {endpoint}, which is gone: restart its process \
         (the kernel needs CONFIG_INET_DIAG_DESTROY, the agent CAP_NET_ADMIN)"
    )]
    Destroy {
        /// Where it is connected to.
        endpoint: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// Destroys every UDP socket of this network namespace that is connected to one of `gone`, and gives their
/// number. Sockets that cannot be destroyed do not stop the others; the first failure is the result.
pub fn destroy_udp(gone: &[SocketAddr]) -> Result<usize, SocketError> {
    let gone: HashSet<(IpAddr, u16)> = gone.iter().map(|at| (at.ip().to_canonical(), at.port())).collect();
    if gone.is_empty() {
        return Ok(0);
    }
    let (mut destroyed, mut failure) = (0, None);
    for family in [libc::AF_INET, libc::AF_INET6] {
        let list = request(family as u8, &[0; ID]);
        let sockets =
            exchange(Protocol::SockDiag, BY_FAMILY, Flags::Dump, &list).map_err(SocketError::List)?;
        for socket in sockets {
            let Some((id, (ip, port))) = destination(family, &socket) else { continue };
            if !gone.contains(&(ip.to_canonical(), port)) {
                continue;
            }
            match exchange(Protocol::SockDiag, DESTROY, Flags::Ack, &request(family as u8, id)) {
                Ok(_) => destroyed += 1,
                // Closed meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(source) => {
                    let endpoint = SocketAddr::new(ip, port);
                    failure.get_or_insert(SocketError::Destroy { endpoint, source });
                }
            }
        }
    }
    failure.map_or(Ok(destroyed), Err)
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, id: &[u8]) -> Vec<u8> {
    let mut request = vec![family, libc::IPPROTO_UDP as u8, 0, 0];
    request.extend(CONNECTED.to_ne_bytes());
    request.extend(id);
    request
}

/// The identity of a socket in `struct inet_diag_msg`, and where it is connected to.
fn destination(family: i32, message: &[u8]) -> Option<(&[u8], (IpAddr, u16))> {
    let id = message.get(ID_AT..ID_AT + ID)?;
    let port = u16::from_be_bytes(id.get(2..4)?.try_into().ok()?);
    let address: [u8; 16] = id.get(20..36)?.try_into().ok()?;
    let ip = if family == libc::AF_INET {
        IpAddr::from([address[0], address[1], address[2], address[3]])
    } else {
        IpAddr::from(Ipv6Addr::from(address))
    };
    Some((id, (ip, port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_destination_is_read_from_where_the_kernel_writes_it() {
        let mut message = vec![0; 72];
        message[ID_AT + 2..ID_AT + 4].copy_from_slice(&53_u16.to_be_bytes());
        message[ID_AT + 20..ID_AT + 24].copy_from_slice(&[10, 244, 0, 7]);
        let (id, at) = destination(libc::AF_INET, &message).unwrap();
        assert_eq!(id.len(), ID);
        assert_eq!(at, ("10.244.0.7".parse().unwrap(), 53));
        assert!(destination(libc::AF_INET, &message[..40]).is_none());
    }

    #[test]
    fn a_request_has_the_length_the_kernel_asks_for() {
        assert_eq!(request(2, &[0; ID]).len(), 56);
    }
}

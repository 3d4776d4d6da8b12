//! Calls in a loop, each by a socket that is made in the cgroup of the moment.

use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use nix::time::ClockId;
use socket2::{Domain, Socket, Type};

use crate::figure::median;

/// Sockets of a turn that makes new ones.
pub(super) const NEW: u32 = 4_000;
/// Calls of a turn that uses one socket.
pub(super) const AGAIN: u32 = 20_000;
/// Calls that are timed together; the others are multiples of it.
const BATCH: u32 = 50;
/// An address of our own, see `NOWHERE`.
const OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Longer than a datagram takes to its own sender.
const PATIENCE: Duration = Duration::from_secs(2);

/// Makes a turn's calls towards an address; nanoseconds of processor time a call.
pub(super) type Call = fn(SocketAddr) -> io::Result<f64>;

/// A socket is made, connected and closed.
pub(super) fn connect_new(to: SocketAddr) -> io::Result<f64> {
    each(NEW, || udp(to)?.connect(&to.into()))
}

/// A socket is connected again and again.
pub(super) fn connect_again(to: SocketAddr) -> io::Result<f64> {
    let socket = udp(to)?;
    each(AGAIN, || socket.connect(&to.into()))
}

/// A socket that is not connected sends.
pub(super) fn send(to: SocketAddr) -> io::Result<f64> {
    let socket = udp(to)?;
    each(AGAIN, || socket.send_to(b"?", &to.into()).map(drop))
}

/// A socket that has sent somewhere receives what it has sent to itself: a datagram that stays, as it is only
/// looked at.
pub(super) fn receive(to: SocketAddr) -> io::Result<f64> {
    let socket = udp(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(b"?", &to.into())?;
    let own = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
    socket.send_to(b"?", &SocketAddr::from((OWN, own.port())).into())?;
    each(AGAIN, || socket.peek_from(&mut [MaybeUninit::uninit()]).map(drop))
}

/// A connected socket is asked for its peer.
pub(super) fn peer(to: SocketAddr) -> io::Result<f64> {
    let socket = udp(to)?;
    socket.connect(&to.into())?;
    each(AGAIN, || socket.peer_addr().map(drop))
}

fn udp(to: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(to), Type::DGRAM, None)
}

/// The median of batches: what interrupts the thread, such as memory that is freed at last, comes in bursts.
fn each(calls: u32, mut call: impl FnMut() -> io::Result<()>) -> io::Result<f64> {
    let mut batches = Vec::new();
    for _ in 0..calls / BATCH {
        let begun = processor_time()?;
        for _ in 0..BATCH {
            call()?;
        }
        batches.push((processor_time()? - begun) / f64::from(BATCH));
    }
    Ok(median(&batches))
}

/// Of this thread, in nanoseconds.
fn processor_time() -> io::Result<f64> {
    Ok(Duration::from(ClockId::CLOCK_THREAD_CPUTIME_ID.now()?).as_secs_f64() * 1e9)
}

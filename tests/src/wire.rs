//! An interface as the cable sees it: raw frames sent, and all that passes received.

use std::io::ErrorKind;
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::net::if_::if_nametoindex;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::netns::Netns;
use crate::packet::View;

/// Longer than any frame that is sent here.
const LONGEST_FRAME: usize = 65_536;
/// What passes while nobody looks must fit in here.
const BUFFER: usize = 32 << 20;

/// A packet socket on one interface. It receives what comes in and what leaves, but not what it has sent itself.
#[derive(Debug)]
pub struct Wire {
    socket: Socket,
    what: String,
    mac: [u8; 6],
}

impl Wire {
    /// Taps an interface; what passes from now on is received.
    pub fn tap(netns: &Netns, interface: &str) -> Result<Self> {
        let what = format!("{interface} in {}", netns.name());
        let socket = netns
            .run_in(|| open(interface))?
            .with_context(|| format!("opening a packet socket on {what}"))?;
        Ok(Self { socket, what, mac: netns.mac(interface)? })
    }

    /// The Ethernet address of the interface.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Sends a frame as it is.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = self.socket.send(frame).with_context(|| format!("sending a frame from {}", self.what))?;
        ensure!(sent == frame.len(), "{} took {sent} of {} bytes", self.what, frame.len());
        Ok(())
    }

    /// The next frame of which `wanted` is true, if one comes within `patience`. Frames that are not IP are passed
    /// over, and so are those whose headers cannot be read.
    pub fn next(&self, patience: Duration, wanted: impl Fn(&View) -> bool) -> Result<Option<Vec<u8>>> {
        let end = Instant::now() + patience;
        let mut buffer = vec![MaybeUninit::uninit(); LONGEST_FRAME];
        loop {
            match self.receive(&mut buffer)? {
                Some(frame) if View::ethernet(&frame).is_ok_and(|view| wanted(&view)) => {
                    return Ok(Some(frame));
                }
                Some(_) => {}
                None if Instant::now() >= end => return Ok(None),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Fails if a frame of which `unwanted` is true has passed, or does so within `patience`.
    pub fn silent(&self, patience: Duration, unwanted: impl Fn(&View) -> bool) -> Result<()> {
        let Some(frame) = self.next(patience, unwanted)? else { return Ok(()) };
        let described = crate::packet::describe(&frame);
        anyhow::bail!("{} carried what it must not: {described}", self.what)
    }

    /// One frame that has come already.
    #[expect(unsafe_code, reason = "the kernel fills a buffer that is not initialised")]
    fn receive(&self, buffer: &mut [MaybeUninit<u8>]) -> Result<Option<Vec<u8>>> {
        match self.socket.recv(buffer) {
            Ok(length) => {
                // SAFETY: `recv` has initialised the first `length` bytes.
                Ok(Some(buffer[..length].iter().map(|byte| unsafe { byte.assume_init() }).collect()))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error).with_context(|| format!("listening on {}", self.what)),
        }
    }
}

/// A frame with an IEEE 802.1Q tag of this priority and VLAN put in.
#[must_use]
pub fn tagged(frame: &[u8], priority: u8, vlan: u16) -> Vec<u8> {
    let control = (u16::from(priority) << 13) | (vlan & 0x0fff);
    [&frame[..12], &[0x81, 0x00], &control.to_be_bytes(), &frame[12..]].concat()
}

fn open(interface: &str) -> Result<Socket> {
    // Without a protocol it receives nothing until it is bound to its interface.
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    socket.set_nonblocking(true)?;
    // More than an ordinary socket may have; where this is refused the usual size has to do.
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &BUFFER).ok();
    let index = if_nametoindex(interface).with_context(|| format!("looking for {interface}"))?;
    socket.bind(&address(index)?)?;
    Ok(socket)
}

#[expect(unsafe_code, reason = "the address of a packet socket is a C struct")]
fn address(index: u32) -> Result<SockAddr> {
    let family = u16::try_from(libc::AF_PACKET).context("AF_PACKET")?;
    let protocol = u16::try_from(libc::ETH_P_ALL).context("ETH_P_ALL")?.to_be();
    let index = i32::try_from(index).context("an interface's index")?;
    // SAFETY: the storage is larger than a `sockaddr_ll` and as strictly aligned; all its bytes are zero before, so
    // what is not written here is initialised, too; the length is that of what was written.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let link = storage.cast::<libc::sockaddr_ll>();
            (*link).sll_family = family;
            (*link).sll_protocol = protocol;
            (*link).sll_ifindex = index;
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })?
    };
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_stands_between_the_addresses_and_the_type() {
        let mut frame = vec![1; 12];
        frame.extend([0x08, 0x00, 0x45]);
        let tagged = tagged(&frame, 5, 7);
        assert_eq!(tagged[12..], [0x81, 0x00, 0xa0, 0x07, 0x08, 0x00, 0x45]);
        assert_eq!(tagged[..12], frame[..12]);
    }
}

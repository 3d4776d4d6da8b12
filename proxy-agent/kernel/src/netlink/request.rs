//! One netlink request and its answers, for the few messages that no crate at hand can send.

use std::io::{self, ErrorKind};
use std::time::Duration;

use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeSpec, TimeVal};

/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `NLM_F_ACK`.
pub(crate) const ACK: u16 = 4;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// `NLMSG_ERROR`: also an acknowledgement, with code 0.
const ERROR: u16 = 2;
/// `NLMSG_DONE`.
const DONE: u16 = 3;
/// Room for one datagram: the kernel fills up to 32 KiB of a dump at once.
const ROOM: usize = 64 * 1024;

/// Which part of the kernel is spoken to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Protocol {
    /// Interfaces, addresses, qdiscs.
    Route,
    /// Sockets.
    SockDiag,
    /// nf_tables and IP sets.
    Netfilter,
    /// Families by name, such as IPVS.
    Generic,
}

impl Protocol {
    fn socket(self) -> io::Result<Socket> {
        Socket::new(match self {
            Self::Route => netlink_sys::protocols::NETLINK_ROUTE,
            Self::SockDiag => netlink_sys::protocols::NETLINK_SOCK_DIAG,
            Self::Netfilter => netlink_sys::protocols::NETLINK_NETFILTER,
            Self::Generic => netlink_sys::protocols::NETLINK_GENERIC,
        })
    }
}

/// What kind of answer is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Flags {
    /// Whether it was done.
    Ack,
    /// All there are.
    Dump,
}

/// Sends one message and gives the bodies of the answers. A refusal is its errno.
pub(crate) fn exchange(protocol: Protocol, kind: u16, flags: Flags, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    let flags = match flags {
        Flags::Ack => ACK,
        Flags::Dump => 0x300,
    };
    ask(protocol, &message(kind, flags, body))
}

/// Sends messages as one datagram; the last of them that asks for an acknowledgement ends the answers.
pub(crate) fn ask(protocol: Protocol, messages: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    let mut answers = Vec::new();
    each(protocol, messages, |message| answers.extend(message.get(HEADER..).map(<[u8]>::to_vec)))?;
    Ok(answers)
}

/// The same; the answers, with their headers, are shown to `see` as they come.
pub(crate) fn each(protocol: Protocol, messages: &[u8], mut see: impl FnMut(&[u8])) -> io::Result<()> {
    let mut socket = protocol.socket()?;
    if messages.len() > ROOM {
        // The kernel counts its own overhead, too.
        setsockopt(&socket, sockopt::SndBufForce, &(messages.len() * 2))?;
    }
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(messages, 0)?;
    let mut room = vec![0; ROOM];
    loop {
        let length = socket.recv(&mut &mut room[..], 0)?;
        let datagram = room.get(..length).unwrap_or(&room);
        if read(datagram, &mut see)? {
            return Ok(());
        }
    }
}

/// What the kernel announces by itself.
#[derive(Debug)]
pub(crate) struct News(Socket);

impl News {
    /// Of one group of multicasts. Each wait for some lasts so long at most.
    pub(crate) fn of(protocol: Protocol, group: u32, patience: Duration) -> io::Result<Self> {
        let mut socket = protocol.socket()?;
        socket.bind_auto()?;
        socket.add_membership(group)?;
        let patience = TimeSpec::from_duration(patience);
        let patience = TimeVal::new(patience.tv_sec(), patience.tv_nsec() / 1000);
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
        Ok(Self(socket))
    }

    /// Waits until something has changed; whether it has. What it was is not read: to look is surer.
    pub(crate) fn wait(&mut self) -> io::Result<bool> {
        let mut room = [0; 64];
        match self.0.recv(&mut &mut room[..], 0) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {} // More than it could keep for us.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        while self.0.recv(&mut &mut room[..], libc::MSG_DONTWAIT).is_ok() {}
        Ok(true)
    }
}

/// A message with its header, padded.
pub(crate) fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((REQUEST | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message.resize(message.len().next_multiple_of(4), 0);
    message
}

/// Appends an attribute.
pub(crate) fn put(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend((4 + value.len() as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Appends an attribute that is a string.
pub(crate) fn put_text(body: &mut Vec<u8>, kind: u16, text: &str) {
    put(body, kind, &[text.as_bytes(), &[0]].concat());
}

/// The attributes in `body` from `at` on: kind and value. What is cut off is left out.
pub(crate) fn attributes(body: &[u8], at: usize) -> impl Iterator<Item = (u16, &[u8])> {
    /// Bits of the kind that say how the value is to be read.
    const FLAGS: u16 = 0xc000;
    let mut rest = body.get(at..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (header, values) = rest.split_at_checked(4)?;
        let word = u32_at(header, 0).to_ne_bytes();
        let length = usize::from(u16::from_ne_bytes([word[0], word[1]]));
        let value = values.get(..length.checked_sub(4)?)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([word[2], word[3]]) & !FLAGS, value))
    })
}

/// The string in an attribute.
pub(crate) fn text_of(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

/// Shows the answers in a datagram; true when it holds the last one.
fn read(mut datagram: &[u8], see: &mut impl FnMut(&[u8])) -> io::Result<bool> {
    while datagram.len() >= HEADER {
        let length = u32_at(datagram, 0) as usize;
        let kind = u32_at(datagram, 4) as u16;
        let (Some(message), Some(body)) = (datagram.get(..length), datagram.get(HEADER..length)) else {
            return Err(ErrorKind::InvalidData.into());
        };
        match kind {
            ERROR => match u32_at(body, 0) as i32 {
                0 => return Ok(true),
                code => return Err(io::Error::from_raw_os_error(-code)),
            },
            DONE => match u32_at(body, 0) as i32 {
                // What was listed before is not all there is.
                code @ ..0 => return Err(io::Error::from_raw_os_error(-code)),
                _ => return Ok(true),
            },
            _ => see(message),
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(false)
}

/// A number in the machine's byte order; 0 past the end.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    word.map_or(0, u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_until_the_last_one() {
        let mut datagram = message(20, 0, &[1, 2, 3]);
        datagram.extend(message(20, 0, &[4, 5, 6, 7]));
        let mut answers = Vec::new();
        let mut see = |message: &[u8]| answers.push(message[HEADER..].to_vec());
        assert!(!read(&datagram, &mut see).unwrap());
        datagram.extend(message(DONE, 0, &0_i32.to_ne_bytes()));
        assert!(read(&datagram, &mut see).unwrap());
        assert_eq!(answers, [vec![1, 2, 3], vec![4, 5, 6, 7], vec![1, 2, 3], vec![4, 5, 6, 7]]);
    }

    #[test]
    fn a_refusal_is_its_errno_and_an_acknowledgement_is_none() {
        let refusal = message(ERROR, 0, &(-libc::ENOENT).to_ne_bytes());
        let mut see = |_: &[u8]| panic!("no answer");
        let cut = read(&message(DONE, 0, &(-libc::ENOMEM).to_ne_bytes()), &mut see).unwrap_err();
        assert_eq!(cut.raw_os_error(), Some(libc::ENOMEM));
        let error = read(&refusal, &mut see).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        assert!(read(&message(ERROR, 0, &[0; 4]), &mut see).unwrap());
    }

    #[test]
    fn attributes_are_read_as_they_are_written_and_a_cut_one_ends_them() {
        let mut body = vec![9; 4];
        put_text(&mut body, 3, "nat");
        put(&mut body, 0x8004, &[1, 2]);
        assert_eq!(body.len(), 4 + 8 + 8);
        let read: Vec<_> = attributes(&body, 4).collect();
        assert_eq!(read, [(3, &b"nat\0"[..]), (4, &[1, 2])]);
        assert_eq!(text_of(read[0].1), "nat");
        assert_eq!(attributes(&body[..14], 4).count(), 1);
        assert_eq!(attributes(&[2, 0, 0, 0], 0).count(), 0);
    }

    #[test]
    fn a_length_beyond_the_datagram_is_an_error() {
        let mut datagram = message(20, 0, &[0; 8]);
        datagram.truncate(20);
        assert!(read(&datagram, &mut |_: &[u8]| panic!("no answer")).is_err());
    }
}

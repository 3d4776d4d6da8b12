//! One netlink request and its answers, for the few messages that no crate at hand can send.

use std::io;

use netlink_sys::{Socket, SocketAddr};

/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
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
    let number = match protocol {
        Protocol::Route => netlink_sys::protocols::NETLINK_ROUTE,
        Protocol::SockDiag => netlink_sys::protocols::NETLINK_SOCK_DIAG,
    };
    let flags = match flags {
        Flags::Ack => 0x4,
        Flags::Dump => 0x300,
    };
    let mut socket = Socket::new(number)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&message(kind, flags, body), 0)?;
    let mut answers = Vec::new();
    let mut room = vec![0; ROOM];
    loop {
        let length = socket.recv(&mut &mut room[..], 0)?;
        let datagram = room.get(..length).unwrap_or(&room);
        if read(datagram, &mut answers)? {
            return Ok(answers);
        }
    }
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((REQUEST | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// Adds the answers in a datagram; true when it holds the last one.
fn read(mut datagram: &[u8], answers: &mut Vec<Vec<u8>>) -> io::Result<bool> {
    while let Some((header, rest)) = datagram.split_at_checked(HEADER) {
        let length = u32_at(header, 0) as usize;
        let kind = u32_at(header, 4) as u16;
        let Some(body) = length.checked_sub(HEADER).and_then(|length| rest.get(..length)) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        match kind {
            ERROR => match u32_at(body, 0) as i32 {
                0 => return Ok(true),
                code => return Err(io::Error::from_raw_os_error(-code)),
            },
            DONE => return Ok(true),
            _ => answers.push(body.to_vec()),
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
        datagram.push(0);
        datagram.extend(message(20, 0, &[4, 5, 6, 7]));
        let mut answers = Vec::new();
        assert!(!read(&datagram, &mut answers).unwrap());
        assert_eq!(answers, [vec![1, 2, 3], vec![4, 5, 6, 7]]);
        datagram.extend(message(DONE, 0, &0_i32.to_ne_bytes()));
        assert!(read(&datagram, &mut answers).unwrap());
    }

    #[test]
    fn a_refusal_is_its_errno_and_an_acknowledgement_is_none() {
        let refusal = message(ERROR, 0, &(-libc::ENOENT).to_ne_bytes());
        let error = read(&refusal, &mut Vec::new()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        assert!(read(&message(ERROR, 0, &[0; 4]), &mut Vec::new()).unwrap());
    }

    #[test]
    fn a_length_beyond_the_datagram_is_an_error() {
        let mut datagram = message(20, 0, &[0; 8]);
        datagram.truncate(20);
        assert!(read(&datagram, &mut Vec::new()).is_err());
    }
}

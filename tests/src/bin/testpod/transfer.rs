//! One TCP connection that carries many bytes both ways at once; every byte is checked.

use std::io::{Read, Write};
use std::net::Shutdown;

use anyhow::Result;
use proxy_tests::answer::Transfer;
use socket2::Socket;

use crate::client::{Client, Failure, Target, failure};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    target: Target,
    /// Bytes to send, all of which are to come back.
    #[arg(long)]
    bytes: u64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut transfer = Transfer::default();
    let outcome = Client::open(&arguments.target).and_then(|client| {
        let socket = client.into_socket();
        (&socket).write_all(b"ECHO\n").map_err(|e| failure("send", &e))?;
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| send(&socket, arguments.bytes));
            let received = receive(&socket, &mut transfer);
            let sent = sender.join().unwrap_or_else(|_| Err("send panic".into()));
            received.and(sent)
        })
    });
    transfer.failure = outcome.err();
    crate::print(&transfer)
}

fn send(mut socket: &Socket, bytes: u64) -> Result<(), Failure> {
    let mut sent = 0;
    let mut buffer = [0; 32 * 1024];
    while sent < bytes {
        let length = buffer.len().min(usize::try_from(bytes - sent).unwrap_or(usize::MAX));
        for (byte, at) in buffer[..length].iter_mut().zip(sent..) {
            *byte = expected(at);
        }
        socket.write_all(&buffer[..length]).map_err(|e| failure("send", &e))?;
        sent += length as u64;
    }
    socket.shutdown(Shutdown::Write).map_err(|e| failure("shutdown", &e))
}

fn receive(mut socket: &Socket, transfer: &mut Transfer) -> Result<(), Failure> {
    let mut buffer = [0; 32 * 1024];
    loop {
        let length = socket.read(&mut buffer).map_err(|e| failure("receive", &e))?;
        if length == 0 {
            return Ok(());
        }
        let damaged = buffer[..length].iter().zip(transfer.echoed..).any(|(byte, at)| *byte != expected(at));
        if damaged {
            return Err("receive damaged".into());
        }
        transfer.echoed += length as u64;
    }
}

/// The byte at a place in the stream: no two stretches of it look alike, so one that is lost, doubled or moved
/// is seen.
fn expected(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56).to_le_bytes()[0]
}

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

/// Bytes that are made, and checked, at a time.
const BLOCK: usize = 32 * 1024;
/// Bytes that are made of one number.
const WORD: usize = size_of::<u64>();
const _: () = assert!(BLOCK.is_multiple_of(WORD));

fn send(mut socket: &Socket, bytes: u64) -> Result<(), Failure> {
    let mut sent = 0;
    let mut block = [0; BLOCK];
    while sent < bytes {
        let length = block.len().min(usize::try_from(bytes - sent).unwrap_or(usize::MAX));
        fill(&mut block, sent);
        socket.write_all(&block[..length]).map_err(|e| failure("send", &e))?;
        sent += length as u64;
    }
    socket.shutdown(Shutdown::Write).map_err(|e| failure("shutdown", &e))
}

fn receive(mut socket: &Socket, transfer: &mut Transfer) -> Result<(), Failure> {
    let (mut block, mut expected) = ([0; BLOCK], [0; BLOCK]);
    loop {
        fill(&mut expected, transfer.echoed);
        let mut length = 0;
        while length < BLOCK {
            match socket.read(&mut block[length..]).map_err(|e| failure("receive", &e))? {
                0 => break,
                more => length += more,
            }
        }
        if block[..length] != expected[..length] {
            return Err("receive damaged".into());
        }
        transfer.echoed += length as u64;
        if length < BLOCK {
            return Ok(());
        }
    }
}

/// The bytes of the stream from a place on, which is a multiple of [`WORD`]: no two stretches of it look alike, so one that
/// is lost, doubled or moved is seen.
fn fill(block: &mut [u8; BLOCK], at: u64) {
    for (word, at) in block.chunks_exact_mut(WORD).zip((at..).step_by(WORD)) {
        word.copy_from_slice(&at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
}

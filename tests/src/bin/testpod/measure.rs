//! For measuring: a server that serves one connection after the other, and a client that keeps it busy. Nothing else is
//! done in between, so that the network is most of what is measured.

use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use proxy_tests::answer::{Rate, Used, Work};
use socket2::{Domain, Protocol, Socket, Type};

use crate::stdin::{Order, Orders};

/// Nothing in a measurement takes longer.
const TIMEOUT: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub(crate) struct AnswerArguments {
    /// Port to serve with TCP.
    #[arg(long)]
    port: u16,
    /// Ends by itself after this time.
    #[arg(long, default_value_t = 600.0)]
    seconds: f64,
}

#[derive(clap::Args)]
pub(crate) struct RateArguments {
    /// Address of the server or the Service.
    #[arg(long)]
    to: SocketAddr,
    /// For how long.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// What to do.
    #[arg(long, value_enum, default_value_t = Work::Connections)]
    work: Work,
}

/// The first byte of a connection says what is wanted.
const REQUEST: u8 = b'r';
const BULK: u8 = b'b';
/// Bytes that are sent at once.
const CHUNK: usize = 64 << 10;
const MEBIBYTE: u64 = 1 << 20;
const OK: &[u8; 3] = b"ok\n";

/// Serves connections, one after the other. The server closes: the client's port is free again at once.
pub(crate) fn answer(arguments: &AnswerArguments) -> Result<()> {
    let address = (Ipv6Addr::UNSPECIFIED, arguments.port);
    let listener = TcpListener::bind(address).with_context(|| format!("listening on {address:?}"))?;
    std::thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        for mut stream in listener.incoming().flatten() {
            // A client that leaves early counts it as a failure itself.
            stream.set_read_timeout(Some(TIMEOUT)).ok();
            serve(&mut stream, &mut buffer).ok();
        }
    });
    crate::print(&serde_json::json!({ "serving": arguments.port }))?;
    let orders = Orders::listen(arguments.seconds);
    loop {
        match orders.within(Duration::from_secs(3600)) {
            Some(Order::Stop) => return Ok(()),
            Some(Order::Report) => crate::print(&Used { cpu_seconds: cpu_seconds()? })?,
            Some(Order::Drain) | None => {}
        }
    }
}

/// One connection: an answer to each request, or one to all bytes.
fn serve(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    let first = stream.read(buffer)?;
    match buffer[..first].first() {
        Some(&REQUEST) => {
            stream.set_nodelay(true)?;
            stream.write_all(OK)?;
            while stream.read(buffer)? > 0 {
                stream.write_all(OK)?;
            }
            Ok(())
        }
        Some(&BULK) => {
            while stream.read(buffer)? > 0 {}
            stream.write_all(OK)
        }
        _ => stream.write_all(OK),
    }
}

/// Does its work until the time is over.
pub(crate) fn rate(arguments: &RateArguments) -> Result<()> {
    let mut rate = Rate::default();
    let mut connects = Vec::new();
    let used = cpu_seconds()?;
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(arguments.seconds);
    let mut failed = |error: io::Error| {
        rate.failed += 1;
        rate.failure = Some(error.to_string());
    };
    match arguments.work {
        Work::Connections => {
            while Instant::now() < end {
                match one(arguments.to, &mut connects) {
                    Ok(()) => rate.done += 1,
                    Err(error) => failed(error),
                }
            }
        }
        Work::Requests => requests(arguments.to, end).map_or_else(failed, |done| rate.done = done),
        Work::Bulk => bulk(arguments.to, end).map_or_else(failed, |done| rate.done = done),
    }
    rate.seconds = begun.elapsed().as_secs_f64();
    rate.cpu_seconds = cpu_seconds()? - used;
    rate.connect_us = median(connects);
    crate::print(&rate)
}

/// What this process has used of the processor. What the kernel does for a packet in the sender's context, which on
/// veth is nearly all of it, is in it.
fn cpu_seconds() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).context("asking for the processor time used")?;
    let microseconds = (usage.user_time() + usage.system_time()).num_microseconds();
    Ok(Duration::from_micros(microseconds.cast_unsigned()).as_secs_f64())
}

fn connect(to: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    // The write time-out is the one of connecting, too (socket(7), SO_SNDTIMEO).
    socket.set_write_timeout(Some(TIMEOUT))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.connect(&to.into())?;
    Ok(socket)
}

fn one(to: SocketAddr, connects: &mut Vec<f64>) -> io::Result<()> {
    let begun = Instant::now();
    let mut socket = connect(to)?;
    connects.push(begun.elapsed().as_secs_f64() * 1e6);
    socket.write_all(b"x\n")?;
    let mut answer = Vec::with_capacity(8);
    socket.read_to_end(&mut answer)?;
    is_ok(&answer)
}

/// The middle one, or 0 if there is none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn is_ok(answer: &[u8]) -> io::Result<()> {
    if answer == OK { Ok(()) } else { Err(io::Error::other("another answer than expected")) }
}

/// How many requests were answered.
fn requests(to: SocketAddr, end: Instant) -> io::Result<u64> {
    let mut socket = connect(to)?;
    socket.set_tcp_nodelay(true)?;
    let (mut done, mut answer) = (0, [0; OK.len()]);
    while Instant::now() < end {
        socket.write_all(&[REQUEST])?;
        socket.read_exact(&mut answer)?;
        is_ok(&answer)?;
        done += 1;
    }
    Ok(done)
}

/// How many mebibytes have come to the server.
fn bulk(to: SocketAddr, end: Instant) -> io::Result<u64> {
    let mut socket = connect(to)?;
    let chunk = vec![BULK; CHUNK];
    let mut sent = 0;
    while Instant::now() < end {
        socket.write_all(&chunk)?;
        sent += chunk.len() as u64;
    }
    socket.shutdown(Shutdown::Write)?;
    let mut answer = Vec::with_capacity(8);
    socket.read_to_end(&mut answer)?;
    is_ok(&answer)?;
    Ok(sent / MEBIBYTE)
}

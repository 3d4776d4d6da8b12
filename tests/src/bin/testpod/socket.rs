//! One socket that does what it is told, step by step.

use std::io::BufRead;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use proxy_tests::answer::{Answer, Request};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::client::{Failure, failure};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The socket's family.
    #[arg(long)]
    family: Family,
    /// Its kind.
    #[arg(long)]
    kind: Kind,
    /// How long an answer may take.
    #[arg(long, default_value_t = 1000)]
    timeout_ms: u64,
    /// Ends by itself after this time.
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Family {
    /// IPv4.
    Inet,
    /// IPv6, and IPv4 by mapped addresses.
    Inet6,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Datagrams.
    Udp,
    /// A stream.
    Tcp,
    /// A stream over MPTCP.
    Mptcp,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let socket = open(arguments)?;
    let until = Instant::now() + Duration::from_secs_f64(arguments.seconds);
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    loop {
        let line = match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(()),
        };
        let mut request = Request::default();
        request.failure = step(&socket, arguments.kind, &line, &mut request)?.err();
        let address = |found: std::io::Result<SockAddr>| found.ok().and_then(|address| address.as_socket());
        request.peer_name = address(socket.peer_addr()).map(canonical);
        request.local = address(socket.local_addr()).map(canonical);
        crate::print(&request)?;
    }
}

fn open(arguments: &Arguments) -> Result<Socket> {
    let domain = if arguments.family == Family::Inet6 { Domain::IPV6 } else { Domain::IPV4 };
    let (kind, protocol) = match arguments.kind {
        Kind::Udp => (Type::DGRAM, Protocol::UDP),
        Kind::Tcp => (Type::STREAM, Protocol::TCP),
        Kind::Mptcp => (Type::STREAM, Protocol::MPTCP),
    };
    let socket = Socket::new(domain, kind, Some(protocol)).context("opening a socket")?;
    let timeout = Some(Duration::from_millis(arguments.timeout_ms));
    socket.set_read_timeout(timeout)?;
    socket.set_write_timeout(timeout)?;
    Ok(socket)
}

/// Does one step; the inner error is one of the network.
fn step(socket: &Socket, kind: Kind, line: &str, request: &mut Request) -> Result<Result<(), Failure>> {
    let (verb, address) = line.split_once(' ').unwrap_or((line, ""));
    let to = || -> Result<SockAddr> {
        let to: SocketAddr = address.parse().with_context(|| format!("the address in {line:?}"))?;
        Ok(to.into())
    };
    let line: &[u8] = if kind == Kind::Udp { b"xxxxxxxx" } else { b"xxxxxxxx\n" };
    let sent = |sent: std::io::Result<usize>| sent.map(drop).map_err(|error| failure("send", &error));
    Ok(match verb {
        "connect" => socket.connect(&to()?).map_err(|error| failure("connect", &error)),
        "disconnect" => disconnect(socket).map_err(|error| failure("disconnect", &error)),
        "send" => sent(socket.send(line)),
        "send-to" => sent(socket.send_to(line, &to()?)),
        "receive" => receive(socket, kind, request),
        "peer" => Ok(()),
        _ => bail!("{verb} is no step"),
    })
}

#[expect(unsafe_code, reason = "no safe wrapper knows an address without a family")]
fn disconnect(socket: &Socket) -> std::io::Result<()> {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the address is valid for reads of its length.
    let done = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, length) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn receive(socket: &Socket, kind: Kind, request: &mut Request) -> Result<(), Failure> {
    let mut buffer = [0; 4096];
    let length = if kind == Kind::Udp {
        let socket: std::net::UdpSocket = socket.try_clone().map_err(|e| failure("dup", &e))?.into();
        let (length, from) = socket.recv_from(&mut buffer).map_err(|e| failure("receive", &e))?;
        request.received_from = Some(canonical(from));
        length
    } else {
        std::io::Read::read(&mut &*socket, &mut buffer).map_err(|e| failure("receive", &e))?
    };
    let end = buffer[..length].iter().position(|byte| *byte == b'\n').ok_or("receive garbage")?;
    let answer: Answer = serde_json::from_slice(&buffer[..end]).map_err(|_| "receive garbage")?;
    request.answer = Some(answer);
    Ok(())
}

/// What was asked for does not depend on the family of the socket.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

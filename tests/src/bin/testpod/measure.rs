//! For measuring: a server that answers one connection after the other, and a client that makes them as fast as it
//! can. Nothing else is done in between, so that the network is most of what is measured.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use proxy_tests::answer::{Rate, Used};
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
}

/// One request, one answer, closed by the server: the client's port is free again at once.
pub(crate) fn answer(arguments: &AnswerArguments) -> Result<()> {
    let address = (Ipv6Addr::UNSPECIFIED, arguments.port);
    let listener = TcpListener::bind(address).with_context(|| format!("listening on {address:?}"))?;
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        for mut stream in listener.incoming().flatten() {
            // A client that leaves early counts it as a failure itself.
            stream.set_read_timeout(Some(TIMEOUT)).ok();
            stream.read(&mut buffer).and_then(|_| stream.write_all(b"ok\n")).ok();
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

/// Connect, one request, one answer, close, again and again.
pub(crate) fn rate(arguments: &RateArguments) -> Result<()> {
    let mut rate = Rate::default();
    let used = cpu_seconds()?;
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(arguments.seconds);
    while Instant::now() < end {
        match one(arguments.to) {
            Ok(()) => rate.connections += 1,
            Err(error) => {
                rate.failed += 1;
                rate.failure = Some(error.to_string());
            }
        }
    }
    rate.seconds = begun.elapsed().as_secs_f64();
    rate.cpu_seconds = cpu_seconds()? - used;
    crate::print(&rate)
}

/// What this process has used of the processor. What the kernel does for a packet in the sender's context, which on
/// veth is nearly all of it, is in it.
fn cpu_seconds() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).context("asking for the processor time used")?;
    let microseconds = (usage.user_time() + usage.system_time()).num_microseconds();
    Ok(Duration::from_micros(microseconds.cast_unsigned()).as_secs_f64())
}

fn one(to: SocketAddr) -> std::io::Result<()> {
    let mut socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    // The write time-out is the one of connecting, too (socket(7), SO_SNDTIMEO).
    socket.set_write_timeout(Some(TIMEOUT))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.connect(&to.into())?;
    socket.write_all(b"x\n")?;
    let mut answer = Vec::with_capacity(8);
    socket.read_to_end(&mut answer)?;
    if answer == b"ok\n" { Ok(()) } else { Err(std::io::Error::other("another answer than expected")) }
}

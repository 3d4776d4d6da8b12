//! Clients that begin attempts at a steady rate, whatever becomes of those before: a client that waits for an answer
//! would ask less the more is lost.

use std::future::Future;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::errno::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::report::Tally;
use crate::pod::Place;

/// A tally that many attempts write to.
#[derive(Clone, Debug, Default)]
pub struct Shared(Arc<Mutex<Tally>>);

impl Shared {
    /// What there is so far.
    #[must_use]
    pub fn so_far(&self) -> Tally {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes an attempt and counts it.
    pub async fn count(self, attempt: impl Future<Output = Result<(), String>>) {
        let begun = Instant::now();
        let outcome = attempt.await;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).note(outcome, begun.elapsed());
    }
}

/// Begins what `next` makes in a place's network, so many a second, until it makes nothing more; then waits for all.
/// `next` is told the number of the attempt. Attempts must end by themselves.
pub fn steady<F>(place: &Place, rate: f64, mut next: impl FnMut(u64) -> Option<F> + Send) -> Result<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    let play = async {
        let mut attempts = JoinSet::new();
        let mut beat = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
        // What a busy machine has made late is made up for: the number of attempts is what was asked for.
        beat.set_missed_tick_behavior(MissedTickBehavior::Burst);
        for number in 0.. {
            beat.tick().await;
            if crate::stop::wanted() {
                bail!("interrupted");
            }
            let Some(attempt) = next(number) else { break };
            attempts.spawn(attempt);
            while let Some(ended) = attempts.try_join_next() {
                ended.context("an attempt panicked")?;
            }
        }
        while let Some(ended) = attempts.join_next().await {
            ended.context("an attempt panicked")?;
        }
        Ok(())
    };
    // Sockets belong to the namespace of the thread that makes them: everything is done on this one.
    place
        .netns
        .run_in(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.context("making a runtime for clients")?.block_on(play)
        })
        .flatten()
}

/// Ports to ask from: each attempt has one of its own, over as many clients as that takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sources {
    clients: u64,
    ports: u64,
}

/// Ports of one client: 2,048 and on.
const PORTS: u64 = 60_000;
/// The first of them.
const FIRST: u16 = 2_048;
/// Clients of one cluster at most.
const MOST: u64 = 20;

impl Sources {
    /// At least so many ports.
    pub fn new(ports: u64) -> Result<Self> {
        let clients = ports.max(1).div_ceil(PORTS);
        ensure!(
            clients <= MOST,
            "{ports} attempts, each from a port of its own, and there are {} ports here: ask for less (--rate, \
             --seconds)",
            MOST * PORTS
        );
        Ok(Self { clients, ports: ports.max(1).next_multiple_of(clients) })
    }

    /// The clients' names.
    #[must_use]
    pub fn names(self) -> Vec<String> {
        (1..=self.clients).map(|n| format!("asker-{n}")).collect()
    }

    /// The client and the port of an attempt.
    fn of(self, attempt: u64) -> (u64, u16) {
        let turn = (attempt % self.ports) / self.clients;
        (attempt % self.clients, FIRST + u16::try_from(turn).expect("ports of a client"))
    }

    /// Makes so many attempts at a steady rate, each from its port.
    pub fn steady<F>(
        self,
        places: &[&Place],
        family: IpAddr,
        (rate, attempts): (f64, u64),
        attempt: impl Fn(u64, SocketAddr) -> F + Sync,
    ) -> Result<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let rate = rate / f64::from(u32::try_from(self.clients)?);
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..self.clients)
                .zip(places)
                .map(|(client, place)| {
                    let attempt = &attempt;
                    scope.spawn(move || {
                        steady(place, rate, |turn| {
                            let number = turn * self.clients + client;
                            let from = SocketAddr::new(place.address_like(family), self.of(number).1);
                            (number < attempts).then(|| attempt(number, from))
                        })
                    })
                })
                .collect();
            let mut ended = clients.into_iter().map(ScopedJoinHandle::join);
            ended.try_for_each(|end| end.map_err(|_| anyhow!("a client panicked")).flatten())
        })
    }
}

/// Who closes a connection first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closes {
    /// The client, as soon as it has its answer.
    Client,
    /// The server, after its answer.
    Server,
}

/// Opens a connection, makes one request, reads the answer to its end and closes. The kernel chooses the port where
/// none is given.
pub async fn connection(
    from: Option<SocketAddr>,
    to: SocketAddr,
    closes: Closes,
    timeout: Duration,
) -> Result<(), String> {
    let attempt = async {
        let mut stream = connect(from, to).await.map_err(|error| named("connect", &error))?;
        stream.set_nodelay(true).map_err(|error| named("nodelay", &error))?;
        // The server answers lines until the client leaves, and a request of HTTP once.
        let request: &[u8] = if closes == Closes::Client { b"hello\n" } else { b"GET / HTTP/1.1\r\n\r\n" };
        stream.write_all(request).await.map_err(|error| named("send", &error))?;
        let mut answer = Vec::new();
        loop {
            let read = stream.read_buf(&mut answer).await.map_err(|error| named("receive", &error))?;
            let whole = answer.ends_with(b"}\n");
            match (read, closes) {
                (0, Closes::Server) if whole => return Ok(()),
                (0, _) => return Err("receive closed".into()),
                (_, Closes::Client) if whole => return Ok(()),
                _ => {}
            }
        }
    };
    match tokio::time::timeout(timeout, attempt).await {
        Ok(outcome) => outcome,
        Err(_) => Err("timeout".into()),
    }
}

async fn connect(from: Option<SocketAddr>, to: SocketAddr) -> std::io::Result<TcpStream> {
    let Some(from) = from else { return TcpStream::connect(to).await };
    let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // An earlier connection from this port may have ended a moment ago.
    socket.set_reuseaddr(true)?;
    socket.bind(from)?;
    socket.connect(to).await
}

/// Asks once from a port over a connected UDP socket, and waits for the answer to just that question.
pub async fn question(
    from: SocketAddr,
    to: SocketAddr,
    number: u64,
    timeout: Duration,
) -> Result<(), String> {
    let socket = UdpSocket::bind(from).await.map_err(|error| named("bind", &error))?;
    socket.connect(to).await.map_err(|error| named("connect", &error))?;
    let asked = number.to_be_bytes();
    socket.send(&asked).await.map_err(|error| named("send", &error))?;
    let mut answer = vec![0; 2048];
    match tokio::time::timeout(timeout, socket.recv(&mut answer)).await {
        Err(_) => Err("receive timeout".into()),
        Ok(Err(error)) => Err(named("receive", &error)),
        // The server says who it is, and then what it was asked.
        Ok(Ok(length)) if answer[..length].ends_with(&asked) => Ok(()),
        Ok(Ok(_)) => Err("receive another answer".into()),
    }
}

/// Connections that are opened once and kept.
#[derive(Debug, Default)]
pub struct Held {
    talking: Vec<Line>,
    silent: Vec<Line>,
    tally: Tally,
}

/// An open connection, read line by line.
type Line = BufReader<std::net::TcpStream>;

impl Held {
    /// Opens so many, and exchanges a line on each; a failure here is an error.
    pub fn open(place: &Place, to: SocketAddr, count: usize, timeout: Duration) -> Result<Self> {
        let connect = || {
            (0..count)
                .map(|_| {
                    let stream = std::net::TcpStream::connect_timeout(&to, timeout)?;
                    stream.set_read_timeout(Some(timeout))?;
                    stream.set_write_timeout(Some(timeout))?;
                    stream.set_nodelay(true)?;
                    let mut stream = BufReader::new(stream);
                    exchange(&mut stream).map(|()| stream)
                })
                .collect::<std::io::Result<_>>()
        };
        let mut talking: Vec<Line> = place
            .netns
            .run_in(connect)?
            .with_context(|| format!("opening {count} connections from {} to {to}", place.name))?;
        let silent = talking.split_off(count.div_ceil(2));
        Ok(Self { talking, silent, tally: Tally::default() })
    }

    /// Exchanges a line on half of them; the others stay silent. A broken one is counted and let go.
    pub fn talk(&mut self) {
        let tally = &mut self.tally;
        self.talking.retain_mut(|line| match exchange(line) {
            Ok(()) => true,
            Err(error) => {
                tally.note(Err(named("exchange", &error)), Duration::ZERO);
                false
            }
        });
    }

    /// Exchanges a line on all that are left, and tells how many have lived until now.
    #[must_use]
    pub fn end(mut self) -> Tally {
        for mut line in self.talking.into_iter().chain(self.silent) {
            let begun = Instant::now();
            let outcome = exchange(&mut line).map_err(|error| named("exchange", &error));
            self.tally.note(outcome, begun.elapsed());
        }
        self.tally
    }
}

/// One line there, one back.
fn exchange(line: &mut Line) -> std::io::Result<()> {
    line.get_mut().write_all(b"hello\n")?;
    if line.read_line(&mut String::new())? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// The step and the error's name: `connect ECONNREFUSED`.
fn named(step: &str, error: &std::io::Error) -> String {
    match (error.kind(), error.raw_os_error()) {
        (std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut, _) => format!("{step} timeout"),
        (_, Some(number)) => format!("{step} {:?}", Errno::from_raw(number)),
        (kind, None) => format!("{step} {kind:?}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_attempt_has_a_port_of_its_own_until_all_have_been_used() {
        for ports in [1, 7, 60_000, 88_000, 180_001] {
            let sources = Sources::new(ports).unwrap();
            assert_eq!(sources.names().len() as u64, ports.div_ceil(PORTS));
            let used: BTreeSet<_> = (0..ports).map(|attempt| sources.of(attempt)).collect();
            assert_eq!(used.len() as u64, ports);
            assert!(used.iter().all(|(client, port)| *client < sources.clients && *port >= FIRST));
            assert_eq!(sources.of(sources.ports), sources.of(0));
        }
        let error = Sources::new(2_000_000).unwrap_err().to_string();
        assert!(error.contains("1200000 ports here") && error.contains("--rate"), "{error}");
    }
}

//! Clients that come in numbers and never end a request: what an open port has to bear.

use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use super::scene::want_descriptors;
use crate::pod::Place;
use crate::probe::eventually;

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(2);
/// Time between two looks at all of them.
const TICK: Duration = Duration::from_millis(50);
/// What the slow ones say, a byte with each tick.
const HEADER: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: node\r\nX-Patience: ";
/// What the deaf ones say at once.
const QUESTION: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n";

/// What the clients of a crowd do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Connect, and say nothing.
    Idle,
    /// Send a header byte by byte, without an end.
    Slow,
    /// Ask a thousand times in one go, which is more than a server reads before it has answered, and take no answer.
    Deaf,
    /// Connect, say nothing, and connect again when they are sent away.
    Insistent,
}

impl Manner {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Idle, Self::Slow, Self::Deaf, Self::Insistent];
}

/// Clients of a server. Dropping it sends them home.
#[derive(Debug)]
pub struct Crowd {
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Counts {
    end: AtomicBool,
    /// Connections that were made.
    made: AtomicU64,
    /// Connections that the server has closed.
    closed: AtomicU64,
}

impl Crowd {
    /// Has so many clients connect from a place, and waits until each has.
    pub fn gather(place: &Place, to: SocketAddr, many: usize, manner: Manner) -> Result<Self> {
        want_descriptors(2 * many as u64)?;
        let counts = Arc::new(Counts::default());
        let (shared, netns) = (counts.clone(), place.netns.clone());
        let play = move || {
            // Without its namespace nobody connects, which whoever waits is told.
            netns.run_in(|| crowd(to, many, manner, &shared)).ok();
        };
        let thread = std::thread::Builder::new().name("crowd".into()).spawn(play).context("a thread")?;
        let crowd = Self { counts, thread: Some(thread) };
        eventually(Duration::from_secs(60), || {
            let made = crowd.made();
            anyhow::ensure!(made >= many as u64, "only {made} of {many} clients have connected to {to}");
            Ok(())
        })?;
        Ok(crowd)
    }

    /// Connections that were made so far.
    #[must_use]
    pub fn made(&self) -> u64 {
        self.counts.made.load(Ordering::Relaxed)
    }

    /// Those of them that the server has closed.
    #[must_use]
    pub fn closed(&self) -> u64 {
        self.counts.closed.load(Ordering::Relaxed)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.counts.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            thread.join().ok();
        }
    }
}

/// One client: its connection, and the bytes that it has sent.
struct Client {
    stream: TcpStream,
    said: usize,
}

fn crowd(to: SocketAddr, many: usize, manner: Manner, counts: &Counts) {
    let mut open: Vec<Option<Client>> = Vec::new();
    open.resize_with(many, || None);
    let mut first = true;
    while !counts.end.load(Ordering::Relaxed) {
        for client in &mut open {
            if let Some(here) = client {
                if !here.goes_on(manner) {
                    *client = None;
                    counts.closed.fetch_add(1, Ordering::Relaxed);
                }
            } else if first
                || manner == Manner::Insistent
                || counts.made.load(Ordering::Relaxed) < many as u64
            {
                *client = Client::connect(to, manner);
                counts.made.fetch_add(u64::from(client.is_some()), Ordering::Relaxed);
            }
        }
        first = false;
        std::thread::sleep(TICK);
    }
}

impl Client {
    /// `None` where it was refused, or the server did not get round to it.
    fn connect(to: SocketAddr, manner: Manner) -> Option<Self> {
        let mut stream = TcpStream::connect_timeout(&to, CONNECT).ok()?;
        if manner == Manner::Deaf {
            // It may be sent away meanwhile, which is noticed later.
            stream.write_all(&QUESTION.repeat(1000)).ok();
        }
        stream.set_nonblocking(true).ok()?;
        Some(Self { stream, said: 0 })
    }

    /// Whether the server lets it.
    fn goes_on(&mut self, manner: Manner) -> bool {
        if manner == Manner::Slow {
            let byte = HEADER.get(self.said).copied().unwrap_or(b'x');
            self.said += 1;
            if self.stream.write(&[byte]).is_err_and(|error| error.kind() != ErrorKind::WouldBlock) {
                return false;
            }
        }
        // Behind an answer that has not been taken only this shows a reset.
        if self.stream.take_error().is_ok_and(|error| error.is_some()) {
            return false;
        }
        match self.stream.peek(&mut [0]) {
            Ok(bytes) => bytes != 0,
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        }
    }
}

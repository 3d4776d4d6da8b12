//! How HTTP is served here: by hyper, within limits.
//!
//! Anybody may be at the other end. A connection may be silent, send its request byte by byte, or not take its answer:
//! after half a minute it is closed. There may be thousands of them: a listener has so many connections at a time, all
//! listeners together so many more, and a new one takes the place of the one that has said nothing for the longest time:
//! answers that it lets wait do not make it younger. So who asks is answered, whoever else is there, and most descriptors
//! of the process are left to the agent ([`Limits`]). All of it runs on the thread of the servers, and the loop does not know of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::resource::{Resource, getrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::io::InspectReader;
use tower::ServiceExt as _;

/// How long a connection may take from its beginning, or from an answer, to the end of the next request. The time to take
/// an answer is part of it.
const SILENCE: Duration = Duration::from_secs(30);
/// The most that one connection keeps of what has been received, headers foremost: hyper's least.
const BUFFER: usize = 8192;
/// Headers of one request.
const HEADERS: usize = 64;
/// How long to wait after an `accept` that failed, which may be for want of memory or descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// What clients may take of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections to one listener at a time.
    pub each: usize,
    /// Connections to all of them.
    pub all: usize,
    /// Listeners for health checks of Services.
    pub listeners: usize,
}

impl Limits {
    /// Three quarters of so many descriptors stay with the agent: for tables, programs, links of interfaces, the API
    /// server, and the files that it looks into.
    #[must_use]
    pub fn of(descriptors: u64) -> Self {
        let eighth = usize::try_from(descriptors / 8).unwrap_or(usize::MAX);
        let all = eighth.clamp(4, 256);
        Self { each: all / 2, all, listeners: eighth.max(2) }
    }

    /// Those of this process.
    #[must_use]
    pub fn of_process() -> Self {
        Self::of(getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft))
    }
}

/// All connections of all listeners.
#[derive(Clone, Debug)]
pub struct Connections {
    limits: Limits,
    open: Arc<Mutex<Open>>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    by_listener: BTreeMap<SocketAddr, BTreeMap<u64, Connection>>,
    /// Connections that had to make room.
    displaced: u64,
    /// Connections that took too long.
    overdue: u64,
}

#[derive(Debug)]
struct Connection {
    abort: AbortHandle,
    progress: Arc<Mutex<Progress>>,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug)]
struct Progress {
    /// Whether a request is being answered.
    busy: bool,
    /// Since when it is, or is not.
    since: Instant,
    /// When bytes came last.
    received: Instant,
    /// When the last bytes of the newest request came, or the connection itself.
    asked: Instant,
}

impl Progress {
    fn new() -> Self {
        let now = Instant::now();
        Self { busy: false, since: now, received: now, asked: now }
    }

    /// A request is whole.
    fn begin(&mut self) {
        (self.busy, self.since, self.asked) = (true, Instant::now(), self.received);
    }

    /// It has its answer, which need not have been sent.
    fn end(&mut self) {
        (self.busy, self.since) = (false, Instant::now());
    }
}

/// What is told of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Open now.
    pub open: u64,
    /// Closed because others came.
    pub displaced: u64,
    /// Closed because they took too long.
    pub overdue: u64,
}

impl Connections {
    /// None yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, open: Arc::default() }
    }

    /// The limits.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// How many there are, and were.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let open = self.lock();
        Counts {
            open: open.by_listener.values().map(BTreeMap::len).sum::<usize>() as u64,
            displaced: open.displaced,
            overdue: open.overdue,
        }
    }

    /// Serves what comes to `listener`, which is named `what` in the log; its connections end with it.
    pub(super) async fn serve(&self, what: &str, listener: TcpListener, router: Router) {
        let Ok(at) = listener.local_addr() else { return };
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        self.admit(at, stream, router.clone(), &mut tasks);
                        // The new one has its say before the next one may displace it.
                        tokio::task::yield_now().await;
                    }
                    Err(error) => {
                        tracing::debug!("{what}: accept: {error}");
                        sleep(PAUSE).await;
                    }
                },
                Some(_) = tasks.join_next() => {}
            }
        }
    }

    fn admit(&self, at: SocketAddr, stream: TcpStream, router: Router, tasks: &mut JoinSet<()>) {
        let mut open = self.lock();
        open.make_room(at, self.limits);
        let id = open.next;
        open.next += 1;
        let progress = Arc::new(Mutex::new(Progress::new()));
        let place = Place { connections: self.clone(), at, id };
        let talk = {
            let progress = progress.clone();
            async move {
                let in_time = talk(stream, router, progress).await;
                place.leave(in_time);
            }
        };
        let abort = tasks.spawn(talk);
        open.by_listener.entry(at).or_default().insert(id, Connection { abort, progress });
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// Closes a connection where one more would be too many: of this listener where it has its share or no other has more
    /// than it, else of the one that has the most.
    fn make_room(&mut self, at: SocketAddr, limits: Limits) {
        let all: usize = self.by_listener.values().map(BTreeMap::len).sum();
        let here = self.by_listener.get(&at).map_or(0, BTreeMap::len);
        let from = if here >= limits.each {
            Some(at)
        } else if all >= limits.all {
            let most = self.by_listener.iter().max_by_key(|(_, of)| of.len());
            most.map(|(most, of)| if of.len() > here { *most } else { at })
        } else {
            None
        };
        let Some(of) = from.and_then(|at| self.by_listener.get_mut(&at)) else { return };
        // Neither being answered nor having been is protection: who asks much at once and does not listen would be the last
        // to go.
        let idlest = of.iter().min_by_key(|(_, connection)| look(&connection.progress).asked);
        if let Some(displaced) = idlest.map(|(id, _)| *id).and_then(|id| of.remove(&id)) {
            displaced.abort.abort();
            self.displaced += 1;
        }
    }
}

fn look(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection's place among the others, given up when it is dropped.
struct Place {
    connections: Connections,
    at: SocketAddr,
    id: u64,
}

impl Place {
    fn leave(self, in_time: bool) {
        self.connections.lock().overdue += u64::from(!in_time);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.connections.lock();
        if let Some(of) = open.by_listener.get_mut(&self.at) {
            of.remove(&self.id);
            if of.is_empty() {
                open.by_listener.remove(&self.at);
            }
        }
    }
}

/// Talks until the other end has gone, or has taken too long: whether it has not.
async fn talk(stream: TcpStream, router: Router, progress: Arc<Mutex<Progress>>) -> bool {
    let stream = InspectReader::new(stream, |_: &[u8]| look(&progress).received = Instant::now());
    let answer = service_fn(async |request| {
        look(&progress).begin();
        let answer = router.clone().oneshot(request).await;
        look(&progress).end();
        answer
    });
    let mut http = http1::Builder::new();
    // Who has said all that it will say may still wait for the answer.
    http.timer(TokioTimer::new()).header_read_timeout(None).half_close(true);
    http.max_buf_size(BUFFER).max_headers(HEADERS);
    tokio::select! {
        result = http.serve_connection(TokioIo::new(stream), answer) => {
            if let Err(error) = result {
                tracing::trace!("an HTTP connection: {error}");
            }
            true
        }
        () = overdue(&progress) => false,
    }
}

/// Returns when nothing has been asked for too long.
async fn overdue(progress: &Mutex<Progress>) {
    loop {
        let Progress { busy, since, .. } = *look(progress);
        let now = Instant::now();
        let quiet_since = if busy { now } else { since };
        let until = quiet_since + SILENCE;
        if until <= now {
            return;
        }
        sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use axum::routing::any;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";

    async fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        (listener, at)
    }

    /// Two listeners within limits.
    async fn served(limits: Limits) -> (Connections, [SocketAddr; 2]) {
        let connections = Connections::new(limits);
        let mut at = Vec::new();
        for _ in 0..2 {
            let (listener, address) = listener().await;
            at.push(address);
            let router =
                Router::new().route("/", any("here")).route("/large", any(async || "x".repeat(64 << 20)));
            let connections = connections.clone();
            tokio::spawn(async move { connections.serve("test", listener, router).await });
        }
        (connections, [at[0], at[1]])
    }

    async fn ask(at: SocketAddr) -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect(at).await?;
        stream.write_all(REQUEST).await?;
        let mut answer = [0; 12];
        timeout(SOON, stream.read_exact(&mut answer)).await.expect("an answer")?;
        assert_eq!(&answer, b"HTTP/1.1 200");
        Ok(stream)
    }

    async fn is_closed(stream: &mut TcpStream) -> bool {
        let mut rest = Vec::new();
        timeout(SOON, stream.read_to_end(&mut rest)).await.is_ok()
    }

    async fn until(connections: &Connections, what: impl Fn(Counts) -> bool) {
        let wait = async {
            while !what(connections.counts()) {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, wait).await.unwrap_or_else(|_| panic!("{:?}", connections.counts()));
    }

    #[test]
    fn most_descriptors_are_left_to_the_agent() {
        for (descriptors, all) in [(64, 8), (256, 32), (1024, 128), (1_048_576, 256)] {
            let limits = Limits::of(descriptors);
            assert_eq!((limits.all, limits.each), (all, all / 2));
            assert!((limits.all + limits.listeners) as u64 <= descriptors / 4);
        }
    }

    #[tokio::test]
    async fn who_asks_is_answered_while_others_are_silent_and_the_oldest_of_them_goes() {
        let (connections, [at, other]) = served(Limits { each: 8, all: 12, listeners: 0 }).await;
        let kept = ask(other).await.unwrap();
        let mut silent = Vec::new();
        for n in 0..100 {
            let mut stream = TcpStream::connect(at).await.unwrap();
            // Some have begun to ask.
            stream.write_all(&REQUEST[..n % REQUEST.len()]).await.unwrap();
            silent.push(stream);
            if n % 10 == 0 {
                drop(ask(at).await.unwrap());
            }
        }
        ask(at).await.unwrap();
        until(&connections, |counts| counts.open <= 9 && counts.displaced >= 92).await;
        assert!(is_closed(&mut silent[0]).await && is_closed(&mut silent[50]).await);
        // The other listener keeps its own.
        drop(kept);
        ask(other).await.unwrap();
    }

    #[tokio::test]
    async fn the_listener_that_has_the_most_makes_room_for_another() {
        let (connections, [at, other]) = served(Limits { each: 8, all: 8, listeners: 0 }).await;
        let mut silent = Vec::new();
        for _ in 0..8 {
            silent.push(TcpStream::connect(at).await.unwrap());
        }
        until(&connections, |counts| counts.open == 8).await;
        let _asked = ask(other).await.unwrap();
        assert!(is_closed(&mut silent[0]).await);
        until(&connections, |counts| counts == Counts { open: 8, displaced: 1, overdue: 0 }).await;
    }

    #[tokio::test]
    async fn who_asks_once_is_not_sent_away_for_those_who_let_their_answers_wait() {
        let limits = Limits { each: 8, all: 8, listeners: 0 };
        let (connections, (listener, at)) = (Connections::new(limits), listener().await);
        let soon = async || sleep(Duration::from_millis(2)).await;
        let late = async || sleep(Duration::from_millis(500)).await;
        let router = Router::new().route("/soon", any(soon)).route("/", any(late));
        let server = connections.clone();
        tokio::spawn(async move { server.serve("test", listener, router).await });
        let mut deaf = Vec::new();
        for _ in 0..4 {
            let mut stream = TcpStream::connect(at).await.unwrap();
            stream.write_all(&b"GET /soon HTTP/1.1\r\nHost: x\r\n\r\n".repeat(200)).await.unwrap();
            deaf.push(stream);
        }
        until(&connections, |counts| counts.open == 4).await;
        let asked = tokio::spawn(ask(at));
        until(&connections, |counts| counts.open == 5).await;
        // Each of the others is answered again and again while it waits, and three come for whom there is no room.
        sleep(Duration::from_millis(50)).await;
        let mut silent = Vec::new();
        for _ in 0..6 {
            silent.push(TcpStream::connect(at).await.unwrap());
        }
        until(&connections, |counts| counts.displaced >= 3).await;
        asked.await.unwrap().unwrap();
        assert!(is_closed(&mut deaf[0]).await);
    }

    #[tokio::test]
    async fn a_listener_with_as_many_as_any_other_makes_room_itself() {
        for turn in [false, true] {
            let (connections, mut at) = served(Limits { each: 8, all: 8, listeners: 0 }).await;
            at.sort_unstable();
            if turn {
                at.reverse();
            }
            let mut silent = Vec::new();
            for _ in 0..4 {
                silent.push(TcpStream::connect(at[0]).await.unwrap());
            }
            until(&connections, |counts| counts.open == 4).await;
            for _ in 0..20 {
                silent.push(TcpStream::connect(at[1]).await.unwrap());
            }
            until(&connections, |counts| counts.displaced == 16).await;
            assert_eq!(connections.lock().by_listener[&at[0]].len(), 4);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_silent_or_slow_for_too_long_is_closed() {
        let (connections, [at, _]) = served(Limits { each: 8, all: 8, listeners: 0 }).await;
        let mut silent = TcpStream::connect(at).await.unwrap();
        let mut slow = TcpStream::connect(at).await.unwrap();
        let mut deaf = TcpStream::connect(at).await.unwrap();
        deaf.write_all(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        until(&connections, |counts| counts.open == 3).await;
        let begun = Instant::now();
        for byte in REQUEST.iter().take(20) {
            // Whether it is still taken does not matter.
            slow.write_all(&[*byte]).await.ok();
            sleep(SILENCE / 10).await;
        }
        until(&connections, |counts| counts == Counts { open: 0, displaced: 0, overdue: 3 }).await;
        assert!(begun.elapsed() < SILENCE * 3, "{:?}", begun.elapsed());
        assert!(is_closed(&mut silent).await && is_closed(&mut slow).await);
    }

    #[tokio::test]
    async fn requests_that_are_too_large_are_refused_and_many_in_one_go_are_answered() {
        let (_, [at, _]) = served(Limits { each: 8, all: 8, listeners: 0 }).await;
        for large in [
            format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", "x".repeat(100_000)),
            format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(100_000)),
            format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(1000)),
        ] {
            let mut stream = TcpStream::connect(at).await.unwrap();
            // It may be cut off in the middle.
            stream.write_all(large.as_bytes()).await.ok();
            let mut answer = Vec::new();
            timeout(SOON, stream.read_to_end(&mut answer)).await.expect("it is closed").ok();
            let answer = String::from_utf8_lossy(&answer).into_owned();
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
        }
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(&REQUEST.repeat(100)).await.unwrap();
        // The end of what it says is not the end of what it hears.
        stream.shutdown().await.unwrap();
        let mut answers = String::new();
        timeout(SOON, stream.read_to_string(&mut answers)).await.unwrap().unwrap();
        assert_eq!(answers.matches("HTTP/1.1 200").count(), 100);
    }
}

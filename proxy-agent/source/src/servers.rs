//! Which API server is asked: those that were given and those that were learnt, one of them in use.
//!
//! A server is kept as long as it answers. One that cannot be reached, or whose answers are of no use, is left for the
//! next, and everybody follows. While none answers one request at a time is made, after pauses that grow: the first that
//! is answered lets all others go on.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Uri, Version};
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{Mutex as Gate, MutexGuard as Admitted, Notify, watch};
use tokio::time::Instant;

use super::backoff::Backoff;

/// Pauses while no server answers.
const DOWN: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(10)];
/// A server that was left is not gone back to for this time, because of what another one answers.
const BLAMED: Duration = Duration::from_secs(10);
/// What was wrong with a server that is no longer asked is told for this time.
const TOLD: Duration = Duration::from_secs(300);
/// No server makes us wait longer than this.
const HELD: Duration = Duration::from_secs(60);
/// One that wants to be left alone for longer than this is left for another.
const WAITED: Duration = Duration::from_secs(5);

/// Where we know a server from. The order is that in which they are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    /// The settings: flags, a kubeconfig, or the environment of a pod.
    Given,
    /// The endpoints of the `kubernetes` Service.
    Endpoints,
    /// kubeadm's ConfigMap `cluster-info`.
    ClusterInfo,
    /// What an earlier agent has learnt.
    Kept,
    /// Talos serves the API on each node.
    Local,
}

#[derive(Debug)]
struct Server {
    url: Uri,
    origin: Origin,
    /// When it was left last.
    blamed: Option<Instant>,
}

/// What is wrong, and until when it is told; `None` for as long as it is.
#[derive(Debug)]
struct Trouble {
    line: String,
    until: Option<Instant>,
}

#[derive(Debug)]
struct State {
    list: Vec<Server>,
    current: usize,
    generation: u64,
    /// No server answers: when the next may be asked.
    down: Option<Instant>,
    backoff: Backoff,
    /// The server in use wants to be left alone until then; and why another is asked instead, if that is long.
    held: Option<(Instant, Option<String>)>,
    /// When something was heard of the server in use.
    heard: Instant,
    /// Whether its connections tell by themselves that nobody is there any more.
    pings: bool,
    /// By what they are about: a server's URL, or a kind of objects.
    troubles: BTreeMap<String, Trouble>,
}

/// The servers of one cluster.
#[derive(Debug)]
pub(super) struct Servers {
    state: Mutex<State>,
    /// Counts moves from server to server, and new credentials: whoever has a connection renews it then.
    moved: watch::Sender<u64>,
    /// Held by whoever may ask while no server answers.
    gate: Gate<()>,
    /// Woken when there is something else to be told.
    told: Notify,
    moves: Counter,
}

/// The server that a request goes to.
#[derive(Clone, Debug)]
pub(super) struct Turn {
    pub(super) url: Uri,
    generation: u64,
}

impl Turn {
    /// Which one it is: one more with each move.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }
}

impl Servers {
    pub(super) fn new(given: Vec<Uri>, moves: Counter) -> Self {
        let list = given.into_iter().map(|url| Server { url, origin: Origin::Given, blamed: None }).collect();
        let state = State {
            list,
            current: 0,
            generation: 0,
            down: None,
            backoff: Backoff::new(DOWN),
            held: None,
            heard: Instant::now(),
            pings: false,
            troubles: BTreeMap::new(),
        };
        let (moved, gate, told) = (watch::Sender::new(0), Gate::new(()), Notify::new());
        Self { state: Mutex::new(state), moved, gate, told, moves }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server in use; `None` when there is none at all.
    pub(super) fn current(&self) -> Option<Turn> {
        let state = self.state();
        let url = state.list.get(state.current)?.url.clone();
        Some(Turn { url, generation: state.generation })
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.state().list.len()
    }

    /// Whether somebody else than the operator has told us of it.
    pub(super) fn is_learnt(&self, url: &Uri) -> bool {
        let state = self.state();
        let mut same = state.list.iter().filter(|server| server.url.authority() == url.authority());
        same.any(|server| server.origin != Origin::Given)
    }

    /// Told when connections are to be renewed.
    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.moved.subscribe()
    }

    /// Waits until a request may be made. Whoever is admitted while no server answers is alone.
    pub(super) async fn admit(&self) -> Option<Admitted<'_, ()>> {
        loop {
            let mut moved = self.subscribe();
            let Some(until) = self.held() else { break };
            tokio::select! {
                () = tokio::time::sleep_until(until) => {}
                _ = moved.changed() => {} // Another server has said nothing of the kind.
            }
        }
        self.state().down?;
        let admitted = self.gate.lock().await;
        let mut moved = self.subscribe();
        let at = self.state().down?;
        tokio::select! {
            () = tokio::time::sleep_until(at) => {}
            _ = moved.changed() => {}
        }
        Some(admitted)
    }

    /// Until when the server in use is left alone, or another was left too lately; that one is in use now if it was not.
    fn held(&self) -> Option<Instant> {
        let (now, mut state) = (Instant::now(), self.state());
        let (until, why) = state.held.clone().filter(|(until, _)| *until > now)?;
        let Some(why) = why else { return Some(until) };
        match self.leave(&mut state, &why) {
            Ok(()) => None,
            Err(fresh) => Some(fresh.map_or(until, |fresh| fresh.min(until))),
        }
    }

    /// Something was heard of the server in use.
    pub(super) fn heard(&self) {
        self.state().heard = Instant::now();
    }

    /// For how long nothing was heard of the server in use; `None` if nobody is to ask it whether it lives: its connections
    /// tell, it wants to be left alone, or it is known to be of no use.
    pub(super) fn unheard(&self) -> Option<Duration> {
        let state = self.state();
        let held = state.held.as_ref().is_some_and(|(held, _)| *held > Instant::now());
        (!state.pings && !held && state.down.is_none()).then(|| state.heard.elapsed())
    }

    /// A server has answered, whatever it said.
    pub(super) fn answered(&self, turn: &Turn, version: Version) {
        let mut state = self.state();
        if turn.generation == state.generation {
            (state.heard, state.pings) = (Instant::now(), version == Version::HTTP_2);
        }
        state.down = None;
        state.backoff.reset();
        if state.troubles.remove(&turn.url.to_string()).is_some() {
            self.told.notify_one();
        }
    }

    /// A server cannot be reached or does not answer: the next is in use now, if there is one.
    pub(super) fn failed(&self, turn: &Turn, why: &str) {
        let mut state = self.state();
        let alone = state.list.len() < 2;
        let until = (!alone).then(|| Instant::now() + TOLD);
        let line = format!("{} cannot be used: {why}", turn.url);
        self.tell(&mut state, turn.url.to_string(), Some(Trouble { line, until }));
        if turn.generation == state.generation && !alone {
            let next = (state.current + 1) % state.list.len();
            self.go(&mut state, next, why);
        }
    }

    /// The server in use does not answer any more, although it did: whoever listens to it hears nothing.
    pub(super) fn hangs(&self, turn: &Turn, why: &str) {
        if turn.generation != self.state().generation {
            return; // Somebody else has found that out.
        }
        self.failed(turn, why);
        if self.len() < 2 {
            self.exhausted();
            self.renew();
        }
    }

    /// What is wrong with the server in use, if none answers.
    pub(super) fn unreachable(&self) -> Option<String> {
        let state = self.state();
        state.down?;
        let server = state.list.get(state.current)?;
        state.troubles.get(&server.url.to_string()).map(|trouble| trouble.line.clone())
    }

    /// None of them has answered.
    pub(super) fn exhausted(&self) {
        let mut state = self.state();
        let pause = state.backoff.pause();
        state.down = Some(Instant::now() + pause);
    }

    /// What the server in use answers is of no use; whether there is another that was not found so lately.
    pub(super) fn blame(&self, generation: u64, why: &str) -> bool {
        let mut state = self.state();
        if generation != state.generation {
            return true; // Somebody else has found that out.
        }
        self.leave(&mut state, why).is_ok()
    }

    /// Leaves the server in use for the next that was not left so lately. If there is none, when there will be one.
    fn leave(&self, state: &mut State, why: &str) -> Result<(), Option<Instant>> {
        let (n, current, now) = (state.list.len(), state.current, Instant::now());
        let fresh = |i: &usize| state.list[*i].blamed.map_or(now, |at| at + BLAMED);
        let others = || (1..n).map(|step| (current + step) % n);
        let Some(next) = others().find(|i| fresh(i) <= now) else {
            return Err(others().map(|i| fresh(&i)).min());
        };
        let url = state.list[current].url.to_string();
        let (line, until) = (format!("{url} was left: {why}"), Some(now + TOLD));
        self.tell(state, url, Some(Trouble { line, until }));
        self.go(state, next, why);
        Ok(())
    }

    fn go(&self, state: &mut State, next: usize, why: &str) {
        let current = state.current;
        state.list[current].blamed = Some(Instant::now());
        let (from, to) = (state.list[current].url.clone(), state.list[next].url.clone());
        tracing::warn!("leaving the API server {from} for {to}: {why}");
        (state.current, state.held) = (next, None);
        (state.heard, state.pings) = (Instant::now(), false);
        self.moves.inc();
        self.renew_in(state);
    }

    /// Whoever has a connection makes a new one.
    pub(super) fn renew(&self) {
        self.renew_in(&mut self.state());
    }

    fn renew_in(&self, state: &mut State) {
        state.generation += 1;
        self.moved.send_replace(state.generation);
    }

    /// The server wants to be left alone for a while (`Retry-After`): nobody asks until then, or another is asked.
    pub(super) fn hold(&self, turn: &Turn, pause: Duration) {
        let why = (pause > WAITED).then(|| format!("it wants to be left alone for {pause:?}"));
        if why.as_ref().is_some_and(|why| self.blame(turn.generation, why)) {
            return;
        }
        let pause = pause.min(HELD);
        let mut state = self.state();
        if turn.generation == state.generation {
            state.held = Some((Instant::now() + pause + pause.mul_f64(fastrand::f64() / 5.0), why));
        }
    }

    /// These are the servers of this origin from now on. One that is in use stays.
    pub(super) fn set(&self, origin: Origin, urls: &[Uri]) {
        let mut state = self.state();
        let current = state.list.get(state.current).map(|server| server.url.clone());
        state.list.retain(|server| {
            server.origin != origin || urls.contains(&server.url) || current.as_ref() == Some(&server.url)
        });
        for url in urls {
            if !state.list.iter().any(|server| server.url == *url) {
                state.list.push(Server { url: url.clone(), origin, blamed: None });
                if origin != Origin::Given {
                    tracing::info!("one more API server is known: {url}");
                }
            }
        }
        state.list.sort_by_key(|server| server.origin);
        let place = state.list.iter().position(|server| Some(&server.url) == current.as_ref());
        state.current = place.unwrap_or(0);
    }

    /// Says what is wrong with a kind of objects or with the account, or that nothing is any longer.
    pub(super) fn trouble(&self, about: &str, line: Option<String>) {
        let trouble = line.map(|line| Trouble { line, until: None });
        self.tell(&mut self.state(), about.to_owned(), trouble);
    }

    fn tell(&self, state: &mut State, about: String, trouble: Option<Trouble>) {
        let before = match trouble {
            Some(trouble) => {
                let line = trouble.line.clone();
                state.troubles.insert(about, trouble).map(|before| before.line != line)
            }
            None => state.troubles.remove(&about).map(|_| true).or(Some(false)),
        };
        if before != Some(false) {
            self.told.notify_one();
        }
    }

    /// Everything that is wrong, whenever that changes.
    pub(super) async fn troubles(&self) -> Vec<String> {
        tokio::select! {
            () = self.told.notified() => {}
            () = tokio::time::sleep(TOLD / 10) => {} // Some of it is over by itself.
        }
        let mut state = self.state();
        state.troubles.retain(|_, trouble| trouble.until.is_none_or(|until| until > Instant::now()));
        state.troubles.values().map(|trouble| trouble.line.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(urls: &[&'static str]) -> Servers {
        Servers::new(urls.iter().map(|url| Uri::from_static(url)).collect(), Counter::default())
    }

    fn used(servers: &Servers) -> String {
        servers.current().unwrap().url.to_string()
    }

    #[test]
    fn one_failure_is_one_step_however_many_have_seen_it() {
        let servers = servers(&["https://a/", "https://b/", "https://c/"]);
        let turn = servers.current().unwrap();
        servers.failed(&turn, "refused");
        servers.failed(&turn, "refused");
        assert_eq!(used(&servers), "https://b/");
        servers.failed(&servers.current().unwrap(), "refused");
        servers.failed(&servers.current().unwrap(), "refused");
        assert_eq!(used(&servers), "https://a/");
    }

    #[test]
    fn a_server_whose_answers_are_of_no_use_is_not_gone_back_to_at_once() {
        let servers = servers(&["https://a/", "https://b/"]);
        assert!(servers.blame(servers.current().unwrap().generation, "cut"));
        assert_eq!(used(&servers), "https://b/");
        let told = servers.state().troubles["https://a/"].line.clone();
        assert_eq!(told, "https://a/ was left: cut");
        assert!(!servers.blame(servers.current().unwrap().generation, "cut"), "there is no third");
        assert_eq!(used(&servers), "https://b/");
    }

    #[test]
    fn learnt_servers_come_after_given_ones_and_the_one_in_use_stays() {
        let servers = servers(&["https://vip/"]);
        let learnt = ["https://10.0.0.1/", "https://10.0.0.2/"].map(Uri::from_static);
        servers.set(Origin::Local, &[Uri::from_static("https://127.0.0.1/")]);
        servers.set(Origin::Endpoints, &learnt);
        servers.failed(&servers.current().unwrap(), "no route");
        assert_eq!(used(&servers), "https://10.0.0.1/");
        servers.set(Origin::Endpoints, &learnt[1..]);
        assert_eq!(used(&servers), "https://10.0.0.1/");
        assert_eq!(servers.len(), 4);
        servers.set(Origin::Given, &[Uri::from_static("https://other/")]);
        assert_eq!((used(&servers), servers.len()), ("https://10.0.0.1/".into(), 4));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_busy_is_waited_for_unless_that_takes_long_and_there_is_another() {
        let waited = async |servers: &Servers| {
            let begun = Instant::now();
            assert!(servers.admit().await.is_none());
            begun.elapsed()
        };
        let (few, many) = (Duration::from_secs(2), Duration::from_secs(3600));
        let servers = servers(&["https://a/", "https://b/"]);
        let first = servers.current().unwrap();
        servers.hold(&first, few);
        assert!(waited(&servers).await >= few && used(&servers) == "https://a/");
        servers.hold(&first, many);
        assert_eq!((used(&servers).as_str(), waited(&servers).await), ("https://b/", Duration::ZERO));
        servers.hold(&first, few);
        assert_eq!(waited(&servers).await, Duration::ZERO, "another server is in use");
        servers.hold(&servers.current().unwrap(), many);
        // The first was left a moment ago; who waits is free when it can be asked again.
        assert_eq!((waited(&servers).await, used(&servers).as_str()), (BLAMED, "https://a/"));
        servers.set(Origin::Given, &[Uri::from_static("https://a/")]);
        servers.hold(&servers.current().unwrap(), many);
        let longest = waited(&servers).await;
        assert!((HELD..HELD * 2).contains(&longest), "{longest:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn while_none_answers_one_request_at_a_time_is_made() {
        let servers = std::sync::Arc::new(servers(&["https://a/"]));
        servers.exhausted();
        let asked = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
        for _ in 0..4 {
            let (servers, asked) = (servers.clone(), asked.clone());
            tokio::spawn(async move {
                loop {
                    let _admitted = servers.admit().await;
                    asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    servers.failed(&servers.current().unwrap(), "refused");
                    servers.exhausted();
                }
            });
        }
        tokio::time::sleep(Duration::from_secs(120)).await;
        let asked = asked.load(std::sync::atomic::Ordering::Relaxed);
        assert!((10..=30).contains(&asked), "{asked} requests in two minutes");
    }
}

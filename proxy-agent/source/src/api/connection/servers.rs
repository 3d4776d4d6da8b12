//! The API servers, configured and discovered, and failover between them: one is in use at a time.
//!
//! A server stays in use while it answers. One that cannot be reached, or whose answers are useless, is left for the
//! next, and all watches follow. While none answers, only one request at a time is sent, with exponential backoff. The
//! first answer lets the others go on. So it is with new connections, too: one request makes one, and the others use it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Uri, Version};
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{Mutex as Gate, MutexGuard as Admitted, Notify, watch};
use tokio::time::Instant;

use crate::api::backoff::{Backoff, between};

/// Backoff while no server answers.
const BACKOFF: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(10)];
/// After how long a node whose connection has broken makes another. Each has a time of its own: what breaks one connection
/// may break those of thousands.
const RESUME: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];
/// A server that was left is not used again for this long, whatever the others answer.
const COOLDOWN: Duration = Duration::from_secs(10);
/// A problem of a server that is no longer in use is shown for this long.
const PROBLEM_SHOWN: Duration = Duration::from_secs(300);
/// The longest `Retry-After` that is followed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
/// A longer `Retry-After` than this causes a failover.
const FAILOVER_AFTER: Duration = Duration::from_secs(5);

/// Where a server is known from, in the order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::api) enum Origin {
    /// Flags, a kubeconfig, or the environment of a pod.
    Configured,
    /// The endpoints of the `kubernetes` Service.
    Endpoints,
    /// kubeadm's ConfigMap `cluster-info`.
    ClusterInfo,
    /// Discovered by an earlier agent.
    Saved,
    /// KubePrism: Talos serves the API on each node.
    Local,
}

#[derive(Debug)]
struct Server {
    url: Uri,
    origin: Origin,
    /// When it was last left for another.
    left_at: Option<Instant>,
}

/// What is wrong, and until when it is shown; `None`: until it is solved.
#[derive(Debug)]
struct Problem {
    line: String,
    until: Option<Instant>,
}

#[derive(Debug)]
struct State {
    list: Vec<Server>,
    current: usize,
    generation: u64,
    /// No server answers: when the next request may be sent.
    next_attempt: Option<Instant>,
    /// Nothing has been answered yet on a connection that others could use.
    fresh: bool,
    backoff: Backoff,
    /// The `Retry-After` of the server in use; with a reason to fail over if that is long.
    retry_after: Option<(Instant, Option<String>)>,
    /// When the server in use last sent something.
    last_response: Instant,
    /// Whether its connections are HTTP/2: their PINGs notice when it hangs.
    http2: bool,
    /// By subject: a server's URL, a kind of objects, or the credentials.
    problems: BTreeMap<String, Problem>,
}

/// The servers of one cluster.
#[derive(Debug)]
pub(in crate::api) struct Servers {
    state: Mutex<State>,
    /// Counts failovers and changes of credentials: connections are renewed then.
    reconnect: watch::Sender<u64>,
    /// Held by whoever sends a request while no server answers.
    gate: Gate<()>,
    problems_changed: Notify,
    failovers: Counter,
    /// How long to wait after a connection has broken.
    resume_after: Duration,
}

/// The server that a request goes to.
#[derive(Clone, Debug)]
pub(in crate::api) struct Target {
    pub(in crate::api) url: Uri,
    generation: u64,
}

impl Target {
    /// The count of failovers and reconnects when it was chosen.
    pub(in crate::api) fn generation(&self) -> u64 {
        self.generation
    }
}

impl Servers {
    pub(in crate::api) fn new(configured: Vec<Uri>, failovers: Counter) -> Self {
        let list = configured
            .into_iter()
            .map(|url| Server { url, origin: Origin::Configured, left_at: None })
            .collect();
        let state = State {
            list,
            current: 0,
            generation: 0,
            next_attempt: None,
            fresh: true,
            backoff: Backoff::new(BACKOFF),
            retry_after: None,
            last_response: Instant::now(),
            http2: false,
            problems: BTreeMap::new(),
        };
        let (reconnect, gate, problems_changed) = (watch::Sender::new(0), Gate::new(()), Notify::new());
        let (state, resume_after) = (Mutex::new(state), between(RESUME));
        Self { state, reconnect, gate, problems_changed, failovers, resume_after }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server in use; `None` when there is none at all.
    pub(in crate::api) fn current(&self) -> Option<Target> {
        let state = self.state();
        let url = state.list.get(state.current)?.url.clone();
        Some(Target { url, generation: state.generation })
    }

    pub(in crate::api) fn len(&self) -> usize {
        self.state().list.len()
    }

    /// Whether it was discovered: the operator has not configured it.
    pub(in crate::api) fn is_discovered(&self, url: &Uri) -> bool {
        let state = self.state();
        let mut same = state.list.iter().filter(|server| server.url.authority() == url.authority());
        same.any(|server| server.origin != Origin::Configured)
    }

    /// Notified when connections are to be renewed.
    pub(in crate::api) fn subscribe(&self) -> watch::Receiver<u64> {
        self.reconnect.subscribe()
    }

    /// Waits until a request may be sent, which may be one that only reads. While no server answers only one caller at a time is
    /// admitted, and so it is on a new connection, but for writes: they may wait for storage that no reader needs.
    pub(in crate::api) async fn admit(&self, reads: bool) -> Option<Admitted<'_, ()>> {
        loop {
            let mut reconnect = self.subscribe();
            let Some(until) = self.wait_until() else { break };
            tokio::select! {
                () = tokio::time::sleep_until(until) => {}
                _ = reconnect.changed() => {} // Another server has not asked us to wait.
            }
        }
        let alone = || {
            let state = self.state();
            (state.fresh && reads || state.next_attempt.is_some()).then_some(state.next_attempt)
        };
        alone()?;
        let admitted = self.gate.lock().await;
        let mut reconnect = self.subscribe();
        if let Some(at) = alone()? {
            tokio::select! {
                () = tokio::time::sleep_until(at) => {}
                _ = reconnect.changed() => {}
            }
        }
        Some(admitted)
    }

    /// A connection has broken, which its requests notice together: waits as long as each of them.
    pub(in crate::api) async fn broken(&self) {
        self.state().fresh = true;
        tokio::time::sleep(self.resume_after).await;
    }

    /// How long to wait because of `Retry-After`: until it ends, or until another server's cooldown does. `None` if there is
    /// none, or after a failover.
    fn wait_until(&self) -> Option<Instant> {
        let (now, mut state) = (Instant::now(), self.state());
        let (until, why) = state.retry_after.clone().filter(|(until, _)| *until > now)?;
        let Some(why) = why else { return Some(until) };
        match self.fail_over(&mut state, &why) {
            Ok(()) => None,
            Err(fresh) => Some(fresh.map_or(until, |fresh| fresh.min(until))),
        }
    }

    /// The server in use has sent something.
    pub(in crate::api) fn received(&self) {
        self.state().last_response = Instant::now();
    }

    /// For how long the server in use has sent nothing. `None` if it is not to be probed: HTTP/2 does that, it has sent
    /// `Retry-After`, or it is known to be down.
    pub(in crate::api) fn idle_for(&self) -> Option<Duration> {
        let state = self.state();
        let held = state.retry_after.as_ref().is_some_and(|(held, _)| *held > Instant::now());
        (!state.http2 && !held && state.next_attempt.is_none()).then(|| state.last_response.elapsed())
    }

    /// A server has answered, with whatever status.
    pub(in crate::api) fn answered(&self, target: &Target, version: Version) {
        let mut state = self.state();
        if target.generation == state.generation {
            (state.last_response, state.http2) = (Instant::now(), version == Version::HTTP_2);
        }
        (state.next_attempt, state.fresh) = (None, false);
        state.backoff.reset();
        if state.problems.remove(&target.url.to_string()).is_some() {
            self.problems_changed.notify_one();
        }
    }

    /// A server cannot be reached or does not answer: fails over to the next, if there is one.
    pub(in crate::api) fn failed(&self, target: &Target, why: &str) {
        let mut state = self.state();
        let alone = state.list.len() < 2;
        let until = (!alone).then(|| Instant::now() + PROBLEM_SHOWN);
        let line = format!("{} cannot be used: {why}", target.url);
        self.update_problem(&mut state, target.url.to_string(), Some(Problem { line, until }));
        if target.generation == state.generation && !alone {
            let next = (state.current + 1) % state.list.len();
            self.switch_to(&mut state, next, why);
        }
    }

    /// The server in use does not answer any more, although it did: its watches are dead, too.
    pub(in crate::api) fn unresponsive(&self, target: &Target, why: &str) {
        if target.generation != self.state().generation {
            return; // Another task has noticed that already.
        }
        self.failed(target, why);
        if self.len() < 2 {
            self.all_failed();
            self.reconnect();
        }
    }

    /// The problem of the server in use, if none answers.
    pub(in crate::api) fn unreachable(&self) -> Option<String> {
        let state = self.state();
        state.next_attempt?;
        let server = state.list.get(state.current)?;
        state.problems.get(&server.url.to_string()).map(|problem| problem.line.clone())
    }

    /// No server has answered: backs off.
    pub(in crate::api) fn all_failed(&self) {
        let mut state = self.state();
        let pause = state.backoff.pause();
        state.next_attempt = Some(Instant::now() + pause);
    }

    /// The answers of the server in use are useless: fails over. `false` if all others are in cooldown.
    pub(in crate::api) fn reject(&self, generation: u64, why: &str) -> bool {
        let mut state = self.state();
        if generation != state.generation {
            return true; // Another task has noticed that already.
        }
        self.fail_over(&mut state, why).is_ok()
    }

    /// Switches to the next server that is not in cooldown. If there is none, when there will be one.
    fn fail_over(&self, state: &mut State, why: &str) -> Result<(), Option<Instant>> {
        let (n, current, now) = (state.list.len(), state.current, Instant::now());
        let fresh = |i: &usize| state.list[*i].left_at.map_or(now, |at| at + COOLDOWN);
        let others = || (1..n).map(|step| (current + step) % n);
        let Some(next) = others().find(|i| fresh(i) <= now) else {
            return Err(others().map(|i| fresh(&i)).min());
        };
        let url = state.list[current].url.to_string();
        let (line, until) = (format!("{url} was left: {why}"), Some(now + PROBLEM_SHOWN));
        self.update_problem(state, url, Some(Problem { line, until }));
        self.switch_to(state, next, why);
        Ok(())
    }

    fn switch_to(&self, state: &mut State, next: usize, why: &str) {
        let current = state.current;
        state.list[current].left_at = Some(Instant::now());
        let (from, to) = (state.list[current].url.clone(), state.list[next].url.clone());
        tracing::warn!("failing over from the API server {from} to {to}: {why}");
        (state.current, state.retry_after) = (next, None);
        (state.last_response, state.http2) = (Instant::now(), false);
        self.failovers.inc();
        self.reconnect_in(state);
    }

    /// Has all connections renewed.
    pub(in crate::api) fn reconnect(&self) {
        self.reconnect_in(&mut self.state());
    }

    fn reconnect_in(&self, state: &mut State) {
        (state.generation, state.fresh) = (state.generation + 1, true);
        self.reconnect.send_replace(state.generation);
    }

    /// The server has sent `Retry-After`: requests wait until then, or go to another server.
    pub(in crate::api) fn retry_after(&self, target: &Target, pause: Duration) {
        let why = (pause > FAILOVER_AFTER).then(|| format!("it asks to retry after {pause:?}"));
        if why.as_ref().is_some_and(|why| self.reject(target.generation, why)) {
            return;
        }
        let pause = pause.min(MAX_RETRY_AFTER);
        let mut state = self.state();
        if target.generation == state.generation {
            state.retry_after = Some((Instant::now() + pause + pause.mul_f64(fastrand::f64() / 5.0), why));
        }
    }

    /// Replaces the servers of this origin. The one in use stays.
    pub(in crate::api) fn set(&self, origin: Origin, urls: &[Uri]) {
        let mut state = self.state();
        let current = state.list.get(state.current).map(|server| server.url.clone());
        state.list.retain(|server| {
            server.origin != origin || urls.contains(&server.url) || current.as_ref() == Some(&server.url)
        });
        for url in urls {
            if !state.list.iter().any(|server| server.url == *url) {
                state.list.push(Server { url: url.clone(), origin, left_at: None });
                if origin != Origin::Configured {
                    tracing::info!("discovered the API server {url}");
                }
            }
        }
        state.list.sort_by_key(|server| server.origin);
        let place = state.list.iter().position(|server| Some(&server.url) == current.as_ref());
        state.current = place.unwrap_or(0);
    }

    /// Sets or clears the problem of a kind of objects or of the credentials.
    pub(in crate::api) fn set_problem(&self, about: &str, line: Option<String>) {
        let problem = line.map(|line| Problem { line, until: None });
        self.update_problem(&mut self.state(), about.to_owned(), problem);
    }

    fn update_problem(&self, state: &mut State, about: String, problem: Option<Problem>) {
        let before = match problem {
            Some(problem) => {
                let line = problem.line.clone();
                state.problems.insert(about, problem).map(|before| before.line != line)
            }
            None => state.problems.remove(&about).map(|_| true).or(Some(false)),
        };
        if before != Some(false) {
            self.problems_changed.notify_one();
        }
    }

    /// Waits until the problems change, and returns them all.
    pub(in crate::api) async fn problems(&self) -> Vec<String> {
        tokio::select! {
            () = self.problems_changed.notified() => {}
            () = tokio::time::sleep(PROBLEM_SHOWN / 10) => {} // Some expire.
        }
        let mut state = self.state();
        state.problems.retain(|_, problem| problem.until.is_none_or(|until| until > Instant::now()));
        state.problems.values().map(|problem| problem.line.clone()).collect()
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
        let target = servers.current().unwrap();
        servers.failed(&target, "refused");
        servers.failed(&target, "refused");
        assert_eq!(used(&servers), "https://b/");
        servers.failed(&servers.current().unwrap(), "refused");
        servers.failed(&servers.current().unwrap(), "refused");
        assert_eq!(used(&servers), "https://a/");
    }

    #[test]
    fn a_server_whose_answers_are_of_no_use_is_not_gone_back_to_at_once() {
        let servers = servers(&["https://a/", "https://b/"]);
        assert!(servers.reject(servers.current().unwrap().generation, "cut"));
        assert_eq!(used(&servers), "https://b/");
        let problem = servers.state().problems["https://a/"].line.clone();
        assert_eq!(problem, "https://a/ was left: cut");
        assert!(!servers.reject(servers.current().unwrap().generation, "cut"), "there is no third");
        assert_eq!(used(&servers), "https://b/");
    }

    #[test]
    fn discovered_servers_come_after_configured_ones_and_the_one_in_use_stays() {
        let servers = servers(&["https://vip/"]);
        let discovered = ["https://10.0.0.1/", "https://10.0.0.2/"].map(Uri::from_static);
        servers.set(Origin::Local, &[Uri::from_static("https://127.0.0.1/")]);
        servers.set(Origin::Endpoints, &discovered);
        servers.failed(&servers.current().unwrap(), "no route");
        assert_eq!(used(&servers), "https://10.0.0.1/");
        servers.set(Origin::Endpoints, &discovered[1..]);
        assert_eq!(used(&servers), "https://10.0.0.1/");
        assert_eq!(servers.len(), 4);
        servers.set(Origin::Configured, &[Uri::from_static("https://other/")]);
        assert_eq!((used(&servers), servers.len()), ("https://10.0.0.1/".into(), 4));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_busy_is_waited_for_unless_that_takes_long_and_there_is_another() {
        let waited = async |servers: &Servers| {
            let begun = Instant::now();
            drop(servers.admit(true).await);
            begun.elapsed()
        };
        let (few, many) = (Duration::from_secs(2), Duration::from_secs(3600));
        let servers = servers(&["https://a/", "https://b/"]);
        let first = servers.current().unwrap();
        servers.retry_after(&first, few);
        assert!(waited(&servers).await >= few && used(&servers) == "https://a/");
        servers.retry_after(&first, many);
        assert_eq!((used(&servers).as_str(), waited(&servers).await), ("https://b/", Duration::ZERO));
        servers.retry_after(&first, few);
        assert_eq!(waited(&servers).await, Duration::ZERO, "another server is in use");
        servers.retry_after(&servers.current().unwrap(), many);
        // The first was left a moment ago; the wait ends with its cooldown.
        assert_eq!((waited(&servers).await, used(&servers).as_str()), (COOLDOWN, "https://a/"));
        servers.set(Origin::Configured, &[Uri::from_static("https://a/")]);
        servers.retry_after(&servers.current().unwrap(), many);
        let longest = waited(&servers).await;
        assert!((MAX_RETRY_AFTER..MAX_RETRY_AFTER * 2).contains(&longest), "{longest:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_request_goes_ahead_on_a_new_connection_and_its_answer_admits_the_others() {
        let servers = servers(&["https://a/", "https://b/"]);
        let target = servers.current().unwrap();
        let waits = async |servers: &Servers| {
            tokio::time::timeout(Duration::from_secs(60), servers.admit(true)).await.is_err()
        };
        let first = servers.admit(true).await;
        assert!(first.is_some() && waits(&servers).await, "nothing is answered yet");
        assert!(servers.admit(false).await.is_none(), "what writes has not to wait, and nobody waits for it");
        servers.answered(&target, Version::HTTP_2);
        drop(first);
        assert!(servers.admit(true).await.is_none() && servers.admit(true).await.is_none());
        servers.broken().await;
        let first = servers.admit(true).await;
        assert!(first.is_some() && waits(&servers).await, "a new connection");
        servers.answered(&target, Version::HTTP_2);
        drop(first);
        servers.failed(&target, "refused");
        assert!(servers.admit(true).await.is_some(), "another server");
    }

    #[tokio::test(start_paused = true)]
    async fn nodes_whose_connections_break_together_come_back_one_by_one() {
        let mut pauses = Vec::new();
        for _ in 0..1000 {
            let servers = servers(&["https://a/"]);
            let begun = Instant::now();
            servers.broken().await;
            pauses.push(begun.elapsed().as_millis());
            let again = Instant::now();
            servers.broken().await;
            assert_eq!(
                again.elapsed().as_millis(),
                *pauses.last().unwrap(),
                "all of a node's watches together"
            );
        }
        // Tenths of a second of which each has its share of the thousand, or nearly.
        let tenth = |n| pauses.iter().filter(|pause| **pause / 100 == n).count();
        assert!((1..10).all(|n| (50..=170).contains(&tenth(n))), "{pauses:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn while_none_answers_one_request_at_a_time_is_sent() {
        let servers = std::sync::Arc::new(servers(&["https://a/"]));
        servers.all_failed();
        let asked = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
        for _ in 0..4 {
            let (servers, asked) = (servers.clone(), asked.clone());
            tokio::spawn(async move {
                loop {
                    let _admitted = servers.admit(true).await;
                    asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    servers.failed(&servers.current().unwrap(), "refused");
                    servers.all_failed();
                }
            });
        }
        tokio::time::sleep(Duration::from_secs(120)).await;
        let asked = asked.load(std::sync::atomic::Ordering::Relaxed);
        assert!((10..=30).contains(&asked), "{asked} requests in two minutes");
    }
}

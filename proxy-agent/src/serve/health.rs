//! `/healthz` and `/livez`: whether each family is in step, and whether the node wants traffic (H-1…H-13).
//!
//! One shared [`Health`] value is fed by the run loop and read by the servers; the clock comes from outside.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use jiff::Timestamp;
use serde::Serialize;

use agent_core::model::Family;

/// Twice the default sync period (H-4).
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// A moment on both clocks: ages are measured on the steady one, people read the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// On a clock that never jumps.
    pub steady: Instant,
    /// On the calendar.
    pub wall: Timestamp,
}

/// Where moments come from.
pub trait Clock: Send + Sync + 'static {
    /// The present one.
    fn now(&self) -> Moment;
}

/// The clocks of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Moment {
        Moment { steady: Instant::now(), wall: Timestamp::now() }
    }
}

/// One family.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// The first request that no success has answered yet.
    queued: Option<Instant>,
    /// The last request.
    last_queued: Option<Timestamp>,
    /// The last success; at first the start of the loop.
    updated: Option<Timestamp>,
    /// The last success proper.
    succeeded: Option<Timestamp>,
}

#[derive(Debug, Default)]
struct State {
    families: BTreeMap<Family, Progress>,
    eligible: bool,
    /// Hooks that should carry programs do not: some traffic is not served.
    unserved: bool,
}

/// The answers given so far, by path and code (H-40, H-41).
#[derive(Debug, Default)]
struct Answers {
    healthz: [AtomicU64; 2],
    livez: [AtomicU64; 2],
}

/// How the proxy fares, shared between the run loop and the servers.
pub struct Health {
    clock: Box<dyn Clock>,
    /// How long a wanted sync may take to succeed.
    timeout: Duration,
    state: Mutex<State>,
    answers: Answers,
}

/// When a family was last wanted and last in step, in Unix seconds (H-33, H-34).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// The family.
    pub family: Family,
    /// Last request for a sync.
    pub queued: Option<f64>,
    /// Last successful sync.
    pub synced: Option<f64>,
}

/// `IPv4` or `IPv6`, as labels and keys have it.
#[must_use]
pub fn family_name(family: Family) -> &'static str {
    family.name()
}

impl Health {
    /// Nothing known yet: no family, and a node that has not been seen is not eligible (T-104).
    #[must_use]
    pub fn new(clock: impl Clock) -> Self {
        Self {
            clock: Box::new(clock),
            timeout: TIMEOUT,
            state: Mutex::default(),
            answers: Answers::default(),
        }
    }

    /// With another patience than [`TIMEOUT`].
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The loop has begun to serve `family`: it counts as in step until a sync is wanted (H-6).
    pub fn started(&self, family: Family) {
        let now = self.clock.now();
        let mut state = self.lock();
        let sync = state.families.entry(family).or_default();
        sync.updated = Some(now.wall);
        sync.last_queued = Some(now.wall);
    }

    /// A sync of `family` is wanted. Only the first request since the last success starts the clock (H-4).
    pub fn queued(&self, family: Family) {
        let now = self.clock.now();
        let mut state = self.lock();
        let sync = state.families.entry(family).or_default();
        sync.queued.get_or_insert(now.steady);
        sync.last_queued = Some(now.wall);
    }

    /// A sync of `family` has succeeded (H-5).
    pub fn synced(&self, family: Family) {
        let now = self.clock.now();
        let mut state = self.lock();
        let sync = state.families.entry(family).or_default();
        sync.queued = None;
        sync.updated = Some(now.wall);
        sync.succeeded = Some(now.wall);
    }

    /// Whether the node wants traffic (H-8). Not to be called when the Node object has gone: the last one
    /// counts. A source that has no Nodes (a directory) says true once.
    pub fn node_eligible(&self, eligible: bool) {
        self.lock().eligible = eligible;
    }

    /// Whether hooks lack their programs, so that traffic is not served however the tables are. No restart would help: it
    /// is nothing for liveness probes.
    pub fn unserved(&self, unserved: bool) {
        self.lock().unserved = unserved;
    }

    /// Whether every family is in step (H-7), and traffic is served.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.report().serves()
    }

    /// Requests and successes of each family.
    #[must_use]
    pub fn times(&self) -> Vec<Times> {
        let seconds = |time: Option<Timestamp>| time.map(|t| t.as_duration().as_secs_f64());
        let state = self.lock();
        let of = |(family, sync): (&Family, &Progress)| Times {
            family: *family,
            queued: seconds(sync.last_queued),
            synced: seconds(sync.succeeded),
        };
        state.families.iter().map(of).collect()
    }

    /// Answers given: path, code, number.
    #[must_use]
    pub fn answers(&self) -> [(&'static str, u16, u64); 4] {
        let Answers { healthz: [healthz_ok, healthz_ill], livez: [livez_ok, livez_ill] } = &self.answers;
        let count = |answers: &AtomicU64| answers.load(Ordering::Relaxed);
        [
            ("healthz", 200, count(healthz_ok)),
            ("healthz", 503, count(healthz_ill)),
            ("livez", 200, count(livez_ok)),
            ("livez", 503, count(livez_ill)),
        ]
    }

    fn report(&self) -> Report {
        let now = self.clock.now();
        let state = self.lock();
        let status: BTreeMap<_, _> = state
            .families
            .iter()
            .filter_map(|(family, sync)| {
                let late =
                    sync.queued.is_some_and(|queued| now.steady.duration_since(queued) >= self.timeout);
                Some((*family, FamilyStatus { last_updated: sync.updated?, healthy: !late }))
            })
            .collect();
        Report {
            now: now.wall,
            eligible: state.eligible,
            unserved: state.unserved,
            healthy: status.values().all(|family| family.healthy),
            status,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics with the lock held; if some did, the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Health").field("state", &self.state).finish_non_exhaustive()
    }
}

/// What is the case at one moment.
struct Report {
    now: Timestamp,
    eligible: bool,
    unserved: bool,
    healthy: bool,
    status: BTreeMap<Family, FamilyStatus>,
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyStatus {
    last_updated: Timestamp,
    healthy: bool,
}

/// The body, its keys in this order (H-3).
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    last_updated: Timestamp,
    current_time: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    status: BTreeMap<&'static str, FamilyStatus>,
}

impl Report {
    fn serves(&self) -> bool {
        self.healthy && !self.unserved
    }

    /// The body for `code`: with 200 it was updated just now, otherwise with the newest family (H-11).
    fn body(&self, ok: bool, healthy: bool, node_eligible: Option<bool>) -> Body {
        let newest = self.status.values().map(|family| family.last_updated).max();
        Body {
            last_updated: if ok { self.now } else { newest.unwrap_or(Timestamp::UNIX_EPOCH) },
            current_time: self.now,
            node_eligible,
            healthy,
            status: self.status.iter().map(|(family, status)| (family_name(*family), *status)).collect(),
        }
    }
}

/// The two paths, any method (H-1).
pub fn router(health: Arc<Health>) -> Router {
    let (of_healthz, of_livez) = (Arc::clone(&health), health);
    Router::new()
        .route("/healthz", any(async move || healthz(&of_healthz)))
        .route("/livez", any(async move || livez(&of_livez)))
}

/// For load balancers: in step, every hook carries its programs, and the node wants traffic (H-9).
fn healthz(health: &Health) -> Response {
    let report = health.report();
    let ok = report.serves() && report.eligible;
    answer(ok, &report.body(ok, report.serves(), Some(report.eligible)), &health.answers.healthz)
}

/// For liveness probes: in step.
fn livez(health: &Health) -> Response {
    let report = health.report();
    answer(report.healthy, &report.body(report.healthy, report.healthy, None), &health.answers.livez)
}

fn answer(ok: bool, body: &Body, [fine, ill]: &[AtomicU64; 2]) -> Response {
    let (code, counter) = match ok {
        true => (StatusCode::OK, fine),
        false => (StatusCode::SERVICE_UNAVAILABLE, ill),
    };
    counter.fetch_add(1, Ordering::Relaxed);
    let headers = [(CONTENT_TYPE, "application/json"), (X_CONTENT_TYPE_OPTIONS, "nosniff")];
    match serde_json::to_string(body) {
        Ok(text) => (code, headers, text).into_response(),
        Err(e) => (StatusCode::SERVICE_UNAVAILABLE, e.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::ask;
    use super::*;

    /// A clock that stands until it is moved.
    #[derive(Clone)]
    struct Fake(Arc<Mutex<Moment>>);

    impl Clock for Fake {
        fn now(&self) -> Moment {
            *self.0.lock().unwrap()
        }
    }

    impl Fake {
        fn forward(&self, seconds: u64) {
            let mut now = self.0.lock().unwrap();
            let by = Duration::from_secs(seconds);
            *now = Moment { steady: now.steady + by, wall: now.wall + by };
        }
    }

    /// A node that has been seen, both families in step at 2026-01-01T00:00:00.5Z (T-95).
    fn fresh() -> (Arc<Health>, Fake) {
        let wall = "2026-01-01T00:00:00.5Z".parse().unwrap();
        let clock = Fake(Arc::new(Mutex::new(Moment { steady: Instant::now(), wall })));
        let health = Arc::new(Health::new(clock.clone()));
        health.node_eligible(true);
        health.synced(Family::V4);
        health.synced(Family::V6);
        (health, clock)
    }

    /// Codes of /healthz and /livez.
    fn codes(health: &Health) -> (u16, u16) {
        (healthz(health).status().as_u16(), livez(health).status().as_u16())
    }

    #[test]
    fn a_late_family_is_ill_until_it_is_itself_in_step_again() {
        // H-4, H-5, H-7, H-9; answers are counted (H-40, H-41).
        let (health, clock) = fresh();
        assert_eq!(codes(&health), (200, 200), "T-95");
        health.queued(Family::V4);
        clock.forward(59);
        assert_eq!(codes(&health), (200, 200), "T-96");
        clock.forward(1);
        assert_eq!(codes(&health), (503, 503), "T-97");
        clock.forward(1);
        health.synced(Family::V6);
        assert_eq!(codes(&health), (503, 503), "T-98");
        health.synced(Family::V4);
        assert_eq!(codes(&health), (200, 200), "T-99");
        assert!(health.is_healthy());
        assert_eq!(
            health.answers(),
            [("healthz", 200, 3), ("healthz", 503, 2), ("livez", 200, 3), ("livez", 503, 2)]
        );
    }

    #[test]
    fn a_later_request_does_not_start_the_clock_anew() {
        // H-4.
        let (health, clock) = fresh();
        health.queued(Family::V4);
        clock.forward(50);
        health.queued(Family::V4);
        clock.forward(11);
        assert_eq!(codes(&health), (503, 503), "T-100");
    }

    #[test]
    fn a_node_on_its_way_out_is_alive_but_wants_no_traffic() {
        let (health, _) = fresh();
        // Taints and deletion become this one word in `source` (H-8).
        health.node_eligible(false);
        assert_eq!(codes(&health), (503, 200), "T-101, T-103");
        health.node_eligible(true);
        assert_eq!(codes(&health), (200, 200), "T-102");
    }

    #[test]
    fn a_node_never_seen_wants_no_traffic() {
        let health = Health::new(SystemClock);
        health.started(Family::V4);
        assert_eq!(codes(&health), (503, 200), "T-104");
    }

    #[test]
    fn patience_follows_the_sync_period() {
        // H-4.
        let (_, clock) = fresh();
        let health = Health::new(clock.clone()).with_timeout(Duration::from_secs(20));
        health.started(Family::V4);
        health.queued(Family::V4);
        clock.forward(19);
        assert!(health.is_healthy());
        clock.forward(1);
        assert!(!health.is_healthy());
    }

    #[test]
    fn the_proxy_is_healthy_before_its_first_pass() {
        let (_, clock) = fresh();
        let health = Health::new(clock.clone());
        health.started(Family::V4);
        clock.forward(3600);
        assert!(health.is_healthy(), "H-6");
        assert_eq!(health.times()[0].synced, None);
        health.queued(Family::V6);
        clock.forward(3600);
        assert!(health.is_healthy(), "a family without lastUpdated is not considered (H-6)");
    }

    #[tokio::test]
    async fn healthz_answers_byte_for_byte_as_documented() {
        // H-2, H-3, H-11.
        let (health, clock) = fresh();
        clock.forward(2);
        let response = ask(router(Arc::clone(&health)), "GET", "/healthz").await;
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
        assert!(response.contains("content-type: application/json\r\n"), "{response}");
        assert!(response.contains("x-content-type-options: nosniff\r\n"), "{response}");
        let body = response.split("\r\n\r\n").nth(1).unwrap();
        assert_eq!(
            body,
            concat!(
                r#"{"lastUpdated":"2026-01-01T00:00:02.5Z","currentTime":"2026-01-01T00:00:02.5Z","#,
                r#""nodeEligible":true,"healthy":true,"status":{"#,
                r#""IPv4":{"lastUpdated":"2026-01-01T00:00:00.5Z","healthy":true},"#,
                r#""IPv6":{"lastUpdated":"2026-01-01T00:00:00.5Z","healthy":true}}}"#
            )
        );
    }

    #[tokio::test]
    async fn an_ineligible_node_says_healthy_with_503_and_its_newest_update() {
        // H-9, H-10, H-11.
        let (health, clock) = fresh();
        health.node_eligible(false);
        clock.forward(2);
        let response = ask(router(Arc::clone(&health)), "POST", "/healthz").await;
        assert!(response.starts_with("HTTP/1.1 503 "), "{response}");
        let expected = concat!(
            r#"{"lastUpdated":"2026-01-01T00:00:00.5Z","currentTime":"2026-01-01T00:00:02.5Z","#,
            r#""nodeEligible":false,"healthy":true,"#
        );
        assert!(response.contains(expected), "{response}");
    }

    #[tokio::test]
    async fn livez_does_not_speak_of_the_node_and_other_paths_are_not_found() {
        // H-1, H-3.
        let (health, _) = fresh();
        let response = ask(router(Arc::clone(&health)), "PUT", "/livez").await;
        assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
        assert!(!response.contains("nodeEligible"), "{response}");
        for path in ["/", "/healthz/", "/readyz", "/healthz/x"] {
            let response = ask(router(Arc::clone(&health)), "GET", path).await;
            assert!(response.starts_with("HTTP/1.1 404 "), "{path}: {response}");
        }
    }

    #[test]
    fn without_any_family_there_is_no_status() {
        let health = Health::new(SystemClock);
        let body = serde_json::to_value(health.report().body(true, true, None)).unwrap();
        assert!(body.get("status").is_none() && body["healthy"] == true, "{body}");
    }
}

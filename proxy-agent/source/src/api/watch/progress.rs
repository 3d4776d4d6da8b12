//! The state of one reflector between its watches, and what all reflectors share.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::end_reason::EndReason;
use super::stall::StallDetector;
use crate::api::backoff::Backoff;
use crate::api::connection::{Requests, Servers};

/// Backoff between attempts that fail although the server can be reached.
const BACKOFF: [Duration; 2] = [Duration::from_millis(800), Duration::from_secs(15)];

/// How recent a list has to be (`resourceVersionMatch`).
#[derive(Clone, Debug)]
pub(super) enum ListVersion {
    /// Whatever the server's cache has: nothing is known yet.
    Any,
    NotOlderThan(String),
    /// From etcd.
    MostRecent,
}

/// The state of one reflector between its watches.
pub(super) struct Progress {
    /// Whether the server supports streaming lists.
    pub(super) streaming: bool,
    /// The resource version from which the next watch starts; `None`: a relist is needed.
    pub(super) version: Option<String>,
    /// The newest resource version seen.
    pub(super) newest: u64,
    pub(super) list_version: ListVersion,
    /// Since when the server has only shown an older state.
    pub(super) older_since: Option<Instant>,
    /// When the last event or bookmark came.
    pub(super) last_event: Instant,
    pub(super) stall: StallDetector,
    /// When a resource version was last answered with 410.
    pub(super) expired_at: Option<Instant>,
    pub(super) backoff: Backoff,
    /// Watches in a row that ended early.
    pub(super) short_watches: u32,
    /// The generation of the server that last answered 429.
    pub(super) throttled_by: Option<u64>,
    /// Rejections (4xx) in a row.
    pub(super) rejections: u32,
    /// Whether it was logged that the server does not serve this kind.
    pub(super) unavailable: bool,
    /// The last warning that was logged.
    pub(super) last_warning: String,
    /// Notified when connections are to be renewed.
    pub(super) reconnect: watch::Receiver<u64>,
    /// The generation of the server that answered last.
    pub(super) generation: u64,
}

impl Progress {
    /// Nothing is known yet. `reconnect` is notified when connections are to be renewed.
    pub(super) fn new(reconnect: watch::Receiver<u64>) -> Self {
        Self {
            streaming: true,
            version: None,
            newest: 0,
            list_version: ListVersion::Any,
            older_since: None,
            last_event: Instant::now(),
            stall: StallDetector::default(),
            expired_at: None,
            backoff: Backoff::new(BACKOFF),
            short_watches: 0,
            throttled_by: None,
            rejections: 0,
            unavailable: false,
            last_warning: String::new(),
            reconnect,
            generation: 0,
        }
    }

    /// Notes which server has answered; a failover since then counts as new.
    pub(super) fn note_responder(&mut self, by: Option<u64>) {
        let now = *self.reconnect.borrow_and_update();
        self.generation = by.unwrap_or(now);
        if self.generation != now {
            self.reconnect.mark_changed();
        }
    }

    /// Why a watch ends that is given up because no event came.
    pub(super) fn idle_end(&mut self) -> EndReason {
        if self.stall.on_idle(self.generation) { EndReason::Stalled } else { EndReason::Idle }
    }
}

/// What reflectors share.
#[derive(Clone)]
pub(in crate::api) struct Shared {
    pub(in crate::api) servers: Arc<Servers>,
    pub(in crate::api) requests: Requests,
    /// Has the credentials read again.
    pub(in crate::api) reload: Arc<Notify>,
}

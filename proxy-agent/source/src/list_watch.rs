//! List, then watch, for ever, and what happens with a server that breaks this protocol (Y-5).
//!
//! `kube` sends the single requests. Its own watcher is of no use here: it retries at once when a watch ends, and does not
//! show its resource version. Here a watch has to prove that it works. An idle one is restarted from its last resource
//! version: that costs the server next to nothing, brings events that were missed, and shows whether it answers at all.
//! A watch that ends early is restarted after a backoff, or on another server if there is one. `end_reason` has why a
//! watch ended, `recovery` what is done about it, and `stall` whether an idle one is stalled.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use kube::Api;
use kube::api::{ListParams, VersionMatch, WatchEvent, WatchParams};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::backoff::Backoff;
use super::decoded::Decoded;
use super::end_reason::{EndReason, PROVEN_AFTER, ROLLBACK_AFTER};
use super::reflector::{Closed, Known, Listing, Reflector};
use super::requests::Requests;
use super::servers::Servers;
use super::stall::{StallDetector, idle_after};
use super::transport::with_responder;

/// Backoff between attempts that fail although the server can be reached.
const BACKOFF: [Duration; 2] = [Duration::from_millis(800), Duration::from_secs(15)];
/// A watch that has lasted this long counts as connected, even without an event.
const CONNECTED_AFTER: Duration = Duration::from_secs(2);
/// A streaming list that pauses for this long is not supported by the server: it sent all objects and will never send
/// the bookmark that ends the list.
const STREAMING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a whole list may take. Over a slow link a large cluster's takes a minute.
const LIST_TIMEOUT: Duration = Duration::from_secs(180);
/// More objects of one kind than any cluster has.
const MAX_OBJECTS: usize = 250_000;
/// Empty pages in a row: a real server fills its pages.
const MAX_EMPTY_PAGES: usize = 16;
/// Objects in a page of a list, as `client-go` has it.
const PAGE_SIZE: u32 = 500;

type Events<K> = BoxStream<'static, kube::Result<WatchEvent<Decoded<K>>>>;

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
    /// Notes which server has answered; a failover since then counts as new.
    fn note_responder(&mut self, by: Option<u64>) {
        let now = *self.reconnect.borrow_and_update();
        self.generation = by.unwrap_or(now);
        if self.generation != now {
            self.reconnect.mark_changed();
        }
    }
}

/// What reflectors share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) servers: Arc<Servers>,
    pub(super) requests: Requests,
    /// Has the credentials read again.
    pub(super) reload: Arc<Notify>,
}

impl<K, T> Reflector<K, T>
where
    K: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    T: Hash + Send + 'static,
{
    /// Runs until the receiver is dropped. `single` is a subset of these objects that is cheap to list: its resource version
    /// is compared when a watch is idle.
    pub(super) async fn run(self, api: Api<Decoded<K>>, single: Option<Api<Decoded<K>>>, shared: Shared) {
        let mut known = Known::default();
        let mut progress = Progress {
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
            reconnect: shared.servers.subscribe(),
            generation: 0,
        };
        loop {
            let round = async {
                if let Some(single) = &single {
                    self.ask_version(single, &mut progress).await;
                }
                let end = self.list_and_watch(&api, &mut known, &mut progress, &shared).await?;
                self.recover(end, &mut progress, &shared).await
            };
            if round.await.is_err() {
                return;
            }
        }
    }

    /// Lists if needed, then watches until the watch ends.
    async fn list_and_watch(
        &self,
        api: &Api<Decoded<K>>,
        known: &mut Known,
        progress: &mut Progress,
        shared: &Shared,
    ) -> Result<EndReason, Closed> {
        // A streaming list is a watch: it would stall like the others.
        let streaming = progress.streaming && !progress.stall.is_stalled();
        let listed = match (&progress.version, streaming) {
            (Some(_), _) => Ok(None),
            (None, true) => self.streaming_list(api, known, progress).await?.map(Some),
            (None, false) => self.paged_list(api, known, progress).await?.map(|()| None),
        };
        let began = match listed {
            Ok(Some(events)) => Ok(events),
            Ok(None) => {
                let version = progress.version.clone().unwrap_or_default();
                self.begin_watch(api, &version, false, progress).await
            }
            Err(end) => Err(end),
        };
        match began {
            Ok(events) => self.watch(events, known, progress, shared).await,
            Err(end) => Ok(end),
        }
    }

    /// Starts a watch, and notes which server it is on.
    async fn begin_watch(
        &self,
        api: &Api<Decoded<K>>,
        version: &str,
        initial: bool,
        progress: &mut Progress,
    ) -> Result<Events<K>, EndReason> {
        let params = WatchParams {
            label_selector: self.label_selector.clone(),
            field_selector: self.field_selector.clone(),
            timeout: Some(progress.stall.begin_watch(self.output.kind, initial)),
            bookmarks: true,
            send_initial_events: initial,
        };
        let (events, by) = with_responder(api.watch(&params, version)).await;
        progress.note_responder(by);
        Ok(events.map_err(EndReason::from_request)?.boxed())
    }

    /// A streaming list: a watch that starts with all objects, and then a bookmark.
    async fn streaming_list(
        &self,
        api: &Api<Decoded<K>>,
        known: &mut Known,
        progress: &mut Progress,
    ) -> Result<Result<Events<K>, EndReason>, Closed> {
        let version = match &progress.list_version {
            ListVersion::Any => "0".to_owned(),
            ListVersion::NotOlderThan(version) => version.clone(),
            ListVersion::MostRecent => String::new(),
        };
        let mut events = match self.begin_watch(api, &version, true, progress).await {
            Ok(events) => events,
            Err(end) => return Ok(Err(end)),
        };
        let mut listing = Listing::new();
        // Bookmarks do not count as objects.
        let (begun, mut objects) = (Instant::now(), 0);
        let mut deadline = begun + STREAMING_TIMEOUT;
        loop {
            let end = match timeout_at(deadline, events.next()).await {
                _ if objects > MAX_OBJECTS || begun.elapsed() > LIST_TIMEOUT => EndReason::LimitExceeded(
                    format!("the list does not end: {objects} objects came in {:?}", begun.elapsed()),
                ),
                Err(_) => EndReason::NotStreaming,
                Ok(None) => EndReason::Truncated,
                Ok(Some(Err(error))) => EndReason::from_stream(error, Duration::ZERO),
                Ok(Some(Ok(WatchEvent::Error(status)))) => EndReason::Status(status),
                Ok(Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)))) => {
                    self.init_apply(object, &mut listing, known).await?;
                    objects += 1;
                    deadline = Instant::now() + STREAMING_TIMEOUT;
                    continue;
                }
                Ok(Some(Ok(WatchEvent::Deleted(_)))) => continue,
                Ok(Some(Ok(WatchEvent::Bookmark(bookmark)))) => {
                    if !bookmark.metadata.annotations.contains_key("k8s.io/initial-events-end") {
                        continue;
                    }
                    let version = bookmark.metadata.resource_version;
                    return Ok(self.accept_list(listing, version, known, progress).await?.map(|()| events));
                }
            };
            return Ok(Err(end));
        }
    }

    /// A paged list, for servers without streaming lists.
    async fn paged_list(
        &self,
        api: &Api<Decoded<K>>,
        known: &mut Known,
        progress: &mut Progress,
    ) -> Result<Result<(), EndReason>, Closed> {
        let (version, matched) = match &progress.list_version {
            ListVersion::Any => (Some("0".to_owned()), Some(VersionMatch::NotOlderThan)),
            ListVersion::NotOlderThan(version) => (Some(version.clone()), Some(VersionMatch::NotOlderThan)),
            ListVersion::MostRecent => (None, None),
        };
        let mut params = ListParams {
            label_selector: self.label_selector.clone(),
            field_selector: self.field_selector.clone(),
            limit: Some(PAGE_SIZE),
            resource_version: version,
            version_match: matched,
            ..ListParams::default()
        };
        let mut listing = Listing::new();
        let (begun, mut objects, mut empty) = (Instant::now(), 0, 0);
        loop {
            let (list, by) = with_responder(api.list(&params)).await;
            progress.note_responder(by);
            let list = match list {
                Ok(list) => list,
                Err(error) => return Ok(Err(EndReason::from_request(error))),
            };
            let kind = list.types.kind.as_str();
            if kind != "List" && kind.strip_suffix("List") != Some(&*K::kind(&())) {
                return Ok(Err(EndReason::Undecodable(format!(
                    "a {kind} is not a list of {}s",
                    self.resource
                ))));
            }
            (objects, empty) =
                (objects + list.items.len(), if list.items.is_empty() { empty + 1 } else { 0 });
            for object in list.items {
                self.init_apply(object, &mut listing, known).await?;
            }
            let next = list.metadata.continue_.filter(|token| !token.is_empty());
            let version = list.metadata.resource_version.filter(|version| !version.is_empty());
            match (next, version) {
                (Some(token), _) => {
                    let again = params.continue_token.as_ref() == Some(&token);
                    if again
                        || empty > MAX_EMPTY_PAGES
                        || objects > MAX_OBJECTS
                        || begun.elapsed() > LIST_TIMEOUT
                    {
                        return Ok(Err(EndReason::LimitExceeded(format!(
                            "the list does not end: {objects} objects came in {:?}",
                            begun.elapsed()
                        ))));
                    }
                    params.continue_token = Some(token);
                }
                (None, Some(version)) => return self.accept_list(listing, version, known, progress).await,
                (None, None) => {
                    return Ok(Err(EndReason::Undecodable("the list has no resource version".to_owned())));
                }
            }
        }
    }

    /// Accepts a complete list unless it is older than what is known.
    async fn accept_list(
        &self,
        listing: Listing<T>,
        version: String,
        known: &mut Known,
        progress: &mut Progress,
    ) -> Result<Result<(), EndReason>, Closed> {
        // Resource versions that are no numbers cannot be compared.
        let number = version.parse().unwrap_or(u64::MAX);
        if number < progress.newest {
            let since = *progress.older_since.get_or_insert_with(Instant::now);
            if since.elapsed() < ROLLBACK_AFTER {
                return Ok(Err(EndReason::Stale { known: progress.newest }));
            }
            tracing::warn!(kind = self.resource, %version, "the API server still shows an older state: accepting it");
        }
        self.init_done(listing, known).await?;
        progress.newest = version.parse().unwrap_or(0);
        (progress.older_since, progress.last_event) = (None, Instant::now());
        progress.list_version = ListVersion::NotOlderThan(version.clone());
        progress.version = Some(version);
        self.output.connected(true).await?;
        Ok(Ok(()))
    }

    /// Follows a watch until it ends.
    async fn watch(
        &self,
        mut events: Events<K>,
        known: &mut Known,
        progress: &mut Progress,
        shared: &Shared,
    ) -> Result<EndReason, Closed> {
        let began = Instant::now();
        let mut idle_at = progress.stall.deadline(self.output.kind);
        let (mut connected, mut no_events) = (false, true);
        loop {
            let event = tokio::select! {
                biased;
                _ = progress.reconnect.changed() => {
                    return Ok(shared.servers.unreachable().map_or(EndReason::Reconnect, EndReason::Unreachable));
                }
                event = events.next() => event,
                () = sleep_until(began + CONNECTED_AFTER), if !connected => {
                    connected = true;
                    self.mark_connected(progress, shared).await?;
                    continue;
                }
                () = sleep_until(idle_at) => return Ok(EndReason::on_idle(progress)),
            };
            shared.servers.received();
            let (version, object) = match event {
                None if progress.stall.is_ending() && no_events => return Ok(EndReason::on_idle(progress)),
                None if progress.stall.is_ending() => return Ok(EndReason::Closed(PROVEN_AFTER)),
                None => return Ok(EndReason::Closed(began.elapsed())),
                Some(Err(error)) => return Ok(EndReason::from_stream(error, began.elapsed())),
                Some(Ok(WatchEvent::Error(status))) => return Ok(EndReason::Status(status)),
                Some(Ok(WatchEvent::Bookmark(bookmark))) => (bookmark.metadata.resource_version, None),
                Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object))) => {
                    (object.metadata.resource_version.clone().unwrap_or_default(), Some((object, true)))
                }
                Some(Ok(WatchEvent::Deleted(object))) => {
                    (object.metadata.resource_version.clone().unwrap_or_default(), Some((object, false)))
                }
            };
            if version.is_empty() {
                return Ok(EndReason::Undecodable("an event has no resource version".to_owned()));
            }
            let number = version.parse().unwrap_or(u64::MAX);
            if number < progress.newest {
                return Ok(EndReason::Stale { known: progress.newest });
            }
            no_events = false;
            let recovered = progress.stall.on_event(object.is_some());
            if !std::mem::replace(&mut connected, true) || recovered {
                self.mark_connected(progress, shared).await?;
            }
            match object {
                Some((object, true)) => self.apply(object, known).await?,
                Some((object, false)) => self.delete(&object, known).await?,
                None => {}
            }
            progress.newest = progress.newest.max(version.parse().unwrap_or(0));
            progress.list_version = ListVersion::NotOlderThan(version.clone());
            progress.version = Some(version);
            progress.last_event = Instant::now();
            idle_at = progress.last_event + idle_after(self.output.kind);
        }
    }

    /// The watch works, at least for now: clears its warning.
    async fn mark_connected(&self, progress: &mut Progress, shared: &Shared) -> Result<(), Closed> {
        if !progress.stall.is_stalled() {
            progress.last_warning.clear();
            shared.servers.set_problem(self.resource, None);
        }
        self.output.connected(true).await
    }
}

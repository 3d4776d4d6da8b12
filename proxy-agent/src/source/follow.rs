//! Lists, then watches, for ever: the protocol, and what becomes of a server that does not keep to it (Y-5).
//!
//! `kube` does single requests; its own watcher asks again at once when a watch ends and keeps to itself what it heard
//! last. Here a watch has to prove that it lives. One that says nothing for a while is begun anew from the version it
//! has come to: that costs a server next to nothing, brings whatever was kept from us, and shows whether it answers
//! at all. A watch that ends before it was of any use is begun again after a pause, and elsewhere if there is another
//! server.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use kube::Api;
use kube::api::{ListParams, VersionMatch, WatchEvent, WatchParams};
use kube::core::Status;
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::Kind;
use super::backoff::{Backoff, between};
use super::connect::cause;
use super::feed::{Closed, Feed, Known, Listing};
use super::heard::Heard;
use super::requests::Requests;
use super::servers::Servers;

/// Pauses between attempts that fail although the server can be reached.
const AGAIN: [Duration; 2] = [Duration::from_millis(800), Duration::from_secs(15)];
/// Pause before another server is asked.
const ELSEWHERE: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(300)];
/// A watch that has lived so long works: what happens to it then has nothing to do with what was before.
const LIVED: Duration = Duration::from_secs(10);
/// A watch that has begun and not ended for so long is a connection.
const PROVEN: Duration = Duration::from_secs(2);
/// A streaming list that pauses for this long is one that the server does not know: it sent what it has and
/// will never say that this was all.
const STREAMING_PATIENCE: Duration = Duration::from_secs(10);
/// No event and no bookmark for this long, however often the watch was renewed: a server sends one a minute. It may
/// have been set back to a time before our version; a list tells.
const DEAF: Duration = Duration::from_secs(150);
/// How long a server must insist on a past that we have left behind, before it is believed: it was restored.
const INSISTS: Duration = Duration::from_secs(60);
/// How long a watch may last, in seconds: the server ends it then.
const LASTS: [Duration; 2] = [Duration::from_secs(240), Duration::from_secs(290)];
/// A version that is too old is answered with a new list at once when the last such answer is this long ago.
const EXPIRED_ANEW: Duration = Duration::from_secs(10);
/// A kind that the server does not have, or does not show us, is asked for again after this time.
const REFUSED: Duration = Duration::from_secs(300);
/// Objects in a page of a list, as `client-go` has it.
const PAGE: u32 = 500;

/// After which silence a watch is begun anew. Endpoints change most and matter most: in any but the smallest cluster
/// they are never silent for so long. In one where nothing happens at all a node makes one request in seven seconds.
fn silence(kind: Kind) -> Duration {
    let seconds = match kind {
        Kind::Slice => [10, 15],
        Kind::Service => [20, 30],
        Kind::Node | Kind::ServiceCidr | Kind::Pod => [60, 90],
    };
    between(seconds.map(Duration::from_secs))
}

type Events<K> = BoxStream<'static, kube::Result<WatchEvent<Heard<K>>>>;

/// How new a list has to be.
#[derive(Clone, Debug)]
enum Freshness {
    /// As the server's cache has it: nothing is known yet.
    Any,
    /// No older than this version.
    AtLeast(String),
    /// As it is stored.
    Newest,
}

/// Why a watch, or the list before it, has come to its end.
#[derive(Debug)]
enum End {
    /// Nothing was heard.
    Silent,
    /// There is another server, or another account.
    Moved,
    /// The server has ended it, after this time.
    Over(Duration),
    /// The connection has broken, after this time.
    Broken(Duration, String),
    /// No server could be asked.
    Unreachable(String),
    /// The server has answered this.
    Status(Box<Status>),
    /// It cannot be understood.
    Unreadable(String),
    /// A list that just ended.
    Half,
    /// A streaming list that never ends.
    Endless,
    /// An older state than the one that is known.
    Backwards { known: u64 },
}

/// How far it has come.
struct Progress {
    streaming: bool,
    /// Where a watch goes on; `None`: a list is needed.
    version: Option<String>,
    /// The newest version that was seen.
    newest: u64,
    fresh: Freshness,
    /// Since when the server insists on an older state.
    insists: Option<Instant>,
    /// When an event or a bookmark came last.
    heard: Instant,
    expired: Option<Instant>,
    backoff: Backoff,
    /// Watches in a row that ended before they were of use.
    cut: u32,
    /// Whether it was said that the server does not show this kind.
    refused: bool,
    /// What was logged last.
    said: String,
    /// Told when connections are to be renewed.
    moved: watch::Receiver<u64>,
    /// Whom the last answer came from, as [`Servers`] counts.
    generation: u64,
}

/// What feeds share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) servers: Arc<Servers>,
    pub(super) requests: Requests,
    /// Has the account read again.
    pub(super) look: Arc<Notify>,
}

impl<K, T> Feed<K, T>
where
    K: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    T: Hash + Send + 'static,
{
    /// Runs until nobody listens.
    pub(super) async fn run(self, api: Api<Heard<K>>, shared: Shared) {
        let mut known = Known::default();
        let mut progress = Progress {
            streaming: true,
            version: None,
            newest: 0,
            fresh: Freshness::Any,
            insists: None,
            heard: Instant::now(),
            expired: None,
            backoff: Backoff::new(AGAIN),
            cut: 0,
            refused: false,
            said: String::new(),
            moved: shared.servers.subscribe(),
            generation: 0,
        };
        loop {
            let round = async {
                let end = self.round(&api, &mut known, &mut progress, &shared).await?;
                self.after(end, &mut progress, &shared).await
            };
            if round.await.is_err() {
                return;
            }
        }
    }

    /// A list if one is needed, then a watch until it ends.
    async fn round(
        &self,
        api: &Api<Heard<K>>,
        known: &mut Known,
        progress: &mut Progress,
        shared: &Shared,
    ) -> Result<End, Closed> {
        let listed = match (&progress.version, progress.streaming) {
            (Some(_), _) => Ok(None),
            (None, true) => self.stream(api, known, progress).await?.map(Some),
            (None, false) => self.pages(api, known, progress).await?.map(|()| None),
        };
        let began = match listed {
            Ok(Some(events)) => Ok(events),
            Ok(None) => {
                let version = progress.version.clone().unwrap_or_default();
                self.begin(api, &version, false, progress).await
            }
            Err(end) => Err(end),
        };
        match began {
            Ok(events) => self.watch(events, known, progress, shared).await,
            Err(end) => Ok(end),
        }
    }

    /// Begins a watch; what happens to servers later concerns it.
    async fn begin(
        &self,
        api: &Api<Heard<K>>,
        version: &str,
        initial: bool,
        progress: &mut Progress,
    ) -> Result<Events<K>, End> {
        let params = WatchParams {
            label_selector: self.labels.clone(),
            field_selector: self.fields.clone(),
            timeout: u32::try_from(between(LASTS).as_secs()).ok(),
            bookmarks: true,
            send_initial_events: initial,
        };
        let events = api.watch(&params, version).await;
        progress.generation = *progress.moved.borrow_and_update();
        Ok(events.map_err(End::of_request)?.boxed())
    }

    /// A streaming list: a watch that begins with all there is, and says where that ends.
    async fn stream(
        &self,
        api: &Api<Heard<K>>,
        known: &mut Known,
        progress: &mut Progress,
    ) -> Result<Result<Events<K>, End>, Closed> {
        let version = match &progress.fresh {
            Freshness::Any => "0".to_owned(),
            Freshness::AtLeast(version) => version.clone(),
            Freshness::Newest => String::new(),
        };
        let mut events = match self.begin(api, &version, true, progress).await {
            Ok(events) => events,
            Err(end) => return Ok(Err(end)),
        };
        let mut listing = Listing::new();
        // Of bookmarks a server may send as many as it likes.
        let mut patience = Instant::now() + STREAMING_PATIENCE;
        loop {
            let end = match timeout_at(patience, events.next()).await {
                Err(_) => End::Endless,
                Ok(None) => End::Half,
                Ok(Some(Err(error))) => End::of_stream(error, Duration::ZERO),
                Ok(Some(Ok(WatchEvent::Error(status)))) => End::Status(status),
                Ok(Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)))) => {
                    self.listed(object, &mut listing, known).await?;
                    patience = Instant::now() + STREAMING_PATIENCE;
                    continue;
                }
                Ok(Some(Ok(WatchEvent::Deleted(_)))) => continue,
                Ok(Some(Ok(WatchEvent::Bookmark(bookmark)))) => {
                    if !bookmark.metadata.annotations.contains_key("k8s.io/initial-events-end") {
                        continue;
                    }
                    let version = bookmark.metadata.resource_version;
                    return Ok(self.whole(listing, version, known, progress).await?.map(|()| events));
                }
            };
            return Ok(Err(end));
        }
    }

    /// A list page by page, for servers without streaming lists.
    async fn pages(
        &self,
        api: &Api<Heard<K>>,
        known: &mut Known,
        progress: &mut Progress,
    ) -> Result<Result<(), End>, Closed> {
        let (version, matched) = match &progress.fresh {
            Freshness::Any => (Some("0".to_owned()), Some(VersionMatch::NotOlderThan)),
            Freshness::AtLeast(version) => (Some(version.clone()), Some(VersionMatch::NotOlderThan)),
            Freshness::Newest => (None, None),
        };
        let mut params = ListParams {
            label_selector: self.labels.clone(),
            field_selector: self.fields.clone(),
            limit: Some(PAGE),
            resource_version: version,
            version_match: matched,
            ..ListParams::default()
        };
        let mut listing = Listing::new();
        loop {
            let list = api.list(&params).await;
            progress.generation = *progress.moved.borrow_and_update();
            let list = match list {
                Ok(list) => list,
                Err(error) => return Ok(Err(End::of_request(error))),
            };
            let kind = list.types.kind.as_str();
            if kind != "List" && kind.strip_suffix("List") != Some(&*K::kind(&())) {
                return Ok(Err(End::Unreadable(format!("a {kind} is no list of {}s", self.what))));
            }
            for object in list.items {
                self.listed(object, &mut listing, known).await?;
            }
            let next = list.metadata.continue_.filter(|token| !token.is_empty());
            let version = list.metadata.resource_version.filter(|version| !version.is_empty());
            match (next, version) {
                (Some(token), _) => params.continue_token = Some(token),
                (None, Some(version)) => return self.whole(listing, version, known, progress).await,
                (None, None) => {
                    return Ok(Err(End::Unreadable("the list says not which version it is".to_owned())));
                }
            }
        }
    }

    /// A list is whole: it counts if it is not older than what is known.
    async fn whole(
        &self,
        listing: Listing<T>,
        version: String,
        known: &mut Known,
        progress: &mut Progress,
    ) -> Result<Result<(), End>, Closed> {
        // Versions that are no numbers cannot be compared.
        let number = version.parse().unwrap_or(u64::MAX);
        if number < progress.newest {
            let since = *progress.insists.get_or_insert_with(Instant::now);
            if since.elapsed() < INSISTS {
                return Ok(Err(End::Backwards { known: progress.newest }));
            }
            tracing::warn!(kind = self.what, %version, "the API server insists on an older state: following it");
        }
        self.complete(listing, known).await?;
        progress.newest = version.parse().unwrap_or(0);
        (progress.insists, progress.heard) = (None, Instant::now());
        progress.fresh = Freshness::AtLeast(version.clone());
        progress.version = Some(version);
        self.line.connected(true).await?;
        Ok(Ok(()))
    }

    /// Follows a watch until it ends.
    async fn watch(
        &self,
        mut events: Events<K>,
        known: &mut Known,
        progress: &mut Progress,
        shared: &Shared,
    ) -> Result<End, Closed> {
        let began = Instant::now();
        let mut silent = began + silence(self.line.kind);
        let mut proven = false;
        loop {
            let event = tokio::select! {
                biased;
                _ = progress.moved.changed() => return Ok(End::Moved),
                event = events.next() => event,
                () = sleep_until(began + PROVEN), if !proven => {
                    proven = true;
                    self.works(progress, shared).await?;
                    continue;
                }
                () = sleep_until(silent) => return Ok(End::Silent),
            };
            let (version, object) = match event {
                None => return Ok(End::Over(began.elapsed())),
                Some(Err(error)) => return Ok(End::of_stream(error, began.elapsed())),
                Some(Ok(WatchEvent::Error(status))) => return Ok(End::Status(status)),
                Some(Ok(WatchEvent::Bookmark(bookmark))) => (bookmark.metadata.resource_version, None),
                Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object))) => {
                    (object.metadata.resource_version.clone().unwrap_or_default(), Some((object, true)))
                }
                Some(Ok(WatchEvent::Deleted(object))) => {
                    (object.metadata.resource_version.clone().unwrap_or_default(), Some((object, false)))
                }
            };
            if version.is_empty() {
                return Ok(End::Unreadable("an event says not which version it is".to_owned()));
            }
            let number = version.parse().unwrap_or(u64::MAX);
            if number < progress.newest {
                return Ok(End::Backwards { known: progress.newest });
            }
            if !std::mem::replace(&mut proven, true) {
                self.works(progress, shared).await?;
            }
            match object {
                Some((object, true)) => self.apply(object, known).await?,
                Some((object, false)) => self.deleted(&object, known).await?,
                None => {}
            }
            progress.newest = progress.newest.max(version.parse().unwrap_or(0));
            progress.fresh = Freshness::AtLeast(version.clone());
            progress.version = Some(version);
            progress.heard = Instant::now();
            silent = progress.heard + silence(self.line.kind);
        }
    }

    /// The watch works, at least for now.
    async fn works(&self, progress: &mut Progress, shared: &Shared) -> Result<(), Closed> {
        progress.said.clear();
        shared.servers.trouble(self.what, None);
        self.line.connected(true).await
    }

    /// Decides how to go on, and waits as long as that takes.
    async fn after(&self, end: End, progress: &mut Progress, shared: &Shared) -> Result<(), Closed> {
        shared.requests.ended(self.what, end.name());
        let lived = match &end {
            End::Over(lived) | End::Broken(lived, _) => *lived,
            End::Silent | End::Moved => LIVED,
            _ => Duration::ZERO,
        };
        if lived >= LIVED {
            progress.backoff.reset();
            progress.cut = 0;
        }
        let why = end.to_string();
        match &end {
            End::Silent => {
                if progress.heard.elapsed() >= DEAF {
                    tracing::info!(kind = self.what, "nothing was heard for long: new list");
                    (progress.version, progress.heard) = (None, Instant::now());
                }
            }
            End::Moved => {}
            End::Over(_) if lived >= LIVED => {}
            End::Over(_) | End::Broken(..) => {
                progress.cut += 1;
                // Once is chance: a server that ends, or a connection that was idle.
                if progress.cut == 1 {
                    sleep(between(ELSEWHERE)).await;
                } else {
                    self.elsewhere(&why, progress, shared).await?;
                }
            }
            End::Unreachable(_) => {
                // Whoever asks next waits until somebody may.
                self.complain_of(&why, progress, shared);
                self.line.connected(false).await?;
            }
            End::Endless => self.without_streaming("it does not say where the list ends", progress),
            End::Status(status) => return self.after_status(status, &why, progress, shared).await,
            End::Half => self.elsewhere(&why, progress, shared).await?,
            End::Unreadable(_) | End::Backwards { .. } => {
                progress.version = None;
                if progress.insists.is_some() {
                    progress.fresh = Freshness::Newest;
                }
                self.elsewhere(&why, progress, shared).await?;
            }
        }
        Ok(())
    }

    async fn after_status(
        &self,
        status: &Status,
        why: &str,
        progress: &mut Progress,
        shared: &Shared,
    ) -> Result<(), Closed> {
        match status.code {
            400 | 422 if progress.version.is_none() && progress.streaming => {
                self.without_streaming("it refuses it", progress);
                return Ok(());
            }
            410 => {
                // A list that has expired itself: only the newest is sure to be there.
                let listing = progress.version.take().is_none();
                if listing {
                    progress.fresh = Freshness::Newest;
                }
                // A server that has forgotten a version is well: nothing is to be waited for, the first time.
                let before = progress.expired.replace(Instant::now());
                if before.is_none_or(|at| at.elapsed() >= EXPIRED_ANEW) {
                    tracing::info!(kind = self.what, "the API server has forgotten our version: new list");
                    return Ok(());
                }
                return self.pause(why, progress, shared).await;
            }
            504 if status.message.contains("Too large resource version") => {
                (progress.version, progress.fresh) = (None, Freshness::Newest);
                return self.elsewhere(why, progress, shared).await;
            }
            401 => shared.look.notify_one(),
            _ => {}
        }
        if self.line.is_optional() && matches!(status.code, 401 | 403 | 404 | 405) {
            self.go_without(why, progress).await;
            return Ok(());
        }
        match status.code {
            401 | 500.. => self.elsewhere(why, progress, shared).await,
            _ => self.pause(why, progress, shared).await,
        }
    }

    fn without_streaming(&self, why: &str, progress: &mut Progress) {
        tracing::info!(kind = self.what, why, "the API server has no streaming lists: list, then watch");
        progress.streaming = false;
    }

    /// A server before 1.33, or one whose roles forbid it: nothing is known of these objects then (Y-16).
    async fn go_without(&self, why: &str, progress: &mut Progress) {
        if !std::mem::replace(&mut progress.refused, true) {
            tracing::info!(kind = self.what, why, "the API server does not show these: going without");
        }
        sleep(REFUSED).await;
    }

    /// Goes on with another server if there is one that was not left lately, else with the same after a pause.
    async fn elsewhere(&self, why: &str, progress: &mut Progress, shared: &Shared) -> Result<(), Closed> {
        if shared.servers.blame(progress.generation, &format!("{}s: {why}", self.what)) {
            sleep(between(ELSEWHERE)).await;
            return Ok(());
        }
        self.pause(why, progress, shared).await
    }

    async fn pause(&self, why: &str, progress: &mut Progress, shared: &Shared) -> Result<(), Closed> {
        self.complain_of(why, progress, shared);
        self.line.connected(false).await?;
        let pause = progress.backoff.pause();
        tracing::debug!(kind = self.what, ?pause, "pausing");
        tokio::select! {
            () = sleep(pause) => {}
            // Another server, or another account.
            _ = progress.moved.changed().fuse() => {}
        }
        Ok(())
    }

    /// Logs what is wrong when it is news, and has it shown.
    fn complain_of(&self, why: &str, progress: &mut Progress, shared: &Shared) {
        shared.servers.trouble(self.what, Some(format!("{}s: {why}", self.what)));
        if progress.said != why {
            tracing::warn!(kind = self.what, why, "cannot watch; what is known stays, trying again");
            why.clone_into(&mut progress.said);
        }
    }
}

impl End {
    /// Why a request was not answered as it should have been.
    fn of_request(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::Status(status),
            kube::Error::Service(error) => Self::Unreachable(cause(&*error)),
            error => Self::Unreadable(cause(&error)),
        }
    }

    /// Why a watch did not go on.
    fn of_stream(error: kube::Error, lived: Duration) -> Self {
        match error {
            kube::Error::Api(status) => Self::Status(status),
            kube::Error::SerdeError(_) => Self::Unreadable(cause(&error)),
            error => Self::Broken(lived, cause(&error)),
        }
    }

    /// In one word, for metrics.
    fn name(&self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Moved => "moved",
            Self::Over(lived) if *lived >= LIVED => "over",
            Self::Over(_) => "cut",
            Self::Broken(..) => "broken",
            Self::Unreachable(_) => "unreachable",
            Self::Status(_) => "status",
            Self::Unreadable(_) => "unreadable",
            Self::Half => "half",
            Self::Endless => "endless",
            Self::Backwards { .. } => "backwards",
        }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Silent => f.write_str("nothing was heard"),
            Self::Moved => f.write_str("there is another server, or another account"),
            Self::Over(_) => f.write_str("the watch ends as soon as it has begun"),
            Self::Broken(_, why) => write!(f, "the watch breaks: {why}"),
            Self::Unreachable(why) => f.write_str(why),
            Self::Status(status) if status.message.is_empty() => {
                write!(f, "answered {} {}", status.code, status.reason)
            }
            Self::Status(status) => write!(f, "{}: {}", status.reason, status.message),
            Self::Unreadable(why) => write!(f, "the answer cannot be understood: {why}"),
            Self::Half => f.write_str("the list ended half-way"),
            Self::Endless => f.write_str("the list does not end"),
            Self::Backwards { known } => {
                write!(
                    f,
                    "it shows an older state than version {known}, which was seen already: a copy that lags \
                           behind, or restored from a backup, which is believed after {INSISTS:?}"
                )
            }
        }
    }
}

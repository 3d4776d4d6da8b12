//! Lists, then watches, for ever: the protocol, and what becomes of a server that does not keep to it (Y-5).
//!
//! `kube` does single requests; its own watcher asks again at once when a watch ends and keeps to itself what it heard
//! last. Here a watch has to prove that it lives. One that says nothing for a while is begun anew from the version it
//! has come to: that costs a server next to nothing, brings whatever was kept from us, and shows whether it answers
//! at all. A watch that ends before it was of any use is begun again after a pause, and elsewhere if there is another
//! server (`end`: why, `resume`: how, `silence`: whether the server keeps something from us).

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
use super::connect::answered_by;
use super::end::{End, INSISTS, LIVED};
use super::feed::{Closed, Feed, Known, Listing};
use super::heard::Heard;
use super::requests::Requests;
use super::servers::Servers;
use super::silence::{Silence, silence};

/// Pauses between attempts that fail although the server can be reached.
const AGAIN: [Duration; 2] = [Duration::from_millis(800), Duration::from_secs(15)];
/// A watch that has begun and not ended for so long is a connection.
const PROVEN: Duration = Duration::from_secs(2);
/// A streaming list that pauses for this long is one that the server does not know: it sent what it has and
/// will never say that this was all.
const STREAMING_PATIENCE: Duration = Duration::from_secs(10);
/// How long a list may take as a whole. Over a slow line a large cluster's takes a minute.
const WHOLE: Duration = Duration::from_secs(180);
/// Objects of one kind: more than a cluster can have.
const MOST: usize = 250_000;
/// Pages in a row without an object: a server looks for as many as were asked for.
const EMPTY: usize = 16;
/// Objects in a page of a list, as `client-go` has it.
const PAGE: u32 = 500;

type Events<K> = BoxStream<'static, kube::Result<WatchEvent<Heard<K>>>>;

/// How new a list has to be.
#[derive(Clone, Debug)]
pub(super) enum Freshness {
    /// As the server's cache has it: nothing is known yet.
    Any,
    /// No older than this version.
    AtLeast(String),
    /// As it is stored.
    Newest,
}

/// How far it has come.
pub(super) struct Progress {
    pub(super) streaming: bool,
    /// Where a watch goes on; `None`: a list is needed.
    pub(super) version: Option<String>,
    /// The newest version that was seen.
    pub(super) newest: u64,
    pub(super) fresh: Freshness,
    /// Since when the server insists on an older state.
    pub(super) insists: Option<Instant>,
    /// When an event or a bookmark came last.
    pub(super) heard: Instant,
    pub(super) silence: Silence,
    pub(super) expired: Option<Instant>,
    pub(super) backoff: Backoff,
    /// Watches in a row that ended before they were of use.
    pub(super) cut: u32,
    /// Who was too busy for us last, as [`Servers`] counts.
    pub(super) busy: Option<u64>,
    /// Refusals in a row.
    pub(super) refusals: u32,
    /// Whether it was said that the server does not show this kind.
    pub(super) refused: bool,
    /// What was logged last.
    pub(super) said: String,
    /// Told when connections are to be renewed.
    pub(super) moved: watch::Receiver<u64>,
    /// Whom the last answer came from, as [`Servers`] counts.
    pub(super) generation: u64,
}

impl Progress {
    /// Notes whom an answer came from; whatever has moved since then concerns us.
    fn answered(&mut self, by: Option<u64>) {
        let now = *self.moved.borrow_and_update();
        self.generation = by.unwrap_or(now);
        if self.generation != now {
            self.moved.mark_changed();
        }
    }
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
    /// Runs until nobody listens. `quick` is a part of these objects that a server finds at once, to be asked for how far
    /// it is after silence.
    pub(super) async fn run(self, api: Api<Heard<K>>, quick: Option<Api<Heard<K>>>, shared: Shared) {
        let mut known = Known::default();
        let mut progress = Progress {
            streaming: true,
            version: None,
            newest: 0,
            fresh: Freshness::Any,
            insists: None,
            heard: Instant::now(),
            silence: Silence::default(),
            expired: None,
            backoff: Backoff::new(AGAIN),
            cut: 0,
            busy: None,
            refusals: 0,
            refused: false,
            said: String::new(),
            moved: shared.servers.subscribe(),
            generation: 0,
        };
        loop {
            let round = async {
                if let Some(quick) = &quick {
                    self.question(quick, &mut progress).await;
                }
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
        // A streaming list is a watch: where those say nothing it would not, either.
        let streaming = progress.streaming && !progress.silence.is_withheld();
        let listed = match (&progress.version, streaming) {
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
            timeout: Some(progress.silence.begin(self.line.kind, initial)),
            bookmarks: true,
            send_initial_events: initial,
        };
        let (events, by) = answered_by(api.watch(&params, version)).await;
        progress.answered(by);
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
        let (begun, mut objects) = (Instant::now(), 0);
        let mut patience = begun + STREAMING_PATIENCE;
        loop {
            let end = match timeout_at(patience, events.next()).await {
                _ if objects > MOST || begun.elapsed() > WHOLE => End::Unfit(format!(
                    "the list does not end: {objects} objects came in {:?}",
                    begun.elapsed()
                )),
                Err(_) => End::Endless,
                Ok(None) => End::Half,
                Ok(Some(Err(error))) => End::of_stream(error, Duration::ZERO),
                Ok(Some(Ok(WatchEvent::Error(status)))) => End::Status(status),
                Ok(Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)))) => {
                    self.listed(object, &mut listing, known).await?;
                    objects += 1;
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
        let (begun, mut objects, mut empty) = (Instant::now(), 0, 0);
        loop {
            let (list, by) = answered_by(api.list(&params)).await;
            progress.answered(by);
            let list = match list {
                Ok(list) => list,
                Err(error) => return Ok(Err(End::of_request(error))),
            };
            let kind = list.types.kind.as_str();
            if kind != "List" && kind.strip_suffix("List") != Some(&*K::kind(&())) {
                return Ok(Err(End::Unreadable(format!("a {kind} is no list of {}s", self.what))));
            }
            (objects, empty) =
                (objects + list.items.len(), if list.items.is_empty() { empty + 1 } else { 0 });
            for object in list.items {
                self.listed(object, &mut listing, known).await?;
            }
            let next = list.metadata.continue_.filter(|token| !token.is_empty());
            let version = list.metadata.resource_version.filter(|version| !version.is_empty());
            match (next, version) {
                (Some(token), _) => {
                    let again = params.continue_token.as_ref() == Some(&token);
                    if again || empty > EMPTY || objects > MOST || begun.elapsed() > WHOLE {
                        return Ok(Err(End::Unfit(format!(
                            "the list does not end: {objects} objects came in {:?}",
                            begun.elapsed()
                        ))));
                    }
                    params.continue_token = Some(token);
                }
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
        let mut silent = progress.silence.patience(self.line.kind);
        let (mut proven, mut mute) = (false, true);
        loop {
            let event = tokio::select! {
                biased;
                _ = progress.moved.changed() => {
                    return Ok(shared.servers.unreachable().map_or(End::Moved, End::Unreachable));
                }
                event = events.next() => event,
                () = sleep_until(began + PROVEN), if !proven => {
                    proven = true;
                    self.works(progress, shared).await?;
                    continue;
                }
                () = sleep_until(silent) => return Ok(End::silent(progress)),
            };
            shared.servers.heard();
            let (version, object) = match event {
                None if progress.silence.is_due() && mute => return Ok(End::silent(progress)),
                None if progress.silence.is_due() => return Ok(End::Over(LIVED)),
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
            mute = false;
            let relieved = progress.silence.broken(object.is_some());
            if !std::mem::replace(&mut proven, true) || relieved {
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
        if !progress.silence.is_withheld() {
            progress.said.clear();
            shared.servers.trouble(self.what, None);
        }
        self.line.connected(true).await
    }
}

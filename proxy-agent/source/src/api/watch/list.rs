//! Lists: streaming ones, paged ones, and those of one object that only show a resource version.

use std::cmp::Ordering;
use std::hash::Hash;
use std::time::Duration;

use futures::StreamExt;
use kube::Api;
use kube::api::{ListParams, VersionMatch, WatchEvent};
use tokio::time::{Instant, timeout, timeout_at};

use super::Events;
use super::decoded::Decoded;
use super::end_reason::{EndReason, ROLLBACK_AFTER};
use super::progress::{ListVersion, Progress};
use super::reflector::{Closed, Known, Listing, Reflector, Watched};
use crate::api::connection::with_responder;

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
/// How long the server may take to send its resource version. Nothing is watched meanwhile.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

impl<K: Watched, T: Hash + Send + 'static> Reflector<K, T> {
    /// A streaming list: a watch that starts with all objects, and then a bookmark.
    pub(super) async fn streaming_list(
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
    pub(super) async fn paged_list(
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

    /// Asks a server whose watch was idle for the resource version of its cache, which also feeds its watches. The list is
    /// of one object; it does not matter whether that exists.
    pub(super) async fn ask_version(&self, api: &Api<Decoded<K>>, progress: &mut Progress) {
        if !std::mem::take(&mut progress.stall.ask_version) {
            return;
        }
        let server = *progress.reconnect.borrow();
        let params = ListParams {
            field_selector: Some("metadata.name=kubernetes".to_owned()),
            resource_version: Some("0".to_owned()),
            version_match: Some(VersionMatch::NotOlderThan),
            ..ListParams::default()
        };
        // If this fails, so will the next watch.
        let Ok(Ok(list)) = timeout(ASK_TIMEOUT, api.list(&params)).await else { return };
        let version = list.metadata.resource_version.and_then(|version| version.parse::<u64>().ok());
        match version.map(|version| version.cmp(&progress.newest)) {
            Some(Ordering::Greater) => progress.stall.due_from = Some(server),
            // As good as an event: there is nothing new.
            Some(Ordering::Equal) => progress.last_event = Instant::now(),
            Some(Ordering::Less) | None => {}
        }
    }
}

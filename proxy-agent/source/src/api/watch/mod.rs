//! List, then watch, for ever, and what happens with a server that breaks this protocol (Y-5).
//!
//! `kube` sends the single requests. Its own watcher is of no use here: it retries at once when a watch ends, and does not
//! show its resource version. Here a watch has to prove that it works. An idle one is restarted from its last resource
//! version: that costs the server next to nothing, brings events that were missed, and shows whether it answers at all.
//! A watch that ends early is restarted after a backoff, or on another server if there is one.
//!
//! [`list`] reads lists, [`reflector`] makes changes of what comes, [`end_reason`] has why a watch ended, [`recovery`] what is
//! done about it, and [`stall`] whether an idle one is stalled.

mod decoded;
mod end_reason;
mod list;
mod progress;
mod recovery;
mod reflector;
mod stall;

use std::hash::Hash;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use kube::Api;
use kube::api::{WatchEvent, WatchParams};
use tokio::time::{Instant, sleep_until};

use crate::api::connection::with_responder;
use decoded::Decoded;
use end_reason::{EndReason, PROVEN_AFTER};
use progress::{ListVersion, Progress};
use reflector::{Closed, Known, Watched};

pub(super) use progress::Shared;
pub(super) use reflector::{Observer, Output, Reflector};

/// A watch that has lasted this long counts as connected, even without an event.
const CONNECTED_AFTER: Duration = Duration::from_secs(2);

type Events<K> = BoxStream<'static, kube::Result<WatchEvent<Decoded<K>>>>;

impl<K: Watched, T: Hash + Send + 'static> Reflector<K, T> {
    /// Runs until the receiver is dropped. `single` is a subset of these objects that is cheap to list: its resource version
    /// is compared when a watch is idle.
    pub(in crate::api) async fn run(
        self,
        api: Api<Decoded<K>>,
        single: Option<Api<Decoded<K>>>,
        shared: Shared,
    ) {
        let mut known = Known::default();
        let mut progress = Progress::new(shared.servers.subscribe());
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
                () = sleep_until(idle_at) => return Ok(progress.idle_end()),
            };
            shared.servers.received();
            let (version, object) = match event {
                None if progress.stall.is_ending() && no_events => return Ok(progress.idle_end()),
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
            idle_at = progress.stall.deadline(self.output.kind);
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

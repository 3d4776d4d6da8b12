//! One watch: initial events, then changes and bookmarks, as a response that goes on.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http::Response;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Bytes, Frame};
use serde_json::{Value, json};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::http::{Body, expired};
use super::selector::Filter;
use super::{Gone, Shared};
use crate::object::Kind;

/// How long before its end a watch is sent a bookmark.
const BEFORE_THE_END: Duration = Duration::from_secs(2);

/// What a watch was asked for.
pub(super) struct Watch {
    pub(super) kind: Kind,
    pub(super) filter: Filter,
    /// The version after which to begin; `None` begins with what there is.
    pub(super) after: Option<u64>,
    /// Whether a bookmark ends the initial events.
    pub(super) initial: bool,
    pub(super) bookmarks: bool,
    pub(super) seconds: u64,
    /// How many watches began before.
    pub(super) n: u64,
    /// Whether it stops in the middle of what there is.
    pub(super) half: bool,
}

/// The client has gone.
struct Left;

/// Begins a watch; it runs beside the response until either ends.
pub(super) fn start(shared: Arc<Shared>, watch: Watch) -> Response<Body> {
    let (sender, receiver) = channel(64);
    tokio::spawn(async move {
        let limit = Duration::from_secs(watch.seconds);
        shared.watching.fetch_add(1, Ordering::Relaxed);
        tokio::select! {
            _ = run(&shared, &watch, &sender) => {}
            () = tokio::time::sleep(limit) => {}
            () = sender.closed() => {}
        }
        shared.watching.fetch_sub(1, Ordering::Relaxed);
    });
    let lines = futures::stream::unfold(receiver, |mut receiver: Receiver<Bytes>| async {
        let line = receiver.recv().await?;
        Some((Ok::<_, Infallible>(Frame::data(line)), receiver))
    });
    let mut response = Response::new(StreamBody::new(lines).boxed());
    let json = ::http::HeaderValue::from_static("application/json");
    response.headers_mut().insert(::http::header::CONTENT_TYPE, json);
    response
}

async fn run(shared: &Shared, watch: &Watch, sender: &Sender<Bytes>) -> Result<(), Left> {
    let mut changed = shared.changed.subscribe();
    let last = Duration::from_secs(watch.seconds).saturating_sub(BEFORE_THE_END);
    let mut last = std::pin::pin!(tokio::time::sleep(last));
    let mut version = match watch.after {
        Some(version) => version,
        None => begin(shared, watch, sender).await?,
    };
    let began = version;
    loop {
        shared.telling(watch.n).await;
        changed.mark_unchanged();
        let news = shared.shown().since(version, watch.kind, &watch.filter);
        let Ok((events, now)) = news else {
            let style = shared.behaviour.borrow().gone;
            if style == Gone::Event {
                send(sender, &json!({ "type": "ERROR", "object": expired() })).await?;
            }
            return Ok(());
        };
        for event in events {
            send(sender, &event).await?;
        }
        version = now;
        let idle = shared.behaviour.borrow().bookmark_every;
        let due = tokio::select! {
            _ = changed.changed() => false,
            () = tokio::time::sleep(idle), if watch.bookmarks => true,
            () = &mut last, if watch.bookmarks && !last.is_elapsed() => true,
        };
        // The real server sends none that says nothing new, and without word of progress it has nothing new to say.
        let (progress, known) = (shared.behaviour.borrow().progress, version.min(shared.version(watch.kind)));
        if due && (progress || known > began) {
            shared.telling(watch.n).await;
            send(sender, &bookmark(watch.kind, known, false)).await?;
        }
    }
}

/// Sends what there is; the version it shows.
async fn begin(shared: &Shared, watch: &Watch, sender: &Sender<Bytes>) -> Result<u64, Left> {
    let version = shared.version(watch.kind);
    let objects = shared.shown().all(watch.kind, &watch.filter);
    shared.telling(watch.n).await;
    let many = if watch.half { objects.len() / 2 } else { objects.len() };
    for object in objects.into_iter().take(many) {
        tell(sender, format!("{{\"type\":\"ADDED\",\"object\":{object}}}\n")).await?;
    }
    if watch.half {
        return Err(Left);
    }
    if watch.initial {
        send(sender, &bookmark(watch.kind, version, true)).await?;
    }
    Ok(version)
}

fn bookmark(kind: Kind, version: u64, ends_initial_events: bool) -> Value {
    let mut metadata = json!({ "resourceVersion": version.to_string(), "creationTimestamp": null });
    if ends_initial_events {
        metadata["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
    }
    json!({
        "type": "BOOKMARK",
        "object": { "kind": kind.name(), "apiVersion": kind.api_version(), "metadata": metadata }
    })
}

async fn send(sender: &Sender<Bytes>, event: &Value) -> Result<(), Left> {
    tell(sender, format!("{event}\n")).await
}

async fn tell(sender: &Sender<Bytes>, line: String) -> Result<(), Left> {
    sender.send(line.into()).await.map_err(|_| Left)
}

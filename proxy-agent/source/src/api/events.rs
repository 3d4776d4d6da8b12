//! What operators see with `kubectl describe` and `kubectl get events`: Events about our Node and about Services.
//!
//! Best effort: recording never waits, and nothing depends on it. Without an API server they go to the log.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event as Published, EventType, Recorder, Reporter};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

use super::backoff::Backoff;
use agent_core::model::ObjectName;

/// The name under which kube-proxy reports: whoever looks for its events finds ours (H-29).
const COMPONENT: &str = "kube-proxy";
/// Events that may wait for the API server; more are dropped.
const QUEUE: usize = 64;
/// Backoff before an event is sent again. It is sent until it is accepted or rejected, because it is looked for when the
/// server is back.
const BACKOFF: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];
/// How long the agent waits for its last event before it ends.
const LAST_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The agent runs (H-29).
    Starting,
    /// The address for health cannot be had, and that ends the agent (H-12).
    NoHealth(String),
    /// The address for metrics cannot be had, and that ends the agent (H-28).
    NoMetrics(String),
    /// Hooks refuse their programs, and are tried again.
    NotAttached(String),
    /// All hooks carry their programs again.
    Attached,
    /// What somebody else had removed or changed has been restored.
    Restored(String),
    /// Tables that are nearly full cannot become larger.
    NotGrown(String),
    /// A Service's health check port cannot be had (H-16).
    NoServiceHealth(ObjectName, String),
}

impl Event {
    fn published(&self) -> Published {
        let (type_, reason, action, note) = match self {
            Self::Starting => {
                let note = concat!("proxy-agent ", env!("CARGO_PKG_VERSION"), " starts").to_owned();
                (EventType::Normal, "Starting", "StartKubeProxy", note)
            }
            Self::NoHealth(note) => {
                (EventType::Warning, "FailedToStartProxierHealthcheck", "StartKubeProxy", note.clone())
            }
            Self::NoMetrics(note) => {
                (EventType::Warning, "FailedToStartMetricServer", "StartKubeProxy", note.clone())
            }
            Self::NotAttached(note) => (EventType::Warning, "FailedToAttachPrograms", "Attach", note.clone()),
            Self::Attached => {
                (EventType::Normal, "AttachedPrograms", "Attach", "all hooks carry their programs".into())
            }
            Self::Restored(note) => (EventType::Warning, "RestoredDataPath", "Repair", note.clone()),
            Self::NotGrown(note) => (EventType::Warning, "FailedToGrowTables", "Grow", note.clone()),
            Self::NoServiceHealth(_, note) => {
                (EventType::Warning, "FailedToStartServiceHealthcheck", "Listen", note.clone())
            }
        };
        Published { type_, reason: reason.into(), action: action.into(), note: Some(note), secondary: None }
    }

    fn about(&self, node: &str) -> ObjectReference {
        match self {
            Self::NoServiceHealth(service, _) => ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Service".into()),
                namespace: Some(service.namespace.to_string()),
                name: Some(service.name.to_string()),
                ..ObjectReference::default()
            },
            Self::Starting
            | Self::NoHealth(_)
            | Self::NoMetrics(_)
            | Self::NotAttached(_)
            | Self::Attached
            | Self::Restored(_)
            | Self::NotGrown(_) => ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Node".into()),
                name: Some(node.to_owned()),
                // As every component of a node has it, and `kubectl describe node` looks for it.
                uid: Some(node.to_owned()),
                ..ObjectReference::default()
            },
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.published().note.unwrap_or_default())
    }
}

/// An event, and who waits for it to be published.
type Queued = (Event, Option<oneshot::Sender<()>>);

/// Records events; clones share the queue.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<Queued>);

/// The other end of the queue, which publishes events.
#[derive(Debug)]
pub struct EventPublisher(mpsc::Receiver<Queued>);

impl Events {
    #[must_use]
    pub fn new() -> (Self, EventPublisher) {
        let (tx, rx) = mpsc::channel(QUEUE);
        (Self(tx), EventPublisher(rx))
    }

    /// Records an event, or drops it if the queue is full.
    pub fn record(&self, event: Event) {
        if let Err(error) = self.0.try_send((event, None)) {
            tracing::debug!("an event was dropped: {error}");
        }
    }

    /// Records an event and waits a little until it is published, because the agent ends after this.
    pub async fn record_last(&self, event: Event) {
        let (done, published) = oneshot::channel();
        let last = async {
            if self.0.send((event, Some(done))).await.is_ok() {
                // An error: the publisher has ended.
                published.await.ok();
            }
        };
        if timeout(LAST_TIMEOUT, last).await.is_err() {
            tracing::debug!("the last event was not accepted in time");
        }
    }
}

impl EventPublisher {
    /// Publishes events until all senders are dropped; without a client they go to the log.
    pub async fn publish(mut self, client: Option<Client>, node: Arc<str>) {
        let reporter = Reporter { controller: COMPONENT.into(), instance: Some(node.to_string()) };
        let recorder = client.map(|client| Recorder::new(client, reporter));
        let mut warned = false;
        while let Some((event, done)) = self.0.recv().await {
            match &recorder {
                Some(recorder) => send(recorder, &event, &node, &mut warned).await,
                None => log(&event, &node),
            }
            if let Some(done) = done {
                // An error: the waiter has given up.
                done.send(()).ok();
            }
        }
    }
}

fn log(event: &Event, node: &str) {
    let (published, about) = (event.published(), event.about(node));
    tracing::info!(
        "event {} about {} {}: {}",
        published.reason,
        about.kind.unwrap_or_default(),
        about.name.unwrap_or_default(),
        published.note.unwrap_or_default()
    );
}

/// Sends an event, with retries unless the API server rejects it. A rejection is logged as a warning once.
async fn send(recorder: &Recorder, event: &Event, node: &str, warned: &mut bool) {
    let (published, about) = (event.published(), event.about(node));
    let mut backoff = Backoff::new(BACKOFF);
    loop {
        let error = match recorder.publish(&published, &about).await {
            Ok(()) => return,
            Err(error) => error,
        };
        let rejected = matches!(&error, kube::Error::Api(status) if status.code < 500 && status.code != 429);
        if !rejected {
            sleep(backoff.pause()).await;
            continue;
        }
        if !std::mem::replace(warned, true) {
            tracing::warn!(
                "events cannot be recorded, such as {}: {error}; this agent may need the verbs create and patch for \
                 events in the group events.k8s.io",
                published.reason
            );
        }
        return log(event, node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recording_never_waits_and_the_queue_is_bounded() {
        let (events, mut publisher) = Events::new();
        for n in 0..1000 {
            events.record(Event::Restored(n.to_string()));
        }
        let waiting: Vec<Event> = std::iter::from_fn(|| Some(publisher.0.try_recv().ok()?.0)).collect();
        assert_eq!((waiting.len(), &waiting[63]), (QUEUE, &Event::Restored("63".into())));
    }
}

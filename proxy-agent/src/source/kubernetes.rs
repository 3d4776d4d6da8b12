//! The Kubernetes API as a source: Services, EndpointSlices and our own Node, listed and watched for ever.
//!
//! `kube`'s watcher does the protocol (Y-5). Added here: the difference after a relist (objects that vanished
//! are removals), the fall-back for servers without streaming lists, a relist when a version is too old
//! however the server says so, and one undecodable object never stopping the others.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::BoxStream;
use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, Event};
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::connect;
use super::convert::{self, LABEL_HEADLESS, LABEL_PROXY_NAME};
use super::heard::Heard;
use super::requests::Requests;
use super::{Change, Kind};
use crate::model::{Node, ObjectName, Service, Slice};

/// How long a connection attempt may take.
const CONNECT: Duration = Duration::from_secs(5);
/// A retry that has not failed for this long has a connection: a quiet watch says nothing of its own.
const QUIET: Duration = Duration::from_secs(6);
/// A streaming list that pauses for this long is one that the server does not know: it sent what it has and
/// will never say that this was all.
const STREAMING_PATIENCE: Duration = Duration::from_secs(10);
/// A version that is too old is answered with a new list at once when the last such answer is this long ago.
const EXPIRED_ANEW: Duration = Duration::from_secs(10);

/// A kind that the server does not have, or does not show us, is asked for again after this time.
const REFUSED: Duration = Duration::from_secs(300);

/// Why there is no client for the API server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig file is missing or wrong.
    #[error("cannot use the kubeconfig {path}: give a readable file with --kubeconfig")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: kube::config::KubeconfigError,
    },
    /// Neither a kubeconfig nor a service account.
    #[error(
        "no kubeconfig was given and this is not a pod with a service account: use --kubeconfig or --apiserver"
    )]
    InCluster(#[source] kube::config::InClusterError),
    /// `--apiserver` is not a URL.
    #[error("--apiserver {url} is not a URL like https://10.0.0.1:6443")]
    Url {
        /// What was given.
        url: String,
        /// Why.
        #[source]
        source: http::uri::InvalidUri,
    },
    /// The client cannot be built (certificates, mostly).
    #[error("cannot prepare a client for the API server {url}")]
    Client {
        /// Its address.
        url: String,
        /// Why.
        #[source]
        source: kube::Error,
    },
}

/// A client from a kubeconfig or, without one, from the pod's service account; `apiserver` replaces the
/// server's address (Y-1), and stands alone when there is neither.
///
/// Its requests are counted in `requests`.
pub async fn client(
    kubeconfig: Option<&PathBuf>,
    apiserver: Option<&str>,
    requests: &Requests,
) -> Result<Client, Error> {
    let url = apiserver.map(|url| url.parse::<http::Uri>().map_err(|source| (url, source)));
    let url = url.transpose().map_err(|(url, source)| Error::Url { url: url.to_owned(), source })?;
    let mut config = match (kubeconfig, &url) {
        (Some(path), _) => {
            let fault = |source| Error::Kubeconfig { path: path.clone(), source };
            let file = Kubeconfig::read_from(path).map_err(fault)?;
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(fault)?
        }
        (None, Some(url)) => kube::Config::incluster_env().unwrap_or_else(|_| kube::Config::new(url.clone())),
        (None, None) => kube::Config::incluster_env().map_err(Error::InCluster)?,
    };
    if let Some(url) = url {
        config.cluster_url = url;
    }
    config.connect_timeout = Some(CONNECT);
    let url = config.cluster_url.to_string();
    connect::client(config, requests).map_err(|source| Error::Client { url, source })
}

/// Sends what the API server says of Services, EndpointSlices, the Node `node_name` and ServiceCIDRs, until nobody
/// listens (Y-4); with `pods` also of this node's pods.
pub async fn run(client: Client, node_name: Arc<str>, pods: bool, tx: mpsc::Sender<Change>) {
    let down = Arc::new(AtomicU32::new(0b111));
    let line = |kind: Kind| Line { kind, tx: tx.clone(), down: down.clone() };
    let not = |label: &str| format!("!{label}");
    let services = Feed::<core::Service, Service> {
        line: line(Kind::Service),
        what: "Service",
        config: watcher::Config::default().labels(&not(LABEL_PROXY_NAME)).fields("spec.clusterIP!=None"), // S-1
        convert: convert::service,
        change: Change::Service,
        triggered: |_| None,
    };
    let slices = Feed::<discovery::EndpointSlice, Slice> {
        line: line(Kind::Slice),
        what: "EndpointSlice",
        config: watcher::Config::default().labels(&not(LABEL_HEADLESS)), // E-2
        convert: convert::slice,
        change: Change::Slice,
        triggered: convert::triggered,
    };
    let node = Feed::<core::Node, Node> {
        line: line(Kind::Node),
        what: "Node",
        config: watcher::Config::default().fields(&format!("metadata.name={node_name}")),
        convert: |object| {
            let (node, complaints) = convert::node(object);
            (Some(node), complaints)
        },
        change: |_, node| Change::Node(node),
        triggered: |_| None,
    };
    let service_cidrs = Feed::<networking::ServiceCIDR, Vec<IpNet>> {
        line: line(Kind::ServiceCidr),
        what: "ServiceCIDR",
        config: watcher::Config::default(),
        convert: |object| {
            let (ranges, complaints) = convert::service_cidr(object);
            (Some(ranges), complaints)
        },
        change: |name, ranges| Change::ServiceRanges(name.name.to_string(), ranges),
        triggered: |_| None,
    };
    let this_node_s_pods = async {
        let feed = Feed::<core::Pod, String> {
            line: line(Kind::Pod),
            what: "Pod",
            config: watcher::Config::default().fields(&format!("spec.nodeName={node_name}")),
            convert: convert::excluded,
            change: Change::Excluded,
            triggered: |_| None,
        };
        if pods {
            feed.run(Api::all(client.clone())).await;
        }
    };
    let all = futures::future::join5(
        services.run(Api::all(client.clone())),
        slices.run(Api::all(client.clone())),
        node.run(Api::all(client.clone())),
        service_cidrs.run(Api::all(client.clone())),
        this_node_s_pods,
    );
    tokio::select! {
        _ = all => {}
        () = tx.closed() => {}
    }
}

/// Nobody listens any more.
struct Closed;

/// Where a kind's changes go, and how it stands with the server.
struct Line {
    kind: Kind,
    tx: mpsc::Sender<Change>,
    /// A bit for every kind that the server does not answer: connected is when there is none.
    down: Arc<AtomicU32>,
}

impl Line {
    async fn send(&self, change: Change) -> Result<(), Closed> {
        self.tx.send(change).await.map_err(|_| Closed)
    }

    async fn connected(&self, up: bool) -> Result<(), Closed> {
        if matches!(self.kind, Kind::ServiceCidr | Kind::Pod) {
            return Ok(()); // Of a kind that a server may well lack, or not show, its silence says nothing.
        }
        let bit = 1 << self.kind as u32;
        let before = if up {
            self.down.fetch_and(!bit, Ordering::Relaxed)
        } else {
            self.down.fetch_or(bit, Ordering::Relaxed)
        };
        let after = if up { before & !bit } else { before | bit };
        if (before == 0) != (after == 0) {
            self.send(Change::Connected(after == 0)).await?;
        }
        Ok(())
    }
}

/// One kind of object, from the API server to changes.
struct Feed<K, T> {
    line: Line,
    what: &'static str,
    config: watcher::Config,
    convert: fn(&K) -> (Option<T>, Vec<String>),
    change: fn(ObjectName, Option<T>) -> Change,
    /// When what it shows happened, if it says so.
    triggered: fn(&K) -> Option<Timestamp>,
}

/// What was sent of an object: enough to take it back, and to tell whether it is news. The object itself
/// lives in the model alone; a second copy of a large cluster would be the agent's largest table.
#[derive(Default)]
struct Sent {
    fingerprint: Option<u64>,
    complaints: Vec<String>,
}

type Known = HashMap<ObjectName, Sent>;
type Events<K> = BoxStream<'static, watcher::Result<Event<Heard<K>>>>;

/// When to ask again.
#[derive(Default)]
struct Retry {
    backoff: DefaultBackoff,
    expired: Option<Instant>,
    /// Whether it was said that the server does not show this kind.
    refused: bool,
}

impl Retry {
    /// Notes that a version was too old; whether that has not happened for a while. A server that says so after
    /// every list must not be listed all the time.
    fn expired_anew(&mut self) -> bool {
        let before = self.expired.replace(Instant::now());
        before.is_none_or(|at| at.elapsed() >= EXPIRED_ANEW)
    }
}

impl<K, T> Feed<K, T>
where
    K: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    T: Hash + Send + 'static,
{
    /// Runs until nobody listens.
    async fn run(self, api: Api<Heard<K>>) {
        let mut streaming = true;
        let mut known = Known::new();
        let mut synced = false;
        let mut retry = Retry::default();
        loop {
            let events = self.events(&api, streaming);
            match self.follow(events, streaming, &mut known, &mut synced, &mut retry).await {
                Ok(End::Relist) => {}
                Ok(End::NoStreaming) => streaming = false,
                Err(Closed) => return,
            }
        }
    }

    fn events(&self, api: &Api<Heard<K>>, streaming: bool) -> Events<K> {
        let config = self.config.clone();
        // A list from the server's cache is enough (Y-5): the watch that follows brings it up to date.
        let config = if streaming { config.streaming_lists() } else { config.any_semantic() };
        watcher::watcher(api.clone(), config).boxed()
    }

    /// Follows one watch until it must be begun anew.
    async fn follow(
        &self,
        mut events: Events<K>,
        streaming: bool,
        known: &mut Known,
        synced: &mut bool,
        retry: &mut Retry,
    ) -> Result<End, Closed> {
        let mut listed: Option<HashSet<ObjectName>> = None;
        let mut paused = false;
        loop {
            let event = if streaming && listed.is_some() {
                match timeout(STREAMING_PATIENCE, self.next(&mut events)).await {
                    Ok(event) => event?,
                    Err(_) => return Ok(self.without_streaming("it does not say where the list ends")),
                }
            } else {
                self.next(&mut events).await?
            };
            match event {
                None => return Ok(End::Relist),
                // A server that ends every list half-way without a word must not be asked without a pause.
                Some(Ok(Event::Init)) if listed.is_some() && !paused => {
                    self.pause("the list ended half-way", retry).await?;
                    listed = Some(HashSet::new());
                }
                Some(Ok(event)) => {
                    paused = false;
                    // A classic list begins with `Init` before anything has been asked.
                    if !matches!(event, Event::Init) {
                        self.line.connected(true).await?;
                    }
                    // A watch that brings news works: the next outage has nothing to do with the last. A list alone
                    // is no proof, or a watch that always fails would have everything listed at the shortest pause.
                    if matches!(event, Event::Apply(_) | Event::Delete(_)) {
                        retry.backoff.reset();
                    }
                    self.take(event, known, &mut listed, synced).await?;
                }
                Some(Err(error)) => {
                    if streaming && does_not_stream(&error) {
                        return Ok(self.without_streaming("it refuses it"));
                    }
                    if matches!(&error, watcher::Error::WatchFailed(kube::Error::SerdeError(_))) {
                        tracing::warn!(kind = self.what, %error, "skipped an event that cannot be read");
                        continue;
                    }
                    // A server that has forgotten a version is well: nothing is to be waited for.
                    if is_expired(&error) && retry.expired_anew() {
                        tracing::info!(
                            kind = self.what,
                            "the API server has forgotten our version: new list"
                        );
                        return Ok(End::Relist);
                    }
                    if matches!(self.line.kind, Kind::ServiceCidr | Kind::Pod) && is_refused(&error) {
                        self.go_without(&error, retry).await;
                    } else {
                        self.failed(&error, retry).await?;
                    }
                    paused = true;
                    if is_gone(&error) {
                        return Ok(End::Relist);
                    }
                }
            }
        }
    }

    /// The next event. A stream that says nothing for a while is connected all the same: a failed attempt
    /// would have been told by then.
    async fn next(&self, events: &mut Events<K>) -> Result<Option<watcher::Result<Event<Heard<K>>>>, Closed> {
        let mut next = pin!(events.next());
        match timeout(QUIET, &mut next).await {
            Ok(event) => Ok(event),
            Err(_) => {
                self.line.connected(true).await?;
                Ok(next.await)
            }
        }
    }

    fn without_streaming(&self, why: &str) -> End {
        tracing::info!(kind = self.what, why, "the API server has no streaming lists: list, then watch");
        End::NoStreaming
    }

    /// A server before 1.33, or one whose roles forbid it: nothing is known of these objects then (Y-16).
    async fn go_without(&self, error: &watcher::Error, retry: &mut Retry) {
        if !std::mem::replace(&mut retry.refused, true) {
            tracing::info!(
                kind = self.what,
                why = cause(error),
                "the API server does not show these: going without"
            );
        }
        tokio::time::sleep(REFUSED).await;
    }

    async fn failed(&self, error: &watcher::Error, retry: &mut Retry) -> Result<(), Closed> {
        self.pause(&cause(error), retry).await
    }

    async fn pause(&self, why: &str, retry: &mut Retry) -> Result<(), Closed> {
        let pause = retry.backoff.next().unwrap_or(Duration::from_secs(30));
        tracing::warn!(kind = self.what, why, ?pause, "cannot watch; what is known stays, trying again");
        self.line.connected(false).await?;
        tokio::time::sleep(pause).await;
        Ok(())
    }

    async fn take(
        &self,
        event: Event<Heard<K>>,
        known: &mut Known,
        listed: &mut Option<HashSet<ObjectName>>,
        synced: &mut bool,
    ) -> Result<(), Closed> {
        match event {
            Event::Init => *listed = Some(HashSet::new()),
            Event::InitApply(object) => {
                if let Some(listed) = listed {
                    listed.insert(convert::object_name(&object.metadata));
                }
                self.apply(object, known).await?;
            }
            Event::Apply(object) => self.apply(object, known).await?,
            Event::Delete(object) => {
                self.remove(convert::object_name(&object.metadata), known).await?; // S-2, Y-8: by name.
            }
            Event::InitDone => {
                let listed = listed.take().unwrap_or_default();
                let vanished: Vec<ObjectName> =
                    known.keys().filter(|name| !listed.contains(name)).cloned().collect();
                for name in vanished {
                    self.remove(name, known).await?;
                }
                if !std::mem::replace(synced, true) {
                    self.line.send(Change::Synced(self.line.kind)).await?;
                }
            }
        }
        Ok(())
    }

    async fn apply(&self, heard: Heard<K>, known: &mut Known) -> Result<(), Closed> {
        let name = convert::object_name(&heard.metadata);
        let sent = known.remove(&name).unwrap_or_default();
        let (fingerprint, complaints) = match &heard.object {
            Ok(object) => {
                let triggered = (self.triggered)(object);
                let (object, complaints) = (self.convert)(object);
                let fingerprint = object.as_ref().map(fingerprint);
                if fingerprint == sent.fingerprint {
                    if fingerprint.is_some() {
                        self.line.send(Change::Repeated(self.line.kind)).await?;
                    }
                } else {
                    if let (Some(at), true) = (triggered, fingerprint.is_some()) {
                        self.line.send(Change::Triggered(name.clone(), at)).await?;
                    }
                    self.line.send((self.change)(name.clone(), object)).await?;
                }
                (fingerprint, complaints)
            }
            // What was known of it stays, as with every object that has become unreadable.
            Err(error) => (sent.fingerprint, vec![format!("cannot be read: {error}")]),
        };
        if sent.complaints != complaints {
            self.complain(&name, complaints.clone()).await?;
        }
        if fingerprint.is_some() || !complaints.is_empty() {
            known.insert(name, Sent { fingerprint, complaints });
        }
        Ok(())
    }

    async fn remove(&self, name: ObjectName, known: &mut Known) -> Result<(), Closed> {
        let Some(sent) = known.remove(&name) else { return Ok(()) };
        if !sent.complaints.is_empty() {
            self.complain(&name, Vec::new()).await?;
        }
        if sent.fingerprint.is_some() {
            self.line.send((self.change)(name, None)).await?;
        }
        Ok(())
    }

    async fn complain(&self, name: &ObjectName, lines: Vec<String>) -> Result<(), Closed> {
        let object = match self.line.kind {
            Kind::Node | Kind::ServiceCidr => format!("{} {}", self.what, name.name),
            Kind::Service | Kind::Slice | Kind::Pod => format!("{} {name}", self.what),
        };
        self.line.send(Change::Complaints { object, lines }).await
    }
}

fn fingerprint<T: Hash>(object: &T) -> u64 {
    let mut hasher = DefaultHasher::new();
    object.hash(&mut hasher);
    hasher.finish()
}

/// Why a watch is begun anew.
enum End {
    Relist,
    NoStreaming,
}

/// The status a server answered with.
fn status(error: &watcher::Error) -> Option<&kube::core::Status> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status),
        _ => None,
    }
}

/// The version to continue from is too old, or newer than what the server has (Y-5). `kube` lists anew only
/// when this comes as an event of a watch; as the answer to a request it would ask the same again for ever.
fn is_gone(error: &watcher::Error) -> bool {
    is_expired(error)
        || status(error)
            .is_some_and(|status| status.code == 504 && status.message.contains("Too large resource version"))
}

/// The error without the watcher's own words, and its root: "connection refused" stands deep below "Connect".
fn cause(error: &watcher::Error) -> String {
    let first = std::error::Error::source(error).unwrap_or(error);
    let (outer, mut root) = (first.to_string(), first);
    while let Some(deeper) = root.source() {
        root = deeper;
    }
    let root = root.to_string();
    if outer.contains(&root) { outer } else { format!("{outer}: {root}") }
}

/// The version is older than what the server remembers.
fn is_expired(error: &watcher::Error) -> bool {
    status(error).is_some_and(|status| status.code == 410)
}

/// The server has no such kind, or forbids it to us.
fn is_refused(error: &watcher::Error) -> bool {
    status(error).is_some_and(|status| matches!(status.code, 401 | 403 | 404 | 405))
}

/// A server before 1.32 or with the feature off refuses `sendInitialEvents`.
fn does_not_stream(error: &watcher::Error) -> bool {
    let watcher::Error::WatchStartFailed(kube::Error::Api(status)) = error else { return false };
    matches!(status.code, 400 | 422)
}

#[cfg(test)]
#[path = "kubernetes_tests.rs"]
mod tests;

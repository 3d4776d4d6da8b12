//! An API server inside the test: lists and watches of Services, EndpointSlices and Nodes over HTTP.
//!
//! It speaks what a client library expects of the real one: pages with continue tokens, selectors, versions,
//! bookmarks, streaming lists, `410 Gone`. And it fails on demand in every way that clusters see: errors, silence,
//! dropped connections, forgotten versions.

mod fault;
mod http;
mod selector;
mod store;
pub mod tls;
mod traffic;
mod watch;

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio_rustls::TlsAcceptor;

use crate::netns::Netns;
use crate::object::{Key, Kind, Object, Publish};
pub use fault::Fault;
use store::Store;
use traffic::Meter;
pub use traffic::Traffic;

/// How many changes a server lags behind that is stale.
const BEHIND: usize = 10;

/// How the server treats `sendInitialEvents`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StreamingLists {
    /// As a new server: initial events, then the bookmark that ends them.
    #[default]
    On,
    /// As a server that knows the parameter but has the feature off: `422 Invalid`.
    Rejected,
    /// As a server from before the parameter: a plain watch, and the bookmark never comes.
    Ignored,
}

/// How a watch from a forgotten version learns it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gone {
    /// As an event of type `ERROR` in the watch.
    #[default]
    Event,
    /// As the status of the response; watches that run are ended.
    Http,
}

/// With which headers a request came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// `Authorization`.
    pub authorization: Option<String>,
    /// `Accept`.
    pub accept: Option<String>,
    /// The client's certificate in DER.
    pub certificate: Option<Vec<u8>>,
}

#[derive(Clone, Copy, Debug)]
struct Behaviour {
    fault: Fault,
    streaming: StreamingLists,
    gone: Gone,
    bookmark_every: Duration,
    /// Whether storage tells of progress, so that each kind's version grows with all others.
    progress: bool,
    events_forbidden: bool,
    /// Watches that began before this many others are deaf.
    deaf: u64,
    /// Grows when connections are to be cut.
    epoch: u64,
    stopped: bool,
}

/// What the handle and the server share.
struct Shared {
    store: Arc<Mutex<Store>>,
    behaviour: tokio::sync::watch::Sender<Behaviour>,
    /// Woken at every change of the store.
    changed: Arc<tokio::sync::watch::Sender<u64>>,
    /// When each request came, and its path and query.
    requests: Mutex<Vec<(Instant, String)>>,
    /// The headers of each of them that tests look at.
    headers: Mutex<Vec<Asked>>,
    events: Mutex<Vec<serde_json::Value>>,
    /// What is shown while it is stale.
    past: Mutex<Store>,
    /// The server that kubeadm's ConfigMap names, if there is one.
    cluster_info: Mutex<Option<String>>,
    /// Watches that have begun.
    watches: AtomicU64,
    /// Watches that run.
    watching: AtomicU64,
    meter: Meter,
    /// How TLS is spoken, if it is.
    tls: Mutex<Option<Arc<rustls::ServerConfig>>>,
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What clients are shown.
    fn shown(&self) -> MutexGuard<'_, Store> {
        let stale = self.behaviour.borrow().fault == Fault::Stale;
        let store = if stale { &self.past } else { &self.store };
        store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far it is with a kind.
    fn version(&self, kind: Kind) -> u64 {
        let progress = self.behaviour.borrow().progress;
        let store = self.shown();
        if progress { store.version() } else { store.version_of(kind) }
    }

    /// Waits until a watch may tell something; the `n`th one may never again.
    async fn telling(&self, n: u64) {
        let mut behaviour = self.behaviour.subscribe();
        // An error means that the server has ended.
        behaviour.wait_for(|now| !now.fault.silences() && n >= now.deaf).await.ok();
    }

    /// Waits until requests may be answered.
    async fn answering(&self) {
        let mut behaviour = self.behaviour.subscribe();
        // An error means that the server has ended.
        behaviour.wait_for(|now| now.fault != Fault::Hang).await.ok();
    }
}

/// A running server and the handle to its objects and its faults. Dropping it ends it.
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// Serves on a listening socket, which may come from any namespace ([`Netns::listen`]).
    pub fn start(listener: TcpListener) -> Result<Self> {
        let changed = Arc::new(tokio::sync::watch::Sender::new(0));
        Self::with(listener, Arc::default(), changed)
    }

    /// Another server of the same cluster: what is put into one is in both, and each fails on its own.
    pub fn beside(&self, listener: TcpListener) -> Result<Self> {
        Self::with(listener, self.shared.store.clone(), self.shared.changed.clone())
    }

    fn with(
        listener: TcpListener,
        store: Arc<Mutex<Store>>,
        changed: Arc<tokio::sync::watch::Sender<u64>>,
    ) -> Result<Self> {
        let address = listener.local_addr().context("the API server's address")?;
        listener.set_nonblocking(true).context("making the API server's socket non-blocking")?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("a runtime for the API server")?;
        let behaviour = Behaviour {
            fault: Fault::None,
            streaming: StreamingLists::On,
            gone: Gone::Event,
            bookmark_every: Duration::from_secs(1),
            progress: true,
            events_forbidden: false,
            deaf: 0,
            epoch: 0,
            stopped: false,
        };
        let shared = Arc::new(Shared {
            store,
            behaviour: tokio::sync::watch::Sender::new(behaviour),
            changed,
            requests: Mutex::default(),
            headers: Mutex::default(),
            events: Mutex::default(),
            past: Mutex::default(),
            cluster_info: Mutex::default(),
            watches: AtomicU64::new(0),
            watching: AtomicU64::new(0),
            meter: Meter::default(),
            tls: Mutex::default(),
        });
        let served = shared.clone();
        let thread = std::thread::Builder::new()
            .name("apiserver".into())
            .spawn(move || runtime.block_on(serve(listener, served)))
            .context("starting the API server's thread")?;
        Ok(Self { shared, address, thread: Some(thread) })
    }

    /// Serves inside a namespace.
    pub fn start_in(netns: &Netns, address: SocketAddr) -> Result<Self> {
        Self::start(netns.listen(address)?)
    }

    /// Speaks TLS from now on, with this certificate; clients have to show one of `clients` if there is one.
    /// Connections there were are cut.
    pub fn secure(&self, pair: &tls::Pair, clients: Option<&tls::Ca>) -> Result<()> {
        let config = pair.config(clients)?;
        *self.shared.tls.lock().unwrap_or_else(PoisonError::into_inner) = Some(config);
        self.cut();
        Ok(())
    }

    /// Its URL, for `--apiserver`.
    #[must_use]
    pub fn url(&self) -> String {
        let tls = self.shared.tls.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        format!("{}://{}", if tls { "https" } else { "http" }, self.address)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Creates or replaces an object.
    pub fn put(&self, object: impl Into<Object>) {
        self.shared.store().put(&object.into());
        self.wake();
    }

    /// Deletes an object; whether there was one.
    pub fn delete(&self, key: &Key) -> bool {
        let deleted = self.shared.store().delete(key);
        self.wake();
        deleted
    }

    /// Fails from now on in this way.
    pub fn fail(&self, fault: Fault) {
        if fault == Fault::Stale {
            let past = self.shared.store().past(BEHIND);
            *self.shared.past.lock().unwrap_or_else(PoisonError::into_inner) = past;
        }
        self.shared.behaviour.send_modify(|now| {
            now.fault = fault;
            now.epoch += u64::from(fault == Fault::Drop);
        });
    }

    /// Shows kubeadm's ConfigMap `cluster-info` with this server to whoever does not say who they are.
    pub fn cluster_info(&self, server: &str) {
        let mut shown = self.shared.cluster_info.lock().unwrap_or_else(PoisonError::into_inner);
        *shown = Some(server.to_owned());
    }

    /// The watches that run fall silent for ever; new ones work.
    pub fn deafen(&self) {
        let deaf = self.shared.watches.load(Ordering::Relaxed);
        self.shared.behaviour.send_modify(|now| now.deaf = deaf);
    }

    /// Whether any watch runs here.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.shared.watching.load(Ordering::Relaxed) > 0
    }

    /// Cuts all connections once.
    pub fn cut(&self) {
        self.shared.behaviour.send_modify(|now| now.epoch += 1);
    }

    /// Forgets all versions so far: watches from them learn it in this way, running ones at once.
    pub fn expire(&self, gone: Gone) {
        self.shared.behaviour.send_modify(|now| now.gone = gone);
        self.shared.store().compact();
        self.wake();
    }

    /// Treats `sendInitialEvents` in this way from now on.
    pub fn streaming_lists(&self, streaming: StreamingLists) {
        self.shared.behaviour.send_modify(|now| now.streaming = streaming);
    }

    /// Sends bookmarks to watches that are idle for this long; one second by default.
    pub fn bookmark_every(&self, interval: Duration) {
        self.shared.behaviour.send_modify(|now| now.bookmark_every = interval);
    }

    /// From now on a kind's version grows only when one of its objects changes, as where storage tells of no progress.
    pub fn without_progress(&self) {
        self.shared.behaviour.send_modify(|now| now.progress = false);
    }

    /// The requests so far: path and query.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        self.timed_requests().into_iter().map(|(_, request)| request).collect()
    }

    /// The headers of the requests so far, in the same order.
    #[must_use]
    pub fn headers(&self) -> Vec<Asked> {
        self.shared.headers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The events that clients have created, in the form they have now.
    #[must_use]
    pub fn events(&self) -> Vec<serde_json::Value> {
        self.shared.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Refuses events from now on.
    pub fn forbid_events(&self) {
        self.shared.behaviour.send_modify(|now| now.events_forbidden = true);
    }

    fn wake(&self) {
        self.shared.changed.send_modify(|count| *count += 1);
    }
}

impl Publish for ApiServer {
    fn publish(&self, object: &Object) -> Result<()> {
        self.put(object.clone());
        Ok(())
    }

    fn retract(&self, key: &Key) -> Result<()> {
        anyhow::ensure!(self.delete(key), "the API server has no {key:?}");
        Ok(())
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.shared.behaviour.send_modify(|now| now.stopped = true);
        if let Some(thread) = self.thread.take() {
            // A panic of the server has been printed where it happened.
            thread.join().ok();
        }
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let listener = tokio::net::TcpListener::from_std(listener).expect("the runtime polls sockets");
    let mut behaviour = shared.behaviour.subscribe();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = behaviour.wait_for(|now| now.stopped) => return,
        };
        // The client gave up before it was accepted.
        let Ok((stream, _)) = accepted else { continue };
        if shared.behaviour.borrow().fault != Fault::Drop {
            tokio::spawn(connection(stream, shared.clone()));
        }
    }
}

/// Serves one connection until it ends or all connections are cut.
async fn connection(stream: tokio::net::TcpStream, shared: Arc<Shared>) {
    let mut behaviour = shared.behaviour.subscribe();
    let epoch = behaviour.borrow().epoch;
    tokio::select! {
        () = speak(stream, shared) => {}
        _ = behaviour.wait_for(|now| now.epoch != epoch) => {}
    }
}

/// HTTP, over TLS if that is spoken. A client that breaks off is no fault of ours.
async fn speak(stream: tokio::net::TcpStream, shared: Arc<Shared>) {
    let stream = traffic::counted(stream, &shared);
    let tls = shared.tls.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let builder = auto::Builder::new(TokioExecutor::new());
    let Some(tls) = tls else {
        let service = service_fn(move |request| http::answer(shared.clone(), None, request));
        drop(builder.serve_connection(TokioIo::new(stream), service).await);
        return;
    };
    let Ok(stream) = TlsAcceptor::from(tls).accept(stream).await else { return };
    let certificates = stream.get_ref().1.peer_certificates();
    let certificate = certificates.and_then(|chain| Some(chain.first()?.to_vec()));
    let service = service_fn(move |request| http::answer(shared.clone(), certificate.clone(), request));
    drop(builder.serve_connection(TokioIo::new(stream), service).await);
}

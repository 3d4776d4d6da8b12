//! The client's way to the API server: `kube`'s client on connections that notice when nobody is there.
//!
//! A request goes to the server in use, and on to the next one when it is not answered in time. What may take how long
//! is bounded everywhere: connecting, the first word of an answer, its rest ([`super::body`]). A connection that is
//! idle is asked whether its other end lives: by the kernel, and over HTTP/2 by PINGs, which a process that hangs does
//! not answer.

use std::cell::Cell;
use std::error::Error as StdError;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::RETRY_AFTER;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use hyper::body::{Body as _, Incoming};
use hyper_rustls::{DefaultServerNameResolver, HttpsConnectorBuilder, ResolveServerName};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::client::legacy::connect::{Connection, HttpConnector};
use hyper_util::client::legacy::{self};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::{Body, ConfigExt};
use rustls::pki_types::ServerName;
use tokio::time::timeout;
use tower::util::BoxCloneService;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt};

use super::body::Guarded;
use super::requests::Requests;
use super::servers::{Servers, Turn};
use super::tls::AsKubectl;

/// How long a connection attempt may take.
const CONNECT: Duration = Duration::from_secs(4);
/// How long a server may take to begin the answer to a watch, which it does before there is anything to tell.
const WATCH_BEGINS: Duration = Duration::from_secs(6);
/// How long it may take to begin another answer: it may have to make a long list first.
const BEGINS: Duration = Duration::from_secs(20);
/// How long it may take to say that it lives.
const LIVES: Duration = Duration::from_secs(5);
/// Where every API server says so, to everybody.
const LIVEZ: &str = "/livez";
/// Silence after which the other end is asked whether it is there.
const SILENCE: Duration = Duration::from_secs(6);
/// Time between two such questions, and how long a PING may be unanswered.
const PROBE: Duration = Duration::from_secs(3);
/// How many stay unanswered before the connection counts as lost.
const PROBES: u32 = 2;
/// How long what is sent may stay unacknowledged.
const UNACKNOWLEDGED: Duration = Duration::from_secs(12);
/// The name that every API server's certificate holds, and no other certificate of a cluster. Those that were only
/// heard of must show it: their addresses may be in certificates of kubelets, too.
const EVERY_SERVER: &str = "kubernetes.default.svc";

type Http = BoxCloneService<Request<Body>, Response<Incoming>, BoxError>;

/// A server said nothing at all.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("no answer within {0:?}")]
struct Silent(Duration);

/// There is nobody to ask.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("no API server is known")]
struct NoServer;

tokio::task_local! {
    /// The turn of the server that answered last.
    static ANSWERED: Cell<Option<u64>>;
}

/// Asks, and tells whose answer it was, as [`Servers`] counts: another server may be in use by the time that it is here. `None`
/// if nobody has answered.
pub(super) async fn answered_by<T>(asks: impl Future<Output = T>) -> (T, Option<u64>) {
    let asked = async { (asks.await, ANSWERED.get().get()) };
    ANSWERED.scope(Cell::new(None), asked).await
}

/// How the servers are spoken to; replaced as a whole when certificates or tokens change.
#[derive(Clone)]
struct Manner {
    config: kube::Config,
    http: Http,
}

/// The way. Clones are the same.
#[derive(Clone)]
pub(super) struct Way {
    servers: Arc<Servers>,
    manner: Arc<Mutex<Manner>>,
    requests: Requests,
}

impl Way {
    /// To these servers, as `config` says.
    pub(super) fn new(
        servers: Arc<Servers>,
        config: kube::Config,
        requests: Requests,
    ) -> Result<Self, kube::Error> {
        let manner = Arc::new(Mutex::new(Manner::new(config, &servers)?));
        Ok(Self { servers, manner, requests })
    }

    /// Speaks to them as `config` says from now on; whoever has a connection is told to renew it.
    pub(super) fn replace(&self, config: kube::Config) -> Result<(), kube::Error> {
        let manner = Manner::new(config, &self.servers)?;
        *self.manner() = manner;
        self.servers.renew();
        Ok(())
    }

    fn manner(&self) -> MutexGuard<'_, Manner> {
        self.manner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn http(&self) -> Http {
        self.manner().http.clone()
    }

    /// Leaves connections behind on which nothing was answered.
    fn reconnect(&self) {
        let mut manner = self.manner();
        match Manner::new(manner.config.clone(), &self.servers) {
            Ok(new) => *manner = new,
            Err(error) => tracing::debug!("the old connections stay: {error}"),
        }
    }

    /// A way to the same servers that does not say who we are.
    pub(super) fn anonymous(&self) -> Result<Self, kube::Error> {
        let mut config = self.manner().config.clone();
        config.auth_info = kube::config::AuthInfo::default();
        Self::new(self.servers.clone(), config, self.requests.clone())
    }

    pub(super) fn servers(&self) -> &Servers {
        &self.servers
    }

    /// Asks the server in use whether it lives. One that does not answer is left, if there is another, and its watches end.
    pub(super) async fn probe(&self) {
        let Some(turn) = self.servers.current() else { return };
        let Ok(uri) = at(&turn.url, &Uri::from_static(LIVEZ)) else { return };
        let ask = async {
            let mut again = true;
            loop {
                let mut request = Request::new(Body::empty());
                *request.uri_mut() = uri.clone();
                match self.http().oneshot(request).await {
                    Err(error) if lost(&*error) && std::mem::take(&mut again) => {}
                    answer => return answer,
                }
            }
        };
        let host = turn.url.authority().map_or("", http::uri::Authority::as_str);
        let counting = self.requests.begin("GET", host);
        let why = match timeout(LIVES, ask).await {
            Ok(Ok(answer)) => {
                counting.done(Some(answer.status()));
                self.servers.answered(&turn, answer.version());
                // Read to its end the connection can be used again; one of which nothing comes may go.
                let mut body = answer.into_body();
                let rest = async {
                    while let Some(Ok(_)) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
                    }
                };
                return drop(timeout(LIVES, rest).await);
            }
            Ok(Err(error)) => cause(&*error),
            Err(_) => Silent(LIVES).to_string(),
        };
        counting.done(None);
        self.reconnect();
        self.servers.hangs(&turn, &why);
    }

    async fn send(self, request: Request<Body>) -> Result<Response<Guarded<Incoming>>, BoxError> {
        let (head, body) = request.into_parts();
        let body = body.collect_bytes().await?;
        let watch = head.uri.query().is_some_and(|query| query.contains("watch=true"));
        let limit = if watch { WATCH_BEGINS } else { BEGINS };
        let _admitted = self.servers.admit().await;
        let mut last: BoxError = NoServer.into();
        let (mut tries, mut again) = (self.servers.len(), true);
        while tries > 0 {
            let Some(turn) = self.servers.current() else { break };
            let mut head = head.clone();
            head.uri = at(&turn.url, &head.uri)?;
            let request = Request::from_parts(head.clone(), Body::from(body.clone()));
            let host = turn.url.authority().map_or("", http::uri::Authority::as_str);
            let counting = self.requests.begin(head.method.as_str(), host);
            let answer = timeout(limit, self.http().oneshot(request)).await;
            match answer {
                Ok(Ok(answer)) => {
                    counting.done(Some(answer.status()));
                    self.servers.answered(&turn, answer.version());
                    // Not everybody wants to know.
                    let _ = ANSWERED.try_with(|answered| answered.set(Some(turn.generation())));
                    self.rest(&turn, &answer);
                    let status = answer.status();
                    return Ok(answer.map(|body| Guarded::new(body, status, watch)));
                }
                Ok(Err(error)) => last = error,
                Err(_) => {
                    last = Silent(limit).into();
                    self.reconnect();
                }
            }
            counting.done(None);
            // A connection that lay idle may have been closed meanwhile: that says nothing of the server.
            if head.method == Method::GET && lost(&*last) && std::mem::take(&mut again) {
                continue;
            }
            tries -= 1;
            self.servers.failed(&turn, &cause(&*last));
            if head.method != Method::GET {
                return Err(last); // It may have been done.
            }
        }
        self.servers.exhausted();
        Err(last)
    }

    /// Follows `Retry-After`.
    fn rest(&self, turn: &Turn, answer: &Response<Incoming>) {
        if ![StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&answer.status()) {
            return;
        }
        let seconds = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        if let Some(seconds) = seconds {
            self.servers.hold(turn, Duration::from_secs(seconds));
        }
    }
}

impl Service<Request<Body>> for Way {
    type Response = Response<Guarded<Incoming>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.clone().send(request))
    }
}

impl Manner {
    fn new(config: kube::Config, servers: &Arc<Servers>) -> Result<Self, kube::Error> {
        let http = Self::build(&config, servers)?;
        Ok(Self { config, http })
    }

    fn build(config: &kube::Config, servers: &Arc<Servers>) -> Result<Http, kube::Error> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_keepalive(Some(SILENCE));
        tcp.set_keepalive_interval(Some(PROBE));
        tcp.set_keepalive_retries(Some(PROBES));
        tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
        let Some(proxy) = &config.proxy_url else { return Self::over(tcp, config, servers) };
        let unsupported = || kube::Error::ProxyProtocolUnsupported { proxy_url: Box::new(proxy.clone()) };
        let (user, password) = userinfo(proxy);
        let basic = user.as_ref().map(|user| basic(user, password.as_deref().unwrap_or_default()));
        match proxy.scheme_str() {
            Some("http") => {
                let tunnel = Tunnel::new(proxy.clone(), tcp);
                let tunnel = match basic {
                    Some(basic) => tunnel.with_auth(basic),
                    None => tunnel,
                };
                Self::over(tunnel, config, servers)
            }
            Some("https") => {
                let tunnel = Tunnel::new(proxy.clone(), config.rustls_https_connector_with_connector(tcp)?);
                let tunnel = match basic {
                    Some(basic) => tunnel.with_auth(basic),
                    None => tunnel,
                };
                Self::over(tunnel, config, servers)
            }
            Some("socks5") => {
                let socks = SocksV5::new(proxy.clone(), tcp);
                let socks = match user {
                    Some(user) => socks.with_auth(user, password.unwrap_or_default()),
                    None => socks,
                };
                Self::over(socks, config, servers)
            }
            _ => Err(unsupported()),
        }
    }

    /// HTTP over TLS over whatever leads there.
    fn over<C>(connector: C, config: &kube::Config, servers: &Arc<Servers>) -> Result<Http, kube::Error>
    where
        C: Service<Uri> + Clone + Send + Sync + 'static,
        C::Response: Connection + hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
        C::Future: Send + 'static,
        C::Error: Into<BoxError> + Send + Sync + 'static,
    {
        let mut tls = config.rustls_client_config()?;
        if let (Some(given), false) = (&config.root_cert, config.accept_invalid_certs) {
            match AsKubectl::new(given, tls.crypto_provider()) {
                Ok(verifier) => tls.dangerous().set_certificate_verifier(Arc::new(verifier)),
                Err(why) => tracing::debug!("no CA of the kubeconfig can be used: {why}"),
            }
        }
        let fixed = config.tls_server_name.clone().and_then(|name| ServerName::try_from(name).ok());
        let servers = servers.clone();
        let resolve = move |uri: &Uri| match &fixed {
            Some(name) => Ok(name.clone()),
            None if servers.is_learnt(uri) => Ok(ServerName::try_from(EVERY_SERVER)?),
            None => DefaultServerNameResolver::default().resolve(uri),
        };
        let tls = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http();
        let tls = tls.with_server_name_resolver(resolve).enable_all_versions().wrap_connector(connector);
        let mut connector = TimeoutConnector::new(tls);
        connector.set_connect_timeout(Some(CONNECT));
        let http: legacy::Client<_, Body> = legacy::Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(BEGINS)
            .http2_keep_alive_interval(SILENCE)
            .http2_keep_alive_timeout(PROBE)
            .build(connector);
        let service = ServiceBuilder::new()
            .option_layer(config.auth_layer()?)
            .layer(config.extra_headers_layer()?)
            .map_err(BoxError::from)
            .service(http);
        Ok(service.boxed_clone())
    }
}

/// Whether a connection that there was has broken.
fn lost(error: &(dyn StdError + 'static)) -> bool {
    error.downcast_ref::<legacy::Error>().is_some_and(|error| !error.is_connect())
}

/// A server's URL, and the path and query of a request to it.
fn at(server: &Uri, request: &Uri) -> Result<Uri, BoxError> {
    let path = request.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let path = format!("{}{path}", server.path().trim_end_matches('/'));
    let mut parts = server.clone().into_parts();
    parts.path_and_query = Some(path.parse()?);
    Ok(Uri::from_parts(parts)?)
}

/// The user and the password of a proxy's URL.
fn userinfo(proxy: &Uri) -> (Option<String>, Option<String>) {
    let decoded = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
    let Some((userinfo, _)) = proxy.authority().and_then(|all| all.as_str().rsplit_once('@')) else {
        return (None, None);
    };
    let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
    (Some(decoded(user)), Some(decoded(password)))
}

fn basic(user: &str, password: &str) -> HeaderValue {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    let mut value = HeaderValue::try_from(format!("Basic {text}")).expect("base64 is text");
    value.set_sensitive(true);
    value
}

/// An error and its root: "connection refused" stands deep below "Connect".
pub(super) fn cause(error: &(dyn StdError + 'static)) -> String {
    let (outer, mut root) = (error.to_string(), error);
    while let Some(deeper) = root.source() {
        root = deeper;
    }
    let root = root.to_string();
    if outer.contains(&root) { outer } else { format!("{outer}: {root}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers one request in a hurry after another, each with this status and when `release` says so.
    async fn serve(
        listener: tokio::net::TcpListener,
        status: &'static str,
        release: Arc<tokio::sync::Notify>,
    ) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await.unwrap();
            release.notified().await;
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn an_answer_is_told_as_that_of_the_server_that_gave_it_although_another_is_in_use_by_then() {
        let release = Arc::new(tokio::sync::Notify::new());
        let mut urls = Vec::new();
        for status in ["500 Odd", "200 OK"] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            urls.push(format!("http://{}/", listener.local_addr().unwrap()).parse::<Uri>().unwrap());
            tokio::spawn(serve(listener, status, release.clone()));
        }
        let config = kube::Config::new(urls[0].clone());
        let servers = Arc::new(Servers::new(urls, prometheus_client::metrics::counter::Counter::default()));
        let way = Way::new(servers.clone(), config, Requests::default()).unwrap();
        let client = kube::Client::new(way, "default");
        let ask = || client.send(Request::get("/api").body(Body::empty()).unwrap());
        let (first, turn) = (answered_by(ask()), servers.current().unwrap().generation());
        let move_on = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(servers.blame(turn, "somebody else has heard of it"));
            release.notify_one();
        };
        let ((answer, by), ()) = tokio::join!(first, move_on);
        assert_eq!((answer.unwrap().status().as_u16(), by), (500, Some(turn)));
        release.notify_one();
        let (answer, by) = answered_by(ask()).await;
        assert_eq!((answer.unwrap().status().as_u16(), by), (200, Some(turn + 1)));
        assert_eq!(answered_by(async {}).await.1, None);
    }

    #[test]
    fn a_server_may_stand_below_a_path() {
        for (server, whole) in [
            ("https://10.0.0.1:6443", "https://10.0.0.1:6443/api/v1/nodes?watch=true"),
            ("https://rancher/k8s/clusters/c-1/", "https://rancher/k8s/clusters/c-1/api/v1/nodes?watch=true"),
        ] {
            let request = Uri::from_static("/api/v1/nodes?watch=true");
            assert_eq!(at(&server.parse().unwrap(), &request).unwrap(), whole);
        }
    }

    #[test]
    fn a_proxy_may_want_a_name_and_a_password() {
        let of = |url: &'static str| userinfo(&Uri::from_static(url));
        assert_eq!(of("http://proxy:3128"), (None, None));
        assert_eq!(of("http://u:p%40ss@proxy:3128"), (Some("u".into()), Some("p@ss".into())));
        assert_eq!(basic("user", "pass"), "Basic dXNlcjpwYXNz");
    }
}

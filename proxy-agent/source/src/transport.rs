//! The HTTP transport below `kube`'s client: time-outs, keep-alive and failover.
//!
//! A request goes to the server in use, and to the next one if it is not answered in time. Everything has a time-out:
//! connecting, the headers of an answer, its body ([`super::body`]). Idle connections are kept under watch by TCP
//! keep-alive and by HTTP/2 PINGs, which a process that hangs does not answer.

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

use super::body::LimitedBody;
use super::requests::Requests;
use super::servers::{Servers, Target};
use super::tls::KubectlVerifier;

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// How long the headers of a watch may take. A server sends them before there is an event.
const WATCH_HEADERS_TIMEOUT: Duration = Duration::from_secs(6);
/// How long the headers of another answer may take: a server may have to build a long list first.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a liveness probe may take.
const LIVEZ_TIMEOUT: Duration = Duration::from_secs(5);
/// Every API server answers this, without authentication.
const LIVEZ: &str = "/livez";
/// Idle time after which keep-alive probes are sent.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(6);
/// Time between two TCP probes, and how long an HTTP/2 PING may take.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
/// How many TCP probes go unanswered before the connection counts as lost.
const KEEPALIVE_RETRIES: u32 = 2;
/// How long sent data may stay unacknowledged.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(12);
/// A name in every API server's certificate, and in no other certificate of a cluster. Discovered servers must show it: their
/// addresses may be in certificates of kubelets, too.
const APISERVER_NAME: &str = "kubernetes.default.svc";

type Http = BoxCloneService<Request<Body>, Response<Incoming>, BoxError>;

#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("no answer within {0:?}")]
struct NoResponse(Duration);

#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("no API server is known")]
struct NoServer;

tokio::task_local! {
    /// The generation of the server that answered last.
    static RESPONDER: Cell<Option<u64>>;
}

/// Sends a request, and returns the generation of the server that answered, if one has: another server may be in use by
/// then.
pub(super) async fn with_responder<T>(request: impl Future<Output = T>) -> (T, Option<u64>) {
    let sent = async { (request.await, RESPONDER.get().get()) };
    RESPONDER.scope(Cell::new(None), sent).await
}

/// The HTTP client and its settings; replaced as a whole when certificates or tokens change.
#[derive(Clone)]
struct HttpClient {
    config: kube::Config,
    http: Http,
}

/// Sends requests to whichever server is in use. Clones share the client.
#[derive(Clone)]
pub(super) struct Transport {
    servers: Arc<Servers>,
    client: Arc<Mutex<HttpClient>>,
    requests: Requests,
}

impl Transport {
    pub(super) fn new(
        servers: Arc<Servers>,
        config: kube::Config,
        requests: Requests,
    ) -> Result<Self, kube::Error> {
        let client = Arc::new(Mutex::new(HttpClient::new(config, &servers)?));
        Ok(Self { servers, client, requests })
    }

    /// Uses other credentials or TLS settings from now on, and has all connections renewed.
    pub(super) fn replace(&self, config: kube::Config) -> Result<(), kube::Error> {
        let client = HttpClient::new(config, &self.servers)?;
        *self.client() = client;
        self.servers.reconnect();
        Ok(())
    }

    fn client(&self) -> MutexGuard<'_, HttpClient> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn http(&self) -> Http {
        self.client().http.clone()
    }

    /// Abandons the connections: nothing was answered on them.
    fn reconnect(&self) {
        let mut client = self.client();
        match HttpClient::new(client.config.clone(), &self.servers) {
            Ok(new) => *client = new,
            Err(error) => tracing::debug!("the old connections stay: {error}"),
        }
    }

    /// A transport to the same servers without credentials.
    pub(super) fn anonymous(&self) -> Result<Self, kube::Error> {
        let mut config = self.client().config.clone();
        config.auth_info = kube::config::AuthInfo::default();
        Self::new(self.servers.clone(), config, self.requests.clone())
    }

    pub(super) fn servers(&self) -> &Servers {
        &self.servers
    }

    /// Sends a liveness probe to the server in use. If it does not answer: fails over, if there is another, and ends its watches.
    pub(super) async fn probe(&self) {
        let Some(target) = self.servers.current() else { return };
        let Ok(uri) = request_url(&target.url, &Uri::from_static(LIVEZ)) else { return };
        let ask = async {
            let mut retry = true;
            loop {
                let mut request = Request::new(Body::empty());
                *request.uri_mut() = uri.clone();
                match self.http().oneshot(request).await {
                    Err(error) if is_connection_lost(&*error) && std::mem::take(&mut retry) => {}
                    answer => return answer,
                }
            }
        };
        let host = target.url.authority().map_or("", http::uri::Authority::as_str);
        let counting = self.requests.begin("GET", host);
        let why = match timeout(LIVEZ_TIMEOUT, ask).await {
            Ok(Ok(answer)) => {
                counting.done(Some(answer.status()));
                self.servers.answered(&target, answer.version());
                // A body that was read to its end lets the connection be reused.
                let mut body = answer.into_body();
                let rest = async {
                    while let Some(Ok(_)) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
                    }
                };
                return drop(timeout(LIVEZ_TIMEOUT, rest).await);
            }
            Ok(Err(error)) => with_root_cause(&*error),
            Err(_) => NoResponse(LIVEZ_TIMEOUT).to_string(),
        };
        counting.done(None);
        self.reconnect();
        self.servers.unresponsive(&target, &why);
    }

    async fn send(self, request: Request<Body>) -> Result<Response<LimitedBody<Incoming>>, BoxError> {
        let (head, body) = request.into_parts();
        let body = body.collect_bytes().await?;
        let watch = head.uri.query().is_some_and(|query| query.contains("watch=true"));
        let limit = if watch { WATCH_HEADERS_TIMEOUT } else { HEADERS_TIMEOUT };
        let _admitted = self.servers.admit().await;
        let mut last: BoxError = NoServer.into();
        let (mut tries, mut retry) = (self.servers.len(), true);
        while tries > 0 {
            let Some(target) = self.servers.current() else { break };
            let mut head = head.clone();
            head.uri = request_url(&target.url, &head.uri)?;
            let request = Request::from_parts(head.clone(), Body::from(body.clone()));
            let host = target.url.authority().map_or("", http::uri::Authority::as_str);
            let counting = self.requests.begin(head.method.as_str(), host);
            let answer = timeout(limit, self.http().oneshot(request)).await;
            match answer {
                Ok(Ok(answer)) => {
                    counting.done(Some(answer.status()));
                    self.servers.answered(&target, answer.version());
                    // Outside of `with_responder` there is no cell.
                    let _ = RESPONDER.try_with(|answered| answered.set(Some(target.generation())));
                    self.honor_retry_after(&target, &answer);
                    let status = answer.status();
                    return Ok(answer.map(|body| LimitedBody::new(body, status, watch)));
                }
                Ok(Err(error)) => last = error,
                Err(_) => {
                    last = NoResponse(limit).into();
                    self.reconnect();
                }
            }
            counting.done(None);
            // An idle connection may have been closed meanwhile: no fault of the server.
            if head.method == Method::GET && is_connection_lost(&*last) && std::mem::take(&mut retry) {
                continue;
            }
            tries -= 1;
            self.servers.failed(&target, &with_root_cause(&*last));
            if head.method != Method::GET {
                return Err(last); // It may have had its effect.
            }
        }
        self.servers.all_failed();
        Err(last)
    }

    /// Follows `Retry-After`.
    fn honor_retry_after(&self, target: &Target, answer: &Response<Incoming>) {
        if ![StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&answer.status()) {
            return;
        }
        let seconds = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        if let Some(seconds) = seconds {
            self.servers.retry_after(target, Duration::from_secs(seconds));
        }
    }
}

impl Service<Request<Body>> for Transport {
    type Response = Response<LimitedBody<Incoming>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.clone().send(request))
    }
}

impl HttpClient {
    fn new(config: kube::Config, servers: &Arc<Servers>) -> Result<Self, kube::Error> {
        let http = Self::build(&config, servers)?;
        Ok(Self { config, http })
    }

    fn build(config: &kube::Config, servers: &Arc<Servers>) -> Result<Http, kube::Error> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_keepalive(Some(KEEPALIVE_IDLE));
        tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
        tcp.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
        tcp.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT));
        let Some(proxy) = &config.proxy_url else { return Self::with_connector(tcp, config, servers) };
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
                Self::with_connector(tunnel, config, servers)
            }
            Some("https") => {
                let tunnel = Tunnel::new(proxy.clone(), config.rustls_https_connector_with_connector(tcp)?);
                let tunnel = match basic {
                    Some(basic) => tunnel.with_auth(basic),
                    None => tunnel,
                };
                Self::with_connector(tunnel, config, servers)
            }
            Some("socks5") => {
                let socks = SocksV5::new(proxy.clone(), tcp);
                let socks = match user {
                    Some(user) => socks.with_auth(user, password.unwrap_or_default()),
                    None => socks,
                };
                Self::with_connector(socks, config, servers)
            }
            _ => Err(unsupported()),
        }
    }

    /// HTTP over TLS over this connector.
    fn with_connector<C>(
        connector: C,
        config: &kube::Config,
        servers: &Arc<Servers>,
    ) -> Result<Http, kube::Error>
    where
        C: Service<Uri> + Clone + Send + Sync + 'static,
        C::Response: Connection + hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
        C::Future: Send + 'static,
        C::Error: Into<BoxError> + Send + Sync + 'static,
    {
        let mut tls = config.rustls_client_config()?;
        if let (Some(given), false) = (&config.root_cert, config.accept_invalid_certs) {
            match KubectlVerifier::new(given, tls.crypto_provider()) {
                Ok(verifier) => tls.dangerous().set_certificate_verifier(Arc::new(verifier)),
                Err(why) => tracing::debug!("no CA of the kubeconfig can be used: {why}"),
            }
        }
        let fixed = config.tls_server_name.clone().and_then(|name| ServerName::try_from(name).ok());
        let servers = servers.clone();
        let resolve = move |uri: &Uri| match &fixed {
            Some(name) => Ok(name.clone()),
            None if servers.is_discovered(uri) => Ok(ServerName::try_from(APISERVER_NAME)?),
            None => DefaultServerNameResolver::default().resolve(uri),
        };
        let tls = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http();
        let tls = tls.with_server_name_resolver(resolve).enable_all_versions().wrap_connector(connector);
        let mut connector = TimeoutConnector::new(tls);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let http: legacy::Client<_, Body> = legacy::Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(HEADERS_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_IDLE)
            .http2_keep_alive_timeout(KEEPALIVE_INTERVAL)
            .build(connector);
        let service = ServiceBuilder::new()
            .option_layer(config.auth_layer()?)
            .layer(config.extra_headers_layer()?)
            .map_err(BoxError::from)
            .service(http);
        Ok(service.boxed_clone())
    }
}

/// Whether an established connection has broken.
fn is_connection_lost(error: &(dyn StdError + 'static)) -> bool {
    error.downcast_ref::<legacy::Error>().is_some_and(|error| !error.is_connect())
}

/// The URL of a request: that of the server, with the path and query.
fn request_url(server: &Uri, request: &Uri) -> Result<Uri, BoxError> {
    let path = request.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let path = format!("{}{path}", server.path().trim_end_matches('/'));
    let mut parts = server.clone().into_parts();
    parts.path_and_query = Some(path.parse()?);
    Ok(Uri::from_parts(parts)?)
}

/// User and password in a proxy's URL.
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
pub(super) fn with_root_cause(error: &(dyn StdError + 'static)) -> String {
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

    /// Answers requests with this status, one each time that `release` is notified.
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
    async fn the_responder_of_a_request_is_known_although_another_server_is_in_use_by_then() {
        let release = Arc::new(tokio::sync::Notify::new());
        let mut urls = Vec::new();
        for status in ["500 Odd", "200 OK"] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            urls.push(format!("http://{}/", listener.local_addr().unwrap()).parse::<Uri>().unwrap());
            tokio::spawn(serve(listener, status, release.clone()));
        }
        let config = kube::Config::new(urls[0].clone());
        let servers = Arc::new(Servers::new(urls, prometheus_client::metrics::counter::Counter::default()));
        let transport = Transport::new(servers.clone(), config, Requests::default()).unwrap();
        let client = kube::Client::new(transport, "default");
        let ask = || client.send(Request::get("/api").body(Body::empty()).unwrap());
        let (first, target) = (with_responder(ask()), servers.current().unwrap().generation());
        let move_on = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(servers.reject(target, "another task has failed over"));
            release.notify_one();
        };
        let ((answer, by), ()) = tokio::join!(first, move_on);
        assert_eq!((answer.unwrap().status().as_u16(), by), (500, Some(target)));
        release.notify_one();
        let (answer, by) = with_responder(ask()).await;
        assert_eq!((answer.unwrap().status().as_u16(), by), (200, Some(target + 1)));
        assert_eq!(with_responder(async {}).await.1, None);
    }

    #[test]
    fn a_server_may_stand_below_a_path() {
        for (server, whole) in [
            ("https://10.0.0.1:6443", "https://10.0.0.1:6443/api/v1/nodes?watch=true"),
            ("https://rancher/k8s/clusters/c-1/", "https://rancher/k8s/clusters/c-1/api/v1/nodes?watch=true"),
        ] {
            let request = Uri::from_static("/api/v1/nodes?watch=true");
            assert_eq!(request_url(&server.parse().unwrap(), &request).unwrap(), whole);
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

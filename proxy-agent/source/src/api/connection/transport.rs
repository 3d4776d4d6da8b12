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
use http::{Method, Request, Response, StatusCode, Uri};
use hyper::body::{Body as _, Incoming};
use hyper_util::client::legacy;
use kube::client::Body;
use tokio::time::timeout;
use tower::{BoxError, Service, ServiceExt};

use super::body::LimitedBody;
use super::connector::{Http, HttpClient};
use super::requests::Requests;
use super::servers::{Servers, Target};

/// How long the headers of a watch may take. A server sends them before there is an event.
const WATCH_HEADERS_TIMEOUT: Duration = Duration::from_secs(6);
/// How long the headers of another answer may take: a server may have to build a long list first.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a liveness probe may take.
const LIVEZ_TIMEOUT: Duration = Duration::from_secs(5);
/// Every API server answers this, without authentication.
const LIVEZ: &str = "/livez";

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
pub(in crate::api) async fn with_responder<T>(request: impl Future<Output = T>) -> (T, Option<u64>) {
    let sent = async { (request.await, RESPONDER.get().get()) };
    RESPONDER.scope(Cell::new(None), sent).await
}

/// Sends requests to whichever server is in use. Clones share the client.
#[derive(Clone)]
pub(in crate::api) struct Transport {
    servers: Arc<Servers>,
    client: Arc<Mutex<HttpClient>>,
    requests: Requests,
}

impl Transport {
    pub(in crate::api) fn new(
        servers: Arc<Servers>,
        config: kube::Config,
        requests: Requests,
    ) -> Result<Self, kube::Error> {
        let client = Arc::new(Mutex::new(HttpClient::new(config, &servers)?));
        Ok(Self { servers, client, requests })
    }

    /// Uses other credentials or TLS settings from now on, and has all connections renewed.
    pub(in crate::api) fn replace(&self, config: kube::Config) -> Result<(), kube::Error> {
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
    pub(in crate::api) fn anonymous(&self) -> Result<Self, kube::Error> {
        let mut config = self.client().config.clone();
        config.auth_info = kube::config::AuthInfo::default();
        Self::new(self.servers.clone(), config, self.requests.clone())
    }

    pub(in crate::api) fn servers(&self) -> &Servers {
        &self.servers
    }

    /// Sends a liveness probe to the server in use. If it does not answer: fails over, if there is another, and ends its watches.
    pub(in crate::api) async fn probe(&self) {
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
        let _admitted = self.servers.admit(head.method == Method::GET).await;
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
                    RESPONDER.try_with(|answered| answered.set(Some(target.generation()))).ok();
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

/// An error and its root: "connection refused" stands deep below "Connect".
pub(in crate::api) fn with_root_cause(error: &(dyn StdError + 'static)) -> String {
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
}

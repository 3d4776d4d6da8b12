//! The HTTP client of a transport: TCP keep-alive, a proxy, TLS, authentication.

use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper_rustls::{DefaultServerNameResolver, HttpsConnectorBuilder, ResolveServerName};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::client::legacy::connect::{Connection, HttpConnector};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::{Body, ConfigExt};
use rustls::pki_types::ServerName;
use tower::util::BoxCloneService;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt};

use super::servers::Servers;
use super::tls::KubectlVerifier;

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a connection is kept on which no request begins, although watches may run there: the longest watch lasts 290 s, and
/// the next one is not to need a connection of its own.
const POOL_IDLE: Duration = Duration::from_secs(300);
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

pub(super) type Http = BoxCloneService<Request<Body>, Response<Incoming>, BoxError>;

/// The HTTP client and its settings; replaced as a whole when certificates or tokens change.
#[derive(Clone)]
pub(super) struct HttpClient {
    pub(super) config: kube::Config,
    pub(super) http: Http,
}

impl HttpClient {
    pub(super) fn new(config: kube::Config, servers: &Arc<Servers>) -> Result<Self, kube::Error> {
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
        let Some(url) = &config.proxy_url else { return Self::with_connector(tcp, config, servers) };
        let unsupported = || kube::Error::ProxyProtocolUnsupported { proxy_url: Box::new(url.clone()) };
        let proxy = proxy(url, &config.cluster_url).ok_or_else(unsupported)?;
        match proxy.uri().scheme_str() {
            Some("http") => Self::with_connector(tunnel(&proxy, tcp), config, servers),
            Some("https") => {
                let tls = config.rustls_https_connector_with_connector(tcp)?;
                Self::with_connector(tunnel(&proxy, tls), config, servers)
            }
            Some("socks5") => {
                let socks = SocksV5::new(proxy.uri().clone(), tcp);
                let socks = match proxy.raw_auth() {
                    Some((user, password)) => socks.with_auth(user.to_owned(), password.to_owned()),
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
            .pool_idle_timeout(POOL_IDLE)
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

/// A proxy's URL as hyper-util reads it, with user and password.
fn proxy(url: &Uri, server: &Uri) -> Option<Intercept> {
    Matcher::builder().all(url.to_string()).build().intercept(server)
}

fn tunnel<C>(proxy: &Intercept, connector: C) -> Tunnel<C> {
    let tunnel = Tunnel::new(proxy.uri().clone(), connector);
    match proxy.basic_auth() {
        Some(auth) => tunnel.with_auth(auth.clone()),
        None => tunnel,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_may_want_a_name_and_a_password() {
        let of = |url| proxy(&Uri::from_static(url), &Uri::from_static("https://10.0.0.1:6443")).unwrap();
        let plain = of("http://proxy:3128");
        assert!(plain.basic_auth().is_none() && plain.raw_auth().is_none());
        assert_eq!(of("http://user:pass@proxy:3128").basic_auth().unwrap(), "Basic dXNlcjpwYXNz");
        assert_eq!(of("https://u:p%40ss@proxy:3128").basic_auth().unwrap(), "Basic dTpwQHNz");
        assert_eq!(of("socks5://u:p%40ss@proxy:1080").raw_auth(), Some(("u", "p@ss")));
    }
}

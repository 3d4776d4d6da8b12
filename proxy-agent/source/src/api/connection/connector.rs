//! The HTTP client of a transport: TCP keep-alive, a proxy, TLS, authentication.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Request, Response, Uri};
use hyper::body::Incoming;
use hyper_rustls::{DefaultServerNameResolver, HttpsConnectorBuilder, ResolveServerName};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::client::legacy::connect::{Connection, HttpConnector};
use hyper_util::client::legacy::{self};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::{Body, ConfigExt};
use rustls::pki_types::ServerName;
use tower::util::BoxCloneService;
use tower::{BoxError, Service, ServiceBuilder, ServiceExt};

use super::servers::Servers;
use super::tls::KubectlVerifier;

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// How long an unused connection is kept.
const POOL_IDLE: Duration = Duration::from_secs(20);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_may_want_a_name_and_a_password() {
        let of = |url: &'static str| userinfo(&Uri::from_static(url));
        assert_eq!(of("http://proxy:3128"), (None, None));
        assert_eq!(of("http://u:p%40ss@proxy:3128"), (Some("u".into()), Some("p@ss".into())));
        assert_eq!(basic("user", "pass"), "Basic dXNlcjpwYXNz");
    }
}

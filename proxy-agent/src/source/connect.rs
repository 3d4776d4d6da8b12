//! The client's way to the API server: what `kube` builds, on connections that notice when nobody is there.
//!
//! A watch may be silent for minutes, and one whose server has lost power is silent for ever. `kube` would ask
//! again after five minutes; the kernel's probes find it out in half of one. A server that lives and says nothing
//! is left to the watch's own time-out.

use std::time::Duration;

use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::Client;
use kube::client::{Body, ConfigExt};
use tower::{BoxError, ServiceBuilder};

use super::requests::Requests;

/// Silence after which the other end is asked whether it is there.
const SILENCE: Duration = Duration::from_secs(15);
/// Time between two such questions.
const PROBE: Duration = Duration::from_secs(5);
/// How many stay unanswered before the connection counts as lost.
const PROBES: u32 = 3;
/// How long what is sent may stay unacknowledged.
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);

/// A client whose requests are counted. What fails is told at once: the source asks again by itself.
pub(super) fn client(config: kube::Config, requests: &Requests) -> Result<Client, kube::Error> {
    if let Some(proxy_url) = config.proxy_url {
        return Err(kube::Error::ProxyProtocolUnsupported { proxy_url: Box::new(proxy_url) });
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_keepalive(Some(SILENCE));
    tcp.set_keepalive_interval(Some(PROBE));
    tcp.set_keepalive_retries(Some(PROBES));
    tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(tcp)?);
    connector.set_connect_timeout(config.connect_timeout);
    let http: legacy::Client<_, Body> = legacy::Client::builder(TokioExecutor::new()).build(connector);
    let host = config.cluster_url.authority().map_or("", http::uri::Authority::as_str);
    let service = ServiceBuilder::new()
        .layer(requests.counting(host))
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

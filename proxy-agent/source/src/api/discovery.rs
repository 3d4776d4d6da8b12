//! API servers that the cluster itself names, so that the loss of the configured one is survived.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::Uri;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::GetParams;
use kube::config::Kubeconfig;
use kube::{Api, Client};

use super::connection::{Origin, Servers, Transport};
use super::watch::Observer;
use crate::convert::{LABEL_SERVICE_NAME, address};

/// kubeadm writes this ConfigMap for machines that join; it can be read without credentials.
const CLUSTER_INFO: (&str, &str) = ("kube-public", "cluster-info");
/// Talos' load balancer for the API servers, on each of its nodes.
pub(super) const KUBE_PRISM: &str = "https://127.0.0.1:7445";
/// How many are saved for the next agent.
const MAX_SAVED: usize = 16;
/// Wait before the ConfigMap is read: the first lists are more urgent.
const DELAY: Duration = Duration::from_secs(5);

/// The API servers in a slice of the Service `default/kubernetes`; `None` for other slices.
fn from_slice(slice: &EndpointSlice, scheme: &str) -> Option<Vec<Uri>> {
    let labels = slice.metadata.labels.as_ref()?;
    let own = labels.get(LABEL_SERVICE_NAME).is_some_and(|name| name == "kubernetes");
    if !own || slice.metadata.namespace.as_deref() != Some("default") {
        return None;
    }
    let ports = slice.ports.iter().flatten();
    let port = ports.filter(|port| port.name.as_deref().is_none_or(|name| name == "https"));
    let port = port.filter_map(|port| u16::try_from(port.port?).ok()).next()?;
    let addresses = slice.endpoints.iter().flatten().flat_map(|endpoint| &endpoint.addresses);
    let urls = addresses.filter_map(|address| {
        let address = SocketAddr::new(address::ip(address).ok()?, port);
        format!("{scheme}://{address}/").parse().ok()
    });
    Some(urls.collect())
}

/// Where discovered servers are saved for the next agent.
pub trait ServerCache: Send + Sync {
    /// What was saved last, or an empty text.
    fn load(&self) -> String;
    fn save(&self, text: &str);
}

/// Takes the API servers out of slices, and saves them.
pub(super) fn observer(
    servers: Arc<Servers>,
    scheme: String,
    cache: Option<Box<dyn ServerCache>>,
) -> Observer<EndpointSlice> {
    let known: Mutex<BTreeMap<String, Vec<Uri>>> = Mutex::default();
    let saved: Mutex<String> = Mutex::default();
    Box::new(move |slice| {
        let Some(urls) = from_slice(slice, &scheme) else { return };
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(slice.metadata.name.clone().unwrap_or_default(), urls);
        let all: Vec<Uri> = known.values().flatten().cloned().collect();
        if all.is_empty() {
            return; // Impossible: a server has sent this.
        }
        servers.set(Origin::Saved, &[]);
        servers.set(Origin::Endpoints, &all);
        let text = to_text(&all);
        let mut saved = saved.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(cache), true) = (&cache, *saved != text) {
            cache.save(&text);
            *saved = text;
        }
    })
}

/// Reads kubeadm's ConfigMap once, if the cluster has it.
pub(super) async fn cluster_info(transport: Transport, servers: Arc<Servers>, scheme: &str) {
    tokio::time::sleep(DELAY).await;
    let Ok(transport) = transport.anonymous() else { return };
    let maps: Api<ConfigMap> = Api::namespaced(Client::new(transport, CLUSTER_INFO.0), CLUSTER_INFO.0);
    // From the server's cache: thousands of nodes ask.
    match maps.get_with(CLUSTER_INFO.1, &GetParams::any()).await {
        Ok(map) => servers.set(Origin::ClusterInfo, &from_cluster_info(&map, scheme)),
        Err(kube::Error::Api(status)) if status.is_not_found() => {}
        Err(error) => tracing::debug!("kubeadm's cluster-info cannot be read: {error}"),
    }
}

fn from_cluster_info(map: &ConfigMap, scheme: &str) -> Vec<Uri> {
    let text = map.data.as_ref().and_then(|data| data.get("kubeconfig"));
    let file = text.and_then(|text| Kubeconfig::from_yaml(text).ok());
    let clusters = file.into_iter().flat_map(|file| file.clusters);
    let urls = clusters.filter_map(|named| named.cluster?.server?.parse::<Uri>().ok());
    urls.filter(|url| is_server(url, scheme)).collect()
}

/// Whether this URL has the scheme of the configured server: no discovered one may lead us, and our token, away from TLS.
fn is_server(url: &Uri, scheme: &str) -> bool {
    url.authority().is_some() && url.scheme_str() == Some(scheme)
}

/// The text in which servers are saved for the next agent.
fn to_text(servers: &[Uri]) -> String {
    servers.iter().take(MAX_SAVED).map(|url| format!("{url}\n")).collect()
}

/// The servers in such a text. Like other discovered ones they are trusted only with a certificate.
pub(super) fn from_text(text: &str, scheme: &str) -> Vec<Uri> {
    let urls = text.lines().filter_map(|line| line.parse().ok());
    urls.filter(|url| is_server(url, scheme)).take(MAX_SAVED).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(namespace: &str, service: &str, port: Value) -> EndpointSlice {
        serde_json::from_value(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": { "name": "kubernetes", "namespace": namespace, "labels": { LABEL_SERVICE_NAME: service } },
            "endpoints": [{ "addresses": ["10.0.0.1"] }, { "addresses": ["fd00::1", "odd"] }],
            "ports": [{ "name": port, "port": 6443, "protocol": "TCP" }],
        }))
        .unwrap()
    }

    #[test]
    fn the_endpoints_of_the_service_kubernetes_are_servers_and_no_others() {
        let discovered = from_slice(&slice("default", "kubernetes", json!("https")), "https").unwrap();
        assert_eq!(discovered, ["https://10.0.0.1:6443/", "https://[fd00::1]:6443/"]);
        assert!(from_slice(&slice("tenant", "kubernetes", json!("https")), "https").is_none());
        assert!(from_slice(&slice("default", "web", json!("https")), "https").is_none());
        assert!(from_slice(&slice("default", "kubernetes", json!("other")), "https").is_none());
    }

    #[test]
    fn the_server_of_cluster_info_is_known() {
        let kubeconfig = "apiVersion: v1\nkind: Config\nclusters:\n- name: ''\n  cluster:\n    \
                          server: https://lb.example:6443\nusers: []\ncontexts: []\n";
        let map = json!({ "data": { "kubeconfig": kubeconfig } });
        let map = serde_json::from_value(map).unwrap();
        assert_eq!(from_cluster_info(&map, "https"), ["https://lb.example:6443/"]);
        assert!(
            from_cluster_info(&map, "http").is_empty()
                && from_cluster_info(&ConfigMap::default(), "https").is_empty()
        );
    }

    #[test]
    fn saved_servers_are_read_back_within_bounds_and_nothing_leads_away_from_tls() {
        let servers = ["https://10.0.0.1:6443/", "https://[fd00::1]:6443/"].map(Uri::from_static);
        assert_eq!(from_text(&to_text(&servers), "https"), servers);
        assert_eq!(
            from_text("http://10.0.0.1:6443/\nhttps://a:1/\n/odd\n\u{1}\n", "https"),
            ["https://a:1/"]
        );
        let many: Vec<Uri> = (0..40).map(|n| format!("https://10.0.0.{n}/").parse().unwrap()).collect();
        assert_eq!(from_text(&to_text(&many), "https"), many[..MAX_SAVED]);
        let lines: String = many.iter().map(|url| format!("{url}\n")).collect();
        assert_eq!(from_text(&lines, "https").len(), MAX_SAVED);
    }
}

//! Servers that the cluster itself tells of, so that the loss of the one we were given is not the end.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::config::Kubeconfig;
use kube::{Api, Client};

use super::address;
use super::connect::Way;
use super::servers::{Origin, Servers};

/// The label that names a slice's Service.
const SERVICE: &str = "kubernetes.io/service-name";
/// kubeadm writes this ConfigMap for machines that join, and shows it to whoever asks without saying who they are.
const CLUSTER_INFO: (&str, &str) = ("kube-public", "cluster-info");
/// Talos' own way to the API server, on each of its nodes.
pub(super) const KUBE_PRISM: &str = "https://127.0.0.1:7445";
/// So many are kept for the next agent.
const KEPT: usize = 16;
/// Pause before it is looked for: what has to be known first comes first.
const LATER: Duration = Duration::from_secs(5);

/// The API servers themselves, if this is a slice of the Service `kubernetes`; they speak `scheme`.
pub(super) fn endpoints(slice: &EndpointSlice, scheme: &str) -> Option<Vec<Uri>> {
    let labels = slice.metadata.labels.as_ref()?;
    let own = labels.get(SERVICE).is_some_and(|name| name == "kubernetes");
    if !own || slice.metadata.namespace.as_deref() != Some("default") {
        return None;
    }
    let ports = slice.ports.iter().flatten();
    let port = ports.filter(|port| port.name.as_deref().is_none_or(|name| name == "https"));
    let port = port.filter_map(|port| port.port).next()?;
    let addresses = slice.endpoints.iter().flatten().flat_map(|endpoint| &endpoint.addresses);
    let urls = addresses.filter_map(|address| {
        let url = match address::ip(address).ok()? {
            IpAddr::V4(v4) => format!("{scheme}://{v4}:{port}/"),
            IpAddr::V6(v6) => format!("{scheme}://[{v6}]:{port}/"),
        };
        url.parse().ok()
    });
    Some(urls.collect())
}

/// Asks for kubeadm's ConfigMap once; a cluster without one is as good.
pub(super) async fn cluster_info(way: Way, servers: Arc<Servers>, scheme: &str) {
    tokio::time::sleep(LATER).await;
    let Ok(way) = way.anonymous() else { return };
    let maps: Api<ConfigMap> = Api::namespaced(Client::new(way, CLUSTER_INFO.0), CLUSTER_INFO.0);
    match maps.get_opt(CLUSTER_INFO.1).await {
        Ok(Some(map)) => servers.set(Origin::ClusterInfo, &listed(&map, scheme)),
        Ok(None) => {}
        Err(error) => tracing::debug!("kubeadm's cluster-info is not shown to us: {error}"),
    }
}

fn listed(map: &ConfigMap, scheme: &str) -> Vec<Uri> {
    let text = map.data.as_ref().and_then(|data| data.get("kubeconfig"));
    let file = text.and_then(|text| Kubeconfig::from_yaml(text).ok());
    let clusters = file.into_iter().flat_map(|file| file.clusters);
    let urls = clusters.filter_map(|named| named.cluster?.server?.parse::<Uri>().ok());
    urls.filter(|url| is_server(url, scheme)).collect()
}

/// Whether this is a URL that is spoken to in the same way as the server that was given: nobody else is to lead us, and our
/// token, away from TLS.
fn is_server(url: &Uri, scheme: &str) -> bool {
    url.authority().is_some() && url.scheme_str() == Some(scheme)
}

/// These servers as text for the next agent.
pub(super) fn text(servers: &[Uri]) -> String {
    servers.iter().take(KEPT).map(|url| format!("{url}\n")).collect()
}

/// The servers of such a text. They are trusted as others that were learnt: when they show a certificate.
pub(super) fn kept(text: &str, scheme: &str) -> Vec<Uri> {
    let urls = text.lines().filter_map(|line| line.parse().ok());
    urls.filter(|url| is_server(url, scheme)).take(KEPT).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(namespace: &str, service: &str, port: Value) -> EndpointSlice {
        serde_json::from_value(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": { "name": "kubernetes", "namespace": namespace, "labels": { SERVICE: service } },
            "endpoints": [{ "addresses": ["10.0.0.1"] }, { "addresses": ["fd00::1", "odd"] }],
            "ports": [{ "name": port, "port": 6443, "protocol": "TCP" }],
        }))
        .unwrap()
    }

    #[test]
    fn the_endpoints_of_the_service_kubernetes_are_servers_and_no_others() {
        let learnt = endpoints(&slice("default", "kubernetes", json!("https")), "https").unwrap();
        assert_eq!(learnt, ["https://10.0.0.1:6443/", "https://[fd00::1]:6443/"]);
        assert!(endpoints(&slice("tenant", "kubernetes", json!("https")), "https").is_none());
        assert!(endpoints(&slice("default", "web", json!("https")), "https").is_none());
        assert!(endpoints(&slice("default", "kubernetes", json!("other")), "https").is_none());
    }

    #[test]
    fn the_server_of_cluster_info_is_known() {
        let kubeconfig = "apiVersion: v1\nkind: Config\nclusters:\n- name: ''\n  cluster:\n    \
                          server: https://lb.example:6443\nusers: []\ncontexts: []\n";
        let map = json!({ "data": { "kubeconfig": kubeconfig } });
        let map = serde_json::from_value(map).unwrap();
        assert_eq!(listed(&map, "https"), ["https://lb.example:6443/"]);
        assert!(listed(&map, "http").is_empty() && listed(&ConfigMap::default(), "https").is_empty());
    }

    #[test]
    fn what_is_kept_is_read_again_within_bounds_and_nothing_leads_away_from_tls() {
        let servers = ["https://10.0.0.1:6443/", "https://[fd00::1]:6443/"].map(Uri::from_static);
        assert_eq!(kept(&text(&servers), "https"), servers);
        assert_eq!(kept("http://10.0.0.1:6443/\nhttps://a:1/\n/odd\n\u{1}\n", "https"), ["https://a:1/"]);
        let many: Vec<Uri> = (0..40).map(|n| format!("https://10.0.0.{n}/").parse().unwrap()).collect();
        assert_eq!(kept(&text(&many), "https"), many[..KEPT]);
        let lines: String = many.iter().map(|url| format!("{url}\n")).collect();
        assert_eq!(kept(&lines, "https").len(), KEPT);
    }
}

//! Whether the agent would reach the API server through itself.
//!
//! The proxy makes the `kubernetes` ClusterIP work, so it must not need it: after a reboot nothing would ever
//! translate the address it waits for.

use std::path::Path;

use serde::Deserialize;

use super::{Host, SourceConfig};

/// The parts of a kubeconfig that name the server.
#[derive(Deserialize)]
struct Kubeconfig {
    #[serde(default, rename = "current-context")]
    current_context: String,
    #[serde(default)]
    contexts: Vec<NamedContext>,
    #[serde(default)]
    clusters: Vec<NamedCluster>,
}

#[derive(Deserialize)]
struct NamedContext {
    name: String,
    context: Context,
}

#[derive(Deserialize)]
struct Context {
    cluster: String,
}

#[derive(Deserialize)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Deserialize)]
struct Cluster {
    server: String,
}

/// The server that a kubeconfig's current context names.
pub(super) fn kubeconfig_server(host: &dyn Host, path: &Path) -> Result<String, String> {
    let text = host.read(path).map_err(|e| format!("cannot be read: {e}"))?;
    let config: Kubeconfig =
        serde_saphyr::from_str(&text).map_err(|e| format!("is not a kubeconfig: {e}"))?;
    let context =
        config.contexts.iter().find(|c| c.name == config.current_context).ok_or_else(|| {
            format!("current-context {:?} is not among its contexts", config.current_context)
        })?;
    let cluster = config
        .clusters
        .iter()
        .find(|c| c.name == context.context.cluster)
        .ok_or_else(|| format!("cluster {:?} is not among its clusters", context.context.cluster))?;
    Ok(cluster.cluster.server.clone())
}

/// The host of a URL: `https://[fd00::1]:6443/x` is `fd00::1`.
pub(super) fn url_host(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    match authority.strip_prefix('[').and_then(|v6| v6.split_once(']')) {
        Some((v6, _)) => v6,
        None => authority.split_once(':').map_or(authority, |(host, _)| host),
    }
}

/// Why the way to the API server would lead through this proxy, if it would.
///
/// Kubelet tells each container the ClusterIP twice; who points `KUBERNETES_SERVICE_HOST` elsewhere by hand
/// leaves the legacy variable alone, so the two tell an overridden address from the ClusterIP.
pub(super) fn depends_on_itself(
    host: &dyn Host,
    source: &SourceConfig,
    servers: &[String],
) -> Option<String> {
    let service_host = host.env("KUBERNETES_SERVICE_HOST");
    let legacy = host.env("KUBERNETES_PORT_443_TCP_ADDR");
    let cluster_ip = legacy.clone().or_else(|| service_host.clone());
    let used = match source {
        SourceConfig::Manifests(_) => return None,
        SourceConfig::InCluster => {
            let used = service_host?;
            // With one variable alone nothing tells a ClusterIP from an address set by hand.
            (legacy? == used).then_some(used)?
        }
        SourceConfig::Kubeconfig { .. } | SourceConfig::ApiServer(_) => {
            let itself = |host: &str| {
                let is_service_name = host == "kubernetes" || host.starts_with("kubernetes.default");
                cluster_ip.as_deref() == Some(host) || is_service_name
            };
            // One that needs no Service is enough.
            let mut hosts = servers.iter().map(|url| url_host(url));
            let used = hosts.clone().next()?.to_owned();
            hosts.all(itself).then_some(used)?
        }
    };
    Some(format!(
        "the API server is reached through {used}, which looks like the kubernetes Service that this agent \
         itself provides: after a reboot it could not start; give an address of the API server that needs no \
         Service, with --apiserver, --kubeconfig, or KUBERNETES_SERVICE_HOST"
    ))
}

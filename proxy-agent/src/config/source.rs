//! Where Services come from.

use std::fmt;
use std::path::PathBuf;

use super::errors::Errors;
use super::kube_proxy::fields::Origin;
use super::{Host, KubeProxyConfiguration, RunArgs, bootstrap};

/// Where Services come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceConfig {
    /// An API server, as a kubeconfig says.
    Kubeconfig {
        /// The kubeconfig.
        file: PathBuf,
        /// The servers' URLs, if others than the file's (Y-1).
        servers: Vec<String>,
    },
    /// API servers of one cluster, at these URLs.
    ApiServer(Vec<String>),
    /// A directory of manifests.
    Manifests(PathBuf),
    /// The API server of the cluster we are a pod of.
    InCluster,
}

impl fmt::Display for SourceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kubeconfig { file, servers } if servers.is_empty() => {
                write!(f, "kubeconfig {}", file.display())
            }
            Self::Kubeconfig { file, servers } => {
                write!(f, "kubeconfig {} at {}", file.display(), servers.join(","))
            }
            Self::ApiServer(servers) => write!(f, "API server {}", servers.join(",")),
            Self::Manifests(dir) => write!(f, "manifests {}", dir.display()),
            Self::InCluster => f.write_str("in-cluster API server"),
        }
    }
}

/// The one source that was named; without any the cluster we are a pod of.
pub(super) fn of(args: &RunArgs, kube: &KubeProxyConfiguration, errors: &mut Errors) -> SourceConfig {
    // Empty values are what templates leave of an unset option.
    let kubeconfig = Some(&kube.client_connection.kubeconfig).filter(|path| !path.is_empty());
    let given = args.apiserver.iter().map(|url| url.trim()).filter(|url| !url.is_empty());
    let apiserver: Vec<String> = given.map(str::to_owned).collect();
    let manifests = args.manifests.as_ref().filter(|path| !path.as_os_str().is_empty());
    for url in &apiserver {
        let known = url.starts_with("https://") || url.starts_with("http://");
        if !known || bootstrap::url_host(url).is_empty() {
            errors.add("--apiserver", url, "must be a URL such as https://10.0.0.10:6443");
        }
    }
    if let Some(dir) = manifests {
        // A file is made for a cluster, and says where that is; the flag is for who has none.
        if !apiserver.is_empty() || kubeconfig.is_some() && errors.origin == Origin::Flags {
            let reason = "only one of --kubeconfig, --apiserver and --manifests may be given";
            errors.add("--manifests", dir.display().to_string(), reason);
        }
        return SourceConfig::Manifests(dir.clone());
    }
    match kubeconfig {
        Some(file) => SourceConfig::Kubeconfig { file: file.into(), servers: apiserver },
        None if apiserver.is_empty() => SourceConfig::InCluster,
        None => SourceConfig::ApiServer(apiserver),
    }
}

/// The URLs of the API servers where they are known.
pub(super) fn servers(source: &SourceConfig, host: &dyn Host, errors: &mut Errors) -> Vec<String> {
    match source {
        SourceConfig::Kubeconfig { file, servers } if servers.is_empty() => {
            let server = bootstrap::kubeconfig_server(host, file);
            server.map_or_else(
                |reason| {
                    errors.add("--kubeconfig", file.display().to_string(), reason);
                    Vec::new()
                },
                |url| vec![url],
            )
        }
        SourceConfig::ApiServer(servers) | SourceConfig::Kubeconfig { servers, .. } => servers.clone(),
        SourceConfig::Manifests(_) | SourceConfig::InCluster => Vec::new(),
    }
}

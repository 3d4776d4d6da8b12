//! Why there is no client for the API server.

use std::path::PathBuf;

use super::exec_plugin::PluginError;

/// Why there is no client for the API server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig file is missing or wrong.
    #[error("cannot use the kubeconfig {path}: give a readable file with --kubeconfig")]
    Kubeconfig {
        path: PathBuf,
        #[source]
        source: kube::config::KubeconfigError,
    },
    /// Neither a kubeconfig nor a service account.
    #[error(
        "no kubeconfig was given and this is not a pod with a service account: use --kubeconfig or --apiserver"
    )]
    InCluster(#[source] kube::config::InClusterError),
    /// `--apiserver` is not a URL.
    #[error("--apiserver {url} is not a URL such as https://10.0.0.1:6443")]
    Url {
        /// What was given.
        url: String,
        #[source]
        source: http::uri::InvalidUri,
    },
    /// The file with the token cannot be read.
    #[error("cannot use the token in {path}: give a readable file that holds one")]
    Token {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The exec plugin gives no credential.
    #[error("cannot use the credential plugin of {path}")]
    Plugin {
        /// The kubeconfig.
        path: PathBuf,
        #[source]
        source: PluginError,
    },
    /// The kubeconfig's proxy is of an unknown kind.
    #[error("cannot use the proxy {url}: proxy-url takes http://, https:// and socks5:// with a host")]
    Proxy {
        /// Its URL.
        url: String,
    },
    /// The CA holds no certificate.
    #[error("the CA for the API server {url} holds no whole certificate")]
    Authority { url: String },
    /// The client cannot be built (certificates, mostly).
    #[error("cannot prepare a client for the API server {url}")]
    Client {
        url: String,
        #[source]
        source: kube::Error,
    },
}

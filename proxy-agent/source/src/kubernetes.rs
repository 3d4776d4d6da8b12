//! The Kubernetes API as a source: Services, EndpointSlices and our own Node, listed and watched for ever.
//!
//! Here is what is asked for; `follow` asks, `feed` makes changes of the answers, and `connect` leads to the server that
//! `servers` has chosen.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, PoisonError};

use http::Uri;
use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::{Api, Client};
use tokio::sync::{Notify, mpsc};

pub use super::account::Account;
use super::account::Read;
use super::connect::Way;
use super::convert::{self, LABEL_HEADLESS, LABEL_PROXY_NAME};
use super::feed::{Feed, Hook, Line};
use super::follow::Shared;
use super::learn;
use super::plugin::PluginError;
use super::probe;
use super::requests::Requests;
use super::servers::{Origin, Servers};
use agent_core::model::{Change, Kind};
use agent_core::model::{Node, Service, Slice};

/// Why there is no client for the API server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig file is missing or wrong.
    #[error("cannot use the kubeconfig {path}: give a readable file with --kubeconfig")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
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
        /// Why.
        #[source]
        source: http::uri::InvalidUri,
    },
    /// The file with the token cannot be read.
    #[error("cannot use the token in {path}: give a readable file that holds one")]
    Token {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The program that gives the credentials does not.
    #[error("cannot use the credential plugin of {path}")]
    Plugin {
        /// The kubeconfig.
        path: PathBuf,
        /// Why.
        #[source]
        source: PluginError,
    },
    /// The proxy of the kubeconfig is none that can be spoken to.
    #[error("cannot use the proxy {url}: proxy-url takes http://, https:// and socks5:// with a host")]
    Proxy {
        /// Its URL.
        url: String,
    },
    /// The CA is no certificate, or not a whole one.
    #[error("the CA for the API server {url} holds no whole certificate")]
    Authority {
        /// Its address.
        url: String,
    },
    /// The client cannot be built (certificates, mostly).
    #[error("cannot prepare a client for the API server {url}")]
    Client {
        /// Its address.
        url: String,
        /// Why.
        #[source]
        source: kube::Error,
    },
}

/// Where servers that were learnt are kept from one agent to the next.
pub trait Memory: Send + Sync {
    /// What was kept last; nothing if nothing was.
    fn recall(&self) -> String;
    /// Keeps this instead.
    fn keep(&self, text: &str);
}

/// A way to the API servers of a cluster.
pub struct Cluster {
    account: Account,
    read: Read,
    way: Way,
    shared: Shared,
    memory: Option<Box<dyn Memory>>,
}

impl Cluster {
    /// Reads the account, without asking anybody yet. Requests are counted in `requests`, servers kept in `memory`.
    pub async fn open(account: Account, requests: &Requests, memory: Box<dyn Memory>) -> Result<Self, Error> {
        let read = account.read().await?;
        let servers = Arc::new(Servers::new(read.servers.clone(), requests.moves()));
        if read.pod {
            servers.set(Origin::Local, &[Uri::from_static(learn::KUBE_PRISM)]);
        }
        // An address of yesterday may be somebody else's today: only certificates tell.
        let proves = scheme(&read.config) == "https" && !read.config.accept_invalid_certs;
        let memory = Some(memory).filter(|_| proves);
        if let Some(memory) = &memory {
            servers.set(Origin::Kept, &learn::kept(&memory.recall(), "https"));
        }
        let shared =
            Shared { servers: servers.clone(), requests: requests.clone(), look: Arc::new(Notify::new()) };
        let way = Way::new(servers, read.config.clone(), requests.clone());
        let way = way.map_err(|source| Error::Client { url: read.config.cluster_url.to_string(), source })?;
        Ok(Self { account, read, way, shared, memory })
    }

    /// A client for further requests; it goes to whichever server is in use.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::new(self.way.clone(), self.read.config.default_namespace.clone())
    }

    /// Sends what the API server says of Services, EndpointSlices, the Node `node_name` and ServiceCIDRs, until nobody
    /// listens (Y-4); with `pods` also of this node's pods.
    pub async fn run(self, node_name: Arc<str>, pods: bool, tx: mpsc::Sender<Change>) {
        let client = self.client();
        let Self { account, read, way, shared, memory } = self;
        let servers = shared.servers.clone();
        let scheme = scheme(&read.config);
        let all =
            feeds(client, &node_name, pods, &tx, &shared, learner(servers.clone(), scheme.clone(), memory));
        tokio::select! {
            () = all => {}
            () = account.follow(read, way.clone(), servers.clone(), shared.look.clone()) => {}
            () = probe::run(way.clone()) => {}
            () = async {
                learn::cluster_info(way, servers.clone(), &scheme).await;
                std::future::pending().await
            } => {}
            () = warn(&servers, &tx) => {}
            () = tx.closed() => {}
        }
    }
}

/// How the API server is spoken to.
fn scheme(config: &kube::Config) -> String {
    config.cluster_url.scheme_str().unwrap_or("https").to_owned()
}

/// Takes the API servers out of slices, and has them kept.
fn learner(
    servers: Arc<Servers>,
    scheme: String,
    memory: Option<Box<dyn Memory>>,
) -> Hook<discovery::EndpointSlice> {
    let known: Mutex<BTreeMap<String, Vec<Uri>>> = Mutex::default();
    let kept: Mutex<String> = Mutex::default();
    Box::new(move |slice| {
        let Some(urls) = learn::endpoints(slice, &scheme) else { return };
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(slice.metadata.name.clone().unwrap_or_default(), urls);
        let all: Vec<Uri> = known.values().flatten().cloned().collect();
        if all.is_empty() {
            return; // Nobody could have told us.
        }
        servers.set(Origin::Kept, &[]);
        servers.set(Origin::Endpoints, &all);
        let text = learn::text(&all);
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(memory), true) = (&memory, *kept != text) {
            memory.keep(&text);
            *kept = text;
        }
    })
}

/// Has what is wrong with the API servers shown, until nobody listens.
async fn warn(servers: &Servers, tx: &mpsc::Sender<Change>) {
    let mut said = Vec::new();
    loop {
        let lines = servers.troubles().await;
        if lines != said {
            let warnings = Change::Warnings { object: "API server".to_owned(), lines: lines.clone() };
            if tx.send(warnings).await.is_err() {
                return;
            }
            said = lines;
        }
    }
}

/// Follows everything that is needed, until nobody listens.
async fn feeds(
    client: Client,
    node_name: &str,
    pods: bool,
    tx: &mpsc::Sender<Change>,
    shared: &Shared,
    learner: Hook<discovery::EndpointSlice>,
) {
    let down = Arc::new(AtomicU32::new(0b111));
    let line = |kind: Kind| Line { kind, tx: tx.clone(), down: down.clone() };
    let not = |label: &str| Some(format!("!{label}"));
    let services = Feed::<core::Service, Service> {
        line: line(Kind::Service),
        what: "Service",
        labels: not(LABEL_PROXY_NAME),
        fields: Some("spec.clusterIP!=None".to_owned()), // S-1
        convert: convert::service,
        change: Change::Service,
        triggered: |_| None,
        hook: None,
    };
    let slices = Feed::<discovery::EndpointSlice, Slice> {
        line: line(Kind::Slice),
        what: "EndpointSlice",
        labels: not(LABEL_HEADLESS), // E-2
        fields: None,
        convert: convert::slice,
        change: Change::Slice,
        triggered: convert::triggered,
        hook: Some(learner),
    };
    let node = Feed::<core::Node, Node> {
        line: line(Kind::Node),
        what: "Node",
        labels: None,
        fields: Some(format!("metadata.name={node_name}")),
        convert: |object| {
            let (node, warnings) = convert::node(object);
            (Some(node), warnings)
        },
        change: |_, node| Change::Node(node),
        triggered: |_| None,
        hook: None,
    };
    let service_cidrs = Feed::<networking::ServiceCIDR, Vec<IpNet>> {
        line: line(Kind::ServiceCidr),
        what: "ServiceCIDR",
        labels: None,
        fields: None,
        convert: |object| {
            let (ranges, warnings) = convert::service_cidr(object);
            (Some(ranges), warnings)
        },
        change: |name, ranges| Change::ServiceRanges(name.name.to_string(), ranges),
        triggered: |_| None,
        hook: None,
    };
    let this_node_s_pods = async {
        let feed = Feed::<core::Pod, String> {
            line: line(Kind::Pod),
            what: "Pod",
            labels: None,
            fields: Some(format!("spec.nodeName={node_name}")),
            convert: convert::excluded,
            change: Change::Excluded,
            triggered: |_| None,
            hook: None,
        };
        if pods {
            feed.run(Api::all(client.clone()), None, shared.clone()).await;
        }
    };
    futures::future::join5(
        services.run(Api::all(client.clone()), None, shared.clone()),
        slices.run(
            Api::all(client.clone()),
            Some(Api::namespaced(client.clone(), "default")),
            shared.clone(),
        ),
        node.run(Api::all(client.clone()), None, shared.clone()),
        service_cidrs.run(Api::all(client.clone()), None, shared.clone()),
        this_node_s_pods,
    )
    .await;
}

#[cfg(test)]
#[path = "kubernetes_tests.rs"]
mod tests;

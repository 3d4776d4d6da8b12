//! The Kubernetes API as a source: Services, EndpointSlices, our own Node and ServiceCIDRs are listed and watched.
//!
//! Here is what is watched. `watch` lists and watches one kind, `connection` leads its requests to an API server, and
//! `discovery` finds more servers.

mod backoff;
mod connection;
mod discovery;
pub mod events;
mod watch;

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use http::Uri;
use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1 as networking;
use kube::{Api, Client};
use tokio::sync::{Notify, mpsc};

use crate::convert::{self, LABEL_HEADLESS, LABEL_PROXY_NAME};
use agent_core::model::{Change, Kind, Node, Service, Slice};
use connection::{Loaded, Origin, Servers, Transport};
use watch::{Observer, Output, Reflector, Shared};

pub use connection::{ClientConfig, Error, Requests};
pub use discovery::ServerCache;

/// The API servers of a cluster.
pub struct Cluster {
    client_config: ClientConfig,
    loaded: Loaded,
    transport: Transport,
    shared: Shared,
    cache: Option<Box<dyn ServerCache>>,
}

impl Cluster {
    /// Reads the configuration; sends no request yet. Requests are counted in `requests`, servers saved in `cache`.
    pub async fn open(
        client_config: ClientConfig,
        requests: &Requests,
        cache: Box<dyn ServerCache>,
    ) -> Result<Self, Error> {
        let loaded = client_config.read().await?;
        let servers = Arc::new(Servers::new(loaded.servers.clone(), requests.failovers()));
        if loaded.pod {
            servers.set(Origin::Local, &[Uri::from_static(discovery::KUBE_PRISM)]);
        }
        // A saved address may belong to another machine by now: only certificates show that.
        let verified = scheme(&loaded.config) == "https" && !loaded.config.accept_invalid_certs;
        let cache = Some(cache).filter(|_| verified);
        if let Some(cache) = &cache {
            servers.set(Origin::Saved, &discovery::from_text(&cache.load(), "https"));
        }
        let shared =
            Shared { servers: servers.clone(), requests: requests.clone(), reload: Arc::new(Notify::new()) };
        let transport = Transport::new(servers, loaded.config.clone(), requests.clone());
        let transport = transport
            .map_err(|source| Error::Client { url: loaded.config.cluster_url.to_string(), source })?;
        Ok(Self { client_config, loaded, transport, shared, cache })
    }

    /// A client for other requests, to whichever server is in use.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::new(self.transport.clone(), self.loaded.config.default_namespace.clone())
    }

    /// Sends the changes of Services, EndpointSlices, the Node `node_name` and ServiceCIDRs until the receiver is dropped
    /// (Y-4); with `pods` also those of this node's pods.
    pub async fn run(self, node_name: Arc<str>, pods: bool, tx: mpsc::Sender<Change>) {
        let client = self.client();
        let Self { client_config, loaded, transport, shared, cache } = self;
        let servers = shared.servers.clone();
        let scheme = scheme(&loaded.config);
        let all = reflectors(
            client,
            &node_name,
            pods,
            &tx,
            &shared,
            discovery::observer(servers.clone(), scheme.clone(), cache),
        );
        tokio::select! {
            () = all => {}
            () = client_config.follow_changes(loaded, transport.clone(), servers.clone(), shared.reload.clone()) => {}
            () = connection::probe(transport.clone()) => {}
            () = async {
                discovery::cluster_info(transport, servers.clone(), &scheme).await;
                std::future::pending::<()>().await;
            } => {}
            () = report_problems(&servers, &tx) => {}
            () = tx.closed() => {}
        }
    }
}

fn scheme(config: &kube::Config) -> String {
    config.cluster_url.scheme_str().unwrap_or("https").to_owned()
}

/// Sends the problems with the API servers as warnings, until the receiver is dropped.
async fn report_problems(servers: &Servers, tx: &mpsc::Sender<Change>) {
    let mut reported = Vec::new();
    loop {
        let lines = servers.problems().await;
        if lines != reported {
            let warnings = Change::Warnings { object: "API server".to_owned(), lines: lines.clone() };
            if tx.send(warnings).await.is_err() {
                return;
            }
            reported = lines;
        }
    }
}

/// Runs all reflectors until the receiver is dropped.
async fn reflectors(
    client: Client,
    node_name: &str,
    pods: bool,
    tx: &mpsc::Sender<Change>,
    shared: &Shared,
    discovery: Observer<EndpointSlice>,
) {
    let client = || client.clone();
    let unavailable = Arc::new(AtomicU32::new(0b111));
    let output = |kind: Kind| Output { kind, tx: tx.clone(), unavailable: unavailable.clone() };
    let not = |label: &str| Some(format!("!{label}"));
    let services = Reflector::<core::Service, Service> {
        output: output(Kind::Service),
        resource: "Service",
        label_selector: not(LABEL_PROXY_NAME),
        field_selector: Some("spec.clusterIP!=None".to_owned()), // S-1
        convert: convert::service,
        change: Change::Service,
        trigger_time: |_| None,
        observer: None,
    };
    let slices = Reflector::<EndpointSlice, Slice> {
        output: output(Kind::Slice),
        resource: "EndpointSlice",
        label_selector: not(LABEL_HEADLESS), // E-2
        field_selector: None,
        convert: convert::slice,
        change: Change::Slice,
        trigger_time: convert::triggered,
        observer: Some(discovery),
    };
    let node = Reflector::<core::Node, Node> {
        output: output(Kind::Node),
        resource: "Node",
        label_selector: None,
        field_selector: Some(format!("metadata.name={node_name}")),
        convert: |object| {
            let (node, warnings) = convert::node(object);
            (Some(node), warnings)
        },
        change: |_, node| Change::Node(node),
        trigger_time: |_| None,
        observer: None,
    };
    let service_cidrs = Reflector::<networking::ServiceCIDR, Vec<IpNet>> {
        output: output(Kind::ServiceCidr),
        resource: "ServiceCIDR",
        label_selector: None,
        field_selector: None,
        convert: |object| {
            let (ranges, warnings) = convert::service_cidr(object);
            (Some(ranges), warnings)
        },
        change: |name, ranges| Change::ServiceRanges(name.name.to_string(), ranges),
        trigger_time: |_| None,
        observer: None,
    };
    let this_node_s_pods = async {
        let reflector = Reflector::<core::Pod, String> {
            output: output(Kind::Pod),
            resource: "Pod",
            label_selector: None,
            field_selector: Some(format!("spec.nodeName={node_name}")),
            convert: convert::excluded,
            change: Change::Excluded,
            trigger_time: |_| None,
            observer: None,
        };
        if pods {
            reflector.run(Api::all(client()), None, shared.clone()).await;
        }
    };
    futures::future::join5(
        services.run(Api::all(client()), Some(Api::namespaced(client(), "default")), shared.clone()),
        slices.run(Api::all(client()), Some(Api::namespaced(client(), "default")), shared.clone()),
        node.run(Api::all(client()), None, shared.clone()),
        service_cidrs.run(Api::all(client()), None, shared.clone()),
        this_node_s_pods,
    )
    .await;
}

#[cfg(test)]
mod tests;

//! The API server of a fleet, over TLS as in a cluster, and what it and its clients have spent so far.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use proxy_tests::apiserver::tls::{Ca, Pair};
use proxy_tests::apiserver::{ApiServer, Gone};
use proxy_tests::manifests::{node, service_cidr};
use tempfile::TempDir;

use super::agents::THREAD;
use crate::cluster;
use crate::process::cpu_of_threads;

/// A real server sends a bookmark a minute.
const BOOKMARKS: Duration = Duration::from_secs(60);
/// Bytes of the token of a service account.
const TOKEN: usize = 1000;
const PORT: u16 = 6443;

pub(super) struct Scene {
    /// `None` while it is down.
    server: Option<ApiServer>,
    /// Has the objects meanwhile; nobody asks it.
    storage: ApiServer,
    certificate: Pair,
    home: TempDir,
}

impl Scene {
    /// With so many nodes and Services.
    pub(super) fn new(nodes: usize, services: u32) -> Result<Self> {
        let ca = Ca::new("cluster")?;
        let certificate = ca.server(&["127.0.0.1"])?;
        let storage = ApiServer::start(listen(0)?)?;
        storage.put(&service_cidr("kubernetes", &["10.100.0.0/16"]));
        for n in 0..nodes {
            let [_, _, high, low] = u32::try_from(n)?.to_be_bytes();
            let labels = [("topology.kubernetes.io/zone", "a"), ("kubernetes.io/os", "linux")];
            let name = super::node_name(n);
            storage.put(&node(&name, &[[192, 168, high, low].into()], &[], &labels));
        }
        cluster::fill(&storage, services);
        let home = tempfile::tempdir().context("a directory for the kubeconfig")?;
        let scene = Self { server: None, storage, certificate, home };
        std::fs::write(scene.home.path().join("ca.crt"), ca.pem()).context("writing the CA")?;
        let text = format!(
            "{{apiVersion: v1, kind: Config, current-context: c, users: [{{name: u, user: {{token: '{}'}}}}],\n\
             clusters: [{{name: c, cluster: {{server: 'https://{}', certificate-authority: ca.crt}}}}],\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]}}\n",
            "t".repeat(TOKEN),
            at(PORT),
        );
        std::fs::write(scene.kubeconfig(), text).context("writing the kubeconfig")?;
        Ok(scene)
    }

    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.home.path().join("config")
    }

    /// The server is there from now on, and has counted nothing.
    pub(super) fn up(&mut self) -> Result<Instant> {
        let server = self.storage.beside(listen(PORT)?)?;
        server.secure(&self.certificate, None)?;
        server.bookmark_every(BOOKMARKS);
        self.server = Some(server);
        Ok(Instant::now())
    }

    /// The server ends with all its connections; with `forget` no version is known afterwards, as in a cluster in which
    /// anything has changed since the last bookmark.
    pub(super) fn down(&mut self, forget: bool) {
        self.server = None;
        if forget {
            self.storage.expire(Gone::Http);
        }
    }

    pub(super) fn server(&self) -> Result<&ApiServer> {
        self.server.as_ref().context("the API server is down")
    }

    pub(super) fn spent(&self) -> Result<Spent> {
        let (traffic, requests) = match &self.server {
            Some(server) => (server.traffic(), server.timed_requests()),
            None => Default::default(),
        };
        Ok(Spent {
            at: Instant::now(),
            requests: requests.into_iter().map(|(_, request)| request).collect(),
            connections: traffic.connections,
            received: traffic.received,
            sent: traffic.sent,
            server: cpu_of_threads("apiserver")?,
            agents: cpu_of_threads(THREAD)?,
        })
    }
}

/// What has been spent up to a moment, or between two.
pub(super) struct Spent {
    pub(super) at: Instant,
    pub(super) requests: Vec<String>,
    pub(super) connections: Vec<Instant>,
    pub(super) received: u64,
    pub(super) sent: u64,
    pub(super) server: Duration,
    pub(super) agents: Duration,
}

impl Spent {
    /// What came after `before`.
    pub(super) fn since(mut self, before: &Self) -> Self {
        self.requests.drain(..before.requests.len());
        self.connections.drain(..before.connections.len());
        self.received -= before.received;
        self.sent -= before.sent;
        self.server = self.server.saturating_sub(before.server);
        self.agents = self.agents.saturating_sub(before.agents);
        self
    }
}

fn at(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn listen(port: u16) -> Result<TcpListener> {
    TcpListener::bind(at(port)).with_context(|| format!("listening on {}", at(port)))
}

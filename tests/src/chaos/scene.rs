//! The cluster that everything here is played in: `node1` with somebody who forwards and with pods that ask, `node2`
//! with the one endpoint, clients outside.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::rules;
use crate::agent::Agent;
use crate::manifests::{EndpointController, ManifestDir, ServicePlan};
use crate::object::{Object, Publish};
use crate::pod::Place;
use crate::probe::{Ask, Process, eventually, get};
use crate::test_cluster::{Plan, TestCluster};

/// The Service's NodePort.
pub const NODE_PORT: u16 = 30_200;
/// The Service's port.
pub const PORT: u16 = 53;
/// The endpoint's port.
pub const TARGET: u16 = 8080;

/// How soon the endpoint must answer once everything has started.
const SOON: Duration = Duration::from_secs(10);
/// What a scene takes besides what is played in it.
const AROUND: Duration = Duration::from_secs(120);

/// Who forwards on `node1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Forwarder {
    /// The agent's programs.
    Agent,
    /// Rules of kube-proxy's shape.
    Nftables,
}

impl Forwarder {
    /// All of them, in the order in which they play.
    pub const ALL: [Self; 2] = [Self::Agent, Self::Nftables];

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Nftables => "nftables",
        }
    }
}

/// What every scenario lets one choose.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Who forwards, one after the other.
    pub forwarders: Vec<Forwarder>,
    /// Further flags for the agent.
    pub agent_flags: Vec<String>,
    /// IPv6 instead of IPv4.
    pub ipv6: bool,
    /// The range of ports that `node1` gives out to its own sockets (`ip_local_port_range`); the kernel's own unless
    /// told. An agent that keeps away from it has few ports left where it is wide.
    pub local_ports: Option<(u16, u16)>,
}

impl Default for Stage {
    fn default() -> Self {
        Self { forwarders: Forwarder::ALL.to_vec(), agent_flags: Vec::new(), ipv6: false, local_ports: None }
    }
}

/// Who is there besides the nodes and the endpoint.
#[derive(Clone, Debug, Default)]
pub(super) struct Cast {
    pub(super) clients: Vec<String>,
    pub(super) pods: Vec<String>,
    /// How long the play lasts.
    pub(super) lasts: Duration,
}

/// A running cluster. Fields are dropped in order.
#[derive(Debug)]
pub struct Scene {
    _server: Process,
    agent: Option<Agent>,
    _manifests: ManifestDir,
    cluster: TestCluster,
    ipv6: bool,
}

impl Scene {
    /// Raises the cluster, starts who forwards, and waits until a client or pod of the cast is answered.
    pub(super) fn raise(stage: &Stage, forwarder: Forwarder, cast: &Cast) -> Result<Self> {
        let pods: Vec<&str> = cast.pods.iter().map(String::as_str).collect();
        // Answers to spoofed sources must leave for somewhere, and be lost there.
        let mut plan = Plan::default().gateway().node("node1", &pods).node("node2", &["server"]);
        for client in &cast.clients {
            plan = plan.client(client);
        }
        let cluster = plan.raise()?;
        if let Some((first, last)) = stage.local_ports {
            let range = format!("{first} {last}");
            cluster.place("node1").netns.sysctls(&[("ipv4/ip_local_port_range", &range)])?;
        }
        let lasts = (cast.lasts + AROUND).as_secs().to_string();
        let serve = ["--tcp", "8080", "--udp", "8080", "--name", "server", "--seconds", &lasts];
        let mut server = Process::start(cluster.place("server"), "serve", &serve.map(ToOwned::to_owned))?;
        server.line::<serde_json::Value>(SOON)?;
        let manifests = ManifestDir::new()?;
        let agent = match forwarder {
            Forwarder::Agent => Some(start_agent(&cluster, &manifests, &stage.agent_flags)?),
            Forwarder::Nftables => {
                rules::load(cluster.place("node1"), vips(), cluster.place("server"))?;
                None
            }
        };
        let scene = Self { _server: server, agent, _manifests: manifests, cluster, ipv6: stage.ipv6 };
        let (client, to) = match (cast.clients.first(), cast.pods.first()) {
            (Some(client), _) => (scene.cluster.place(client), scene.node_port()),
            (None, Some(pod)) => (scene.cluster.place(pod), scene.cluster_ip()),
            (None, None) => bail!("nobody is there to ask"),
        };
        for ask in [Ask::tcp(to), Ask::udp(to)] {
            eventually(SOON, || get(client, &ask)).with_context(|| format!("with {}", forwarder.name()))?;
        }
        Ok(scene)
    }

    /// A node, a pod or a client by its name.
    #[must_use]
    pub fn place(&self, name: &str) -> &Place {
        self.cluster.place(name)
    }

    /// The agent, where it forwards.
    #[must_use]
    pub fn agent(&self) -> Option<&Agent> {
        self.agent.as_ref()
    }

    /// The Service at the node.
    #[must_use]
    pub fn node_port(&self) -> SocketAddr {
        self.cluster.place("node1").at(NODE_PORT)[usize::from(self.ipv6)]
    }

    /// The Service at its own address.
    #[must_use]
    pub fn cluster_ip(&self) -> SocketAddr {
        SocketAddr::new(vips()[usize::from(self.ipv6)], PORT)
    }
}

/// An agent with the one Service, whose endpoint is the server.
fn start_agent(cluster: &TestCluster, manifests: &ManifestDir, flags: &[String]) -> Result<Agent> {
    let service = ServicePlan::new("web", &vips())
        .port("tcp", "TCP", PORT, TARGET)
        .node_port(NODE_PORT)
        .port("udp", "UDP", PORT, TARGET)
        .node_port(NODE_PORT);
    manifests.publish(&Object::from(&service.build()))?;
    let ports = [("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)];
    let families = crate::manifests::Family::ALL;
    EndpointController::adopt(manifests, "web", &ports, &families, &[cluster.place("server")])?;
    let ranges = TestCluster::CLUSTER_CIDRS.join(",");
    let mut all = vec!["--cluster-cidr", &ranges];
    all.extend(flags.iter().map(String::as_str));
    Agent::start(cluster, "node1", manifests, &all)
}

/// The Service's addresses.
fn vips() -> [IpAddr; 2] {
    [Ipv4Addr::new(10, 96, 0, 10).into(), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 10).into()]
}

/// Makes sure that this many sockets can be open at a time.
pub(super) fn want_descriptors(sockets: u64) -> Result<()> {
    /// What is open besides.
    const OTHERS: u64 = 500;
    let wanted = sockets + OTHERS;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("asking how many files may be open")?;
    if soft >= wanted {
        return Ok(());
    }
    ensure!(
        hard >= wanted,
        "{wanted} files may have to be open at a time, and {hard} may be here: ask for less (--rate, --timeout-ms), \
         or raise the limit (ulimit -Hn {wanted})"
    );
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).context("raising the number of files that may be open")
}

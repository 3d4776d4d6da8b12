//! What faults are played on: two nodes with pods, a client outside, Services of several kinds over TCP and UDP in both
//! families, crowds of clients at them, and the agent of `node1`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::clients::{Clients, Term};
use super::services::{self, MOVING, ROLES, Role, STAYING, TARGET};
use crate::agent::{Agent, Feed};
use crate::apiserver::ApiServer;
use crate::crowd::{Target, now_ms};
use crate::manifests::{EndpointController, ManifestDir, Phase, node};
use crate::object::Publish;
use crate::pod::Place;
use crate::probe::{Server, eventually};
use crate::reference::{self, Door};
use crate::test_cluster::{Plan, TestCluster};

/// New requests a second, of each crowd.
const RATE: f64 = 40.0;
/// How soon tables must say what has been published.
const SOON: Duration = Duration::from_secs(10);

/// Who forwards on `node1` when the clients begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// The agent.
    Agent,
    /// The agent, beside rules of kube-proxy's shape. They know only Services with one endpoint
    /// ([`Role::has_rules`]), so only these are played.
    AgentAndRules,
    /// Such rules.
    Rules,
}

impl Before {
    fn plays(self, role: &Role) -> bool {
        self == Self::Agent || role.has_rules()
    }
}

/// Where objects are published, and the agent watches them.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// A directory.
    Manifests(&'a ManifestDir),
    /// API servers of one cluster, of which the agent may use any.
    ApiServers(&'a [ApiServer; 2]),
}

impl<'a> Source<'a> {
    fn publisher(self) -> &'a dyn Publish {
        match self {
            Self::Manifests(directory) => directory,
            Self::ApiServers([first, _]) => first,
        }
    }

    fn feed(self) -> Feed {
        match self {
            Self::Manifests(directory) => directory.into(),
            Self::ApiServers(servers) => Feed::ApiServer(servers.each_ref().map(ApiServer::url).join(",")),
        }
    }
}

/// How soon rules are removed that the agent has taken over from.
const TAKES_OVER: Duration = Duration::from_secs(30);

/// Frontends and the endpoints that are used for what is new.
type Picture = BTreeMap<String, BTreeSet<String>>;

/// The ground. Dropping it ends the clients and the agent, and takes its programs down.
pub struct Ground<'a> {
    /// Everybody who asks.
    pub clients: Clients,
    /// The agent of `node1`.
    pub agent: Agent,
    /// Nodes, pods and the client outside.
    pub cluster: &'a TestCluster,
    /// Where objects are published.
    pub to: &'a dyn Publish,
    /// Who tells the agent of them.
    pub source: Source<'a>,
    /// The endpoints of the Service `moving`, of which [`STAYING`] are always ready.
    pub moving: EndpointController<'a>,
    controllers: BTreeMap<&'static str, EndpointController<'a>>,
    servers: BTreeMap<String, Server>,
    before: Before,
    /// Frontends as they were when the agent had just got ready.
    picture: Picture,
}

/// API servers in `node1`, where its agent reaches them, whatever becomes of its programs.
pub fn raise_api_servers(cluster: &TestCluster) -> Result<[ApiServer; 2]> {
    let host = cluster.place("node1");
    let listen = |port| host.netns.listen(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let first = ApiServer::start(listen(6443)?)?;
    let second = first.beside(listen(6444)?)?;
    first.put(&node("node1", &host.addresses(), &cluster.pod_cidrs("node1"), &[]));
    Ok([first, second])
}

/// The cluster of all plays.
pub fn raise_cluster() -> Result<TestCluster> {
    // Answers to spoofed sources, and what netfilter is to translate, have to have a route.
    Plan::default()
        .gateway()
        .node("node1", &["a", "b", "d", "e", "r1", "n1", "s1"])
        .node("node2", &["c", "f", "g", "r2", "n2", "s2"])
        .client("outside")
        .client("liar")
        .raise()
}

impl<'a> Ground<'a> {
    /// Publishes the Services, starts their pods and who forwards: an agent with these flags, or one that will have them.
    pub fn lay(cluster: &'a TestCluster, source: Source<'a>, flags: &[&str], before: Before) -> Result<Self> {
        let to = source.publisher();
        let mut controllers = BTreeMap::new();
        let mut servers = BTreeMap::new();
        for role in ROLES.iter().filter(|role| before.plays(role)) {
            let mut controller = services::publish(to, role)?;
            let pods: Vec<&Place> = role.pods.iter().map(|pod| cluster.place(pod)).collect();
            controller.replace(&pods)?;
            controllers.insert(role.name, controller);
            for pod in role.pods {
                if !servers.contains_key(*pod) {
                    servers.insert((*pod).to_owned(), Server::start(cluster.place(pod), &[TARGET])?);
                }
            }
        }
        let moving = match controllers.remove(MOVING) {
            Some(controller) => controller,
            None => EndpointController::new(to, MOVING, &services::PORTS)?,
        };
        let binary = crate::require::agent_binary()?;
        let agent = Agent::prepare(&binary, cluster, "node1", source.feed(), flags)?;
        let clients = Clients::default();
        let picture = Picture::new();
        let mut ground =
            Self { clients, agent, cluster, to, source, moving, controllers, servers, before, picture };
        if before != Before::Agent {
            ground.rules()?;
        }
        if before != Before::Rules {
            ground.agent.spawn()?;
            ground.agent.wait_ready()?;
            ground.picture = ground.look()?;
            ensure!(!ground.picture.is_empty(), "nothing is served: {}", ground.agent.log_text());
        }
        Ok(ground)
    }

    /// Starts crowds in the pod, on the host and outside, with connections that are held if told.
    pub fn crowd(&mut self, term: Term, held: bool) -> Result<()> {
        let [pod, host, outside] = ["a", "node1", "outside"].map(|name| self.cluster.place(name));
        let crowds = [
            (pod, self.targets(|role| role.from_pods(self.cluster))),
            (host, self.targets(Role::from_host)),
            (outside, self.targets(|role| role.from_outside(self.cluster))),
        ];
        let crowds = crowds.map(|(place, mut targets)| {
            for target in &mut targets {
                target.idle *= u32::from(held);
                target.busy *= u32::from(held);
            }
            (place, targets)
        });
        self.clients.start(term, &crowds, RATE)
    }

    fn targets(&self, of: impl Fn(&Role) -> Vec<Target>) -> Vec<Target> {
        let played = ROLES.iter().filter(|role| self.before.plays(role));
        played.flat_map(of).collect()
    }

    /// Leaves rules on the node as a kube-proxy in nftables mode does.
    pub fn rules(&self) -> Result<()> {
        let mut doors: Vec<(Door, SocketAddr)> = Vec::new();
        for role in ROLES.iter().filter(|role| role.has_rules()) {
            let pod = self.cluster.place(role.pods[0]).at(TARGET);
            for (address, to) in role.cluster_ips().into_iter().zip(pod) {
                doors.extend([(Door::Address(address), to), (Door::NodePort(role.node_port), to)]);
            }
        }
        reference::load_as("kube-proxy", &self.cluster.place("node1").netns, &doors)
    }

    /// Whether a table of kube-proxy's is left on the node.
    fn has_rules(&self) -> Result<bool> {
        let tables = self.cluster.place("node1").netns.output("nft", &["list", "tables"])?;
        Ok(tables.contains("kube-proxy"))
    }

    /// Waits until the agent has removed the rules of a kube-proxy.
    pub fn rules_gone(&self) -> Result<()> {
        eventually(TAKES_OVER, || {
            ensure!(!self.has_rules()?, "rules are left: {}", self.agent.log_text());
            Ok(())
        })
    }

    /// A command of the agent that must succeed; what it said.
    pub fn tell_agent(&self, arguments: &[&str]) -> Result<String> {
        let (status, said) = self.agent.ask(arguments)?;
        ensure!(status.success(), "proxy-agent {}: {status}: {said}", arguments.join(" "));
        Ok(said)
    }

    /// The controller of a Service other than `moving`.
    pub fn controller(&mut self, service: &str) -> Result<&mut EndpointController<'a>> {
        self.controllers.get_mut(service).with_context(|| format!("no Service {service} is played"))
    }

    /// Starts the server of a pod, unless it runs.
    pub fn serve(&mut self, pod: &str) -> Result<()> {
        if !self.servers.contains_key(pod) {
            self.servers.insert(pod.into(), Server::start(self.cluster.place(pod), &[TARGET])?);
        }
        Ok(())
    }

    /// Ends the server of a pod as a pod ends that is told to: what is open may end first.
    pub fn end_server(&mut self, pod: &str) -> Result<()> {
        if let Some(mut server) = self.servers.remove(pod) {
            server.drain()?;
        }
        Ok(())
    }

    /// Gives `moving` these endpoints besides those that stay, in one edit.
    pub fn move_to(&mut self, pods: &[&str]) -> Result<()> {
        let all: Vec<&Place> = STAYING.iter().chain(pods).map(|pod| self.cluster.place(pod)).collect();
        self.moving.replace(&all)
    }

    /// What is in the tables: every frontend and its endpoints for new connections.
    fn look(&self) -> Result<Picture> {
        let listed = self.agent.service_list_json()?;
        let rows = listed.as_array().with_context(|| format!("no list of frontends: {listed}"))?;
        let row = |row: &serde_json::Value| {
            let key = ["service", "type", "address", "port", "protocol", "family"]
                .map(|field| row[field].to_string().trim_matches('"').to_owned());
            let endpoints = row["endpoints"].as_array().map_or(&[][..], Vec::as_slice);
            let active = endpoints.iter().filter(|endpoint| endpoint["state"] == "active");
            let named = active.filter_map(|endpoint| endpoint["endpoint"].as_str().map(ToOwned::to_owned));
            (key.join(" "), named.collect())
        };
        Ok(rows.iter().map(row).collect())
    }

    /// What should be in the tables.
    fn wanted(&self) -> Picture {
        let ready: Vec<SocketAddr> = self
            .moving
            .members()
            .filter(|(_, phase)| *phase == Phase::Ready)
            .flat_map(|(pod, _)| self.cluster.place(pod).at(TARGET))
            .collect();
        let mut picture = self.picture.clone();
        for (frontend, endpoints) in &mut picture {
            if frontend.starts_with("default/moving:") {
                let v4 = frontend.ends_with(" 4");
                let same = ready.iter().filter(|address| address.is_ipv4() == v4);
                *endpoints = same.map(ToString::to_string).collect();
            }
        }
        picture
    }

    /// An error as long as the tables do not say what has been published.
    pub fn is_in_line(&self) -> Result<()> {
        let (wanted, now) = (self.wanted(), self.look()?);
        let differ = |a: &Picture, b: &Picture| {
            let other = a.iter().filter(|(key, value)| b.get(*key) != Some(value));
            other.map(|(key, value)| format!("{key} → {value:?}")).collect::<Vec<_>>()
        };
        let (missing, strange) = (differ(&wanted, &now), differ(&now, &wanted));
        ensure!(missing.is_empty() && strange.is_empty(), "there is no {missing:?}, but {strange:?}");
        Ok(())
    }

    /// Waits until the tables say what has been published.
    pub fn in_line(&self) -> Result<()> {
        eventually(SOON, || self.is_in_line())
    }

    /// Waits for an agent that has been started, and until it has brought everything in line; what is not is lost.
    pub fn settle(&mut self) {
        let begun = now_ms();
        let outcome = self.agent.wait_ready().and_then(|()| self.in_line());
        self.clients.note("the agent", "tables as published", begun, outcome);
    }

    /// Waits until a Service leads to just these pods.
    pub fn serves(&self, service: &str, pods: &[&str]) -> Result<()> {
        let wanted: BTreeSet<String> =
            pods.iter().flat_map(|pod| self.cluster.place(pod).at(TARGET)).map(|at| at.to_string()).collect();
        let prefix = format!("default/{service}:");
        eventually(SOON, || {
            let now: BTreeMap<_, _> =
                self.look()?.into_iter().filter(|(frontend, _)| frontend.starts_with(&prefix)).collect();
            let all: BTreeSet<String> = now.values().flatten().cloned().collect();
            ensure!(all == wanted, "{service} leads to {now:?}, not to {wanted:?}");
            Ok(())
        })
    }
}

impl Drop for Ground<'_> {
    fn drop(&mut self) {
        // Clients that outlive what they ask would only tell of its end.
        self.clients = Clients::default();
    }
}

//! The cluster that the probes play in, and what they ask of it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use proxy_tests::agent::{Agent, FLAGS};
use proxy_tests::answer::Hold;
use proxy_tests::manifests::{EndpointController, ManifestDir, Phase, ServicePlan};
use proxy_tests::object::{Object, Publish};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Runner, Server, eventually, get, request};
use proxy_tests::test_cluster::{Plan, PodNetwork, TestCluster};
use serde_json::Value;

/// The Services: name, number, NodePort, endpoints. `b` is a pod of the agent's node, `c` one of another node.
pub(crate) const NEAR: Service = Service { name: "near", number: 1, node_port: 30080, pods: &["b"] };
pub(crate) const FAR: Service = Service { name: "far", number: 2, node_port: 30081, pods: &["c"] };
pub(crate) const NONE: Service = Service { name: "none", number: 3, node_port: 30082, pods: &[] };
pub(crate) const BOTH: Service = Service { name: "both", number: 4, node_port: 30083, pods: &["b", "c"] };
/// Its endpoint is the pod that asks.
pub(crate) const SELF: Service = Service { name: "self", number: 5, node_port: 30084, pods: &["a"] };

/// How long a change may take to be seen on an emulated machine.
const SOON: Duration = Duration::from_secs(30);
/// The port of every server.
pub(crate) const SERVED: u16 = 8080;

/// A Service over TCP and UDP, both families.
pub(crate) struct Service {
    pub(crate) name: &'static str,
    number: u8,
    pub(crate) node_port: u16,
    pub(crate) pods: &'static [&'static str],
}

impl Service {
    /// Its ClusterIPs.
    pub(crate) fn vips(&self) -> [SocketAddr; 2] {
        self.addresses().map(|address| SocketAddr::new(address, 80))
    }

    /// Its NodePort at a node's addresses.
    pub(crate) fn node_ports(&self, node: &Place) -> [SocketAddr; 2] {
        node.at(self.node_port)
    }

    fn addresses(&self) -> [IpAddr; 2] {
        let n = u16::from(self.number);
        [[10, 96, 0, self.number].into(), [0xfd00, 0x10, 0x96, 0, 0, 0, 0, n].into()]
    }

    fn plan(&self) -> ServicePlan {
        ServicePlan::new(self.name, &self.addresses())
            .port("tcp", "TCP", 80, SERVED)
            .node_port(self.node_port)
            .port("udp", "UDP", 80, SERVED)
            .node_port(self.node_port)
    }

    /// Publishes it; who it returns plays the endpoint controller.
    pub(crate) fn publish<'a>(
        &self,
        to: &'a ManifestDir,
        cluster: &TestCluster,
        change: impl Fn(ServicePlan) -> ServicePlan,
    ) -> Result<EndpointController<'a>> {
        to.publish(&Object::from(&change(self.plan()).build()))?;
        let ports = [("tcp", "TCP", SERVED), ("udp", "UDP", SERVED)];
        let mut controller = EndpointController::new(to, self.name, &ports)?;
        for pod in self.pods {
            controller.set(cluster.place(pod), Phase::Ready)?;
        }
        Ok(controller)
    }
}

/// Two nodes, a client outside, and a server in every pod.
pub(crate) struct Scene {
    pub(crate) cluster: TestCluster,
    /// They live as long as the scene.
    _servers: Vec<Server>,
}

impl Scene {
    pub(crate) fn raise(network: PodNetwork) -> Result<Self> {
        let cluster = Plan::default()
            .node("node1", &["a", "b"])
            .node("node2", &["c"])
            .client("outside")
            .network(network)
            .raise()?;
        let serve = |pod| Server::start(cluster.place(pod), &[SERVED]);
        let servers = ["a", "b", "c"].into_iter().map(serve).collect::<Result<_>>()?;
        Ok(Self { cluster, _servers: servers })
    }

    /// An agent on `node1` that is not started yet.
    pub(crate) fn agent(&self, manifests: &ManifestDir, flags: &[&str]) -> Result<Agent> {
        let binary = proxy_tests::require::agent_binary()?;
        Agent::prepare(&binary, &self.cluster, "node1", manifests, &[&FLAGS[..], flags].concat())
    }

    pub(crate) fn node(&self) -> &Place {
        self.cluster.place("node1")
    }
}

/// The ways to ask: TCP, and UDP with either kind of socket.
pub(crate) fn ways(to: SocketAddr) -> [(&'static str, Ask); 3] {
    let patient = |ask: Ask| ask.timeout(Duration::from_secs(5));
    [
        ("TCP", patient(Ask::tcp(to))),
        ("UDP", patient(Ask::udp(to))),
        ("unconnected UDP", patient(Ask::unconnected(to))),
    ]
}

/// Wants an answer from the pod `name` to every way of asking.
pub(crate) fn answered(from: &Place, to: [SocketAddr; 2], name: &str) -> Result<()> {
    each_way(from, to, name, |_| true)
}

/// The same, and the pod sees these addresses as the client's, one a family.
pub(crate) fn served(from: &Place, to: [SocketAddr; 2], name: &str, peers: [IpAddr; 2]) -> Result<()> {
    each_way(from, to, name, |seen| peers.contains(&seen))
}

fn each_way(from: &Place, to: [SocketAddr; 2], name: &str, known: impl Fn(IpAddr) -> bool) -> Result<()> {
    for to in to {
        for (way, ask) in ways(to) {
            let answer = get(from, &ask).with_context(|| way.to_owned())?;
            let seen = answer.peer.ip();
            ensure!(
                answer.name == name && known(seen),
                "{way} from {} to {to}: {} answers, not {name}, or sees another client: {seen}",
                from.name,
                answer.name
            );
        }
    }
    Ok(())
}

/// Wants a rejection at once, by TCP and connected UDP; the names of the errors that came.
pub(crate) fn refused(from: &Place, to: [SocketAddr; 2]) -> Result<Vec<String>> {
    let mut errors = Vec::new();
    for to in to {
        for (way, ask) in ways(to).into_iter().take(2) {
            let outcome = request(from, &ask)?;
            let failure = outcome.failure.unwrap_or_else(|| format!("answered: {:?}", outcome.answer));
            let error = failure.split(' ').next_back().unwrap_or_default().to_owned();
            if !matches!(error.as_str(), "ECONNREFUSED" | "EPERM") {
                bail!("{way} from {} to {to}: {failure}, wanted a rejection", from.name);
            }
            if !errors.contains(&error) {
                errors.push(error);
            }
        }
    }
    Ok(errors)
}

/// Each of them is answered a few times more.
pub(crate) fn go_on(holds: &mut [(String, Runner<Hold>)]) -> Result<()> {
    for (what, hold) in holds {
        let before = hold.report()?.made;
        eventually(SOON, || {
            let now = hold.report()?;
            ensure!(now.failed == 0 && now.made > before + 2, "{what}: {now:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// The counters of the programs, by `status`.
pub(crate) fn counters(agent: &Agent) -> Result<BTreeMap<String, u64>> {
    let status = agent.status_json()?;
    let rows = status["reasons"].as_array().context("status has no counters")?;
    let count = |row: &Value| Some((row["reason"].as_str()?.to_owned(), row["count"].as_u64()?));
    Ok(rows.iter().filter_map(count).collect())
}

/// How much a counter grows while something is done.
pub(crate) fn growth(agent: &Agent, counter: &str, done: impl FnOnce() -> Result<()>) -> Result<u64> {
    let read = || Ok::<_, anyhow::Error>(counters(agent)?.get(counter).copied().unwrap_or(0));
    let before = read()?;
    done()?;
    Ok(read()? - before)
}

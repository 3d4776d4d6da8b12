//! A node with a server pod, honest clients in a pod and outside, and a liar outside.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use proxy_tests::agent::Agent;
use proxy_tests::answer::Rate;
use proxy_tests::chaos::spoof::{Flood, Sent};
use proxy_tests::manifests::ManifestDir;
use proxy_tests::object::{Object, Publish as _};
use proxy_tests::pod::Place;
use proxy_tests::probe::Process;
use proxy_tests::test_cluster::{Plan as Cluster, TestCluster};

use super::Target;
use crate::rulesets::{Fed, Kind, PORT, Plan, Service, TARGET};

/// Packets of a flood a second.
pub(super) const RATE: f64 = 20_000.0;
/// Packets of a flood that has the node for itself, and of one beside which others connect.
const ALONE: u32 = 10_000;
const BESIDE: u32 = 28_000;
/// How long an honest client is measured, and how long a flood has gone on before the first begins.
const TURN: &str = "0.4";
const AHEAD: Duration = Duration::from_millis(200);
/// Longer than any turn, and than any rules of two Services.
const PATIENCE: Duration = Duration::from_secs(20);
const NODE: &str = "node1";
/// The Services.
const WEB: ([u8; 4], u16) = ([10, 100, 0, 1], 30_080);
const DNS: ([u8; 4], u16) = ([10, 100, 0, 2], 30_053);

/// Who forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Who {
    /// The node itself, to the pod's own address.
    Nobody,
    Agent,
    Rules(Kind),
}

impl Who {
    pub(super) const ALL: [Self; 4] =
        [Self::Nobody, Self::Agent, Self::Rules(Kind::Nftables), Self::Rules(Kind::Iptables)];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Nobody => "no proxy",
            Self::Agent => "agent",
            Self::Rules(kind) => kind.name(),
        }
    }
}

/// Who is honest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Client {
    /// A pod, to the ClusterIP.
    Pod,
    /// Outside, to the NodePort: masqueraded, as the flood is.
    Outside,
}

impl Client {
    pub(super) const ALL: [Self; 2] = [Self::Pod, Self::Outside];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod to ClusterIP",
            Self::Outside => "outside to NodePort",
        }
    }
}

/// A flood beside which somebody honest has connected.
pub(super) struct Loud {
    pub(super) clients: Vec<(Client, Honest)>,
    /// Packets a second.
    pub(super) sent: f64,
}

/// What an honest client has come to.
pub(super) struct Honest(Rate);

#[expect(clippy::cast_precision_loss, reason = "counts of one turn")]
impl Honest {
    pub(super) fn rate(&self) -> f64 {
        self.0.done as f64 / self.0.seconds
    }

    pub(super) fn failed_percent(&self) -> f64 {
        100.0 * self.0.failed as f64 / (self.0.failed + self.0.done).max(1) as f64
    }
}

/// Fields go in order.
pub(super) struct Node {
    pub(super) who: Who,
    _agent: Option<(Agent, ManifestDir)>,
    _server: Process,
    /// Nobody reads from it: what does not fit is dropped by the pod.
    _sink: UdpSocket,
    cluster: TestCluster,
}

impl Node {
    pub(super) fn raise(who: Who) -> Result<Self> {
        // Answers to spoofed sources must leave for somewhere, and be lost there.
        let plan = Cluster::default().gateway().node(NODE, &["server", "client"]);
        let cluster = plan.client_via("honest", NODE).client_via("liar", NODE).raise()?;
        let pod = cluster.place("server");
        let mut server = Process::start(pod, "answer", &["--port".to_owned(), TARGET.to_string()])?;
        server.line::<serde_json::Value>(PATIENCE)?;
        let sink =
            pod.netns.run_in(|| UdpSocket::bind((pod.v4, TARGET)))?.context("a socket for datagrams")?;
        let plan = plan_of(cluster.place(NODE), pod);
        let agent = match who {
            Who::Nobody => None,
            Who::Agent => Some(start_agent(&cluster, &plan)?),
            Who::Rules(kind) => {
                let fed = kind.load(cluster.place(NODE), &plan, PATIENCE)?;
                ensure!(fed != Fed::GivenUp, "loading rules of two Services took longer than {PATIENCE:?}");
                None
            }
        };
        let node = Self { who, _agent: agent, _server: server, _sink: sink, cluster };
        for client in Client::ALL {
            node.honest(client)?;
        }
        Ok(node)
    }

    /// New connections, one after the other; to the server pod's own address where nobody translates.
    pub(super) fn honest(&self, client: Client) -> Result<Honest> {
        let (place, to) = match client {
            Client::Pod => ("client", Target::ClusterIpSyn),
            Client::Outside => ("honest", Target::NodePortSyn),
        };
        let to = self.address(to).to_string();
        let arguments = ["--to", &to, "--seconds", TURN].map(ToOwned::to_owned);
        let rate: Rate = Process::start(self.cluster.place(place), "rate", &arguments)?.line(PATIENCE)?;
        let why = rate.failure.as_deref().unwrap_or_default();
        ensure!(rate.done + rate.failed > 0, "an honest client did nothing: {why}");
        Ok(Honest(rate))
    }

    /// Microseconds of processor time for each packet.
    pub(super) fn flood_alone(&self, target: Target) -> Result<f64> {
        let flood = self.prepare(target, ALONE, BESIDE)?;
        let before = used()?;
        let sent = flood.send(RATE)?;
        let used = used()? - before;
        ensure!(sent.packets > 0, "nothing was sent");
        #[expect(clippy::cast_precision_loss, reason = "a count of one flood")]
        Ok(used * 1e6 / sent.packets as f64)
    }

    /// A flood while somebody honest connects.
    pub(super) fn flood(&self, target: Target) -> Result<Loud> {
        let flood = self.prepare(target, BESIDE, 0)?;
        let (clients, sent) = std::thread::scope(|scope| {
            let sending = scope.spawn(|| flood.send(RATE));
            std::thread::sleep(AHEAD);
            let one = |client| Ok((client, self.honest(client)?));
            (Client::ALL.into_iter().map(one).collect::<Result<_>>(), sending.join())
        });
        let Sent { packets, took } = sent.map_err(|_| anyhow::anyhow!("the flood panicked"))??;
        #[expect(clippy::cast_precision_loss, reason = "a count of one flood")]
        Ok(Loud { clients: clients?, sent: packets as f64 / took.as_secs_f64() })
    }

    /// Frames from sources that no other flood at this node has had.
    fn prepare(&self, target: Target, count: u32, first: u32) -> Result<Flood> {
        let (liar, node) = (self.cluster.place("liar"), self.cluster.place(NODE));
        Flood::prepare(liar, node, self.address(target), target.sends(), first, count)
    }

    /// Where a packet is sent.
    fn address(&self, target: Target) -> SocketAddr {
        let node = self.cluster.place(NODE).v4;
        match (self.who, target) {
            (Who::Nobody, _) => (self.cluster.place("server").v4, TARGET).into(),
            (_, Target::NodePortSyn) => (node, WEB.1).into(),
            (_, Target::ClusterIpSyn) => (Ipv4Addr::from(WEB.0), PORT).into(),
            (_, Target::NodePortUdp) => (node, DNS.1).into(),
        }
    }
}

fn plan_of(node: &Place, pod: &Place) -> Plan {
    let service = |number, proto, (address, node_port): ([u8; 4], u16)| Service {
        number,
        proto,
        address: address.into(),
        node_port: Some(node_port),
        endpoints: vec![pod.v4],
    };
    let services = vec![service(0, "tcp", WEB), service(1, "udp", DNS)];
    Plan { node: node.v4, pods: TestCluster::CLUSTER_CIDRS[0], services }
}

fn start_agent(cluster: &TestCluster, plan: &Plan) -> Result<(Agent, ManifestDir)> {
    let manifests = ManifestDir::new()?;
    for service in &plan.services {
        manifests.publish(&Object::from(&service.object()))?;
        manifests.publish(&Object::from(&service.slice()))?;
    }
    let ranges = format!("--cluster-cidr={}", TestCluster::CLUSTER_CIDRS.join(","));
    let agent = Agent::start(cluster, NODE, &manifests, &[&ranges])?;
    Ok((agent, manifests))
}

/// Seconds of processor time that this thread and the kernel's threads for packets have used. On veth devices a packet goes
/// all the way in the context of who sends it; what that does not finish is left to those threads.
fn used() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).context("asking for the processor time used")?;
    let own = (usage.user_time() + usage.system_time()).num_microseconds();
    let own = Duration::from_micros(own.cast_unsigned()).as_secs_f64();
    let mut threads = 0.0;
    for entry in Path::new("/proc").read_dir().context("reading /proc")? {
        let process = entry?.path();
        // Others may end while they are looked at.
        let comm = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
        if comm.starts_with("ksoftirqd/") {
            let text =
                std::fs::read_to_string(process.join("schedstat")).context("reading what ksoftirqd used")?;
            let nanoseconds: f64 = text.split(' ').next().context("an empty schedstat")?.parse()?;
            threads += nanoseconds / 1e9;
        }
    }
    Ok(own + threads)
}

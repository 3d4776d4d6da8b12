//! Who serves a scene, and the questions that are asked in it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::{Agent, FLAGS};
use proxy_tests::answer::Answer;
use proxy_tests::manifests::{EndpointController, ManifestDir, Phase, ServicePlan};
use proxy_tests::object::{Object, Publish};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Server, eventually, request};
use proxy_tests::reference::{self, Door};
use proxy_tests::test_cluster::TestCluster;

/// How soon a change must show.
pub(crate) const SOON: Duration = Duration::from_secs(10);
/// How long one looks for what must not come.
pub(crate) const MOMENT: Duration = Duration::from_millis(300);
/// What endpoints listen on.
pub(crate) const PORT: u16 = 8080;

/// A Service over TCP and UDP, dual-stack: port 80 of its ClusterIPs and a NodePort lead to one endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Web<'a> {
    /// Its name, of which its ClusterIPs' last number is a part.
    pub(crate) n: u8,
    /// Its NodePort.
    pub(crate) node_port: u16,
    /// Where it leads.
    pub(crate) endpoint: &'a str,
}

impl<'a> Web<'a> {
    pub(crate) const fn new(n: u8, node_port: u16, endpoint: &'a str) -> Self {
        Self { n, node_port, endpoint }
    }

    /// Its ClusterIPs with its port.
    pub(crate) fn cluster_ips(&self) -> [SocketAddr; 2] {
        vips(self.n).map(|vip| SocketAddr::new(vip, 80))
    }

    fn plan(&self) -> ServicePlan {
        ServicePlan::new(&self.name(), &vips(self.n))
            .port("tcp", "TCP", 80, PORT)
            .node_port(self.node_port)
            .port("udp", "UDP", 80, PORT)
            .node_port(self.node_port)
    }

    pub(crate) fn name(&self) -> String {
        format!("web{}", self.n)
    }
}

fn vips(n: u8) -> [IpAddr; 2] {
    [format!("10.96.0.{n}"), format!("fd00:10:96::{n}")].map(|text| text.parse().expect("an address"))
}

/// Who translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proxy {
    /// Rules of kube-proxy's shape.
    Rules,
    /// The agent.
    Agent,
}

/// Plays a scene with both.
pub(crate) fn with_either(play: impl Fn(Proxy) -> Result<()>) -> Result<()> {
    [Proxy::Rules, Proxy::Agent]
        .into_iter()
        .try_for_each(|proxy| play(proxy).with_context(|| format!("served by {proxy:?}")))
}

/// What serves a node; it ends with this value.
pub(crate) struct Serving {
    pub(crate) agent: Option<Agent>,
    dir: ManifestDir,
}

impl Proxy {
    /// Has a node serve these. The flags are the agent's.
    pub(crate) fn serve(
        self,
        cluster: &TestCluster,
        node: &str,
        webs: &[Web],
        flags: &[&str],
    ) -> Result<Serving> {
        self.serve_and(cluster, node, webs, flags, &[])
    }

    /// The same, with these objects for the agent besides.
    pub(crate) fn serve_and(
        self,
        cluster: &TestCluster,
        node: &str,
        webs: &[Web],
        flags: &[&str],
        objects: &[Object],
    ) -> Result<Serving> {
        let dir = ManifestDir::new()?;
        objects.iter().try_for_each(|object| dir.publish(object))?;
        webs.iter().try_for_each(|web| publish(&dir, cluster, web, |plan| plan))?;
        let agent = match self {
            Self::Agent => Some(Agent::start(cluster, node, &dir, &[&FLAGS[..], flags].concat())?),
            Self::Rules => {
                reference::load(&cluster.place(node).netns, &doors(cluster, webs))?;
                None
            }
        };
        Ok(Serving { agent, dir })
    }
}

impl Serving {
    /// Where its objects are.
    pub(crate) fn dir(&self) -> &ManifestDir {
        &self.dir
    }

    /// Has the agent serve one more, changed so.
    pub(crate) fn add(
        &self,
        cluster: &TestCluster,
        web: &Web,
        change: impl Fn(ServicePlan) -> ServicePlan,
    ) -> Result<()> {
        publish(&self.dir, cluster, web, change)
    }

    /// The same without an endpoint.
    pub(crate) fn add_empty(&self, web: &Web, change: impl Fn(ServicePlan) -> ServicePlan) -> Result<()> {
        publish_empty(&self.dir, web, change).map(drop)
    }

    /// Waits until the agent shows all of these addresses.
    pub(crate) fn knows(&self, addresses: &[&str]) -> Result<()> {
        let agent = self.agent.as_ref().context("no agent serves")?;
        soon(|| {
            let listed = agent.service_list_json()?.to_string();
            let absent = addresses.iter().find(|address| !listed.contains(*address));
            ensure!(absent.is_none(), "{absent:?} is not among {listed}");
            Ok(())
        })
    }
}

fn publish(
    dir: &ManifestDir,
    cluster: &TestCluster,
    web: &Web,
    change: impl Fn(ServicePlan) -> ServicePlan,
) -> Result<()> {
    publish_empty(dir, web, change)?.set(cluster.place(web.endpoint), Phase::Ready)
}

fn publish_empty<'a>(
    dir: &'a ManifestDir,
    web: &Web,
    change: impl Fn(ServicePlan) -> ServicePlan,
) -> Result<EndpointController<'a>> {
    dir.publish(&Object::from(&change(web.plan()).build()))?;
    EndpointController::new(dir, &web.name(), &[("tcp", "TCP", PORT), ("udp", "UDP", PORT)])
}

/// Rules as a kube-proxy in nftables mode leaves them.
pub(crate) fn leave_rules(cluster: &TestCluster, node: &str, webs: &[Web]) -> Result<()> {
    reference::load_as("kube-proxy", &cluster.place(node).netns, &doors(cluster, webs))
}

/// The same in iptables mode: `kind` is `nft` or `legacy`.
pub(crate) fn leave_iptables(kind: &str, cluster: &TestCluster, node: &str, webs: &[Web]) -> Result<()> {
    reference::load_iptables(kind, &cluster.place(node).netns, &doors(cluster, webs))
}

fn doors(cluster: &TestCluster, webs: &[Web]) -> Vec<(Door, SocketAddr)> {
    let families = |web: &Web| {
        let addresses = web.cluster_ips().map(Door::Address).into_iter();
        let doors = addresses.flat_map(|address| [address, Door::NodePort(web.node_port)]);
        doors
            .zip(cluster.place(web.endpoint).at(PORT).into_iter().flat_map(|to| [to, to]))
            .collect::<Vec<_>>()
    };
    webs.iter().flat_map(families).collect()
}

/// Servers on the endpoints' port in these places.
pub(crate) fn servers(cluster: &TestCluster, places: &[&str]) -> Result<Vec<Server>> {
    places.iter().map(|place| Server::start(cluster.place(place), &[PORT])).collect()
}

/// TCP, connected UDP, unconnected UDP.
pub(crate) const WAYS: [fn(SocketAddr) -> Ask; 3] = [Ask::tcp, Ask::udp, Ask::unconnected];

/// An answer to one question, which must come from `server`.
pub(crate) fn answer(client: &Place, ask: &Ask, server: &str) -> Result<Answer> {
    let request = request(client, ask)?;
    let context = || format!("{} {ask:?} got {request:?}", client.name);
    let answer = request.answer.clone().with_context(context)?;
    ensure!(answer.name == server, "not from {server}: {}", context());
    Ok(answer)
}

/// Every way in both families gets an answer from `server`.
pub(crate) fn is_served(client: &Place, targets: [SocketAddr; 2], server: &str) -> Result<()> {
    for to in targets {
        WAYS.into_iter().try_for_each(|way| answer(client, &way(to), server).map(drop))?;
    }
    Ok(())
}

/// The same, and the server sees one of these addresses.
pub(crate) fn is_served_as(
    client: &Place,
    targets: [SocketAddr; 2],
    server: &str,
    seen: [IpAddr; 2],
) -> Result<()> {
    for to in targets {
        for way in WAYS {
            let answer = answer(client, &way(to), server)?;
            ensure!(
                seen.contains(&answer.peer.ip()),
                "{} asks {to}: {server} sees {}, not {seen:?}",
                client.name,
                answer.peer
            );
        }
    }
    Ok(())
}

/// Waits until a check holds.
pub(crate) fn soon(check: impl FnMut() -> Result<()>) -> Result<()> {
    eventually(SOON, check)
}

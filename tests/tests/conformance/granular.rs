//! Upstream's granular checks of Services, for one address family: `networking` asks for the primary one, `dual_stack`
//! for the secondary.
//!
//! As `NewNetworkingTestConfig` makes them: a pod a node behind a NodePort Service, the same pods behind one with session
//! affinity, a client in a pod and one in the host network. Each check runs in every cluster of [`GROUNDS`]; tests that run
//! at the same time share these clusters, and make Services of their own for what they change.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result, ensure};
use proxy_tests::probe::Server;

use crate::cluster::{Cluster, GROUNDS, service, web_node_port};
use crate::reach::{WAYS, Way, dial, echo, never, silent, soon, sticks};

/// The endpoints, one a node.
const ENDPOINTS: [&str; 3] = ["a", "c", "e"];
/// The endpoints in the host network.
const HOST_ENDPOINTS: [&str; 3] = ["h1", "h2", "h3"];
/// The numbers of the Services that stay as they are.
const PLAIN: u8 = 1;
const STICKY: u8 = 2;
const HOST: u8 = 3;

/// An address family, as an index into pairs of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4.
    Primary = 0,
    /// IPv6.
    Secondary = 1,
}

/// A cluster with its servers, which end before it.
struct Stage {
    /// Nobody asks them from here; the lock makes them fit for threads to share.
    _servers: Mutex<Vec<Server>>,
    cluster: Cluster,
}

impl Stage {
    fn raise(ground: usize) -> Result<Self> {
        let cluster = Cluster::on(GROUNDS[ground])?;
        let servers = cluster.serve(&[&ENDPOINTS[..], &HOST_ENDPOINTS[..]].concat())?;
        cluster.expose(&web_node_port("plain", PLAIN, node_port(PLAIN)), &ENDPOINTS)?;
        cluster.expose(&web_node_port("sticky", STICKY, node_port(STICKY)).affinity(10_800), &ENDPOINTS)?;
        cluster.expose(&web_node_port("host", HOST, node_port(HOST)), &HOST_ENDPOINTS)?;
        Ok(Self { _servers: Mutex::new(servers), cluster })
    }

    /// The addresses of a Service for a family: ClusterIP and NodePort, on the client's own node and on another.
    fn addresses(&self, n: u8, family: Family) -> [SocketAddr; 3] {
        let nodes = ["node1", "node2"].map(|node| self.cluster.place(node).at(node_port(n))[family as usize]);
        [service(n)[family as usize], nodes[0], nodes[1]]
    }

    /// Every address of a Service leads to exactly these endpoints.
    fn leads(&self, client: &str, n: u8, family: Family, way: Way, endpoints: &[&str]) -> Result<()> {
        let addresses = self.addresses(n, family);
        addresses.into_iter().try_for_each(|to| dial(self.cluster.place(client), &way(to), endpoints))
    }

    /// The same once a change is in force.
    fn soon_leads(&self, client: &str, n: u8, family: Family, way: Way, endpoints: &[&str]) -> Result<()> {
        soon(|| self.leads(client, n, family, way, endpoints))
    }
}

fn node_port(n: u8) -> u16 {
    30_000 + u16::from(n)
}

/// A number for a Service that no other test has in these clusters.
fn fresh() -> u8 {
    static NEXT: AtomicU8 = AtomicU8::new(10);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Runs a check in each of the clusters.
fn everywhere(check: impl Fn(&Stage) -> Result<()>) -> Result<()> {
    // All are held to the end: the next test finds them.
    let stages = (0..GROUNDS.len()).map(stage).collect::<Result<Vec<_>>>()?;
    stages.iter().zip(GROUNDS).try_for_each(|(stage, ground)| {
        check(stage).with_context(|| format!("with network and socket LB {ground:?}"))
    })
}

/// The cluster that some test holds, or a new one.
fn stage(ground: usize) -> Result<Arc<Stage>> {
    static SHARED: Mutex<[Weak<Stage>; GROUNDS.len()]> = Mutex::new([const { Weak::new() }; GROUNDS.len()]);
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(stage) = shared[ground].upgrade() {
        return Ok(stage);
    }
    let stage = Arc::new(Stage::raise(ground)?);
    shared[ground] = Arc::downgrade(&stage);
    Ok(stage)
}

/// pod-Service, node-Service and endpoint-Service: every endpoint is seen through every address, and one of the three
/// is the client itself if it is an endpoint.
pub(crate) fn client_reaches(client: &str, family: Family, way: Way) -> Result<()> {
    everywhere(|stage| stage.soon_leads(client, PLAIN, family, way, &ENDPOINTS))
}

/// Two Services over the same pods; deleting one leaves the other.
pub(crate) fn same_selector(family: Family) -> Result<()> {
    let n = fresh();
    everywhere(|stage| {
        let twin = format!("twin{n}");
        stage.cluster.expose(&web_node_port(&twin, n, node_port(n)), &ENDPOINTS)?;
        for way in WAYS {
            stage.soon_leads("b", n, family, way, &ENDPOINTS)?;
            stage.leads("b", PLAIN, family, way, &ENDPOINTS)?;
        }
        stage.cluster.delete(&twin);
        for way in WAYS {
            for to in stage.addresses(n, family) {
                soon(|| silent(stage.cluster.place("b"), &way(to)))?;
            }
            stage.leads("b", PLAIN, family, way, &ENDPOINTS)?;
        }
        Ok(())
    })
}

/// After an endpoint has gone exactly the others answer. Its server goes on, so that a request to it would be seen.
pub(crate) fn update_endpoints(family: Family, way: Way) -> Result<()> {
    let n = fresh();
    everywhere(|stage| {
        let name = format!("shrinks{n}");
        let plan = web_node_port(&name, n, node_port(n));
        let mut controller = stage.cluster.expose(&plan, &ENDPOINTS)?;
        stage.soon_leads("b", n, family, way, &ENDPOINTS)?;
        controller.remove("c")?;
        stage.soon_leads("b", n, family, way, &["a", "e"])?;
        stage.cluster.delete(&name);
        Ok(())
    })
}

/// A NodePort serves the host, own and other node; after the Service is deleted no endpoint answers.
pub(crate) fn update_node_port(family: Family, way: Way) -> Result<()> {
    let n = fresh();
    everywhere(|stage| {
        let name = format!("goes{n}");
        stage.cluster.expose(&web_node_port(&name, n, node_port(n)), &ENDPOINTS)?;
        stage.soon_leads("h1", n, family, way, &ENDPOINTS)?;
        stage.cluster.delete(&name);
        let client = stage.cluster.place("h1");
        for to in stage.addresses(n, family) {
            soon(|| silent(client, &way(to)))?;
            never(client, &way(to))?;
        }
        Ok(())
    })
}

/// One endpoint answers a client, whatever address of the Service it uses.
pub(crate) fn affinity(family: Family, way: Way) -> Result<()> {
    everywhere(|stage| {
        for client in ["b", "h1"] {
            let client = stage.cluster.place(client);
            let mut chosen = Vec::new();
            // The NodePort of another node is another node's to choose for.
            for to in &stage.addresses(STICKY, family)[..2] {
                let stuck = soon(|| sticks(client, &way(*to)))?;
                chosen.push(stuck.with_context(|| format!("{} → {to} is not sticky", client.name))?);
            }
            ensure!(chosen[0] == chosen[1], "{}: {chosen:?}", client.name);
            let far = stage.addresses(STICKY, family)[2];
            ensure!(sticks(client, &way(far))?.is_some(), "{} → {far} is not sticky", client.name);
        }
        Ok(())
    })
}

/// 2000 bytes go there and come back; as a datagram they are fragments.
pub(crate) fn large(family: Family, way: Way) -> Result<()> {
    everywhere(|stage| {
        for n in [PLAIN, HOST] {
            for to in stage.addresses(n, family) {
                // Often enough to meet every endpoint; a path's MTU is learnt at the cost of a datagram.
                soon(|| (0..12).try_for_each(|_| echo(stage.cluster.place("b"), &way(to))))?;
            }
        }
        Ok(())
    })
}

/// Endpoints in the host network serve pods and nodes by all addresses, large requests too.
pub(crate) fn host_network(family: Family) -> Result<()> {
    everywhere(|stage| {
        for way in WAYS {
            for client in ["b", "h1"] {
                stage.soon_leads(client, HOST, family, way, &HOST_ENDPOINTS)?;
                for to in stage.addresses(HOST, family) {
                    soon(|| echo(stage.cluster.place(client), &way(to)))?;
                }
            }
        }
        Ok(())
    })
}

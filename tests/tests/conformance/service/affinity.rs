//! Session affinity: on, timed out, switched.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::manifests::ServicePlan;
use proxy_tests::probe::{Ask, get, wait};
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, service, web_node_port};
use crate::reach::{soon, sticks, ways};

const NODE_PORT: u16 = 30_080;
const PODS: [&str; 3] = ["b", "c", "e"];
/// Upstream's is 125 seconds; long enough for 15 requests on a machine that is busy.
const TIMEOUT: u16 = 3;

/// The way a test asks: the ClusterIP, or the NodePort of a node that is not the client's.
#[derive(Clone, Copy)]
enum Door {
    ClusterIp,
    NodePort,
}

impl Door {
    fn targets(self, cluster: &Cluster) -> [SocketAddr; 2] {
        match self {
            Self::ClusterIp => service(1),
            Self::NodePort => cluster.place("node3").at(NODE_PORT),
        }
    }
}

fn plan() -> ServicePlan {
    web_node_port("affinity", 1, NODE_PORT)
}

/// Every way of asking sticks to one endpoint, or none does.
fn stick(cluster: &Cluster, door: Door, wanted: bool) -> Result<()> {
    let client = cluster.place("a");
    for ask in ways(door.targets(cluster)) {
        soon(|| {
            let sticky = sticks(client, &ask)?.is_some();
            ensure!(sticky == wanted, "{ask:?}: sticky is {sticky}");
            Ok(())
        })?;
    }
    Ok(())
}

fn works(network: PodNetwork, door: Door) -> Result<()> {
    let cluster = Cluster::raise(network)?;
    let _servers = cluster.serve(&PODS)?;
    cluster.expose(&plan().affinity(10_800), &PODS)?;
    stick(&cluster, door, true)
}

fn times_out(network: PodNetwork, door: Door) -> Result<()> {
    let cluster = Cluster::raise(network)?;
    let _servers = cluster.serve(&PODS)?;
    cluster.expose(&plan().affinity(TIMEOUT.into()), &PODS)?;
    let client = cluster.place("a");
    let asks = door.targets(&cluster).map(Ask::tcp);
    let mut before = Vec::new();
    for ask in &asks {
        let stuck = soon(|| sticks(client, ask)?.context("not sticky"))?;
        before.push(stuck);
    }
    // The client must be idle for longer than the time-out, or nothing is shown; upstream tries ten times, too.
    let mut changed = [false; 2];
    for _ in 0..10 {
        wait(Duration::from_secs_f64(f64::from(TIMEOUT) + 0.5), "affinity to end");
        for (family, ask) in asks.iter().enumerate() {
            let now = get(client, ask)?.name;
            changed[family] |= now != before[family];
            // Whoever was chosen keeps the client.
            ensure!(sticks(client, ask)?.as_ref() == Some(&now), "{ask:?} does not stick to {now}");
        }
        if changed == [true; 2] {
            return Ok(());
        }
    }
    anyhow::bail!("never another endpoint after the time-out: {changed:?}")
}

fn switches(network: PodNetwork, door: Door) -> Result<()> {
    let cluster = Cluster::raise(network)?;
    let _servers = cluster.serve(&PODS)?;
    cluster.expose(&plan(), &PODS)?;
    stick(&cluster, door, false)?;
    cluster.apply(plan().affinity(10_800));
    stick(&cluster, door, true)?;
    cluster.apply(plan());
    stick(&cluster, door, false)
}

#[test]
fn should_have_session_affinity_work_for_service_with_type_cluster_ip() -> Result<()> {
    // service.go:2229; A-1
    works(PodNetwork::Routed, Door::ClusterIp)
}

#[test]
fn should_have_session_affinity_timeout_work_for_service_with_type_cluster_ip() -> Result<()> {
    // service.go:2235
    times_out(PodNetwork::Bridged, Door::ClusterIp)
}

#[test]
fn should_be_able_to_switch_session_affinity_for_service_with_type_cluster_ip() -> Result<()> {
    // service.go:2251; A-9
    switches(PodNetwork::Overlay, Door::ClusterIp)
}

#[test]
fn should_have_session_affinity_work_for_node_port_service() -> Result<()> {
    // service.go:2266
    works(PodNetwork::Overlay, Door::NodePort)
}

#[test]
fn should_have_session_affinity_timeout_work_for_node_port_service() -> Result<()> {
    // service.go:2272; A-4
    times_out(PodNetwork::Routed, Door::NodePort)
}

#[test]
fn should_be_able_to_switch_session_affinity_for_node_port_service() -> Result<()> {
    // service.go:2288; A-9
    switches(PodNetwork::Bridged, Door::NodePort)
}

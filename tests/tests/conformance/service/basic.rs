//! Services come, go and come back.

use anyhow::{Result, ensure};
use proxy_tests::apiserver::Fault;
use proxy_tests::manifests::Phase;
use proxy_tests::probe::Server;
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, everywhere, service, vips, web};
use crate::reach::{dial_all, down, refused, seen_as, soon, up};

#[test]
fn should_serve_a_basic_endpoint_from_pods() -> Result<()> {
    // service.go:733; E-6, P-14
    let cluster = Cluster::raise(PodNetwork::RoutedOverlay)?;
    let _servers = cluster.serve(&["c", "d"])?;
    let mut endpoints = cluster.expose(&web("endpoint-test2", 1), &[])?;
    let [client, c, d] = cluster.places(["a", "c", "d"]);
    soon(|| refused(client, service(1)))?;
    endpoints.set(c, Phase::Ready)?;
    soon(|| dial_all(client, service(1), &["c"]))?;
    endpoints.set(d, Phase::Ready)?;
    soon(|| dial_all(client, service(1), &["c", "d"]))?;
    endpoints.remove("c")?;
    soon(|| dial_all(client, service(1), &["d"]))?;
    endpoints.remove("d")?;
    soon(|| refused(client, service(1)))
}

#[test]
fn should_preserve_source_pod_ip_for_traffic_through_service_cluster_ip() -> Result<()> {
    // service.go:1020; M-6, M-17
    everywhere(|cluster| {
        let _servers = cluster.serve(&["c"])?;
        cluster.expose(&web("sourceip-test", 1), &["c"])?;
        for client in cluster.places(["d", "a", "e"]) {
            soon(|| seen_as(client, service(1), client.addresses()))?;
        }
        Ok(())
    })
}

#[test]
fn should_allow_pods_to_hairpin_back_to_themselves_through_services() -> Result<()> {
    // service.go:1095; M-10
    everywhere(|cluster| {
        let _servers = cluster.serve(&["a"])?;
        cluster.expose(&web("hairpin-test", 1), &["a"])?;
        soon(|| dial_all(cluster.place("a"), service(1), &["a"]))
    })
}

/// A Service with three servers of its own, one a node, in pods that others use too.
struct Deployment {
    names: [String; 3],
    _servers: Vec<Server>,
}

impl Deployment {
    fn start(cluster: &Cluster, name: &str, n: u8) -> Result<Self> {
        let (pods, port) = (["a", "c", "e"], 9000 + u16::from(n));
        let names = pods.map(|pod| format!("{name}-{pod}"));
        let servers =
            pods.iter().zip(&names).map(|(pod, name)| Server::named(cluster.place(pod), name, &[port]));
        let servers = servers.collect::<Result<_>>()?;
        let plan = proxy_tests::manifests::ServicePlan::new(name, &vips(n)).port("", "TCP", 80, port);
        cluster.expose(&plan, &pods)?;
        Ok(Self { names, _servers: servers })
    }

    /// Upstream's `verifyServeHostnameServiceUp`.
    fn is_up(&self, cluster: &Cluster, n: u8) -> Result<()> {
        up(cluster.places(["h1", "b"]), service(n), &self.names.each_ref().map(String::as_str))
    }
}

#[test]
fn should_be_able_to_up_and_down_services() -> Result<()> {
    // service.go:1125; S-6, V-3
    let cluster = Cluster::raise(PodNetwork::Bridged)?;
    let first = Deployment::start(&cluster, "up-down-1", 1)?;
    let second = Deployment::start(&cluster, "up-down-2", 2)?;
    first.is_up(&cluster, 1)?;
    second.is_up(&cluster, 2)?;
    cluster.delete("up-down-1");
    down(cluster.places(["h1", "b"]), service(1))?;
    second.is_up(&cluster, 2)?;
    let third = Deployment::start(&cluster, "up-down-3", 3)?;
    second.is_up(&cluster, 2)?;
    third.is_up(&cluster, 3)
}

#[test]
fn should_work_after_the_service_has_been_recreated() -> Result<()> {
    // service.go:1171; S-22, X-19
    let cluster = Cluster::raise(PodNetwork::Routed)?;
    let pods = ["a", "c", "e"];
    let _servers = cluster.serve(&pods)?;
    let clients = || cluster.places(["h1", "b"]);
    // Under the same address, and then under another.
    for (n, next) in [(1, 1), (1, 2)] {
        cluster.expose(&web("again", n), &pods)?;
        up(clients(), service(n), &pods)?;
        cluster.delete("again");
        down(clients(), service(n))?;
        cluster.expose(&web("again", next), &pods)?;
        up(clients(), service(next), &pods)?;
        if next != n {
            down(clients(), service(n))?;
        }
    }
    Ok(())
}

#[test]
fn should_work_after_restarting_kube_proxy() -> Result<()> {
    // service.go:1207; Y-22, F-14
    let mut cluster = Cluster::raise(PodNetwork::Overlay)?;
    let first = Deployment::start(&cluster, "restart-proxy-1", 1)?;
    let second = Deployment::start(&cluster, "restart-proxy-2", 2)?;
    first.is_up(&cluster, 1)?;
    second.is_up(&cluster, 2)?;
    for agent in &mut cluster.agents {
        let status = agent.stop()?;
        ensure!(status.success(), "{status}");
    }
    cluster.delete("restart-proxy-1");
    for agent in &mut cluster.agents {
        agent.spawn()?;
        agent.wait_ready()?;
    }
    second.is_up(&cluster, 2)?;
    // What was deleted meanwhile is gone, and what comes now is served.
    down(cluster.places(["h1", "b"]), service(1))?;
    let third = Deployment::start(&cluster, "restart-proxy-3", 3)?;
    third.is_up(&cluster, 3)
}

#[test]
fn should_work_after_restarting_apiserver() -> Result<()> {
    // service.go:1240; Y-5, Y-6
    let cluster = Cluster::raise(PodNetwork::Bridged)?;
    let first = Deployment::start(&cluster, "restart-apiserver-1", 1)?;
    first.is_up(&cluster, 1)?;
    cluster.api.fail(Fault::Drop);
    first.is_up(&cluster, 1)?;
    cluster.api.fail(Fault::None);
    let second = Deployment::start(&cluster, "restart-apiserver-2", 2)?;
    second.is_up(&cluster, 2)?;
    first.is_up(&cluster, 1)
}

//! `apps/daemon_restart.go`.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, expose, service, web, web_node_port};
use crate::http;
use crate::reach::{connections, dial_all, soon, unbroken};

#[test]
fn kube_proxy_should_recover_after_being_killed_accidentally() -> Result<()> {
    // daemon_restart.go:368; H-1, Y-22
    let mut cluster = Cluster::raise(PodNetwork::Bridged)?;
    let _servers = cluster.serve(&["a", "c", "e"])?;
    let Cluster { agents, api, test_cluster, .. } = &mut cluster;
    expose(api, test_cluster, &web_node_port("survives", 1, 30_080), &["a", "c", "e"])?;
    let (pod, outside) = (test_cluster.place("b"), test_cluster.place("outside"));
    soon(|| dial_all(pod, service(1), &["a", "c", "e"]))?;
    let loads =
        [connections(pod, service(1)[0])?, connections(outside, test_cluster.place("node1").at(30_080)[1])?];
    let healthz = SocketAddr::from(([127, 0, 0, 1], 10_256));
    for agent in agents.iter_mut() {
        agent.kill()?;
    }
    for node in crate::cluster::NODES {
        ensure!(
            http::try_get(test_cluster.place(node), healthz, "/healthz")?.is_none(),
            "{node}: somebody answers"
        );
    }
    // What the kubelet does.
    agents.iter_mut().try_for_each(proxy_tests::agent::Agent::spawn)?;
    for node in crate::cluster::NODES {
        soon(|| {
            let health = http::get(test_cluster.place(node), healthz, "/healthz")?;
            ensure!(health.starts_with("HTTP/1.1 200 "), "{node}: {health}");
            Ok(())
        })?;
    }
    // It observes what is new.
    expose(api, test_cluster, &web("new", 2), &["e"])?;
    soon(|| dial_all(pod, service(2), &["e"]))?;
    loads.into_iter().try_for_each(unbroken)
}

//! Labels that keep a Service or a slice from the proxy; a kernel module that must not be loaded.

use std::fs::read_to_string;

use anyhow::{Result, ensure};
use proxy_tests::manifests::ServicePlan;
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, NODES, READY, service, vips, web};
use crate::reach::{down, soon, up};

const PODS: [&str; 3] = ["a", "c", "e"];

#[test]
fn should_implement_service_proxy_name_label() -> Result<()> {
    // service.go:2294; S-1, S-2
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    let _servers = cluster.serve(&PODS)?;
    let clients = || cluster.places(["h1", "b"]);
    let disabled = |plan: ServicePlan| plan.label("service.kubernetes.io/service-proxy-name", "foo-bar");
    cluster.expose(&disabled(web("disabled", 1)), &PODS)?;
    cluster.expose(&web("toggled", 2), &PODS)?;
    up(clients(), service(2), &PODS)?;
    down(clients(), service(1))?;
    cluster.apply(disabled(web("toggled", 2)));
    down(clients(), service(2))?;
    cluster.apply(web("toggled", 2));
    up(clients(), service(2), &PODS)?;
    down(clients(), service(1))
}

#[test]
fn should_implement_headless_label() -> Result<()> {
    // service.go:2345; E-2, E-3
    let cluster = Cluster::raise(PodNetwork::Bridged)?;
    let _servers = cluster.serve(&PODS)?;
    let clients = || cluster.places(["h1", "b"]);
    cluster.apply(web("by-hand", 1));
    let ports = [("tcp", "TCP", 8080), ("udp", "UDP", 8080)];
    let pods = PODS.map(|pod| (pod, READY));
    cluster.slices("by-hand", "all", &ports, &pods);
    up(clients(), service(1), &PODS)?;
    for mut slice in cluster.written("by-hand", "all", &ports, &pods) {
        let labels = slice.metadata.labels.get_or_insert_default();
        labels.insert("service.kubernetes.io/headless".into(), String::new());
        cluster.api.put(&slice);
    }
    down(clients(), service(1))?;
    cluster.slices("by-hand", "all", &ports, &pods);
    up(clients(), service(1), &PODS)
}

#[test]
fn should_allow_creating_a_basic_sctp_service_with_pod_and_endpoints() -> Result<()> {
    // service.go:3776; Z-14
    let cluster = Cluster::raise(PodNetwork::Routed)?;
    let traces = || -> Result<_> {
        let modules = read_to_string("/proc/modules").unwrap_or_default();
        let loaded = modules.lines().any(|line| line.starts_with("sctp "));
        let protocols = NODES.map(|node| {
            let table = || read_to_string("/proc/thread-self/net/protocols");
            Ok(cluster.place(node).netns.run_in(table)??.contains("\nSCTP"))
        });
        Ok((loaded, protocols.into_iter().collect::<Result<Vec<_>>>()?))
    };
    let before = traces()?;
    let plan = ServicePlan::new("sctp-clusterip", &vips(1)).port("sctp", "SCTP", 5060, 5060);
    cluster.expose(&plan.node_port(30_506), &["c"])?;
    for agent in &cluster.agents {
        soon(|| {
            let listed = agent.service_list_json()?.to_string();
            ensure!(listed.contains("SCTP") && listed.contains("sctp-clusterip"), "not there yet: {listed}");
            Ok(())
        })?;
    }
    let after = traces()?;
    ensure!(after == before, "SCTP of the kernel, module and protocol, before {before:?}, after {after:?}");
    Ok(())
}

//! ClusterIP and NodePort, TCP and UDP, both families, from a pod, from the host, and from outside.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::probe::{Ask, Server, request};
use proxy_tests::test_cluster::PodNetwork;

use crate::common::{manifests, two_nodes, vips, web};

#[test]
fn a_cluster_ip_answers_pods_and_host_processes() -> Result<()> {
    // V-3, V-5, D-1.
    for network in [PodNetwork::Routed, PodNetwork::Bridged] {
        let cluster = two_nodes(network)?;
        let dir = manifests()?;
        let _servers = ["b", "c"]
            .map(|pod| Server::start(cluster.place(pod), &[8080]))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        let _web = web(&dir, &cluster, "web", 1, &["b", "c"], |plan| plan)?;
        let _agent =
            Agent::start(&cluster, "node1", &dir, &["--cluster-cidr", "10.244.0.0/16,fd00:244::/32"])?;
        for client in ["a", "b", "h1"] {
            let place = cluster.place(client);
            for vip in vips(1) {
                let to = SocketAddr::new(vip, 80);
                for ask in [Ask::tcp(to), Ask::udp(to), Ask::unconnected(to)] {
                    let mut names = std::collections::BTreeSet::new();
                    for _ in 0..12 {
                        let request = request(place, &ask)?;
                        let seen = request.peer_name.or(request.received_from);
                        ensure!(seen == Some(to), "{client} asked {to} and sees {seen:?}: {request:?}");
                        ensure!(request.answer.is_some(), "{network:?} {client}: {ask:?}: {request:?}");
                        names.extend(request.answer.map(|answer| answer.name));
                    }
                    ensure!(names.len() == 2, "{network:?} {client} {ask:?}: only {names:?} answered");
                }
            }
        }
    }
    Ok(())
}

//! `network/service_latency.go`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, ensure};
use proxy_tests::manifests::ServicePlan;
use proxy_tests::probe::{Ask, request};
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, at};
use crate::reach::soon;

/// As many as upstream makes.
const SERVICES: u8 = 200;

fn addresses(n: u8) -> [IpAddr; 2] {
    [Ipv4Addr::new(10, 97, 0, n).into(), Ipv6Addr::new(0xfd00, 0x10, 0x97, 0, 0, 0, 0, n.into()).into()]
}

#[test]
fn should_not_be_very_high() -> Result<()> {
    // service_latency.go:60; Y-24: of many Services at once each is served soon, and soon is not said in milliseconds.
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    let _servers = cluster.serve(&["c"])?;
    let name = |n: u8| format!("latency-svc-{n}");
    for n in 1..=SERVICES {
        cluster.expose(&ServicePlan::new(&name(n), &addresses(n)).port("", "TCP", 80, 8080), &["c"])?;
    }
    for n in 1..=SERVICES {
        for to in at(addresses(n), 80) {
            soon(|| {
                let request = request(cluster.place("a"), &Ask::tcp(to))?;
                ensure!(request.answer.is_some_and(|answer| answer.name == "c"), "{to} is not served");
                Ok(())
            })?;
        }
    }
    for n in 1..=SERVICES {
        cluster.delete(&name(n));
    }
    for agent in &cluster.agents {
        soon(|| {
            let listed = agent.service_list_json()?.to_string();
            ensure!(!listed.contains("latency-svc"), "still there: {listed}");
            Ok(())
        })?;
    }
    Ok(())
}

//! Addresses of load balancers, external addresses, source ranges, traffic policies.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use proxy_tests::manifests::ServicePlan;
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, get};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};

use crate::common::{manifests, two_nodes, vips};
use crate::scene::{
    agent, answers, at, fails, in_network, is_dropped, is_refused, is_served, public, seen_as, servers,
    service, soon, spreads,
};

#[test]
fn load_balancer_and_external_addresses_serve_pods_hosts_and_outside() -> Result<()> {
    // V-3, V-7, V-9, V-23, P-23; source ranges V-14, V-17.
    in_network(PodNetwork::Bridged, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["b", "c", "h2"])?;
        service(&dir, &cluster, ("balanced", 1, 0), &["b", "c"], |plan| plan.load_balancer(&public(1)))?;
        service(&dir, &cluster, ("external", 2, 0), &["c"], |plan| plan.external_ips(&public(2)))?;
        service(&dir, &cluster, ("host", 3, 0), &["h2"], |plan| plan.external_ips(&public(3)))?;
        let open =
            [(4, ["192.168.10.101/32", "fd00:10::1:1/128"]), (5, ["10.244.1.11/32", "fd00:244:1::11/128"])];
        for (n, ranges) in open {
            let restricted = |plan: ServicePlan| plan.load_balancer(&public(n)).source_ranges(&ranges);
            service(
                &dir,
                &cluster,
                (&format!("restricted{n}"), n, 30000 + u16::from(n)),
                &["c"],
                restricted,
            )?;
        }
        let _agent = agent(&cluster, "node1", &dir, &[])?;
        let outside = cluster.place("outside");
        for client in ["a", "b", "node1", "outside"].map(|name| cluster.place(name)) {
            spreads(client, at(public(1), 80), &["b", "c"])?;
            is_served(client, at(public(2), 80), "c")?;
            is_served(client, at(public(3), 80), "h2")?;
            // Ranges restrict the balancer's addresses alone.
            is_served(client, at(vips(4), 80), "c")?;
            is_served(client, cluster.place("node1").at(30004), "c")?;
        }
        is_served(outside, at(public(4), 80), "c")?;
        is_dropped(outside, at(public(5), 80))?;
        is_served(cluster.place("a"), at(public(5), 80), "c")?;
        for pod in ["a", "b"] {
            is_dropped(cluster.place(pod), at(public(4), 80))?;
        }
        for to in at(public(4), 80) {
            fails(cluster.place("node1"), &Ask::tcp(to), &["connect EPERM", "connect timeout"])?;
        }
        Ok(())
    })
}

#[test]
fn a_local_policy_keeps_traffic_on_its_node_and_drops_it_where_there_is_no_endpoint() -> Result<()> {
    // P-9, P-15, P-16, V-24, V-25, V-26.
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["b", "c"])?;
        service(&dir, &cluster, ("both", 1, 30001), &["b", "c"], |plan| {
            plan.load_balancer(&public(1)).external_local(None)
        })?;
        service(&dir, &cluster, ("far", 2, 30002), &["c"], |plan| {
            plan.load_balancer(&public(2)).external_local(None)
        })?;
        service(&dir, &cluster, ("inside", 3, 30003), &["b", "c"], ServicePlan::internal_local)?;
        service(&dir, &cluster, ("nowhere", 4, 0), &["c"], ServicePlan::internal_local)?;
        let _agent = agent(&cluster, "node1", &dir, &[])?;
        let (a, node1, outside) = (cluster.place("a"), cluster.place("node1"), cluster.place("outside"));
        for targets in [at(public(1), 80), node1.at(30001)] {
            answers(outside, targets, "b", |answer| seen_as(answer, outside.addresses()))?;
            for client in [a, node1] {
                spreads(client, targets, &["b", "c"])?;
            }
        }
        for targets in [at(public(2), 80), node1.at(30002)] {
            is_dropped(outside, targets)?;
            answers(a, targets, "c", |answer| seen_as(answer, a.addresses()))?;
            answers(node1, targets, "c", |answer| seen_as(answer, node1.addresses()))?;
        }
        for client in [a, node1] {
            is_served(client, at(vips(3), 80), "b")?;
        }
        spreads(outside, node1.at(30003), &["b", "c"])?;
        for to in at(vips(4), 80) {
            // Where sockets are translated a drop shows as an error at once.
            fails(a, &Ask::tcp(to), &["connect EPERM", "connect timeout"])?;
            fails(a, &Ask::udp(to), &["receive timeout"])?;
            fails(outside, &Ask::tcp(to), &["connect timeout"])?;
        }
        Ok(())
    })
}

#[test]
fn a_client_stays_with_its_endpoint_until_that_goes_or_affinity_is_switched_off() -> Result<()> {
    //
    let cluster = two_nodes(PodNetwork::Bridged)?;
    let dir = manifests()?;
    let _servers = servers(&cluster, &["b", "c", "d"])?;
    let pods = ["b", "c", "d"].map(|name| cluster.place(name));
    let sticky = |plan: ServicePlan| plan.external_ips(&public(1)).affinity(3600);
    let mut web = service(&dir, &cluster, ("web", 1, 30001), &["b", "c", "d"], sticky)?;
    let _agent = agent(&cluster, "node1", &dir, &[])?;
    let clients = ["a", "node1", "outside"].map(|name| cluster.place(name));
    for client in clients {
        let chosen = sticks(client, &cluster)?;
        // One endpoint goes: who was there goes elsewhere, and stays there when it comes back; others do not move.
        let gone = chosen[0].as_str();
        let rest: Vec<_> = pods.into_iter().filter(|pod| pod.name != gone).collect();
        web.replace(&rest)?;
        soon(|| {
            let now = sticks(client, &cluster)?;
            let right = |(now, before): (&String, &String)| now != gone && (now == before || before == gone);
            ensure!(now.iter().zip(&chosen).all(right), "{chosen:?} became {now:?} when {gone} went");
            Ok(())
        })?;
        let second = sticks(client, &cluster)?;
        web.replace(&pods)?;
        soon(|| {
            ensure!(web.members().count() == 3 && sticks(client, &cluster)? == second, "moved");
            Ok(())
        })?;
    }
    service(&dir, &cluster, ("web", 1, 30001), &["b", "c", "d"], |plan| plan.external_ips(&public(1)))?;
    for client in clients {
        soon(|| spreads(client, cluster.place("node1").at(30001), &["b", "c", "d"]))?;
    }
    is_refused(cluster.place("a"), at(vips(1), 81))
}

/// Who answers a client: the same for every address of the Service, one a family and protocol.
fn sticks(client: &Place, cluster: &TestCluster) -> Result<Vec<String>> {
    let mut chosen = Vec::new();
    let targets = [at(vips(1), 80), at(public(1), 80), cluster.place("node1").at(30001)];
    for family in [0, 1] {
        for way in [Ask::tcp, Ask::udp] {
            let mut names = BTreeSet::new();
            for target in &targets {
                for _ in 0..3 {
                    names.insert(get(client, &way(target[family]))?.name);
                }
            }
            ensure!(names.len() == 1, "{} is sent to {names:?}", client.name);
            chosen.extend(names);
        }
    }
    Ok(chosen)
}

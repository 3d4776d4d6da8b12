//! Who counts as a pod by the interface it sends through, and where nobody's ClusterIPs lead.

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::manifests::{ServicePlan, service_cidr};
use proxy_tests::object::{Key, Kind, Object, Publish};
use proxy_tests::probe::{Ask, request};
use proxy_tests::test_cluster::PodNetwork;

use crate::common::{manifests, vips};
use crate::scene::{
    SHORT, answers, at, counted, in_network, is_dropped, is_served, public, seen_as, servers, service, soon,
};

/// M-1, M-2, M-6, V-24…V-30: what counts as a pod's without any range of pod addresses.
fn by_interface(network: PodNetwork, flags: &[&str]) -> Result<()> {
    in_network(network, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        let local = |plan: ServicePlan| plan.external_ips(&public(1)).external_local(None);
        service(&dir, &cluster, ("web", 1, 30001), &["c"], local)?;
        let flags = [flags, &["--socket-lb", "off"]].concat();
        let agents = ["node1", "node2"].map(|node| Agent::start(&cluster, node, &dir, &flags));
        let _agents = agents.into_iter().collect::<Result<Vec<_>>>()?;
        let (a, d, node1, outside) = ("a", "d", "node1", "outside");
        let [a, d, node1, outside] = [a, d, node1, outside].map(|name| cluster.place(name));
        // A pod keeps its address, and takes the short cut to an endpoint elsewhere though the policy is Local.
        for to in [at(vips(1), 80), node1.at(30001), at(public(1), 80)] {
            answers(a, to, "c", |answer| seen_as(answer, a.addresses()))?;
        }
        // Somebody from outside does not, nor does a pod of another node.
        answers(outside, at(vips(1), 80), "c", |answer| seen_as(answer, node1.addresses()))?;
        for client in [outside, d] {
            is_dropped(client, node1.at(30001))?;
        }
        Ok(())
    })
}

#[test]
fn pods_behind_the_bridge_that_is_named_are_told_by_it() -> Result<()> {
    by_interface(
        PodNetwork::Bridged,
        &["--detect-local-mode", "BridgeInterface", "--pod-bridge-interface", "cni0"],
    )
}

#[test]
fn pods_behind_interfaces_of_a_name_are_told_by_it() -> Result<()> {
    by_interface(
        PodNetwork::Routed,
        &["--detect-local-mode", "InterfaceNamePrefix", "--pod-interface-name-prefix", "v-"],
    )
}

#[test]
fn an_address_of_a_service_cidr_that_is_no_service_s_leads_nowhere_as_long_as_the_range_is_there()
-> Result<()> {
    // P-22, Y-16: at once, and for packets as for sockets.
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["b"])?;
        service(&dir, &cluster, ("web", 1, 0), &["b"], |plan| plan)?;
        dir.publish(&Object::from(&service_cidr("kubernetes", &["10.96.0.0/16", "fd00:10:96::/108"])))?;
        let all = Agent::start(&cluster, "node1", &dir, &[])?;
        let off = Agent::start(&cluster, "node2", &dir, &["--socket-lb", "off"])?;
        let denied = |client: &str| -> Result<()> {
            for to in at(vips(77), 80) {
                let failure = request(cluster.place(client), &Ask::tcp(to).timeout(SHORT))?.failure;
                let failure = failure.context("somebody answered")?;
                ensure!(failure == "connect EPERM", "{client} → {to}: {failure}");
            }
            Ok(())
        };
        for client in ["a", "node1"] {
            is_served(cluster.place(client), at(vips(1), 80), "b")?;
            denied(client)?;
        }
        is_served(cluster.place("d"), at(vips(1), 80), "b")?;
        is_dropped(cluster.place("d"), at(vips(77), 80))?;
        for agent in [&all, &off] {
            ensure!(counted(agent, "unallocated_cluster_ip")? >= 4, "not counted");
        }
        // A new Service takes its address out of nowhere.
        service(&dir, &cluster, ("late", 77, 0), &["b"], |plan| plan)?;
        for client in ["a", "node1", "d"] {
            soon(|| is_served(cluster.place(client), at(vips(77), 80), "b"))?;
        }
        // Without the range an unknown address goes the way of all others: here there is none.
        dir.retract(&Key { kind: Kind::ServiceCidr, namespace: String::new(), name: "kubernetes".into() })?;
        soon(|| {
            let before = counted(&all, "unallocated_cluster_ip")?;
            request(cluster.place("a"), &Ask::tcp(at(vips(78), 80)[0]).timeout(SHORT))?;
            ensure!(counted(&all, "unallocated_cluster_ip")? == before, "still dropped");
            Ok(())
        })
    })
}

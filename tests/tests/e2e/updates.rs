//! Deployments as their users know them, under a steady load: rolling, blue/green, recreate (C-2, Y-21).

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::manifests::{EndpointController, ManifestDir};
use proxy_tests::probe::{Server, eventually};
use proxy_tests::test_cluster::TestCluster;

use crate::common::{manifests, web};
use crate::life::{FLAGS, Loads, SOON, node_ports, one_node, servers, service, with_node_ports};

/// A Service with the pods `b` and `c` behind it, whose every way in is used all the time.
struct Deployment<'a> {
    cluster: &'a TestCluster,
    controller: EndpointController<'a>,
    servers: BTreeMap<&'static str, Server>,
    loads: Loads,
    _agent: Agent,
}

impl<'a> Deployment<'a> {
    fn start(cluster: &'a TestCluster, dir: &'a ManifestDir) -> Result<Self> {
        let old = ["b", "c"];
        let servers = old.into_iter().zip(servers(cluster, &old)?).collect();
        let controller = web(dir, cluster, "web", 1, &old, |_| with_node_ports("web", 1, 30080))?;
        let agent = Agent::start(cluster, "node1", dir, &FLAGS)?;
        let mut loads = Loads::default();
        for to in service(1) {
            loads.add(cluster.place("a"), to)?;
        }
        loads.add(cluster.place("h1"), service(1)[0])?;
        for to in node_ports(cluster, "node1", 30080) {
            loads.add(cluster.place("outside"), to)?;
        }
        loads.go_on(10)?;
        Ok(Self { cluster, controller, servers, loads, _agent: agent })
    }

    fn serve(&mut self, pod: &'static str) -> Result<()> {
        self.servers.insert(pod, Server::start(self.cluster.place(pod), &[8080])?);
        Ok(())
    }
}

fn cluster() -> Result<TestCluster> {
    one_node(&["a", "b", "c", "d", "e"])
}

#[test]
fn a_rolling_update_fails_no_request() -> Result<()> {
    // C-3.
    let (cluster, dir) = (cluster()?, manifests()?);
    let mut web = Deployment::start(&cluster, &dir)?;
    for (new, old, after) in [("d", "b", ["c", "d"]), ("e", "c", ["d", "e"])] {
        let Deployment { controller, servers, loads, .. } = &mut web;
        controller.surge(cluster.place(new), || {
            servers.insert(new, Server::start(cluster.place(new), &[8080])?);
            Ok(())
        })?;
        controller.retire(cluster.place(old), || {
            // A pod that ends gracefully serves until the proxies have observed it.
            loads.only(&after)?;
            servers.get_mut(old).map_or(Ok(()), Server::drain)
        })?;
        servers.remove(old);
        loads.go_on(10)?;
    }
    web.loads.only(&["d", "e"])?;
    web.loads.end()
}

#[test]
fn blue_and_green_change_places_in_one_edit_and_no_request_fails() -> Result<()> {
    let (cluster, dir) = (cluster()?, manifests()?);
    let mut web = Deployment::start(&cluster, &dir)?;
    web.serve("d")?;
    web.serve("e")?;
    web.controller.replace(&[cluster.place("d"), cluster.place("e")])?;
    web.loads.only(&["d", "e"])?;
    web.servers.retain(|name, _| ["d", "e"].contains(name));
    web.loads.go_on(20)?;
    // And back, as after a bad release.
    web.serve("b")?;
    web.controller.replace(&[cluster.place("b")])?;
    web.loads.only(&["b"])?;
    web.servers.retain(|name, _| *name == "b");
    web.loads.go_on(20)?;
    web.loads.end()
}

#[test]
fn a_recreated_deployment_refuses_at_once_while_it_has_no_pod_and_fails_at_no_other_time() -> Result<()> {
    let (cluster, dir) = (cluster()?, manifests()?);
    let mut web = Deployment::start(&cluster, &dir)?;
    for (_, load) in web.loads.reports()? {
        ensure!(load.failed == 0, "{load:?} before");
    }
    web.controller.replace(&[])?;
    let loads = &mut web.loads;
    eventually(SOON, || {
        let refused = loads.reports()?.iter().all(|(_, load)| load.failed >= 5);
        ensure!(refused, "not all are refused: {:?}", loads.reports()?);
        Ok(())
    })?;
    web.servers.clear();
    web.serve("d")?;
    web.controller.replace(&[cluster.place("d")])?;
    web.loads.only(&["d"])?;
    let after: Vec<u64> = web.loads.reports()?.iter().map(|(_, load)| load.failed).collect();
    web.loads.only(&["d"])?;
    for ((what, load), failed) in web.loads.reports()?.into_iter().zip(after) {
        ensure!(load.failed == failed, "{what} fails again: {load:?}");
        // At once, and never by a time-out (P-4).
        let reasons: Vec<_> = load.reasons.keys().map(String::as_str).collect();
        ensure!(reasons == ["connect ECONNREFUSED"], "{what}: {load:?}");
        ensure!(load.slowest_ms < 1000.0, "{what}: {load:?}");
    }
    Ok(())
}

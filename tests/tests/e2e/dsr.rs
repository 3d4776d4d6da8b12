//! Direct server return: packets from outside go to their endpoint's node as they are, and that node answers the client.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::answer::Hold;
use proxy_tests::manifests::{EndpointController, ManifestDir, Phase, ServicePlan};
use proxy_tests::object::{Object, Publish as _};
use proxy_tests::probe::{Ask, Runner, eventually, get, transfer};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};

use crate::common::{manifests, vips};
use crate::scene::{
    SOON, agent, answers, at, counted, in_every_network, in_network, public, seen_as, servers, service,
};

const MIB: u64 = 1 << 20;
/// A transfer starves rather than the test.
const PATIENT: Duration = Duration::from_secs(5);
/// From one question of a held connection to the next.
const OFTEN: Duration = Duration::from_millis(5);
/// Where agents ask each other, and the Service by which they know each other.
const PORT: u16 = 10_261;
const FLAGS: [&str; 2] = ["--agents-service=default/agents", "--loadbalancer-mode=dsr"];
const NODE_PORT: u16 = 30_004;

/// The agents of both nodes as endpoints of their Service.
fn agents<'a>(dir: &'a ManifestDir, cluster: &TestCluster) -> Result<EndpointController<'a>> {
    let plan = ServicePlan::new("agents", &vips(9)).port("dsr", "UDP", PORT, PORT);
    dir.publish(&Object::from(&plan.build()))?;
    let mut controller = EndpointController::new(dir, "agents", &[("dsr", "UDP", PORT)])?;
    for pod in ["h1", "h2"] {
        controller.set(cluster.place(pod), Phase::Ready)?;
    }
    Ok(controller)
}

/// A Service whose one endpoint is on the second node.
fn far<'a>(dir: &'a ManifestDir, cluster: &TestCluster) -> Result<EndpointController<'a>> {
    service(dir, cluster, ("far", 4, NODE_PORT), &["c"], |plan| plan.load_balancer(&public(4)))
}

/// How the outside reaches it by the first node: by the load balancer's address, and by the NodePort.
fn doors(cluster: &TestCluster) -> [[SocketAddr; 2]; 2] {
    [at(public(4), 80), cluster.place("node1").at(NODE_PORT)]
}

/// So many of the nodes with endpoints are reached directly.
fn reaches(agent: &Agent, said: &str) -> Result<()> {
    eventually(4 * SOON, || {
        let status = agent.status_json()?;
        let line = format!("direct server return: {said} nodes with endpoints for it are reached directly");
        ensure!(status["notes"].to_string().contains(&line), "not {line:?} in {status}");
        Ok(())
    })
}

/// The packets of this work are wrapped by the first node and unwrapped by the second.
fn goes_wrapped([first, second]: [&Agent; 2], work: impl FnOnce() -> Result<()>) -> Result<()> {
    let before = (counted(first, "wrapped")?, counted(second, "unwrapped")?);
    work()?;
    let after = (counted(first, "wrapped")?, counted(second, "unwrapped")?);
    ensure!(after.0 > before.0 && after.1 > before.1, "wrapped and unwrapped: {before:?}, then {after:?}");
    Ok(())
}

/// Every way in finds the endpoint, which sees the client itself.
fn is_direct(cluster: &TestCluster) -> Result<()> {
    let outside = cluster.place("outside");
    let see = |answer: &_| seen_as(answer, outside.addresses());
    doors(cluster).into_iter().try_for_each(|door| answers(outside, door, "c", see))
}

/// The same, with the first node between the two.
fn is_masqueraded(cluster: &TestCluster) -> Result<()> {
    let (outside, node1) = (cluster.place("outside"), cluster.place("node1"));
    for to in doors(cluster).into_iter().flatten() {
        let answer = get(outside, &Ask::tcp(to))?;
        seen_as(&answer, node1.addresses()).or_else(|error| {
            // A node masquerades with an address of the interface that leads to the pod.
            ensure!(!outside.addresses().contains(&answer.peer.ip()), "{error}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Connections over every way in that ask all the time.
fn holds(cluster: &TestCluster) -> Result<Vec<Runner<Hold>>> {
    let all = doors(cluster).into_iter().flatten();
    let asks = all.flat_map(|to| [Ask::tcp(to), Ask::udp(to)]);
    asks.map(|ask| Runner::hold(cluster.place("outside"), &ask, OFTEN, Duration::from_secs(120))).collect()
}

/// They go on, so many questions further, and nothing is lost.
fn go_on(holds: &mut [Runner<Hold>]) -> Result<()> {
    for hold in holds {
        let before = hold.report()?.made;
        eventually(SOON, || {
            let report = hold.report()?;
            ensure!(report.made > before + 50 && report.failed == 0, "{report:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn an_endpoint_on_another_node_sees_the_client_and_answers_it() -> Result<()> {
    in_every_network(|cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        let (_agents, _far) = (agents(&dir, &cluster)?, far(&dir, &cluster)?);
        let [first, second] =
            [agent(&cluster, "node1", &dir, &FLAGS)?, agent(&cluster, "node2", &dir, &FLAGS)?];
        reaches(&first, "1 of 1")?;
        goes_wrapped([&first, &second], || is_direct(&cluster))?;
        let outside = cluster.place("outside");
        for to in doors(&cluster).into_iter().flatten() {
            goes_wrapped([&first, &second], || transfer(outside, &Ask::tcp(to).timeout(PATIENT), 8 * MIB))
                .with_context(|| format!("8 MiB to {to} and back"))?;
        }
        // What does not come from outside is none of its business.
        answers(cluster.place("a"), at(vips(4), 80), "c", |_| Ok(()))?;
        Ok(())
    })
}

#[test]
fn a_node_that_does_not_answer_gets_what_is_new_masqueraded_and_keeps_what_it_has() -> Result<()> {
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        let (_agents, _far) = (agents(&dir, &cluster)?, far(&dir, &cluster)?);
        let [first, mut second] =
            [agent(&cluster, "node1", &dir, &FLAGS)?, agent(&cluster, "node2", &dir, &FLAGS)?];
        reaches(&first, "1 of 1")?;
        is_direct(&cluster)?;
        let mut holds = holds(&cluster)?;
        go_on(&mut holds)?;
        second.stop()?;
        reaches(&first, "0 of 1")?;
        let status = first.status_json()?;
        ensure!(status["object_warnings"].to_string().contains("node node2 is not reached"), "{status}");
        is_masqueraded(&cluster)?;
        go_on(&mut holds)?;
        second.spawn()?;
        second.wait_ready()?;
        reaches(&first, "1 of 1")?;
        is_direct(&cluster)?;
        go_on(&mut holds)?;
        for hold in holds {
            let report = hold.stop()?;
            ensure!(report.failed == 0, "{report:?}");
        }
        Ok(())
    })
}

#[test]
fn a_restart_changes_nothing_about_who_is_reached() -> Result<()> {
    in_network(PodNetwork::Routed, |cluster| {
        let dir = manifests()?;
        let _servers = servers(&cluster, &["c"])?;
        let (mut agents, _far) = (agents(&dir, &cluster)?, far(&dir, &cluster)?);
        let [mut first, _second] =
            [agent(&cluster, "node1", &dir, &FLAGS)?, agent(&cluster, "node2", &dir, &FLAGS)?];
        reaches(&first, "1 of 1")?;
        first.stop()?;
        is_direct(&cluster)?;
        // The other agent's endpoint is gone for the moment, as while it is replaced.
        agents.remove("h2")?;
        first.spawn()?;
        first.wait_ready()?;
        is_direct(&cluster)?;
        reaches(&first, "1 of 1")?;
        is_direct(&cluster)
    })
}

//! The API server as a source, with everything that goes wrong with API servers: the data plane works all along,
//! and what changed meanwhile is in force once it is back (Y-5, Y-6, Y-8, Y-17).

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::apiserver::{ApiServer, Fault, Gone, StreamingLists};
use proxy_tests::manifests::{Family, Phase, ServicePlan, SlicePlan, node};
use proxy_tests::object::{Key, Kind};
use proxy_tests::probe::{eventually, get};
use proxy_tests::test_cluster::TestCluster;

use crate::common::{vips, web};
use crate::life::{
    FLAGS, SOON, answers, fails, nobody_answers, one_node, quick, servers, service, status_until, tables,
    with_node_ports,
};

fn cluster() -> Result<TestCluster> {
    one_node(&["a", "b", "c"])
}

/// An API server in the node, where its agent reaches it.
pub(crate) fn server(cluster: &TestCluster) -> Result<ApiServer> {
    let place = cluster.place("node1");
    let server = ApiServer::start_in(&place.netns, SocketAddr::from((Ipv4Addr::LOCALHOST, 6443)))?;
    server.put(&node("node1", &place.addresses(), &cluster.pod_cidrs("node1"), &[]));
    Ok(server)
}

fn key(name: &str) -> Key {
    Key { kind: Kind::Service, namespace: "default".into(), name: name.into() }
}

pub(crate) fn connected(agent: &Agent, wanted: bool) -> Result<()> {
    status_until(agent, &format!("connected: {wanted}"), |status| status["agent"]["connected"] == wanted)
        .map(drop)
}

/// The API server fails; Services work as before, and what changed meanwhile is in force once it is back.
fn outage(fault: Fault) -> Result<()> {
    let cluster = cluster()?;
    let server = server(&cluster)?;
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut controller = web(&server, &cluster, "web", 1, &["b"], |plan| plan)?;
    let _deleted = web(&server, &cluster, "deleted", 2, &["b"], |plan| plan)?;
    let agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    let (pod, [vip, deleted]) = (cluster.place("a"), [1, 2].map(|n| service(n)[0]));
    answers(pod, vip, "b")?;
    connected(&agent, true)?;
    server.fail(fault);
    if fault != Fault::Hang {
        // Errors meet only new requests: watches that run go on until they are cut.
        server.cut();
        connected(&agent, false)?;
    }
    let (status, page) = agent.ask(&["status"])?;
    ensure!(status.success(), "losing the API server is no illness (Y-6):\n{page}");
    ensure!(fault == Fault::Hang || page.contains("does not answer"), "{page}");
    controller.replace(&[cluster.place("c")])?;
    server.delete(&key("deleted"));
    for _ in 0..5 {
        ensure!(get(pod, &quick(vip))?.name == "b", "somebody else answers");
        ensure!(get(pod, &quick(deleted))?.name == "b", "a Service is lost");
    }
    // What was deleted meanwhile is known only from its absence in the new list (Y-8).
    server.expire(Gone::Event);
    server.fail(Fault::None);
    answers(pod, vip, "c").with_context(|| agent.log_text())?;
    nobody_answers(pod, deleted)?;
    connected(&agent, true)?;
    let _new = web(&server, &cluster, "new", 3, &["b"], |plan| plan)?;
    answers(pod, service(3)[1], "b")
}

#[test]
fn services_work_while_the_api_server_drops_every_connection() -> Result<()> {
    outage(Fault::Drop)
}

#[test]
fn services_work_while_the_api_server_answers_nothing() -> Result<()> {
    outage(Fault::Hang)
}

#[test]
fn services_work_while_the_api_server_answers_with_errors() -> Result<()> {
    outage(Fault::Status(500))
}

#[test]
fn a_server_whose_machine_is_gone_is_noticed_although_nobody_closes_the_connection() -> Result<()> {
    /// The kernel asks an idle peer after 6 s, and gives up 6 s later; a connection attempt may take 4 s.
    const NOTICED: Duration = Duration::from_secs(30);
    let cluster = cluster()?;
    let away = cluster.place("outside");
    let server = ApiServer::start_in(&away.netns, SocketAddr::from((away.v4, 6443)))?;
    let host = cluster.place("node1");
    server.put(&node("node1", &host.addresses(), &cluster.pod_cidrs("node1"), &[]));
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut controller = web(&server, &cluster, "web", 1, &["b"], |plan| plan)?;
    let agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    let (pod, vip) = (cluster.place("a"), service(1)[0]);
    answers(pod, vip, "b")?;
    connected(&agent, true)?;
    let rules = "add table ip gone; add chain ip gone in { type filter hook input priority 0; }; \
                 add chain ip gone out { type filter hook output priority 0; }; \
                 add rule ip gone in tcp dport 6443 drop; add rule ip gone out tcp sport 6443 drop";
    away.netns.output("nft", &[rules])?;
    controller.replace(&[cluster.place("c")])?;
    eventually(NOTICED, || {
        let status = agent.status_json()?;
        ensure!(status["agent"]["connected"] == false, "{:#}", status["agent"]);
        Ok(())
    })?;
    ensure!(agent.status_json()?["healthy"] == true, "losing the API server is no illness (Y-6)");
    answers(pod, vip, "b")?;
    away.netns.output("nft", &["delete table ip gone"])?;
    eventually(NOTICED, || {
        ensure!(get(pod, &quick(vip))?.name == "c", "the change has not arrived");
        Ok(())
    })?;
    connected(&agent, true)
}

#[test]
fn a_version_that_is_too_old_leads_to_a_new_list_however_the_server_says_so() -> Result<()> {
    let cluster = cluster()?;
    let server = server(&cluster)?;
    server.bookmark_every(Duration::from_millis(50));
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut controller = web(&server, &cluster, "web", 1, &["b"], |plan| plan)?;
    let agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    let (pod, vip) = (cluster.place("a"), service(1)[0]);
    for (gone, streaming, home) in [
        (Gone::Event, StreamingLists::On, "c"),
        (Gone::Http, StreamingLists::On, "b"),
        (Gone::Http, StreamingLists::Rejected, "c"),
        (Gone::Event, StreamingLists::Rejected, "b"),
    ] {
        server.put(&ServicePlan::new("vanishes", &vips(2)).port("", "TCP", 80, 8080).build());
        fails(pod, service(2)[0], "connect ECONNREFUSED")?;
        server.streaming_lists(streaming);
        server.fail(Fault::Hang);
        server.delete(&key("vanishes"));
        controller.replace(&[cluster.place(home)])?;
        server.expire(gone);
        server.fail(Fault::None);
        answers(pod, vip, home).with_context(|| format!("{gone:?} {streaming:?}"))?;
        eventually(SOON, || {
            let listed = agent.service_list_json()?.to_string();
            ensure!(!listed.contains("vanishes"), "{gone:?} {streaming:?}: {listed}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn lists_come_in_pages_when_the_server_has_no_streaming_lists() -> Result<()> {
    let cluster = cluster()?;
    let server = server(&cluster)?;
    server.streaming_lists(StreamingLists::Rejected);
    let _servers = servers(&cluster, &["b"])?;
    for n in 0..600_u16 {
        let [high, low] = n.to_be_bytes();
        let vip = Ipv4Addr::new(10, 97, high, low).into();
        server.put(&ServicePlan::new(&format!("s{n}"), &[vip]).port("", "TCP", 80, 8080).build());
        let slice = SlicePlan::new(&format!("s{n}"), "v4", Family::V4).port("", "TCP", 8080);
        let slice = slice.endpoint("b", cluster.place("b").v4.into(), Some("node1"), Phase::Ready);
        server.put(&slice.build());
    }
    let agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    for last in [[0, 0], 600_u16.wrapping_sub(1).to_be_bytes()] {
        let vip = Ipv4Addr::new(10, 97, last[0], last[1]);
        answers(cluster.place("a"), SocketAddr::from((vip, 80)), "b")?;
    }
    let status = agent.status_json()?;
    ensure!(status["agent"]["services"] == 600 && status["frontends"] == 600, "{:#}", status["agent"]);
    let pages = server.requests().iter().filter(|request| request.contains("continue=page")).count();
    ensure!(pages >= 2, "no pages: {:#?}", server.requests());
    Ok(())
}

#[test]
fn a_server_from_before_streaming_lists_is_understood() -> Result<()> {
    let cluster = cluster()?;
    let server = server(&cluster)?;
    server.streaming_lists(StreamingLists::Ignored);
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut controller = web(&server, &cluster, "web", 1, &["b"], |plan| plan)?;
    let _agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    answers(cluster.place("a"), service(1)[0], "b")?;
    controller.replace(&[cluster.place("c")])?;
    answers(cluster.place("a"), service(1)[1], "c")
}

#[test]
fn an_agent_that_starts_without_its_api_server_waits_and_touches_nothing() -> Result<()> {
    let cluster = cluster()?;
    let server = server(&cluster)?;
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&server, &cluster, "web", 1, &["b"], |plan| plan)?;
    let _gone = web(&server, &cluster, "gone", 2, &["b"], |plan| plan)?;
    server.fail(Fault::Drop);
    let binary = proxy_tests::require::agent_binary()?;
    let mut agent = Agent::prepare(&binary, &cluster, "node1", &server, &FLAGS)?;
    agent.spawn()?;
    let pid = agent.pid();
    let waits = |status: &serde_json::Value, pid: Option<u32>| {
        status["agent"]["pid"].as_u64() == pid.map(u64::from) && status["healthy"] == false
    };
    eventually(SOON, || {
        // Before the first pins there is nothing to be asked.
        let status = agent.status_json()?;
        ensure!(waits(&status, pid), "{status:#}");
        ensure!(status["frontends"] == 0 && status["links"] == serde_json::json!([]), "{status:#}");
        Ok(())
    })?;
    let (status, page) = agent.ask(&["status"])?;
    ensure!(status.code() == Some(1) && page.contains("the first list has not arrived"), "{status}\n{page}");
    server.fail(Fault::None);
    agent.wait_ready()?;
    for n in [1, 2] {
        answers(cluster.place("a"), service(n)[0], "b")?;
    }
    let before = tables(&agent)?;
    agent.kill()?;
    server.fail(Fault::Drop);
    server.delete(&key("gone"));
    agent.spawn()?;
    let pid = agent.pid();
    status_until(&agent, "a new agent that waits", |status| waits(status, pid))?;
    ensure!(tables(&agent)? == before, "it has changed something (Y-17)");
    for n in [1, 2] {
        answers(cluster.place("a"), service(n)[0], "b")?;
    }
    server.fail(Fault::None);
    agent.wait_ready()?;
    nobody_answers(cluster.place("a"), service(2)[0])?;
    answers(cluster.place("a"), service(1)[0], "b")
}

#[test]
fn labels_that_come_and_go_take_a_service_out_and_bring_it_back() -> Result<()> {
    const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
    const HEADLESS: &str = "service.kubernetes.io/headless";
    let cluster = cluster()?;
    let server = server(&cluster)?;
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&server, &cluster, "web", 1, &["b"], |plan| plan)?;
    let _agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    let (pod, vip) = (cluster.place("a"), service(1)[0]);
    let plan = || with_node_ports("web", 1, 30080);
    let slice = || {
        let slice = SlicePlan::new("web", "v4", Family::V4).port("tcp", "TCP", 8080);
        slice.endpoint("b", cluster.place("b").v4.into(), Some("node1"), Phase::Ready).build()
    };
    for _ in 0..2 {
        answers(pod, vip, "b")?;
        server.put(&plan().label(PROXY_NAME, "another").build()); // S-2
        nobody_answers(pod, vip)?;
        server.put(&plan().build());
        answers(pod, vip, "b")?;
        let mut headless = slice();
        headless.metadata.labels.get_or_insert_default().insert(HEADLESS.into(), String::new()); // E-2
        server.put(&headless);
        fails(pod, vip, "connect ECONNREFUSED")?;
        server.put(&slice());
        answers(pod, vip, "b")?;
        let mut headless = plan().build();
        let spec = headless.spec.get_or_insert_default();
        (spec.cluster_ip, spec.cluster_ips) = (Some("None".into()), Some(vec!["None".into()]));
        server.put(&headless); // S-1
        nobody_answers(pod, vip)?;
        server.put(&plan().build());
    }
    answers(pod, vip, "b")
}

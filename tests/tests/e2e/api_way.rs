//! Ways to the API server: several servers, servers that were learnt, certificates and tokens that change (Y-1).

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::{Agent, Feed};
use proxy_tests::apiserver::tls::{Ca, Pair};
use proxy_tests::apiserver::{ApiServer, Fault, StreamingLists};
use proxy_tests::manifests::{Family, Phase, SlicePlan};
use proxy_tests::probe::{eventually, wait};
use proxy_tests::test_cluster::TestCluster;

use crate::account::in_pod;
use crate::api_scene::ApiScene;
use crate::api_server::{connected, server};
use crate::common::web;
use crate::life::{FLAGS, SOON, answers, one_node, servers, service, warns};

/// Account files are looked at every five seconds.
const ROTATED: Duration = Duration::from_secs(20);

fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// Another server of the same cluster, in the node.
fn beside(server: &ApiServer, cluster: &TestCluster, port: u16) -> Result<ApiServer> {
    server.beside(cluster.place("node1").netns.listen(local(port))?)
}

#[test]
fn when_one_of_several_servers_fails_another_is_asked_and_kept() -> Result<()> {
    let scene = ApiScene::raise()?;
    let (cluster, first, second) = (&scene.cluster, &scene.server, scene.beside(6444)?);
    let (mut controller, agent) = (scene.web()?, scene.agent(scene.urls(&second))?);
    let (pod, vip) = (scene.pod(), scene.vip());
    ensure!(second.requests().is_empty(), "the first one works");
    // Each fault in turn of whichever is in use.
    let mut home = "b";
    let mut turn = |used: &ApiServer, other: &ApiServer, fault: Fault, limit: u64| -> Result<()> {
        home = if home == "b" { "c" } else { "b" };
        let begun = Instant::now();
        used.fail(fault);
        if fault != Fault::Hang {
            used.cut();
        }
        controller.replace(&[cluster.place(home)])?;
        eventually(Duration::from_secs(limit), || answers_now(cluster, vip, home))
            .with_context(|| format!("{fault:?}:\n{}", agent.log_text()))?;
        eprintln!("{fault:?}: another server is followed after {:?}", begun.elapsed());
        used.fail(Fault::None);
        wait(Duration::from_secs(1), "what was on its way to the server that failed comes");
        let left = used.requests().len();
        wait(Duration::from_secs(3), "the server that failed is not asked again");
        let since = used.requests().split_off(left);
        ensure!(since.is_empty(), "{fault:?}: it is asked again, {since:?}:\n{}", agent.log_text());
        ensure!(!other.requests().is_empty(), "{fault:?}: the other is not asked:\n{}", agent.log_text());
        Ok(())
    };
    turn(first, &second, Fault::Drop, 5)?;
    turn(&second, first, Fault::Hang, 12)?;
    // The other one was left a moment ago.
    turn(first, &second, Fault::Status(500), 20)?;
    // Once it has its way, if that is not much to ask.
    turn(&second, first, Fault::Busy(2), 30)?;
    turn(first, &second, Fault::Busy(3600), 30)?;
    // A server that has just begun knows no roles yet.
    turn(&second, first, Fault::Status(403), 30)?;
    turn(first, &second, Fault::Slow, 40)?;
    connected(&agent, true)?;
    // Neither: what is served stays, and goes on with the first that is back.
    first.fail(Fault::Drop);
    second.fail(Fault::Drop);
    connected(&agent, false)?;
    controller.replace(&[cluster.place("b")])?;
    wait(Duration::from_secs(3), "what is served stays while no server answers");
    answers_now(cluster, vip, "c")?;
    first.fail(Fault::None);
    answers(pod, vip, "b").with_context(|| agent.log_text())?;
    connected(&agent, true)
}

#[test]
fn when_one_of_several_servers_refuses_or_never_ends_from_the_beginning_another_is_asked() -> Result<()> {
    let cluster = one_node(&["a", "b"])?;
    let first = server(&cluster)?;
    let second = beside(&first, &cluster, 6444)?;
    let _servers = servers(&cluster, &["b"])?;
    let _controller = web(&first, &cluster, "web", 1, &["b"], |plan| plan)?;
    first.streaming_lists(StreamingLists::Rejected);
    for fault in [Fault::Status(400), Fault::Status(403), Fault::Status(410), Fault::Endless] {
        first.fail(fault);
        let asked = first.requests().len();
        let urls = Feed::ApiServer(format!("{},{}", first.url(), second.url()));
        let agent = Agent::start(&cluster, "node1", urls, &FLAGS)?;
        answers(cluster.place("a"), service(1)[0], "b").with_context(|| format!("{fault:?}"))?;
        connected(&agent, true).with_context(|| agent.log_text())?;
        let asked = first.requests().len() - asked;
        // Three kinds are needed.
        ensure!((1..=80).contains(&asked), "{fault:?}: {asked} requests");
    }
    Ok(())
}

fn answers_now(cluster: &TestCluster, vip: SocketAddr, name: &str) -> Result<()> {
    let answer = proxy_tests::probe::get(cluster.place("a"), &crate::life::quick(vip))?;
    ensure!(answer.name == name, "{} answers", answer.name);
    Ok(())
}

#[test]
fn servers_that_the_cluster_tells_of_are_asked_when_the_one_that_was_given_is_gone() -> Result<()> {
    let cluster = one_node(&["a", "b", "c"])?;
    let given = server(&cluster)?;
    let (endpoint, balanced) = (beside(&given, &cluster, 6444)?, beside(&given, &cluster, 6445)?);
    given.cluster_info(&balanced.url());
    let kubernetes = SlicePlan::new("kubernetes", "v4", Family::V4).port("https", "TCP", 6444);
    given.put(&kubernetes.endpoint("apiserver", Ipv4Addr::LOCALHOST.into(), None, Phase::Ready).build());
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut controller = web(&given, &cluster, "web", 1, &["b"], |plan| plan)?;
    let agent = Agent::start(&cluster, "node1", &given, &FLAGS)?;
    let (pod, vip) = (cluster.place("a"), service(1)[0]);
    answers(pod, vip, "b")?;
    eventually(SOON, || {
        let log = agent.log_text();
        for server in [&endpoint, &balanced] {
            ensure!(log.contains(&format!("discovered the API server {}", server.url())), "{log}");
        }
        Ok(())
    })?;
    given.fail(Fault::Drop);
    controller.replace(&[cluster.place("c")])?;
    answers(pod, vip, "c").with_context(|| agent.log_text())?;
    ensure!(!endpoint.requests().is_empty() && balanced.requests().is_empty());
    endpoint.fail(Fault::Drop);
    controller.replace(&[cluster.place("b")])?;
    answers(pod, vip, "b").with_context(|| agent.log_text())?;
    ensure!(!balanced.requests().is_empty());
    Ok(())
}

#[test]
fn an_agent_that_starts_while_its_server_is_down_asks_one_that_an_earlier_agent_has_learnt() -> Result<()> {
    let cluster = one_node(&["a", "b", "c"])?;
    let (given, home, ca) = (server(&cluster)?, tempfile::tempdir()?, Ca::new("cluster")?);
    let other = beside(&given, &cluster, 6444)?;
    given.secure(&ca.server(&["127.0.0.1"])?, None)?;
    other.secure(&ca.server(&["kubernetes.default.svc"])?, None)?;
    fs::write(home.path().join("ca.crt"), ca.pem())?;
    let kubernetes = SlicePlan::new("kubernetes", "v4", Family::V4).port("https", "TCP", 6444);
    given.put(&kubernetes.endpoint("apiserver", Ipv4Addr::LOCALHOST.into(), None, Phase::Ready).build());
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut controller = web(&given, &cluster, "web", 1, &["b"], |plan| plan)?;
    let flag = kubeconfig(home.path(), &given, "{}")?;
    let flags = [&FLAGS[..], &[&flag]].concat();
    let mut agent = Agent::start(&cluster, "node1", Feed::ApiServer(String::new()), &flags)?;
    let (pod, vip) = (cluster.place("a"), service(1)[0]);
    answers(pod, vip, "b")?;
    eventually(SOON, || {
        let log = agent.log_text();
        ensure!(log.contains(&format!("discovered the API server {}", other.url())), "{log}");
        Ok(())
    })?;
    agent.kill()?;
    given.fail(Fault::Drop);
    controller.replace(&[cluster.place("c")])?;
    // A server of another cluster, or a kubelet, has that address now: its certificate is not for an API server.
    other.secure(&ca.server(&["127.0.0.1"])?, None)?;
    agent.spawn()?;
    warns(&agent, &["API server", ":6444", "certificate"], true)?;
    answers_now(&cluster, vip, "b")?;
    ensure!(other.requests().is_empty(), "{:?}", other.requests());
    agent.kill()?;
    other.secure(&ca.server(&["kubernetes.default.svc"])?, None)?;
    agent.spawn()?;
    answers(pod, vip, "c").with_context(|| agent.log_text())?;
    connected(&agent, true)?;
    let note = agent.bpf_root().join("servers");
    ensure!(note.exists(), "{} is not there", note.display());
    Ok(())
}

/// A kubeconfig for a server, whose files lie beside it.
pub(crate) fn kubeconfig(home: &Path, server: &ApiServer, user: &str) -> Result<String> {
    kubeconfig_of(home, &server.url(), "", user)
}

/// The same with more said of the cluster.
pub(crate) fn kubeconfig_of(home: &Path, url: &str, cluster: &str, user: &str) -> Result<String> {
    let text = format!(
        "{{apiVersion: v1, kind: Config, current-context: c,\n\
         clusters: [{{name: c, cluster: {{server: '{url}', certificate-authority: ca.crt{cluster}}}}}],\n\
         users: [{{name: u, user: {user}}}],\n\
         contexts: [{{name: c, context: {{cluster: c, user: u}}}}]}}\n",
    );
    let path = home.join("config");
    fs::write(&path, text)?;
    Ok(format!("--kubeconfig={}", path.display()))
}

#[test]
fn certificates_and_tokens_that_are_rotated_are_used_without_a_restart() -> Result<()> {
    let cluster = one_node(&["a", "b", "c"])?;
    let server = server(&cluster)?;
    let home = tempfile::tempdir()?;
    let (old, new) = (Ca::new("old")?, Ca::new("new")?);
    let clients = Ca::new("clients")?;
    let (one, two) = (clients.client("one")?, clients.client("two")?);
    server.secure(&old.server(&["127.0.0.1"])?, Some(&clients))?;
    // As a volume is mounted: files are links through a link that is exchanged.
    let install = |name: &str, ca: &Ca, client: &Pair, token: &str| -> Result<()> {
        let dir = home.path().join(name);
        fs::create_dir(&dir)?;
        fs::write(dir.join("ca.crt"), ca.pem())?;
        fs::write(dir.join("token"), format!("{token}\n"))?;
        fs::write(dir.join("tls.crt"), &client.certificate)?;
        fs::write(dir.join("tls.key"), &client.key)?;
        let data = home.path().join("..data");
        let next = home.path().join("..next");
        symlink(name, &next)?;
        fs::rename(next, data).context("exchanging the link")
    };
    install("v1", &old, &one, "first")?;
    for name in ["ca.crt", "token", "tls.crt", "tls.key"] {
        symlink(format!("..data/{name}"), home.path().join(name))?;
    }
    let user = "{tokenFile: token, client-certificate: tls.crt, client-key: tls.key}";
    let flag = kubeconfig(home.path(), &server, user)?;
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut controller = web(&server, &cluster, "web", 1, &["b"], |plan| plan)?;
    let agent =
        Agent::start(&cluster, "node1", Feed::ApiServer(String::new()), &[&FLAGS[..], &[&flag]].concat())?;
    let (pod, vip) = (cluster.place("a"), service(1)[0]);
    answers(pod, vip, "b")?;
    // The newline is the file's (A token with one in it is no header at all).
    let used = |token: &str, client: &Pair| {
        let token = Some(format!("Bearer {token}"));
        let same = |asked: &&proxy_tests::apiserver::Asked| {
            asked.authorization == token && asked.certificate.as_ref() == Some(&client.der)
        };
        server.headers().iter().filter(same).count()
    };
    ensure!(used("first", &one) >= 3, "{:?}", server.headers());

    // Token and certificate: those who listen are connected anew by themselves.
    let begun = Instant::now();
    install("v2", &old, &two, "second")?;
    eventually(ROTATED, || {
        ensure!(used("second", &two) >= 3, "{}", agent.log_text());
        Ok(())
    })?;
    eprintln!("token and client certificate: used after {:?}", begun.elapsed());

    // The server's CA, and with it the server's certificate.
    let begun = Instant::now();
    server.secure(&new.server(&["127.0.0.1"])?, Some(&clients))?;
    controller.replace(&[cluster.place("c")])?;
    warns(&agent, &["API server", "certificate"], true)?;
    install("v3", &new, &two, "second")?;
    answers(pod, vip, "c").with_context(|| agent.log_text())?;
    eprintln!("CA: used after {:?}", begun.elapsed());

    // A file that is written half is not used, and said.
    fs::write(home.path().join("v3/ca.crt"), "-----BEGIN CERTIFICATE-----\nAAAA\n")?;
    warns(&agent, &["API server", "stay in use"], true)?;
    controller.replace(&[cluster.place("b")])?;
    answers(pod, vip, "b")?;
    fs::write(home.path().join("v3/ca.crt"), new.pem())?;
    warns(&agent, &["API server", "stay in use"], false)
}

#[test]
fn a_server_whose_certificate_is_its_own_ca_is_accepted_and_one_of_another_name_is_not() -> Result<()> {
    let cluster = one_node(&["a"])?;
    let server = server(&cluster)?;
    let home = tempfile::tempdir()?;
    let own = Pair::own_ca(Ipv4Addr::LOCALHOST.into())?;
    server.secure(&own, None)?;
    fs::write(home.path().join("ca.crt"), &own.certificate)?;
    let flag = kubeconfig(home.path(), &server, "{}")?;
    let flags = [&FLAGS[..], &[&flag]].concat();
    let agent = Agent::start(&cluster, "node1", Feed::ApiServer(String::new()), &flags)?;
    connected(&agent, true)?;
    let other = Pair::own_ca("127.0.0.2".parse()?)?;
    server.secure(&other, None)?;
    connected(&agent, false)?;
    fs::write(home.path().join("ca.crt"), format!("{}{}", own.certificate, other.certificate))?;
    // It is given now, but for another name.
    wait(Duration::from_secs(7), "files are read again every five seconds");
    connected(&agent, false)?;
    server.secure(&own, None)?;
    connected(&agent, true)
}

#[test]
fn a_pod_on_a_fresh_node_gets_to_its_server_although_nobody_serves_the_cluster_ip() -> Result<()> {
    let cluster = one_node(&["a", "b"])?;
    let host = cluster.place("node1");
    let (ca, home) = (Ca::new("cluster")?, tempfile::tempdir()?);
    // As on Talos.
    let server = ApiServer::start_in(&host.netns, local(7445))?;
    server.secure(&ca.server(&["kubernetes.default.svc", "10.96.0.1"])?, None)?;
    server.put(&proxy_tests::manifests::node("node1", &host.addresses(), &cluster.pod_cidrs("node1"), &[]));
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&server, &cluster, "web", 1, &["b"], |plan| plan)?;
    let environment = "export KUBERNETES_SERVICE_HOST=10.96.0.99 KUBERNETES_SERVICE_PORT=443";
    let path = in_pod(home.path(), environment, &ca.pem())?;
    let mut agent = Agent::prepare(&path, &cluster, "node1", Feed::ApiServer(String::new()), &FLAGS)?;
    agent.spawn()?;
    let answered = answers(cluster.place("a"), service(1)[0], "b");
    answered.with_context(|| agent.log_text())
}

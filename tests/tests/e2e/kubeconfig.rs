//! What a kubeconfig may say of the way to the API server, with real sockets: another name, a proxy, a credential plugin,
//! IPv6 (Y-1).

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::{Agent, Feed};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::apiserver::tls::Ca;
use proxy_tests::netns::Netns;
use proxy_tests::probe::eventually;
use proxy_tests::require::agent_binary;
use proxy_tests::test_cluster::TestCluster;

use crate::account::in_pod;
use crate::api_server::{connected, server};
use crate::api_way::kubeconfig_of;
use crate::common::web;
use crate::life::{FLAGS, SOON, answers, one_node, servers, service, warns};

/// No source by its own flag.
fn nowhere() -> Feed {
    Feed::ApiServer(String::new())
}

fn start(cluster: &TestCluster, flag: &str) -> Result<Agent> {
    Agent::start(cluster, "node1", nowhere(), &[&FLAGS[..], &[flag]].concat())
}

#[test]
fn a_server_shows_a_certificate_for_the_name_that_the_kubeconfig_gives_it() -> Result<()> {
    let cluster = one_node(&["a"])?;
    let (server, home, ca) = (server(&cluster)?, tempfile::tempdir()?, Ca::new("cluster")?);
    server.secure(&ca.server(&["api.internal"])?, None)?;
    fs::write(home.path().join("ca.crt"), ca.pem())?;
    let flag = kubeconfig_of(home.path(), &server.url(), ", tls-server-name: api.internal", "{}")?;
    let agent = start(&cluster, &flag)?;
    connected(&agent, true)?;
    // The address is not its name.
    server.secure(&ca.server(&["127.0.0.1"])?, None)?;
    connected(&agent, false)?;
    warns(&agent, &["API server", "certificate"], true)?;
    server.secure(&ca.server(&["api.internal"])?, None)?;
    connected(&agent, true)
}

#[test]
fn a_server_is_found_by_its_ipv6_address_with_brackets_and_in_a_pod_without() -> Result<()> {
    let cluster = one_node(&["a"])?;
    let host = cluster.place("node1");
    let server = ApiServer::start_in(&host.netns, SocketAddr::from((Ipv6Addr::LOCALHOST, 6443)))?;
    server.put(&proxy_tests::manifests::node("node1", &host.addresses(), &cluster.pod_cidrs("node1"), &[]));
    let (home, ca) = (tempfile::tempdir()?, Ca::new("cluster")?);
    server.secure(&ca.server(&["::1"])?, None)?;
    fs::write(home.path().join("ca.crt"), ca.pem())?;
    let flag = kubeconfig_of(home.path(), "https://[::1]:6443", "", "{}")?;
    let agent = start(&cluster, &flag)?;
    connected(&agent, true)?;
    drop(agent);
    let environment = "export KUBERNETES_SERVICE_HOST=::1 KUBERNETES_SERVICE_PORT=6443";
    let path = in_pod(home.path(), environment, &ca.pem())?;
    let mut agent = Agent::prepare(&path, &cluster, "node1", nowhere(), &FLAGS)?;
    agent.spawn()?;
    agent.wait_ready()?;
    connected(&agent, true)
}

/// A proxy that leads whatever is wanted to one place; the heads of the requests that it got.
fn proxy(netns: &Netns, at: SocketAddr, to: SocketAddr) -> Result<Arc<Mutex<Vec<String>>>> {
    let (listener, heads) = (netns.listen(at)?, Arc::<Mutex<Vec<String>>>::default());
    let said = heads.clone();
    // It ends with the test's process.
    let netns = netns.file().try_clone()?;
    std::thread::spawn(move || -> Result<()> {
        nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
        serve(&listener, to, &said)
    });
    Ok(heads)
}

fn serve(listener: &TcpListener, to: SocketAddr, heads: &Mutex<Vec<String>>) -> Result<()> {
    for client in listener.incoming() {
        let mut client = client?;
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") && client.read(&mut byte)? != 0 {
            head.push(byte[0]);
        }
        heads.lock().expect("no panic").push(String::from_utf8_lossy(&head).into_owned());
        let server = TcpStream::connect(to)?;
        client.write_all(b"HTTP/1.1 200 Connected\r\n\r\n")?;
        for (mut from, mut to) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
            std::thread::spawn(move || {
                // Either end may go at any time.
                std::io::copy(&mut from, &mut to).ok();
                to.shutdown(std::net::Shutdown::Both).ok();
            });
        }
    }
    Ok(())
}

#[test]
fn a_server_behind_a_proxy_is_asked_through_it_and_an_odd_proxy_is_refused() -> Result<()> {
    let cluster = one_node(&["a", "b", "c"])?;
    let (server, home, ca) = (server(&cluster)?, tempfile::tempdir()?, Ca::new("cluster")?);
    // Nobody but the proxy knows where that is.
    server.secure(&ca.server(&["api.internal"])?, None)?;
    fs::write(home.path().join("ca.crt"), ca.pem())?;
    let url = "https://api.internal:6443";
    let said = ", proxy-url: 'http://user:p%40ss@127.0.0.1:3128'";
    let flag = kubeconfig_of(home.path(), url, said, "{}")?;
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, 3128));
    let heads = proxy(&cluster.place("node1").netns, at, server.address())?;
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut controller = web(&server, &cluster, "web", 1, &["b"], |plan| plan)?;
    let mut agent = start(&cluster, &flag)?;
    answers(cluster.place("a"), service(1)[0], "b")?;
    let head = heads.lock().expect("no panic").first().cloned().context("nobody asked the proxy")?;
    ensure!(head.starts_with("CONNECT api.internal:6443 HTTP/1.1\r\n"), "{head}");
    // user:p@ss
    ensure!(head.to_lowercase().contains("proxy-authorization: basic dxnlcjpwqhnz"), "{head}");
    controller.replace(&[cluster.place("c")])?;
    answers(cluster.place("a"), service(1)[0], "c")?;
    agent.stop()?;
    drop(agent);

    kubeconfig_of(home.path(), url, ", proxy-url: 'ftp://127.0.0.1:3128'", "{}")?;
    let mut agent =
        Agent::prepare(&agent_binary()?, &cluster, "node1", nowhere(), &[&FLAGS[..], &[&flag]].concat())?;
    agent.spawn()?;
    ensure!(agent.ended()?.code() == Some(1), "{}", agent.log_text());
    let log = agent.log_text();
    ensure!(log.contains("cannot use the proxy ftp://127.0.0.1:3128: proxy-url takes http://"), "{log}");
    drop(agent);

    // The environment's is for what goes outside: followed it would lead nowhere here, and that it is not is said.
    server.secure(&ca.server(&["127.0.0.1"])?, None)?;
    kubeconfig_of(home.path(), &server.url(), "", "{}")?;
    let mut agent =
        Agent::prepare(&agent_binary()?, &cluster, "node1", nowhere(), &[&FLAGS[..], &[&flag]].concat())?;
    agent.before("export HTTPS_PROXY=http://127.0.0.1:9");
    agent.spawn()?;
    agent.wait_ready()?;
    connected(&agent, true)?;
    let log = agent.log_text();
    ensure!(log.contains("HTTPS_PROXY is not followed"), "{log}");
    Ok(())
}

/// A credential plugin that says in a file that it runs, and gives the token of another one, for so many seconds.
fn plugin(home: &Path, before: &str) -> Result<()> {
    let path = home.join("plugin");
    let script = format!(
        "#!/bin/sh\ncd {}\necho run >>runs\n{before}\nuntil=$(date -u -d '+75 seconds' +%Y-%m-%dT%H:%M:%SZ)\n\
         echo \"{{\\\"kind\\\": \\\"ExecCredential\\\", \\\"status\\\": {{\\\"token\\\": \\\"$(cat token)\\\", \
         \\\"expirationTimestamp\\\": \\\"$until\\\"}}}}\"\n",
        home.display()
    );
    // In one step, as it may run.
    fs::write(home.join("next"), script)?;
    fs::set_permissions(home.join("next"), fs::Permissions::from_mode(0o755))?;
    fs::rename(home.join("next"), path).context("putting a plugin in its place")
}

#[test]
fn a_credential_plugin_is_asked_in_time_and_one_that_hangs_delays_nothing() -> Result<()> {
    let cluster = one_node(&["a", "b", "c"])?;
    let (server, home, ca) = (server(&cluster)?, tempfile::tempdir()?, Ca::new("cluster")?);
    server.secure(&ca.server(&["127.0.0.1"])?, None)?;
    fs::write(home.path().join("ca.crt"), ca.pem())?;
    fs::write(home.path().join("token"), "first")?;
    plugin(home.path(), "")?;
    let user =
        "{exec: {apiVersion: client.authentication.k8s.io/v1, command: ./plugin, interactiveMode: Never}}";
    let flag = kubeconfig_of(home.path(), &server.url(), "", user)?;
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut controller = web(&server, &cluster, "web", 1, &["b"], |plan| plan)?;
    let agent = start(&cluster, &flag)?;
    answers(cluster.place("a"), service(1)[0], "b")?;
    let used = |token: &str| {
        let token = Some(format!("Bearer {token}"));
        server.headers().iter().filter(|asked| asked.authorization == token).count()
    };
    let runs = || Ok::<_, anyhow::Error>(fs::read_to_string(home.path().join("runs"))?.lines().count());
    ensure!(used("first") >= 3, "{:?}", server.headers());
    ensure!(runs()? == 1, "{} runs for one credential", runs()?);
    // A credential that ends in a minute is renewed.
    fs::write(home.path().join("token"), "second")?;
    eventually(Duration::from_secs(30), || {
        ensure!(used("second") >= 3, "{}", agent.log_text());
        Ok(())
    })?;
    ensure!(runs()? == 2, "{} runs for two credentials", runs()?);
    // The next time it does not end.
    plugin(home.path(), "exec sleep 1000")?;
    eventually(Duration::from_secs(30), || {
        ensure!(runs()? == 3, "{}", agent.log_text());
        Ok(())
    })?;
    let begun = std::time::Instant::now();
    controller.replace(&[cluster.place("c")])?;
    answers(cluster.place("a"), service(1)[0], "c")?;
    ensure!(
        begun.elapsed() < Duration::from_secs(5) * proxy_tests::patience(),
        "served only after {:?}",
        begun.elapsed()
    );
    warns(&agent, &["API server", "plugin has not ended within 15s", "stay in use"], true)?;
    plugin(home.path(), "")?;
    eventually(SOON, || warns(&agent, &["API server", "plugin"], false))
}

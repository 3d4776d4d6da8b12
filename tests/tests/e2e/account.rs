//! How an agent finds its API server and says who it is, and what it asks for (Y-1, Y-3, Y-4).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::{Agent, Feed};
use proxy_tests::probe::{eventually, wait};
use proxy_tests::require::agent_binary;

use crate::api_server::server;
use crate::life::{FLAGS, SOON, one_node};

/// No source by its own flag: an empty value is as good as none.
fn nowhere() -> Feed {
    Feed::ApiServer(String::new())
}

/// A program that starts the agent as in a pod: with this environment, and an account in its place.
pub(crate) fn in_pod(home: &Path, environment: &str, ca: &str) -> Result<PathBuf> {
    let account = home.join("account");
    fs::create_dir_all(&account)?;
    for (name, text) in [("token", "token"), ("namespace", "kube-system"), ("ca.crt", ca)] {
        fs::write(account.join(name), text)?;
    }
    // The files stand at a place that is fixed: the agent sees a /run of its own.
    let script = format!(
        "#!/bin/sh\n{environment}\nexec unshare --mount --propagation private sh -c '\n\
         mount -t tmpfs none /run && mkdir -p /run/secrets/kubernetes.io &&\n\
         ln -s {} /run/secrets/kubernetes.io/serviceaccount && exec {} \"$@\"' sh \"$@\"\n",
        account.display(),
        agent_binary()?.display()
    );
    let path = home.join("agent");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

#[test]
fn only_what_a_service_proxy_needs_is_asked_for() -> Result<()> {
    let cluster = one_node(&["a"])?;
    let server = server(&cluster)?;
    let _agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    let needed = BTreeMap::from([
        // S-1.
        ("/api/v1/services", ("!service.kubernetes.io/service-proxy-name", "spec.clusterIP!=None")),
        // E-2.
        ("/apis/discovery.k8s.io/v1/endpointslices", ("!service.kubernetes.io/headless", "")),
        ("/api/v1/nodes", ("", "metadata.name=node1")),
    ]);
    // What it does with less of it when it must.
    let optional = [
        "/apis/networking.k8s.io/v1/servicecidrs",
        "/apis/events.k8s.io/v1/namespaces/default/events",
        "/api/v1/namespaces/kube-public/configmaps/cluster-info",
        "/livez",
    ];
    let mut asked = BTreeSet::new();
    for request in server.requests() {
        let (path, query) = request.split_once('?').unwrap_or((&request, ""));
        let query: BTreeMap<String, String> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        let value = |name: &str| query.get(name).map_or("", String::as_str);
        match needed.get(path) {
            Some(selectors) => {
                ensure!((value("labelSelector"), value("fieldSelector")) == *selectors, "{request}");
            }
            None => ensure!(optional.contains(&path), "nobody needs {request}"),
        }
        asked.insert(path.to_owned());
    }
    let missing: Vec<_> = needed.keys().filter(|path| !asked.contains(**path)).collect();
    ensure!(missing.is_empty(), "{missing:?} were not asked for: {asked:?}");
    // Y-3: JSON.
    let accepted: BTreeSet<_> = server.headers().into_iter().filter_map(|asked| asked.accept).collect();
    ensure!(accepted.iter().all(|accept| accept.starts_with("application/json")), "{accepted:?}");
    Ok(())
}

#[test]
fn a_token_that_is_replaced_in_its_file_is_used_from_then_on() -> Result<()> {
    /// Tokens are read again after five seconds; requests come again after pauses that grow.
    const READ_AGAIN: Duration = Duration::from_secs(60);
    let cluster = one_node(&["a"])?;
    let server = server(&cluster)?;
    let home = tempfile::tempdir()?;
    let (kubeconfig, token) = (home.path().join("config"), home.path().join("token"));
    fs::write(&token, "first")?;
    let text = format!(
        "{{apiVersion: v1, kind: Config, current-context: c,\n\
         clusters: [{{name: c, cluster: {{server: '{}'}}}}],\n\
         users: [{{name: u, user: {{tokenFile: {}}}}}],\n\
         contexts: [{{name: c, context: {{cluster: c, user: u}}}}]}}\n",
        server.url(),
        token.display()
    );
    fs::write(&kubeconfig, text)?;
    let flag = format!("--kubeconfig={}", kubeconfig.display());
    let flags = [&FLAGS[..], &[&flag]].concat();
    let _agent = Agent::start(&cluster, "node1", nowhere(), &flags)?;
    let used = |wanted: &str| {
        let wanted = Some(format!("Bearer {wanted}"));
        server.headers().iter().filter(|asked| asked.authorization == wanted).count()
    };
    ensure!(used("first") == server.headers().len(), "{:?}", server.headers());
    fs::write(&token, "second")?;
    eventually(READ_AGAIN, || {
        // A watch keeps the token with which it began.
        server.cut();
        wait(Duration::from_secs(1), "watches begin again");
        ensure!(used("second") > 0, "{:?}", server.headers().last());
        Ok(())
    })
}

#[test]
fn a_pod_finds_the_server_in_its_environment_and_its_account_in_its_files() -> Result<()> {
    let cluster = one_node(&["a"])?;
    let host = cluster.place("node1");
    // Who listens speaks no TLS, but sees that it is spoken to.
    let listener = host.netns.listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 7443)))?;
    let home = tempfile::tempdir()?;
    let start = |environment: &str| -> Result<Agent> {
        let path = in_pod(home.path(), environment, include_str!("account.crt"))?;
        let mut agent = Agent::prepare(&path, &cluster, "node1", nowhere(), &FLAGS)?;
        agent.spawn()?;
        Ok(agent)
    };
    let mut lost = start("unset KUBERNETES_SERVICE_HOST KUBERNETES_SERVICE_PORT")?;
    ensure!(lost.ended()?.code() == Some(1), "{}", lost.log_text());
    let log = lost.log_text();
    ensure!(
        log.contains("this is not a pod with a service account: use --kubeconfig or --apiserver"),
        "{log}"
    );
    drop(lost);

    let agent = start("export KUBERNETES_SERVICE_HOST=127.0.0.1 KUBERNETES_SERVICE_PORT=7443")?;
    listener.set_nonblocking(true)?;
    let mut stream =
        eventually(SOON, || listener.accept().map(|(stream, _)| stream).with_context(|| agent.log_text()))?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(SOON))?;
    let mut hello = [0; 2];
    stream.read_exact(&mut hello)?;
    // A TLS handshake (RFC 8446, 5.1).
    ensure!(hello == [22, 3], "it speaks no TLS: {hello:?}");
    Ok(())
}

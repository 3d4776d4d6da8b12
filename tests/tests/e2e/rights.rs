//! The manifests, run as a container runtime would run them: with the rights that they ask for, and no more.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::ConfigMap;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::container::{ACCOUNT, Container, Host, containers};
use proxy_tests::manifests::ServicePlan;
use proxy_tests::pod::Place;
use proxy_tests::probe::{Remote, eventually};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};

use crate::common::{two_nodes, vips, web};
use crate::life::answers;
use crate::scene::{SOON, at, is_served, servers};

const RESTRICTED: &str = "daemonset-restricted.yaml";
const PRIVILEGED: &str = "daemonset.yaml";
/// How long an agent may take to be ready, with tables of their full size.
const READY: Duration = Duration::from_secs(60);
/// A setting that kube-proxy makes, and its value.
const CLOSE_WAIT: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";
/// The kernel's setting that makes attaching fast.
const EXPEDITED: &str = "/sys/kernel/rcu_expedited";

/// The one document of a manifest with this kind.
fn document<T: DeserializeOwned>(manifest: &str, kind: &str) -> Result<T> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(manifest);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text)?;
    let found = documents.into_iter().find(|document| document["kind"] == kind);
    Ok(serde_json::from_value(found.with_context(|| format!("{manifest} has no {kind}"))?)?)
}

/// A directory that is a mount of its own; mounts in it are the test's, or the containers', too.
struct Directory(TempDir);

impl Directory {
    fn new(name: &str, kind: MsFlags) -> Result<Self> {
        let prefix = format!("{}-{name}-", proxy_tests::unique());
        let directory = Self(tempfile::Builder::new().prefix(&prefix).tempdir()?);
        mount(Some(directory.path()), directory.path(), None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        mount(None::<&str>, directory.path(), None::<&str>, kind, None::<&str>)?;
        Ok(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What a container has mounted there lies above; the last one is not there any more.
        while umount2(self.0.path(), MntFlags::MNT_DETACH).is_ok() {}
    }
}

/// A node for the pod of a manifest.
struct Scene {
    cluster: TestCluster,
    server: ApiServer,
    /// `/sys/fs/bpf` of the node: no bpffs yet.
    bpf: Directory,
    root: Directory,
    config: TempDir,
    account: TempDir,
    /// What stands for [`EXPEDITED`]: that of this machine is set by agents of other tests, too.
    expedited: NamedTempFile,
}

impl Scene {
    fn new(manifest: &str) -> Result<Self> {
        let cluster = two_nodes(PodNetwork::Routed)?;
        let server = crate::api_server::server(&cluster)?;
        let config = tempfile::tempdir()?;
        let map: ConfigMap = document(manifest, "ConfigMap")?;
        for (name, text) in map.data.iter().flatten() {
            fs::write(config.path().join(name), text.replace("https://API_SERVER:6443", &server.url()))?;
        }
        let account = tempfile::tempdir()?;
        for (name, text) in
            [("token", "token"), ("namespace", "kube-system"), ("ca.crt", include_str!("account.crt"))]
        {
            fs::write(account.path().join(name), text)?;
        }
        let expedited = NamedTempFile::new()?;
        fs::write(&expedited, "0\n")?;
        Ok(Self {
            expedited,
            cluster,
            server,
            bpf: Directory::new("bpf", MsFlags::MS_SHARED)?,
            root: Directory::new("root", MsFlags::MS_PRIVATE)?,
            config,
            account,
        })
    }

    fn containers(&self, manifest: &str) -> Result<(Vec<Container>, Container)> {
        let volumes: BTreeMap<&str, PathBuf> = BTreeMap::from([
            ("/sys/fs/bpf", self.bpf.path().into()),
            ("/sys/fs/cgroup", self.cluster.cgroup_root("node1").into()),
            ("ebpf-proxy", self.config.path().into()),
            (EXPEDITED, self.expedited.path().into()),
            (ACCOUNT, self.account.path().into()),
        ]);
        let host = Host { volumes, node: "node1", root: self.root.path().into() };
        containers(
            &document::<DaemonSet>(manifest, "DaemonSet")?,
            &host,
            &proxy_tests::require::agent_binary()?,
        )
    }

    fn node(&self) -> &Place {
        self.cluster.place("node1")
    }
}

/// A container that runs, and ends with this.
struct Running {
    container: Container,
    node: Place,
    log: PathBuf,
    child: Child,
    _directory: TempDir,
}

impl Running {
    fn start(container: &Container, node: &Place) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let log = directory.path().join("log");
        let child = spawn(container, node, &log)?;
        Ok(Self { container: container.clone(), node: node.clone(), log, child, _directory: directory })
    }

    fn wait_ready(&mut self) -> Result<Value> {
        let ready = eventually(READY, || {
            let ended = self.child.try_wait()?;
            ensure!(ended.is_none(), "it has ended: {ended:?}");
            let (healthy, said) = self.exec(&["status", "--output", "json"])?;
            ensure!(healthy, "{said}");
            Ok(serde_json::from_str(&said)?)
        });
        ready.with_context(|| fs::read_to_string(&self.log).unwrap_or_default())
    }

    /// Runs a command of the agent's in the container.
    fn exec(&self, arguments: &[&str]) -> Result<(bool, String)> {
        let root = ["--bpf-root", "/sys/fs/bpf/ebpf-proxy"];
        self.container.with(&[arguments, &root].concat()).run(&self.node)
    }

    fn done(&self, arguments: &[&str]) -> Result<String> {
        let (done, said) = self.exec(arguments)?;
        ensure!(done, "{arguments:?}: {said}");
        Ok(said)
    }

    /// Kills it and starts it again.
    fn restart(&mut self) -> Result<()> {
        self.end();
        self.child = spawn(&self.container, &self.node, &self.log)?;
        Ok(())
    }

    fn end(&mut self) {
        // It may have ended by itself.
        self.child.kill().ok();
        self.child.wait().ok();
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
        self.exec(&["cleanup"]).ok();
    }
}

fn spawn(container: &Container, node: &Place, log: &Path) -> Result<Child> {
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    container.spawn(node, || log.try_clone().map_or_else(|_| Stdio::null(), Stdio::from))
}

/// The notes of a status about what is done without.
fn without(status: &Value) -> Vec<&str> {
    let notes = status["notes"].as_array().map_or(&[][..], Vec::as_slice);
    let notes = notes.iter().filter_map(Value::as_str);
    notes.filter_map(|note| note.strip_prefix("this agent: without ")?.split(' ').next()).collect()
}

fn set(netns: &Place, value: &str) -> Result<()> {
    let write = || fs::write(CLOSE_WAIT, value);
    Ok(netns.netns.run_in(write)??)
}

fn setting(netns: &Place) -> Result<String> {
    Ok(netns.netns.run_in(|| fs::read_to_string(CLOSE_WAIT))??.trim().to_owned())
}

/// Whatever an agent does in its life.
#[expect(clippy::too_many_lines, reason = "one life of an agent, step by step")]
fn lives(manifest: &str, lacks: &[&str]) -> Result<()> {
    let mut scene = Scene::new(manifest)?;
    let _servers = servers(&scene.cluster, &["b", "c", "d"])?;
    // Connection tracking comes with its first rule.
    scene
        .node()
        .netns
        .nft("table ip t { chain c { type filter hook prerouting priority 0; ct state new accept; }; }")?;
    set(scene.node(), "60")?;
    let reset = |plan: ServicePlan| plan.annotation("ebpf-proxy/on-endpoint-loss", "reset");
    let mut controller = web(&scene.server, &scene.cluster, "web", 1, &["c"], reset)?;
    let (first, own) = scene.containers(manifest)?;
    for container in &first {
        let (done, said) = container.run(scene.node())?;
        ensure!(done, "{}: {said}", container.name);
        ensure!(setting(scene.node())? == "3600", "{said}");
    }
    let mut agent = Running::start(&own, scene.node())?;
    let status = agent.wait_ready()?;
    ensure!(without(&status) == lacks, "{status:#}");
    ensure!(status["object_warnings"] == serde_json::json!([]), "{status:#}");
    ensure!(setting(scene.node())? == "3600");
    if own.mounts.iter().any(|mount| mount.to == Path::new(EXPEDITED)) {
        // It was set, and set back: this is not what stood there at first.
        ensure!(fs::read_to_string(&scene.expedited)? == "0", "nothing was written to {EXPEDITED}");
    }
    // Sockets and packets, from everywhere, a pod that comes later too.
    let late = scene.cluster.add_pod("node1", "late")?;
    for client in ["a", "h1", "outside", "late"] {
        is_served(scene.cluster.place(client), at(vips(1), 80), "c")?;
    }
    // Connections whose endpoint is lost: of pods, of the node, and by packet.
    let clients = ["a", "h1", "outside"];
    let mut open = Vec::new();
    for client in clients {
        let mut socket = Remote::open(scene.cluster.place(client), "inet", "tcp")?;
        socket.done("connect", "10.96.0.1:80")?;
        open.push(socket);
    }
    // And a socket over UDP that is led on, or closed.
    let mut datagrams = Remote::open(scene.cluster.place("h1"), "inet", "udp")?;
    datagrams.done("connect", "10.96.0.1:80")?;
    controller.replace(&[scene.cluster.place("d")])?;
    for to in at(vips(1), 80) {
        answers(&late, to, "d")?;
    }
    for (socket, client) in open.iter_mut().zip(clients) {
        eventually(SOON, || {
            let received = socket.step("receive", "")?.failure.unwrap_or_default();
            ensure!(
                received == "receive ECONNRESET" || received == "receive ECONNABORTED",
                "{client}: {received}"
            );
            Ok(())
        })
        .with_context(|| agent.log())?;
    }
    eventually(SOON, || {
        let sent = datagrams.step("send", "")?.failure;
        let received = datagrams.step("receive", "")?;
        let led_on = received.answer.is_some_and(|answer| answer.name == "d");
        let closed = sent.as_deref() == Some("send EDESTADDRREQ");
        ensure!(if lacks.is_empty() { led_on } else { closed }, "{sent:?} {:?}", received.failure);
        Ok(())
    })?;
    // The next agent finds what the last one has left, and takes over.
    agent.restart()?;
    controller.replace(&[scene.cluster.place("b")])?;
    agent.wait_ready()?;
    for to in at(vips(1), 80) {
        answers(&late, to, "b")?;
    }
    for client in ["a", "h1", "outside", "late"] {
        is_served(scene.cluster.place(client), at(vips(1), 80), "b")?;
    }
    // The command line, from inside.
    for command in [&["service", "list"][..], &["backend", "list"], &["conntrack", "list"], &["retire"]] {
        agent.done(command)?;
    }
    eventually(SOON, || {
        let said = agent.done(&["status"])?;
        ensure!(said.contains("retired"), "{said}");
        Ok(())
    })?;
    agent.done(&["retire", "--undo"])?;
    is_served(scene.cluster.place("outside"), at(vips(1), 80), "b")?;
    // A score below that of this test may be refused to anybody here.
    let log: String = agent.log().lines().filter(|line| !line.contains("oom_score_adj")).collect();
    ensure!(!log.contains("Operation not permitted") && !log.contains("Permission denied"), "{log}");
    ensure!(!log.contains("Read-only file system"), "{log}");
    agent.end();
    eventually(SOON, || agent.done(&["cleanup"]))?;
    ensure!(!scene.bpf.path().join("ebpf-proxy").exists(), "pins are left");
    Ok(())
}

#[test]
fn the_restricted_daemonset_does_all_with_its_rights_alone() -> Result<()> {
    lives(RESTRICTED, &["CAP_SYS_PTRACE", "CAP_SYS_ADMIN"])
}

#[test]
fn the_privileged_daemonset_does_all_and_makes_its_node_ready_itself() -> Result<()> {
    lives(PRIVILEGED, &[])
}

#[test]
fn without_the_setting_that_makes_attaching_fast_all_works_and_that_it_is_slow_is_said() -> Result<()> {
    let scene = Scene::new(RESTRICTED)?;
    let _servers = servers(&scene.cluster, &["c"])?;
    let _web = web(&scene.server, &scene.cluster, "web", 1, &["c"], |plan| plan)?;
    let (first, own) = scene.containers(RESTRICTED)?;
    for container in &first {
        ensure!(container.run(scene.node())?.0, "{}", container.name);
    }
    let mut less = own.clone();
    less.mounts.retain(|mount| mount.to != Path::new(EXPEDITED));
    ensure!(less.mounts.len() + 1 == own.mounts.len(), "{:?}", own.mounts);
    let mut agent = Running::start(&less, scene.node())?;
    let status = agent.wait_ready()?;
    ensure!(without(&status).contains(&&*format!("{EXPEDITED},")), "{status:#}");
    for client in ["a", "h1", "outside"] {
        is_served(scene.cluster.place(client), at(vips(1), 80), "c")?;
    }
    let doctor = |agent: &Running| -> Result<Value> {
        let (_, said) = agent.exec(&["doctor", "--output", "json"])?;
        let report: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
        let checks = report["checks"].as_array().context("checks")?;
        let found = checks.iter().find(|check| check["name"] == "attaching");
        Ok(found.context("no such check")?["verdict"].clone())
    };
    ensure!(doctor(&agent)? == "warn");
    ensure!(fs::read_to_string(&scene.expedited)? == "0\n");
    drop(agent);
    // As the manifest has it.
    let mut agent = Running::start(&own, scene.node())?;
    agent.wait_ready()?;
    ensure!(doctor(&agent)? == "ok");
    Ok(())
}

#[test]
fn none_of_the_rights_of_the_restricted_daemonset_is_one_too_many() -> Result<()> {
    let scene = Scene::new(RESTRICTED)?;
    let (first, own) = scene.containers(RESTRICTED)?;
    // The container that stays may not do the other one's work.
    let (done, said) = own.run(scene.node())?;
    ensure!(!done && said.contains("run `proxy-agent run --init-only` with more privileges first"), "{said}");
    for container in &first {
        ensure!(container.run(scene.node())?.0, "{}", container.name);
    }
    ensure!(own.read_only_root && own.no_new_privileges && own.default_seccomp && !own.host_pid);
    ensure!(own.capabilities == ["BPF", "PERFMON", "NET_ADMIN", "NET_RAW"], "{:?}", own.capabilities);
    for cap in &own.capabilities {
        let mut less = own.clone();
        less.capabilities.retain(|kept| kept != cap);
        let named = format!("CAP_{cap}");
        if cap == "NET_RAW" {
            let status = Running::start(&less, scene.node())?.wait_ready()?;
            ensure!(without(&status).contains(&&*named), "{status:#}");
        } else {
            let (done, said) = less.run(scene.node())?;
            ensure!(!done && said.contains(&format!("this process lacks {named}")), "{said}");
        }
    }
    Ok(())
}

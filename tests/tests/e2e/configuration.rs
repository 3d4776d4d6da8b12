//! The agent in the place of kube-proxy: its file, its flags, and what it sets on the node.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::{Agent, Feed};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::manifests::node;
use proxy_tests::netns::Netns;
use proxy_tests::object::Object;
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, eventually, get};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{manifests, two_nodes, web};
use crate::health::http;
use crate::life::{FLAGS, SOON, answers, node_ports, one_node, servers, service, with_node_ports};

/// [`FLAGS`] without those that a file overrules.
fn sizes() -> Vec<&'static str> {
    FLAGS.into_iter().filter(|flag| flag.starts_with("--max")).collect()
}

/// A directory as kubelet makes it of a ConfigMap: `NAME` → `..data/NAME`, `..data` → `..1`.
struct ConfigMap {
    directory: TempDir,
    version: u32,
}

impl ConfigMap {
    const NAME: &str = "config.conf";

    fn new(text: &str) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix(&format!("{}-config-", proxy_tests::unique()))
            .tempdir()
            .context("making a directory for the configuration")?;
        let mut map = Self { directory, version: 0 };
        map.put(text)?;
        symlink(Path::new("..data").join(Self::NAME), map.path())?;
        Ok(map)
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join(Self::NAME)
    }

    /// The file says this from now on.
    fn put(&mut self, text: &str) -> Result<()> {
        self.version += 1;
        let version = format!("..{}", self.version);
        let at = |name: &str| self.directory.path().join(name);
        std::fs::create_dir(at(&version))?;
        std::fs::write(at(&version).join(Self::NAME), text)?;
        symlink(&version, at("..next"))?;
        std::fs::rename(at("..next"), at("..data")).context("exchanging the version")
    }
}

/// What kubeadm writes, in short.
fn kubeadm(more: &str) -> String {
    format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nbindAddress: 0.0.0.0\n\
         clientConnection: {{kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0, burst: 0}}\n\
         clusterCIDR: 10.244.0.0/16,fd00:244::/32\nhealthzBindAddress: \"\"\nmetricsBindAddress: \"\"\n\
         conntrack: {{maxPerCore: null, min: null, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null}}\n\
         mode: \"\"\nnodePortAddresses: null\niptables: {{syncPeriod: 0s, minSyncPeriod: 0s}}\n{more}"
    )
}

/// A number under `/proc/sys/net/` of a namespace.
fn sysctl(netns: &Netns, key: &str) -> Result<u64> {
    let path = format!("/proc/sys/net/{key}");
    let text = netns.run_in(|| std::fs::read_to_string(&path))?.with_context(|| format!("reading {path}"))?;
    text.trim().parse().with_context(|| format!("{path}: {text}"))
}

/// Runs `run` with these flags until it ends: exit code and what it said.
fn ends(cluster: &TestCluster, feed: impl Into<Feed>, flags: &[&str]) -> Result<(bool, String)> {
    let binary = proxy_tests::require::agent_binary()?;
    let agent = Agent::prepare(&binary, cluster, "node1", Feed::Manifests("/nonexistent".into()), &[])?;
    let (flag, value) = match feed.into() {
        Feed::Manifests(path) => ("--manifests", path.display().to_string()),
        Feed::ApiServer(url) => ("--apiserver", url),
        Feed::Config(path) => ("--config", path.display().to_string()),
    };
    let cgroup = cluster.cgroup_root("node1").display().to_string();
    let line = ["run", "--hostname-override=node1", "--cgroup-root", &cgroup, flag, &value];
    let (status, said) = agent.ask(&[&line[..], flags].concat())?;
    Ok((status.success(), said))
}

#[test]
fn a_configmap_of_kube_proxy_is_followed_and_a_changed_one_ends_the_agent() -> Result<()> {
    // F-1, F-3, F-14, H-27, Y-22.
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |_| with_node_ports("web", 1, 30081))?;
    let mut config =
        ConfigMap::new(&kubeadm("mode: ipvs\nipvs: {scheduler: rr}\n").replace("mode: \"\"\n", ""))?;
    let flag = format!("--config={}", config.path().display());
    let mut flags = sizes();
    flags.extend([flag.as_str(), "--masquerade-all"]);
    let mut agent = Agent::start(&cluster, "node1", &dir, &flags)?;
    let (a, host) = (cluster.place("a"), cluster.place("node1"));
    answers(a, service(1)[0], "b")?;
    answers(cluster.place("outside"), node_ports(&cluster, "node1", 30081)[0], "b")?;
    let status = agent.status_json()?;
    let said = status["object_warnings"].to_string();
    for words in [
        "these settings have no effect here: mode=ipvs, ipvs.scheduler=rr",
        "overrules these flags: --masquerade-all",
    ] {
        ensure!(said.contains(words), "no {words:?}: {said}");
    }
    let (code, page) = http(host, "127.0.0.1:10249", "/configz")?;
    let page: Value = serde_json::from_str(&page)?;
    let shown = &page["kubeproxy.config.k8s.io"];
    ensure!(code == 200 && shown["kind"] == "KubeProxyConfiguration", "{page:#}");
    ensure!(shown["clusterCIDR"] == "10.244.0.0/16,fd00:244::/32", "{page:#}");
    ensure!(
        shown["healthzBindAddress"] == "0.0.0.0:10256" && shown["conntrack"]["min"] == 131_072,
        "{page:#}"
    );

    config
        .put(&kubeadm("metricsBindAddress: 127.0.0.1:10999\n").replace("metricsBindAddress: \"\"\n", ""))?;
    eventually(SOON, || {
        let log = agent.log_text();
        ensure!(log.contains("error: the configuration file") && log.contains("has changed"), "{log}");
        Ok(())
    })?;
    // Nobody supervises it here; traffic does not need it, and the next one takes the new file.
    answers(a, service(1)[0], "b")?;
    agent.stop()?;
    agent.spawn()?;
    agent.wait_ready()?;
    eventually(SOON, || {
        ensure!(http(host, "127.0.0.1:10999", "/configz")?.0 == 200);
        Ok(())
    })?;
    answers(a, service(1)[0], "b")
}

#[test]
fn a_configmap_of_kubeadm_is_all_that_an_agent_needs() -> Result<()> {
    // F-14, Y-1: the API server by the kubeconfig that the file names, everything else by the file.
    let cluster = one_node(&["a", "b"])?;
    let _servers = servers(&cluster, &["b"])?;
    let host = cluster.place("node1");
    let server = ApiServer::start_in(&host.netns, "127.0.0.1:6443".parse()?)?;
    server.put(Object::from(&node("node1", &host.addresses(), &cluster.pod_cidrs("node1"), &[])));
    let _web = web(&server, &cluster, "web", 1, &["b"], |_| with_node_ports("web", 1, 30081))?;
    let mut config = ConfigMap::new("")?;
    let kubeconfig = config.directory.path().join("kubeconfig.conf");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: default\n\
         clusters: [{{name: default, cluster: {{server: '{}'}}}}]\n\
         contexts: [{{name: default, context: {{cluster: default, namespace: default, user: default}}}}]\n\
         users: [{{name: default, user: {{token: secret}}}}]\n",
        server.url()
    );
    std::fs::write(&kubeconfig, text)?;
    config.put(
        &kubeadm("").replace("/var/lib/kube-proxy/kubeconfig.conf", &kubeconfig.display().to_string()),
    )?;
    let agent = Agent::start(&cluster, "node1", Feed::Config(config.path()), &sizes())?;
    answers(cluster.place("a"), service(1)[0], "b")?;
    answers(cluster.place("outside"), node_ports(&cluster, "node1", 30081)[0], "b")?;
    let status = agent.status_json()?;
    ensure!(
        status["agent"]["source"] == format!("kubeconfig {}", kubeconfig.display()).as_str(),
        "{status:#}"
    );
    ensure!(status["object_warnings"] == serde_json::json!([]), "{status:#}");
    Ok(())
}

#[test]
fn a_file_that_cannot_be_followed_keeps_the_agent_from_starting() -> Result<()> {
    // F-2, F-4.
    let (cluster, dir) = (one_node(&["a"])?, manifests()?);
    let file = |name: &str, text: &str| -> Result<String> {
        let path = dir.path().with_file_name(name);
        std::fs::write(&path, text)?;
        Ok(format!("--config={}", path.display()))
    };
    let wrong = file("wrong", &kubeadm("oomScoreAdj: 2000\nportRange: 1-2\nconfigSyncPeriod: -1s\n"))?;
    let (ok, said) = ends(&cluster, &dir, &[&wrong])?;
    ensure!(!ok && said.contains("oomScoreAdj \"2000\": must be -1000 to 1000"), "{said}");
    ensure!(said.contains("2 of the settings") && said.contains("configSyncPeriod \"-1s\""), "{said}");
    let kind = file("kind", "apiVersion: v1\nkind: ConfigMap\n")?;
    let (ok, said) = ends(&cluster, &dir, &[&kind])?;
    ensure!(!ok && said.contains("KubeProxyConfiguration") && said.contains("\"ConfigMap\""), "{said}");
    Ok(())
}

#[test]
fn only_connection_tracking_is_set_and_init_only_ends_with_that() -> Result<()> {
    // F-7, Z-7, Z-9, Z-10, Z-12, Z-13.
    let (cluster, dir) = (one_node(&["a"])?, manifests()?);
    let netns = &cluster.place("node1").netns;
    let untouched = [
        "ipv4/conf/all/route_localnet",
        "ipv4/ip_forward",
        "ipv4/conf/all/rp_filter",
        "ipv4/conf/all/arp_ignore",
        "ipv4/conf/all/arp_announce",
        "ipv6/conf/all/forwarding",
        "netfilter/nf_conntrack_udp_timeout",
        "netfilter/nf_conntrack_tcp_be_liberal",
    ];
    let values = || untouched.iter().map(|key| sysctl(netns, key)).collect::<Result<Vec<u64>>>();
    let [established, close_wait] = ["established", "close_wait"];
    let timeout = |of: &str| sysctl(netns, &format!("netfilter/nf_conntrack_tcp_timeout_{of}"));
    let before = values()?;
    ensure!(timeout(close_wait)? != 3_600, "nothing to be seen here");
    let (ok, said) = ends(&cluster, &dir, &["--init-only"])?;
    ensure!(ok, "{said}");
    ensure!((timeout(established)?, timeout(close_wait)?) == (86_400, 3_600));
    ensure!(values()? == before, "{untouched:?}: {:?}, not {before:?}", values()?);
    let set = [
        "--init-only=true",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=30m",
        "--conntrack-tcp-be-liberal",
        "--conntrack-udp-timeout=11s",
    ];
    ensure!(ends(&cluster, &dir, &set)?.0);
    ensure!((timeout(established)?, timeout(close_wait)?) == (86_400, 1_800));
    ensure!(sysctl(netns, "netfilter/nf_conntrack_udp_timeout")? == 11);
    ensure!(sysctl(netns, "netfilter/nf_conntrack_tcp_be_liberal")? == 1);
    // An agent that goes on does the same, and nothing else either.
    // Z-11: less than it was takes a right that is not given everywhere; more never does.
    let agent = Agent::start(&cluster, "node1", &dir, &[&FLAGS[..], &["--oom-score-adj=456"]].concat())?;
    ensure!(timeout(close_wait)? == 3_600 && values()?[..6] == before[..6]);
    let score = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", agent.pid().context("no pid")?))?;
    ensure!(score.trim() == "456", "{score}");
    Ok(())
}

/// The entry of the kernel's own connection tracking for a TCP connection to this port: its state and its seconds.
fn tracked(place: &Place, port: u16) -> Result<(String, u64)> {
    let read = || std::fs::read_to_string("/proc/thread-self/net/nf_conntrack");
    let text =
        place.netns.run_in(read)?.context("reading nf_conntrack: CONFIG_NF_CONNTRACK_PROCFS is needed")?;
    let port = format!("dport={port}");
    let line = text.lines().find(|line| line.contains("tcp") && line.split(' ').any(|word| word == port));
    let line = line.with_context(|| format!("no entry with {port}:\n{text}"))?;
    // ipv4 2 tcp 6 3599 CLOSE_WAIT src=…
    let words: Vec<&str> = line.split_whitespace().collect();
    Ok((words[5].to_owned(), words[4].parse().context("a time-out")?))
}

#[test]
fn the_kernel_remembers_a_connection_in_close_wait_for_an_hour() -> Result<()> {
    // Z-9, Z-10, as Kubernetes' own test of service proxies looks at it.
    let (cluster, dir) = (two_nodes(PodNetwork::Routed)?, manifests()?);
    let (client, server, node1) = (cluster.place("a"), cluster.place("h2"), cluster.place("node1"));
    // A rule that asks for the state of a connection switches connection tracking on.
    for rule in [
        &["add", "table", "inet", "track"][..],
        &["add", "chain", "inet", "track", "forward", "{ type filter hook forward priority 0; }"],
        &["add", "rule", "inet", "track", "forward", "ct", "state", "new", "counter"],
    ] {
        node1.netns.output("nft", rule)?;
    }
    let _agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let to = server.at(11302)[0];
    let listener: TcpListener = server.netns.listen(to)?;
    let mut connection = client.netns.run_in(|| TcpStream::connect(to))?.context("connecting")?;
    let (mut accepted, _) = listener.accept()?;
    connection.write_all(b"x")?;
    accepted.read_exact(&mut [0])?;
    // The client has said all; the server does not answer in kind.
    connection.shutdown(Shutdown::Write)?;
    eventually(SOON, || {
        let (state, seconds) = tracked(node1, 11302)?;
        ensure!(state == "CLOSE_WAIT" && (3_540..=3_660).contains(&seconds), "{state} for {seconds} s");
        Ok(())
    })
}

#[test]
fn our_own_flows_end_when_the_time_outs_of_the_file_say() -> Result<()> {
    // C-16, D-6.
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |_| with_node_ports("web", 1, 30081))?;
    let config = ConfigMap::new(
        &kubeadm("").replace("conntrack: {", "conntrack: {udpStreamTimeout: 1s, udpTimeout: 1s, "),
    )?;
    let flag = format!("--config={}", config.path().display());
    let mut flags = sizes();
    flags.push(&flag);
    let agent = Agent::start(&cluster, "node1", &dir, &flags)?;
    let (outside, to) = (cluster.place("outside"), node_ports(&cluster, "node1", 30081)[0]);
    let flows = |proto: &str| -> Result<usize> {
        let rows = agent.json(&["conntrack", "list", "--output", "json"])?;
        let rows = rows.as_array().context("no list")?.clone();
        Ok(rows.iter().filter(|row| row["protocol"] == proto).count())
    };
    let mut held = proxy_tests::probe::Runner::hold(
        outside,
        &Ask::tcp(to),
        std::time::Duration::from_secs(60),
        crate::life::LIMIT,
    )?;
    eventually(SOON, || {
        ensure!(held.report()?.made == 1);
        Ok(())
    })?;
    ensure!(get(outside, &Ask::udp(to))?.name == "b");
    // Without the setting it stays for two minutes, which is longer than this waits.
    eventually(SOON, || {
        ensure!(flows("UDP")? == 0, "it is still there");
        Ok(())
    })?;
    ensure!(flows("TCP")? == 1, "an open connection stays");
    Ok(())
}

#[test]
fn an_address_that_is_taken_ends_an_agent_that_is_told_so() -> Result<()> {
    // H-12, H-28.
    let (cluster, dir) = (one_node(&["a"])?, manifests()?);
    let _taken = cluster.place("node1").netns.listen("127.0.0.1:10249".parse()?)?;
    let flags = [&FLAGS[..], &["--bind-address-hard-fail"]].concat();
    let (ok, said) = ends(&cluster, &dir, &flags)?;
    ensure!(!ok && said.contains("cannot serve metrics at 127.0.0.1:10249"), "{said}");
    Ok(())
}

#[test]
fn a_node_without_ipv6_serves_ipv4_alone() -> Result<()> {
    // Y-11, S-12, F-13.
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    let host = cluster.place("node1");
    host.netns.sysctls(&[("ipv6/conf/all/disable_ipv6", "1")])?;
    let agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    answers(cluster.place("a"), service(1)[0], "b")?;
    let listed = agent.service_list_json()?.to_string();
    ensure!(listed.contains("10.96.0.1") && !listed.contains("fd00:10:96::1"), "{listed}");
    let health: Value = serde_json::from_str(&http(host, "127.0.0.1:10256", "/healthz")?.1)?;
    ensure!(health["status"].get("IPv4").is_some() && health["status"].get("IPv6").is_none(), "{health:#}");
    drop(agent);

    let server = ApiServer::start_in(&host.netns, "127.0.0.1:6443".parse()?)?;
    server.put(Object::from(&node("node1", &host.addresses(), &cluster.pod_cidrs("node1"), &[])));
    let (ok, said) = ends(&cluster, &server, &["--cluster-cidr=fd00:244::/32", "--max-flows=1024"])?;
    ensure!(!ok && said.contains("the cluster CIDR has no IPv4 range"), "{said}");
    Ok(())
}

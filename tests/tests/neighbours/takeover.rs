//! A kube-proxy that has served a node, and then the agent: nobody notices.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::pod::Place;
use proxy_tests::probe::wait;
use proxy_tests::test_cluster::{Plan, PodNetwork, TestCluster};

use crate::common::{MOMENT, PORT, Proxy, Web, is_served, leave_iptables, leave_rules, servers, soon};
use crate::talk::{Talk, Way};

/// One Service leads to a pod of the node itself, one to a pod of another.
const NEAR: Web = Web::new(1, 30200, "b");
const FAR: Web = Web::new(2, 30201, "c");
const WEBS: [Web; 2] = [NEAR, FAR];
/// The same for connections that end at once.
const SHORT: [Web; 2] = [Web::new(3, 30202, "e"), Web::new(4, 30203, "d")];

/// These scenes keep every processor busy: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn cluster(network: PodNetwork) -> Result<TestCluster> {
    let cluster = Plan::default()
        .node("node1", &["a", "b", "e"])
        .node("node2", &["c", "d"])
        .client("outside")
        .network(network)
        .raise()?;
    // What netfilter is to translate has to have a route first.
    let node1 = &cluster.place("node1").netns;
    node1.ip("route add 10.96.0.0/16 dev eth0\nroute add fd00:10:96::/112 dev eth0\n")?;
    Ok(cluster)
}

/// Connections from a pod and outside, to both Services, over both families, TCP and UDP.
fn talk_through(cluster: &TestCluster) -> Result<Vec<Talk>> {
    let [node1, a, outside] = ["node1", "a", "outside"].map(|name| cluster.place(name));
    talk(cluster, |web| {
        vec![(a, web.cluster_ips()), (a, node1.at(web.node_port)), (outside, node1.at(web.node_port))]
    })
}

/// As [`talk_through`], and from the node itself, by rules: the sockets of tests are in no cgroup of an agent.
fn talk_all(cluster: &TestCluster) -> Result<Vec<Talk>> {
    let mut talks = talk_through(cluster)?;
    talks.extend(talk(cluster, |web| vec![(cluster.place("node1"), web.cluster_ips())])?);
    Ok(talks)
}

fn talk<'a>(
    cluster: &TestCluster,
    asks: impl Fn(&Web) -> Vec<(&'a Place, [SocketAddr; 2])>,
) -> Result<Vec<Talk>> {
    let mut talks = Vec::new();
    for web in WEBS {
        let server = cluster.place(web.endpoint);
        for (client, targets) in asks(&web) {
            for way in [Way::Tcp, Way::Udp] {
                for (to, at) in targets.into_iter().zip(server.at(PORT)) {
                    talks.push(Talk::begin(way, (&client.netns, 0), to, (&server.netns, at))?);
                }
            }
        }
    }
    Ok(talks)
}

/// Does `work` while these connections are used, and new ones are made to `SHORT`, without a pause. None of them may fail.
fn meanwhile<T>(cluster: &TestCluster, busy: &[Talk], work: impl FnOnce() -> Result<T>) -> Result<T> {
    let stop = AtomicBool::new(false);
    let rounds = |what: &str, round: &dyn Fn() -> Result<()>| {
        let mut rounds = 0;
        // Some of them after it is done.
        while rounds < 4 || !stop.load(Ordering::Relaxed) {
            round().with_context(|| format!("{what}, round {rounds}"))?;
            rounds += 1;
        }
        anyhow::Ok(())
    };
    let joined =
        |thread: ScopedJoinHandle<'_, Result<()>>| thread.join().map_err(|_| anyhow!("a thread panicked"))?;
    std::thread::scope(|scope| {
        let speaking = scope.spawn(|| rounds("held", &|| busy.iter().try_for_each(Talk::exchange)));
        let asking = scope.spawn(|| rounds("new", &|| ask_all(cluster, &SHORT)));
        // After an error nobody serves any more.
        let done = work().inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
        wait(MOMENT, "connections go on a little longer than until it is done");
        stop.store(true, Ordering::Relaxed);
        joined(speaking)?;
        joined(asking)?;
        Ok(done)
    })
}

/// A pod, the node itself and somebody outside ask these Services.
fn ask_all(cluster: &TestCluster, webs: &[Web]) -> Result<()> {
    let [node1, a, outside] = ["node1", "a", "outside"].map(|name| cluster.place(name));
    for web in webs {
        is_served(a, web.cluster_ips(), web.endpoint)?;
        is_served(node1, web.cluster_ips(), web.endpoint)?;
        is_served(outside, node1.at(web.node_port), web.endpoint)?;
    }
    Ok(())
}

#[test]
fn connections_of_a_kube_proxy_go_on_when_the_agent_takes_over() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (network, iptables) in [
        (PodNetwork::Routed, None),
        (PodNetwork::Overlay, None),
        (PodNetwork::Routed, Some("legacy")),
        (PodNetwork::Routed, Some("nft")),
    ] {
        let cluster = cluster(network)?;
        let webs = [WEBS, SHORT].concat();
        match iptables {
            None => leave_rules(&cluster, "node1", &webs)?,
            Some(kind) => leave_iptables(kind, &cluster, "node1", &webs)?,
        }
        let _servers = servers(&cluster, &["d", "e"])?;
        let (idle, busy) = (talk_all(&cluster)?, talk_all(&cluster)?);
        let talks = idle.len() + busy.len();
        let serving = meanwhile(&cluster, &busy, || {
            let serving = Proxy::Agent.serve(&cluster, "node1", &webs, &[])?;
            let agent = serving.agent.as_ref().context("an agent")?;
            soon(|| {
                let log = agent.log_text();
                ensure!(log.contains("removed what kube-proxy had left"), "{log}");
                ensure!(log.contains("are translated by this proxy now"), "{log}");
                are_taken(agent)
            })?;
            Ok(serving)
        })?;
        let log = serving.agent.as_ref().context("an agent")?.log_text();
        let word = log.split_once("took over ").and_then(|(_, rest)| rest.split(' ').next());
        let adopted: usize = word.context("nothing taken over")?.parse()?;
        // All but those of the node itself.
        ensure!(adopted >= talks / 4 * 3, "{log}");
        for talk in idle.iter().chain(&busy) {
            // A server that speaks first finds its client, too.
            talk.push().and_then(|()| talk.exchange()).with_context(|| log.clone())?;
        }
        ask_all(&cluster, &SHORT)?;
    }
    Ok(())
}

/// What goes straight to an endpoint from the port of a connection to its Service, over but remembered, or alive; and netfilter
/// may have given it another port.
#[test]
fn connections_that_share_their_ends_with_another_go_on() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (live, moved) in [(false, true), (true, true), (false, false), (true, false)] {
        let cluster = cluster(PodNetwork::Routed)?;
        let (node1, a) = (cluster.place("node1"), cluster.place("a"));
        let mut ways = Vec::new();
        for web in WEBS {
            let server = cluster.place(web.endpoint);
            for doors in [web.cluster_ips(), node1.at(web.node_port)] {
                ways.extend(doors.into_iter().zip(server.at(PORT)).map(|(door, end)| (server, door, end)));
            }
        }
        let begin = |straight: bool| -> Result<Vec<Talk>> {
            let mut talks = Vec::new();
            for (port, (server, door, end)) in (20_000..).zip(&ways) {
                // Two UDP sockets with one port, which netfilter leaves alone, are one conversation to it, too.
                let udp = moved.then_some(Way::Udp);
                for way in [Way::Tcp].into_iter().chain(udp) {
                    let to = if straight { *end } else { *door };
                    talks.push(Talk::begin(way, (&a.netns, port), to, (&server.netns, *end))?);
                }
            }
            Ok(talks)
        };
        let webs = [WEBS, SHORT].concat();
        leave_rules(&cluster, "node1", &webs)?;
        let _servers = servers(&cluster, &["d", "e"])?;
        let rule = if moved { "masquerade to :25000-25999" } else { "accept" };
        node1.netns.nft(&format!(
            "table inet moved {{
                chain postrouting {{
                    type nat hook postrouting priority srcnat - 1;
                    meta l4proto {{ tcp, udp }} th sport 20000-20099 th dport 8080 {rule}
                }}
            }}\n",
        ))?;
        let mut straight = begin(true)?;
        if !live {
            straight.clear();
        }
        node1.netns.nft("delete table inet moved\n")?;
        let talks = begin(false)?;
        straight.iter().chain(&talks).try_for_each(Talk::exchange).context("by rules")?;
        let serving = Proxy::Agent.serve(&cluster, "node1", &webs, &[])?;
        let agent = serving.agent.as_ref().context("an agent")?;
        soon(|| {
            let log = agent.log_text();
            ensure!(live || log.contains("are translated by this proxy now"), "{log}");
            ensure!(log.contains("removed what kube-proxy had left"), "{log}");
            Ok(())
        })?;
        wait(Duration::from_secs(2), "whatever else is taken from netfilter is taken");
        for talk in straight.iter().chain(&talks) {
            talk.exchange()
                .and_then(|()| talk.push())
                .with_context(|| format!("live {live}, moved {moved}: {}", agent.log_text()))?;
        }
    }
    Ok(())
}

/// Whether netfilter has kept no more of what is not the node's own than what it masquerades with ports that the node gives out
/// itself (`--service-node-port-range`, `net.ipv4.ip_local_port_range`).
fn are_taken(agent: &Agent) -> Result<()> {
    let flows = agent.json(&["conntrack", "list", "-o", "json"])?;
    for flow in flows.as_array().context("a list of flows")? {
        let port = flow["masquerade"].as_str().and_then(|end| end.rsplit(':').next()?.parse::<u16>().ok());
        let of_node = port.is_some_and(|port| (30_000..=60_999).contains(&port));
        ensure!((flow["translated_by"] == "netfilter") == of_node, "{flow}");
    }
    Ok(())
}

/// The agent that follows finishes what it finds.
#[test]
fn an_agent_that_is_killed_while_it_takes_over_leaves_no_connection_alone() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let cluster = cluster(PodNetwork::Routed)?;
    let webs = [WEBS, SHORT].concat();
    let _servers = servers(&cluster, &["d", "e"])?;
    // Each time a little later.
    for moment in 0..6 {
        leave_rules(&cluster, "node1", &webs)?;
        let talks = talk_all(&cluster)?;
        let serving = meanwhile(&cluster, &talks, || {
            let mut serving = Proxy::Agent.serve(&cluster, "node1", &webs, &[])?;
            let agent = serving.agent.as_mut().context("an agent")?;
            wait(Duration::from_millis(moment * 150), "the agent gets a little further each time");
            agent.kill()?;
            agent.spawn()?;
            agent.wait_ready()?;
            soon(|| {
                are_taken(agent)?;
                // By one of the two agents.
                let tables = cluster.place("node1").netns.output("nft", &["list", "tables"])?;
                let left = ["kube-proxy", "ebpf-proxy-takeover"].iter().any(|name| tables.contains(name));
                ensure!(!left, "{tables}: {}", agent.log_text());
                Ok(())
            })?;
            Ok(serving)
        })?;
        let agent = serving.agent.as_ref().context("an agent")?;
        talks.iter().try_for_each(Talk::exchange).with_context(|| agent.log_text())?;
    }
    Ok(())
}

/// How many flows the agent has.
fn flows(agent: &Agent) -> Result<usize> {
    Ok(agent.json(&["conntrack", "list", "-o", "json"])?.as_array().context("a list of flows")?.len())
}

#[test]
fn an_agent_that_retires_leaves_the_node_to_kube_proxy_and_nobody_notices() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // Rules that come before, and rules that come when the agent has retired.
    for before in [true, false] {
        let cluster = cluster(PodNetwork::Routed)?;
        let webs = [WEBS, SHORT].concat();
        let flags = ["--conntrack-udp-timeout=2s", "--conntrack-udp-timeout-stream=2s"];
        let mut serving = Proxy::Agent.serve(&cluster, "node1", &webs, &flags)?;
        let _servers = servers(&cluster, &["d", "e"])?;
        let (idle, busy) = (talk_through(&cluster)?, talk_through(&cluster)?);
        let agent = serving.agent.as_mut().context("an agent")?;
        if before {
            leave_rules(&cluster, "node1", &webs)?;
            meanwhile(&cluster, &busy, || {
                let (status, said) = agent.ask(&["retire"])?;
                ensure!(
                    status.success() && said.contains("flows go on") && !said.contains("warning"),
                    "{said}"
                );
                Ok(())
            })?;
        } else {
            let (status, said) = agent.ask(&["retire"])?;
            ensure!(status.success() && said.contains("warning: nobody serves"), "{said}");
            leave_rules(&cluster, "node1", &webs)?;
            meanwhile(&cluster, &busy, || Ok(()))?;
        }
        // What is new leaves no flow; rules stay although nobody of that name runs.
        soon(|| {
            let (old, new) = (flows(agent)?, talk_all(&cluster)?);
            new.iter().try_for_each(Talk::exchange)?;
            ensure!(flows(agent)? <= old, "flows have begun");
            Ok(())
        })?;
        ensure!(agent.status_json()?["notes"].to_string().contains("retired"), "{}", agent.status_json()?);
        // Those over TCP: UDP's time-outs are short here.
        let tcp = |talks: &[Talk]| talks.iter().filter(|talk| talk.is_tcp()).try_for_each(Talk::exchange);
        tcp(&idle)?;
        let (status, said) = agent.ask(&["retire", "--wait=1s"])?;
        ensure!(!status.success() && said.contains("flows are left"), "{said}");
        // An agent that is started again has not forgotten it.
        agent.stop()?;
        agent.spawn()?;
        agent.wait_ready()?;
        tcp(&idle)?;
        tcp(&busy)?;
        drop((idle, busy));
        let (status, said) = agent.ask(&["retire", "--wait=20s"])?;
        ensure!(status.success() && said.contains("no flow is left"), "{said}");
        meanwhile(&cluster, &[], || {
            agent.stop()?;
            let (status, said) = agent.ask(&["cleanup"])?;
            ensure!(status.success(), "{said}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn an_agent_that_is_taken_back_takes_over_what_kube_proxy_has_begun() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let cluster = cluster(PodNetwork::Routed)?;
    let webs = [WEBS, SHORT].concat();
    leave_rules(&cluster, "node1", &webs)?;
    let _servers = servers(&cluster, &["d", "e"])?;
    let serving = Proxy::Agent.serve(&cluster, "node1", &webs, &["--remove-kube-proxy-rules=false"])?;
    let agent = serving.agent.as_ref().context("an agent")?;
    let mut talks = Vec::new();
    for _ in 0..3 {
        talks.extend(talk_all(&cluster)?);
        meanwhile(&cluster, &talks, || {
            let (status, said) = agent.ask(&["retire"])?;
            ensure!(status.success(), "{said}");
            Ok(())
        })?;
        talks.extend(talk_all(&cluster)?);
        meanwhile(&cluster, &talks, || {
            let (status, said) = agent.ask(&["retire", "--undo"])?;
            ensure!(status.success(), "{said}");
            Ok(())
        })?;
    }
    talks.iter().try_for_each(Talk::exchange)
}

#[test]
fn another_proxy_masquerades_with_no_port_of_flows_that_go_on() -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let cluster = cluster(PodNetwork::Routed)?;
    let node1 = &cluster.place("node1").netns;
    // Four ports are left for masquerading, to either.
    node1.sysctls(&[("ipv4/ip_local_reserved_ports", "1024-1999,2004-65535")])?;
    let _servers = servers(&cluster, &["d", "e"])?;
    let webs = [WEBS, SHORT].concat();
    let serving = Proxy::Agent.serve(&cluster, "node1", &webs, &[])?;
    let agent = serving.agent.as_ref().context("an agent")?;
    let far = || {
        let (outside, server) = (cluster.place("outside"), cluster.place(FAR.endpoint));
        let mut talks = Vec::new();
        for way in [Way::Tcp, Way::Udp] {
            for (to, at) in cluster.place("node1").at(FAR.node_port).into_iter().zip(server.at(PORT)) {
                for _ in 0..2 {
                    talks.push(Talk::begin(way, (&outside.netns, 0), to, (&server.netns, at))?);
                }
            }
        }
        anyhow::Ok(talks)
    };
    let ours = far()?;
    let (status, said) = agent.ask(&["retire"])?;
    ensure!(status.success(), "{said}");
    node1.nft(
        "table inet few {
            chain postrouting {
                type nat hook postrouting priority srcnat - 1;
                meta mark & 0x4000 != 0 meta l4proto { tcp, udp } masquerade to :2000-2003
            }
        }\n",
    )?;
    leave_rules(&cluster, "node1", &webs)?;
    let theirs = far().context("the other proxy's")?;
    ours.iter().chain(&theirs).try_for_each(Talk::exchange)
}

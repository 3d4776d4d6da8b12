//! A kube-proxy that has served a node, and then the agent: nobody notices.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;

use anyhow::{Context, Result, anyhow, ensure};
use proxy_tests::town::{Plan, PodNetwork, Town};

use crate::common::{MOMENT, PORT, Proxy, Web, is_served, leave_rules, servers, soon};
use crate::talk::{Talk, Way};

/// One Service leads to a pod of the node itself, one to a pod of another.
const NEAR: Web = Web::new(1, 30200, "b");
const FAR: Web = Web::new(2, 30201, "c");
const WEBS: [Web; 2] = [NEAR, FAR];
/// The same for connections that end at once.
const SHORT: [Web; 2] = [Web::new(3, 30202, "e"), Web::new(4, 30203, "d")];

fn town(network: PodNetwork) -> Result<Town> {
    let town = Plan::default()
        .node("node1", &["a", "b", "e"])
        .node("node2", &["c", "d"])
        .client("outside")
        .network(network)
        .raise()?;
    // What netfilter is to translate has to have a route first.
    let node1 = &town.place("node1").netns;
    node1.ip("route add 10.96.0.0/16 dev eth0\nroute add fd00:10:96::/112 dev eth0\n")?;
    Ok(town)
}

/// Connections from a pod, the node itself and outside, to both Services, over both families, TCP and UDP.
fn talk_all(town: &Town) -> Result<Vec<Talk>> {
    let [node1, a, outside] = ["node1", "a", "outside"].map(|name| town.place(name));
    let mut talks = Vec::new();
    for web in WEBS {
        let server = town.place(web.endpoint);
        let asks: [(_, [SocketAddr; 2]); 4] = [
            (a, web.cluster_ips()),
            (a, node1.at(web.node_port)),
            (outside, node1.at(web.node_port)),
            (node1, web.cluster_ips()),
        ];
        for (client, targets) in asks {
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
fn meanwhile<T>(town: &Town, busy: &[Talk], work: impl FnOnce() -> Result<T>) -> Result<T> {
    let stop = AtomicBool::new(false);
    let rounds = |what: &str, round: &dyn Fn() -> Result<()>| {
        let mut rounds = 0;
        while !stop.load(Ordering::Relaxed) {
            round().with_context(|| format!("{what}, round {rounds}"))?;
            rounds += 1;
        }
        ensure!(rounds > 3, "{what}: only {rounds} rounds");
        anyhow::Ok(())
    };
    let joined =
        |thread: ScopedJoinHandle<'_, Result<()>>| thread.join().map_err(|_| anyhow!("a thread panicked"))?;
    std::thread::scope(|scope| {
        let speaking = scope.spawn(|| rounds("held", &|| busy.iter().try_for_each(Talk::exchange)));
        let asking = scope.spawn(|| rounds("new", &|| ask_all(town, &SHORT)));
        let done = work();
        // A little longer than until it is done.
        std::thread::sleep(MOMENT);
        stop.store(true, Ordering::Relaxed);
        joined(speaking)?;
        joined(asking)?;
        done
    })
}

/// A pod, the node itself and somebody outside ask these Services.
fn ask_all(town: &Town, webs: &[Web]) -> Result<()> {
    let [node1, a, outside] = ["node1", "a", "outside"].map(|name| town.place(name));
    for web in webs {
        is_served(a, web.cluster_ips(), web.endpoint)?;
        is_served(node1, web.cluster_ips(), web.endpoint)?;
        is_served(outside, node1.at(web.node_port), web.endpoint)?;
    }
    Ok(())
}

#[test]
fn connections_of_a_kube_proxy_go_on_when_the_agent_takes_over() -> Result<()> {
    for network in [PodNetwork::Routed, PodNetwork::Overlay] {
        let town = town(network)?;
        let webs = [WEBS, SHORT].concat();
        leave_rules(&town, "node1", &webs)?;
        let _servers = servers(&town, &["d", "e"])?;
        let (idle, busy) = (talk_all(&town)?, talk_all(&town)?);
        let serving = meanwhile(&town, &busy, || {
            let serving = Proxy::Agent.serve(&town, "node1", &webs, &[])?;
            let agent = serving.agent.as_ref().context("an agent")?;
            soon(|| {
                let log = agent.log_text();
                ensure!(log.contains("removed what kube-proxy had left"), "{log}");
                Ok(())
            })?;
            Ok(serving)
        })?;
        let log = serving.agent.as_ref().context("an agent")?.log_text();
        let word = log.split_once("took over ").and_then(|(_, rest)| rest.split(' ').next());
        let adopted: usize = word.context("nothing taken over")?.parse()?;
        // All but those of the node itself.
        ensure!(adopted >= (idle.len() + busy.len()) / 4 * 3, "{log}");
        for talk in idle.iter().chain(&busy) {
            // A server that speaks first finds its client, too.
            talk.push().and_then(|()| talk.exchange()).with_context(|| log.clone())?;
        }
        ask_all(&town, &SHORT)?;
    }
    Ok(())
}

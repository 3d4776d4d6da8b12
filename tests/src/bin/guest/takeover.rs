//! A kube-proxy has served the node, in nftables or in IPVS mode, and the agent takes over: what it has begun goes on.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::answer::Hold;
use proxy_tests::manifests::ManifestDir;
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Runner, eventually};
use proxy_tests::reference::{self, Door};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};

use crate::scene::{FAR, NEAR, SERVED, Scene, Service, answered, counters, go_on};

/// How long a change may take to be seen on an emulated machine.
const SOON: Duration = Duration::from_secs(60);
/// How long a connection is held at most.
const HELD: Duration = Duration::from_secs(300);
/// The interface that holds the Service addresses.
const HOLDER: &str = "kube-ipvs0";

/// How the node was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Nftables,
    Ipvs,
}

/// In a word, how much there was.
pub(crate) fn takeover(mode: Mode) -> Result<String> {
    let (scene, manifests) = (Scene::raise(PodNetwork::Routed)?, ManifestDir::new()?);
    let (cluster, node) = (&scene.cluster, scene.node());
    serve(mode, cluster, node)?;
    // It holds what the agent is to know.
    let mut published = Vec::new();
    for service in [NEAR, FAR] {
        published.push(service.publish(&manifests, cluster, |plan| plan)?);
    }
    let mut holds = hold(cluster, node)?;
    go_on(&mut holds).context("served by kube-proxy")?;
    let mut agent = scene.agent(&manifests, &[])?;
    agent.spawn()?;
    agent.wait_ready()?;
    eventually(SOON, || {
        let log = agent.log_text();
        ensure!(log.contains("are translated by this proxy now"), "{log}");
        ensure!(log.contains("removed what kube-proxy had left: nftables table ip kube-proxy"), "{log}");
        Ok(())
    })?;
    go_on(&mut holds).with_context(|| format!("taken over: {}", said(&agent, node)))?;
    for from in [cluster.place("a"), node, cluster.place("outside")] {
        if from.name != "outside" {
            answered(from, NEAR.vips(), "b")?;
        }
        answered(from, FAR.node_ports(node), "c")?;
    }
    if mode == Mode::Ipvs {
        // It leads connections of the node itself.
        let kept = agent.status_json()?["object_warnings"].to_string();
        ensure!(kept.contains("they stay until"), "virtual servers are not told of: {kept}");
    }
    go_on(&mut holds).with_context(|| format!("later: {}", said(&agent, node)))?;
    let mut exchanges = 0;
    for (what, hold) in holds {
        let end = hold.stop()?;
        ensure!(end.failed == 0, "{what}: {end:?}; {}", agent.log_text());
        exchanges += end.made;
    }
    gone(&mut agent, node)?;
    Ok(format!("{exchanges} exchanges held"))
}

/// What the agent has said, and who translates which connection: everything there is to find out why one does not go on.
fn said(agent: &Agent, node: &Place) -> String {
    let read = |name: &str| {
        let path = format!("/proc/thread-self/net/{name}");
        let text = node.netns.run_in(|| std::fs::read_to_string(&path)).ok().and_then(Result::ok);
        format!("{name}:\n{}", text.unwrap_or_default())
    };
    let flows = agent.ask(&["conntrack", "list"]).map(|(_, flows)| flows).unwrap_or_default();
    let counters = format!("{:?}", counters(agent).unwrap_or_default());
    [agent.log_text(), counters, flows, read("nf_conntrack"), read("ip_vs_conn")].join("\n")
}

/// What kube-proxy has left goes with a cleanup at the latest.
fn gone(agent: &mut Agent, node: &Place) -> Result<()> {
    agent.stop()?;
    let (status, said) = agent.ask(&["cleanup", "--kube-proxy"])?;
    ensure!(status.success(), "{said}");
    let links = node.netns.output("ip", &["-o", "link"])?;
    ensure!(!links.contains(HOLDER), "{links}");
    Ok(())
}

/// Connections over TCP and UDP from a pod, from outside and from the node itself, to endpoints here and there.
fn hold(cluster: &TestCluster, node: &Place) -> Result<Vec<(String, Runner<Hold>)>> {
    let (pod, outside) = (cluster.place("a"), cluster.place("outside"));
    let mut holds = Vec::new();
    let asks = [
        (pod, NEAR.vips()),
        (pod, FAR.vips()),
        (node, FAR.vips()),
        (outside, NEAR.node_ports(node)),
        (outside, FAR.node_ports(node)),
    ];
    for (from, targets) in asks {
        for to in targets {
            for ask in [Ask::tcp(to), Ask::udp(to)] {
                let ask = ask.timeout(Duration::from_secs(10));
                let hold = Runner::hold(from, &ask, Duration::from_millis(250), HELD)?;
                holds.push((format!("{} → {ask:?}", from.name), hold));
            }
        }
    }
    Ok(holds)
}

fn serve(mode: Mode, cluster: &TestCluster, node: &Place) -> Result<()> {
    // Where each Service leads: its pod's address of the same family.
    let mut doors = Vec::new();
    for service in [NEAR, FAR] {
        let ends = cluster.place(service.pods[0]).at(SERVED);
        for (vip, end) in service.vips().into_iter().zip(ends) {
            doors.push((Door::Address(vip), end));
            doors.push((Door::NodePort(service.node_port), end));
        }
    }
    match mode {
        Mode::Nftables => {
            node.netns.ip("route add 10.96.0.0/16 dev eth0\nroute add fd00:10:96::/112 dev eth0\n")?;
            reference::load_as("kube-proxy", &node.netns, &doors)
        }
        Mode::Ipvs => virtual_servers(node, &doors),
    }
}

/// What kube-proxy makes in IPVS mode: Service addresses at an interface, a virtual server for each door, and a rule that
/// masquerades what comes from elsewhere than a pod.
fn virtual_servers(node: &Place, doors: &[(Door, SocketAddr)]) -> Result<()> {
    node.netns.sysctls(&[("ipv4/vs/conntrack", "1")]).context("IPVS in this kernel")?;
    let mut links = format!("link add {HOLDER} type dummy\n");
    for vip in [NEAR, FAR].iter().flat_map(Service::vips) {
        let bits = if vip.is_ipv4() { 32 } else { 128 };
        links.push_str(&format!("address add {}/{bits} dev {HOLDER}\n", vip.ip()));
    }
    node.netns.ip(&links)?;
    for (door, end) in doors {
        let at = match door {
            Door::Address(at) => *at,
            Door::NodePort(port) => {
                let own = node.addresses().into_iter().find(|own| own.is_ipv4() == end.is_ipv4());
                SocketAddr::new(own.context("an address of the node")?, *port)
            }
        };
        for protocol in ["-t", "-u"] {
            let (at, end) = (at.to_string(), end.to_string());
            node.netns.output("ipvsadm", &["-A", protocol, &at, "-s", "rr"])?;
            node.netns.output("ipvsadm", &["-a", protocol, &at, "-r", &end, "-m"])?;
        }
    }
    for (family, pods) in [("ip", TestCluster::CLUSTER_CIDRS[0]), ("ip6", TestCluster::CLUSTER_CIDRS[1])] {
        node.netns.nft(&format!(
            "table {family} kube-proxy {{
                chain postrouting {{
                    type nat hook postrouting priority srcnat;
                    {family} saddr != {pods} {family} daddr {pods} masquerade fully-random
                }}
            }}\n"
        ))?;
    }
    Ok(())
}

//! Who answers: ClusterIP, NodePort and UDP, from a pod, from the node and from outside.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use proxy_tests::agent::Agent;
use proxy_tests::answer::Load;
use proxy_tests::probe::{Ask, Runner};
use proxy_tests::stop::pause;
use proxy_tests::test_cluster::TestCluster;

use crate::promise::Promises;
use crate::screen::Screen;

/// Requests a second of one client.
pub(crate) const RATE: u32 = 150;
/// How long a client asks here.
const ASKING: Duration = Duration::from_millis(900);

pub(crate) fn at(address: [u8; 4], port: u16) -> SocketAddr {
    (Ipv4Addr::from(address), port).into()
}

/// The address of the Service `webui`.
pub(crate) fn webui() -> SocketAddr {
    at([10, 100, 100, 100], 80)
}

/// The NodePort of `webui-public`, at node1.
pub(crate) fn node_port(test_cluster: &TestCluster) -> SocketAddr {
    (test_cluster.place("node1").v4, 30200).into()
}

struct Scene {
    client: &'static str,
    who: &'static str,
    what: String,
    ask: Ask,
    pods: [&'static str; 3],
}

pub(crate) fn show(
    screen: &Screen,
    test_cluster: &TestCluster,
    agent: &Agent,
    promises: &mut Promises,
) -> Result<()> {
    const WEBUI: [&str; 3] = ["webui-1", "webui-2", "webui-3"];
    const DNS: [&str; 3] = ["dns-1", "dns-2", ""];
    screen.heading("1. One address, several pods")?;
    screen.text(
        "A Service has an address that no machine has. Whoever opens a connection to it must reach one of its \
         pods, wherever that pod runs: webui-1 and webui-2 are on node1, webui-3 is on node2. Each client asks \
         for 0.9 seconds, every request with a new connection.",
    )?;
    let dns = at([10, 96, 0, 10], 53);
    let scenes = [
        scene("shell", "a pod", format!("ClusterIP {}", webui()), Ask::tcp(webui()), WEBUI),
        scene("node1", "the host node1", format!("ClusterIP {}", webui()), Ask::tcp(webui()), WEBUI),
        scene(
            "outside",
            "outside",
            format!("NodePort {}", node_port(test_cluster)),
            Ask::tcp(node_port(test_cluster)),
            WEBUI,
        ),
        scene("shell", "a pod", format!("UDP {dns}"), Ask::udp(dns), DNS),
        scene("shell-2", "a pod, sendto", format!("UDP {dns}"), Ask::unconnected(dns), DNS),
    ];
    let loads = ask_all(test_cluster, &scenes)?;
    let rows: Vec<Vec<String>> = scenes
        .iter()
        .zip(&loads)
        .map(|(scene, load)| {
            let mut row =
                vec![scene.who.into(), scene.what.clone(), load.made.to_string(), load.failed.to_string()];
            let named = scene.pods.iter().filter(|pod| !pod.is_empty());
            let counts: Vec<String> =
                named.map(|pod| format!("{pod}: {}", load.names.get(*pod).unwrap_or(&0))).collect();
            row.push(counts.join("  "));
            row
        })
        .collect();
    screen.table(&["FROM", "TO", "ANSWERED", "FAILED", "WHO ANSWERED"], &rows)?;
    let webui_ok = scenes.iter().zip(&loads).take(3).all(|(scene, load)| all_and_only(scene, load));
    let dns_ok = scenes.iter().zip(&loads).skip(3).all(|(scene, load)| all_and_only(scene, load));
    let (web, udp) = loads.split_at(3);
    promises.note(
        "ClusterIP, NodePort",
        "every pod answers, none fails",
        &web.iter().collect::<Vec<_>>(),
        webui_ok,
    );
    promises.note("DNS over UDP", "every pod answers, none fails", &udp.iter().collect::<Vec<_>>(), dns_ok);
    look_inside(screen, agent)
}

fn scene(client: &'static str, who: &'static str, what: String, ask: Ask, pods: [&'static str; 3]) -> Scene {
    Scene { client, who, what, ask, pods }
}

/// All clients at the same time.
fn ask_all(test_cluster: &TestCluster, scenes: &[Scene]) -> Result<Vec<Load>> {
    let start = |scene: &Scene| {
        Runner::load(test_cluster.place(scene.client), &scene.ask, RATE, 2, Duration::from_secs(20))
    };
    let runners = scenes.iter().map(start).collect::<Result<Vec<_>>>()?;
    pause(ASKING)?;
    runners.into_iter().map(Runner::stop).collect()
}

/// Every pod has answered, nobody else has, and nothing has failed.
fn all_and_only(scene: &Scene, load: &Load) -> bool {
    let wanted: BTreeSet<&str> = scene.pods.iter().copied().filter(|pod| !pod.is_empty()).collect();
    load.failed == 0 && load.names.keys().map(String::as_str).collect::<BTreeSet<_>>() == wanted
}

/// What the operator of a node sees.
fn look_inside(screen: &Screen, agent: &Agent) -> Result<()> {
    screen.heading("2. What the node says about itself")?;
    screen.text(
        "The agent only writes tables; the kernel does the work. These commands read the same tables, so they show \
         what is, not what was meant.",
    )?;
    let (_, status) = agent.ask(&["status"])?;
    // Its paragraphs; how full the tables are matters little here.
    let paragraphs = status.split("\n\n").filter(|paragraph| !paragraph.starts_with("TABLE"));
    screen.quote("proxy-agent status", &paragraphs.collect::<Vec<_>>().join("\n\n"))?;
    let (_, services) = agent.ask(&["service", "list"])?;
    let mut shown = String::new();
    // The Services of this demo; an endpoint stands alone on its line.
    let mut of_ours = true;
    for (number, line) in services.lines().enumerate() {
        if number != 0 && !line.starts_with(' ') {
            of_ours = ["default/webui", "kube-system/kube-dns", "default/checkout"]
                .iter()
                .any(|name| line.starts_with(name));
        }
        if of_ours {
            shown.push_str(line.trim_end());
            shown.push('\n');
        }
    }
    screen.quote("proxy-agent service list    (webui, checkout and kube-dns of it)", &shown)
}

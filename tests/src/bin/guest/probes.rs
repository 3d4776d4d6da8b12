//! The probes, in the order in which they are done. Each says one word for the table, or what went wrong.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::manifests::ManifestDir;
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Runner, eventually, get, tally, transfer};
use proxy_tests::test_cluster::PodNetwork;
use serde_json::Value;

use crate::machine;
use crate::report::Reports;
use crate::scene::{BOTH, FAR, NEAR, NONE, SELF, Scene, answered, go_on, growth, refused, served};
use crate::takeover::{Mode, takeover};

/// How long a change may take to be seen on an emulated machine.
const SOON: Duration = Duration::from_secs(30);
/// How long a held connection is held at most.
const HELD: Duration = Duration::from_secs(300);
/// Bytes of a transfer: many segments, also where they are merged.
const BULK: u64 = 1 << 20;

/// Counters of the programs.
const CHOSEN_BY_SOCKET: &str = "socket_translated";
const NEW_FLOW: &str = "new_flow";

/// Does the probes; what cannot be tried because something before it has failed is not said at all.
pub(crate) fn run(reports: &mut Reports, whole: bool) {
    let mut world = None;
    let raised = reports.probe("cluster of namespaces", || {
        world = Some((Scene::raise(PodNetwork::Routed)?, ManifestDir::new()?));
        Ok(String::new())
    });
    if let (true, Some((scene, manifests))) = (raised, &world) {
        routed(reports, scene, manifests, whole);
    }
    drop(world);
    if whole {
        reports.probe("takeover, IPVS", || takeover(Mode::Ipvs));
        reports.probe("takeover, nftables", || takeover(Mode::Nftables));
        reports.probe("VXLAN between nodes", || overlay(PodNetwork::Overlay));
        reports.probe("VXLAN, routed pods", || overlay(PodNetwork::RoutedOverlay));
    }
    reports.probe("kernel log", || {
        let said = machine::warnings()?;
        ensure!(said.is_empty(), "the kernel warns: {}", said.join(" | "));
        Ok("clean".to_owned())
    });
}

fn routed(reports: &mut Reports, scene: &Scene, manifests: &ManifestDir, whole: bool) {
    let cluster = &scene.cluster;
    let (node, pod, outside) = (scene.node(), cluster.place("a"), cluster.place("outside"));
    let mut agent = None;
    reports.probe("doctor", || doctor(agent.insert(scene.agent(manifests, &[])?)));
    let Some(mut agent) = agent else { return };
    let loaded = reports.probe("load and attach", || {
        for service in [NEAR, FAR, NONE, SELF] {
            service.publish(manifests, cluster, |plan| plan)?;
        }
        agent.spawn()?;
        agent.wait_ready()?;
        attached(&agent)
    });
    if !loaded {
        return;
    }
    reports.probe("fall-backs reported", || fall_backs(&agent));

    reports.probe("ClusterIP, pod's socket", || by_socket(&agent, pod));
    reports.probe("ClusterIP, host's socket", || by_socket(&agent, node));
    reports.probe("NodePort, local endpoint", || {
        served(outside, NEAR.node_ports(node), "b", outside.addresses())?;
        Ok(String::new())
    });
    reports.probe("NodePort, remote endpoint", || {
        served(outside, FAR.node_ports(node), "c", node.addresses())?;
        Ok(String::new())
    });
    reports.probe("rejection, socket", || {
        let errors = refused(pod, NONE.vips())?;
        refused(node, NONE.vips())?;
        Ok(errors.join(" "))
    });
    reports.probe("rejection, packet", || Ok(refused(outside, NONE.node_ports(node))?.join(" ")));
    if whole {
        reports.probe("affinity", || affinity(scene, manifests));
        reports.probe("bulk", || {
            for to in [FAR.node_ports(node), NEAR.node_ports(node)].concat() {
                transfer(outside, &Ask::tcp(to), BULK)?;
            }
            Ok(String::new())
        });
    }
    reports.probe("endpoint replaced", || replaced(scene, manifests));
    reports.probe("agent killed and restarted", || restarted(scene, &mut agent));
    // From here on with --socket-lb=host.
    reports.probe("ClusterIP, pod's packets", || by_packet(&agent, pod));
    reports.probe("host and pod told apart", || told_apart(&agent, node, pod));
    if whole {
        reports.probe("rejection, pod's packets", || Ok(refused(pod, NONE.vips())?.join(" ")));
        reports.probe("bulk, pod's packets", || {
            for to in [FAR.vips(), NEAR.vips(), SELF.vips()].concat() {
                transfer(pod, &Ask::tcp(to), BULK)?;
            }
            Ok(String::new())
        });
    }
    reports.probe("cleanup", || cleaned(&mut agent, pod));
}

/// The node is ready, which means that every program could be loaded.
fn doctor(agent: &Agent) -> Result<String> {
    let (_, said) = agent.ask(&["doctor", "--output", "json"])?;
    // What it logs comes after the report.
    let report = serde_json::Deserializer::from_str(&said).into_iter::<Value>().next();
    let report = report.with_context(|| format!("doctor printed: {said}"))??;
    let checks = report["checks"].as_array().context("doctor has no checks")?;
    let failed = checks.iter().filter(|check| check["verdict"] == "fail");
    let failed: Vec<_> = failed.map(|check| format!("{}: {}", check["name"], check["found"])).collect();
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    let programs = checks.iter().find(|check| check["name"] == "programs").context("it loaded nothing")?;
    Ok(programs["found"].as_str().unwrap_or_default().to_owned())
}

/// `status` says what the kernel lacks, as `doctor` does; in a word, how much.
fn fall_backs(agent: &Agent) -> Result<String> {
    let status = agent.status_json()?;
    let reported = status["fall_backs"].as_array().context("status has no fall-backs")?;
    let (_, page) = agent.ask(&["doctor"])?;
    for one in reported {
        let feature = one["feature"].as_str().context("a fall-back without a name")?;
        ensure!(page.contains(&format!("{feature}: ")), "doctor does not know of {feature}:\n{page}");
    }
    Ok(format!("{} reported", reported.len()))
}

/// Every program hangs where it should; in a word, how long it took.
fn attached(agent: &Agent) -> Result<String> {
    let status = agent.status_json()?;
    let links = status["links"].as_array().context("status has no links")?;
    let loose: Vec<_> = links.iter().filter(|link| link["attached"] != true).collect();
    ensure!(loose.is_empty(), "attached to nothing: {loose:?}");
    let hooks = status["socket_hooks"].as_array().context("status has no socket hooks")?.len();
    ensure!(hooks == 8, "{hooks} of 8 socket hooks");
    ensure!(status["agent"]["interfaces_failed"] == 0, "{:#}", status["agent"]);
    let log = agent.log_text();
    let seconds = log.split("ready after ").nth(1).and_then(|rest| rest.split(':').next());
    Ok(seconds.context("the agent's log does not say how long it took")?.trim().to_owned())
}

/// The socket's hooks choose: no packet to the Service is ever sent.
fn by_socket(agent: &Agent, from: &Place) -> Result<String> {
    let chosen = growth(agent, CHOSEN_BY_SOCKET, || {
        answered(from, NEAR.vips(), "b")?;
        answered(from, FAR.vips(), "c")
    })?;
    // Connected UDP sockets may be left to their packets.
    ensure!(chosen >= 8, "only {chosen} of 8 were translated at the socket");
    Ok(String::new())
}

/// The socket's hooks leave the pod alone: its packets are translated.
fn by_packet(agent: &Agent, pod: &Place) -> Result<String> {
    let chosen = growth(agent, CHOSEN_BY_SOCKET, || {
        let flows = growth(agent, NEW_FLOW, || {
            served(pod, NEAR.vips(), "b", pod.addresses())?;
            served(pod, FAR.vips(), "c", pod.addresses())?;
            for to in SELF.vips() {
                let name = get(pod, &Ask::tcp(to)).context("itself")?.name;
                ensure!(name == "a", "{name} answers instead of itself");
            }
            Ok(())
        })?;
        ensure!(flows >= 12, "only {flows} flows were opened");
        Ok(())
    })?;
    ensure!(chosen == 0, "{chosen} were translated at the socket");
    Ok(String::new())
}

/// With `--socket-lb=host` the same hooks act on the host's sockets and leave pods' alone.
fn told_apart(agent: &Agent, host: &Place, pod: &Place) -> Result<String> {
    let ask = |from: &Place| {
        for to in NEAR.vips() {
            get(from, &Ask::tcp(to))?;
            get(from, &Ask::udp(to))?;
        }
        Ok(())
    };
    let of_host = growth(agent, CHOSEN_BY_SOCKET, || ask(host))?;
    let of_pod = growth(agent, CHOSEN_BY_SOCKET, || ask(pod))?;
    ensure!(of_host == 4 && of_pod == 0, "{of_host} of 4 of the host's and {of_pod} of the pod's sockets");
    Ok(String::new())
}

fn affinity(scene: &Scene, manifests: &ManifestDir) -> Result<String> {
    let _endpoints = BOTH.publish(manifests, &scene.cluster, |plan| plan.affinity(600))?;
    let pod = scene.cluster.place("a");
    for to in BOTH.vips() {
        eventually(SOON, || get(pod, &Ask::tcp(to)))?;
        let names = tally(pod, &Ask::tcp(to), 10)?;
        ensure!(names.len() == 1, "{to}: {names:?}");
    }
    Ok(String::new())
}

/// New connections go to the new endpoint.
fn replaced(scene: &Scene, manifests: &ManifestDir) -> Result<String> {
    let cluster = &scene.cluster;
    let mut endpoints = BOTH.publish(manifests, cluster, |plan| plan)?;
    let pod = cluster.place("a");
    endpoints.replace(&[cluster.place("c")])?;
    for to in BOTH.vips() {
        eventually(SOON, || {
            let names = tally(pod, &Ask::tcp(to), 4)?;
            ensure!(names.keys().eq(["c"]), "{names:?}");
            Ok(())
        })?;
    }
    Ok(String::new())
}

/// Nothing breaks and nothing fails while the agent is dead, nor when another takes over.
fn restarted(scene: &Scene, agent: &mut Agent) -> Result<String> {
    let (node, pod, outside) = (scene.node(), scene.cluster.place("a"), scene.cluster.place("outside"));
    let mut holds = Vec::new();
    for (from, to) in [FAR.node_ports(node).map(|to| (outside, to)), FAR.vips().map(|to| (pod, to))].concat()
    {
        let ask = Ask::tcp(to).timeout(Duration::from_secs(10));
        let hold = Runner::hold(from, &ask, Duration::from_millis(250), HELD)?;
        holds.push((format!("{} → {to}", from.name), hold));
    }
    go_on(&mut holds)?;
    agent.kill()?;
    served(pod, NEAR.vips(), "b", pod.addresses()).context("without an agent")?;
    served(outside, FAR.node_ports(node), "c", node.addresses()).context("without an agent")?;
    agent.further(&["--socket-lb=host"]);
    agent.spawn()?;
    agent.wait_ready()?;
    go_on(&mut holds)?;
    let mut exchanges = 0;
    for (what, hold) in holds {
        let end = hold.stop()?;
        ensure!(end.failed == 0, "{what}: {end:?}");
        exchanges += end.made;
    }
    Ok(format!("{exchanges} exchanges held"))
}

/// No pin, no program, no map, no Service; and pods still reach each other.
fn cleaned(agent: &mut Agent, pod: &Place) -> Result<String> {
    let status = agent.stop()?;
    ensure!(status.success(), "SIGTERM: {status}");
    let (status, said) = agent.ask(&["cleanup"])?;
    ensure!(status.success(), "cleanup: {status}: {said}");
    let left = std::fs::read_dir(agent.bpf_root()).map_or(0, Iterator::count);
    ensure!(left == 0, "{left} things are left in {}", agent.bpf_root().display());
    // The kernel frees programs a little later than links.
    eventually(SOON, || {
        let programs = aya::programs::loaded_programs().count();
        let maps = aya::maps::loaded_maps().count();
        ensure!(programs == 0 && maps == 0, "{programs} programs and {maps} maps are left");
        Ok(())
    })?;
    for to in NEAR.vips() {
        let answered = get(pod, &Ask::tcp(to).timeout(Duration::from_millis(500)));
        ensure!(answered.is_err(), "the Service still answers: {answered:?}");
    }
    Ok(String::new())
}

/// The same packets inside VXLAN.
fn overlay(network: PodNetwork) -> Result<String> {
    let (scene, manifests) = (Scene::raise(network)?, ManifestDir::new()?);
    let cluster = &scene.cluster;
    for service in [NEAR, FAR] {
        service.publish(&manifests, cluster, |plan| plan)?;
    }
    let mut agent = scene.agent(&manifests, &["--socket-lb=host"])?;
    agent.spawn()?;
    agent.wait_ready()?;
    let (node, pod, outside) = (scene.node(), cluster.place("a"), cluster.place("outside"));
    served(pod, FAR.vips(), "c", pod.addresses())?;
    served(outside, NEAR.node_ports(node), "b", outside.addresses())?;
    // Which of its addresses a node masquerades with depends on the way to the pod.
    answered(outside, FAR.node_ports(node), "c")?;
    for to in FAR.node_ports(node) {
        transfer(outside, &Ask::tcp(to), BULK)?;
    }
    Ok(String::new())
}

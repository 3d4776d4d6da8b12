//! Somebody detaches programs, removes pins, writes to tables: noticed, undone, counted and said, without a restart.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya_obj::generated::{bpf_attach_type, bpf_prog_type};
use proxy_tests::agent::Agent;
use proxy_tests::apiserver::ApiServer;
use proxy_tests::chaos::bpf;
use proxy_tests::chaos::sabotage::{Sabotage, contents, pins};
use proxy_tests::manifests::{EndpointController, Phase};
use proxy_tests::object::{Object, Publish};
use proxy_tests::probe::{Ask, Server, eventually, wait};
use proxy_tests::require::agent_binary;
use proxy_tests::test_cluster::TestCluster;

use crate::api_server::server;
use crate::common::manifests;
use crate::events::event;
use crate::health::http;
use crate::life::{
    FLAGS, Holds, Loads, SOON, answers, node_ports, one_node, servers, service, with_node_ports,
};

/// A node with a Service, its server and its agent.
struct Scene {
    agent: Agent,
    _servers: Vec<Server>,
    cluster: TestCluster,
}

const NODE_PORT: u16 = 30_080;

fn publish<'a>(to: &'a dyn Publish, cluster: &TestCluster) -> Result<EndpointController<'a>> {
    to.publish(&Object::from(&with_node_ports("web", 1, NODE_PORT).source_ranges(&["0.0.0.0/0"]).build()))?;
    let mut web = EndpointController::new(to, "web", &[("tcp", "TCP", 8080), ("udp", "UDP", 8080)])?;
    web.set(cluster.place("b"), Phase::Ready)?;
    Ok(web)
}

impl Scene {
    fn raise(to: &ApiServer, cluster: TestCluster) -> Result<Self> {
        let servers = servers(&cluster, &["b"])?;
        publish(to, &cluster)?;
        let agent = Agent::start(&cluster, "node1", to, &FLAGS)?;
        Ok(Self { agent, _servers: servers, cluster })
    }

    /// A pod through its packets and its sockets, the host, and a client outside all reach the Service anew.
    fn serves(&self) -> Result<()> {
        for n in 0..2 {
            answers(self.cluster.place("a"), service(1)[n], "b")?;
            answers(self.cluster.place("h1"), service(1)[n], "b")?;
            answers(self.cluster.place("outside"), node_ports(&self.cluster, "node1", NODE_PORT)[n], "b")?;
        }
        Ok(())
    }

    /// How often something of this kind has been restored.
    fn repairs(&self, what: &str) -> Result<u64> {
        let page = http(self.cluster.place("node1"), "127.0.0.1:10249", "/metrics")?.1;
        let name = format!("proxy_agent_repairs_total{{what=\"{what}\"}} ");
        let line = page.lines().find_map(|line| line.strip_prefix(&name)).context("no such metric")?;
        Ok(line.parse::<f64>()? as u64)
    }

    /// Waits until that is so many more than before.
    fn repaired(&self, what: &str, before: u64, more: usize, within: Duration) -> Result<()> {
        eventually(within, || {
            let now = self.repairs(what)?;
            ensure!(now >= before + more as u64, "{what}: {now} after {before}, not {more} more");
            Ok(())
        })
        .with_context(|| self.agent.log_text())
    }

    fn healthz(&self) -> Result<u16> {
        Ok(http(self.cluster.place("node1"), "127.0.0.1:10256", "/healthz")?.0)
    }
}

/// Agents look twice a second; the rest is for a machine that is busy with other tests.
const SECONDS: Duration = Duration::from_secs(5);

#[test]
fn detached_links_and_replaced_programs_are_restored_within_seconds_and_told() -> Result<()> {
    // Y-20.
    let cluster = one_node(&["a", "b"])?;
    let server = server(&cluster)?;
    let scene = Scene::raise(&server, cluster)?;
    scene.serves()?;
    // Connections that are open all the while: what is lost is sent again. (From outside the node itself would answer what
    // nobody translates, with a RST.)
    let mut held = Holds::default();
    for to in [service(1)[0], service(1)[1]] {
        held.add(scene.cluster.place("a"), "holds", &Ask::tcp(to).timeout(Duration::from_secs(20)))?;
    }
    held.go_on(3)?;
    for (sabotage, what) in [
        (Sabotage::DetachInterfaces, "link"),
        (Sabotage::DetachSockets, "link"),
        (Sabotage::ReplacePrograms, "program"),
    ] {
        let before = scene.repairs(what)?;
        let hurt = sabotage.commit(&scene.agent)?;
        scene.repaired(what, before, hurt, SECONDS).context(sabotage.name())?;
        scene.serves().context(sabotage.name())?;
        held.go_on(3).context(sabotage.name())?;
        ensure!(scene.healthz()? == 200, "{}", sabotage.name());
    }
    held.end()?;
    let emitted = event(&server, "RestoredDataPath")?;
    ensure!(emitted["type"] == "Warning" && emitted["regarding"]["name"] == "node1", "{emitted:#}");
    ensure!(emitted["note"].as_str().is_some_and(|note| note.contains("tc_")), "{emitted:#}");
    let log = scene.agent.log_text();
    ensure!(log.contains("link tc_egress at interface eth0"), "{log}");
    // The record that it reads is renewed every few seconds.
    eventually(SECONDS, || {
        let (code, page) = scene.agent.ask(&["status"])?;
        ensure!(
            code.success() && page.contains("removed or changed by somebody else and restored"),
            "{page}"
        );
        Ok(())
    })
}

#[test]
fn pins_that_somebody_removes_come_back_and_nothing_is_lost_meanwhile() -> Result<()> {
    let cluster = one_node(&["a", "b"])?;
    let server = server(&cluster)?;
    let scene = Scene::raise(&server, cluster)?;
    scene.serves()?;
    let mut loads = Loads::default();
    loads.add(scene.cluster.place("a"), service(1)[0])?;
    loads.add(scene.cluster.place("h1"), service(1)[1])?;
    for to in node_ports(&scene.cluster, "node1", NODE_PORT) {
        loads.add(scene.cluster.place("outside"), to)?;
    }
    let before = (links(&scene.agent)?, pins(&scene.agent)?);
    for sabotage in Sabotage::ALL.into_iter().filter(|sabotage| sabotage.is_harmless()) {
        let repaired = scene.repairs("pin")?;
        sabotage.commit(&scene.agent)?;
        scene.repaired("pin", repaired, 1, SECONDS).context(sabotage.name())?;
        eventually(SECONDS, || {
            let (code, page) = scene.agent.ask(&["status"])?;
            ensure!(code.success(), "{page}");
            let now = (links(&scene.agent)?, pins(&scene.agent)?);
            ensure!(now == before, "{now:?}, not {before:?}");
            Ok(())
        })
        .with_context(|| format!("after {}\n{}", sabotage.name(), scene.agent.log_text()))?;
        loads.go_on(10).context(sabotage.name())?;
    }
    loads.end()?;
    // The same links, never detached.
    ensure!(scene.repairs("link")? == 0 && scene.repairs("program")? == 0, "{}", scene.agent.log_text());
    // Nobody else can take its place, on the new file system either.
    let (code, said) = scene.agent.ask(&["run", "--apiserver", &server.url()])?;
    ensure!(code.code() == Some(1) && said.contains("another agent runs with --bpf-root"), "{said}");
    Ok(())
}

/// Pins of links with the ids of the programs behind them.
fn links(agent: &Agent) -> Result<serde_json::Value> {
    Ok(agent.status_json()?["links"].clone())
}

#[test]
fn entries_that_somebody_deletes_changes_or_adds_are_as_they_were_within_a_minute() -> Result<()> {
    // Y-20.
    let cluster = one_node(&["a", "b"])?;
    let server = server(&cluster)?;
    let scene = Scene::raise(&server, cluster)?;
    scene.serves()?;
    let before = contents(&scene.agent)?;
    ensure!(before.len() > 20, "{before:?}");
    let repaired = scene.repairs("entry")?;
    let mut hurt = 0;
    // What was added would be deleted with the rest.
    for sabotage in [Sabotage::DeleteEntries, Sabotage::ZeroElements, Sabotage::AddEntries] {
        hurt += sabotage.commit(&scene.agent)?;
    }
    let within = Sabotage::DeleteEntries.undone_within();
    eventually(within, || {
        let now = contents(&scene.agent)?;
        let missing: Vec<_> = before.iter().filter(|entry| !now.contains(entry)).collect();
        let extra: Vec<_> = now.iter().filter(|entry| !before.contains(entry)).collect();
        ensure!(missing.is_empty() && extra.is_empty(), "missing {missing:?}, extra {extra:?}");
        Ok(())
    })
    .with_context(|| scene.agent.log_text())?;
    scene.repaired("entry", repaired, hurt, SECONDS)?;
    scene.serves()?;
    // What is as it should be is left alone.
    let restored = scene.repairs("entry")?;
    wait(Duration::from_secs(1), "entries that are right are not written again");
    ensure!(scene.repairs("entry")? == restored, "{}", scene.agent.log_text());
    Ok(())
}

/// So many programs of somebody else at a hook that there is no room for another; they go when this is dropped.
fn crowd(cluster: &TestCluster, interface: &str) -> Result<Vec<OwnedFd>> {
    let hook = bpf_attach_type::BPF_TCX_INGRESS;
    let attach = || -> Result<Vec<OwnedFd>> {
        let index = nix::net::if_::if_nametoindex(interface)?;
        let one = || {
            let program = bpf::idle_program(bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS, hook)?;
            bpf::attach(program.as_fd(), index, hook)
        };
        let mut all = Vec::new();
        loop {
            match one() {
                Ok(link) => all.push(link),
                // As many as the kernel takes (`BPF_MPROG_MAX`).
                Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ERANGE as i32) => {
                    return Ok(all);
                }
                Err(error) => return Err(error).context("attaching somebody else's program"),
            }
        }
    };
    cluster.place("node1").netns.run_in(attach)?
}

#[test]
fn an_interface_that_refuses_its_programs_is_told_and_tried_again_and_holds_up_no_other() -> Result<()> {
    let cluster = one_node(&["a", "b"])?;
    let server = server(&cluster)?;
    let _servers = servers(&cluster, &["b"])?;
    let _web = publish(&server, &cluster)?;
    let crowd = crowd(&cluster, "eth0")?;
    let mut agent = Agent::prepare(&agent_binary()?, &cluster, "node1", &server, &FLAGS)?;
    agent.spawn()?;
    // The pod's own interface carries programs.
    answers(cluster.place("a"), service(1)[0], "b")?;
    let emitted = event(&server, "FailedToAttachPrograms")?;
    ensure!(
        emitted["type"] == "Warning" && emitted["note"].as_str().is_some_and(|n| n.contains("eth0")),
        "{emitted:#}"
    );
    let healthz = || Ok::<_, anyhow::Error>(http(cluster.place("node1"), "127.0.0.1:10256", "/healthz")?.0);
    ensure!(healthz()? == 503, "/healthz does not tell");
    ensure!(http(cluster.place("node1"), "127.0.0.1:10256", "/livez")?.0 == 200, "a restart would not help");
    let status = eventually(SOON, || {
        let status = agent.status_json()?;
        ensure!(status["agent"]["interfaces_failed"] == 1, "{status:#}");
        Ok(status)
    })?;
    let problems = status["problems"].to_string();
    ensure!(status["healthy"] == false && problems.contains("interface eth0"), "{status:#}");
    let metrics = http(cluster.place("node1"), "127.0.0.1:10249", "/metrics")?.1;
    ensure!(metrics.contains("proxy_agent_interfaces_failed 1"), "{metrics}");
    drop(crowd);
    for to in node_ports(&cluster, "node1", NODE_PORT) {
        answers(cluster.place("outside"), to, "b")?;
    }
    event(&server, "AttachedPrograms")?;
    ensure!(healthz()? == 200, "/healthz still tells");
    agent.wait_ready()
}

#[test]
fn a_cgroup_that_refuses_a_program_is_told_and_tried_again_and_holds_up_no_interface() -> Result<()> {
    let cluster = one_node(&["a", "b"])?;
    let server = server(&cluster)?;
    let _servers = servers(&cluster, &["b"])?;
    let _web = publish(&server, &cluster)?;
    // Somebody else's program that wants to be alone, at one of the hooks in the middle.
    let hook = bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG;
    let cgroup = File::open(cluster.cgroup_root("node1"))?;
    let program = bpf::idle_program(bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR, hook)?;
    bpf::attach_alone(program.as_fd(), cgroup.as_fd(), hook)?;
    let mut agent = Agent::prepare(&agent_binary()?, &cluster, "node1", &server, &FLAGS)?;
    agent.spawn()?;
    // What passes an interface is served.
    for to in node_ports(&cluster, "node1", NODE_PORT) {
        answers(cluster.place("outside"), to, "b")?;
    }
    let emitted = event(&server, "FailedToAttachPrograms")?;
    ensure!(emitted["note"].as_str().is_some_and(|note| note.contains("cgroup ")), "{emitted:#}");
    let healthz = || Ok::<_, anyhow::Error>(http(cluster.place("node1"), "127.0.0.1:10256", "/healthz")?.0);
    ensure!(healthz()? == 503, "/healthz does not tell");
    let status = eventually(SOON, || {
        let status = agent.status_json()?;
        let problems = status["problems"].to_string();
        ensure!(problems.contains("cannot attach program sendmsg4 to cgroup"), "{status:#}");
        Ok(status)
    })?;
    ensure!(status["healthy"] == false && status["agent"]["interfaces_failed"] == 0, "{status:#}");
    // All of them or none: a socket that is translated at one hook alone would get no answer.
    let of_sockets = || -> Result<usize> {
        let status = agent.status_json()?;
        let links = status["links"].as_array().context("links")?;
        Ok(links.iter().filter(|link| link.to_string().contains("cgroup_")).count())
    };
    ensure!(of_sockets()? == 0, "{:#}", agent.status_json()?["links"]);
    wait(Duration::from_secs(4), "the program is tried again, and that is logged once");
    let refused = agent.log_text().matches("cannot attach program sendmsg4").count();
    ensure!(refused == 1, "{refused} lines:\n{}", agent.log_text());
    bpf::detach_alone(program.as_fd(), cgroup.as_fd(), hook)?;
    for to in service(1) {
        answers(cluster.place("h1"), to, "b")?;
    }
    event(&server, "AttachedPrograms")?;
    ensure!(of_sockets()? == 8, "{:#}", agent.status_json()?["links"]);
    agent.wait_ready()?;
    ensure!(healthz()? == 200, "/healthz still tells");
    Ok(())
}

#[test]
fn an_interface_that_is_away_for_a_while_carries_programs_again() -> Result<()> {
    // Back under the same index and name, with nothing left of what was attached, or all of it.
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let _web = publish(&dir, &cluster)?;
    let _agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let (node, to) = (cluster.place("node1"), node_ports(&cluster, "node1", NODE_PORT)[0]);
    answers(cluster.place("outside"), to, "b")?;
    let other = proxy_tests::netns::Netns::new("away")?;
    node.netns.ip(&format!("link set eth0 netns {}\n", other.name()))?;
    other.output("ip", &["link", "set", "eth0", "netns", node.netns.name()])?;
    node.netns.ip(&format!("link set eth0 up\naddr add {}/24 dev eth0\n", node.v4))?;
    answers(cluster.place("outside"), to, "b")
}

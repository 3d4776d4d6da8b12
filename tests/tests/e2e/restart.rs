//! An agent that ends, in whatever way, changes nothing; one that starts again changes only what is new (Y-22).

use anyhow::{Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::manifests::Phase;
use proxy_tests::object::{Key, Kind, Publish};
use proxy_tests::probe::Ask;
use proxy_tests::test_cluster::PodNetwork;

use crate::common::{manifests, two_nodes, web};
use crate::life::{
    FLAGS, Holds, Loads, answers, fails, generation, node_ports, one_node, servers, service, tables,
    with_node_ports,
};

/// A cluster under load: new connections by every way there is, and sockets that are held. What happens to the
/// agent meanwhile is the test's.
fn under_load(
    socket_lb: &str,
    play: impl Fn(&mut Agent, &mut Loads, &mut Holds) -> Result<()>,
) -> Result<()> {
    let cluster = two_nodes(PodNetwork::Routed)?;
    let dir = manifests()?;
    let _servers = servers(&cluster, &["b", "c"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b", "c"], |_| with_node_ports("web", 1, 30080))?;
    // Its endpoint is on the other node: from outside it is masqueraded.
    let _far = web(&dir, &cluster, "far", 2, &["c"], |_| with_node_ports("far", 2, 30081))?;
    let socket_lb = format!("--socket-lb={socket_lb}");
    let mut agent = Agent::start(&cluster, "node1", &dir, &[&FLAGS[..], &[&socket_lb]].concat())?;
    let (mut loads, mut holds) = (Loads::default(), Holds::default());
    let (pod, outside) = (cluster.place("a"), cluster.place("outside"));
    for to in service(1) {
        loads.add(pod, to)?;
        loads.add(cluster.place("h1"), to)?;
    }
    for to in node_ports(&cluster, "node1", 30080) {
        loads.add(outside, to)?;
    }
    for to in node_ports(&cluster, "node1", 30081) {
        holds.add(outside, &format!("holds {to}/TCP"), &Ask::tcp(to))?;
        holds.add(outside, &format!("holds {to}/UDP"), &Ask::udp(to))?;
    }
    for to in service(2) {
        holds.add(pod, &format!("holds {to}/TCP"), &Ask::tcp(to))?;
        holds.add(pod, &format!("holds {to}/UDP"), &Ask::udp(to))?;
    }
    loads.go_on(5)?;
    holds.go_on(5)?;
    play(&mut agent, &mut loads, &mut holds)?;
    loads.end()?;
    holds.end()
}

/// Ends the agent, looks at what goes on without it, starts it again.
fn end_and_start(
    agent: &mut Agent,
    loads: &mut Loads,
    holds: &mut Holds,
    end: impl Fn(&mut Agent) -> Result<()>,
) -> Result<()> {
    let before = tables(agent)?;
    end(agent)?;
    loads.go_on(10)?;
    holds.go_on(5)?;
    ensure!(tables(agent)? == before, "ending changed something:\n{before:#}\n{:#}", tables(agent)?);
    agent.spawn()?;
    agent.wait_ready()?;
    loads.go_on(10)?;
    holds.go_on(5)?;
    ensure!(tables(agent)? == before, "starting changed something:\n{before:#}\n{:#}", tables(agent)?);
    ensure!(generation(agent)? == 0, "the new agent has written: {:#}", agent.status_json()?["agent"]);
    let log = agent.log_text();
    let line = log.lines().rfind(|line| line.contains("ready after")).unwrap_or_default();
    ensure!(line.contains(", 0 writes"), "{log}");
    Ok(())
}

fn killed(agent: &mut Agent) -> Result<()> {
    agent.kill()
}

fn told_to_end(agent: &mut Agent) -> Result<()> {
    let status = agent.stop()?;
    ensure!(status.success(), "SIGTERM: {status}\n{}", agent.log_text());
    Ok(())
}

#[test]
fn no_connection_fails_and_none_breaks_when_the_agent_is_restarted_with_socket_lb() -> Result<()> {
    under_load("all", |agent, loads, holds| {
        end_and_start(agent, loads, holds, killed)?;
        end_and_start(agent, loads, holds, told_to_end)
    })
}

#[test]
fn no_connection_fails_and_none_breaks_when_the_agent_is_restarted_with_pods_left_to_tc() -> Result<()> {
    under_load("host", |agent, loads, holds| {
        end_and_start(agent, loads, holds, killed)?;
        end_and_start(agent, loads, holds, told_to_end)
    })
}

#[test]
fn what_changed_while_the_agent_was_away_is_in_force_after_its_first_pass() -> Result<()> {
    let cluster = one_node(&["a", "b", "c"])?;
    let dir = manifests()?;
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut moved = web(&dir, &cluster, "moved", 1, &["b"], |_| with_node_ports("moved", 1, 30080))?;
    let gone = web(&dir, &cluster, "gone", 2, &["b"], |_| with_node_ports("gone", 2, 30081))?;
    let _kept = web(&dir, &cluster, "kept", 3, &["b"], |_| with_node_ports("kept", 3, 30082))?;
    let mut agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let (pod, outside) = (cluster.place("a"), cluster.place("outside"));
    let before = tables(&agent)?;
    agent.kill()?;
    moved.set(cluster.place("b"), Phase::Terminating)?;
    moved.set(cluster.place("c"), Phase::Ready)?;
    gone.withdraw()?;
    dir.retract(&Key { kind: Kind::Service, namespace: "default".into(), name: "gone".into() })?;
    let _new = web(&dir, &cluster, "new", 4, &["c"], |_| with_node_ports("new", 4, 30084))?;
    // Nobody has observed it.
    ensure!(tables(&agent)? == before, "somebody has written while no agent ran");
    for n in [1, 2, 3] {
        answers(pod, service(n)[0], "b")?;
    }
    agent.spawn()?;
    agent.wait_ready()?;
    for i in [0, 1] {
        answers(pod, service(1)[i], "c")?;
        answers(pod, service(3)[i], "b")?;
        answers(pod, service(4)[i], "c")?;
        answers(outside, node_ports(&cluster, "node1", 30080)[i], "c")?;
        answers(outside, node_ports(&cluster, "node1", 30084)[i], "c")?;
        // Y-22: its NodePort is an ordinary port of the node again, at which nobody listens.
        fails(outside, node_ports(&cluster, "node1", 30081)[i], "connect ECONNREFUSED")?;
    }
    let listed = agent.service_list_json()?.to_string();
    ensure!(!listed.contains("default/gone") && listed.contains("default/new"), "{listed}");
    Ok(())
}

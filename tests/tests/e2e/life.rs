//! What tests of the agent's life share: a small cluster under load, and tables as they can be compared.

use std::fmt::Debug;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::answer::{Hold, Load};
use proxy_tests::manifests::ServicePlan;
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Runner, Server, eventually, eventually_by_command, get};
use proxy_tests::test_cluster::{Plan, TestCluster};
use serde::de::DeserializeOwned;
use serde_json::Value;

pub(crate) use proxy_tests::agent::FLAGS;

use crate::common::vips;

/// How long a change may take to be seen, on a machine that is busy with other tests.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// How long a load runs when nobody stops it.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// `node1` with these pods and a host-network pod `h1`, and a client outside that knows no Service address.
pub(crate) fn one_node(pods: &[&str]) -> Result<TestCluster> {
    Plan::default().node("node1", pods).host_pod("h1").client("outside").raise()
}

/// The two NodePort addresses of a node.
pub(crate) fn node_ports(cluster: &TestCluster, node: &str, port: u16) -> [SocketAddr; 2] {
    cluster.place(node).at(port)
}

/// A Service over TCP and UDP with a NodePort of the same number for both.
pub(crate) fn with_node_ports(name: &str, n: u8, node_port: u16) -> ServicePlan {
    ServicePlan::new(name, &vips(n))
        .port("tcp", "TCP", 80, 8080)
        .node_port(node_port)
        .port("udp", "UDP", 80, 8080)
        .node_port(node_port)
}

/// The ClusterIPs of a Service with its port.
pub(crate) fn service(n: u8) -> [SocketAddr; 2] {
    vips(n).map(|vip| SocketAddr::new(vip, 80))
}

/// Servers in these pods.
pub(crate) fn servers(cluster: &TestCluster, pods: &[&str]) -> Result<Vec<Server>> {
    pods.iter().map(|pod| Server::start(cluster.place(pod), &[8080])).collect()
}

/// Loads of new connections, each with a word for what it is.
#[derive(Default)]
pub(crate) struct Loads(Vec<(String, Runner<Load>)>);

impl Loads {
    /// Adds a load from a place.
    pub(crate) fn add(&mut self, place: &Place, to: SocketAddr) -> Result<()> {
        let runner = Runner::load(place, &Ask::tcp(to).timeout(Duration::from_secs(5)), 100, 2, LIMIT)?;
        self.0.push((format!("{} → {to}", place.name), runner));
        Ok(())
    }

    /// Waits until each of them has been answered this many times more.
    pub(crate) fn go_on(&mut self, answers: u64) -> Result<()> {
        go_on(&mut self.0, |now| (now.made, now.failed), answers)
    }

    /// Waits until only servers of these names answer any of them.
    pub(crate) fn only(&mut self, names: &[&str]) -> Result<()> {
        for (what, runner) in &mut self.0 {
            eventually(SOON, || {
                let before = runner.report()?;
                let now = eventually(SOON, || {
                    let now = runner.report()?;
                    ensure!(now.made >= before.made + 10, "{what} stands still: {now:?}");
                    Ok(now)
                })?;
                let grown = now.names.iter().filter(|(name, n)| before.names.get(*name) != Some(*n));
                let strangers: Vec<_> = grown.filter(|(name, _)| !names.contains(&name.as_str())).collect();
                ensure!(strangers.is_empty(), "{what}: {strangers:?} still answer");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// What each of them has counted so far.
    pub(crate) fn reports(&mut self) -> Result<Vec<(&str, Load)>> {
        self.0.iter_mut().map(|(what, runner)| Ok((what.as_str(), runner.report()?))).collect()
    }

    /// Ends them; none may have failed.
    pub(crate) fn end(self) -> Result<()> {
        for (what, runner) in self.0 {
            let load = runner.stop()?;
            ensure!(load.failed == 0 && load.made > 0, "{what}: {load:?}");
        }
        Ok(())
    }
}

/// Sockets that are used all the time, each with a word for what it is.
#[derive(Default)]
pub(crate) struct Holds(Vec<(String, Runner<Hold>)>);

impl Holds {
    /// Adds one.
    pub(crate) fn add(&mut self, place: &Place, what: &str, ask: &Ask) -> Result<()> {
        let runner = Runner::hold(place, ask, Duration::from_millis(20), LIMIT)?;
        self.0.push((format!("{} {what}", place.name), runner));
        Ok(())
    }

    /// Waits until each of them has been answered this many times more.
    pub(crate) fn go_on(&mut self, answers: u64) -> Result<()> {
        go_on(&mut self.0, |now| (now.made, now.failed), answers)
    }

    /// Ends them; none may have lost an answer, and each has spoken to one server only.
    pub(crate) fn end(self) -> Result<()> {
        for (what, runner) in self.0 {
            let hold = runner.stop()?;
            ensure!(hold.failed == 0 && hold.broke.is_none() && hold.names.len() == 1, "{what}: {hold:?}");
        }
        Ok(())
    }
}

/// Waits until each client has been answered this many times more, of what it counts as made and as failed.
fn go_on<T: DeserializeOwned + Debug>(
    clients: &mut [(String, Runner<T>)],
    counts: impl Fn(&T) -> (u64, u64),
    answers: u64,
) -> Result<()> {
    for (what, runner) in clients {
        let (before, _) = counts(&runner.report()?);
        eventually(SOON, || {
            let now = runner.report()?;
            let (made, failed) = counts(&now);
            ensure!(failed == 0, "{what}: {now:?}");
            ensure!(made >= before + answers, "{what} stands still: {now:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// The tables and what is attached, without what traffic and time change by themselves.
pub(crate) fn tables(agent: &Agent) -> Result<Value> {
    let status = agent.status_json()?;
    let mut all = serde_json::json!({
        "services": agent.service_list_json()?,
        "backends": agent.json(&["backend", "list", "--output", "json"])?,
        "links": status["links"],
        "frontends": status["frontends"],
    });
    forget(&mut all, &["rejected", "dropped", "connections"]);
    Ok(all)
}

/// Removes these fields everywhere.
fn forget(value: &mut Value, fields: &[&str]) {
    match value {
        Value::Object(map) => {
            map.retain(|key, _| !fields.contains(&key.as_str()));
            map.values_mut().for_each(|value| forget(value, fields));
        }
        Value::Array(values) => values.iter_mut().for_each(|value| forget(value, fields)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Passes that changed a table, by the agent that runs.
pub(crate) fn generation(agent: &Agent) -> Result<u64> {
    agent.status_json()?["agent"]["generation"].as_u64().context("status has no generation")
}

/// Waits until somebody of this name answers.
pub(crate) fn answers(place: &Place, to: SocketAddr, name: &str) -> Result<()> {
    eventually(SOON, || {
        let answer = get(place, &quick(to))?;
        ensure!(answer.name == name, "{} answers at {to}, not {name}", answer.name);
        Ok(())
    })
}

/// Waits until a request fails in this way.
pub(crate) fn fails(place: &Place, to: SocketAddr, how: &str) -> Result<()> {
    eventually(SOON, || {
        let request = proxy_tests::probe::request(place, &quick(to))?;
        ensure!(request.failure.as_deref() == Some(how), "{} → {to}: {request:?}, not {how}", place.name);
        Ok(())
    })
}

/// Waits until nobody answers there, in whatever way.
pub(crate) fn nobody_answers(place: &Place, to: SocketAddr) -> Result<()> {
    eventually(SOON, || {
        let request = proxy_tests::probe::request(place, &quick(to))?;
        ensure!(request.answer.is_none(), "{} → {to}: {request:?}", place.name);
        Ok(())
    })
}

/// TCP that gives up soon.
pub(crate) fn quick(to: SocketAddr) -> Ask {
    Ask::tcp(to).timeout(Duration::from_millis(500))
}

/// Waits until `status` satisfies a wish.
pub(crate) fn status_until(agent: &Agent, what: &str, wish: impl Fn(&Value) -> bool) -> Result<Value> {
    eventually_by_command(SOON, || {
        let status = agent.status_json()?;
        ensure!(wish(&status), "{what}: {status:#}");
        Ok(status)
    })
}

/// Waits until a warning of `status` contains all of these words, or, with `false`, until none does.
pub(crate) fn warns(agent: &Agent, words: &[&str], wanted: bool) -> Result<()> {
    let about = |line: &str| words.iter().all(|word| line.contains(word));
    status_until(agent, &format!("warnings about {words:?}: {wanted}"), |status| {
        let lines = status["object_warnings"].as_array().map_or(&[][..], Vec::as_slice);
        lines.iter().filter_map(Value::as_str).any(about) == wanted
    })
    .map(drop)
}

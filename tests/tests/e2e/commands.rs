//! The command line on a node that works: what an operator types and reads.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::probe::{Ask, Runner, eventually, get};
use proxy_tests::test_cluster::PodNetwork;
use serde_json::Value;

use crate::common::{manifests, two_nodes, web};
use crate::life::{FLAGS, LIMIT, SOON, node_ports, servers, service, status_until, with_node_ports};

/// Long enough that a held socket says nothing more once it has been answered.
const QUIET: Duration = Duration::from_secs(60);

fn rows(value: Value) -> Result<Vec<Value>> {
    value.as_array().cloned().with_context(|| format!("not a list: {value}"))
}

/// What a listing prints must have these words in one of its lines, in this order.
fn has_line(text: &str, words: &[&str]) -> Result<()> {
    let has = |line: &str| {
        words.iter().try_fold(line, |rest, word| rest.split_once(word).map(|(_, rest)| rest)).is_some()
    };
    ensure!(text.lines().any(has), "no line with {words:?}:\n{text}");
    Ok(())
}

#[test]
fn listings_show_services_endpoints_and_a_held_flow_and_flush_removes_just_that() -> Result<()> {
    let (cluster, dir) = (two_nodes(PodNetwork::Routed)?, manifests()?);
    let _servers = servers(&cluster, &["b", "c"])?;
    let _far = web(&dir, &cluster, "far", 1, &["c"], |_| with_node_ports("far", 1, 30081))?;
    let flags = [&FLAGS[..], &["--socket-lb=host"]].concat();
    let agent = Agent::start(&cluster, "node1", &dir, &flags)?;
    let (outside, node) = (cluster.place("outside"), cluster.place("node1"));
    let to = node_ports(&cluster, "node1", 30081)[0];
    let endpoint = format!("{}:8080", cluster.place("c").v4);
    let mut held = [
        Runner::hold(outside, &Ask::tcp(to).from_port(40001), QUIET, LIMIT)?,
        Runner::hold(cluster.place("a"), &Ask::tcp(service(1)[0]).from_port(40002), QUIET, LIMIT)?,
    ];
    for held in &mut held {
        eventually(SOON, || {
            let held = held.report()?;
            ensure!(held.made == 1, "{held:?}");
            Ok(())
        })?;
    }
    let text = |arguments: &[&str]| -> Result<String> {
        let (status, text) = agent.ask(arguments)?;
        ensure!(status.success(), "{arguments:?}: {status}\n{text}");
        Ok(text)
    };

    let flows = || rows(agent.json(&["conntrack", "list", "--output", "json"])?);
    let client = format!("{}:40001", outside.v4);
    let flow = flows()?.into_iter().find(|flow| flow["client"] == client.as_str()).context("no flow")?;
    for (field, value) in [
        ("protocol", "TCP"),
        ("destination", &to.to_string()),
        ("endpoint", &endpoint),
        ("state", "established"),
        ("service", "default/far:tcp"),
    ] {
        ensure!(flow[field] == value, "{field} is not {value}: {flow:#}");
    }
    let masquerade = flow["masquerade"].as_str().context("it is not masqueraded")?;
    ensure!(masquerade.starts_with(&format!("{}:", node.v4)), "{flow:#}");
    let list = text(&["conntrack", "list"])?;
    has_line(&list, &["PROTO", "CLIENT", "DESTINATION", "ENDPOINT", "MASQUERADED AS", "STATE", "SERVICE"])?;
    has_line(
        &list,
        &["TCP", &client, &to.to_string(), &endpoint, masquerade, "established", "default/far:tcp"],
    )?;

    let list = text(&["service", "list"])?;
    has_line(&list, &["SERVICE", "TYPE", "ENDPOINTS"])?;
    has_line(&list, &["default/far:tcp", "ClusterIP", "10.96.0.1:80/TCP", &endpoint, "active"])?;
    has_line(&list, &["default/far:tcp", "NodePort", "*:30081/TCP", &endpoint, "active 2 connections"])?;
    let list = text(&["backend", "list"])?;
    has_line(&list, &["ENDPOINT", "LOCAL", "CONNECTIONS", "STATE", "SERVICES"])?;
    has_line(&list, &[&format!("{endpoint}/TCP"), "no", "2", "active", "default/far:tcp"])?;

    let said = text(&["conntrack", "flush", "--client", &outside.v4.to_string()])?;
    ensure!(said.contains("removed 1 flows"), "{said}");
    let left = flows()?;
    ensure!(left.len() == 1 && left[0]["endpoint"] == endpoint.as_str(), "{left:#?}");
    ensure!(left[0]["client"] == format!("{}:40002", cluster.place("a").v4), "{left:#?}");
    let said = text(&["conntrack", "flush", "--client", &outside.v4.to_string()])?;
    ensure!(said.contains("removed 0 flows"), "{said}");
    ensure!(get(outside, &Ask::tcp(to))?.name == "c", "new flows are none the worse");
    Ok(())
}

#[test]
fn status_and_doctor_call_a_good_node_good_and_a_killed_agent_is_seen_at_once() -> Result<()> {
    let (cluster, dir) = (crate::life::one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    let mut agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let (code, page) = agent.ask(&["status"])?;
    ensure!(code.success() && page.starts_with("healthy\n"), "{code}\n{page}");
    has_line(&page, &["node", "node1"])?;
    has_line(&page, &["source", "manifests"])?;
    has_line(&page, &["agent", "alive, pid"])?;
    has_line(&page, &["services", "1"])?;
    has_line(&page, &["socket hooks", "8 of 8"])?;
    has_line(&page, &["TABLE", "USED", "MAX", "FILL"])?;
    let status = agent.status_json()?;
    ensure!(status["healthy"] == true && status["agent"]["node"] == "node1", "{status:#}");
    ensure!(status["agent"]["pid"].as_u64() == agent.pid().map(u64::from), "{status:#}");
    let (code, page) = agent.ask(&["doctor"])?;
    ensure!(code.success() && page.starts_with("this node is ready"), "{code}\n{page}");
    has_line(&page, &["VERDICT", "CHECK", "FOUND"])?;
    has_line(&page, &["ok", "agent", "running and healthy"])?;
    let report = agent.json(&["doctor", "--output", "json"])?;
    ensure!(report["ready"] == true, "{report:#}");

    agent.kill()?;
    let (code, page) = agent.ask(&["status"])?;
    ensure!(code.code() == Some(1) && page.starts_with("not healthy: the agent does not run"), "{page}");
    has_line(&page, &["remedy: start it"])?;
    ensure!(get(cluster.place("a"), &Ask::tcp(service(1)[0]))?.name == "b", "traffic needs no agent");
    agent.spawn()?;
    agent.wait_ready()?;
    status_until(&agent, "healthy again", |status| status["problems"] == serde_json::json!([])).map(drop)
}

#[test]
fn commands_say_what_to_do_where_no_agent_has_run() -> Result<()> {
    let (cluster, dir) = (crate::life::one_node(&["a"])?, manifests()?);
    let agent = Agent::prepare(&proxy_tests::require::agent_binary()?, &cluster, "node1", &dir, &[])?;
    for command in [&["service", "list"][..], &["backend", "list"], &["conntrack", "list"]] {
        let (code, said) = agent.ask(command)?;
        ensure!(code.code() == Some(1) && said.contains("start `proxy-agent run`"), "{command:?}: {said}");
    }
    let (code, page) = agent.ask(&["status"])?;
    ensure!(code.code() == Some(1) && page.starts_with("not healthy: no agent has run here"), "{page}");
    let (code, said) = agent.ask(&["cleanup"])?;
    ensure!(code.success(), "{said}");
    Ok(())
}

//! A sync that fails: tried again, reported, and nothing that belongs after a sync happens before one succeeds.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::object::{Object, Publish};
use proxy_tests::probe::eventually;

use crate::common::{ip, manifests, vips, web};
use crate::health::http;
use crate::life::{FLAGS, SOON, answers, one_node, servers, service, status_until};

/// A metric's value without labels or with these.
fn figure(metrics: &str, sample: &str) -> Result<f64> {
    let line = metrics.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("no {sample} in:\n{metrics}"))?.parse()?)
}

#[test]
fn health_checks_of_a_service_wait_for_a_pass_that_succeeds() -> Result<()> {
    // Y-19, Y-25; H-18, H-30, H-33.
    const PASSES: &str = "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}";
    const SYNCED: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"}";
    const PENDING: &str = "kubeproxy_sync_proxy_rules_service_changes_pending";
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    let agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let host = cluster.place("node1");
    answers(cluster.place("a"), service(1)[0], "b")?;

    // From now on the kernel refuses every write to this table, as it might for want of memory.
    let table = agent.bpf_root().join("g1/maps/FRONTENDS");
    let frozen = Command::new("bpftool").args(["map", "freeze", "pinned"]).arg(&table).output()?;
    ensure!(frozen.status.success(), "{}", String::from_utf8_lossy(&frozen.stderr));
    let before = http(host, "127.0.0.1:10249", "/metrics")?.1;
    let checked = proxy_tests::manifests::ServicePlan::new("late", &vips(2))
        .port("tcp", "TCP", 80, 8080)
        .load_balancer(&[ip("203.0.113.7")])
        .external_local(Some(30_999));
    dir.publish(&Object::from(&checked.build()))?;
    status_until(&agent, "a sync that failed", |status| status.to_string().contains("the last sync failed"))?;
    eventually(SOON, || {
        let now = http(host, "127.0.0.1:10249", "/metrics")?.1;
        ensure!(figure(&now, PASSES)? >= figure(&before, PASSES)? + 2.0, "it is not tried again:\n{now}");
        ensure!(figure(&now, SYNCED)? == figure(&before, SYNCED)?, "a failure counts as success:\n{now}");
        ensure!(figure(&now, PENDING)? == 1.0, "{now}");
        Ok(())
    })?;
    for to in host.at(30_999) {
        let refused = host.netns.run_in(|| TcpStream::connect(to))?;
        let kind = refused.err().map(|error| error.kind());
        ensure!(kind == Some(ErrorKind::ConnectionRefused), "{to} is served before its Service: {kind:?}");
    }
    answers(cluster.place("a"), service(1)[1], "b")
}

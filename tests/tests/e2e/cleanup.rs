//! `cleanup` leaves a node as if the agent had never been there.

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::probe::{Ask, eventually, get};
use proxy_tests::test_cluster::TestCluster;

use crate::common::{manifests, web};
use crate::life::{
    FLAGS, SOON, answers, nobody_answers, node_ports, one_node, servers, service, with_node_ports,
};

/// Ids of the programs that the pinned links run.
fn programs(agent: &Agent) -> Result<Vec<u64>> {
    let status = agent.status_json()?;
    let links = status["links"].as_array().context("no links")?;
    ensure!(!links.is_empty() && links.iter().all(|link| link["attached"] == true), "{status:#}");
    Ok(links.iter().filter_map(|link| link["program_id"].as_u64()).collect())
}

/// What hangs on the interfaces of the node, by those who can tell: `tc` shows filters and their qdiscs.
fn qdiscs(cluster: &TestCluster) -> Result<String> {
    cluster.place("node1").netns.output("tc", &["qdisc", "show"])
}

#[test]
fn nothing_is_left_after_cleanup_and_doing_it_twice_is_doing_it_once() -> Result<()> {
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |_| with_node_ports("web", 1, 30080))?;
    let qdiscs_before = qdiscs(&cluster)?;
    let mut agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let (pod, outside) = (cluster.place("a"), cluster.place("outside"));
    answers(pod, service(1)[0], "b")?;
    answers(outside, node_ports(&cluster, "node1", 30080)[1], "b")?;
    let programs = programs(&agent)?;

    let (code, said) = agent.ask(&["cleanup"])?;
    ensure!(code.code() == Some(1) && said.contains("stop it first"), "{said}");
    ensure!(get(pod, &Ask::tcp(service(1)[0]))?.name == "b", "a refused cleanup has taken something");

    agent.stop()?;
    let (code, said) = agent.ask(&["cleanup"])?;
    ensure!(code.success() && said.starts_with("removed "), "{said}");
    // The operator who mounted the bpffs would see an empty directory; the one below it is gone.
    let left = std::fs::read_dir(agent.bpf_root()).map_or(0, Iterator::count);
    ensure!(left == 0, "{left} things are left in {}", agent.bpf_root().display());
    for vip in service(1) {
        nobody_answers(pod, vip)?;
    }
    for to in node_ports(&cluster, "node1", 30080) {
        nobody_answers(outside, to)?;
    }
    for to in cluster.place("b").at(8080) {
        ensure!(get(pod, &Ask::tcp(to))?.name == "b", "direct traffic is broken");
    }
    ensure!(qdiscs(&cluster)? == qdiscs_before, "qdiscs are left: {}", qdiscs(&cluster)?);
    // The kernel frees programs a little later than links.
    eventually(SOON, || {
        let loaded = aya::programs::loaded_programs().filter_map(|program| Some(program.ok()?.id()));
        let left: Vec<u32> = loaded.filter(|id| programs.contains(&u64::from(*id))).collect();
        ensure!(left.is_empty(), "programs {left:?} are still loaded");
        Ok(())
    })?;

    let (code, said) = agent.ask(&["cleanup"])?;
    ensure!(code.success() && said.starts_with("nothing to remove"), "{said}");
    Ok(())
}

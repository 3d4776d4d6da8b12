//! What keeps an agent from starting is said in words that help, and nothing is left half done.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::{Agent, Feed};
use proxy_tests::probe::eventually;
use proxy_tests::test_cluster::TestCluster;

use crate::common::{manifests, web};
use crate::life::{FLAGS, SOON, answers, one_node, servers, service, tables};

/// A program beside the manifests that runs the agent in another way.
fn wrapper(directory: &Path, prefix: &str) -> Result<std::path::PathBuf> {
    let binary = proxy_tests::require::agent_binary()?;
    let script = directory.with_file_name("agent");
    // Only `run` is to go wrong: cleaning up afterwards is not.
    let text = format!(
        "#!/bin/sh\n[ $1 = run ] && exec {prefix} {binary} \"$@\"\nexec {binary} \"$@\"\n",
        binary = binary.display()
    );
    std::fs::write(&script, text)?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    Ok(script)
}

/// Runs an agent that cannot start: it must end by itself, say all these words at the end, and leave no link.
fn refused(agent: &mut Agent, words: &[&str]) -> Result<()> {
    agent.spawn()?;
    let ended = format!("{:#}", agent.wait_ready().err().context("it is ready")?);
    ensure!(ended.contains("has ended"), "{ended}");
    let log = agent.log_text();
    let said = log.rsplit_once("error: ").map_or("", |(_, said)| said);
    ensure!(words.iter().all(|word| said.contains(word)), "no {words:?} in {said:?}:\n{log}");
    ensure!(!log.contains("panicked"), "{log}");
    let links: Vec<_> = match std::fs::read_dir(agent.bpf_root().join("v1/links")) {
        Ok(entries) => entries.flatten().map(|entry| entry.file_name()).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    ensure!(links.is_empty(), "links are left: {links:?}");
    Ok(())
}

fn agent(cluster: &TestCluster, feed: impl Into<Feed>, flags: &[&str]) -> Result<Agent> {
    let flags = [&FLAGS[..], flags].concat();
    Agent::prepare(&proxy_tests::require::agent_binary()?, cluster, "node1", feed, &flags)
}

#[test]
fn sources_and_flags_that_cannot_be_followed_are_named_with_a_remedy() -> Result<()> {
    let (cluster, dir) = (one_node(&["a"])?, manifests()?);
    let none = dir.path().join("none");
    refused(&mut agent(&cluster, Feed::Manifests(none), &[])?, &["none", "does it exist"])?;
    let file = dir.path().join("file.yaml");
    dir.write("file.yaml", "")?;
    refused(&mut agent(&cluster, Feed::Manifests(file), &[])?, &["file.yaml", "is it a directory"])?;
    refused(&mut agent(&cluster, Feed::ApiServer("10.0.0.1:6443".into()), &[])?, &["--apiserver"])?;
    let devices = ["--devices=eth["];
    refused(&mut agent(&cluster, &dir, &devices)?, &["--devices", "eth[", "eth*"])
}

#[test]
fn a_cgroup_root_that_is_none_is_named_and_no_program_stays_attached() -> Result<()> {
    let (cluster, dir) = (one_node(&["a"])?, manifests()?);
    let cgroup_root = dir.path().display().to_string();
    // The fixture gives one already, and a flag may stand only once: a script puts the other in its place.
    let script = dir.path().with_file_name("agent");
    let text = format!(
        "#!/bin/sh\nlast=\nfor word; do shift; [ \"$last\" = --cgroup-root ] && word={cgroup_root}\n\
         set -- \"$@\" \"$word\"; last=$word; done\nexec {} \"$@\"\n",
        proxy_tests::require::agent_binary()?.display()
    );
    std::fs::write(&script, text)?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    let mut agent = Agent::prepare(&script, &cluster, "node1", &dir, &FLAGS)?;
    refused(&mut agent, &[cgroup_root.as_str(), "--cgroup-root", "cgroup v2"])
}

#[test]
fn an_agent_without_the_rights_it_needs_says_so() -> Result<()> {
    // Z-15.
    let (cluster, dir) = (one_node(&["a"])?, manifests()?);
    for prefix in
        ["setpriv --reuid=65534 --regid=65534 --clear-groups", "setpriv --bounding-set=-all --inh-caps=-all"]
    {
        let script = wrapper(&dir.path(), prefix)?;
        // Its directory must be open to everybody, or it fails for another reason.
        let above = dir.path().parent().context("a directory above")?.to_owned();
        std::fs::set_permissions(&above, std::fs::Permissions::from_mode(0o755))?;
        let mut agent = Agent::prepare(&script, &cluster, "node1", &dir, &FLAGS)?;
        refused(&mut agent, &["CAP_BPF", "root"]).with_context(|| prefix.to_owned())?;
    }
    Ok(())
}

#[test]
fn a_second_agent_on_the_same_pins_is_refused_and_the_first_goes_on() -> Result<()> {
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    let first = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let before = tables(&first)?;
    let manifests = dir.path().display().to_string();
    let (code, said) = first.ask(&["run", "--manifests", &manifests])?;
    ensure!(code.code() == Some(1), "{code}\n{said}");
    ensure!(said.contains("another agent runs with --bpf-root") && said.contains("stop it first"), "{said}");
    ensure!(tables(&first)? == before, "the second one has changed something");
    answers(cluster.place("a"), service(1)[0], "b")
}

#[test]
fn an_api_server_that_cannot_be_reached_is_named_and_tried_again() -> Result<()> {
    let cluster = one_node(&["a"])?;
    let url = "http://127.0.0.1:6443";
    let mut agent = agent(&cluster, Feed::ApiServer(url.into()), &[])?;
    agent.spawn()?;
    eventually(SOON, || {
        let (code, page) = agent.ask(&["status"])?;
        ensure!(code.code() == Some(1) && page.contains("the first list has not arrived"), "{page}");
        ensure!(page.contains(url) && page.contains("remedy: see that the source can be reached"), "{page}");
        let log = agent.log_text();
        ensure!(log.contains("retrying") && log.contains("refused"), "{log}");
        Ok(())
    })?;
    ensure!(agent.status_json()?["links"] == serde_json::json!([]), "programs are attached");
    agent.stop().map(drop)
}

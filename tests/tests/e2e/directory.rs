//! A directory of manifests as the source: edits of every kind, and files that are broken (Y-6, X-16).

use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::manifests::ManifestDir;
use proxy_tests::object::{Key, Kind, Object, Publish};
use proxy_tests::probe::get;

use crate::common::{manifests, vips, web};
use crate::life::{
    FLAGS, answers, fails, generation, nobody_answers, one_node, quick, servers, service, status_until,
    warns, with_node_ports,
};
use proxy_tests::manifests::ServicePlan;

fn key(name: &str) -> Key {
    Key { kind: Kind::Service, namespace: "default".into(), name: name.into() }
}

/// A Service of this port in front of the endpoints of `web`.
fn web_at(port: u16) -> Object {
    Object::from(&ServicePlan::new("web", &vips(1)).port("tcp", "TCP", port, 8080).build())
}

#[test]
fn files_that_are_edited_added_renamed_and_removed_are_followed() -> Result<()> {
    let (cluster, dir) = (one_node(&["a", "b", "c"])?, manifests()?);
    let _servers = servers(&cluster, &["b", "c"])?;
    let mut controller = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    let agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let (pod, vip) = (cluster.place("a"), service(1)[0]);
    let other_port = std::net::SocketAddr::new(vip.ip(), 81);
    answers(pod, vip, "b")?;
    controller.replace(&[cluster.place("c")])?;
    answers(pod, vip, "c")?;
    dir.publish(&web_at(81))?;
    answers(pod, other_port, "c")?;
    fails(pod, vip, "connect ECONNREFUSED")?;
    let _added = web(&dir, &cluster, "added", 2, &["b"], |plan| plan)?;
    answers(pod, service(2)[0], "b")?;
    // A name of a file means nothing: not one write follows.
    let passes = generation(&agent)?;
    let renamed = dir.path().join("another-name.yml");
    std::fs::rename(dir.path().join(ManifestDir::file_name(&key("web"))), &renamed)?;
    dir.publish(&Object::from(&with_node_ports("marks-the-end", 9, 30089).build()))?;
    status_until(&agent, "three Services", |status| status["agent"]["services"] == 3)?;
    status_until(&agent, "one pass for the new Service", |status| {
        status["agent"]["generation"] == passes + 1
    })?;
    ensure!(get(pod, &quick(other_port))?.name == "c", "renaming a file did something");
    std::fs::remove_file(&renamed)?;
    nobody_answers(pod, other_port)?;
    answers(pod, service(2)[1], "b")?;
    dir.retract(&key("added"))?;
    nobody_answers(pod, service(2)[1])
}

/// Publishes objects as a mounted ConfigMap does: files that lead through a link `..data`, which is swapped.
fn mount_config_map(dir: &Path, version: &str, objects: &[Object]) -> Result<()> {
    let data = dir.join(format!("..{version}"));
    std::fs::create_dir(&data)?;
    for object in objects {
        let name = ManifestDir::file_name(&object.key);
        std::fs::write(data.join(&name), object.json.to_string())?;
        let link = dir.join(&name);
        if !link.is_symlink() {
            symlink(Path::new("..data").join(&name), &link)?;
        }
    }
    symlink(format!("..{version}"), dir.join("..data_tmp"))?;
    std::fs::rename(dir.join("..data_tmp"), dir.join("..data")).context("swapping ..data")
}

#[test]
fn a_mounted_config_map_is_followed_when_its_data_is_swapped() -> Result<()> {
    let (cluster, dir) = (one_node(&["a", "b"])?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    // The slices are ordinary files; the Service comes from the ConfigMap.
    let _web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    dir.retract(&key("web"))?;
    mount_config_map(&dir.path(), "v1", &[web_at(80)])?;
    let _agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let (pod, vip) = (cluster.place("a"), service(1)[0]);
    answers(pod, vip, "b")?;
    for (version, port, before) in [("v2", 81, 80), ("v3", 82, 81)] {
        mount_config_map(&dir.path(), version, &[web_at(port)])?;
        answers(pod, std::net::SocketAddr::new(vip.ip(), port), "b")?;
        fails(pod, std::net::SocketAddr::new(vip.ip(), before), "connect ECONNREFUSED")?;
    }
    Ok(())
}

#[test]
fn a_broken_file_is_reported_with_its_line_and_keeps_what_it_said() -> Result<()> {
    let (cluster, dir) = (one_node(&["a", "b", "c"])?, manifests()?);
    let _servers = servers(&cluster, &["b", "c"])?;
    let _web = web(&dir, &cluster, "web", 1, &["b"], |plan| plan)?;
    let mut other = web(&dir, &cluster, "other", 2, &["b"], |plan| plan)?;
    let agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    let pod = cluster.place("a");
    let file = ManifestDir::file_name(&key("web"));
    let broken = "apiVersion: v1\nkind: Service\nmetadata: {name: web\nspec: [\n";
    let wrong = "# a comment\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: many}\n";
    for (text, words) in [
        (broken, ["service-default-web.yaml:", "stays in use"]),
        (wrong, ["service-default-web.yaml:2", "Service default/web cannot be read"]),
    ] {
        dir.write(&file, text)?;
        warns(&agent, &words, true)?;
        let (status, page) = agent.ask(&["status"])?;
        ensure!(status.success() && page.contains(words[0]), "{page}");
        answers(pod, service(1)[0], "b")?;
        // Others are not held up.
        other.replace(&[cluster.place("c")])?;
        answers(pod, service(2)[0], "c")?;
        dir.publish(&Object::from(&with_node_ports("web", 1, 30080).build()))?;
        warns(&agent, &words, false)?;
        answers(cluster.place("outside"), crate::life::node_ports(&cluster, "node1", 30080)[0], "b")?;
        other.replace(&[cluster.place("b")])?;
        answers(pod, service(2)[0], "b")?;
    }
    Ok(())
}

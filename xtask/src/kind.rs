//! A kind cluster without kube-proxy, with the proxy from this checkout in it.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{cmd, image, workspace};

/// Which cluster.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The cluster's name.
    #[arg(long, default_value = "ebpf-proxy")]
    name: String,
    /// Only say the steps.
    #[arg(long)]
    dry_run: bool,
}

/// `cargo xtask kind`
pub(crate) fn run(args: &Args) -> Result<()> {
    let manifest = workspace::root().join("target/kind/daemonset.yaml");
    let archive = image::default_output();
    let steps = steps(&args.name, &archive.display().to_string(), &manifest.display().to_string());
    if args.dry_run {
        println!("cargo xtask image");
        println!(
            "# {}: deploy/daemonset.yaml with the API server at {}",
            manifest.display(),
            server(&args.name)
        );
        steps.iter().for_each(|step| println!("{}", cmd::shown(step)));
        return Ok(());
    }
    for (tool, from) in [
        ("kind", "https://kind.sigs.k8s.io (and a container engine that it can use)"),
        ("kubectl", "https://kubernetes.io/docs/tasks/tools"),
    ] {
        if cmd::find(tool, &[]).is_none() {
            bail!("no {tool} on PATH; get it from {from}, then run: cargo xtask kind");
        }
    }
    image::write(None, &archive)?;
    let template = workspace::root().join("deploy/daemonset.yaml");
    let text =
        fs::read_to_string(&template).with_context(|| format!("could not read {}", template.display()))?;
    fs::create_dir_all(manifest.with_file_name("")).context("could not create target/kind")?;
    fs::write(&manifest, for_cluster(&text, &args.name)?)
        .with_context(|| format!("could not write {}", manifest.display()))?;
    for mut step in steps {
        cmd::run(&mut step)?;
    }
    println!("delete it with: kind delete cluster --name {}", args.name);
    Ok(())
}

/// What is done, in order, once image and manifest are written.
fn steps(name: &str, archive: &str, manifest: &str) -> Vec<Command> {
    let config = workspace::root().join("deploy/kind.yaml").display().to_string();
    let context = format!("kind-{name}");
    let kubectl = |args: &[&str]| cmd::with("kubectl", ["--context", &context].iter().chain(args));
    vec![
        // Nodes only become ready with a proxy, so kind must not wait for them.
        cmd::with("kind", ["create", "cluster", "--name", name, "--config", &config, "--wait", "0s"]),
        cmd::with("kind", ["load", "image-archive", archive, "--name", name]),
        kubectl(&["apply", "--filename", manifest]),
        kubectl(&[
            "--namespace",
            "kube-system",
            "rollout",
            "status",
            "daemonset/ebpf-proxy",
            "--timeout=180s",
        ]),
        kubectl(&["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=180s"]),
    ]
}

/// Where kind's API server listens, seen from its nodes: the first control plane's container by name.
fn server(cluster: &str) -> String {
    format!("https://{cluster}-control-plane:6443")
}

/// The manifest with this cluster's API server.
fn for_cluster(manifest: &str, cluster: &str) -> Result<String> {
    /// What deploy/daemonset.yaml has in the place of the address.
    const PLACE: &str = "https://API_SERVER:6443";
    if manifest.matches(PLACE).count() != 1 {
        bail!("deploy/daemonset.yaml does not name {PLACE} exactly once");
    }
    Ok(manifest.replace(PLACE, &server(cluster)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_gets_the_address_of_the_clusters_api_server() {
        let manifest = fs::read_to_string(workspace::root().join("deploy/daemonset.yaml")).unwrap();
        let changed = for_cluster(&manifest, "town").unwrap();
        assert!(changed.contains("https://town-control-plane:6443"));
        assert!(!changed.contains("API_SERVER:"));
        assert!(for_cluster(&changed, "town").is_err());
    }

    #[test]
    fn every_kubectl_step_names_the_cluster() {
        let shown: Vec<String> = steps("town", "a.tar", "m.yaml").iter().map(cmd::shown).collect();
        assert!(shown.iter().all(|step| step.contains("town")), "{shown:?}");
    }
}

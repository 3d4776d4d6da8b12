//! A container as a DaemonSet describes it, run on this machine as a container runtime would run it: with its root, mounts,
//! capabilities and system calls, and no more. The program `container` does that; here is what it is told.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1 as core;
use serde::{Deserialize, Serialize};

use crate::pod::Place;

/// Where the agent is in its image.
pub const ENTRYPOINT: &str = "/proxy-agent";
/// Where a pod finds the token of its account.
pub const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// What a container may do that says nothing of capabilities: the list that container runtimes share.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// What becomes of mounts that are made in a volume (`mountPropagation`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    /// They stay inside, and those of the host outside.
    None,
    /// Those of the host come in.
    HostToContainer,
    /// Both ways.
    Bidirectional,
}

/// A volume at its place.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mount {
    /// On the host.
    pub from: PathBuf,
    /// In the container.
    pub to: PathBuf,
    /// Whether nothing can be written there.
    pub read_only: bool,
    /// See there.
    pub propagation: Propagation,
}

/// A container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// The program that stands at [`ENTRYPOINT`].
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// All rights, every system call, writable `/proc/sys` and `/sys`.
    pub privileged: bool,
    /// Whether nothing can be written to its root.
    pub read_only_root: bool,
    /// Whether no program that it runs can give it more rights.
    pub no_new_privileges: bool,
    /// Whether the runtime's default list of system calls holds.
    pub default_seccomp: bool,
    /// Its capabilities, without the prefix.
    pub capabilities: Vec<String>,
    /// Whether it sees the processes of the host.
    pub host_pid: bool,
    /// What it is mounted.
    pub mounts: Vec<Mount>,
    /// A directory on the host where its root is made: a mount of its own that is not shared.
    pub root: PathBuf,
}

/// What a node has for the volumes of a pod, and a name.
pub struct Host<'a> {
    /// By the path or ConfigMap that a volume names, or [`ACCOUNT`].
    pub volumes: BTreeMap<&'a str, PathBuf>,
    /// Its name.
    pub node: &'a str,
    /// See [`Container::root`].
    pub root: PathBuf,
}

/// The containers of a DaemonSet's pod: those that run first, and its own.
pub fn containers(set: &DaemonSet, host: &Host<'_>, program: &Path) -> Result<(Vec<Container>, Container)> {
    let pod = set.spec.as_ref().and_then(|spec| spec.template.spec.as_ref()).context("a DaemonSet's pod")?;
    ensure!(pod.host_network == Some(true), "only pods in the host's network are understood");
    let container = |one: &core::Container| {
        container(pod, one, host, program).with_context(|| format!("container {}", one.name))
    };
    let first = pod.init_containers.iter().flatten().map(container).collect::<Result<_>>()?;
    let [own] = &pod.containers[..] else { anyhow::bail!("one container, not {}", pod.containers.len()) };
    Ok((first, container(own)?))
}

fn container(
    pod: &core::PodSpec,
    one: &core::Container,
    host: &Host<'_>,
    program: &Path,
) -> Result<Container> {
    let rights = one.security_context.clone().unwrap_or_default();
    let privileged = rights.privileged == Some(true);
    let named = |list: Option<Vec<String>>| list.unwrap_or_default();
    let (add, drop) = rights.capabilities.map(|caps| (named(caps.add), named(caps.drop))).unwrap_or_default();
    let mut capabilities: Vec<String> = DEFAULT.map(ToOwned::to_owned).to_vec();
    capabilities.retain(|cap| !drop.iter().any(|gone| gone == "ALL" || gone == cap));
    capabilities.extend(add);
    let of_pod = pod.security_context.as_ref().and_then(|rights| rights.seccomp_profile.as_ref());
    let seccomp = rights.seccomp_profile.as_ref().or(of_pod).map(|profile| profile.type_.as_str());
    Ok(Container {
        name: one.name.clone(),
        program: program.into(),
        arguments: one.args.iter().flatten().map(|arg| arg.replace("$(NODE_NAME)", host.node)).collect(),
        privileged,
        read_only_root: rights.read_only_root_filesystem == Some(true),
        no_new_privileges: rights.allow_privilege_escalation == Some(false),
        default_seccomp: !privileged && seccomp == Some("RuntimeDefault"),
        capabilities,
        host_pid: pod.host_pid == Some(true),
        mounts: mounts(pod, one, host)?,
        root: host.root.clone(),
    })
}

fn mounts(pod: &core::PodSpec, one: &core::Container, host: &Host<'_>) -> Result<Vec<Mount>> {
    let mounts = one.volume_mounts.iter().flatten().map(|mount| {
        let volume = pod.volumes.iter().flatten().find(|volume| volume.name == mount.name);
        let volume = volume.with_context(|| format!("no volume {}", mount.name))?;
        let of_host = volume.host_path.as_ref().map(|path| path.path.as_str());
        let source = of_host.or(volume.config_map.as_ref().map(|map| map.name.as_str()));
        let source = source.with_context(|| format!("volume {} is of a kind unknown here", mount.name))?;
        let from = host.volumes.get(source).with_context(|| format!("this node has no {source}"))?;
        Ok(Mount {
            from: from.clone(),
            to: mount.mount_path.clone().into(),
            read_only: mount.read_only == Some(true),
            propagation: match mount.mount_propagation.as_deref() {
                Some("Bidirectional") => Propagation::Bidirectional,
                Some("HostToContainer") => Propagation::HostToContainer,
                _ => Propagation::None,
            },
        })
    });
    // What kubelet mounts of itself.
    let account = host.volumes.get(ACCOUNT).map(|from| {
        Ok(Mount { from: from.clone(), to: ACCOUNT.into(), read_only: true, propagation: Propagation::None })
    });
    mounts.chain(account).collect()
}

impl Container {
    /// Runs it in a place; what is said goes to `said`. Killing it kills all of it.
    pub fn spawn(&self, place: &Place, said: impl Fn() -> Stdio) -> Result<Child> {
        let mut command = Command::new(crate::require::container_binary()?);
        command.arg(serde_json::to_string(self)?).stdin(Stdio::null()).stdout(said()).stderr(said());
        place.spawn(command)
    }

    /// The same container with another command in it, as `kubectl exec` runs it.
    #[must_use]
    pub fn with(&self, arguments: &[&str]) -> Self {
        Self { arguments: arguments.iter().map(ToString::to_string).collect(), ..self.clone() }
    }

    /// Runs it until it ends: whether it succeeded, and all that it has said.
    pub fn run(&self, place: &Place) -> Result<(bool, String)> {
        let output =
            self.spawn(place, Stdio::piped)?.wait_with_output().context("waiting for a container")?;
        let said = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
    }
}

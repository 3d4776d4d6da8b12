//! What an agent needs before it touches anything: the rights, and a cgroup to attach to.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::config::Config;
use agent_core::model::SocketLb;
use agent_kernel::datapath::probe;

/// Numbers of `linux/capability.h`.
const NET_ADMIN: u32 = 12;
const NET_RAW: u32 = 13;
const SYS_PTRACE: u32 = 19;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

/// What an agent may lack, and what is not done then.
const WISHED: [(&str, u32, &str); 3] = [
    (
        "CAP_NET_RAW",
        NET_RAW,
        "where a Service has connections reset whose endpoint is lost, only ends that send hear of it, not silent ones, and no \
         node is reached directly (--loadbalancer-mode=dsr)",
    ),
    (
        "CAP_SYS_PTRACE",
        SYS_PTRACE,
        "UDP sockets of host processes whose endpoint has gone are closed and not led on, and a kube-proxy beside us is \
         known by its health port alone (10256)",
    ),
    (
        "CAP_SYS_ADMIN",
        SYS_ADMIN,
        "the programs are exchanged at each start, even for the same ones (no packet notices)",
    ),
];

/// Refuses to begin what would fail half-way; gives what is done without.
pub(in crate::run) fn rights() -> Result<Vec<String>> {
    // Where there is no such file, the kernel says itself what it refuses.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let Some(effective) = effective(&status) else { return Ok(Vec::new()) };
    let missing = missing(effective);
    if !missing.is_empty() {
        bail!(
            "this process lacks {}: run it as root (in Kubernetes: securityContext.privileged, or these \
             capabilities, which deploy/daemonset-restricted.yaml gives)",
            missing.join(" and ")
        );
    }
    Ok(wished(effective))
}

/// The effective set (proc_pid_status(5)).
fn effective(status: &str) -> Option<u64> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(effective.trim(), 16).ok()
}

/// What is missing of what there must be.
fn missing(effective: u64) -> Vec<&'static str> {
    let has = |bit: u32| effective >> bit & 1 != 0;
    let admin = has(SYS_ADMIN);
    [
        ("CAP_NET_ADMIN", has(NET_ADMIN)),
        ("CAP_BPF", admin || has(BPF)),
        ("CAP_PERFMON", admin || has(PERFMON)),
    ]
    .into_iter()
    .filter_map(|(name, has)| (!has).then_some(name))
    .collect()
}

fn wished(effective: u64) -> Vec<String> {
    let lacks = WISHED.iter().filter(|(_, bit, _)| effective >> bit & 1 == 0);
    lacks.map(|(name, _, without)| format!("without {name} {without}")).collect()
}

/// The cgroup for the socket programs; `None` when there are to be none.
pub(in crate::run) fn cgroup_root(config: &Config) -> Result<Option<PathBuf>> {
    if config.settings.socket_lb == SocketLb::Off {
        return Ok(None);
    }
    let root = config.cgroup_root.clone().or_else(probe::cgroup2_mount).context(
        "no cgroup v2 hierarchy is mounted: mount one (mount -t cgroup2 none /sys/fs/cgroup/unified), \
         name it with --cgroup-root, or do without socket programs (--socket-lb=off)",
    )?;
    check(&root)?;
    Ok(Some(root))
}

fn check(root: &Path) -> Result<()> {
    let found = statfs(root).with_context(|| {
        format!("cannot look at the cgroup root {}: name another with --cgroup-root", root.display())
    })?;
    if found.filesystem_type() != CGROUP2_SUPER_MAGIC {
        bail!(
            "--cgroup-root {} is no directory of a cgroup v2 hierarchy: name one, or do without socket programs \
             (--socket-lb=off)",
            root.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let of = |status: &str| effective(status).map(missing);
        assert_eq!(of("Name:\tx\nCapEff:\t000001ffffffffff\n"), Some(vec![]));
        assert_eq!(of("CapEff:\t0000000000001000\n"), Some(vec!["CAP_BPF", "CAP_PERFMON"]));
        assert_eq!(of("CapEff:\t000000c000001000\n"), Some(vec![]), "as little as that");
        assert_eq!(of("CapEff:\t0000000000201000\n"), Some(vec![]), "CAP_SYS_ADMIN stands for both");
        assert_eq!(of("CapEff:\t000000c000000000\n"), Some(vec!["CAP_NET_ADMIN"]));
        assert_eq!(of("nothing of the kind"), None);
    }

    #[test]
    fn what_is_done_without_is_said() {
        assert!(wished(u64::MAX).is_empty());
        let said = wished(1 << NET_RAW);
        assert_eq!(said.len(), 2);
        assert!(said[0].starts_with("without CAP_SYS_PTRACE UDP sockets"), "{said:?}");
    }

    #[test]
    fn an_ordinary_directory_is_no_cgroup_root() {
        let here = tempfile::tempdir().unwrap();
        let said = check(here.path()).unwrap_err().to_string();
        assert!(said.contains("--cgroup-root") && said.contains("cgroup v2"), "{said}");
        let said = check(&here.path().join("none")).unwrap_err().to_string();
        assert!(said.contains("--cgroup-root"), "{said}");
    }
}

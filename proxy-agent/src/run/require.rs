//! What an agent needs before it touches anything: the rights, and a cgroup to attach to.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::config::Config;
use crate::datapath::probe;
use crate::model::SocketLb;

/// Numbers of `linux/capability.h`. Programs are found by id, which CAP_BPF alone does not allow.
const NEEDED: [(&str, u32); 2] = [("CAP_NET_ADMIN", 12), ("CAP_SYS_ADMIN", 21)];

/// Refuses to begin what would fail half-way.
pub(super) fn rights() -> Result<()> {
    // Where there is no such file, the kernel says itself what it refuses.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let missing = missing(&status);
    if !missing.is_empty() {
        bail!(
            "this process lacks {}: run it as root (in Kubernetes: securityContext.privileged, or these \
             capabilities)",
            missing.join(" and ")
        );
    }
    Ok(())
}

/// What is missing of [`NEEDED`] in the effective set (proc_pid_status(5)).
fn missing(status: &str) -> Vec<&'static str> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let Some(effective) = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()) else {
        return Vec::new();
    };
    NEEDED.iter().filter(|(_, bit)| effective >> bit & 1 == 0).map(|(name, _)| *name).collect()
}

/// The cgroup for the socket programs; `None` when there are to be none.
pub(super) fn cgroup_root(config: &Config) -> Result<Option<PathBuf>> {
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
        assert_eq!(missing("Name:\tx\nCapEff:\t000001ffffffffff\n"), Vec::<&str>::new());
        assert_eq!(missing("CapEff:\t0000000000001000\n"), ["CAP_SYS_ADMIN"]);
        assert_eq!(missing("CapEff:\t0000000000000000\n"), ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"]);
        assert_eq!(missing("nothing of the kind"), Vec::<&str>::new());
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

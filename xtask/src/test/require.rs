//! What the levels on this kernel need of it.

use std::{fs, path::Path, process::Command};

use anyhow::{Result, bail};

use crate::cmd;

/// Fails with everything that is absent here, so that one look is enough.
pub(super) fn kernel() -> Result<()> {
    cmd::require_root("tests with kernel programs (all levels but unit and golden)", "cargo xtask test")?;
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let checks = [
        (
            Path::new("/sys/kernel/btf/vmlinux").is_file(),
            "a kernel that describes its types (CONFIG_DEBUG_INFO_BTF=y, /sys/kernel/btf/vmlinux)",
        ),
        (has_mount(&mounts, "cgroup2"), "cgroup v2 (mount -t cgroup2 none /sys/fs/cgroup/unified)"),
        (runs("ip", &["netns", "list"]), "ip with network namespaces (cargo xtask setup)"),
        (runs("tc", &["-Version"]), "tc (cargo xtask setup)"),
        (runs("nft", &["--version"]), "nft (cargo xtask setup)"),
    ];
    let absent: Vec<&str> = checks.into_iter().filter(|(there, _)| !there).map(|(_, what)| what).collect();
    if !absent.is_empty() {
        bail!("these tests need, and this machine lacks: {}", absent.join("; "));
    }
    Ok(())
}

/// Whether a file system of this type is mounted, after the format of /proc/mounts (proc_mounts(5)).
fn has_mount(mounts: &str, kind: &str) -> bool {
    mounts.lines().any(|line| line.split(' ').nth(2) == Some(kind))
}

fn runs(program: &str, args: &[&str]) -> bool {
    cmd::find(program, &[]).is_some_and(|path| cmd::output(Command::new(path).args(args)).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_its_type_not_by_its_place() {
        let mounts = "none /sys/fs/cgroup2 tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert!(has_mount(mounts, "cgroup2"));
        assert!(!has_mount(mounts, "bpf"));
    }
}

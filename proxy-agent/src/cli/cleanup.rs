//! `cleanup`: removes what the agent has left in the kernel. Doing it twice is doing it once.
//!
//! A pinned link lives as long as its pin: removing the pin detaches the program. Then the maps go.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use proxy_common::abi::AgentState;

use super::status::BEAT_LIMIT_MS;
use super::view::Now;

/// The file system as far as the kernel decides about it.
pub trait Mounts {
    /// Whether `path` lies in a BPF file system.
    fn is_bpffs(&self, path: &Path) -> Result<bool>;
    /// Unmounts `path` if a BPF file system is mounted exactly there; whether one was.
    fn unmount(&self, path: &Path) -> Result<bool>;
}

/// The file system we run on.
#[derive(Clone, Copy, Debug)]
pub struct KernelFs;

impl Mounts for KernelFs {
    fn is_bpffs(&self, path: &Path) -> Result<bool> {
        use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
        let found =
            statfs(path).with_context(|| format!("asking for the file system of {}", path.display()))?;
        Ok(found.filesystem_type() == BPF_FS_MAGIC)
    }

    fn unmount(&self, path: &Path) -> Result<bool> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
        if !is_mounted(&mounts, path) {
            return Ok(false);
        }
        nix::mount::umount(path).with_context(|| format!("unmounting {}", path.display()))?;
        Ok(true)
    }
}

/// Whether /proc/self/mounts names a BPF file system at `path`.
fn is_mounted(mounts: &str, path: &Path) -> bool {
    mounts.lines().any(|line| {
        let mut words = line.split(' ').skip(1);
        words.next().is_some_and(|at| Path::new(at) == path) && words.next() == Some("bpf")
    })
}

/// An agent that runs would put everything back, or trip over what is missing.
pub fn refuse_while_running(state: Option<&AgentState>, now: Now, proc: &Path) -> Result<()> {
    let Some(state) = state else { return Ok(()) };
    let fresh = now.unix_ms.saturating_sub(state.beat_ms) < BEAT_LIMIT_MS;
    // A pid of another pid namespace may be anyone's here, so the process's name has to fit, too.
    let name = fs::read_to_string(proc.join(state.pid.to_string()).join("comm")).unwrap_or_default();
    if fresh && name.trim_end() == "proxy-agent" {
        bail!("the agent is running (pid {}): stop it first, then clean up", state.pid);
    }
    Ok(())
}

/// Removes the pins of every version under `root`, links first; says what it removed.
pub fn remove_pins(root: &Path, mounts: &dyn Mounts) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    if !root.try_exists().with_context(|| format!("looking for {}", root.display()))? {
        return Ok(removed);
    }
    let versions = versions(root)?;
    if !versions.is_empty() && !mounts.is_bpffs(root)? {
        bail!(
            "{} holds directories, but is no BPF file system: is this the --bpf-root of run?",
            root.display()
        );
    }
    for room in ["links", "progs", "maps"] {
        for version in &versions {
            let dir = version.join(room);
            for pin in entries(&dir)? {
                fs::remove_file(&pin).with_context(|| format!("removing the pin {}", pin.display()))?;
                removed.push(pin.display().to_string());
            }
            remove_dir(&dir)?;
        }
    }
    for version in &versions {
        remove_dir(version)?;
    }
    if mounts.unmount(root)? {
        removed.push(format!("the BPF file system at {}", root.display()));
    }
    remove_dir(root)?;
    Ok(removed)
}

/// Directories `v<number>`, which no one else makes there.
fn versions(root: &Path) -> Result<Vec<PathBuf>> {
    let is_version = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.and_then(|name| name.strip_prefix('v')).is_some_and(|n| n.parse::<u32>().is_ok())
    };
    Ok(entries(root)?.into_iter().filter(is_version).collect())
}

/// What is in a directory, sorted; nothing when there is none.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let act = || format!("listing {}", dir.display());
    let listed = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        listed => listed.with_context(act)?,
    };
    let mut paths: Vec<_> =
        listed.map(|entry| entry.map(|e| e.path())).collect::<io::Result<_>>().with_context(act)?;
    paths.sort();
    Ok(paths)
}

/// Removes a directory that is empty; what others have put there stays.
fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir(dir) {
        // Busy: a volume of the container is mounted there.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy
            ) =>
        {
            Ok(())
        }
        result => result.with_context(|| format!("removing the directory {}", dir.display())),
    }
}

/// What was done, for a person.
#[must_use]
pub fn text(removed: &[String], root: &Path) -> String {
    match removed.len() {
        0 => format!("nothing to remove under {}\n", root.display()),
        n => {
            let lines: String = removed.iter().map(|what| format!("  {what}\n")).collect();
            format!("removed {n}:\n{lines}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::{NOW, small_cluster};
    use super::super::view::View;
    use super::*;

    struct Pretend {
        bpffs: bool,
    }

    impl Mounts for Pretend {
        fn is_bpffs(&self, _: &Path) -> Result<bool> {
            Ok(self.bpffs)
        }
        fn unmount(&self, _: &Path) -> Result<bool> {
            Ok(false)
        }
    }

    fn pinned() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for pin in ["v1/maps/FLOWS", "v1/links/connect4", "v2/maps/FLOWS"] {
            let path = dir.path().join("root").join(pin);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        dir
    }

    #[test]
    fn pins_of_every_version_go_links_first_and_twice_is_once() {
        let dir = pinned();
        let root = dir.path().join("root");
        let removed = remove_pins(&root, &Pretend { bpffs: true }).unwrap();
        let names: Vec<_> = removed.iter().map(|p| p.split("/root/").nth(1).unwrap()).collect();
        assert_eq!(names, ["v1/links/connect4", "v1/maps/FLOWS", "v2/maps/FLOWS"]);
        assert!(!root.exists());
        assert_eq!(remove_pins(&root, &Pretend { bpffs: true }).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn what_others_have_put_there_stays() {
        let dir = pinned();
        let root = dir.path().join("root");
        for path in ["vault/maps/x", "v1/other/x"] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        remove_pins(&root, &Pretend { bpffs: true }).unwrap();
        assert!(root.join("vault/maps/x").exists() && root.join("v1/other/x").exists());
        assert!(!root.join("v1/maps").exists());
    }

    #[test]
    fn an_ordinary_file_system_is_left_alone() {
        let dir = pinned();
        let error = remove_pins(&dir.path().join("root"), &Pretend { bpffs: false }).unwrap_err();
        assert!(error.to_string().contains("is no BPF file system"), "{error}");
        assert!(dir.path().join("root/v1/maps/FLOWS").exists());
        assert!(!KernelFs.is_bpffs(dir.path()).unwrap());
        assert!(!KernelFs.unmount(dir.path()).unwrap());
    }

    #[test]
    fn a_running_agent_is_not_pulled_from_under() {
        let proc = tempfile::tempdir().unwrap();
        let state = small_cluster().agent().unwrap();
        let refuse = |now| refuse_while_running(Some(&state), now, proc.path()).is_err();
        assert!(!refuse(NOW));
        fs::create_dir(proc.path().join("4242")).unwrap();
        fs::write(proc.path().join("4242/comm"), "bash\n").unwrap();
        assert!(!refuse(NOW));
        fs::write(proc.path().join("4242/comm"), "proxy-agent\n").unwrap();
        assert!(refuse(NOW));
        assert!(!refuse(Now { unix_ms: NOW.unix_ms + BEAT_LIMIT_MS, ..NOW }));
        assert!(refuse_while_running(None, NOW, proc.path()).is_ok());
    }

    #[test]
    fn a_mount_is_found_by_its_place_and_kind() {
        let mounts = "bpf /sys/fs/bpf bpf rw 0 0\ntmpfs /run/x tmpfs rw 0 0\n";
        assert!(is_mounted(mounts, Path::new("/sys/fs/bpf")));
        assert!(!is_mounted(mounts, Path::new("/sys/fs/bpf/ebpf-proxy")));
        assert!(!is_mounted(mounts, Path::new("/run/x")));
    }

    #[test]
    fn the_text_lists_what_went() {
        let root = Path::new("/r");
        assert_eq!(text(&[], root), "nothing to remove under /r\n");
        assert_eq!(text(&["a".to_owned(), "b".to_owned()], root), "removed 2:\n  a\n  b\n");
    }
}

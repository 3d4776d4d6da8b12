//! `cleanup`: removes what the agent has left in the kernel. Doing it twice is doing it once.
//!
//! A pinned link lives as long as its pin: removing the pin detaches the program. Then the maps go.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::view::View;
use agent_kernel::kube_proxy;

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
pub fn refuse_while_running(view: &dyn View) -> Result<()> {
    if view.is_running()? {
        bail!("the agent is running (pid {}): stop it first, then clean up", view.agent()?.pid);
    }
    Ok(())
}

/// A kube-proxy that runs would put its rules back.
pub fn refuse_beside_kube_proxy(proc: &Path) -> Result<()> {
    match kube_proxy::process(proc) {
        Some(why) => bail!("{why}: stop it first (delete its DaemonSet), then clean up"),
        None => Ok(()),
    }
}

/// Refuses a root that is an ordinary directory with something in it: a mistyped `--bpf-root`.
pub fn refuse_ordinary_files(root: &Path, mounts: &dyn Mounts) -> Result<()> {
    let full = fs::read_dir(root).is_ok_and(|mut entries| entries.next().is_some());
    if full && !mounts.is_bpffs(root)? {
        bail!("{} is no BPF file system: is this the --bpf-root of run?", root.display());
    }
    Ok(())
}

/// Unmounts the BPF file system that the agent mounted at its own root, and removes the directory; says what
/// it removed.
pub fn unmount(root: &Path, mounts: &dyn Mounts) -> Result<Vec<String>> {
    if !mounts.unmount(root)? {
        return Ok(vec![]);
    }
    // What others have put under the mount point stays, and so does the directory then.
    fs::remove_dir(root).ok();
    Ok(vec![format!("the BPF file system at {}", root.display())])
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
    use super::super::memory::small_cluster;
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

    #[test]
    fn an_ordinary_directory_with_files_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        refuse_ordinary_files(dir.path(), &KernelFs).unwrap();
        refuse_ordinary_files(&dir.path().join("none"), &KernelFs).unwrap();
        fs::write(dir.path().join("mine"), "").unwrap();
        let error = refuse_ordinary_files(dir.path(), &KernelFs).unwrap_err();
        assert!(error.to_string().contains("is no BPF file system"), "{error}");
        refuse_ordinary_files(dir.path(), &Pretend { bpffs: true }).unwrap();
        assert_eq!(unmount(dir.path(), &KernelFs).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_running_agent_is_not_pulled_from_under() {
        let mut view = small_cluster();
        assert!(refuse_while_running(&view).unwrap_err().to_string().contains("stop it first"));
        view.running = false;
        refuse_while_running(&view).unwrap();
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

//! A cgroup v2 directory as a value: processes are born into it, and it takes them with it when it goes.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// A tree of cgroups. Dropping it kills every process inside and removes the directories.
#[derive(Debug)]
pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// A new tree with this name below the cgroup2 mount.
    pub fn new(name: &str) -> Result<Self> {
        let root = crate::require::cgroup2()?.join(name);
        std::fs::create_dir(&root).with_context(|| format!("making cgroup {}", root.display()))?;
        Ok(Self { root })
    }

    /// A cgroup of the tree, made if it is not there.
    pub fn cgroup(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        let path = self.root.join(path);
        std::fs::create_dir_all(&path).with_context(|| format!("making cgroup {}", path.display()))?;
        Ok(path)
    }

    /// Where the tree begins.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if crate::keep() {
            crate::say(&format!("kept: {}", self.root.display()));
        } else {
            remove_tree(&self.root);
        }
    }
}

/// The file through which a process moves itself into a cgroup by writing `0`.
pub(crate) fn door(cgroup: &Path) -> Result<File> {
    let path = cgroup.join("cgroup.procs");
    OpenOptions::new().write(true).open(&path).with_context(|| format!("opening {}", path.display()))
}

/// Kills what lives in a tree and removes it, within five seconds. What stays is left to the next sweep.
pub(crate) fn remove_tree(root: &Path) {
    kill(root);
    let give_up = Instant::now() + Duration::from_secs(5);
    // A cgroup is busy until its last process has been taken apart; there is no event for the moment after.
    while !remove_directories(root) && Instant::now() < give_up {
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn kill(root: &Path) {
    if std::fs::write(root.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    // Before 5.14 there is no cgroup.kill: one by one.
    for directory in directories(root) {
        kill(&directory);
    }
    let processes = std::fs::read_to_string(root.join("cgroup.procs")).unwrap_or_default();
    for pid in processes.lines().filter_map(|line| line.parse().ok()) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).ok();
    }
}

fn remove_directories(root: &Path) -> bool {
    let children = directories(root).iter().all(|directory| remove_directories(directory));
    children && (std::fs::remove_dir(root).is_ok() || !root.exists())
}

fn directories(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

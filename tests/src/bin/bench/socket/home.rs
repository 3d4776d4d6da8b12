//! This process in cgroups of its own, one after the other: a socket belongs to the cgroup in which it was made.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use proxy_tests::cgroup::Tree;

/// The cgroups, and the one that the process comes from. It goes back there before they are removed.
pub(super) struct Home {
    door: PathBuf,
    tree: Tree,
}

impl Home {
    pub(super) fn new() -> Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").context("asking for our cgroup")?;
        let path = own.lines().find_map(|line| line.strip_prefix("0::/")).context("we are in no cgroup2")?;
        let door = proxy_tests::require::cgroup2()?.join(path).join("cgroup.procs");
        Ok(Self { door, tree: Tree::new(&proxy_tests::unique())? })
    }

    pub(super) fn cgroup(&self, name: &str) -> Result<PathBuf> {
        self.tree.cgroup(name)
    }

    /// Moves the process to a cgroup.
    pub(super) fn enter(&self, cgroup: &Path) -> Result<()> {
        fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| format!("entering {}", cgroup.display()))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // The tree kills who is still in it.
        fs::write(&self.door, "0").expect("the way back to our cgroup");
    }
}

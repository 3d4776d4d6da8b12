//! Leftovers of runs that were killed: namespaces, cgroups, mounts and directories of pids that are gone.

use std::path::Path;
use std::sync::Once;

use nix::mount::{MntFlags, umount2};

/// Sweeps once in the life of this process.
pub fn once() {
    static DONE: Once = Once::new();
    DONE.call_once(sweep);
}

/// Removes what dead runs have left. What cannot be removed now is left to the next sweep.
pub fn sweep() {
    if let Ok(root) = crate::require::cgroup2() {
        for name in leftovers(&root) {
            crate::cgroup::remove_tree(&root.join(name));
        }
    }
    for name in leftovers(Path::new(crate::netns::DIRECTORY)) {
        crate::netns::remove(&Path::new(crate::netns::DIRECTORY).join(name));
    }
    let temporary = std::env::temp_dir();
    for name in leftovers(&temporary) {
        let directory = temporary.join(name);
        // Not every directory holds a bpffs.
        umount2(&directory.join("bpf"), MntFlags::MNT_DETACH).ok();
        std::fs::remove_dir_all(&directory).ok();
    }
}

fn leftovers(directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_orphan(name))
        .collect()
}

/// Whether `ebpx-<pid>-…` belongs to a process that no longer lives.
fn is_orphan(name: &str) -> bool {
    let mut parts = name.split('-');
    parts.next() == Some(crate::PREFIX)
        && parts
            .next()
            .and_then(|pid| pid.parse::<u32>().ok())
            .is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_dead_processes_are_orphans() {
        let own = std::process::id();
        assert!(!is_orphan(&format!("ebpx-{own}-0-node1")));
        assert!(!is_orphan("ebpx-node1"));
        assert!(!is_orphan("other-4294967295-0"));
        // Above any pid_max the kernel accepts (2^22).
        assert!(is_orphan("ebpx-4194999-0-node1"));
    }
}

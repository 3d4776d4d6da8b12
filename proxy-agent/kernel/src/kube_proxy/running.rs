//! Whether a kube-proxy still runs on this node.
//!
//! One in another network namespace is another node's (kind's nodes are containers). Without the host's process
//! ids in sight a kube-proxy is known by the port of its health server, which it holds instead of us.

use std::fs;
use std::path::Path;

/// `healthzBindAddress` unless told otherwise.
const HEALTH_PORT: u16 = 10256;
/// `TCP_LISTEN` as `/proc/net/tcp` writes it.
const LISTENS: &str = "0A";

/// Why it is thought that a kube-proxy runs in this network namespace.
#[must_use]
pub fn running() -> Option<String> {
    process(Path::new("/proc")).or_else(|| port(Path::new("/proc")))
}

/// Says which process of that name runs in our network namespace, as `/proc` at `proc` shows it.
#[must_use]
pub fn process(proc: &Path) -> Option<String> {
    let ours = fs::read_link(proc.join("thread-self/ns/net")).ok();
    let found = fs::read_dir(proc).ok()?.flatten().find(|entry| {
        fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim() == "kube-proxy")
            && fs::read_link(entry.path().join("ns/net")).ok() == ours
    })?;
    Some(format!("kube-proxy runs (pid {})", found.file_name().to_string_lossy()))
}

/// A listener at the health port that is not ours.
fn port(proc: &Path) -> Option<String> {
    let sockets = ["thread-self/net/tcp", "thread-self/net/tcp6"];
    let tables = sockets.map(|file| fs::read_to_string(proc.join(file)).unwrap_or_default());
    let listeners: Vec<&str> = tables.iter().flat_map(|table| table.lines().filter_map(listener)).collect();
    if listeners.is_empty() {
        return None;
    }
    let files = fs::read_dir(proc.join("self/fd")).into_iter().flatten().flatten();
    let ours: Vec<_> = files.filter_map(|file| fs::read_link(file.path()).ok()).collect();
    let is_ours = |inode: &&str| ours.iter().any(|file| file.as_os_str() == &*format!("socket:[{inode}]"));
    let foreign = !listeners.iter().all(is_ours);
    foreign.then(|| format!("another process serves health at port {HEALTH_PORT}"))
}

/// The inode of a socket that listens at the health port (proc_net_tcp).
fn listener(line: &str) -> Option<&str> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, local, _, LISTENS, _, _, _, _, _, inode, ..] = words.as_slice() else { return None };
    let port = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
    (port == HEALTH_PORT).then_some(inode)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:2810 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0
   1: 0100007F:2810 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 99 1 0 100 0 0 10 0
";

    fn proc() -> tempfile::TempDir {
        let proc = tempfile::tempdir().unwrap();
        for directory in ["thread-self/ns", "thread-self/net", "self/fd", "7/ns", "8/ns"] {
            fs::create_dir_all(proc.path().join(directory)).unwrap();
        }
        for (link, to) in [("thread-self/ns/net", 1), ("7/ns/net", 2), ("8/ns/net", 1)] {
            symlink(format!("net:[{to}]"), proc.path().join(link)).unwrap();
        }
        fs::write(proc.path().join("7/comm"), "kube-proxy\n").unwrap();
        fs::write(proc.path().join("8/comm"), "kube-proxyish\n").unwrap();
        proc
    }

    #[test]
    fn only_a_process_in_this_network_namespace_counts() {
        let proc = proc();
        assert_eq!(process(proc.path()), None);
        fs::write(proc.path().join("8/comm"), "kube-proxy\n").unwrap();
        assert_eq!(process(proc.path()).unwrap(), "kube-proxy runs (pid 8)");
    }

    #[test]
    fn only_a_foreign_listener_at_the_port_counts() {
        let proc = proc();
        assert_eq!(port(proc.path()), None);
        fs::write(proc.path().join("thread-self/net/tcp"), TABLE).unwrap();
        assert!(port(proc.path()).unwrap().contains("10256"));
        symlink("socket:[4711]", proc.path().join("self/fd/9")).unwrap();
        assert_eq!(port(proc.path()), None);
    }
}

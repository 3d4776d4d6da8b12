//! The kernel's settings that a service proxy is expected to make when it starts (Z-7…Z-11).

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::config::Sysctls;

/// Settings of connection tracking, seen from the root of the file system.
const NETFILTER: &str = "proc/sys/net/netfilter";
/// Buckets of its table.
const HASHSIZE: &str = "sys/module/nf_conntrack/parameters/hashsize";
/// What the kernel thinks of ending this process.
const OOM_SCORE_ADJ: &str = "proc/self/oom_score_adj";

/// Whether connection tracking is there to be set.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::run) enum Applied {
    /// It is as it should be; the lines say where it could not be.
    Done(Vec<String>),
    /// This kernel tracks no connections, or does not yet: the module comes with its first rule.
    Absent,
}

/// Sets what is to be set, and writes only what differs (Z-7).
pub(in crate::run) fn apply(root: &Path, wanted: &Sysctls) -> Result<Applied> {
    let directory = root.join(NETFILTER);
    if !directory.join("nf_conntrack_max").exists() {
        return Ok(Applied::Absent);
    }
    let mut notes = Vec::new();
    if let Some(max) = wanted.conntrack_max {
        notes.extend(size(root, max)?);
    }
    for (name, value) in &wanted.others {
        set(&directory.join(name), *value).with_context(|| {
            format!(
                "cannot set net.netfilter.{name} to {value}: run `proxy-agent run --init-only` with more privileges \
                 first (writable /proc/sys), or see the --conntrack-… flags, where 0 leaves a value as it is"
            )
        })?;
    }
    Ok(Applied::Done(notes))
}

/// The size of the table is the machine's, and not any namespace's: in a container it has to stay.
fn size(root: &Path, max: u64) -> Result<Option<String>> {
    let path = root.join(NETFILTER).join("nf_conntrack_max");
    if let Err(error) = set(&path, max) {
        if is_read_only(&path) {
            return Ok(Some(format!(
                "net.netfilter.nf_conntrack_max belongs to the machine's own network namespace, and this is another: \
                 it is not set to {max}"
            )));
        }
        return Err(error).with_context(|| {
            format!(
                "cannot set net.netfilter.nf_conntrack_max to {max}: run `proxy-agent run --init-only` with more \
                 privileges first (writable /proc/sys), or leave it as it is with --conntrack-max-per-core=0"
            )
        });
    }
    let path = root.join(HASHSIZE);
    let buckets = max / 4;
    match number(&path) {
        Ok(now) if now < buckets => {
            let done = std::fs::write(&path, buckets.to_string());
            Ok(done
                .err()
                .map(|e| format!("{} is not set to {buckets}: {e}; long chains cost time", path.display())))
        }
        Ok(_) | Err(_) => Ok(None),
    }
}

/// How readily the kernel ends this process when memory runs out.
pub(in crate::run) fn oom_score_adj(root: &Path, wanted: i32) -> io::Result<()> {
    let path = root.join(OOM_SCORE_ADJ);
    if std::fs::read_to_string(&path)?.trim().parse() == Ok(wanted) {
        return Ok(());
    }
    std::fs::write(path, wanted.to_string())
}

fn set(path: &Path, wanted: u64) -> io::Result<()> {
    if number(path)? == wanted {
        return Ok(());
    }
    std::fs::write(path, wanted.to_string())
}

fn number(path: &Path) -> io::Result<u64> {
    let text = std::fs::read_to_string(path)?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is no number")))
}

/// Whether the kernel shows it without any right to write, as it does outside the first network namespace.
fn is_read_only(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o222 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file system with these sysctls.
    fn root(values: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, value) in values {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, value).unwrap();
        }
        root
    }

    fn read(root: &tempfile::TempDir, path: &str) -> String {
        std::fs::read_to_string(root.path().join(path)).unwrap()
    }

    const MAX: &str = "proc/sys/net/netfilter/nf_conntrack_max";
    const CLOSE_WAIT: &str = "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";

    fn wanted(max: Option<u64>) -> Sysctls {
        Sysctls { conntrack_max: max, others: vec![("nf_conntrack_tcp_timeout_close_wait", 3_600)] }
    }

    #[test]
    fn only_what_differs_is_written() {
        // Z-7, Z-8, Z-9, Z-10.
        let root = root(&[(MAX, "65536\n"), (CLOSE_WAIT, "60\n"), (HASHSIZE, "16384\n")]);
        assert_eq!(apply(root.path(), &wanted(Some(131_072))).unwrap(), Applied::Done(vec![]));
        assert_eq!([MAX, CLOSE_WAIT, HASHSIZE].map(|path| read(&root, path)), ["131072", "3600", "32768"]);
        // As the kernel shows them; whoever wrote them again would lose the line's end.
        for (path, value) in [(MAX, "131072\n"), (CLOSE_WAIT, "3600\n"), (HASHSIZE, "40000\n")] {
            std::fs::write(root.path().join(path), value).unwrap();
        }
        assert_eq!(apply(root.path(), &wanted(Some(131_072))).unwrap(), Applied::Done(vec![]));
        assert_eq!(
            [MAX, CLOSE_WAIT, HASHSIZE].map(|path| read(&root, path)),
            ["131072\n", "3600\n", "40000\n"]
        );
    }

    #[test]
    fn a_size_of_zero_a_core_leaves_the_table_alone() {
        // Z-8, T-120.
        let root = root(&[(MAX, "5"), (CLOSE_WAIT, "60"), (HASHSIZE, "1")]);
        assert_eq!(apply(root.path(), &wanted(None)).unwrap(), Applied::Done(vec![]));
        assert_eq!([MAX, CLOSE_WAIT, HASHSIZE].map(|path| read(&root, path)), ["5", "3600", "1"]);
    }

    #[test]
    fn without_connection_tracking_there_is_nothing_to_set() {
        assert_eq!(apply(root(&[]).path(), &wanted(Some(1))).unwrap(), Applied::Absent);
    }

    #[test]
    fn what_cannot_be_set_is_named_with_a_way_out() {
        // Z-7: a directory can neither be read nor written as a number, whoever tries.
        let root = root(&[(MAX, "5")]);
        std::fs::create_dir_all(root.path().join(CLOSE_WAIT)).unwrap();
        let error = format!("{:#}", apply(root.path(), &wanted(None)).unwrap_err());
        assert!(error.contains("nf_conntrack_tcp_timeout_close_wait to 3600"), "{error}");
        assert!(error.contains("--init-only"), "{error}");
        std::fs::write(root.path().join(MAX), "many").unwrap();
        let error = format!("{:#}", apply(root.path(), &wanted(Some(7))).unwrap_err());
        assert!(error.contains("--conntrack-max-per-core=0"), "{error}");
    }

    #[test]
    fn the_score_is_written_where_it_differs() {
        // Z-11.
        let root = root(&[(OOM_SCORE_ADJ, "0\n")]);
        oom_score_adj(root.path(), -999).unwrap();
        assert_eq!(read(&root, OOM_SCORE_ADJ), "-999");
        std::fs::write(root.path().join(OOM_SCORE_ADJ), "-999\n").unwrap();
        oom_score_adj(root.path(), -999).unwrap();
        assert_eq!(read(&root, OOM_SCORE_ADJ), "-999\n");
        assert!(oom_score_adj(Path::new("/nowhere"), 0).is_err());
    }
}

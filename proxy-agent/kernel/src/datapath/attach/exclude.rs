//! Pods whose sockets are left to their packets: a program on the pod's cgroup marks each new socket in it, and the
//! socket programs leave what is marked.
//!
//! The kernel itself knows what is inside the cgroup, at any depth: containers, and a whole cluster inside a pod. Other
//! pods pay nothing for it. A pod's cgroup may come at any time, so the tree is looked through again and again; what is
//! inside one that was found, and what has no children, is not looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya_obj::generated::bpf_attach_type as Hook;
use globset::{Glob, GlobBuilder, GlobSet, GlobSetBuilder};

use super::hooks::{Spot, Unit};
use super::loaded::Loaded;
use super::{AttachError, Attached, PinName};

pub(crate) const PROGRAM: &str = "exclude_socket";

/// A pattern of `--socket-lb-exclude-cgroups` that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{pattern:?} is no pattern for paths below the cgroup root: {}", source.kind())]
pub struct PatternError {
    pattern: String,
    source: globset::Error,
}

impl PatternError {
    #[must_use]
    pub fn pattern(&self) -> &str {
        &self.pattern
    }
}

/// A cgroup, and whether its sockets are marked.
pub type Marked = (PathBuf, Result<Attached, AttachError>);

/// Which cgroups are left to their packets.
#[derive(Clone, Debug, Default)]
pub struct Excluded {
    patterns: GlobSet,
    pods: BTreeMap<Arc<str>, String>,
}

impl Excluded {
    /// From patterns for paths below the cgroup root: `*` stands for any part of one name, `**` for any names.
    pub fn new<S: AsRef<str>>(patterns: &[S]) -> Result<Self, PatternError> {
        let failed = |pattern: &str, source| PatternError { pattern: pattern.to_owned(), source };
        let glob = |pattern: &str| -> Result<Glob, globset::Error> {
            GlobBuilder::new(pattern.trim_matches('/')).literal_separator(true).build()
        };
        let mut set = GlobSetBuilder::new();
        for pattern in patterns {
            let pattern = pattern.as_ref();
            set.add(glob(pattern).map_err(|source| failed(pattern, source))?);
        }
        let patterns = set.build().map_err(|source| failed("", source))?;
        Ok(Self { patterns, pods: BTreeMap::new() })
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty() && self.pods.is_empty()
    }

    /// Adds the pod of a name, with the UID that its cgroup is named after, or takes it out.
    pub fn set_pod(&mut self, name: Arc<str>, uid: Option<&str>) {
        match uid {
            Some(uid) => drop(self.pods.insert(name, canonical(uid))),
            None => drop(self.pods.remove(&name)),
        }
    }

    /// Whether the cgroup at this path below the root is one of them.
    fn matches(&self, path: &Path) -> bool {
        self.patterns.is_match(path) || self.is_pod(path)
    }

    /// kubelet names a pod's cgroup `pod<UID>`, and with systemd `kubepods-<class>-pod<UID>.slice` with underscores
    /// in the UID; static pods have a hash without either.
    fn is_pod(&self, path: &Path) -> bool {
        if self.pods.is_empty() {
            return false;
        }
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
        let name = name.strip_suffix(".slice").unwrap_or(name);
        let Some((before, uid)) = name.rsplit_once("pod") else { return false };
        let uid = canonical(uid);
        (before.is_empty() || before.ends_with('-')) && self.pods.values().any(|known| *known == uid)
    }

    /// The cgroups below `root` that are to be left, each without those inside it; and whether all could be looked at.
    fn find(&self, root: &Path) -> (Vec<(PathBuf, u64)>, bool) {
        let (mut found, mut left, mut whole) = (Vec::new(), vec![root.to_owned()], true);
        while let Some(directory) = left.pop() {
            let read = self.find_in(root, &directory, &mut found, &mut left);
            // A cgroup that goes while we look is gone.
            let gone = [Some(libc::ENOENT), Some(libc::ENODEV)];
            whole &= read.is_ok() || read.is_err_and(|error| gone.contains(&error.raw_os_error()));
        }
        (found, whole)
    }

    fn find_in(
        &self,
        root: &Path,
        directory: &Path,
        found: &mut Vec<(PathBuf, u64)>,
        left: &mut Vec<PathBuf>,
    ) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                continue;
            }
            let path = entry.path();
            let facts = match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                facts => facts?,
            };
            if path.strip_prefix(root).is_ok_and(|below| self.matches(below)) {
                found.push((path, facts.ino()));
            } else if facts.nlink() != 2 {
                left.push(path);
            }
        }
        Ok(())
    }
}

fn canonical(uid: &str) -> String {
    uid.chars().filter(|c| *c != '-' && *c != '_').flat_map(char::to_lowercase).collect()
}

impl Loaded {
    /// Marks the new sockets of the cgroups below `root` that are `wanted`; of others no more, unless not all that is
    /// wanted is known yet. One result for each that was not marked before.
    pub fn sync_excluded(
        &mut self,
        root: &Path,
        wanted: &Excluded,
        all_known: bool,
    ) -> Result<Vec<Marked>, AttachError> {
        let (found, whole) = if wanted.is_empty() { (Vec::new(), true) } else { wanted.find(root) };
        let ids: BTreeSet<u64> = found.iter().map(|(_, id)| *id).collect();
        self.hooks.forget_excluded(&ids);
        if all_known && whole {
            for pin in self.excluded()? {
                if matches!(pin, PinName::Excluded(id) if !ids.contains(&id)) {
                    self.detach(&pin)?;
                }
            }
        }
        let new: Vec<_> = found
            .into_iter()
            // What is attached is looked at with everything else.
            .filter(|(_, id)| {
                !self.hooks.holds(&PinName::Excluded(*id)) && !self.hooks.rests(Unit::Excluded(*id))
            })
            .collect();
        let results = new.into_iter().map(|(path, id)| (path.clone(), self.exclude(&path, id))).collect();
        self.hooks.batch_ended();
        Ok(results)
    }

    /// Cgroups that are marked, once by an earlier agent, too.
    fn excluded(&mut self) -> Result<Vec<PinName>, AttachError> {
        if !self.hooks.excluded_adopted {
            let names = self.root().link_names()?;
            self.hooks.excluded_adopted = true;
            return Ok(names.iter().filter_map(|name| PinName::parse(name)).collect());
        }
        Ok(self.hooks.held().filter(|pin| matches!(pin, PinName::Excluded(_))).cloned().collect())
    }

    fn exclude(&mut self, path: &Path, id: u64) -> Result<Attached, AttachError> {
        let spot = Spot::Cgroup { path: path.to_owned(), id, hook: Hook::BPF_CGROUP_INET_SOCK_CREATE };
        let result = self.ensure(&PinName::Excluded(id), PROGRAM, spot);
        self.hooks.note(Unit::Excluded(id), &format!("sockets in cgroup {}", path.display()), &result);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0a1b2c3d-1111-2222-3333-444455556666";

    fn found(excluded: &Excluded, tree: &[&str]) -> Vec<String> {
        let root = tempfile::tempdir().unwrap();
        for path in tree {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        fs::write(root.path().join("cgroup.procs"), "").unwrap();
        let below = |(path, _): (PathBuf, u64)| path.strip_prefix(root.path()).unwrap().display().to_string();
        let mut found: Vec<String> = excluded.find(root.path()).0.into_iter().map(below).collect();
        found.sort();
        found
    }

    #[test]
    fn a_pod_s_cgroup_is_found_by_its_uid_however_kubelet_names_it() {
        let mut excluded = Excluded::default();
        excluded.set_pod("default/kind".into(), Some(UID));
        let slice = "kubepods.slice/kubepods-burstable.slice/\
                     kubepods-burstable-pod0a1b2c3d_1111_2222_3333_444455556666.slice";
        let plain = "kubelet/kubepods/besteffort/pod0a1b2c3d-1111-2222-3333-444455556666";
        let tree = [
            &format!("{slice}/cri-containerd-1.scope"),
            &format!("{plain}/1"),
            "kubepods.slice/kubepods-pod0a1b2c3d_1111_2222_3333_444455556667.slice",
            "system.slice/tripod0a1b2c3d111122223333444455556666",
        ];
        assert_eq!(found(&excluded, &tree), [plain, slice]);
        excluded.set_pod("default/kind".into(), None);
        assert!(excluded.is_empty());
        // A static pod's is a hash.
        excluded.set_pod("kube-system/etcd".into(), Some("0123456789abcdef0123456789abcdef"));
        let path = "kubepods/burstable/pod0123456789abcdef0123456789abcdef";
        assert_eq!(found(&excluded, &[path]), [path]);
    }

    #[test]
    fn patterns_are_for_whole_paths_below_the_root_and_what_is_inside_is_not_looked_at() {
        let tree = ["a/b/c", "a/x", "b/a/b", "vm.slice/one.scope/inner"];
        for (pattern, expected) in [
            ("a", &["a"][..]),
            ("/a/b/", &["a/b"]),
            ("*/b", &["a/b"]),
            ("**/b", &["a/b", "b"]),
            ("vm.slice/*.scope", &["vm.slice/one.scope"]),
            ("*b*c", &[]),
        ] {
            assert_eq!(found(&Excluded::new(&[pattern]).unwrap(), &tree), expected, "{pattern}");
        }
        let error = Excluded::new(&["a", "b["]).unwrap_err();
        assert!(error.pattern() == "b[" && error.to_string().contains("b["), "{error}");
    }
}

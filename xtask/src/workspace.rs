//! Where things are, and what cargo knows of the workspace.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use cargo_metadata::{MetadataCommand, Package, TargetKind};

/// The folder that holds the workspace's `Cargo.toml`.
pub(crate) fn root() -> PathBuf {
    // Cargo sets the variable when it runs us; the compiled-in path serves a binary that was started by hand.
    let manifest_dir = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    manifest_dir.parent().map_or_else(|| manifest_dir.clone(), Path::to_path_buf)
}

/// Everything that has to do with BPF: the object, and the folder it is compiled in. Always in the workspace's
/// own `target`, where the agent's build script looks, even when `CARGO_TARGET_DIR` points elsewhere.
pub(crate) fn bpf_dir() -> PathBuf {
    root().join("target/bpf")
}

/// The compiled kernel programs.
pub(crate) fn bpf_object() -> PathBuf {
    bpf_dir().join("proxy-ebpf")
}

/// The folder of a tool that `setup` compiles, by its name and version: in the user's cache, so that all checkouts share it
/// and none disturbs another that wants another version. Without a home, in `target`.
pub(crate) fn tool_dir(tool: &str) -> PathBuf {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    cache.map_or_else(|| root().join("target/tools"), |cache| cache.join("ebpf-proxy/tools")).join(tool)
}

/// Where the executable of such a tool may be besides PATH; the second place is that of earlier versions of `setup`.
pub(crate) fn tool_places(tool: &str) -> [PathBuf; 2] {
    [tool_dir(tool).join("bin"), root().join("target/tools/bin")]
}

/// The files below a folder whose names end so, in order, without what is built.
pub(crate) fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in entries(folder)? {
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            files.extend(self::files(&path, extension)?);
        } else if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    Ok(files)
}

/// Those in the folder itself.
pub(crate) fn files_beside(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut files = entries(folder)?;
    files.retain(|path| path.is_file() && path.extension().is_some_and(|found| found == extension));
    Ok(files)
}

/// What a folder holds, in order.
pub(crate) fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = || format!("could not list {}", folder.display());
    let entries = std::fs::read_dir(folder).with_context(listed)?;
    let mut entries =
        entries.map(|entry| Ok(entry.with_context(listed)?.path())).collect::<Result<Vec<_>>>()?;
    entries.sort();
    Ok(entries)
}

/// What cargo knows of the workspace.
pub(crate) struct Metadata {
    pub(crate) target_directory: PathBuf,
    packages: Vec<Package>,
}

impl Metadata {
    /// Asks cargo.
    pub(crate) fn read() -> Result<Self> {
        let metadata = MetadataCommand::new().no_deps().current_dir(root()).exec()?;
        Ok(Self { target_directory: metadata.target_directory.into(), packages: metadata.packages })
    }

    /// A package of the workspace by name.
    pub(crate) fn package(&self, name: &str) -> Result<&Package> {
        let package = self.packages.iter().find(|package| package.name == name);
        package.with_context(|| format!("the workspace has no package `{name}`"))
    }

    /// Everything that holds tests: the folder of its package below the workspace's, its kind (`lib`, `bin`, `test`), its
    /// name.
    pub(crate) fn test_targets(&self) -> Vec<(PathBuf, TargetKind, String)> {
        let root = root();
        let mut all = Vec::new();
        for package in &self.packages {
            let folder = package.manifest_path.parent().and_then(|folder| folder.strip_prefix(&root).ok());
            let folder = folder.map(PathBuf::from).unwrap_or_default();
            for target in package.targets.iter().filter(|target| target.test) {
                all.extend(
                    target.kind.first().map(|kind| (folder.clone(), kind.clone(), target.name.clone())),
                );
            }
        }
        all
    }
}

/// What can be asked of a package.
pub(crate) trait Targets {
    /// Whether the package has a target of this kind (`bin`, `lib`, `test`) and name.
    fn has(&self, kind: &str, name: &str) -> bool;
}

impl Targets for Package {
    fn has(&self, kind: &str, name: &str) -> bool {
        self.targets.iter().any(|target| target.name == name && target.kind.contains(&kind.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_tells_what_the_workspace_holds() {
        let metadata = Metadata::read().unwrap();
        assert!(metadata.package("xtask").unwrap().has("bin", "xtask"));
        assert!(!metadata.package("xtask").unwrap().has("test", "xtask"));
        assert!(metadata.package("absent").is_err());
        assert!(root().join("proxy-common/Cargo.toml").is_file());
    }
}

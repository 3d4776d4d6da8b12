//! A directory of manifests as an operator or a tool edits it: one file an object, each write whole at once.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::object::{Key, Object, Publish};

/// A directory for `--manifests`, gone on drop.
#[derive(Debug)]
pub struct ManifestDir {
    root: TempDir,
}

impl ManifestDir {
    /// An empty directory.
    pub fn new() -> Result<Self> {
        crate::sweep::once();
        let root = tempfile::Builder::new()
            .prefix(&format!("{}-manifests-", crate::unique()))
            .tempdir()
            .context("making a directory of manifests")?;
        let directory = Self { root };
        for path in [directory.path(), directory.staging()] {
            std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        }
        Ok(directory)
    }

    /// A copy of a directory's `.yaml` files.
    pub fn copy_of(source: &Path) -> Result<Self> {
        let copy = Self::new()?;
        let entries = std::fs::read_dir(source)
            .with_context(|| format!("reading the directory {}", source.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("reading {}", source.display()))?.path();
            if let (Some("yaml"), Some(name)) = (
                path.extension().and_then(|end| end.to_str()),
                path.file_name().and_then(|name| name.to_str()),
            ) {
                let content =
                    std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
                copy.write(name, &content)?;
            }
        }
        Ok(copy)
    }

    /// The directory to watch.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.root.path().join("manifests")
    }

    /// Writes a file of any content, whole at once: also what is no manifest.
    pub fn write(&self, name: &str, content: &str) -> Result<()> {
        // Written beside the watched directory, on the same file system, and moved in: readers see all or nothing.
        let (staged, path) = (self.staging().join(name), self.path().join(name));
        std::fs::write(&staged, content).with_context(|| format!("writing {}", staged.display()))?;
        std::fs::rename(&staged, &path).with_context(|| format!("moving a file to {}", path.display()))
    }

    /// Removes a file.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.path().join(name);
        std::fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }

    /// The name of an object's file.
    #[must_use]
    pub fn file_name(key: &Key) -> String {
        let kind = key.kind.name().to_lowercase();
        let parts = [&kind, &key.namespace, &key.name].map(String::as_str);
        let mut name = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-");
        name.push_str(".yaml");
        name
    }

    fn staging(&self) -> PathBuf {
        self.root.path().join("staging")
    }
}

impl Publish for ManifestDir {
    fn publish(&self, object: &Object) -> Result<()> {
        let yaml = serde_saphyr::to_string(&object.json)
            .with_context(|| format!("writing {:?} as YAML", object.key))?;
        self.write(&Self::file_name(&object.key), &yaml)
    }

    fn retract(&self, key: &Key) -> Result<()> {
        self.remove(&Self::file_name(key))
    }
}

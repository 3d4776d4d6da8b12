//! A directory of manifests as a source, without an API server.
//!
//! Edits, additions and removals are noticed. If a file becomes unreadable (`file.rs`), its previous content stays in use. An
//! object in two files is taken from the first by name, and from the other when that one is removed.

mod file;
pub mod manifest;
mod store;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::blocking::run_blocking;
use crate::directory::watch_directory;
use agent_core::model::{Change, Kind};

pub use store::ManifestStore;

/// How long the directory must be quiet before it is read: an editor's save is several events.
const QUIET: Duration = Duration::from_millis(30);
/// Reading is not put off longer than this, however busy the directory is.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often to check what inotify does not report: whether the directory itself was replaced, and whether unreadable files
/// have become readable.
const POLL: Duration = Duration::from_secs(5);

/// Why a directory cannot be a source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be listed.
    #[error("cannot read the manifest directory {path}: does it exist, and is it a directory?")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Its changes cannot be watched.
    #[error(
        "cannot watch the manifest directory {path}; look at fs.inotify.max_user_instances and max_user_watches"
    )]
    Watch {
        path: PathBuf,
        #[source]
        source: notify::Error,
    },
}

/// Sends the objects of the manifests in `path`, and every change, until the receiver is dropped.
pub async fn run(path: PathBuf, node_name: Arc<str>, tx: mpsc::Sender<Change>) -> Result<(), Error> {
    run_polling(path, node_name, tx, POLL).await
}

/// The same with another time than [`POLL`].
async fn run_polling(
    path: PathBuf,
    node_name: Arc<str>,
    tx: mpsc::Sender<Change>,
    poll: Duration,
) -> Result<(), Error> {
    let (wake, mut woken) = mpsc::channel(1);
    let mut watch = Watch::start(&path, wake.clone())?;
    let mut store = ManifestStore::new(path.clone(), node_name);
    let mut first = true;
    loop {
        let (back, read) = run_blocking("manifests", move || {
            let read = store.refresh();
            (store, read)
        })
        .await
        .expect("reading manifests does not panic");
        store = back;
        let mut changes = match read {
            Ok(changes) => changes,
            Err(source) if first => return Err(Error::Open { path, source }),
            Err(source) => store.unreadable(&source),
        };
        if std::mem::take(&mut first) {
            changes.extend([Kind::Service, Kind::Slice, Kind::Node].map(Change::Synced));
        }
        for change in changes {
            if tx.send(change).await.is_err() {
                return Ok(());
            }
        }
        loop {
            tokio::select! {
                _ = woken.recv() => break,
                () = tx.closed() => return Ok(()),
                () = sleep(poll) => {
                    if watch.is_stale(&path) {
                        // Watch before reading, so that no change is missed.
                        if let Ok(new) = Watch::start(&path, wake.clone()) {
                            watch = new;
                        }
                        break;
                    }
                    if store.needs_retry() {
                        break;
                    }
                }
            }
        }
        let settled = async { while timeout(QUIET, woken.recv()).await.is_ok() {} };
        timeout(PATIENCE, settled).await.ok();
    }
}

/// A watch on a directory, and the inode that it is on.
struct Watch {
    inode: Option<(u64, u64)>,
    _watcher: notify::RecommendedWatcher,
}

impl Watch {
    fn start(path: &Path, wake: mpsc::Sender<()>) -> Result<Self, Error> {
        let fault = |source| Error::Watch { path: path.to_owned(), source };
        let inode = inode(path).map_err(|source| Error::Open { path: path.to_owned(), source })?;
        let watcher = watch_directory(path, wake).map_err(fault)?;
        Ok(Self { inode: Some(inode), _watcher: watcher })
    }

    /// Whether the path leads to another directory now, or to none for the first time.
    fn is_stale(&mut self, path: &Path) -> bool {
        let now = inode(path).ok();
        let changed = now != self.inode;
        if now.is_none() {
            self.inode = None;
        }
        changed
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests;

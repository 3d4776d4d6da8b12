//! Changes of the files in a directory.

use std::path::Path;

use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{Event, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

/// Wakes a receiver whenever something changes in this directory, for as long as the watcher lives.
pub fn watch_directory(path: &Path, wake: mpsc::Sender<()>) -> notify::Result<RecommendedWatcher> {
    // Our own reads are events, too: only changes matter.
    let matters = |kind: &EventKind| match kind {
        EventKind::Access(access) => *access == AccessKind::Close(AccessMode::Write),
        _ => true,
    };
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        if event.as_ref().map_or(true, |event| matters(&event.kind)) {
            wake.try_send(()).ok(); // A full channel means that it is woken already.
        }
    })?;
    watcher.watch(path, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

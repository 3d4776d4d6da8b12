//! The configuration file: when it says something else, this process has to begin anew (F-3).

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Error, anyhow};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::config::ConfigFile;
use agent_source::blocking::run_blocking;
use agent_source::directory::watch_directory;

/// A file that is being written is read again until it says the same twice, this far apart.
const QUIET: Duration = Duration::from_millis(100);
/// How often to look without having been told: a link may lead anywhere.
const LOOK: Duration = Duration::from_secs(5);

/// Waits until the file's content differs from what was read at the start, and says so. A file that is missing says
/// nothing.
///
/// The directory is watched, not the file: a ConfigMap is changed by exchanging a link beside it.
pub(in crate::run) async fn changed(file: ConfigFile) -> Error {
    let (wake, mut woken) = mpsc::channel(1);
    let directory = file.path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let watcher = watch_directory(directory.unwrap_or(Path::new(".")), wake);
    if let Err(error) = &watcher {
        tracing::warn!("changes of {} are noticed late: {error}", file.path.display());
    }
    let mut before = None;
    loop {
        let path = file.path.clone();
        let now = run_blocking("configuration", || fs::read_to_string(path)).await;
        let now = now.flatten().ok().filter(|text| *text != file.text);
        if now.is_some() && now == before {
            return anyhow!(
                "the configuration file {} has changed: ending, to be started again with what it says now; the kernel \
                 goes on meanwhile",
                file.path.display()
            );
        }
        let pause = if now.is_some() { QUIET } else { LOOK };
        before = now;
        if before.is_some() {
            sleep(pause).await;
        } else {
            timeout(pause, woken.recv()).await.ok(); // Told or not, it is time to look.
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Generous: the machine may be busy.
    const PATIENCE: Duration = Duration::from_secs(30);

    fn file(path: &Path) -> ConfigFile {
        ConfigFile { path: path.to_owned(), text: fs::read_to_string(path).unwrap() }
    }

    async fn said(watched: impl Future<Output = Error>) -> String {
        timeout(PATIENCE, watched).await.expect("the change is noticed").to_string()
    }

    #[tokio::test]
    async fn a_file_that_is_written_or_replaced_is_noticed() {
        // F-3.
        let there = tempfile::tempdir().unwrap();
        let path = there.path().join("config.conf");
        fs::write(&path, "a").unwrap();
        let watched = changed(file(&path));
        fs::write(&path, "b").unwrap();
        assert!(said(watched).await.contains("config.conf has changed"));
        let watched = tokio::spawn(changed(file(&path)));
        // What says the same again is no change, nor is one that has gone.
        fs::write(&path, "b").unwrap();
        fs::remove_file(&path).unwrap();
        sleep(QUIET * 3).await;
        assert!(!watched.is_finished());
        let other = there.path().join("other");
        fs::write(&other, "c").unwrap();
        fs::rename(&other, &path).unwrap();
        said(async { watched.await.unwrap() }).await;
    }

    #[tokio::test]
    async fn a_configmap_that_is_exchanged_is_noticed() {
        // F-3: config.conf → ..data/config.conf, ..data → ..1, and then → ..2.
        let there = tempfile::tempdir().unwrap();
        let at = |name: &str| there.path().join(name);
        for (version, text) in [("..1", "a"), ("..2", "b")] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("config.conf"), text).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/config.conf", at("config.conf")).unwrap();
        let watched = tokio::spawn(changed(file(&at("config.conf"))));
        symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        said(async { watched.await.unwrap() }).await;
    }
}

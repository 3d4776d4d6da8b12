//! A directory of manifests as a source: no API server needed.
//!
//! Edits, additions and removals are noticed. A file that is broken, or no file at all (`file.rs`), keeps what it
//! said before; an object in two files is taken from the first by name, and from the other when that one goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::file::{self, Refusal};
use super::manifest::{self, Content, Id, Manifest, Object};
use crate::blocking::run_blocking;
use agent_core::model::{Change, Kind};
use agent_core::model::{Node, ObjectName, Service, Slice};

/// How long the directory must be quiet before it is read: an editor's save is several events.
const QUIET: Duration = Duration::from_millis(30);
/// Reading is not put off longer than this, however busy the directory is.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often to look for what inotify does not tell: whether the directory itself has been replaced, and whether what
/// could not be read can be.
const LOOK: Duration = Duration::from_secs(5);
/// The most that is read of one file. Ten thousand Services as `kubectl get` writes them are about as much.
const MAX_FILE: u64 = 16 << 20;
/// The most that is read of all files together; what would be more is not read, by the order of names.
const MAX_TOTAL: u64 = 64 << 20;

/// Why a directory cannot be a source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be listed.
    #[error("cannot read the manifest directory {path}: does it exist, and is it a directory?")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its changes cannot be watched.
    #[error(
        "cannot watch the manifest directory {path}; look at fs.inotify.max_user_instances and max_user_watches"
    )]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: notify::Error,
    },
}

/// Sends what the manifests in `path` say, and every change of it, until nobody listens.
pub async fn run(path: PathBuf, node_name: Arc<str>, tx: mpsc::Sender<Change>) -> Result<(), Error> {
    let (wake, mut woken) = mpsc::channel(1);
    let mut watch = Watch::start(&path, wake.clone())?;
    let mut shelf = Shelf::new(path.clone(), node_name);
    let mut first = true;
    loop {
        let (back, read) = run_blocking("manifests", move || {
            let read = shelf.refresh();
            (shelf, read)
        })
        .await
        .expect("reading manifests does not panic");
        shelf = back;
        let mut changes = match read {
            Ok(changes) => changes,
            Err(source) if first => return Err(Error::Open { path, source }),
            Err(source) => shelf.lost(&source),
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
                () = sleep(LOOK) => {
                    if watch.is_stale(&path) {
                        // Watch first, read then: nothing falls between.
                        if let Ok(new) = Watch::start(&path, wake.clone()) {
                            watch = new;
                        }
                        break;
                    }
                    if shelf.lacks() {
                        break;
                    }
                }
            }
        }
        let settled = async { while timeout(QUIET, woken.recv()).await.is_ok() {} };
        let _ = timeout(PATIENCE, settled).await;
    }
}

/// A watch on a directory, and which directory that was.
struct Watch {
    inode: Option<(u64, u64)>,
    _watcher: notify::RecommendedWatcher,
}

impl Watch {
    fn start(path: &Path, wake: mpsc::Sender<()>) -> Result<Self, Error> {
        let fault = |source| Error::Watch { path: path.to_owned(), source };
        // Our own reading is an event, too: only what changes something counts.
        let matters = |kind: &EventKind| match kind {
            EventKind::Access(access) => *access == AccessKind::Close(AccessMode::Write),
            _ => true,
        };
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.as_ref().map_or(true, |event| matters(&event.kind)) {
                let _ = wake.try_send(()); // A full channel has woken it already.
            }
        })
        .map_err(fault)?;
        let inode = inode(path).map_err(|source| Error::Open { path: path.to_owned(), source })?;
        watcher.watch(path, RecursiveMode::NonRecursive).map_err(fault)?;
        Ok(Self { inode: Some(inode), _watcher: watcher })
    }

    /// Whether the path leads to another directory now, or has lost its directory since the last look.
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

/// What was loaded from one file.
#[derive(Debug, Default)]
struct File {
    hash: Option<u64>,
    manifest: Manifest,
    /// Whether it could ever be read.
    known: bool,
    /// Why the file as it is now could not be read, with its line.
    broken: Option<(u64, String)>,
    /// It would be too much together with the files before it.
    over: bool,
}

impl File {
    /// Whether what it says now is not known.
    fn is_unread(&self) -> bool {
        self.broken.is_some() || self.over
    }
}

/// What the source has said, or should.
#[derive(Debug, Default)]
struct Said {
    services: BTreeMap<ObjectName, Service>,
    slices: BTreeMap<ObjectName, Slice>,
    node: Option<Node>,
    service_ranges: BTreeMap<String, Vec<IpNet>>,
    warnings: BTreeMap<String, Vec<String>>,
    /// Something was never understood.
    torn: bool,
}

/// The files and what they amount to: the source without its watch, for whoever decides when to look.
#[derive(Debug)]
pub struct Shelf {
    path: PathBuf,
    node_name: Arc<str>,
    files: BTreeMap<String, File>,
    said: Said,
    connected: bool,
    /// [`MAX_TOTAL`].
    total: u64,
}

impl Shelf {
    /// Nothing read yet.
    #[must_use]
    pub fn new(path: PathBuf, node_name: Arc<str>) -> Self {
        Self {
            path,
            node_name,
            files: BTreeMap::new(),
            said: Said::default(),
            connected: false,
            total: MAX_TOTAL,
        }
    }

    /// Reads what has changed, and says what follows. `Err` when the directory cannot be listed.
    pub fn refresh(&mut self) -> io::Result<Vec<Change>> {
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_manifest(&name) {
                names.insert(name);
            }
        }
        self.files.retain(|name, _| names.contains(name));
        let mut room = self.total;
        for name in names {
            self.read_file(name, &mut room);
        }
        let mut changes = self.say();
        if !std::mem::replace(&mut self.connected, true) {
            changes.push(Change::Connected(true));
        }
        Ok(changes)
    }

    /// The directory cannot be read any more: what it said stays (Y-6).
    fn lost(&mut self, error: &io::Error) -> Vec<Change> {
        let object = self.path.display().to_string();
        let lines = vec![format!("cannot be read: {error}; what it said before stays")];
        self.said.warnings.insert(object.clone(), lines.clone());
        let mut changes = vec![Change::Warnings { object, lines }];
        if std::mem::replace(&mut self.connected, false) {
            changes.push(Change::Connected(false));
        }
        changes
    }

    /// Whether the directory or a file could not be read that may be readable later, without an event that tells so.
    fn lacks(&self) -> bool {
        !self.connected || self.files.values().any(|file| file.is_unread() && file.hash.is_none())
    }

    fn read_file(&mut self, name: String, room: &mut u64) {
        let read = file::read(&self.path.join(&name), MAX_FILE, *room);
        let file = self.files.entry(name.clone()).or_default();
        file.over = matches!(read, Err(Refusal::NoRoom));
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(refusal) => {
                file.hash = None;
                file.broken = (!file.over).then(|| (1, refusal.to_string()));
                return;
            }
        };
        *room -= bytes.len() as u64;
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        let hash = Some(hasher.finish());
        if file.hash == hash {
            return;
        }
        file.hash = hash;
        match manifest::read(&String::from_utf8_lossy(&bytes), name.ends_with(".json"), &self.node_name) {
            Ok(mut manifest) => {
                file.broken = None;
                // An object that cannot be read now keeps what it said before.
                let kept =
                    manifest.faults.iter().filter_map(|fault| fault.id.as_ref()).filter_map(|id| {
                        file.manifest.objects.iter().find(|object| object.id == *id).cloned()
                    });
                let kept: Vec<Object> = kept.collect();
                manifest.objects.extend(kept);
                file.manifest = manifest;
                file.known = true;
            }
            Err(fault) => file.broken = Some((fault.line, fault.text)),
        }
    }

    /// The difference between what the files amount to and what has been said.
    fn say(&mut self) -> Vec<Change> {
        let new = self.amount();
        let mut changes = Vec::new();
        difference(&self.said.services, &new.services, |name, service| {
            changes.push(Change::Service(name.clone(), service.cloned()));
        });
        difference(&self.said.slices, &new.slices, |name, slice| {
            changes.push(Change::Slice(name.clone(), slice.cloned()));
        });
        if self.said.node != new.node {
            changes.push(Change::Node(new.node.clone()));
        }
        difference(&self.said.service_ranges, &new.service_ranges, |name, ranges| {
            changes.push(Change::ServiceRanges(name.clone(), ranges.cloned()));
        });
        difference(&self.said.warnings, &new.warnings, |object, lines| {
            let lines = lines.cloned().unwrap_or_default();
            changes.push(Change::Warnings { object: object.clone(), lines });
        });
        if self.said.torn != new.torn {
            changes.push(Change::Whole(!new.torn));
        }
        self.said = new;
        changes
    }

    /// What all files together say: of an object in several, the first file's.
    fn amount(&self) -> Said {
        let mut said = Said::default();
        let mut chosen: BTreeMap<&Id, (&str, &Object)> = BTreeMap::new();
        for (name, file) in &self.files {
            let mut warn = |line: u64, text: &str| {
                said.warnings.entry(format!("{name}:{line}")).or_default().push(text.to_owned());
            };
            if let Some((line, text)) = &file.broken {
                let then = match file.manifest.objects.is_empty() {
                    true => "nothing in the file is used until it can be read",
                    false => "what the file said before stays",
                };
                warn(*line, &format!("{text}; {then}"));
            }
            said.torn |= file.is_unread() && !file.known;
            for fault in &file.manifest.faults {
                let kept = file.manifest.objects.iter().any(|object| Some(&object.id) == fault.id.as_ref());
                let stays = if kept { "; what it said before stays" } else { "" };
                said.torn |= !kept;
                warn(fault.line, &format!("{}{stays}", fault.text));
            }
            for object in &file.manifest.objects {
                match chosen.get(&object.id) {
                    None => {
                        chosen.insert(&object.id, (name, object));
                    }
                    Some((first, _)) => said
                        .warnings
                        .entry(object.id.to_string())
                        .or_default()
                        .push(format!("in {name} is ignored: {first} has it already and comes first")),
                }
            }
        }
        let mut over = self.files.iter().filter(|(_, file)| file.over);
        if let Some((first, _)) = over.next() {
            let line = format!(
                "has more than {} bytes of manifests, the most that is read: {first} and {} files after it are not \
                 read; what they said before stays",
                self.total,
                over.count()
            );
            said.warnings.entry(self.path.display().to_string()).or_default().push(line);
        }
        let sliced: BTreeSet<ObjectName> = chosen
            .values()
            .filter_map(|(_, object)| match &object.content {
                Content::Slice(Some(slice)) => Some(slice.service.clone()),
                _ => None,
            })
            .collect();
        for (id, (name, object)) in chosen {
            let told = object.warnings.iter().map(|line| format!("in {name}: {line}"));
            let told: Vec<String> = told.collect();
            if !told.is_empty() {
                said.warnings.entry(id.to_string()).or_default().extend(told);
            }
            said.put(id, &object.content, &sliced);
        }
        said
    }
}

impl Said {
    fn put(&mut self, id: &Id, content: &Content, sliced: &BTreeSet<ObjectName>) {
        match (id, content) {
            (Id::Service(name), Content::Service(Some(service))) => {
                self.services.insert(name.clone(), service.clone());
            }
            (Id::Slice(name), Content::Slice(Some(slice))) => {
                self.slices.insert(name.clone(), slice.clone());
            }
            // Endpoints are the old way of saying what slices say: both would count everything twice.
            (Id::Endpoints(name), Content::Endpoints(slices)) if !sliced.contains(name) => {
                for (i, slice) in slices.iter().enumerate() {
                    // The slash keeps the name apart from every real slice.
                    let name = ObjectName::new(&name.namespace, &format!("{}/endpoints-{i}", name.name));
                    self.slices.insert(name, slice.clone());
                }
            }
            (Id::Node, Content::Node(node)) => self.node = Some(node.clone()),
            (Id::ServiceCidr(name), Content::ServiceRanges(ranges)) => {
                self.service_ranges.insert(name.clone(), ranges.clone());
            }
            _ => {}
        }
    }
}

/// Calls `tell` for every key whose value differs: with the new one, or `None` when it has gone.
fn difference<K: Ord, V: PartialEq>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
    mut tell: impl FnMut(&K, Option<&V>),
) {
    for key in old.keys().filter(|key| !new.contains_key(key)) {
        tell(key, None);
    }
    for (key, value) in new {
        if old.get(key) != Some(value) {
            tell(key, Some(value));
        }
    }
}

fn is_manifest(name: &str) -> bool {
    let known = [".yaml", ".yml", ".json"].iter().any(|end| name.ends_with(end));
    known && !name.starts_with('.') // Editors keep their drafts in hidden files.
}

#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;

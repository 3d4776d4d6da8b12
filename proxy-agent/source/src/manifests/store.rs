//! The manifest store: which objects the files of a directory hold, and what has changed since the last snapshot.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;

use super::file::{self, ReadError};
use super::manifest::{self, Content, Id, Manifest, Object};
use agent_core::model::{Change, Node, ObjectName, Service, Slice};

/// The largest file that is read: about ten thousand Services as `kubectl get` writes them.
const FILE_LIMIT: u64 = 16 << 20;
/// The most that is read of all files together, in the order of their names.
const TOTAL_LIMIT: u64 = 64 << 20;

/// What was read from one file.
#[derive(Debug, Default)]
struct File {
    hash: Option<u64>,
    manifest: Manifest,
    /// Whether it has ever been read.
    known: bool,
    /// The line and the error of its current, unreadable content.
    broken: Option<(u64, String)>,
    /// It would exceed the limit for all files.
    over_limit: bool,
}

impl File {
    fn is_unread(&self) -> bool {
        self.broken.is_some() || self.over_limit
    }
}

/// All objects of the directory, as they were last sent or are to be sent; their files have them, too.
#[derive(Debug, Default)]
struct Snapshot {
    services: BTreeMap<ObjectName, Arc<Service>>,
    slices: BTreeMap<ObjectName, Arc<Slice>>,
    node: Option<Node>,
    service_ranges: BTreeMap<String, Vec<IpNet>>,
    warnings: BTreeMap<String, Vec<String>>,
    /// A file or an object has never been read.
    incomplete: bool,
}

/// The files and their objects: the source without the watching, for callers that decide when to read.
#[derive(Debug)]
pub struct ManifestStore {
    path: PathBuf,
    node_name: Arc<str>,
    files: BTreeMap<String, File>,
    snapshot: Snapshot,
    connected: bool,
    /// [`TOTAL_LIMIT`].
    pub(super) total: u64,
}

impl ManifestStore {
    #[must_use]
    pub fn new(path: PathBuf, node_name: Arc<str>) -> Self {
        Self {
            path,
            node_name,
            files: BTreeMap::new(),
            snapshot: Snapshot::default(),
            connected: false,
            total: TOTAL_LIMIT,
        }
    }

    /// Reads changed files and returns the changes. `Err` when the directory cannot be listed.
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
        let mut remaining = self.total;
        for name in names {
            self.read_file(name, &mut remaining);
        }
        let mut changes = self.diff();
        if !std::mem::replace(&mut self.connected, true) {
            changes.push(Change::Connected(true));
        }
        Ok(changes)
    }

    /// The directory has become unreadable: its objects stay in use (Y-6).
    pub(super) fn unreadable(&mut self, error: &io::Error) -> Vec<Change> {
        let object = self.path.display().to_string();
        let lines = vec![format!("cannot be read: {error}; its previous version stays in use")];
        self.snapshot.warnings.insert(object.clone(), lines.clone());
        let mut changes = vec![Change::Warnings { object, lines }];
        if std::mem::replace(&mut self.connected, false) {
            changes.push(Change::Connected(false));
        }
        changes
    }

    /// Whether something unreadable may become readable without an event.
    pub(super) fn needs_retry(&self) -> bool {
        !self.connected || self.files.values().any(|file| file.is_unread() && file.hash.is_none())
    }

    fn read_file(&mut self, name: String, remaining: &mut u64) {
        let read = file::read(&self.path.join(&name), FILE_LIMIT, *remaining);
        let file = self.files.entry(name.clone()).or_default();
        file.over_limit = matches!(read, Err(ReadError::OverTotal));
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(error) => {
                file.hash = None;
                file.broken = (!file.over_limit).then(|| (1, error.to_string()));
                return;
            }
        };
        *remaining -= bytes.len() as u64;
        let hash = Some(crate::hash(&bytes));
        if file.hash == hash {
            return;
        }
        file.hash = hash;
        match manifest::read(&String::from_utf8_lossy(&bytes), name.ends_with(".json"), &self.node_name) {
            Ok(mut manifest) => {
                file.broken = None;
                // Of an unreadable object the previous version stays in use.
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

    /// The changes since the last snapshot.
    fn diff(&mut self) -> Vec<Change> {
        let new = self.merge();
        let mut changes = Vec::new();
        difference(&self.snapshot.services, &new.services, |name, service| {
            changes.push(Change::Service(name.clone(), service.map(|service| Service::clone(service))));
        });
        difference(&self.snapshot.slices, &new.slices, |name, slice| {
            changes.push(Change::Slice(name.clone(), slice.map(|slice| Slice::clone(slice))));
        });
        if self.snapshot.node != new.node {
            changes.push(Change::Node(new.node.clone()));
        }
        difference(&self.snapshot.service_ranges, &new.service_ranges, |name, ranges| {
            changes.push(Change::ServiceRanges(name.clone(), ranges.cloned()));
        });
        difference(&self.snapshot.warnings, &new.warnings, |object, lines| {
            let lines = lines.cloned().unwrap_or_default();
            changes.push(Change::Warnings { object: object.clone(), lines });
        });
        if self.snapshot.incomplete != new.incomplete {
            changes.push(Change::Whole(!new.incomplete));
        }
        self.snapshot = new;
        changes
    }

    /// Merges all files. An object in several is taken from the first.
    fn merge(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        let mut chosen: BTreeMap<&Id, (&str, &Object)> = BTreeMap::new();
        for (name, file) in &self.files {
            let mut warn = |line: u64, text: &str| {
                snapshot.warnings.entry(format!("{name}:{line}")).or_default().push(text.to_owned());
            };
            if let Some((line, text)) = &file.broken {
                let then = match file.manifest.objects.is_empty() {
                    true => "nothing in it is used until it can be read",
                    false => "its previous content stays in use",
                };
                warn(*line, &format!("{text}; {then}"));
            }
            snapshot.incomplete |= file.is_unread() && !file.known;
            for fault in &file.manifest.faults {
                let kept = file.manifest.objects.iter().any(|object| Some(&object.id) == fault.id.as_ref());
                let stays = if kept { "; its previous version stays in use" } else { "" };
                snapshot.incomplete |= !kept;
                warn(fault.line, &format!("{}{stays}", fault.text));
            }
            for object in &file.manifest.objects {
                match chosen.get(&object.id) {
                    None => {
                        chosen.insert(&object.id, (name, object));
                    }
                    Some((first, _)) => snapshot
                        .warnings
                        .entry(object.id.to_string())
                        .or_default()
                        .push(format!("in {name} is ignored: {first} comes first and has it, too")),
                }
            }
        }
        let mut over_limit = self.files.iter().filter(|(_, file)| file.over_limit);
        if let Some((first, _)) = over_limit.next() {
            let line = format!(
                "has more than {} bytes of manifests, the most that is read: {first} and {} files after it are not \
                 read; their previous content stays in use",
                self.total,
                over_limit.count()
            );
            snapshot.warnings.entry(self.path.display().to_string()).or_default().push(line);
        }
        let sliced: BTreeSet<ObjectName> = chosen
            .values()
            .filter_map(|(_, object)| match &object.content {
                Content::Slice(Some(slice)) => Some(slice.service.clone()),
                _ => None,
            })
            .collect();
        for (id, (name, object)) in chosen {
            if !object.warnings.is_empty() {
                let lines = object.warnings.iter().map(|line| format!("in {name}: {line}"));
                snapshot.warnings.entry(id.to_string()).or_default().extend(lines);
            }
            snapshot.insert(id, &object.content, &sliced);
        }
        snapshot
    }
}

impl Snapshot {
    fn insert(&mut self, id: &Id, content: &Content, sliced: &BTreeSet<ObjectName>) {
        match (id, content) {
            (Id::Service(name), Content::Service(Some(service))) => {
                self.services.insert(name.clone(), service.clone());
            }
            (Id::Slice(name), Content::Slice(Some(slice))) => {
                self.slices.insert(name.clone(), slice.clone());
            }
            // A Service with slices needs no Endpoints: both would count everything twice.
            (Id::Endpoints(name), Content::Endpoints(slices)) if !sliced.contains(name) => {
                for (i, slice) in slices.iter().enumerate() {
                    // No real slice has a slash in its name.
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

/// Calls `changed` for every key whose value differs, with the new one, or `None` if it was removed.
fn difference<K: Ord, V: PartialEq>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
    mut changed: impl FnMut(&K, Option<&V>),
) {
    for key in old.keys().filter(|key| !new.contains_key(key)) {
        changed(key, None);
    }
    for (key, value) in new {
        if old.get(key) != Some(value) {
            changed(key, Some(value));
        }
    }
}

fn is_manifest(name: &str) -> bool {
    let known = [".yaml", ".yml", ".json"].iter().any(|end| name.ends_with(end));
    known && !name.starts_with('.') // Editors keep drafts in hidden files.
}

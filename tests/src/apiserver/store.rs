//! The objects with their versions, and the changes since the last compaction.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde_json::{Value, json};

use super::selector::Filter;
use crate::object::{Key, Kind, Object};

/// One write: the object before and after it.
#[derive(Clone)]
struct Change {
    version: u64,
    key: Key,
    before: Option<Arc<Value>>,
    after: Option<Arc<Value>>,
}

/// What a server keeps.
#[derive(Clone, Default)]
pub(super) struct Store {
    version: u64,
    /// The version before which changes are forgotten.
    oldest: u64,
    /// Shared with those who are being told of them.
    objects: BTreeMap<Key, Arc<Value>>,
    changes: Vec<Change>,
    /// The rest of lists that are being read in pages, by their continue token.
    pages: HashMap<String, (u64, Vec<Arc<Value>>)>,
}

/// One page of a list.
pub(super) struct Page {
    pub(super) version: u64,
    pub(super) items: Vec<Arc<Value>>,
    /// The token for the next page, and how many objects are left for it.
    pub(super) next: Option<(String, usize)>,
}

/// A version that is no longer known (`410 Gone`).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

impl Store {
    /// Creates or replaces an object.
    pub(super) fn put(&mut self, object: &Object) {
        self.version += 1;
        let mut json = object.json.clone();
        let before = self.objects.get(&object.key).cloned();
        // A uid stays with the object; a new object of an old name has another, unless it brings one.
        if let Some(old) = &before {
            json["metadata"]["uid"] = old["metadata"]["uid"].clone();
        } else if !json["metadata"]["uid"].is_string() {
            json["metadata"]["uid"] = json!(format!("00000000-0000-4000-8000-{:012x}", self.version));
        }
        json["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let json = Arc::new(json);
        self.objects.insert(object.key.clone(), json.clone());
        self.changes.push(Change {
            version: self.version,
            key: object.key.clone(),
            before,
            after: Some(json),
        });
    }

    /// Deletes an object; whether there was one.
    pub(super) fn delete(&mut self, key: &Key) -> bool {
        let Some(before) = self.objects.remove(key) else { return false };
        self.version += 1;
        self.changes.push(Change {
            version: self.version,
            key: key.clone(),
            before: Some(before),
            after: None,
        });
        true
    }

    /// Forgets all changes: every version handed out so far is gone.
    pub(super) fn compact(&mut self) {
        self.version += 1;
        self.oldest = self.version;
        self.changes.clear();
        self.pages.clear();
    }

    /// What it was this many changes ago.
    pub(super) fn past(&self, changes: usize) -> Self {
        let mut past = self.clone();
        for _ in 0..changes {
            let Some(change) = past.changes.pop() else { break };
            past.version = change.version - 1;
            match change.before {
                Some(before) => drop(past.objects.insert(change.key, before)),
                None => drop(past.objects.remove(&change.key)),
            }
        }
        past
    }

    /// The current version.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// The version of the last change of a kind.
    pub(super) fn version_of(&self, kind: Kind) -> u64 {
        let of_kind = self.changes.iter().rev().find(|change| change.key.kind == kind);
        of_kind.map_or(self.oldest, |change| change.version)
    }

    /// One object.
    pub(super) fn get(&self, key: &Key) -> Option<&Value> {
        self.objects.get(key).map(|object| &**object)
    }

    /// Whether there is any object of a kind.
    pub(super) fn has(&self, kind: Kind) -> bool {
        self.objects.keys().any(|key| key.kind == kind)
    }

    /// All objects of a kind that are selected.
    pub(super) fn all(&self, kind: Kind, filter: &Filter) -> Vec<Arc<Value>> {
        let of_kind = self.objects.iter().filter(|(key, _)| key.kind == kind);
        of_kind.map(|(_, object)| object).filter(|object| filter.selects(object)).cloned().collect()
    }

    /// A page of a list: the first, or the one a token stands for. All pages show the same version.
    pub(super) fn page(
        &mut self,
        kind: Kind,
        filter: &Filter,
        limit: Option<usize>,
        token: Option<&str>,
    ) -> Result<Page, Gone> {
        let (version, mut items) = match token {
            Some(token) => self.pages.get(token).cloned().ok_or(Gone)?,
            None => (self.version, self.all(kind, filter)),
        };
        let rest = limit.filter(|limit| *limit < items.len()).map(|limit| items.split_off(limit));
        let next = rest.map(|rest| {
            let (token, left) = (format!("page-{}-{version}", self.pages.len()), rest.len());
            self.pages.insert(token.clone(), (version, rest));
            (token, left)
        });
        Ok(Page { version, items, next })
    }

    /// What a watch gets after a version: events, and the version up to which they go.
    pub(super) fn since(&self, version: u64, kind: Kind, filter: &Filter) -> Result<(Vec<Value>, u64), Gone> {
        if version < self.oldest {
            return Err(Gone);
        }
        let fresh = self.changes.iter().filter(|change| change.version > version && change.key.kind == kind);
        Ok((fresh.filter_map(|change| change.event(filter)).collect(), self.version))
    }
}

impl Change {
    /// The event as a filtered watch sees it: what stops being selected is deleted for it.
    fn event(&self, filter: &Filter) -> Option<Value> {
        let selected =
            |object: &Option<Arc<Value>>| object.as_ref().is_some_and(|object| filter.selects(object));
        let (kind, object) = match (selected(&self.before), selected(&self.after)) {
            (false, true) => ("ADDED", Arc::unwrap_or_clone(self.after.clone()?)),
            (true, true) => ("MODIFIED", Arc::unwrap_or_clone(self.after.clone()?)),
            (true, false) => {
                // The last state that was selected, with the version of the change.
                let mut object = Arc::unwrap_or_clone(self.before.clone()?);
                object["metadata"]["resourceVersion"] = json!(self.version.to_string());
                ("DELETED", object)
            }
            (false, false) => return None,
        };
        Some(json!({ "type": kind, "object": object }))
    }
}

//! One kind of object, from what the API server says to changes: only what is news is told.
//!
//! A first list is told as it comes, since nothing is programmed before it is whole. A later one is held back until its
//! end is known and it is no older than what is known already: half a list, or one of yesterday, changes nothing.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::convert;
use super::heard::Heard;
use agent_core::model::ObjectName;
use agent_core::model::{Change, Kind};

/// Nobody listens any more.
#[derive(Debug)]
pub(super) struct Closed;

/// Where a kind's changes go, and how it stands with the server.
pub(super) struct Line {
    pub(super) kind: Kind,
    pub(super) tx: mpsc::Sender<Change>,
    /// A bit for every kind that the server does not answer: connected is when there is none.
    pub(super) down: Arc<AtomicU32>,
}

impl Line {
    async fn send(&self, change: Change) -> Result<(), Closed> {
        self.tx.send(change).await.map_err(|_| Closed)
    }

    /// Whether this kind is one that a server may well lack, or not show: its silence says nothing.
    pub(super) fn is_optional(&self) -> bool {
        matches!(self.kind, Kind::ServiceCidr | Kind::Pod)
    }

    /// Says that the server answers for this kind, or does not.
    pub(super) async fn connected(&self, up: bool) -> Result<(), Closed> {
        if self.is_optional() {
            return Ok(());
        }
        let bit = 1 << self.kind as u32;
        let before = if up {
            self.down.fetch_and(!bit, Ordering::Relaxed)
        } else {
            self.down.fetch_or(bit, Ordering::Relaxed)
        };
        let after = if up { before & !bit } else { before | bit };
        if (before == 0) != (after == 0) {
            self.send(Change::Connected(after == 0)).await?;
        }
        Ok(())
    }
}

/// Told of each object before it is converted.
pub(super) type Hook<K> = Box<dyn Fn(&K) + Send + Sync>;

/// One kind of object, from the API server to changes.
pub(super) struct Feed<K, T> {
    pub(super) line: Line,
    pub(super) what: &'static str,
    pub(super) labels: Option<String>,
    pub(super) fields: Option<String>,
    pub(super) convert: fn(&K) -> (Option<T>, Vec<String>),
    pub(super) change: fn(ObjectName, Option<T>) -> Change,
    /// When what it shows happened, if it says so.
    pub(super) triggered: fn(&K) -> Option<Timestamp>,
    /// Who else looks at these objects.
    pub(super) hook: Option<Hook<K>>,
}

/// What was sent of an object: enough to take it back, and to tell whether it is news. The object itself
/// lives in the model alone; a second copy of a large cluster would be the agent's largest table.
#[derive(Default)]
struct Sent {
    fingerprint: Option<u64>,
    warnings: Vec<String>,
}

/// What was sent of all objects.
#[derive(Default)]
pub(super) struct Known {
    sent: HashMap<ObjectName, Sent>,
    /// Whether a list has been whole once.
    synced: bool,
}

/// An object as it was heard of, converted.
struct News<T> {
    name: ObjectName,
    object: Option<T>,
    fingerprint: Option<u64>,
    triggered: Option<Timestamp>,
    warnings: Vec<String>,
}

/// A list that is coming in.
pub(super) struct Listing<T> {
    names: HashSet<ObjectName>,
    /// What differs from what is known, if it must wait.
    held: Vec<News<T>>,
}

impl<T> Listing<T> {
    pub(super) fn new() -> Self {
        Self { names: HashSet::new(), held: Vec::new() }
    }
}

impl<K, T> Feed<K, T>
where
    K: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    T: Hash + Send + 'static,
{
    /// An object of a list.
    pub(super) async fn listed(
        &self,
        heard: Heard<K>,
        listing: &mut Listing<T>,
        known: &mut Known,
    ) -> Result<(), Closed> {
        let news = self.convert(&heard, known);
        listing.names.insert(news.name.clone());
        let same = |sent: &Sent| sent.fingerprint == news.fingerprint && sent.warnings == news.warnings;
        if !known.synced || known.sent.get(&news.name).is_some_and(same) {
            return self.tell(news, known).await;
        }
        listing.held.push(news);
        Ok(())
    }

    /// A list is whole.
    pub(super) async fn complete(&self, listing: Listing<T>, known: &mut Known) -> Result<(), Closed> {
        let Listing { names, held } = listing;
        for news in held {
            self.tell(news, known).await?;
        }
        let vanished: Vec<ObjectName> =
            known.sent.keys().filter(|name| !names.contains(name)).cloned().collect();
        for name in vanished {
            self.remove(name, known).await?;
        }
        if !std::mem::replace(&mut known.synced, true) {
            self.line.send(Change::Synced(self.line.kind)).await?;
        }
        Ok(())
    }

    /// An object of a watch.
    pub(super) async fn apply(&self, heard: Heard<K>, known: &mut Known) -> Result<(), Closed> {
        let news = self.convert(&heard, known);
        self.tell(news, known).await
    }

    /// An object that is gone: it counts by its name (S-2, Y-8).
    pub(super) async fn deleted(&self, heard: &Heard<K>, known: &mut Known) -> Result<(), Closed> {
        self.remove(convert::object_name(&heard.metadata), known).await
    }

    fn convert(&self, heard: &Heard<K>, known: &Known) -> News<T> {
        let name = convert::object_name(&heard.metadata);
        match &heard.object {
            Ok(object) => {
                if let Some(hook) = &self.hook {
                    hook(object);
                }
                let triggered = (self.triggered)(object);
                let (object, warnings) = (self.convert)(object);
                let fingerprint = object.as_ref().map(fingerprint);
                News { name, object, fingerprint, triggered, warnings }
            }
            // What was known of it stays, as with every object that has become unreadable.
            Err(error) => {
                let fingerprint = known.sent.get(&name).and_then(|sent| sent.fingerprint);
                let warnings = vec![format!("cannot be read: {error}")];
                News { name, object: None, fingerprint, triggered: None, warnings }
            }
        }
    }

    async fn tell(&self, news: News<T>, known: &mut Known) -> Result<(), Closed> {
        let News { name, object, fingerprint, triggered, warnings } = news;
        let sent = known.sent.remove(&name).unwrap_or_default();
        if fingerprint != sent.fingerprint {
            if let (Some(at), true) = (triggered, fingerprint.is_some()) {
                self.line.send(Change::Triggered(name.clone(), at)).await?;
            }
            self.line.send((self.change)(name.clone(), object)).await?;
        } else if object.is_some() {
            self.line.send(Change::Repeated(self.line.kind)).await?;
        }
        if sent.warnings != warnings {
            self.warn(&name, warnings.clone()).await?;
        }
        if fingerprint.is_some() || !warnings.is_empty() {
            known.sent.insert(name, Sent { fingerprint, warnings });
        }
        Ok(())
    }

    async fn remove(&self, name: ObjectName, known: &mut Known) -> Result<(), Closed> {
        let Some(sent) = known.sent.remove(&name) else { return Ok(()) };
        if !sent.warnings.is_empty() {
            self.warn(&name, Vec::new()).await?;
        }
        if sent.fingerprint.is_some() {
            self.line.send((self.change)(name, None)).await?;
        }
        Ok(())
    }

    async fn warn(&self, name: &ObjectName, lines: Vec<String>) -> Result<(), Closed> {
        let object = match self.line.kind {
            Kind::Node | Kind::ServiceCidr => format!("{} {}", self.what, name.name),
            Kind::Service | Kind::Slice | Kind::Pod => format!("{} {name}", self.what),
        };
        self.line.send(Change::Warnings { object, lines }).await
    }
}

fn fingerprint<T: Hash>(object: &T) -> u64 {
    let mut hasher = DefaultHasher::new();
    object.hash(&mut hasher);
    hasher.finish()
}

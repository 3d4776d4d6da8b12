//! One kind of object, from the API server to changes: only differences are sent.
//!
//! The objects of the first list are sent as they come, since nothing is programmed before the list is complete. Those of a
//! relist are held back until it is complete and known to be no older than what was sent: a truncated or stale list
//! changes nothing.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::decoded::Decoded;
use crate::{convert, hash};
use agent_core::model::{Change, Kind, Names, ObjectName};

/// The receiver of changes has been dropped.
#[derive(Debug)]
pub(super) struct Closed;

/// Where the changes of a kind go, and whether the server answers for it.
pub(in crate::api) struct Output {
    pub(in crate::api) kind: Kind,
    pub(in crate::api) tx: mpsc::Sender<Change>,
    /// A bit for every kind that the server does not answer for; connected means none.
    pub(in crate::api) unavailable: Arc<AtomicU32>,
}

impl Output {
    async fn send(&self, change: Change) -> Result<(), Closed> {
        self.tx.send(change).await.map_err(|_| Closed)
    }

    /// Whether the server need not serve this kind: its absence does not count as disconnected.
    pub(super) fn is_optional(&self) -> bool {
        matches!(self.kind, Kind::ServiceCidr | Kind::Pod)
    }

    /// Reports whether the server answers for this kind.
    pub(super) async fn connected(&self, up: bool) -> Result<(), Closed> {
        if self.is_optional() {
            return Ok(());
        }
        let bit = 1 << self.kind as u32;
        let before = if up {
            self.unavailable.fetch_and(!bit, Ordering::Relaxed)
        } else {
            self.unavailable.fetch_or(bit, Ordering::Relaxed)
        };
        let after = if up { before & !bit } else { before | bit };
        if (before == 0) != (after == 0) {
            self.send(Change::Connected(after == 0)).await?;
        }
        Ok(())
    }
}

/// Called with each object before it is converted.
pub(in crate::api) type Observer<K> = Box<dyn Fn(&K) + Send + Sync>;

/// A kind of object that can be listed and watched.
pub(in crate::api) trait Watched:
    kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static
{
}

impl<K> Watched for K where
    K: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static
{
}

/// One kind of object, from the API server to changes.
pub(in crate::api) struct Reflector<K, T> {
    pub(in crate::api) output: Output,
    pub(in crate::api) resource: &'static str,
    pub(in crate::api) label_selector: Option<String>,
    pub(in crate::api) field_selector: Option<String>,
    pub(in crate::api) convert: fn(&K) -> (Option<T>, Vec<String>),
    pub(in crate::api) change: fn(ObjectName, Option<T>) -> Change,
    /// When the change that an object shows happened, if its annotations have that.
    pub(in crate::api) trigger_time: fn(&K) -> Option<Timestamp>,
    pub(in crate::api) observer: Option<Observer<K>>,
}

/// What was sent of all objects: enough to remove one, and to detect a change. The objects themselves are only kept in the
/// model; a second copy of a large cluster would be the agent's largest table.
#[derive(Default)]
pub(super) struct Known {
    fingerprints: HashMap<ObjectName, u64>,
    /// Of those that have some, sent or not.
    warnings: HashMap<ObjectName, Vec<String>>,
    namespaces: Names,
    /// Whether a list has been complete once.
    synced: bool,
}

impl Known {
    fn fingerprint(&self, name: &ObjectName) -> Option<u64> {
        self.fingerprints.get(name).copied()
    }

    fn warnings(&self, name: &ObjectName) -> &[String] {
        self.warnings.get(name).map_or(&[], Vec::as_slice)
    }
}

/// An object that was received and converted.
struct Update<T> {
    name: ObjectName,
    object: Option<T>,
    fingerprint: Option<u64>,
    trigger_time: Option<Timestamp>,
    warnings: Vec<String>,
}

/// A list that is being received.
pub(super) struct Listing<T> {
    names: HashSet<ObjectName>,
    /// Differences that wait for the end of a relist.
    held: Vec<Update<T>>,
}

impl<T> Listing<T> {
    pub(super) fn new() -> Self {
        Self { names: HashSet::new(), held: Vec::new() }
    }
}

impl<K: Watched, T: Hash + Send + 'static> Reflector<K, T> {
    /// An object of a list.
    pub(super) async fn init_apply(
        &self,
        decoded: Decoded<K>,
        listing: &mut Listing<T>,
        known: &mut Known,
    ) -> Result<(), Closed> {
        let update = self.convert(&decoded, known);
        listing.names.insert(update.name.clone());
        let same = known.fingerprint(&update.name) == update.fingerprint
            && known.warnings(&update.name) == update.warnings;
        if !known.synced || same {
            return self.publish(update, known).await;
        }
        listing.held.push(update);
        Ok(())
    }

    /// A list is complete: what it lacks is removed.
    pub(super) async fn init_done(&self, listing: Listing<T>, known: &mut Known) -> Result<(), Closed> {
        let Listing { names, held } = listing;
        for update in held {
            self.publish(update, known).await?;
        }
        let sent = known.fingerprints.keys().chain(known.warnings.keys());
        let vanished: HashSet<ObjectName> = sent.filter(|name| !names.contains(name)).cloned().collect();
        for name in vanished {
            self.remove(name, known).await?;
        }
        if !std::mem::replace(&mut known.synced, true) {
            self.output.send(Change::Synced(self.output.kind)).await?;
        }
        Ok(())
    }

    /// An object of a watch.
    pub(super) async fn apply(&self, decoded: Decoded<K>, known: &mut Known) -> Result<(), Closed> {
        let update = self.convert(&decoded, known);
        self.publish(update, known).await
    }

    /// A deleted object: only its name matters (S-2, Y-8).
    pub(super) async fn delete(&self, decoded: &Decoded<K>, known: &mut Known) -> Result<(), Closed> {
        self.remove(convert::object_name(&decoded.metadata), known).await
    }

    fn convert(&self, decoded: &Decoded<K>, known: &mut Known) -> Update<T> {
        let mut name = convert::object_name(&decoded.metadata);
        known.namespaces.share(&mut name.namespace);
        match &decoded.object {
            Ok(object) => {
                if let Some(observer) = &self.observer {
                    observer(object);
                }
                let trigger_time = (self.trigger_time)(object);
                let (object, warnings) = (self.convert)(object);
                let fingerprint = object.as_ref().map(hash);
                Update { name, object, fingerprint, trigger_time, warnings }
            }
            // What was known stays in use, as with every object that becomes unreadable.
            Err(error) => {
                let fingerprint = known.fingerprint(&name);
                let warnings = vec![format!("cannot be read: {error}")];
                Update { name, object: None, fingerprint, trigger_time: None, warnings }
            }
        }
    }

    async fn publish(&self, update: Update<T>, known: &mut Known) -> Result<(), Closed> {
        let Update { name, object, fingerprint, trigger_time, warnings } = update;
        if fingerprint != known.fingerprint(&name) {
            if let (Some(at), true) = (trigger_time, fingerprint.is_some()) {
                self.output.send(Change::Triggered(name.clone(), at)).await?;
            }
            self.output.send((self.change)(name.clone(), object)).await?;
        } else if object.is_some() {
            self.output.send(Change::Repeated(self.output.kind)).await?;
        }
        if known.warnings(&name) != warnings {
            self.warn(&name, warnings.clone()).await?;
        }
        match warnings.is_empty() {
            true => known.warnings.remove(&name),
            false => known.warnings.insert(name.clone(), warnings),
        };
        match fingerprint {
            Some(fingerprint) => known.fingerprints.insert(name, fingerprint),
            None => known.fingerprints.remove(&name),
        };
        Ok(())
    }

    async fn remove(&self, name: ObjectName, known: &mut Known) -> Result<(), Closed> {
        if known.warnings.remove(&name).is_some() {
            self.warn(&name, Vec::new()).await?;
        }
        if known.fingerprints.remove(&name).is_some() {
            self.output.send((self.change)(name, None)).await?;
        }
        Ok(())
    }

    async fn warn(&self, name: &ObjectName, lines: Vec<String>) -> Result<(), Closed> {
        let object = match self.output.kind {
            Kind::Node | Kind::ServiceCidr => format!("{} {}", self.resource, name.name),
            Kind::Service | Kind::Slice | Kind::Pod => format!("{} {name}", self.resource),
        };
        self.output.send(Change::Warnings { object, lines }).await
    }
}

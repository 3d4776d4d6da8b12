//! The tables as they are, with the indices that make a plan cost no more than its change.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proxy_common::abi::{Backend, Frontend, FrontendKey, Run, ServiceName, SourceKey, address, frontend};
use proxy_common::addr::{Addr, Port};

use super::{Actual, Step};

/// Everything in the tables that bears one service id.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) name: Option<ServiceName>,
    pub(super) frontends: BTreeSet<FrontendKey>,
    pub(super) backends: BTreeMap<(Addr, Port), u32>,
    /// Live indices whose endpoint has another index already.
    pub(super) strays: BTreeSet<u32>,
    pub(super) sources: BTreeSet<SourceKey>,
}

impl Held {
    fn is_empty(&self) -> bool {
        let Self { name, frontends, backends, strays, sources } = self;
        name.is_none()
            && frontends.is_empty()
            && backends.is_empty()
            && strays.is_empty()
            && sources.is_empty()
    }
}

/// How many frontends of each kind stand at an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Uses {
    pub(super) internal: u32,
    pub(super) external: u32,
}

impl Uses {
    pub(super) fn add(&mut self, flags: u32) {
        match use_of(flags) {
            address::CLUSTER_IP => self.internal += 1,
            address::EXTERNAL => self.external += 1,
            _ => {}
        }
    }

    pub(super) fn remove(&mut self, flags: u32) {
        match use_of(flags) {
            address::CLUSTER_IP => self.internal -= 1,
            address::EXTERNAL => self.external -= 1,
            _ => {}
        }
    }

    pub(super) fn bits(self) -> u32 {
        let internal = if self.internal == 0 { 0 } else { address::CLUSTER_IP };
        let external = if self.external == 0 { 0 } else { address::EXTERNAL };
        internal | external
    }
}

/// The bit of ADDRESSES that a frontend with these flags brings; none for a NodePort.
pub(super) const fn use_of(flags: u32) -> u32 {
    if flags & frontend::NODE_PORT != 0 {
        0
    } else if flags & frontend::INTERNAL != 0 {
        address::CLUSTER_IP
    } else {
        address::EXTERNAL
    }
}

/// [`Actual`] and its indices, changed only by [`Self::apply`].
#[derive(Debug, Default)]
pub(super) struct Mirror {
    actual: Actual,
    by_name: HashMap<ServiceName, u32>,
    held: HashMap<u32, Held>,
    uses: HashMap<Addr, Uses>,
}

impl Mirror {
    pub(super) fn new(actual: &Actual) -> Self {
        let mut mirror = Self::default();
        for step in actual.entries() {
            mirror.apply(&step);
        }
        mirror
    }

    pub(super) fn actual(&self) -> &Actual {
        &self.actual
    }

    pub(super) fn id(&self, name: &ServiceName) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    pub(super) fn held(&self, id: u32) -> Option<&Held> {
        self.held.get(&id)
    }

    pub(super) fn ids(&self) -> BTreeSet<u32> {
        self.held.keys().copied().collect()
    }

    pub(super) fn uses(&self, addr: &Addr) -> Uses {
        self.uses.get(addr).copied().unwrap_or_default()
    }

    /// The runs that the frontends of a Service show.
    pub(super) fn runs(&self, id: u32) -> BTreeSet<Run> {
        let keys = self.held.get(&id).into_iter().flat_map(|held| &held.frontends);
        keys.filter_map(|key| self.actual.frontends.get(key))
            .flat_map(|value| [value.cluster, value.local])
            .filter(|run| run.count != 0)
            .collect()
    }

    pub(super) fn apply(&mut self, step: &Step) {
        match *step {
            Step::PutService(id, name) => {
                self.unname(id);
                self.held.entry(id).or_default().name = Some(name);
                // Of two ids with one name the first keeps it; the other is unwanted.
                self.by_name.entry(name).or_insert(id);
            }
            Step::DeleteService(id) => self.unname(id),
            Step::PutBackend(index, value) => {
                if let Some(old) = self.actual.backends.get(&index).copied() {
                    self.unlink_backend(index, &old);
                }
                self.link_backend(index, &value);
            }
            Step::PutSource(key) => {
                self.held.entry(u32::from_be(key.service)).or_default().sources.insert(key);
            }
            Step::DeleteSource(key) => self.with(u32::from_be(key.service), |held| {
                held.sources.remove(&key);
            }),
            Step::PutFrontend(key, value) => {
                self.unlink_frontend(&key);
                self.link_frontend(key, &value);
            }
            Step::DeleteFrontend(key) => self.unlink_frontend(&key),
            Step::PutConfig(_)
            | Step::PutIface(..)
            | Step::DeleteIface(_)
            | Step::PutSlot(..)
            | Step::PutAddress(..)
            | Step::DeleteAddress(_) => {}
        }
        self.actual.apply(step);
    }

    /// Changes what an id holds and forgets the id when nothing is left.
    fn with(&mut self, id: u32, change: impl FnOnce(&mut Held)) {
        if let Some(held) = self.held.get_mut(&id) {
            change(held);
            if held.is_empty() {
                self.held.remove(&id);
            }
        }
    }

    fn unname(&mut self, id: u32) {
        if let Some(name) = self.held.get(&id).and_then(|held| held.name)
            && self.by_name.get(&name) == Some(&id)
        {
            self.by_name.remove(&name);
        }
        self.with(id, |held| held.name = None);
    }

    fn link_backend(&mut self, index: u32, value: &Backend) {
        if !value.is_live() {
            return;
        }
        let held = self.held.entry(value.service).or_default();
        if *held.backends.entry((value.addr, value.port)).or_insert(index) != index {
            held.strays.insert(index);
        }
    }

    fn unlink_backend(&mut self, index: u32, old: &Backend) {
        let endpoint = (old.addr, old.port);
        self.with(old.service, |held| {
            held.strays.remove(&index);
            if held.backends.get(&endpoint) == Some(&index) {
                held.backends.remove(&endpoint);
            }
        });
    }

    fn link_frontend(&mut self, key: FrontendKey, value: &Frontend) {
        self.held.entry(value.service).or_default().frontends.insert(key);
        if use_of(value.flags) != 0 {
            self.uses.entry(key.addr).or_default().add(value.flags);
        }
    }

    fn unlink_frontend(&mut self, key: &FrontendKey) {
        let Some(old) = self.actual.frontends.get(key).copied() else { return };
        self.with(old.service, |held| {
            held.frontends.remove(key);
        });
        if use_of(old.flags) != 0
            && let Some(uses) = self.uses.get_mut(&key.addr)
        {
            uses.remove(old.flags);
            if *uses == Uses::default() {
                self.uses.remove(&key.addr);
            }
        }
    }
}

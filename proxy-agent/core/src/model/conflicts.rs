//! Who owns a destination when several Service ports ask for it (X-17…X-19).
//!
//! Every request is kept, the losers' too, so that the next one takes over in the moment the owner goes. The
//! order is a property of the requests and not of their arrival.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::{Bound, RangeInclusive};

use proxy_common::abi::{FrontendKey, frontend};
use proxy_common::addr::Addr;

use super::{ObjectName, Service, ServicePort};

/// One Service port asks for one destination. The least request owns it: ClusterIPs first, then the oldest
/// Service, then by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Request {
    external: bool,
    created: i64,
    pub(super) port: ServicePort,
}

/// All requests, and who owns what by them.
#[derive(Debug, Default)]
pub(super) struct Owners {
    /// The least request for each destination.
    owners: HashMap<FrontendKey, Request>,
    /// The others, in order; few destinations have any.
    losers: BTreeMap<FrontendKey, Vec<Request>>,
    /// How many destinations an address has: what is in here is a Service's address.
    addresses: HashMap<Addr, usize>,
    /// How many NodePorts, of all protocols and families, have a number.
    node_ports: BTreeMap<u16, usize>,
}

impl Owners {
    /// Replaces everything that `name` asks for; says which other Services won or lost a destination by it.
    pub(super) fn replace(
        &mut self,
        name: &ObjectName,
        old: Option<&Service>,
        new: Option<&Service>,
    ) -> BTreeSet<ObjectName> {
        let requests =
            |service: Option<&Service>| service.map(|service| requests_of(name, service)).unwrap_or_default();
        let (old, new) = (requests(old), requests(new));
        if old == new {
            return BTreeSet::new();
        }
        let before: BTreeMap<FrontendKey, Option<ServicePort>> =
            old.iter().chain(&new).map(|(key, _)| (*key, self.owner(key).cloned())).collect();
        for (key, request) in &old {
            self.remove(key, request);
        }
        for (key, request) in new {
            self.insert(key, request);
        }
        let mut moved = BTreeSet::new();
        for (key, before) in before {
            let after = self.owner(&key);
            if before.as_ref() != after {
                moved.extend(before.iter().chain(after).map(|port| port.service.clone()));
            }
        }
        moved.remove(name);
        moved
    }

    /// The Service port that owns a destination.
    pub(super) fn owner(&self, key: &FrontendKey) -> Option<&ServicePort> {
        self.owners.get(key).map(|request| &request.port)
    }

    /// Whether `addr` is an address of a Service.
    pub(super) fn is_service_address(&self, addr: &Addr) -> bool {
        self.addresses.contains_key(addr)
    }

    /// The numbers of NodePorts outside a range, in order.
    pub(super) fn node_ports_outside(&self, usual: &RangeInclusive<u16>) -> impl Iterator<Item = u16> {
        let below = self.node_ports.range(..usual.start());
        let above = self.node_ports.range((Bound::Excluded(*usual.end()), Bound::Unbounded));
        below.chain(above).map(|(port, _)| *port)
    }

    /// Every request that lost, as (destination, loser, owner).
    pub(super) fn conflicts(&self) -> impl Iterator<Item = (&FrontendKey, &ServicePort, &ServicePort)> {
        let owned = self.losers.iter().filter_map(|(key, losers)| Some((key, losers, self.owner(key)?)));
        owned.flat_map(|(key, losers, owner)| losers.iter().map(move |loser| (key, &loser.port, owner)))
    }

    fn insert(&mut self, key: FrontendKey, request: Request) {
        let Some(owner) = self.owners.get_mut(&key) else {
            self.owners.insert(key, request);
            *self.addresses.entry(key.addr).or_default() += 1;
            if key.addr.is_unspecified() {
                *self.node_ports.entry(key.port.number()).or_default() += 1;
            }
            return;
        };
        let loser = if request < *owner { std::mem::replace(owner, request) } else { request };
        let losers = self.losers.entry(key).or_default();
        if let Err(place) = losers.binary_search(&loser) {
            losers.insert(place, loser);
        }
    }

    fn remove(&mut self, key: &FrontendKey, request: &Request) {
        let Some(owner) = self.owners.get_mut(key) else { return };
        if let Some(losers) = self.losers.get_mut(key) {
            if owner == request {
                *owner = losers.remove(0);
            } else {
                losers.retain(|known| known != request);
            }
            if losers.is_empty() {
                self.losers.remove(key);
            }
            return;
        }
        self.owners.remove(key);
        let number = key.port.number();
        if key.addr.is_unspecified()
            && let Some(count) = self.node_ports.get_mut(&number)
        {
            *count -= 1;
            if *count == 0 {
                self.node_ports.remove(&number);
            }
        }
        if let Some(count) = self.addresses.get_mut(&key.addr) {
            *count -= 1;
            if *count == 0 {
                self.addresses.remove(&key.addr);
            }
        }
    }
}

fn requests_of(name: &ObjectName, service: &Service) -> Vec<(FrontendKey, Request)> {
    let mut requests = Vec::new();
    for wanted in super::frontends::wanted(name, service) {
        for (key, flags) in wanted.frontends {
            let external = flags & frontend::INTERNAL == 0;
            requests.push((key, Request { external, created: service.created, port: wanted.owner.clone() }));
        }
    }
    requests
}

//! Who holds a destination when several Service ports ask for it (X-17…X-19).
//!
//! Every claim is kept, the losers' too, so that the next one takes over in the moment the holder goes. The
//! order is a property of the claims and not of their arrival.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::{Bound, RangeInclusive};

use proxy_common::abi::{FrontendKey, frontend};
use proxy_common::addr::Addr;

use super::{ObjectName, Service, ServicePort};

/// One Service port's wish for one destination. The least claim holds it: ClusterIPs first, then the oldest
/// Service, then by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claim {
    external: bool,
    created: i64,
    pub(super) owner: ServicePort,
}

/// All claims.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// Claims of a destination, the holder's first.
    by_key: HashMap<FrontendKey, Vec<Claim>>,
    by_service: HashMap<ObjectName, Vec<(FrontendKey, Claim)>>,
    contested: BTreeSet<FrontendKey>,
    /// How many destinations an address has: what is in here is a Service's address.
    addresses: HashMap<Addr, usize>,
    /// How many NodePorts, of all protocols and families, have a number.
    node_ports: BTreeMap<u16, usize>,
}

impl Claims {
    /// Replaces everything that `name` claims; tells which other Services won or lost a destination by it.
    pub(super) fn replace(&mut self, name: &ObjectName, service: Option<&Service>) -> BTreeSet<ObjectName> {
        let new = service.map(|service| claims_of(name, service)).unwrap_or_default();
        let old = self.by_service.remove(name).unwrap_or_default();
        if old == new {
            self.remember(name, new);
            return BTreeSet::new();
        }
        let before: BTreeMap<FrontendKey, Option<ServicePort>> =
            old.iter().chain(&new).map(|(key, _)| (*key, self.holder(key).cloned())).collect();
        for (key, claim) in &old {
            self.remove(key, claim);
        }
        for (key, claim) in &new {
            self.insert(*key, claim.clone());
        }
        self.remember(name, new);
        let mut moved = BTreeSet::new();
        for (key, before) in before {
            let after = self.holder(&key);
            if before.as_ref() != after {
                moved.extend(before.iter().chain(after).map(|port| port.service.clone()));
            }
        }
        moved.remove(name);
        moved
    }

    /// The Service port that holds a destination.
    pub(super) fn holder(&self, key: &FrontendKey) -> Option<&ServicePort> {
        self.by_key.get(key).and_then(|claims| claims.first()).map(|claim| &claim.owner)
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

    /// Every claim that lost, as (destination, loser, holder).
    pub(super) fn lost(&self) -> impl Iterator<Item = (&FrontendKey, &ServicePort, &ServicePort)> {
        self.contested.iter().filter_map(|key| self.by_key.get(key).map(|claims| (key, claims))).flat_map(
            |(key, claims)| claims.iter().skip(1).map(move |claim| (key, &claim.owner, &claims[0].owner)),
        )
    }

    fn remember(&mut self, name: &ObjectName, claims: Vec<(FrontendKey, Claim)>) {
        if !claims.is_empty() {
            self.by_service.insert(name.clone(), claims);
        }
    }

    fn insert(&mut self, key: FrontendKey, claim: Claim) {
        let claims = self.by_key.entry(key).or_default();
        if let Err(place) = claims.binary_search(&claim) {
            claims.insert(place, claim);
        }
        if claims.len() > 1 {
            self.contested.insert(key);
        } else {
            *self.addresses.entry(key.addr).or_default() += 1;
            if key.addr.is_unspecified() {
                *self.node_ports.entry(key.port.number()).or_default() += 1;
            }
        }
    }

    fn remove(&mut self, key: &FrontendKey, claim: &Claim) {
        let Some(claims) = self.by_key.get_mut(key) else { return };
        claims.retain(|known| known != claim);
        if claims.len() > 1 {
            return;
        }
        self.contested.remove(key);
        if !claims.is_empty() {
            return;
        }
        self.by_key.remove(key);
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

fn claims_of(name: &ObjectName, service: &Service) -> Vec<(FrontendKey, Claim)> {
    let mut claims = Vec::new();
    for wanted in super::frontends::wanted(name, service) {
        for (key, flags) in wanted.frontends {
            let external = flags & frontend::INTERNAL == 0;
            claims.push((key, Claim { external, created: service.created, owner: wanted.owner.clone() }));
        }
    }
    claims
}

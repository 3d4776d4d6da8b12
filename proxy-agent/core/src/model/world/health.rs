//! Where `healthCheckNodePort`s are served, and what they answer.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;

use super::World;
use crate::model::merge::merge;
use crate::model::tables::{self, Accepted};
use crate::model::{Family, ObjectName, Service, frontends};

/// A `healthCheckNodePort` to serve, in one family (H-14).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HealthCheck {
    pub service: ObjectName,
    /// Family to listen in.
    pub family: Family,
    /// Port to listen on.
    pub port: u16,
    /// Distinct local ready endpoint addresses of the Service (H-20).
    pub local_endpoints: usize,
}

/// What is known of health checks from one time they are taken to the next.
#[derive(Debug, Default)]
pub(super) struct Checks {
    /// Services that had one when they were last taken.
    served: HashSet<ObjectName>,
    /// Services of which something has changed since, if they have or had one.
    changed: BTreeSet<ObjectName>,
}

impl World {
    /// The `healthCheckNodePort`s to serve, with their counts (H-14, H-20): a walk through all Services.
    #[must_use]
    pub fn health_checks(&self) -> Vec<HealthCheck> {
        self.services.keys().flat_map(|name| self.checks_of(name)).collect()
    }

    /// Those of each Service that has changed since they were last taken; none of one that has none any more. What
    /// they cost is what has changed, however many Services there are.
    pub fn take_health_checks(&mut self) -> Vec<(ObjectName, Vec<HealthCheck>)> {
        let changed = std::mem::take(&mut self.checks.changed).into_iter();
        changed
            .map(|name| {
                let checks = self.checks_of(&name);
                if checks.is_empty() {
                    self.checks.served.remove(&name);
                } else {
                    self.checks.served.insert(name.clone());
                }
                (name, checks)
            })
            .collect()
    }

    /// A Service or its endpoints have changed.
    pub(super) fn note_check(&mut self, name: &ObjectName) {
        let has = self.services.get(name).is_some_and(|service| service.health_check_node_port != 0);
        if has || self.checks.served.contains(name) {
            self.checks.changed.insert(name.clone());
        }
    }

    fn checks_of(&self, name: &ObjectName) -> Vec<HealthCheck> {
        let Some(service) = self.services.get(name).filter(|service| service.health_check_node_port != 0)
        else {
            return Vec::new();
        };
        let check = |ip: &IpAddr| HealthCheck {
            service: name.clone(),
            family: Family::of(ip),
            port: service.health_check_node_port,
            local_endpoints: self.local_ready(name, service, Family::of(ip)),
        };
        service.cluster_ips.iter().map(check).collect()
    }

    /// Where NodePorts of a family are accepted, and health checks are served (H-15).
    #[must_use]
    pub fn node_port_addresses(&self, family: Family) -> Accepted {
        tables::accepted(&self.settings, &self.last_node, &self.links, family)
    }

    fn local_ready(&self, name: &ObjectName, service: &Service, family: Family) -> usize {
        let mut ips: BTreeSet<IpAddr> = BTreeSet::new();
        for wanted in frontends::wanted(name, service) {
            if wanted.owner.family == family {
                let endpoints = merge(&wanted.owner, self.slices_of(name));
                let ready = endpoints.values().filter(|e| e.ready && self.here.is_local(e));
                ips.extend(ready.map(|endpoint| endpoint.ip));
            }
        }
        ips.len()
    }
}

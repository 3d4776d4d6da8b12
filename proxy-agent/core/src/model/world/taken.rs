//! What was last taken from the world to be programmed: enough to tell whether there is news.
//!
//! Fingerprints will do, since the tables themselves are compared once more when they are written: a second copy of
//! all that should be was the model's largest table.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use proxy_common::addr::Proto;

use super::pending::Ports;
use crate::model::{DesiredService, Family, NoLocalByFamily, ObjectName, ServicePort};

/// Fingerprints by Service, and the Service ports that serve nobody here (H-42).
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// In order.
    ports: HashMap<ObjectName, Box<[Port]>>,
    /// Only of Services that have some.
    no_local: HashMap<ObjectName, NoLocalByFamily>,
    /// Of all Services together.
    no_local_sum: NoLocalByFamily,
    /// Nobody outside knows its key, and so what has the fingerprint of something else.
    hasher: RandomState,
}

/// One port of a Service in one family.
#[derive(Debug)]
struct Port {
    name: Arc<str>,
    proto: Proto,
    family: Family,
    fingerprint: u64,
}

impl Port {
    /// Whether it comes before, is, or comes after a port of the same Service.
    fn order(&self, port: &ServicePort) -> Ordering {
        let ServicePort { service: _, port, proto, family } = port;
        (&self.name, &self.proto, &self.family).cmp(&(port, proto, family))
    }

    fn of(&self, service: &ObjectName) -> ServicePort {
        let Self { name, proto, family, fingerprint: _ } = self;
        ServicePort { service: service.clone(), port: name.clone(), proto: *proto, family: *family }
    }
}

impl Taken {
    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.ports.clear();
        self.no_local.clear();
        self.no_local_sum = NoLocalByFamily::default();
    }

    /// Replaces what was taken of a Service, and returns what differs: ports that are new or changed, then those that
    /// are no more (`None`).
    pub(super) fn replace(
        &mut self,
        service: &ObjectName,
        now: Ports,
    ) -> Vec<(ServicePort, Option<DesiredService>)> {
        let before = self.ports.remove(service).unwrap_or_default();
        if let Some(was) = self.no_local.remove(service) {
            self.no_local_sum -= was;
        }
        let no_local = NoLocalByFamily::of(&now);
        if no_local != NoLocalByFamily::default() {
            self.no_local_sum += no_local;
            self.no_local.insert(service.clone(), no_local);
        }

        let removed = before.iter().map(|old| old.of(service)).filter(|port| !now.contains_key(port));
        let removed: Vec<_> = removed.map(|port| (port, None)).collect();
        let mut ports = Vec::with_capacity(now.len());
        let mut differs = Vec::new();
        for (port, desired) in now {
            let fingerprint = self.hasher.hash_one(&desired);
            let ServicePort { service: _, port: name, proto, family } = &port;
            ports.push(Port { name: name.clone(), proto: *proto, family: *family, fingerprint });
            let old =
                before.binary_search_by(|old| old.order(&port)).ok().map(|place| before[place].fingerprint);
            if old != Some(fingerprint) {
                differs.push((port, Some(desired)));
            }
        }
        if !ports.is_empty() {
            self.ports.insert(service.clone(), ports.into());
        }
        differs.extend(removed);
        differs
    }

    /// Service ports with policy Local and without an endpoint of this node, of those for which there are endpoints
    /// elsewhere (H-42).
    pub(super) fn no_local(&self) -> NoLocalByFamily {
        self.no_local_sum
    }
}

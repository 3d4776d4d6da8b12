//! Where `healthCheckNodePort`s are served, and what they answer.

use std::collections::BTreeSet;
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

impl World {
    /// The `healthCheckNodePort`s to serve, with their counts (H-14, H-20).
    #[must_use]
    pub fn health_checks(&self) -> Vec<HealthCheck> {
        let with_port = self.services.iter().filter(|(_, service)| service.health_check_node_port != 0);
        with_port
            .flat_map(|(name, service)| {
                service.cluster_ips.iter().map(|ip| HealthCheck {
                    service: name.clone(),
                    family: Family::of(ip),
                    port: service.health_check_node_port,
                    local_endpoints: self.local_ready(name, service, Family::of(ip)),
                })
            })
            .collect()
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

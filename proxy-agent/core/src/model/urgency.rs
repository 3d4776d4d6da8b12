//! How soon a change has to be in the tables.
//!
//! What only adds or edits goes at once. What takes away may be one half of something whose other half follows a moment
//! later: an endpoint moves from one slice to another, a port gets another name in a Service and then in its slices. Done
//! one by one these would reject or reset connections in between that nothing is wrong with.

use super::{Service, Slice};

/// How soon a change has to be in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Nothing that may follow makes it another one.
    AtOnce,
    /// It waits a moment for what may belong to it, or there is no hurry.
    Settled,
}

impl Urgency {
    /// Of a Service that was, and is now, like this.
    pub(super) fn of_service(old: Option<&Service>, new: Option<&Service>, has_slices: bool) -> Self {
        let at_once = match (old, new) {
            (_, None) => false,
            // Without slices nobody is served sooner.
            (None, Some(_)) => has_slices,
            (Some(old), Some(new)) => keeps_destinations(old, new),
        };
        if at_once { Self::AtOnce } else { Self::Settled }
    }

    /// Of a slice that was, and is now, like this; both are sorted. `service` is the one it belongs to now, and
    /// `has_others` says whether that has other slices of the family.
    pub(super) fn of_slice(
        old: Option<&Slice>,
        new: Option<&Slice>,
        service: Option<&Service>,
        has_others: bool,
    ) -> Self {
        // Without a Service there is nothing to write.
        let (Some(new), Some(service)) = (new, service) else { return Self::Settled };
        let at_once = old.is_none_or(|old| {
            // Endpoints can only move where there is a slice to move to; one that leaves for good is not to be reset in haste.
            let may_move = has_others || service.reset_on_loss || new.endpoints.is_empty();
            keeps_ports(old, new) && (!may_move || keeps_endpoints(old, new))
        });
        if at_once { Self::AtOnce } else { Self::Settled }
    }
}

fn keeps_destinations(old: &Service, new: &Service) -> bool {
    old.ports.iter().all(|port| new.ports.contains(port))
        && old.cluster_ips.iter().all(|ip| new.cluster_ips.contains(ip))
        && old.external_ips.iter().all(|ip| new.external_ips.contains(ip))
        && old.load_balancer_ips.iter().all(|ip| new.load_balancer_ips.contains(ip))
}

fn keeps_ports(old: &Slice, new: &Slice) -> bool {
    old.service == new.service
        && old.family == new.family
        && old.ports.iter().all(|port| new.ports.contains(port))
}

fn keeps_endpoints(old: &Slice, new: &Slice) -> bool {
    let has = |ip| new.endpoints.binary_search_by_key(ip, |endpoint| endpoint.ip).is_ok();
    old.endpoints.iter().all(|endpoint| has(&endpoint.ip))
}

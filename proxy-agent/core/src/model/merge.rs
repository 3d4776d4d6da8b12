//! The slices of a Service as one set of endpoints a port.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::IpAddr;

use super::names::Names;
use super::{Endpoint, Hints, ServicePort, Slice};

/// The endpoints of one Service port by address and port number: the union over `slices` (E-6), each
/// destination once (E-21), in an order that does not depend on how the slices are cut or sorted (E-23).
///
/// `slices` come in order of their names: among duplicates of equal worth the first one stays.
pub(super) fn merge<'a>(
    owner: &ServicePort,
    slices: impl Iterator<Item = &'a Slice>,
) -> BTreeMap<(IpAddr, u16), &'a Endpoint> {
    let mut merged: BTreeMap<(IpAddr, u16), &Endpoint> = BTreeMap::new();
    for slice in slices.filter(|slice| slice.family == owner.family) {
        // E-14: the same port name may stand for several numbers.
        for port in slice.ports.iter().filter(|p| p.name == owner.port && p.proto == owner.proto) {
            for endpoint in &slice.endpoints {
                merged
                    .entry((endpoint.ip, port.port))
                    .and_modify(|known| {
                        if worth(endpoint) > worth(known) {
                            *known = endpoint;
                        }
                    })
                    .or_insert(endpoint);
            }
        }
    }
    merged
}

/// E-21: one that is not terminating replaces one that is, never the other way round; then a ready one wins.
fn worth(endpoint: &Endpoint) -> (Reverse<bool>, bool, bool) {
    (Reverse(endpoint.terminating), endpoint.ready, endpoint.serving)
}

impl Slice {
    /// The slice with its parts in an order of their own, so that a reordered slice is no change (E-8), and with names that
    /// it shares with others.
    #[must_use]
    pub fn sorted(mut self, names: &mut Names) -> Self {
        names.share(&mut self.service.namespace);
        self.ports.iter_mut().for_each(|port| names.share(&mut port.name));
        self.ports.sort_by(|a, b| (&a.name, a.proto, a.port).cmp(&(&b.name, b.proto, b.port)));
        self.ports.dedup();
        for endpoint in &mut self.endpoints {
            endpoint.node.iter_mut().for_each(|name| names.share(name));
            if let Some(Hints { zones, nodes }) = endpoint.hints.as_deref_mut() {
                zones.iter_mut().chain(&mut *nodes).for_each(|name| names.share(name));
                zones.sort_unstable();
                nodes.sort_unstable();
            }
        }
        self.endpoints.sort_by(|a, b| order(a).cmp(&order(b)));
        self.endpoints.dedup();
        self.ports.shrink_to_fit();
        self.endpoints.shrink_to_fit();
        self
    }
}

type Order<'a> = (IpAddr, bool, bool, bool, Option<&'a str>, Option<&'a Hints>);

fn order(endpoint: &Endpoint) -> Order<'_> {
    let Endpoint { ip, ready, serving, terminating, node, hints } = endpoint;
    (*ip, *ready, *serving, *terminating, node.as_deref(), hints.as_deref())
}

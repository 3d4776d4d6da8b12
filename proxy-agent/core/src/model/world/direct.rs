//! Direct server return: the other nodes that answer clients themselves, kept as Services and slices change.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::World;
use crate::model::compile::Here;
use crate::model::frontends::has_direct;
use crate::model::{ObjectName, Slice};

impl World {
    /// Other nodes with endpoints of Services with direct server return, each with its number.
    pub fn dsr_nodes(&self) -> impl Iterator<Item = (&Arc<str>, u32)> {
        self.here.nodes.iter()
    }

    /// Whether any Service has direct server return.
    #[must_use]
    pub fn has_direct_services(&self) -> bool {
        self.direct_services > 0
    }

    /// Whether other nodes answer the clients of a Service.
    pub(super) fn is_direct(&self, service: &ObjectName) -> bool {
        self.services.get(service).is_some_and(has_direct)
    }

    /// A slice of such a Service has come or is about to go.
    pub(super) fn count_nodes(&mut self, slice: &Slice, added: bool) {
        let moved = count(&mut self.here, slice, added);
        self.renumbered(&moved);
    }

    /// A Service has become such a one, or is none any more.
    pub(super) fn count_all_nodes(&mut self, service: &ObjectName, added: bool) {
        self.direct_services =
            if added { self.direct_services + 1 } else { self.direct_services.saturating_sub(1) };
        let names = self.slices_of.get(service).into_iter().flatten();
        let mut moved = Vec::new();
        for slice in names.filter_map(|name| self.slices.get(name)) {
            moved.extend(count(&mut self.here, slice, added));
        }
        self.renumbered(&moved);
    }

    /// Marks the Services with endpoints on these nodes. Two nodes hardly ever share a number, so all may be looked through.
    fn renumbered(&mut self, nodes: &[Arc<str>]) {
        if nodes.is_empty() {
            return;
        }
        let touched = self.slices.values().filter(|slice| {
            slice.endpoints.iter().any(|e| e.node.as_ref().is_some_and(|node| nodes.contains(node)))
        });
        self.stale.extend(touched.map(|slice| slice.service.clone()));
    }
}

/// Adds or removes the other nodes of a slice; returns those that have another number now.
fn count(here: &mut Here, slice: &Slice, added: bool) -> Vec<Arc<str>> {
    let others = slice.endpoints.iter().filter(|endpoint| !here.is_local(endpoint));
    let nodes: BTreeSet<&Arc<str>> = others.filter_map(|endpoint| endpoint.node.as_ref()).collect();
    let nodes = nodes.into_iter();
    if added {
        nodes.flat_map(|node| here.nodes.add(node)).collect()
    } else {
        nodes.flat_map(|node| here.nodes.remove(node)).collect()
    }
}

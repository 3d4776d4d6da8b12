//! The way of nearly all packets: those that belong to nobody, and those of flows that go on. What is decided here is
//! what [`ingress`](super::ingress) and [`egress`](super::egress) would decide, from less: few tables and little code,
//! since most of what a packet costs is to fetch them. In doubt it decides nothing.

use super::{Tables, flow};
use crate::abi::Hook;
use crate::wire::{Edit, Packet};

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Quick {
    /// It is not ours: it goes on unchanged.
    Pass,
    /// The edit is to be applied, and it goes on.
    Rewrite,
    /// That is for the hook to find out.
    Ask,
}

/// Decides about a packet that [`peek`](crate::wire::peek) has read.
#[inline(always)]
pub fn quick<T: Tables>(tables: &T, hook: Hook, packet: &Packet, edit: &mut Edit) -> Quick {
    let (key, source) = tables.key_of(packet);
    if tables.may_have_leg(&key) {
        return if flow::goes_on(tables, hook, packet, &key, source, edit).is_some() {
            Quick::Rewrite
        } else {
            Quick::Ask
        };
    }
    let nobodys = if hook == Hook::INGRESS { enters(tables, packet) } else { leaves(tables, packet) };
    if nobodys { Quick::Pass } else { Quick::Ask }
}

/// Whether a packet of no flow is for an address that is neither a Service's nor the node's, nor in a range of Services.
#[inline(always)]
fn enters<T: Tables>(tables: &T, packet: &Packet) -> bool {
    !tables.is_known(&packet.tuple.dst)
        && tables.config().is_some_and(|config| !config.is_service_range(&packet.tuple.dst))
}

/// Whether a packet of no flow does not come from an address of the node, or neither from the port of a Service nor to an
/// endpoint: only of the others is noted that they were sent. What pods send ends with the first question.
#[inline(always)]
fn leaves<T: Tables>(tables: &T, packet: &Packet) -> bool {
    !tables.is_known(&packet.tuple.src)
        || !tables.is_service_port(packet.tuple.sport) && !tables.is_endpoint(&packet.tuple.dst)
}

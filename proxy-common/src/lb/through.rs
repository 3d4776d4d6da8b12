//! The way of a packet that only passes the node, from outside to an endpoint elsewhere and back: what
//! [`ingress`](super::ingress) and [`egress`](super::egress) would write over it one after the other is decided at the
//! driver, before the stack has it (XDP). Only packets of flows that have been answered come here, and none that begins
//! or ends anything: all others take the long way, and so does whatever is in doubt. Nothing is written to a packet before
//! all is decided, so that the long way is always open.

use super::Tables;
use super::flow::{self, Touch};
use crate::abi::{FlowId, Hook};
use crate::addr::Port;
use crate::wire::{Edit, End, Packet};

/// A packet on its way through.
#[derive(Clone, Copy, Debug)]
pub struct Passage {
    id: FlowId,
    forward: bool,
}

impl Passage {
    /// The number of no passage.
    pub const NONE: u64 = FlowId::NONE.0;
    /// A bit that is in no id: a table has 2^24 records at most.
    const FORWARD: u64 = 1 << 31;

    /// It as a number that is not [`NONE`](Self::NONE).
    #[inline(always)]
    #[must_use]
    pub const fn number(self) -> u64 {
        self.id.0 | if self.forward { Self::FORWARD } else { 0 }
    }

    /// The one with this number.
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u64) -> Self {
        Self { id: FlowId(number & !Self::FORWARD), forward: number & Self::FORWARD != 0 }
    }
}

/// What becomes of the destination of a packet that [`peek`](crate::wire::peek) or
/// [`peek_v6`](crate::wire::peek_v6) has read; `None` if it is to take the long way. With the edit it is then routed.
#[inline(always)]
pub fn enter<T: Tables>(tables: &T, packet: &Packet, edit: &mut Edit) -> Option<Passage> {
    if !packet.goes_on() {
        return None;
    }
    step(tables, Hook::INGRESS, packet, edit)
}

/// What becomes of its source. `packet` is as it leaves, by the interface that it names.
#[inline(always)]
pub fn leave<T: Tables>(tables: &T, packet: &Packet, passage: Passage, edit: &mut Edit) -> bool {
    if passage.forward {
        // What is masqueraded gets its source from the record: whatever else is in it has been looked at.
        let found = tables.record(passage.id.index(), |flow| {
            let (addr, port) = flow.node();
            (edit.addr, edit.port) = (*addr, port);
            flow.is_masqueraded() && flow.has_source() && flow.is(passage.id)
        });
        (edit.other_port, edit.out) = (Port(0), 0);
        return found == Some(true);
    }
    let Some(found) = step(tables, Hook::EGRESS, packet, edit) else { return false };
    // It has come back to another flow, or has to leave elsewhere.
    found.id == passage.id && !found.forward && (edit.out == 0 || edit.out == packet.ifindex)
}

#[inline(always)]
fn step<T: Tables>(tables: &T, hook: Hook, packet: &Packet, edit: &mut Edit) -> Option<Passage> {
    let (key, source) = tables.key_of(packet);
    if !tables.may_have_leg(&key) {
        return None;
    }
    if let Some(way) = flow::goes_on(tables, hook, packet, &key, source, edit) {
        return Some(Passage { id: way.id, forward: way.forward });
    }
    let found = flow::touch(tables, hook, packet, edit);
    (found.touch == Touch::Rewrite && !found.care).then_some(Passage { id: found.id, forward: found.forward })
}

impl Packet {
    /// As it is with the edit of one end.
    #[inline(always)]
    pub const fn apply(&mut self, end: End, edit: &Edit) {
        let (addr, port, other) = match end {
            End::Src => (&mut self.tuple.src, &mut self.tuple.sport, &mut self.tuple.dport),
            End::Dst => (&mut self.tuple.dst, &mut self.tuple.dport, &mut self.tuple.sport),
        };
        (*addr, *port) = (edit.addr, edit.port);
        if edit.other_port.0 != 0 {
            *other = edit.other_port;
        }
    }
}

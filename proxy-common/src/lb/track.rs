//! The life of a flow: refreshed by its packets, promoted when answered, forgotten when over.

use super::{FlowTable, Inserted, Tables, Touch};
use crate::abi::{Flow, FlowKey, Hook, Leg, Reason};
use crate::addr::{Addr, Port, Proto};
use crate::wire::{Edit, Packet};

/// Refreshes a flow by one of its packets and fills in the edit.
#[inline(always)]
pub(super) fn refresh<T: Tables>(
    tables: &T,
    table: FlowTable,
    packet: &Packet,
    flow: &mut Flow,
    edit: &mut Edit,
) -> Touch {
    if flow.leg == Leg::DNAT {
        // UDP has no end, and an unanswered SYN has nobody to lose: both follow the Service when their
        // backend goes (C-4…C-8). An answered TCP flow keeps its endpoint until it ends (P-18), but a new
        // connection from the same port is a new flow (P-26).
        let fresh = packet.is_syn();
        let bound = packet.key.proto == Proto::UDP || matches!(table, FlowTable::HalfOpen) || fresh;
        if bound && tables.backend(flow.backend).is_none_or(|b| b.generation != flow.generation) {
            return Touch::Stale;
        }
        if fresh && matches!(table, FlowTable::Established) && is_over(tables, &packet.key, flow) {
            return Touch::Stale;
        }
    }
    flow.last_seen = tables.now();
    flow.seen |= packet.tcp_flags;
    edit.addr = flow.addr;
    edit.port = flow.port;
    edit.other_port = flow.other_port;
    match flow.leg {
        Leg::UNDNAT => Touch::Answer,
        Leg::SNAT if flow.addr.is_unspecified() => Touch::Unmasqueraded,
        _ => Touch::Alive,
    }
}

/// Whether a TCP flow has ended: a RST from either side, or a FIN from the client (which alone may open the
/// port again).
#[inline(always)]
fn is_over<T: Tables>(tables: &T, key: &FlowKey, dnat: &Flow) -> bool {
    if dnat.seen & (Packet::RST | Packet::FIN) != 0 {
        return true;
    }
    let reply = undnat_key(key, dnat);
    tables
        .with_flow(FlowTable::Established, &reply, |f| f.seen & (Packet::RST | Packet::FIN) != 0)
        .unwrap_or(true)
}

/// The egress tuple of the endpoint's answers, from the DNAT leg.
#[inline(always)]
#[must_use]
pub fn undnat_key(dnat_key: &FlowKey, dnat: &Flow) -> FlowKey {
    let client_port = if dnat.other_port.0 != 0 { dnat.other_port } else { dnat_key.sport };
    FlowKey {
        src: dnat.addr,
        dst: dnat_key.src,
        sport: dnat.port,
        dport: client_port,
        proto: dnat_key.proto,
        hook: Hook::EGRESS,
        pad: 0,
    }
}

/// The ingress tuple of the client's packets, from the UNDNAT leg.
#[inline(always)]
#[must_use]
pub fn dnat_key(undnat_key: &FlowKey, undnat: &Flow) -> FlowKey {
    let client_port = if undnat.other_port.0 != 0 { undnat.other_port } else { undnat_key.dport };
    FlowKey {
        src: undnat_key.dst,
        dst: undnat.addr,
        sport: client_port,
        dport: undnat.port,
        proto: undnat_key.proto,
        hook: Hook::INGRESS,
        pad: 0,
    }
}

/// The ingress tuple of answers to a masqueraded flow, from the SNAT leg's tuple and node address.
#[inline(always)]
#[must_use]
pub fn unsnat_key(snat_key: &FlowKey, addr: Addr, port: Port) -> FlowKey {
    FlowKey {
        src: snat_key.dst,
        dst: addr,
        sport: snat_key.dport,
        dport: port,
        proto: snat_key.proto,
        hook: Hook::INGRESS,
        pad: 0,
    }
}

/// Moves an answered flow, whose UNDNAT leg is at `key`, from the half-open to the established table. When
/// that is full the flow stays where it is and goes on, and can be evicted: counted.
#[inline(always)]
pub fn promote<T: Tables>(tables: &T, key: &FlowKey) -> u32 {
    // An answer that came before the question has left under its final source is none.
    let pending = |snat: &mut Flow| snat.leg == Leg::SNAT && snat.addr.is_unspecified();
    if tables.with_flow(FlowTable::HalfOpen, &key.reversed(Hook::EGRESS), pending) == Some(true) {
        return 0;
    }
    // Once to carry, once more to clear away: one piece of code for both, since each takes stack.
    let mut stage = Stage::Carry;
    for _ in 0..2 {
        let whole = each_leg(tables, key, |tables, key| match stage {
            Stage::Carry => carry(tables, key),
            Stage::Clear(table) => {
                tables.delete_flow(table, key);
                true
            }
        });
        if stage == Stage::Carry {
            stage = Stage::Clear(if whole { FlowTable::HalfOpen } else { FlowTable::Established });
        }
    }
    if stage == Stage::Clear(FlowTable::HalfOpen) {
        1
    } else {
        tables.count(Reason::FlowTableFull);
        0
    }
}

/// What promotion is doing to a flow's legs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Copying them to the established table.
    Carry,
    /// Deleting them from a table: the half-open one, or the established one when it had no room for all.
    Clear(FlowTable),
}

/// Does `f` to every half-open leg of the flow whose UNDNAT leg is at `key`, that one last; false as soon as
/// `f` says so. One key at a time: the kernel's stack is small.
#[inline(always)]
fn each_leg<T: Tables>(tables: &T, key: &FlowKey, f: impl Fn(&T, &FlowKey) -> bool) -> bool {
    let Some(mut other) = tables.with_flow(FlowTable::HalfOpen, key, |undnat| dnat_key(key, undnat)) else {
        return false;
    };
    if !f(tables, &other) {
        return false;
    }
    other = key.reversed(Hook::EGRESS);
    let back = tables.with_flow(FlowTable::HalfOpen, &other, |snat| unsnat_key(&other, snat.addr, snat.port));
    if let Some(back) = back
        && !(f(tables, &back) && f(tables, &other))
    {
        return false;
    }
    f(tables, key)
}

/// Copies one leg to the established table. False when it is full; a leg that is gone has nothing to carry.
#[inline(always)]
fn carry<T: Tables>(tables: &T, key: &FlowKey) -> bool {
    let full = tables.with_flow(FlowTable::HalfOpen, key, |flow| {
        matches!(tables.insert_flow(FlowTable::Established, key, flow, true), Inserted::Full)
    });
    full != Some(true)
}

/// How long the client of a UDP flow must have been silent before it counts as over, in nanoseconds. A translated
/// datagram may be seen again at once, at a bridge behind its interface, and must not end its own flow.
const SILENCE: u64 = 1_000_000_000;

/// A packet goes past all Services from `key`'s client to its endpoint. If these two have ended a flow through a
/// Service from the same client port, answers must not be translated for that any more (D-5, D-19): a TCP connection
/// that is over, or a UDP flow whose client is silent. Not zero for such a flow, which is to be forgotten; `key` has
/// become that of its DNAT leg.
#[inline(always)]
pub fn superseded<T: Tables>(tables: &T, key: &mut FlowKey) -> u32 {
    let proto = key.proto;
    let answers = key.reversed(Hook::EGRESS);
    let found = tables.with_flow(FlowTable::Established, &answers, |undnat| {
        (undnat.leg, undnat.seen & (Packet::RST | Packet::FIN) != 0, dnat_key(&answers, undnat))
    });
    let Some((Leg::UNDNAT, ended, dnat)) = found else {
        return 0;
    };
    let silent = |flow: &mut Flow| tables.now().saturating_sub(flow.last_seen) > SILENCE;
    *key = dnat;
    u32::from(match proto {
        Proto::UDP => tables.with_flow(FlowTable::Established, key, silent) == Some(true),
        _ => ended,
    })
}

/// Forgets the flow whose DNAT leg is at `key`, wherever its legs are.
#[inline(always)]
pub fn forget<T: Tables>(tables: &T, key: &FlowKey) -> u32 {
    let reply = |dnat: &mut Flow| undnat_key(key, dnat);
    let found = tables
        .with_flow(FlowTable::Established, key, reply)
        .or_else(|| tables.with_flow(FlowTable::HalfOpen, key, reply));
    let Some(mut other) = found else {
        return 0;
    };
    delete(tables, key);
    // Another flow may have taken the tuple since (D-5): only a leg that leads back here is ours.
    let ours = |f: &mut Flow| f.addr.same(&key.dst) && f.port == key.dport;
    let mine = tables
        .with_flow(FlowTable::Established, &other, ours)
        .or_else(|| tables.with_flow(FlowTable::HalfOpen, &other, ours));
    if mine != Some(true) {
        return 0;
    }
    delete(tables, &other);
    other = other.reversed(Hook::EGRESS);
    let back = |snat: &mut Flow| unsnat_key(&other, snat.addr, snat.port);
    let back = tables
        .with_flow(FlowTable::Established, &other, back)
        .or_else(|| tables.with_flow(FlowTable::HalfOpen, &other, back));
    if let Some(back) = back {
        delete(tables, &back);
        delete(tables, &other);
    }
    1
}

#[inline(always)]
fn delete<T: Tables>(tables: &T, key: &FlowKey) {
    tables.delete_flow(FlowTable::Established, key);
    tables.delete_flow(FlowTable::HalfOpen, key);
}

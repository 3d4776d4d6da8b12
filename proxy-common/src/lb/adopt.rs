//! Another proxy on this node: what is left to it, and how the connections that it has begun become flows.
//! And tables of our own that are left for others: their flows are entered in the same way.
//!
//! A connection is first noted as a flow that is left to netfilter ([`adopt`]): its packets pass, and nothing
//! changes for them. Then the agent sees to it that neither the kernel's connection tracking is in the way of
//! the same packets translated by us, nor anybody misses an entry there, and [`take`] has them translated.

use super::flow::{self, Entered};
use super::{Subprograms, Tables, select};
use crate::abi::{Flow, FlowId, Role, State, ask, config, flow_flags};
use crate::addr::Proto;
use crate::wire::Packet;

/// Whether what is new is another proxy's.
#[inline(always)]
pub fn leaves_new<T: Tables>(tables: &T) -> bool {
    tables.config().is_some_and(|config| config.flags & config::LEAVE_NEW != 0)
}

/// Whether a packet to a Service that belongs to no flow of ours is left to another proxy.
#[inline(always)]
pub fn leaves<T: Tables>(tables: &T, packet: &Packet) -> bool {
    let flags = tables.config().map_or(0, |config| config.flags);
    let middle = matches!(packet.tuple.proto, Proto::TCP) && packet.tcp_flags & Packet::SYN == 0;
    flags & config::LEAVE_NEW != 0 || middle && flags & config::LEAVE_MIDDLE != 0
}

/// Where a flow comes from that is entered whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum From {
    /// Another proxy. A flow of ours that has one of its pairs makes room if it notes that the node speaks
    /// (for the other proxy), or if it is UDP's and young: a datagram of the same conversation has begun it.
    /// TCP's is a newer connection, and stays; one that has been adopted before is this one, or has ended
    /// since (connection tracking has each tuple once).
    Proxy,
    /// Tables that are still in use, while these are not: a flow here with one of its pairs is what they had
    /// before.
    Tables,
    /// Tables that are no longer in use: what is here is newer.
    OldTables,
}

/// Makes a flow of what others have begun, which `fill` writes to a record: everything but its id and claims.
/// What another proxy has begun is left to netfilter until [`take`], or has lost its endpoint already. The
/// answer is that of [`ask::ADOPT`].
#[inline(always)]
pub fn adopt<T: Subprograms>(tables: &T, from: From, fill: impl FnOnce(&mut Flow) -> bool) -> u32 {
    let Some(index) = tables.take_record() else {
        return ask::NO_ROOM;
    };
    if !tables.claim(index) {
        // Another CPU still looks at the flow that was here before: the record is used later.
        flow::enter_free(tables, index);
        return ask::NO_ROOM;
    }
    let now = tables.now();
    let filled = tables.record(index, |flow| {
        let filled = fill(flow)
            && (matches!(flow.state, State::LEFT | State::LOST)
                || from != From::Proxy && flow.state == State::LIVE);
        flow.checked = now;
        (flow.id, filled)
    });
    let Some((id, true)) = filled else {
        dissolve_at(tables, index);
        return 0;
    };
    let (mut holder, mut alone) = (FlowId::NONE, false);
    for role in [Role::OUTER, Role::MIDDLE, Role::INNER, Role::OWN] {
        let has = tables.record(index, |flow| {
            // Behind a masquerade the answers are for the node until they have been translated, and must not
            // be taken for questions: netfilter may have chosen the port of a Service.
            let left = flow.state == State::LEFT;
            (flow.has(role) && !(left && flow.has_source() && role == Role::MIDDLE), left)
        });
        let Some((true, left)) = has else { continue };
        let entered = enter(tables, from, id, role, &mut holder);
        if entered == Entered::Done {
            continue;
        }
        if left && (role == Role::MIDDLE || role == Role::INNER) {
            alone = true;
            continue;
        }
        let known = from == From::Proxy && entered == Entered::Taken && is_the_same(tables, id, holder);
        tables.dissolve(id);
        return match entered {
            Entered::Full => ask::NO_ROOM,
            _ if known => holder.index() | ask::KNOWN,
            _ => 0,
        };
    }
    let bound = tables.record(index, |flow| {
        let bound = from == From::Proxy && flow.flags & flow_flags::AFFINITY != 0;
        (bound, flow.service, flow.backend, flow.generation, *flow.client().0)
    });
    if let Some((true, service, backend, generation, client)) = bound {
        select::remember(tables, service, backend, generation, client);
    }
    tables.unclaim(index);
    if alone { index | ask::ALONE } else { index }
}

/// Whether two flows lead to the same endpoint under the same address.
#[inline(always)]
fn is_the_same<T: Tables>(tables: &T, id: FlowId, other: FlowId) -> bool {
    let leads = |flow: &mut Flow| {
        let (addr, port) = flow.endpoint();
        (addr.0, port, if flow.has_source() { flow.source } else { 0 })
    };
    let one = tables.record(id.index(), leads);
    one.is_some() && one == tables.record(other.index(), leads)
}

/// Enters a leg of a flow that is being adopted: see [`From`].
#[inline(always)]
fn enter<T: Subprograms>(tables: &T, from: From, id: FlowId, role: Role, holder: &mut FlowId) -> Entered {
    for _ in 0..2 {
        match tables.enter(id, role, holder) {
            Entered::Done | Entered::Kept => return Entered::Done,
            Entered::Ended => {}
            Entered::Taken => {
                let held = *holder;
                let again = from == From::Proxy && role == Role::OUTER;
                if held == FlowId::NONE || again && is_the_same(tables, id, held) {
                    return Entered::Taken;
                }
                let yields = |flow: &mut Flow| match from {
                    From::Tables => flow.id == held,
                    From::OldTables => false,
                    From::Proxy => {
                        let fresh = flow.old == 0 && flow.proto() == Proto::UDP;
                        let adopted = flow.flags & flow_flags::ADOPTED != 0;
                        flow.is_left(held) && role == Role::OUTER
                            || flow.is(held) && (flow.is_own() || fresh && !adopted)
                    }
                };
                if tables.record(held.index(), yields) != Some(true) {
                    return Entered::Taken;
                }
            }
            Entered::Full => return Entered::Full,
        }
        if tables.take_apart(*holder) == 0 {
            break;
        }
    }
    Entered::Taken
}

/// Gives back a claimed record that no leg leads to.
#[inline(always)]
fn dissolve_at<T: Tables>(tables: &T, index: u32) {
    if let Some(id) = tables.record(index, |flow| flow.id) {
        flow::give_back(tables, id);
    }
}

/// A flow that has been adopted is translated by us from now on, if all its pairs can be had; 1 if it is.
#[inline(always)]
pub fn take<T: Subprograms>(tables: &T, id: FlowId) -> u32 {
    let index = id.index();
    if !tables.claim(index) {
        return 0;
    }
    let found = tables.record(index, |flow| (flow.id == id, flow.state, flow.has_source()));
    let taken = match found {
        Some((true, State::LIVE, _)) => true,
        Some((true, State::LEFT, masqueraded)) => {
            let mut holder = FlowId::NONE;
            let taken = enter(tables, From::Proxy, id, Role::MIDDLE, &mut holder) == Entered::Done
                && (!masqueraded
                    || enter(tables, From::Proxy, id, Role::INNER, &mut holder) == Entered::Done);
            if taken {
                let _ = tables.record(index, |flow| flow.state = State::LIVE);
            }
            taken
        }
        _ => false,
    };
    tables.unclaim(index);
    u32::from(taken)
}

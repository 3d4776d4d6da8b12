//! Another proxy on this node: what is left to it, and how the connections that it has begun become flows.
//!
//! A connection that was masqueraded becomes a flow at once. Another one is adopted in three steps: [`adopt`] enters its legs,
//! and from then on its packets wait where they enter; the agent has the kernel's connection tracking let go of it, which would
//! otherwise have the tuple that we lead it to already, and give it another port; [`release`] has its packets translated.

use super::{Entered, Tables, flow, select};
use crate::abi::{Flow, FlowId, Role, State, ask, config, flow_flags};
use crate::addr::Proto;
use crate::wire::Packet;

/// Whether what is new is another proxy's.
#[inline(always)]
pub fn leaves_new<T: Tables>(tables: &T) -> bool {
    tables.config().is_some_and(|config| config.flags & config::LEAVE_NEW != 0)
}

/// Whether connections of another proxy are being adopted.
#[inline(always)]
pub fn goes_on<T: Tables>(tables: &T) -> bool {
    tables.config().is_some_and(|config| config.flags & config::LEAVE_MIDDLE != 0)
}

/// Whether a packet of this flow waits.
#[inline(always)]
pub fn waits<T: Tables>(tables: &T, id: FlowId) -> bool {
    let now = tables.now();
    tables.record(id.index(), |flow| flow.waits(id, now)) == Some(true)
}

/// Whether a packet to a Service that belongs to no flow of ours is left to another proxy.
#[inline(always)]
pub fn leaves<T: Tables>(tables: &T, packet: &Packet) -> bool {
    let flags = tables.config().map_or(0, |config| config.flags);
    let middle = matches!(packet.tuple.proto, Proto::TCP) && packet.tcp_flags & Packet::SYN == 0;
    flags & config::LEAVE_NEW != 0 || middle && flags & config::LEAVE_MIDDLE != 0
}

/// Makes a flow of what another proxy has begun, which `fill` writes to a record: everything but its id and claims. A flow of
/// ours that has one of its pairs makes room if it is held itself (somebody died over it), if it notes that the node speaks (for
/// the other proxy), or if it is UDP's and young: a datagram of the same conversation has begun it. TCP's is a newer
/// connection, and stays. The answer is that of [`ask::ADOPT`].
#[inline(always)]
pub fn adopt<T: Tables>(tables: &T, fill: impl FnOnce(&mut Flow) -> bool) -> u32 {
    let Some(index) = tables.take_record() else {
        return ask::NO_ROOM;
    };
    if !tables.claim(index) {
        // Somebody asks after the flow that was here before: it comes round again.
        flow::enter_free(tables, index);
        return ask::NO_ROOM;
    }
    let now = tables.now();
    let filled = tables.record(index, |flow| {
        let filled = fill(flow) && matches!(flow.state, State::HELD | State::LIVE);
        flow.checked = now;
        (flow.id, filled)
    });
    let Some((id, true)) = filled else {
        dissolve_at(tables, index);
        return 0;
    };
    for role in [Role::MIDDLE, Role::OUTER, Role::INNER] {
        if tables.record(index, |flow| flow.has(role)) != Some(true) {
            continue;
        }
        let entered = enter_adopted(tables, id, role);
        if entered != Entered::Done {
            tables.dissolve(id);
            return if entered == Entered::Full { ask::NO_ROOM } else { 0 };
        }
    }
    let bound = tables.record(index, |flow| {
        let bound = flow.flags & flow_flags::AFFINITY != 0;
        (bound, flow.service, flow.backend, flow.generation, *flow.client().0)
    });
    if let Some((true, service, backend, generation, client)) = bound {
        select::remember(tables, service, backend, generation, client);
    }
    tables.unclaim(index);
    index
}

#[inline(always)]
fn enter_adopted<T: Tables>(tables: &T, id: FlowId, role: Role) -> Entered {
    for _ in 0..2 {
        let mut holder = FlowId::NONE;
        match tables.enter(id, role, &mut holder) {
            Entered::Done | Entered::Kept => return Entered::Done,
            Entered::Over => {}
            Entered::Taken => {
                let yields = |flow: &mut Flow| {
                    flow.id == holder
                        && (flow.state == State::HELD
                            || flow.is_own()
                            || flow.old == 0
                                && flow.proto() == Proto::UDP
                                && flow.flags & flow_flags::ADOPTED == 0)
                };
                if holder == FlowId::NONE || tables.record(holder.index(), yields) != Some(true) {
                    return Entered::Taken;
                }
            }
            Entered::Full => return Entered::Full,
        }
        if tables.take_apart(holder) == 0 {
            return Entered::Taken;
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

/// A flow that has been adopted is held no longer; 1 if there is one.
#[inline(always)]
pub fn release<T: Tables>(tables: &T, index: u32) -> u32 {
    if !tables.claim(index) {
        return 0;
    }
    let held = tables.record(index, |flow| {
        let held = flow.state == State::HELD;
        if held {
            flow.state = State::LIVE;
        }
        held
    });
    tables.unclaim(index);
    u32::from(held == Some(true))
}

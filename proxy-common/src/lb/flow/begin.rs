//! Flows begin: a record is taken, written and joined by its legs.

use super::end::{displace, enter_free};
use super::leg::{Entered, enter_for};
use crate::abi::{Flow, FlowId, Pair, Reason, Role, State, Tuple, flow_flags, frontend};
use crate::addr::{Port, Proto};
use crate::lb::select::{self, Choice};
use crate::lb::{Inserted, Ring, Subprograms, Tables};
use crate::wire::Packet;

/// How many young flows are displaced for one new one when there is no free record.
const DISPLACED: usize = 6;

/// A record for a new flow, claimed. If there is none, the oldest young flows of this CPU make room; if that is not
/// enough, [`FlowId::NONE`].
#[inline(always)]
pub fn take<T: Subprograms>(tables: &T, ring: Ring) -> FlowId {
    for _ in 0..DISPLACED {
        if let Some(index) = tables.take_record() {
            if tables.claim(index) {
                return tables.record(index, |flow| flow.id).unwrap_or(FlowId::NONE);
            }
            // Another CPU still looks at the flow that was here before: the record is used later.
            enter_free(tables, index);
            continue;
        }
        displace(tables, tables.put_in_ring(ring, FlowId::NONE));
        // Where this CPU has no young flows, others have.
        displace(tables, tables.any_in_rings());
    }
    FlowId::NONE
}

/// Makes the flow `id` of a record that has been taken: of `packet`, which is for a Service, to the backend of `choice`. It
/// stays claimed. `middle_port` replaces the client's port behind the Service unless zero.
#[inline(always)]
pub fn make<T: Tables>(tables: &T, packet: &Packet, choice: &Choice, middle_port: Port, id: FlowId) -> u32 {
    let tuple = &packet.tuple;
    let now = tables.now();
    let uplink = tables.iface(packet.ifindex).map_or(0, |iface| iface.uplink);
    let middle_port = if middle_port.0 == 0 { tuple.sport } else { middle_port };
    // If Service and endpoint are one there is nothing to translate, but it may change. What goes wrapped stays as it is.
    let identity = choice.node != 0
        || choice.port == tuple.dport && middle_port == tuple.sport && choice.addr.same(&tuple.dst);
    let _ = tables.record(id.index(), |flow| {
        clear(flow, packet, now);
        flow.service = choice.service;
        flow.backend = choice.index;
        flow.generation = choice.generation;
        flow.flags = match (choice.masquerade, choice.node) {
            (_, 1..) => flow_flags::DIRECT,
            (1.., _) => flow_flags::MASQUERADE,
            _ => 0,
        };
        flow.node = choice.node;
        let middle = Tuple::new(tuple.src, middle_port, choice.addr, choice.port, tuple.proto);
        flow.near[Role::MIDDLE.index()] = middle.write_pair(&mut flow.pairs[Role::MIDDLE.index()]) as u8;
        flow.legs = if identity { 1 } else { 2 };
        // Answers to what came wrapped leave by the routes.
        flow.uplink = if packet.wrapped == 0 { uplink } else { 0 };
        flow.state = State::LIVE;
    });
    if choice.flags & frontend::AFFINITY != 0 {
        select::remember(tables, choice.service, choice.index, choice.generation, tuple.src);
    }
    1
}

/// Enters the legs of a flow that has just been made, and ends the claim; or takes it apart again.
#[inline(always)]
pub fn join<T: Subprograms>(tables: &T, packet: &Packet, id: FlowId) -> Inserted {
    let mut holder = FlowId::NONE;
    let kind = tables.record(id.index(), |flow| (flow.is_identity(), flow.is_direct()));
    let (identity, direct) = kind.unwrap_or((true, false));
    let ring = if direct { Ring::DIRECT } else { Ring::of(packet.tuple.proto) };
    // The middle leg first: it is the one that can be taken.
    let mut entered = Entered::Done;
    if !identity {
        entered = enter_for(tables, id, Role::MIDDLE, &mut holder);
        if entered == Entered::Taken {
            tables.dissolve(id);
            return join_holder(tables, &packet.tuple, holder);
        }
    }
    if entered != Entered::Full {
        entered = enter_for(tables, id, Role::OUTER, &mut holder);
    }
    match entered {
        Entered::Done | Entered::Kept => {
            tables.unclaim(id.index());
            displace(tables, tables.put_in_ring(ring, id));
            Inserted::Done
        }
        // Another CPU has opened the flow meanwhile, with another endpoint.
        Entered::Taken | Entered::Ended => {
            tables.dissolve(id);
            Inserted::Raced
        }
        Entered::Full => {
            tables.dissolve(id);
            // The oldest young flow makes room for the next one that asks.
            displace(tables, tables.put_in_ring(ring, FlowId::NONE));
            Inserted::Full
        }
    }
}

/// The middle pair is held by another flow. If that is this very one, opened by another CPU at this moment or
/// without its outer leg, the packet joins it.
#[inline(always)]
fn join_holder<T: Subprograms>(tables: &T, tuple: &Tuple, holder: FlowId) -> Inserted {
    let same = tables.record(holder.index(), |flow| {
        let ((client, sport), (vip, dport)) = (flow.client(), flow.vip());
        flow.is(holder)
            && vip.same(&tuple.dst)
            && dport == tuple.dport
            && client.same(&tuple.src)
            && sport == tuple.sport
    });
    if holder == FlowId::NONE || same != Some(true) || !tables.claim(holder.index()) {
        return Inserted::Exists;
    }
    let mut joined = Entered::Taken;
    if tables.record(holder.index(), |flow| flow.is(holder)) == Some(true) {
        joined = tables.enter(holder, Role::OUTER, &mut FlowId(0));
    }
    tables.unclaim(holder.index());
    match joined {
        Entered::Done | Entered::Kept => Inserted::Raced,
        _ => Inserted::Exists,
    }
}

/// Sets what any new flow has of its first packet. The id and the claims stay; the state comes last.
#[inline(always)]
fn clear(flow: &mut Flow, packet: &Packet, now: u64) {
    flow.service = 0;
    flow.backend = 0;
    flow.generation = 0;
    flow.old = 0;
    flow.seen = [now, 0];
    flow.source = 0;
    flow.uplink = 0;
    flow.acked = [if packet.tuple.proto == Proto::TCP { packet.ack } else { 0 }, 0];
    flow.fin = [0; 2];
    flow.near[Role::OUTER.index()] = packet.tuple.write_pair(&mut flow.pairs[Role::OUTER.index()]) as u8;
    flow.pairs[Role::MIDDLE.index()] = Pair::NONE;
    flow.pairs[Role::INNER.index()] = Pair::NONE;
    flow.rst = [0; 2];
    flow.born = now;
    flow.checked = now;
    flow.first = 0;
    flow.last = 0;
    flow.node = 0;
}

/// Makes the record of a conversation of the node's own, whose first packet leaves, so that its answers are
/// not taken for questions. It stays claimed; [`FlowId::NONE`] if there is no room.
#[inline(always)]
pub fn make_own<T: Subprograms>(tables: &T, packet: &Packet, guest: bool) -> FlowId {
    let id = take(tables, Ring::OWN);
    if id == FlowId::NONE {
        // Without the note a port of a Service may take the answers: counted, but no reason to stop the packet.
        tables.count(Reason::FlowTableFull);
        return FlowId::NONE;
    }
    let now = tables.now();
    let _ = tables.record(id.index(), |flow| {
        clear(flow, packet, now);
        flow.flags = flow_flags::OWN | if guest { flow_flags::GUEST } else { 0 };
        flow.legs = 1;
        flow.state = State::LIVE;
    });
    id
}

/// Enters the leg of a conversation of the node's own, and ends the claim; or takes it apart again.
#[inline(always)]
pub fn join_own<T: Subprograms>(tables: &T, id: FlowId) -> u32 {
    if enter_for(tables, id, Role::OWN, &mut FlowId(0)) != Entered::Done {
        tables.dissolve(id);
        return 0;
    }
    tables.unclaim(id.index());
    displace(tables, tables.put_in_ring(Ring::OWN, id));
    tables.count(Reason::NodeTraffic);
    1
}

//! The life of a flow: found by its packets, begun whole, taken apart whole.

use super::{Entered, Inserted, Ring, Tables, Touch, Touched, lost, select::Choice};
use crate::abi::{
    FORWARD, Flow, FlowId, Hook, Notes, Pair, REPLY, Reason, Role, SILENCE, State, Timeouts, Tuple,
    flow_flags, frontend, window,
};
use crate::addr::{Port, Proto};
use crate::wire::{Edit, Kind, Packet};

/// How long a flow must have lasted, in nanoseconds, before traffic both ways makes it old where there is no handshake
/// (as the kernel's connection tracking does for UDP).
const STREAM: u64 = 2_000_000_000;
/// How often the legs of a flow are looked after, in nanoseconds.
const CHECK: i64 = 1_000_000_000;
/// Longer than a packet takes from one hook to the other, in nanoseconds.
const MOMENT: u64 = SILENCE / 10;
/// How many young flows are displaced for one new one when there is no free record.
const DISPLACED: usize = 6;

/// What a first look at a packet's flow found.
pub(super) enum Look {
    /// No living flow.
    None,
    /// Go on.
    Go,
    /// Go on if the backend is still the one of this generation.
    Bound(u32, u32),
    /// Its client begins anew, or the node speaks for itself: it is over.
    Over,
    /// Its client speaks past the Service to the endpoint, or another masquerade has its port: it is over.
    Superseded,
    /// It has lost its endpoint, and whoever sends is to be told.
    Lost,
    /// An answer that has been translated already: by IPVS, say, which goes on with connections that have become ours. If it is
    /// the node that sends it, the flow is over.
    Translated,
}

/// Which of a flow's pairs a packet has, and whether it goes towards the endpoint.
pub(super) struct Way {
    pub(super) id: FlowId,
    pub(super) role: Role,
    pub(super) forward: bool,
}

/// Finds a packet's flow, refreshes it and fills in the edit that it asks for.
#[inline(always)]
pub(super) fn touch<T: Tables>(tables: &T, hook: Hook, packet: &Packet, edit: &mut Edit) -> Touched {
    let (source, Some((leg, place))) = tables.leg_of(packet) else {
        return Touched::NONE;
    };
    // What it says is taken over at once, whether it will be wanted or not: the kernel's stack need not keep it.
    edit.addr = leg.addr(packet.v4);
    edit.port = leg.port();
    edit.other_port = leg.other_port();
    edit.out = 0;
    let (notes, now) = (leg.notes(), tables.now());
    let leg = Way { id: leg.id, role: leg.role(), forward: source == leg.near() };
    let found = Touched { touch: Touch::None, id: leg.id, forward: leg.forward, care: false };
    let noted = packet.v4 && leg.leads(hook);
    // UDP towards its endpoint asks each time whether that is still there.
    let goes_on = noted && packet.goes_on() && !(packet.tuple.proto == Proto::UDP && leg.role == Role::OUTER);
    let acked = if packet.tcp_flags & Packet::ACK != 0 { packet.ack } else { notes.acked };
    if goes_on && notes.asked == window(now) {
        // Nothing counts at an inner leg.
        if notes.acked != acked && leg.role != Role::INNER {
            tables.note(place, leg.id, Notes { acked, ..notes });
        }
        return Touched { touch: Touch::Rewrite, ..found };
    }
    let looked = tables.record(leg.id.index(), |flow| match look(flow, &leg, hook, packet, now) {
        Look::Go => Ok(pass(tables, flow, &leg, hook, packet, now, edit)),
        Look::None => Ok((Touch::None, false, false)),
        Look::Over => Ok((Touch::Over, false, false)),
        Look::Superseded => Ok((Touch::Superseded, false, false)),
        Look::Lost => Ok((Touch::Lost, false, false)),
        Look::Bound(index, generation) => Err(Some((index, generation))),
        Look::Translated => Err(None),
    });
    let passed = match looked {
        Some(Err(asked)) => {
            let over = match asked {
                Some((index, generation)) => {
                    tables.backend(index).is_none_or(|b| b.generation != generation).then_some(Touch::Stale)
                }
                None => (!tables.is_of_others(&packet.tuple)).then_some(Touch::Over),
            };
            if let Some(touch) = over {
                return Touched { touch, ..found };
            }
            tables.record(leg.id.index(), |flow| pass(tables, flow, &leg, hook, packet, now, edit))
        }
        Some(Ok(passed)) => Some(passed),
        None => None,
    };
    let Some((touch, care, settled)) = passed else {
        return found;
    };
    // A RST acknowledges nothing that need be believed.
    if noted && touch == Touch::Rewrite && packet.tcp_flags & Packet::RST == 0 {
        // Of a flow that may have to leave by another interface the record is asked each time.
        let stays = edit.out == 0 || edit.out == packet.ifindex;
        let asked = if goes_on && settled && stays { window(now) } else { 0 };
        tables.note(place, leg.id, Notes { asked, acked });
    }
    Touched { touch, care, ..found }
}

impl Way {
    /// Whether the leg itself says what is written over a packet that goes this way.
    #[inline(always)]
    fn leads(&self, hook: Hook) -> bool {
        match self.role {
            Role::OUTER => hook == Hook::INGRESS && self.forward,
            Role::MIDDLE => hook == Hook::EGRESS && !self.forward,
            Role::INNER => hook == Hook::INGRESS && !self.forward,
            _ => false,
        }
    }
}

#[inline(always)]
fn look(flow: &Flow, leg: &Way, hook: Hook, packet: &Packet, now: u64) -> Look {
    let forward = leg.forward;
    let left = flow.is_left(leg.id);
    if !left && !flow.is(leg.id) {
        return if flow.is_lost(leg.id) { lost::look(flow, leg, hook, packet) } else { Look::None };
    }
    if matches!(packet.kind, Kind::IcmpError) {
        return Look::Go;
    }
    let fresh = packet.is_syn();
    // What the masquerade of this flow has made leaves with a mark, and is not looked at again: this is somebody else's, who
    // has chosen the same port. One that is over, or whose client is silent, gives way, or the answers would be taken for its.
    if forward && leg.role == Role::INNER && hook == Hook::EGRESS && !left {
        let over = fresh && flow.is_over(now);
        let gone = packet.tuple.proto == Proto::UDP && now.saturating_sub(flow.seen[FORWARD]) > SILENCE;
        return if over || gone { Look::Superseded } else { Look::Go };
    }
    // Past the Service to its endpoint. If a flow from that port is over, or its client silent, answers must not be
    // translated any more (D-5, D-19). A bridge shows the packet only where it leaves; there a packet of the flow itself
    // comes, too, but that has been seen as such a moment before. What netfilter has rewritten looks the same.
    if forward && leg.role == Role::MIDDLE {
        let silent = now.saturating_sub(flow.seen[FORWARD]);
        let over =
            fresh && (flow.is_reset() || flow.fin[REPLY] != 0) && (hook == Hook::INGRESS || silent > MOMENT);
        let gone = packet.tuple.proto == Proto::UDP && silent > SILENCE;
        return if (over || gone) && !left { Look::Superseded } else { Look::Go };
    }
    if hook == Hook::EGRESS || !forward {
        // Who is asked by somebody that it once asked, or only tried to ask, is asked anew.
        let asked = hook == Hook::INGRESS && leg.role == Role::OWN && fresh;
        // If the node itself speaks from a Service's port, it has spoken first, and its answers were taken for questions.
        let own = hook == Hook::EGRESS
            && leg.role == Role::OUTER
            && !forward
            && packet.tuple.proto == Proto::UDP
            && !flow.is_identity()
            && !left;
        let over = asked && (flow.is_over(now) || flow.seen[REPLY] == 0);
        return match (over, own) {
            (true, _) => Look::Over,
            (_, true) => Look::Translated,
            _ => Look::Go,
        };
    }
    match leg.role {
        // UDP has no end, and a flow that nobody has answered has nobody to lose: both follow the Service when their
        // backend goes (C-4…C-8). A TCP flow that has been answered keeps its endpoint until it ends (P-18), but a new
        // connection from the same port is a new flow (P-26).
        Role::OUTER => {
            if fresh && flow.may_begin_anew() {
                Look::Over
            } else if packet.tuple.proto == Proto::UDP || flow.seen[REPLY] == 0 || fresh {
                Look::Bound(flow.backend, flow.generation)
            } else {
                Look::Go
            }
        }
        _ => Look::Go,
    }
}

/// What the flow wants done with the packet, whether it wants to be looked after, and whether its legs may speak for it: one
/// that has been reset is watched closely.
#[inline(always)]
fn pass<T: Tables>(
    tables: &T,
    flow: &mut Flow,
    leg: &Way,
    hook: Hook,
    packet: &Packet,
    now: u64,
    edit: &mut Edit,
) -> (Touch, bool, bool) {
    let forward = leg.forward;
    let error = matches!(packet.kind, Kind::IcmpError);
    let enters = hook == Hook::INGRESS;
    let left = flow.state == State::LEFT;
    let mut counts = true;
    let touch = match leg.role {
        Role::OUTER if left && enters == forward => Touch::Pass,
        Role::OUTER if enters && forward => Touch::Rewrite,
        Role::MIDDLE if !enters && !forward => {
            edit.out = flow.uplink;
            Touch::Rewrite
        }
        Role::MIDDLE | Role::OUTER
            if !enters && forward && flow.is_masqueraded() && leg.role == flow.innermost() =>
        {
            counts = false;
            match flow.has_source() {
                true => {
                    let (addr, port) = flow.node();
                    edit.addr = *addr;
                    edit.port = port;
                    edit.other_port = Port(0);
                    Touch::Rewrite
                }
                false if error => Touch::Pass,
                false => Touch::Masquerade,
            }
        }
        Role::INNER if enters && !forward => {
            counts = false;
            if left { Touch::Pass } else { Touch::Rewrite }
        }
        Role::OWN => Touch::Pass,
        Role::OUTER if !enters && !forward => Touch::Pass,
        _ => {
            counts = false;
            Touch::Pass
        }
    };
    // The two places at which a direction counts are the outermost on its way through the node.
    let mut care = false;
    if counts && !error {
        let direction = if forward { FORWARD } else { REPLY };
        if packet.tcp_flags & (Packet::FIN | Packet::RST) != 0 {
            end_of(tables, flow, packet, direction, now);
        } else {
            flow.seen[direction] = now;
        }
        if packet.tcp_flags & Packet::ACK != 0 {
            flow.acked[direction] = packet.ack;
        }
        care = flow.old == 0 || forward && is_due(flow, now);
    }
    // The record may have been given to another flow while it was read.
    let settled = flow.old != 0 && flow.last_reset() == 0;
    if flow.id == leg.id { (touch, care, settled) } else { (Touch::None, false, false) }
}

/// Whether the flow's legs are to be looked after. The clock of another CPU may be a little ahead, so the difference has
/// a sign; and a subtraction that stops at zero would cost a packet more.
#[inline(always)]
const fn is_due(flow: &Flow, now: u64) -> bool {
    now.wrapping_sub(flow.checked) as i64 > CHECK
}

/// How far from what the other end has acknowledged a FIN or RST may stand to be believed: a forged one does not know
/// where that is.
const BELIEVED: u32 = 1 << 20;

/// What a direction has last acknowledged: the leg at which it counts has seen packets that the record has not.
#[inline(always)]
pub(super) fn last_acked<T: Tables>(tables: &T, flow: &Flow, direction: usize) -> u32 {
    let (known, role) = if direction == FORWARD {
        (flow.acked[FORWARD], Role::OUTER)
    } else {
        (flow.acked[REPLY], Role::MIDDLE)
    };
    let pair = &flow.pairs[role.index()];
    if !flow.has(role) || !pair.ends[0].is_v4() {
        return known;
    }
    match tables.leg(pair) {
        Some(leg) if leg.id == flow.id => leg.notes().acked,
        _ => known,
    }
}

/// A FIN or RST passes.
#[inline(always)]
fn end_of<T: Tables>(tables: &T, flow: &mut Flow, packet: &Packet, direction: usize, now: u64) {
    let acked = last_acked(tables, flow, direction ^ 1);
    // Before a handshake is complete there is nothing to compare with, and little to lose; nor is there in a flow that has
    // been adopted, until its other end speaks.
    let unknown = flow.old == 0 || flow.flags & flow_flags::ADOPTED != 0 && acked == 0;
    let believed = unknown || packet.seq.wrapping_sub(acked) < BELIEVED;
    if packet.tcp_flags & Packet::RST == 0 {
        flow.seen[direction] = now;
        if believed {
            flow.fin[direction] = 1;
        }
    } else if believed {
        flow.rst[direction] = now;
    }
}

/// Does what a packet's flow wants done beside.
#[inline(always)]
pub(super) fn care_for<T: Tables>(tables: &T, packet: &Packet, found: &Touched) {
    if tables.progress(packet, found.id, found.forward) != 0 {
        tables.look_after(found.id);
    }
}

/// A packet of a flow that is young or due: notes what it shows. 1 if the flow's legs are to be looked after.
#[inline(always)]
pub fn progress<T: Tables>(tables: &T, packet: &Packet, id: FlowId, forward: bool) -> u32 {
    let now = tables.now();
    let due = tables.record(id.index(), |flow| {
        if !flow.lives(id) {
            return false;
        }
        if flow.old == 0 {
            match (packet.tuple.proto, forward) {
                (Proto::TCP, true) => grown_tcp(flow, packet),
                (Proto::TCP, false) => note_window(flow, packet),
                (_, true) => grown(flow, now),
                // An endpoint that repeats itself proves nothing: it may have been asked under a false name.
                (_, false) => {}
            }
        }
        let due = forward && is_due(flow, now);
        if due {
            flow.checked = now;
        }
        due
    });
    u32::from(due == Some(true))
}

/// Which of its own sequence numbers the endpoint has shown (RFC 9293 §3.4): those the client can acknowledge only if it
/// has received them.
#[inline(always)]
fn note_window(flow: &mut Flow, packet: &Packet) {
    if packet.tcp_flags & Packet::RST != 0 {
        return;
    }
    let end = packet.seq.wrapping_add(packet.seq_len());
    if packet.tcp_flags & Packet::SYN != 0 || flow.flags & flow_flags::WINDOW == 0 {
        // A SYN takes one number, which is acknowledged by the next. With SYN cookies a resent one has another number.
        flow.first = packet.seq.wrapping_add(u32::from(packet.tcp_flags & Packet::SYN != 0));
        flow.last = end;
        flow.flags |= flow_flags::WINDOW;
    } else if end.wrapping_sub(flow.last) < 1 << 31 {
        flow.last = end;
    }
}

#[inline(always)]
fn grown_tcp(flow: &mut Flow, packet: &Packet) {
    let acknowledges = packet.tcp_flags & (Packet::ACK | Packet::SYN | Packet::RST) == Packet::ACK
        && flow.flags & flow_flags::WINDOW != 0
        && packet.ack.wrapping_sub(flow.first) <= flow.last.wrapping_sub(flow.first);
    if acknowledges && flow.flags & flow_flags::GUEST == 0 {
        flow.old = 1;
    }
}

#[inline(always)]
fn grown(flow: &mut Flow, now: u64) {
    let both_ways = flow.seen[REPLY] != 0;
    if both_ways && now.saturating_sub(flow.born) >= STREAM && flow.flags & flow_flags::GUEST == 0 {
        flow.old = 1;
    }
}

/// Sees to it that all legs of a flow are there: one that somebody has deleted is written again; if another flow has
/// taken its place, this one ends.
#[inline(always)]
pub fn look_after<T: Tables>(tables: &T, id: FlowId) -> u32 {
    // Under the claim the flow cannot be taken apart, so no leg can be left behind.
    if !tables.claim(id.index()) {
        return 0;
    }
    let mut lost = false;
    for role in [Role::OUTER, Role::MIDDLE, Role::INNER, Role::OWN] {
        if tables.record(id.index(), |flow| flow.is(id) && flow.has(role)) == Some(true) {
            match tables.enter(id, role, &mut FlowId(0)) {
                Entered::Kept => {}
                Entered::Done => tables.count(Reason::Mended),
                Entered::Over | Entered::Taken | Entered::Full => lost = true,
            }
        }
    }
    if lost {
        tables.dissolve(id);
    } else {
        tables.unclaim(id.index());
    }
    0
}

/// Takes a flow apart. 0 if somebody else is at work on it; then it is to be left alone for now. A flow that is gone
/// already counts as taken apart.
#[inline(always)]
pub fn take_apart<T: Tables>(tables: &T, id: FlowId) -> u32 {
    if !tables.claim(id.index()) {
        return 0;
    }
    if tables.record(id.index(), |flow| flow.id == id && flow.state.0 >= State::LIVE.0) == Some(true) {
        dissolve(tables, id);
    } else {
        tables.unclaim(id.index());
    }
    1
}

/// Ends a flow that the caller has claimed, deletes its legs, and gives its record back.
#[inline(always)]
pub fn dissolve<T: Tables>(tables: &T, id: FlowId) -> u32 {
    let _ = tables.record(id.index(), |flow| flow.state = State::ENDED);
    for role in [Role::OUTER, Role::MIDDLE, Role::INNER] {
        let _ = tables.record(id.index(), |flow| {
            // The inner leg may be there although its choice has not been told yet.
            let pair = &flow.pairs[role.index()];
            if tables.leg(pair).is_some_and(|leg| leg.id == id) {
                tables.delete_leg(pair);
            }
        });
    }
    give_back(tables, id);
    1
}

/// Gives back the record of a flow that has no legs any more; its claim ends.
#[inline(always)]
pub(super) fn give_back<T: Tables>(tables: &T, id: FlowId) {
    let index = id.index();
    let _ = tables.record(index, |flow| {
        flow.state = State::FREE;
        flow.id = id.next();
    });
    tables.unclaim(index);
    enter_free(tables, index);
}

/// Enters a record among the free ones.
#[inline(always)]
pub(super) fn enter_free<T: Tables>(tables: &T, index: u32) {
    if !tables.give_record(index) {
        // The sweep enters it again, as if it had never been used.
        let _ = tables.record(index, |flow| flow.state = State::NEW);
    }
}

/// A record for a new flow, claimed. If there is none, the oldest young flows of this CPU make room.
#[inline(always)]
fn take_record<T: Tables>(tables: &T, ring: Ring) -> Option<FlowId> {
    for _ in 0..DISPLACED {
        if let Some(index) = tables.take_record() {
            if tables.claim(index) {
                return tables.record(index, |flow| flow.id);
            }
            // Somebody asks after the flow that was here before: it comes round again.
            enter_free(tables, index);
            continue;
        }
        displace(tables, tables.stand(ring, FlowId::NONE));
        // Where this CPU has no young flows, others have.
        displace(tables, tables.anybody());
    }
    None
}

/// Whether the flow is there and young.
#[inline(always)]
fn is_young<T: Tables>(tables: &T, id: FlowId) -> bool {
    tables.record(id.index(), |flow| flow.is(id) && flow.old == 0) == Some(true)
}

/// Takes a flow apart if it is young: what stood in a place of the ring, or at a port that is wanted.
#[inline(always)]
pub(super) fn displace<T: Tables>(tables: &T, id: FlowId) -> bool {
    let done = id != FlowId::NONE && is_young(tables, id) && tables.take_apart(id) != 0;
    if done {
        tables.count(Reason::Displaced);
    }
    done
}

/// Enters the leg of a flow that the caller has claimed, whose pair stands in the record; `holder` becomes the flow that
/// has the pair, if another one has.
#[inline(always)]
pub fn enter<T: Tables>(tables: &T, id: FlowId, role: Role, holder: &mut FlowId) -> Entered {
    *holder = FlowId::NONE;
    for attempt in 0..3 {
        let tried = tables.record(id.index(), |flow| {
            let pair = &flow.pairs[role.index()];
            match tables.insert_leg(flow, role) {
                Inserted::Done => Ok(Entered::Done),
                Inserted::Full | Inserted::Raced => Ok(Entered::Full),
                Inserted::Exists => {
                    let found = tables.leg(pair).map(|found| found.id);
                    // Gone again, or written at this moment; if that lasts, it is no whole leg and nobody's.
                    if found.is_none() && attempt != 0 && tables.is_broken(pair) {
                        tables.delete_leg(pair);
                    }
                    Err(found)
                }
            }
        });
        let found = match tried {
            Some(Ok(entered)) => return entered,
            Some(Err(Some(found))) => found,
            Some(Err(None)) => continue,
            None => return Entered::Taken,
        };
        if found == id {
            return Entered::Kept;
        }
        let now = tables.now();
        let state =
            tables.record(found.index(), |flow| (flow.id == found, flow.lives(found), flow.is_over(now)));
        if let Some((true, lives, over)) = state {
            *holder = found;
            return if lives && !over { Entered::Taken } else { Entered::Over };
        }
        // Its flow is gone, and nobody else is certain to clear it away; somebody may have done so by now.
        let _ = tables.record(id.index(), |flow| {
            let pair = &flow.pairs[role.index()];
            if tables.leg(pair).is_some_and(|leg| leg.id == found) {
                tables.delete_leg(pair);
            }
        });
    }
    Entered::Taken
}

/// The same; a flow that is over makes room.
#[inline(always)]
pub(super) fn enter_for<T: Tables>(tables: &T, id: FlowId, role: Role, holder: &mut FlowId) -> Entered {
    for _ in 0..2 {
        let entered = tables.enter(id, role, holder);
        if entered != Entered::Over {
            return entered;
        }
        if tables.take_apart(*holder) == 0 {
            break;
        }
    }
    *holder = FlowId::NONE;
    Entered::Taken
}

/// Makes the record of a new flow of `packet`, which is for a Service, to the backend of `choice`; it stays claimed.
/// `middle_port` replaces the client's port behind the Service unless zero. [`FlowId::NONE`] if there is no room.
#[inline(always)]
pub fn make<T: Tables>(tables: &T, packet: &Packet, choice: &Choice, middle_port: Port) -> FlowId {
    let tuple = &packet.tuple;
    let Some(id) = take_record(tables, Ring::of(tuple.proto)) else {
        return FlowId::NONE;
    };
    let now = tables.now();
    let uplink = tables.iface(packet.ifindex).map_or(0, |iface| iface.uplink);
    let middle_port = if middle_port.0 == 0 { tuple.sport } else { middle_port };
    // If Service and endpoint are one there is nothing to translate, but it may change.
    let identity = choice.port == tuple.dport && middle_port == tuple.sport && choice.addr.same(&tuple.dst);
    let _ = tables.record(id.index(), |flow| {
        clear(flow, packet, now);
        flow.service = choice.service;
        flow.backend = choice.index;
        flow.generation = choice.generation;
        flow.flags = if choice.masquerade != 0 { flow_flags::MASQUERADE } else { 0 };
        flow.legs = if identity { 1 } else { 2 };
        let middle = Tuple::new(tuple.src, middle_port, choice.addr, choice.port, tuple.proto);
        flow.near[Role::MIDDLE.index()] = middle.write_pair(&mut flow.pairs[Role::MIDDLE.index()]) as u8;
        flow.uplink = uplink;
        flow.state = State::LIVE;
    });
    if choice.flags & frontend::AFFINITY != 0 {
        super::select::remember(tables, choice.service, choice.index, choice.generation, tuple.src);
    }
    id
}

/// Enters the legs of a flow that has just been made, and ends the claim; or takes it apart again.
#[inline(always)]
pub fn join<T: Tables>(tables: &T, packet: &Packet, id: FlowId) -> Inserted {
    let mut holder = FlowId::NONE;
    let ring = Ring::of(packet.tuple.proto);
    // The middle leg first: it is the one that can be taken.
    let mut entered = Entered::Done;
    if tables.record(id.index(), |flow| flow.is_identity()) == Some(false) {
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
            displace(tables, tables.stand(ring, id));
            Inserted::Done
        }
        // Another CPU has opened the flow meanwhile, with another endpoint.
        Entered::Taken | Entered::Over => {
            tables.dissolve(id);
            Inserted::Raced
        }
        Entered::Full => {
            tables.dissolve(id);
            // The oldest young flow makes room for the next one that asks.
            displace(tables, tables.stand(ring, FlowId::NONE));
            Inserted::Full
        }
    }
}

/// The middle pair is held by another flow. If that is this very one, opened by another CPU at this moment or bereft of
/// its outer leg, the packet joins it.
#[inline(always)]
fn join_holder<T: Tables>(tables: &T, tuple: &Tuple, holder: FlowId) -> Inserted {
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
}

/// Makes the record of a conversation of the node's own, whose first packet leaves: its answers are nobody's question. It
/// stays claimed; [`FlowId::NONE`] if there is no room.
#[inline(always)]
pub fn make_own<T: Tables>(tables: &T, packet: &Packet, guest: bool) -> FlowId {
    let Some(id) = take_record(tables, Ring::OWN) else {
        // Without the note a port of a Service may take the answers: counted, but no reason to stop the packet.
        tables.count(Reason::FlowTableFull);
        return FlowId::NONE;
    };
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
pub fn join_own<T: Tables>(tables: &T, id: FlowId) -> u32 {
    if enter_for(tables, id, Role::OWN, &mut FlowId(0)) != Entered::Done {
        tables.dissolve(id);
        return 0;
    }
    tables.unclaim(id.index());
    displace(tables, tables.stand(Ring::OWN, id));
    tables.count(Reason::OwnConversation);
    1
}

/// Looks at one record: a new one becomes free, a flow that is silent for too long is taken apart, and so is one that its
/// packets cannot find any more. How many flows were taken apart.
#[inline(always)]
pub fn sweep<T: Tables>(tables: &T, index: u32, timeouts: &Timeouts) -> u32 {
    let now = tables.now();
    let found = tables.record(index, |flow| {
        let last = flow.last_seen().max(flow.last_reset());
        let idle = now.saturating_sub(last) > u64::from(timeouts.idle(flow)) * 1_000_000_000;
        (flow.state, flow.id, idle)
    });
    match found {
        Some((State::NEW, ..)) if index != 0 && tables.claim(index) => {
            let new = tables.record(index, |flow| {
                let new = flow.state == State::NEW;
                if new {
                    // One that has been used goes on counting.
                    let id = if flow.id == FlowId::NONE { FlowId(u64::from(index)) } else { flow.id };
                    flow.id = id.next();
                    flow.state = State::FREE;
                }
                new
            });
            tables.unclaim(index);
            if new == Some(true) {
                enter_free(tables, index);
            }
            0
        }
        Some((State::LIVE | State::LEFT, id, true)) | Some((State::ENDED, id, _)) => tables.take_apart(id),
        Some((State::LOST, id, _)) => lost::sweep(tables, id, now),
        Some((State::LIVE | State::LEFT, id, false)) => {
            let lost =
                |flow: &mut Flow| tables.leg(&flow.pairs[Role::OUTER.index()]).is_none_or(|leg| leg.id != id);
            if tables.record(index, lost) == Some(true) { tables.take_apart(id) } else { 0 }
        }
        _ => 0,
    }
}

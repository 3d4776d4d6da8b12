//! What a packet's flow wants done with it.

use super::lost;
use super::progress::is_due;
use crate::abi::{FORWARD, Flow, FlowId, Hook, Key, Leg, Notes, REPLY, Role, SILENCE, State, flow_flags};
use crate::addr::{Port, Proto};
use crate::lb::Tables;
use crate::wire::{Edit, Kind, Packet};

/// Longer than a packet takes from one hook to the other, in nanoseconds.
const MOMENT: u64 = SILENCE / 10;

/// What a look at a packet's flow found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Touch {
    /// No living flow.
    None,
    /// The packet goes on as it is.
    Pass,
    /// The edit is filled in.
    Rewrite,
    /// Its endpoint's node answers the client: the packet goes there wrapped. The edit has the node's address, the
    /// endpoint's hint as port, and the node as interface.
    Wrap,
    /// A packet of a masqueraded flow at egress: its source is still to be chosen.
    Masquerade,
    /// The flow's backend has been removed: choose anew.
    Stale,
    /// The flow has ended.
    Ended,
    /// The flow has ended, and the packet does not belong to it.
    Superseded,
    /// The flow's endpoint is lost: whoever sends gets a reset.
    Lost,
}

/// A packet's flow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Touched {
    /// What is to be done.
    pub(crate) touch: Touch,
    /// The flow, if there is one.
    pub(crate) id: FlowId,
    /// Whether the packet goes towards the endpoint.
    pub(crate) forward: bool,
    /// Whether [`care_for`](super::care_for) is wanted.
    pub(crate) care: bool,
}

impl Touched {
    /// No flow.
    pub(crate) const NONE: Self = Self { touch: Touch::None, id: FlowId::NONE, forward: false, care: false };
}

/// What a first look at a packet's flow found.
pub(crate) enum Look {
    /// No living flow.
    None,
    /// Go on.
    Go,
    /// Go on if the backend is still the one of this generation.
    Bound(u32, u32),
    /// It has ended: its client begins anew, or the node speaks for itself.
    Ended,
    /// It has ended: its client speaks to the endpoint directly, or another masquerade has its port.
    Superseded,
    /// It has lost its endpoint, and whoever sends gets a reset.
    Lost,
    /// An answer that has been translated already: by IPVS, say, which goes on with connections that have
    /// become ours. If it is the node that sends it, the flow has ended.
    Translated,
}

/// Which of a flow's pairs a packet has, and whether it goes towards the endpoint.
pub(crate) struct Way {
    pub(crate) id: FlowId,
    pub(crate) role: Role,
    pub(crate) forward: bool,
}

/// Whether a leg of IPv4 speaks for its record, which it has asked in this window. Then nothing else need be looked at:
/// the edit is filled in, and what the packet acknowledges is noted.
#[inline(always)]
pub(crate) fn goes_on<T: Tables>(
    tables: &T,
    hook: Hook,
    packet: &Packet,
    key: &Key,
    source: usize,
    edit: &mut Edit,
) -> Option<Way> {
    let (leg, place) = tables.leg_at(key)?;
    let way = Way { id: leg.id, role: leg.role(), forward: source == leg.near() };
    let notes = leg.notes();
    if !(way.leads(hook) && packet.goes_on() && notes.asked == tables.window()) {
        return None;
    }
    if way.is_bound(packet) {
        // A leg that has a backend noted has asked for its generation in this window. One that is in use again, for
        // the same endpoint, is as good.
        let there = tables.backend(notes.backend());
        if there.is_none_or(|backend| backend.port != leg.port() || !backend.addr.same(&leg.addr(true))) {
            return None;
        }
    }
    leg.fill(true, edit);
    // Nothing counts at an inner leg.
    if packet.tcp_flags & Packet::ACK != 0 && notes.acked != packet.ack && way.role != Role::INNER {
        tables.note(place, leg.id, Notes { acked: packet.ack, ..notes });
    }
    Some(way)
}

/// Finds a packet's flow, refreshes it and fills in the edit that it asks for.
#[inline(always)]
pub(crate) fn touch<T: Tables>(tables: &T, hook: Hook, packet: &Packet, edit: &mut Edit) -> Touched {
    let (key, source) = tables.key_of(packet);
    if !tables.may_have_leg(&key) {
        return Touched::NONE;
    }
    let Some((leg, place)) = tables.leg_at(&key) else {
        return Touched::NONE;
    };
    // Copied at once, needed or not: so it need not stay on the kernel's small stack.
    leg.fill(packet.v4, edit);
    let (notes, now) = (leg.notes(), tables.now());
    let leg = Way { id: leg.id, role: leg.role(), forward: source == leg.near() };
    let found = Touched { touch: Touch::None, id: leg.id, forward: leg.forward, care: false };
    let looked =
        tables.record(leg.id.index(), |flow| match look(flow, &leg, hook, packet, now, tables.wraps()) {
            Look::Go => Ok(pass(tables, flow, &leg, hook, packet, now, edit)),
            Look::None => Ok((Touch::None, false, false)),
            Look::Ended => Ok((Touch::Ended, false, false)),
            Look::Superseded => Ok((Touch::Superseded, false, false)),
            Look::Lost => Ok((Touch::Lost, false, false)),
            Look::Bound(index, generation) => Err(Some((index, generation))),
            Look::Translated => Err(None),
        });
    let bound = if let Some(Err(Some((index, _)))) = looked { index } else { 0 };
    let passed = match looked {
        Some(Err(asked)) => {
            let ended = match asked {
                Some((index, generation)) => {
                    tables.backend(index).is_none_or(|b| b.generation != generation).then_some(Touch::Stale)
                }
                None => (!tables.is_of_others(&packet.tuple)).then_some(Touch::Ended),
            };
            if let Some(touch) = ended {
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
    // What a RST acknowledges does not count.
    if packet.v4 && leg.leads(hook) && touch == Touch::Rewrite && packet.tcp_flags & Packet::RST == 0 {
        // Of a flow that may have to leave by another interface the record is asked each time.
        let stays = edit.out == 0 || edit.out == packet.ifindex;
        // Nor does a leg speak before its flow has been cared for: that is not to be put off from window to window.
        let asked = if packet.goes_on() && settled && stays && !care { tables.window() } else { 0 };
        let acked = if packet.tcp_flags & Packet::ACK != 0 { packet.ack } else { notes.acked };
        let notes = Notes { asked, acked };
        tables.note(place, leg.id, if leg.is_bound(packet) { notes.bound_to(bound) } else { notes });
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

impl Way {
    /// Whether the packet goes on only while its endpoint is there: UDP has no end.
    #[inline(always)]
    fn is_bound(&self, packet: &Packet) -> bool {
        packet.tuple.proto == Proto::UDP && self.role == Role::OUTER
    }
}

impl Leg {
    /// What is written over a packet where this leg leads.
    #[inline(always)]
    const fn fill(&self, v4: bool, edit: &mut Edit) {
        edit.addr = self.addr(v4);
        edit.port = self.port();
        edit.other_port = self.other_port();
        edit.out = 0;
    }
}

#[inline(always)]
fn look(flow: &Flow, leg: &Way, hook: Hook, packet: &Packet, now: u64, wraps: bool) -> Look {
    let (forward, direct) = (leg.forward, wraps && flow.is_direct());
    let left = flow.is_left(leg.id);
    if !left && !flow.is(leg.id) {
        return if flow.is_lost(leg.id) { lost::look(flow, leg, hook, packet) } else { Look::None };
    }
    if matches!(packet.kind, Kind::IcmpError) {
        return Look::Go;
    }
    let fresh = packet.is_syn();
    // What this flow's masquerade has made leaves with a mark, and is not looked at again: this packet is
    // another masquerade's, which has chosen the same port. A flow that is closed, or whose client is silent,
    // gives way, or the answers would be taken for its.
    if forward && leg.role == Role::INNER && hook == Hook::EGRESS && !left {
        let closed = fresh && flow.is_closed(now);
        let idle = packet.tuple.proto == Proto::UDP && now.saturating_sub(flow.seen[FORWARD]) > SILENCE;
        return if closed || idle { Look::Superseded } else { Look::Go };
    }
    // Past the Service to its endpoint. If a flow from that port is closed, or its client silent, answers
    // must not be translated any more (D-5, D-19). A bridge shows the packet only where it leaves; there a
    // packet of the flow itself comes, too, but that has been seen as such a moment before. What netfilter
    // has rewritten looks the same.
    if forward && leg.role == Role::MIDDLE {
        let silent = now.saturating_sub(flow.seen[FORWARD]);
        let closed =
            fresh && (flow.is_reset() || flow.fin[REPLY] != 0) && (hook == Hook::INGRESS || silent > MOMENT);
        let idle = packet.tuple.proto == Proto::UDP && silent > SILENCE;
        return if (closed || idle) && !left { Look::Superseded } else { Look::Go };
    }
    if hook == Hook::EGRESS || !forward {
        // The other end begins a connection of its own, from the address and port that the node once asked.
        let asked = hook == Hook::INGRESS && leg.role == Role::OWN && fresh;
        // If the node itself speaks from a Service's port, it has spoken first, and its answers were taken
        // for questions.
        let own = hook == Hook::EGRESS
            && leg.role == Role::OUTER
            && !forward
            && packet.tuple.proto == Proto::UDP
            && !flow.is_identity()
            && !left;
        let ended = asked && (flow.is_closed(now) || flow.seen[REPLY] == 0);
        return match (ended, own) {
            (true, _) => Look::Ended,
            (_, true) => Look::Translated,
            _ => Look::Go,
        };
    }
    match leg.role {
        // UDP has no end, and a flow without an answer has no endpoint to lose: both follow the Service when
        // their backend is removed (C-4…C-8). A TCP flow that has been answered keeps its endpoint until it
        // ends (P-18), but a new connection from the same port is a new flow (P-26).
        Role::OUTER => {
            if fresh && flow.may_begin_anew() && !direct {
                Look::Ended
            } else if packet.tuple.proto == Proto::UDP
                || flow.seen[REPLY] == 0 && !(direct && flow.old != 0)
                || fresh
            {
                Look::Bound(flow.backend, flow.generation)
            } else {
                Look::Go
            }
        }
        _ => Look::Go,
    }
}

/// What the flow wants done with the packet, whether it wants to be looked after, and whether its legs may
/// speak for it: one that has been reset is watched closely.
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
    let direct = tables.wraps() && flow.is_direct();
    let mut counts = true;
    let touch = match leg.role {
        Role::OUTER if left && enters == forward => Touch::Pass,
        Role::OUTER if enters && forward && direct => {
            let (addr, port) = flow.endpoint();
            edit.addr = *addr;
            edit.port = port;
            edit.out = flow.node;
            Touch::Wrap
        }
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
        // Of one side alone what it sends is noted each time.
        care = flow.old == 0 || direct || forward && is_due(flow, now);
    }
    // The record may have been given to another flow while it was read.
    let settled = flow.old != 0 && flow.last_reset() == 0;
    if flow.id == leg.id { (touch, care, settled) } else { (Touch::None, false, false) }
}

/// How far from what the other end has acknowledged a FIN or RST may stand to be believed: a forged one does
/// not know where that is. A true one stands behind all that is under way: 4 to 6 MiB at most, unless
/// `net.ipv4.tcp_rmem` and `tcp_wmem` say otherwise.
pub(super) const BELIEVED: u32 = 1 << 23;

/// What a direction has last acknowledged: the leg at which it counts has seen packets that the record has not.
#[inline(always)]
pub(crate) fn last_acked<T: Tables>(tables: &T, flow: &Flow, direction: usize) -> u32 {
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
    // Before a handshake is complete there is nothing to compare with, and little to lose; nor is there in a
    // flow that has been adopted, until its other end speaks.
    let unknown = flow.old == 0 || flow.flags & flow_flags::ADOPTED != 0 && acked == 0;
    // Of a flow whose answers do not pass here, what the client has sent last is all there is to compare with.
    let from = if tables.wraps() && flow.is_direct() { flow.last } else { acked };
    let believed = unknown || packet.seq.wrapping_sub(from) < BELIEVED;
    if packet.tcp_flags & Packet::RST == 0 {
        flow.seen[direction] = now;
        if believed {
            flow.fin[direction] = 1;
        }
    } else if believed {
        flow.rst[direction] = now;
    }
}

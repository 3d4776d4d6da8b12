//! When a source must be rewritten, and to what.

use super::flow::{self, Entered};
use super::{Subprograms, Verdict, select};
use crate::abi::{Backend, Config, FlowId, Reason, Role, config, frontend};
use crate::addr::{Addr, Port};
use crate::lb::select::Source;
use crate::wire::{Edit, Packet};

/// What [`find_port`] says when it may not look any further: above all ports.
pub const ENDED: u32 = 1 << 16;
/// Source ports that one call of [`find_port`] looks at.
const TRIES: u32 = 128;
/// After so many of them the best one that is not free is taken, if there is any.
const ENOUGH: u32 = 12;
/// So many calls look at every port there is.
const CALLS: u32 = 65_536 / TRIES;
/// From one port that is looked at to the next. A prime larger than any range, so that every port has its turn.
const STEP: u32 = 65_537;
/// How often a port that was found is lost to another flow before the flow is given up.
const FINDS: usize = 3;

/// Whether the flow's source must be rewritten when it leaves (the truth table M-12, hairpin M-10), except
/// that a flow to an endpoint on this node keeps its source, since its answers are certain to pass here;
/// `--masquerade-local` restores kube-proxy's way, but for what has come here wrapped.
#[inline(always)]
pub(super) fn is_needed(
    config: &Config,
    flags: u32,
    backend: &Backend,
    client: &Addr,
    source: Source,
    wrapped: bool,
) -> bool {
    if backend.addr.same(client) {
        return true;
    }
    let near = backend.is_local() && (wrapped || config.flags & config::MASQUERADE_LOCAL == 0);
    if flags & frontend::INTERNAL != 0 {
        if config.flags & config::MASQUERADE_ALL != 0 {
            return true;
        }
        config.knows_pods(client) && !matches!(source, Source::Pod) && !near
    } else if flags & frontend::LOCAL != 0 {
        matches!(source, Source::Host) && !near
    } else {
        !near
    }
}

/// Chooses the source of a masqueraded flow at the interface it leaves by, and enters its inner leg. The
/// packet is on its way from the client to the endpoint.
#[inline(always)]
pub(super) fn choose_source<T: Subprograms>(
    tables: &T,
    packet: &mut Packet,
    id: FlowId,
    edit: &mut Edit,
) -> Verdict {
    // The search writes the source that it tries to the packet, where subprograms find it.
    let (client, client_port) = (packet.tuple.src, packet.tuple.sport);
    let mut entered = Entered::Taken;
    for _ in 0..FINDS {
        if tables.find_source(packet) == 0 {
            // Counted already.
            return Verdict::Drop;
        }
        entered = tables.enter_source(packet, id);
        if entered != Entered::Taken {
            break;
        }
    }
    if !matches!(entered, Entered::Done | Entered::Kept) {
        tables.count(if entered == Entered::Full { Reason::FlowInsert } else { Reason::FlowBusy });
        return Verdict::Drop;
    }
    (packet.tuple.src, packet.tuple.sport) = (client, client_port);
    let stands = tables.record(id.index(), |flow| {
        let (addr, port) = flow.node();
        edit.addr = *addr;
        edit.port = port;
        edit.other_port = Port(0);
        edit.out = 0;
        flow.has_source() && flow.is(id)
    });
    if stands != Some(true) {
        // The flow has been taken apart meanwhile.
        tables.count(Reason::FlowBusy);
        return Verdict::Drop;
    }
    Verdict::Rewrite
}

/// Enters the inner leg of a flow: from the source that has been found to the endpoint, as `packet` says.
#[inline(always)]
pub fn enter_source<T: Subprograms>(tables: &T, packet: &Packet, id: FlowId) -> Entered {
    if !tables.claim(id.index()) {
        return Entered::Taken;
    }
    // Under the claim the flow cannot be taken apart, and no other source be chosen.
    let state = tables.record(id.index(), |flow| {
        let missing = flow.is(id) && !flow.has_source();
        if missing {
            let index = Role::INNER.index();
            flow.near[index] = packet.tuple.write_pair(&mut flow.pairs[index]) as u8;
        }
        (flow.is(id), missing)
    });
    let entered = match state {
        Some((true, false)) => Entered::Kept,
        Some((true, true)) => enter_inner(tables, id),
        _ => Entered::Taken,
    };
    if entered == Entered::Done {
        let _ = tables.record(id.index(), |flow| flow.source = flow.pairs[Role::INNER.index()].seal() | 1);
    }
    tables.unclaim(id.index());
    entered
}

#[inline(always)]
fn enter_inner<T: Subprograms>(tables: &T, id: FlowId) -> Entered {
    let mut holder = FlowId::NONE;
    for _ in 0..2 {
        match flow::enter_for(tables, id, Role::INNER, &mut holder) {
            Entered::Kept => return Entered::Done,
            Entered::Taken if flow::displace(tables, holder) => {}
            entered => return entered,
        }
    }
    Entered::Taken
}

/// How far the searches for a source port of one CPU may go beyond their first call: through all ports once a
/// second. A search finds nothing in its first call only where nearly all ports have living flows to the
/// endpoint; there a flood of new flows is not to cost the node more than about a hundredth of the CPU (some
/// 110 ns a port).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowance {
    /// In which 2^30 ns (1.07 s) of the clock.
    period: u32,
    /// Calls in it.
    used: u32,
}

impl Allowance {
    /// Whether there may be one call more.
    #[inline(always)]
    pub const fn take(&mut self, now: u64) -> bool {
        let period = (now >> 30) as u32;
        if self.period != period {
            *self = Self { period, used: 0 };
        }
        let left = self.used < CALLS;
        self.used += left as u32;
        left
    }
}

/// Looks for a source towards the destination of `packet`, which becomes its source: an address of the node,
/// and a port that is to be had (see [`find_port`]), of all there are. 0 if there is none; counted. The
/// search begins anywhere, so that a packet that is sent again looks elsewhere.
#[inline(always)]
pub fn find_source<T: Subprograms>(tables: &T, packet: &mut Packet) -> u32 {
    let addr = tables.masquerade_address(packet.ifindex, &packet.tuple.dst);
    let Some(addr) = addr.filter(|addr| !addr.is_unspecified()) else {
        tables.count(Reason::NoSourceAddress);
        return 0;
    };
    packet.tuple.src = addr;
    let total = tables.config().map_or(0, |config| config.snat_total);
    let start = ((u64::from(select::scramble(tables.random())) * u64::from(total)) >> 32) as u32;
    // Little in the loop: the verifier walks through all of it.
    for call in 0..CALLS {
        let found = tables.find_port(packet, start, call);
        if found == ENDED {
            break;
        }
        if found != 0 {
            return 1;
        }
    }
    tables.count(Reason::NoSourcePort);
    0
}

/// Looks for a port towards the destination of `packet`, from its source address: one that is free, or of a
/// flow that is closed, the longest ago, or of the oldest of the young ones; these make room when the leg is
/// entered. What others on this node use towards that destination is left out. All ports are numbered; of those from
/// the one with the number `start` on it is the turn of so many as belong to this call, counted from 0. 0 if there is
/// none, [`ENDED`] if all have had their turn, or there may be no further call.
#[inline(always)]
pub fn find_port<T: Subprograms>(tables: &T, packet: &mut Packet, start: u32, call: u32) -> u32 {
    let total = tables.config().map_or(0, |config| config.snat_total);
    if call >= CALLS || call * TRIES >= total || call != 0 && !tables.may_search_on() {
        return ENDED;
    }
    let step = STEP.checked_rem(total).unwrap_or(0);
    let behind = u64::from(call * TRIES) * u64::from(step) + u64::from(start);
    let mut at = behind.checked_rem(total.into()).unwrap_or(0) as u32;
    // The lowest cost so far, and the port that it buys.
    let (mut best, mut least) = (0_u32, u64::MAX);
    for n in 0..TRIES {
        if n >= total || n > ENOUGH && best != 0 {
            break;
        }
        let price = tables.price(packet, at);
        at = further(at, step, total);
        if price < least {
            (best, least) = (packet.tuple.sport.0.into(), price);
            if price == 0 {
                break;
            }
        }
    }
    packet.tuple.sport = Port(best as u16);
    best
}

/// So many ports further on, from the last one to the first.
#[inline(always)]
const fn further(at: u32, step: u32, total: u32) -> u32 {
    let next = at + step;
    if next < total { next } else { next - total }
}

/// What the source port with the number `at`, which `packet` gets, costs: nothing if it is free; if it has a flow that
/// is closed, the time of that flow's last packet; if that flow is young, when it began, which is always more.
/// `u64::MAX` if it is not to be had.
#[inline(always)]
pub fn price<T: Subprograms>(tables: &T, packet: &mut Packet, at: u32) -> u64 {
    const YOUNG: u64 = 1 << 63;
    packet.tuple.sport = tables.snat_port(at);
    if packet.tuple.sport.0 == 0 || tables.is_service_port(packet.tuple.sport) {
        return u64::MAX;
    }
    let now = tables.now();
    let price = match tables.leg_at(&tables.key_of(packet).0) {
        None => 0,
        Some((leg, _)) => tables
            .record(leg.id.index(), |flow| {
                if !flow.is(leg.id) || flow.is_closed(now) {
                    flow.last_seen() | 1
                } else if flow.old == 0 && leg.role() == Role::INNER {
                    YOUNG | flow.born
                } else {
                    u64::MAX
                }
            })
            .unwrap_or(u64::MAX),
    };
    if price != u64::MAX && (tables.is_taken(&packet.tuple) || tables.is_socket(&packet.tuple)) {
        return u64::MAX;
    }
    price
}

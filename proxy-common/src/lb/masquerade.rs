//! When a source must be rewritten, and to what.

use super::{Entered, Tables, Verdict, flow, select};
use crate::abi::{Backend, Config, FlowId, Leg, Reason, Role, config, frontend};
use crate::addr::{Addr, Port};
use crate::lb::select::Source;
use crate::wire::{Edit, Packet};

/// Source ports that are looked at for one flow: of a range that is full but for one in a hundred, three of four
/// searches find one.
const TRIES: u32 = 128;
/// After so many of them the best one that is not free is taken, if there is any.
const ENOUGH: u32 = 12;
/// From one port that is looked at to the next. A prime larger than any range, so that every port has its turn.
const STEP: u32 = 65_537;
/// How often a port that was found is lost to somebody else before the flow is given up.
const FINDS: usize = 3;

/// Whether the flow's source must be rewritten when it leaves (the truth table M-12, hairpin M-10), except
/// that a flow to an endpoint on this node keeps its source, since its answers are certain to pass here;
/// `--masquerade-local` restores kube-proxy's way.
#[inline(always)]
pub(super) fn is_needed(
    config: &Config,
    flags: u32,
    backend: &Backend,
    client: &Addr,
    source: Source,
) -> bool {
    if backend.addr.same(client) {
        return true;
    }
    let near = backend.is_local() && config.flags & config::MASQUERADE_LOCAL == 0;
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

/// Chooses the source of a masqueraded flow at the interface it leaves by, and enters its inner leg. The packet is on
/// its way from the client to the endpoint.
#[inline(always)]
pub(super) fn choose_source<T: Tables>(
    tables: &T,
    packet: &mut Packet,
    id: FlowId,
    edit: &mut Edit,
) -> Verdict {
    // The search spends the client's end of the packet.
    let (client, client_port) = (packet.tuple.src, packet.tuple.sport);
    let mut entered = Entered::Taken;
    for _ in 0..FINDS {
        if tables.find_port(packet) == 0 {
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
        // Somebody has taken the flow apart at once.
        tables.count(Reason::FlowBusy);
        return Verdict::Drop;
    }
    Verdict::Rewrite
}

/// Enters the inner leg of a flow: from the source that has been found to the endpoint, as `packet` says.
#[inline(always)]
pub fn enter_source<T: Tables>(tables: &T, packet: &Packet, id: FlowId) -> Entered {
    if !tables.claim(id.index()) {
        return Entered::Taken;
    }
    // Only now is it certain that nobody else chooses, or takes the flow apart.
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
        tables.set_target(&packet.tuple);
    }
    tables.unclaim(id.index());
    entered
}

#[inline(always)]
fn enter_inner<T: Tables>(tables: &T, id: FlowId) -> Entered {
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

/// Looks for a source towards the destination of `packet`, which becomes its source: an address of the node, and a port
/// that is free, or of a flow that is over, the longest ago, or of the oldest of the young ones; these make room when the
/// leg is entered. 0 if there is none; counted. The search begins anywhere, so that a packet that is sent again looks
/// elsewhere.
#[inline(always)]
pub fn find_port<T: Tables>(tables: &T, packet: &mut Packet) -> u32 {
    let addr = tables.masquerade_address(packet.ifindex, &packet.tuple.dst);
    let Some(addr) = addr.filter(|addr| !addr.is_unspecified()) else {
        tables.count(Reason::NoSourceAddress);
        return 0;
    };
    packet.tuple.src = addr;
    let total = tables.config().map_or(0, |config| config.snat_total);
    let start = select::scramble(tables.random()) >> 1;
    let now = tables.now();
    // The lowest cost so far, and the port that it buys.
    let (mut best, mut least) = (0_u32, u64::MAX);
    for n in 0..TRIES {
        if n >= total || n > ENOUGH && best != 0 {
            break;
        }
        packet.tuple.sport = tables.snat_port(start.wrapping_add(n.wrapping_mul(STEP)));
        if packet.tuple.sport.0 == 0 || tables.is_service_port(packet.tuple.sport) {
            continue;
        }
        let cost = match tables.leg_of(packet).1 {
            Some((leg, _)) => cost(tables, &leg, now),
            None if tables.is_socket(&packet.tuple) => u64::MAX,
            None => return 1,
        };
        if cost < least {
            (best, least) = (packet.tuple.sport.0.into(), cost);
        }
    }
    packet.tuple.sport = Port(best as u16);
    if best == 0 {
        tables.count(Reason::NoSourcePort);
    }
    best
}

/// What it would cost to take a port from its flow: the age of one that is over counts before that of a young one;
/// others are not to be had.
#[inline(always)]
fn cost<T: Tables>(tables: &T, leg: &Leg, now: u64) -> u64 {
    const YOUNG: u64 = 1 << 63;
    let cost = tables.record(leg.id.index(), |flow| {
        if !flow.is(leg.id) || flow.is_over(now) {
            flow.last_seen()
        } else if flow.old == 0 && leg.role() == Role::INNER {
            YOUNG | flow.born
        } else {
            u64::MAX
        }
    });
    cost.unwrap_or(u64::MAX)
}

//! A packet that belongs to no flow: if it is for a Service it opens one.

use super::select::{self, Choice};
use super::{FlowTable, Inserted, Stat, Tables, Verdict, masquerade, track};
use crate::abi::{Flow, FlowKey, Hook, Leg, Reason, SourceKey, address, frontend};
use crate::addr::{Addr, Port, Proto};
use crate::wire::{Edit, Kind, Packet};

/// Backends that are tried when a flow's tuple behind the Service is taken.
const BACKENDS: u32 = 4;
/// Source ports that are tried after that.
const PORTS: u32 = 8;
/// How often a selection that met a table in the middle of a change starts anew.
const SELECTIONS: usize = 3;

/// Chooses a backend for the packet's flow and enters its legs. `known` is what is known of the destination
/// address. On [`Verdict::Rewrite`] the edit is filled in.
///
/// If the tuple behind the Service belongs to another flow of the same client port (D-5), other backends
/// are tried, and then other source ports.
#[inline(always)]
pub(super) fn open<T: Tables>(tables: &T, packet: &Packet, known: u32, edit: &mut Edit) -> Verdict {
    // A stray RST opens nothing, nor does a later fragment: the first one has opened the flow or been refused,
    // and then the rest has no business at a Service's address.
    if matches!(packet.kind, Kind::LaterFragment) && known & address::NODE == 0 {
        tables.count(Reason::FragmentUnknown);
        return Verdict::Drop;
    }
    if packet.tcp_flags & Packet::RST != 0 || matches!(packet.kind, Kind::LaterFragment) {
        return Verdict::Pass;
    }
    let mut choice = Choice::NONE;
    for attempt in 0..BACKENDS {
        let verdict = tables.choose(packet, known, attempt, &mut choice);
        if verdict != Verdict::Rewrite {
            return verdict;
        }
        match tables.write_flow(&packet.key, &choice, Port(0), edit) {
            Inserted::Done => return opened(tables, &choice),
            Inserted::Exists => {}
            Inserted::Full => {
                tables.count(Reason::FlowInsert);
                return Verdict::Drop;
            }
        }
        // A client bound to its backend does not move for the sake of a tuple.
        if choice.flags & frontend::AFFINITY != 0 {
            break;
        }
    }
    let Some(config) = tables.config() else {
        return Verdict::Drop;
    };
    let start = select::flow_hash(&packet.key, config.seed);
    for n in 0..PORTS {
        let port = config.snat_port(start.wrapping_add(n.wrapping_mul(13)));
        if port.0 != 0 && tables.write_flow(&packet.key, &choice, port, edit) == Inserted::Done {
            tables.count(Reason::FlowCollision);
            return opened(tables, &choice);
        }
    }
    tables.count(Reason::CollisionUnresolved);
    Verdict::Drop
}

#[inline(always)]
fn opened<T: Tables>(tables: &T, choice: &Choice) -> Verdict {
    tables.count(Reason::NewFlow);
    tables.count_service(choice.service, Stat::Chosen);
    Verdict::Rewrite
}

/// Chooses a backend. On [`Verdict::Rewrite`] the choice is filled in; anything else has been counted.
/// Attempts after the first look elsewhere.
#[inline(always)]
pub fn choose<T: Tables>(
    tables: &T,
    packet: &Packet,
    known: u32,
    attempt: u32,
    choice: &mut Choice,
) -> Verdict {
    let key = &packet.key;
    if key.dst.is_never_service() {
        return Verdict::Pass;
    }
    let Some(config) = tables.config() else {
        tables.count(Reason::ConfigMissing);
        return Verdict::Pass;
    };
    let source = select::source_of(tables, config, &key.src, packet.ifindex);
    let mut hash = select::flow_hash(key, config.seed);
    if attempt != 0 {
        hash = select::scramble(hash.wrapping_add(attempt));
    }
    for _ in 0..SELECTIONS {
        let frontend = match select::frontend_for(tables, &key.dst, key.dport, key.proto, known) {
            Ok(frontend) => frontend,
            Err(select::Refusal::NotService) => return Verdict::Pass,
            Err(refusal) => return deny(tables, refusal),
        };
        if frontend.flags & frontend::SOURCE_RANGES != 0
            && !tables.source_allowed(&SourceKey::exact(frontend.service, key.src))
        {
            tables.count(Reason::SourceRange);
            tables.count_service(frontend.service, Stat::Dropped);
            return Verdict::Drop;
        }
        let (run, flag) = match select::usable(&frontend, source) {
            Ok(usable) => usable,
            Err(refusal) => return deny(tables, refusal),
        };
        let chosen = match select::remembered(tables, &frontend, flag, key.src) {
            Some(chosen) => Some(chosen),
            None => select::pick(tables, &frontend, run, hash),
        };
        if let Some((index, backend)) = chosen {
            choice.addr = backend.addr;
            choice.port = backend.port;
            choice.index = index;
            choice.generation = backend.generation;
            choice.service = frontend.service;
            choice.flags = frontend.flags;
            choice.masquerade =
                u32::from(masquerade::is_needed(config, frontend.flags, &backend, &key.src, source));
            return Verdict::Rewrite;
        }
    }
    tables.count(Reason::BadSlot);
    Verdict::Drop
}

#[inline(always)]
fn deny<T: Tables>(tables: &T, refusal: select::Refusal) -> Verdict {
    if refusal.count(tables) { Verdict::Refuse } else { Verdict::Drop }
}

/// Writes the legs of a flow to the half-open table: the answer's first, since it is the one that can be
/// taken. `client_port` replaces the client's port behind the Service unless zero.
#[inline(always)]
pub fn write_flow<T: Tables>(
    tables: &T,
    key: &FlowKey,
    choice: &Choice,
    client_port: Port,
    edit: &mut Edit,
) -> Inserted {
    edit.addr = choice.addr;
    edit.port = choice.port;
    edit.other_port = client_port;
    // One record and one key, filled in leg by leg: the kernel's stack is small.
    let mut flow = Flow {
        addr: key.dst,
        port: key.dport,
        other_port: if client_port.0 == 0 { Port(0) } else { key.sport },
        leg: Leg::UNDNAT,
        seen: 0,
        pad: 0,
        backend: choice.index,
        generation: choice.generation,
        service: choice.service,
        pad2: 0,
        last_seen: tables.now(),
    };
    let mut other = FlowKey {
        src: choice.addr,
        dst: key.src,
        sport: choice.port,
        dport: if client_port.0 == 0 { key.sport } else { client_port },
        proto: key.proto,
        hook: Hook::EGRESS,
        pad: 0,
    };
    // A pod that reaches itself from the port it serves: its packets and its answers would be one tuple
    // behind the Service (M-10, D-5).
    if other.sport == other.dport && other.src.same(&other.dst) {
        return Inserted::Exists;
    }
    let entered = reserve(tables, &mut other, &flow);
    if entered != Inserted::Done {
        return entered;
    }
    flow.leg = Leg::DNAT;
    flow.addr = choice.addr;
    flow.port = choice.port;
    flow.other_port = client_port;
    if matches!(tables.insert_flow(FlowTable::HalfOpen, key, &flow, true), Inserted::Full) {
        tables.delete_flow(FlowTable::HalfOpen, &other);
        return Inserted::Full;
    }
    if choice.masquerade != 0 {
        other.turn();
        flow.leg = Leg::SNAT;
        flow.addr = Addr::ANY_V6;
        flow.port = Port(0);
        flow.other_port = Port(0);
        // A left-over of the same tuple may know a node address already: its answers' leg is still there.
        if matches!(tables.insert_flow(FlowTable::HalfOpen, &other, &flow, false), Inserted::Full) {
            other.turn();
            tables.delete_flow(FlowTable::HalfOpen, &other);
            tables.delete_flow(FlowTable::HalfOpen, key);
            return Inserted::Full;
        }
    }
    if choice.flags & frontend::AFFINITY != 0 {
        select::remember(tables, choice.service, choice.index, choice.generation, key.src);
    }
    Inserted::Done
}

/// Who holds the tuple of a flow's answers.
enum Holder {
    /// A left-over of the flow itself: it is taken over.
    Ours,
    /// A connection that has ended.
    Over,
    /// Another flow.
    Other,
}

/// Takes the tuple of a flow's answers, `reply`. One that is held by a connection that has ended, or is this flow's
/// own left-over, is taken over.
#[inline(always)]
fn reserve<T: Tables>(tables: &T, reply: &mut FlowKey, back: &Flow) -> Inserted {
    let tcp = reply.proto == Proto::TCP;
    let held = |f: &mut Flow| {
        if f.addr.same(&back.addr) && f.port == back.port && f.other_port == back.other_port {
            *f = *back;
            Holder::Ours
        } else if tcp && f.seen & (Packet::RST | Packet::FIN) != 0 {
            Holder::Over
        } else {
            Holder::Other
        }
    };
    match tables.with_flow(FlowTable::Established, reply, held) {
        Some(Holder::Ours) => return Inserted::Done,
        Some(Holder::Other) => return Inserted::Exists,
        Some(Holder::Over) => {
            // What it shares with the new flow goes at once, or that would end with the rest of the old one.
            tables.delete_flow(FlowTable::Established, reply);
            reply.turn();
            tables.delete_flow(FlowTable::Established, reply);
            reply.turn();
        }
        None => {}
    }
    match tables.insert_flow(FlowTable::HalfOpen, reply, back, false) {
        Inserted::Exists => match tables.with_flow(FlowTable::HalfOpen, reply, held) {
            Some(Holder::Ours) => Inserted::Done,
            Some(Holder::Over) => tables.insert_flow(FlowTable::HalfOpen, reply, back, true),
            Some(Holder::Other) | None => Inserted::Exists,
        },
        other => other,
    }
}

/// A half-open flow's answer leg may have been evicted while the client kept sending: enters it again.
/// Zero when that is impossible and the flow must be opened anew.
#[inline(always)]
pub fn revive<T: Tables>(tables: &T, key: &FlowKey) -> u32 {
    let Some(flow) = tables.with_flow(FlowTable::HalfOpen, key, |f| *f) else {
        return 1;
    };
    if flow.leg != Leg::DNAT {
        return 1;
    }
    let mut reply = track::undnat_key(key, &flow);
    if tables.with_flow(FlowTable::HalfOpen, &reply, |_| ()).is_some() {
        return 1;
    }
    let back = Flow {
        addr: key.dst,
        port: key.dport,
        other_port: if flow.other_port.0 == 0 { Port(0) } else { key.sport },
        leg: Leg::UNDNAT,
        ..flow
    };
    u32::from(reserve(tables, &mut reply, &back) == Inserted::Done)
}

//! A packet that belongs to no flow: if it is for a Service it opens one.

use super::select::{self, Choice, Source};
use super::{FlowTable, Inserted, Stat, Tables, Verdict, masquerade, track};
use crate::abi::{Flow, FlowKey, Frontend, Hook, Leg, Reason, SourceKey, frontend};
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
#[cfg_attr(target_arch = "bpf", inline(never))]
pub(super) fn open<T: Tables>(tables: &T, packet: &Packet, known: u32, edit: &mut Edit) -> Verdict {
    // A stray RST or a fragment without ports opens nothing; for a ClusterIP nobody else would take it.
    if packet.tcp_flags & Packet::RST != 0 || matches!(packet.kind, Kind::LaterFragment) {
        return Verdict::Pass;
    }
    if packet.key.dst.is_never_service() {
        return Verdict::Pass;
    }
    let Some(config) = tables.config() else {
        tables.count(Reason::ConfigMissing);
        return Verdict::Pass;
    };
    let hash = select::flow_hash(&packet.key, config.seed);
    let source = select::source_of(tables, &config, &packet.key.src);
    let choice = match choose(tables, &packet.key, known, source, hash) {
        Ok(choice) => choice,
        Err(Denial::Pass) => return Verdict::Pass,
        Err(Denial::Refuse) => return Verdict::Refuse,
        Err(Denial::Drop) => return Verdict::Drop,
    };
    let masquerade = masquerade::is_needed(&config, &choice, &packet.key.src, source);
    let verdict = enter(tables, &packet.key, &choice, source, masquerade, hash, edit);
    if verdict == Verdict::Rewrite {
        tables.count(Reason::NewFlow);
        tables.count_service(choice.frontend.service, Stat::Chosen);
    }
    verdict
}

/// Why no flow is opened; already counted.
enum Denial {
    Pass,
    Refuse,
    Drop,
}

#[inline(always)]
fn choose<T: Tables>(
    tables: &T,
    key: &FlowKey,
    known: u32,
    source: Source,
    hash: u32,
) -> Result<Choice, Denial> {
    for _ in 0..SELECTIONS {
        let frontend = match select::frontend_for(tables, &key.dst, key.dport, key.proto, known) {
            Ok(frontend) => frontend,
            Err(select::Refusal::NotService) => return Err(Denial::Pass),
            Err(refusal) => return Err(deny(tables, refusal)),
        };
        if frontend.flags & frontend::SOURCE_RANGES != 0
            && !tables.source_allowed(&SourceKey::exact(frontend.service, key.src))
        {
            tables.count(Reason::SourceRange);
            tables.count_service(frontend.service, Stat::Dropped);
            return Err(Denial::Drop);
        }
        let (run, flag) = match select::usable(&frontend, source) {
            Ok(usable) => usable,
            Err(refusal) => return Err(deny(tables, refusal)),
        };
        let chosen = match select::remembered(tables, &frontend, flag, key.src) {
            Some(chosen) => Some(chosen),
            None => select::pick(tables, &frontend, run, hash),
        };
        if let Some((index, backend)) = chosen {
            return Ok(Choice { frontend, index, backend });
        }
    }
    tables.count(Reason::BadSlot);
    Err(Denial::Drop)
}

#[inline(always)]
fn deny<T: Tables>(tables: &T, refusal: select::Refusal) -> Denial {
    if refusal.count(tables) { Denial::Refuse } else { Denial::Drop }
}

/// Enters the flow's legs. If the tuple behind the Service belongs to another flow of the same client port
/// (D-5), other backends are tried, and then other source ports.
#[inline(always)]
fn enter<T: Tables>(
    tables: &T,
    key: &FlowKey,
    first: &Choice,
    source: Source,
    masquerade: bool,
    hash: u32,
    edit: &mut Edit,
) -> Verdict {
    let mut choice = *first;
    let mut masquerade = masquerade;
    for n in 0..BACKENDS {
        if n != 0 {
            if choice.frontend.flags & frontend::AFFINITY != 0 {
                break;
            }
            let hash = select::scramble(hash.wrapping_add(n));
            if let Some(other) = another(tables, &choice.frontend, source, hash) {
                choice.index = other.0;
                choice.backend = other.1;
                if let Some(config) = tables.config() {
                    masquerade = masquerade::is_needed(&config, &choice, &key.src, source);
                }
            }
        }
        match write(tables, key, &choice, masquerade, Port(0), edit) {
            Inserted::Done => return Verdict::Rewrite,
            Inserted::Exists => {}
            Inserted::Full => {
                tables.count(Reason::FlowInsert);
                return Verdict::Drop;
            }
        }
    }
    let Some(config) = tables.config() else {
        return Verdict::Drop;
    };
    for n in 0..PORTS {
        let port = config.snat_port(hash.wrapping_add(n.wrapping_mul(13)));
        if port.0 != 0 && write(tables, key, &choice, masquerade, port, edit) == Inserted::Done {
            tables.count(Reason::FlowCollision);
            return Verdict::Rewrite;
        }
    }
    tables.count(Reason::CollisionUnresolved);
    Verdict::Drop
}

#[inline(always)]
fn another<T: Tables>(
    tables: &T,
    frontend: &Frontend,
    source: Source,
    hash: u32,
) -> Option<(u32, crate::abi::Backend)> {
    let (run, _) = select::usable(frontend, source).ok()?;
    select::pick(tables, frontend, run, hash)
}

/// Writes the legs of a flow to the half-open table: the answer's first, since it is the one that can be
/// taken. `client_port` replaces the client's port behind the Service unless zero.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn write<T: Tables>(
    tables: &T,
    key: &FlowKey,
    choice: &Choice,
    masquerade: bool,
    client_port: Port,
    edit: &mut Edit,
) -> Inserted {
    let now = tables.now();
    let mut flow = Flow {
        addr: choice.backend.addr,
        port: choice.backend.port,
        other_port: client_port,
        leg: Leg::DNAT,
        seen: 0,
        pad: 0,
        backend: choice.index,
        generation: choice.backend.generation,
        service: choice.frontend.service,
        pad2: 0,
        last_seen: now,
    };
    let reply = track::undnat_key(key, &flow);
    edit.addr = flow.addr;
    edit.port = flow.port;
    edit.other_port = client_port;

    let back = Flow {
        addr: key.dst,
        port: key.dport,
        other_port: if client_port.0 == 0 { Port(0) } else { key.sport },
        leg: Leg::UNDNAT,
        ..flow
    };
    let entered = reserve(tables, &reply, &back);
    if entered != Inserted::Done {
        return entered;
    }
    if matches!(tables.insert_flow(FlowTable::HalfOpen, key, &flow, true), Inserted::Full) {
        tables.delete_flow(FlowTable::HalfOpen, &reply);
        return Inserted::Full;
    }
    if masquerade {
        let snat = reply.reversed(Hook::EGRESS);
        flow.leg = Leg::SNAT;
        flow.addr = Addr::ANY_V6;
        flow.port = Port(0);
        flow.other_port = Port(0);
        // A left-over of the same tuple may know a node address already: its answers' leg is still there.
        if matches!(tables.insert_flow(FlowTable::HalfOpen, &snat, &flow, false), Inserted::Full) {
            tables.delete_flow(FlowTable::HalfOpen, &reply);
            tables.delete_flow(FlowTable::HalfOpen, key);
            return Inserted::Full;
        }
    }
    if choice.frontend.flags & frontend::AFFINITY != 0 {
        select::remember(tables, choice, key.src);
    }
    Inserted::Done
}

/// Takes the tuple of a flow's answers. One that is held by a flow that has ended, or is this flow's own
/// left-over, is taken over.
#[inline(always)]
fn reserve<T: Tables>(tables: &T, reply: &FlowKey, back: &Flow) -> Inserted {
    let held = |f: &mut Flow| {
        let ours = f.addr.same(&back.addr) && f.port == back.port && f.other_port == back.other_port;
        let over = reply.proto == Proto::TCP && f.seen & (Packet::RST | Packet::FIN) != 0;
        if ours || over {
            *f = *back;
            Inserted::Done
        } else {
            Inserted::Exists
        }
    };
    if let Some(known) = tables.with_flow(FlowTable::Established, reply, held) {
        return known;
    }
    match tables.insert_flow(FlowTable::HalfOpen, reply, back, false) {
        Inserted::Exists => tables.with_flow(FlowTable::HalfOpen, reply, held).unwrap_or(Inserted::Exists),
        other => other,
    }
}

/// A half-open flow's answer leg may have been evicted while the client kept sending: enters it again.
/// Zero when that is impossible and the flow must be opened anew.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub(super) fn revive<T: Tables>(tables: &T, key: &FlowKey) -> u32 {
    let Some(flow) = tables.with_flow(FlowTable::HalfOpen, key, |f| *f) else {
        return 1;
    };
    if flow.leg != Leg::DNAT {
        return 1;
    }
    let reply = track::undnat_key(key, &flow);
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
    u32::from(reserve(tables, &reply, &back) == Inserted::Done)
}

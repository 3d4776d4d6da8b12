//! When a source must be rewritten, and to what.

use super::{FlowTable, Inserted, Tables, Verdict, select, track};
use crate::abi::{Backend, Config, FlowKey, Leg, Reason, config, frontend};
use crate::addr::{Addr, Port};
use crate::lb::select::Source;
use crate::wire::Edit;

/// Source ports that are tried before a flow is dropped.
const TRIES: u32 = 16;

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

/// Chooses the source of a masqueraded flow at the interface it leaves by, and enters the leg of its
/// answers. `key` is the egress tuple (client → endpoint).
#[inline(always)]
pub fn choose_source<T: Tables>(tables: &T, key: &FlowKey, ifindex: u32, edit: &mut Edit) -> Verdict {
    let Some(config) = tables.config() else {
        tables.count(Reason::ConfigMissing);
        return Verdict::Drop;
    };
    let addr = match tables.iface(ifindex) {
        Some(iface) if key.src.is_v4() => iface.snat_v4,
        Some(iface) => iface.snat_v6,
        None => Addr::ANY_V6,
    };
    if addr.is_unspecified() {
        tables.count(Reason::NoSourceAddress);
        return Verdict::Drop;
    }
    let Some(mut leg) = tables.with_flow(FlowTable::HalfOpen, key, |f| *f) else {
        // Evicted between two looks: the client sends again.
        tables.count(Reason::FlowInsert);
        return Verdict::Drop;
    };
    leg.addr = key.src;
    leg.port = key.sport;
    leg.leg = Leg::UNSNAT;
    leg.seen = 0;
    let start = select::flow_hash(key, config.seed);
    let mut back = track::unsnat_key(key, addr, Port(0));
    for n in 0..TRIES {
        back.dport = config.snat_port(start.wrapping_add(n.wrapping_mul(7)));
        if back.dport.0 == 0 {
            break;
        }
        if tables.with_flow(FlowTable::Established, &back, |_| ()).is_some() {
            continue;
        }
        match tables.insert_flow(FlowTable::HalfOpen, &back, &leg, false) {
            Inserted::Done => {
                edit.addr = back.dst;
                edit.port = back.dport;
                let kept = tables.with_flow(FlowTable::HalfOpen, key, |f| {
                    f.addr = back.dst;
                    f.port = back.dport;
                });
                if kept.is_some() {
                    return Verdict::Rewrite;
                }
                tables.delete_flow(FlowTable::HalfOpen, &back);
                tables.count(Reason::FlowInsert);
                return Verdict::Drop;
            }
            Inserted::Exists => {}
            Inserted::Full => {
                tables.count(Reason::FlowInsert);
                return Verdict::Drop;
            }
        }
    }
    tables.count(Reason::NoSourcePort);
    Verdict::Drop
}

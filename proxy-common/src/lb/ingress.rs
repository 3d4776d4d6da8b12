//! Before the stack: the client's packets get the endpoint as destination, answers to a masqueraded flow
//! get the client.

use super::{FlowTable, Recalled, Tables, Touch, Verdict, open, touch};
use crate::abi::{Hook, Reason, address};
use crate::addr::Proto;
use crate::wire::{Edit, End, Kind, Packet};

/// Decides about a packet that enters the node, whatever the interface.
#[inline(always)]
pub fn ingress<T: Tables>(tables: &T, packet: &mut Packet, edit: &mut Edit) -> Verdict {
    debug_assert_eq!(packet.key.hook, Hook::INGRESS);
    edit.end = End::Dst;
    match packet.kind {
        Kind::Whole => {}
        Kind::FirstFragment => drop(tables.remember_fragment(packet)),
        Kind::IcmpError => return error(tables, packet, edit),
        // Whoever they are for: what is an answer is known only when it leaves, and there nothing can wait.
        Kind::LaterFragment => match tables.recall_fragment(packet) {
            Recalled::Known => {}
            Recalled::Waiting => return Verdict::Wait,
            Recalled::Unknown => return lone_fragment(tables, packet),
        },
        Kind::Other => return other(tables, packet),
    }
    if touch(tables, FlowTable::Established, packet, edit) != Some(Touch::Alive) {
        // An address that is nobody's is the quick way out for all other traffic.
        let known = tables.address(&packet.key.dst);
        if known != 0 {
            let verdict = tables.ingress_slow(packet, known, edit);
            if verdict != Verdict::Pass {
                return verdict;
            }
        }
        return tables.past(packet, known);
    }
    Verdict::Rewrite
}

/// A packet that is for no Service, given what is `known` of its destination. One to an address inside a Service range
/// that is nobody's is dropped, since it would only wander (P-22); others pass.
#[inline(always)]
pub fn past<T: Tables>(tables: &T, packet: &mut Packet, known: u32) -> Verdict {
    if known == 0 && tables.config().is_some_and(|config| config.is_service_range(&packet.key.dst)) {
        tables.count(Reason::UnallocatedClusterIp);
        return Verdict::Drop;
    }
    if packet.is_syn() || packet.key.proto == Proto::UDP {
        // The packet is passed: its key serves to name the flow.
        if tables.superseded(&mut packet.key) != 0 {
            tables.forget(&packet.key);
        }
    }
    Verdict::Pass
}

/// A fragment whose first one has not come: for the node itself it is the stack's; to a Service it would leave
/// untranslated.
#[inline(always)]
fn lone_fragment<T: Tables>(tables: &T, packet: &mut Packet) -> Verdict {
    let known = tables.address(&packet.key.dst);
    if known == 0 {
        return tables.past(packet, known);
    }
    if known & address::NODE != 0 {
        return Verdict::Pass;
    }
    tables.count(Reason::FragmentUnknown);
    Verdict::Drop
}

/// A packet to an address of a Service or of the node that belongs to no living established flow.
#[inline(always)]
pub fn slow<T: Tables>(tables: &T, packet: &Packet, known: u32, edit: &mut Edit) -> Verdict {
    let stale = match touch(tables, FlowTable::Established, packet, edit) {
        Some(Touch::Alive | Touch::Answer) => return Verdict::Rewrite,
        Some(Touch::Stale | Touch::Unmasqueraded) => true,
        None => match touch(tables, FlowTable::HalfOpen, packet, edit) {
            Some(Touch::Alive | Touch::Answer) => {
                if tables.revive(&packet.key) != 0 {
                    return Verdict::Rewrite;
                }
                true
            }
            Some(Touch::Stale | Touch::Unmasqueraded) => true,
            None => false,
        },
    };
    if stale {
        tables.forget(&packet.key);
        tables.count(Reason::Reselected);
    }
    open::open(tables, packet, known, edit)
}

/// An ICMP error about a flow goes where the flow's answers go (D-2).
#[inline(always)]
fn error<T: Tables>(tables: &T, packet: &Packet, edit: &mut Edit) -> Verdict {
    let found = touch(tables, FlowTable::Established, packet, edit)
        .or_else(|| touch(tables, FlowTable::HalfOpen, packet, edit));
    if found == Some(Touch::Alive) {
        tables.count(Reason::IcmpTranslated);
        Verdict::Rewrite
    } else {
        Verdict::Pass
    }
}

/// Echo requests and protocols without ports have no business at a ClusterIP: refused (P-21). Other ICMP
/// messages are left alone: answers would answer each other (RFC 1122 §3.2.2).
#[inline(always)]
fn other<T: Tables>(tables: &T, packet: &mut Packet) -> Verdict {
    let quiet = match packet.key.proto {
        Proto::ICMP => packet.icmp_type != 8,
        Proto::ICMPV6 => packet.icmp_type != 128,
        _ => false,
    };
    let known = tables.address(&packet.key.dst);
    if known == 0 {
        return tables.past(packet, known);
    }
    if quiet || known & address::CLUSTER_IP == 0 {
        return Verdict::Pass;
    }
    tables.count(Reason::UndefinedPort);
    Verdict::Refuse
}

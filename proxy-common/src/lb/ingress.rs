//! Before the stack: the client's packets get the endpoint as destination, answers to a masqueraded flow
//! get the client.

use super::{FlowTable, Tables, Touch, Verdict, open, touch};
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
        Kind::FirstFragment => {}
        Kind::IcmpError => return error(tables, packet, edit),
        Kind::LaterFragment => {
            // Only fragments to an address of a Service or of the node can be ours.
            let known = tables.address(&packet.key.dst);
            if known == 0 {
                return Verdict::Pass;
            }
            if tables.recall_fragment(packet) == 0 {
                // A fragment for the node itself is the stack's; one for a VIP would leave untranslated.
                if known & address::NODE != 0 {
                    return Verdict::Pass;
                }
                tables.count(Reason::FragmentUnknown);
                return Verdict::Drop;
            }
        }
        Kind::Other => return other(tables, packet),
    }
    if touch(tables, FlowTable::Established, packet, edit) != Some(Touch::Alive) {
        // An address that is nobody's is the quick way out for all other traffic.
        let known = tables.address(&packet.key.dst);
        if known == 0 {
            return Verdict::Pass;
        }
        let verdict = tables.ingress_slow(packet, known, edit);
        if verdict != Verdict::Rewrite {
            return verdict;
        }
    }
    if matches!(packet.kind, Kind::FirstFragment) {
        tables.remember_fragment(packet);
    }
    Verdict::Rewrite
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
fn other<T: Tables>(tables: &T, packet: &Packet) -> Verdict {
    let quiet = match packet.key.proto {
        Proto::ICMP => packet.icmp_type != 8,
        Proto::ICMPV6 => packet.icmp_type != 128,
        _ => false,
    };
    if quiet || tables.address(&packet.key.dst) & address::CLUSTER_IP == 0 {
        return Verdict::Pass;
    }
    tables.count(Reason::UndefinedPort);
    Verdict::Refuse
}

//! Before the stack: the client's packets get the endpoint as destination, answers to a masqueraded flow
//! get the client.

use super::{FlowTable, Tables, Touch, Verdict, open, recall_fragment, remember_fragment, touch, track};
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
            if recall_fragment(tables, packet).is_none() {
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
    let mut found = touch(tables, FlowTable::Established, packet, edit);
    let mut known = 0;
    if found != Some(Touch::Alive) {
        known = tables.address(&packet.key.dst);
        if found.is_none() {
            if known == 0 {
                return Verdict::Pass;
            }
            found = touch(tables, FlowTable::HalfOpen, packet, edit);
            if matches!(found, Some(Touch::Alive)) && open::revive(tables, &packet.key) == 0 {
                found = None;
            }
        }
    }
    match found {
        Some(Touch::Alive | Touch::Answer) => {}
        Some(Touch::Stale | Touch::Unmasqueraded) => {
            track::forget(tables, &packet.key);
            tables.count(Reason::Reselected);
            let verdict = open::open(tables, packet, known, edit);
            if verdict != Verdict::Rewrite {
                return verdict;
            }
        }
        None => {
            let verdict = open::open(tables, packet, known, edit);
            if verdict != Verdict::Rewrite {
                return verdict;
            }
        }
    }
    remember_fragment(tables, packet);
    Verdict::Rewrite
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

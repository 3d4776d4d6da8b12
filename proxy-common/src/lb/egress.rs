//! Behind the stack: answers get the VIP as source, masqueraded packets get an address of the node.

use super::{FlowTable, Recalled, Tables, Touch, Verdict, touch};
use crate::abi::{Hook, Reason};
use crate::wire::{Edit, End, Kind, Packet};

/// Decides about a packet that leaves the node.
#[inline(always)]
pub fn egress<T: Tables>(tables: &T, packet: &mut Packet, edit: &mut Edit) -> Verdict {
    debug_assert_eq!(packet.key.hook, Hook::EGRESS);
    edit.end = End::Src;
    match packet.kind {
        Kind::Whole | Kind::FirstFragment | Kind::IcmpError => {}
        Kind::LaterFragment => {
            // Fragments were put in order when they entered, and the stack keeps them so.
            if tables.recall_fragment(packet) != Recalled::Known {
                return Verdict::Pass;
            }
        }
        Kind::Other => return Verdict::Pass,
    }
    let found = match touch(tables, FlowTable::Established, packet, edit) {
        Some(found) => found,
        None => match touch(tables, FlowTable::HalfOpen, packet, edit) {
            Some(found) => {
                if found == Touch::Answer && accepts(packet) {
                    tables.promote(&packet.key);
                }
                found
            }
            None => return Verdict::Pass,
        },
    };
    match found {
        Touch::Alive | Touch::Answer => {}
        Touch::Unmasqueraded => {
            let verdict = tables.choose_source(&packet.key, packet.ifindex, edit);
            if verdict != Verdict::Rewrite {
                return verdict;
            }
        }
        Touch::Stale => return Verdict::Pass,
    }
    if matches!(packet.kind, Kind::IcmpError) {
        tables.count(Reason::IcmpTranslated);
    }
    if matches!(packet.kind, Kind::FirstFragment) {
        tables.remember_fragment(packet);
    }
    Verdict::Rewrite
}

/// Whether an endpoint's packet answers its client, rather than refusing it: only then is the flow kept.
#[inline(always)]
fn accepts(packet: &Packet) -> bool {
    !matches!(packet.kind, Kind::IcmpError) && packet.tcp_flags & Packet::RST == 0
}

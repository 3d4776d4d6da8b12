//! Behind the stack: answers get the VIP as source, masqueraded packets get an address of the node.

use super::flow::{self, Touch, Touched};
use super::fragment::Recalled;
use super::{Subprograms, Tables, Verdict, adopt, masquerade};
use crate::abi::{FlowId, Hook, Reason, address};
use crate::wire::{Edit, Kind, Packet};

/// Decides about a packet that leaves the node.
#[inline(always)]
pub fn egress<T: Subprograms>(tables: &T, packet: &mut Packet, edit: &mut Edit) -> Verdict {
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
    let found = flow::touch(tables, Hook::EGRESS, packet, edit);
    if found.care {
        flow::care_for(tables, packet, &found);
    }
    match found.touch {
        Touch::Rewrite => {}
        // The second one is for packets that enter.
        Touch::Pass | Touch::Wrap => return Verdict::Pass,
        Touch::Masquerade => {
            let verdict = masquerade::choose_source(tables, packet, found.id, edit);
            if verdict != Verdict::Rewrite {
                return verdict;
            }
        }
        Touch::Superseded => {
            tables.take_apart(found.id);
            return Verdict::Pass;
        }
        // The last one is for packets that enter.
        Touch::None | Touch::Ended | Touch::Stale | Touch::Lost => return unknown(tables, packet, &found),
    }
    if matches!(packet.kind, Kind::IcmpError) {
        tables.count(Reason::IcmpTranslated);
    }
    if matches!(packet.kind, Kind::FirstFragment) {
        tables.remember_fragment(packet);
    }
    if edit.out != 0 && edit.out != packet.ifindex {
        edit.out = way_back(tables, packet.ifindex, edit.out);
    }
    Verdict::Rewrite
}

/// The uplink that an answer must leave by, if that is not the interface it is about to leave by: where the
/// question came in, if both are uplinks. A router behind another one may refuse an address that is not of
/// its network.
#[inline(always)]
fn way_back<T: Tables>(tables: &T, ifindex: u32, uplink: u32) -> u32 {
    let here = tables.iface(ifindex).map_or(0, |iface| iface.uplink);
    let there = tables.iface(uplink).map_or(0, |iface| iface.uplink);
    if here != 0 && here != uplink && there == uplink {
        tables.count(Reason::ReplyRedirected);
        uplink
    } else {
        0
    }
}

/// A packet that belongs to no flow. If the node speaks from a port of a Service, or somebody else's
/// masquerade to an endpoint from a port that we masquerade with, too, the conversation is noted, so that its
/// answers are not taken for ours. Nothing is while new connections are another proxy's.
#[inline(always)]
fn unknown<T: Subprograms>(tables: &T, packet: &Packet, found: &Touched) -> Verdict {
    let matters = !matches!(packet.kind, Kind::IcmpError) && packet.tcp_flags & Packet::RST == 0;
    if !matters {
        return Verdict::Pass;
    }
    let service = tables.is_service_port(packet.tuple.sport) && !packet.is_answer();
    let guest = !service && tables.is_endpoint(&packet.tuple.dst) && tables.is_of_others(&packet.tuple);
    if (service || guest)
        && tables.address(&packet.tuple.src) & address::NODE != 0
        // From any other port it is nothing to us.
        && (service || tables.is_snat_port(packet.tuple.sport))
        && !adopt::leaves_new(tables)
    {
        if found.touch == Touch::Ended {
            tables.take_apart(found.id);
        }
        let id = tables.make_own(packet, guest);
        if id != FlowId::NONE {
            tables.join_own(id);
        }
    }
    Verdict::Pass
}

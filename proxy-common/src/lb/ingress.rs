//! Before the stack: the client's packets get the endpoint as destination, answers to a masqueraded flow
//! get the client.

use super::flow::{self, Touch};
use super::fragment::Recalled;
use super::{Subprograms, Tables, Verdict, adopt, direct, open};
use crate::abi::{Hook, Reason, address};
use crate::addr::Proto;
use crate::wire::{Edit, Kind, Packet};

/// Decides about a packet that enters the node, whatever the interface.
#[inline(always)]
pub fn ingress<T: Subprograms>(tables: &T, packet: &mut Packet, edit: &mut Edit) -> Verdict {
    match packet.kind {
        Kind::Whole | Kind::IcmpError => {}
        Kind::FirstFragment => drop(tables.remember_fragment(packet)),
        // For any destination: what is an answer is known only when it leaves, and there nothing can wait.
        Kind::LaterFragment => match tables.recall_fragment(packet) {
            Recalled::Known => {}
            // It is unwrapped, and would come again as something else.
            Recalled::Waiting if was_wrapped(tables, packet) => return lone_fragment(tables, packet),
            Recalled::Waiting => return Verdict::Wait,
            Recalled::Unknown => return lone_fragment(tables, packet),
        },
        Kind::Other => return other(tables, packet),
    }
    let found = flow::touch(tables, Hook::INGRESS, packet, edit);
    if matches!(packet.kind, Kind::IcmpError) {
        return error(tables, packet, found.touch);
    }
    match found.touch {
        // What another node has wrapped is not sent on so: it might come back, for ever. It begins anew, here; and so does
        // what no way is known for any more.
        Touch::Wrap if was_wrapped(tables, packet) || !direct::leads(tables, packet, edit.out) => {
            tables.take_apart(found.id);
        }
        Touch::Rewrite | Touch::Pass | Touch::Wrap => {
            if found.care {
                flow::care_for(tables, packet, &found);
            }
            return match found.touch {
                Touch::Rewrite => Verdict::Rewrite,
                Touch::Wrap => Verdict::Wrap,
                _ => Verdict::Pass,
            };
        }
        Touch::None | Touch::Masquerade => {}
        Touch::Lost => {
            tables.count(Reason::EndpointLost);
            return Verdict::Reject;
        }
        Touch::Stale | Touch::Ended | Touch::Superseded => {
            tables.take_apart(found.id);
            if found.touch == Touch::Stale {
                tables.count(Reason::Reselected);
            }
        }
    }
    if was_wrapped(tables, packet) {
        return direct::enter(tables, packet, edit);
    }
    // The quick way out for all other traffic.
    let known = tables.address(&packet.tuple.dst);
    if known == 0 {
        return unallocated(tables, packet);
    }
    tables.open(packet, known, edit)
}

/// Whether another node had wrapped it.
#[inline(always)]
fn was_wrapped<T: Tables>(tables: &T, packet: &Packet) -> bool {
    tables.wraps() && packet.wrapped != 0
}

/// A packet to an address that is neither a Service's nor the node's: dropped if it lies inside a Service
/// range, since the packet would only wander (P-22).
#[inline(always)]
fn unallocated<T: Tables>(tables: &T, packet: &Packet) -> Verdict {
    if tables.config().is_some_and(|config| config.is_service_range(&packet.tuple.dst)) {
        tables.count(Reason::UnallocatedClusterIp);
        return Verdict::Drop;
    }
    Verdict::Pass
}

/// A fragment whose first one has not come.
#[inline(always)]
fn lone_fragment<T: Tables>(tables: &T, packet: &Packet) -> Verdict {
    match tables.address(&packet.tuple.dst) {
        _ if was_wrapped(tables, packet) => {
            tables.count(Reason::FragmentUnknown);
            Verdict::Drop
        }
        0 => unallocated(tables, packet),
        known => open::fragment_of_nothing(tables, known),
    }
}

/// An ICMP error about a flow goes where the flow's answers go (D-2).
#[inline(always)]
fn error<T: Tables>(tables: &T, packet: &Packet, touch: Touch) -> Verdict {
    match touch {
        Touch::Rewrite => {
            tables.count(Reason::IcmpTranslated);
            Verdict::Rewrite
        }
        Touch::Wrap if !was_wrapped(tables, packet) => Verdict::Wrap,
        // It would come back by the routes, or for ever.
        _ if was_wrapped(tables, packet) => {
            tables.count(Reason::WrapFailed);
            Verdict::Drop
        }
        _ => Verdict::Pass,
    }
}

/// Echo requests and protocols without ports have no business at a ClusterIP: rejected (P-21). Other ICMP
/// messages pass: errors about errors would never end (RFC 1122 §3.2.2).
#[inline(always)]
fn other<T: Tables>(tables: &T, packet: &Packet) -> Verdict {
    let quiet = match packet.tuple.proto {
        Proto::ICMP => packet.icmp_type != 8,
        Proto::ICMPV6 => packet.icmp_type != 128,
        _ => false,
    };
    let known = tables.address(&packet.tuple.dst);
    if known == 0 {
        return unallocated(tables, packet);
    }
    if quiet || adopt::leaves_new(tables) || known & address::CLUSTER_IP == 0 {
        return Verdict::Pass;
    }
    tables.count(Reason::UndefinedPort);
    Verdict::Reject
}

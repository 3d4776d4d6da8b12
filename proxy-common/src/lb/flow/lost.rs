//! TCP connections whose endpoint has left without terminating, and whose Service wants them reset.
//!
//! The agent sees that an endpoint has left, and has its flows marked ([`lose`]). From then on an end that
//! still sends gets a RST built from the packet, so that its numbers fit. A silent end gets one from the
//! agent; if its numbers do not fit, it is answered (RFC 5961 section 3.2), and the answer gets one that
//! does.

use super::touch::{Look, Way, last_acked};
use crate::abi::{FORWARD, Flow, FlowId, Hook, REPLY, Role, State, TELL};
use crate::addr::Proto;
use crate::lb::{Subprograms, Tables};
use crate::wire::{Kind, Packet};

/// A socket without an answer asks again after at most 64 seconds (`tcp_syn_retries` of the kernel's
/// ip-sysctl.rst); in nanoseconds.
const TRIES: u64 = 70_000_000_000;

/// What becomes of a packet of a flow that has lost its endpoint. A RST may reach the other end, and what
/// leaves the node is from an end that is notified in another way: the node itself, or an endpoint of its
/// own, whose client answers it. A SYN begins something new, unless it is the connection's own, and
/// unanswered.
#[inline(always)]
pub(crate) fn look(flow: &Flow, leg: &Way, hook: Hook, packet: &Packet) -> Look {
    let ends = packet.tcp_flags & Packet::RST != 0 || matches!(packet.kind, Kind::IcmpError);
    if ends || hook == Hook::EGRESS {
        Look::Go
    } else if leg.forward && leg.role == Role::MIDDLE {
        Look::Superseded
    } else if leg.forward && packet.is_syn() && flow.is_answered() {
        Look::Ended
    } else {
        Look::Lost
    }
}

/// Marks a flow if it is TCP's and has been answered: another one finds another endpoint by itself. What its
/// ends have last acknowledged is taken from its legs, once more if it is marked already. 1 if there is one.
#[inline(always)]
pub fn lose<T: Tables>(tables: &T, id: FlowId) -> u32 {
    if !tables.claim(id.index()) {
        return 0;
    }
    let now = tables.now();
    let lost = tables.record(id.index(), |flow| {
        if flow.lives(id) && flow.proto() == Proto::TCP && !flow.is_own() && flow.is_answered() {
            flow.state = State::LOST;
            flow.checked = now;
        }
        let lost = flow.is_lost(id);
        if lost {
            flow.acked = [last_acked(tables, flow, FORWARD), last_acked(tables, flow, REPLY)];
        }
        lost
    });
    tables.unclaim(id.index());
    u32::from(lost == Some(true))
}

/// Takes a flow apart whose ends have been notified long enough.
#[inline(always)]
pub(crate) fn sweep<T: Subprograms>(tables: &T, id: FlowId, now: u64) -> u32 {
    let notified = |flow: &mut Flow| {
        let long = if !flow.is_answered() { TRIES } else { TELL };
        now.saturating_sub(flow.checked) >= long
    };
    if tables.record(id.index(), notified) == Some(true) { tables.take_apart(id) } else { 0 }
}

//! What a packet of a flow that is young, or due to be looked after, shows.

use super::touch::Touched;
use crate::abi::{FORWARD, Flow, FlowId, REPLY, flow_flags};
use crate::addr::Proto;
use crate::lb::{Subprograms, Tables};
use crate::wire::Packet;

/// How long a flow must have lasted, in nanoseconds, before traffic both ways makes it old where there is no
/// handshake (as the kernel's connection tracking does for UDP).
const STREAM: u64 = 2_000_000_000;
/// How often the legs of a flow are looked after, in nanoseconds.
const CHECK: i64 = 1_000_000_000;

/// Whether the flow's legs are to be looked after. The clock of another CPU may be a little ahead, so the
/// difference has a sign; and a subtraction that stops at zero would cost a packet more.
#[inline(always)]
pub(crate) const fn is_due(flow: &Flow, now: u64) -> bool {
    now.wrapping_sub(flow.checked) as i64 > CHECK
}

/// Notes what a packet shows, and checks the legs of its flow if that is due.
#[inline(always)]
pub(crate) fn care_for<T: Subprograms>(tables: &T, packet: &Packet, found: &Touched) {
    if tables.progress(packet, found.id, found.forward) != 0 {
        tables.look_after(found.id);
    }
}

/// A packet of a flow that is young or due: notes what it shows. 1 if the flow's legs are to be looked after.
#[inline(always)]
pub fn progress<T: Tables>(tables: &T, packet: &Packet, id: FlowId, forward: bool) -> u32 {
    let now = tables.now();
    let due = tables.record(id.index(), |flow| {
        if !flow.lives(id) {
            return false;
        }
        if flow.old == 0 {
            match (packet.tuple.proto, forward) {
                (Proto::TCP, true) if flow.is_direct() => {
                    // Who goes on has been answered, elsewhere.
                    flow.old = u8::from(packet.tcp_flags & (Packet::SYN | Packet::RST) == 0);
                }
                (Proto::TCP, true) => grown_tcp(flow, packet),
                (Proto::TCP, false) => note_window(flow, packet),
                (_, true) => grown(flow, now),
                // An endpoint that repeats itself proves nothing: it may have been asked from a spoofed address.
                (_, false) => {}
            }
        }
        let ends = packet.tcp_flags & (Packet::FIN | Packet::RST) != 0;
        if flow.is_direct() && packet.tuple.proto == Proto::TCP && !ends {
            flow.last = packet.seq;
            // A new connection from the same port: whether it is one the endpoint's node says, but it is not over.
            if packet.is_syn() {
                (flow.fin[FORWARD], flow.rst[FORWARD]) = (0, 0);
            }
        }
        let due = forward && is_due(flow, now);
        if due {
            flow.checked = now;
        }
        due
    });
    u32::from(due == Some(true))
}

/// Which of its own sequence numbers the endpoint has shown (RFC 9293 §3.4): those the client can acknowledge
/// only if it has received them.
#[inline(always)]
fn note_window(flow: &mut Flow, packet: &Packet) {
    if packet.tcp_flags & Packet::RST != 0 {
        return;
    }
    let end = packet.seq.wrapping_add(packet.seq_len());
    if packet.tcp_flags & Packet::SYN != 0 || flow.flags & flow_flags::WINDOW == 0 {
        // A SYN takes one number, which is acknowledged by the next. With SYN cookies a resent one has
        // another number.
        flow.first = packet.seq.wrapping_add(u32::from(packet.tcp_flags & Packet::SYN != 0));
        flow.last = end;
        flow.flags |= flow_flags::WINDOW;
    } else if end.wrapping_sub(flow.last) < 1 << 31 {
        flow.last = end;
    }
}

#[inline(always)]
fn grown_tcp(flow: &mut Flow, packet: &Packet) {
    let acknowledges = packet.tcp_flags & (Packet::ACK | Packet::SYN | Packet::RST) == Packet::ACK
        && flow.flags & flow_flags::WINDOW != 0
        && packet.ack.wrapping_sub(flow.first) <= flow.last.wrapping_sub(flow.first);
    if acknowledges && flow.flags & flow_flags::GUEST == 0 {
        flow.old = 1;
    }
}

#[inline(always)]
fn grown(flow: &mut Flow, now: u64) {
    let both_ways = flow.seen[REPLY] != 0 || flow.is_direct();
    if both_ways && now.saturating_sub(flow.born) >= STREAM && flow.flags & flow_flags::GUEST == 0 {
        flow.old = 1;
    }
}

//! A packet through a hook, as the kernel programs do it.

use std::vec::Vec;

use super::ByteFrame;
use crate::abi::{Hook, Reason};
use crate::lb::direct::{self, Inside, Wrapping};
use crate::lb::quick::{Quick, quick};
use crate::lb::through::{self, Passage};
use crate::lb::{Subprograms, Verdict, egress, ingress};
use crate::wire::reject::{self, Reply};
use crate::wire::{
    Edit, End, Frame as _, Kind, Packet, lower_hops, parse, peek, peek_v6, rewrite, rewrite_error, wrap,
};

/// What became of a frame at a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Went on unchanged.
    Passed,
    /// Went on changed.
    Rewritten(ByteFrame),
    /// Was discarded, and this was sent back.
    Rejected(ByteFrame),
    /// Was sent to its endpoint's node in a packet of its own.
    Wrapped(ByteFrame),
    /// Was put at the end of the queue, to come again.
    Waits,
    /// Was discarded.
    Dropped,
}

/// Runs an Ethernet frame through the decision of a hook and applies it, as the kernel programs do. What goes on
/// quickly although its hook would not have it so fails the test.
pub fn run(tables: &impl Subprograms, frame: &ByteFrame, hook: Hook, ifindex: u32) -> Outcome {
    run_on::<true>(tables, frame, hook, ifindex)
}

/// The same; with `ETHERNET` false the frame begins at the IP header.
pub fn run_on<const ETHERNET: bool>(
    tables: &impl Subprograms,
    frame: &ByteFrame,
    hook: Hook,
    ifindex: u32,
) -> Outcome {
    let end = if hook == Hook::INGRESS { End::Dst } else { End::Src };
    let mut edit = Edit::NONE;
    let peeked = peek::<_, ETHERNET>(frame);
    let quickly = peeked.map_or(Quick::Ask, |packet| quick(tables, hook, &packet, &mut edit));
    let mut packet = Packet::at(ifindex);
    let parsed = parse::<_, ETHERNET>(frame, &mut packet);
    if let Some(peeked) = peeked.or_else(|| peek_v6::<_, ETHERNET>(frame)) {
        assert_eq!((parsed, Packet { ifindex, ..peeked }), (Some(()), packet), "both have read the same");
    }
    if quickly == Quick::Rewrite {
        let mut out = frame.clone();
        let done = rewrite(&mut out, &packet, end, &edit);
        return if done { Outcome::Rewritten(out) } else { Outcome::Dropped };
    }
    if parsed.is_none() {
        return Outcome::Passed;
    }
    if hook == Hook::INGRESS
        && let Some(inside) = unwrap(tables, frame, &mut packet)
    {
        let out = enter_unwrapped::<ETHERNET>(tables, &inside, &mut packet, &mut edit);
        return if out == Outcome::Passed { Outcome::Rewritten(inside) } else { out };
    }
    let verdict = if hook == Hook::INGRESS {
        ingress::ingress(tables, &mut packet, &mut edit)
    } else {
        egress::egress(tables, &mut packet, &mut edit)
    };
    if quickly == Quick::Pass && verdict != Verdict::Pass {
        // Unless the tables have changed in between.
        let again = quick(tables, hook, &packet, &mut Edit { ..Edit::NONE });
        assert_ne!(again, Quick::Pass, "goes on quickly although it is {verdict:?}: {packet:?}");
    }
    apply::<ETHERNET>(tables, frame, hook, &packet, &edit, verdict)
}

/// A packet that was wrapped, as it has come out.
fn enter_unwrapped<const ETHERNET: bool>(
    tables: &impl Subprograms,
    frame: &ByteFrame,
    packet: &mut Packet,
    edit: &mut Edit,
) -> Outcome {
    if packet.wrapped == 0 {
        return Outcome::Passed;
    }
    let verdict = ingress::ingress(tables, packet, edit);
    apply::<ETHERNET>(tables, frame, Hook::INGRESS, packet, edit, verdict)
}

/// Takes the header of a packet away that has one of ours inside; `packet` is that one then.
fn unwrap(tables: &impl Subprograms, frame: &ByteFrame, packet: &mut Packet) -> Option<ByteFrame> {
    let outer = *packet;
    if !direct::may_wrap(&outer) {
        return None;
    }
    let mut read = Packet::at(outer.ifindex);
    parse::<_, false>(&wrap::Inside(frame, outer.l4.into()), &mut read)?;
    if direct::inside(tables, &outer, wrap::hint_in(frame, &outer), &mut read) == Inside::Other {
        return None;
    }
    read.come_out_of(&outer);
    *packet = read;
    if read.wrapped != 0 {
        tables.count(Reason::Unwrapped);
    }
    let mut out = frame.clone();
    out.bytes.drain(usize::from(outer.l3)..usize::from(outer.l4));
    Some(out)
}

/// Puts a packet into one of its own.
fn wrap_up(tables: &impl Subprograms, frame: &ByteFrame, packet: &Packet, edit: &Edit) -> Outcome {
    let l3 = usize::from(packet.l3);
    let Some(len) = wrap::length_in(frame, packet, (frame.bytes.len() - l3) as u32) else {
        tables.count(Reason::WrapFailed);
        return Outcome::Dropped;
    };
    match direct::wrapping(tables, packet, edit, len) {
        Wrapping::By(tunnel) => {
            let mut words = [0; wrap::WORDS];
            let head = frame.load::<u32>(l3).unwrap_or(0);
            wrap::write(&mut words, packet.v4, head, len, (&tunnel.from, &tunnel.to), edit.port.0);
            let mut out = frame.clone();
            let header = words.iter().flat_map(|word| word.to_ne_bytes()).take(wrap::length(packet.v4));
            out.bytes.splice(l3..l3, header);
            tables.count(Reason::Wrapped);
            Outcome::Wrapped(out)
        }
        Wrapping::TooBig(room) => {
            let mut reply = Reply { words: [0; 24], len: 0 };
            tables.count(Reason::TooBig);
            let built = reject::build_too_big(frame, packet, room, &mut reply);
            if built { Outcome::Rejected(turned(frame, l3, &reply)) } else { Outcome::Dropped }
        }
        Wrapping::None => {
            tables.count(Reason::WrapFailed);
            Outcome::Dropped
        }
    }
}

/// A reply to a frame whose IP header begins at `l3`.
fn turned(frame: &ByteFrame, l3: usize, reply: &Reply) -> ByteFrame {
    let mut bytes = Vec::new();
    if l3 != 0 {
        bytes.extend(&frame.bytes[6..12]);
        bytes.extend(&frame.bytes[..6]);
        bytes.extend(&frame.bytes[12..14]);
    }
    bytes.extend(reply.words.iter().take(reply.len).flat_map(|w| w.to_ne_bytes()));
    ByteFrame { bytes, partial: false }
}

/// Does with a frame what was decided.
fn apply<const ETHERNET: bool>(
    tables: &impl Subprograms,
    frame: &ByteFrame,
    hook: Hook,
    packet: &Packet,
    edit: &Edit,
    verdict: Verdict,
) -> Outcome {
    let end = if hook == Hook::INGRESS { End::Dst } else { End::Src };
    match verdict {
        Verdict::Pass => Outcome::Passed,
        Verdict::Rewrite => {
            let mut out = frame.clone();
            let done = match packet.kind {
                Kind::IcmpError => rewrite_error(&mut out, packet, end, edit),
                _ => rewrite(&mut out, packet, end, edit),
            };
            if done {
                return Outcome::Rewritten(out);
            }
            tables.count(Reason::RewriteFailed);
            Outcome::Dropped
        }
        Verdict::Reject if hook == Hook::INGRESS => {
            let mut reply = Reply { words: [0; 24], len: 0 };
            if !reject::build(frame, packet, &mut reply) {
                return Outcome::Dropped;
            }
            Outcome::Rejected(turned(frame, if ETHERNET { 14 } else { 0 }, &reply))
        }
        Verdict::Wait if hook == Hook::INGRESS => Outcome::Waits,
        Verdict::Wrap if hook == Hook::INGRESS => wrap_up(tables, frame, packet, edit),
        Verdict::Reject | Verdict::Wait | Verdict::Wrap | Verdict::Drop => Outcome::Dropped,
    }
}

/// Runs an Ethernet frame that has come in by the interface `from` through the program at its driver, as the kernel does
/// where routes lead it out by `out`; the Ethernet header stays. `None` where it goes on to the stack.
pub fn run_through(tables: &impl Subprograms, frame: &ByteFrame, from: u32, out: u32) -> Option<ByteFrame> {
    let mut packet = peek::<_, true>(frame).or_else(|| peek_v6::<_, true>(frame))?;
    packet.ifindex = from;
    let (mut enters, mut leaves) = (Edit::NONE, Edit::NONE);
    let passage = through::enter(tables, &packet, &mut enters)?.number();
    let arrived = packet;
    packet.apply(End::Dst, &enters);
    packet.ifindex = out;
    let mut sent = frame.clone();
    if !through::leave(tables, &packet, Passage::from_number(passage), &mut leaves)
        || !lower_hops(&mut sent, &packet)
    {
        return None;
    }
    let done =
        rewrite(&mut sent, &arrived, End::Dst, &enters) && rewrite(&mut sent, &packet, End::Src, &leaves);
    assert!(done, "what has been read can be written: {packet:?}");
    tables.count(Reason::PassedThrough);
    Some(sent)
}

//! A packet through a hook, as the kernel programs do it.

use std::vec::Vec;

use super::ByteFrame;
use crate::abi::{Hook, Reason};
use crate::lb::quick::{Quick, quick};
use crate::lb::through::{self, Passage};
use crate::lb::{Subprograms, Verdict, egress, ingress};
use crate::wire::reject::{self, Reply};
use crate::wire::{Edit, End, Kind, Packet, lower_hops, parse, peek, peek_v6, rewrite, rewrite_error};

/// What became of a frame at a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Went on unchanged.
    Passed,
    /// Went on changed.
    Rewritten(ByteFrame),
    /// Was discarded, and this was sent back.
    Rejected(ByteFrame),
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
    match verdict {
        Verdict::Pass => Outcome::Passed,
        Verdict::Rewrite => {
            let mut out = frame.clone();
            let done = match packet.kind {
                Kind::IcmpError => rewrite_error(&mut out, &packet, end, &edit),
                _ => rewrite(&mut out, &packet, end, &edit),
            };
            if done {
                return Outcome::Rewritten(out);
            }
            tables.count(Reason::RewriteFailed);
            Outcome::Dropped
        }
        Verdict::Reject if hook == Hook::INGRESS => {
            let mut reply = Reply { words: [0; 24], len: 0 };
            if !reject::build(frame, &packet, &mut reply) {
                return Outcome::Dropped;
            }
            let mut bytes = Vec::new();
            if ETHERNET {
                bytes.extend(&frame.bytes[6..12]);
                bytes.extend(&frame.bytes[..6]);
                bytes.extend(&frame.bytes[12..14]);
            }
            bytes.extend(reply.words.iter().take(reply.len).flat_map(|w| w.to_ne_bytes()));
            Outcome::Rejected(ByteFrame { bytes, partial: false })
        }
        Verdict::Wait if hook == Hook::INGRESS => Outcome::Waits,
        Verdict::Reject | Verdict::Wait | Verdict::Drop => Outcome::Dropped,
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

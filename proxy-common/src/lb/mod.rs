//! Decisions: what becomes of a packet or a socket call. Pure functions over [`Tables`].
//!
//! The story of a packet: [`ingress`] finds its flow or [`open`]s one and names the new destination;
//! [`egress`] finds the same flow by its tuple behind the stack and names the new source. [`socket`] is the
//! same story without packets. What is chosen and why is in [`select`]; how flows begin, are answered and
//! end is in [`track`].

pub mod egress;
pub mod ingress;
pub mod masquerade;
pub mod open;
pub mod select;
pub mod socket;
pub mod track;

#[cfg(test)]
mod tests;

pub use select::Choice;

use crate::abi::{
    Affinity, AffinityKey, Backend, Config, Flow, FlowKey, Fragment, FragmentKey, Frontend, FrontendKey,
    Iface, Reason, SourceKey,
};
use crate::addr::{Addr, Port};
use crate::wire::{Edit, Kind, Packet};

/// The two flow tables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FlowTable {
    /// Answered flows: never evicted.
    Established,
    /// Flows not yet answered: an LRU, so that a flood of them evicts only its own kind.
    HalfOpen,
}

/// What came of inserting a flow.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Inserted {
    /// It is there now.
    Done = 0,
    /// It was there already, and only absent keys were asked for.
    Exists,
    /// The table is full or the kernel out of memory.
    Full,
}

impl Inserted {
    /// The result with this number; any other number means full.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Done,
            1 => Self::Exists,
            _ => Self::Full,
        }
    }
}

/// Which counter of a Service port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stat {
    /// A backend was chosen.
    Chosen,
    /// Refused.
    Refused,
    /// Dropped.
    Dropped,
}

/// All that a decision may ask and remember. Implemented over BPF maps and over hash maps.
pub trait Tables {
    /// The node's settings; `None` before the agent has written them.
    fn config(&self) -> Option<&Config>;
    /// Now, in nanoseconds of `CLOCK_MONOTONIC_COARSE`.
    fn now(&self) -> u64;
    /// A random word.
    fn random(&self) -> u32;
    /// What is known of an address: bits of [`crate::abi::address`], 0 for nothing.
    fn address(&self, addr: &Addr) -> u32;
    /// A frontend as it stands; its seal has not been checked.
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend>;
    /// The backend index in a slot.
    fn slot(&self, slot: u32) -> Option<u32>;
    /// A backend.
    fn backend(&self, index: u32) -> Option<Backend>;
    /// Whether a source range covers the exact key.
    fn source_allowed(&self, key: &SourceKey) -> bool;
    /// Where a client went last.
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    /// Remembers where a client went.
    fn set_affinity(&self, key: &AffinityKey, value: &Affinity);
    /// The interface with an index.
    fn iface(&self, ifindex: u32) -> Option<Iface>;
    /// Lets `f` read and change a flow in place; `None` when there is none.
    fn with_flow<R>(&self, table: FlowTable, key: &FlowKey, f: impl FnOnce(&mut Flow) -> R) -> Option<R>;
    /// Inserts a flow; with `replace` false only if the key is absent.
    fn insert_flow(&self, table: FlowTable, key: &FlowKey, flow: &Flow, replace: bool) -> Inserted;
    /// Deletes a flow if it is there.
    fn delete_flow(&self, table: FlowTable, key: &FlowKey);
    /// Lets `f` read and change in place what is known of a fragmented datagram.
    fn with_fragment<R>(&self, key: &FragmentKey, f: impl FnOnce(&mut Fragment) -> R) -> Option<R>;
    /// Remembers something of a fragmented datagram; with `replace` false only if nothing is known yet.
    fn set_fragment(&self, key: &FragmentKey, value: &Fragment, replace: bool);
    /// Counts a reason.
    fn count(&self, reason: Reason);
    /// Counts for a Service port.
    fn count_service(&self, service: u32, stat: Stat);

    // Cut points. Each is one function of this crate; the kernel overrides it by a call to the same function
    // as a separately verified one, so that the verifier's work adds up instead of multiplying, and stack
    // frames stay small.

    /// [`ingress::slow`].
    fn ingress_slow(&self, packet: &Packet, known: u32, edit: &mut Edit) -> Verdict
    where
        Self: Sized,
    {
        ingress::slow(self, packet, known, edit)
    }
    /// [`ingress::past`].
    fn past(&self, packet: &mut Packet, known: u32) -> Verdict
    where
        Self: Sized,
    {
        ingress::past(self, packet, known)
    }
    /// [`open::choose`].
    fn choose(&self, packet: &Packet, known: u32, attempt: u32, choice: &mut Choice) -> Verdict
    where
        Self: Sized,
    {
        open::choose(self, packet, known, attempt, choice)
    }
    /// [`open::write_flow`].
    fn write_flow(&self, key: &FlowKey, choice: &Choice, client_port: Port, edit: &mut Edit) -> Inserted
    where
        Self: Sized,
    {
        open::write_flow(self, key, choice, client_port, edit)
    }
    /// [`open::revive`].
    fn revive(&self, key: &FlowKey) -> u32
    where
        Self: Sized,
    {
        open::revive(self, key)
    }
    /// [`track::promote`].
    fn promote(&self, key: &FlowKey) -> u32
    where
        Self: Sized,
    {
        track::promote(self, key)
    }
    /// [`track::forget`].
    fn forget(&self, key: &FlowKey) -> u32
    where
        Self: Sized,
    {
        track::forget(self, key)
    }
    /// [`track::superseded`].
    fn superseded(&self, key: &mut FlowKey) -> u32
    where
        Self: Sized,
    {
        track::superseded(self, key)
    }
    /// [`recall_fragment`].
    fn recall_fragment(&self, packet: &mut Packet) -> Recalled
    where
        Self: Sized,
    {
        recall_fragment(self, packet)
    }
    /// [`remember_fragment`].
    fn remember_fragment(&self, packet: &Packet) -> u32
    where
        Self: Sized,
    {
        remember_fragment(self, packet)
    }
    /// [`masquerade::choose_source`].
    fn choose_source(&self, key: &FlowKey, ifindex: u32, edit: &mut Edit) -> Verdict
    where
        Self: Sized,
    {
        masquerade::choose_source(self, key, ifindex, edit)
    }
}

/// What to do with a packet.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Verdict {
    /// Not ours: it goes on unchanged.
    Pass = 0,
    /// Apply the edit and let it go on.
    Rewrite,
    /// Answer it with a refusal.
    Refuse,
    /// Discard it.
    Drop,
    /// Put it at the end of the queue, to come again.
    Wait,
}

impl Verdict {
    /// The verdict with this number; any other number drops. No cut point lets a packet wait.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Pass,
            1 => Self::Rewrite,
            2 => Self::Refuse,
            _ => Self::Drop,
        }
    }
}

/// How often fragments of one datagram wait for its first one. Each time lets what the processor has queued go
/// first, a batch of up to 64 packets: enough for what was sent in one go and came in another order, and a
/// bound on what a flood of such fragments costs.
const WAITS: u32 = 4;
/// How long what is known of a datagram counts, in nanoseconds: its identification comes round again, and after
/// this time it is more likely another one's.
const FRAGMENTS_LIVE: u64 = 5_000_000_000;

/// What is known of a later fragment.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Recalled {
    /// Nothing, and it has waited enough.
    Unknown = 0,
    /// The first fragment came before it: the packet has its ports now.
    Known,
    /// Nothing yet.
    Waiting,
}

impl Recalled {
    /// The result with this number; any other number knows nothing.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Known,
            2 => Self::Waiting,
            _ => Self::Unknown,
        }
    }
}

/// Gives a later fragment the ports that the first one had at this hook.
#[inline(always)]
pub fn recall_fragment<T: Tables>(tables: &T, packet: &mut Packet) -> Recalled {
    let key = fragment_key(packet);
    let now = tables.now();
    let waits = tables.with_fragment(&key, |fragment| {
        if now.saturating_sub(fragment.since) > FRAGMENTS_LIVE {
            *fragment = Fragment { sport: Port(0), dport: Port(0), waits: 1, since: now };
        } else if fragment.waits == 0 {
            packet.key.sport = fragment.sport;
            packet.key.dport = fragment.dport;
        } else {
            fragment.waits += 1;
        }
        fragment.waits
    });
    match waits {
        Some(0) => Recalled::Known,
        Some(1..=WAITS) => Recalled::Waiting,
        Some(_) => Recalled::Unknown,
        None => {
            let first_wait = Fragment { sport: Port(0), dport: Port(0), waits: 1, since: now };
            tables.set_fragment(&key, &first_wait, false);
            Recalled::Waiting
        }
    }
}

/// Remembers the ports of a first fragment.
#[inline(always)]
pub fn remember_fragment<T: Tables>(tables: &T, packet: &Packet) -> u32 {
    let ports = Fragment { sport: packet.key.sport, dport: packet.key.dport, waits: 0, since: tables.now() };
    tables.set_fragment(&fragment_key(packet), &ports, true);
    1
}

#[inline(always)]
fn fragment_key(packet: &Packet) -> FragmentKey {
    FragmentKey {
        src: packet.key.src,
        dst: packet.key.dst,
        id: packet.fragment_id,
        proto: packet.key.proto,
        pad: [0; 3],
    }
}

/// What a look at a flow found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Touch {
    /// The flow goes on: the edit is filled in.
    Alive,
    /// The same, and the packet comes from the endpoint and goes to the client.
    Answer,
    /// A first packet of a masqueraded flow at egress: its source is still to be chosen.
    Unmasqueraded,
    /// The flow is over or its backend has gone: choose anew.
    Stale,
}

/// Looks a packet's flow up, refreshes it and fills in the edit it asks for.
#[inline(always)]
fn touch<T: Tables>(tables: &T, table: FlowTable, packet: &Packet, edit: &mut Edit) -> Option<Touch> {
    tables.with_flow(table, &packet.key, |flow| {
        if matches!(packet.kind, Kind::IcmpError) {
            if flow.leg == crate::abi::Leg::SNAT && flow.addr.is_unspecified() {
                return Touch::Stale;
            }
            edit.addr = flow.addr;
            edit.port = flow.port;
            edit.other_port = flow.other_port;
            return Touch::Alive;
        }
        track::refresh(tables, table, packet, flow, edit)
    })
}

//! Decisions: what becomes of a packet or a socket call. Pure functions over [`Tables`].
//!
//! The story of a packet: [`ingress`] finds its flow or [`open`]s one and names the new destination;
//! [`egress`] finds the same flow by its tuple behind the stack and names the new source. [`socket`] is the
//! same story without packets. What is chosen and why is in [`select`]; how flows begin, are answered and
//! end is in [`track`].

pub mod egress;
pub mod ingress;
mod masquerade;
mod open;
mod select;
pub mod socket;
mod track;

use crate::abi::{
    Affinity, AffinityKey, Backend, Config, Flow, FlowKey, Fragment, FragmentKey, Frontend, FrontendKey,
    Iface, Reason, SourceKey,
};
use crate::addr::Addr;
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
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Inserted {
    /// It is there now.
    Done,
    /// It was there already, and only absent keys were asked for.
    Exists,
    /// The table is full or the kernel out of memory.
    Full,
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
    fn config(&self) -> Option<Config>;
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
    /// The ports of a fragmented datagram.
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment>;
    /// Remembers the ports of a fragmented datagram.
    fn set_fragment(&self, key: &FragmentKey, value: &Fragment);
    /// Counts a reason.
    fn count(&self, reason: Reason);
    /// Counts for a Service port.
    fn count_service(&self, service: u32, stat: Stat);
}

/// What to do with a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Verdict {
    /// Not ours: it goes on unchanged.
    Pass,
    /// Apply the edit and let it go on.
    Rewrite,
    /// Answer it with a refusal.
    Refuse,
    /// Discard it.
    Drop,
}

/// Gives a later fragment the ports that the first one had at this hook. `None` when they are not known.
#[inline(always)]
fn recall_fragment<T: Tables>(tables: &T, packet: &mut Packet) -> Option<()> {
    let ports = tables.fragment(&fragment_key(packet))?;
    packet.key.sport = ports.sport;
    packet.key.dport = ports.dport;
    Some(())
}

/// Remembers the ports of a first fragment that is being translated.
#[inline(always)]
fn remember_fragment<T: Tables>(tables: &T, packet: &Packet) {
    if matches!(packet.kind, Kind::FirstFragment) {
        let ports = Fragment { sport: packet.key.sport, dport: packet.key.dport };
        tables.set_fragment(&fragment_key(packet), &ports);
    }
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

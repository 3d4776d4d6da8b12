//! What a decision may read and write: the tables, the clock, chance, and the node's sockets.

use crate::abi::{
    Affinity, AffinityKey, Backend, Config, Flow, FlowId, Fragment, FragmentKey, Frontend, FrontendKey,
    Iface, Key, Leg, Notes, Pair, Reason, Role, SourceKey, Tunnel, TunnelKey, Tuple, window,
};
use crate::addr::{Addr, Port, Proto};
use crate::wire::Packet;

/// All that a decision may read and write. Implemented over BPF maps and over hash maps.
pub trait Tables {
    /// Where a leg stands.
    type Place: Copy;
    /// The node's settings; `None` before the agent has written them.
    fn config(&self) -> Option<&Config>;
    /// Now, in nanoseconds of `CLOCK_MONOTONIC_COARSE`.
    fn now(&self) -> u64;
    /// Which window of the clock this is: for the rest of it a leg speaks for its record (see [`Notes::asked`]).
    fn window(&self) -> u32 {
        window(self.now())
    }
    /// Until when nothing new begins, on the same clock: the agent is about to exchange programs and tables.
    /// It ends by itself, whatever becomes of the agent.
    fn paused_until(&self) -> u64;
    /// A random word.
    fn random(&self) -> u32;
    /// Whether anything may be known of an address; false is certain.
    fn is_known(&self, addr: &Addr) -> bool {
        self.address(addr) != 0
    }
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
    /// Source of masqueraded flows that leave by an interface towards `dst`, of the family of `dst` (M-13);
    /// it may be unspecified, which is as good as none.
    fn masquerade_address(&self, ifindex: u32, dst: &Addr) -> Option<Addr>;
    /// Whether packets are wrapped and unwrapped at all.
    fn wraps(&self) -> bool {
        true
    }
    /// The way to another node.
    fn tunnel(&self, key: &TunnelKey) -> Option<Tunnel>;
    /// Whether a frontend that is no ClusterIP has this port.
    fn is_service_port(&self, port: Port) -> bool;
    /// Whether a socket of this node holds the tuple that the node would send; one that listens at its source
    /// counts.
    fn is_socket(&self, tuple: &Tuple) -> bool;
    /// Whether the packet in hand, whose source is that of `tuple`, is not a socket's of this node: it has
    /// come in by an interface, or its source has been rewritten.
    fn is_of_others(&self, tuple: &Tuple) -> bool;
    /// Whether an address is that of an endpoint; true for a few others, too.
    fn is_endpoint(&self, addr: &Addr) -> bool;
    /// Whether the kernel's connection tracking had this tuple when the agent last looked, of a connection to
    /// an endpoint.
    fn is_taken(&self, tuple: &Tuple) -> bool;
    /// [`Allowance::take`](super::masquerade::Allowance::take) of this CPU's.
    fn may_search_on(&self) -> bool;
    /// The leg of a pair.
    fn leg(&self, pair: &Pair) -> Option<Leg>;
    /// The key of a packet's ends, and the place of its source in their pair.
    fn key_of(&self, packet: &Packet) -> (Key, usize);
    /// Whether there may be a leg at a key; false is certain.
    fn may_have_leg(&self, key: &Key) -> bool;
    /// The leg at a key.
    fn leg_at(&self, key: &Key) -> Option<(Leg, Self::Place)>;
    /// Writes the notes of a leg of IPv4, if it is still this flow's.
    fn note(&self, place: Self::Place, id: FlowId, notes: Notes);
    /// Whether the entry of a pair is no whole leg.
    fn is_broken(&self, pair: &Pair) -> bool;
    /// Inserts a leg of a flow where there is none.
    fn insert_leg(&self, flow: &Flow, role: Role) -> Inserted;
    /// Deletes a leg if it is there.
    fn delete_leg(&self, pair: &Pair);
    /// Lets `f` read and change a record in place, whatever flow is in it; `None` past the end. It may ask
    /// for legs meanwhile, and for nothing else.
    fn record<R>(&self, index: u32, f: impl FnOnce(&mut Flow) -> R) -> Option<R>;
    /// Tries to become the only one who may end the flow in a record, or change its legs.
    fn claim(&self, index: u32) -> bool;
    /// Ends a claim.
    fn unclaim(&self, index: u32);
    /// Takes a record that is free.
    fn take_record(&self) -> Option<u32>;
    /// Gives a record back. False when it could not be entered among the free ones.
    fn give_record(&self, index: u32) -> bool;
    /// Puts a flow, or none, into the next place of this CPU's ring; the one that stood there.
    fn put_in_ring(&self, ring: Ring, id: FlowId) -> FlowId;
    /// Who stands in the next place of this CPU's ring.
    fn next_in_ring(&self, ring: Ring) -> FlowId;
    /// The flow at some place of some ring.
    fn any_in_rings(&self) -> FlowId;
    /// Lets `f` read and change in place what is known of a fragmented datagram.
    fn with_fragment<R>(&self, key: &FragmentKey, f: impl FnOnce(&mut Fragment) -> R) -> Option<R>;
    /// Remembers something of a fragmented datagram; with `replace` false only if nothing is known yet.
    fn set_fragment(&self, key: &FragmentKey, value: &Fragment, replace: bool);
    /// Counts a reason.
    fn count(&self, reason: Reason);
    /// Counts for a Service port.
    fn count_service(&self, service: u32, stat: Stat);
}

/// Which ring of young flows: a flood of one kind displaces only its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ring(pub u32);

impl Ring {
    /// How many there are; a power of two.
    pub const COUNT: u32 = 4;
    /// TCP connections to Services.
    pub const TCP: Self = Self(0);
    /// Other flows to Services.
    pub const OTHER: Self = Self(1);
    /// Conversations of the node's own.
    pub const OWN: Self = Self(2);
    /// Flows whose packets are wrapped, for as long as they live.
    pub const DIRECT: Self = Self(3);

    /// That of a flow to a Service.
    #[inline(always)]
    #[must_use]
    pub const fn of(proto: Proto) -> Self {
        if matches!(proto, Proto::TCP) { Self::TCP } else { Self::OTHER }
    }
}

/// What came of inserting a leg or beginning a flow.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Inserted {
    /// It is there now.
    Done = 0,
    /// It was there already, and only absent keys were asked for.
    Exists,
    /// The table is full or the kernel out of memory.
    Full,
    /// Another CPU has begun the same flow at this moment.
    Raced,
}

impl Inserted {
    /// The result with this number; any other number means full.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Done,
            1 => Self::Exists,
            3 => Self::Raced,
            _ => Self::Full,
        }
    }
}

/// Which counter of a Service port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stat {
    /// A flow or socket got a backend.
    Chosen,
    /// No endpoint: the sender got a reject reply.
    Rejected,
    /// Dropped.
    Dropped,
}

//! Decisions: what becomes of a packet or a socket call. Pure functions over [`Tables`].
//!
//! The story of a packet: [`ingress`] finds its flow or [`open`]s one and names the new destination;
//! [`egress`] finds the same flow by its tuple behind the stack and names the new source. [`socket`] is the
//! same story without packets. What is chosen and why is in [`select`]; how flows begin, live and end is in [`flow`], and
//! how those of another proxy become ours in [`adopt`].

pub mod adopt;
pub mod egress;
pub mod flow;
pub mod ingress;
pub mod lost;
pub mod masquerade;
pub mod open;
pub mod select;
pub mod socket;

#[cfg(test)]
mod flow_tests;
#[cfg(test)]
mod lost_tests;
#[cfg(test)]
mod race_tests;
#[cfg(test)]
mod tests;

pub use select::Choice;

use crate::abi::{
    Affinity, AffinityKey, Backend, Config, Flow, FlowId, Fragment, FragmentKey, Frontend, FrontendKey,
    Iface, Leg, Notes, Pair, Reason, Role, SourceKey, Timeouts, Tuple,
};
use crate::addr::{Addr, Port, Proto};
use crate::wire::{Edit, Packet};

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

    /// That of a flow to a Service.
    #[inline(always)]
    #[must_use]
    pub const fn of(proto: Proto) -> Self {
        if matches!(proto, Proto::TCP) { Self::TCP } else { Self::OTHER }
    }
}

/// What came of entering a leg.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entered {
    /// It is there now.
    Done = 0,
    /// It was there already.
    Kept,
    /// The pair belongs to another flow, which is over.
    Over,
    /// The pair belongs to another flow.
    Taken,
    /// No room.
    Full,
}

impl Entered {
    /// The result with this number; any other number means full.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Done,
            1 => Self::Kept,
            2 => Self::Over,
            3 => Self::Taken,
            _ => Self::Full,
        }
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
    /// A backend was chosen.
    Chosen,
    /// Refused.
    Refused,
    /// Dropped.
    Dropped,
}

/// All that a decision may ask and remember. Implemented over BPF maps and over hash maps.
pub trait Tables {
    /// Where a leg stands.
    type Place: Copy;
    /// The node's settings; `None` before the agent has written them.
    fn config(&self) -> Option<&Config>;
    /// Now, in nanoseconds of `CLOCK_MONOTONIC_COARSE`.
    fn now(&self) -> u64;
    /// Until when nothing new begins, on the same clock: the agent is about to exchange programs and tables. It ends by
    /// itself, whatever becomes of the agent.
    fn paused_until(&self) -> u64;
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
    /// Source of masqueraded flows that leave by an interface towards `dst`, of the family of `dst` (M-13); it may be
    /// unspecified, which is as good as none.
    fn masquerade_address(&self, ifindex: u32, dst: &Addr) -> Option<Addr>;
    /// Whether a frontend that is no ClusterIP has this port.
    fn is_service_port(&self, port: Port) -> bool;
    /// Whether a socket of this node holds the tuple that the node would send; one that listens at its source counts.
    fn is_socket(&self, tuple: &Tuple) -> bool;
    /// Whether the source of the packet in hand, which is that of `tuple`, is none of a socket of this node that sends it:
    /// it has come in by an interface, or somebody has rewritten it.
    fn is_of_others(&self, tuple: &Tuple) -> bool;
    /// Whether an address is that of an endpoint; true for a few others, too.
    fn is_endpoint(&self, addr: &Addr) -> bool;
    /// Whether the kernel's connection tracking had this tuple when the agent last looked, of a connection to an endpoint.
    fn is_taken(&self, tuple: &Tuple) -> bool;
    /// [`masquerade::Allowance::take`] of this CPU's.
    fn may_search_on(&self) -> bool;
    /// The leg of a pair.
    fn leg(&self, pair: &Pair) -> Option<Leg>;
    /// At which place of the pair of a packet's ends its source is, and the leg of that pair.
    fn leg_of(&self, packet: &Packet) -> (usize, Option<(Leg, Self::Place)>);
    /// Writes the notes of a leg of IPv4, if it is still this flow's.
    fn note(&self, place: Self::Place, id: FlowId, notes: Notes);
    /// Whether there is something at a pair that is no whole leg.
    fn is_broken(&self, pair: &Pair) -> bool;
    /// Inserts a leg of a flow where there is none.
    fn insert_leg(&self, flow: &Flow, role: Role) -> Inserted;
    /// Deletes a leg if it is there.
    fn delete_leg(&self, pair: &Pair);
    /// Lets `f` read and change a record in place, whatever flow is in it; `None` past the end. It may ask for legs
    /// meanwhile, and for nothing else.
    fn record<R>(&self, index: u32, f: impl FnOnce(&mut Flow) -> R) -> Option<R>;
    /// Tries to become the only one who may end the flow in a record, or change its legs.
    fn claim(&self, index: u32) -> bool;
    /// Ends a claim.
    fn unclaim(&self, index: u32);
    /// Takes a record that is free.
    fn take_record(&self) -> Option<u32>;
    /// Gives a record back. False when it could not be entered among the free ones.
    fn give_record(&self, index: u32) -> bool;
    /// Puts a flow into the next place of this CPU's ring, or nobody; who stood there.
    fn stand(&self, ring: Ring, id: FlowId) -> FlowId;
    /// Who stands at some place of some ring.
    fn anybody(&self) -> FlowId;
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

    /// Whether an address lies in a range of ClusterIPs.
    fn is_service_range(&self, addr: &Addr) -> bool {
        self.config().is_some_and(|config| config.is_service_range(addr))
    }
    /// [`Config::snat_port`] of the node's settings.
    fn snat_port(&self, n: u32) -> Port {
        self.config().map_or(Port(0), |config| config.snat_port(n))
    }
    /// [`Config::is_snat_port`] of the node's settings.
    fn is_snat_port(&self, port: Port) -> bool {
        self.config().is_some_and(|config| config.is_snat_port(port))
    }
    /// [`ingress::slow`].
    fn ingress_slow(&self, packet: &Packet, known: u32, edit: &mut Edit) -> Verdict
    where
        Self: Sized,
    {
        ingress::slow(self, packet, known, edit, &mut Choice { ..Choice::NONE })
    }
    /// [`open::choose`].
    fn choose(&self, packet: &Packet, known: u32, attempt: u32, choice: &mut Choice) -> Verdict
    where
        Self: Sized,
    {
        open::choose(self, packet, known, attempt, choice)
    }
    /// [`flow::make`].
    fn make(&self, packet: &Packet, choice: &Choice, middle_port: Port) -> FlowId
    where
        Self: Sized,
    {
        flow::make(self, packet, choice, middle_port)
    }
    /// [`flow::join`].
    fn join(&self, packet: &Packet, id: FlowId) -> Inserted
    where
        Self: Sized,
    {
        flow::join(self, packet, id)
    }
    /// [`flow::progress`].
    fn progress(&self, packet: &Packet, id: FlowId, forward: bool) -> u32
    where
        Self: Sized,
    {
        flow::progress(self, packet, id, forward)
    }
    /// [`flow::look_after`].
    fn look_after(&self, id: FlowId) -> u32
    where
        Self: Sized,
    {
        flow::look_after(self, id)
    }
    /// [`flow::enter`].
    fn enter(&self, id: FlowId, role: Role, holder: &mut FlowId) -> Entered
    where
        Self: Sized,
    {
        flow::enter(self, id, role, holder)
    }
    /// [`flow::dissolve`].
    fn dissolve(&self, id: FlowId) -> u32
    where
        Self: Sized,
    {
        flow::dissolve(self, id)
    }
    /// [`flow::take_apart`].
    fn take_apart(&self, id: FlowId) -> u32
    where
        Self: Sized,
    {
        flow::take_apart(self, id)
    }
    /// [`flow::make_own`].
    fn make_own(&self, packet: &Packet, guest: bool) -> FlowId
    where
        Self: Sized,
    {
        flow::make_own(self, packet, guest)
    }
    /// [`flow::join_own`].
    fn join_own(&self, id: FlowId) -> u32
    where
        Self: Sized,
    {
        flow::join_own(self, id)
    }
    /// [`flow::sweep`].
    fn sweep(&self, index: u32, timeouts: &Timeouts) -> u32
    where
        Self: Sized,
    {
        flow::sweep(self, index, timeouts)
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
    /// [`masquerade::find_source`].
    fn find_source(&self, packet: &mut Packet) -> u32
    where
        Self: Sized,
    {
        masquerade::find_source(self, packet)
    }
    /// [`masquerade::find_port`].
    fn find_port(&self, packet: &mut Packet, at: u32) -> u32
    where
        Self: Sized,
    {
        masquerade::find_port(self, packet, at)
    }
    /// [`masquerade::price`].
    fn price(&self, packet: &Packet) -> u64
    where
        Self: Sized,
    {
        masquerade::price(self, packet)
    }
    /// [`masquerade::enter_source`].
    fn enter_source(&self, packet: &Packet, id: FlowId) -> Entered
    where
        Self: Sized,
    {
        masquerade::enter_source(self, packet, id)
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
    /// The verdict with this number; any other number drops.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Pass,
            1 => Self::Rewrite,
            2 => Self::Refuse,
            4 => Self::Wait,
            _ => Self::Drop,
        }
    }
}

/// How far ahead an agent may set the end of a pause, in nanoseconds: it may die in it, and a busy node may take a second where an
/// idle one takes milliseconds. Never less than what older agents set.
pub const LONGEST_PAUSE: u64 = 5_000_000_000;

/// Whether nothing may begin yet if a pause ends at `until`. One that is longer than any agent's has been set by somebody else, and
/// would stop all that is new for ever; the clock of packets may be some ticks behind the agent's.
#[inline(always)]
#[must_use]
pub const fn is_paused(now: u64, until: u64) -> bool {
    now < until && until - now < 2 * LONGEST_PAUSE
}

/// How often fragments of one datagram wait for its first one. Each time lets what the processor has queued go
/// first, a batch of up to 64 packets: enough for what was sent in one go and came in another order, and a
/// bound on what a flood of such fragments costs.
const WAITS: u32 = 4;
/// How long what is known of a datagram counts, in nanoseconds: its identification comes round again, and after
/// this time it is more likely another one's.
pub const FRAGMENTS_LIVE: u64 = 5_000_000_000;

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
            packet.tuple.sport = fragment.sport;
            packet.tuple.dport = fragment.dport;
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
    let ports =
        Fragment { sport: packet.tuple.sport, dport: packet.tuple.dport, waits: 0, since: tables.now() };
    tables.set_fragment(&fragment_key(packet), &ports, true);
    1
}

#[inline(always)]
fn fragment_key(packet: &Packet) -> FragmentKey {
    FragmentKey {
        src: packet.tuple.src,
        dst: packet.tuple.dst,
        id: packet.fragment_id,
        proto: packet.tuple.proto,
        pad: [0; 3],
    }
}

/// What a look at a packet's flow found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Touch {
    /// No living flow.
    None,
    /// The packet goes on as it is.
    Pass,
    /// The edit is filled in.
    Rewrite,
    /// A packet of a masqueraded flow at egress: its source is still to be chosen.
    Masquerade,
    /// The flow's backend has gone: choose anew.
    Stale,
    /// The flow is over.
    Over,
    /// The flow is over, and the packet is none of its.
    Superseded,
    /// The flow's endpoint has gone: whoever sends is told.
    Lost,
}

/// A packet's flow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Touched {
    /// What is to be done.
    pub(crate) touch: Touch,
    /// The flow, if there is one.
    pub(crate) id: FlowId,
    /// Whether the packet goes towards the endpoint.
    pub(crate) forward: bool,
    /// Whether [`Tables::progress`] is wanted.
    pub(crate) care: bool,
}

impl Touched {
    /// No flow.
    pub(crate) const NONE: Self = Self { touch: Touch::None, id: FlowId::NONE, forward: false, care: false };
}

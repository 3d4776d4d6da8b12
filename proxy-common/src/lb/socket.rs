//! Socket calls instead of packets: the destination is translated once, at `connect`, or at each `sendmsg`
//! of an unconnected UDP socket; the socket remembers what the process asked for.
//!
//! A socket is dealt with in one way in every hook. What the kernel has connected it to is the decision that was
//! taken at `connect`: who sends to that address again, by name or because the kernel names it (an IPv6 socket
//! connected over IPv4), is left alone. What an unconnected socket cannot remember goes by packet, and so does
//! everything new of that socket from then on, so that no Service changes its endpoint by changing its way.

use super::select::{self, Asker, Refusal, Selected, Source};
use super::{Stat, Tables};
use crate::abi::socket::{BY_PACKET, EXCLUDED, MORE};
use crate::abi::{
    Config, PeerKey, Reason, SOCKET_ENTRIES, SocketEntry, SocketState, address, config, frontend,
};
use crate::addr::{Addr, Port, Proto};

/// A socket call.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The address the process names.
    pub dst: Addr,
    /// The port it names.
    pub dport: Port,
    /// Transport protocol.
    pub proto: Proto,
    /// Cookie of the socket's network namespace; 0 when the kernel does not tell it.
    pub netns: u64,
    /// Whether it is a `connect`.
    pub connect: bool,
    /// With a `sendmsg`: the address that the kernel hears alone, because the socket is connected to it, or over IPv6
    /// has once been; else unspecified.
    pub peer: Addr,
    /// The port of that; zero for a socket that is not connected.
    pub peer_port: Port,
}

impl Call {
    #[inline(always)]
    fn names_peer(&self) -> bool {
        self.peer.same(&self.dst) && (self.peer_port == self.dport || self.peer_port.0 == 0) && !self.connect
    }
}

/// What becomes of a socket call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Answer {
    /// Not ours, or better done per packet.
    Leave,
    /// Write the destination that was chosen.
    Use,
    /// Fail with "connection refused".
    Refuse,
    /// Fail with "operation not permitted".
    Deny,
}

/// Where one socket remembers what its storage has no room for, and where that comes from.
pub trait Memory<'a> {
    /// Storage for a socket that has none; `None` when there is no memory for it.
    fn new_state(&self) -> Option<&'a mut SocketState>;
    /// The socket's cookie.
    fn cookie(&self) -> u64;
    /// Shows what was put aside under a key; `None` when there is nothing.
    fn peer<R>(&self, key: &PeerKey, see: impl FnOnce(&SocketEntry) -> R) -> Option<R>;
    /// Puts something aside; false when there is no room.
    fn set_peer(&self, key: &PeerKey, entry: &SocketEntry) -> bool;
    /// Forgets what was put aside.
    fn forget_peer(&self, key: &PeerKey);
}

/// Decides a call of a socket with this storage, writes what was chosen to `entry`, and remembers it.
#[inline(always)]
pub fn translate<'a, T: Tables, M: Memory<'a>>(
    tables: &T,
    memory: &M,
    mut state: Option<&'a mut SocketState>,
    call: &Call,
    entry: &mut SocketEntry,
) -> Answer {
    if call.names_peer() {
        return Answer::Leave;
    }
    let mut by_packet = false;
    if let Some(state) = &mut state {
        if state.flags & EXCLUDED != 0 {
            return Answer::Leave;
        }
        if !call.connect {
            if state.translation(tables, memory, call, entry) {
                return Answer::Use;
            }
            by_packet = state.flags & BY_PACKET != 0;
        }
    }
    let answer = if by_packet { Answer::Leave } else { decide(tables, call, entry) };
    match answer {
        // An IPv6 call cannot be given an IPv4 endpoint, nor the other way round.
        Answer::Use if entry.addr.is_v4() != call.dst.is_v4() => Answer::Leave,
        Answer::Use => {
            let host = tables.config().is_some_and(|config| is_host(config, call));
            let state = match state {
                Some(state) => Some(state),
                None => memory.new_state(),
            };
            if state.is_some_and(|state| state.remember(tables, memory, call, entry, !host)) {
                return answer;
            }
            tables.count(Reason::SocketStorage);
            // What the node sends passes no program that could do it later.
            if host { answer } else { Answer::Leave }
        }
        Answer::Leave => {
            if let Some(state) = state {
                state.turn_to(memory, &call.dst, call.dport, call.proto);
            }
            answer
        }
        Answer::Refuse | Answer::Deny => answer,
    }
}

/// What the process named, given the peer that the kernel sees.
#[inline(always)]
pub fn original<'a, M: Memory<'a>>(
    memory: &M,
    state: &SocketState,
    addr: &Addr,
    port: Port,
    proto: Proto,
) -> Option<(Addr, Port)> {
    if let Some(entry) = state.end(addr, port, proto) {
        return Some((entry.vip, entry.vport));
    }
    if state.flags & MORE == 0 {
        return None;
    }
    memory.peer(&PeerKey::endpoint(memory.cookie(), *addr, port, proto), |entry| (entry.vip, entry.vport))
}

/// Decides a call whose socket remembers nothing that fits.
#[inline(always)]
fn decide<T: Tables>(tables: &T, call: &Call, entry: &mut SocketEntry) -> Answer {
    let loopback = call.dst.is_loopback();
    let known = match call.dst.is_never_service() {
        true if loopback => address::NODE_PORT,
        true => 0,
        false => tables.address(&call.dst),
    };
    let Some(config) = tables.config() else {
        return Answer::Leave;
    };
    if known == 0 && !config.is_service_range(&call.dst) || config.flags & config::LEAVE_NEW != 0 {
        return Answer::Leave;
    }
    // A pod's loopback is its own: there the socket must be known to be the host's.
    if loopback
        && (config.flags & config::LOCALHOST_NODE_PORTS == 0
            || call.netns == 0
            || call.netns != config.host_netns)
    {
        return Answer::Leave;
    }
    let host = is_host(config, call);
    let wanted = if host { config::SOCKET_HOST } else { config::SOCKET_PODS };
    if config.flags & wanted == 0 {
        return Answer::Leave;
    }
    // A connected UDP socket of a pod must follow its Service when endpoints go: per packet it does. And what another one
    // sends to a port of the node may be an answer to a process there, which only packets tell.
    let leave = u32::from(call.connect) | u32::from(known & address::NODE != 0);
    if !host && call.proto == Proto::UDP && leave != 0 {
        return Answer::Leave;
    }
    if known == 0 {
        // P-22: what would only wander fails at once.
        tables.count(Reason::UnallocatedClusterIp);
        return Answer::Deny;
    }
    let asker = Caller { call, config, host };
    let Selected { frontend, index, backend } =
        match select::backend_for(tables, &asker, (&call.dst, call.dport, call.proto), known) {
            Ok(selected) => selected,
            Err(Refusal::NotOurs) => return Answer::Leave,
            Err(refusal) if refusal.count(tables) => return Answer::Refuse,
            Err(_) => return Answer::Deny,
        };
    if frontend.flags & frontend::AFFINITY != 0 {
        select::remember(tables, frontend.service, index, backend.generation, client(call));
    }
    tables.count(Reason::SocketChosen);
    tables.count_service(frontend.service, Stat::Chosen);
    *entry = SocketEntry {
        vip: call.dst,
        addr: backend.addr,
        vport: call.dport,
        port: backend.port,
        backend: index,
        generation: backend.generation,
        proto: call.proto,
        pad: [0; 3],
    };
    Answer::Use
}

/// A socket that asks for a backend.
struct Caller<'a> {
    call: &'a Call,
    config: &'a Config,
    host: bool,
}

impl Asker for Caller<'_> {
    #[inline(always)]
    fn source(&self) -> Source {
        if self.host { Source::Host } else { Source::Pod }
    }

    #[inline(always)]
    fn address(&self) -> Addr {
        if self.call.dst.is_v4() { self.config.node_v4 } else { self.config.node_v6 }
    }

    #[inline(always)]
    fn client(&self) -> Addr {
        client(self.call)
    }

    #[inline(always)]
    fn leaves(&self, flags: u32) -> bool {
        !self.host && needs_address(self.config, flags)
    }

    #[inline(always)]
    fn hash<T: Tables>(&self, tables: &T) -> u32 {
        select::scramble(tables.random())
    }
}

/// Whether a pod's socket is better left to its packets: affinity and source ranges go by the pod's address, which
/// a socket does not have yet; to masquerade takes a packet (M-6, M-8); and under an external Local policy it counts
/// what the detector says of the packets' source (V-24, V-27).
#[inline(always)]
fn needs_address(config: &Config, flags: u32) -> bool {
    let by_packet = if flags & frontend::INTERNAL != 0 {
        config.flags & config::MASQUERADE_ALL != 0
    } else {
        config.flags & config::MASQUERADE_LOCAL != 0 || flags & frontend::LOCAL != 0
    };
    by_packet || flags & (frontend::AFFINITY | frontend::SOURCE_RANGES) != 0
}

/// Whether the socket is the node's own. Where the kernel does not tell namespaces apart, every socket
/// counts as the node's.
#[inline(always)]
fn is_host(config: &Config, call: &Call) -> bool {
    call.netns == config.host_netns || call.netns == 0 || config.host_netns == 0
}

/// The identity of a socket's owner for affinity: its network namespace.
#[inline(always)]
fn client(call: &Call) -> Addr {
    Addr([0, 0, (call.netns >> 32) as u32, call.netns as u32])
}

impl SocketEntry {
    /// Nothing remembered.
    pub const EMPTY: Self = Self {
        vip: Addr::ANY_V6,
        addr: Addr::ANY_V6,
        vport: Port(0),
        port: Port(0),
        backend: 0,
        generation: 0,
        proto: Proto(0),
        pad: [0; 3],
    };
}

impl SocketState {
    /// Nothing remembered.
    pub const EMPTY: Self = Self {
        cookie: 0,
        entries: [SocketEntry::EMPTY; SOCKET_ENTRIES],
        flags: 0,
        pad: 0,
        #[cfg(feature = "next-layout")]
        next: [0; 3],
    };

    /// Whether the socket remembers the destination a process names, and the backend is still there; where it leads
    /// goes to `found`.
    #[inline(always)]
    fn translation<'a, T: Tables, M: Memory<'a>>(
        &self,
        tables: &T,
        memory: &M,
        call: &Call,
        found: &mut SocketEntry,
    ) -> bool {
        for entry in &self.entries {
            if entry.backend != 0
                && entry.vport == call.dport
                && entry.proto == call.proto
                && entry.vip.same(&call.dst)
                && is_alive(tables, entry)
            {
                *found = *entry;
                return true;
            }
        }
        if self.flags & MORE == 0 {
            return false;
        }
        let cookie = memory.cookie();
        let named = PeerKey::named(cookie, call.dst, call.dport, call.proto);
        if memory.peer(&named, |entry| *found = *entry).is_none() || !is_alive(tables, found) {
            return false;
        }
        // Another destination may have been given the same endpoint meanwhile, or the way back been evicted.
        let back = PeerKey::endpoint(cookie, found.addr, found.port, found.proto);
        if memory.peer(&back, |entry| entry.backend == found.backend && entry.vip.same(&found.vip))
            != Some(true)
        {
            memory.set_peer(&back, found);
        }
        true
    }

    /// The entry that leads to an endpoint.
    #[inline(always)]
    fn end(&self, addr: &Addr, port: Port, proto: Proto) -> Option<&SocketEntry> {
        self.entries.iter().find(|entry| {
            entry.backend != 0 && entry.port == port && entry.proto == proto && entry.addr.same(addr)
        })
    }

    /// The process names this address itself: what comes from there is shown as it is.
    #[inline(always)]
    fn turn_to<'a, M: Memory<'a>>(&mut self, memory: &M, addr: &Addr, port: Port, proto: Proto) {
        for entry in &mut self.entries {
            if entry.port == port && entry.addr.same(addr) {
                entry.backend = 0;
            }
        }
        if self.flags & MORE != 0 {
            memory.forget_peer(&PeerKey::endpoint(memory.cookie(), *addr, port, proto));
        }
    }

    /// Remembers a translation: over an entry of the same destination, else where there is room. Two destinations
    /// with one endpoint cannot be told apart when it answers (D-1): where packets can take another way
    /// (`by_packet`), the second takes it, and so does what there is no room for, which is what false says.
    /// Elsewhere the latest counts, and there is more room in a table.
    #[inline(always)]
    fn remember<'a, T: Tables, M: Memory<'a>>(
        &mut self,
        tables: &T,
        memory: &M,
        call: &Call,
        entry: &SocketEntry,
        by_packet: bool,
    ) -> bool {
        let by_packet = by_packet && !call.connect;
        // What the kernel has connected the socket to is shown as it was asked for, whatever else is sent.
        if call.peer_port.0 != 0 {
            let to_peer = entry.port == call.peer_port && entry.addr.same(&call.peer);
            return to_peer || self.put_aside(memory, entry, by_packet);
        }
        let (mut same, mut free) = (0, 0);
        for n in 0..SOCKET_ENTRIES {
            let old = &mut self.entries[n];
            let in_use = old.backend != 0;
            let same_end = in_use && old.port == entry.port && old.addr.same(&entry.addr);
            if in_use && old.vport == entry.vport && old.vip.same(&entry.vip) {
                same |= 1 << n;
            } else if same_end && by_packet {
                self.flags |= BY_PACKET;
                return false;
            } else {
                if same_end {
                    old.backend = 0;
                }
                free |= u32::from(same_end || !in_use || call.connect || !is_alive(tables, old)) << n;
            }
        }
        let place = if same != 0 { lowest(same) } else { lowest(free) };
        if place == SOCKET_ENTRIES {
            return self.put_aside(memory, entry, by_packet);
        }
        self.entries[place & (SOCKET_ENTRIES - 1)] = *entry;
        // Only the node's own sockets get here with a connected UDP socket.
        if call.connect && call.proto == Proto::UDP {
            self.cookie = memory.cookie();
        }
        true
    }

    /// Remembers a translation that there is no room for here; where packets can take another way it is not, which is
    /// what false says.
    #[inline(always)]
    fn put_aside<'a, M: Memory<'a>>(&mut self, memory: &M, entry: &SocketEntry, by_packet: bool) -> bool {
        if by_packet {
            self.flags |= BY_PACKET;
            return false;
        }
        self.flags |= MORE;
        let cookie = memory.cookie();
        memory.set_peer(&PeerKey::named(cookie, entry.vip, entry.vport, entry.proto), entry)
            && memory.set_peer(&PeerKey::endpoint(cookie, entry.addr, entry.port, entry.proto), entry)
    }
}

/// The number of the lowest bit that is set among the entries'; theirs if there is none.
#[inline(always)]
const fn lowest(bits: u32) -> usize {
    let mut n = 0;
    while n < SOCKET_ENTRIES && bits & 1 << n == 0 {
        n += 1;
    }
    n
}

impl PeerKey {
    /// The key of what a process named.
    #[inline(always)]
    const fn named(cookie: u64, addr: Addr, port: Port, proto: Proto) -> Self {
        Self { cookie, addr, port, proto, endpoint: 0, pad: 0 }
    }

    /// The key of an endpoint.
    #[inline(always)]
    const fn endpoint(cookie: u64, addr: Addr, port: Port, proto: Proto) -> Self {
        Self { endpoint: 1, ..Self::named(cookie, addr, port, proto) }
    }
}

#[inline(always)]
fn is_alive<T: Tables>(tables: &T, entry: &SocketEntry) -> bool {
    tables.backend(entry.backend).is_some_and(|backend| backend.generation == entry.generation)
}

const _: () = assert!(SOCKET_ENTRIES.is_power_of_two());

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;

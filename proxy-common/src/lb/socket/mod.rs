//! Socket calls instead of packets: the destination is translated once, at `connect`, or at each `sendmsg`
//! of an unconnected UDP socket; the socket remembers what the process asked for.
//!
//! A socket is dealt with in one way in every hook. What the kernel has connected it to is the decision that was
//! taken at `connect`: who sends to that address again, by name or because the kernel names it (an IPv6 socket
//! connected over IPv4), is ignored. What an unconnected socket cannot remember goes by packet, and so does
//! everything new of that socket from then on, so that no Service changes its endpoint by changing its way.

mod state;

#[cfg(test)]
mod tests;

pub use state::{Memory, original};

use super::select::{self, Asker, Rejection, Selected, Source};
use super::{Stat, Subprograms, Tables};
use crate::abi::socket::{BY_PACKET, EXCLUDED};
use crate::abi::{Config, Reason, SocketEntry, SocketState, address, config, frontend};
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
    /// Cookie of the socket's network namespace; 0 when the kernel does not say.
    pub netns: u64,
    /// Whether it is a `connect`.
    pub connect: bool,
    /// With a `sendmsg`: the only address that the socket receives from, because it is connected to it, or
    /// over IPv6 has once been; else unspecified.
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
pub enum Decision {
    /// Not ours, or better done per packet.
    Pass,
    /// Write the destination that was chosen.
    Translate,
    /// Fail with "connection refused".
    Reject,
    /// Fail with "operation not permitted".
    Deny,
}

/// Decides a call of a socket with this storage, writes what was chosen to `entry`, and remembers it.
#[inline(always)]
pub fn translate<'a, T: Subprograms, M: Memory<'a>>(
    tables: &T,
    memory: &M,
    mut state: Option<&'a mut SocketState>,
    call: &Call,
    entry: &mut SocketEntry,
) -> Decision {
    if call.names_peer() {
        return Decision::Pass;
    }
    let mut by_packet = false;
    if let Some(state) = &mut state {
        if state.flags & EXCLUDED != 0 {
            return Decision::Pass;
        }
        if !call.connect {
            if state.translation(tables, memory, call, entry) {
                return Decision::Translate;
            }
            by_packet = state.flags & BY_PACKET != 0;
        }
    }
    let decision = if by_packet { Decision::Pass } else { decide(tables, call, entry) };
    match decision {
        // An IPv6 call cannot be given an IPv4 endpoint, nor the other way round.
        Decision::Translate if entry.addr.is_v4() != call.dst.is_v4() => Decision::Pass,
        Decision::Translate => {
            let host = tables.config().is_some_and(|config| is_host(config, call));
            let state = match state {
                Some(state) => Some(state),
                None => memory.new_state(),
            };
            if state.is_some_and(|state| state.remember(tables, memory, call, entry, !host)) {
                return decision;
            }
            tables.count(Reason::SocketStorage);
            // What the node sends passes no program that could do it later.
            if host { decision } else { Decision::Pass }
        }
        Decision::Pass => {
            if let Some(state) = state {
                state.turn_to(memory, &call.dst, call.dport, call.proto);
            }
            decision
        }
        Decision::Reject | Decision::Deny => decision,
    }
}

/// Decides a call whose socket remembers nothing that fits.
#[inline(always)]
fn decide<T: Subprograms>(tables: &T, call: &Call, entry: &mut SocketEntry) -> Decision {
    let loopback = call.dst.is_loopback();
    let known = match call.dst.is_never_service() {
        true if loopback => address::NODE_PORT,
        true => 0,
        false => tables.address(&call.dst),
    };
    let Some(config) = tables.config() else {
        return Decision::Pass;
    };
    if known == 0 && !config.is_service_range(&call.dst) || config.flags & config::LEAVE_NEW != 0 {
        return Decision::Pass;
    }
    // A pod's loopback is its own: there the socket must be known to be the host's.
    if loopback
        && (config.flags & config::LOCALHOST_NODE_PORTS == 0
            || call.netns == 0
            || call.netns != config.host_netns)
    {
        return Decision::Pass;
    }
    let host = is_host(config, call);
    let wanted = if host { config::SOCKET_HOST } else { config::SOCKET_PODS };
    if config.flags & wanted == 0 {
        return Decision::Pass;
    }
    // A connected UDP socket of a pod must follow its Service when endpoints go: per packet it does. And what
    // another one sends to a port of the node may be an answer to a process there, which only packets show.
    let leave = u32::from(call.connect) | u32::from(known & address::NODE != 0);
    if !host && call.proto == Proto::UDP && leave != 0 {
        return Decision::Pass;
    }
    if known == 0 {
        // P-22: what would only wander fails at once.
        tables.count(Reason::UnallocatedClusterIp);
        return Decision::Deny;
    }
    let asker = Caller { call, config, host };
    let Selected { frontend, index, backend } =
        match select::backend_for(tables, &asker, (&call.dst, call.dport, call.proto), known) {
            Ok(selected) => selected,
            Err(Rejection::NotOurs) => return Decision::Pass,
            Err(rejection) if rejection.count(tables) => return Decision::Reject,
            Err(_) => return Decision::Deny,
        };
    if frontend.flags & frontend::AFFINITY != 0 {
        select::remember(tables, frontend.service, index, backend.generation, client(call));
    }
    tables.count(Reason::SocketTranslated);
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
    Decision::Translate
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

/// Whether a pod's socket is better left to its packets: affinity and source ranges go by the pod's address,
/// which a socket does not have yet; to masquerade takes a packet (M-6, M-8); and under an external Local
/// policy it counts what the detector says of the packets' source (V-24, V-27).
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

//! Socket calls instead of packets: the destination is translated once, at `connect`, or at each `sendmsg`
//! of an unconnected UDP socket; the socket remembers what the process asked for.

use super::select::{self, Refusal, Source};
use super::{Stat, Tables};
use crate::abi::{
    Config, Reason, SOCKET_ENTRIES, SocketEntry, SocketState, SourceKey, address, config, frontend,
};
use crate::addr::{Addr, Port, Proto};

/// How often a selection that met a table in the middle of a change starts anew.
const SELECTIONS: usize = 3;

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
}

/// What becomes of a socket call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Answer {
    /// Not ours, or better done per packet.
    Leave,
    /// Write this destination and remember it.
    Use(SocketEntry),
    /// Fail with "connection refused".
    Refuse,
    /// Fail with "operation not permitted".
    Deny,
}

/// Decides a call whose socket remembers nothing that fits.
#[inline(always)]
pub fn decide<T: Tables>(tables: &T, call: &Call) -> Answer {
    let loopback = call.dst.is_loopback();
    let known = match call.dst.is_never_service() {
        true if loopback => address::NODE_PORT,
        true => 0,
        false => tables.address(&call.dst),
    };
    let Some(config) = tables.config() else {
        return Answer::Leave;
    };
    if known == 0 && !config.is_service_range(&call.dst) {
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
    // A connected UDP socket of a pod must follow its Service when endpoints go: per packet it does.
    if !host && call.connect && call.proto == Proto::UDP {
        return Answer::Leave;
    }
    if known == 0 {
        // P-22: what would only wander fails at once.
        tables.count(Reason::UnallocatedClusterIp);
        return Answer::Deny;
    }
    for _ in 0..SELECTIONS {
        let frontend = match select::frontend_for(tables, &call.dst, call.dport, call.proto, known) {
            Ok(frontend) => frontend,
            Err(Refusal::NotService) => return Answer::Leave,
            Err(refusal) => return refuse(tables, refusal),
        };
        let flags = frontend.flags;
        if !host && needs_address(config, flags) {
            return Answer::Leave;
        }
        if flags & frontend::SOURCE_RANGES != 0 {
            let source = if call.dst.is_v4() { config.node_v4 } else { config.node_v6 };
            if !tables.source_allowed(&SourceKey::exact(frontend.service, source)) {
                tables.count(Reason::SourceRange);
                tables.count_service(frontend.service, Stat::Dropped);
                return Answer::Deny;
            }
        }
        let source = if host { Source::Host } else { Source::Pod };
        let (run, flag) = match select::usable(&frontend, source) {
            Ok(usable) => usable,
            Err(refusal) => return refuse(tables, refusal),
        };
        let client = client(call);
        let chosen = match select::remembered(tables, &frontend, flag, client) {
            Some(chosen) => Some(chosen),
            None => select::pick(tables, &frontend, run, select::scramble(tables.random())),
        };
        if let Some((index, backend)) = chosen {
            if flags & frontend::AFFINITY != 0 {
                select::remember(tables, frontend.service, index, backend.generation, client);
            }
            tables.count(Reason::SocketChosen);
            tables.count_service(frontend.service, Stat::Chosen);
            return Answer::Use(SocketEntry {
                vip: call.dst,
                addr: backend.addr,
                vport: call.dport,
                port: backend.port,
                backend: index,
                generation: backend.generation,
                proto: call.proto,
                pad: [0; 3],
            });
        }
    }
    tables.count(Reason::BadSlot);
    Answer::Deny
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

/// Whether packets of the socket pass an interface program of this node on their way out, so that what is not
/// translated at the socket is translated there: a pod's do, the node's own do not.
#[inline(always)]
pub fn passes_ingress<T: Tables>(tables: &T, call: &Call) -> bool {
    tables.config().is_some_and(|config| !is_host(config, call))
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

#[inline(always)]
fn refuse<T: Tables>(tables: &T, refusal: Refusal) -> Answer {
    if refusal.count(tables) { Answer::Refuse } else { Answer::Deny }
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
    pub const EMPTY: Self = Self { entries: [SocketEntry::EMPTY; SOCKET_ENTRIES], next: 0, pad: 0 };

    /// What the socket remembers of the destination a process names, while the backend is still there.
    #[inline(always)]
    pub fn translation<T: Tables>(&self, tables: &T, call: &Call) -> Option<SocketEntry> {
        let mut n = 0;
        while n < SOCKET_ENTRIES {
            let entry = &self.entries[n];
            if entry.backend != 0
                && entry.vip.same(&call.dst)
                && entry.vport == call.dport
                && entry.proto == call.proto
            {
                let alive = tables.backend(entry.backend).is_some_and(|b| b.generation == entry.generation);
                return if alive { Some(*entry) } else { None };
            }
            n += 1;
        }
        None
    }

    /// What the process named, given the peer that the kernel sees.
    #[inline(always)]
    pub fn original(&self, addr: &Addr, port: Port, proto: Proto) -> Option<(Addr, Port)> {
        let mut n = 0;
        while n < SOCKET_ENTRIES {
            let entry = &self.entries[n];
            if entry.backend != 0 && entry.port == port && entry.proto == proto && entry.addr.same(addr) {
                return Some((entry.vip, entry.vport));
            }
            n += 1;
        }
        None
    }

    /// Remembers a translation: over the entry of the same destination, else over the oldest. Two destinations
    /// with one endpoint cannot be told apart when it answers (D-1): where packets can take another way
    /// (`elsewhere`), the second is not remembered, which is what false says; else the latest counts.
    #[inline(always)]
    #[must_use]
    pub fn remember(&mut self, entry: &SocketEntry, elsewhere: bool) -> bool {
        let (mut place, mut n) = (SOCKET_ENTRIES, 0);
        while n < SOCKET_ENTRIES {
            let old = &self.entries[n];
            let same_proto = old.backend != 0 && old.proto == entry.proto;
            let same_vip = same_proto && old.vport == entry.vport && old.vip.same(&entry.vip);
            let same_end = same_proto && old.port == entry.port && old.addr.same(&entry.addr);
            if same_vip {
                place = n;
            } else if same_end {
                if elsewhere {
                    return false;
                }
                self.entries[n] = SocketEntry::EMPTY;
            }
            n += 1;
        }
        if place == SOCKET_ENTRIES {
            place = self.next as usize & (SOCKET_ENTRIES - 1);
            self.next = self.next.wrapping_add(1);
        }
        self.entries[place & (SOCKET_ENTRIES - 1)] = *entry;
        true
    }
}

const _: () = assert!(SOCKET_ENTRIES.is_power_of_two());

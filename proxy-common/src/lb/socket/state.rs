//! What a socket remembers of the Services that its process has named.

use super::Call;
use crate::abi::socket::{BY_PACKET, MORE};
use crate::abi::{PeerKey, SOCKET_ENTRIES, SocketEntry, SocketState};
use crate::addr::{Addr, Port, Proto};
use crate::lb::Tables;

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

    /// Whether the socket remembers the destination a process names, and the backend is still there; where it
    /// leads goes to `found`.
    #[inline(always)]
    pub(super) fn translation<'a, T: Tables, M: Memory<'a>>(
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
    pub(super) fn turn_to<'a, M: Memory<'a>>(&mut self, memory: &M, addr: &Addr, port: Port, proto: Proto) {
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
    pub(super) fn remember<'a, T: Tables, M: Memory<'a>>(
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

    /// Remembers a translation that there is no room for here; where packets can take another way it is not,
    /// which is what false says.
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

//! A socket's memory.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use super::MemoryTables;
use crate::abi::{PeerKey, SocketEntry, SocketState};
use crate::addr::{Addr, Port, Proto};
use crate::lb::socket::{self, Call, Memory};

/// A socket, as far as it remembers something.
pub struct MemorySocket {
    /// Its storage.
    pub state: SocketState,
    /// Whether it has any.
    pub has_state: bool,
    /// Whether it can get some.
    pub room: bool,
    /// PEERS.
    pub peers: RefCell<HashMap<PeerKey, SocketEntry>>,
}

impl Default for MemorySocket {
    fn default() -> Self {
        Self { state: SocketState::EMPTY, has_state: false, room: true, peers: RefCell::default() }
    }
}

/// What a call can get from outside the socket's storage.
struct Beside<'a> {
    storage: Cell<Option<&'a mut SocketState>>,
    used: &'a Cell<bool>,
    peers: &'a RefCell<HashMap<PeerKey, SocketEntry>>,
}

impl MemorySocket {
    /// The cookie of all such sockets.
    pub const COOKIE: u64 = 77;

    /// A call of this socket, and where it leads.
    pub fn call(&mut self, tables: &MemoryTables, call: &Call) -> (socket::Decision, SocketEntry) {
        let used = Cell::new(self.has_state);
        let (old, new) = match self.has_state {
            true => (Some(&mut self.state), None),
            false => (None, self.room.then_some(&mut self.state)),
        };
        let beside = Beside { storage: Cell::new(new), used: &used, peers: &self.peers };
        let mut entry = SocketEntry::EMPTY;
        let decision = socket::translate(tables, &beside, old, call, &mut entry);
        self.has_state = used.get();
        (decision, entry)
    }

    /// What the process is shown of a peer.
    pub fn shown(&self, addr: Addr, port: Port, proto: Proto) -> (Addr, Port) {
        let used = Cell::new(false);
        let beside = Beside { storage: Cell::new(None), used: &used, peers: &self.peers };
        let original = self.has_state.then(|| socket::original(&beside, &self.state, &addr, port, proto));
        original.flatten().unwrap_or((addr, port))
    }
}

impl<'a> Memory<'a> for Beside<'a> {
    fn new_state(&self) -> Option<&'a mut SocketState> {
        let storage = self.storage.take();
        self.used.set(self.used.get() || storage.is_some());
        storage
    }

    fn cookie(&self) -> u64 {
        MemorySocket::COOKIE
    }

    fn peer<R>(&self, key: &PeerKey, see: impl FnOnce(&SocketEntry) -> R) -> Option<R> {
        self.peers.borrow().get(key).map(see)
    }

    fn set_peer(&self, key: &PeerKey, entry: &SocketEntry) -> bool {
        self.peers.borrow_mut().insert(*key, *entry);
        true
    }

    fn forget_peer(&self, key: &PeerKey) {
        self.peers.borrow_mut().remove(key);
    }
}

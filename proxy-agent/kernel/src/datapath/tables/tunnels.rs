//! TUNNELS: how the nodes are reached whose endpoints answer clients themselves.
//!
//! Beside plans: what stands here follows from answers of other nodes and not from Services. It is small, so it is read each time
//! and compared with what should be there; what somebody else has done to it is undone by that.

use std::collections::BTreeMap;

use proxy_common::abi::{Tunnel, TunnelKey, maps};

use crate::datapath::store::pin::BpfRoot;
use crate::datapath::store::table::{Table, TableError};

/// The table.
#[derive(Debug)]
pub struct Tunnels {
    table: Table<TunnelKey, Tunnel>,
    /// What was last made of it.
    known: Option<BTreeMap<TunnelKey, Tunnel>>,
}

/// What has been done to the table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Brought {
    /// Entries written or deleted.
    pub writes: usize,
    /// Those of them that somebody else had changed.
    pub repairs: usize,
    /// Entries for which there is no room.
    pub refused: Vec<TunnelKey>,
}

impl Tunnels {
    /// Opens what is pinned under `root`.
    pub fn open(root: &BpfRoot) -> Result<Self, TableError> {
        Ok(Self { table: Table::open(root, maps::TUNNELS)?, known: None })
    }

    /// What stands there.
    pub fn read(&self) -> Result<BTreeMap<TunnelKey, Tunnel>, TableError> {
        let mut found = BTreeMap::new();
        self.table.scan(|key, tunnel| {
            found.insert(key, tunnel);
        })?;
        Ok(found)
    }

    /// Has this and nothing else stand there; only what differs is written. What goes makes room for what comes.
    pub fn bring(&mut self, wanted: &BTreeMap<TunnelKey, Tunnel>) -> Result<Brought, TableError> {
        let mut there = self.read()?;
        let mut brought = Brought::default();
        if let Some(known) = &self.known {
            let changed = known.iter().filter(|(key, tunnel)| there.get(key) != Some(tunnel)).count();
            let added = there.keys().filter(|key| !known.contains_key(key)).count();
            brought.repairs = changed + added;
        }
        // Until the end nobody knows: a call may fail.
        self.known = None;
        for key in there.keys().filter(|key| !wanted.contains_key(key)).copied().collect::<Vec<_>>() {
            self.table.delete(&key)?;
            there.remove(&key);
            brought.writes += 1;
        }
        for (key, tunnel) in wanted {
            if there.get(key) == Some(tunnel) {
                continue;
            }
            match self.table.put(key, tunnel) {
                Ok(()) => {
                    there.insert(*key, *tunnel);
                    brought.writes += 1;
                }
                Err(TableError::Full { .. }) => brought.refused.push(*key),
                Err(error) => return Err(error),
            }
        }
        self.known = Some(there);
        Ok(brought)
    }
}

//! RETIRED: whether an operator has told this node's agent to leave what is new to another proxy. It outlives the agent.

use proxy_common::abi::maps;

use super::pin::BpfRoot;
use super::table::{Table, TableError};

/// The mark.
#[derive(Debug)]
pub struct Retired(Table<u32, u32>);

impl Retired {
    /// Opens what is pinned under `root`.
    pub fn open(root: &BpfRoot) -> Result<Self, TableError> {
        Ok(Self(Table::open(root, maps::RETIRED)?))
    }

    /// Whether it is set.
    pub fn get(&self) -> Result<bool, TableError> {
        Ok(self.0.get(&0)? == Some(1))
    }

    /// Sets it or takes it away.
    pub fn set(&self, retired: bool) -> Result<(), TableError> {
        self.0.put(&0, &u32::from(retired))
    }
}

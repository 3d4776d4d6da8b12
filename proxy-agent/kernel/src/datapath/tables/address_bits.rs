//! ADDRESS_BITS and ENDPOINT_BITS: for most addresses a bit that is not set tells a packet that ADDRESSES need not be asked,
//! or that there is no endpoint.
//!
//! A bit may be set for nobody, never the other way round: it is set before its address is written, and taken away only
//! when all addresses have been counted again.

use std::collections::BTreeMap;

use proxy_common::abi::capacity;
use proxy_common::addr::Addr;

use crate::datapath::store::pin::BpfRoot;
use crate::datapath::store::table::{Table, TableError};

/// One of the tables, and what is known of it.
#[derive(Debug)]
pub(crate) struct AddressBits {
    table: Table<u32, u64>,
    /// After so many addresses have gone their bits are worth a count.
    many: usize,
    /// The words as they stand; empty before they have been read.
    words: Vec<u64>,
    /// Addresses that have gone since they were counted.
    gone: usize,
}

impl AddressBits {
    /// Opens the map of this name that is pinned under `root`.
    pub(crate) fn open(root: &BpfRoot, map: &'static str, many: usize) -> Result<Self, TableError> {
        Ok(Self { table: Table::open(root, map)?, many, words: Vec::new(), gone: 0 })
    }

    /// Sets the bits of addresses that are about to be written; whether there are new ones.
    pub(crate) fn add(&mut self, addresses: impl Iterator<Item = Addr>) -> Result<bool, TableError> {
        self.know()?;
        let mut wanted = BTreeMap::new();
        for (word, bit) in addresses.map(|addr| place(&addr)) {
            let known = self.words.get(word).copied().unwrap_or(0);
            if known & bit == 0 {
                *wanted.entry(word).or_insert(known) |= bit;
            }
        }
        let new = !wanted.is_empty();
        self.write(wanted)?;
        Ok(new)
    }

    /// So many addresses have gone; whether the bits ought to be counted again.
    pub(crate) fn lose(&mut self, count: usize) -> bool {
        self.gone += count;
        self.gone >= self.many
    }

    /// Sets the bits of these addresses and no others: there are no others.
    pub(crate) fn count<'a>(&mut self, addresses: impl Iterator<Item = &'a Addr>) -> Result<(), TableError> {
        self.know()?;
        let mut words = vec![0; WORDS];
        for (word, bit) in addresses.map(place) {
            if let Some(word) = words.get_mut(word) {
                *word |= bit;
            }
        }
        let changed = words.into_iter().enumerate().filter(|(n, word)| self.words.get(*n) != Some(word));
        let changed = changed.collect();
        self.write(changed)?;
        self.gone = 0;
        Ok(())
    }

    /// Writes words again that somebody else has changed: how many there are, and how many of them were wrong.
    pub(crate) fn restore(&mut self) -> Result<(usize, usize), TableError> {
        self.know()?;
        let mut wrong = BTreeMap::new();
        self.table.scan(|n, word| {
            if let Some(known) = self.words.get(n as usize).filter(|known| **known != word) {
                wrong.insert(n as usize, *known);
            }
        })?;
        let count = wrong.len();
        self.write(wrong)?;
        Ok((WORDS, count))
    }

    fn know(&mut self) -> Result<(), TableError> {
        if self.words.is_empty() {
            let mut words = vec![0; WORDS];
            self.table.scan(|n, word| {
                if let Some(known) = words.get_mut(n as usize) {
                    *known = word;
                }
            })?;
            self.words = words;
        }
        Ok(())
    }

    fn write(&mut self, wanted: BTreeMap<usize, u64>) -> Result<(), TableError> {
        for (n, word) in wanted {
            self.table.put(&(n as u32), &word)?;
            if let Some(known) = self.words.get_mut(n) {
                *known = word;
            }
        }
        Ok(())
    }
}

/// Both tables have as many.
const WORDS: usize = capacity::ADDRESS_BITS;
const _: () = assert!(WORDS == capacity::ENDPOINT_BITS);

/// The word and the bit of an address.
pub(crate) fn place(addr: &Addr) -> (usize, u64) {
    let place = addr.place();
    (place as usize / 64, 1 << (place % 64))
}

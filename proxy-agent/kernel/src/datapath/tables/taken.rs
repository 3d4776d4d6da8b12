//! TAKEN: the source ports that others on this node use towards endpoints, as the kernel's connection tracking knows them, as
//! far as they are ports that flows are masqueraded with.
//!
//! What a CNI masquerades to an endpoint under an address that we masquerade with, too, is noted by its first packet
//! (`lb::egress`). This table is for what began before its endpoint was one, or has been silent for longer than such a note
//! lasts: the agent reads connection tracking again and again, and writes what has changed.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use proxy_common::abi::{Config, RouteKey, Tuple, maps};
use proxy_common::addr::{Addr, Port, Proto};

use super::address_bits::place;
use crate::datapath::store::pin::BpfRoot;
use crate::datapath::store::table::{Table, TableError};
use crate::netlink::conntrack;

/// The value of every entry: only its being there counts.
const LISTED: u32 = 1;
/// How long what was written is believed to be still there, whatever anybody else has done to the table.
const BELIEVED: Duration = Duration::from_secs(45);

/// Why the table is not as connection tracking is.
#[derive(Debug, thiserror::Error)]
pub enum TakenError {
    /// It cannot be read.
    #[error("cannot read the kernel's connection tracking (CAP_NET_ADMIN, module nf_conntrack_netlink)")]
    Read(#[from] io::Error),
    /// Some of it could not be understood.
    #[error("{0} entries of the kernel's connection tracking cannot be read")]
    Unread(usize),
    /// There are more than the table holds.
    #[error("map {} is full ({max} entries): no room for {left} more", maps::TAKEN)]
    Full {
        max: u32,
        /// What found no room.
        left: usize,
    },
    /// A table cannot be used.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// The table, and what it follows from.
#[derive(Debug)]
pub struct Taken {
    table: Table<Tuple, u32>,
    endpoints: Table<u32, u64>,
    sources: Table<RouteKey, Addr>,
    config: Table<u32, Config>,
    /// What is in it, and when that was read.
    known: Option<(HashSet<Tuple>, Instant)>,
}

impl Taken {
    /// Opens what is pinned under `root`.
    pub fn open(root: &BpfRoot) -> Result<Self, TableError> {
        Ok(Self {
            table: Table::open(root, maps::TAKEN)?,
            endpoints: Table::open(root, maps::ENDPOINT_BITS)?,
            sources: Table::open(root, maps::MASQUERADE)?,
            config: Table::open(root, maps::CONFIG)?,
            known: None,
        })
    }

    /// Brings the table in line with connection tracking; how many entries it has. After an error it is as true as could be.
    pub fn follow(&mut self) -> Result<usize, TakenError> {
        let mut wanted = HashSet::new();
        let unread = self.read(&mut wanted)?;
        let (known, since) = match self.known.take() {
            Some((known, since)) if since.elapsed() < BELIEVED => (known, since),
            _ => (self.table.keys()?.into_iter().collect(), Instant::now()),
        };
        let gone: Vec<Tuple> = known.difference(&wanted).copied().collect();
        self.table.delete_many(&gone).map_err(|(_, error)| error)?;
        let mut new: Vec<Tuple> = wanted.difference(&known).copied().collect();
        let max = self.table.max();
        let left = wanted.len().saturating_sub(max as usize);
        new.truncate(new.len() - left.min(new.len()));
        self.table.put_many(&new, &vec![LISTED; new.len()]).map_err(|(_, error)| error)?;
        let mut there = known;
        gone.iter().for_each(|tuple| {
            there.remove(tuple);
        });
        there.extend(new);
        let count = there.len();
        self.known = Some((there, since));
        match (left, unread) {
            (0, 0) => Ok(count),
            (0, unread) => Err(TakenError::Unread(unread)),
            (left, _) => Err(TakenError::Full { max, left }),
        }
    }

    /// Adds what connection tracking has between an end that flows are masqueraded with and an endpoint, whoever of them has
    /// begun it; how many entries could not be read.
    fn read(&self, taken: &mut HashSet<Tuple>) -> Result<usize, TakenError> {
        let mut endpoints = Vec::new();
        self.endpoints.scan(|_, word| endpoints.push(word))?;
        let mut sources = HashSet::new();
        self.sources.scan(|_, source| {
            sources.insert(source);
        })?;
        let is_endpoint = |addr: &Addr| {
            let (word, bit) = place(addr);
            endpoints.get(word).is_some_and(|word| word & bit != 0)
        };
        let config = self.config.get(&0)?.unwrap_or(Config::EMPTY);
        let is_ours = |addr: &Addr, port: Port| config.is_snat_port(port) && sources.contains(addr);
        let unread = conntrack::connections(|connection| {
            // As the endpoint sends: answers, or what it has begun itself.
            for sent in [connection.answered, connection.asked] {
                let ports = matches!(sent.proto, Proto::TCP | Proto::UDP | Proto::SCTP);
                if ports && is_ours(&sent.dst, sent.dport) && is_endpoint(&sent.src) {
                    taken.insert(sent.reversed());
                }
            }
        })?;
        Ok(unread)
    }
}

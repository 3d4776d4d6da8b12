//! How the nodes are reached whose endpoints answer clients themselves: whom to ask and when, what follows from answers that come
//! and that do not, and what that makes of the table TUNNELS.
//!
//! Time is microseconds of any clock that does not go back.

mod allowance;
mod reach;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use proxy_common::abi::tunnel::{READY, V4, V6};
use proxy_common::abi::{Tunnel, TunnelKey};

pub use allowance::Allowance;
pub use reach::{Block, Reach, Standing};

use super::{Family, Peers};

/// So many answers in a row, and a node is reached.
const GOOD: u32 = 2;
/// So many that are missing in a row, and it is not.
const BAD: u32 = 3;
/// From one question to a node over a family to the next.
const EVERY_US: u64 = 1_000_000;
/// From one question to the next, whomever they are for: where there are so many nodes that it would be less, each is asked less
/// often.
const APART_US: u64 = 10_000;

/// A node to be reached.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Its name.
    pub name: Arc<str>,
    /// The number that backends have for it.
    pub number: u32,
}

/// The way to an address, as this node's routes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// This node's address on it.
    pub from: IpAddr,
    /// Index of the interface, which has an Ethernet header.
    pub link: u32,
    /// How long a packet may be.
    pub mtu: u32,
}

/// Somebody whose turn it is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    /// Who.
    pub key: TunnelKey,
    /// Where its agent answers.
    pub to: SocketAddr,
}

/// A node, over one family.
#[derive(Clone, Debug)]
struct End {
    node: Arc<str>,
    to: SocketAddr,
    /// The last way there was.
    way: Option<Way>,
    /// Why there is none now.
    no_way: Option<String>,
    /// Why nothing could be sent when it was last its turn.
    not_sent: Option<String>,
    ready: bool,
    /// What it was asked last, and has not answered.
    question: Option<u64>,
    /// Answers in a row.
    answered: u32,
    /// Those that are missing, in a row.
    missed: u32,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Tunnels {
    ends: BTreeMap<TunnelKey, End>,
    /// Nodes that no Service asks for any more: flows may go there for hours, by the way there was. So they stay, 48 bytes
    /// each, until the node is restarted.
    left: BTreeMap<TunnelKey, Tunnel>,
    /// Where agents are asked of whom nothing is known.
    port: u16,
    /// Nodes of whose agents no address is known.
    without: BTreeSet<Arc<str>>,
    questions: HashMap<u64, TunnelKey>,
    /// Ends for which the table has no room.
    refused: BTreeSet<TunnelKey>,
    /// Why nobody is asked.
    block: Option<Block>,
    /// Who was asked last.
    last: Option<TunnelKey>,
    /// When the next one is asked.
    next_us: Option<u64>,
    /// Answers that did not come.
    missing: u64,
    /// Whether what should stand in the table may be something else than when that was last asked.
    changed: bool,
}

impl Tunnels {
    /// What the table says, an earlier agent's word, counts until answers say otherwise: for the nodes that are named next, by
    /// [`Self::follow`]. `port` is asked where no agent has said another one.
    #[must_use]
    pub fn new(found: &BTreeMap<TunnelKey, Tunnel>, port: u16) -> Self {
        let ends = found.iter().map(|(key, tunnel)| (*key, End::of(tunnel, port))).collect();
        Self { ends, port, ..Self::default() }
    }

    /// These nodes are to be reached, and no others; `peers` are the agents that are known. An address stays known while its
    /// agent is not there, since nothing else about the node has changed.
    pub fn follow(&mut self, targets: &[Target], peers: &Peers) {
        let mut before = std::mem::take(&mut self.ends);
        self.without.clear();
        for Target { name, number } in targets {
            let mut known = false;
            for (family, word) in [(Family::V4, V4), (Family::V6, V6)] {
                let key = TunnelKey { node: *number, family: word };
                let said = peers.get(name).and_then(|peer| peer.at(family));
                let left = self.left.remove(&key).map(|tunnel| End::of(&tunnel, self.port));
                let end = match (before.remove(&key).or(left), said) {
                    (None, None) => continue,
                    (Some(end), None) => end,
                    (None, Some(to)) => End::new(name.clone(), to),
                    (Some(end), Some(to)) => end.at(to),
                };
                known = true;
                self.ends.insert(key, End { node: name.clone(), ..end });
            }
            if !known {
                self.without.insert(name.clone());
            }
        }
        for (key, end) in before {
            if let Some(tunnel) = end.entry() {
                self.left.insert(key, Tunnel { flags: 0, ..tunnel });
            }
        }
        let ends = &self.ends;
        self.questions.retain(|question, key| ends.get(key).is_some_and(|e| e.question == Some(*question)));
        self.refused.retain(|key| ends.contains_key(key));
        if self.ends.is_empty() {
            self.next_us = None;
        }
        self.changed = true;
    }

    /// Nobody is asked, and nobody reached, for this reason; `None` takes it back.
    pub fn block(&mut self, why: Option<Block>) {
        self.block = why;
        if why.is_some() {
            self.next_us = None;
            self.questions.clear();
            self.ends.values_mut().for_each(End::lose);
            self.changed = true;
        }
    }

    /// When the next one is to be asked; `None` for never.
    #[must_use]
    pub fn next_us(&self, now_us: u64) -> Option<u64> {
        let asks = self.block.is_none() && !self.ends.is_empty();
        asks.then(|| self.next_us.unwrap_or(now_us))
    }

    /// Whose turn it is, if it is anybody's: one after the other, evenly. What it was asked before and has not answered is
    /// missing from now on.
    pub fn due(&mut self, now_us: u64) -> Option<Due> {
        let at = self.next_us(now_us).filter(|at| *at <= now_us)?;
        let after = self.last.map_or(Unbounded, Excluded);
        let key = *self.ends.range((after, Unbounded)).chain(&self.ends).next()?.0;
        self.last = Some(key);
        let apart = (EVERY_US / self.ends.len() as u64).max(APART_US);
        // Who comes late goes on from there: nothing is made up for.
        self.next_us = Some(if at + apart < now_us { now_us } else { at } + apart);
        let end = self.ends.get_mut(&key)?;
        if let Some(question) = end.question.take() {
            self.questions.remove(&question);
            self.missing += 1;
            self.changed |= end.miss();
        }
        Some(Due { key, to: end.to })
    }

    /// The way to whom it is the turn of.
    pub fn routed(&mut self, key: &TunnelKey, way: Result<Way, String>) {
        let Some(end) = self.ends.get_mut(key) else { return };
        match way {
            Ok(way) => {
                self.changed |= end.way != Some(way);
                (end.way, end.no_way) = (Some(way), None);
            }
            Err(why) => {
                self.changed |= end.ready;
                end.lose();
                end.no_way = Some(why);
            }
        }
    }

    /// It has been asked.
    pub fn asked(&mut self, key: &TunnelKey, question: u64) {
        let Some(end) = self.ends.get_mut(key) else { return };
        end.not_sent = None;
        end.question = Some(question);
        self.questions.insert(question, *key);
    }

    /// It could not be asked, which is as good as no answer.
    pub fn not_asked(&mut self, key: &TunnelKey, why: String) {
        let Some(end) = self.ends.get_mut(key) else { return };
        end.not_sent = Some(why);
        self.changed |= end.miss();
    }

    /// An answer has come; whether it is one to a question of ours, from whom that was for.
    pub fn answered(&mut self, question: u64, from: SocketAddr) -> bool {
        let Some(key) = self.questions.get(&question) else { return false };
        let Some(end) = self.ends.get_mut(key) else { return false };
        if (end.to.ip(), end.to.port()) != (from.ip(), from.port()) {
            return false;
        }
        self.questions.remove(&question);
        end.question = None;
        end.missed = 0;
        end.answered = GOOD.min(end.answered + 1);
        let ready = end.ready || end.answered == GOOD && end.no_way.is_none();
        self.changed |= std::mem::replace(&mut end.ready, ready) != ready;
        true
    }

    /// The table has no room for these.
    pub fn refused(&mut self, keys: impl IntoIterator<Item = TunnelKey>) {
        self.refused = keys.into_iter().collect();
    }

    /// Whether [`Self::entries`] may be others than when this was last asked.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// What should stand in the table.
    #[must_use]
    pub fn entries(&self) -> BTreeMap<TunnelKey, Tunnel> {
        let ends = self.ends.iter().filter_map(|(key, end)| Some((*key, end.entry()?)));
        self.left.iter().map(|(key, tunnel)| (*key, *tunnel)).chain(ends).collect()
    }

    /// How each node fares, by name.
    #[must_use]
    pub fn standings(&self) -> Vec<Standing> {
        let without = self.without.iter().map(|node| Standing {
            node: node.clone(),
            family: None,
            reach: self.block.map_or(Reach::NoAgent, Reach::Blocked),
        });
        let ends = self.ends.iter().map(|(key, end)| Standing {
            node: end.node.clone(),
            family: Some(if key.family == V4 { Family::V4 } else { Family::V6 }),
            reach: self.reach(key, end),
        });
        let mut all: Vec<Standing> = without.chain(ends).collect();
        all.sort_by(|a, b| (&a.node, a.family).cmp(&(&b.node, b.family)));
        all
    }

    /// How many answers have not come.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.missing
    }

    fn reach(&self, key: &TunnelKey, end: &End) -> Reach {
        match (&end.no_way, &end.not_sent) {
            _ if self.block.is_some() => self.block.map_or(Reach::Asking, Reach::Blocked),
            _ if self.refused.contains(key) => Reach::Full,
            (Some(why), _) => Reach::NoWay(why.clone()),
            _ if end.ready => Reach::Directly,
            (None, Some(why)) => Reach::NotAsked(why.clone()),
            (None, None) if end.missed >= BAD => Reach::NoAnswer,
            (None, None) => Reach::Asking,
        }
    }
}

impl End {
    /// As the table has it.
    fn of(tunnel: &Tunnel, port: u16) -> Self {
        let way = Way { from: tunnel.from.into(), link: tunnel.ifindex, mtu: tunnel.mtu };
        let to = SocketAddr::new(tunnel.to.into(), port);
        Self { way: (way.link != 0).then_some(way), ready: tunnel.is_ready(), ..Self::new("".into(), to) }
    }

    fn new(node: Arc<str>, to: SocketAddr) -> Self {
        Self {
            node,
            to,
            way: None,
            no_way: None,
            not_sent: None,
            ready: false,
            question: None,
            answered: 0,
            missed: 0,
        }
    }

    /// The same end at the address that its agent has now. Nothing is known of another address; how to get there is about the
    /// same until it has been looked up.
    fn at(self, to: SocketAddr) -> Self {
        if self.to.ip() == to.ip() {
            return Self { to, question: self.question.filter(|_| self.to == to), ..self };
        }
        Self { way: self.way, ..Self::new(self.node, to) }
    }

    /// One more answer is missing; whether it is ready no more.
    fn miss(&mut self) -> bool {
        self.answered = 0;
        self.missed = BAD.min(self.missed + 1);
        let ready = self.ready && self.missed < BAD;
        std::mem::replace(&mut self.ready, ready) != ready
    }

    fn lose(&mut self) {
        (self.ready, self.answered, self.question) = (false, 0, None);
    }

    fn entry(&self) -> Option<Tunnel> {
        let way = self.way?;
        Some(Tunnel {
            to: self.to.ip().into(),
            from: way.from.into(),
            ifindex: way.link,
            mtu: way.mtu,
            flags: if self.ready { READY } else { 0 },
            pad: 0,
        })
    }
}

#[cfg(test)]
mod tests;

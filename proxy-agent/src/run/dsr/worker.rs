//! The thread: asks, hears, answers, writes.

use std::collections::BTreeSet;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep_until};

use super::{News, Wanted};
use crate::serve::ProbeCounts;
use agent_core::model::Family;
use agent_core::model::tunnels::{Allowance, Block, Due, Reach, Tunnels, Way};
use agent_kernel::datapath::store::pin::BpfRoot;
use agent_kernel::datapath::store::table::TableError;
use agent_kernel::datapath::tables::tunnels::Tunnels as Table;
use agent_kernel::netlink;
use agent_kernel::tunnel::{Heard, Listener, Probe, Wrapper, question, wrapped};

/// From one comparison of the table with what should be there to the next; what is missing of sockets is tried again as often.
const ROUND: Duration = Duration::from_secs(1);
/// Questions that are answered: five thousand nodes ask a hundred times a second.
const ANSWERS_PER_SECOND: u64 = 1_000;
/// Those of others, such as a node's other addresses.
const STRANGERS_PER_SECOND: u64 = 50;
/// Nodes that one line of the log names.
const NAMED: usize = 4;

pub(super) struct Worker {
    port: u16,
    ipv6: bool,
    wanted: watch::Receiver<Wanted>,
    tunnels: Tunnels,
    table: Table,
    listener: Option<Listener>,
    wrapper: Option<Wrapper>,
    /// What is wrong: said once.
    troubles: BTreeSet<String>,
    allowance: Allowance,
    /// For those who ask and are no agent's address that is known: they must not use up what agents need.
    strangers: Allowance,
    known: BTreeSet<IpAddr>,
    counts: ProbeCounts,
    repairs: usize,
    /// Nobody else can guess what it makes of a count.
    random: RandomState,
    /// Who was reached when that was last looked at.
    reached: BTreeSet<(Arc<str>, Option<Family>)>,
    clock: Instant,
    news: Arc<Mutex<News>>,
}

impl Worker {
    /// Within a runtime of tokio.
    pub(super) fn open(
        root: &BpfRoot,
        port: u16,
        ipv6: bool,
        wanted: watch::Receiver<Wanted>,
        news: Arc<Mutex<News>>,
    ) -> Result<Self, TableError> {
        let table = Table::open(root)?;
        let mut tunnels = Tunnels::new(&table.read()?, port);
        tunnels.block((port == 0).then_some(Block::Off));
        Ok(Self {
            port,
            ipv6,
            wanted,
            tunnels,
            table,
            listener: None,
            wrapper: None,
            troubles: BTreeSet::new(),
            allowance: Allowance::per_second(ANSWERS_PER_SECOND),
            strangers: Allowance::per_second(STRANGERS_PER_SECOND),
            known: BTreeSet::new(),
            counts: ProbeCounts::default(),
            repairs: 0,
            random: RandomState::new(),
            reached: BTreeSet::new(),
            clock: Instant::now(),
            news,
        })
    }

    /// Until the loop has ended.
    pub(super) async fn work(mut self) {
        let mut rounds = interval(ROUND);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Skip);
        self.follow();
        loop {
            let next = self.tunnels.next_us(self.now_us());
            let next = next.map(|us| (self.clock + Duration::from_micros(us)).into());
            tokio::select! {
                changed = self.wanted.changed() => match changed {
                    Ok(()) => self.follow(),
                    Err(_) => return,
                },
                heard = hear(self.listener.as_ref()) => self.heard(heard),
                () = until(next) => self.ask(),
                _ = rounds.tick(), if self.is_needed() || self.lacks_ears() => self.round(),
            }
            if self.tunnels.take_changed() {
                self.write();
            }
        }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn is_needed(&self) -> bool {
        !self.wanted.borrow().targets.is_empty()
    }

    fn lacks_ears(&self) -> bool {
        self.port != 0 && self.listener.is_none() && self.wanted.borrow().direct
    }

    fn follow(&mut self) {
        let wanted = self.wanted.borrow_and_update().clone();
        self.tunnels.follow(&wanted.targets, &wanted.peers);
        self.known =
            wanted.peers.values().flat_map(|peer| [peer.v4, peer.v6]).flatten().map(|at| at.ip()).collect();
        if !wanted.direct {
            self.listener = None;
        }
        self.round();
    }

    /// What is missing is tried again, and the table compared.
    fn round(&mut self) {
        self.troubles.clear();
        if self.lacks_ears() {
            self.listen();
        }
        if self.port != 0 && self.is_needed() && self.wrapper.is_none() {
            self.wrap();
        }
        self.write();
        self.tell();
    }

    fn listen(&mut self) {
        match Listener::open(self.port, self.ipv6) {
            Ok(listener) => self.listener = Some(listener),
            Err(error) => self.trouble(format!(
                "direct server return: UDP port {} cannot be had: {error}; other nodes masquerade what is for this one, until \
                 it is free or all agents have another --dsr-probe-port",
                self.port
            )),
        }
    }

    fn wrap(&mut self) {
        match Wrapper::open(self.ipv6) {
            Ok(wrapper) => {
                self.wrapper = Some(wrapper);
                self.tunnels.block(None);
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                self.tunnels.block(Some(Block::NoRight));
                self.trouble(
                    "direct server return: this agent lacks CAP_NET_RAW and cannot ask other nodes whether wrapped packets get \
                     through: everything is masqueraded (deploy/daemonset-restricted.yaml gives it)"
                        .to_owned(),
                );
            }
            Err(error) => {
                self.trouble(format!("direct server return: no raw socket to ask other nodes by: {error}"));
            }
        }
    }

    /// All whose turn it is.
    fn ask(&mut self) {
        while let Some(due) = self.tunnels.due(self.now_us()) {
            let way = netlink::way(due.to.ip());
            let way = way.map_err(|error| format!("{:#}", anyhow::Error::from(error)));
            self.tunnels.routed(&due.key, way.clone());
            let Ok(way) = way else { continue };
            let Due { key, to } = due;
            self.counts.asked += 1;
            let number = self.random.hash_one(self.counts.asked);
            match self.send(&way, to, number) {
                Ok(()) => self.tunnels.asked(&key, number),
                Err(error) => {
                    self.tunnels.not_asked(&key, format!("no packet can be sent to {}: {error}", to.ip()));
                }
            }
        }
    }

    fn send(&self, way: &Way, to: SocketAddr, number: u64) -> io::Result<()> {
        let ends = self.listener.as_ref().zip(self.wrapper.as_ref());
        let (listener, wrapper) =
            ends.ok_or_else(|| io::Error::other("this agent could not hear an answer"))?;
        let asked = question(number, way.from, way.mtu);
        let packet = wrapped(way.from, listener.port(), to, &asked)?;
        wrapper.send(&packet, to.ip())
    }

    fn heard(&mut self, heard: io::Result<Heard>) {
        let heard = match heard {
            Ok(heard) => heard,
            Err(error) => {
                tracing::warn!(
                    "direct server return: the socket of probes fails and is opened anew: {error}"
                );
                self.listener = None;
                return;
            }
        };
        match Probe::read(&heard.bytes) {
            Some(Probe::Question(number)) if self.may_answer(heard.from.ip()) => {
                let answer = Probe::Answer(number).bytes();
                let sent = self.listener.as_ref().map(|listener| listener.answer(&heard, &answer));
                match sent {
                    Some(Err(error)) => tracing::debug!("no answer to the probe of {}: {error}", heard.from),
                    _ => self.counts.given += 1,
                }
            }
            Some(Probe::Question(_)) => self.counts.withheld += 1,
            Some(Probe::Answer(number)) => {
                self.counts.answered += u64::from(self.tunnels.answered(number, heard.from));
            }
            // No probe.
            None => {}
        }
    }

    fn may_answer(&mut self, from: IpAddr) -> bool {
        let now_us = self.now_us();
        let allowance = if self.known.contains(&from) { &mut self.allowance } else { &mut self.strangers };
        allowance.take(now_us)
    }

    fn write(&mut self) {
        match self.table.bring(&self.tunnels.entries()) {
            Ok(brought) => {
                self.repairs += brought.repairs;
                self.tunnels.refused(brought.refused);
            }
            Err(error) => self.trouble(format!(
                "direct server return: the ways to other nodes are not written: {:#}",
                anyhow::Error::from(error)
            )),
        }
    }

    /// One more line for `status`; the log has it once.
    fn trouble(&mut self, line: String) {
        let known = self.news.lock().unwrap_or_else(PoisonError::into_inner).warnings.contains(&line);
        if self.troubles.insert(line.clone()) && !known {
            tracing::warn!("{line}");
        }
    }

    fn tell(&mut self) {
        let standings = self.tunnels.standings();
        let is_reached = |reach: &Reach| *reach == Reach::Directly;
        let reached: BTreeSet<_> = standings
            .iter()
            .filter(|standing| is_reached(&standing.reach))
            .map(|standing| (standing.node.clone(), standing.family))
            .collect();
        log("reached directly now", reached.difference(&self.reached));
        log("reached directly no more", self.reached.difference(&reached));
        self.reached = reached;
        self.counts.missing = self.tunnels.missing();
        let mut news = self.news.lock().unwrap_or_else(PoisonError::into_inner);
        let repairs = news.repairs + std::mem::take(&mut self.repairs);
        let warnings = self.troubles.iter().cloned().collect();
        *news = News { standings, warnings, counts: self.counts, repairs };
    }
}

fn log<'a>(what: &str, nodes: impl Iterator<Item = &'a (Arc<str>, Option<Family>)>) {
    let names: Vec<String> =
        nodes.map(|(node, family)| format!("{node} ({})", family.map_or("-", Family::name))).collect();
    if let Some(first) = names.get(..names.len().min(NAMED)).filter(|first| !first.is_empty()) {
        let more = names.len() - first.len();
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        tracing::info!("{what}: {}{more}", first.join(", "));
    }
}

async fn hear(listener: Option<&Listener>) -> io::Result<Heard> {
    match listener {
        Some(listener) => listener.hear().await,
        None => std::future::pending().await,
    }
}

async fn until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

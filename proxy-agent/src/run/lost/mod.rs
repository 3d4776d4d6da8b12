//! Connections whose endpoint has left its Service without terminating are reset, where the Service says so.
//!
//! An endpoint has left when no slice of its Service names it any more (one that is not ready may come back, C-2), and the
//! Service and its port are still there. Of its life the tables know enough: a backend that is not terminating bears a flag
//! ([`backend::RESET`]), also from one agent to the next. What becomes of packets then is told in `proxy_common::lb::flow`; here
//! the silent are told, and sockets that were translated at `connect`. All of it happens on a thread, and in rounds: a packet may
//! be lost, and a connection have begun just before.

mod segments;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use proxy_common::abi::{Flow, ServiceName, Tuple, backend, flow_flags, untext};
use proxy_common::addr::{Addr, Port, Proto};

use self::segments::Segments;
use agent_core::model::{Family, ObjectName, ServicePort, World};
use agent_core::plan::{Proposal, Step};
use agent_kernel::datapath::flow::streams::{self, Streams};
use agent_kernel::datapath::flow::{Adopted, Flows, now};
use agent_kernel::datapath::store::pin::BpfRoot;
use agent_kernel::netlink::conntrack::{self, Connection};
use agent_kernel::netlink::sock_diag;

/// When it is looked for connections, from the moment an endpoint is gone.
const ROUNDS: [Duration; 3] = [Duration::ZERO, Duration::from_secs(1), Duration::from_secs(3)];
/// Connections that netfilter forgets at once.
const AT_ONCE: usize = 256;
/// By a backend's index and generation.
pub(super) type Endpoints = BTreeMap<(u32, u32), Endpoint>;

/// An endpoint that has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// It, and whose it was.
    name: String,
    end: (Addr, Port),
    /// Where its Service is asked for; a NodePort at no address.
    frontends: Vec<(Addr, Port)>,
}

impl Endpoint {
    /// Whether netfilter leads a TCP connection here, for its Service.
    fn is_reached_by(&self, connection: &Connection) -> bool {
        let Connection { asked, answered, .. } = connection;
        let asked_for = |addr: Addr| self.frontends.contains(&(addr, asked.dport));
        asked.proto == Proto::TCP
            && connection.is_rewritten()
            && (answered.src, answered.sport) == self.end
            && (asked_for(asked.dst) || asked_for(asked.dst.wildcard()))
    }
}

/// The endpoints that leave with a plan, of Services that want to know.
pub(super) fn lost(world: &World, proposal: &Proposal) -> Endpoints {
    let before = proposal.before();
    let retired = proposal.plan.steps.iter().filter_map(|step| match step {
        Step::PutBackend(index, new) if !new.is_live() => Some(*index),
        _ => None,
    });
    let lost = retired.filter_map(|index| {
        let old =
            before.backends.get(index).filter(|old| old.is_live() && old.flags & backend::RESET != 0)?;
        let owner = service_port(before.services.get(&old.service)?);
        let endpoint = (IpAddr::from(old.addr), old.port.number());
        let told = || Endpoint {
            name: format!("{}:{} of Service {}", endpoint.0, endpoint.1, owner.service),
            end: (old.addr, old.port),
            frontends: proposal.frontends_of(old.service).map(|key| (key.addr, key.port)).collect(),
        };
        world.has_left(&owner, endpoint).then(|| ((index, old.generation), told()))
    });
    lost.collect()
}

fn service_port(name: &ServiceName) -> ServicePort {
    ServicePort {
        service: ObjectName::new(untext(&name.namespace), untext(&name.name)),
        port: untext(&name.port).into(),
        proto: name.proto,
        family: if name.family == 4 { Family::V4 } else { Family::V6 },
    }
}

/// Who resets them.
#[derive(Debug)]
pub(super) struct Lost {
    root: BpfRoot,
    /// The thread; there is none before the first endpoint is lost.
    thread: Option<Sender<Endpoints>>,
}

impl Lost {
    pub(super) fn new(root: BpfRoot) -> Self {
        Self { root, thread: None }
    }

    /// Resets the connections to these endpoints, now that no new ones are led there.
    pub(super) fn reset(&mut self, endpoints: Endpoints) {
        if endpoints.is_empty() {
            return;
        }
        // It ends only in a panic; what it knew then is over.
        let Err(error) = self.thread().and_then(|thread| Ok(thread.send(endpoints)?)) else { return };
        self.thread = None;
        tracing::warn!("connections to an endpoint that has left are not reset: no thread for it: {error}");
    }

    fn thread(&mut self) -> Result<&Sender<Endpoints>> {
        if self.thread.is_none() {
            let (sender, orders) = channel();
            let worker = Worker { root: self.root.clone(), segments: None, streams: None };
            std::thread::Builder::new().name("resets".into()).spawn(move || worker.run(&orders))?;
            self.thread = Some(sender);
        }
        self.thread.as_ref().context("just started")
    }
}

struct Worker {
    root: BpfRoot,
    // Opened when they are needed first.
    segments: Option<Segments>,
    streams: Option<Streams>,
}

/// Endpoints that were lost at the same time, and what has been found of them.
struct Batch {
    endpoints: Endpoints,
    since: Instant,
    round: usize,
    /// What sockets of pods send to them, once these are among the flows.
    streams: BTreeSet<Tuple>,
    /// Sockets of the node that were closed.
    closed: usize,
    /// Flows whose client has been told.
    reset: usize,
}

impl Batch {
    fn due(&self) -> Option<Instant> {
        ROUNDS.get(self.round).map(|after| self.since + *after)
    }
}

impl Worker {
    fn run(mut self, orders: &Receiver<Endpoints>) {
        let mut batches: Vec<Batch> = Vec::new();
        loop {
            let next = batches.iter().filter_map(Batch::due).min();
            let wait = next.map_or(Duration::MAX, |due| due.saturating_duration_since(Instant::now()));
            match orders.recv_timeout(wait) {
                Ok(endpoints) => {
                    batches.push(Batch {
                        endpoints,
                        since: Instant::now(),
                        round: 0,
                        streams: BTreeSet::new(),
                        closed: 0,
                        reset: 0,
                    });
                }
                Err(RecvTimeoutError::Timeout) => {}
                // The agent leaves.
                Err(RecvTimeoutError::Disconnected) => return,
            }
            for batch in &mut batches {
                if batch.due().is_some_and(|due| due <= Instant::now()) {
                    self.round(batch);
                    batch.round += 1;
                }
            }
            batches.retain(|batch| {
                let goes_on = batch.due().is_some();
                if !goes_on {
                    batch.log();
                }
                goes_on
            });
        }
    }

    /// One round. What fails does not keep the rest from being done, and is tried again in the next one.
    fn round(&mut self, batch: &mut Batch) {
        // Each time: the tables may have become larger since, and these are no longer those of the hooks.
        let done = match Flows::open(&self.root) {
            Ok(flows) => vec![
                self.sockets(batch, &flows).context("sockets that were translated at connect are not closed"),
                of_node(batch).context("connections of this node that netfilter translates are not closed"),
                self.flows(batch, &flows).context("connections that pass this node are not reset"),
            ],
            Err(error) => vec![Err(error).context("its connections are not reset")],
        };
        for error in done.into_iter().filter_map(Result::err) {
            tracing::warn!("an endpoint has left: {error:#}");
        }
    }

    /// Flows: from now on whoever sends is reset. Both ends of each are told.
    fn flows(&mut self, batch: &mut Batch, flows: &Flows) -> Result<()> {
        let is_lost = |backend, generation| batch.endpoints.contains_key(&(backend, generation));
        let mut lost = Vec::new();
        for id in flows.lose(is_lost)? {
            lost.extend(flows.lost(id)?);
        }
        // What fails of these keeps nobody else from being told.
        let forgotten = forget(&lost);
        let told = self
            .silent(&lost)
            .context("who is silent is not told, only who sends (CAP_NET_RAW is needed)")?;
        forgotten
            .context("who is silent is not told where netfilter translates (CAP_NET_ADMIN is needed)")?;
        batch.reset = batch.reset.max(told);
        Ok(())
    }

    /// Sockets of the node are closed; connections of pods' sockets are marked like flows.
    fn sockets(&mut self, batch: &mut Batch, flows: &Flows) -> Result<()> {
        let streams = open(&mut self.streams, || Ok(Streams::open(&self.root)?))?;
        for stream in streams.connected()? {
            let entry = &stream.entry;
            let lost = batch.endpoints.contains_key(&(entry.backend, entry.generation));
            if !lost || batch.streams.contains(&stream.tuple()) {
                continue;
            }
            if stream.close()? {
                batch.closed += 1;
                continue;
            }
            let backend = [0, entry.backend, entry.generation];
            let flow = Flow::lost(&stream.tuple(), backend, !stream.is_connecting(), now()?);
            if let Adopted::Done(_) = flows.adopt(&flow)? {
                batch.streams.insert(stream.tuple());
            }
        }
        Ok(())
    }

    /// How many clients have been told.
    fn silent(&mut self, lost: &[Flow]) -> Result<usize> {
        let mut told = 0;
        for flow in lost {
            if !flow.is_answered() {
                // Who tries to connect sends.
                told += 1;
                continue;
            }
            let segments = open(&mut self.segments, || Ok(Segments::open()?))?;
            // One that has no way is no reason to leave out the others.
            let end = |End { tuple, acked, other }: &End| {
                let sent = segments.end(tuple, *acked, *other);
                if let Err(error) = &sent {
                    tracing::debug!("no segment from {} to {}: {error}", tuple.src, tuple.dst);
                }
                sent.is_ok()
            };
            let (client, endpoint) = ends(flow);
            told += usize::from(end(&client));
            if let Some(endpoint) = endpoint {
                end(&endpoint);
            }
        }
        Ok(told)
    }
}

/// Somebody who is to be told.
#[derive(Debug, PartialEq, Eq)]
struct End {
    /// From the other end, to this one.
    tuple: Tuple,
    /// What this one has last acknowledged, and what the other one has.
    acked: u32,
    other: u32,
}

/// The client, and the endpoint: not that of a flow to another node, which hears of it there and has answers of which
/// nothing is known here.
fn ends(flow: &Flow) -> (End, Option<End>) {
    let [by_client, by_endpoint] = flow.acked;
    let (to_client, to_endpoint) = flow.between_ends();
    let endpoint = End { tuple: to_endpoint, acked: by_endpoint, other: by_client };
    (End { tuple: to_client, acked: by_client, other: by_endpoint }, (!flow.is_direct()).then_some(endpoint))
}

/// Sockets of the node are closed whose connections netfilter translates: those that a kube-proxy's rules have begun stay with it
/// until they end.
fn of_node(batch: &mut Batch) -> Result<()> {
    let mut found = Vec::new();
    conntrack::connections(|connection| {
        if batch.endpoints.values().any(|endpoint| endpoint.is_reached_by(connection)) {
            found.push(connection.asked);
        }
    })
    .context("reading the kernel's connection tracking (CAP_NET_ADMIN)")?;
    for asked in found {
        let end = |addr: Addr, port: Port| SocketAddr::new(addr.into(), port.number());
        let closed =
            streams::close(end(asked.src, asked.sport), end(asked.dst, asked.dport), sock_diag::ANY_DEVICE)?;
        batch.closed += usize::from(closed);
    }
    Ok(())
}

/// Has netfilter forget the connections among these that it has translated: it would take what is told to an end for another
/// connection between the same ports, and give it a port of its own.
fn forget(lost: &[Flow]) -> std::io::Result<()> {
    let adopted = lost.iter().filter(|flow| flow.flags & flow_flags::ADOPTED != 0);
    let asked: Vec<Tuple> = adopted.map(|flow| flow.between_ends().0.reversed()).collect();
    for some in asked.chunks(AT_ONCE) {
        conntrack::forget(some.iter())?;
    }
    Ok(())
}

fn open<T>(place: &mut Option<T>, open: impl FnOnce() -> Result<T>) -> Result<&mut T> {
    let opened = match place.take() {
        Some(opened) => opened,
        None => open()?,
    };
    Ok(place.insert(opened))
}

impl Batch {
    fn log(&self) {
        let count = self.reset + self.closed;
        let names: Vec<&str> = self.endpoints.values().map(|endpoint| endpoint.name.as_str()).collect();
        tracing::info!("{} left without terminating: {count} connections reset", names.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(src: [u8; 4], sport: u16, dst: [u8; 4], dport: u16) -> Tuple {
        let addr = |octets| IpAddr::from(octets).into();
        Tuple::new(addr(src), Port::new(sport), addr(dst), Port::new(dport), Proto::TCP)
    }

    #[test]
    fn of_a_flow_to_another_node_the_client_alone_is_told() {
        let (client, vip, node) = ([192, 0, 2, 9], [203, 0, 113, 7], [10, 0, 0, 2]);
        let mut flow = Flow { legs: 2, acked: [100, 200], ..Flow::EMPTY };
        for (pair, end) in [(0, tuple(client, 4000, vip, 80)), (1, tuple(client, 4000, node, 8080))] {
            flow.near[pair] = u8::try_from(end.write_pair(&mut flow.pairs[pair])).expect("one of two ends");
        }
        let told = End { tuple: tuple(vip, 80, client, 4000), acked: 100, other: 200 };
        let endpoint = End { tuple: tuple(client, 4000, node, 8080), acked: 200, other: 100 };
        assert_eq!(ends(&flow), (told, Some(endpoint)));
        // The same with a node in the endpoint's place.
        (flow.flags, flow.legs, flow.acked) = (flow_flags::DIRECT, 1, [100, 0]);
        let told = End { tuple: tuple(vip, 80, client, 4000), acked: 100, other: 0 };
        assert_eq!(ends(&flow), (told, None));
    }
}

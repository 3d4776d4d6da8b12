//! The flows that packets belong to: whole ones, as a connection leaves them in the tables, of clients that have been
//! answered.

use std::net::SocketAddr;

use anyhow::Result;
use aya::Ebpf;
use proxy_common::abi::{Flow, FlowId, Role, State, Tuple, ask, capacity, flow_flags, maps};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::testing::SECRET;
use proxy_common::wire::End;

use super::ideal::Ideal;
use crate::object::{array, hash};
use crate::tables::{self, CLIENTS, MANY, NODES, endpoint, place, service};

/// Records for first packets; those of established flows stand behind them.
pub(super) const FRESH: u32 = 20 * ask::MOST * 2;

/// Numbers of flows that packets go round in.
pub(super) const RINGS: [u32; 2] = [1, MANY];

/// Flows of a kind.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    pub(super) v4: bool,
    pub(super) proto: Proto,
    pub(super) masqueraded: bool,
}

pub(super) const TCP4: Kind = Kind { name: "TCP4", v4: true, proto: Proto::TCP, masqueraded: false };

pub(super) static KINDS: [Kind; 5] = [
    TCP4,
    Kind { name: "UDP4", proto: Proto::UDP, ..TCP4 },
    Kind { name: "TCP6", v4: false, ..TCP4 },
    Kind { name: "UDP6", v4: false, proto: Proto::UDP, ..TCP4 },
    Kind { name: "masqueraded TCP4", masqueraded: true, ..TCP4 },
];

/// The ends of a flow.
pub(super) struct Ends {
    pub(super) client: SocketAddr,
    pub(super) service: SocketAddr,
    pub(super) endpoint: SocketAddr,
    /// Under which the client is masqueraded.
    pub(super) node: SocketAddr,
}

impl Kind {
    /// Flow `n` of a ring: each has a Service of its own, and another port of the client than those of other rings.
    pub(super) fn ends(&self, flows: u32, n: u32) -> Ends {
        let port = 2 * u16::from(self.masqueraded) + u16::from(flows != 1);
        Ends {
            client: (place(self.v4, CLIENTS, 267), 40_000 + port).into(),
            service: service(self.v4, n),
            endpoint: endpoint(self.v4, n),
            node: (place(self.v4, NODES, 1), 61_000 + port).into(),
        }
    }

    /// The record of a flow.
    fn flow(&self, id: FlowId, flows: u32, n: u32) -> Flow {
        let ends = self.ends(flows, n);
        let asked = tuple(ends.client, ends.service, self.proto);
        let source = self.masqueraded.then(|| end(ends.node));
        let ids = [tables::service_id(n), tables::backend_index(self.v4, n), 1];
        let mut flow = Flow::adopted(&asked, end(ends.endpoint), source, ids, (true, true), 1);
        (flow.id, flow.state) = (id, State::LIVE);
        flow.flags &= !flow_flags::ADOPTED;
        // Nobody ever looks after its legs.
        flow.checked = i64::MAX as u64;
        flow
    }
}

fn end(at: SocketAddr) -> (Addr, Port) {
    (at.ip().into(), Port::new(at.port()))
}

fn tuple(from: SocketAddr, to: SocketAddr, proto: Proto) -> Tuple {
    let ((src, sport), (dst, dport)) = (end(from), end(to));
    Tuple::new(src, sport, dst, dport, proto)
}

/// How many flows there are.
pub(super) fn count() -> u32 {
    KINDS.len() as u32 * RINGS.iter().sum::<u32>()
}

/// Writes all flows to the tables, and those of TCP over IPv4 that are not masqueraded to the floor's, too. In place of the
/// others' legs the floor gets as many entries that nobody asks for: what a look-up costs depends on how many there are.
pub(super) fn fill(ebpf: &mut Ebpf, ideal: &Ideal) -> Result<()> {
    array(ebpf, maps::SECRET)?.set(0, SECRET, 0)?;
    let all = || {
        let rings = KINDS.iter().flat_map(|kind| RINGS.map(|flows| (kind, flows)));
        rings.flat_map(|(kind, flows)| (0..flows).map(move |n| (kind, flows, n)))
    };
    let flow = |index: u32, kind: &Kind, flows, n| kind.flow(FlowId(index.into()).next(), flows, n);
    let mut records = array(ebpf, maps::RECORDS)?;
    for (index, (kind, flows, n)) in (FRESH..).zip(all()) {
        records.set(index, flow(index, kind, flows, n), 0)?;
    }
    let mut legs = hash(ebpf, maps::FLOWS)?;
    let mut learnt = 0;
    let mut filter = vec![0_u64; capacity::FLOW_FILTER];
    for (index, (kind, flows, n)) in (FRESH..).zip(all()) {
        let flow = flow(index, kind, flows, n);
        for role in [Role::OUTER, Role::MIDDLE, Role::INNER].into_iter().filter(|role| flow.has(*role)) {
            let key = flow.pairs[role.index()].key(|| Some(&SECRET));
            legs.insert(key, flow.leg(role).sealed(&key), 0)?;
            if kind.name != TCP4.name {
                learnt += 1;
                ideal.fill(learnt)?;
            }
            let place = key.place(&SECRET);
            filter[place.word as usize] += place.one() as u64;
        }
    }
    let mut words = array(ebpf, maps::FLOW_FILTER)?;
    for (index, word) in (0..).zip(filter) {
        words.set(index, word, 0)?;
    }
    for (flows, n) in RINGS.into_iter().flat_map(|flows| (0..flows).map(move |n| (flows, n))) {
        let ends = TCP4.ends(flows, n);
        for (from, to, becomes) in
            [(ends.client, ends.service, ends.endpoint), (ends.endpoint, ends.client, ends.service)]
        {
            let (addr, port) = end(becomes);
            ideal.learn(&tuple(from, to, Proto::TCP), &addr, port)?;
        }
    }
    Ok(())
}

/// Which way a packet of a flow goes, and at which hook it is seen.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From the client to the Service, entering.
    Asks,
    /// From the endpoint to the client, leaving.
    Answers,
    /// From the client to the endpoint, leaving under the node's address.
    Leaves,
    /// From the endpoint to the node's address, entering.
    Returns,
}

impl Way {
    pub(super) const ALL: [Self; 4] = [Self::Asks, Self::Answers, Self::Leaves, Self::Returns];

    /// Whether only packets of masqueraded flows go this way.
    pub(super) fn is_masqueraded(self) -> bool {
        matches!(self, Self::Leaves | Self::Returns)
    }

    /// Which end is rewritten; the destination of what enters, the source of what leaves.
    pub(super) fn end(self) -> End {
        match self {
            Self::Asks | Self::Returns => End::Dst,
            Self::Answers | Self::Leaves => End::Src,
        }
    }

    /// At which end Service or endpoint stands, which flows differ in.
    pub(super) fn turns(self) -> End {
        match self {
            Self::Asks | Self::Leaves => End::Dst,
            Self::Answers | Self::Returns => End::Src,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Asks => "entering, client to Service",
            Self::Answers => "leaving, endpoint to client",
            Self::Leaves => "leaving, client to endpoint",
            Self::Returns => "entering, endpoint to node",
        }
    }

    /// Source and destination.
    pub(super) fn of(self, ends: &Ends) -> (SocketAddr, SocketAddr) {
        match self {
            Self::Asks => (ends.client, ends.service),
            Self::Answers => (ends.endpoint, ends.client),
            Self::Leaves => (ends.client, ends.endpoint),
            Self::Returns => (ends.endpoint, ends.node),
        }
    }
}

//! The proxy without its kernel: what was heard becomes tables, and packets and socket calls are decided
//! over them by the functions that the programs are made of.

use std::collections::BTreeSet;
use std::net::IpAddr;

use proxy_agent::datapath::Datapath as _;
use proxy_agent::datapath::memory::Memory;
use proxy_agent::model::World;
use proxy_agent::plan::{Capacity, Planner};
use proxy_agent::source::{Change, Kind};
use proxy_common::abi::{FlowKey, Hook};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::lb::socket::{self, Answer, Call};
use proxy_common::testing::{ByteFrame, MemoryTables, Outcome, frame, run, tuple, verify};

use super::facts::Facts;
use super::objects::{BRIDGE, UPLINK, links, node_change, service_change, settings, slice_change};
use super::oracle::Target;

const SYN: u8 = 1 << 1;

/// What was observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Observed {
    /// Left alone.
    Pass,
    /// Refused.
    Refuse,
    /// Dropped.
    Drop,
    /// Sent to an endpoint; with the new source, if it has one.
    Forward(Target, Option<IpAddr>),
}

/// The agent's straight line from changes to tables, and the tables.
pub(crate) struct System {
    world: World,
    planner: Option<Planner>,
    memory: Memory,
    tables: MemoryTables,
    now_ms: u64,
}

impl System {
    /// A node that has heard everything once.
    pub(crate) fn new(facts: &Facts) -> Self {
        let mut world = World::new(settings(facts));
        world.hear(Change::Links(links()));
        world.hear(node_change(facts));
        let slices = facts.slices.keys().map(|n| slice_change(facts, *n));
        for change in slices.chain(facts.services.keys().map(|n| service_change(facts, *n))) {
            world.hear(change);
        }
        for kind in [Kind::Service, Kind::Slice, Kind::Node] {
            world.hear(Change::Synced(kind));
        }
        assert!(world.synced(), "a world that has heard everything is synced");
        let mut memory = Memory::new(Capacity::default());
        let desired = world.take_desired();
        let pass = Planner::new(&memory.actual, Capacity::default(), 0).full(&desired, 0);
        memory.apply(&pass.plan.steps).expect("room in the tables");
        let planner = Some(pass.applied(0));
        let mut system = Self { world, planner, memory, tables: MemoryTables::default(), now_ms: 0 };
        system.load();
        system
    }

    /// Hears what has changed and writes it.
    pub(crate) fn hear(&mut self, changes: Vec<Change>) {
        for change in changes {
            self.world.hear(change);
        }
        self.now_ms += 5_000;
        let dirty = self.world.take_dirty();
        let planner = self.planner.take().expect("a planner is always put back");
        let pass = planner.dirty(&dirty, Some(&self.world.node()), self.now_ms);
        self.memory.apply(&pass.plan.steps).expect("room in the tables");
        self.planner = Some(pass.applied(self.now_ms));
        self.load();
    }

    /// Gives the tables to the programs; flows end, affinity stays.
    fn load(&mut self) {
        let actual = &self.memory.actual;
        self.tables.config = Some(actual.config);
        self.tables.addresses = actual.addresses.clone().into_iter().collect();
        self.tables.frontends = actual.frontends.clone().into_iter().collect();
        self.tables.slots = actual.slots.clone().into_iter().collect();
        self.tables.backends = actual.backends.clone().into_iter().collect();
        self.tables.sources = actual.sources.iter().copied().collect();
        self.tables.ifaces = actual.ifaces.clone().into_iter().collect();
        self.tables.flows.borrow_mut().clear();
    }

    /// The tables for a person.
    pub(crate) fn dump(&self) -> String {
        self.memory.actual.dump()
    }

    /// The first packet of a flow: in at one interface, out at the one the endpoint is behind.
    pub(crate) fn packet(
        &self,
        from: Target,
        to: Target,
        proto: Proto,
        here: &BTreeSet<IpAddr>,
    ) -> Result<Observed, String> {
        let key = FlowKey {
            src: from.0.into(),
            dst: to.0.into(),
            sport: Port::new(from.1),
            dport: Port::new(to.1),
            proto,
            hook: Hook::INGRESS,
            pad: 0,
        };
        let sent = frame(&key, SYN, b"hello", false);
        let mut frame = sent.clone();
        match run(&self.tables, &sent, Hook::INGRESS, UPLINK) {
            Outcome::Passed => {}
            Outcome::Rewritten(out) => frame = out,
            Outcome::Refused(answer) => return refusal(&answer, from, to),
            Outcome::Dropped => return Ok(Observed::Drop),
            Outcome::Waits => return Err("a whole packet was made to wait".into()),
        }
        let inside = read(&frame)?;
        if inside.0 != from {
            return Err(format!("the source became {:?} at ingress", inside.0));
        }
        let out_of = if here.contains(&inside.1.0) { BRIDGE } else { UPLINK };
        let left = match run(&self.tables, &frame, Hook::EGRESS, out_of) {
            Outcome::Passed => frame,
            Outcome::Rewritten(out) => out,
            other => return Err(format!("at egress: {other:?}")),
        };
        let after = read(&left)?;
        if after.1 != inside.1 {
            return Err(format!("the destination became {:?} at egress", after.1));
        }
        let source = Some(after.0.0).filter(|_| after.0 != from);
        if after.1 == to && source.is_none() {
            let same = left == sent;
            return if same { Ok(Observed::Pass) } else { Err("changed although it was passed".into()) };
        }
        Ok(Observed::Forward(after.1, source))
    }

    /// A socket's call.
    pub(crate) fn call(&self, to: Target, proto: Proto, netns: u64, connect: bool) -> Observed {
        let call = Call { dst: to.0.into(), dport: Port::new(to.1), proto, netns, connect };
        match socket::decide(&self.tables, &call) {
            Answer::Leave => Observed::Pass,
            Answer::Refuse => Observed::Refuse,
            Answer::Deny => Observed::Drop,
            Answer::Use(entry) => Observed::Forward(target(entry.addr, entry.port), None),
        }
    }
}

fn target(addr: Addr, port: Port) -> Target {
    (IpAddr::from(addr), port.number())
}

/// Source and destination of a packet whose checksums are right.
fn read(frame: &ByteFrame) -> Result<(Target, Target), String> {
    verify(frame).map_err(|what| format!("wrong {what}"))?;
    let packet = tuple(frame, Hook::INGRESS).ok_or("does not parse")?;
    Ok((target(packet.key.src, packet.key.sport), target(packet.key.dst, packet.key.dport)))
}

/// A refusal goes back to the client from the address it named (D-18).
fn refusal(answer: &ByteFrame, from: Target, to: Target) -> Result<Observed, String> {
    verify(answer).map_err(|what| format!("refusal with wrong {what}"))?;
    let mut at = answer.bytes[14..].iter().copied();
    let (skip, len) = if from.0.is_ipv4() { (12, 4) } else { (8, 16) };
    let bytes: Vec<u8> = at.by_ref().skip(skip).take(2 * len).collect();
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    if bytes == [octets(to.0), octets(from.0)].concat() {
        Ok(Observed::Refuse)
    } else {
        Err(format!("refusal between {bytes:?}"))
    }
}

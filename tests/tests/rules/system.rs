//! The proxy between what it observes and what it does: the agent's straight line from changes to tables, and packets
//! and socket calls decided over them, on the host or in this kernel.

use std::collections::BTreeSet;
use std::net::IpAddr;

use agent_core::model::{Change, Kind};
use agent_core::model::{Settings, World};
use agent_core::plan::{Actual, Capacity, Planner, Step, lint};
use proxy_common::abi::{Hook, Tuple};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::testing::{ByteFrame, Outcome, segment, tuple, verify};

use super::facts::{FAMILIES, Facts, OWN_NODE, endpoint_ip, endpoint_node, own_addresses};
use super::objects::{
    BRIDGE, UPLINK, links_change, node_change, ranges_change, service_change, settings, slice_change,
};
use super::oracle::Target;

/// TCP flags of a first packet, its answer, and those that follow.
pub(crate) const SYN: u8 = 1 << 1;
pub(crate) const SYN_ACK: u8 = SYN | ACK;
pub(crate) const ACK: u8 = 1 << 4;

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
    Forward(Target, Option<Target>),
}

/// Whose socket calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Caller {
    /// A process of the node.
    Host,
    /// A process of a pod.
    Pod,
}

/// Where the tables lie, and what decides over them.
pub(crate) trait Programs {
    /// Empty tables.
    fn empty(&mut self);
    /// How much they hold.
    fn capacity(&self) -> Capacity;
    /// Cookie of the node's network namespace.
    fn host_netns(&self) -> u64;
    /// Reads the configuration tables.
    fn read(&mut self) -> Actual;
    /// Writes to them.
    fn apply(&mut self, steps: &[Step]);
    /// One packet at one hook.
    fn run(&mut self, frame: &ByteFrame, hook: Hook, ifindex: u32) -> Outcome;
    /// One call of a socket that remembers nothing; `None` where no socket of the protocol is made.
    fn call(&mut self, to: Target, proto: Proto, who: Caller, connect: bool) -> Option<Observed>;
    /// A UDP socket that is kept and sends without connecting: its number.
    fn keep_socket(&mut self, who: Caller, six: bool) -> usize;
    /// A datagram of a kept socket.
    fn send(&mut self, socket: usize, to: Target) -> Observed;
    /// Ends flows that nobody has answered.
    fn forget_half_open(&mut self);
    /// Lets time pass, as far as affinity is concerned.
    fn rest(&mut self, secs: u32);
}

/// The agent and its tables.
pub(crate) struct System<'a, P> {
    world: World,
    planner: Option<Planner>,
    pub(crate) programs: &'a mut P,
    /// Addresses behind the bridge.
    here: BTreeSet<IpAddr>,
    /// Addresses this node ever had.
    node: BTreeSet<IpAddr>,
    now_ms: u64,
}

/// Everything there is to observe.
fn everything(facts: &Facts) -> Vec<Change> {
    let slices = facts.slices.keys().map(|n| slice_change(facts, *n));
    let services = facts.services.keys().map(|n| service_change(facts, *n));
    let node = [links_change(facts), node_change(facts), ranges_change(facts)];
    node.into_iter().chain(slices).chain(services).collect()
}

/// A world to which everything has been applied once.
fn world(settings: Settings, changes: Vec<Change>) -> World {
    let mut world = World::new(settings);
    for change in changes {
        world.apply(change);
    }
    for kind in [Kind::Service, Kind::Slice, Kind::Node] {
        world.apply(Change::Synced(kind));
    }
    assert!(world.synced(), "a world to which everything has been applied is synced");
    world
}

impl<'a, P: Programs> System<'a, P> {
    /// A node whose agent starts over empty tables.
    pub(crate) fn new(programs: &'a mut P, facts: &Facts) -> Self {
        let settings = settings(facts, programs.host_netns());
        Self::with_changes(programs, settings, everything(facts))
    }

    /// The same with changes of one's own.
    pub(crate) fn with_changes(programs: &'a mut P, settings: Settings, changes: Vec<Change>) -> Self {
        programs.empty();
        let pods = (0..9).filter(|n| endpoint_node(*n) == Some(OWN_NODE));
        let mut system = Self {
            world: world(settings, changes),
            planner: None,
            here: pods.flat_map(|n| FAMILIES.map(|six| endpoint_ip(n, six))).collect(),
            node: FAMILIES.into_iter().flat_map(own_addresses).collect(),
            programs,
            now_ms: 0,
        };
        system.start();
        system
    }

    /// The first pass of an agent; how much it writes.
    fn start(&mut self) -> usize {
        let desired = self.world.take_desired();
        let actual = self.programs.read();
        let pass = Planner::new(&actual, self.programs.capacity()).full(&desired, self.now_ms);
        assert_eq!(pass.plan.warnings, [""; 0], "room in the tables");
        self.programs.apply(&pass.plan.steps);
        let writes = pass.plan.steps.len();
        self.planner = Some(pass.applied(self.now_ms).0);
        writes
    }

    /// Applies what has changed, and writes what follows.
    pub(crate) fn apply(&mut self, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            self.world.apply(change);
        }
        self.now_ms += 5_000;
        let dirty = self.world.take_dirty();
        let planner = self.planner.take().expect("a planner is always put back");
        let pass = planner.dirty(&dirty, Some(&self.world.node()), self.now_ms);
        assert_eq!(pass.plan.warnings, [""; 0], "room in the tables");
        self.programs.apply(&pass.plan.steps);
        self.planner = Some(pass.applied(self.now_ms).0);
        self.programs.forget_half_open();
    }

    /// Another agent takes over, which observes the same. Y-22, A-14: it finds nothing to write.
    pub(crate) fn restart(&mut self, facts: &Facts) -> Result<(), String> {
        self.world = world(settings(facts, self.programs.host_netns()), everything(facts));
        self.now_ms += 5_000;
        match self.start() {
            0 => Ok(()),
            n => Err(format!("a restart wrote {n} times")),
        }
    }

    /// Lets time pass.
    pub(crate) fn rest(&mut self, secs: u32) {
        self.now_ms += u64::from(secs) * 1_000;
        self.programs.rest(secs);
    }

    /// What is in the tables is sound.
    pub(crate) fn lint(&mut self) -> Result<(), String> {
        let found = lint(&self.programs.read());
        if found.is_empty() { Ok(()) } else { Err(format!("{found:?}")) }
    }

    /// The tables for a person.
    pub(crate) fn dump(&mut self) -> String {
        self.programs.read().dump()
    }

    /// A packet of a client: in at the interface the client is behind, out at the endpoint's.
    pub(crate) fn packet(
        &mut self,
        from: Target,
        to: Target,
        proto: Proto,
        flags: u8,
    ) -> Result<Observed, String> {
        let sent = packet(from, to, proto, flags, if flags == SYN { [1_000, 0] } else { [1_001, 5_001] });
        let mut frame = sent.clone();
        match self.programs.run(&sent, Hook::INGRESS, self.way_to(from.0)) {
            Outcome::Passed => {}
            Outcome::Rewritten(out) => frame = out,
            Outcome::Rejected(answer) => return rejection(&answer, from, to),
            Outcome::Wrapped(_) => return Err("it was wrapped, though no Service asks for that".into()),
            Outcome::Dropped => return Ok(Observed::Drop),
            Outcome::Waits => return Err("a whole packet was made to wait".into()),
        }
        let inside = read(&frame)?;
        if inside.0 != from {
            return Err(format!("the source became {:?} at ingress", inside.0));
        }
        let left = match self.programs.run(&frame, Hook::EGRESS, self.way_to(inside.1.0)) {
            Outcome::Passed => frame,
            Outcome::Rewritten(out) => out,
            other => return Err(format!("at egress: {other:?}")),
        };
        let after = read(&left)?;
        if after.1 != inside.1 {
            return Err(format!("the destination became {:?} at egress", after.1));
        }
        let source = Some(after.0).filter(|_| after.0 != from);
        if after.1 == to && source.is_none() {
            let same = left == sent;
            return if same { Ok(Observed::Pass) } else { Err("changed although it was passed".into()) };
        }
        Ok(Observed::Forward(after.1, source))
    }

    /// An endpoint's answer to a client it sees as `seen`: it has to arrive from the Service (D-1).
    pub(crate) fn answer(
        &mut self,
        endpoint: Target,
        seen: Target,
        (client, service): (Target, Target),
        proto: Proto,
        flags: u8,
    ) -> Result<(), String> {
        let numbers = if flags == SYN_ACK { [5_000, 1_001] } else { [5_001, 1_001] };
        let mut frame = packet(endpoint, seen, proto, flags, numbers);
        // A process of the node answers from inside.
        if !self.node.contains(&endpoint.0) || seen != client {
            match self.programs.run(&frame, Hook::INGRESS, self.way_to(endpoint.0)) {
                Outcome::Passed => {}
                Outcome::Rewritten(out) => frame = out,
                other => return Err(format!("the answer at ingress: {other:?}")),
            }
        }
        match self.programs.run(&frame, Hook::EGRESS, self.way_to(client.0)) {
            Outcome::Passed => {}
            Outcome::Rewritten(out) => frame = out,
            other => return Err(format!("the answer at egress: {other:?}")),
        }
        let arrived = read(&frame)?;
        if arrived == (service, client) { Ok(()) } else { Err(format!("the answer arrives as {arrived:?}")) }
    }

    /// A call of a socket.
    pub(crate) fn call(&mut self, to: Target, proto: Proto, who: Caller, connect: bool) -> Option<Observed> {
        self.programs.call(to, proto, who, connect)
    }

    /// A UDP socket that is kept and sends without connecting: its number.
    pub(crate) fn keep_socket(&mut self, who: Caller, six: bool) -> usize {
        self.programs.keep_socket(who, six)
    }

    /// A datagram of a kept socket.
    pub(crate) fn send(&mut self, socket: usize, to: Target) -> Observed {
        self.programs.send(socket, to)
    }

    fn way_to(&self, addr: IpAddr) -> u32 {
        if self.here.contains(&addr) { BRIDGE } else { UPLINK }
    }
}

/// `numbers` are what the sender says it sends and has got (TCP).
fn packet(from: Target, to: Target, proto: Proto, flags: u8, numbers: [u32; 2]) -> ByteFrame {
    let tuple = Tuple::new(from.0.into(), Port::new(from.1), to.0.into(), Port::new(to.1), proto);
    segment(&tuple, flags, numbers, b"hello", false)
}

/// As tests name it.
pub(crate) fn target(addr: Addr, port: Port) -> Target {
    (IpAddr::from(addr), port.number())
}

/// Source and destination of a packet whose checksums are right.
fn read(frame: &ByteFrame) -> Result<(Target, Target), String> {
    verify(frame).map_err(|what| format!("wrong {what}"))?;
    let packet = tuple(frame).ok_or("does not parse")?;
    Ok((target(packet.tuple.src, packet.tuple.sport), target(packet.tuple.dst, packet.tuple.dport)))
}

/// A rejection goes back to the client from the address it named (D-18).
fn rejection(answer: &ByteFrame, from: Target, to: Target) -> Result<Observed, String> {
    verify(answer).map_err(|what| format!("rejection with wrong {what}"))?;
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
        Err(format!("rejection between {bytes:?}"))
    }
}

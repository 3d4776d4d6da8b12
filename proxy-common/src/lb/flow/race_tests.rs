//! Several processors at once over small tables, drawn at random: whatever one of them does between two steps of
//! another, a flow is there as a whole or not at all, and nobody gets an answer that he has not asked for.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::vec::Vec;

use crate::abi::{
    Affinity, AffinityKey, Backend, Config, Flow, FlowId, Fragment, FragmentKey, Frontend, FrontendKey, Hook,
    Iface, Key, Leg, Notes, Pair, PortRange, Reason, Role, SourceKey, State, Timeouts, Tunnel, TunnelKey,
    Tuple, frontend,
};
use crate::addr::{Addr, Port, Proto};
use crate::lb::tests::{ETH, Node, addr, key};
use crate::lb::{Inserted, Ring, Stat, Subprograms, Tables};
use crate::testing::{ByteFrame, MemoryTables, Outcome, run, segment, tuple, verify};
use crate::wire::Packet;

const NODE: &str = "192.168.10.1";
const CLIENTS: [&str; 4] = ["198.51.100.9", "198.51.100.10", "10.244.1.5", "10.244.1.6"];
const PORTS: [u16; 3] = [40_000, 40_001, 8080];
const VIPS: [(&str, u16); 5] =
    [("203.0.113.1", 80), ("203.0.113.2", 80), ("10.96.0.1", 80), (NODE, 30_200), ("192.168.10.2", 8080)];
const ENDPOINTS: [(&str, u16); 2] = [("10.244.2.7", 8080), ("10.244.2.8", 8080)];
const HERE: (&str, u16) = ("+10.244.1.5", 8080);
const SECOND: u64 = 1_000_000_000;

/// What the ends of a TCP connection have said: first numbers of client and endpoint, and whether each is
/// known to the other.
#[derive(Clone, Copy, Default)]
struct Talk {
    client: u32,
    endpoint: u32,
    answered: bool,
}

/// The tables, and the ends that talk over them.
struct World {
    tables: MemoryTables,
    random: Cell<u64>,
    /// Whether a record is held: then nobody else comes between.
    held: Cell<bool>,
    /// How many processors are at work inside of one another.
    depth: Cell<u32>,
    /// Of a thousand steps so many are followed by something on another processor.
    chance: Cell<u64>,
    /// How often that has happened.
    meetings: Cell<u64>,
    /// Who has asked: the question as the endpoint has received it, and as its clients have sent it.
    asked: RefCell<HashMap<Tuple, HashSet<Tuple>>>,
    /// Who has asked: the endpoint that a question was for, and the question.
    meant: RefCell<HashSet<(Addr, Port, Tuple)>>,
    /// What was received, in order.
    received: RefCell<Vec<Tuple>>,
    /// Answers that have been translated: to what was received, and as they reached a client.
    replies: RefCell<Vec<(Tuple, Tuple)>>,
    talks: RefCell<HashMap<Tuple, Talk>>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut node = Node::new();
        let config = node.tables.config.take().expect("settings");
        let few = PortRange { first: 2000, count: 7 };
        node.tables.config = Some(config.with_snat_ports(&[few]));
        let [one, two] = ENDPOINTS;
        for proto in [Proto::TCP, Proto::UDP] {
            node.service(VIPS[0], proto, 0, &[one, two]);
            node.service(VIPS[1], proto, 0, &[one, two]);
            node.service(VIPS[2], proto, frontend::INTERNAL, &[one, two, HERE]);
            node.service(("0.0.0.0", 30_200), proto, frontend::NODE_PORT, &[one, HERE]);
            node.service(VIPS[4], proto, 0, &[VIPS[4]]);
        }
        let mut tables = std::mem::take(&mut node.tables);
        // So few that records are used again at once, or so many that there is always one.
        tables.max_records = Some(if seed.is_multiple_of(3) { 1 + 5 } else { 1 + 24 });
        tables.max_flows = Some(50);
        tables.places = Some(5);
        if seed.is_multiple_of(2) {
            let all = tables.max_records.unwrap_or_default();
            tables.records.borrow_mut().resize(all, Flow::EMPTY);
        }
        Self {
            tables,
            random: Cell::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            held: Cell::new(false),
            depth: Cell::new(0),
            chance: Cell::new(0),
            meetings: Cell::new(0),
            asked: RefCell::default(),
            meant: RefCell::default(),
            received: RefCell::default(),
            replies: RefCell::default(),
            talks: RefCell::default(),
        }
    }

    /// A number below `n`.
    fn below(&self, n: u64) -> u64 {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.set(x);
        (x >> 11) % n
    }

    fn any<T: Copy>(&self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    fn wait(&self, time: u64) {
        self.tables.now.set(self.tables.now.get() + time);
    }

    /// Between two steps of one processor another one does something.
    fn meet(&self) {
        if !self.held.get() && self.depth.get() < 3 && self.below(1_000) < self.chance.get() {
            self.meetings.set(self.meetings.get() + 1);
            self.depth.set(self.depth.get() + 1);
            self.act();
            self.depth.set(self.depth.get() - 1);
        }
    }

    /// Somebody does something.
    fn act(&self) {
        match self.below(100) {
            0..50 => self.client(),
            50..78 => self.endpoint(),
            78..84 => self.node(),
            84..87 => {
                if let Some(flow) = self.some_flow() {
                    self.take_apart(flow.id);
                }
            }
            87..90 => self.cut(),
            90..95 => {
                let records = self.tables.records.borrow().len() as u64;
                if records != 0 {
                    self.sweep(self.below(records) as u32, &Timeouts::CONNTRACK);
                }
            }
            _ => self.wait(self.any(&[1_000_000, 100_000_000, 300_000_000, SECOND, 2 * SECOND, 31 * SECOND])),
        }
    }

    fn some_flow(&self) -> Option<Flow> {
        let live = self.tables.live();
        (!live.is_empty()).then(|| self.any(&live))
    }

    /// Somebody deletes a leg.
    fn cut(&self) {
        let mut legs: Vec<Key> = self.tables.flows.borrow().keys().copied().collect();
        legs.sort_unstable();
        if !legs.is_empty() {
            self.tables.flows.borrow_mut().remove(&self.any(&legs));
        }
    }

    /// A client sends something that fits, mostly.
    fn client(&self) {
        let proto = self.any(&[Proto::TCP, Proto::UDP]);
        let client = (self.any(&CLIENTS), self.any(&PORTS));
        let ask = key(client, self.any(&VIPS), proto);
        let mut talk = self.talks.borrow().get(&ask).copied().unwrap_or_default();
        let (flags, seq) = match self.below(10) {
            0 | 1 => {
                talk = Talk { client: self.below(1 << 32) as u32, ..Talk::default() };
                (Packet::SYN, talk.client)
            }
            2 => (Packet::FIN | Packet::ACK, talk.client.wrapping_add(1)),
            3 => (Packet::RST, talk.client.wrapping_add(1)),
            4 => {
                (self.any(&[Packet::SYN | Packet::ACK, Packet::RST, Packet::ACK]), self.below(1 << 32) as u32)
            }
            _ if !talk.answered => (Packet::SYN, talk.client),
            _ => (Packet::ACK, talk.client.wrapping_add(1)),
        };
        self.talks.borrow_mut().insert(ask, talk);
        self.ask(&ask, flags, [seq, talk.endpoint.wrapping_add(1)]);
    }

    /// A client's packet all the way; what the endpoint receives.
    fn ask(&self, ask: &Tuple, flags: u8, numbers: [u32; 2]) -> Option<Tuple> {
        let sent = segment(ask, flags, numbers, b"?", false);
        let mut times = 0;
        let entered = loop {
            match run(self, &sent, Hook::INGRESS, ETH) {
                Outcome::Waits if times < 5 => times += 1,
                other => break other,
            }
        };
        let entered = match entered {
            Outcome::Rewritten(frame) => frame,
            Outcome::Passed => sent.clone(),
            _ => return None,
        };
        let inside = read(&entered);
        assert_eq!(inside.src, ask.src, "only the destination changes at ingress");
        self.meant.borrow_mut().insert((inside.dst, inside.dport, *ask));
        let left = match run(self, &entered, Hook::EGRESS, ETH) {
            Outcome::Rewritten(frame) => frame,
            Outcome::Passed => entered,
            _ => return None,
        };
        let received = read(&left);
        assert_eq!(
            (received.dst, received.dport),
            (inside.dst, inside.dport),
            "only the source changes at egress"
        );
        if (received.dst, received.dport) == (ask.dst, ask.dport) && received.src == ask.src {
            assert_eq!(left, sent);
            return None;
        }
        if received.src != ask.src {
            assert_eq!(received.src, addr(NODE));
            assert!((2000..2007).contains(&received.sport.number()), "{}", received.sport);
        }
        self.asked.borrow_mut().entry(received).or_default().insert(*ask);
        self.received.borrow_mut().push(received);
        Some(received)
    }

    /// An endpoint answers something that it has received, lately or long ago.
    fn endpoint(&self) {
        let received = {
            let received = self.received.borrow();
            let latest = received.len().saturating_sub(if self.below(4) == 0 { 200 } else { 5 });
            if received.is_empty() {
                return;
            }
            self.any(&received[latest..])
        };
        let asks: Vec<Tuple> = self.asked.borrow()[&received].iter().copied().collect();
        let client =
            asks.iter().min().and_then(|ask| self.talks.borrow().get(ask).copied()).unwrap_or_default();
        let first = if client.endpoint == 0 { self.below(1 << 32) as u32 } else { client.endpoint };
        let (flags, seq) = match self.below(10) {
            0 => (Packet::FIN | Packet::ACK, first.wrapping_add(1)),
            1 => (Packet::RST | Packet::ACK, first.wrapping_add(1)),
            2 => (self.any(&[Packet::FIN, Packet::RST, Packet::ACK]), self.below(1 << 32) as u32),
            _ if client.answered => (Packet::ACK, first.wrapping_add(1)),
            _ => (Packet::SYN | Packet::ACK, first),
        };
        let arrived = self.answer(&received, flags, [seq, client.client.wrapping_add(1)]);
        if flags == Packet::SYN | Packet::ACK
            && let Some(arrived) = arrived
            && let Some(talk) = self.talks.borrow_mut().get_mut(&arrived.reversed())
        {
            (talk.endpoint, talk.answered) = (first, true);
        }
    }

    /// An endpoint's packet all the way; as what it reaches its client, if it has been translated.
    fn answer(&self, received: &Tuple, flags: u8, numbers: [u32; 2]) -> Option<Tuple> {
        let sent = segment(&received.reversed(), flags, numbers, b"!", false);
        let entered = match run(self, &sent, Hook::INGRESS, ETH) {
            Outcome::Rewritten(frame) => frame,
            Outcome::Passed => sent.clone(),
            _ => return None,
        };
        assert_eq!(read(&entered).src, received.dst, "only the destination changes at ingress");
        let left = match run(self, &entered, Hook::EGRESS, ETH) {
            Outcome::Rewritten(frame) => frame,
            Outcome::Passed => entered,
            _ => return None,
        };
        let arrived = read(&left);
        if arrived == received.reversed() {
            assert_eq!(left, sent);
            return None;
        }
        self.replies.borrow_mut().push((*received, arrived));
        Some(arrived)
    }

    /// The node, or somebody that it forwards for, speaks from a port of the node.
    fn node(&self) {
        let proto = self.any(&[Proto::TCP, Proto::UDP]);
        let to = match self.any(&[0, 1, 2]) {
            0 => ENDPOINTS[0],
            1 => (CLIENTS[0], self.any(&PORTS)),
            _ => ("198.51.100.77", 443),
        };
        let says = key((NODE, self.any(&[30_200, 30_200, 2000, 2003])), to, proto);
        let flags = self.any(&[Packet::SYN, Packet::SYN, Packet::ACK, Packet::SYN | Packet::ACK]);
        let before = self.tables.forwarded.replace(self.below(2) == 0);
        let sent = segment(&says, flags, [self.below(1 << 32) as u32, 0], b"", false);
        let outcome = run(self, &sent, Hook::EGRESS, ETH);
        self.tables.forwarded.set(before);
        // What leaves from the node is never translated but for its answers to clients.
        assert_eq!(outcome, Outcome::Passed, "{says:?}");
    }

    /// All come to rest: those who have lost something are given a second of their clients' traffic.
    fn rest(&self) {
        self.chance.set(0);
        for _ in 0..2 {
            self.sweep_all();
            self.wait(1_100_000_000);
            for flow in self.tables.live().iter().filter(|flow| !flow.is_own()) {
                let outer = Role::OUTER.index();
                let ask = flow.pairs[outer].tuple(flow.near[outer].into());
                let talk = self.talks.borrow().get(&ask).copied().unwrap_or_default();
                self.ask(&ask, Packet::ACK, [talk.client.wrapping_add(1), talk.endpoint.wrapping_add(1)]);
            }
        }
        if self.meetings.get() != 0 {
            // What could not be deleted is nobody's and in nobody's way.
            let records = self.tables.records.borrow();
            let is_somebodys = |leg: &Leg| records[leg.id.index() as usize].id == leg.id;
            self.tables.flows.borrow_mut().retain(|_, leg| is_somebodys(leg));
        }
        let broken = self.tables.broken_flows();
        assert!(broken.is_empty(), "{broken:#?}");
        for (received, arrived) in self.replies.take() {
            let asked = self.asked.borrow();
            let clients = &asked[&received];
            let meant = self.meant.borrow();
            // A client's questions to several Services from one port look alike behind them, where one has
            // lost its legs; and while several are at work, a question may have got a source and be lost all
            // the same.
            let same_client = clients.iter().any(|ask| (ask.src, ask.sport) == (arrived.dst, arrived.dport));
            let alike = (same_client || received.src == arrived.dst || self.meetings.get() != 0)
                && meant.contains(&(received.dst, received.dport, arrived.reversed()));
            let fits = clients.contains(&arrived.reversed()) || alike;
            // Half an answer: the flow was taken apart while it passed. It must be for one who has asked all
            // the same.
            let its_own = |ask: &Tuple| ask.src == arrived.dst && ask.proto == arrived.proto;
            let half = (arrived.src, arrived.sport) == (received.dst, received.dport)
                && meant
                    .iter()
                    .any(|(to, port, ask)| (*to, *port) == (received.dst, received.dport) && its_own(ask));
            assert!(fits || half, "{received:?} was answered as {arrived:?}; asked: {clients:?}");
        }
    }

    /// In peace everything fits: every living flow carries a question to its endpoint and the answer back.
    fn check(&self) {
        for flow in self.tables.live() {
            let outer = Role::OUTER.index();
            let ask = flow.pairs[outer].tuple(flow.near[outer].into());
            if flow.is_own() {
                let back = segment(&ask.reversed(), Packet::ACK, [0; 2], b"", false);
                assert_eq!(run(self, &back, Hook::INGRESS, ETH), Outcome::Passed, "{flow:?}");
                continue;
            }
            if !self.tables.live().iter().any(|now| now.id == flow.id) {
                continue;
            }
            // One that has no source yet may find no port.
            let Some(received) = self.ask(&ask, Packet::ACK, [0; 2]) else {
                assert!(!flow.has_source(), "{flow:?}");
                continue;
            };
            assert_eq!((received.dst, received.dport), (*flow.endpoint().0, flow.endpoint().1));
            assert_eq!(received.src == addr(NODE), flow.is_masqueraded(), "{flow:?}");
            let arrived = self.answer(&received, Packet::ACK, [0; 2]);
            // A Service that is its own endpoint has nothing to translate, unless it is masqueraded.
            assert_eq!(arrived.unwrap_or(ask.reversed()), ask.reversed(), "{flow:?}");
        }
        assert_eq!(self.tables.broken_flows(), [""; 0]);
    }

    fn sweep_all(&self) {
        let records = self.tables.records.borrow().len() as u32;
        for index in 0..records {
            self.sweep(index, &Timeouts::CONNTRACK);
        }
    }
}

#[track_caller]
fn read(frame: &ByteFrame) -> Tuple {
    assert_eq!(verify(frame), Ok(()));
    tuple(frame).expect("a packet").tuple
}

/// Each question to the tables is a moment in which another processor may come first.
impl Tables for World {
    type Place = Key;
    fn config(&self) -> Option<&Config> {
        self.tables.config()
    }
    fn now(&self) -> u64 {
        self.tables.now()
    }
    fn paused_until(&self) -> u64 {
        self.tables.paused_until()
    }
    fn random(&self) -> u32 {
        self.below(1 << 32) as u32
    }
    fn address(&self, addr: &Addr) -> u32 {
        self.tables.address(addr)
    }
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.meet();
        self.tables.frontend(key)
    }
    fn slot(&self, slot: u32) -> Option<u32> {
        self.tables.slot(slot)
    }
    fn backend(&self, index: u32) -> Option<Backend> {
        self.meet();
        self.tables.backend(index)
    }
    fn source_allowed(&self, key: &SourceKey) -> bool {
        self.tables.source_allowed(key)
    }
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.tables.affinity(key)
    }
    fn set_affinity(&self, key: &AffinityKey, value: &Affinity) {
        self.tables.set_affinity(key, value);
    }
    fn iface(&self, ifindex: u32) -> Option<Iface> {
        self.tables.iface(ifindex)
    }
    fn masquerade_address(&self, ifindex: u32, dst: &Addr) -> Option<Addr> {
        self.tables.masquerade_address(ifindex, dst)
    }
    fn tunnel(&self, key: &TunnelKey) -> Option<Tunnel> {
        self.tables.tunnel(key)
    }
    fn is_service_port(&self, port: Port) -> bool {
        self.tables.is_service_port(port)
    }
    fn is_socket(&self, tuple: &Tuple) -> bool {
        self.meet();
        self.tables.is_socket(tuple)
    }
    fn is_of_others(&self, tuple: &Tuple) -> bool {
        self.tables.is_of_others(tuple)
    }
    fn is_endpoint(&self, addr: &Addr) -> bool {
        self.tables.is_endpoint(addr)
    }
    fn is_taken(&self, tuple: &Tuple) -> bool {
        self.tables.is_taken(tuple)
    }
    fn may_search_on(&self) -> bool {
        self.tables.may_search_on()
    }
    fn leg(&self, pair: &Pair) -> Option<Leg> {
        self.meet();
        self.tables.leg(pair)
    }
    fn key_of(&self, packet: &Packet) -> (Key, usize) {
        self.tables.key_of(packet)
    }
    fn may_have_leg(&self, key: &Key) -> bool {
        self.meet();
        self.tables.may_have_leg(key)
    }
    fn leg_at(&self, key: &Key) -> Option<(Leg, Key)> {
        self.meet();
        self.tables.leg_at(key)
    }
    fn note(&self, place: Key, id: FlowId, notes: Notes) {
        self.meet();
        self.tables.note(place, id, notes);
    }
    fn is_broken(&self, pair: &Pair) -> bool {
        self.meet();
        self.tables.is_broken(pair)
    }
    fn insert_leg(&self, flow: &Flow, role: Role) -> Inserted {
        self.meet();
        self.tables.insert_leg(flow, role)
    }
    fn delete_leg(&self, pair: &Pair) {
        self.meet();
        // The kernel may find its own lock taken.
        let busy = self.chance.get() != 0 && self.below(40) == 0;
        if !busy {
            self.tables.delete_leg(pair);
        }
    }
    fn record<R>(&self, index: u32, f: impl FnOnce(&mut Flow) -> R) -> Option<R> {
        self.meet();
        assert!(!self.held.replace(true), "a record is asked for while one is held");
        let result = self.tables.record(index, f);
        self.held.set(false);
        result
    }
    fn claim(&self, index: u32) -> bool {
        self.meet();
        // Of two that come at the same moment both may fail.
        let both_fail = self.chance.get() != 0 && self.below(50) == 0;
        !both_fail && self.tables.claim(index)
    }
    fn unclaim(&self, index: u32) {
        self.meet();
        self.tables.unclaim(index);
    }
    fn take_record(&self) -> Option<u32> {
        self.meet();
        self.tables.take_record()
    }
    fn give_record(&self, index: u32) -> bool {
        self.meet();
        let full = self.chance.get() != 0 && self.below(100) == 0;
        !full && self.tables.give_record(index)
    }
    fn put_in_ring(&self, ring: Ring, id: FlowId) -> FlowId {
        self.meet();
        self.tables.put_in_ring(ring, id)
    }
    fn next_in_ring(&self, ring: Ring) -> FlowId {
        self.tables.next_in_ring(ring)
    }
    fn any_in_rings(&self) -> FlowId {
        self.tables.any_in_rings()
    }
    fn with_fragment<R>(&self, key: &FragmentKey, f: impl FnOnce(&mut Fragment) -> R) -> Option<R> {
        self.tables.with_fragment(key, f)
    }
    fn set_fragment(&self, key: &FragmentKey, value: &Fragment, replace: bool) {
        self.tables.set_fragment(key, value, replace);
    }
    fn count(&self, reason: Reason) {
        self.tables.count(reason);
    }
    fn count_service(&self, service: u32, stat: Stat) {
        self.tables.count_service(service, stat);
    }
}

impl Subprograms for World {}

/// Some bursts, in which `chance` of a thousand steps are followed by something else; the reasons that were
/// counted, how often processors met, and how many old flows there were.
fn play(seed: u64, chance: u64) -> (HashMap<Reason, u64>, u64, usize) {
    // Shown if it fails.
    std::println!("seed {seed}");
    let world = World::new(seed);
    world.sweep_all();
    let mut old = 0;
    for _ in 0..10 {
        world.chance.set(chance);
        for _ in 0..80 {
            world.act();
        }
        world.rest();
        old += world.tables.live().iter().filter(|flow| flow.old != 0).count();
        world.check();
    }
    world.wait(100_000 * SECOND);
    world.sweep_all();
    // Those that could not be given back at once.
    world.sweep_all();
    assert_eq!(world.tables.broken_flows(), [""; 0]);
    assert!(world.tables.flows.borrow().is_empty());
    let records = world.tables.records.borrow();
    assert!(records.iter().skip(1).all(|flow| flow.state == State::FREE));
    (world.tables.reasons.take(), world.meetings.get(), old)
}

/// Everything that can happen must have happened.
fn assert_all(seeds: std::ops::Range<u64>, chance: u64) {
    let mut all: HashMap<Reason, u64> = HashMap::new();
    let (mut meetings, mut old) = (0, 0);
    for seed in seeds {
        let (reasons, met, its_old) = play(seed, chance);
        meetings += met;
        old += its_old;
        reasons.into_iter().for_each(|(reason, n)| *all.entry(reason).or_default() += n);
    }
    assert_eq!(meetings != 0, chance != 0);
    assert!(old > 100, "{old}");
    let wanted = [
        Reason::NewFlow,
        Reason::Displaced,
        Reason::EntryRestored,
        Reason::NodeTraffic,
        Reason::FlowCollision,
        Reason::FlowTableFull,
    ];
    for reason in wanted {
        assert!(all.get(&reason).is_some_and(|n| *n > 10), "{reason:?}: {all:?}");
    }
}

#[test]
fn flows_stay_whole_whatever_happens_one_after_another() {
    assert_all(1..40, 0);
}

#[test]
fn flows_stay_whole_whatever_other_processors_do_meanwhile() {
    assert_all(1_000..1_025, 20);
}

#[test]
fn flows_stay_whole_in_a_crush() {
    assert_all(2_000..2_012, 60);
}

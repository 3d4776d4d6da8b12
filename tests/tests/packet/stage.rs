//! Where a story is played: one packet after the other, to host and kernel at once.

use std::collections::BTreeMap;
use std::sync::MutexGuard;

use nix::time::{ClockId, clock_gettime};
use proxy_common::abi::{
    Config, Flow, FlowId, Hook, Key, Leg, Notes, PortRange, Reason, Role, Timeouts, Tuple,
};
use proxy_common::addr::{Port, Proto};
use proxy_common::lb::Subprograms as _;
use proxy_common::testing::{self, ByteFrame, MemoryTables, Outcome, SECRET, run_on};
use proxy_tests::packet::{Packet, View, check, describe, protocol};

use crate::node::{Node, addr};
use crate::real::{IFACE, LEGS, Name, PLACES, RECORDS, Real, Traces, differences, direct_places, name, real};

/// How packets are played.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Form {
    /// Ethernet frames, to host and kernel.
    Ethernet,
    /// IP packets without a header before them, to host and kernel.
    Plain,
    /// Ethernet frames whose TCP or UDP checksum is left to the hardware, to the host.
    Partial,
}

/// Whose legs [`Stage::leave_room_for`] makes: no flow has this id, since every record counts from one.
pub(crate) const NOBODY: FlowId = FlowId(1);

/// Tells a story in every form, each time on a node made anew.
#[track_caller]
pub(crate) fn story(node: impl Fn() -> Node, tell: impl Fn(&mut Stage)) {
    story_in(&[Form::Ethernet, Form::Plain, Form::Partial], node, tell);
}

/// The same in Ethernet frames only: a test run in the kernel takes the first bytes of any packet for an Ethernet header, and
/// so makes room, or takes it away, in the wrong place of one that has none.
#[track_caller]
pub(crate) fn framed_story(node: impl Fn() -> Node, tell: impl Fn(&mut Stage)) {
    story_in(&[Form::Ethernet, Form::Partial], node, tell);
}

/// The same in whole Ethernet frames only.
#[track_caller]
pub(crate) fn whole_story(node: impl Fn() -> Node, tell: impl Fn(&mut Stage)) {
    story_in(&[Form::Ethernet], node, tell);
}

#[track_caller]
fn story_in(forms: &[Form], node: impl Fn() -> Node, tell: impl Fn(&mut Stage)) {
    for form in forms.iter().copied() {
        let mut stage = Stage::new(form, node().tables);
        tell(&mut stage);
        assert_eq!(stage.uncounted, [].into(), "{form:?}: reasons that the story does not mention");
        stage.end();
    }
}

/// A node, twice.
pub(crate) struct Stage {
    form: Form,
    host: MemoryTables,
    kernel: Option<MutexGuard<'static, Real>>,
    /// The interface by which what leaves the node has come in; 0 for none.
    pub(crate) came_by: u32,
    /// Whether host and kernel are compared only when the story asks.
    hurries: bool,
    /// Whether somebody has been at the flow tables.
    tampered: bool,
    /// Reasons counted since the story last asked.
    uncounted: BTreeMap<Reason, u64>,
}

/// What became of a packet, to be judged.
#[must_use]
pub(crate) struct Seen<'a> {
    stage: &'a Stage,
    sent: Vec<u8>,
    outcome: Outcome,
}

impl Stage {
    #[track_caller]
    pub(crate) fn new(form: Form, mut tables: MemoryTables) -> Self {
        tables.max_flows = Some(LEGS);
        tables.max_records = Some(RECORDS);
        tables.places = Some(PLACES);
        tables.direct_places = Some(direct_places());
        let mut kernel = (form != Form::Partial).then(real);
        if let Some(kernel) = &mut kernel {
            kernel.begin(&tables);
        }
        Self {
            form,
            host: tables,
            kernel,
            came_by: 0,
            hurries: false,
            tampered: false,
            uncounted: BTreeMap::new(),
        }
    }

    /// A packet that comes to the node.
    #[track_caller]
    pub(crate) fn ingress(&mut self, packet: &Packet) -> Seen<'_> {
        self.frame(Hook::INGRESS, self.bytes(packet))
    }

    /// A packet that comes to the node, and comes again from the end of the queue as long as it is put there.
    #[track_caller]
    pub(crate) fn ingress_at_last(&mut self, packet: &Packet) -> Seen<'_> {
        let bytes = self.bytes(packet);
        for _ in 0..3 {
            if self.frame(Hook::INGRESS, bytes.clone()).outcome != Outcome::Waits {
                break;
            }
        }
        self.frame(Hook::INGRESS, bytes)
    }

    /// A packet that leaves it.
    #[track_caller]
    pub(crate) fn egress(&mut self, packet: &Packet) -> Seen<'_> {
        self.frame(Hook::EGRESS, self.bytes(packet))
    }

    /// One packet through one hook; for a packet that cannot be built, or not as a whole.
    #[track_caller]
    pub(crate) fn frame(&mut self, hook: Hook, sent: Vec<u8>) -> Seen<'_> {
        let outcome = match self.step(hook, &sent) {
            Ok(outcome) => outcome,
            Err(report) => panic!("{report}"),
        };
        Seen { stage: self, sent, outcome }
    }

    /// The bytes of a packet in this form.
    pub(crate) fn bytes(&self, packet: &Packet) -> Vec<u8> {
        match self.form {
            Form::Plain => packet.clone().without_ethernet().build(),
            Form::Partial if is_finished_by_hardware(&packet.build()) => {
                packet.clone().partial_checksum().build()
            }
            Form::Ethernet | Form::Partial => packet.build(),
        }
    }

    /// The fragments of a packet in this form.
    pub(crate) fn fragments(&self, packet: &Packet, size: usize) -> Vec<Vec<u8>> {
        match self.form {
            Form::Plain => packet.clone().without_ethernet().fragments(size),
            Form::Ethernet | Form::Partial => packet.fragments(size),
        }
    }

    /// The bytes of an Ethernet frame in this form.
    pub(crate) fn reform(&self, frame: &[u8]) -> Vec<u8> {
        if self.form == Form::Plain { frame[14..].to_vec() } else { frame.to_vec() }
    }

    /// One packet through host and kernel; what they do not agree about is the error.
    pub(crate) fn step(&mut self, hook: Hook, sent: &[u8]) -> Result<Outcome, String> {
        let ethernet = self.form != Form::Plain;
        let partial = self.form == Form::Partial && is_finished_by_hardware(sent);
        let frame = ByteFrame { bytes: sent.to_vec(), partial };
        let before = self.host.reasons.borrow().clone();
        let from = if hook == Hook::EGRESS { self.came_by } else { 0 };
        // The kernel first: it looks for source ports at random, and the host is to find the one that it has found.
        let seen = self.kernel.as_ref().and_then(|kernel| kernel.run(from, sent, hook, ethernet));
        self.host.now.set(now());
        self.host.forwarded.set(from != 0);
        let outcome = if ethernet && hook == Hook::INGRESS && is_for_another_host(sent) {
            Outcome::Passed
        } else {
            let moved = seen.as_ref().and_then(|seen| self.new_source_port(sent, seen));
            let config = self.host.config;
            if let (Some(port), Some(config)) = (moved, &mut self.host.config)
                && is_for_masquerading(config, port)
            {
                *config = config.with_snat_ports(&[PortRange { first: port, count: 1 }]);
            }
            let outcome = match ethernet {
                true => run_on::<true>(&self.host, &frame, hook, IFACE),
                false => run_on::<false>(&self.host, &frame, hook, IFACE),
            };
            self.host.config = config;
            outcome
        };
        // A packet may be rewritten to itself.
        let outcome = if outcome == Outcome::Rewritten(frame) { Outcome::Passed } else { outcome };
        for (reason, count) in self.host.reasons.borrow().iter() {
            let new = count - before.get(reason).unwrap_or(&0);
            if new > 0 {
                *self.uncounted.entry(*reason).or_default() += new;
            }
        }
        if let (Some(kernel), Some(seen)) = (&self.kernel, seen) {
            if seen != outcome {
                return Err(self.report(hook, sent, &outcome, &format!("kernel: {}", self.tell(&seen))));
            }
            if !self.hurries {
                self.compare(kernel, hook, sent, &outcome)?;
            }
        }
        if let Some(wrong) = self.wrong_checksum(sent, &outcome) {
            return Err(self.report(hook, sent, &outcome, &wrong));
        }
        Ok(outcome)
    }

    /// The source port that the kernel has given a packet, or that packet's flow before it was dropped.
    fn new_source_port(&self, sent: &[u8], seen: &Outcome) -> Option<u16> {
        let Outcome::Rewritten(frame) = seen else {
            let dropped = self.kernel.as_ref().filter(|_| *seen == Outcome::Dropped)?;
            return dropped.new_source_port(&self.host.flows.borrow());
        };
        // As the programs see it, who ask for no checksums.
        let source = |bytes: &[u8]| {
            let frame = ByteFrame { bytes: self.framed(bytes), partial: false };
            let tuple = testing::tuple(&frame)?.tuple;
            Some((tuple.src, tuple.sport.number()))
        };
        // A new address may come with the port that the packet had.
        source(&frame.bytes).filter(|new| source(sent) != Some(*new)).map(|(_, port)| port)
    }

    fn compare(&self, kernel: &Real, hook: Hook, sent: &[u8], outcome: &Outcome) -> Result<(), String> {
        self.disagreement(kernel).map_or(Ok(()), |text| Err(self.report(hook, sent, outcome, &text)))
    }

    /// What host and kernel do not agree about.
    fn disagreement(&self, kernel: &Real) -> Option<String> {
        let (here, there) = (Traces::of_host(&self.host), kernel.traces());
        if here == there {
            return None;
        }
        let mut text = differences("reason", &here.reasons, &there.reasons);
        text.push_str(&differences("service", &here.stats, &there.stats));
        text.push_str(&differences("flow", &here.flows, &there.flows));
        text.push_str(&differences("leg", &here.legs, &there.legs));
        text.push_str(&differences("fragment", &here.fragments, &there.fragments));
        text.push_str(&differences("affinity", &here.affinity, &there.affinity));
        Some(text)
    }

    /// A right packet must not become a wrong one, and what we say ourselves is right in any case.
    fn wrong_checksum(&self, sent: &[u8], outcome: &Outcome) -> Option<String> {
        let wrong = match outcome {
            Outcome::Rewritten(frame)
                if !frame.partial
                    && check(&self.framed(sent)).is_ok()
                    && inside(&self.framed(sent)).is_none_or(|inside| check(&inside).is_ok()) =>
            {
                let framed = self.framed(&frame.bytes);
                let verified = View::ethernet(&framed).and_then(|view| {
                    view.verify()?;
                    // The transport checksum of what an ICMP error embeds is nobody's to verify: it may be
                    // cut off. Its IP header's is.
                    view.embedded().transpose().map(drop)
                });
                verified.err()
            }
            // What it embeds may be cut off, or wrong since it was sent.
            Outcome::Rejected(frame) => {
                View::ethernet(&self.framed(&frame.bytes)).and_then(|view| view.verify()).err()
            }
            // What is inside is as it came, and the tests have the header.
            Outcome::Rewritten(_)
            | Outcome::Wrapped(_)
            | Outcome::Passed
            | Outcome::Waits
            | Outcome::Dropped => None,
        };
        wrong.map(|error| format!("{error:#}"))
    }

    fn report(&self, hook: Hook, sent: &[u8], outcome: &Outcome, more: &str) -> String {
        let hook = if hook == Hook::INGRESS { "ingress" } else { "egress" };
        let hex: String = sent.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = describe(&self.framed(sent));
        format!("{:?} at {hook}: {text}\nbytes {hex}\nhost: {}\n{more}", self.form, self.tell(outcome))
    }

    fn tell(&self, outcome: &Outcome) -> String {
        let show = |frame: &ByteFrame| {
            let hex: String = frame.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{}\n  {hex}", describe(&self.framed(&frame.bytes)))
        };
        match outcome {
            Outcome::Passed => "passed".into(),
            Outcome::Dropped => "dropped".into(),
            Outcome::Waits => "put at the end of the queue".into(),
            Outcome::Rewritten(frame) => format!("rewritten to {}", show(frame)),
            Outcome::Rejected(frame) => format!("refused with {}", show(frame)),
            Outcome::Wrapped(frame) => format!("wrapped as {}", show(frame)),
        }
    }

    /// With an Ethernet header, whatever the form.
    pub(crate) fn framed(&self, bytes: &[u8]) -> Vec<u8> {
        if self.form != Form::Plain {
            return bytes.to_vec();
        }
        let kind = if bytes.first().is_some_and(|first| first >> 4 == 6) { [0x86, 0xdd] } else { [8, 0] };
        [&[0; 12][..], &kind, bytes].concat()
    }

    /// Exactly these reasons have been counted since the story began or last asked.
    #[track_caller]
    pub(crate) fn counted(&mut self, expected: &[(Reason, u64)]) {
        let expected: BTreeMap<Reason, u64> = expected.iter().copied().collect();
        assert_eq!(std::mem::take(&mut self.uncounted), expected, "{:?}", self.form);
    }

    /// Changes the tables between two packets.
    pub(crate) fn change(&mut self, change: impl FnOnce(&mut Node)) {
        let mut node = Node { tables: std::mem::take(&mut self.host), next: 100 };
        change(&mut node);
        self.host = node.tables;
        if let Some(kernel) = &mut self.kernel {
            kernel.configure(&self.host);
        }
    }

    /// Every reason counted since the story began.
    pub(crate) fn met(&self) -> BTreeMap<Reason, u64> {
        self.host.reasons.borrow().iter().map(|(reason, count)| (*reason, *count)).collect()
    }

    /// How many young flows there are, and how many old ones.
    pub(crate) fn flows(&self) -> (usize, usize) {
        let flows = self.host.live();
        let young = flows.iter().filter(|flow| flow.old == 0).count();
        (young, flows.len() - young)
    }

    /// Legs of all flows.
    pub(crate) fn legs(&self) -> usize {
        self.host.flows.borrow().len()
    }

    /// Legs that the kernel's programs have counted.
    pub(crate) fn counted_legs(&self) -> Option<u64> {
        self.kernel.as_ref().map(|kernel| kernel.counted_legs())
    }

    /// Lets time pass, as far as flows are concerned. The clock of the kernel cannot be set: they become older instead.
    pub(crate) fn rest(&mut self, milliseconds: u64) {
        let past = milliseconds * 1_000_000;
        let age = |flow: &mut Flow| {
            let times = flow.seen.iter_mut().chain(&mut flow.rst).chain([&mut flow.born, &mut flow.checked]);
            times.filter(|time| **time != 0).for_each(|time| *time = time.saturating_sub(past).max(1));
        };
        // In another window legs ask their records again.
        let forget = |key: &Key, leg: &mut Leg| {
            if key.is_v4() {
                leg.upper = Notes { asked: 0, ..leg.notes() }.word();
            }
        };
        self.host.records.borrow_mut().iter_mut().for_each(age);
        self.host.flows.borrow_mut().iter_mut().for_each(|(key, leg)| forget(key, leg));
        if let Some(kernel) = &mut self.kernel {
            kernel.change_flows(age);
            kernel.change_legs(forget);
        }
    }

    /// The agent looks through all flows once. How many were over.
    pub(crate) fn sweep(&mut self) -> u32 {
        self.host.now.set(now());
        let records = self.host.records.borrow().len() as u32;
        let swept = (0..records).map(|index| self.host.sweep(index, &Timeouts::CONNTRACK)).sum();
        if let Some(kernel) = &self.kernel {
            assert_eq!(swept, kernel.sweep(), "{:?}", self.form);
        }
        self.agrees();
        swept
    }

    /// The agent ends the n-th flow.
    pub(crate) fn end_flow(&mut self, n: usize) {
        let legs: Vec<(Key, Leg)> = self.host.flows.borrow().iter().map(|(key, leg)| (*key, *leg)).collect();
        let mut flows: Vec<(Name, FlowId)> =
            self.host.live().iter().map(|flow| (name(flow.id, &legs), flow.id)).collect();
        // One without a leg is nobody's: the kernel may have several.
        flows.retain(|(name, _)| !name.is_empty());
        flows.sort();
        if !flows.is_empty() {
            let (name, flow) = &flows[n % flows.len()];
            assert_eq!(self.host.take_apart(*flow), 1);
            if let Some(kernel) = &self.kernel {
                kernel.end(name);
            }
        }
    }

    /// Somebody deletes the n-th entry of FLOWS, or the n-th of this role.
    pub(crate) fn lose_leg(&mut self, role: Option<Role>, n: usize) {
        let is_meant = |leg: &Leg| role.is_none_or(|role| leg.role() == role);
        let mut keys: Vec<Key> =
            self.host.flows.borrow().iter().filter(|(_, leg)| is_meant(leg)).map(|(key, _)| *key).collect();
        keys.sort();
        if !keys.is_empty() {
            let key = keys[n % keys.len()];
            self.tampered = true;
            self.host.flows.borrow_mut().remove(&key);
            if let Some(kernel) = &mut self.kernel {
                kernel.lose(&key);
            }
        }
    }

    /// FLOWS holds legs of flows that are gone, until there is room for so many.
    pub(crate) fn leave_room_for(&mut self, legs: usize) {
        self.tampered = true;
        for n in 0..(LEGS - legs - self.legs()) as u16 {
            let (one, other) = (addr("172.16.0.1"), addr("172.16.0.2"));
            let pair = Tuple::new(one, Port::new(n), other, Port::new(80), Proto::TCP).pair();
            let key = pair.key(|| Some(&SECRET));
            let leg = Flow { id: NOBODY, pairs: [pair; 3], ..Flow::EMPTY }.leg(Role::OUTER).sealed(&key);
            self.host.flows.borrow_mut().insert(key, leg);
            if let Some(kernel) = &mut self.kernel {
                kernel.plant(&key, &leg);
            }
        }
    }

    /// Does something with many packets; host and kernel are compared in full only before and after.
    #[track_caller]
    pub(crate) fn hurry(&mut self, much: impl FnOnce(&mut Self)) {
        self.hurries = true;
        much(self);
        self.hurries = false;
        self.agrees();
    }

    #[track_caller]
    fn agrees(&self) {
        if let Some(text) = self.kernel.as_ref().and_then(|kernel| self.disagreement(kernel)) {
            panic!("{:?}: {text}", self.form);
        }
    }

    /// The story is over: no flow has half of anything, and when all have ended nothing of them is left.
    #[track_caller]
    pub(crate) fn end(mut self) {
        self.agrees();
        // What somebody has spoiled need not be whole; it must end all the same.
        let rounds = if self.tampered { &[true][..] } else { &[false, true] };
        for all_ended in rounds {
            if *all_ended {
                self.host.live().iter().for_each(|flow| assert_eq!(self.host.take_apart(flow.id), 1));
                self.host.flows.borrow_mut().retain(|_, leg| leg.id != NOBODY);
                assert_eq!((self.flows(), self.legs()), ((0, 0), 0), "{:?}", self.form);
            }
            assert_eq!(self.host.broken_flows(), Vec::<String>::new(), "{:?}, ended: {all_ended}", self.form);
            if let Some(kernel) = &mut self.kernel {
                if *all_ended {
                    kernel.end_all();
                    kernel.weed();
                }
                let broken = kernel.broken_flows();
                assert_eq!(broken, Vec::<String>::new(), "{:?} in the kernel, ended: {all_ended}", self.form);
            }
        }
    }
}

/// Now, as the programs see it.
fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).unwrap();
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}

/// Whether a source port is one of those to masquerade with.
fn is_for_masquerading(config: &Config, port: u16) -> bool {
    let holds = |range: &PortRange| (range.first..range.first.saturating_add(range.count)).contains(&port);
    config.snat_ports.iter().any(holds)
}

/// Whether a frame at loopback is addressed to somebody else than this host alone.
fn is_for_another_host(frame: &[u8]) -> bool {
    frame.get(..6).is_some_and(|to| to != [0; 6])
}

/// Whether hardware could be left to finish the packet's checksum: a whole TCP segment or UDP datagram.
fn is_finished_by_hardware(frame: &[u8]) -> bool {
    View::ethernet(frame)
        .is_ok_and(|view| view.fragment.is_none() && [protocol::TCP, protocol::UDP].contains(&view.protocol))
}

impl Seen<'_> {
    #[track_caller]
    fn is(&self, expected: &Outcome) {
        let stage = self.stage;
        assert!(
            self.outcome == *expected,
            "{:?}: {}\nexpected: {}\nbut:      {}",
            stage.form,
            describe(&stage.framed(&self.sent)),
            stage.tell(expected),
            stage.tell(&self.outcome)
        );
    }

    /// It goes on unchanged.
    #[track_caller]
    pub(crate) fn passes(self) {
        self.is(&Outcome::Passed);
    }

    /// It is to come again, after what is queued.
    #[track_caller]
    pub(crate) fn waits(self) {
        self.is(&Outcome::Waits);
    }

    /// It is discarded.
    #[track_caller]
    pub(crate) fn dropped(self) {
        self.is(&Outcome::Dropped);
    }

    /// It goes on as this packet.
    #[track_caller]
    pub(crate) fn becomes(self, packet: &Packet) {
        let bytes = self.stage.bytes(packet);
        self.becomes_bytes(bytes);
    }

    /// It goes on as these bytes.
    #[track_caller]
    pub(crate) fn becomes_bytes(self, bytes: Vec<u8>) {
        let partial = self.stage.form == Form::Partial && is_finished_by_hardware(&bytes);
        self.is(&Outcome::Rewritten(ByteFrame { bytes, partial }));
    }

    /// It goes to its endpoint's node in this packet.
    #[track_caller]
    pub(crate) fn becomes_wrapped(self, bytes: Vec<u8>) {
        let partial = self.stage.form == Form::Partial && is_finished_by_hardware(&self.sent);
        self.is(&Outcome::Wrapped(ByteFrame { bytes, partial }));
    }

    /// It is answered with this Ethernet frame.
    #[track_caller]
    pub(crate) fn answered_with(self, frame: &[u8]) {
        let bytes = self.stage.reform(frame);
        self.is(&Outcome::Rejected(ByteFrame { bytes, partial: false }));
    }

    /// It is answered.
    #[track_caller]
    pub(crate) fn gets_refused(self) {
        assert!(matches!(self.outcome, Outcome::Rejected(_)), "{}", self.stage.tell(&self.outcome));
    }

    /// It goes on rewritten: the ports and addresses it has now, `source > destination`.
    #[track_caller]
    pub(crate) fn becomes_some(self) -> (String, String) {
        let Outcome::Rewritten(frame) = &self.outcome else {
            panic!("{:?}: {}", self.stage.form, self.stage.tell(&self.outcome));
        };
        let framed = self.stage.framed(&frame.bytes);
        let view = View::ethernet(&framed).expect("a packet");
        let (source, destination) = view.ports.expect("ports");
        let end = |ip: std::net::IpAddr, port: u16| std::net::SocketAddr::new(ip, port).to_string();
        (end(view.source, source), end(view.destination, destination))
    }

    /// It goes on rewritten, as an ICMP error.
    #[track_caller]
    pub(crate) fn becomes_some_error(self) {
        let Outcome::Rewritten(frame) = &self.outcome else {
            panic!("{:?}: {}", self.stage.form, self.stage.tell(&self.outcome));
        };
        let framed = self.stage.framed(&frame.bytes);
        assert!(View::ethernet(&framed).unwrap().embedded().is_some(), "{}", describe(&framed));
    }
}

/// The frame of the packet that is inside another one of its family.
fn inside(framed: &[u8]) -> Option<Vec<u8>> {
    let length = match (framed.get(12..14)?, framed.get(14 + 9), framed.get(14 + 6)) {
        ([8, 0], Some(4), _) => 20,
        ([0x86, 0xdd], _, Some(41)) => 40,
        _ => return None,
    };
    Some([&framed[..14], framed.get(14 + length..)?].concat())
}

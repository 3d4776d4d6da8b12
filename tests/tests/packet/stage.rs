//! Where a story is told: one packet after the other, to host and kernel at once.

use std::collections::BTreeMap;
use std::sync::MutexGuard;

use proxy_common::abi::{Hook, Reason};
use proxy_common::lb::FlowTable;
use proxy_common::testing::{ByteFrame, MemoryTables, Outcome, run_on};
use proxy_tests::packet::{Packet, View, check, describe, protocol};

use crate::node::Node;
use crate::real::{FLOWS, IFACE, Real, Traces, differences, real};

/// How packets are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Form {
    /// Ethernet frames, to host and kernel.
    Ethernet,
    /// IP packets without a header before them, to host and kernel.
    Plain,
    /// Ethernet frames whose TCP or UDP checksum is left to the hardware, to the host.
    Partial,
}

/// Tells a story in every form, each time on a node made anew.
#[track_caller]
pub(crate) fn story(node: impl Fn() -> Node, tell: impl Fn(&mut Stage)) {
    for form in [Form::Ethernet, Form::Plain, Form::Partial] {
        let mut stage = Stage::new(form, node().tables);
        tell(&mut stage);
        assert_eq!(stage.uncounted, [].into(), "{form:?}: reasons that the story does not mention");
    }
}

/// A node, twice.
pub(crate) struct Stage {
    form: Form,
    host: MemoryTables,
    kernel: Option<MutexGuard<'static, Real>>,
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
        tables.max_flows = Some(FLOWS);
        tables.now.set(1_000_000_000_000);
        let mut kernel = (form != Form::Partial).then(real);
        if let Some(kernel) = &mut kernel {
            kernel.begin(&tables);
        }
        Self { form, host: tables, kernel, uncounted: BTreeMap::new() }
    }

    /// A packet that comes to the node.
    #[track_caller]
    pub(crate) fn ingress(&mut self, packet: &Packet) -> Seen<'_> {
        self.frame(Hook::INGRESS, self.bytes(packet))
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
        let outcome = match ethernet {
            true => run_on::<true>(&self.host, &frame, hook, IFACE),
            false => run_on::<false>(&self.host, &frame, hook, IFACE),
        };
        // A packet may be rewritten to itself.
        let outcome = if outcome == Outcome::Rewritten(frame) { Outcome::Passed } else { outcome };
        for (reason, count) in self.host.reasons.borrow().iter() {
            let new = count - before.get(reason).unwrap_or(&0);
            if new > 0 {
                *self.uncounted.entry(*reason).or_default() += new;
            }
        }
        if let Some(kernel) = &self.kernel {
            match kernel.run(sent, hook, ethernet) {
                Some(seen) if seen != outcome => {
                    return Err(self.report(hook, sent, &outcome, &format!("kernel: {}", self.tell(&seen))));
                }
                Some(_) => self.compare(kernel, hook, sent, &outcome)?,
                None => {}
            }
        }
        if let Some(wrong) = self.wrong_checksum(sent, &outcome) {
            return Err(self.report(hook, sent, &outcome, &wrong));
        }
        Ok(outcome)
    }

    fn compare(&self, kernel: &Real, hook: Hook, sent: &[u8], outcome: &Outcome) -> Result<(), String> {
        let (here, there) = (Traces::of_host(&self.host), kernel.traces());
        if here == there {
            return Ok(());
        }
        let mut text = differences("reason", &here.reasons, &there.reasons);
        text.push_str(&differences("service", &here.stats, &there.stats));
        text.push_str(&differences("flow", &here.flows, &there.flows));
        text.push_str(&differences("fragment", &here.fragments, &there.fragments));
        text.push_str(&differences("affinity", &here.affinity, &there.affinity));
        Err(self.report(hook, sent, outcome, &text))
    }

    /// A right packet must not become a wrong one, and what we say ourselves is right in any case.
    fn wrong_checksum(&self, sent: &[u8], outcome: &Outcome) -> Option<String> {
        let wrong = match outcome {
            Outcome::Rewritten(frame) if !frame.partial && check(&self.framed(sent)).is_ok() => {
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
            Outcome::Refused(frame) => {
                View::ethernet(&self.framed(&frame.bytes)).and_then(|view| view.verify()).err()
            }
            Outcome::Rewritten(_) | Outcome::Passed | Outcome::Waits | Outcome::Dropped => None,
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
            Outcome::Refused(frame) => format!("refused with {}", show(frame)),
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

    /// Legs in a table.
    pub(crate) fn legs(&self, table: FlowTable) -> usize {
        self.host.flows.borrow().keys().filter(|(t, _)| *t == table).count()
    }
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

    /// It is answered with this Ethernet frame.
    #[track_caller]
    pub(crate) fn answered_with(self, frame: &[u8]) {
        let bytes = self.stage.reform(frame);
        self.is(&Outcome::Refused(ByteFrame { bytes, partial: false }));
    }

    /// It is answered.
    #[track_caller]
    pub(crate) fn gets_refused(self) {
        assert!(matches!(self.outcome, Outcome::Refused(_)), "{}", self.stage.tell(&self.outcome));
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

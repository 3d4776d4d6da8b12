//! A packet that belongs to no flow: if it is for a Service it opens one.

use super::select::{self, Asker, Choice, Rejection, Selected, Source};
use super::{Inserted, Ring, Stat, Subprograms, Tables, Verdict, adopt, direct, is_paused, masquerade};
use crate::abi::{FlowId, Reason, Tuple, address, frontend};
use crate::addr::{Addr, Port, Proto};
use crate::wire::{Edit, Kind, Packet, wrap};

/// Backends that are tried when a flow's tuple behind the Service is taken.
const BACKENDS: u32 = 4;
/// Source ports that are tried after that.
const PORTS: u32 = 8;

/// Chooses a backend for the packet's flow and begins it. `known` is what is known of the destination
/// address. On [`Verdict::Rewrite`] the edit is filled in.
///
/// If the tuple behind the Service belongs to another flow of the same client port (D-5), other backends
/// are tried, and then other source ports.
#[inline(always)]
pub fn open<T: Subprograms>(
    tables: &T,
    packet: &Packet,
    known: u32,
    edit: &mut Edit,
    choice: &mut Choice,
) -> Verdict {
    // A later fragment opens nothing: the first one has opened the flow or been rejected.
    if matches!(packet.kind, Kind::LaterFragment) {
        return fragment_of_nothing(tables, known);
    }
    if opens_nothing(packet, known) || adopt::leaves(tables, packet) {
        return Verdict::Pass;
    }
    for attempt in 0..BACKENDS {
        let verdict = decide(tables, packet, known, attempt, choice);
        if verdict != Verdict::Rewrite {
            return verdict;
        }
        // What begins now would begin in tables that are about to be left.
        if is_paused(tables.now(), tables.paused_until()) {
            return Verdict::Wait;
        }
        match begin(tables, packet, choice, Port(0)) {
            Inserted::Done => return opened(tables, choice, Port(0), edit),
            Inserted::Raced => return Verdict::Wait,
            Inserted::Exists => {}
            Inserted::Full => {
                tables.count(Reason::FlowTableFull);
                return Verdict::Drop;
            }
        }
        // A client bound to its backend does not move for the sake of a tuple.
        if choice.flags & frontend::AFFINITY != 0 {
            break;
        }
    }
    let start = tables.random() >> 1;
    for n in 0..PORTS {
        let port = tables.snat_port(start.wrapping_add(n.wrapping_mul(13)));
        if port.0 != 0 && begin(tables, packet, choice, port) == Inserted::Done {
            tables.count(Reason::FlowCollision);
            return opened(tables, choice, port, edit);
        }
    }
    tables.count(Reason::CollisionUnresolved);
    Verdict::Drop
}

/// A later fragment of no living flow: for the node itself it is the stack's; to a Service it would leave
/// untranslated.
#[inline(always)]
pub(super) fn fragment_of_nothing<T: Tables>(tables: &T, known: u32) -> Verdict {
    if adopt::leaves_new(tables) || known & address::NODE != 0 {
        return Verdict::Pass;
    }
    tables.count(Reason::FragmentUnknown);
    Verdict::Drop
}

/// Whether a TCP packet outside all flows is no question: a RST, an answer, or, at an address of the node,
/// anything but the beginning of a connection, which is the node's own affair. Elsewhere the middle of a
/// connection opens a flow: the address is the Service's alone, and the hash finds the endpoint that it had.
#[inline(always)]
const fn opens_nothing(packet: &Packet, known: u32) -> bool {
    let flags = packet.tcp_flags;
    let answers = Packet::SYN | Packet::ACK;
    matches!(packet.tuple.proto, Proto::TCP)
        && (flags & Packet::RST != 0
            || flags & answers == answers
            || known & address::NODE != 0 && flags & Packet::SYN == 0)
}

/// Begins the packet's flow. `middle_port` replaces the client's port behind the Service unless zero.
#[inline(always)]
fn begin<T: Subprograms>(tables: &T, packet: &Packet, choice: &Choice, middle_port: Port) -> Inserted {
    let behind = if middle_port.0 == 0 { packet.tuple.sport } else { middle_port };
    // A pod that reaches itself from the port it serves: its packets and its answers would be one tuple
    // behind the Service (M-10, D-5).
    if choice.port == behind && choice.addr.same(&packet.tuple.src) {
        return Inserted::Exists;
    }
    let id = tables.take(Ring::of(packet.tuple.proto));
    if id == FlowId::NONE {
        return Inserted::Full;
    }
    tables.make(packet, choice, middle_port, id);
    tables.join(packet, id)
}

#[inline(always)]
fn opened<T: Tables>(tables: &T, choice: &Choice, other_port: Port, edit: &mut Edit) -> Verdict {
    edit.addr = choice.addr;
    edit.port = choice.port;
    edit.other_port = other_port;
    edit.out = choice.node;
    tables.count(Reason::NewFlow);
    tables.count_service(choice.service, Stat::Chosen);
    if choice.node == 0 { Verdict::Rewrite } else { Verdict::Wrap }
}

/// Chooses a backend. On [`Verdict::Rewrite`] the choice is filled in; anything else has been counted.
/// Attempts after the first look elsewhere.
#[inline(always)]
fn decide<T: Subprograms>(
    tables: &T,
    packet: &Packet,
    known: u32,
    attempt: u32,
    choice: &mut Choice,
) -> Verdict {
    for look in 1..=select::LOOKS {
        let last = look == select::LOOKS;
        if let Some(verdict) = tables.choose(packet, known, attempt, last, choice) {
            return verdict;
        }
    }
    Verdict::Drop
}

/// One look for a backend. `None` if tables were rewritten meanwhile, unless this is the `last` look.
#[inline(always)]
pub fn choose<T: Subprograms>(
    tables: &T,
    packet: &Packet,
    known: u32,
    attempt: u32,
    last: bool,
    choice: &mut Choice,
) -> Option<Verdict> {
    let key = &packet.tuple;
    if key.dst.is_never_service() {
        return Some(Verdict::Pass);
    }
    let Some(config) = tables.config() else {
        tables.count(Reason::ConfigMissing);
        return Some(Verdict::Pass);
    };
    let source = select::source_of(tables, config, &key.src, packet.ifindex);
    let wrapped = tables.wraps() && packet.wrapped != 0;
    let hint = wrapped.then_some(packet.hint);
    let asker = Question { tuple: key, source, seed: config.seed, attempt, hint };
    let verdict = match select::look(tables, &asker, (&key.dst, key.dport, key.proto), known) {
        Ok(Selected { frontend, index, backend }) => {
            choice.addr = backend.addr;
            choice.port = backend.port;
            choice.index = index;
            choice.generation = backend.generation;
            choice.service = frontend.service;
            choice.flags = frontend.flags;
            choice.masquerade =
                u32::from(masquerade::is_needed(config, frontend.flags, &backend, &key.src, source, wrapped));
            choice.node = 0;
            if matches!(source, Source::External)
                && let Some(node) = direct::way_to(tables, packet, frontend.flags, &backend)
            {
                choice.node = backend.node;
                choice.masquerade = 0;
                choice.addr = node;
                choice.port = Port(wrap::hint(&backend.addr, backend.port));
            }
            Verdict::Rewrite
        }
        Err(Rejection::NotOurs) => Verdict::Pass,
        Err(Rejection::Torn(_)) if !last => return None,
        Err(rejection) if rejection.count(tables) => Verdict::Reject,
        Err(_) => Verdict::Drop,
    };
    Some(verdict)
}

/// A packet that asks for a backend.
struct Question<'a> {
    tuple: &'a Tuple,
    source: Source,
    seed: u32,
    attempt: u32,
    hint: Option<u16>,
}

impl Asker for Question<'_> {
    #[inline(always)]
    fn source(&self) -> Source {
        self.source
    }

    #[inline(always)]
    fn address(&self) -> Addr {
        self.tuple.src
    }

    #[inline(always)]
    fn client(&self) -> Addr {
        self.tuple.src
    }

    #[inline(always)]
    fn leaves(&self, _flags: u32) -> bool {
        false
    }

    #[inline(always)]
    fn hint(&self) -> Option<u16> {
        self.hint
    }

    /// Another one for each attempt.
    #[inline(always)]
    fn hash<T: Tables>(&self, _tables: &T) -> u32 {
        let hash = select::flow_hash(self.tuple, self.seed);
        if self.attempt == 0 { hash } else { select::scramble(hash.wrapping_add(self.attempt)) }
    }
}

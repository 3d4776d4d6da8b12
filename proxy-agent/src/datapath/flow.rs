//! The flow table from user space: which entries belong together, when a flow has ended, and removing it.
//!
//! A flow has two to four entries (legs; see `proxy_common::abi::Flow`), and each is found from any other.
//! They live and die together: the newest time and the TCP flags of all legs decide, and all are deleted in
//! one go, the DNAT leg first, so that a packet never meets half a flow that would translate it.

use std::collections::HashSet;
use std::mem;

use proxy_common::abi::{Flow, FlowKey, Hook, Leg, maps};
use proxy_common::addr::Proto;

use super::pin::BpfRoot;
use super::table::{Cursor, Table, TableError};

/// TCP flags as they stand in a header (RFC 9293 §3.1).
mod tcp {
    pub(super) const FIN: u8 = 1 << 0;
    pub(super) const RST: u8 = 1 << 2;
}

/// One second in the unit of `Flow::last_seen`.
const SECOND: u64 = 1_000_000_000;

pub use proxy_common::lb::FlowTable;
use proxy_common::lb::track;
pub use proxy_common::lb::track::dnat_key;

/// How long a flow may be silent, in seconds (D-6, C-16; conntrack's defaults).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP, both directions open.
    pub tcp_established: u64,
    /// TCP, one direction closed.
    pub tcp_half_closed: u64,
    /// TCP, both directions closed.
    pub tcp_closed: u64,
    /// TCP, reset.
    pub tcp_reset: u64,
    /// TCP, not answered.
    pub tcp_syn: u64,
    /// UDP, not answered.
    pub udp: u64,
    /// UDP, answered.
    pub udp_stream: u64,
    /// SCTP, answered: its shutdown is not followed, so it is kept as long as an open TCP connection.
    pub sctp_established: u64,
    /// SCTP, not answered.
    pub sctp_init: u64,
}

impl Timeouts {
    /// The defaults of conntrack.
    pub const CONNTRACK: Self = Self {
        tcp_established: 86_400,
        tcp_half_closed: 3_600,
        tcp_closed: 120,
        tcp_reset: 10,
        tcp_syn: 120,
        udp: 30,
        udp_stream: 120,
        sctp_established: 86_400,
        sctp_init: 120,
    };

    /// No flow ends before this many seconds of silence.
    fn shortest(&self) -> u64 {
        let Self {
            tcp_established,
            tcp_half_closed,
            tcp_closed,
            tcp_reset,
            tcp_syn,
            udp,
            udp_stream,
            sctp_established,
            sctp_init,
        } = *self;
        let all =
            [tcp_half_closed, tcp_closed, tcp_reset, tcp_syn, udp, udp_stream, sctp_established, sctp_init];
        all.into_iter().fold(tcp_established, u64::min)
    }

    /// Seconds of silence that end a flow. `seen` are the TCP flags of each direction.
    #[must_use]
    pub fn idle(&self, table: FlowTable, proto: Proto, forward: u8, reply: u8) -> u64 {
        let half_open = table == FlowTable::HalfOpen;
        match proto {
            Proto::TCP if (forward | reply) & tcp::RST != 0 => self.tcp_reset,
            Proto::TCP if half_open => self.tcp_syn,
            Proto::TCP if forward & reply & tcp::FIN != 0 => self.tcp_closed,
            Proto::TCP if (forward | reply) & tcp::FIN != 0 => self.tcp_half_closed,
            Proto::TCP => self.tcp_established,
            Proto::SCTP if half_open => self.sctp_init,
            Proto::SCTP => self.sctp_established,
            _ if half_open => self.udp,
            _ => self.udp_stream,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self::CONNTRACK
    }
}

/// The legs of one flow that exist, in the order in which they are to be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Legs {
    /// Key and value of each.
    pub legs: Vec<(FlowKey, Flow)>,
}

impl Legs {
    /// Whether the leg that makes the flow is there; without it the others are orphans.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.leg(Leg::DNAT).is_some()
    }

    /// One leg.
    #[must_use]
    pub fn leg(&self, leg: Leg) -> Option<&(FlowKey, Flow)> {
        self.legs.iter().find(|(_, flow)| flow.leg == leg)
    }

    /// When a packet of any leg last passed.
    #[must_use]
    pub fn last_seen(&self) -> u64 {
        self.legs.iter().map(|(_, flow)| flow.last_seen).max().unwrap_or(0)
    }

    /// TCP flags of both directions: client to endpoint, endpoint to client.
    #[must_use]
    pub fn seen(&self) -> (u8, u8) {
        self.legs.iter().fold((0, 0), |(forward, reply), (_, flow)| {
            if flow.leg == Leg::DNAT || flow.leg == Leg::SNAT {
                (forward | flow.seen, reply)
            } else {
                (forward, reply | flow.seen)
            }
        })
    }

    /// Whether the flow has ended at `now`. An orphan leg ends when nothing has used it for as long as an
    /// unanswered flow may last: it may also be the beginning of a flow whose other legs come next.
    #[must_use]
    pub fn has_ended(&self, table: FlowTable, timeouts: &Timeouts, now: u64) -> bool {
        let Some((key, _)) = self.legs.first() else { return false };
        let (forward, reply) = self.seen();
        let idle = if self.is_whole() {
            timeouts.idle(table, key.proto, forward, reply)
        } else {
            timeouts.idle(FlowTable::HalfOpen, key.proto, 0, 0)
        };
        now.saturating_sub(self.last_seen()) > idle.saturating_mul(SECOND)
    }
}

/// Client → endpoint at egress, from the DNAT leg.
#[must_use]
pub fn snat_key(key: &FlowKey, dnat: &Flow) -> FlowKey {
    undnat_key(&track::undnat_key(key, dnat))
}

/// Endpoint → node address at ingress, from the SNAT leg.
#[must_use]
pub fn unsnat_key(key: &FlowKey, snat: &Flow) -> FlowKey {
    track::unsnat_key(key, snat.addr, snat.port)
}

/// Endpoint → client at egress, from the SNAT leg's key, and the reverse: also of flows that are not masqueraded.
#[must_use]
pub fn undnat_key(snat: &FlowKey) -> FlowKey {
    snat.reversed(Hook::EGRESS)
}

/// Client → endpoint at egress, from any leg.
fn middle(key: &FlowKey, flow: &Flow) -> Option<FlowKey> {
    Some(match flow.leg {
        Leg::DNAT => snat_key(key, flow),
        Leg::SNAT => *key,
        Leg::UNSNAT => FlowKey { dst: flow.addr, dport: flow.port, ..*key }.reversed(Hook::EGRESS),
        Leg::UNDNAT => key.reversed(Hook::EGRESS),
        _ => return None,
    })
}

/// All legs of the flow that `key` belongs to, as `lookup` finds them. A leg counts only if it is of the
/// kind that belongs at its place and leads back: after a new choice of endpoint, or when a port is used
/// again, it may stand for another flow (D-5).
#[must_use]
pub fn legs(key: &FlowKey, flow: &Flow, mut lookup: impl FnMut(&FlowKey) -> Option<Flow>) -> Legs {
    let alone = || Legs { legs: vec![(*key, *flow)] };
    let Some(centre) = middle(key, flow) else { return alone() };
    let mut find = |at: FlowKey, leg: Leg| {
        let value = if at == *key { Some(*flow) } else { lookup(&at) };
        value.filter(|value| value.leg == leg).map(|value| (at, value))
    };
    let snat = find(centre, Leg::SNAT);
    let undnat = find(undnat_key(&centre), Leg::UNDNAT);
    let start = undnat.map(|(at, value)| dnat_key(&at, &value));
    let back = snat.filter(|(_, value)| !value.addr.is_unspecified());
    let back = back.map(|(at, value)| unsnat_key(&at, &value));
    let is_other = match flow.leg {
        Leg::DNAT => start.is_some_and(|start| start != *key),
        Leg::UNSNAT => back != Some(*key),
        _ => false,
    };
    if is_other {
        return alone();
    }
    let dnat = if flow.leg == Leg::DNAT { Some(*key) } else { start }.and_then(|at| find(at, Leg::DNAT));
    let unsnat = back.and_then(|at| find(at, Leg::UNSNAT));
    let leads_back = |(at, value): &(FlowKey, Flow)| middle(at, value) == Some(centre);
    let found = [dnat.filter(leads_back), snat, unsnat.filter(leads_back), undnat];
    Legs { legs: found.into_iter().flatten().collect() }
}

/// What a sweep or a purge did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Swept {
    /// Entries looked at.
    pub seen: usize,
    /// Entries deleted.
    pub deleted: usize,
}

/// Looks through the flow tables a few thousand entries at a time and removes flows that have ended.
#[derive(Debug)]
pub struct Sweeper {
    flows: Table<FlowKey, Flow>,
    half_open: Table<FlowKey, Flow>,
    at: Cursor<FlowKey, Flow>,
    at_half_open: Cursor<FlowKey, Flow>,
    timeouts: Timeouts,
}

impl Sweeper {
    /// A sweeper over the pinned tables.
    pub fn open(root: &BpfRoot, timeouts: Timeouts) -> Result<Self, TableError> {
        Ok(Self {
            flows: Table::open(root, maps::FLOWS)?,
            half_open: Table::open(root, maps::HALF_OPEN)?,
            at: Cursor::default(),
            at_half_open: Cursor::default(),
            timeouts,
        })
    }

    /// Looks at the next `chunks` of both tables and deletes what has ended by now.
    pub fn tick(&mut self, chunks: usize) -> Result<Swept, TableError> {
        self.tick_at(chunks, now()?)
    }

    /// The same at a given time of `CLOCK_MONOTONIC`.
    pub fn tick_at(&mut self, chunks: usize, now: u64) -> Result<Swept, TableError> {
        let timeouts = self.timeouts;
        let shortest = timeouts.shortest().saturating_mul(SECOND);
        let mut swept = Swept::default();
        for table in [FlowTable::Established, FlowTable::HalfOpen] {
            for _ in 0..chunks {
                let (more, one) = self.step(
                    table,
                    |flow| now.saturating_sub(flow.last_seen) > shortest,
                    |table, legs| legs.has_ended(table, &timeouts, now),
                )?;
                swept.seen += one.seen;
                swept.deleted += one.deleted;
                if !more {
                    break;
                }
            }
        }
        Ok(swept)
    }

    /// Removes every flow that `wanted` names, whatever its age; from the start of both tables to their end.
    pub fn purge(&mut self, mut wanted: impl FnMut(FlowTable, &Legs) -> bool) -> Result<Swept, TableError> {
        let places = (mem::take(&mut self.at), mem::take(&mut self.at_half_open));
        let mut swept = Swept::default();
        let mut result = Ok(());
        'tables: for table in [FlowTable::Established, FlowTable::HalfOpen] {
            loop {
                match self.step(table, |_| true, &mut wanted) {
                    Ok((more, one)) => {
                        swept.seen += one.seen;
                        swept.deleted += one.deleted;
                        if !more {
                            break;
                        }
                    }
                    Err(error) => {
                        result = Err(error);
                        break 'tables;
                    }
                }
            }
        }
        (self.at, self.at_half_open) = places;
        result.map(|()| swept)
    }

    /// One chunk of one table: whether there is more, and what was done. Entries that are not `worth` a look
    /// are passed over.
    fn step(
        &mut self,
        which: FlowTable,
        worth: impl Fn(&Flow) -> bool,
        mut ended: impl FnMut(FlowTable, &Legs) -> bool,
    ) -> Result<(bool, Swept), TableError> {
        let (table, other, cursor) = match which {
            FlowTable::Established => (&self.flows, &self.half_open, &mut self.at),
            FlowTable::HalfOpen => (&self.half_open, &self.flows, &mut self.at_half_open),
        };
        let mut chunk = Vec::new();
        let more = table.chunk(cursor, |key, flow| chunk.push((key, flow)))?;
        let mut swept = Swept { seen: chunk.len(), deleted: 0 };
        let mut done = HashSet::new();
        for (key, flow) in &chunk {
            if !worth(flow) || done.contains(key) {
                continue;
            }
            let mut failure = None;
            let mut elsewhere = false;
            // A flow moves from one table to the other leg by leg.
            let flow_legs = legs(key, flow, |key| match table.get(key) {
                Ok(None) => {
                    other.get(key).map(|found| found.inspect(|_| elsewhere = true)).unwrap_or_else(|error| {
                        failure.get_or_insert(error);
                        None
                    })
                }
                Ok(found) => found,
                Err(error) => {
                    failure.get_or_insert(error);
                    None
                }
            });
            if let Some(error) = failure {
                return Err(error);
            }
            let state = if elsewhere { FlowTable::Established } else { which };
            done.extend(flow_legs.legs.iter().map(|(key, _)| *key));
            if ended(state, &flow_legs) {
                for (key, _) in &flow_legs.legs {
                    let gone = table.delete(key)? | (elsewhere && other.delete(key)?);
                    swept.deleted += usize::from(gone);
                }
            }
        }
        Ok((more, swept))
    }
}

/// Now, on the clock of `Flow::last_seen`.
pub fn now() -> Result<u64, TableError> {
    let time =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_err(|errno| TableError::Call {
            act: "read the clock for",
            object: "flows".into(),
            map: maps::FLOWS,
            source: errno.into(),
        })?;
    Ok(time.tv_sec() as u64 * SECOND + time.tv_nsec() as u64)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::net::IpAddr;

    use proxy_common::addr::{Addr, Port};

    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn key(src: (&str, u16), dst: (&str, u16), hook: Hook) -> FlowKey {
        FlowKey {
            src: addr(src.0),
            dst: addr(dst.0),
            sport: Port::new(src.1),
            dport: Port::new(dst.1),
            proto: Proto::TCP,
            hook,
            pad: 0,
        }
    }

    fn flow(leg: Leg, to: (&str, u16), other_port: u16) -> Flow {
        Flow {
            addr: addr(to.0),
            port: Port::new(to.1),
            other_port: Port::new(other_port),
            leg,
            seen: 0,
            pad: 0,
            backend: 1,
            generation: 1,
            service: 1,
            pad2: 0,
            last_seen: 0,
        }
    }

    const CLIENT: (&str, u16) = ("10.0.0.9", 40000);
    const VIP: (&str, u16) = ("10.96.0.1", 80);
    const ENDPOINT: (&str, u16) = ("10.244.1.5", 8080);
    const NODE: (&str, u16) = ("10.0.0.1", 61000);

    /// A masqueraded flow whose client got another source port before that, because of a collision.
    fn masqueraded() -> HashMap<FlowKey, Flow> {
        let moved = (CLIENT.0, 50000);
        HashMap::from([
            (key(CLIENT, VIP, Hook::INGRESS), flow(Leg::DNAT, ENDPOINT, 50000)),
            (key(moved, ENDPOINT, Hook::EGRESS), flow(Leg::SNAT, NODE, 0)),
            (key(ENDPOINT, NODE, Hook::INGRESS), flow(Leg::UNSNAT, moved, 0)),
            (key(ENDPOINT, moved, Hook::EGRESS), flow(Leg::UNDNAT, VIP, 40000)),
        ])
    }

    fn plain() -> HashMap<FlowKey, Flow> {
        HashMap::from([
            (key(CLIENT, VIP, Hook::INGRESS), flow(Leg::DNAT, ENDPOINT, 0)),
            (key(ENDPOINT, CLIENT, Hook::EGRESS), flow(Leg::UNDNAT, VIP, 0)),
        ])
    }

    #[test]
    fn every_leg_finds_all_the_others() {
        for table in [masqueraded(), plain()] {
            for (at, value) in &table {
                let found = legs(at, value, |key| table.get(key).copied());
                assert_eq!(found.legs.len(), table.len(), "from {:?}", value.leg);
                assert!(found.is_whole());
                assert!(found.legs.iter().all(|(key, value)| table[key] == *value));
                assert_eq!(found.legs[0].1.leg, Leg::DNAT, "the DNAT leg goes first");
            }
        }
    }

    #[test]
    fn a_leg_without_its_flow_is_an_orphan() {
        let mut table = masqueraded();
        table.remove(&key(CLIENT, VIP, Hook::INGRESS));
        for (at, value) in &table {
            let found = legs(at, value, |key| table.get(key).copied());
            assert!(!found.is_whole());
            assert!(!found.has_ended(FlowTable::Established, &Timeouts::CONNTRACK, 120 * SECOND));
            assert!(found.has_ended(FlowTable::Established, &Timeouts::CONNTRACK, 121 * SECOND));
        }
    }

    #[test]
    fn a_leg_of_another_kind_in_its_place_belongs_to_another_flow() {
        let mut table = plain();
        let reply = key(ENDPOINT, CLIENT, Hook::EGRESS);
        table.insert(reply, flow(Leg::SNAT, NODE, 0));
        let start = key(CLIENT, VIP, Hook::INGRESS);
        let found = legs(&start, &table[&start], |key| table.get(key).copied());
        assert_eq!(found.legs.len(), 1);
    }

    #[test]
    fn what_an_earlier_choice_of_endpoint_left_behind_does_not_end_the_new_flow() {
        let mut table = plain();
        let start = key(CLIENT, VIP, Hook::INGRESS);
        let other = ("10.244.1.6", 8080);
        table.insert(start, flow(Leg::DNAT, other, 0));
        table.insert(key(other, CLIENT, Hook::EGRESS), flow(Leg::UNDNAT, VIP, 0));
        let left = key(ENDPOINT, CLIENT, Hook::EGRESS);
        let find = |key: &FlowKey| table.get(key).copied();
        assert_eq!(legs(&left, &table[&left], find).legs, [(left, table[&left])]);
        let new = legs(&start, &table[&start], find);
        assert!(new.is_whole() && new.legs.len() == 2 && new.legs.iter().all(|(key, _)| *key != left));
    }

    #[test]
    fn a_tuple_that_another_service_has_taken_is_not_part_of_the_flow() {
        let mut table = plain();
        table.insert(key(ENDPOINT, CLIENT, Hook::EGRESS), flow(Leg::UNDNAT, ("10.96.0.2", 80), 0));
        let start = key(CLIENT, VIP, Hook::INGRESS);
        let found = legs(&start, &table[&start], |key| table.get(key).copied());
        assert_eq!(found.legs, [(start, table[&start])]);
    }

    #[test]
    fn an_answer_tuple_whose_flow_got_another_node_port_is_an_orphan() {
        let mut table = masqueraded();
        let left = key(ENDPOINT, NODE, Hook::INGRESS);
        let moved = key((CLIENT.0, 50000), ENDPOINT, Hook::EGRESS);
        table.insert(moved, flow(Leg::SNAT, (NODE.0, 61001), 0));
        let found = legs(&left, &table[&left], |key| table.get(key).copied());
        assert_eq!(found.legs, [(left, table[&left])]);
    }

    #[test]
    fn the_newest_packet_of_either_direction_keeps_a_flow() {
        let mut table = plain();
        let reply = key(ENDPOINT, CLIENT, Hook::EGRESS);
        table.get_mut(&reply).unwrap().last_seen = 500_000 * SECOND;
        let start = key(CLIENT, VIP, Hook::INGRESS);
        let found = legs(&start, &table[&start], |key| table.get(key).copied());
        let ended = |now: u64| found.has_ended(FlowTable::Established, &Timeouts::CONNTRACK, now * SECOND);
        assert!(!ended(586_400));
        assert!(ended(586_401));
    }

    #[test]
    fn time_outs_follow_what_both_directions_have_shown() {
        let (fin, rst) = (tcp::FIN, tcp::RST);
        let (open, half) = (FlowTable::Established, FlowTable::HalfOpen);
        let table = [
            (open, Proto::TCP, 0, 0, 86_400),
            (open, Proto::TCP, fin, 0, 3_600),
            (open, Proto::TCP, 0, fin, 3_600),
            (open, Proto::TCP, fin, fin, 120),
            (open, Proto::TCP, fin, rst, 10),
            (open, Proto::TCP, rst, 0, 10),
            (half, Proto::TCP, 2, 0, 120),
            (half, Proto::TCP, 2, rst, 10),
            (half, Proto::UDP, 0, 0, 30),
            (open, Proto::UDP, 0, 0, 120),
            (half, Proto::SCTP, 0, 0, 120),
            (open, Proto::SCTP, 0, 0, 86_400),
        ];
        for (which, proto, forward, reply, want) in table {
            let idle = Timeouts::CONNTRACK.idle(which, proto, forward, reply);
            assert_eq!(idle, want, "{which:?} {proto} {forward:#x} {reply:#x}");
        }
        assert_eq!(Timeouts::CONNTRACK.shortest(), 10);
    }
}

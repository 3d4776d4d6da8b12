//! Records that the agent makes, of connections that began without it.

use super::record::{INNER, MIDDLE, OUTER};
use super::{Flow, State, Tuple, flow_flags};
use crate::addr::{Addr, Port};

impl Flow {
    /// A connection from `client` to a Service (`asked`) that another proxy has led to `endpoint`, under the
    /// address and port `source` if it has masqueraded it: left to netfilter for now. `meant` says that both
    /// ends have shown that they mean it.
    #[must_use]
    pub const fn adopted(
        asked: &Tuple,
        endpoint: (Addr, Port),
        source: Option<(Addr, Port)>,
        [service, backend, generation]: [u32; 3],
        (answered, meant): (bool, bool),
        now: u64,
    ) -> Self {
        let mut flow = Self::EMPTY;
        let ((client, port), (to, to_port)) = ((asked.src, asked.sport), endpoint);
        let middle = Tuple::new(client, port, to, to_port, asked.proto);
        flow.near[OUTER] = asked.write_pair(&mut flow.pairs[OUTER]) as u8;
        flow.near[MIDDLE] = middle.write_pair(&mut flow.pairs[MIDDLE]) as u8;
        flow.flags = flow_flags::ADOPTED;
        if let Some((addr, port)) = source {
            let inner = Tuple::new(addr, port, to, to_port, asked.proto);
            flow.near[INNER] = inner.write_pair(&mut flow.pairs[INNER]) as u8;
            flow.flags |= flow_flags::MASQUERADE;
            flow.source = flow.pairs[INNER].seal() | 1;
        }
        (flow.service, flow.backend, flow.generation) = (service, backend, generation);
        flow.state = State::LEFT;
        (flow.old, flow.legs) = (meant as u8, 2);
        (flow.seen, flow.born, flow.checked) = ([now, if answered { now } else { 0 }], now, now);
        flow
    }

    /// The same of a connection that stays with netfilter, because another one has the same ends between
    /// client and endpoint, and netfilter tells them apart: it is never looked up there.
    #[must_use]
    pub const fn known_by_its_service(mut self) -> Self {
        if !self.has_source() {
            (self.near[INNER], self.pairs[INNER]) = (self.near[MIDDLE], self.pairs[MIDDLE]);
            self.flags |= flow_flags::MASQUERADE;
            self.source = self.pairs[INNER].seal() | 1;
        }
        self
    }

    /// A connection whose packets are not translated, from one end to the other, and has lost the endpoint
    /// that it was given when its socket connected; `answered` unless it is still trying to.
    #[must_use]
    pub const fn lost(
        tuple: &Tuple,
        [service, backend, generation]: [u32; 3],
        answered: bool,
        now: u64,
    ) -> Self {
        let mut flow = Self::EMPTY;
        flow.near[OUTER] = tuple.write_pair(&mut flow.pairs[OUTER]) as u8;
        (flow.service, flow.backend, flow.generation) = (service, backend, generation);
        (flow.state, flow.old, flow.legs) = (State::LOST, 1, 1);
        (flow.seen, flow.born, flow.checked) = ([now, if answered { now } else { 0 }], now, now);
        flow
    }
}

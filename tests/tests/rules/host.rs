//! The proxy without its kernel: the functions that the programs are made of, over tables in memory.

use std::cell::RefCell;
use std::collections::HashMap;

use proxy_agent::datapath::Datapath as _;
use proxy_agent::datapath::memory::Memory;
use proxy_agent::plan::{Actual, Capacity, Step};
use proxy_common::abi::{Flow, FlowKey, Hook, SocketState};
use proxy_common::addr::{Port, Proto};
use proxy_common::lb::FlowTable;
use proxy_common::lb::socket::{self, Answer, Call};
use proxy_common::testing::{ByteFrame, MemoryTables, Outcome, run};

use super::oracle::Target;
use super::system::{Caller, Observed, Programs, target};

/// Cookies of network namespaces.
const HOST_NETNS: u64 = 1;
const POD_NETNS: u64 = 4_711;

/// Tables in memory.
#[derive(Default)]
pub(crate) struct Host {
    memory: Memory,
    tables: MemoryTables,
    sockets: Vec<(Caller, SocketState)>,
}

impl Host {
    /// The flows there are.
    pub(crate) fn flows(&self) -> &RefCell<HashMap<(FlowTable, FlowKey), Flow>> {
        &self.tables.flows
    }
}

fn call(to: Target, proto: Proto, who: Caller, connect: bool) -> Call {
    let netns = if who == Caller::Host { HOST_NETNS } else { POD_NETNS };
    Call { dst: to.0.into(), dport: Port::new(to.1), proto, netns, connect }
}

impl Programs for Host {
    fn empty(&mut self) {
        *self = Self::default();
    }

    fn capacity(&self) -> Capacity {
        Capacity::default()
    }

    fn host_netns(&self) -> u64 {
        HOST_NETNS
    }

    fn read(&mut self) -> Actual {
        self.memory.actual.clone()
    }

    fn apply(&mut self, steps: &[Step]) {
        self.memory.apply(steps).expect("room in the tables");
        let actual = &self.memory.actual;
        self.tables.config = Some(actual.config);
        self.tables.addresses = actual.addresses.clone().into_iter().collect();
        self.tables.frontends = actual.frontends.clone().into_iter().collect();
        self.tables.slots = actual.slots.clone().into_iter().collect();
        self.tables.backends = actual.backends.clone().into_iter().collect();
        self.tables.sources = actual.sources.iter().copied().collect();
        self.tables.ifaces = actual.ifaces.clone().into_iter().collect();
    }

    fn run(&mut self, frame: &ByteFrame, hook: Hook, ifindex: u32) -> Outcome {
        run(&self.tables, frame, hook, ifindex)
    }

    fn call(&mut self, to: Target, proto: Proto, who: Caller, connect: bool) -> Option<Observed> {
        Some(match socket::decide(&self.tables, &call(to, proto, who, connect)) {
            Answer::Leave => Observed::Pass,
            Answer::Refuse => Observed::Refuse,
            Answer::Deny => Observed::Drop,
            Answer::Use(entry) => Observed::Forward(target(entry.addr, entry.port), None),
        })
    }

    fn keep_socket(&mut self, who: Caller, _: bool) -> usize {
        self.sockets.push((who, SocketState::EMPTY));
        self.sockets.len() - 1
    }

    fn send(&mut self, socket: usize, to: Target) -> Observed {
        let (who, state) = &mut self.sockets[socket];
        let call = call(to, Proto::UDP, *who, false);
        let known = state.translation(&self.tables, &call);
        match known.map_or_else(|| socket::decide(&self.tables, &call), Answer::Use) {
            Answer::Leave => Observed::Pass,
            Answer::Refuse => Observed::Refuse,
            Answer::Deny => Observed::Drop,
            Answer::Use(entry) => {
                assert!(
                    state.remember(&entry, socket::passes_ingress(&self.tables, &call)),
                    "one destination"
                );
                Observed::Forward(target(entry.addr, entry.port), None)
            }
        }
    }

    fn forget_half_open(&mut self) {
        self.tables.flows.borrow_mut().retain(|(table, _), _| *table == FlowTable::Established);
    }

    fn rest(&mut self, secs: u32) {
        self.tables.now.set(self.tables.now.get() + u64::from(secs) * 1_000_000_000);
    }
}

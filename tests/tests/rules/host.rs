//! The proxy without its kernel: the functions that the programs are made of, over tables in memory.

use agent_core::datapath::Datapath as _;
use agent_core::datapath::memory::Memory;
use agent_core::plan::{Actual, Capacity, Step};
use proxy_common::abi::{Hook, REPLY, SocketEntry};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::lb::Subprograms as _;
use proxy_common::lb::socket::{Call, Decision};
use proxy_common::testing::{ByteFrame, MemorySocket, MemoryTables, Outcome, run};

use super::oracle::Target;
use super::system::{Caller, Observed, Programs, target};

/// Cookies of network namespaces.
const HOST_NETNS: u64 = 1;
const POD_NETNS: u64 = 4_711;

/// Tables in memory.
pub(crate) struct Host {
    memory: Memory,
    tables: MemoryTables,
    sockets: Vec<(Caller, MemorySocket)>,
}

impl Default for Host {
    fn default() -> Self {
        let tables = MemoryTables::default();
        // Nothing has ever happened at 0.
        tables.now.set(1_000_000_000_000);
        Self { memory: Memory::default(), tables, sockets: Vec::new() }
    }
}

impl Host {
    /// The tables with the flows.
    pub(crate) const fn tables(&self) -> &MemoryTables {
        &self.tables
    }
}

fn call(to: Target, proto: Proto, who: Caller, connect: bool) -> Call {
    let netns = if who == Caller::Host { HOST_NETNS } else { POD_NETNS };
    Call {
        dst: to.0.into(),
        dport: Port::new(to.1),
        proto,
        netns,
        connect,
        peer: Addr::ANY_V6,
        peer_port: Port(0),
    }
}

fn observed((answer, entry): (Decision, SocketEntry)) -> Observed {
    match answer {
        Decision::Pass => Observed::Pass,
        Decision::Reject => Observed::Refuse,
        Decision::Deny => Observed::Drop,
        Decision::Translate => Observed::Forward(target(entry.addr, entry.port), None),
    }
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
        self.tables.slots = actual.slots.iter().map(|(slot, backend)| (slot, *backend)).collect();
        self.tables.backends = actual.backends.iter().map(|(index, backend)| (index, *backend)).collect();
        self.tables.sources = actual.sources.iter().copied().collect();
        self.tables.ifaces = actual.ifaces.clone().into_iter().collect();
        self.tables.masquerade = actual.routes.clone().into_iter().collect();
    }

    fn run(&mut self, frame: &ByteFrame, hook: Hook, ifindex: u32) -> Outcome {
        run(&self.tables, frame, hook, ifindex)
    }

    fn call(&mut self, to: Target, proto: Proto, who: Caller, connect: bool) -> Option<Observed> {
        let answer = MemorySocket::default().call(&self.tables, &call(to, proto, who, connect));
        Some(observed(answer))
    }

    fn keep_socket(&mut self, who: Caller, _: bool) -> usize {
        self.sockets.push((who, MemorySocket::default()));
        self.sockets.len() - 1
    }

    fn send(&mut self, socket: usize, to: Target) -> Observed {
        let (who, memory) = &mut self.sockets[socket];
        observed(memory.call(&self.tables, &call(to, Proto::UDP, *who, false)))
    }

    fn forget_half_open(&mut self) {
        for flow in self.tables.live().iter().filter(|flow| flow.seen[REPLY] == 0) {
            assert_eq!(self.tables.take_apart(flow.id), 1, "nobody else is at work");
        }
        assert_eq!(self.tables.broken_flows(), [""; 0]);
    }

    fn rest(&mut self, secs: u32) {
        self.tables.now.set(self.tables.now.get() + u64::from(secs) * 1_000_000_000);
    }
}

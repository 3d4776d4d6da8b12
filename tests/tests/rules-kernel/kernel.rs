//! The proxy in this kernel.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use agent_core::plan::{Actual, Capacity, Step};
use agent_kernel::datapath::load::Capacities;
use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData};
use proxy_common::abi::{Affinity, AffinityKey, Hook, REPLY, capacity, maps};
use proxy_common::addr::Proto;
use proxy_common::testing::{ByteFrame, Outcome};
use proxy_tests::programs::{self, clear, entries, with_own_mounts};

use super::oracle::Target;
use super::sockets::Sockets;
use super::system::{Caller, Observed, Programs};

/// Small enough to be read after every step; no LRU is so full that it evicts what is asked about.
const CAPACITIES: Capacities = Capacities {
    frontends: 1_024,
    slots: 4_096,
    backends: 4_096,
    addresses: 256,
    sources: 256,
    ifaces: 16,
    services: 256,
    flows: 32_768,
    young_flows: 131_072,
    fragments: 1_024,
    affinity: 16_384,
};

/// Programs, maps, and sockets to call from.
pub(crate) struct Kernel {
    programs: programs::Programs,
    affinity: HashMap<MapData, AffinityKey, Affinity>,
    sockets: Sockets,
}

/// Runs a test with the programs loaded, on a thread of its own in the node's network namespace.
///
/// # Panics
/// When that cannot be made, with what is missing.
pub(crate) fn with_kernel<T: Send>(test: impl FnOnce(Kernel) -> T + Send) -> T {
    // The whole process is in the cgroup of the one test that runs.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let work = |directory: &Path| -> Result<T> {
        proxy_tests::require::world()?;
        let mut programs = programs::Programs::load(directory, &CAPACITIES)?;
        let sockets = Sockets::new(programs.loaded())?;
        Ok(test(Kernel { affinity: programs.hash(maps::AFFINITY)?, programs, sockets }))
    };
    with_own_mounts(work).context("making the node").unwrap_or_else(|error| panic!("{error:#}"))
}

impl Programs for Kernel {
    fn empty(&mut self) {
        self.programs.empty().expect("tables to empty");
        self.programs.end_flows(|_| true).expect("flows to forget");
        clear(&mut self.affinity).expect("clients to forget");
        self.sockets.close();
    }

    fn capacity(&self) -> Capacity {
        let Capacities { frontends, slots, backends, addresses, sources, services, ifaces, .. } = CAPACITIES;
        let routes = capacity::MASQUERADE as u32;
        Capacity { frontends, slots, backends, addresses, sources, services, ifaces, routes }
    }

    fn host_netns(&self) -> u64 {
        self.sockets.host_netns()
    }

    fn read(&mut self) -> Actual {
        self.programs.read().expect("tables to read")
    }

    fn apply(&mut self, steps: &[Step]) {
        self.programs.apply(steps).expect("tables to write");
    }

    fn run(&mut self, frame: &ByteFrame, hook: Hook, ifindex: u32) -> Outcome {
        self.programs.run(&frame.bytes, hook, true, ifindex).expect("a test run").expect("a whole packet")
    }

    fn call(&mut self, to: Target, proto: Proto, who: Caller, connect: bool) -> Option<Observed> {
        self.sockets.call(to, proto, who, connect)
    }

    fn keep_socket(&mut self, who: Caller, six: bool) -> usize {
        self.sockets.keep(who, six)
    }

    fn send(&mut self, socket: usize, to: Target) -> Observed {
        self.sockets.send(socket, to)
    }

    fn forget_half_open(&mut self) {
        self.programs.end_flows(|flow| flow.seen[REPLY] == 0).expect("unanswered flows to forget");
    }

    /// The clock of the kernel cannot be set: records become older instead.
    fn rest(&mut self, secs: u32) {
        for (key, mut value) in entries(&self.affinity).expect("clients to list") {
            value.last_seen = value.last_seen.saturating_sub(u64::from(secs) * 1_000_000_000);
            self.affinity.insert(key, value, 0).expect("a client to change");
        }
    }
}

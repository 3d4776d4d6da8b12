//! The fixture room: a cluster on one kernel, for end-to-end tests and the demo.
//!
//! A [`test_cluster::TestCluster`] is a set of network namespaces: nodes joined by an underlay, pods in the nodes, clients
//! outside. [`pod::Place`] is where a process can run in it; [`probe`] runs the test-pod program there and reads its
//! answers. [`agent::Agent`] runs the real agent in a node, [`manifests`] and [`apiserver`] feed it,
//! [`packet`] builds and checks packets, [`wire`] sends and receives them as raw frames, [`mod@reference`] has netfilter do
//! what the agent does. Nothing here knows the agent's insides: it is a binary with a command
//! line (only [`programs`] and the benchmarks call its planner and load its programs).
//!
//! Everything made here is a value that takes itself down when dropped, also when a test panics; what a killed
//! run has left is swept by the next one ([`sweep`]). Names begin with `ebpx-<pid>-<n>`.

pub mod agent;
pub mod answer;
pub mod apiserver;
pub mod cgroup;
pub mod chaos;
pub mod container;
pub mod crowd;
pub mod manifests;
pub mod netns;
pub mod object;
pub mod packet;
pub mod pod;
pub mod probe;
pub mod programs;
pub mod reference;
pub mod require;
pub mod rollout;
pub mod stop;
pub mod sweep;
pub mod test_cluster;
pub mod wire;

use std::sync::atomic::{AtomicU32, Ordering};

/// Prefix of everything the tests make on this machine.
pub const PREFIX: &str = "ebpx";

/// A name nobody else has: `ebpx-<pid>-<n>`.
#[must_use]
pub fn unique() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{PREFIX}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Whether the operator wants to look at the world of a test after it has ended (`PROXY_TESTS_KEEP=1`).
#[must_use]
pub fn keep() -> bool {
    std::env::var_os("PROXY_TESTS_KEEP").is_some_and(|value| value == "1")
}

/// How many times longer than on an ordinary machine things may take here (`PROXY_TESTS_PATIENCE`): an emulated one
/// is ten times slower.
#[must_use]
pub fn patience() -> u32 {
    std::env::var("PROXY_TESTS_PATIENCE").ok().and_then(|value| value.parse().ok()).unwrap_or(1).max(1)
}

/// Says something to the person who runs the tests; the one place that does.
pub(crate) fn say(line: &str) {
    eprintln!("{line}");
}

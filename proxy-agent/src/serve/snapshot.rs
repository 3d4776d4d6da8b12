//! What the run loop and the tables know at one moment, for a scrape.

use std::collections::BTreeMap;

use agent_core::model::NoLocalByFamily;
use agent_kernel::datapath::pinned::MapFill;
use agent_kernel::datapath::tables::growth::Standing;
use proxy_common::abi::Reason;

use super::http::Counts;
use super::probes::ProbeCounts;

/// What the run loop and the tables know at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Where the Services come from.
    pub source: String,
    /// Whether the source answers.
    pub connected: bool,
    /// Services known.
    pub services: u64,
    /// Endpoints known.
    pub endpoints: u64,
    /// Frontends programmed.
    pub frontends: u64,
    /// Interfaces with programs.
    pub interfaces: u64,
    /// Interfaces that refused a program.
    pub interfaces_failed: u64,
    /// Syncs that changed a table.
    pub generation: u64,
    /// Objects left out.
    pub warnings: u64,
    /// Slice changes received and not yet programmed (H-36).
    pub endpoint_changes_pending: u64,
    /// Slice changes received (H-37).
    pub endpoint_changes: u64,
    /// Services with changes not yet programmed (H-38).
    pub service_changes_pending: u64,
    /// Service changes received, once for each family (H-39, H-49).
    pub service_changes: u64,
    /// Service ports without an endpoint here (H-42).
    pub without_local: NoLocalByFamily,
    /// Nodes with endpoints that answer clients themselves, by how they fare.
    pub dsr_nodes: BTreeMap<&'static str, u64>,
    /// What agents have asked each other.
    pub probes: ProbeCounts,
    /// Connections to the agent's own ports.
    pub connections: Counts,
    /// The counters of REASONS.
    pub reasons: Vec<(Reason, u64)>,
    /// How full the tables are.
    pub tables: Vec<MapFill>,
    /// How they grow.
    pub growth: Standing,
    /// How long clients are remembered, by Service id: what decides whether an entry of AFFINITY is in use.
    pub affinity_secs: BTreeMap<u32, u32>,
}

//! What the command line sees of the tables: a trait, so that the commands are tested over tables in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use proxy_common::abi::{AgentState, Flow, FlowId, Reason, ServiceName, ServiceStats, untext};

use agent_core::plan::Actual;
pub use agent_kernel::datapath::pinned::MapFill;

/// One pinned link.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct LinkInfo {
    /// Its pin's name.
    pub name: String,
    /// The program behind it.
    pub program: String,
    /// Whether it is attached to something that still exists.
    pub attached: bool,
    /// Id of that program.
    pub program_id: u32,
}

/// The tables of this node, for reading; flows can be deleted.
pub trait View {
    /// The configuration tables.
    fn actual(&self) -> Result<Actual>;
    /// What the agent says of itself.
    fn agent(&self) -> Result<AgentState>;
    /// Whether an agent runs here, whatever it last said of itself.
    fn is_running(&self) -> Result<bool>;
    /// Objects that were left out, newest last.
    fn warnings(&self) -> Result<Vec<String>>;
    /// The counters of REASONS.
    fn reasons(&self) -> Result<Vec<(Reason, u64)>>;
    /// Counters by service id, summed over CPUs.
    fn service_stats(&self) -> Result<BTreeMap<u32, ServiceStats>>;
    /// Calls `each` for every living flow.
    fn flows(&self, each: &mut dyn FnMut(&Flow)) -> Result<()>;
    /// Ends flows; how many of them there were.
    fn end_flows(&self, ids: &[FlowId]) -> Result<u32>;
    /// How full the tables are.
    fn fill(&self) -> Result<Vec<MapFill>>;
    /// The pinned links.
    fn links(&self) -> Result<Vec<LinkInfo>>;
    /// Tells the agent to leave what is new to another proxy, or no longer.
    fn retire(&mut self, retired: bool) -> Result<()>;
}

/// The moment a command runs at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Unix time in milliseconds, as in [`AgentState`].
    pub unix_ms: u64,
    /// `CLOCK_MONOTONIC_COARSE` in nanoseconds, as in [`Flow`].
    pub mono_ns: u64,
}

impl Now {
    /// The moment this is called at.
    pub fn read() -> Result<Self> {
        use nix::time::{ClockId, clock_gettime};
        let unix = std::time::Duration::from(clock_gettime(ClockId::CLOCK_REALTIME)?);
        let mono = std::time::Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)?);
        Ok(Self {
            unix_ms: u64::try_from(unix.as_millis()).unwrap_or(u64::MAX),
            mono_ns: u64::try_from(mono.as_nanos()).unwrap_or(u64::MAX),
        })
    }
}

/// A span for a person: its two largest units at most.
#[must_use]
pub fn span(ms: u64) -> String {
    match ms / 1000 {
        0 => format!("{ms}ms"),
        s @ 1..60 => format!("{s}s"),
        s @ 60..3600 => format!("{}m{}s", s / 60, s % 60),
        s @ 3600..86400 => format!("{}h{}m", s / 3600, s % 3600 / 60),
        s => format!("{}d{}h", s / 86400, s % 86400 / 3600),
    }
}

/// `namespace/name:port` of a Service port; `#7` when its name is not in the tables.
#[must_use]
pub fn service_text(id: u32, names: &BTreeMap<u32, Arc<ServiceName>>) -> String {
    let Some(name) = names.get(&id) else { return format!("#{id}") };
    let (namespace, service, port) = (untext(&name.namespace), untext(&name.name), untext(&name.port));
    match port {
        "" => format!("{namespace}/{service}"),
        port => format!("{namespace}/{service}:{port}"),
    }
}

/// `address:port`, an IPv6 address in brackets.
#[must_use]
pub fn endpoint_text(addr: proxy_common::addr::Addr, port: proxy_common::addr::Port) -> String {
    std::net::SocketAddr::new(addr.into(), port.number()).to_string()
}

/// Live connections by backend index and generation.
///
/// Connections that were translated at their socket have no flow and are not counted.
pub(super) fn connections(view: &dyn View) -> Result<BTreeMap<(u32, u32), u64>> {
    let mut count = BTreeMap::new();
    view.flows(&mut |flow| {
        if !flow.is_own() {
            *count.entry((flow.backend, flow.generation)).or_default() += 1;
        }
    })?;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_has_two_units_at_most() {
        let texts: Vec<_> = [0, 999, 1000, 61_000, 3_660_000, 90_000_000].map(span).into();
        assert_eq!(texts, ["0ms", "999ms", "1s", "1m1s", "1h1m", "1d1h"]);
    }

    #[test]
    fn fill_is_rounded_up() {
        let percent = |used, max| MapFill { name: "FLOWS", used, max }.percent();
        assert_eq!([percent(0, 10), percent(1, 1000), percent(9, 10), percent(10, 10)], [0, 1, 90, 100]);
        assert_eq!(percent(0, 0), 0);
    }
}

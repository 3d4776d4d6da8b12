//! What lies in the kernel, for the command line and the metrics: nothing is loaded, nothing is changed
//! except what a person asks to flush, and what the agent says of itself.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use aya::Pod;
use nix::time::{ClockId, clock_gettime};
use proxy_common::abi::{
    Affinity, AffinityKey, AgentState, Flow, FlowId, Fragment, FragmentKey, Key, Leg, Reason, ServiceName,
    ServiceStats, Warning, maps, text, untext,
};
use proxy_common::lb::FRAGMENTS_LIVE;

use crate::datapath::attach::{Direction, PinName};
use crate::datapath::flow::Flows;
use crate::datapath::store::pin::{BpfRoot, PinError};
use crate::datapath::store::retired::Retired;
use crate::datapath::store::table::{Cursor, Table, TableError};
use crate::datapath::tables::kernel::Kernel;
use crate::sys::{self, Target};
use agent_core::plan::Actual;

/// Why there is nothing to be seen.
#[derive(Debug, thiserror::Error)]
pub enum PinnedError {
    /// No pins.
    #[error("no agent has run under {root}: start `proxy-agent run`, or name its directory with --bpf-root")]
    NoAgent { root: String },
    /// Not allowed to look.
    #[error("not allowed to read the tables under {root}: run as root")]
    Forbidden { root: String, source: TableError },
    /// A table cannot be used.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The clock that entries are dated by cannot be read.
    #[error("reading CLOCK_MONOTONIC_COARSE")]
    Clock(#[source] nix::Error),
    /// The pins cannot be listed.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct MapFill {
    pub name: &'static str,
    /// Entries in use.
    pub used: u64,
    /// Entries it is made for.
    pub max: u64,
}

impl MapFill {
    /// Fill in per cent, rounded up so that only an empty map reads 0.
    #[must_use]
    pub fn percent(&self) -> u64 {
        (self.used * 100).div_ceil(self.max.max(1))
    }
}

/// Where a program is attached.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A cgroup, by its id (inode number of its directory).
    Cgroup(u64),
    /// An interface, by its index.
    Interface(u32, Direction),
    /// An interface's driver, by the interface's index.
    Driver(u32),
    /// Nowhere any more: the cgroup or interface has gone.
    Nowhere,
}

/// A pinned link, or the filter that stands for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// Name of the pin.
    pub name: String,
    /// Where the program runs.
    pub place: Place,
    /// Name of the program, as the kernel keeps it (15 bytes).
    pub program: String,
    /// Id of the program.
    pub program_id: u32,
    /// A filter of the clsact qdisc rather than a link.
    pub filter: bool,
}

/// The pinned tables.
#[derive(Debug)]
pub struct Pinned {
    root: BpfRoot,
    kernel: Kernel,
    agent: Table<u32, AgentState>,
    warnings: Table<u32, Warning>,
    services: Table<u32, ServiceName>,
    reasons: Table<u32, u64>,
    stats: Table<u32, ServiceStats>,
    flows: Flows,
    legs: Table<Key, Leg>,
    retired: Retired,
}

impl Pinned {
    /// Opens what an agent has pinned under `root`: one generation of it, whatever comes meanwhile.
    pub fn open(root: &BpfRoot) -> Result<Self, PinnedError> {
        let settled = root.settled()?;
        match Self::open_generation(&settled) {
            // It has gone while it was opened, since there is a newer one.
            Err(PinnedError::NoAgent { .. }) if root.settled()? != settled => {
                Self::open_generation(&root.settled()?)
            }
            opened => opened,
        }
    }

    fn open_generation(root: &BpfRoot) -> Result<Self, PinnedError> {
        let open = || -> Result<Self, TableError> {
            Ok(Self {
                root: root.clone(),
                kernel: Kernel::open(root)?,
                agent: Table::open(root, maps::AGENT)?,
                warnings: Table::open(root, maps::COMPLAINTS)?,
                services: Table::open(root, maps::SERVICES)?,
                reasons: Table::open(root, maps::REASONS)?,
                stats: Table::open(root, maps::SERVICE_STATS)?,
                flows: Flows::open(root)?,
                legs: Table::open(root, maps::FLOWS)?,
                retired: Retired::open(root)?,
            })
        };
        open().map_err(|error| {
            let root = root.path().display().to_string();
            match error {
                TableError::Open { ref source, .. } if source.kind() == io::ErrorKind::NotFound => {
                    PinnedError::NoAgent { root }
                }
                TableError::Open { ref source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                    PinnedError::Forbidden { root, source: error }
                }
                other => other.into(),
            }
        })
    }

    /// Every configuration table.
    pub fn actual(&self) -> Result<Actual, PinnedError> {
        Ok(self.kernel.actual()?)
    }

    /// Tells the agent to leave what is new to another proxy, or no longer. Where no agent runs, the programs are told
    /// to leave it; what they did not see meanwhile only an agent can take back.
    pub fn retire(&mut self, retired: bool) -> Result<(), PinnedError> {
        self.retired.set(retired)?;
        if retired && !self.is_running()? {
            self.kernel.leave_new()?;
        }
        Ok(())
    }

    /// Whether the agent has been told so.
    pub fn is_retired(&self) -> Result<bool, PinnedError> {
        Ok(self.retired.get()?)
    }

    /// What the agent last said of itself.
    pub fn agent(&self) -> Result<AgentState, PinnedError> {
        self.agent
            .get(&0)?
            .ok_or_else(|| PinnedError::NoAgent { root: self.root.path().display().to_string() })
    }

    /// Whether an agent runs here, whatever it last said.
    pub fn is_running(&self) -> Result<bool, PinnedError> {
        Ok(self.root.is_claimed()?)
    }

    /// Says how the agent fares.
    pub fn write_agent(&self, state: &AgentState) -> Result<(), PinnedError> {
        Ok(self.agent.put(&0, state)?)
    }

    /// What the agent warns of.
    pub fn warnings(&self) -> Result<Vec<String>, PinnedError> {
        let mut found = Vec::new();
        self.warnings.scan(|_, warning| {
            let text = untext(&warning.text);
            if !text.is_empty() {
                found.push(text.to_owned());
            }
        })?;
        Ok(found)
    }

    /// Replaces the warnings; of more than there is room for, the last ones are kept.
    pub fn write_warnings(&self, lines: &[String]) -> Result<(), PinnedError> {
        let room = self.warnings.max() as usize;
        let kept = lines.get(lines.len().saturating_sub(room)..).unwrap_or(&[]);
        let entry = |n: usize| Warning { text: kept.get(n).map_or([0; 256], |line| text(line)) };
        let keys: Vec<u32> = (0..self.warnings.max()).collect();
        let values: Vec<Warning> = (0..room).map(entry).collect();
        Ok(self.warnings.put_many(&keys, &values).map_err(|(_, error)| error)?)
    }

    /// How often each [`Reason`] occurred, summed over the CPUs.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>, PinnedError> {
        let mut found = Vec::with_capacity(Reason::COUNT);
        for reason in Reason::ALL {
            let counts = self.reasons.get_all(&(*reason as u32))?.unwrap_or_default();
            found.push((*reason, counts.into_iter().fold(0, u64::wrapping_add)));
        }
        Ok(found)
    }

    /// Counters of every Service port that has a name, by its id, summed over the CPUs.
    pub fn service_stats(&self) -> Result<BTreeMap<u32, ServiceStats>, PinnedError> {
        let mut ids = Vec::new();
        self.services.scan(|id, _| ids.push(id))?;
        let mut found = BTreeMap::new();
        for id in ids {
            if let Some(each) = self.stats.get_all(&id)? {
                found.insert(id, sum(&each));
            }
        }
        Ok(found)
    }

    /// Shows every living flow, a chunk at a time.
    pub fn flows(&self, see: &mut impl FnMut(&Flow)) -> Result<(), PinnedError> {
        Ok(self.flows.scan(see)?)
    }

    /// Ends flows; how many of them there were.
    pub fn end_flows(&self, ids: &[FlowId]) -> Result<u32, PinnedError> {
        Ok(self.flows.end(ids)?)
    }

    fn count_flows(&self) -> Result<MapFill, TableError> {
        Ok(MapFill { name: maps::RECORDS, used: self.flows.count()?, max: self.flows.max().into() })
    }

    /// How full every table is whose entries come and go.
    pub fn fill(&self) -> Result<Vec<MapFill>, PinnedError> {
        let actual = self.kernel.actual()?;
        let live = actual.backends.values().filter(|backend| backend.is_live()).count();
        let mut fill = self.fill_by_agent(&actual, actual.shown_slots(), live);
        fill.extend(self.fill_by_traffic(&actual.affinity_secs())?);
        Ok(fill)
    }

    /// The same for the tables that the agent fills, as it has them, with so many slots and backends in use.
    #[must_use]
    pub fn fill_by_agent(&self, actual: &Actual, slots: usize, backends: usize) -> Vec<MapFill> {
        let used: BTreeMap<&str, usize> = BTreeMap::from([
            (maps::FRONTENDS, actual.frontends.len()),
            (maps::SLOTS, slots),
            (maps::BACKENDS, backends),
            (maps::ADDRESSES, actual.addresses.len()),
            (maps::SOURCES, actual.sources.len()),
            (maps::IFACES, actual.ifaces.len()),
            (maps::MASQUERADE, actual.routes.len()),
            (maps::SERVICES, actual.services.len()),
        ]);
        let fill = |(name, max): (&'static str, u32)| MapFill {
            name,
            used: used.get(name).map_or(0, |n| *n as u64),
            max: max.into(),
        };
        self.kernel.sizes().into_iter().map(fill).collect()
    }

    /// The same for the tables that traffic fills, and no others: the agent knows what it wrote itself, and
    /// reading the large arrays again for each scrape would cost a hundred milliseconds.
    ///
    /// Clients that are remembered longer than their Service asks for (`affinity_secs` by its id), and fragments of
    /// datagrams that will never be whole, stay until others need their place: they do not count.
    pub fn fill_by_traffic(&self, affinity_secs: &BTreeMap<u32, u32>) -> Result<Vec<MapFill>, PinnedError> {
        let age = age()?;
        let awaited =
            |_: FragmentKey, fragment: Fragment| age(fragment.since) <= Duration::from_nanos(FRAGMENTS_LIVE);
        Ok(vec![
            self.count_flows()?,
            count(&self.legs, |_, _| true)?,
            count(&Table::open(&self.root, maps::FRAGMENTS)?, awaited)?,
            self.count_bound(affinity_secs)?,
        ])
    }

    fn count_bound(&self, affinity_secs: &BTreeMap<u32, u32>) -> Result<MapFill, PinnedError> {
        let age = age()?;
        let remembered = |key: AffinityKey, value: Affinity| {
            let secs = affinity_secs.get(&key.service).copied().unwrap_or(0);
            age(value.last_seen) <= Duration::from_secs(secs.into())
        };
        Ok(count(&Table::open(&self.root, maps::AFFINITY)?, remembered)?)
    }

    /// How many flows there are.
    pub fn living(&self) -> Result<u64, PinnedError> {
        Ok(self.flows.count()?)
    }

    /// How many clients are bound to an endpoint, by Services that remember them for so long.
    pub fn bound(&self, affinity_secs: &BTreeMap<u32, u32>) -> Result<u64, PinnedError> {
        Ok(self.count_bound(affinity_secs)?.used)
    }

    /// What is attached where.
    pub fn links(&self) -> Result<Vec<LinkInfo>, PinnedError> {
        let mut found = Vec::new();
        for name in self.root.link_names()? {
            if let Some(link) = PinName::parse(&name).and_then(|pin| self.link(&name, &pin)) {
                found.push(link);
            }
        }
        Ok(found)
    }

    /// One pin; `None` when it went while we looked, or stands for no program that runs.
    fn link(&self, name: &str, pin: &PinName) -> Option<LinkInfo> {
        let fd = sys::obj_get(&self.root.link(name)).ok()?;
        let (place, program) = match pin {
            PinName::Qdisc(_) => return None,
            PinName::Filter(index, direction) => {
                let facts = sys::program_facts(fd.as_fd()).ok()?;
                (Place::Interface(*index, *direction), (facts.name, facts.id))
            }
            PinName::Cgroup(_) | PinName::Excluded(_) | PinName::Tcx(..) | PinName::Driver(_) => {
                let link = sys::link_facts(fd.as_fd()).ok()?;
                let place = match (link.target, pin) {
                    (Target::Cgroup(id), _) if id != 0 => Place::Cgroup(id),
                    (Target::Interface(index), PinName::Tcx(_, direction)) if index != 0 => {
                        Place::Interface(index, *direction)
                    }
                    (Target::Interface(index), PinName::Driver(_)) if index != 0 => Place::Driver(index),
                    _ => Place::Nowhere,
                };
                let program = match sys::program_by_id(link.program) {
                    Ok(program) => Some(sys::program_facts(program.as_fd()).ok()?.name),
                    // It takes CAP_SYS_ADMIN to look: the pin says as much.
                    Err(error) if error.raw_os_error() == Some(libc::EPERM) => None,
                    Err(_) => return None,
                };
                (place, (program.unwrap_or_else(|| pin.program().to_owned()), link.program))
            }
        };
        let (program, program_id) = program;
        Some(LinkInfo {
            name: name.to_owned(),
            place,
            program,
            program_id,
            filter: matches!(pin, PinName::Filter(..)),
        })
    }
}

fn sum(each: &[ServiceStats]) -> ServiceStats {
    each.iter().copied().fold(ServiceStats::NONE, add)
}

fn add(mut sum: ServiceStats, one: ServiceStats) -> ServiceStats {
    sum.chosen = sum.chosen.wrapping_add(one.chosen);
    sum.refused = sum.refused.wrapping_add(one.refused);
    sum.dropped = sum.dropped.wrapping_add(one.dropped);
    sum
}

/// How long ago something was, by the clock of entries.
fn age() -> Result<impl Fn(u64) -> Duration, PinnedError> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_err(PinnedError::Clock)?);
    Ok(move |since| now.saturating_sub(Duration::from_nanos(since)))
}

/// Counts the entries that are in use.
fn count<K: Pod + std::fmt::Debug, V: Pod>(
    table: &Table<K, V>,
    is_used: impl Fn(K, V) -> bool,
) -> Result<MapFill, TableError> {
    let mut used = 0;
    let mut cursor = Cursor::default();
    while table.chunk(&mut cursor, |key, value| used += u64::from(is_used(key, value)))? {}
    Ok(MapFill { name: table.name(), used, max: table.max().into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_all_cpus_are_added() {
        let one = ServiceStats { chosen: 1, refused: 2, dropped: 3 };
        assert_eq!(sum(&[one, one]), ServiceStats { chosen: 2, refused: 4, dropped: 6 });
    }

    #[test]
    fn a_root_without_an_agent_says_what_to_do() {
        let here = tempfile::tempdir().unwrap();
        let error = Pinned::open(&BpfRoot::new(here.path())).unwrap_err().to_string();
        assert!(error.contains("--bpf-root") || error.contains("run as root"), "{error}");
    }
}

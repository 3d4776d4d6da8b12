//! What the kernel says that tables take.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use agent_kernel::datapath::store::pin::BpfRoot;
use anyhow::{Context, Result};
use aya::maps::{MapData, MapType};
use proxy_common::abi::maps;

/// Tables that take less are not worth a line of their own.
const LITTLE: f64 = 128.0 * 1024.0;

struct Table {
    name: String,
    bytes: f64,
    /// Bytes that one CPU has for itself; 0 where all share them.
    per_cpu: f64,
}

/// The pinned tables of an agent.
pub(crate) struct Tables(Vec<Table>);

impl Tables {
    pub(crate) fn of(root: &Path) -> Result<Self> {
        let folder = BpfRoot::new(root).settled()?.maps();
        let mut found = Vec::new();
        for entry in folder.read_dir().with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            let map = MapData::from_pin(&path).with_context(|| format!("opening {}", path.display()))?;
            let info = map.info()?;
            let per_cpu = match info.map_type()? {
                MapType::PerCpuArray => {
                    f64::from(info.value_size().next_multiple_of(8)) * f64::from(info.max_entries())
                }
                _ => 0.0,
            };
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            found.push(Table { name, bytes: bytes(&map)?, per_cpu });
        }
        found.sort_by(|one, other| other.bytes.total_cmp(&one.bytes));
        Ok(Self(found))
    }

    /// What all take together.
    pub(crate) fn bytes(&self) -> f64 {
        self.0.iter().map(|table| table.bytes).sum()
    }

    /// What the counters would take on so many CPUs.
    pub(super) fn counters(&self, cpus: u32) -> f64 {
        let counters =
            self.0.iter().filter(|table| [maps::REASONS, maps::SERVICE_STATS].contains(&table.name.as_str()));
        counters
            .map(|table| if table.per_cpu > 0.0 { table.per_cpu * f64::from(cpus) } else { table.bytes })
            .sum()
    }

    /// Those that take most, the largest first.
    pub(super) fn largest(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().filter(|table| table.bytes >= LITTLE).map(|table| (table.name.as_str(), table.bytes))
    }
}

/// The memory of a map, as the kernel tells it of a descriptor.
fn bytes(map: &MapData) -> Result<f64> {
    let path = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("memlock:")).context("no memlock")?;
    Ok(line.trim().parse()?)
}

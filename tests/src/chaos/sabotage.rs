//! What a person with `bpftool`, another program or a script can do behind the agent's back to what it has attached,
//! pinned and written; each by a name, to be done to an agent that runs, in any order and as often as wanted.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya_obj::generated::{bpf_attach_type, bpf_prog_type};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::bpf::{self, Map};
use crate::agent::Agent;

/// Something that somebody does behind the agent's back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sabotage {
    /// Detaches the links on interfaces (`bpftool link detach`).
    DetachInterfaces,
    /// Detaches the links on cgroups.
    DetachSockets,
    /// Puts a program that does nothing behind every link.
    ReplacePrograms,
    /// Removes the pins of links and of the program that looks after flows.
    UnpinLinks,
    /// Removes the pins of maps.
    UnpinMaps,
    /// Pins an empty map in the place of each configuration table.
    SwapMaps,
    /// Removes everything below the agent's directory (`rm -r`).
    RemovePins,
    /// Unmounts the file system that the pins are on.
    Unmount,
    /// Mounts an empty one over it.
    MountOver,
    /// Deletes every entry of every configuration table that entries can be deleted from.
    DeleteEntries,
    /// Overwrites every element of every configuration table that is an array with zeros.
    ZeroElements,
    /// Adds an entry that nobody wants to each configuration table.
    AddEntries,
}

/// Configuration tables: the agent is the only one who writes them.
const TABLES: [&str; 13] = [
    "FRONTENDS",
    "SLOTS",
    "BACKENDS",
    "ENDPOINT_BITS",
    "ADDRESSES",
    "ADDRESS_BITS",
    "SOURCES",
    "IFACES",
    "MASQUERADE",
    "SERVICE_PORTS",
    "CONFIG",
    "SERVICES",
    "SECRET",
];
/// The pin of the program that no hook carries.
const FLOWS: &str = "flows";

impl Sabotage {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::DetachInterfaces,
        Self::DetachSockets,
        Self::ReplacePrograms,
        Self::UnpinLinks,
        Self::UnpinMaps,
        Self::SwapMaps,
        Self::RemovePins,
        Self::Unmount,
        Self::MountOver,
        Self::DeleteEntries,
        Self::ZeroElements,
        Self::AddEntries,
    ];

    /// Its name in reports and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::DetachInterfaces => "detach-interfaces",
            Self::DetachSockets => "detach-sockets",
            Self::ReplacePrograms => "replace-programs",
            Self::UnpinLinks => "unpin-links",
            Self::UnpinMaps => "unpin-maps",
            Self::SwapMaps => "swap-maps",
            Self::RemovePins => "remove-pins",
            Self::Unmount => "unmount",
            Self::MountOver => "mount-over",
            Self::DeleteEntries => "delete-entries",
            Self::ZeroElements => "zero-elements",
            Self::AddEntries => "add-entries",
        }
    }

    /// Whether traffic flows on as if nothing had been done: only pins go, which nothing but the next agent needs.
    #[must_use]
    pub fn is_harmless(self) -> bool {
        matches!(
            self,
            Self::UnpinLinks
                | Self::UnpinMaps
                | Self::SwapMaps
                | Self::RemovePins
                | Self::Unmount
                | Self::MountOver
        )
    }

    /// Whether packets of connections that are open are not translated either, until the agent has undone it. Who sends one
    /// is answered by the node itself, with a reset.
    #[must_use]
    pub fn leaves_packets_alone(self) -> bool {
        // Without SECRET no flow of IPv6 is found.
        matches!(self, Self::DetachInterfaces | Self::ReplacePrograms | Self::ZeroElements)
    }

    /// How soon the agent has undone it: hooks and pins within seconds, entries within a minute.
    #[must_use]
    pub fn undone_within(self) -> Duration {
        match self {
            Self::DeleteEntries | Self::ZeroElements | Self::AddEntries => Duration::from_secs(60),
            _ => Duration::from_secs(5),
        }
    }

    /// Does it; how many things were hurt.
    pub fn commit(self, agent: &Agent) -> Result<usize> {
        let root = agent.bpf_root();
        let done = match self {
            Self::DetachInterfaces => detach(root, "tc_"),
            Self::DetachSockets => detach(root, "cgroup_").and_then(|n| Ok(n + detach(root, "exclude_")?)),
            Self::ReplacePrograms => replace_programs(root),
            Self::UnpinLinks => remove(below(root, "links")?),
            Self::UnpinMaps => remove(below(root, "maps")?),
            Self::SwapMaps => swap_maps(root),
            Self::RemovePins => remove_all(root),
            Self::Unmount => {
                umount2(root, MntFlags::MNT_DETACH).context("unmounting the agent's bpffs")?;
                Ok(1)
            }
            Self::MountOver => {
                mount(Some("bpffs"), root, Some("bpf"), MsFlags::empty(), None::<&str>)
                    .context("mounting a bpffs over the agent's")?;
                Ok(1)
            }
            Self::DeleteEntries => delete_entries(root),
            Self::ZeroElements => zero_elements(root),
            Self::AddEntries => add_entries(root),
        }
        .with_context(|| format!("{} under {}", self.name(), root.display()))?;
        ensure!(done != 0, "{} found nothing to be hurt under {}", self.name(), root.display());
        Ok(done)
    }
}

/// All pins in directories of this name, wherever they are below `root`: where exactly is the agent's affair.
fn below(root: &Path, directory: &str) -> Result<Vec<PathBuf>> {
    let (mut found, mut left) = (Vec::new(), vec![root.to_owned()]);
    while let Some(at) = left.pop() {
        for entry in fs::read_dir(&at).with_context(|| format!("reading {}", at.display()))? {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                left.push(path);
            } else if path.components().any(|part| part.as_os_str() == directory) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The pins of links, without programs that stand for filters.
fn links(root: &Path) -> Result<Vec<PathBuf>> {
    let mut links = below(root, "links")?;
    links.retain(|path| {
        let name = name(path);
        name != FLOWS && !name.starts_with("clsact_") && !name.starts_with("new_")
    });
    Ok(links)
}

/// Detaches the links whose pins have names that begin so.
fn detach(root: &Path, prefix: &str) -> Result<usize> {
    let mut done = 0;
    for path in links(root)?.into_iter().filter(|path| name(path).starts_with(prefix)) {
        let link = bpf::get(&path).with_context(|| format!("opening {}", path.display()))?;
        bpf::detach(link.as_fd()).with_context(|| format!("detaching {}", path.display()))?;
        done += 1;
    }
    Ok(done)
}

fn replace_programs(root: &Path) -> Result<usize> {
    use bpf_attach_type as Hook;
    use bpf_prog_type as Kind;
    let links = links(root)?;
    for path in &links {
        let kind = match name(path) {
            name if name.starts_with("tc_") => (Kind::BPF_PROG_TYPE_SCHED_CLS, Hook::BPF_TCX_INGRESS),
            name if name.starts_with("cgroup_") => {
                (Kind::BPF_PROG_TYPE_CGROUP_SOCK_ADDR, Hook::BPF_CGROUP_INET4_CONNECT)
            }
            _ => (Kind::BPF_PROG_TYPE_CGROUP_SOCK, Hook::BPF_CGROUP_INET_SOCK_CREATE),
        };
        let program = bpf::idle_program(kind.0, kind.1).context("loading a program that does nothing")?;
        let link = bpf::get(path).with_context(|| format!("opening {}", path.display()))?;
        bpf::replace(link.as_fd(), program.as_fd())
            .with_context(|| format!("putting another program behind {}", path.display()))?;
    }
    Ok(links.len())
}

fn remove(pins: Vec<PathBuf>) -> Result<usize> {
    for path in &pins {
        fs::remove_file(path).with_context(|| format!("removing {}", path.display()))?;
    }
    Ok(pins.len())
}

/// How often a directory is removed again into which something has come meanwhile.
const REMOVALS: usize = 20;

/// What is below a directory, and not itself: it is a mount point.
fn remove_all(root: &Path) -> Result<usize> {
    let mut done = 0;
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            // The kernel's own iterators, which it puts into each new file system.
            continue;
        }
        let path = entry.path();
        // The agent may put something back at the same moment.
        let mut removed = fs::remove_dir_all(&path);
        for _ in 0..REMOVALS {
            if removed.as_ref().is_err_and(|error| error.kind() == ErrorKind::DirectoryNotEmpty) {
                removed = fs::remove_dir_all(&path);
            }
        }
        removed.with_context(|| format!("removing {}", path.display()))?;
        done += 1;
    }
    Ok(done)
}

/// The configuration tables, each with its pin.
fn tables(root: &Path) -> Result<Vec<(PathBuf, Map)>> {
    let pins = below(root, "maps")?.into_iter().filter(|path| TABLES.contains(&name(path).as_str()));
    pins.map(|path| {
        let map = Map::open(&path).with_context(|| format!("opening {}", path.display()))?;
        Ok((path, map))
    })
    .collect()
}

fn swap_maps(root: &Path) -> Result<usize> {
    let tables = tables(root)?;
    for (path, map) in &tables {
        let other = map.make_alike().with_context(|| format!("making a map like {}", path.display()))?;
        fs::remove_file(path)?;
        bpf::pin(other.as_fd(), path)
            .with_context(|| format!("pinning another map at {}", path.display()))?;
    }
    Ok(tables.len())
}

fn delete_entries(root: &Path) -> Result<usize> {
    let mut done = 0;
    for (path, map) in tables(root)?.iter().filter(|(_, map)| !map.is_array()) {
        for key in map.keys()? {
            map.delete(&key).with_context(|| format!("deleting from {}", path.display()))?;
            done += 1;
        }
    }
    Ok(done)
}

fn zero_elements(root: &Path) -> Result<usize> {
    let mut done = 0;
    for (path, map) in tables(root)?.iter().filter(|(_, map)| map.is_array()) {
        let zeros = vec![0; map.sizes().1];
        for key in map.keys()? {
            if map.value(&key)?.is_some_and(|value| value != zeros) {
                map.put(&key, &zeros).with_context(|| format!("writing to {}", path.display()))?;
                done += 1;
            }
        }
    }
    Ok(done)
}

fn add_entries(root: &Path) -> Result<usize> {
    let mut done = 0;
    for (path, map) in tables(root)?.iter().filter(|(_, map)| !map.is_array()) {
        let (key, value) = map.sizes();
        let mut key = vec![0x5a; key];
        if matches!(name(path).as_str(), "SOURCES" | "MASQUERADE") {
            // How many bits of the rest count comes first.
            key[..4].copy_from_slice(&64_u32.to_ne_bytes());
        }
        map.put(&key, &vec![0; value]).with_context(|| format!("writing to {}", path.display()))?;
        done += 1;
    }
    Ok(done)
}

/// All that is pinned.
pub fn pins(agent: &Agent) -> Result<Vec<PathBuf>> {
    let mut all = below(agent.bpf_root(), "links")?;
    all.extend(below(agent.bpf_root(), "maps")?);
    Ok(all)
}

/// A table, a key, a value.
pub type Entry = (String, Vec<u8>, Vec<u8>);

/// Every entry of every configuration table that says something, for comparing what was with what is again.
pub fn contents(agent: &Agent) -> Result<Vec<Entry>> {
    let mut all = Vec::new();
    for (path, map) in tables(agent.bpf_root())? {
        let zeros = vec![0; map.sizes().1];
        for key in map.keys()? {
            let value = map.value(&key)?.unwrap_or_default();
            if !map.is_array() || value != zeros {
                all.push((name(&path), key, value));
            }
        }
    }
    all.sort();
    Ok(all)
}

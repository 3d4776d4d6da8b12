//! Who else is at the hooks where our programs are, in which order, and which devices packets may take past them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya_obj::generated::bpf_attach_type as Hook;

use super::filter;
use super::{CGROUP, Direction, PinName};
use crate::datapath::store::pin::BpfRoot;
use crate::netlink::devices::{self, Device};
use crate::sys::{self, At, Target};

/// Cgroups that are looked through at most: a node has some hundreds.
const CGROUPS: usize = 5_000;

/// Programs of others at one hook of one or more places.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Company {
    /// `ingress`, `egress`, `XDP`, `netkit`, or the name of a socket program of ours.
    pub hook: &'static str,
    /// Programs that run before ours.
    pub before: Vec<String>,
    /// Programs that run after it.
    pub after: Vec<String>,
    /// Interfaces or cgroups where it is so.
    pub places: Vec<String>,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// Programs of others.
    pub company: Vec<Company>,
    /// Interfaces with virtual functions, and how many of these there are.
    pub virtual_functions: Vec<(String, u32)>,
    /// What could not be asked for.
    pub unknown: Vec<String>,
}

/// Programs in their order; ours marked.
type Row = Vec<(String, bool)>;

/// Looks at every hook where something of ours is pinned under `root`; at nothing where nothing is.
#[must_use]
pub fn others(root: &BpfRoot) -> Others {
    let mut others = Others::default();
    let ours = Ours::read(root);
    let mut found: BTreeMap<(&'static str, Row), Vec<String>> = BTreeMap::new();
    let devices = match devices::devices() {
        Ok(devices) => devices,
        Err(error) => {
            others.unknown.push(format!("interfaces cannot be listed: {error}"));
            Vec::new()
        }
    };
    for device in &devices {
        for (hook, row) in ours.at_interface(device, &mut others.unknown) {
            if row.iter().any(|(_, ours)| !ours) {
                found.entry((hook, row)).or_default().push(device.name.clone());
            }
        }
        if let Some(count) = virtual_functions(&device.name) {
            others.virtual_functions.push((device.name.clone(), count));
        }
    }
    for (hook, row, path) in ours.at_cgroups(&mut others.unknown) {
        found.entry((hook, row)).or_default().push(path);
    }
    let company = |((hook, row), places): ((&'static str, Row), Vec<String>)| {
        let ours = row.iter().position(|(_, ours)| *ours).unwrap_or(row.len());
        let names = |row: &[(String, bool)]| {
            row.iter().filter(|(_, ours)| !ours).map(|(name, _)| name.clone()).collect::<Vec<_>>()
        };
        let (before, after) = row.split_at(ours);
        Company { hook, before: names(before), after: names(after), places }
    };
    others.company = found.into_iter().map(company).collect();
    others
}

/// What is ours.
#[derive(Debug, Default)]
struct Ours {
    programs: BTreeSet<u32>,
    interfaces: BTreeSet<u32>,
    cgroups: BTreeSet<u64>,
}

impl Ours {
    fn read(root: &BpfRoot) -> Self {
        let mut ours = Self::default();
        for name in root.link_names().unwrap_or_default() {
            let Some(pin) = PinName::parse(&name) else { continue };
            let Ok(fd) = sys::obj_get(&root.link(&name)) else { continue };
            match &pin {
                PinName::Filter(index, _) => {
                    ours.interfaces.insert(*index);
                    ours.programs.extend(sys::program_facts(fd.as_fd()).map(|facts| facts.id));
                }
                PinName::Cgroup(_) | PinName::Excluded(_) | PinName::Tcx(..) | PinName::Driver(_) => {
                    let Ok(facts) = sys::link_facts(fd.as_fd()) else { continue };
                    ours.programs.insert(facts.program);
                    match (facts.target, &pin) {
                        (Target::Interface(index), _) => drop(ours.interfaces.insert(index)),
                        (Target::Cgroup(id), PinName::Cgroup(_)) => drop(ours.cgroups.insert(id)),
                        _ => {}
                    }
                }
                PinName::Qdisc(_) => {}
            }
        }
        ours
    }

    fn row(&self, ids: Vec<u32>) -> Row {
        let name = |id: u32| {
            let facts = sys::program_by_id(id).and_then(|fd| sys::program_facts(fd.as_fd()));
            facts.map(|facts| facts.name).ok().filter(|name| !name.is_empty())
        };
        let entry = |id| (name(id).unwrap_or_else(|| format!("program {id}")), self.programs.contains(&id));
        ids.into_iter().map(entry).collect()
    }

    /// Each hook of an interface in the order in which packets come to them.
    fn at_interface(&self, device: &Device, unknown: &mut Vec<String>) -> Vec<(&'static str, Row)> {
        let mut rows = Vec::new();
        let mut ask = |what: &str, asked: io::Result<Vec<u32>>| match asked {
            Ok(ids) => self.row(ids),
            // A kernel that has no such hook, or a device.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENODEV)) =>
            {
                Vec::new()
            }
            Err(error) => {
                unknown.push(format!("programs at {what} of {}: {error}", device.name));
                Vec::new()
            }
        };
        if device.kind == "netkit" {
            for hook in [Hook::BPF_NETKIT_PRIMARY, Hook::BPF_NETKIT_PEER] {
                let asked = sys::programs_at(At::Interface(device.index), hook);
                rows.push(("netkit", ask("netkit", asked)));
            }
        }
        if !self.interfaces.contains(&device.index) {
            return rows;
        }
        if let Some(program) = device.xdp {
            rows.push(("XDP", self.row(vec![program])));
        }
        let ways = [
            ("ingress", Direction::Ingress, Hook::BPF_TCX_INGRESS),
            ("egress", Direction::Egress, Hook::BPF_TCX_EGRESS),
        ];
        for (name, direction, hook) in ways {
            // Filters come after all programs of the newer kind.
            let mut row = ask(name, sys::programs_at(At::Interface(device.index), hook));
            let filters = filter::all(device.index, direction).unwrap_or_default();
            let filter =
                |(name, id): (String, Option<u32>)| (name, id.is_some_and(|id| self.programs.contains(&id)));
            row.extend(filters.into_iter().map(filter));
            rows.push((name, row));
        }
        rows
    }

    /// Programs at our socket hooks, in our own cgroup and in those inside it, which run before ours.
    fn at_cgroups(&self, unknown: &mut Vec<String>) -> Vec<(&'static str, Row, String)> {
        let Some(mount) = crate::datapath::probe::cgroup2_mount().filter(|_| !self.cgroups.is_empty()) else {
            return Vec::new();
        };
        let Some(root) = find(&mount, &self.cgroups) else {
            unknown.push(format!("the cgroup of our socket programs is not found below {}", mount.display()));
            return Vec::new();
        };
        let (mut found, mut left, mut seen) = (Vec::new(), vec![root.clone()], 0);
        while let Some(path) = left.pop().filter(|_| seen < CGROUPS) {
            seen += 1;
            left.extend(children(&path));
            let Ok(directory) = File::open(&path) else { continue };
            for (name, hook) in CGROUP {
                let Ok(ids) = sys::programs_at(At::Cgroup(directory.as_fd()), hook) else { continue };
                let mut row = self.row(ids);
                if row.iter().all(|(_, ours)| *ours) {
                    continue;
                }
                if path != root {
                    // The cgroup's own come first, then those of the ones that it lies in.
                    row.push((name.to_owned(), true));
                }
                found.push((name, row, path.display().to_string()));
            }
        }
        found
    }
}

fn children(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()).collect()
}

/// The cgroup with one of these ids.
fn find(mount: &Path, ids: &BTreeSet<u64>) -> Option<PathBuf> {
    let (mut left, mut seen) = (vec![mount.to_owned()], 0);
    while let Some(path) = left.pop().filter(|_| seen < CGROUPS) {
        seen += 1;
        if fs::metadata(&path).is_ok_and(|found| ids.contains(&found.ino())) {
            return Some(path);
        }
        left.extend(children(&path));
    }
    None
}

/// How many virtual functions a network card has made (SR-IOV).
fn virtual_functions(interface: &str) -> Option<u32> {
    let path = format!("/sys/class/net/{interface}/device/sriov_numvfs");
    fs::read_to_string(path).ok()?.trim().parse().ok().filter(|count| *count != 0)
}

//! Where the programs run: on the cgroup root, and on each interface in both directions.
//!
//! A link's pin keeps its program attached whatever happens to the agent. The next agent finds the pin and
//! swaps the program behind it in one step, or leaves it alone when it would change nothing. Before TCX
//! (6.6) there are no links on interfaces: a clsact filter takes their place, and a pin of its program
//! remembers it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya_obj::generated::bpf_attach_type as Hook;

use super::filter::{self, FilterError};
use super::grace::{self, Expedited};
use super::hooks::{self, Spot, Unit};
use super::load::{Loaded, LoadedProgram};
use super::pin::{self, BpfRoot, PinError};
use super::sys::{self, LinkFacts};
use agent_core::model::Link;

/// The programs of the cgroup root.
pub(super) const CGROUP: [(&str, Hook); 8] = [
    ("connect4", Hook::BPF_CGROUP_INET4_CONNECT),
    ("connect6", Hook::BPF_CGROUP_INET6_CONNECT),
    ("sendmsg4", Hook::BPF_CGROUP_UDP4_SENDMSG),
    ("sendmsg6", Hook::BPF_CGROUP_UDP6_SENDMSG),
    ("recvmsg4", Hook::BPF_CGROUP_UDP4_RECVMSG),
    ("recvmsg6", Hook::BPF_CGROUP_UDP6_RECVMSG),
    ("getpeername4", Hook::BPF_CGROUP_INET4_GETPEERNAME),
    ("getpeername6", Hook::BPF_CGROUP_INET6_GETPEERNAME),
];

/// Why a program is not where it should be.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The object has no such program.
    #[error("the BPF object has no program {program}: build it again with `cargo xtask build-ebpf`")]
    Missing {
        /// Its name.
        program: &'static str,
    },
    /// The cgroup root cannot be opened.
    #[error("cannot open the cgroup root {path}: name a cgroup v2 directory with --cgroup-root")]
    CgroupRoot {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot attach program {program} to {place}")]
    Attach {
        /// The program.
        program: &'static str,
        /// Cgroup or interface.
        place: String,
        /// Why.
        source: io::Error,
    },
    /// The swap of a program failed.
    #[error("cannot replace program {program} at {place}; the older one goes on")]
    Replace {
        /// The program.
        program: &'static str,
        /// Cgroup or interface.
        place: String,
        /// Why.
        source: io::Error,
    },
    /// The swap of a program for one that works with other tables failed.
    #[error("cannot exchange program {program} at {place} for one that works with the new tables")]
    Exchange {
        /// The program.
        program: String,
        /// Its pin.
        place: String,
        /// Why.
        source: io::Error,
    },
    /// The link could not be pinned.
    #[error("cannot pin the link {path}")]
    Pin {
        /// The pin.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The interface has another name now, or is gone.
    #[error("interface {name} (index {index}) is gone or has another name now")]
    Renamed {
        /// Name it had.
        name: Arc<str>,
        /// Its index.
        index: u32,
    },
    /// A clsact filter could not be set.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A pin could not be read or removed.
    #[error(transparent)]
    Pins(#[from] PinError),
}

impl AttachError {
    /// Whether what it was to be attached to has just gone: it will be heard of.
    #[must_use]
    pub fn is_of_something_gone(&self) -> bool {
        match self {
            Self::Renamed { .. } => true,
            Self::Attach { source, .. } => source.raw_os_error() == Some(libc::ENODEV),
            Self::Filter(error) => error.is_of_something_gone(),
            Self::Missing { .. }
            | Self::CgroupRoot { .. }
            | Self::Replace { .. }
            | Self::Exchange { .. }
            | Self::Pin { .. }
            | Self::Pins(_) => false,
        }
    }
}

/// How often progress is logged while programs are attached.
const PROGRESS: Duration = Duration::from_secs(1);

/// A direction of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Into the node's stack.
    Ingress,
    /// Out of it.
    Egress,
}

impl Direction {
    /// Both, in the order in which they are attached: a reply that is not translated back does less harm
    /// than a flow that is translated only one way, so the way out comes first.
    pub(crate) const BOTH: [Self; 2] = [Self::Egress, Self::Ingress];

    fn word(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    /// The programs of a direction.
    pub(super) fn programs(self) -> [&'static str; 2] {
        [self.program(false), self.program(true)]
    }

    pub(super) fn program(self, layer3: bool) -> &'static str {
        match (self, layer3) {
            (Self::Ingress, false) => "tc_ingress",
            (Self::Egress, false) => "tc_egress",
            (Self::Ingress, true) => "tc_ingress_l3",
            (Self::Egress, true) => "tc_egress_l3",
        }
    }
}

/// What a pin in the links directory stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PinName {
    /// A program of the cgroup root.
    Cgroup(String),
    /// The program that marks the new sockets of a cgroup, by its id.
    Excluded(u64),
    /// A TCX link.
    Tcx(u32, Direction),
    /// The program of a clsact filter.
    Filter(u32, Direction),
    /// A program that says: the clsact qdisc of this interface is ours.
    Qdisc(u32),
}

impl PinName {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        if let Some(program) = name.strip_prefix("cgroup_") {
            return Some(Self::Cgroup(program.to_owned()));
        }
        let (kind, rest) = name.split_once('_')?;
        if kind == "exclude" {
            return rest.parse().ok().map(Self::Excluded);
        }
        let (index, place) = rest.split_once('_')?;
        let index = index.parse().ok()?;
        Some(match (kind, place) {
            ("tc", "ingress") => Self::Tcx(index, Direction::Ingress),
            ("tc", "egress") => Self::Tcx(index, Direction::Egress),
            ("clsact", "ingress") => Self::Filter(index, Direction::Ingress),
            ("clsact", "egress") => Self::Filter(index, Direction::Egress),
            ("clsact", "qdisc") => Self::Qdisc(index),
            _ => return None,
        })
    }

    /// All that an interface may have, a filter before the qdisc that it hangs on.
    fn of_interface(index: u32) -> [Self; 5] {
        let [egress, ingress] = Direction::BOTH;
        [
            Self::Tcx(index, egress),
            Self::Tcx(index, ingress),
            Self::Filter(index, egress),
            Self::Filter(index, ingress),
            Self::Qdisc(index),
        ]
    }

    /// The program that belongs there, for who may not ask the kernel; on an interface without link-layer headers it is the
    /// other one of two that do the same.
    pub(crate) fn program(&self) -> &str {
        match self {
            Self::Cgroup(program) => program,
            Self::Excluded(_) => super::exclude::PROGRAM,
            Self::Tcx(_, direction) | Self::Filter(_, direction) => direction.program(false),
            Self::Qdisc(_) => "",
        }
    }

    /// The interface it belongs to.
    fn interface(&self) -> Option<u32> {
        match self {
            Self::Cgroup(_) | Self::Excluded(_) => None,
            Self::Tcx(index, _) | Self::Filter(index, _) | Self::Qdisc(index) => Some(*index),
        }
    }
}

impl std::fmt::Display for PinName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cgroup(program) => write!(f, "cgroup_{program}"),
            Self::Excluded(id) => write!(f, "exclude_{id}"),
            Self::Tcx(index, direction) => write!(f, "tc_{index}_{}", direction.word()),
            Self::Filter(index, direction) => write!(f, "clsact_{index}_{}", direction.word()),
            Self::Qdisc(index) => write!(f, "clsact_{index}_qdisc"),
        }
    }
}

/// What bringing one place in line took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attached {
    /// It was attached with this very program.
    Kept,
    /// Its program was swapped.
    Updated,
    /// It was attached.
    New,
}

impl Loaded {
    /// Attaches every socket program to the cgroup at `cgroup`: all of them or, with an error, none more
    /// than before. After an error [`Self::retry`] tries again.
    pub fn attach_cgroup(&mut self, cgroup: &Path) -> Result<Attached, AttachError> {
        self.hooks.cgroup = Some(cgroup.to_owned());
        let result = self.attach_sockets(cgroup);
        self.hooks.batch_ended();
        self.hooks.note(Unit::Sockets, &format!("cgroup {}", cgroup.display()), &result);
        result
    }

    fn attach_sockets(&mut self, cgroup: &Path) -> Result<Attached, AttachError> {
        let failed = |source| AttachError::CgroupRoot { path: cgroup.to_owned(), source };
        let id = File::open(cgroup).and_then(|directory| directory.metadata()).map_err(failed)?.ino();
        let mut most = Attached::Kept;
        let mut made = Vec::new();
        for (program, hook) in CGROUP {
            let pin = PinName::Cgroup(program.into());
            match self.ensure(&pin, program, Spot::Cgroup { path: cgroup.into(), id, hook }) {
                Ok(done) => {
                    most = most.max(done);
                    if done == Attached::New {
                        made.push(pin);
                    }
                }
                Err(error) => {
                    for pin in made {
                        self.detach(&pin)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(most)
    }

    /// Takes the socket programs away (`--socket-lb=off`).
    pub fn detach_cgroup(&mut self) -> Result<usize, AttachError> {
        self.hooks.cgroup = None;
        self.hooks.forget(Unit::Sockets);
        let mut removed = 0;
        for name in self.root().link_names()? {
            if let Some(pin @ (PinName::Cgroup(_) | PinName::Excluded(_))) = PinName::parse(&name) {
                removed += usize::from(self.detach(&pin)?);
            }
        }
        Ok(removed)
    }

    /// Brings the programs on interfaces in line with `links`: attaches to those that are new, and removes
    /// the pins of interfaces that are not listed. One result for each that is new or another than before; an interface
    /// that refuses one direction carries neither, and is tried again by [`Self::retry`]. What others there are costs
    /// nothing: a new pod's interface does not wait for them.
    pub fn sync_interfaces(&mut self, links: &[Link]) -> Vec<(Arc<str>, Result<Attached, AttachError>)> {
        let mut results = Vec::new();
        if let Err(error) = self.drop_unlisted(links) {
            results.push((Arc::from("interfaces that are gone"), Err(error)));
        }
        let new: Vec<&Link> = links.iter().filter(|link| self.hooks.is_new(link)).collect();
        let _expedited = if new.is_empty() { None } else { Expedited::begin(self.root()) };
        let mut told = Instant::now();
        for (n, link) in new.iter().enumerate() {
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                tracing::info!("attaching programs: {n} of {} interfaces done", new.len());
            }
            self.hooks.interfaces.insert(link.index, (*link).clone());
            results.push((link.name.clone(), self.try_interface(link)));
        }
        self.hooks.batch_ended();
        results
    }

    /// Removes the programs of interfaces that are not listed; the first time those of an earlier agent, too.
    fn drop_unlisted(&mut self, links: &[Link]) -> Result<(), AttachError> {
        let wanted: BTreeSet<u32> = links.iter().map(|link| link.index).collect();
        let mut gone: BTreeSet<u32> =
            self.hooks.interfaces.keys().copied().filter(|index| !wanted.contains(index)).collect();
        if !self.hooks.adopted {
            if let Err(error) = grace::recover(self.root()) {
                tracing::warn!("grace periods of the kernel may stay short: {error}");
            }
            let pinned = self.root().link_names()?;
            self.hooks.adopted = true;
            let pinned = pinned.iter().filter_map(|name| PinName::parse(name)?.interface());
            gone.extend(pinned.filter(|index| !wanted.contains(index)));
        }
        let mut result = Ok(());
        for index in gone {
            self.hooks.interfaces.remove(&index);
            self.hooks.forget(Unit::Interface(index));
            // The others go all the same.
            result = result.and(self.drop_interface(index));
        }
        result
    }

    /// Removes the programs of an interface, with what they hang on.
    fn drop_interface(&mut self, index: u32) -> Result<(), AttachError> {
        self.hooks.filters.remove(&index);
        for pin in PinName::of_interface(index) {
            // A filter may have lost its pin, which is only a note; a link without one is held.
            let there = self.root().link(&pin.to_string()).symlink_metadata().is_ok();
            if there || self.hooks.holds(&pin) || !self.tcx {
                self.detach(&pin)?;
            }
        }
        Ok(())
    }

    /// Attaches to an interface, in both directions or not at all, and notes what came of it.
    pub(super) fn try_interface(&mut self, link: &Link) -> Result<Attached, AttachError> {
        let result = self.attach_interface(link);
        if let Err(error) = &result {
            self.drop_half(link.index, error);
        }
        self.hooks.note(Unit::Interface(link.index), &format!("interface {}", link.name), &result);
        result
    }

    /// Half an interface would translate one way only: what it carries goes, after this error. One that carries programs in
    /// both directions is left as it is, whatever could not be asked or done.
    pub(super) fn drop_half(&mut self, index: u32, error: &AttachError) {
        let refused = matches!(error, AttachError::Attach { .. });
        if refused || !Direction::BOTH.into_iter().all(|direction| self.is_attached(index, direction)) {
            // The error that led here matters more.
            let _ = self.drop_interface(index);
        }
    }

    /// Whether an interface carries a program of ours in this direction, as far as can be told.
    fn is_attached(&self, index: u32, direction: Direction) -> bool {
        let is_pinned = |pin: PinName| self.root().link(&pin.to_string()).symlink_metadata().is_ok();
        if self.tcx {
            let pin = PinName::Tcx(index, direction);
            return self.hooks.holds(&pin) || is_pinned(pin);
        }
        let running = filter::running(index, direction).map(|program| program.is_some());
        running.unwrap_or_else(|_| is_pinned(PinName::Filter(index, direction)))
    }

    fn attach_interface(&mut self, link: &Link) -> Result<Attached, AttachError> {
        if !self.tcx {
            return self.attach_filters(link);
        }
        let mut most = Attached::Kept;
        for direction in Direction::BOTH {
            let pin = PinName::Tcx(link.index, direction);
            let spot = Spot::Interface { index: link.index, name: link.name.clone(), direction };
            most = most.max(self.ensure(&pin, direction.program(link.layer3), spot)?);
        }
        Ok(most)
    }

    fn attach_filters(&mut self, link: &Link) -> Result<Attached, AttachError> {
        let gone = || AttachError::Renamed { name: link.name.clone(), index: link.index };
        // Filters are set by name: it must mean the interface that was listed, before and after.
        let named = |link: &Link| nix::net::if_::if_nametoindex(&*link.name).is_ok_and(|i| i == link.index);
        if !named(link) {
            return Err(gone());
        }
        let pins = Direction::BOTH.map(|direction| PinName::Filter(link.index, direction));
        let known = pins.iter().all(|pin| self.root().link(&pin.to_string()).exists());
        if filter::add_qdisc(&link.name)? {
            self.remember(&PinName::Qdisc(link.index), Direction::Ingress.program(link.layer3))?;
        }
        for direction in Direction::BOTH {
            let name = direction.program(link.layer3);
            filter::set(&mut self.ebpf, &link.name, direction, name)?;
            self.remember(&PinName::Filter(link.index, direction), name)?;
        }
        if !named(link) {
            return Err(gone());
        }
        self.hooks.filters.insert(link.index);
        Ok(if known { Attached::Updated } else { Attached::New })
    }

    /// Pins a program in place of a link that does not exist.
    pub(super) fn remember(&self, pin: &PinName, program: &'static str) -> Result<(), AttachError> {
        let path = self.root().link(&pin.to_string());
        let program = self.program(program)?.fd.as_fd();
        hooks::pin_at(self.root(), &path, |path| sys::obj_pin(program, path)).map(drop)
    }

    /// Detaches what a pin stands for, and removes it; `false` when there was none.
    pub(super) fn detach(&mut self, pin: &PinName) -> Result<bool, AttachError> {
        if let Some(link) = self.hooks.take(pin) {
            // One that has lost its pin is attached as long as we hold it.
            let _ = sys::link_detach(link.as_fd());
        }
        drop_pin(self.root(), pin)
    }

    pub(super) fn program(&self, program: &'static str) -> Result<&LoadedProgram, AttachError> {
        self.programs.get(program).ok_or(AttachError::Missing { program })
    }
}

/// An existing link with what the kernel says of it.
pub(super) fn open_link(path: &Path) -> Result<Option<(OwnedFd, LinkFacts)>, AttachError> {
    let found = sys::obj_get(path).and_then(|fd| sys::link_facts(fd.as_fd()).map(|facts| (fd, facts)));
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(source) => Err(AttachError::Pin { path: path.to_owned(), source }),
    }
}

/// Detaches what a pin stands for and removes it; `false` when there was none.
pub(crate) fn drop_pin(root: &BpfRoot, pin: &PinName) -> Result<bool, AttachError> {
    drop_pin_at(&root.link(&pin.to_string()), pin)
}

/// The same for a pin of any version.
pub(crate) fn drop_pin_at(path: &Path, pin: &PinName) -> Result<bool, AttachError> {
    match pin {
        PinName::Cgroup(_) | PinName::Excluded(_) | PinName::Tcx(..) => {
            // Others may hold the link: it is detached, not only forgotten. A severed link has nothing to
            // detach, and kernels before 5.11 detach when the pin goes.
            if let Ok(link) = sys::obj_get(path) {
                let _ = sys::link_detach(link.as_fd());
            }
        }
        PinName::Filter(index, direction) => filter::clear(*index, *direction)?,
        PinName::Qdisc(index) => filter::remove_qdisc(*index)?,
    }
    Ok(pin::remove(path, false)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pin_names_survive_the_round_trip() {
        let names = [
            PinName::Cgroup("connect4".into()),
            PinName::Excluded(4711),
            PinName::Tcx(7, Direction::Ingress),
            PinName::Tcx(7, Direction::Egress),
            PinName::Filter(12, Direction::Ingress),
            PinName::Qdisc(12),
        ];
        for name in names {
            assert_eq!(PinName::parse(&name.to_string()), Some(name));
        }
        assert_eq!(PinName::parse("tc_x_ingress"), None);
        assert_eq!(PinName::parse("tc_1_sideways"), None);
        assert_eq!(PinName::parse("new_tc_1_ingress"), None);
    }

    #[test]
    fn pin_names_fit_the_documented_form() {
        assert_eq!(PinName::Tcx(3, Direction::Egress).to_string(), "tc_3_egress");
        assert_eq!(PinName::Cgroup("sendmsg6".into()).to_string(), "cgroup_sendmsg6");
    }
}

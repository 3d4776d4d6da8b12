//! Where the programs run: on the cgroup root, and on each interface in both directions.
//!
//! A link's pin keeps its program attached whatever happens to the agent. The next agent finds the pin and
//! swaps the program behind it in one step, or leaves it alone when it would change nothing. Before TCX
//! (6.6) there are no links on interfaces: a clsact filter takes their place, and a pin of its program
//! remembers it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya_obj::generated::bpf_attach_type as Hook;

use super::filter::{self, FilterError};
use super::load::{Loaded, LoadedProgram};
use super::pin::{self, BpfRoot, PinError};
use super::sys::{self, LinkFacts, Target};
use crate::model::Link;

/// The programs of the cgroup root.
const CGROUP: [(&str, Hook); 8] = [
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

    fn program(self, layer3: bool) -> &'static str {
        match (self, layer3) {
            (Self::Ingress, false) => "tc_ingress",
            (Self::Egress, false) => "tc_egress",
            (Self::Ingress, true) => "tc_ingress_l3",
            (Self::Egress, true) => "tc_egress_l3",
        }
    }
}

/// What a pin in the links directory stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// than before.
    pub fn attach_cgroup(&mut self, cgroup: &Path) -> Result<Attached, AttachError> {
        let failed = |source| AttachError::CgroupRoot { path: cgroup.to_owned(), source };
        let directory = File::open(cgroup).map_err(failed)?;
        let id = directory.metadata().map_err(failed)?.ino();
        let mut most = Attached::Kept;
        let mut made = Vec::new();
        for (program, hook) in CGROUP {
            let pin = PinName::Cgroup(program.into());
            let place = cgroup.display().to_string();
            let done = self.ensure(&pin, program, &place, Target::Cgroup(id), |fd| {
                sys::link_cgroup(fd, directory.as_fd(), hook)
            });
            match done {
                Ok(done) => {
                    most = most.max(done);
                    if done == Attached::New {
                        made.push(pin);
                    }
                }
                Err(error) => {
                    for pin in made {
                        drop_pin(self.root(), &pin)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(most)
    }

    /// Takes the socket programs away (`--socket-lb=off`).
    pub fn detach_cgroup(&mut self) -> Result<usize, AttachError> {
        let mut removed = 0;
        for name in self.root().link_names()? {
            if let Some(pin @ (PinName::Cgroup(_) | PinName::Excluded(_))) = PinName::parse(&name) {
                removed += usize::from(drop_pin(self.root(), &pin)?);
            }
        }
        Ok(removed)
    }

    /// Brings the programs on interfaces in line with `links`: attaches to those that lack them, and removes
    /// the pins of interfaces that are not listed. One result for each of `links`; an interface that refuses
    /// one direction carries neither. Attaching takes the kernel some milliseconds each, so that a node with very
    /// many is told how far it is.
    pub fn sync_interfaces(&mut self, links: &[Link]) -> Vec<(Arc<str>, Result<Attached, AttachError>)> {
        let mut told = Instant::now();
        let wanted: BTreeSet<u32> = links.iter().map(|link| link.index).collect();
        let mut results = Vec::new();
        match self.drop_interfaces(|index| !wanted.contains(&index)) {
            Ok(_) => {}
            Err(error) => results.push((Arc::from("interfaces that are gone"), Err(error))),
        }
        for (n, link) in links.iter().enumerate() {
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                tracing::info!("attaching programs: {n} of {} interfaces done", links.len());
            }
            let result = self.attach_interface(link);
            if result.is_err() {
                // Half an interface would translate one way only; the error that led here matters more.
                let _ = self.drop_interfaces(|index| index == link.index);
            }
            results.push((link.name.clone(), result));
        }
        results
    }

    /// Removes the programs of the interfaces that `gone` names.
    fn drop_interfaces(&mut self, gone: impl Fn(u32) -> bool) -> Result<usize, AttachError> {
        let mut removed = 0;
        for name in self.root().link_names()? {
            let Some(pin) = PinName::parse(&name) else { continue };
            if pin.interface().is_some_and(&gone) {
                removed += usize::from(drop_pin(self.root(), &pin)?);
            }
        }
        self.filters.retain(|index| !gone(*index));
        Ok(removed)
    }

    fn attach_interface(&mut self, link: &Link) -> Result<Attached, AttachError> {
        if !self.tcx {
            return self.attach_filters(link);
        }
        let mut most = Attached::Kept;
        for direction in Direction::BOTH {
            let pin = PinName::Tcx(link.index, direction);
            let program = direction.program(link.layer3);
            let target = Target::Interface(link.index);
            let egress = direction == Direction::Egress;
            let place = format!("interface {}", link.name);
            let attach = |fd: BorrowedFd<'_>| sys::link_tcx(fd, link.index, egress);
            most = most.max(self.ensure(&pin, program, &place, target, attach)?);
        }
        Ok(most)
    }

    /// One link: kept, updated, or made with `attach`.
    pub(super) fn ensure(
        &self,
        pin: &PinName,
        program: &'static str,
        place: &str,
        target: Target,
        attach: impl Fn(BorrowedFd<'_>) -> io::Result<OwnedFd>,
    ) -> Result<Attached, AttachError> {
        let loaded = self.program(program)?;
        let path = self.root().link(&pin.to_string());
        if let Some((fd, facts)) = open_link(&path)?
            && facts.target == target
        {
            let running = sys::program_by_id(facts.program).ok();
            if running.as_ref().is_some_and(|running| self.is_same(program, running.as_fd())) {
                return Ok(Attached::Kept);
            }
            // The swap holds only if the link still has the program that was looked at.
            match sys::link_update(fd.as_fd(), loaded.fd.as_fd(), running.as_ref().map(AsFd::as_fd)) {
                Ok(()) => return Ok(Attached::Updated),
                // The cgroup or interface went this moment.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                Err(source) => {
                    return Err(AttachError::Replace { program, place: place.into(), source });
                }
            }
        }
        let made = attach(loaded.fd.as_fd()).map_err(|source| AttachError::Attach {
            program,
            place: place.into(),
            source,
        })?;
        // An older link goes in the same step as the new one comes.
        let making = self.root().link_in_making(&pin.to_string());
        let failed = |source| AttachError::Pin { path: path.clone(), source };
        pin::remove(&making, false)?;
        sys::obj_pin(made.as_fd(), &making).map_err(failed)?;
        fs::rename(&making, &path).map_err(failed)?;
        Ok(Attached::New)
    }

    fn attach_filters(&mut self, link: &Link) -> Result<Attached, AttachError> {
        let gone = || AttachError::Renamed { name: link.name.clone(), index: link.index };
        // Filters are set by name: it must mean the interface that was listed, before and after.
        let named = |link: &Link| nix::net::if_::if_nametoindex(&*link.name).is_ok_and(|i| i == link.index);
        if !named(link) {
            return Err(gone());
        }
        let pins = Direction::BOTH.map(|direction| PinName::Filter(link.index, direction));
        let is_same = |direction: Direction| {
            let path = self.root().link(&PinName::Filter(link.index, direction).to_string());
            sys::obj_get(&path).is_ok_and(|fd| self.is_same(direction.program(link.layer3), fd.as_fd()))
        };
        if self.filters.contains(&link.index) && Direction::BOTH.into_iter().all(is_same) {
            return Ok(Attached::Kept);
        }
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
        self.filters.insert(link.index);
        Ok(if known { Attached::Updated } else { Attached::New })
    }

    /// Pins a program in place of a link that does not exist.
    fn remember(&self, pin: &PinName, program: &'static str) -> Result<(), AttachError> {
        let path = self.root().link(&pin.to_string());
        pin::remove(&path, false)?;
        sys::obj_pin(self.program(program)?.fd.as_fd(), &path)
            .map_err(|source| AttachError::Pin { path, source })
    }

    fn program(&self, program: &'static str) -> Result<&LoadedProgram, AttachError> {
        self.programs.get(program).ok_or(AttachError::Missing { program })
    }
}

/// An existing link with what the kernel says of it.
fn open_link(path: &Path) -> Result<Option<(OwnedFd, LinkFacts)>, AttachError> {
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

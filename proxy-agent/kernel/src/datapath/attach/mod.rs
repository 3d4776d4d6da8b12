//! Where the programs run: on the cgroup root, and on each interface in both directions.
//!
//! A link's pin keeps its program attached whatever happens to the agent. The next agent finds the pin and
//! swaps the program behind it in one step, or leaves it alone when it would change nothing. Before TCX
//! (6.6) there are no links on interfaces: a clsact filter takes their place, and a pin of its program
//! remembers it.

pub mod driver;
mod ensure;
mod error;
pub(crate) mod exchange;
pub mod exclude;
pub(crate) mod filter;
pub mod grace;
pub(crate) mod hooks;
pub mod loaded;
pub mod look;
pub(crate) mod name;
pub mod others;
pub mod program_log;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya_obj::generated::bpf_attach_type as Hook;

use self::grace::Expedited;
use self::hooks::{Spot, Unit};
use self::loaded::{Loaded, LoadedProgram};
use crate::datapath::store::pin::{self, BpfRoot};
use crate::sys::{self, LinkFacts};
use agent_core::model::Link;

pub use self::error::AttachError;
pub use self::name::Direction;
pub(crate) use self::name::PinName;

/// The programs of the cgroup root.
pub(crate) const CGROUP: [(&str, Hook); 8] = [
    ("connect4", Hook::BPF_CGROUP_INET4_CONNECT),
    ("connect6", Hook::BPF_CGROUP_INET6_CONNECT),
    ("sendmsg4", Hook::BPF_CGROUP_UDP4_SENDMSG),
    ("sendmsg6", Hook::BPF_CGROUP_UDP6_SENDMSG),
    ("recvmsg4", Hook::BPF_CGROUP_UDP4_RECVMSG),
    ("recvmsg6", Hook::BPF_CGROUP_UDP6_RECVMSG),
    ("getpeername4", Hook::BPF_CGROUP_INET4_GETPEERNAME),
    ("getpeername6", Hook::BPF_CGROUP_INET6_GETPEERNAME),
];

/// How often progress is logged while programs are attached.
const PROGRESS: Duration = Duration::from_secs(1);

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
        let mut reported = Instant::now();
        for (n, link) in new.iter().enumerate() {
            if reported.elapsed() >= PROGRESS {
                reported = Instant::now();
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
            self.hooks.drivers.remove(&index);
            self.hooks.forget(Unit::Interface(index));
            self.hooks.forget(Unit::Driver(index));
            // The others go all the same.
            result = result.and(self.drop_interface(index));
        }
        result
    }

    /// Removes the programs of an interface, with what they hang on.
    fn drop_interface(&mut self, index: u32) -> Result<(), AttachError> {
        self.hooks.filters.remove(&index);
        self.drop_driver(index);
        for pin in PinName::of_interface(index) {
            // A filter may have lost its pin, which is only a note; a link without one is held.
            let there = self.root().link(&pin.to_string()).symlink_metadata().is_ok();
            if there || self.hooks.holds(&pin) || !self.features.tcx {
                self.detach(&pin)?;
            }
        }
        Ok(())
    }

    /// Attaches to an interface, in both directions or not at all, and notes what came of it.
    pub(crate) fn try_interface(&mut self, link: &Link) -> Result<Attached, AttachError> {
        let result = self.attach_interface(link);
        if let Err(error) = &result {
            self.drop_half(link.index, error);
        }
        self.hooks.note(Unit::Interface(link.index), &format!("interface {}", link.name), &result);
        result
    }

    /// Half an interface would translate one way only: what it carries goes, after this error. One that carries programs in
    /// both directions is left as it is, whatever could not be asked or done.
    pub(crate) fn drop_half(&mut self, index: u32, error: &AttachError) {
        let refused = matches!(error, AttachError::Attach { .. });
        if refused || !Direction::BOTH.into_iter().all(|direction| self.is_attached(index, direction)) {
            // The error that led here matters more.
            self.drop_interface(index).ok();
        }
    }

    /// Whether an interface carries a program of ours in this direction, as far as can be told.
    fn is_attached(&self, index: u32, direction: Direction) -> bool {
        let is_pinned = |pin: PinName| self.root().link(&pin.to_string()).symlink_metadata().is_ok();
        if self.features.tcx {
            let pin = PinName::Tcx(index, direction);
            return self.hooks.holds(&pin) || is_pinned(pin);
        }
        let running = filter::running(index, direction).map(|program| program.is_some());
        running.unwrap_or_else(|_| is_pinned(PinName::Filter(index, direction)))
    }

    fn attach_interface(&mut self, link: &Link) -> Result<Attached, AttachError> {
        for direction in Direction::BOTH {
            self.have(direction.program(link.layer3))?;
        }
        if !self.features.tcx {
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
    pub(crate) fn remember(&self, pin: &PinName, program: &'static str) -> Result<(), AttachError> {
        let path = self.root().link(&pin.to_string());
        let program = self.program(program)?.fd.as_fd();
        pin::pin_at(self.root(), &path, |path| sys::obj_pin(program, path))?;
        Ok(())
    }

    /// Detaches what a pin stands for, and removes it; `false` when there was none.
    pub(crate) fn detach(&mut self, pin: &PinName) -> Result<bool, AttachError> {
        if let Some(link) = self.hooks.take(pin) {
            // One that has lost its pin is attached as long as we hold it.
            sys::link_detach(link.as_fd()).ok();
        }
        drop_pin(self.root(), pin)
    }

    pub(crate) fn program(&self, program: &str) -> Result<&LoadedProgram, AttachError> {
        self.programs.get(program).ok_or_else(|| AttachError::Missing { program: program.to_owned() })
    }
}

/// An existing link with what the kernel says of it.
pub(crate) fn open_link(path: &Path) -> Result<Option<(OwnedFd, LinkFacts)>, AttachError> {
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
        PinName::Cgroup(_) | PinName::Excluded(_) | PinName::Tcx(..) | PinName::Driver(_) => {
            // Others may hold the link: it is detached, not only forgotten. A severed link has nothing to
            // detach, and kernels before 5.11 detach when the pin goes.
            if let Ok(link) = sys::obj_get(path) {
                sys::link_detach(link.as_fd()).ok();
            }
        }
        PinName::Filter(index, direction) => filter::clear(*index, *direction)?,
        PinName::Qdisc(index) => filter::remove_qdisc(*index)?,
    }
    Ok(pin::remove(path, false)?)
}

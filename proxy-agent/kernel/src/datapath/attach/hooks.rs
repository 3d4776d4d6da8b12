//! What is attached where: made once, held, looked at again and again, and restored.
//!
//! The agent keeps what it has attached open, so whoever removes a pin takes no program away: only the pin has to come
//! back. Everything else that a person or another program can do to a link (detach it, put another program behind it)
//! shows when the link is asked. A look asks one after the other for as long as it is given, and goes on next time; what
//! cannot be restored at once is tried again after a pause that doubles. Filters (before TCX) are asked for by netlink.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya_obj::generated::bpf_attach_type as Hook;

use super::{AttachError, Attached, Direction, PinName};
use crate::datapath::flow;
use crate::datapath::store::pin::PinId;
use crate::sys::{self, Target};
use agent_core::model::{AtDriver, Link};
use proxy_common::abi::maps;

/// Pause before a hook that has refused is tried again, the first time.
const FIRST: Duration = Duration::from_millis(500);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(30);
/// With a pause this long an interface that is not there has been tried three times, and is still listed.
const STRANGE: Duration = Duration::from_secs(2);

/// Where a link holds its program.
#[derive(Clone, Debug)]
pub(crate) enum Spot {
    /// A cgroup, by its path and its id.
    Cgroup { path: PathBuf, id: u64, hook: Hook },
    /// An interface.
    Interface { index: u32, name: Arc<str>, direction: Direction },
    /// An interface's driver.
    Driver { index: u32, name: Arc<str> },
}

impl Spot {
    pub(crate) fn target(&self) -> Target {
        match self {
            Self::Cgroup { id, .. } => Target::Cgroup(*id),
            Self::Interface { index, .. } | Self::Driver { index, .. } => Target::Interface(*index),
        }
    }

    pub(super) fn attach(&self, program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        match self {
            Self::Cgroup { path, hook, .. } => {
                let directory = fs::File::open(path)?;
                sys::link_cgroup(program, directory.as_fd(), *hook)
            }
            Self::Interface { index, direction, .. } => {
                sys::link_tcx(program, *index, *direction == Direction::Egress)
            }
            Self::Driver { index, .. } => sys::link_xdp(program, *index),
        }
    }
}

impl fmt::Display for Spot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cgroup { path, .. } => write!(f, "cgroup {}", path.display()),
            Self::Interface { name, .. } => write!(f, "interface {name}"),
            Self::Driver { name, .. } => write!(f, "the driver of interface {name}"),
        }
    }
}

/// What is attached or refused as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Unit {
    /// The socket programs.
    Sockets,
    /// A cgroup whose sockets are marked, by its id.
    Excluded(u64),
    /// An interface, by its index.
    Interface(u32),
    /// An interface's driver, by its index.
    Driver(u32),
}

/// A link as it should be.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) program: &'static str,
    pub(crate) spot: Spot,
    /// Id of the program that was seen to be right: ours, or an earlier one that does the same.
    pub(crate) runs: u32,
    /// Open, as long as there are descriptors enough.
    pub(crate) link: Option<OwnedFd>,
    pub(crate) pin: PinId,
}

/// A hook that refuses its program.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) line: String,
    /// What it was to be attached to has just been removed; netlink will say so.
    passing: bool,
    again: Instant,
    pause: Duration,
}

impl Refused {
    pub(super) fn counts(&self) -> bool {
        !self.passing || self.pause >= STRANGE
    }
}

/// What is attached, as this process knows it.
#[derive(Debug, Default)]
pub(crate) struct Hooks {
    pub(crate) links: BTreeMap<PinName, Held>,
    /// Maps, and the program that no hook carries.
    pub(crate) kept: Vec<Kept>,
    pub(crate) cgroup: Option<PathBuf>,
    pub(crate) interfaces: BTreeMap<u32, Link>,
    /// Interfaces whose drivers are to carry a program.
    pub(super) drivers: BTreeMap<u32, AtDriver>,
    /// Whether pins of an earlier agent at drivers have been looked through.
    pub(super) drivers_adopted: bool,
    /// Interfaces whose filters this process has put in place.
    pub(crate) filters: BTreeSet<u32>,
    pub(super) refused: BTreeMap<Unit, Refused>,
    /// Whether pins of an earlier agent have been looked through.
    pub(crate) adopted: bool,
    /// The same for marked cgroups.
    pub(crate) excluded_adopted: bool,
    /// Programs by id that were compared with ours since a batch began: many links have the same.
    pub(super) same: BTreeMap<(&'static str, u32), bool>,
    pub(crate) round: Option<Round>,
}

impl Hooks {
    /// Whether an interface is not attached to as it is now.
    pub(crate) fn is_new(&self, link: &Link) -> bool {
        self.interfaces
            .get(&link.index)
            .is_none_or(|known| (known.layer3, known.born) != (link.layer3, link.born))
    }

    pub(crate) fn holds(&self, pin: &PinName) -> bool {
        self.links.contains_key(pin)
    }

    pub(crate) fn held(&self) -> impl Iterator<Item = &PinName> {
        self.links.keys()
    }

    /// Forgets a link, and gives it where it is open.
    pub(crate) fn take(&mut self, pin: &PinName) -> Option<OwnedFd> {
        self.links.remove(pin)?.link
    }

    /// Notes what came of attaching.
    pub(crate) fn note(&mut self, unit: Unit, name: &str, result: &Result<Attached, AttachError>) {
        let Err(error) = result else { return self.forget(unit) };
        let pause = self.refused.get(&unit).map_or(FIRST, |before| (before.pause * 2).min(LONGEST));
        let refused = Refused {
            line: format!("{name}: {}", chain(error)),
            passing: error.is_of_something_gone(),
            again: Instant::now() + pause,
            pause,
        };
        self.refused.insert(unit, refused);
    }

    pub(crate) fn forget(&mut self, unit: Unit) {
        self.refused.remove(&unit);
    }

    /// Forgets cgroups to be marked that have gone.
    pub(crate) fn forget_excluded(&mut self, there: &BTreeSet<u64>) {
        self.refused.retain(|unit, _| !matches!(unit, Unit::Excluded(id) if !there.contains(id)));
    }

    /// A batch has ended: an id may mean another program next time.
    pub(crate) fn batch_ended(&mut self) {
        self.same.clear();
    }

    /// Whether a unit has refused, and its pause has not passed.
    pub(crate) fn rests(&self, unit: Unit) -> bool {
        self.refused.get(&unit).is_some_and(|refused| Instant::now() < refused.again)
    }
}

/// An error with what is behind it, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        line.push_str(": ");
        line.push_str(&error.to_string());
        source = error.source();
    }
    line
}

/// Something else that is pinned and must stay so. Its descriptor is the one that the programs were loaded with.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(super) object: Object,
    pub(super) path: PathBuf,
    /// `None` for one that had gone before it was first looked at.
    pub(super) pin: Option<PinId>,
}

/// What that is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Object {
    Map(&'static str),
    /// What the tables say of themselves: the next agent cannot read them without.
    Layout,
    /// The program that looks after flows.
    Flows,
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map(name) => write!(f, "map {name}"),
            Self::Layout => write!(f, "map {}", maps::LAYOUT),
            Self::Flows => write!(f, "program {}", flow::PROGRAM),
        }
    }
}

/// How far a look is.
#[derive(Debug)]
pub(crate) enum Round {
    Links(Option<PinName>),
    Filters(Option<u32>),
    Pins,
}

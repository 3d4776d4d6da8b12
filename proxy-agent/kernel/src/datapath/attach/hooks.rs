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
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya_obj::generated::bpf_attach_type as Hook;
use nix::sys::resource::{Resource, getrlimit};

use super::grace::Expedited;
use super::loaded::Loaded;
use super::look::{Kept, Round};
use super::{AttachError, Attached, Direction, PinName, open_link};
use crate::datapath::store::pin::{PinId, pin_at, pin_id};
use crate::sys::{self, LinkFacts, Target};
use agent_core::model::Link;

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
}

impl Spot {
    pub(crate) fn target(&self) -> Target {
        match self {
            Self::Cgroup { id, .. } => Target::Cgroup(*id),
            Self::Interface { index, .. } => Target::Interface(*index),
        }
    }

    fn attach(&self, program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        match self {
            Self::Cgroup { path, hook, .. } => {
                let directory = fs::File::open(path)?;
                sys::link_cgroup(program, directory.as_fd(), *hook)
            }
            Self::Interface { index, direction, .. } => {
                sys::link_tcx(program, *index, *direction == Direction::Egress)
            }
        }
    }
}

impl fmt::Display for Spot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cgroup { path, .. } => write!(f, "cgroup {}", path.display()),
            Self::Interface { name, .. } => write!(f, "interface {name}"),
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

/// What bringing a link in line has come to.
struct Brought {
    done: Attached,
    /// The link, unless it was held before.
    link: Option<OwnedFd>,
    pin: PinId,
    runs: u32,
}

/// A hook that refuses its program.
#[derive(Debug)]
struct Refused {
    line: String,
    /// What it was to be attached to has just been removed; netlink will say so.
    passing: bool,
    again: Instant,
    pause: Duration,
}

impl Refused {
    fn counts(&self) -> bool {
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
    /// Interfaces whose filters this process has put in place.
    pub(crate) filters: BTreeSet<u32>,
    refused: BTreeMap<Unit, Refused>,
    /// Whether pins of an earlier agent have been looked through.
    pub(crate) adopted: bool,
    /// The same for marked cgroups.
    pub(crate) excluded_adopted: bool,
    /// Programs by id that were compared with ours since a batch began: many links have the same.
    same: BTreeMap<(&'static str, u32), bool>,
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

impl Loaded {
    /// One link: kept, updated, or made. After an error a link that there was is still there, unless the error is
    /// [`AttachError::Attach`].
    pub(crate) fn ensure(
        &mut self,
        pin: &PinName,
        program: &'static str,
        spot: Spot,
    ) -> Result<Attached, AttachError> {
        let before = self.hooks.links.remove(pin);
        let held = before.as_ref().and_then(|held| held.link.as_ref());
        match self.bring(pin, program, &spot, held) {
            Ok(Brought { done, link, pin: id, runs }) => {
                let link = link.or(before.and_then(|held| held.link)).filter(has_room);
                self.hooks.links.insert(pin.clone(), Held { program, spot, runs, link, pin: id });
                Ok(done)
            }
            Err(error) => {
                if let (Some(before), false) = (before, matches!(error, AttachError::Attach { .. })) {
                    // Without its pin it ends with its descriptor.
                    self.hooks.links.insert(pin.clone(), before);
                }
                Err(error)
            }
        }
    }

    /// The same, to a link that is held or pinned; nothing is noted.
    fn bring(
        &mut self,
        pin: &PinName,
        program: &'static str,
        spot: &Spot,
        held: Option<&OwnedFd>,
    ) -> Result<Brought, AttachError> {
        let path = self.root().link(&pin.to_string());
        let place = spot.to_string();
        let failed = |source| AttachError::Pin { path: path.clone(), source };
        let found = match held {
            Some(link) => Some((None, sys::link_facts(link.as_fd()).map_err(failed)?)),
            None => open_link(&path)?.map(|(link, facts)| (Some(link), facts)),
        };
        if let Some((opened, facts)) = found
            && facts.target == spot.target()
            && let Some(link) = opened.as_ref().or(held)
            && let Some((done, runs)) = self.put_behind(link, &facts, program, &place)?
        {
            let id = if opened.is_some() || is_pinned_at(facts.id, &path) {
                pin_id(&path).map_err(failed)?
            } else {
                pin_at(self.root(), &path, |path| sys::obj_pin(link.as_fd(), path))?
            };
            return Ok(Brought { done, link: opened, pin: id, runs });
        }
        let attach = |source| AttachError::Attach { program, place: place.clone(), source };
        let ours = self.program(program)?.fd.as_fd();
        let runs = sys::program_facts(ours).map_err(failed)?.id;
        let link = spot.attach(ours).map_err(attach)?;
        // An older link goes in the same step as the new one comes.
        match pin_at(self.root(), &path, |path| sys::obj_pin(link.as_fd(), path)) {
            Ok(id) => Ok(Brought { done: Attached::New, link: Some(link), pin: id, runs }),
            // It ends here, and so did the older one.
            Err(error) => Err(attach(io::Error::other(error))),
        }
    }

    /// Sees to it that our program, or one that does the same, is behind a link, and gives the id of what is; `None` if the link
    /// has gone meanwhile.
    fn put_behind(
        &mut self,
        link: &OwnedFd,
        facts: &LinkFacts,
        program: &'static str,
        place: &str,
    ) -> Result<Option<(Attached, u32)>, AttachError> {
        let running = sys::program_by_id(facts.program).ok();
        let same = match self.hooks.same.get(&(program, facts.program)) {
            Some(same) => *same,
            None => running.as_ref().is_some_and(|running| self.is_same(program, running.as_fd())),
        };
        self.hooks.same.insert((program, facts.program), same);
        if same {
            return Ok(Some((Attached::Kept, facts.program)));
        }
        let failed = |source| AttachError::Replace { program, place: place.into(), source };
        // The swap holds only if the link still has the program that was looked at.
        let ours = self.program(program)?;
        let runs = sys::program_facts(ours.fd.as_fd()).map_err(failed)?.id;
        match sys::link_update(link.as_fd(), ours.fd.as_fd(), running.as_ref().map(AsFd::as_fd)) {
            Ok(()) => Ok(Some((Attached::Updated, runs))),
            // The cgroup or interface went this moment.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(None),
            Err(source) => Err(failed(source)),
        }
    }

    /// Attaches again where it was refused and the pause has passed: to what, and what came of it.
    pub fn retry(&mut self) -> Vec<(String, Result<Attached, AttachError>)> {
        let due: Vec<Unit> =
            self.hooks.refused.keys().copied().filter(|unit| !self.hooks.rests(*unit)).collect();
        let _expedited = if due.is_empty() { None } else { Expedited::begin(self.root()) };
        let mut results = Vec::new();
        for unit in due {
            match unit {
                Unit::Sockets => {
                    if let Some(cgroup) = self.hooks.cgroup.clone() {
                        results.push((format!("cgroup {}", cgroup.display()), self.attach_cgroup(&cgroup)));
                    }
                }
                Unit::Interface(index) => {
                    if let Some(link) = self.hooks.interfaces.get(&index).cloned() {
                        results.push((format!("interface {}", link.name), self.try_interface(&link)));
                    }
                }
                // Looked for all the time.
                Unit::Excluded(_) => {}
            }
        }
        self.hooks.batch_ended();
        results
    }

    /// Hooks that refuse their programs, so that traffic is not served, a line each; those whose interface has just gone are
    /// none, nor are pods' cgroups that cannot be marked: their sockets are served as others are.
    #[must_use]
    pub fn refusing(&self) -> Vec<String> {
        let serve = |unit: &Unit| matches!(unit, Unit::Sockets | Unit::Interface(_));
        let refused = self.hooks.refused.iter().filter(|(unit, refused)| serve(unit) && refused.counts());
        refused.map(|(_, refused)| refused.line.clone()).collect()
    }

    /// How many interfaces carry programs, and how many refuse them.
    #[must_use]
    pub fn interfaces(&self) -> (usize, usize) {
        let of_interfaces = self.hooks.refused.iter().filter(|(unit, _)| matches!(unit, Unit::Interface(_)));
        let without = of_interfaces.clone().count();
        let refusing = of_interfaces.filter(|(_, refused)| refused.counts()).count();
        (self.hooks.interfaces.len() - without, refusing)
    }
}

/// Whether the link of this id is pinned at `path`.
fn is_pinned_at(id: u32, path: &Path) -> bool {
    let pinned = sys::obj_get(path).and_then(|pinned| sys::link_facts(pinned.as_fd()));
    pinned.is_ok_and(|pinned| pinned.id == id)
}

/// Whether there are descriptors enough to keep this one: as many as half of what may be open.
fn has_room(fd: &OwnedFd) -> bool {
    let most = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    u64::try_from(fd.as_raw_fd()).is_ok_and(|number| number < most / 2)
}

//! One link at its hook: kept, updated or made; and what refuses is tried again.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};

use super::grace::Expedited;
use super::hooks::{Held, Spot, Unit};
use super::loaded::Loaded;
use super::{AttachError, Attached, PinName, open_link};
use crate::datapath::store::pin::{PinId, pin_at, pin_id};
use crate::sys::{self, LinkFacts};

/// What bringing a link in line has come to.
struct Brought {
    done: Attached,
    /// The link, unless it was held before.
    link: Option<OwnedFd>,
    pin: PinId,
    runs: u32,
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
                Unit::Excluded(_) | Unit::Driver(_) => {}
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

//! Exchanging every program at its hook for the one of the same name in another object, each in one step.
//!
//! Links belong to no generation of tables: whoever comes next takes them over as they are pinned, and puts another program
//! behind each. A filter of the clsact qdisc is replaced in its place.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::net::if_::if_indextoname;

use super::filter;
use super::loaded::Loaded;
use super::{AttachError, Direction, PinName, drop_pin, open_link};
use crate::datapath::store::pin::BpfRoot;
use crate::sys::{self, ProgramFacts};

impl Loaded {
    /// Exchanges what is at the hooks; how many there were.
    pub(crate) fn exchange(&mut self) -> Result<usize, AttachError> {
        let mut exchanged = 0;
        for name in self.root().link_names()? {
            let Some(pin) = PinName::parse(&name) else { continue };
            let done = match &pin {
                PinName::Qdisc(_) => false,
                PinName::Filter(index, direction) => self.exchange_filter(&pin, *index, *direction)?,
                PinName::Cgroup(_) | PinName::Excluded(_) | PinName::Tcx(..) | PinName::Driver(_) => {
                    self.exchange_link(&pin)?
                }
            };
            exchanged += usize::from(done);
        }
        Ok(exchanged)
    }

    fn exchange_link(&mut self, pin: &PinName) -> Result<bool, AttachError> {
        let path = self.root().link(&pin.to_string());
        let Some((link, facts)) = open_link(&path)? else { return Ok(false) };
        // Its cgroup or interface has gone; whoever attaches next removes the pin.
        let Some(running) = program(pin, sys::program_by_id(facts.program))? else { return Ok(false) };
        if !self.have(&running.name)? {
            // Another layout's: nobody here can do its work.
            return drop_pin(self.root(), pin).map(|_| false);
        }
        let program = self.program(&running.name)?;
        match sys::link_update(link.as_fd(), program.fd.as_fd(), None) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
            Err(source) => {
                Err(AttachError::Exchange { program: running.name, place: pin.to_string(), source })
            }
        }
    }

    fn exchange_filter(
        &mut self,
        pin: &PinName,
        index: u32,
        direction: Direction,
    ) -> Result<bool, AttachError> {
        let path = self.root().link(&pin.to_string());
        let running = program(pin, sys::obj_get(&path))?;
        let interface = if_indextoname(index).ok().and_then(|name| name.into_string().ok());
        let (Some(running), Some(interface)) = (running, interface) else { return Ok(false) };
        let Some(name) = Direction::programs(direction).into_iter().find(|name| *name == running.name) else {
            return drop_pin(self.root(), pin).map(|_| false);
        };
        self.have(name)?;
        filter::set(&mut self.ebpf, &interface, direction, name)?;
        self.remember(pin, name)?;
        Ok(true)
    }
}

/// Whether this is so of any program at a hook.
pub(crate) fn any_at_hooks(
    root: &BpfRoot,
    is_so: impl Fn(&ProgramFacts) -> bool,
) -> Result<bool, AttachError> {
    for name in root.link_names()? {
        let path = root.link(&name);
        let Some(pin) = PinName::parse(&name) else { continue };
        let running = match &pin {
            PinName::Qdisc(_) => continue,
            PinName::Filter(..) => sys::obj_get(&path),
            PinName::Cgroup(_) | PinName::Excluded(_) | PinName::Tcx(..) | PinName::Driver(_) => {
                match open_link(&path)? {
                    Some((_, facts)) => sys::program_by_id(facts.program),
                    None => continue,
                }
            }
        };
        if program(&pin, running)?.is_some_and(|facts| is_so(&facts)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What the kernel says of a program at a hook; `None` where there is none any more.
fn program(pin: &PinName, found: io::Result<OwnedFd>) -> Result<Option<ProgramFacts>, AttachError> {
    match found.and_then(|fd| sys::program_facts(fd.as_fd())) {
        Ok(facts) => Ok(Some(facts)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(source) => {
            Err(AttachError::Exchange { program: pin.program().to_owned(), place: pin.to_string(), source })
        }
    }
}

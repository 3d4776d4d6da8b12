//! Exchanging every program at its hook for the one of the same name in another object, each in one step.
//!
//! Links belong to no generation of tables: whoever comes next takes them over as they are pinned, and puts another program
//! behind each. A filter of the clsact qdisc is replaced in its place.

use std::os::fd::AsFd;

use nix::net::if_::if_indextoname;

use super::attach::{AttachError, Direction, PinName, drop_pin, open_link};
use super::filter;
use super::load::Loaded;
use super::sys;

impl Loaded {
    /// Exchanges what is at the hooks; how many there were.
    pub(super) fn exchange(&mut self) -> Result<usize, AttachError> {
        let mut exchanged = 0;
        for name in self.root().link_names()? {
            let Some(pin) = PinName::parse(&name) else { continue };
            let done = match &pin {
                PinName::Qdisc(_) => false,
                PinName::Filter(index, direction) => self.exchange_filter(&pin, *index, *direction)?,
                PinName::Cgroup(_) | PinName::Excluded(_) | PinName::Tcx(..) => self.exchange_link(&pin)?,
            };
            exchanged += usize::from(done);
        }
        Ok(exchanged)
    }

    fn exchange_link(&self, pin: &PinName) -> Result<bool, AttachError> {
        let path = self.root().link(&pin.to_string());
        let Some((link, facts)) = open_link(&path)? else { return Ok(false) };
        // Its cgroup or interface has gone; whoever attaches next removes the pin.
        let Ok(running) = sys::program_by_id(facts.program).and_then(|fd| sys::program_facts(fd.as_fd()))
        else {
            return Ok(false);
        };
        let Some(program) = self.programs.get(&running.name) else {
            // Another layout's: nobody here can do its work.
            return drop_pin(self.root(), pin).map(|_| false);
        };
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
        let running = sys::obj_get(&path).and_then(|fd| sys::program_facts(fd.as_fd()));
        let interface = if_indextoname(index).ok().and_then(|name| name.into_string().ok());
        let (Ok(running), Some(interface)) = (running, interface) else { return Ok(false) };
        let Some(name) = Direction::programs(direction).into_iter().find(|name| *name == running.name) else {
            return drop_pin(self.root(), pin).map(|_| false);
        };
        filter::set(&mut self.ebpf, &interface, direction, name)?;
        self.remember(pin, name)?;
        Ok(true)
    }

    /// Whether any program at a hook works with this map.
    pub(super) fn is_used(&self, map: u32) -> Result<bool, AttachError> {
        for name in self.root().link_names()? {
            let path = self.root().link(&name);
            let program = match PinName::parse(&name) {
                Some(PinName::Filter(..)) => sys::obj_get(&path).ok(),
                Some(PinName::Qdisc(_)) | None => None,
                Some(_) => open_link(&path)?.and_then(|(_, facts)| sys::program_by_id(facts.program).ok()),
            };
            let facts = program.and_then(|program| sys::program_facts(program.as_fd()).ok());
            if facts.is_some_and(|facts| facts.maps.contains(&map)) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

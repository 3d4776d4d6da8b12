//! Looking at what is attached and pinned, one after the other, and restoring what is not as it was left.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use proxy_common::abi::maps;

use super::filter;
use super::grace::Expedited;
use super::hooks::{Kept, Object, Round, Spot, Unit};
use super::loaded::Loaded;
use super::{AttachError, Direction, PinName};
use crate::datapath::flow;
use crate::datapath::store::layout::Layout;
use crate::datapath::store::pin::{pin_at, pin_id};
use crate::sys;

/// What a look has found amiss.
#[derive(Debug)]
pub struct Repair {
    /// `link`, `program`, `pin`, `map` or `filter`.
    pub what: &'static str,
    pub object: String,
    /// Whether it is as it was.
    pub result: Result<(), AttachError>,
}

impl Loaded {
    /// Looks on until a moment, and restores what is not as it was left; whether everything has been looked at since the
    /// last time that this was true.
    pub fn look(&mut self, until: Instant) -> (Vec<Repair>, bool) {
        let mut repairs = Vec::new();
        if self.hooks.kept.is_empty() {
            self.keep();
        }
        loop {
            let round = self.hooks.round.take().unwrap_or(Round::Links(None));
            let (repair, next) = match round {
                Round::Links(last) => self.look_at_next_link(last),
                Round::Filters(last) => self.look_at_next_filter(last),
                Round::Pins => {
                    repairs.extend(self.look_at_pins());
                    return (repairs, true);
                }
            };
            repairs.extend(repair);
            self.hooks.round = Some(next);
            if Instant::now() >= until {
                return (repairs, false);
            }
        }
    }

    fn look_at_next_link(&mut self, last: Option<PinName>) -> (Option<Repair>, Round) {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = last.map_or(Unbounded, Excluded);
        let Some((pin, held)) = self.hooks.links.range((from, Unbounded)).next() else {
            return (None, Round::Filters(None));
        };
        let path = self.root().link(&pin.to_string());
        let facts = match &held.link {
            Some(link) => sys::link_facts(link.as_fd()),
            None => sys::obj_get(&path).and_then(|link| sys::link_facts(link.as_fd())),
        };
        let what = match facts {
            Ok(facts) if facts.target != held.spot.target() => "link",
            Ok(facts) if facts.program != held.runs => "program",
            Ok(_) if pin_id(&path).ok() == Some(held.pin) => return (None, Round::Links(Some(pin.clone()))),
            Ok(_) => "pin",
            // The pin was all that was left of it.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => "link",
            // Unknown: next time.
            Err(_) => return (None, Round::Links(Some(pin.clone()))),
        };
        let (pin, program, spot) = (pin.clone(), held.program, held.spot.clone());
        (self.restore(what, &pin, program, spot), Round::Links(Some(pin)))
    }

    fn restore(
        &mut self,
        what: &'static str,
        pin: &PinName,
        program: &'static str,
        spot: Spot,
    ) -> Option<Repair> {
        let object = format!("{program} at {spot}");
        let unit = match pin {
            PinName::Excluded(id) => Unit::Excluded(*id),
            _ => match &spot {
                Spot::Cgroup { .. } => Unit::Sockets,
                Spot::Interface { index, .. } => Unit::Interface(*index),
                Spot::Driver { index, .. } => Unit::Driver(*index),
            },
        };
        if what == "link"
            && let Spot::Cgroup { path, id, .. } = &spot
            && !fs::metadata(path).is_ok_and(|found| found.ino() == *id)
            && matches!(unit, Unit::Excluded(_))
        {
            // A pod's cgroup that has gone takes its link with it.
            return None;
        }
        let _expedited = if what == "link" { Expedited::begin(self.root()) } else { None };
        let name = spot.to_string();
        let result = self.ensure(pin, program, spot);
        self.hooks.batch_ended();
        if let Err(error) = &result {
            if error.is_of_something_gone() && matches!(unit, Unit::Interface(_)) {
                // It has been removed, and netlink will say so; if it comes back before that, it is tried again.
                self.hooks.note(unit, &name, &result);
                return None;
            }
            self.hooks.note(unit, &name, &result);
            if let (Unit::Interface(index), Err(error)) = (unit, &result) {
                self.drop_half(index, error);
            }
        }
        Some(Repair { what, object, result: result.map(drop) })
    }

    fn look_at_next_filter(&mut self, last: Option<u32>) -> (Option<Repair>, Round) {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = last.map_or(Unbounded, Excluded);
        let next = self.hooks.filters.range((from, Unbounded)).next().copied();
        let Some(index) = next else { return (None, Round::Pins) };
        let next = Round::Filters(Some(index));
        let Some(link) = self.hooks.interfaces.get(&index).cloned() else { return (None, next) };
        let is_there = |direction: Direction| {
            let program = self.program(direction.program(link.layer3)).map(|program| program.fd.as_fd());
            let ours = program.ok().and_then(|fd| sys::program_facts(fd).ok()).map(|facts| facts.id);
            let pinned = self.root().link(&PinName::Filter(index, direction).to_string()).exists();
            // What cannot be found out is ignored.
            filter::running(index, direction).map_or(pinned, |running| running == ours && pinned)
        };
        if Direction::BOTH.into_iter().all(is_there) {
            return (None, next);
        }
        let result = self.try_interface(&link);
        let gone = result.as_ref().is_err_and(AttachError::is_of_something_gone);
        let object = format!("filters of interface {}", link.name);
        ((!gone).then(|| Repair { what: "filter", object, result: result.map(drop) }), next)
    }

    /// Notes what is pinned besides links.
    fn keep(&mut self) {
        let root = self.root();
        let of_maps = maps::ALL.into_iter().map(|name| (Object::Map(name), root.map(name)));
        let others = [(Object::Layout, root.map(maps::LAYOUT)), (Object::Flows, root.program(flow::PROGRAM))];
        let kept = of_maps.chain(others).map(|(object, path)| Kept { object, pin: pin_id(&path).ok(), path });
        self.hooks.kept = kept.collect();
    }

    fn look_at_pins(&mut self) -> Vec<Repair> {
        let mut repairs = Vec::new();
        let mut all = std::mem::take(&mut self.hooks.kept);
        for kept in &mut all {
            if kept.pin.is_some() && pin_id(&kept.path).ok() == kept.pin {
                continue;
            }
            let pinned =
                pin_at(self.root(), &kept.path, |path| self.pin(kept.object, path)).map_err(Into::into);
            let result = pinned.map(|pin| kept.pin = Some(pin));
            repairs.push(Repair { what: "pin", object: kept.object.to_string(), result });
        }
        self.hooks.kept = all;
        repairs
    }

    fn pin(&self, object: Object, path: &Path) -> io::Result<()> {
        let missing = |name| io::Error::other(format!("the BPF object has no {name}"));
        match object {
            Object::Map(name) => {
                let map = self.ebpf.map(name).ok_or_else(|| missing(name))?;
                map.pin(path).map_err(io::Error::other)
            }
            Object::Layout => Layout::own().write(path).map(drop),
            Object::Flows => {
                let program = self.programs.get(flow::PROGRAM).ok_or_else(|| missing(flow::PROGRAM))?;
                sys::obj_pin(program.fd.as_fd(), path)
            }
        }
    }
}

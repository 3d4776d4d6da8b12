//! Programs at the drivers of interfaces to the outside (XDP), where `--xdp` wants them.
//!
//! They only make things faster: what they leave alone takes the way through the stack and TC. So one that is refused hurts
//! nobody; it is said, and tried again after a pause. A driver that carries somebody else's program refuses ours (`EBUSY`).
//!
//! There is no way in the stack in a driver's place (generic XDP): on Linux 6.18 packets came to TC programs behind it without
//! their Ethernet header.

use std::sync::Arc;

use proxy_common::abi::device::SENDS;
use proxy_common::abi::{Device, maps};

use super::hooks::{Spot, Unit};
use super::loaded::Loaded;
use super::{AttachError, Attached, PinName};
use crate::datapath::probe::Features;
use crate::datapath::store::table::Table;
use crate::netlink::driver;
use agent_core::model::AtDriver;

/// Where packets lie in one piece.
pub(crate) const PROGRAM: &str = "xdp_ingress";
/// Where they may lie in several.
const IN_PIECES: &str = "xdp_ingress_sg";

/// Whether a program is one for drivers.
pub(crate) fn is_of_drivers(program: &str) -> bool {
    program == PROGRAM || program == IN_PIECES
}

/// Whether a kernel with these features knows programs of its kind.
pub(crate) fn is_known(program: &str, features: &Features) -> bool {
    program != IN_PIECES || features.xdp_frags
}

impl Loaded {
    /// Brings the programs at drivers in line with `wanted`. One result for each that is new, or has been tried again.
    pub fn sync_drivers(&mut self, wanted: &[AtDriver]) -> Vec<(Arc<str>, Result<Attached, AttachError>)> {
        self.drop_unwanted(wanted);
        let mut results = Vec::new();
        for driver in wanted {
            let (unit, index) = (Unit::Driver(driver.index), driver.index);
            // Without programs that begin flows there is nothing to do for this one.
            let serves =
                self.hooks.interfaces.contains_key(&index) && !self.hooks.rests(Unit::Interface(index));
            let stands =
                self.hooks.holds(&PinName::Driver(index)) && self.hooks.drivers.get(&index) == Some(driver);
            if !serves || stands || self.hooks.rests(unit) {
                continue;
            }
            let result = self.attach_driver(driver);
            if result.is_err() {
                self.drop_driver(index);
            }
            self.hooks.batch_ended();
            self.hooks.drivers.insert(index, driver.clone());
            self.hooks.note(unit, &format!("driver of {}", driver.name), &result);
            results.push((driver.name.clone(), result));
        }
        results
    }

    /// Which interfaces carry a program at their driver.
    pub fn at_drivers(&self) -> impl Iterator<Item = &str> {
        let held = |index: &u32| self.hooks.holds(&PinName::Driver(*index));
        let carry = self.hooks.drivers.iter().filter(move |(index, _)| held(index));
        carry.map(|(_, driver)| &*driver.name)
    }

    /// Removes programs from drivers that are to carry none, or another; the first time those of an earlier agent, too.
    fn drop_unwanted(&mut self, wanted: &[AtDriver]) {
        let mut gone: Vec<u32> = self
            .hooks
            .drivers
            .values()
            .filter(|known| !wanted.contains(known))
            .map(|known| known.index)
            .collect();
        if !self.hooks.drivers_adopted
            && let Ok(pinned) = self.root().link_names()
        {
            self.hooks.drivers_adopted = true;
            gone.extend(pinned.iter().filter_map(|name| match PinName::parse(name)? {
                PinName::Driver(index) => {
                    (!wanted.iter().any(|driver| driver.index == index)).then_some(index)
                }
                _ => None,
            }));
        }
        for index in gone {
            self.hooks.drivers.remove(&index);
            self.hooks.forget(Unit::Driver(index));
            self.drop_driver(index);
        }
    }

    /// Takes away the program of a driver, if there is one, and what is known of it.
    pub(super) fn drop_driver(&mut self, index: u32) {
        if let Err(error) = self.detach(&PinName::Driver(index)) {
            tracing::warn!(error = &error as &dyn std::error::Error, "a program stays at a driver");
        }
        // Nobody reads of a driver that carries no program, but others might hand it packets.
        if let Ok(devices) = Table::<u32, Device>::open(self.root(), maps::DEVICES) {
            devices.delete(&index).ok();
        }
    }

    fn attach_driver(&mut self, driver: &AtDriver) -> Result<Attached, AttachError> {
        let AtDriver { index, name, mac, is_pair, .. } = driver;
        let sends = driver::sends(*index);
        // One end of a pair hands over to the other, which must be ready for that.
        if *is_pair && !sends {
            return Err(AttachError::SendsNothing { name: name.clone() });
        }
        let program = if self.features.xdp_frags { IN_PIECES } else { PROGRAM };
        self.have(program)?;
        let spot = Spot::Driver { index: *index, name: name.clone() };
        let done = self.ensure(&PinName::Driver(*index), program, spot)?;
        let device = Device { mac: *mac, flags: if sends { SENDS } else { 0 } };
        Table::open(self.root(), maps::DEVICES)
            .and_then(|devices| devices.put(index, &device))
            .map_err(|source| AttachError::Device { name: name.clone(), source })?;
        Ok(done)
    }
}

//! From the object to maps and programs in the kernel: tables that are pinned are used again, or carried over to others
//! (`change`). Programs are loaded before anything is exchanged, so that a failure leaves the data path as it was.
//!
//! To have a program verified is what takes long at a start. Those for interfaces without Ethernet header, and those for
//! drivers, wait until there is such an interface, or are loaded with the others where some hook has one of an earlier
//! agent's.

mod carry;
mod carry_flows;
mod carry_sockets;
mod changeover;
mod error;
mod generation;
mod object;
mod refusal;
pub mod remove;

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use aya::VerifierLogLevel;
use aya_log::EbpfLogger;
use aya_obj::Object;
use proxy_common::abi::maps;

use self::generation::Fates;
use self::object::{LOG_MAP, Maps, draw_secret, load_program, open_maps, pin_flows, program_fd, refused};
use self::remove::remove_versions;
use crate::datapath::attach::driver::{is_known, is_of_drivers};
use crate::datapath::attach::exchange::any_at_hooks;
use crate::datapath::attach::hooks::Hooks;
use crate::datapath::attach::loaded::{LoadedProgram, identity};
use crate::datapath::attach::program_log::Bridge;
use crate::datapath::attach::{AttachError, Direction};
use crate::datapath::flow;
use crate::datapath::probe::{self, Features};
use crate::datapath::store::layout::Layout;
use crate::datapath::store::pin::BpfRoot;
use crate::datapath::tables::cpus::cpus;
use crate::sys;

pub use self::error::LoadError;
pub use self::object::{OBJECT, trial};
pub use self::refusal::Refusal;
pub use super::attach::loaded::{Changeover, Loaded};
pub use super::attach::program_log::{ProgramLog, ProgramLogger};
pub use agent_core::capacity::Capacities;

impl Loaded {
    /// Loads the embedded object, using again the maps pinned under `root`.
    pub fn open(
        root: &BpfRoot,
        features: &Features,
        capacities: &Capacities,
        log: ProgramLog,
    ) -> Result<Self, LoadError> {
        if OBJECT.is_empty() {
            return Err(LoadError::NoObject);
        }
        Self::open_object(OBJECT, root, features, capacities, log)
    }

    /// The same with an object of the caller's.
    pub fn open_object(
        object: &'static [u8],
        root: &BpfRoot,
        features: &Features,
        capacities: &Capacities,
        log: ProgramLog,
    ) -> Result<Self, LoadError> {
        Self::prepare_object(object, root, features, capacities, log)?.finish()
    }

    /// Loads the embedded object beside what is at work, with tables of these sizes; nothing that runs is touched. This is what
    /// takes time.
    pub fn prepare(
        root: &BpfRoot,
        features: &Features,
        capacities: &Capacities,
        log: ProgramLog,
    ) -> Result<Prepared, LoadError> {
        Self::prepare_object(OBJECT, root, features, capacities, log)
    }

    fn prepare_object(
        object: &'static [u8],
        root: &BpfRoot,
        features: &Features,
        capacities: &Capacities,
        log: ProgramLog,
    ) -> Result<Prepared, LoadError> {
        probe::raise_memlock();
        let object = Source { bytes: object, parsed: Object::parse(object)?, features, log };
        root.prepare()?;
        let old = remove_versions(root)?;
        if old.links + old.maps != 0 {
            tracing::warn!(
                "removed {} programs and {} maps of an agent whose tables cannot be carried over: open connections break",
                old.links,
                old.maps
            );
        }
        let found = generation::all(root)?;
        let mut fates = generation::fates(&object.parsed, found.first(), &capacities.each(cpus()).into())?;
        let warnings = std::mem::take(&mut fates.warnings);
        let made = !fates.made.is_empty() || found.is_empty();
        let loaded = match found.first() {
            Some(newest) if !made => Self::load(&object, root, &newest.root, &fates, warnings)?,
            newest => Self::make(&object, root, newest, &fates, warnings).inspect_err(|_| {
                // What was made for nothing goes at once; the programs that run do not know it.
                root.in_making().remove_generation().ok();
            })?,
        };
        Ok(Prepared { loaded, found, fates, made })
    }

    /// Makes the next generation of tables, and loads the programs that work with them.
    fn make(
        object: &Source<'_>,
        root: &BpfRoot,
        newest: Option<&generation::Generation>,
        fates: &Fates,
        warnings: Vec<String>,
    ) -> Result<Self, LoadError> {
        let making = root.begin()?;
        if let Some(newest) = newest {
            generation::pin_kept(newest, fates, &making)?;
        }
        let loaded = Self::load(object, root, &making, fates, warnings)?;
        let layout = making.map(maps::LAYOUT);
        Layout::own().write(&layout).map_err(|source| LoadError::Describe { path: layout, source })?;
        if fates.of_flows() {
            // All records are to be free before the first flow comes.
            flow::Sweeper::open(&making, flow::Timeouts::CONNTRACK)?.all()?;
        }
        Ok(loaded)
    }

    fn load(
        object: &Source<'_>,
        root: &BpfRoot,
        tables: &BpfRoot,
        fates: &Fates,
        warnings: Vec<String>,
    ) -> Result<Self, LoadError> {
        let Source { bytes, features, log, .. } = *object;
        let maps = Maps::Pinned(tables, fates);
        let mut ebpf = open_maps(bytes, &maps, features, log, VerifierLogLevel::STATS)?;
        draw_secret(&mut ebpf)?;
        let logger = match log {
            ProgramLog::Off => None,
            _ if ebpf.map(LOG_MAP).is_none() => None,
            _ => Some(
                EbpfLogger::init_with_logger(&mut ebpf, Bridge)
                    .map_err(|error| LoadError::Log(Box::new(error)))?,
            ),
        };
        let mut loaded = Self {
            root: root.clone(),
            ebpf,
            programs: BTreeMap::new(),
            object: bytes,
            features: features.clone(),
            hooks: Hooks::default(),
            log,
            logger,
            warnings,
            changed: None,
        };
        // Who may not know what is at a hook loads them all.
        let runs = |of: fn(&str) -> bool| any_at_hooks(root, |program| of(&program.name)).unwrap_or(true);
        let (layer3, drivers) = (runs(is_of_layer3), runs(is_of_drivers));
        let names: Vec<String> = loaded.ebpf.programs().map(|(name, _)| name.to_owned()).collect();
        let wanted = |name: &str| match name {
            _ if is_of_layer3(name) => layer3,
            _ if is_of_drivers(name) => drivers && is_known(name, features),
            _ => true,
        };
        for name in names.iter().filter(|name| wanted(name)) {
            loaded.load_one(name)?;
        }
        pin_flows(tables, &loaded.programs)?;
        Ok(loaded)
    }

    /// Loads a program unless it is loaded; `false` when the object has none of this name.
    pub(crate) fn have(&mut self, name: &str) -> Result<bool, AttachError> {
        let failed = |error| AttachError::Load { program: name.to_owned(), source: Box::new(error) };
        Ok(self.programs.contains_key(name) || self.load_one(name).map_err(failed)?)
    }

    fn load_one(&mut self, name: &str) -> Result<bool, LoadError> {
        let Some(program) = self.ebpf.program_mut(name) else { return Ok(false) };
        load_program(program).map_err(|error| refused(self.object, &self.features, name, error))?;
        let failed = |source| LoadError::Facts { program: name.into(), source };
        let fd = program_fd(program).map_err(failed)?;
        let identity = match identity(&sys::program_facts(fd.as_fd()).map_err(failed)?) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => None,
            identity => Some(identity.map_err(failed)?),
        };
        self.programs.insert(name.to_owned(), LoadedProgram { fd, identity });
        Ok(true)
    }

    /// Loads what has been left for later, too: to run a packet of one's own through each.
    pub fn load_rest(&mut self) -> Result<(), AttachError> {
        for direction in Direction::BOTH {
            for name in direction.programs() {
                self.have(name)?;
            }
        }
        Ok(())
    }
}

/// Programs that are loaded, with tables that nothing has been carried over to yet.
#[derive(Debug)]
pub struct Prepared {
    loaded: Loaded,
    found: Vec<generation::Generation>,
    fates: Fates,
    made: bool,
}

impl Prepared {
    /// Carries over what is in the tables that are at work, and exchanges the programs.
    pub fn finish(self) -> Result<Loaded, LoadError> {
        let Self { mut loaded, found, fates, made } = self;
        if made {
            let changed = loaded.change(&found, &fates);
            // Unless it is whole it goes.
            loaded.root.in_making().remove_generation()?;
            loaded.changed = Some(changed?);
        } else if let Some((newest, left)) = found.split_first().filter(|(_, left)| !left.is_empty()) {
            loaded.changed = Some(loaded.finish(newest, left)?);
        }
        Ok(loaded)
    }
}

/// Whether a program is one for interfaces without Ethernet header.
fn is_of_layer3(program: &str) -> bool {
    Direction::BOTH.iter().any(|direction| direction.program(true) == program)
}

/// What is loaded, and how.
struct Source<'a> {
    bytes: &'static [u8],
    parsed: Object,
    features: &'a Features,
    log: ProgramLog,
}

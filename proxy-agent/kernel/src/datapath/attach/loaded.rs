//! Programs in the kernel, with the tables that they work with: what is to be attached, and by what two of them are the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use aya::Ebpf;
use aya::programs::{Program, SchedClassifier};
use aya_log::EbpfLogger;
use proxy_common::abi::maps;

use super::hooks::Hooks;
use super::program_log::{Bridge, ProgramLog, ProgramLogger};
use crate::datapath::probe::Features;
use crate::datapath::store::pin::BpfRoot;
use crate::sys::{self, ProgramFacts};

/// A program in the kernel.
#[derive(Debug)]
pub(crate) struct LoadedProgram {
    pub(crate) fd: OwnedFd,
    /// `None` where that is not to be known: to look at maps and programs by their numbers takes `CAP_SYS_ADMIN`.
    pub(crate) identity: Option<Identity>,
}

/// What makes two loaded programs the same: instructions, constants, and the pinned maps they use. The tag
/// alone says nothing of constants and maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    tag: [u8; 8],
    maps: BTreeSet<u32>,
    constants: BTreeMap<String, Vec<u8>>,
}

/// Maps and programs in the kernel, ready to be attached.
pub struct Loaded {
    pub(crate) root: BpfRoot,
    pub(crate) ebpf: Ebpf,
    pub(crate) programs: BTreeMap<String, LoadedProgram>,
    /// The object that the programs are in.
    pub(crate) object: &'static [u8],
    pub(crate) features: Features,
    /// What is attached.
    pub(crate) hooks: Hooks,
    pub(crate) log: ProgramLog,
    pub(crate) logger: Option<EbpfLogger<Bridge>>,
    pub(crate) warnings: Vec<String>,
    pub(crate) changed: Option<Changeover>,
}

impl Loaded {
    /// Where it is pinned.
    #[must_use]
    pub fn root(&self) -> &BpfRoot {
        &self.root
    }

    /// A TC program by its ELF name, once it is loaded, to be run on a packet of one's own (`BPF_PROG_TEST_RUN`).
    #[must_use]
    pub fn classifier(&self, name: &str) -> Option<&SchedClassifier> {
        match self.ebpf.program(name)? {
            Program::SchedClassifier(program) => Some(program),
            _ => None,
        }
    }

    /// What the operator should know about the pins that were found.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    pub(crate) fn warn(&mut self, line: String) {
        if !self.warnings.contains(&line) {
            self.warnings.push(line);
        }
    }

    /// What it has taken to exchange the programs, and to carry over what was in other tables, if that was done.
    #[must_use]
    pub fn changed(&self) -> Option<Changeover> {
        self.changed
    }

    /// The log of the programs when they log: poll [`ProgramLogger::as_fd`], then drain.
    pub fn logger(&mut self) -> Option<ProgramLogger<'_>> {
        self.logger.as_mut().map(|logger| ProgramLogger { logger })
    }

    /// Whether `running` does the same as the loaded program `name`: attaching that one would change nothing.
    pub(crate) fn is_same(&self, name: &str, running: BorrowedFd<'_>) -> bool {
        // A program that logs writes to the log of its own agent.
        self.log == ProgramLog::Off
            && sys::program_facts(running).and_then(|facts| identity(&facts)).is_ok_and(|found| {
                self.programs.get(name).is_some_and(|p| p.identity.as_ref() == Some(&found))
            })
    }
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded")
            .field("root", &self.root)
            .field("programs", &self.programs.keys())
            .finish_non_exhaustive()
    }
}

pub(crate) fn identity(program: &ProgramFacts) -> io::Result<Identity> {
    let (mut used, mut constants) = (BTreeSet::new(), BTreeMap::new());
    for id in &program.maps {
        let fd = sys::map_by_id(*id)?;
        let map = sys::map_facts(fd.as_fd())?;
        if map.name.contains(".rodata") {
            let mut words = sys::zeros::<u64>((map.value_size as usize).div_ceil(8));
            sys::lookup(fd.as_fd(), &0_u32, &mut words)?;
            let bytes = words.into_iter().flat_map(u64::to_ne_bytes).take(map.value_size as usize);
            constants.insert(map.name, bytes.collect());
        } else if maps::ALL.contains(&map.name.as_str()) {
            used.insert(*id);
        }
    }
    Ok(Identity { tag: program.tag, maps: used, constants })
}

/// What a change has taken.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changeover {
    /// Flows that have been carried over.
    pub flows: usize,
    /// Flows that found no room.
    pub no_room: usize,
    /// Programs that have been exchanged.
    pub hooks: usize,
    /// For how long what was new had to wait.
    pub paused: Duration,
    /// All of it.
    pub took: Duration,
}

impl fmt::Display for Changeover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { flows, no_room, hooks, paused, took } = *self;
        write!(
            f,
            "carried {flows} flows over to new tables and exchanged {hooks} programs in {:.0} ms; what was new waited for {:.1} \
             ms of them",
            took.as_secs_f64() * 1000.0,
            paused.as_secs_f64() * 1000.0
        )?;
        if no_room != 0 {
            write!(f, "; {no_room} flows found no room: raise --max-flows")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_loaded_can_move_between_threads() {
        fn check<T: Send>() {}
        check::<Loaded>();
    }
}

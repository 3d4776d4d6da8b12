//! From the object to maps and programs in the kernel: tables that are pinned are used again, or carried over to others
//! (`change`). Programs are loaded before anything is exchanged, so that a failure leaves the data path as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use aya::maps::{Array, MapError};
use aya::programs::{Program, ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use aya_log::EbpfLogger;
use aya_obj::btf::BtfError;
use aya_obj::{Object, ParseError};
use proxy_common::abi::{Secret, maps};
use proxy_common::lb::Ring;

use super::attach::AttachError;
pub use super::capacity::Capacities;
use super::capacity::cpus;
use super::change::Change;
use super::flow;
use super::generation::{self, Fates};
use super::hooks::Hooks;
use super::layout::Layout;
use super::pin::{self, BpfRoot, PinError};
use super::probe::Features;
use super::program_log::Bridge;
pub use super::program_log::{ProgramLog, ProgramLogger};
pub use super::refusal::Refusal;
use super::remove::remove_versions;
use super::sys::{self, ProgramFacts};
use super::table::TableError;

/// The embedded BPF object; empty when the crate was built without one.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/proxy-ebpf"));

/// Global of the object: bits of `abi::feature`.
const FEATURES: &str = "FEATURES";
/// Where random numbers come from.
const RANDOM: &str = "/dev/urandom";
/// Globals of the object: places in one ring of young flows, and how many CPUs have rings.
const PLACES: &str = "PLACES";
/// See above.
const CPUS: &str = "CPUS";
/// Map that a data path with logging writes to.
const LOG_MAP: &str = "AYA_LOGS";
/// Entries of each map of a trial: the verifier does not look at sizes.
const TRIAL_ENTRIES: u32 = 64;

/// Why the programs could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// There is no object in this binary.
    #[error(
        "this proxy-agent was built without its BPF object: run `cargo xtask build-ebpf`, then build again"
    )]
    NoObject,
    /// The pins cannot be used.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The object is not what it should be.
    #[error("cannot read the BPF object: build it again with `cargo xtask build-ebpf`")]
    Parse(#[from] ParseError),
    /// A map or program is missing in the object.
    #[error("the BPF object has no {what} {name}: build it again with `cargo xtask build-ebpf`")]
    Missing {
        /// Map or program.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A pinned map cannot be looked at.
    #[error("cannot open the pinned map {path}")]
    OpenPin {
        /// The pin.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What the tables say of their layout cannot be read.
    #[error(
        "cannot read {path}, which says what the pinned tables hold: run `proxy-agent cleanup` (open connections through \
         Services break), then start again"
    )]
    Layout {
        /// The pin.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is said of the layout could not be written.
    #[error("cannot write {path}, by which the next agent knows what the tables hold")]
    Describe {
        /// The pin.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is in the tables could not be carried over.
    #[error("cannot carry over what is in the tables")]
    Carry(#[from] TableError),
    /// The programs could not be exchanged.
    #[error(transparent)]
    Exchange(#[from] AttachError),
    /// Maps could not be made.
    #[error("cannot create the maps of the BPF object")]
    Maps(#[source] Box<EbpfError>),
    /// The verifier refused a program, or it is of a kind this kernel lacks.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// A program of a kind that this agent does not know.
    #[error("cannot load program {program}: build the BPF object again with `cargo xtask build-ebpf`")]
    Kind {
        /// Its name.
        program: String,
        /// Why.
        source: Box<ProgramError>,
    },
    /// A loaded program cannot be looked at.
    #[error("cannot look at the loaded program {program}")]
    Facts {
        /// Its name.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// There are no random numbers.
    #[error(
        "cannot read random numbers from {RANDOM}: the agent needs the host's or the container's usual /dev"
    )]
    Random(#[source] io::Error),
    /// The map of random numbers cannot be used.
    #[error("cannot read or write the map {}", maps::SECRET)]
    Secret(#[source] Box<MapError>),
    /// The log of the programs cannot be read.
    #[error("cannot read the log of the BPF programs")]
    Log(#[source] Box<aya_log::Error>),
}

/// A program in the kernel.
#[derive(Debug)]
pub(crate) struct LoadedProgram {
    pub(crate) fd: OwnedFd,
    /// `None` where that is not to be known: to look at maps and programs by their numbers takes `CAP_SYS_ADMIN`.
    identity: Option<Identity>,
}

/// What makes two loaded programs the same: instructions, constants, and the pinned maps they use. The tag
/// alone says nothing of constants and maps.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    tag: [u8; 8],
    maps: BTreeSet<u32>,
    constants: BTreeMap<String, Vec<u8>>,
}

/// Maps and programs in the kernel, ready to be attached.
pub struct Loaded {
    root: BpfRoot,
    pub(crate) ebpf: Ebpf,
    pub(crate) programs: BTreeMap<String, LoadedProgram>,
    pub(crate) tcx: bool,
    /// What is attached.
    pub(crate) hooks: Hooks,
    log: ProgramLog,
    logger: Option<EbpfLogger<Bridge>>,
    warnings: Vec<String>,
    changed: Option<Change>,
}

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
        object: &[u8],
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
        object: &[u8],
        root: &BpfRoot,
        features: &Features,
        capacities: &Capacities,
        log: ProgramLog,
    ) -> Result<Prepared, LoadError> {
        super::probe::raise_memlock();
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
        let mut fates = generation::fates(&object.parsed, found.first(), &capacities.each().into())?;
        let warnings = std::mem::take(&mut fates.warnings);
        let made = !fates.made.is_empty() || found.is_empty();
        let loaded = match found.first() {
            Some(newest) if !made => Self::load(&object, root, &newest.root, &fates, warnings)?,
            newest => Self::make(&object, root, newest, &fates, warnings).inspect_err(|_| {
                // What was made for nothing goes at once; the programs that run do not know it.
                let _ = root.in_making().remove_generation();
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
        let mut programs = BTreeMap::new();
        for (name, program) in ebpf.programs_mut() {
            load_program(program).map_err(|error| refused(bytes, features, name, error))?;
            let failed = |source| LoadError::Facts { program: name.into(), source };
            let fd = program_fd(program).map_err(failed)?;
            let identity = match identity(&sys::program_facts(fd.as_fd()).map_err(failed)?) {
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => None,
                identity => Some(identity.map_err(failed)?),
            };
            programs.insert(name.to_owned(), LoadedProgram { fd, identity });
        }
        pin_flows(tables, &programs)?;
        Ok(Self {
            root: root.clone(),
            ebpf,
            programs,
            tcx: features.tcx,
            hooks: Hooks::default(),
            log,
            logger,
            warnings,
            changed: None,
        })
    }

    /// Where it is pinned.
    #[must_use]
    pub fn root(&self) -> &BpfRoot {
        &self.root
    }

    /// A loaded TC program by its ELF name, to be run on a packet of one's own (`BPF_PROG_TEST_RUN`).
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

    pub(super) fn warn(&mut self, line: String) {
        if !self.warnings.contains(&line) {
            self.warnings.push(line);
        }
    }

    /// What it has taken to exchange the programs, and to carry over what was in other tables, if that was done.
    #[must_use]
    pub fn changed(&self) -> Option<Change> {
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

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded")
            .field("root", &self.root)
            .field("programs", &self.programs.keys())
            .finish_non_exhaustive()
    }
}

/// What is loaded, and how.
struct Source<'a> {
    bytes: &'a [u8],
    parsed: Object,
    features: &'a Features,
    log: ProgramLog,
}

/// How often a program is loaded whose verification a signal has ended.
const INTERRUPTED: usize = 20;

fn load_program(program: &mut Program) -> Result<(), ProgramError> {
    for _ in 1..INTERRUPTED {
        match load_once(program) {
            Err(ProgramError::LoadError { io_error, .. }) if io_error.kind() == io::ErrorKind::WouldBlock => {
            }
            done => return done,
        }
    }
    load_once(program)
}

fn load_once(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// Pins the program that no hook carries beside its tables, in place of an older one: whoever looks after flows finds it there.
fn pin_flows(root: &BpfRoot, programs: &BTreeMap<String, LoadedProgram>) -> Result<(), LoadError> {
    let missing = || LoadError::Missing { what: "program", name: flow::PROGRAM.into() };
    let program = programs.get(flow::PROGRAM).ok_or_else(missing)?;
    let (path, making) = (root.program(flow::PROGRAM), root.program_in_making(flow::PROGRAM));
    let failed = |source| LoadError::OpenPin { path: path.clone(), source };
    pin::remove(&making, false)?;
    sys::obj_pin(program.fd.as_fd(), &making).map_err(failed)?;
    std::fs::rename(&making, &path).map_err(failed)
}

fn program_fd(program: &Program) -> io::Result<OwnedFd> {
    program.fd().map_err(io::Error::other)?.as_fd().try_clone_to_owned()
}

/// Where the maps of an object are made.
enum Maps<'a> {
    /// In a generation, where some are already.
    Pinned(&'a BpfRoot, &'a Fates),
    /// Nowhere, and tiny.
    Trial,
}

/// Reads the object and makes its maps; no program is loaded yet.
///
/// A refused load is tried again by aya with a buffer for the verifier's log, ten times larger each time until the log
/// fits: minutes, when each step is in it. At the level of statistics it holds only what went wrong, and fits at once.
fn open_maps(
    object: &[u8],
    maps: &Maps<'_>,
    features: &Features,
    log: ProgramLog,
    verifier: VerifierLogLevel,
) -> Result<Ebpf, LoadError> {
    let (bits, level) = (features.bits(), log as u8);
    let mut loader = EbpfLoader::new();
    loader.verifier_log_level(verifier);
    loader.override_global(FEATURES, &bits, false).override_global(aya_log::LEVEL, &level, false);
    let (cpus, mut places) = (cpus(), 1);
    match maps {
        Maps::Pinned(tables, fates) => {
            for (name, size) in &fates.made {
                // Socket storage has no size.
                if *size != 0 {
                    loader.map_max_entries(name, *size);
                }
            }
            places = (fates.size(maps::RING).unwrap_or(0) / (Ring::COUNT * cpus)).max(1);
            for name in maps::ALL {
                loader.map_pin_path(name, tables.map(name));
            }
        }
        Maps::Trial => {
            for (name, _) in Capacities::DEFAULT.each() {
                loader.map_max_entries(name, TRIAL_ENTRIES);
            }
        }
    }
    loader.override_global(PLACES, &places, false).override_global(CPUS, &cpus, false);
    loader.load(object).map_err(|error| match error {
        EbpfError::BtfError(BtfError::LoadError { io_error, verifier_log }) => {
            let log = verifier_log.to_string();
            LoadError::Refused(Box::new(Refusal::new("(its types)", io_error, &log, || None)))
        }
        error => LoadError::Maps(Box::new(error)),
    })
}

/// Draws the random numbers that keys of flows are made with, unless an agent before this one has: its flows are found by
/// them.
fn draw_secret(ebpf: &mut Ebpf) -> Result<(), LoadError> {
    let missing = || LoadError::Missing { what: "map", name: maps::SECRET.into() };
    let failed = |error: MapError| LoadError::Secret(Box::new(error));
    let map = ebpf.map_mut(maps::SECRET).ok_or_else(missing)?;
    let mut map: Array<_, Secret> = map.try_into().map_err(failed)?;
    if map.get(&0, 0).map_err(failed)? != Secret::NONE {
        return Ok(());
    }
    let mut random = std::fs::File::open(RANDOM).map_err(LoadError::Random)?;
    let mut bytes = [0; size_of::<Secret>()];
    random.read_exact(&mut bytes).map_err(LoadError::Random)?;
    let mut words =
        bytes.chunks_exact(8).map(|word| word.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)));
    let mut secret = Secret::NONE;
    secret.factors.as_flattened_mut().fill_with(|| words.next().unwrap_or_default());
    map.set(0, secret, 0).map_err(failed)
}

/// Loads every program of the embedded object beside tiny maps, and lets go of everything: whether this kernel takes
/// them, without a trace. How many there are.
pub fn trial(features: &Features) -> Result<usize, LoadError> {
    if OBJECT.is_empty() {
        return Err(LoadError::NoObject);
    }
    super::probe::raise_memlock();
    let mut ebpf = open_maps(OBJECT, &Maps::Trial, features, ProgramLog::Off, VerifierLogLevel::STATS)?;
    let mut loaded = 0;
    for (name, program) in ebpf.programs_mut() {
        load_program(program).map_err(|error| refused(OBJECT, features, name, error))?;
        loaded += 1;
    }
    Ok(loaded)
}

fn refused(object: &[u8], features: &Features, program: &str, error: ProgramError) -> LoadError {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let whole = || whole_log(object, features, program);
            LoadError::Refused(Box::new(Refusal::new(program, io_error, &log, whole)))
        }
        error => LoadError::Kind { program: program.into(), source: Box::new(error) },
    }
}

/// The verifier's log with each step on the way to where it gave up.
fn whole_log(object: &[u8], features: &Features, program: &str) -> Option<String> {
    tracing::info!("the kernel refuses program {program}: asking it for the whole of the verifier's log");
    let mut ebpf =
        open_maps(object, &Maps::Trial, features, ProgramLog::Off, VerifierLogLevel::DEBUG).ok()?;
    match load_program(ebpf.program_mut(program)?) {
        Err(ProgramError::LoadError { verifier_log, .. }) => Some(verifier_log.to_string()),
        _ => None,
    }
}

fn identity(program: &ProgramFacts) -> io::Result<Identity> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_loaded_can_move_between_threads() {
        fn check<T: Send>() {}
        check::<Loaded>();
    }
}

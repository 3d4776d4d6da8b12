//! The object, and what the kernel is asked to make of it: maps, then programs, verified one by one.

use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};

use aya::maps::{Array, MapError};
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use aya_obj::btf::BtfError;
use nix::sys::time::TimeValLike as _;
use nix::time::{ClockId, clock_getres};
use proxy_common::abi::{Secret, maps};
use proxy_common::lb::Ring;

use super::error::{LoadError, RANDOM};
use super::generation::Fates;
use super::refusal::Refusal;
use crate::datapath::attach::driver::is_known;
use crate::datapath::attach::loaded::LoadedProgram;
use crate::datapath::attach::program_log::ProgramLog;
use crate::datapath::flow;
use crate::datapath::probe::{self, Features};
use crate::datapath::store::pin::{self, BpfRoot};
use crate::datapath::tables::cpus::cpus;
use crate::sys;
use agent_core::capacity::Capacities;

/// The embedded BPF object; empty when the crate was built without one.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/proxy-ebpf"));

/// Global of the object: bits of `abi::feature`.
const FEATURES: &str = "FEATURES";
/// Globals of the object: places in one ring of young flows, and how many CPUs have rings.
const PLACES: &str = "PLACES";
const DIRECT_PLACES: &str = "DIRECT_PLACES";
/// See above.
const CPUS: &str = "CPUS";
/// How long a window is, in ticks, as a power of two.
const WINDOW_SHIFT: &str = "WINDOW_SHIFT";
/// How long it is about, in nanoseconds: not longer.
const WINDOW: u64 = 1 << 26;
/// Map that a data path with logging writes to.
pub(super) const LOG_MAP: &str = "AYA_LOGS";
/// Entries of each map of a trial: the verifier does not look at sizes.
const TRIAL_ENTRIES: u32 = 64;

/// How often a program is loaded whose verification a signal has ended.
const INTERRUPTED: usize = 20;

pub(super) fn load_program(program: &mut Program) -> Result<(), ProgramError> {
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
pub(super) fn pin_flows(root: &BpfRoot, programs: &BTreeMap<String, LoadedProgram>) -> Result<(), LoadError> {
    let missing = || LoadError::Missing { what: "program", name: flow::PROGRAM.into() };
    let program = programs.get(flow::PROGRAM).ok_or_else(missing)?;
    let (path, making) = (root.program(flow::PROGRAM), root.program_in_making(flow::PROGRAM));
    let failed = |source| LoadError::OpenPin { path: path.clone(), source };
    pin::remove(&making, false)?;
    sys::obj_pin(program.fd.as_fd(), &making).map_err(failed)?;
    std::fs::rename(&making, &path).map_err(failed)
}

pub(super) fn program_fd(program: &Program) -> io::Result<OwnedFd> {
    program.fd().map_err(io::Error::other)?.as_fd().try_clone_to_owned()
}

/// Where the maps of an object are made.
pub(super) enum Maps<'a> {
    /// In a generation, where some are already.
    Pinned(&'a BpfRoot, &'a Fates),
    /// Nowhere, and tiny.
    Trial,
}

/// Reads the object and makes its maps; no program is loaded yet.
///
/// A refused load is tried again by aya with a buffer for the verifier's log, ten times larger each time until the log
/// fits: minutes, when each step is in it. At the level of statistics it holds only what went wrong, and fits at once.
pub(super) fn open_maps(
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
    let (cpus, mut places, mut direct) = (cpus(), 1, 1);
    match maps {
        Maps::Pinned(tables, fates) => {
            for (name, size) in &fates.made {
                // Socket storage has no size.
                if *size != 0 {
                    loader.map_max_entries(name, *size);
                }
            }
            places = (fates.size(maps::RING).unwrap_or(0) / (Ring::COUNT * cpus)).max(1);
            direct = direct_places(places, fates.size(maps::RECORDS).unwrap_or(0), cpus);
            for name in maps::ALL {
                loader.map_pin_path(name, tables.map(name));
            }
        }
        Maps::Trial => {
            for (name, _) in Capacities::DEFAULT.each(cpus) {
                loader.map_max_entries(name, TRIAL_ENTRIES);
            }
        }
    }
    loader.override_global(PLACES, &places, false).override_global(CPUS, &cpus, false);
    loader.override_global(DIRECT_PLACES, &direct, false);
    let shift = window_shift();
    loader.override_global(WINDOW_SHIFT, &shift, false);
    loader.load(object).map_err(|error| match error {
        EbpfError::BtfError(BtfError::LoadError { io_error, verifier_log }) => {
            let log = verifier_log.to_string();
            LoadError::Refused(Box::new(Refusal::new("(its types)", io_error, &log, || None)))
        }
        error => LoadError::Maps(Box::new(error)),
    })
}

/// Places in the ring of one CPU for flows of which one side alone is seen (direct server return): all CPUs together have a
/// quarter of the records, so that whoever sends half of connections leaves room for others.
pub(super) fn direct_places(places: u32, records: u32, cpus: u32) -> u32 {
    places.min(records / (4 * cpus)).max(1)
}

/// How many of the kernel's ticks make a window. The coarse clock goes on by one tick.
fn window_shift() -> u32 {
    const USUAL: u64 = 4_000_000;
    let tick =
        clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).map_or(USUAL, |tick| tick.num_nanoseconds() as u64);
    (WINDOW / tick.max(1)).checked_ilog2().unwrap_or(0)
}

/// Draws the random numbers that keys of flows are made with, unless an agent before this one has: its flows are found by
/// them.
pub(super) fn draw_secret(ebpf: &mut Ebpf) -> Result<(), LoadError> {
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
    probe::raise_memlock();
    let mut ebpf = open_maps(OBJECT, &Maps::Trial, features, ProgramLog::Off, VerifierLogLevel::STATS)?;
    let mut loaded = 0;
    for (name, program) in ebpf.programs_mut().filter(|(name, _)| is_known(name, features)) {
        load_program(program).map_err(|error| refused(OBJECT, features, name, error))?;
        loaded += 1;
    }
    Ok(loaded)
}

pub(super) fn refused(object: &[u8], features: &Features, program: &str, error: ProgramError) -> LoadError {
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

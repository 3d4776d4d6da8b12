//! Why programs could not be loaded.

use std::io;
use std::path::PathBuf;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use aya_obj::ParseError;
use proxy_common::abi::maps;

use super::refusal::Refusal;
use crate::datapath::attach::AttachError;
use crate::datapath::store::pin::PinError;
use crate::datapath::store::table::TableError;

/// Where random numbers come from.
pub(super) const RANDOM: &str = "/dev/urandom";

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
        name: String,
    },
    /// A pinned map cannot be looked at.
    #[error("cannot open the pinned map {path}")]
    OpenPin { path: PathBuf, source: io::Error },
    /// What the tables say of their layout cannot be read.
    #[error(
        "cannot read {path}, which says what the pinned tables hold: run `proxy-agent cleanup` (open connections through \
         Services break), then start again"
    )]
    Layout { path: PathBuf, source: io::Error },
    /// What is said of the layout could not be written.
    #[error("cannot write {path}, by which the next agent knows what the tables hold")]
    Describe { path: PathBuf, source: io::Error },
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
    Kind { program: String, source: Box<ProgramError> },
    /// A loaded program cannot be looked at.
    #[error("cannot look at the loaded program {program}")]
    Facts { program: String, source: io::Error },
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

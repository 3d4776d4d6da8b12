//! Why programs could not be attached.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::filter::FilterError;
use crate::datapath::load::LoadError;
use crate::datapath::store::pin::PinError;
use crate::datapath::store::table::TableError;

/// Why a program is not where it should be.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The object has no such program.
    #[error("the BPF object has no program {program}: build it again with `cargo xtask build-ebpf`")]
    Missing { program: String },
    /// A program that is loaded when it is first needed could not be.
    #[error("cannot load program {program}")]
    Load { program: String, source: Box<LoadError> },
    /// The cgroup root cannot be opened.
    #[error("cannot open the cgroup root {path}: name a cgroup v2 directory with --cgroup-root")]
    CgroupRoot { path: PathBuf, source: io::Error },
    /// The kernel refused.
    #[error("cannot attach program {program} to {place}")]
    Attach { program: &'static str, place: String, source: io::Error },
    /// The interface cannot send what drivers give it.
    #[error(
        "interface {name} cannot send from its driver: its other end needs GRO or a program of its own there"
    )]
    SendsNothing { name: Arc<str> },
    /// What programs at drivers know of an interface could not be written.
    #[error("cannot write what programs at drivers know of interface {name}")]
    Device { name: Arc<str>, source: TableError },
    /// The swap of a program failed.
    #[error("cannot replace program {program} at {place}; the older one goes on")]
    Replace { program: &'static str, place: String, source: io::Error },
    /// The swap of a program for one that works with other tables failed.
    #[error("cannot exchange program {program} at {place} for one that works with the new tables")]
    Exchange { program: String, place: String, source: io::Error },
    /// The link could not be pinned.
    #[error("cannot pin the link {path}")]
    Pin { path: PathBuf, source: io::Error },
    /// The interface has another name now, or is gone.
    #[error("interface {name} (index {index}) is gone or has another name now")]
    Renamed {
        /// Name it had.
        name: Arc<str>,
        index: u32,
    },
    /// A clsact filter could not be set.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A pin could not be read or removed.
    #[error(transparent)]
    Pins(#[from] PinError),
}

impl AttachError {
    /// Whether what it was to be attached to has just been removed: netlink will say so.
    #[must_use]
    pub fn is_of_something_gone(&self) -> bool {
        match self {
            Self::Renamed { .. } => true,
            Self::Attach { source, .. } => source.raw_os_error() == Some(libc::ENODEV),
            Self::Filter(error) => error.is_of_something_gone(),
            Self::Missing { .. }
            | Self::Load { .. }
            | Self::SendsNothing { .. }
            | Self::Device { .. }
            | Self::CgroupRoot { .. }
            | Self::Replace { .. }
            | Self::Exchange { .. }
            | Self::Pin { .. }
            | Self::Pins(_) => false,
        }
    }
}

//! What the programs themselves log, on its way to the agent's own log.

use std::os::fd::{AsFd, BorrowedFd};

use aya_log::EbpfLogger;

/// How much the programs log; anything but `Off` costs time for each packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProgramLog {
    Off = 0,
    /// What went wrong.
    Error = 1,
    /// What is odd.
    Warn = 2,
    /// New flows and refusals.
    Info = 3,
    /// Every decision.
    Debug = 4,
    /// Every packet.
    Trace = 5,
}

/// Reads what the programs log and passes it on to `tracing`.
pub struct ProgramLogger<'a> {
    pub(crate) logger: &'a mut EbpfLogger<Bridge>,
}

impl std::fmt::Debug for ProgramLogger<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProgramLogger").finish_non_exhaustive()
    }
}

impl ProgramLogger<'_> {
    /// Passes on what has been logged since the last time.
    pub fn drain(&mut self) {
        self.logger.flush();
    }
}

impl AsFd for ProgramLogger<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.logger.as_fd()
    }
}

/// Log records of the programs, as events of `tracing`.
#[derive(Debug)]
pub(crate) struct Bridge;

impl log::Log for Bridge {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let said = record.args();
        match record.level() {
            log::Level::Error => tracing::error!(target: "bpf", "{said}"),
            log::Level::Warn => tracing::warn!(target: "bpf", "{said}"),
            log::Level::Info => tracing::info!(target: "bpf", "{said}"),
            log::Level::Debug => tracing::debug!(target: "bpf", "{said}"),
            log::Level::Trace => tracing::trace!(target: "bpf", "{said}"),
        }
    }

    fn flush(&self) {}
}

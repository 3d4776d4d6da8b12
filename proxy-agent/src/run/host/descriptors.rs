//! File descriptors: as many as the process may have, and most of them for the agent's own work.
//!
//! The agent itself has some hundred and fifty open: tables, programs, the API server, netlink; links of interfaces are
//! pinned, and open only while they are looked at. What clients may take is bounded in [`crate::serve::Limits`], which
//! follows from the limit set here.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// With fewer there is little room for health checks of Services, and for clients.
const FEW: u64 = 1024;

/// Raises the soft limit to the hard one; what to say where that leaves few.
pub(in crate::run) fn raise() -> Option<String> {
    let (soft, hard) = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok(limits) => limits,
        Err(error) => return Some(format!("cannot ask how many file descriptors are allowed: {error}")),
    };
    if soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        return Some(format!(
            "only {soft} file descriptors: their number cannot be raised to {hard}: {error}"
        ));
    }
    (hard < FEW).then(|| {
        format!(
            "only {hard} file descriptors are allowed: with {FEW} and more there is room for many health checks of Services \
             (LimitNOFILE=, ulimit -Hn)"
        )
    })
}

//! The binary: binds the command line to the rooms.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use proxy_agent::cli::{self, Opened, Rooms};
use proxy_agent::config::Config;

/// The seam between the command line and the rest: the rooms that this binary has.
fn rooms() -> Rooms {
    Rooms { run, open, detach, object: &[] }
}

fn run(_: Config) -> Result<()> {
    bail!("this binary has no run loop")
}

fn open(_: &Path) -> Opened {
    bail!("this binary cannot open pinned tables")
}

fn detach(_: &Path) -> Result<Vec<String>> {
    bail!("this binary cannot detach programs")
}

fn main() -> ExitCode {
    cli::main(&rooms())
}

//! How probes went, for the program that watches the console: JSON lines with a mark, each on a line of its own.

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

/// What a line of ours begins with; anything else on the console is the kernel's.
const MARK: &str = "@probe ";

/// One line. `cargo xtask` reads it: a change here is a change there (`xtask/src/matrix/machine.rs`).
#[derive(Serialize)]
#[serde(tag = "line", rename_all = "snake_case")]
enum Line<'a> {
    /// The first: which kernel this is.
    Kernel { release: &'a str, version: &'a str },
    /// A probe: its name, whether it went well, a word for the table, how long it took.
    Probe { name: &'a str, ok: bool, note: &'a str, seconds: f64 },
    /// The last: nothing was cut off.
    End,
}

/// Says how probes went.
pub(crate) struct Reports(());

impl Reports {
    /// Says which kernel this is.
    pub(crate) fn open() -> Result<Self> {
        let fact = |name: &str| {
            let path = format!("/proc/sys/kernel/{name}");
            std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))
        };
        say(&Line::Kernel { release: fact("osrelease")?.trim(), version: fact("version")?.trim() })?;
        Ok(Self(()))
    }

    /// Does a probe and says how it went; whether it went well.
    pub(crate) fn probe(&mut self, name: &str, probe: impl FnOnce() -> Result<String>) -> bool {
        let begun = Instant::now();
        let outcome = probe();
        let ok = outcome.is_ok();
        let note = outcome.unwrap_or_else(|error| format!("{error:#}"));
        let line = Line::Probe { name, ok, note: &note, seconds: begun.elapsed().as_secs_f64() };
        if let Err(error) = say(&line) {
            println!("\nguest: {error:#}");
        }
        ok
    }

    /// Says that this was all.
    pub(crate) fn close(self) -> Result<()> {
        say(&Line::End)
    }
}

/// One write, so that no line of the kernel gets between; it may stand in the middle of one of its lines.
fn say(line: &Line<'_>) -> Result<()> {
    let text = format!("\n{MARK}{}\n", serde_json::to_string(line)?);
    let mut console = std::io::stdout().lock();
    console.write_all(text.as_bytes()).and_then(|()| console.flush()).context("writing to the console")
}

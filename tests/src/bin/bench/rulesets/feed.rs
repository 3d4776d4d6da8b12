//! Rules are handed to the program that loads them, and it is given up when it takes too long.

use std::io::{Read as _, Seek as _, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use proxy_tests::pod::Place;

/// Between two looks whether it has ended.
const LOOK: Duration = Duration::from_micros(200);
/// Waits for a line, so that its own start is not counted, and becomes the program.
const SCRIPT: &str = r#"read -r _; file=$1; shift; exec "$@" < "$file""#;

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fed {
    /// From the start of the program to its end.
    Took(Duration),
    /// It has been ended, and has loaded nothing.
    GivenUp,
}

/// Runs the program in a place with these rules as its input.
pub(super) fn feed(place: &Place, program: &[&str], rules: &str, limit: Duration) -> Result<Fed> {
    let mut file = tempfile::NamedTempFile::new().context("making a file for rules")?;
    file.write_all(rules.as_bytes()).context("writing rules")?;
    let mut errors = tempfile::tempfile().context("making a file for errors")?;
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT, "feed"]).arg(file.path()).args(program);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(errors.try_clone()?);
    let mut child = place.spawn(command)?;
    let mut stdin = child.stdin.take().context("its stdin")?;
    let begun = Instant::now();
    writeln!(stdin).context("telling it to begin")?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begun.elapsed() >= limit {
            child.kill().with_context(|| format!("ending {program:?}"))?;
            child.wait()?;
            return Ok(Fed::GivenUp);
        }
        std::thread::sleep(LOOK);
    };
    let took = begun.elapsed();
    let mut said = String::new();
    errors.rewind()?;
    // The first lines tell what is wrong; rules may be wrong a hundred thousand times.
    errors.take(2000).read_to_string(&mut said).ok();
    ensure!(status.success(), "{program:?} in {}: {status}: {}", place.name, said.trim());
    Ok(Fed::Took(took))
}

//! Runs other programs: says what it runs, and fails with the command line in the message.
//!
//! No command ever waits for input: stdin is closed, so CI and terminals behave alike.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// A command line as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| quoted(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{word}'") }
}

/// Says the command, runs it with our stdout and stderr, and fails unless it succeeds.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    println!("$ {}", shown(command));
    quiet(command)
}

/// Like [`run`], without saying it first.
pub(crate) fn quiet(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("could not start: {}", shown(command)))?;
    if !status.success() {
        bail!("failed ({status}): {}", shown(command));
    }
    Ok(())
}

/// Runs a command silently and returns what it printed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let out = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("could not start: {}", shown(command)))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        bail!("failed ({}): {}\n{}", out.status, shown(command), said.trim_end());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The cargo that runs us, so that `cargo +toolchain xtask …` stays with its toolchain.
pub(crate) fn cargo() -> Command {
    Command::new(cargo_path())
}

/// See [`cargo`].
pub(crate) fn cargo_path() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

/// The first executable of this name in `first` or on PATH.
pub(crate) fn find(name: &str, first: &[PathBuf]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Administrators' tools are often missing from the PATH of other users.
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let dirs = first.iter().cloned().chain(std::env::split_paths(&path)).chain(more);
    dirs.map(|dir| dir.join(name)).find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Fails with one line that says what to type when we are not root.
pub(crate) fn require_root(purpose: &str, again: &str) -> Result<()> {
    if !is_root() {
        bail!("{purpose} needs root; run: sudo -E env \"PATH=$PATH\" {again}");
    }
    Ok(())
}

/// Whether we are root.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A command with arguments, in one expression.
pub(crate) fn with<S: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = S>,
) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_command_is_named_in_the_error() {
        let error = quiet(&mut with("sh", ["-c", "exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c 'exit 3'"), "{error}");
        assert!(error.contains('3'), "{error}");
    }

    #[test]
    fn what_a_failing_command_said_is_in_the_error() {
        let error = output(&mut with("sh", ["-c", "echo no such luck >&2; exit 1"])).unwrap_err().to_string();
        assert!(error.ends_with("no such luck"), "{error}");
    }

    #[test]
    fn commands_never_wait_for_input() {
        assert_eq!(output(&mut with("cat", [""; 0])).unwrap(), "");
    }

    #[test]
    fn a_file_that_is_not_executable_is_not_a_program() {
        assert!(find("passwd", &["/etc".into()]).is_none_or(|file| !file.starts_with("/etc")));
        assert!(find("sh", &[]).is_some());
    }
}

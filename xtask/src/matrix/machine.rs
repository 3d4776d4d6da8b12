//! A virtual machine: boots a kernel with an initramfs, and reads on its console how the probes go.

use std::{
    collections::VecDeque,
    fs,
    io::{BufRead as _, BufReader, Read, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{Scope, packages::Kernel};
use crate::cmd;

const QEMU: &str = "qemu-system-x86_64";
/// A processor of 2013, without what software does not emulate: else qemu says so each time.
const CPU: &str = "Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-rtm,-invpcid";
/// What a line of the probes begins with.
const MARK: &str = "@probe ";
/// How much longer than on a real machine things may take inside.
const PATIENCE: u32 = 8;
/// How long a kernel may say nothing before its first program has begun. On an idle machine it takes some ten seconds
/// altogether.
const SILENCE: Duration = Duration::from_secs(90);
/// How often a machine is started that stops while it boots.
const STARTS: u32 = 3;
/// Lines of the console that are shown of a machine that broke off.
const LAST_LINES: usize = 12;

/// How it went on one kernel.
#[derive(Debug)]
pub(super) struct Outcome {
    /// The package's version.
    pub(super) version: String,
    /// The probes that were done, in order.
    pub(super) probes: Vec<Probe>,
    /// Why there are not more of them.
    pub(super) broke_off: Option<String>,
    /// How long it took, with booting.
    pub(super) took: Duration,
}

/// How a probe went.
#[derive(Debug, PartialEq, Deserialize)]
pub(super) struct Probe {
    /// Its name.
    pub(super) name: String,
    /// Whether it went well.
    pub(super) ok: bool,
    /// A word for the table, or what went wrong.
    pub(super) note: String,
    /// How long it took.
    pub(super) seconds: f64,
}

/// A line of the probes: what `tests/src/bin/guest/report.rs` prints.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
enum Line {
    Kernel { release: String, version: String },
    Probe(Probe),
    End,
}

/// How long a machine may run.
fn limit(scope: Scope) -> Duration {
    match scope {
        // A hundred by itself; beside the levels on this kernel it gets a part of the processors.
        Scope::Bounded => Duration::from_secs(480),
        Scope::Whole => Duration::from_secs(900),
    }
}

/// Boots the kernel, shows how the probes go, and waits until the machine has been switched off, for a bounded time.
///
/// Now and then an emulated machine with more than one processor stops for ever while it boots (seen once in some
/// hundred boots, with nothing said at all): that says nothing about the programs, so it is started again, and said.
pub(super) fn boot(kernel: &Kernel, initramfs: &Path, scope: Scope) -> Result<Outcome> {
    let begun = Instant::now();
    for start in 1..STARTS {
        match run(kernel, initramfs, scope, begun)? {
            Ended::Stuck(why) => println!("start {start} of {STARTS}: {why}"),
            Ended::Booted(outcome) => return Ok(outcome),
        }
    }
    Ok(match run(kernel, initramfs, scope, begun)? {
        Ended::Booted(outcome) => outcome,
        Ended::Stuck(why) => Outcome {
            version: kernel.version.clone(),
            probes: Vec::new(),
            broke_off: Some(format!("{STARTS} starts: {why}")),
            took: begun.elapsed(),
        },
    })
}

/// How a machine has ended.
enum Ended {
    /// Its first program was heard, or it has ended by itself.
    Booted(Outcome),
    /// It was stopped, since it had gone silent before its first program began.
    Stuck(String),
}

/// Starts a machine once; `begun` is when the first one of this kernel was started.
fn run(kernel: &Kernel, initramfs: &Path, scope: Scope, begun: Instant) -> Result<Ended> {
    let qemu = cmd::find(QEMU, &[]).with_context(|| format!("no {QEMU} here; run: cargo xtask setup"))?;
    let mut command = Command::new(qemu);
    command
        // Software alone: machines that build and test are often virtual themselves.
        .args(["-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", "2", "-m", "2G"])
        .args(["-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot", "-nic", "none"])
        .arg("-kernel")
        .arg(kernel.image()?)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &kernel_command_line(scope)])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    let mut machine =
        Machine(command.spawn().with_context(|| format!("could not start: {}", cmd::shown(&command)))?);
    let console = console_file(kernel)?;
    let lines = read_console(machine.0.stdout.take().context("qemu has no standard output")?, &console)?;
    let mut watch = Watch::new(&kernel.release);
    let until = Instant::now() + limit(scope);
    let broke_off = loop {
        let next = watch.next_line_until(Instant::now(), until);
        match lines.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok(line) => watch.hear(&line),
            Err(RecvTimeoutError::Disconnected) => break watch.incomplete(),
            Err(RecvTimeoutError::Timeout) if watch.booted.is_none() => {
                let silence = SILENCE.as_secs();
                let (console, end) = (console.display(), watch.end());
                return Ok(Ended::Stuck(format!(
                    "silent for {silence} s while it booted: stopped; the end of {console}:\n{end}"
                )));
            }
            Err(RecvTimeoutError::Timeout) => {
                break Some(format!("not done after {} s: stopped", limit(scope).as_secs()));
            }
        }
    };
    machine.end();
    let broke_off = broke_off.map(|why| format!("{why}; the end of {}:\n{}", console.display(), watch.end()));
    let version = kernel.version.clone();
    Ok(Ended::Booted(Outcome { version, probes: watch.probes, broke_off, took: begun.elapsed() }))
}

fn kernel_command_line(scope: Scope) -> String {
    let probes = match scope {
        Scope::Bounded => "",
        Scope::Whole => " -- --whole",
    };
    // What the kernel does not know becomes the environment of the first program, and its arguments.
    format!(
        "console=ttyS0 panic=-1 rdinit=/bin/guest PATH=/bin \
         PROXY_TESTS_PATIENCE={PATIENCE}{probes}"
    )
}

fn console_file(kernel: &Kernel) -> Result<PathBuf> {
    let folder = super::directory().join("consoles");
    fs::create_dir_all(&folder).with_context(|| format!("could not create {}", folder.display()))?;
    Ok(folder.join(format!("{}.log", kernel.release)))
}

/// A running qemu that does not outlive us.
struct Machine(Child);

impl Machine {
    fn end(&mut self) {
        // Errors: it has ended by itself.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// The lines of the console, which also go to a file.
fn read_console(from: impl Read + Send + 'static, to: &Path) -> Result<Receiver<String>> {
    let mut file = fs::File::create(to).with_context(|| format!("could not create {}", to.display()))?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut console = BufReader::new(from);
        let mut line = Vec::new();
        while console.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            // A full disk loses the file, not the probes.
            writeln!(file, "{text}").ok();
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    Ok(receiver)
}

/// What was heard so far.
struct Watch<'a> {
    release: &'a str,
    booted: Option<String>,
    probes: Vec<Probe>,
    ended: bool,
    last: VecDeque<String>,
}

impl<'a> Watch<'a> {
    fn new(release: &'a str) -> Self {
        Self { release, booted: None, probes: Vec::new(), ended: false, last: VecDeque::default() }
    }

    /// Until when the next line is waited for, at the latest `until`.
    fn next_line_until(&self, now: Instant, until: Instant) -> Instant {
        if self.booted.is_some() { until } else { until.min(now + SILENCE) }
    }

    fn hear(&mut self, line: &str) {
        match read(line) {
            Some(Line::Kernel { release, version }) => {
                println!("booted {release}: {version}");
                self.booted = Some(release);
            }
            Some(Line::Probe(probe)) => {
                let verdict = if probe.ok { "ok" } else { "FAILED" };
                println!("{verdict:<7} {:>6.1} s  {}: {}", probe.seconds, probe.name, probe.note);
                self.probes.push(probe);
            }
            Some(Line::End) => self.ended = true,
            None if line.trim().is_empty() => {}
            None => {
                self.last.push_back(line.to_owned());
                if self.last.len() > LAST_LINES {
                    self.last.pop_front();
                }
            }
        }
    }

    /// What is missing although the machine has ended.
    fn incomplete(&self) -> Option<String> {
        match &self.booted {
            None => Some("the first program did not start".to_owned()),
            Some(booted) if booted != self.release => Some(format!("another kernel was booted: {booted}")),
            Some(_) if !self.ended => Some("the machine ended before the probes did".to_owned()),
            Some(_) => None,
        }
    }

    fn end(&self) -> String {
        self.last.iter().map(|line| format!("    {line}\n")).collect()
    }
}

/// A line of the probes; nothing when the kernel said it.
fn read(line: &str) -> Option<Line> {
    serde_json::from_str(line.split_once(MARK)?.1).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probes_are_heard_between_what_the_kernel_says() {
        let mut watch = Watch::new("6.1.0");
        assert_eq!(watch.incomplete().unwrap(), "the first program did not start");
        watch.hear(
            r#"@probe {"line":"kernel","release":"6.1.0","version":"\#1 SMP"}"#.replace("\\#", "#").as_str(),
        );
        watch.hear("[    0.1] x86/cpu: something");
        watch.hear(r#"[    0.2] @probe {"line":"probe","name":"load","ok":true,"note":"2 s","seconds":2.5}"#);
        assert_eq!(watch.incomplete().unwrap(), "the machine ended before the probes did");
        watch.hear(r#"@probe {"line":"end"}"#);
        assert_eq!(watch.incomplete(), None);
        assert_eq!(watch.probes.len(), 1);
        assert_eq!(watch.end(), "    [    0.1] x86/cpu: something\n");
    }

    #[test]
    fn a_silent_machine_is_given_up_early_only_while_it_boots() {
        let (now, mut watch) = (Instant::now(), Watch::new("6.1.0"));
        let until = now + SILENCE * 5;
        assert_eq!(watch.next_line_until(now, until), now + SILENCE);
        watch.hear("[    0.1] Linux version 6.1.0");
        assert_eq!(watch.next_line_until(now + SILENCE, until), now + SILENCE * 2);
        assert_eq!(watch.next_line_until(until, until), until);
        watch.hear(r#"@probe {"line":"kernel","release":"6.1.0","version":""}"#);
        assert_eq!(watch.next_line_until(now, until), until);
    }

    #[test]
    fn another_kernel_than_the_wanted_one_is_no_result() {
        let mut watch = Watch::new("6.1.0");
        watch.hear(r#"@probe {"line":"kernel","release":"6.2.0","version":""}"#);
        watch.hear(r#"@probe {"line":"end"}"#);
        assert_eq!(watch.incomplete().unwrap(), "another kernel was booted: 6.2.0");
    }
}

//! The test levels, from pure functions to a whole node; prints how long each took.
//!
//! What is fast comes first. Levels that have machines of their own run beside those on this kernel, which mostly wait.
//! A level that cannot run here fails and says what it needs: nothing is skipped in silence.

mod level;
mod programs;
mod require;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use cargo_metadata::TargetKind;

use self::level::{ALL, Ground, Level, Options};
use self::programs::Program;
use crate::{build_ebpf, cmd, compile, workspace, workspace::Metadata};

/// Which tests to run.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The levels to run; by default all of them, `matrix` only in its bounded form `kernels`.
    #[arg(value_enum)]
    levels: Vec<Level>,
    /// Run only the tests whose name contains this; for `kernels` and `matrix`, one series: `6.16`, `newest`.
    #[arg(long)]
    only: Option<String>,
    /// Begin no further level when one has failed.
    #[arg(long)]
    fail_fast: bool,
    /// How many tests of a level run at a time, where they need this kernel.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

/// How a level went.
struct Outcome {
    level: Level,
    took: Duration,
    passed: bool,
}

/// `cargo xtask test`
pub(crate) fn run(args: &Args) -> Result<()> {
    let levels = if args.levels.is_empty() { &ALL[..] } else { &args.levels };
    let on =
        |ground| levels.iter().copied().filter(move |level| level.ground() == ground).collect::<Vec<_>>();
    let (process, kernel, apart) = (on(Ground::Process), on(Ground::Kernel), on(Ground::Apart));
    let run = Run { args, begun: Instant::now(), failed: AtomicBool::new(false) };
    if !kernel.is_empty() {
        require::kernel()?;
        println!("\n=== build: kernel programs");
        // The agent holds them: it is compiled once if they are there first.
        build_ebpf::run()?;
    }
    let mut outcomes = Vec::new();
    if !process.is_empty() {
        let programs = run.compile(&process)?;
        outcomes.extend(run.levels(&process, &programs));
    }
    if run.goes_on() && !kernel.is_empty() {
        println!("\n=== build: agents, test programs");
        compile::programs()?;
        build_ebpf::next()?;
        let programs = run.compile(&kernel)?;
        std::thread::scope(|scope| {
            let beside = scope.spawn(|| run.beside(&apart));
            outcomes.extend(run.levels(&kernel, &programs));
            outcomes.extend(beside.join().unwrap_or_default());
        });
    } else if run.goes_on() {
        outcomes.extend(run.levels(&apart, &[]));
    }
    summarise(levels, &outcomes)
}

struct Run<'a> {
    args: &'a Args,
    begun: Instant,
    failed: AtomicBool,
}

impl Run<'_> {
    fn options(&self) -> Options<'_> {
        let Args { levels: _, only, fail_fast, threads } = self.args;
        Options { only: only.as_deref(), threads: *threads, fail_fast: *fail_fast }
    }

    /// Whether another level may begin.
    fn goes_on(&self) -> bool {
        !(self.args.fail_fast && self.failed.load(Ordering::Relaxed))
    }

    /// The test programs of these levels.
    fn compile(&self, levels: &[Level]) -> Result<Vec<Program>> {
        let mut flags = BTreeSet::new();
        for (package, kind, name) in Metadata::read()?.test_targets() {
            if levels.iter().any(|level| level.holds(&package, &kind, &name)) {
                flags.insert(match kind {
                    TargetKind::Lib => "--lib".to_owned(),
                    TargetKind::Bin => "--bins".to_owned(),
                    _ => format!("--test={name}"),
                });
            }
        }
        programs::compile(&workspace::root(), &flags.into_iter().collect::<Vec<_>>())
    }

    /// Runs levels one after the other.
    fn levels(&self, levels: &[Level], programs: &[Program]) -> Vec<Outcome> {
        self.each(levels, |level| {
            println!("\n=== {level}");
            let result = level.run(programs, &self.options());
            if let Err(error) = &result {
                println!("{error:#}");
            }
            result.is_ok()
        })
    }

    /// Runs levels one after the other while others run, each as a process whose output goes to a file and is shown when it
    /// has ended.
    fn beside(&self, levels: &[Level]) -> Vec<Outcome> {
        self.each(levels, |level| {
            let log = log_file(level);
            println!("\n=== {level}, beside the others: {}", log.display());
            let passed = self.apart(level, &log);
            let text = fs::read_to_string(&log).unwrap_or_default();
            println!("\n=== {level}: what it said\n{text}=== end of {level}");
            if let Err(error) = &passed {
                println!("{error:#}");
            }
            passed.is_ok()
        })
    }

    fn apart(&self, level: Level, log: &Path) -> Result<()> {
        let failed = || format!("could not write {}", log.display());
        fs::create_dir_all(log.parent().unwrap_or(Path::new("/"))).with_context(failed)?;
        let file = fs::File::create(log).with_context(failed)?;
        // This very program, even if it has been compiled anew meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.args(["test", &level.to_string()]);
        command.args(self.args.only.iter().flat_map(|only| ["--only", only]));
        command.stdout(file.try_clone().with_context(failed)?).stderr(file).stdin(Stdio::null());
        cmd::quiet(&mut command)
    }

    fn each(&self, levels: &[Level], run: impl Fn(Level) -> bool) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for level in levels.iter().copied().take_while(|_| self.goes_on()) {
            let start = Instant::now();
            let passed = run(level);
            if !passed {
                self.failed.store(true, Ordering::Relaxed);
            }
            let took = start.elapsed();
            let verdict = if passed { "ok" } else { "FAILED" };
            let whole = self.begun.elapsed().as_secs_f64();
            println!("=== {level}: {verdict} after {:.1} s, {whole:.1} s in all", took.as_secs_f64());
            outcomes.push(Outcome { level, took, passed });
        }
        outcomes
    }
}

fn log_file(level: Level) -> PathBuf {
    workspace::root().join("target/test").join(format!("{level}.log"))
}

fn summarise(levels: &[Level], outcomes: &[Outcome]) -> Result<()> {
    println!("\n=== levels");
    let mut failed = Vec::new();
    for level in levels {
        let outcome = outcomes.iter().find(|outcome| outcome.level == *level);
        let verdict = match outcome {
            Some(Outcome { passed: true, .. }) => "ok",
            Some(_) => "FAILED",
            None => "not run",
        };
        let took = outcome.map_or(Duration::ZERO, |outcome| outcome.took);
        println!("{:<11} {verdict:<8} {:>7.1} s", level.to_string(), took.as_secs_f64());
        if verdict != "ok" {
            failed.push(level.to_string());
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failed_level_fails_the_run_by_name_and_so_does_one_that_was_not_begun() {
        let took = Duration::from_secs(1);
        let unit = || Outcome { level: Level::Unit, took, passed: true };
        assert!(summarise(&[Level::Unit], &[unit()]).is_ok());
        let e2e = Outcome { level: Level::E2e, took, passed: false };
        let error = summarise(&[Level::Unit, Level::E2e, Level::Image], &[unit(), e2e]).unwrap_err();
        assert_eq!(error.to_string(), "failed: e2e, image");
    }
}

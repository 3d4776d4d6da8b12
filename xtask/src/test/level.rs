//! The levels, from pure functions to whole nodes: what belongs to each, and how it is run.

use std::{fmt, path::Path, process::Command};

use anyhow::{Result, bail};
use cargo_metadata::TargetKind;
use clap::ValueEnum;

use super::programs::Program;
use crate::{cmd, compile, image, matrix, workspace};

/// A level of tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Level {
    /// Everything that runs without root or a kernel object (includes `golden`).
    Unit,
    /// Only the scenarios: manifests in, tables out.
    Golden,
    /// Random clusters against an independent reading of the rules; no root.
    Rules,
    /// The test harness itself: namespaces, pods, API server.
    Fixtures,
    /// Packets through the kernel programs, compared with the same code on the host; and the questions of `rules`
    /// to the kernel programs, sockets included.
    Packet,
    /// Loading, attaching and pinning on this kernel.
    Kernel,
    /// The agent on nodes made of network namespaces, with real traffic.
    E2e,
    /// The agent beside rules, routes, devices and machines that are not its own: flannel's masquerade, second
    /// interfaces, traffic shaping, bridges.
    Neighbours,
    /// What Kubernetes' own end-to-end tests demand, on three nodes.
    Conformance,
    /// The container image: the static release binary packed, unpacked and run.
    Image,
    /// The static release binary on Debian's kernels 5.10, 6.1 and the newest, in virtual machines.
    Kernels,
    /// The same with more kernels and all probes; prints the table of README.
    Matrix,
}

/// Where a level is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ground {
    /// In the test programs alone: fast, and first.
    Process,
    /// On this kernel, as root.
    Kernel,
    /// In machines or containers of its own: beside the others.
    Apart,
}

/// What runs when no level is named; `golden` is part of `unit`, `kernels` of `matrix`.
pub(super) const ALL: [Level; 10] = [
    Level::Unit,
    Level::Rules,
    Level::Fixtures,
    Level::Packet,
    Level::Kernel,
    Level::E2e,
    Level::Neighbours,
    Level::Conformance,
    Level::Image,
    Level::Kernels,
];

impl Level {
    pub(super) fn ground(self) -> Ground {
        match self {
            Self::Unit | Self::Golden | Self::Rules => Ground::Process,
            Self::Fixtures
            | Self::Packet
            | Self::Kernel
            | Self::E2e
            | Self::Neighbours
            | Self::Conformance => Ground::Kernel,
            Self::Image | Self::Kernels | Self::Matrix => Ground::Apart,
        }
    }

    /// Whether a test program belongs to the level: one of this package's folder, kind and name.
    pub(super) fn holds(self, package: &Path, kind: &TargetKind, name: &str) -> bool {
        let (tests, test) = (package == Path::new("tests"), *kind == TargetKind::Test);
        let of_tests = |names: &[&str]| tests && test && names.contains(&name);
        match self {
            Self::Unit => !tests && !Self::Kernel.holds(package, kind, name),
            Self::Golden => test && name == "golden",
            Self::Rules => of_tests(&["rules"]),
            // The harness has unit tests as well.
            Self::Fixtures => of_tests(&["fixtures"]) || tests && !test,
            Self::Packet => of_tests(&["packet", "rules-kernel"]),
            Self::Kernel => test && name == "kernel",
            Self::E2e | Self::Neighbours | Self::Conformance => of_tests(&[&self.to_string()]),
            Self::Image | Self::Kernels | Self::Matrix => false,
        }
    }

    /// Runs the level, by the test programs that belong to it or by itself.
    pub(super) fn run(self, programs: &[Program], options: &Options<'_>) -> Result<()> {
        match self {
            Self::Image => image::write(None, &image::default_output()).map(|tag| println!("{tag} runs")),
            Self::Kernels => matrix::run(matrix::Scope::Bounded, options.only),
            Self::Matrix => matrix::run(matrix::Scope::Whole, options.only),
            _ => self.run_programs(programs, options),
        }
    }

    fn run_programs(self, programs: &[Program], options: &Options<'_>) -> Result<()> {
        let mine =
            programs.iter().filter(|program| self.holds(&program.package, &program.kind, &program.name));
        let mut commands: Vec<Command> = mine.map(|program| program.command(&workspace::root())).collect();
        if commands.is_empty() {
            bail!("the level {self} has no test program");
        }
        for command in &mut commands {
            if self.ground() == Ground::Kernel {
                command.arg(format!("--test-threads={}", options.threads.unwrap_or_else(|| self.threads())));
                if std::env::var_os(PATIENCE.0).is_none() {
                    command.env(PATIENCE.0, PATIENCE.1);
                }
            }
            command.args(options.only);
        }
        if self == Self::Unit {
            let mut docs = compile::whole("test");
            docs.args(["--doc", "--quiet", "--"]).args(options.only);
            commands.push(docs);
        }
        let mut failed = Vec::new();
        for mut command in commands {
            if let Err(error) = cmd::run(&mut command) {
                println!("{error:#}");
                failed.push(command.get_program().to_string_lossy().into_owned());
                if options.fail_fast {
                    break;
                }
            }
        }
        if !failed.is_empty() {
            bail!("failed: {}", failed.join(", "));
        }
        Ok(())
    }

    /// How many tests at a time.
    fn threads(self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        match self {
            // They wait most of the time: for what an agent does every few seconds, and for what must not happen.
            Self::E2e | Self::Neighbours | Self::Conformance => cores * 4,
            Self::Kernel => cores.min(4),
            _ => cores * 2,
        }
    }
}

/// How much longer than on an idle machine the tests of [`Ground::Kernel`] may wait for what must happen. It makes no test
/// that passes slower: many run at a time, and virtual machines beside them.
const PATIENCE: (&str, &str) = ("PROXY_TESTS_PATIENCE", "4");

/// What all levels are told.
pub(super) struct Options<'a> {
    pub(super) only: Option<&'a str>,
    pub(super) threads: Option<usize>,
    pub(super) fail_fast: bool,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("?", |value| value.get_name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::Metadata;

    #[test]
    fn all_levels_run_every_test_once() {
        assert_eq!(ALL.len() + 2, Level::value_variants().len());
        assert!(!ALL.contains(&Level::Golden) && !ALL.contains(&Level::Matrix));
        for (package, kind, name) in Metadata::read().unwrap().test_targets() {
            let levels = ALL.iter().filter(|level| level.holds(&package, &kind, &name)).count();
            assert_eq!(levels, 1, "{} {kind} {name} is in {levels} levels", package.display());
        }
    }

    #[test]
    fn what_is_fast_is_first() {
        let process = ALL.iter().take_while(|level| level.ground() == Ground::Process).count();
        assert!(ALL[process..].iter().all(|level| level.ground() != Ground::Process));
    }
}

//! The test levels, from pure functions to a whole node; prints how long each took.
//!
//! A level that cannot run here fails and says what it needs: nothing is skipped in silence.

use std::{
    fmt, fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::{
    build_ebpf, cmd, image, matrix,
    workspace::{self, Metadata, Targets as _},
};

/// Which tests to run.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The levels to run; by default all of them, `matrix` only in its bounded form `kernels`.
    #[arg(value_enum)]
    levels: Vec<Level>,
    /// Run only the tests whose name contains this; for `kernels` and `matrix`, one series: `6.16`, `newest`.
    #[arg(long)]
    only: Option<String>,
}

/// A level of tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Level {
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

/// What runs when no level is named; `golden` is part of `unit`, `kernels` of `matrix`.
const ALL: [Level; 10] = [
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

/// The feature of `agent-kernel` that its tests on a real kernel stand behind.
const KERNEL_FEATURE: &str = "kernel-tests";

/// `cargo xtask test`
pub(crate) fn run(args: &Args) -> Result<()> {
    let metadata = Metadata::read()?;
    let levels = if args.levels.is_empty() { &ALL[..] } else { &args.levels };
    if levels.iter().any(|level| level.needs_kernel()) {
        require_kernel()?;
        println!("\n=== build: kernel programs, agent, test programs");
        build_ebpf::next()?;
        build_ebpf::run()?;
        let mut build = cmd::cargo();
        build.current_dir(workspace::root()).args([
            "build",
            "--bins",
            "-p",
            "proxy-agent",
            "-p",
            "proxy-tests",
        ]);
        cmd::run(&mut build)?;
    }

    let mut results = Vec::new();
    for level in levels {
        println!("\n=== {level}");
        let start = Instant::now();
        let result = level.run(&metadata, args.only.as_deref());
        if let Err(error) = &result {
            println!("{error:#}");
        }
        results.push((level, start.elapsed(), result.is_ok()));
    }
    summarise(&results)
}

fn summarise(results: &[(&Level, Duration, bool)]) -> Result<()> {
    println!("\n=== levels");
    for (level, took, passed) in results {
        let verdict = if *passed { "ok" } else { "FAILED" };
        println!("{:<11} {verdict:<8} {:>7.1} s", level.to_string(), took.as_secs_f64());
    }
    let failed: Vec<String> =
        results.iter().filter(|(_, _, passed)| !passed).map(|(level, _, _)| level.to_string()).collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

impl Level {
    fn needs_kernel(self) -> bool {
        !matches!(self, Self::Unit | Self::Golden | Self::Rules | Self::Image | Self::Kernels | Self::Matrix)
    }

    fn run(self, metadata: &Metadata, only: Option<&str>) -> Result<()> {
        match self {
            Self::Image => {
                return image::write(None, &image::default_output()).map(|tag| println!("{tag} runs"));
            }
            Self::Kernels => return matrix::run(matrix::Scope::Bounded, only),
            Self::Matrix => return matrix::run(matrix::Scope::Whole, only),
            _ => {}
        }
        let mut command = cmd::cargo();
        command.current_dir(workspace::root()).arg("test").args(self.selection(metadata)?).arg("--");
        if self.needs_kernel() {
            // Each of these tests starts many processes and threads of its own.
            command.arg(format!("--test-threads={}", self.threads()));
        }
        cmd::run(command.args(only))
    }

    /// What cargo is to test.
    fn selection(self, metadata: &Metadata) -> Result<Vec<&'static str>> {
        let (package, target) = match self {
            Self::Unit => return Ok(vec![]),
            Self::Kernel => {
                if !metadata.package("agent-kernel")?.features.contains_key(KERNEL_FEATURE) {
                    bail!("package agent-kernel has no feature `{KERNEL_FEATURE}`");
                }
                let selection = vec!["-p", "agent-kernel", "--features", KERNEL_FEATURE, "--test", "kernel"];
                return Ok(selection);
            }
            Self::Golden => ("proxy-agent", "golden"),
            Self::Rules => ("proxy-tests", "rules"),
            Self::Fixtures => ("proxy-tests", "fixtures"),
            Self::Packet => ("proxy-tests", "packet"),
            Self::E2e => ("proxy-tests", "e2e"),
            Self::Neighbours => ("proxy-tests", "neighbours"),
            Self::Conformance => ("proxy-tests", "conformance"),
            Self::Image | Self::Kernels | Self::Matrix => bail!("the level {self} has no test target"),
        };
        if !metadata.package(package)?.has("test", target) {
            bail!("package {package} has no test target `{target}`");
        }
        let mut selection = vec!["-p", package, "--test", target];
        match self {
            // The harness has unit tests as well.
            Self::Fixtures => selection.push("--lib"),
            Self::Packet => selection.extend(["--test", "rules-kernel"]),
            _ => {}
        }
        Ok(selection)
    }

    fn threads(self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        match self {
            // A node is an agent, its pods and their clients: one a core keeps time-outs honest.
            Self::E2e | Self::Neighbours | Self::Conformance | Self::Kernel => cores.min(4),
            _ => cores * 2,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("?", |value| value.get_name()))
    }
}

/// Fails with everything that is absent here, so that one look is enough.
fn require_kernel() -> Result<()> {
    cmd::require_root("tests with kernel programs (all levels but unit and golden)", "cargo xtask test")?;
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let checks = [
        (
            Path::new("/sys/kernel/btf/vmlinux").is_file(),
            "a kernel that describes its types (CONFIG_DEBUG_INFO_BTF=y, /sys/kernel/btf/vmlinux)",
        ),
        (has_mount(&mounts, "cgroup2"), "cgroup v2 (mount -t cgroup2 none /sys/fs/cgroup/unified)"),
        (runs("ip", &["netns", "list"]), "ip with network namespaces (cargo xtask setup)"),
        (runs("tc", &["-Version"]), "tc (cargo xtask setup)"),
        (runs("nft", &["--version"]), "nft (cargo xtask setup)"),
    ];
    let absent: Vec<&str> = checks.into_iter().filter(|(there, _)| !there).map(|(_, what)| what).collect();
    if !absent.is_empty() {
        bail!("these tests need, and this machine lacks: {}", absent.join("; "));
    }
    Ok(())
}

/// Whether a file system of this type is mounted, after the format of /proc/mounts (proc_mounts(5)).
fn has_mount(mounts: &str, kind: &str) -> bool {
    mounts.lines().any(|line| line.split(' ').nth(2) == Some(kind))
}

fn runs(program: &str, args: &[&str]) -> bool {
    cmd::find(program, &[]).is_some_and(|path| cmd::output(Command::new(path).args(args)).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_its_type_not_by_its_place() {
        let mounts = "none /sys/fs/cgroup2 tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert!(has_mount(mounts, "cgroup2"));
        assert!(!has_mount(mounts, "bpf"));
    }

    #[test]
    fn all_levels_run_every_test_once() {
        assert_eq!(ALL.len() + 2, Level::value_variants().len());
        assert!(!ALL.contains(&Level::Golden) && !ALL.contains(&Level::Matrix));
    }

    #[test]
    fn one_failed_level_fails_the_run_by_name() {
        let took = Duration::from_secs(1);
        assert!(summarise(&[(&Level::Unit, took, true)]).is_ok());
        let error = summarise(&[(&Level::Unit, took, true), (&Level::E2e, took, false)]).unwrap_err();
        assert_eq!(error.to_string(), "failed: e2e");
    }
}

//! What CI demands besides the tests. Runs everything, then says what failed.

use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{cmd, compile, conformance, invariants, pages, setup, toolchain::Toolchain, workspace};

/// What to check.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only these; by default all, the fastest first.
    #[arg(value_enum)]
    checks: Vec<Check>,
}

/// Something that CI demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Check {
    /// rustfmt has nothing to change.
    Format,
    /// What can be seen in the source text.
    Invariants,
    /// What pages name exists.
    Pages,
    /// `tests/conformance.md` is up to date.
    Conformance,
    /// Clippy has nothing to say.
    Lints,
    /// The same for the kernel programs.
    KernelLints,
    /// Fuzz targets compile.
    Fuzz,
    /// Documentation leads nowhere wrong.
    Docs,
    /// Licences, bans, sources, advisories.
    Deny,
}

/// `cargo xtask check`
pub(crate) fn run(args: &Args) -> Result<()> {
    let checks = if args.checks.is_empty() { Check::value_variants() } else { &args.checks };
    let mut failed = Vec::new();
    for check in checks {
        let name = check.to_possible_value().map_or("?".to_owned(), |value| value.get_name().to_owned());
        println!("\n=== {name}");
        let begun = Instant::now();
        let result = check.run();
        println!("=== {name}: {:.1} s", begun.elapsed().as_secs_f64());
        if let Err(error) = result {
            println!("{error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    println!("\nall of these checks passed");
    Ok(())
}

impl Check {
    fn run(self) -> Result<()> {
        match self {
            Self::Format => format(),
            Self::Invariants => invariants::check(),
            Self::Pages => pages::check(),
            Self::Conformance => conformance::check(),
            Self::Lints => lints(),
            Self::KernelLints => kernel_lints(),
            Self::Fuzz => fuzz(),
            Self::Docs => docs(),
            Self::Deny => deny(),
        }
    }
}

fn format() -> Result<()> {
    require_component("fmt", "rustfmt")?;
    cmd::run(cmd::cargo().current_dir(workspace::root()).args(["fmt", "--all", "--", "--check"]))
}

fn lints() -> Result<()> {
    require_component("clippy", "clippy")?;
    cmd::run(compile::whole("clippy").args(["--all-targets", "--", "-Dwarnings"]))
}

/// Clippy where the BPF toolchain has it; else the compiler's own warnings.
fn kernel_lints() -> Result<()> {
    let toolchain = Toolchain::find()?;
    let subcommand = if toolchain.rustc.has_clippy() { "clippy" } else { "check" };
    println!(
        "cargo {subcommand} with rustc {} ({})",
        toolchain.rustc.version,
        toolchain.rustc.path.display()
    );
    // Another folder than the build's: the flags differ, and each would throw away the other's work.
    cmd::quiet(&mut toolchain.cargo(subcommand, &workspace::bpf_dir().join("check"), &["-Dwarnings"]))
}

/// Those of the agent would compile all of it once more for a few lines: what they do is part of its tests.
fn fuzz() -> Result<()> {
    let mut check = cmd::cargo();
    check.current_dir(workspace::root().join("proxy-common/fuzz")).arg("check");
    check.args(["--quiet", "--locked", "--bins", "--no-default-features", "--target-dir"]);
    cmd::run(check.arg(workspace::root().join("target/fuzz")).env("RUSTFLAGS", "-Dwarnings"))
}

fn docs() -> Result<()> {
    cmd::run(compile::whole("doc").arg("--no-deps").env("RUSTDOCFLAGS", "-Dwarnings"))
}

fn deny() -> Result<()> {
    let path = setup::cargo_deny().context("no cargo-deny; run: cargo xtask setup")?;
    let deny = |args: &[&str]| {
        let mut command = cmd::with(&path, args);
        command.current_dir(workspace::root());
        command
    };
    cmd::run(&mut deny(&["check", "licenses", "bans", "sources"]))?;
    // The database is a git repository elsewhere: not being able to fetch it says nothing about us.
    if let Err(error) = cmd::output(&mut deny(&["fetch", "db"])) {
        let why = error.to_string();
        println!(
            "advisories NOT checked, the database could not be fetched: {}",
            why.lines().last().unwrap_or("")
        );
        return Ok(());
    }
    cmd::run(&mut deny(&["check", "advisories"]))
}

fn require_component(subcommand: &str, component: &str) -> Result<()> {
    if cmd::output(cmd::cargo().args([subcommand, "--version"])).is_err() {
        bail!("no cargo {subcommand}; run: rustup component add {component}");
    }
    Ok(())
}

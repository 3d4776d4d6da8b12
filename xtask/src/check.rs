//! What CI demands besides the tests. Runs everything, then says what failed.

use anyhow::{Context as _, Result, bail};

use crate::{cmd, conformance, invariants, setup, toolchain::Toolchain, workspace};

type Check = fn() -> Result<()>;

/// `cargo xtask check`
pub(crate) fn run() -> Result<()> {
    let checks: [(&str, Check); 7] = [
        ("format", format),
        ("invariants", invariants::check),
        ("conformance table", conformance::check),
        ("lints", lints),
        ("lints of the kernel programs", kernel_lints),
        ("docs", docs),
        ("licences, bans, sources, advisories", deny),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        println!("\n=== {name}");
        if let Err(error) = check() {
            println!("{error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join("; "));
    }
    println!("\nall checks passed");
    Ok(())
}

fn format() -> Result<()> {
    require_component("fmt", "rustfmt")?;
    cmd::run(cmd::cargo().current_dir(workspace::root()).args(["fmt", "--all", "--", "--check"]))
}

fn lints() -> Result<()> {
    require_component("clippy", "clippy")?;
    let mut clippy = cmd::cargo();
    clippy.current_dir(workspace::root());
    // All features but `next-layout`, in which the values that tests write down lack fields.
    let features = "agent-kernel/kernel-tests,proxy-common/user,proxy-common/testing";
    clippy.args(["clippy", "--workspace", "--all-targets", "--features", features, "--", "-Dwarnings"]);
    cmd::run(&mut clippy)
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

fn docs() -> Result<()> {
    let mut doc = cmd::cargo();
    doc.current_dir(workspace::root())
        .args(["doc", "--workspace", "--no-deps"])
        .env("RUSTDOCFLAGS", "-Dwarnings");
    cmd::run(&mut doc)
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

//! `cargo xtask`: the one command surface for people who build, try and test this project.
//!
//! CI calls nothing else. Each command lives in the module of its name; [`cmd`] runs processes,
//! [`workspace`] knows where things are, [`toolchain`] finds (and pins) what compiles for the kernel.
#![expect(clippy::print_stdout, reason = "this binary talks to a terminal")]

mod bpf_loops;
mod bpf_object;
mod bpf_stack;
mod build;
mod build_ebpf;
mod check;
mod cmd;
mod compile;
mod conformance;
mod image;
mod invariants;
mod kind;
mod matrix;
mod miri;
mod pages;
mod release;
mod scenario;
mod setup;
mod test;
mod toolchain;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Build, try and test the eBPF service proxy.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make this machine ready: the BPF toolchain and the tools that the tests use. Start here.
    Setup(setup::Args),
    /// Compile the kernel programs to `target/bpf/proxy-ebpf`.
    BuildEbpf(build_ebpf::Args),
    /// Compile the kernel programs and the agent that embeds them (release).
    Build(build::Args),
    /// Show the proxy at work in a cluster made of network namespaces (root).
    Demo(scenario::Args),
    /// Run the tests, all levels or those named.
    Test(test::Args),
    /// Measure (root): all, or `packet`, `socket`, `change`, `attach`, `wire`. `--json FILE` also writes every figure to a file.
    Bench(scenario::Args),
    /// Count what clients lose while faults happen to the agent; `compare`: with nftables rules beside it (root).
    Chaos(scenario::Args),
    /// What CI demands besides the tests: format, lints, docs, licences, invariants.
    Check(check::Args),
    /// Write `tests/conformance.md`: every rule with the tests that cite it, with links to `docs/service-semantics.md`.
    Conformance,
    /// Run tests of proxy-common under Miri (needs a nightly toolchain with Miri).
    Miri,
    /// Write a container image (OCI layout and docker archive in one tar file).
    Image(image::Args),
    /// Set the version, and build what a release consists of. `--dry-run` only looks whether it could.
    Release(release::Args),
    /// Create a kind cluster without kube-proxy and install the proxy in it.
    Kind(kind::Args),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not through `main`'s return value: that would add a backtrace when the environment asks for them,
            // and what is wrong here is told by the message.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Setup(args) => setup::run(&args),
        Command::BuildEbpf(args) => build_ebpf::command(&args),
        Command::Build(args) => build::run(&args),
        Command::Demo(args) => scenario::run("demo", &args),
        Command::Test(args) => test::run(&args),
        Command::Bench(args) => scenario::run("bench", &args),
        Command::Chaos(args) => scenario::run("chaos", &args),
        Command::Check(args) => check::run(&args),
        Command::Conformance => conformance::run(),
        Command::Miri => miri::run(),
        Command::Image(args) => image::run(&args),
        Command::Release(args) => release::run(&args),
        Command::Kind(args) => kind::run(&args),
    }
}

//! `demo`, `bench` and `chaos`: compiles what they need, then runs the program of that name in `proxy-tests`. Only what
//! is measured is compiled for release, which takes minutes.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::{
    build_ebpf, cmd, compile,
    workspace::{self, Metadata, Targets as _},
};

/// Handed to the program as it stands; `--help` there tells what it takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Arguments for the program.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// `cargo xtask demo`, `cargo xtask bench`, `cargo xtask chaos`
pub(crate) fn run(program: &str, args: &Args) -> Result<()> {
    let metadata = Metadata::read()?;
    if !metadata.package("proxy-tests")?.has("bin", program) {
        bail!("package proxy-tests has no program `{program}`");
    }
    cmd::require_root(
        &format!("`{program}` makes network namespaces and loads kernel programs; it"),
        &format!("cargo xtask {program}"),
    )?;
    if program == "chaos" {
        // One of its faults is an agent with another layout of the tables.
        build_ebpf::next()?;
    }
    let folder = if program == "bench" { measured(&metadata)? } else { compile::programs()? };
    // From the caller's directory: `--json FILE` means a file there.
    cmd::run(&mut cmd::with(folder.join(program), &args.rest))
}

/// The programs as they are measured.
fn measured(metadata: &Metadata) -> Result<PathBuf> {
    build_ebpf::run()?;
    let build = ["build", "--release", "--bins", "-p", "proxy-agent", "-p", "proxy-tests"];
    cmd::run(cmd::cargo().current_dir(workspace::root()).args(build))?;
    Ok(metadata.target_directory.join("release"))
}

//! One way to compile the workspace for a developer: every command asks for the same packages and features.
//!
//! Cargo chooses the features of a dependency by the packages that are asked for together. Asked for one by one, two
//! packages that disagree about a feature of `tokio` make it compile half of all dependencies twice. Asked for as a whole
//! they agree. (What is released is compiled without the features of tests, see [`build`](crate::build).)

use std::{path::PathBuf, process::Command};

use anyhow::{Result, bail};

use crate::{
    build_ebpf, cmd,
    workspace::{self, Metadata, Targets as _},
};

/// Everything but `next-layout`, in which the values that tests write down lack fields.
const FEATURES: &str = "agent-kernel/kernel-tests,proxy-common/user,proxy-common/testing";

/// A cargo command for the whole workspace.
pub(crate) fn whole(subcommand: &str) -> Command {
    with_features(subcommand, FEATURES)
}

fn with_features(subcommand: &str, features: &str) -> Command {
    let mut command = cmd::cargo();
    command.current_dir(workspace::root()).args([subcommand, "--workspace", "--features", features]);
    command
}

/// Compiles the kernel programs and every program of the workspace; returns the folder that holds them.
pub(crate) fn programs() -> Result<PathBuf> {
    build_ebpf::run()?;
    cmd::run(whole("build").arg("--bins"))?;
    debug_folder()
}

/// Compiles one program of `proxy-tests` without the agent.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    if !Metadata::read()?.package("proxy-tests")?.has("bin", name) {
        bail!("package proxy-tests has no program `{name}`");
    }
    cmd::run(whole("build").args(["--bin", name]))?;
    Ok(debug_folder()?.join(name))
}

/// Compiles a program of the agent's that needs a feature.
pub(crate) fn program_with(name: &str, feature: &str) -> Result<()> {
    let features = format!("{FEATURES},proxy-agent/{feature}");
    cmd::run(with_features("build", &features).args(["--bin", name]))
}

fn debug_folder() -> Result<PathBuf> {
    Ok(Metadata::read()?.target_directory.join("debug"))
}

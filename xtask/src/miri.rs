//! Tests of `proxy-common` under Miri, which sees undefined behaviour where it happens.

use anyhow::{Result, bail};

use crate::{cmd, workspace};

/// Unit tests of what reads bytes as words; the rest makes tables of millions of rounds, of which Miri does a few a second.
const UNIT: &str = "wire::";

/// `cargo xtask miri`
pub(crate) fn run() -> Result<()> {
    let miri = |args: &[&str]| {
        let mut command = cmd::with("cargo", ["+nightly", "miri"]);
        command.current_dir(workspace::root()).args(args);
        // Property tests ask for the time and the environment.
        command.env("MIRIFLAGS", "-Zmiri-disable-isolation").env("PROPTEST_CASES", "1");
        command
    };
    if cmd::output(&mut miri(&["--version"])).is_err() {
        bail!(
            "no Miri; run: rustup toolchain install nightly --profile minimal --component miri --component rust-src"
        );
    }
    let target = workspace::root().join("target/miri").display().to_string();
    let test = ["test", "--target-dir", &target, "-p", "proxy-common"];
    cmd::run(&mut miri(&[&test[..], &["--lib", "--", UNIT]].concat()))?;
    cmd::run(&mut miri(&[&test[..], &["--test", "fuzz"]].concat()))
}

//! The levels `kernels` and `matrix`: the agent on Debian's kernels, in virtual machines without any acceleration.
//!
//! For each series the newest package is looked up, downloaded and unpacked ([`packages`]); what the probes need of its
//! modules ([`modules`]), the agent as a static program and the program that probes go into an initramfs
//! ([`initramfs`]); [`machine`] boots it under qemu and reads what the probes say; [`table`] shows it. The probes
//! themselves are the program `guest` of `proxy-tests`.
//!
//! Everything is kept in `target/matrix`: kernels, apt's lists, and each machine's console.

mod initramfs;
mod machine;
mod modules;
mod packages;
mod table;

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::{build, compile, workspace};

/// How much is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Three kernels and the probes that tell most.
    Bounded,
    /// All kernels and all probes.
    Whole,
}

/// A series of kernels.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Series {
    /// The newest of `5.10` and the like.
    Of(String),
    /// The newest of all.
    Newest,
}

impl Scope {
    /// The series that are tried. 5.10 is the oldest that the programs are made for; the verifiers of 5.10 and 6.1 are
    /// stricter than those of the series after them up to 6.8, so they stand for them.
    fn series(self) -> Vec<Series> {
        let numbers: &[&str] = match self {
            Self::Bounded => &["5.10", "6.1"],
            Self::Whole => &["5.10", "6.1", "6.12", "6.18"],
        };
        numbers.iter().map(|series| Series::Of((*series).to_owned())).chain([Series::Newest]).collect()
    }
}

/// `cargo xtask test kernels`, `cargo xtask test matrix`; `only` names one series instead, as in `6.16`.
pub(crate) fn run(scope: Scope, only: Option<&str>) -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the kernels that are tried are those of 64-bit PCs: run this on such a machine");
    }
    let series = match only {
        Some("newest") => vec![Series::Newest],
        Some(series) => vec![Series::Of(series.to_owned())],
        None => scope.series(),
    };
    let kernels = packages::fetch(&series)?;
    let agent = build::static_agent()?;
    let programs = initramfs::Programs { agent, others: test_programs()? };

    let mut results = Vec::new();
    for kernel in &kernels {
        println!("\n--- {} ({})", kernel.release, kernel.version);
        let initramfs = initramfs::write(kernel, &programs)?;
        results.push(machine::boot(kernel, &initramfs, scope)?);
        // Some hundred megabytes, made again in no time.
        fs::remove_file(&initramfs).with_context(|| format!("could not remove {}", initramfs.display()))?;
    }
    println!("\n{}", table::text(&results));
    let failures = table::failures(&results);
    if !failures.is_empty() {
        bail!("{}\nconsoles: {}", failures.join("\n"), directory().join("consoles").display());
    }
    Ok(())
}

/// Where everything of these levels is kept.
fn directory() -> PathBuf {
    workspace::root().join("target/matrix")
}

/// The programs that run beside the agent; of any build, since the machines have the libraries of this one.
fn test_programs() -> Result<Vec<PathBuf>> {
    ["guest", "testpod"].into_iter().map(compile::program).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounded_form_is_part_of_the_whole_one() {
        let whole = Scope::Whole.series();
        assert!(Scope::Bounded.series().iter().all(|series| whole.contains(series)));
    }
}

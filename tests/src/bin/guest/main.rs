//! What `cargo xtask test kernels` and `matrix` run in a virtual machine of another kernel: the machine's first and
//! only program. It makes the machine fit for a [`proxy_tests::test_cluster`], asks the real agent and its programs what a
//! cluster would ask of them, says how each probe went, and switches the machine off.
//!
//! The machine has nothing else: no shell, no init, `ip`, `bridge`, `nft` and `ipvsadm` only. What is said goes to the console, one line
//! a probe ([`report`]).

#![expect(clippy::print_stdout, reason = "the console is its only way out")]

mod machine;
mod probes;
mod report;
mod scene;
mod takeover;

use anyhow::{Result, ensure};
use clap::Parser;

use crate::report::Reports;

/// The first program of a virtual machine that tries the agent on its kernel; of no use elsewhere.
#[derive(Parser)]
struct Arguments {
    /// Every probe, not only those of the bounded form.
    #[arg(long)]
    whole: bool,
}

fn main() {
    let outcome = run();
    if let Err(error) = &outcome {
        println!("\nguest: {error:#}");
    }
    machine::switch_off();
}

fn run() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(
        std::process::id() == 1,
        "this is the first program of a virtual machine: run `cargo xtask test kernels`"
    );
    machine::mount_file_systems()?;
    machine::quieten()?;
    let mut reports = Reports::open()?;
    machine::load_modules()?;
    probes::run(&mut reports, arguments.whole);
    reports.close()
}

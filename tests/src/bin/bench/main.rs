//! The benchmarks: ratios within one run, since machines differ and shared ones are noisy.
//!
//! What is compared is measured in rounds, one after the other in each, and a figure is the median over the rounds.
//! A ratio is the median of the rounds' ratios, so that slow phases of the machine weigh on both sides.

mod attach;
mod figure;
mod packet;
mod plan;
mod raw;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};

use crate::figure::Figures;

#[derive(Parser)]
#[command(about = "Measures connections, packets and plans (root); an otherwise idle machine helps")]
struct Arguments {
    /// Also write every figure to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure only these.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Part::ALL)]
    only: Vec<Part>,
    /// Rounds; the median counts.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// New connections a second, pod to Service.
    Wire,
    /// Nanoseconds a packet in the kernel programs.
    Packet,
    /// Planning, writing and comparing the tables of a large cluster.
    Plan,
    /// Attaching to hundreds of interfaces.
    Attach,
}

impl Part {
    const ALL: [Self; 4] = [Self::Packet, Self::Plan, Self::Attach, Self::Wire];
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !nix::unistd::geteuid().is_root() {
        eprintln!("The benchmarks make network namespaces and load kernel programs, which needs root. Run:");
        eprintln!("    sudo -E env \"PATH=$PATH\" cargo xtask bench");
        return ExitCode::FAILURE;
    }
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything asked for could be measured.
fn run(arguments: &Arguments) -> Result<bool> {
    let mut figures = Figures::default();
    let rounds = arguments.rounds.max(1);
    for part in &arguments.only {
        let (name, measured) = match part {
            Part::Packet => ("packet", packet::measure(&mut figures, rounds)),
            Part::Attach => ("attach", attach::measure(&mut figures, rounds)),
            Part::Plan => ("plan", plan::measure(&mut figures, rounds)),
            Part::Wire => ("wire", wire::measure(&mut figures, rounds)),
        };
        if let Err(error) = measured {
            figures.missing(name, &format!("{error:#}"));
        }
    }
    figures.print().context("writing the figures")?;
    if let Some(path) = &arguments.json {
        figures.save(path)?;
    }
    Ok(figures.complete())
}

//! The benchmarks: ratios within one run, since machines differ and shared ones are noisy.
//!
//! What is compared is measured in rounds, one after the other in each, and a figure is the median over the rounds.
//! A ratio is the median of the rounds' ratios, so that slow phases of the machine weigh on both sides.

mod asm;
mod attach;
mod change;
mod cluster;
mod coldstart;
mod controlplane;
mod empty;
mod figure;
mod fleet;
mod flood;
mod memory;
mod object;
mod packet;
mod process;
mod raw;
mod rulesets;
mod scale;
mod socket;
mod tables;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};

use crate::figure::Figures;

#[derive(Parser)]
#[command(
    bin_name = "cargo xtask bench",
    about = "Measures packets, sockets, changes, starts, memory, connections, rivals, floods and fleets (root); an idle machine helps"
)]
struct Arguments {
    /// What to measure.
    #[arg(value_enum, default_values_t = Part::ALL)]
    parts: Vec<Part>,
    /// Also write every figure to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where curves are written, in a folder of their part's name.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Rounds; the median counts.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Agents of `fleet`.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u16).range(1..))]
    nodes: u16,
    /// One round of `controlplane` in this process, for the one that has started it.
    #[arg(long, hide = true)]
    alone: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Nanoseconds a packet in the kernel programs, and in a hand-written one.
    Packet,
    /// Nanoseconds that the programs add to connect, sendmsg, recvmsg and getpeername.
    Socket,
    /// Planning, writing and comparing the tables of a large cluster; one endpoint, from the API server to the tables.
    Change,
    /// Attaching to hundreds of interfaces.
    Attach,
    /// MiB of the tables of an idle node, and of an agent with a large cluster.
    Memory,
    /// New connections a second, pod to Service.
    Wire,
    /// What grows with the number of Services, beside rules of nftables and of iptables, as curves.
    Scale,
    /// Who can still connect while the node is flooded from spoofed sources, and what a packet of the flood costs.
    Flood,
    /// Objects to tables: 50,000 Services with one endpoint each.
    Controlplane,
    /// An agent from its start until its tables are complete.
    Coldstart,
    /// What the agents of hundreds of nodes ask of an API server, and what it costs.
    Fleet,
}

impl Part {
    const ALL: [Self; 11] = [
        Self::Packet,
        Self::Socket,
        Self::Change,
        Self::Attach,
        Self::Memory,
        Self::Wire,
        Self::Scale,
        Self::Flood,
        Self::Controlplane,
        Self::Coldstart,
        Self::Fleet,
    ];

    /// Measures it.
    fn measure(self, figures: &mut Figures, arguments: &Arguments) -> (&'static str, Result<()>) {
        let (name, [baseline, value], measure): (_, _, fn(&mut Figures, usize) -> Result<()>) = match self {
            Self::Packet => ("packet", ["FLOOR", "OURS"], packet::measure),
            Self::Socket => ("socket", ["WITHOUT", "OURS"], socket::measure),
            Self::Change => ("change", ["BASELINE", "VALUE"], change::measure),
            Self::Attach => ("attach", ["BASELINE", "VALUE"], attach::measure),
            Self::Memory => ("memory", ["BASELINE", "VALUE"], memory::measure),
            Self::Wire => ("wire", ["BASELINE", "VALUE"], wire::measure),
            Self::Scale => ("scale", ["BASELINE", "VALUE"], scale::measure),
            Self::Flood => ("flood", ["BASELINE", "VALUE"], flood::measure),
            Self::Controlplane => ("controlplane", ["BASELINE", "VALUE"], controlplane::measure),
            Self::Coldstart => ("coldstart", ["DECODING", "VALUE"], coldstart::measure),
            Self::Fleet => ("fleet", ["BASELINE", "VALUE"], fleet::measure),
        };
        let size = if self == Self::Fleet { arguments.nodes } else { arguments.rounds };
        figures.begin(name, baseline, value);
        (name, measure(figures, size.into()))
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !nix::unistd::geteuid().is_root() {
        eprintln!("The benchmarks make network namespaces and load kernel programs, which needs root. Run:");
        eprintln!("    sudo -E env \"PATH=$PATH\" cargo xtask bench");
        return ExitCode::FAILURE;
    }
    if arguments.alone {
        return match controlplane::alone() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("bench: {error:#}");
                ExitCode::FAILURE
            }
        };
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
    let mut figures = Figures::new(&arguments.out);
    for part in &arguments.parts {
        if let (name, Err(error)) = part.measure(&mut figures, arguments) {
            figures.missing(name, &format!("{error:#}"));
        }
    }
    figures.print().context("writing the figures")?;
    if let Some(path) = &arguments.json {
        figures.save(path)?;
    }
    Ok(figures.complete())
}

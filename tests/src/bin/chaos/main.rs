//! What clients lose while everything goes wrong round the agent: it is killed, restarted, flooded, its endpoints come
//! and go. One line a fault; the exit code says whether anything was lost.

mod compare;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use proxy_tests::chaos::fault::{Name, Options};
use proxy_tests::chaos::trial::{Outcome, play};
use proxy_tests::stop;
use serde::Serialize;

#[derive(Parser)]
#[command(about = "Counts what clients lose while faults happen to the agent (root)")]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Faults, one after the other; all of them unless named.
    #[arg(value_enum, value_name = "FAULT")]
    faults: Vec<Name>,
    /// How often each is done; by default what it has by itself.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    rounds: Option<u64>,
    /// How long the soak lasts; five minutes by default.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: Option<u64>,
    /// Of syscall-kill and syscall-error only the calls whose names begin so, such as --call='bpf OBJ_GET'; may be given more
    /// than once.
    #[arg(long, value_name = "NAME")]
    call: Vec<String>,
    /// What random choices follow from; another one each time by default.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Also write the report to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// A further flag for the agent, such as --agent-flag=--socket-lb=host; may be given more than once.
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    agent_flag: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// The agent against nftables rules of kube-proxy's shape, where many ask at a time.
    #[command(subcommand)]
    Compare(compare::Comparison),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !nix::unistd::geteuid().is_root() {
        eprintln!("This makes network namespaces and loads kernel programs, which needs root. Run:");
        eprintln!("    sudo -E env \"PATH=$PATH\" cargo xtask chaos [FAULT…]");
        return ExitCode::FAILURE;
    }
    stop::listen();
    let outcome = match &arguments.command {
        Some(Command::Compare(comparison)) => compare::run(comparison).map(|()| true),
        None => run(&arguments),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // Whatever broke after Ctrl-C broke because of it.
        Err(_) if stop::wanted() => {
            eprintln!("Interrupted. Everything that was made has been removed.");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Plays faults one after the other; says whether nothing was lost.
fn run(arguments: &Arguments) -> Result<bool> {
    let faults = if arguments.faults.is_empty() { Name::value_variants() } else { &arguments.faults };
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    eprintln!("chaos: --seed {seed}");
    let options = Options {
        rounds: arguments.rounds,
        lasts: arguments.seconds.map(Duration::from_secs),
        calls: arguments.call.clone(),
        seed,
        agent_flags: arguments.agent_flag.clone(),
    };
    let mut outcomes = Vec::new();
    for fault in faults {
        match play(*fault, &options) {
            Ok(outcome) => outcomes.push(outcome),
            Err(error) => {
                // What is known is told, whatever came then.
                print(&outcomes)?;
                return Err(error);
            }
        }
    }
    print(&outcomes).context("writing the report")?;
    save(arguments.json.as_deref(), &outcomes)?;
    Ok(outcomes.iter().all(|outcome| outcome.lost == 0))
}

fn print(outcomes: &[Outcome]) -> Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(vec!["FAULT", "ROUNDS", "CONNECTIONS HELD", "REQUESTS", "LOST"]);
    for outcome in outcomes {
        let Outcome { fault, rounds, held, requests, lost, slowest_ms: _, remarks: _ } = outcome;
        let [rounds, held, requests, lost] = [rounds, held, requests, lost].map(ToString::to_string);
        table.add_row(vec![fault.clone(), rounds, held, requests, lost]);
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if index > 0 {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", table.trim_fmt())?;
    for outcome in outcomes {
        writeln!(out, "{}: the slowest answer took {:.0} ms", outcome.fault, outcome.slowest_ms)?;
        for remark in &outcome.remarks {
            writeln!(out, "{}: {remark}", outcome.fault)?;
        }
    }
    Ok(out.flush()?)
}

/// Writes a report to a file, if one is wanted.
fn save(path: Option<&Path>, report: &impl Serialize) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(report)? + "\n";
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

//! The test-pod program: servers that answer with their name, clients that count answers.
//!
//! Every command ends by itself (`--seconds`), when its standard input ends, and on the line `stop`. It prints one
//! JSON object a line (see `proxy_tests::answer`). On the line `report` the clients print what they have so far;
//! a crowd has more orders (see `crowd`).

#![expect(clippy::print_stdout, reason = "its output is what it is for")]

mod client;
mod crowd;
mod get;
mod hold;
mod load;
mod measure;
mod roam;
mod serve;
mod socket;
mod stdin;
mod transfer;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Servers and clients for tests inside network namespaces")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer every line and every datagram with the own name, the peer's address and the length.
    Serve(serve::Arguments),
    /// Make one request, or several one after the other.
    Get(get::Arguments),
    /// Make new connections steadily and count who answers.
    Load(load::Arguments),
    /// Exchange lines over one socket steadily.
    Hold(hold::Arguments),
    /// Hold connections and make new requests, as many clients, and print each loss.
    Crowd(crowd::Arguments),
    /// For measuring: serve one connection after the other.
    Answer(measure::AnswerArguments),
    /// For measuring: make connections or requests, or send bytes, as fast as possible.
    Rate(measure::RateArguments),
    /// Ask several servers in turn over one UDP socket.
    Roam(roam::Arguments),
    /// Do with one socket what standard input says: connect, disconnect, send, send-to, receive, peer.
    Socket(socket::Arguments),
    /// Send many bytes over one TCP connection and check that all come back.
    Transfer(transfer::Arguments),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Get(arguments) => get::run(&arguments),
        Command::Load(arguments) => load::run(&arguments),
        Command::Hold(arguments) => hold::run(&arguments),
        Command::Crowd(arguments) => crowd::run(&arguments),
        Command::Answer(arguments) => measure::answer(&arguments),
        Command::Rate(arguments) => measure::rate(&arguments),
        Command::Roam(arguments) => roam::run(&arguments),
        Command::Socket(arguments) => socket::run(&arguments),
        Command::Transfer(arguments) => transfer::run(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("testpod: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints one JSON line.
fn print(value: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}

//! The agent with the made-up next layout of the tables (`proxy_common::abi`, feature `next-layout`): what a test upgrades to.

#[path = "main.rs"]
mod agent;

fn main() -> std::process::ExitCode {
    agent::main()
}

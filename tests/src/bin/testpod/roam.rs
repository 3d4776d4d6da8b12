//! One UDP socket, never connected, that asks several servers in turn.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use proxy_tests::answer::Request;

use crate::client::{Client, Target};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Addresses of servers or Services, all of one family; asked in this order.
    #[arg(long, required = true)]
    to: Vec<SocketAddr>,
    /// How often all are asked.
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// How long an answer may take.
    #[arg(long, default_value_t = 2000)]
    timeout_ms: u64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let first = *arguments.to.first().context("nobody to ask")?;
    let target = Target::unconnected(first, arguments.timeout_ms);
    let mut client = Client::open(&target).map_err(anyhow::Error::msg)?;
    for _ in 0..arguments.rounds {
        for to in &arguments.to {
            client.turn_to(*to);
            let mut request = Request { local: client.local(), ..Request::default() };
            match client.exchange() {
                Ok((answer, from)) => (request.answer, request.received_from) = (Some(answer), from),
                Err(failure) => request.failure = Some(failure),
            }
            crate::print(&request)?;
        }
    }
    Ok(())
}

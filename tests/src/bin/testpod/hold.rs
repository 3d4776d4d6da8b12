//! One socket used for long: a TCP connection that must not break, a UDP socket that must follow its Service.

use std::time::Duration;

use anyhow::Result;
use proxy_tests::answer::Hold;

use crate::client::{Client, Target};
use crate::stdin::{Order, Orders};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    target: Target,
    /// Ends by itself after this time.
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// Pause between two exchanges.
    #[arg(long, default_value_t = 50)]
    interval_ms: u64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let orders = Orders::listen(arguments.seconds);
    let mut hold = Hold::default();
    let mut client = match Client::open(&arguments.target) {
        Ok(client) => Some(client),
        Err(failure) => {
            note(&mut hold, failure, false);
            None
        }
    };
    let interval = Duration::from_millis(arguments.interval_ms);
    loop {
        if let Some(open) = &mut client {
            match open.exchange() {
                Ok((answer, _)) => {
                    hold.made += 1;
                    *hold.names.entry(answer.name.clone()).or_default() += 1;
                    hold.last = Some(answer);
                    hold.peer_name = open.peer_name();
                }
                Err(failure) => {
                    note(&mut hold, failure, arguments.target.udp);
                    if !arguments.target.udp {
                        client = None;
                    }
                }
            }
        }
        match orders.within(interval) {
            Some(Order::Stop) => return crate::print(&hold),
            Some(Order::Report) => crate::print(&hold)?,
            Some(Order::Drain) | None => {}
        }
    }
}

/// A datagram lost is counted; a connection lost is the end.
fn note(hold: &mut Hold, failure: String, goes_on: bool) {
    hold.failed += 1;
    *hold.reasons.entry(failure.clone()).or_default() += 1;
    if !goes_on {
        hold.broke = Some(failure);
    }
}

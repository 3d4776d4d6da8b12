//! Requests one after the other, each with a socket of its own.

use anyhow::Result;
use proxy_tests::answer::Request;

use crate::client::{Client, Target};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    target: Target,
    /// How many requests.
    #[arg(long, default_value_t = 1)]
    times: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    (0..arguments.times).try_for_each(|_| crate::print(&ask(&arguments.target)))
}

fn ask(target: &Target) -> Request {
    let mut request = Request::default();
    let outcome = Client::open(target).and_then(|mut client| {
        request.peer_name = client.peer_name();
        let exchanged = client.exchange();
        request.local = client.local();
        exchanged
    });
    match outcome {
        Ok((answer, from)) => (request.answer, request.received_from) = (Some(answer), from),
        Err(failure) => request.failure = Some(failure),
    }
    request
}

//! One request.

use anyhow::Result;
use proxy_tests::answer::Request;

use crate::client::{Client, Target};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    target: Target,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut request = Request::default();
    let outcome = Client::open(&arguments.target).and_then(|mut client| {
        request.peer_name = client.peer_name();
        let exchanged = client.exchange();
        request.local = client.local();
        exchanged
    });
    match outcome {
        Ok((answer, from)) => (request.answer, request.received_from) = (Some(answer), from),
        Err(failure) => request.failure = Some(failure),
    }
    crate::print(&request)
}

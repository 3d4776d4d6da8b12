//! API servers that are of no use, while endpoints change. Every other time all of them fail at once, and the change has to
//! be followed when that is over; else only the one that the agent uses, and another takes its place. Endpoints that have
//! left go on answering until the agent has been told.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Fault, Next};
use crate::apiserver::{ApiServer, Fault as ServerFault, Gone};
use crate::chaos::ground::{Ground, Source};
use crate::chaos::services::COMING;
use crate::crowd::now_ms;
use crate::probe::eventually;
use crate::stop::pause;

/// How long all servers fail.
const LASTS: Duration = Duration::from_secs(3);
/// From the beginning of a fault to the change.
const BEFORE: Duration = Duration::from_millis(500);
/// How soon a change is in the tables once a server is of use: what no answer tells takes 21 s to be noticed, that watches
/// begin and bring nothing 33 s, and pauses between attempts last up to 15 s.
const FOLLOWS: Duration = Duration::from_secs(45);

/// What happens to the servers, in turn.
pub(super) struct Api {
    faults: Vec<ServerFault>,
    slowest: Duration,
}

impl Api {
    pub(super) fn new(faults: Vec<ServerFault>) -> Self {
        Self { faults, slowest: Duration::ZERO }
    }
}

impl Fault for Api {
    fn round(&mut self, ground: &mut Ground<'_>, number: u64) -> Result<Next> {
        let Source::ApiServers(servers) = ground.source else { bail!("the agent is fed by no API server") };
        let turn = usize::try_from(number / 2)? % self.faults.len().max(1);
        let fault = *self.faults.get(turn).context("a fault of API servers")?;
        COMING.into_iter().try_for_each(|pod| ground.serve(pod))?;
        let all = number.is_multiple_of(2);
        let failing = if all { &servers[..] } else { std::slice::from_ref(in_use(servers)?) };
        let whose = if all { "all servers" } else { "the server in use" };
        ground.clients.step(format!("api {number}: {fault:?} of {whose}"));
        for server in failing {
            server.fail(fault);
            if matches!(fault, ServerFault::Half | ServerFault::Stale) {
                // These are seen in lists.
                server.expire(Gone::Event);
            } else if !fault.silences() {
                // Most faults are those of an answer: watches that run have theirs.
                server.cut();
            }
        }
        pause(BEFORE)?;
        let pods = if ground.moving.members().count() > 2 { &[][..] } else { &COMING };
        ground.move_to(pods)?;
        if all {
            pause(LASTS)?;
            servers.iter().for_each(|server| server.fail(ServerFault::None));
            ground.clients.step(format!("api {number}: over"));
        }
        let (begun, begun_ms) = (Instant::now(), now_ms());
        let outcome = eventually(FOLLOWS, || ground.is_in_line());
        self.slowest = self.slowest.max(begun.elapsed());
        ground.clients.note(
            "the agent",
            &format!("tables as published within {FOLLOWS:?}"),
            begun_ms,
            outcome,
        );
        servers.iter().for_each(|server| server.fail(ServerFault::None));
        ground.clients.check()?;
        Ok(Next::More)
    }

    fn end(&mut self, ground: &mut Ground<'_>) -> Result<Vec<String>> {
        ground.settle();
        let slowest = self.slowest.as_secs_f64();
        Ok(vec![format!("changes were in the tables at most {slowest:.1} s after a server was of use")])
    }
}

/// The server that the agent watches; it leaves another one as a whole.
fn in_use(servers: &[ApiServer; 2]) -> Result<&ApiServer> {
    eventually(FOLLOWS, || match servers.each_ref().map(ApiServer::is_watched) {
        [true, false] => Ok(&servers[0]),
        [false, true] => Ok(&servers[1]),
        watched => bail!("which of the servers are watched: {watched:?}"),
    })
}

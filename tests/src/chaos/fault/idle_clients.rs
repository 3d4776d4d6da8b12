//! Clients that never end a request hold the agent's HTTP ports, while endpoints change: the agent follows, and whoever
//! asks how it is, is told.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{Fault, Next};
use crate::chaos::crowd::{Crowd, Manner};
use crate::chaos::figures::descriptors;
use crate::chaos::ground::Ground;
use crate::chaos::services::COMING;
use crate::crowd::now_ms;
use crate::probe::{eventually, http};
use crate::stop::pause;

/// Clients of each manner at each port.
const EACH: usize = 250;
/// How soon a change must be in the tables, and an answer there.
const AT_ONCE: Duration = Duration::from_secs(4);
/// A start has opened by then what it holds open.
const STARTED: Duration = Duration::from_secs(2);
/// How soon descriptors are free again.
const FREE: Duration = Duration::from_secs(10);

/// What the agent has borne.
#[derive(Default)]
pub(super) struct IdleClients {
    /// Its descriptors before anybody came.
    open: usize,
    closed: u64,
    slowest: Duration,
}

impl Fault for IdleClients {
    fn begin(&mut self, ground: &mut Ground<'_>) -> Result<()> {
        pause(STARTED)?;
        self.open = descriptors(&ground.agent)?;
        ground.clients.receive()
    }

    fn round(&mut self, ground: &mut Ground<'_>, number: u64) -> Result<Next> {
        COMING.into_iter().try_for_each(|pod| ground.serve(pod))?;
        let (outside, host) = (ground.cluster.place("outside"), ground.cluster.place("node1"));
        let ports = [
            (outside, SocketAddr::new(host.v4.into(), 10256), "/healthz"),
            (host, SocketAddr::from((Ipv4Addr::LOCALHOST, 10249)), "/metrics"),
        ];
        ground.clients.step(format!("idle clients {number}: they come"));
        let mut crowds = Vec::new();
        for (place, to, _) in ports {
            for manner in Manner::ALL {
                crowds.push(Crowd::gather(place, to, EACH, manner)?);
            }
        }
        for pods in [&COMING[..], &[]] {
            ground.clients.step(format!("idle clients {number}: moving to {pods:?}"));
            let (begun, begun_ms) = (Instant::now(), now_ms());
            ground.move_to(pods)?;
            let outcome = eventually(AT_ONCE, || ground.is_in_line());
            self.slowest = self.slowest.max(begun.elapsed());
            ground.clients.note(
                "the agent",
                &format!("tables as published within {AT_ONCE:?}"),
                begun_ms,
                outcome,
            );
        }
        for (place, to, path) in ports {
            let (begun, begun_ms) = (Instant::now(), now_ms());
            let outcome = http(place, to, path).and_then(|(code, page)| {
                let took = begun.elapsed();
                ensure!(code == 200 && took <= AT_ONCE * crate::patience(), "{code} after {took:?}: {page}");
                Ok(())
            });
            let what = format!("{}: http://{to}{path}", place.name);
            ground.clients.note(&what, &format!("an answer within {AT_ONCE:?}"), begun_ms, outcome);
        }
        self.closed += crowds.iter().map(Crowd::closed).sum::<u64>();
        drop(crowds);
        ground.clients.step(format!("idle clients {number}: they have gone"));
        ground.clients.check()?;
        Ok(Next::More)
    }

    fn end(&mut self, ground: &mut Ground<'_>) -> Result<Vec<String>> {
        ground.settle();
        let begun = now_ms();
        let outcome = eventually(FREE, || {
            let open = descriptors(&ground.agent)?;
            ensure!(open <= self.open, "{open} descriptors are open, {} were before", self.open);
            Ok(())
        });
        ground.clients.note("the agent's process", "the descriptors of before", begun, outcome);
        Ok(vec![format!(
            "changes were in the tables after at most {:.1} s; {} idle clients were sent away",
            self.slowest.as_secs_f64(),
            self.closed
        )])
    }
}

//! A kube-proxy's node becomes the agent's, and is given back: what the rules have begun goes on with the agent, the rules
//! come again, the agent retires, waits until nothing is left to it, and is cleaned up.

use anyhow::{Context, Result};

use super::{Fault, Next};
use crate::chaos::clients::Term;
use crate::chaos::ground::Ground;
use crate::crowd::now_ms;

/// Waits for the last flow.
const WAIT: [&str; 2] = ["retire", "--wait=15s"];

/// Nothing is remembered from round to round.
pub(super) struct Takeover;

impl Fault for Takeover {
    fn round(&mut self, ground: &mut Ground<'_>, number: u64) -> Result<Next> {
        ground.crowd(Term::Round, true)?;
        ground.clients.step(format!("takeover {number}: the agent starts"));
        let begun = now_ms();
        ground.agent.spawn()?;
        let outcome = ground.agent.wait_ready().and_then(|()| ground.rules_gone());
        ground.clients.note("the agent", "a node that it has taken over", begun, outcome);
        ground.clients.step(format!("takeover {number}: the rules have gone"));
        ground.clients.check()?;

        ground.clients.step(format!("takeover {number}: the rules come again"));
        ground.rules()?;
        ground.clients.step(format!("takeover {number}: retire"));
        ground.tell_agent(&["retire"])?;
        ground.clients.check()?;
        ground.clients.end_round()?;
        ground.clients.step(format!("takeover {number}: retire --wait"));
        let begun = now_ms();
        let mut outcome = ground.tell_agent(&WAIT).map(drop);
        // One command here may last 20 seconds.
        for _ in 0..2 {
            outcome = outcome.or_else(|_| ground.tell_agent(&WAIT).map(drop));
        }
        ground.clients.note("the agent", "no flow that is left", begun, outcome);
        ground.clients.step(format!("takeover {number}: cleanup"));
        ground.agent.stop().context("an agent that has retired is told to end")?;
        ground.tell_agent(&["cleanup"])?;
        Ok(Next::More)
    }

    fn end(&mut self, _: &mut Ground<'_>) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

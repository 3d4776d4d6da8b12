//! The way back before it is gone to the end: the agent leaves what is new to rules of kube-proxy's shape, and takes over
//! what they have begun. The rules stay, as those of a kube-proxy that runs. Connections are held over all of it.

use std::time::Duration;

use anyhow::Result;

use super::{Fault, Next};
use crate::chaos::clients::Term;
use crate::chaos::ground::Ground;
use crate::stop::pause;

/// What is looked at in between goes on for so long.
const MOMENT: Duration = Duration::from_millis(500);

/// Nothing is remembered from round to round.
pub(super) struct Retire;

impl Fault for Retire {
    fn round(&mut self, ground: &mut Ground<'_>, number: u64) -> Result<Next> {
        ground.clients.step(format!("retire {number}: retire"));
        ground.tell_agent(&["retire"])?;
        ground.clients.check()?;
        // These the rules begin.
        ground.crowd(Term::Round, true)?;
        pause(MOMENT)?;
        ground.clients.step(format!("retire {number}: retire --undo"));
        ground.tell_agent(&["retire", "--undo"])?;
        pause(MOMENT)?;
        ground.clients.end_round()?;
        ground.clients.check()?;
        Ok(Next::More)
    }
}

//! A flood of spoofed SYNs, as in [`crate::chaos::flood`], while everybody else goes on.

use anyhow::{Context, Result};

use super::{Fault, Next};
use crate::chaos::ground::Ground;
use crate::chaos::services::ROLES;
use crate::chaos::spoof::{Flood as Frames, Kind};

/// Sources in a round.
const SOURCES: u32 = 20_000;
/// Packets a second.
const SPEED: f64 = 20_000.0;

/// Who has sent so far.
#[derive(Default)]
pub(super) struct Flood {
    sent: u64,
}

impl Fault for Flood {
    fn round(&mut self, ground: &mut Ground<'_>, number: u64) -> Result<Next> {
        let far = ROLES.iter().find(|role| role.name == "far").context("no Service far")?;
        let node = ground.cluster.place("node1");
        let to = node.at(far.node_port)[usize::from(number.is_multiple_of(2))];
        let first = u32::try_from(number).unwrap_or_default().wrapping_mul(SOURCES);
        let frames = Frames::prepare(ground.cluster.place("liar"), node, to, Kind::Syn, first, SOURCES)?;
        ground.clients.step(format!("flood {number}: {SOURCES} SYNs to {to}"));
        self.sent += frames.send(SPEED)?.packets;
        ground.clients.step(format!("flood {number}: over"));
        Ok(Next::More)
    }

    fn end(&mut self, ground: &mut Ground<'_>) -> Result<Vec<String>> {
        ground.settle();
        Ok(vec![format!("{} spoofed packets were sent", self.sent)])
    }
}

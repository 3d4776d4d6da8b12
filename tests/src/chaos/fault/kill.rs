//! SIGKILL, as the kernel sends it when memory runs out: at a random moment of a start, or of a sync.

use std::time::{Duration, Instant};

use anyhow::Result;
use fastrand::Rng;

use super::{Fault, Next};
use crate::chaos::ground::Ground;
use crate::chaos::services::COMING;
use crate::stop::pause;

/// After so many rounds it is seen whether a start brings everything in line.
const LOOK: u64 = 10;
/// No sync takes longer.
const SYNC: Duration = Duration::from_millis(30);

/// Its choices, and how long a start takes here.
pub(super) struct Kill {
    random: Rng,
    start: Duration,
}

impl Kill {
    pub(super) fn new(seed: u64) -> Self {
        Self { random: Rng::with_seed(seed), start: Duration::ZERO }
    }

    /// A part of a time, up to all of it.
    fn part_of(&mut self, time: Duration) -> Duration {
        time.mul_f64(self.random.f64())
    }
}

impl Fault for Kill {
    fn round(&mut self, ground: &mut Ground<'_>, number: u64) -> Result<Next> {
        COMING.into_iter().try_for_each(|pod| ground.serve(pod))?;
        let pods: Vec<&str> = COMING.into_iter().filter(|_| self.random.bool()).collect();
        if number.is_multiple_of(2) {
            // Of a start: it was begun when the round before was over, or is begun now.
            ground.agent.kill()?;
            ground.clients.step(format!("kill {number}: starting"));
            ground.agent.spawn()?;
            let (first, second) = (self.part_of(self.start), self.part_of(self.start / 2));
            pause(first)?;
            ground.move_to(&pods)?;
            pause(second)?;
        } else {
            let begun = Instant::now();
            ground.settle();
            self.start = self.start.max(begun.elapsed());
            ground.clients.step(format!("kill {number}: moving to {pods:?}"));
            ground.move_to(&pods)?;
            let moment = self.part_of(SYNC);
            pause(moment)?;
        }
        ground.clients.step(format!("kill {number}: SIGKILL"));
        ground.agent.kill()?;
        ground.agent.spawn()?;
        if number.is_multiple_of(LOOK) {
            ground.settle();
        }
        Ok(Next::More)
    }
}

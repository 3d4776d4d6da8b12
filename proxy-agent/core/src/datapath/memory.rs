//! Tables in memory: for tests, dry runs, and for doing wrong on purpose.

use std::convert::Infallible;

use super::Datapath;
use crate::plan::{Actual, Capacity, Step};

/// Tables in memory that hold as much as those in the kernel would.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// What is in them.
    pub actual: Actual,
    /// Steps done so far.
    pub writes: usize,
    capacity: Capacity,
}

/// A write beyond the end of a table: E2BIG or ENOSPC in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot do `{step}`: the table is full; plan with the capacity the tables were made for")]
pub struct TableFull {
    step: String,
}

impl Memory {
    /// Empty tables of a given size.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        Self { actual: Actual::default(), writes: 0, capacity }
    }

    fn fits(&self) -> bool {
        let Self { actual, capacity, .. } = self;
        actual.frontends.len() <= capacity.frontends as usize
            && actual.addresses.len() <= capacity.addresses as usize
            && actual.sources.len() <= capacity.sources as usize
            && actual.services.len() <= capacity.services as usize
            && actual.ifaces.len() <= capacity.ifaces as usize
            && actual.routes.len() <= capacity.routes as usize
            && actual.services.keys().next_back().is_none_or(|id| *id < capacity.services)
            && actual.slots.last().is_none_or(|slot| slot < capacity.slots)
            && actual.backends.last().is_none_or(|index| index < capacity.backends)
    }
}

impl Datapath for Memory {
    type Error = TableFull;

    fn read(&mut self) -> Result<Actual, TableFull> {
        Ok(self.actual.clone())
    }

    fn apply(&mut self, steps: &[Step]) -> Result<(), (usize, TableFull)> {
        for (done, step) in steps.iter().enumerate() {
            self.actual.apply(step);
            if !self.fits() {
                return Err((done, TableFull { step: step.to_string() }));
            }
            self.writes += 1;
        }
        Ok(())
    }
}

/// When a [`Faulty`] data path fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Never.
    Never,
    /// Once, at the nth step from now (0 is the next one).
    At(usize),
    /// At any step, so many times in a thousand, by a generator that starts here.
    Chance {
        /// How often.
        per_mille: u32,
        /// State of the generator.
        state: u64,
    },
}

/// A data path over another one that fails when told to. Steps before the failure are done.
#[derive(Clone, Debug)]
pub struct Faulty<D> {
    /// The data path that does the work.
    pub inner: D,
    /// When the next failure comes.
    pub fault: Fault,
}

/// Why a [`Faulty`] data path failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultyError<E = Infallible> {
    /// As told.
    #[error("cannot do `{0}`: told to fail")]
    Injected(String),
    /// By itself.
    #[error(transparent)]
    Inner(E),
}

impl Fault {
    fn strikes(&mut self) -> bool {
        match self {
            Self::Never => false,
            Self::At(0) => {
                *self = Self::Never;
                true
            }
            Self::At(left) => {
                *left -= 1;
                false
            }
            Self::Chance { per_mille, state } => {
                // SplitMix64 (Steele, Lea, Flood 2014): any seed will do.
                *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = *state;
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                (z ^ (z >> 31)) % 1000 < u64::from(*per_mille)
            }
        }
    }
}

impl<D: Datapath> Datapath for Faulty<D> {
    type Error = FaultyError<D::Error>;

    fn read(&mut self) -> Result<Actual, Self::Error> {
        self.inner.read().map_err(FaultyError::Inner)
    }

    fn apply(&mut self, steps: &[Step]) -> Result<(), (usize, Self::Error)> {
        for (done, step) in steps.iter().enumerate() {
            if self.fault.strikes() {
                return Err((done, FaultyError::Injected(step.to_string())));
            }
            self.inner.apply(std::slice::from_ref(step)).map_err(|(_, e)| (done, FaultyError::Inner(e)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::addr::Addr;

    use super::*;

    fn steps(n: u32) -> Vec<Step> {
        (0..n).map(|n| Step::PutAddress(Addr::v4(n), 1)).collect()
    }

    #[test]
    fn a_full_table_ends_the_plan_at_the_step_that_overflows() {
        let mut memory = Memory::new(Capacity { addresses: 3, ..Capacity::default() });
        let (done, error) = memory.apply(&steps(5)).unwrap_err();
        assert_eq!((done, memory.writes), (3, 3));
        assert!(
            error.to_string().contains("address 0.0.0.3") || error.to_string().contains("address 3.0.0.0")
        );
    }

    #[test]
    fn a_fault_strikes_once_and_what_came_before_is_done() {
        let mut faulty = Faulty { inner: Memory::default(), fault: Fault::At(2) };
        let (done, error) = faulty.apply(&steps(5)).unwrap_err();
        assert!(matches!(error, FaultyError::Injected(_)));
        assert_eq!((done, faulty.inner.writes), (2, 2));
        assert!(faulty.apply(&steps(5)).is_ok());
        assert_eq!(faulty.inner.actual.addresses.len(), 5);
    }

    #[test]
    fn chance_strikes_about_as_often_as_told_and_the_same_way_each_time() {
        let count = |seed| {
            let mut fault = Fault::Chance { per_mille: 100, state: seed };
            (0..10_000).filter(|_| fault.strikes()).count()
        };
        assert!((800..1200).contains(&count(1)), "{}", count(1));
        assert_eq!(count(7), count(7));
    }
}

//! Who gets which number: ids one by one, slots in runs.
//!
//! A program that read an entry just before it changed may still follow it, so what is given back rests
//! for [`GRACE_MS`] before it is handed out again. At the start nothing rests: the tables are read only when no program
//! follows what an earlier agent has changed ([`crate::datapath::Datapath::read`]), so that an agent that is started again
//! and again has as many numbers to give as one that runs for ever.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proxy_common::abi::Run;

/// How long a number rests after nothing in the tables refers to it any more. A program runs for
/// microseconds; the rest is for a virtual CPU that is taken off its core in the middle of one.
pub const GRACE_MS: u64 = 2_000;

/// Single ids: the lowest free one first, so that tables stay dense.
#[derive(Debug)]
pub(super) struct IdPool {
    /// Lowest id that was never used.
    next: u32,
    /// First id past the end of the table.
    limit: u32,
    free: BTreeSet<u32>,
    /// Given back, with the time; oldest first.
    resting: VecDeque<(u64, u32)>,
}

impl IdPool {
    /// All ids are free but those in use.
    pub(super) fn new(limit: u32, used: &BTreeSet<u32>) -> Self {
        // What lies past the end is not ours and never handed out.
        let highest = used.range(..limit).next_back().copied().unwrap_or(0);
        let free = (1..=highest).filter(|id| !used.contains(id)).collect();
        Self { next: highest + 1, limit, free, resting: VecDeque::new() }
    }

    pub(super) fn take(&mut self) -> Option<u32> {
        if let Some(id) = self.free.pop_first() {
            return Some(id);
        }
        let id = (self.next < self.limit).then_some(self.next)?;
        self.next += 1;
        Some(id)
    }

    pub(super) fn release(&mut self, id: u32, now_ms: u64) {
        // 0 is never used, and what lies past the end was not ours.
        if (1..self.limit).contains(&id) {
            self.resting.push_back((now_ms, id));
        }
    }

    /// Ends the rest of what has rested long enough.
    pub(super) fn settle(&mut self, now_ms: u64) {
        while let Some((_, id)) = self.resting.pop_front_if(|(since, _)| rested(*since, now_ms)) {
            self.free.insert(id);
        }
    }

    pub(super) fn available(&self) -> usize {
        self.free.len() + self.limit.saturating_sub(self.next) as usize
    }

    pub(super) fn resting(&self) -> usize {
        self.resting.len()
    }

    /// Ids that are neither free nor resting.
    pub(super) fn used(&self) -> usize {
        self.next as usize - 1 - self.free.len() - self.resting.len()
    }
}

/// Runs of slots: first fit over the free intervals, neighbours joined.
#[derive(Debug)]
pub(super) struct RunPool {
    /// First slot past the end of the table.
    limit: u32,
    /// First slot → number of slots.
    free: BTreeMap<u32, u32>,
    available: usize,
    resting: VecDeque<(u64, Run)>,
    resting_slots: usize,
}

impl RunPool {
    /// All slots are free but those of `used`, which may overlap.
    pub(super) fn new(limit: u32, used: &BTreeSet<Run>) -> Self {
        let mut pool =
            Self { limit, free: BTreeMap::new(), available: 0, resting: VecDeque::new(), resting_slots: 0 };
        let mut from = 1;
        let end = Run { first: limit, count: 0 };
        for run in used.iter().filter(|run| run.count != 0).chain([&end]) {
            let gap_end = run.first.min(limit);
            if from < gap_end {
                pool.give(Run { first: from, count: gap_end - from });
            }
            from = from.max(run.first.saturating_add(run.count));
        }
        pool
    }

    pub(super) fn take(&mut self, count: usize) -> Option<Run> {
        let count = u32::try_from(count).ok()?;
        let (first, length) = self.free.iter().find(|(_, length)| **length >= count)?;
        let (first, length) = (*first, *length);
        self.free.remove(&first);
        if length > count {
            self.free.insert(first + count, length - count);
        }
        self.available -= count as usize;
        Some(Run { first, count })
    }

    /// Takes back at once a run that nobody has seen.
    pub(super) fn give(&mut self, run: Run) {
        if run.count == 0 {
            return;
        }
        self.available += run.count as usize;
        let Run { mut first, mut count } = run;
        if let Some((before, length)) = self.free.range(..first).next_back() {
            let (before, length) = (*before, *length);
            if before + length == first {
                self.free.remove(&before);
                (first, count) = (before, length + count);
            }
        }
        if let Some(length) = self.free.remove(&(first + count)) {
            count += length;
        }
        self.free.insert(first, count);
    }

    pub(super) fn release(&mut self, run: Run, now_ms: u64) {
        self.resting_slots += run.count as usize;
        self.resting.push_back((now_ms, run));
    }

    pub(super) fn settle(&mut self, now_ms: u64) {
        while let Some((_, run)) = self.resting.pop_front_if(|(since, _)| rested(*since, now_ms)) {
            self.resting_slots -= run.count as usize;
            self.give(run);
        }
    }

    pub(super) fn available(&self) -> usize {
        self.available
    }

    pub(super) fn resting(&self) -> usize {
        self.resting_slots
    }

    /// Slots that are neither free nor resting.
    pub(super) fn used(&self) -> usize {
        (self.limit as usize).saturating_sub(1 + self.available + self.resting_slots)
    }
}

fn rested(since_ms: u64, now_ms: u64) -> bool {
    now_ms >= since_ms.saturating_add(GRACE_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u32, count: u32) -> Run {
        Run { first, count }
    }

    #[test]
    fn an_id_rests_before_it_is_handed_out_again() {
        let mut pool = IdPool::new(4, &BTreeSet::new());
        assert_eq!([pool.take(), pool.take(), pool.take(), pool.take()], [Some(1), Some(2), Some(3), None]);
        pool.release(2, 100);
        pool.settle(100 + GRACE_MS - 1);
        assert_eq!((pool.available(), pool.resting(), pool.used(), pool.take()), (0, 1, 2, None));
        pool.settle(100 + GRACE_MS);
        assert_eq!((pool.available(), pool.resting(), pool.take()), (1, 0, Some(2)));
    }

    #[test]
    fn what_nobody_uses_at_the_start_is_free_at_once() {
        let mut pool = IdPool::new(6, &BTreeSet::from([1, 4, 9]));
        assert_eq!((pool.available(), pool.resting(), pool.used()), (3, 0, 2));
        assert_eq!([pool.take(), pool.take(), pool.take(), pool.take()], [Some(2), Some(3), Some(5), None]);
    }

    #[test]
    fn runs_are_first_fit_and_neighbours_join() {
        let mut pool = RunPool::new(11, &BTreeSet::new());
        assert_eq!(
            (pool.take(3), pool.take(4), pool.take(3)),
            (Some(run(1, 3)), Some(run(4, 4)), Some(run(8, 3)))
        );
        assert_eq!((pool.take(1), pool.available()), (None, 0));
        pool.release(run(8, 3), 0);
        pool.release(run(1, 3), 0);
        pool.release(run(4, 4), 1);
        pool.settle(GRACE_MS);
        assert_eq!((pool.available(), pool.resting(), pool.used(), pool.take(4)), (6, 4, 0, None));
        pool.settle(GRACE_MS + 1);
        assert_eq!(pool.take(10), Some(run(1, 10)));
    }

    #[test]
    fn runs_in_use_at_the_start_leave_the_gaps_free() {
        // 2-3 used, 8-11 used twice over, and one that leaves the table.
        let used = BTreeSet::from([run(2, 2), run(8, 3), run(9, 3), run(20, 3)]);
        let pool = RunPool::new(14, &used);
        assert_eq!((pool.available(), pool.resting(), pool.used()), (7, 0, 6));
        assert_eq!(pool.free, BTreeMap::from([(1, 1), (4, 4), (12, 2)]));
    }
}

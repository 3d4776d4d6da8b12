//! When to do the next sync: at most so often, at least so often, again after a failure.
//!
//! No clock of its own: times are milliseconds that the caller passes in.

use agent_core::model::Urgency;

/// How often syncs are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long a request that is not urgent waits for what may belong to it.
    pub settle_ms: u64,
    /// Least time from the end of a sync to the start of the next (Y-18).
    pub min_gap_ms: u64,
    /// Longest time from the end of a sync to the start of the next, wanted or not (Y-20).
    pub max_gap_ms: u64,
    /// Time from the first failure to the next try; doubled with each further failure.
    pub retry_first_ms: u64,
    /// Longest time from a failure to the next try (Y-19).
    pub retry_max_ms: u64,
}

/// Requests in, due times out.
#[derive(Clone, Debug)]
pub struct SyncRunner {
    limits: Limits,
    /// The first request that no successful sync has answered yet.
    queued_ms: Option<u64>,
    /// The first request since the last sync began.
    requested_ms: Option<u64>,
    /// The first of them that is to settle.
    settling_ms: Option<u64>,
    /// The end of the last sync, or when all began.
    ended_ms: u64,
    /// Whether a sync has ended at all.
    ended: bool,
    /// A sync wanted at a set time.
    not_later_ms: Option<u64>,
    failures: u32,
}

impl SyncRunner {
    /// Nothing requested, nothing done.
    #[must_use]
    pub const fn new(limits: Limits, now_ms: u64) -> Self {
        Self {
            limits,
            queued_ms: None,
            requested_ms: None,
            settling_ms: None,
            ended_ms: now_ms,
            ended: false,
            not_later_ms: None,
            failures: 0,
        }
    }

    /// Something has changed. While something settles all wait for it: a sync is of everything that has changed.
    pub fn request(&mut self, now_ms: u64, urgency: Urgency) {
        self.queued_ms.get_or_insert(now_ms);
        self.requested_ms.get_or_insert(now_ms);
        match urgency {
            Urgency::AtOnce => {}
            Urgency::Settled => drop(self.settling_ms.get_or_insert(now_ms)),
        }
    }

    /// A sync is wanted at `at_ms` even if nothing changes until then.
    pub fn request_at(&mut self, at_ms: u64) {
        self.not_later_ms = Some(self.not_later_ms.map_or(at_ms, |before| before.min(at_ms)));
    }

    /// When the next sync is due; may be in the past.
    #[must_use]
    pub fn due_ms(&self) -> u64 {
        let Limits { settle_ms, min_gap_ms, max_gap_ms, .. } = self.limits;
        let after = |gap| self.ended_ms.saturating_add(gap);
        let latest = if self.failures == 0 { after(max_gap_ms) } else { after(self.retry_gap_ms()) };
        let settled = self.settling_ms.map(|since| since.saturating_add(settle_ms));
        let wanted = settled.or(self.requested_ms);
        let due = [wanted, self.not_later_ms].into_iter().flatten().fold(latest, u64::min);
        // The first sync of all waits for nothing; a retry keeps the gap like any other sync.
        if self.ended { due.max(after(min_gap_ms)) } else { due }
    }

    /// How long to sleep until the next sync.
    #[must_use]
    pub fn wait_ms(&self, now_ms: u64) -> u64 {
        self.due_ms().saturating_sub(now_ms)
    }

    /// Whether it is time.
    #[must_use]
    pub fn is_due(&self, now_ms: u64) -> bool {
        self.wait_ms(now_ms) == 0
    }

    /// Since when the oldest request waits for a successful sync: what health is measured by (H-4).
    #[must_use]
    pub const fn queued_ms(&self) -> Option<u64> {
        self.queued_ms
    }

    /// Syncs that have failed since the last one that did not.
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// A sync begins: it answers all requests so far. Later ones ask for another.
    pub fn begin(&mut self) {
        self.requested_ms = None;
        self.settling_ms = None;
        self.not_later_ms = None;
    }

    /// The sync has succeeded.
    pub fn succeeded(&mut self, now_ms: u64) {
        self.end(now_ms);
        self.failures = 0;
        self.queued_ms = self.requested_ms;
    }

    /// The sync has failed: there will be another soon, and sooner if something changes.
    pub fn failed(&mut self, now_ms: u64) {
        self.end(now_ms);
        self.failures = self.failures.saturating_add(1);
        self.queued_ms.get_or_insert(now_ms);
    }

    fn end(&mut self, now_ms: u64) {
        self.ended_ms = now_ms;
        self.ended = true;
    }

    fn retry_gap_ms(&self) -> u64 {
        let doublings = self.failures.saturating_sub(1).min(32);
        self.limits.retry_first_ms.saturating_mul(1 << doublings).min(self.limits.retry_max_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        settle_ms: 5,
        min_gap_ms: 100,
        max_gap_ms: 3_600_000,
        retry_first_ms: 200,
        retry_max_ms: 1_000,
    };

    fn idle_since(ended_ms: u64) -> SyncRunner {
        let mut runner = SyncRunner::new(LIMITS, 0);
        runner.begin();
        runner.succeeded(ended_ms);
        runner
    }

    #[test]
    fn an_urgent_request_after_an_idle_time_waits_for_nothing() {
        // Y-18.
        let mut runner = idle_since(1_000);
        runner.request(5_000, Urgency::AtOnce);
        assert!(runner.is_due(5_000));
        runner.begin();
        runner.succeeded(5_001);
        // What follows in the same burst keeps the gap.
        runner.request(5_002, Urgency::AtOnce);
        assert_eq!(runner.due_ms(), 5_101);
    }

    #[test]
    fn what_is_urgent_waits_for_what_settles_and_not_the_other_way_round() {
        // Y-18.
        let mut runner = idle_since(1_000);
        runner.request(5_000, Urgency::Settled);
        runner.request(5_002, Urgency::AtOnce);
        assert_eq!((runner.due_ms(), runner.queued_ms()), (5_005, Some(5_000)));
        runner.begin();
        runner.succeeded(5_006);
        // Of what was asked for while the gap lasted, only the part of it that has not settled is waited for.
        runner.request(5_010, Urgency::AtOnce);
        runner.request(5_104, Urgency::Settled);
        assert_eq!(runner.due_ms(), 5_109);
        runner.begin();
        runner.succeeded(5_110);
        runner.request(6_000, Urgency::AtOnce);
        assert!(runner.is_due(6_000), "a settling request is over with its sync");
    }

    #[test]
    fn a_request_that_settles_after_an_idle_time_waits_only_for_its_burst() {
        // Y-18.
        let mut runner = idle_since(1_000);
        runner.request(5_000, Urgency::Settled);
        runner.request(5_004, Urgency::Settled);
        assert_eq!(runner.due_ms(), 5_005);
        assert!(!runner.is_due(5_004) && runner.is_due(5_005));
        assert_eq!(runner.wait_ms(5_001), 4);
    }

    #[test]
    fn the_first_pass_of_all_keeps_no_gap() {
        let mut runner = SyncRunner::new(LIMITS, 1_000);
        runner.request(1_010, Urgency::Settled);
        assert_eq!(runner.due_ms(), 1_015);
    }

    #[test]
    fn requests_in_a_row_are_answered_at_most_so_often() {
        // Y-18.
        let mut runner = idle_since(1_000);
        runner.request(1_001, Urgency::Settled);
        assert_eq!(runner.due_ms(), 1_100);
        runner.begin();
        runner.succeeded(1_110);
        runner.request(1_111, Urgency::Settled);
        assert_eq!(runner.due_ms(), 1_210);
    }

    #[test]
    fn a_pass_comes_at_least_so_often() {
        // Y-20.
        let runner = idle_since(1_000);
        assert_eq!(runner.due_ms(), 3_601_000);
    }

    #[test]
    fn a_request_during_a_pass_asks_for_another() {
        let mut runner = idle_since(0);
        runner.request(500, Urgency::Settled);
        runner.begin();
        runner.request(510, Urgency::Settled);
        runner.succeeded(520);
        assert_eq!((runner.queued_ms(), runner.due_ms()), (Some(510), 620));
        runner.begin();
        runner.succeeded(630);
        assert_eq!((runner.queued_ms(), runner.due_ms()), (None, 3_600_630));
    }

    #[test]
    fn failures_are_retried_ever_later_up_to_a_limit() {
        // Y-19.
        let mut runner = idle_since(0);
        runner.request(1_000, Urgency::Settled);
        let mut gaps = Vec::new();
        for n in 0..5 {
            let now = 10_000 * (n + 1);
            runner.begin();
            runner.failed(now);
            gaps.push(runner.due_ms() - now);
        }
        assert_eq!(gaps, [200, 400, 800, 1_000, 1_000]);
        assert_eq!((runner.failures(), runner.queued_ms()), (5, Some(1_000)));
        runner.begin();
        runner.succeeded(60_000);
        assert_eq!((runner.failures(), runner.queued_ms(), runner.due_ms()), (0, None, 3_660_000));
    }

    #[test]
    fn a_request_after_a_failure_comes_sooner_but_keeps_the_gap() {
        // Y-19.
        let mut runner = idle_since(0);
        for now in [10_000, 20_000, 30_000, 40_000] {
            runner.begin();
            runner.failed(now);
        }
        runner.request(40_010, Urgency::Settled);
        assert_eq!(runner.due_ms(), 40_100);
        runner.begin();
        runner.failed(40_110);
        runner.request(40_500, Urgency::Settled);
        assert_eq!(runner.due_ms(), 40_505);
    }

    #[test]
    fn a_pass_can_be_ordered_for_a_time() {
        let mut runner = idle_since(0);
        runner.request_at(9_000);
        runner.request_at(7_000);
        assert_eq!((runner.due_ms(), runner.queued_ms()), (7_000, None));
        runner.begin();
        runner.succeeded(7_001);
        assert_eq!(runner.due_ms(), 3_607_001);
    }
}

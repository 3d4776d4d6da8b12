//! Whether an idle watch is stalled: nothing happens, or the server does not send its events (Y-5).
//!
//! Bookmarks are no guarantee: without progress notifications from etcd a server sends none while a kind does not change.
//! But if its cache is newer than the resource version of a watch, the watch brings an event, or, two seconds before its
//! timeout, a bookmark. So an idle watch is followed by a short one, and the server is asked for the resource version of its
//! cache. If that was newer and the short watch ends without an event, the watch is stalled.
//!
//! Only answers of the same server are compared. Another one may learn of progress at another time.

use std::time::Duration;

use tokio::time::Instant;

use crate::api::backoff::between;
use agent_core::model::Kind;

/// The timeout of a normal watch, after which the server closes it.
const WATCH_TIMEOUT: [Duration; 2] = [Duration::from_secs(240), Duration::from_secs(290)];
/// How much later than its timeout a short watch may end.
const LATE: Duration = Duration::from_secs(3);
/// How much earlier it may end.
const EARLY: Duration = Duration::from_secs(1);

/// After so many idle rounds each next one is twice as long, up to [`LONGEST`]: what has been at rest for a minute mostly
/// stays so, and thousands of nodes ask.
const STEADY: u32 = 4;
/// The longest rounds. Less than it takes for a bookmark to be missed, after which there would be a list.
const LONGEST: [Duration; 2] = [Duration::from_secs(90), Duration::from_secs(120)];

/// After how long without an event a watch is restarted. Endpoints change most and matter most: only in the smallest
/// clusters are they idle for so long. Where nothing changes at all a node sends one request in seven seconds at first, and
/// one in half a minute later.
pub(super) fn idle_after(kind: Kind) -> Duration {
    between(idle_range(kind))
}

fn idle_range(kind: Kind) -> [Duration; 2] {
    let seconds = match kind {
        Kind::Slice => [10, 15],
        Kind::Service => [20, 30],
        Kind::Node | Kind::ServiceCidr | Kind::Pod => [60, 90],
    };
    seconds.map(Duration::from_secs)
}

#[derive(Debug, Default)]
pub(super) struct StallDetector {
    /// Watches in a row in which nothing has changed; after the first they are short.
    quiet: u32,
    /// When the current watch ends, if it is a short one.
    ends_at: Option<Instant>,
    /// The server is to be asked for its resource version.
    pub(super) ask_version: bool,
    /// The generation of the server whose cache was newer: its watch has to bring an event.
    pub(super) due_from: Option<u64>,
    /// Stalled watches in a row.
    stalls: u32,
}

impl StallDetector {
    /// The timeout of the watch that starts now, in seconds. One that starts with a list is never short.
    pub(super) fn begin_watch(&mut self, kind: Kind, lists: bool) -> u32 {
        let short = self.quiet > 0 && !lists;
        let seconds = if short { between(self.round(kind)) } else { between(WATCH_TIMEOUT) }.as_secs();
        self.quiet += u32::from(short);
        self.ends_at = short.then(|| Instant::now() + Duration::from_secs(seconds));
        u32::try_from(seconds).unwrap_or(u32::MAX)
    }

    /// How long the next short watch is.
    fn round(&self, kind: Kind) -> [Duration; 2] {
        let range = idle_range(kind);
        // Something is suspected: that is not to take long.
        if self.due_from.is_some() || self.stalls > 0 {
            return range;
        }
        let times = 1 << self.quiet.saturating_sub(STEADY).min(4);
        [0, 1].map(|end| (range[end] * times).min(LONGEST[end]))
    }

    /// When the watch counts as idle: a short one when it should have ended, another some time after its last event.
    pub(super) fn deadline(&self, kind: Kind) -> Instant {
        let short = self.ends_at.filter(|_| self.quiet > 0);
        short.map_or_else(|| Instant::now() + idle_after(kind), |end| end + LATE)
    }

    /// Whether a watch that ends now is a short one that has reached its timeout.
    pub(super) fn is_ending(&self) -> bool {
        self.ends_at.is_some_and(|end| Instant::now() + EARLY >= end)
    }

    /// An event or a bookmark came. Whether the watches were stalled before.
    pub(super) fn on_event(&mut self, change: bool) -> bool {
        if change {
            self.quiet = 0;
        }
        self.due_from = None;
        std::mem::take(&mut self.stalls) > 0
    }

    /// Something has gone wrong, or another server is in use: rounds are short again until it has proved itself.
    pub(super) fn suspect(&mut self) {
        self.quiet = self.quiet.min(1);
    }

    /// The answer of the server only counts for the watch that follows it.
    pub(super) fn forget_version(&mut self) {
        self.due_from = None;
    }

    /// A watch of `server` is given up because it was idle. Whether it was stalled.
    pub(super) fn on_idle(&mut self, server: u64) -> bool {
        self.quiet = self.quiet.max(1);
        let owed = self.due_from.take() == Some(server) && self.ends_at.is_some();
        self.stalls += u32::from(owed);
        self.ask_version = !owed;
        owed
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.stalls > 0
    }

    /// Whether to relist now that all `servers` are stalled: after the first round, the second, the fourth, and so on. So
    /// changes are seen soon, without a list each time.
    pub(super) fn needs_relist(&self, servers: usize) -> bool {
        let servers = u32::try_from(servers.max(1)).unwrap_or(u32::MAX);
        self.stalls.is_multiple_of(servers) && (self.stalls / servers).is_power_of_two()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A short watch of this server ends without an event.
    fn idle(stall: &mut StallDetector, server: u64) -> bool {
        stall.begin_watch(Kind::Slice, false);
        assert!(stall.ends_at.is_some());
        stall.on_idle(server)
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_watch_that_brings_nothing_is_followed_by_a_short_one() {
        let mut stall = StallDetector::default();
        assert!(stall.begin_watch(Kind::Slice, false) >= 240 && !stall.is_ending());
        assert!(!stall.on_idle(1) && stall.ask_version);
        let seconds = stall.begin_watch(Kind::Slice, false);
        assert!((10..=15).contains(&seconds) && !stall.is_ending(), "{seconds}");
        tokio::time::advance(Duration::from_secs(seconds.into())).await;
        assert!(stall.is_ending());
        // After a bookmark watches stay short, after a change they do not; one with a list never is.
        stall.on_event(false);
        assert!(stall.begin_watch(Kind::Slice, true) >= 240);
        assert!(stall.begin_watch(Kind::Slice, false) <= 15);
        stall.on_event(true);
        assert!(stall.begin_watch(Kind::Slice, false) >= 240);
    }

    #[test]
    fn what_stays_at_rest_is_asked_for_less_and_less_until_something_changes() {
        for kind in [Kind::Slice, Kind::Service, Kind::Node] {
            let mut stall = StallDetector::default();
            stall.begin_watch(kind, false);
            assert!(!stall.on_idle(1));
            let rounds: Vec<u32> = (0..16).map(|_| stall.begin_watch(kind, false)).collect();
            let [least, most] = idle_range(kind).map(|end| u32::try_from(end.as_secs()).unwrap());
            assert!(rounds[..4].iter().all(|seconds| (least..=most).contains(seconds)), "{rounds:?}");
            assert!(rounds[8..].iter().all(|seconds| (90..=120).contains(seconds)), "{rounds:?}");
            // What is suspected is looked into at once, and a change begins anew.
            stall.due_from = Some(1);
            assert!((least..=most).contains(&stall.begin_watch(kind, false)));
            stall.on_event(true);
            assert!(stall.begin_watch(kind, false) >= 240);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_bookmark_does_not_cut_a_long_round_short() {
        let mut stall = StallDetector { quiet: 16, ..StallDetector::default() };
        let seconds = stall.begin_watch(Kind::Slice, false);
        let end = Instant::now() + Duration::from_secs(seconds.into());
        stall.on_event(false);
        assert_eq!(stall.deadline(Kind::Slice), end + LATE);
        stall.on_event(true);
        assert!(stall.deadline(Kind::Slice) <= Instant::now() + Duration::from_secs(15));
    }

    #[test]
    fn a_watch_without_the_event_that_is_due_is_stalled() {
        let mut stall = StallDetector::default();
        assert!(!long_idle(&mut stall), "no event is due");
        assert!(!idle(&mut stall, 1), "still none");
        stall.due_from = Some(1);
        assert!(!idle(&mut stall, 2), "no event of another server is due");
        stall.due_from = Some(2);
        stall.on_event(false);
        assert!(!idle(&mut stall, 2), "an event came");
        stall.due_from = Some(2);
        assert!(idle(&mut stall, 2) && stall.is_stalled());
        assert!(stall.on_event(false) && !stall.is_stalled());
    }

    fn long_idle(stall: &mut StallDetector) -> bool {
        stall.begin_watch(Kind::Slice, false);
        assert_eq!(stall.ends_at, None);
        stall.on_idle(1)
    }

    #[test]
    fn relists_grow_rarer_while_all_servers_are_stalled() {
        for servers in [1, 3] {
            let mut stall = StallDetector { quiet: 1, ..StallDetector::default() };
            let mut lists = Vec::new();
            for time in 1..=24 {
                stall.due_from = Some(1);
                assert!(idle(&mut stall, 1));
                if stall.needs_relist(servers) {
                    lists.push(time);
                }
            }
            let all = [1, 2, 4, 8, 16].map(|times| times * i32::try_from(servers).unwrap());
            assert_eq!(lists, all.into_iter().filter(|time| *time <= 24).collect::<Vec<_>>());
        }
    }
}

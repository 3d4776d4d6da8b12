//! A watch that is silent: because nothing happens, or because the server keeps it from us (Y-5).
//!
//! No server promises bookmarks, and one without progress notifications from etcd sends none while a kind rests. But
//! one word is sure: when its cache is further than the version from which a watch was begun, the watch brings an
//! event, or, two seconds before its end, a bookmark. So after silence a watch is begun that is to end soon, and the server
//! is asked how far it is. If it is further and the watch has ended without a word, it withholds something.
//!
//! It is that server's own word against its own watch. What another server has come to proves nothing: it hears of progress
//! at another time.

use std::cmp::Ordering;
use std::fmt::Debug;
use std::hash::Hash;
use std::time::Duration;

use kube::Api;
use kube::api::{ListParams, VersionMatch};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};

use super::backoff::between;
use super::feed::Feed;
use super::follow::Progress;
use super::heard::Heard;
use agent_core::model::Kind;

/// How long a watch may last: the server ends it then.
const LASTS: [Duration; 2] = [Duration::from_secs(240), Duration::from_secs(290)];
/// How much later than it was asked to a watch may end.
const LATE: Duration = Duration::from_secs(3);
/// How much earlier the end that was asked for may seem to come.
const EARLY: Duration = Duration::from_secs(1);
/// How long the server may take to say how far it is. Nothing is watched meanwhile.
const ANSWERS: Duration = Duration::from_secs(2);

/// After which silence a watch is begun anew. Endpoints change most and matter most: in any but the smallest cluster
/// they are never silent for so long. In one where nothing happens at all a node makes one request in seven seconds.
pub(super) fn silence(kind: Kind) -> Duration {
    let seconds = match kind {
        Kind::Slice => [10, 15],
        Kind::Service => [20, 30],
        Kind::Node | Kind::ServiceCidr | Kind::Pod => [60, 90],
    };
    between(seconds.map(Duration::from_secs))
}

/// What the silence of a kind's watches has shown so far.
#[derive(Debug, Default)]
pub(super) struct Silence {
    /// Nothing has changed lately: watches are short.
    quiet: bool,
    /// When the watch that runs is to end, if it is a short one.
    due: Option<Instant>,
    /// The server is to be asked how far it is.
    unsure: bool,
    /// Who owes us a word, as [`Servers`](super::servers::Servers) counts.
    owes: Option<u64>,
    /// How often in a row somebody has withheld something.
    withheld: u32,
}

impl Silence {
    /// A watch is begun: how long it is to last, in seconds. One that begins with a list is never short.
    pub(super) fn begin(&mut self, kind: Kind, lists: bool) -> u32 {
        let short = self.quiet && !lists;
        let seconds = if short { silence(kind) } else { between(LASTS) }.as_secs();
        self.due = short.then(|| Instant::now() + Duration::from_secs(seconds));
        u32::try_from(seconds).unwrap_or(u32::MAX)
    }

    /// Until when the watch may say nothing.
    pub(super) fn patience(&self, kind: Kind) -> Instant {
        self.due.map_or_else(|| Instant::now() + silence(kind), |due| due + LATE)
    }

    /// Whether a watch that ends now does so because it was to be short.
    pub(super) fn is_due(&self) -> bool {
        self.due.is_some_and(|due| Instant::now() + EARLY >= due)
    }

    /// A word of the server; whether it withheld something before.
    pub(super) fn broken(&mut self, change: bool) -> bool {
        self.quiet &= !change;
        self.owes = None;
        std::mem::take(&mut self.withheld) > 0
    }

    /// What a server owes it owes to the watch that is begun next.
    pub(super) fn forgive(&mut self) {
        self.owes = None;
    }

    /// A watch of `server` is given up because of silence; whether something was withheld.
    pub(super) fn lasted(&mut self, server: u64) -> bool {
        self.quiet = true;
        let owed = self.owes.take() == Some(server) && self.due.is_some();
        self.withheld += u32::from(owed);
        self.unsure = !owed;
        owed
    }

    /// Whether the last word of a server is that it has none.
    pub(super) fn is_withheld(&self) -> bool {
        self.withheld > 0
    }

    /// Whether a list is needed now that each of `servers` has withheld something: after one time around, two, four, and
    /// so on. What changes is seen soon then, and nobody is asked for lists all the time.
    pub(super) fn needs_list(&self, servers: usize) -> bool {
        let servers = u32::try_from(servers.max(1)).unwrap_or(u32::MAX);
        self.withheld.is_multiple_of(servers) && (self.withheld / servers).is_power_of_two()
    }
}

impl<K, T> Feed<K, T>
where
    K: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    T: Hash + Send + 'static,
{
    /// Asks a server whose watch was silent how far it is, by one object that may as well not be there: the version of
    /// such a list is that of the cache, from which the watch is fed, too.
    pub(super) async fn question(&self, api: &Api<Heard<K>>, progress: &mut Progress) {
        if !std::mem::take(&mut progress.silence.unsure) {
            return;
        }
        let server = *progress.moved.borrow();
        let params = ListParams {
            field_selector: Some("metadata.name=kubernetes".to_owned()),
            resource_version: Some("0".to_owned()),
            version_match: Some(VersionMatch::NotOlderThan),
            ..ListParams::default()
        };
        // The watch that is begun next will find out what is wrong.
        let Ok(Ok(list)) = timeout(ANSWERS, api.list(&params)).await else { return };
        let version = list.metadata.resource_version.and_then(|version| version.parse::<u64>().ok());
        match version.map(|version| version.cmp(&progress.newest)) {
            Some(Ordering::Greater) => progress.silence.owes = Some(server),
            // That is a word, too: there is nothing else to be told.
            Some(Ordering::Equal) => progress.heard = Instant::now(),
            Some(Ordering::Less) | None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A short watch of this server ends without a word.
    fn mute(silence: &mut Silence, server: u64) -> bool {
        silence.begin(Kind::Slice, false);
        assert!(silence.due.is_some());
        silence.lasted(server)
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_watch_that_brings_nothing_is_followed_by_a_short_one() {
        let mut silence = Silence::default();
        assert!(silence.begin(Kind::Slice, false) >= 240 && !silence.is_due());
        assert!(!silence.lasted(1) && silence.unsure);
        let seconds = silence.begin(Kind::Slice, false);
        assert!((10..=15).contains(&seconds) && !silence.is_due(), "{seconds}");
        tokio::time::advance(Duration::from_secs(seconds.into())).await;
        assert!(silence.is_due());
        // A bookmark leaves it so, a change does not, and a list lasts.
        silence.broken(false);
        assert!(silence.begin(Kind::Slice, true) >= 240);
        assert!(silence.begin(Kind::Slice, false) <= 15);
        silence.broken(true);
        assert!(silence.begin(Kind::Slice, false) >= 240);
    }

    #[test]
    fn who_owes_a_word_and_says_none_withholds_it() {
        let mut silence = Silence::default();
        assert!(!mute_long(&mut silence), "nothing is owed");
        assert!(!mute(&mut silence, 1), "nor is it now");
        silence.owes = Some(1);
        assert!(!mute(&mut silence, 2), "another server owes nothing");
        silence.owes = Some(2);
        silence.broken(false);
        assert!(!mute(&mut silence, 2), "it has said something");
        silence.owes = Some(2);
        assert!(mute(&mut silence, 2) && silence.is_withheld());
        assert!(silence.broken(false) && !silence.is_withheld());
    }

    fn mute_long(silence: &mut Silence) -> bool {
        silence.begin(Kind::Slice, false);
        assert_eq!(silence.due, None);
        silence.lasted(1)
    }

    #[test]
    fn lists_grow_rarer_while_all_servers_withhold_something() {
        for servers in [1, 3] {
            let mut silence = Silence { quiet: true, ..Silence::default() };
            let mut lists = Vec::new();
            for time in 1..=24 {
                silence.owes = Some(1);
                assert!(mute(&mut silence, 1));
                if silence.needs_list(servers) {
                    lists.push(time);
                }
            }
            let all = [1, 2, 4, 8, 16].map(|times| times * i32::try_from(servers).unwrap());
            assert_eq!(lists, all.into_iter().filter(|time| *time <= 24).collect::<Vec<_>>());
        }
    }
}

//! How to go on when a watch has ended: at once, after a pause, elsewhere, or with a new list.

use std::fmt::Debug;
use std::hash::Hash;
use std::time::Duration;

use futures::FutureExt;
use kube::core::Status;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep};

use super::backoff::between;
use super::end::{End, LIVED};
use super::feed::{Closed, Feed};
use super::follow::{Freshness, Progress, Shared};

/// Pause before another server is asked.
const ELSEWHERE: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(300)];
/// No event and no bookmark for this long, however often the watch was renewed: a server sends one a minute. It may
/// have been set back to a time before our version; a list tells.
const DEAF: Duration = Duration::from_secs(150);
/// A version that is too old is answered with a new list at once when the last such answer is this long ago.
const EXPIRED_ANEW: Duration = Duration::from_secs(10);
/// When all servers have refused, the next is asked after this many more refusals.
const REFUSALS: u32 = 8;
/// A kind that the server does not have, or does not show us, is asked for again after this time.
const REFUSED: Duration = Duration::from_secs(300);

impl<K, T> Feed<K, T>
where
    K: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    T: Hash + Send + 'static,
{
    /// Decides how to go on, and waits as long as that takes.
    pub(super) async fn after(
        &self,
        end: End,
        progress: &mut Progress,
        shared: &Shared,
    ) -> Result<(), Closed> {
        shared.requests.ended(self.what, end.name());
        let lived = match &end {
            End::Over(lived) | End::Broken(lived, _) => *lived,
            End::Silent | End::Withheld | End::Moved => LIVED,
            _ => Duration::ZERO,
        };
        if lived >= LIVED {
            progress.backoff.reset();
            (progress.cut, progress.busy, progress.refusals) = (0, None, 0);
        }
        progress.silence.forgive();
        let why = end.to_string();
        match &end {
            End::Silent => {
                if progress.heard.elapsed() >= DEAF {
                    tracing::info!(kind = self.what, "nothing was heard for long: new list");
                    (progress.version, progress.heard) = (None, Instant::now());
                }
            }
            End::Withheld => self.withheld(&why, progress, shared),
            End::Moved => {}
            End::Over(_) if lived >= LIVED => {}
            End::Over(_) | End::Broken(..) => {
                progress.cut += 1;
                // Once is chance: a server that ends, or a connection that was idle.
                if progress.cut == 1 {
                    sleep(between(ELSEWHERE)).await;
                } else {
                    self.elsewhere(&why, progress, shared).await?;
                }
            }
            End::Unreachable(_) => {
                // Whoever asks next waits until somebody may.
                self.warn_of(&why, progress, shared);
                self.line.connected(false).await?;
            }
            End::Endless => self.without_streaming("it does not say where the list ends", progress),
            End::Status(status) => return self.after_status(status, &why, progress, shared).await,
            End::Half | End::Unfit(_) => self.elsewhere(&why, progress, shared).await?,
            End::Unreadable(_) | End::Backwards { .. } => {
                progress.version = None;
                if progress.insists.is_some() {
                    progress.fresh = Freshness::Newest;
                }
                self.elsewhere(&why, progress, shared).await?;
            }
        }
        Ok(())
    }

    async fn after_status(
        &self,
        status: &Status,
        why: &str,
        progress: &mut Progress,
        shared: &Shared,
    ) -> Result<(), Closed> {
        match status.code {
            400 | 422 if progress.version.is_none() && progress.streaming => {
                self.without_streaming("it refuses it", progress);
                return Ok(());
            }
            410 => {
                // A list that has expired itself: only the newest is sure to be there.
                let listing = progress.version.take().is_none();
                if listing {
                    progress.fresh = Freshness::Newest;
                }
                // A server that has forgotten a version is well: nothing is to be waited for, the first time.
                let before = progress.expired.replace(Instant::now());
                if before.is_none_or(|at| at.elapsed() >= EXPIRED_ANEW) {
                    tracing::info!(kind = self.what, "the API server has forgotten our version: new list");
                    return Ok(());
                }
                return self.elsewhere(why, progress, shared).await;
            }
            504 if status.message.contains("Too large resource version") => {
                (progress.version, progress.fresh) = (None, Freshness::Newest);
                return self.elsewhere(why, progress, shared).await;
            }
            401 => shared.look.notify_one(),
            _ => {}
        }
        if self.line.is_optional() && matches!(status.code, 401 | 403 | 404 | 405) {
            self.go_without(why, progress).await;
            return Ok(());
        }
        match status.code {
            // Once it has its way, which the next request waits for: others may be no less busy.
            429 if progress.busy.replace(progress.generation) != Some(progress.generation) => {
                sleep(between(ELSEWHERE)).await;
                Ok(())
            }
            401 | 429 | 500.. => self.elsewhere(why, progress, shared).await,
            // A refusal: by one server that is not what it should be, or by all of them.
            _ => {
                progress.refusals += 1;
                let servers = u32::try_from(shared.servers.len()).unwrap_or(u32::MAX);
                if progress.refusals <= servers || progress.refusals.is_multiple_of(REFUSALS) {
                    self.elsewhere(why, progress, shared).await
                } else {
                    self.pause(why, progress, shared).await
                }
            }
        }
    }

    /// The server keeps something from us: the next one is asked, which goes on from our version. A list is read when all do so.
    fn withheld(&self, why: &str, progress: &mut Progress, shared: &Shared) {
        if progress.silence.needs_list(shared.servers.len()) || progress.heard.elapsed() >= DEAF {
            (progress.version, progress.heard) = (None, Instant::now());
        }
        if !shared.servers.blame(progress.generation, &format!("{}s: {why}", self.what)) {
            self.warn_of(why, progress, shared);
        }
    }

    fn without_streaming(&self, why: &str, progress: &mut Progress) {
        tracing::info!(kind = self.what, why, "the API server has no streaming lists: list, then watch");
        progress.streaming = false;
    }

    /// A server before 1.33, or one whose roles forbid it: nothing is known of these objects then (Y-16).
    async fn go_without(&self, why: &str, progress: &mut Progress) {
        if !std::mem::replace(&mut progress.refused, true) {
            tracing::info!(kind = self.what, why, "the API server does not show these: going without");
        }
        tokio::select! {
            () = sleep(REFUSED) => {}
            // Another server may show them.
            _ = progress.moved.changed() => {}
        }
    }

    /// Goes on with another server if there is one that was not left lately, else with the same after a pause.
    async fn elsewhere(&self, why: &str, progress: &mut Progress, shared: &Shared) -> Result<(), Closed> {
        if shared.servers.blame(progress.generation, &format!("{}s: {why}", self.what)) {
            sleep(between(ELSEWHERE)).await;
            return Ok(());
        }
        self.pause(why, progress, shared).await
    }

    async fn pause(&self, why: &str, progress: &mut Progress, shared: &Shared) -> Result<(), Closed> {
        self.warn_of(why, progress, shared);
        self.line.connected(false).await?;
        let pause = progress.backoff.pause();
        tracing::debug!(kind = self.what, ?pause, "pausing");
        tokio::select! {
            () = sleep(pause) => {}
            // Another server, or another account.
            _ = progress.moved.changed().fuse() => {}
        }
        Ok(())
    }

    /// Logs what is wrong when it is news, and has it shown.
    fn warn_of(&self, why: &str, progress: &mut Progress, shared: &Shared) {
        shared.servers.trouble(self.what, Some(format!("{}s: {why}", self.what)));
        if progress.said != why {
            tracing::warn!(kind = self.what, why, "cannot watch; what is known stays, trying again");
            why.clone_into(&mut progress.said);
        }
    }
}

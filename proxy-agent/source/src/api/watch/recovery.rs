//! What to do when a watch has ended: retry, back off, fail over, or relist.

use std::hash::Hash;
use std::time::Duration;

use futures::FutureExt;
use kube::core::Status;
use tokio::time::{Instant, sleep};

use super::end_reason::{EndReason, PROVEN_AFTER};
use super::progress::{ListVersion, Progress, Shared};
use super::reflector::{Closed, Reflector, Watched};
use crate::api::backoff::between;

/// Pause before a failover.
const FAILOVER_PAUSE: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(300)];
/// No event and no bookmark for this long, although the watch was restarted: a server sends a bookmark a minute. It may
/// have been restored to a state before our resource version, which only a relist shows.
const NO_EVENTS: Duration = Duration::from_secs(150);
/// A 410 leads to a relist at once if the last one is this long ago.
const RELIST_INTERVAL: Duration = Duration::from_secs(10);
/// When all servers have rejected a request, the next failover comes after this many more rejections.
const REJECTIONS_PER_FAILOVER: u32 = 8;
/// How long to wait before asking again for a kind that the server does not serve.
const UNAVAILABLE_PAUSE: Duration = Duration::from_secs(300);

impl<K: Watched, T: Hash + Send + 'static> Reflector<K, T> {
    /// Decides what to do after the end of a watch, and waits before the next attempt.
    pub(super) async fn recover(
        &self,
        end: EndReason,
        progress: &mut Progress,
        shared: &Shared,
    ) -> Result<(), Closed> {
        shared.requests.ended(self.resource, end.label());
        let lasted = match &end {
            EndReason::Closed(lasted) | EndReason::Broken(lasted, _) => *lasted,
            EndReason::Idle | EndReason::Stalled | EndReason::Reconnect => PROVEN_AFTER,
            _ => Duration::ZERO,
        };
        if lasted >= PROVEN_AFTER {
            progress.backoff.reset();
            (progress.short_watches, progress.throttled_by, progress.rejections) = (0, None, 0);
        }
        progress.stall.forget_version();
        if !matches!(end, EndReason::Idle | EndReason::Closed(_)) {
            progress.stall.suspect();
        }
        let why = end.to_string();
        match &end {
            EndReason::Idle => {
                if progress.last_event.elapsed() >= NO_EVENTS {
                    tracing::info!(kind = self.resource, "no event for a long time: relisting");
                    (progress.version, progress.last_event) = (None, Instant::now());
                }
            }
            EndReason::Stalled => self.stalled(&why, progress, shared),
            EndReason::Reconnect => {}
            EndReason::Closed(_) if lasted >= PROVEN_AFTER => {}
            EndReason::Closed(_) | EndReason::Broken(..) => {
                progress.short_watches += 1;
                // The first time is no failover: a server may restart, or a connection have been idle.
                if progress.short_watches == 1 {
                    shared.servers.broken().await;
                } else {
                    self.fail_over(&why, progress, shared).await?;
                }
            }
            EndReason::Unreachable(_) => {
                // No backoff: `Servers::admit` delays the next request.
                self.warn_of(&why, progress, shared);
                self.output.connected(false).await?;
            }
            EndReason::NotStreaming => self.without_streaming("the list has no end bookmark", progress),
            EndReason::Status(status) => {
                return self.recover_from_status(status, &why, progress, shared).await;
            }
            EndReason::Truncated | EndReason::LimitExceeded(_) => {
                self.fail_over(&why, progress, shared).await?;
            }
            EndReason::Undecodable(_) | EndReason::Stale { .. } => {
                progress.version = None;
                if progress.older_since.is_some() {
                    progress.list_version = ListVersion::MostRecent;
                }
                self.fail_over(&why, progress, shared).await?;
            }
        }
        Ok(())
    }

    async fn recover_from_status(
        &self,
        status: &Status,
        why: &str,
        progress: &mut Progress,
        shared: &Shared,
    ) -> Result<(), Closed> {
        match status.code {
            400 | 422 if progress.version.is_none() && progress.streaming => {
                self.without_streaming("it rejects them", progress);
                return Ok(());
            }
            410 => {
                // The list itself has expired: only the most recent is sure to be there.
                let listing = progress.version.take().is_none();
                if listing {
                    progress.list_version = ListVersion::MostRecent;
                }
                // A 410 is normal: no backoff, the first time.
                let before = progress.expired_at.replace(Instant::now());
                if before.is_none_or(|at| at.elapsed() >= RELIST_INTERVAL) {
                    tracing::info!(kind = self.resource, "our resource version has expired: relisting");
                    return Ok(());
                }
                return self.fail_over(why, progress, shared).await;
            }
            504 if status.message.contains("Too large resource version") => {
                (progress.version, progress.list_version) = (None, ListVersion::MostRecent);
                return self.fail_over(why, progress, shared).await;
            }
            401 => shared.reload.notify_one(),
            _ => {}
        }
        if self.output.is_optional() && matches!(status.code, 401 | 403 | 404 | 405) {
            self.wait_for_resource(why, progress).await;
            return Ok(());
        }
        match status.code {
            // The first 429 is no failover: other servers may be as busy. `Servers::admit` follows `Retry-After`.
            429 if progress.throttled_by.replace(progress.generation) != Some(progress.generation) => {
                sleep(between(FAILOVER_PAUSE)).await;
                Ok(())
            }
            401 | 429 | 500.. => self.fail_over(why, progress, shared).await,
            // A rejection, by one broken server or by all of them.
            _ => {
                progress.rejections += 1;
                let servers = u32::try_from(shared.servers.len()).unwrap_or(u32::MAX);
                if progress.rejections <= servers
                    || progress.rejections.is_multiple_of(REJECTIONS_PER_FAILOVER)
                {
                    self.fail_over(why, progress, shared).await
                } else {
                    self.back_off(why, progress, shared).await
                }
            }
        }
    }

    /// The server's watch is stalled: fails over and goes on from our resource version. Relists when all servers stall.
    fn stalled(&self, why: &str, progress: &mut Progress, shared: &Shared) {
        if progress.stall.needs_relist(shared.servers.len()) || progress.last_event.elapsed() >= NO_EVENTS {
            (progress.version, progress.last_event) = (None, Instant::now());
        }
        if !shared.servers.reject(progress.generation, &format!("{}s: {why}", self.resource)) {
            self.warn_of(why, progress, shared);
        }
    }

    fn without_streaming(&self, why: &str, progress: &mut Progress) {
        tracing::info!(
            kind = self.resource,
            why,
            "the API server does not support streaming lists: using paged ones"
        );
        progress.streaming = false;
    }

    /// A server before 1.33, or missing RBAC rights: goes without these objects (Y-16).
    async fn wait_for_resource(&self, why: &str, progress: &mut Progress) {
        if !std::mem::replace(&mut progress.unavailable, true) {
            tracing::info!(
                kind = self.resource,
                why,
                "the API server does not serve this kind: going without"
            );
        }
        tokio::select! {
            () = sleep(UNAVAILABLE_PAUSE) => {}
            // Another server may serve it.
            _ = progress.reconnect.changed() => {}
        }
    }

    /// Goes on with another server that is not in cooldown, else with the same one after a backoff.
    async fn fail_over(&self, why: &str, progress: &mut Progress, shared: &Shared) -> Result<(), Closed> {
        if shared.servers.reject(progress.generation, &format!("{}s: {why}", self.resource)) {
            sleep(between(FAILOVER_PAUSE)).await;
            return Ok(());
        }
        self.back_off(why, progress, shared).await
    }

    async fn back_off(&self, why: &str, progress: &mut Progress, shared: &Shared) -> Result<(), Closed> {
        self.warn_of(why, progress, shared);
        self.output.connected(false).await?;
        let pause = progress.backoff.pause();
        tracing::debug!(kind = self.resource, ?pause, "backing off");
        tokio::select! {
            () = sleep(pause) => {}
            // A failover, or other credentials.
            _ = progress.reconnect.changed().fuse() => {}
        }
        Ok(())
    }

    /// Shows a warning, and logs it if it is new.
    fn warn_of(&self, why: &str, progress: &mut Progress, shared: &Shared) {
        shared.servers.set_problem(self.resource, Some(format!("{}s: {why}", self.resource)));
        if progress.last_warning != why {
            tracing::warn!(kind = self.resource, why, "cannot watch, retrying; known objects stay in use");
            why.clone_into(&mut progress.last_warning);
        }
    }
}

//! The small pages of the metrics address: who is there, and is it well (H-27).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet};
use prometheus_client::metrics::MetricType;

use super::Health;

/// Answers of `/healthz`, and since when there are any.
#[derive(Debug)]
pub(super) struct Pages {
    started: Timestamp,
    pings: AtomicU64,
}

impl Pages {
    pub(super) fn new() -> Self {
        Self { started: Timestamp::now(), pings: AtomicU64::new(0) }
    }

    /// `/healthz`: whoever reads this has been answered.
    pub(super) fn ping(&self, query: &str) -> String {
        self.pings.fetch_add(1, Ordering::Relaxed);
        match query.split('&').any(|word| word == "verbose" || word.starts_with("verbose=")) {
            true => "[+]ping ok\nhealthz check passed\n".to_owned(),
            false => "ok".to_owned(),
        }
    }

    /// `/statusz`.
    pub(super) fn status(&self, now: Timestamp) -> String {
        let up = now.duration_since(self.started).as_secs().max(0);
        format!(
            "proxy-agent statusz\nFor people, not for programs: its form may change.\n\n\
             Started: {}\nUp: {} hr {:02} min {:02} sec\nBinary version: {}\n",
            self.started,
            up / 3600,
            up / 60 % 60,
            up % 60,
            env!("CARGO_PKG_VERSION")
        )
    }
}

/// `/metrics/slis`: whether checks pass now, and how often they were made.
pub(super) struct Slis {
    pub(super) health: Arc<Health>,
    pub(super) pages: Arc<Pages>,
}

impl fmt::Debug for Slis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slis").finish_non_exhaustive()
    }
}

impl Collector for Slis {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        const PING: [(&str, &str); 2] = [("name", "ping"), ("type", "healthz")];
        const PROXY: [(&str, &str); 2] = [("name", "proxy"), ("type", "livez")];
        let help = "1 while the check passes";
        let mut now = encoder.encode_descriptor("kubernetes_healthcheck", help, None, MetricType::Gauge)?;
        for (labels, well) in [(PING, true), (PROXY, self.health.is_healthy())] {
            now.encode_family(&labels)?.encode_gauge(&u64::from(well))?;
        }
        let help = "How often the check was made";
        let mut made =
            encoder.encode_descriptor("kubernetes_healthchecks", help, None, MetricType::Counter)?;
        let mut count = |of: [(&str, &str); 2], status, n: u64| {
            let labels = [of[0], of[1], ("status", status)];
            encode(&mut made, &labels, n)
        };
        count(PING, "success", self.pages.pings.load(Ordering::Relaxed))?;
        for (_, code, n) in self.health.answers().into_iter().filter(|(path, ..)| *path == "livez") {
            count(PROXY, if code == 200 { "success" } else { "error" }, n)?;
        }
        Ok(())
    }
}

fn encode(
    into: &mut prometheus_client::encoding::MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    n: u64,
) -> fmt::Result {
    into.encode_family(labels)?.encode_counter::<[(&str, &str); 1], _, u64>(&n, None)
}

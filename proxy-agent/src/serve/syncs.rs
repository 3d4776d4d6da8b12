//! What passes by and is kept: durations of passes and of what follows them, as histograms.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::health::family_name;
use agent_core::model::Family;

type Labels = [(&'static str, &'static str); 1];
type Histograms = family::Family<Labels, Histogram, fn() -> Histogram>;

/// The histograms, under kube-proxy's names.
#[derive(Clone, Debug)]
pub struct Syncs {
    any: Histograms,
    full: Histograms,
    partial: Histograms,
    programming: Histograms,
    reconciling: Histograms,
    reconciled: family::Family<Labels, Counter>,
}

impl Default for Syncs {
    fn default() -> Self {
        let exponential = || Histograms::new_with_constructor(exponential);
        Self {
            any: exponential(),
            full: exponential(),
            partial: exponential(),
            programming: Histograms::new_with_constructor(programming),
            reconciling: exponential(),
            reconciled: family::Family::default(),
        }
    }
}

/// 1 ms … 16.384 s (section 8.4).
fn exponential() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// A quarter of a second … five minutes (H-35).
fn programming() -> Histogram {
    let seconds = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    Histogram::new([0.25, 0.5].into_iter().chain(seconds.map(f64::from)))
}

fn label(family: Family) -> Labels {
    [("ip_family", family_name(family))]
}

impl Syncs {
    /// Offers them to whoever scrapes `registry`.
    pub(super) fn register(&self, registry: &mut Registry) {
        let mut add = |name: &str, help: &str, histograms: &Histograms| {
            registry.register(format!("kubeproxy_{name}_seconds"), help, histograms.clone());
        };
        add("sync_proxy_rules_duration", "How long a sync took", &self.any);
        add("sync_full_proxy_rules_duration", "How long a sync that compared everything took", &self.full);
        add("sync_partial_proxy_rules_duration", "How long a sync over what changed took", &self.partial);
        let help = "From a change of endpoints in the cluster to its programming";
        add("network_programming_duration", help, &self.programming);
        let help = "How long it took to close UDP sockets that led to endpoints that have gone";
        add("conntrack_reconciler_sync_duration", help, &self.reconciling);
        let help = "UDP sockets led on or closed because their endpoint has gone";
        registry.register("kubeproxy_conntrack_reconciler_deleted_entries", help, self.reconciled.clone());
    }

    /// A sync of `family` has ended, well or not (H-30…H-32).
    pub fn took(&self, family: Family, full: bool, time: Duration) {
        let kind = if full { &self.full } else { &self.partial };
        for histograms in [&self.any, kind] {
            histograms.get_or_create(&label(family)).observe(time.as_secs_f64());
        }
    }

    /// A change of endpoints is programmed this many seconds after it was made (H-35).
    pub fn programmed(&self, family: Family, seconds: f64) {
        self.programming.get_or_create(&label(family)).observe(seconds);
    }

    /// What led to endpoints that have gone is led on or closed (H-45).
    pub fn reconciled(&self, family: Family, closed: usize, time: Duration) {
        self.reconciling.get_or_create(&label(family)).observe(time.as_secs_f64());
        self.reconciled.get_or_create(&label(family)).inc_by(closed as u64);
    }
}

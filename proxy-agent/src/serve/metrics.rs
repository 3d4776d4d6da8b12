//! `/metrics` under kube-proxy's own names plus ours (`proxy_agent_*`), and `/proxyMode`.
//!
//! What others know is asked for at each scrape ([`Snapshot`]); what only passes by is kept here.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use proxy_common::abi::Reason;

use super::health::{Health, family_name};
use super::process::Process;
use crate::cli::view::MapFill;
use crate::model::Family;

/// What the run loop and the tables know at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Where the Services come from.
    pub source: String,
    /// Whether the source answers.
    pub connected: bool,
    /// Services known.
    pub services: u64,
    /// Endpoints known.
    pub endpoints: u64,
    /// Frontends programmed.
    pub frontends: u64,
    /// Interfaces with programs.
    pub interfaces: u64,
    /// Interfaces that refused a program.
    pub interfaces_failed: u64,
    /// Passes that changed a table.
    pub generation: u64,
    /// Objects left out.
    pub complaints: u64,
    /// Slice changes heard and not yet programmed (H-36).
    pub endpoint_changes_pending: u64,
    /// Slice changes heard (H-37).
    pub endpoint_changes: u64,
    /// Services with changes not yet programmed (H-38).
    pub service_changes_pending: u64,
    /// Service changes heard (H-39).
    pub service_changes: u64,
    /// The counters of REASONS.
    pub reasons: Vec<(Reason, u64)>,
    /// How full the tables are.
    pub tables: Vec<MapFill>,
}

/// Where snapshots come from. Asked at each scrape, on a thread that may wait for the kernel.
pub type Snapshots = dyn Fn() -> Snapshot + Send + Sync;

/// Labels of a family.
type Labels = [(&'static str, &'static str); 1];

/// The metrics of this agent.
pub struct Metrics {
    registry: Registry,
    duration: family::Family<Labels, Histogram, fn() -> Histogram>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// 1 ms … 16.384 s, as kube-proxy has them (section 8.4).
fn sync_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

impl Metrics {
    /// Metrics over what `snapshots` and `health` tell.
    #[must_use]
    pub fn new(snapshots: Box<Snapshots>, health: Arc<Health>) -> Self {
        let duration: family::Family<Labels, Histogram, fn() -> Histogram> =
            family::Family::new_with_constructor(sync_buckets);
        let mut registry = Registry::default();
        registry.register(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "How long a pass took",
            duration.clone(),
        );
        registry.register_collector(Box::new(Scrape { snapshots, health }));
        registry.register_collector(Box::new(Process::this()));
        Self { registry, duration }
    }

    /// A pass of `family` has ended, well or not (H-30).
    pub fn pass_took(&self, family: Family, time: Duration) {
        self.duration.get_or_create(&[("ip_family", family_name(family))]).observe(time.as_secs_f64());
    }

    /// Everything, as OpenMetrics text.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Turns a snapshot into metrics.
struct Scrape {
    snapshots: Box<Snapshots>,
    health: Arc<Health>,
}

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scrape").finish_non_exhaustive()
    }
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        let snapshot = (self.snapshots)();
        of_kube_proxy(&mut page, &snapshot, &self.health)?;
        of_agent(&mut page, &snapshot)
    }
}

/// A name, what it means, and its values by label.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.0.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
    }

    /// The encoder appends `_total` to the name.
    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        encoder.encode_counter::<Labels, _, u64>(&value, None)
    }

    fn gauges<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, f64)>,
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        values
            .into_iter()
            .try_for_each(|(labels, value)| encoder.encode_family(&labels)?.encode_gauge(&value))
    }

    fn counters<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        values.into_iter().try_for_each(|(labels, value)| {
            encoder.encode_family(&labels)?.encode_counter::<Labels, _, u64>(&value, None)
        })
    }
}

/// Under the names of kube-proxy, so that dashboards and alerts go on working.
fn of_kube_proxy(page: &mut Page<'_>, snapshot: &Snapshot, health: &Health) -> fmt::Result {
    let times = health.times();
    let label = |family| [("ip_family", family_name(family))];
    page.gauges(
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "When tables last equalled what is wanted, Unix time",
        times.iter().filter_map(|t| Some((label(t.family), t.synced?))),
    )?;
    page.gauges(
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
        "When a pass was last wanted, Unix time",
        times.iter().filter_map(|t| Some((label(t.family), t.queued?))),
    )?;
    page.gauge(
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
        "EndpointSlice changes not yet programmed",
        snapshot.endpoint_changes_pending,
    )?;
    page.counter(
        "kubeproxy_sync_proxy_rules_endpoint_changes",
        "EndpointSlice changes heard",
        snapshot.endpoint_changes,
    )?;
    page.gauge(
        "kubeproxy_sync_proxy_rules_service_changes_pending",
        "Services with changes not yet programmed",
        snapshot.service_changes_pending,
    )?;
    page.counter(
        "kubeproxy_sync_proxy_rules_service_changes",
        "Service changes heard",
        snapshot.service_changes,
    )?;
    for path in ["healthz", "livez"] {
        let answers = health.answers().into_iter().filter(|(of, ..)| *of == path);
        page.counters(
            &format!("kubeproxy_proxy_{path}"),
            "Answers of this path by code",
            answers.map(|(_, code, count)| ([("code", code.to_string())], count)),
        )?;
    }
    Ok(())
}

/// Under our own names.
fn of_agent(page: &mut Page<'_>, snapshot: &Snapshot) -> fmt::Result {
    let Snapshot {
        source,
        connected,
        services,
        endpoints,
        frontends,
        interfaces,
        interfaces_failed,
        generation,
        complaints,
        reasons,
        tables,
        ..
    } = snapshot;
    let build = [("version", env!("CARGO_PKG_VERSION").to_owned()), ("source", source.clone())];
    page.gauges("proxy_agent_build_info", "Version and source of the agent; always 1", [(build, 1.0)])?;
    page.gauge("proxy_agent_connected", "1 when the source answers", u64::from(*connected))?;
    page.gauge("proxy_agent_services", "Services known", *services)?;
    page.gauge("proxy_agent_endpoints", "Endpoints known", *endpoints)?;
    page.gauge("proxy_agent_frontends", "Frontends programmed", *frontends)?;
    page.gauge("proxy_agent_interfaces", "Interfaces that carry programs", *interfaces)?;
    page.gauge("proxy_agent_interfaces_failed", "Interfaces that refused a program", *interfaces_failed)?;
    page.gauge("proxy_agent_generation", "Passes that changed a table", *generation)?;
    page.gauge("proxy_agent_complaints", "Objects left out because they are wrong", *complaints)?;
    page.counters(
        "proxy_agent_reasons",
        "Ways packets and socket calls left the programs",
        reasons.iter().map(|(reason, count)| ([("reason", reason.label())], *count)),
    )?;
    let label = |table: &MapFill| [("table", table.name)];
    page.gauges(
        "proxy_agent_table_entries",
        "Entries in use",
        tables.iter().map(|table| (label(table), table.used as f64)),
    )?;
    page.gauges(
        "proxy_agent_table_max_entries",
        "Entries the table was made for",
        tables.iter().map(|table| (label(table), table.max as f64)),
    )
}

/// The paths of the metrics address (H-27).
pub fn router(metrics: Arc<Metrics>) -> Router {
    let plain = |text: &'static str| {
        let headers = [(CONTENT_TYPE, "text/plain; charset=utf-8"), (X_CONTENT_TYPE_OPTIONS, "nosniff")];
        any(async move || (headers, text))
    };
    Router::new()
        .route("/metrics", any(async move || scrape(metrics).await))
        .route("/proxyMode", plain("ebpf"))
        .route("/healthz", plain("ok"))
        .route("/healthz/ping", plain("ok"))
}

async fn scrape(metrics: Arc<Metrics>) -> Response {
    // Counting entries walks whole tables: not on the thread that everything else runs on.
    let text = tokio::task::spawn_blocking(move || metrics.text()).await;
    let ill = |error: String| (StatusCode::INTERNAL_SERVER_ERROR, error).into_response();
    match text {
        Ok(Ok(text)) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(CONTENT_TYPE, kind)], text).into_response()
        }
        Ok(Err(e)) => ill(format!("writing the metrics: {e}")),
        Err(e) => ill(format!("reading the metrics: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::ask;
    use super::super::health::SystemClock;
    use super::*;

    fn metrics() -> Arc<Metrics> {
        let snapshot = || Snapshot {
            source: "manifests /x".to_owned(),
            connected: true,
            services: 2,
            endpoints: 3,
            frontends: 5,
            interfaces: 4,
            interfaces_failed: 1,
            generation: 17,
            complaints: 6,
            endpoint_changes_pending: 7,
            endpoint_changes: 8,
            service_changes_pending: 9,
            service_changes: 10,
            reasons: vec![(Reason::NewFlow, 12), (Reason::Refused, 0)],
            tables: vec![MapFill { name: "FLOWS", used: 8, max: 1024 }],
        };
        let health = Arc::new(Health::new(SystemClock));
        health.started(Family::V4);
        health.synced(Family::V4);
        Arc::new(Metrics::new(Box::new(snapshot), health))
    }

    #[test]
    fn every_figure_is_under_its_documented_name() {
        // H-30, H-33, H-34, H-36…H-41.
        let metrics = metrics();
        metrics.pass_took(Family::V4, Duration::from_millis(3));
        let text = metrics.text().unwrap();
        for line in [
            "# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram",
            r#"kubeproxy_sync_proxy_rules_duration_seconds_bucket{le="0.002",ip_family="IPv4"} 0"#,
            r#"kubeproxy_sync_proxy_rules_duration_seconds_bucket{le="0.004",ip_family="IPv4"} 1"#,
            r#"kubeproxy_sync_proxy_rules_duration_seconds_bucket{le="16.384",ip_family="IPv4"} 1"#,
            r#"kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"} 1"#,
            "# TYPE kubeproxy_sync_proxy_rules_last_timestamp_seconds gauge",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 7",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 8",
            "kubeproxy_sync_proxy_rules_service_changes_pending 9",
            "kubeproxy_sync_proxy_rules_service_changes_total 10",
            r#"kubeproxy_proxy_healthz_total{code="200"} 0"#,
            r#"kubeproxy_proxy_livez_total{code="503"} 0"#,
            concat!(
                r#"proxy_agent_build_info{version=""#,
                env!("CARGO_PKG_VERSION"),
                r#"",source="manifests /x"} 1.0"#
            ),
            "proxy_agent_connected 1",
            "proxy_agent_services 2",
            "proxy_agent_endpoints 3",
            "proxy_agent_frontends 5",
            "proxy_agent_interfaces 4",
            "proxy_agent_interfaces_failed 1",
            "proxy_agent_generation 17",
            "proxy_agent_complaints 6",
            r#"proxy_agent_reasons_total{reason="new_flow"} 12"#,
            r#"proxy_agent_reasons_total{reason="refused"} 0"#,
            r#"proxy_agent_table_entries{table="FLOWS"} 8.0"#,
            r#"proxy_agent_table_max_entries{table="FLOWS"} 1024.0"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing from\n{text}");
        }
        for name in [
            r#"kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"} 1"#,
            r#"kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family="IPv4"} 1"#,
            "process_resident_memory_bytes ",
            "process_cpu_seconds_total ",
        ] {
            assert!(text.lines().any(|l| l.starts_with(name)), "{name} is missing from\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn a_family_that_never_was_in_step_has_no_time_stamp() {
        let health = Arc::new(Health::new(SystemClock));
        health.started(Family::V6);
        let text = Metrics::new(Box::new(Snapshot::default), health).text().unwrap();
        assert!(!text.contains("last_timestamp_seconds{"), "{text}");
        assert!(text.contains(r#"last_queued_timestamp_seconds{ip_family="IPv6"}"#), "{text}");
    }

    #[tokio::test]
    async fn the_metrics_address_answers_on_its_paths_only() {
        let page = ask(router(metrics()), "GET", "/metrics").await;
        assert!(page.starts_with("HTTP/1.1 200 OK\r\n") && page.contains("# EOF"), "{page}");
        assert!(page.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"));
        let mode = ask(router(metrics()), "GET", "/proxyMode").await;
        assert!(mode.contains("content-type: text/plain; charset=utf-8\r\n"), "{mode}");
        assert!(mode.ends_with("\r\n\r\nebpf"), "{mode}");
        assert!(ask(router(metrics()), "GET", "/healthz").await.ends_with("\r\n\r\nok"));
        assert!(ask(router(metrics()), "GET", "/nowhere").await.starts_with("HTTP/1.1 404 "));
    }
}

//! `/metrics` under kube-proxy's own names plus ours (`proxy_agent_*`), and `/proxyMode`.
//!
//! What others know is asked for at each scrape ([`Snapshot`]); what only passes by is kept here.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::RawQuery;
use axum::http::header::{CONTENT_TYPE, HeaderName, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use jiff::Timestamp;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Registry;
use tokio::sync::Mutex;

use super::exposition;
use super::health::Health;
use super::page::{Page, of_agent, of_component, of_kube_proxy};
use super::pages::{Pages, Slis};
use super::process::Process;
use super::repairs::Repairs;
use super::snapshot::Snapshot;
use super::syncs::Syncs;
use agent_source::api::Requests;
use agent_source::blocking::run_blocking;

/// Where snapshots come from. Asked at each scrape, on a thread that may wait for the kernel.
pub type Snapshots = dyn Fn() -> Snapshot + Send + Sync;

/// The metrics of this agent.
pub struct Metrics {
    registry: Registry,
    slis: Registry,
    syncs: Syncs,
    repairs: Repairs,
    pages: Arc<Pages>,
    /// What was last said, and when that was begun.
    last: Arc<Mutex<Option<(Instant, String)>>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Metrics over what `snapshots` and `health` tell.
    #[must_use]
    pub fn new(snapshots: Box<Snapshots>, health: Arc<Health>, requests: &Requests) -> Self {
        let (syncs, repairs, pages) = (Syncs::default(), Repairs::default(), Arc::new(Pages::new()));
        let mut registry = Registry::default();
        syncs.register(&mut registry);
        repairs.register(&mut registry);
        requests.register(&mut registry);
        registry.register_collector(Box::new(Scrape { snapshots, health: health.clone() }));
        registry.register_collector(Box::new(Process::this()));
        let mut slis = Registry::default();
        slis.register_collector(Box::new(Slis { health, pages: pages.clone() }));
        Self { registry, slis, syncs, repairs, pages, last: Arc::default() }
    }

    /// Where what passes by is counted.
    #[must_use]
    pub fn syncs(&self) -> &Syncs {
        &self.syncs
    }

    /// Where what was restored is counted.
    #[must_use]
    pub fn repairs(&self) -> &Repairs {
        &self.repairs
    }

    /// Everything, as OpenMetrics text.
    pub fn text(&self) -> Result<String, fmt::Error> {
        encode(&self.registry)
    }

    /// The same, for everybody who has been waiting for it at once: counting entries walks whole tables, one at a time,
    /// and on another thread than that of the servers.
    async fn scraped(self: Arc<Self>) -> Result<String, String> {
        let asked = Instant::now();
        let mut last = self.last.clone().lock_owned().await;
        if let Some((_, text)) = last.as_ref().filter(|(begun, _)| *begun >= asked) {
            return Ok(text.clone());
        }
        // The lock goes along: who has gone away must not leave room for one more at the same time.
        let scrape = move || {
            let begun = Instant::now();
            let text = self.text().map_err(|error| format!("writing the metrics: {error}"))?;
            *last = Some((begun, text.clone()));
            Ok(text)
        };
        let scraped = run_blocking("scrape", scrape).await;
        scraped.unwrap_or_else(|error| Err(format!("reading the metrics: {error}")))
    }
}

fn encode(registry: &Registry) -> Result<String, fmt::Error> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry)?;
    Ok(text)
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
        of_component(&mut page)?;
        of_agent(&mut page, &snapshot)
    }
}

/// The paths of the metrics address (H-27).
pub fn router(metrics: Arc<Metrics>) -> Router {
    let ping = |metrics: Arc<Metrics>| {
        any(async move |RawQuery(query)| {
            (plain_text(), metrics.pages.ping(&query.unwrap_or_default())).into_response()
        })
    };
    let status = metrics.clone();
    let (all, slis) = (metrics.clone(), metrics.clone());
    Router::new()
        .route("/metrics", any(async move |headers: HeaderMap| written(all.scraped().await, &headers)))
        .route(
            "/metrics/slis",
            any(async move |headers: HeaderMap| {
                let text = encode(&slis.slis).map_err(|error| format!("writing the metrics: {error}"));
                written(text, &headers)
            }),
        )
        .route("/proxyMode", any((plain_text(), "ebpf")))
        .route("/statusz", any(async move || (plain_text(), status.pages.status(Timestamp::now()))))
        .route("/healthz", ping(metrics.clone()))
        .route("/healthz/ping", ping(metrics))
}

fn plain_text() -> [(HeaderName, &'static str); 2] {
    [(CONTENT_TYPE, "text/plain; charset=utf-8"), (X_CONTENT_TYPE_OPTIONS, "nosniff")]
}

fn written(text: Result<String, String>, headers: &HeaderMap) -> Response {
    match text {
        Ok(text) if exposition::wants_open_metrics(headers) => {
            ([(CONTENT_TYPE, exposition::OPEN_METRICS)], text).into_response()
        }
        Ok(text) => ([(CONTENT_TYPE, exposition::PLAIN)], exposition::plain(&text)).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error).into_response(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::ask;
    use std::time::Duration;

    use super::super::health::SystemClock;
    use std::collections::BTreeMap;

    use agent_core::model::tunnels::Reach;
    use agent_core::model::{Family, NoLocalByFamily};
    use agent_kernel::datapath::pinned::MapFill;
    use agent_kernel::datapath::tables::growth::Standing;
    use proxy_common::abi::Reason;

    use super::super::http::Counts;
    use super::super::probes::ProbeCounts;

    use super::*;
    use agent_core::model::NoLocal;
    use agent_kernel::datapath::tables::growth::Against;

    pub(in super::super) fn metrics() -> Arc<Metrics> {
        let snapshot = || Snapshot {
            source: "manifests /x".to_owned(),
            connected: true,
            services: 2,
            endpoints: 3,
            frontends: 5,
            interfaces: 4,
            interfaces_failed: 1,
            generation: 17,
            warnings: 6,
            endpoint_changes_pending: 7,
            endpoint_changes: 8,
            service_changes_pending: 9,
            service_changes: 10,
            without_local: NoLocalByFamily {
                v4: NoLocal { internal: 11, external: 12 },
                v6: NoLocal { internal: 13, external: 14 },
            },
            dsr_nodes: Reach::LABELS.iter().map(|label| (*label, u64::from(*label == "ready") * 4)).collect(),
            probes: ProbeCounts { asked: 21, answered: 22, missing: 23, given: 24, withheld: 25 },
            connections: Counts { open: 3, displaced: 2, overdue: 1 },
            reasons: vec![(Reason::NewFlow, 12), (Reason::NoEndpoint, 0)],
            tables: vec![MapFill { name: "FLOWS", used: 8, max: 1024 }],
            growth: Standing {
                memory: 9,
                limit: 10,
                planned: BTreeMap::from([("SLOTS", 2048)]),
                blocked: BTreeMap::from([("RECORDS", Against::Memory(1)), ("SERVICES", Against::Limit)]),
                done: 3,
                failed: 1,
            },
            affinity_secs: BTreeMap::new(),
        };
        let health = Arc::new(Health::new(SystemClock));
        health.started(Family::V4);
        health.synced(Family::V4);
        Arc::new(Metrics::new(Box::new(snapshot), health, &Requests::default()))
    }

    #[test]
    fn every_figure_is_under_its_documented_name() {
        // H-30…H-42, H-45.
        let metrics = metrics();
        let syncs = metrics.syncs();
        syncs.took(Family::V4, true, Duration::from_millis(3));
        syncs.took(Family::V4, false, Duration::from_millis(5));
        syncs.programmed(Family::V6, 59.5);
        syncs.reconciled(Family::V4, 2, Duration::from_millis(1));
        metrics.repairs().count("link", 2);
        let text = metrics.text().unwrap();
        for line in [
            "# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram",
            r#"kubeproxy_sync_proxy_rules_duration_seconds_bucket{le="0.002",ip_family="IPv4"} 0"#,
            r#"kubeproxy_sync_proxy_rules_duration_seconds_bucket{le="0.004",ip_family="IPv4"} 1"#,
            r#"kubeproxy_sync_proxy_rules_duration_seconds_bucket{le="16.384",ip_family="IPv4"} 2"#,
            r#"kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"} 2"#,
            r#"kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv4"} 1"#,
            r#"kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family="IPv4"} 1"#,
            r#"kubeproxy_network_programming_duration_seconds_bucket{le="59.0",ip_family="IPv6"} 0"#,
            r#"kubeproxy_network_programming_duration_seconds_bucket{le="60.0",ip_family="IPv6"} 1"#,
            r#"kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family="IPv4"} 1"#,
            r#"kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family="IPv4"} 2"#,
            r#"kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy="external",ip_family="IPv6"} 14.0"#,
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
            r#"proxy_agent_repairs_total{what="link"} 2"#,
            r#"proxy_agent_repairs_total{what="entry"} 0"#,
            "proxy_agent_connected 1",
            "proxy_agent_services 2",
            "proxy_agent_endpoints 3",
            "proxy_agent_frontends 5",
            "proxy_agent_interfaces 4",
            "proxy_agent_interfaces_failed 1",
            "proxy_agent_generation 17",
            "proxy_agent_warnings 6",
            "proxy_agent_log_lines_lost_total 0",
            "proxy_agent_http_connections 3",
            r#"proxy_agent_http_connections_closed_total{why="displaced"} 2"#,
            r#"proxy_agent_http_connections_closed_total{why="overdue"} 1"#,
            r#"proxy_agent_reasons_total{reason="new_flow"} 12"#,
            r#"proxy_agent_reasons_total{reason="no_endpoint"} 0"#,
            r#"proxy_agent_table_entries{table="FLOWS"} 8.0"#,
            r#"proxy_agent_table_max_entries{table="FLOWS"} 1024.0"#,
            r#"proxy_agent_dsr_nodes{state="ready"} 4.0"#,
            r#"proxy_agent_dsr_nodes{state="no_agent"} 0.0"#,
            r#"proxy_agent_dsr_probes_total{what="asked"} 21"#,
            r#"proxy_agent_dsr_probes_total{what="answered"} 22"#,
            r#"proxy_agent_dsr_probes_total{what="missing"} 23"#,
            r#"proxy_agent_dsr_probes_total{what="given"} 24"#,
            r#"proxy_agent_dsr_probes_total{what="withheld"} 25"#,
            "proxy_agent_table_memory_bytes 9",
            "proxy_agent_table_memory_limit_bytes 10",
            r#"proxy_agent_table_planned_entries{table="SLOTS"} 2048.0"#,
            r#"proxy_agent_table_growth_blocked{table="RECORDS",by="memory"} 1.0"#,
            r#"proxy_agent_table_growth_blocked{table="SERVICES",by="limit"} 1.0"#,
            r#"proxy_agent_table_growths_total{result="done"} 3"#,
            r#"proxy_agent_table_growths_total{result="failed"} 1"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing from\n{text}");
        }
        for name in [
            r#"kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"} 1"#,
            r#"kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family="IPv4"} 1"#,
            "process_resident_memory_bytes ",
            "process_cpu_seconds_total ",
            "process_open_fds ",
            "process_max_fds ",
        ] {
            assert!(text.lines().any(|l| l.starts_with(name)), "{name} is missing from\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn a_family_that_never_was_in_step_has_no_time_stamp() {
        let health = Arc::new(Health::new(SystemClock));
        health.started(Family::V6);
        let text = Metrics::new(Box::new(Snapshot::default), health, &Requests::default()).text().unwrap();
        assert!(!text.contains("last_timestamp_seconds{"), "{text}");
        assert!(text.contains(r#"last_queued_timestamp_seconds{ip_family="IPv6"}"#), "{text}");
    }

    #[tokio::test]
    async fn whoever_asks_at_the_same_time_is_told_the_same() {
        use std::sync::atomic::{AtomicU64, Ordering};
        let scrapes = Arc::new(AtomicU64::new(0));
        let counted = scrapes.clone();
        let snapshots = move || {
            std::thread::sleep(Duration::from_millis(50));
            Snapshot { services: counted.fetch_add(1, Ordering::Relaxed) + 1, ..Snapshot::default() }
        };
        let health = Arc::new(Health::new(SystemClock));
        let metrics = Arc::new(Metrics::new(Box::new(snapshots), health, &Requests::default()));
        let all: Vec<_> = (0..100).map(|_| tokio::spawn(metrics.clone().scraped())).collect();
        for asked in all {
            asked.await.unwrap().unwrap();
        }
        // One that was begun before the others had asked, and one for them.
        assert!(scrapes.load(Ordering::Relaxed) <= 2, "{scrapes:?}");
        let later = metrics.clone().scraped().await.unwrap();
        let n = scrapes.load(Ordering::Relaxed);
        assert!(later.contains(&format!("proxy_agent_services {n}\n")), "{later}");
    }

    #[tokio::test]
    async fn the_metrics_address_answers_on_its_paths_only() {
        let page = ask(router(metrics()), "GET", "/metrics").await;
        assert!(page.starts_with("HTTP/1.1 200 OK\r\n") && !page.contains("# EOF"), "{page}");
        assert!(page.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{page}");
        let mode = ask(router(metrics()), "GET", "/proxyMode").await;
        assert!(mode.contains("content-type: text/plain; charset=utf-8\r\n"), "{mode}");
        assert!(mode.ends_with("\r\n\r\nebpf"), "{mode}");
        assert!(ask(router(metrics()), "GET", "/healthz").await.ends_with("\r\n\r\nok"));
        assert!(ask(router(metrics()), "GET", "/healthz/ping").await.ends_with("\r\n\r\nok"));
        let verbose = ask(router(metrics()), "GET", "/healthz?verbose").await;
        assert!(verbose.contains("[+]ping ok\n"), "{verbose}");
        let slis = ask(router(metrics()), "GET", "/metrics/slis").await;
        assert!(slis.contains("kubernetes_healthcheck{name=\"ping\",type=\"healthz\"} 1\n"), "{slis}");
        assert!(slis.contains("# TYPE kubernetes_healthchecks_total counter\n"), "{slis}");
        let status = ask(router(metrics()), "GET", "/statusz").await;
        assert!(status.contains(concat!("Binary version: ", env!("CARGO_PKG_VERSION"))), "{status}");
        // H-27: nothing to profile is offered.
        assert!(ask(router(metrics()), "GET", "/debug/pprof/").await.starts_with("HTTP/1.1 404 "));
        assert!(ask(router(metrics()), "GET", "/nowhere").await.starts_with("HTTP/1.1 404 "));
    }
}

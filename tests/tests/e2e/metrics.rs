//! The metrics that dashboards and alerts for kube-proxy read: names, types, labels, and when they move.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use proxy_tests::agent::Agent;
use proxy_tests::apiserver::ApiServer;
use proxy_tests::manifests::{Family, Phase, ServicePlan, SlicePlan};
use proxy_tests::pod::Place;
use proxy_tests::probe::eventually;

use crate::api_server::server;
use crate::common::vips;
use crate::health::http;
use crate::life::{FLAGS, SOON, one_node};

/// Name, type and labels of what a replacement must have (H-30…H-42, H-45, H-48), without the prefix
/// `kubeproxy_` where there is one.
const NAMES: [(&str, &str, &str); 27] = [
    ("sync_proxy_rules_duration_seconds", "histogram", "ip_family"),
    ("sync_full_proxy_rules_duration_seconds", "histogram", "ip_family"),
    ("sync_partial_proxy_rules_duration_seconds", "histogram", "ip_family"),
    ("sync_proxy_rules_last_timestamp_seconds", "gauge", "ip_family"),
    ("sync_proxy_rules_last_queued_timestamp_seconds", "gauge", "ip_family"),
    ("network_programming_duration_seconds", "histogram", "ip_family"),
    ("sync_proxy_rules_endpoint_changes_pending", "gauge", ""),
    ("sync_proxy_rules_endpoint_changes_total", "counter", ""),
    ("sync_proxy_rules_service_changes_pending", "gauge", ""),
    ("sync_proxy_rules_service_changes_total", "counter", ""),
    ("proxy_healthz_total", "counter", "code"),
    ("proxy_livez_total", "counter", "code"),
    ("sync_proxy_rules_no_local_endpoints_total", "gauge", "traffic_policy,ip_family"),
    ("conntrack_reconciler_sync_duration_seconds", "histogram", "ip_family"),
    ("conntrack_reconciler_deleted_entries_total", "counter", "ip_family"),
    ("kubernetes_build_info", "gauge", "major,minor,git_version,compiler,platform"),
    ("rest_client_requests_total", "counter", "code,method,host"),
    ("rest_client_request_duration_seconds", "histogram", "verb,host"),
    ("process_cpu_seconds_total", "counter", ""),
    ("process_resident_memory_bytes", "gauge", ""),
    ("process_start_time_seconds", "gauge", ""),
    ("process_open_fds", "gauge", ""),
    ("process_max_fds", "gauge", ""),
    ("proxy_agent_build_info", "gauge", "version,source"),
    ("proxy_agent_table_memory_bytes", "gauge", ""),
    ("proxy_agent_table_memory_limit_bytes", "gauge", ""),
    ("proxy_agent_table_growths_total", "counter", "result"),
];

/// What one scrape shows: types by name, and values by name and labels as they are written.
pub(crate) struct Scrape {
    types: BTreeMap<String, String>,
    samples: BTreeMap<String, f64>,
}

impl Scrape {
    pub(crate) fn of(host: &Place) -> Result<Self> {
        let (code, text) = http(host, "127.0.0.1:10249", "/metrics")?;
        ensure!(code == 200, "{code}: {text}");
        let mut scrape = Self { types: BTreeMap::new(), samples: BTreeMap::new() };
        for line in text.lines() {
            if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|line| line.split_once(' ')) {
                scrape.types.insert(name.to_owned(), kind.to_owned());
            } else if let Some((sample, value)) = line.rsplit_once(' ').filter(|_| !line.starts_with('#')) {
                let value = value.parse().with_context(|| format!("no number: {line}"))?;
                scrape.samples.insert(sample.to_owned(), value);
            }
        }
        Ok(scrape)
    }

    pub(crate) fn value(&self, sample: &str) -> Result<f64> {
        self.samples.get(sample).copied().with_context(|| format!("no {sample} in {:#?}", self.samples))
    }

    /// Names of the labels of a metric's samples, without those that a histogram's buckets have.
    fn labels(&self, name: &str, kind: &str) -> Result<String> {
        let first = if kind == "histogram" { format!("{name}_count") } else { name.to_owned() };
        let found = self.samples.keys().find(|sample| {
            sample.strip_prefix(&*first).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
        });
        let found = found.with_context(|| format!("no sample of {name} in {:#?}", self.samples))?;
        let inside = found.strip_prefix(&*first).unwrap_or_default().trim_matches(['{', '}']);
        let names = inside.split(',').filter_map(|label| Some(label.split_once('=')?.0));
        Ok(names.collect::<Vec<_>>().join(","))
    }
}

/// Puts a slice with one endpoint, which changed at a time.
fn put_slice(server: &ApiServer, family: Family, last: u8, node: &str, triggered: &str) {
    let (suffix, ip) = match family {
        Family::V4 => ("v4", format!("10.244.9.{last}")),
        Family::V6 => ("v6", format!("fd00:244:9::{last}")),
    };
    let ip = ip.parse().expect("an address");
    let plan = SlicePlan::new("web", suffix, family).port("tcp", "TCP", 8080);
    let mut slice = plan.endpoint("x", ip, Some(node), Phase::Ready).build();
    let annotations = slice.metadata.annotations.get_or_insert_default();
    annotations.insert("endpoints.kubernetes.io/last-change-trigger-time".into(), triggered.into());
    server.put(&slice);
}

fn ago(seconds: i64) -> String {
    (Timestamp::now() - SignedDuration::from_secs(seconds)).to_string()
}

#[test]
fn every_metric_has_its_name_type_and_labels() -> Result<()> {
    // H-30…H-42, H-45, H-48.
    let cluster = one_node(&["a"])?;
    let (server, host) = (server(&cluster)?, cluster.place("node1"));
    let _agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    server.put(&ServicePlan::new("web", &vips(1)).port("tcp", "TCP", 80, 8080).build());
    put_slice(&server, Family::V4, 1, "node2", &ago(0));
    eventually(SOON, || {
        let scrape = Scrape::of(host)?;
        for (name, kind, labels) in NAMES {
            let prefixed = format!("kubeproxy_{name}");
            let name = if scrape.types.contains_key(&prefixed) { &*prefixed } else { name };
            let found = scrape.types.get(name).with_context(|| format!("no {name}: {:#?}", scrape.types))?;
            ensure!(found == kind, "{name} is a {found}");
            let found = scrape.labels(name, kind)?;
            ensure!(found == labels, "{name} has the labels {found}");
        }
        ensure!(scrape.types.keys().filter(|name| name.starts_with("kubeproxy_")).count() == 15);
        Ok(())
    })
}

#[test]
fn programming_latency_counts_each_change_that_tells_its_time() -> Result<()> {
    // E-24, H-35.
    let cluster = one_node(&["a"])?;
    let (server, host) = (server(&cluster)?, cluster.place("node1"));
    let _agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    server.put(&ServicePlan::new("web", &vips(1)).port("tcp", "TCP", 80, 8080).build());
    let figure = |scrape: &Scrape, what: &str, family: &str| {
        let name = format!("kubeproxy_network_programming_duration_seconds_{what}{{ip_family=\"{family}\"}}");
        scrape.samples.get(&name).copied().unwrap_or_default()
    };
    let changes = |wanted: f64| {
        eventually(SOON, || {
            let scrape = Scrape::of(host)?;
            let counted = scrape.value("kubeproxy_sync_proxy_rules_endpoint_changes_total")?;
            let pending = scrape.value("kubeproxy_sync_proxy_rules_endpoint_changes_pending")?;
            ensure!((counted, pending) == (wanted, 0.0), "{counted} counted, {pending} pending");
            Ok(scrape)
        })
    };
    put_slice(&server, Family::V4, 1, "node2", &ago(3600));
    put_slice(&server, Family::V6, 1, "node2", "yesterday");
    let none = changes(2.0)?;
    ensure!(
        figure(&none, "count", "IPv4") == 0.0 && figure(&none, "count", "IPv6") == 0.0,
        "what is old counts"
    );
    put_slice(&server, Family::V4, 2, "node2", &ago(0));
    changes(3.0)?;
    // Y-7: the same again with another time is no change of endpoints: it is counted, and nothing is programmed.
    let generation = |scrape: &Scrape| scrape.value("proxy_agent_generation");
    let before = generation(&changes(3.0)?)?;
    put_slice(&server, Family::V4, 2, "node2", &ago(0));
    ensure!(generation(&changes(4.0)?)? == before, "what is repeated was programmed");
    put_slice(&server, Family::V4, 3, "node2", &ago(0));
    let two = changes(5.0)?;
    ensure!(
        figure(&two, "count", "IPv4") == 2.0 && figure(&two, "count", "IPv6") == 0.0,
        "{:#?}",
        two.samples
    );
    let (sum, bound) = (figure(&two, "sum", "IPv4"), SOON.as_secs_f64() * 2.0);
    ensure!(sum > 0.0 && sum < bound, "{sum} s");
    Ok(())
}

#[test]
fn services_without_an_endpoint_here_are_counted_by_policy_and_family() -> Result<()> {
    // H-42; H-39, H-49: a Service is a change for each family, a slice for its own.
    let cluster = one_node(&["a"])?;
    let (server, host) = (server(&cluster)?, cluster.place("node1"));
    let _agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    let until = |internal: f64, external: f64, v6: f64| {
        eventually(SOON, || {
            let scrape = Scrape::of(host)?;
            let count = |policy: &str, family: &str| {
                scrape.value(&format!(
                    "kubeproxy_sync_proxy_rules_no_local_endpoints_total\
                     {{traffic_policy=\"{policy}\",ip_family=\"{family}\"}}"
                ))
            };
            let found = (count("internal", "IPv4")?, count("external", "IPv4")?, count("internal", "IPv6")?);
            ensure!(found == (internal, external, v6), "{found:?}");
            Ok(scrape)
        })
    };
    let plan = || ServicePlan::new("web", &vips(1)).port("tcp", "TCP", 80, 8080);
    server.put(&plan().internal_local().build());
    eventually(SOON, || {
        let counted = Scrape::of(host)?.value("kubeproxy_sync_proxy_rules_service_changes_total")?;
        ensure!(counted == 2.0, "{counted} changes");
        Ok(())
    })?;
    // Without any endpoint nothing is amiss on this node in particular.
    until(0.0, 0.0, 0.0)?;
    put_slice(&server, Family::V4, 1, "node2", &ago(0));
    until(1.0, 0.0, 0.0)?;
    put_slice(&server, Family::V6, 1, "node2", &ago(0));
    until(1.0, 0.0, 1.0)?;
    put_slice(&server, Family::V4, 1, "node1", &ago(0));
    until(0.0, 0.0, 1.0)?;
    put_slice(&server, Family::V4, 1, "node2", &ago(0));
    server.put(&plan().node_port(30080).external_local(None).build());
    until(0.0, 1.0, 0.0)?;
    // A policy for external traffic that cannot come does not count.
    server.put(&plan().external_local(None).build());
    let scrape = until(0.0, 0.0, 0.0)?;
    ensure!(
        scrape.value("kubeproxy_sync_proxy_rules_service_changes_total")? >= 6.0,
        "{:#?}",
        scrape.samples
    );
    Ok(())
}

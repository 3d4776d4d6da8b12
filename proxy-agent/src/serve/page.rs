//! The figures of one scrape, each under its documented name (docs/metrics.md).

use std::collections::BTreeMap;
use std::fmt;

use agent_core::model::{Family, NoLocalByFamily};
use agent_kernel::datapath::pinned::MapFill;
use agent_kernel::datapath::tables::growth::Standing;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet};
use prometheus_client::metrics::MetricType;

use super::health::{Health, family_name};
use super::probes::ProbeCounts;
use super::snapshot::Snapshot;

/// Labels of a counter without exemplars.
type Labels = [(&'static str, &'static str); 1];

/// A name, what it means, and its values by label.
pub(super) struct Page<'a>(pub(super) DescriptorEncoder<'a>);

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
pub(super) fn of_kube_proxy(page: &mut Page<'_>, snapshot: &Snapshot, health: &Health) -> fmt::Result {
    let times = health.times();
    let label = |family| [("ip_family", family_name(family))];
    page.gauges(
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "When tables last equalled what is wanted, Unix time",
        times.iter().filter_map(|t| Some((label(t.family), t.synced?))),
    )?;
    page.gauges(
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
        "When a sync was last wanted, Unix time",
        times.iter().filter_map(|t| Some((label(t.family), t.queued?))),
    )?;
    page.gauge(
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
        "EndpointSlice changes not yet programmed",
        snapshot.endpoint_changes_pending,
    )?;
    page.counter(
        "kubeproxy_sync_proxy_rules_endpoint_changes",
        "EndpointSlice changes received",
        snapshot.endpoint_changes,
    )?;
    page.gauge(
        "kubeproxy_sync_proxy_rules_service_changes_pending",
        "Services with changes not yet programmed",
        snapshot.service_changes_pending,
    )?;
    page.counter(
        "kubeproxy_sync_proxy_rules_service_changes",
        "Service changes received",
        snapshot.service_changes,
    )?;
    let NoLocalByFamily { v4, v6 } = snapshot.without_local;
    let without = |policy, family, count: u64| {
        ([("traffic_policy", policy), ("ip_family", family_name(family))], count as f64)
    };
    page.gauges(
        // A gauge all the same (H-42).
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "Service ports with policy Local that have endpoints, but none on this node",
        [
            without("internal", Family::V4, v4.internal),
            without("external", Family::V4, v4.external),
            without("internal", Family::V6, v6.internal),
            without("external", Family::V6, v6.external),
        ],
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

/// As every component of Kubernetes has it (H-48).
pub(super) fn of_component(page: &mut Page<'_>) -> fmt::Result {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let labels = [
        ("major", env!("CARGO_PKG_VERSION_MAJOR").to_owned()),
        ("minor", env!("CARGO_PKG_VERSION_MINOR").to_owned()),
        ("git_version", concat!("v", env!("CARGO_PKG_VERSION")).to_owned()),
        ("compiler", "rustc".to_owned()),
        ("platform", format!("{}/{architecture}", std::env::consts::OS)),
    ];
    page.gauges("kubernetes_build_info", "Version of the agent; always 1", [(labels, 1.0)])
}

/// Under our own names.
pub(super) fn of_agent(page: &mut Page<'_>, snapshot: &Snapshot) -> fmt::Result {
    let Snapshot {
        source,
        connected,
        services,
        endpoints,
        frontends,
        interfaces,
        interfaces_failed,
        generation,
        warnings,
        dsr_nodes,
        probes,
        connections,
        reasons,
        tables,
        growth,
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
    page.gauge("proxy_agent_generation", "Syncs that changed a table", *generation)?;
    page.gauge("proxy_agent_warnings", "Objects left out because they are wrong", *warnings)?;
    page.gauge("proxy_agent_http_connections", "Connections to the agent's own ports", connections.open)?;
    page.counters(
        "proxy_agent_http_connections_closed",
        "Connections to the agent's own ports that were closed, and why",
        [("displaced", connections.displaced), ("overdue", connections.overdue)]
            .map(|(why, count)| ([("why", why)], count)),
    )?;
    page.counter(
        "proxy_agent_log_lines_lost",
        "Lines of the log that stderr did not take",
        crate::logging::lost(),
    )?;
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
    )?;
    of_direct(page, dsr_nodes, *probes)?;
    of_growth(page, growth)
}

/// Who is reached directly, and how that is known.
fn of_direct(page: &mut Page<'_>, nodes: &BTreeMap<&'static str, u64>, probes: ProbeCounts) -> fmt::Result {
    page.gauges(
        "proxy_agent_dsr_nodes",
        "Other nodes whose endpoints answer clients themselves, by whether they are reached directly (ready) or why not",
        nodes.iter().map(|(state, count)| ([("state", *state)], *count as f64)),
    )?;
    let ProbeCounts { asked, answered, missing, given, withheld } = probes;
    page.counters(
        "proxy_agent_dsr_probes",
        "Questions to other nodes (asked), answers that came (answered) or not (missing), answers to other nodes (given), and \
         their questions beyond what is answered (withheld)",
        [("asked", asked), ("answered", answered), ("missing", missing), ("given", given), ("withheld", withheld)]
            .map(|(what, count)| ([("what", what)], count)),
    )
}

/// What is planned is there for the seconds that it takes; what is blocked, as long as it is.
fn of_growth(page: &mut Page<'_>, growth: &Standing) -> fmt::Result {
    let Standing { memory, limit, planned, blocked, done, failed } = growth;
    page.gauge("proxy_agent_table_memory_bytes", "Memory of all tables when they are full", *memory)?;
    page.gauge("proxy_agent_table_memory_limit_bytes", "Memory that --map-memory allows them", *limit)?;
    page.gauges(
        "proxy_agent_table_planned_entries",
        "Entries that the table is about to be made for, since it fills",
        planned.iter().map(|(table, entries)| ([("table", *table)], f64::from(*entries))),
    )?;
    page.gauges(
        "proxy_agent_table_growth_blocked",
        "1 for a table that is four fifths full and cannot grow, by --map-memory (memory) or its own flag (limit)",
        blocked.iter().map(|(table, by)| ([("table", *table), ("by", by.label())], 1.0)),
    )?;
    page.counters(
        "proxy_agent_table_growths",
        "How often tables have become larger under way",
        [("done", *done), ("failed", *failed)].map(|(result, count)| ([("result", result)], count)),
    )
}

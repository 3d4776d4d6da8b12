//! `docs/metrics.md` and the code name the same metrics, labels and reasons: the page's tables are written from here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use agent_core::model::Family;
use proxy_common::abi::Reason;

use super::ask;
use super::metrics::{router, tests::metrics};

/// Values of these labels are no fixed set.
const OPEN_LABELS: [&str; 7] = ["compiler", "git_version", "major", "minor", "platform", "source", "version"];

/// A metric as `/metrics` shows it.
#[derive(Default)]
struct Metric {
    kind: String,
    help: String,
    labels: BTreeMap<String, BTreeSet<String>>,
}

#[tokio::test]
async fn the_page_names_the_metrics_that_there_are() {
    let metrics = metrics();
    metrics.syncs().took(Family::V4, true, Duration::from_millis(3));
    metrics.syncs().took(Family::V4, false, Duration::from_millis(5));
    metrics.syncs().programmed(Family::V4, 1.0);
    metrics.syncs().reconciled(Family::V4, 1, Duration::from_millis(1));
    let all = parse(&ask(router(metrics.clone()), "GET", "/metrics").await);
    let slis = parse(&ask(router(metrics), "GET", "/metrics/slis").await);
    let named = |prefixes: &[&str]| {
        let named = all.iter().filter(|(name, _)| prefixes.iter().any(|prefix| name.starts_with(prefix)));
        table(named)
    };
    let reasons =
        Reason::ALL.iter().map(|reason| format!("| `{}` | {} |\n", reason.label(), reason.meaning()));
    let blocks = [
        ("kube-proxy", named(&["kubeproxy_"])),
        ("component", named(&["kubernetes_", "process_"])),
        ("slis", table(slis.iter())),
        ("agent", named(&["proxy_agent_"])),
        ("reasons", format!("| `reason` | Meaning |\n|---|---|\n{}", reasons.collect::<String>())),
    ];
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let written = std::fs::read_to_string(path).unwrap();
    let now = blocks.iter().fold(written.clone(), |page, (name, block)| replaced(&page, name, block));
    if written == now {
        return;
    }
    if std::env::var_os("UPDATE_EXPECT").is_some_and(|value| value == "1") {
        return std::fs::write(path, now).unwrap();
    }
    let lost = written.lines().filter(|line| !now.contains(line));
    let new = now.lines().filter(|line| !written.contains(line));
    let diff: String = lost.map(|l| format!("- {l}\n")).chain(new.map(|l| format!("+ {l}\n"))).collect();
    panic!(
        "docs/metrics.md does not say what /metrics shows (- written, + as it is now):\n{diff}\
         names are stable: if the change is meant, say so in CHANGELOG.md, and then\n\
         UPDATE_EXPECT=1 cargo test --package proxy-agent the_page_names"
    );
}

fn parse(response: &str) -> BTreeMap<String, Metric> {
    let mut metrics: BTreeMap<String, Metric> = BTreeMap::new();
    for line in response.split_once("\r\n\r\n").unwrap().1.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(name), Some(help)) => {
                metrics.entry(name.to_owned()).or_default().help = help.to_owned();
            }
            (Some("#"), Some("TYPE"), Some(name), Some(kind)) => {
                metrics.entry(name.to_owned()).or_default().kind = kind.to_owned();
            }
            _ => {
                let (name, labels) = line.split_once('{').unwrap_or((line, ""));
                let (of, metric) =
                    metrics.iter_mut().rev().find(|(of, _)| name.starts_with(of.as_str())).unwrap();
                assert!(!of.is_empty(), "{line}");
                let labels = labels.rsplit_once('}').map_or("", |(labels, _)| labels);
                for (label, value) in labels.split("\",").filter_map(|label| label.split_once("=\"")) {
                    let values = metric.labels.entry(label.to_owned()).or_default();
                    values.insert(value.trim_end_matches('"').to_owned());
                }
            }
        }
    }
    metrics
}

/// Rows: name, type, unit, labels with their values, meaning.
fn table<'a>(metrics: impl Iterator<Item = (&'a String, &'a Metric)>) -> String {
    let mut table = "| Name | Type | Unit | Labels | Meaning |\n|---|---|---|---|---|\n".to_owned();
    for (name, Metric { kind, help, labels }) in metrics {
        let base = name.trim_end_matches("_total");
        let unit = ["seconds", "bytes"].into_iter().find(|unit| base.ends_with(unit)).unwrap_or_default();
        let labels: Vec<String> = labels.iter().filter(|(label, _)| *label != "le").map(label).collect();
        // Writing to a string does not fail.
        writeln!(
            table,
            "| `{name}` | {kind} | {unit} | {} | {} |",
            labels.join("; "),
            help.trim_end_matches('.')
        )
        .ok();
    }
    table
}

fn label((label, values): (&String, &BTreeSet<String>)) -> String {
    match label.as_str() {
        "reason" => "`reason`: see below".to_owned(),
        "table" => "`table`".to_owned(),
        // Each figure has both, as soon as there is something to say of them.
        "ip_family" => "`ip_family`: `IPv4`, `IPv6`".to_owned(),
        label if OPEN_LABELS.contains(&label) => format!("`{label}`"),
        label => {
            let values: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
            format!("`{label}`: {}", values.join(", "))
        }
    }
}

/// The page with another block between the two marks of this name.
fn replaced(page: &str, name: &str, block: &str) -> String {
    let (begin, end) = (format!("<!-- {name}: written by a test -->\n"), format!("<!-- end of {name} -->\n"));
    let (before, rest) = page.split_once(&begin).unwrap_or_else(|| panic!("no {begin}"));
    let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("no {end}"));
    format!("{before}{begin}\n{block}\n{end}{after}")
}

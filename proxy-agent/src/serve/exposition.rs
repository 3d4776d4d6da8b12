//! The two text forms of metrics: OpenMetrics, and the older one for those who do not ask for it (H-27).

use axum::http::HeaderMap;
use axum::http::header::ACCEPT;

/// `Content-Type` of OpenMetrics.
pub(super) const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// `Content-Type` of the older form.
pub(super) const PLAIN: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Whether OpenMetrics is asked for by name.
pub(super) fn wants_open_metrics(headers: &HeaderMap) -> bool {
    let mut accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted.any(|value| value.contains("application/openmetrics-text"))
}

/// OpenMetrics in the older form: there the whole name of a counter is its name, and nothing marks the end.
pub(super) fn plain(open_metrics: &str) -> String {
    let mut plain = String::with_capacity(open_metrics.len());
    let counters: Vec<&str> = open_metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    for line in open_metrics.lines().filter(|line| *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("UNIT"), ..) => continue,
            (Some("#"), Some(what), Some(name), Some(rest)) if counters.contains(&name) => {
                plain += &format!("# {what} {name}_total {rest}\n");
            }
            _ => {
                plain += line;
                plain.push('\n');
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newer_form_is_for_those_who_ask_for_it() {
        // H-27.
        let asks = |accept: &'static str| {
            let mut headers = HeaderMap::new();
            headers.append(ACCEPT, http::HeaderValue::from_static(accept));
            wants_open_metrics(&headers)
        };
        assert!(asks("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"));
        assert!(!asks("text/plain") && !asks("*/*") && !wants_open_metrics(&HeaderMap::new()));
    }

    #[test]
    fn counters_have_their_whole_name_in_the_older_form() {
        // H-27.
        let open =
            "# HELP a_b Word.\n# TYPE a_b counter\na_b_total 1\n# HELP c X.\n# TYPE c gauge\nc 2\n# EOF\n";
        let expected = "# HELP a_b_total Word.\n# TYPE a_b_total counter\na_b_total 1\n# HELP c X.\n# TYPE c gauge\nc 2\n";
        assert_eq!(plain(open), expected);
    }
}

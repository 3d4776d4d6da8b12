//! What a request asks of a server.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// The width of the window in which most come.
const WINDOW: Duration = Duration::from_millis(100);

fn query(request: &str) -> HashMap<String, String> {
    let (_, query) = request.split_once('?').unwrap_or((request, ""));
    form_urlencoded::parse(query.as_bytes()).into_owned().collect()
}

fn says(query: &HashMap<String, String>, name: &str) -> bool {
    query.get(name).is_some_and(|value| value == "true")
}

/// Whether it has a server ask its storage: without a version only that is new enough.
pub(super) fn reads_storage(request: &str) -> bool {
    !request.starts_with("/livez") && query(request).get("resourceVersion").is_none_or(String::is_empty)
}

/// Whether it has a server send all objects of a kind.
pub(super) fn lists(request: &str) -> bool {
    let query = query(request);
    says(&query, "sendInitialEvents") || query.contains_key("limit")
}

/// Whether it only goes on with a watch.
pub(super) fn goes_on(request: &str) -> bool {
    let query = query(request);
    says(&query, "watch") && !says(&query, "sendInitialEvents")
}

/// How many come at most in a tenth of a second.
pub(super) fn busiest(times: &[Instant]) -> usize {
    let mut times = times.to_vec();
    times.sort_unstable();
    let within = |first: &usize| times[*first..].partition_point(|time| *time < times[*first] + WINDOW);
    (0..times.len()).map(|first| within(&first)).max().unwrap_or(0)
}

/// How many come in each half second: `1.5 s: 20, 2.0 s: 31`.
pub(super) fn spread(times: &[Instant], from: Instant) -> String {
    let mut bins = std::collections::BTreeMap::new();
    for time in times {
        *bins.entry(time.saturating_duration_since(from).as_millis() / 500).or_insert(0) += 1;
    }
    let bins = bins.into_iter().map(|(bin, count)| format!("{}.{} s: {count}", bin / 2, bin % 2 * 5));
    bins.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_watches_and_what_is_read_from_storage_are_told_apart() {
        let first = "/api/v1/services?watch=true&sendInitialEvents=true&resourceVersion=0";
        assert!(lists(first) && !goes_on(first) && !reads_storage(first));
        let newest = "/api/v1/services?watch=true&sendInitialEvents=true&resourceVersion=";
        assert!(lists(newest) && reads_storage(newest));
        let again = "/api/v1/services?watch=true&resourceVersion=7";
        assert!(goes_on(again) && !lists(again) && !reads_storage(again));
        assert!(reads_storage("/api/v1/namespaces/kube-public/configmaps/cluster-info"));
        assert!(!reads_storage("/livez") && lists("/api/v1/services?limit=500"));
    }

    #[test]
    fn a_crowd_is_seen_in_its_busiest_moment() {
        let begun = Instant::now();
        let after = |millis| begun + Duration::from_millis(millis);
        assert_eq!(busiest(&[]), 0);
        assert_eq!(busiest(&[after(900), after(0), after(60), after(150), after(159)]), 3);
        assert_eq!(spread(&[after(10), after(1600), after(499)], begun), "0.0 s: 2, 1.5 s: 1");
    }
}

//! Counts requests to the API server under the names of Kubernetes' own clients (H-48).

use std::time::Instant;

use http::StatusCode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

type Labels<const N: usize> = [(&'static str, String); N];

/// The metrics. Clones share them.
#[derive(Clone, Debug)]
pub struct Requests {
    total: Family<Labels<3>, Counter>,
    duration: Family<Labels<2>, Histogram, fn() -> Histogram>,
    ended: Family<Labels<2>, Counter>,
    failovers: Counter,
}

impl Default for Requests {
    fn default() -> Self {
        Self {
            total: Family::default(),
            duration: Family::new_with_constructor(duration),
            ended: Family::default(),
            failovers: Counter::default(),
        }
    }
}

fn duration() -> Histogram {
    Histogram::new([0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0])
}

impl Requests {
    pub fn register(&self, registry: &mut Registry) {
        let help = "Requests to the API server by code, method and host";
        registry.register("rest_client_requests", help, self.total.clone());
        let help = "How long the API server took to begin its answer, by verb and host";
        registry.register("rest_client_request_duration_seconds", help, self.duration.clone());
        let help = "Watches of the API server that ended or could not be started, by resource and reason";
        registry.register("proxy_agent_watches_ended", help, self.ended.clone());
        let help = "Failovers from one API server to another";
        registry.register("proxy_agent_apiserver_failovers", help, self.failovers.clone());
    }

    pub(in crate::api) fn begin(&self, method: &str, host: &str) -> Counting<'_> {
        Counting { requests: self, method: method.to_owned(), host: host.to_owned(), began: Instant::now() }
    }

    pub(in crate::api) fn failovers(&self) -> Counter {
        self.failovers.clone()
    }

    /// Counts a watch that has ended or could not be started.
    pub(in crate::api) fn ended(&self, resource: &str, reason: &str) {
        self.ended.get_or_create(&[("resource", resource.to_owned()), ("reason", reason.to_owned())]).inc();
    }
}

/// A request under way.
#[derive(Debug)]
pub(in crate::api) struct Counting<'a> {
    requests: &'a Requests,
    method: String,
    host: String,
    began: Instant,
}

impl Counting<'_> {
    /// The request was answered, or has failed (`None`).
    pub(in crate::api) fn done(self, status: Option<StatusCode>) {
        let Self { requests, method, host, began } = self;
        let code = status.map_or_else(|| "<error>".to_owned(), |status| status.as_u16().to_string());
        let verb = [("verb", method.clone()), ("host", host.clone())];
        requests.duration.get_or_create(&verb).observe(began.elapsed().as_secs_f64());
        requests.total.get_or_create(&[("code", code), ("method", method), ("host", host)]).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_under_its_documented_name() {
        // H-48.
        let requests = Requests::default();
        requests.begin("GET", "host").done(None);
        requests.ended("services", "expired");
        let mut registry = Registry::default();
        requests.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let page = include_str!("../../../../../docs/metrics.md");
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        let names =
            types.map(|(name, of)| if of == "counter" { format!("{name}_total") } else { name.to_owned() });
        let missing: Vec<_> = names.filter(|name| !page.contains(&format!("\n| `{name}` |"))).collect();
        assert!(missing.is_empty(), "docs/metrics.md lacks {missing:?}");
        assert!(
            text.contains(r#"rest_client_requests_total{code="<error>",method="GET",host="host"} 1"#),
            "{text}"
        );
        assert!(
            text.contains(r#"rest_client_request_duration_seconds_count{verb="GET",host="host"} 1"#),
            "{text}"
        );
        assert!(
            text.contains(r#"proxy_agent_watches_ended_total{resource="services",reason="expired"} 1"#),
            "{text}"
        );
        assert!(text.contains("proxy_agent_apiserver_failovers_total 0"), "{text}");
    }
}

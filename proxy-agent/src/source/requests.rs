//! Counts requests to the API server under the names of Kubernetes' own clients (H-48).

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use http::{Request, Response};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tower::{Layer, Service};

type Labels<const N: usize> = [(&'static str, String); N];

/// The counters. Clones share them.
#[derive(Clone, Debug)]
pub struct Requests {
    total: Family<Labels<3>, Counter>,
    duration: Family<Labels<2>, Histogram, fn() -> Histogram>,
}

impl Default for Requests {
    fn default() -> Self {
        Self { total: Family::default(), duration: Family::new_with_constructor(duration) }
    }
}

fn duration() -> Histogram {
    Histogram::new([0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0])
}

impl Requests {
    /// Offers the counters to whoever scrapes `registry`.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Requests to the API server by code, method and host";
        registry.register("rest_client_requests", help, self.total.clone());
        let help = "How long the API server took to begin its answer, by verb and host";
        registry.register("rest_client_request_duration_seconds", help, self.duration.clone());
    }

    /// What counts the requests that a client sends to `host`.
    pub(super) fn counting(&self, host: &str) -> Counting {
        Counting { requests: self.clone(), host: host.to_owned() }
    }

    fn done(&self, method: &str, host: &str, code: String, began: Instant) {
        let (method, host) = (method.to_owned(), host.to_owned());
        let verb = [("verb", method.clone()), ("host", host.clone())];
        self.duration.get_or_create(&verb).observe(began.elapsed().as_secs_f64());
        self.total.get_or_create(&[("code", code), ("method", method), ("host", host)]).inc();
    }
}

/// A layer of a client.
#[derive(Clone, Debug)]
pub(super) struct Counting {
    requests: Requests,
    host: String,
}

impl<S> Layer<S> for Counting {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, counting: self.clone() }
    }
}

/// A client that counts.
#[derive(Clone, Debug)]
pub(super) struct Counted<S> {
    inner: S,
    counting: Counting,
}

impl<S, A, B> Service<Request<A>> for Counted<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let Counting { requests, host } = self.counting.clone();
        let (method, began) = (request.method().to_string(), Instant::now());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            let code = match &answer {
                Ok(response) => response.status().as_u16().to_string(),
                Err(_) => "<error>".to_owned(),
            };
            requests.done(&method, &host, code, began);
            answer
        })
    }
}

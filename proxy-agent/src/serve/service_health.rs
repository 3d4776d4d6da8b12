//! `healthCheckNodePort`: tells load balancers whether this node has endpoints of a Service (H-14…H-25).
//!
//! The loop says after each sync what is wanted ([`ServiceHealth::want`]); a [`Server`] beside the other
//! servers brings the listeners in line. What cannot be opened is tried again, and told as a warning.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::http::{Response, StatusCode};
use axum::routing::any;
use nix::sys::socket::{setsockopt, sockopt};
use serde::Serialize;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::health::family_name;
use super::{Connections, Health};
use agent_core::model::{Accepted, Family, HealthCheck, ObjectName};
use agent_source::api::events::{Event, Events};

/// When what could not be opened is tried again, if no sync comes first (H-16).
const RETRY: Duration = Duration::from_secs(5);
const BACKLOG: u32 = 128;

/// What should be served, as of the last sync.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Counts, a family each.
    pub checks: BTreeMap<ObjectName, Vec<HealthCheck>>,
    /// IPv4 addresses at which NodePorts are accepted (H-15).
    pub v4: Accepted,
    /// The same for IPv6.
    pub v6: Accepted,
}

impl Wanted {
    pub const NOTHING: Self =
        Self { checks: BTreeMap::new(), v4: Accepted::Everywhere, v6: Accepted::Everywhere };

    fn check(&self, (service, family): &Key) -> Option<&HealthCheck> {
        self.checks.get(service)?.iter().find(|check| check.family == *family)
    }

    fn addresses(&self, family: Family) -> Vec<IpAddr> {
        match (family, if family == Family::V4 { &self.v4 } else { &self.v6 }) {
            (Family::V4, Accepted::Everywhere) => vec![Ipv4Addr::UNSPECIFIED.into()],
            (Family::V6, Accepted::Everywhere) => vec![Ipv6Addr::UNSPECIFIED.into()],
            (_, Accepted::At(ips)) => ips.clone(),
        }
    }
}

/// One Service in one family: each family listens on its own (H-14).
type Key = (ObjectName, Family);

/// The loop's end: says what is wanted, hears what does not work.
#[derive(Debug)]
pub struct ServiceHealth {
    wanted: watch::Sender<Wanted>,
    failures: Arc<Mutex<BTreeMap<Key, String>>>,
}

impl Default for ServiceHealth {
    fn default() -> Self {
        Self { wanted: watch::Sender::new(Wanted::NOTHING), failures: Arc::default() }
    }
}

impl ServiceHealth {
    /// To be called after each successful sync, even when nothing has changed: what failed is tried again. `changed` are the
    /// Services whose checks are other ones now, or none; `accepted` is where each family is served.
    pub fn want(&self, changed: Vec<(ObjectName, Vec<HealthCheck>)>, accepted: [Accepted; 2]) {
        self.wanted.send_modify(|wanted| {
            for (service, checks) in changed {
                if checks.is_empty() {
                    wanted.checks.remove(&service);
                } else {
                    wanted.checks.insert(service, checks);
                }
            }
            [wanted.v4, wanted.v6] = accepted;
        });
    }

    /// What is not served and why, one line each.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.iter().map(|((service, _), line)| format!("Service {service}: {line}")).collect()
    }

    /// The other end, for the thread that serves.
    #[must_use]
    pub fn server(
        &self,
        health: Arc<Health>,
        node: Arc<str>,
        events: Events,
        connections: Connections,
    ) -> Server {
        Server {
            node,
            connections,
            events,
            wanted: self.wanted.subscribe(),
            failures: self.failures.clone(),
            health,
            served: BTreeMap::new(),
        }
    }
}

/// The listeners.
#[derive(Debug)]
pub struct Server {
    node: Arc<str>,
    connections: Connections,
    events: Events,
    wanted: watch::Receiver<Wanted>,
    failures: Arc<Mutex<BTreeMap<Key, String>>>,
    health: Arc<Health>,
    served: BTreeMap<Key, Served>,
}

/// The listeners of one Service in one family.
#[derive(Debug)]
struct Served {
    port: u16,
    count: Arc<AtomicUsize>,
    /// One task each, which holds the listener and its connections.
    at: BTreeMap<IpAddr, JoinSet<()>>,
}

impl Served {
    /// Stops listening and ends open connections (H-18): when this returns the port is free again.
    async fn close(self) {
        for mut task in self.at.into_values() {
            task.shutdown().await;
        }
    }
}

impl Server {
    /// Serves what is wanted until the loop has gone.
    pub async fn run(mut self) {
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let failed = self.reconcile(&wanted).await;
            tokio::select! {
                changed = self.wanted.changed() => if changed.is_err() {
                    return;
                },
                () = sleep(RETRY), if failed => {}
            }
        }
    }

    /// Closes, then opens, then counts (H-18). Tells whether anything could not be opened.
    async fn reconcile(&mut self, wanted: &Wanted) -> bool {
        for (_, served) in self
            .served
            .extract_if(.., |key, served| wanted.check(key).is_none_or(|check| check.port != served.port))
        {
            served.close().await;
        }
        let mut failures = BTreeMap::new();
        for check in wanted.checks.values().flatten() {
            let key = (check.service.clone(), check.family);
            if let Err((at, error)) = self.open(&key, check, &wanted.addresses(check.family)).await {
                let line = format!(
                    "healthCheckNodePort {} ({}) is not served: cannot listen at {at}: {error}; load \
                     balancers send this node nothing; trying again, does another Service or process hold it?",
                    check.port,
                    family_name(check.family)
                );
                failures.insert(key, line);
            }
        }
        let failed = !failures.is_empty();
        let mut known = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, line) in failures.iter().filter(|(key, line)| known.get(*key) != Some(*line)) {
            tracing::warn!("Service {}: {line}", key.0);
            let note = format!("node {}, Service {}: {line}", self.node, key.0);
            self.events.record(Event::NoServiceHealth(key.0.clone(), note)); // H-16.
        }
        *known = failures;
        failed
    }

    fn listeners(&self) -> usize {
        self.served.values().map(|served| served.at.len()).sum()
    }

    /// Brings one Service's listeners in line: all are open then, or none is (H-16).
    async fn open(
        &mut self,
        key: &Key,
        check: &HealthCheck,
        addresses: &[IpAddr],
    ) -> Result<(), (SocketAddr, io::Error)> {
        let served = self.served.entry(key.clone()).or_insert_with(|| Served {
            port: check.port,
            count: Arc::default(),
            at: BTreeMap::new(),
        });
        served.count.store(check.local_endpoints, Ordering::Relaxed);
        // H-17: the addresses may have changed since.
        for (_, mut task) in served.at.extract_if(.., |ip, _| !addresses.contains(ip)) {
            task.shutdown().await;
        }
        let missing: Vec<IpAddr> =
            addresses.iter().copied().filter(|ip| !served.at.contains_key(ip)).collect();
        let (all, most) = (self.listeners(), self.connections.limits().listeners);
        let Some(served) = self.served.get_mut(key) else { return Ok(()) };
        for (n, ip) in missing.into_iter().enumerate() {
            let address = SocketAddr::new(ip, check.port);
            let listener = if all + n < most {
                listen(address)
            } else {
                Err(io::Error::other(format!(
                    "no more than {most} such listeners are opened with so few file descriptors: raise the hard limit \
                     (LimitNOFILE=, ulimit -Hn)"
                )))
            };
            match listener {
                Ok(listener) => {
                    let (service, count) = (key.0.clone(), served.count.clone());
                    let page = Arc::new(Page { service, count, health: self.health.clone() });
                    let (connections, what) =
                        (self.connections.clone(), format!("health of Service {}", key.0));
                    let serving = async move { connections.serve(&what, listener, page.router()).await };
                    served.at.insert(ip, JoinSet::from_iter([serving]));
                }
                Err(error) => {
                    if let Some(served) = self.served.remove(key) {
                        served.close().await;
                    }
                    return Err((address, error));
                }
            }
        }
        Ok(())
    }
}

/// A listener of one family alone: both may hold the same port (H-14).
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    // Connections of a listener that was here a moment ago must not keep the port (H-25).
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// What one Service's listeners say.
#[derive(Debug)]
struct Page {
    service: ObjectName,
    count: Arc<AtomicUsize>,
    health: Arc<Health>,
}

/// The body, its keys in this order (H-23).
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer<'a> {
    service: Name<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct Name<'a> {
    namespace: &'a str,
    name: &'a str,
}

impl Page {
    /// The same whatever is asked (H-19).
    fn router(self: Arc<Self>) -> Router {
        Router::new().fallback(any(async move || {
            self.answer().map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
        }))
    }

    fn answer(&self) -> Result<Response<Body>, axum::Error> {
        let count = self.count.load(Ordering::Relaxed);
        let healthy = self.health.is_healthy();
        // H-21: whether the node wants traffic does not matter here.
        let code = if count != 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let answer = Answer {
            service: Name { namespace: &self.service.namespace, name: &self.service.name },
            local_endpoints: count,
            service_proxy_healthy: healthy,
        };
        let mut body = Vec::new();
        let tabs = serde_json::ser::PrettyFormatter::with_indent(b"\t");
        let written = answer.serialize(&mut serde_json::Serializer::with_formatter(&mut body, tabs));
        written.map_err(axum::Error::new)?;
        Response::builder()
            .status(code)
            .header(CONTENT_TYPE, "application/json")
            .header(X_CONTENT_TYPE_OPTIONS, "nosniff")
            .header("X-Load-Balancing-Endpoint-Weight", count)
            .body(body.into())
            .map_err(axum::Error::new)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use jiff::Timestamp;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::time::timeout;

    use super::super::health::{Clock, Moment};
    use super::*;

    const SOON: Duration = Duration::from_secs(10);
    const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    /// A clock that runs ahead by what it is told.
    #[derive(Clone, Default)]
    struct Ahead(Arc<Mutex<Duration>>);

    impl Clock for Ahead {
        fn now(&self) -> Moment {
            Moment { steady: Instant::now() + *self.0.lock().unwrap(), wall: Timestamp::UNIX_EPOCH }
        }
    }

    fn server() -> (ServiceHealth, Server, Arc<Health>, Ahead) {
        let clock = Ahead::default();
        let health = Arc::new(Health::new(clock.clone()));
        health.started(Family::V4);
        let service_health = ServiceHealth::default();
        let (events, _) = Events::new();
        let connections = Connections::new(super::super::Limits::of(1024));
        let server = service_health.server(health.clone(), "n1".into(), events, connections);
        (service_health, server, health, clock)
    }

    /// A port that was free a moment ago.
    fn port() -> u16 {
        std::net::TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
    }

    fn check(name: &str, family: Family, port: u16, local_endpoints: usize) -> HealthCheck {
        HealthCheck { service: ObjectName::new("shop", name), family, port, local_endpoints }
    }

    fn by_service(checks: &[HealthCheck]) -> BTreeMap<ObjectName, Vec<HealthCheck>> {
        let mut all: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for check in checks {
            all.entry(check.service.clone()).or_default().push(check.clone());
        }
        all
    }

    fn wanted(checks: &[HealthCheck], v4: &[IpAddr]) -> Wanted {
        Wanted { checks: by_service(checks), v4: Accepted::At(v4.to_vec()), v6: Accepted::Everywhere }
    }

    async fn ask(to: SocketAddr, line: &str) -> String {
        let mut stream = TcpStream::connect(to).await.unwrap();
        let request = format!("{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        timeout(SOON, stream.read_to_string(&mut response)).await.unwrap().unwrap();
        response
    }

    async fn is_closed(to: SocketAddr) -> bool {
        TcpStream::connect(to).await.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
    }

    #[tokio::test]
    async fn the_answer_is_byte_for_byte_as_documented_whatever_is_asked() {
        let (_, mut server, ..) = server();
        let port = port();
        assert!(!server.reconcile(&wanted(&[check("web", Family::V4, port, 3)], &[LOCAL])).await);
        // H-19.
        for line in ["GET /", "POST /healthz", "DELETE /any/where?at=all"] {
            let response = ask(SocketAddr::new(LOCAL, port), line).await;
            assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
            // H-22.
            assert!(response.contains("content-type: application/json\r\n"), "{response}");
            assert!(response.contains("x-content-type-options: nosniff\r\n"), "{response}");
            assert!(response.contains("x-load-balancing-endpoint-weight: 3\r\n"), "{response}");
            // H-23.
            let body = response.split("\r\n\r\n").nth(1).unwrap();
            let expected = "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\
                            \t\"localEndpoints\": 3,\n\t\"serviceProxyHealthy\": true\n}";
            assert_eq!(body, expected);
        }
    }

    #[tokio::test]
    async fn without_local_endpoints_or_with_a_late_proxy_the_answer_is_503() {
        let (_, mut server, health, clock) = server();
        let at = SocketAddr::new(LOCAL, port());
        // H-21, T-105. That this node was never seen, and so wants no traffic, does not matter.
        let cases = [
            (0, false, "503", "weight: 0", "\"serviceProxyHealthy\": true"),
            (3, false, "200", "weight: 3", "\"serviceProxyHealthy\": true"),
            (3, true, "503", "weight: 3", "\"serviceProxyHealthy\": false"),
        ];
        for (count, late, code, weight, healthy) in cases {
            server.reconcile(&wanted(&[check("web", Family::V4, at.port(), count)], &[LOCAL])).await;
            if late {
                health.queued(Family::V4);
                *clock.0.lock().unwrap() += Duration::from_secs(60);
            }
            let response = ask(at, "GET /").await;
            for expected in [code, weight, healthy, &format!("\"localEndpoints\": {count}")] {
                assert!(response.contains(expected), "{count} {late}: {response}");
            }
        }
    }

    #[tokio::test]
    async fn a_service_that_goes_takes_its_connections_along_and_may_come_back() {
        let (_, mut server, ..) = server();
        let at = SocketAddr::new(LOCAL, port());
        let open = wanted(&[check("web", Family::V4, at.port(), 1)], &[LOCAL]);
        // T-106, H-18, H-25: twice, since the same port must serve again.
        for _ in 0..2 {
            assert!(!server.reconcile(&open).await);
            let mut kept = TcpStream::connect(at).await.unwrap();
            kept.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            let mut begun = [0; 12];
            timeout(SOON, kept.read_exact(&mut begun)).await.unwrap().unwrap();
            assert_eq!(&begun, b"HTTP/1.1 200");
            server.reconcile(&wanted(&[], &[LOCAL])).await;
            assert!(is_closed(at).await);
            // The connection was kept alive; its end is the server's doing (a reset is one, too).
            let mut rest = Vec::new();
            timeout(SOON, kept.read_to_end(&mut rest)).await.expect("the connection is still open").ok();
        }
        // H-18: another port.
        server.reconcile(&open).await;
        let moved = SocketAddr::new(LOCAL, port());
        server.reconcile(&wanted(&[check("web", Family::V4, moved.port(), 1)], &[LOCAL])).await;
        assert!(is_closed(at).await);
        assert!(ask(moved, "GET /").await.contains("200 OK"));
    }

    #[tokio::test]
    async fn both_families_hold_the_same_port_and_tell_their_own_count() {
        let (_, mut server, ..) = server();
        let port = port();
        let checks = [check("web", Family::V4, port, 2), check("web", Family::V6, port, 5)];
        let everywhere =
            Wanted { checks: by_service(&checks), v4: Accepted::Everywhere, v6: Accepted::Everywhere };
        // H-14: were one socket to serve both families, the other could not be opened.
        assert!(!server.reconcile(&everywhere).await);
        let v6 = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
        assert!(ask(SocketAddr::new(LOCAL, port), "GET /").await.contains("weight: 2"));
        assert!(ask(v6, "GET /").await.contains("weight: 5"));
        // H-15: an accepted address that exists nowhere is no reason to listen, and no error.
        let nowhere = Wanted { v6: Accepted::At(Vec::new()), ..everywhere };
        assert!(!server.reconcile(&nowhere).await);
        assert!(is_closed(v6).await);
        assert!(ask(SocketAddr::new(LOCAL, port), "GET /").await.contains("weight: 2"));
    }

    #[tokio::test]
    async fn all_listeners_of_a_service_are_open_or_none_is() {
        let (service_health, mut server, ..) = server();
        let second: IpAddr = "127.0.0.2".parse().unwrap();
        let (at, port) = ([LOCAL, second], port());
        let both = wanted(&[check("web", Family::V4, port, 1)], &at);
        let taken = TcpListener::bind((second, port)).await.unwrap();
        // H-16.
        assert!(server.reconcile(&both).await);
        assert!(is_closed(SocketAddr::new(LOCAL, port)).await);
        let [warning] = service_health.warnings().try_into().unwrap();
        for part in ["Service shop/web: ", &format!("{port} (IPv4)"), &format!("127.0.0.2:{port}"), "in use"]
        {
            assert!(warning.contains(part), "{warning}");
        }
        drop(taken);
        assert!(!server.reconcile(&both).await);
        for ip in at {
            assert!(ask(SocketAddr::new(ip, port), "GET /").await.contains("200 OK"));
        }
        assert!(service_health.warnings().is_empty());
        // H-17: an address that goes takes its listener along and no other.
        server.reconcile(&Wanted { v4: Accepted::At(vec![LOCAL]), ..both }).await;
        assert!(is_closed(SocketAddr::new(second, port)).await);
        assert!(ask(SocketAddr::new(LOCAL, port), "GET /").await.contains("200 OK"));
    }

    #[tokio::test]
    async fn of_two_services_with_one_port_the_first_keeps_it_until_it_goes() {
        let (service_health, server, ..) = server();
        let at = SocketAddr::new(LOCAL, port());
        let of = |name, count| check(name, Family::V4, at.port(), count);
        let running = tokio::spawn(server.run());
        let settled = async |done: &dyn Fn(&[String]) -> bool| {
            let wait = async {
                while !done(&service_health.warnings()) {
                    tokio::task::yield_now().await;
                }
            };
            timeout(SOON, wait).await.expect("the listeners do not get there");
        };
        // H-16, X-21: "b" listens first, so "a" is refused, though it comes first by name.
        service_health.wanted.send_replace(wanted(&[of("b", 7)], &[LOCAL]));
        let open = async {
            while is_closed(at).await {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, open).await.unwrap();
        service_health.wanted.send_replace(wanted(&[of("a", 1), of("b", 7)], &[LOCAL]));
        settled(&|lines| lines.len() == 1 && lines[0].contains("Service shop/a")).await;
        assert!(ask(at, "GET /").await.contains("weight: 7"));
        service_health.wanted.send_replace(wanted(&[of("a", 1)], &[LOCAL]));
        settled(&<[String]>::is_empty).await;
        assert!(ask(at, "GET /").await.contains("weight: 1"));
        // When the loop ends, so do the listeners.
        drop(service_health);
        timeout(SOON, running).await.unwrap().unwrap();
        assert!(is_closed(at).await);
    }

    #[test]
    fn only_what_has_changed_is_said_and_the_rest_stays_wanted() {
        // Y-25.
        let service_health = ServiceHealth::default();
        let everywhere = || [Accepted::Everywhere, Accepted::Everywhere];
        let say = |name: &str, checks: &[HealthCheck]| {
            service_health.want(vec![(ObjectName::new("shop", name), checks.to_vec())], everywhere());
            service_health.wanted.borrow().checks.values().flatten().cloned().collect::<Vec<_>>()
        };
        let (a, b) = (check("a", Family::V4, 1, 2), check("b", Family::V4, 2, 0));
        assert!(say("a", std::slice::from_ref(&a)).iter().eq([&a]));
        assert_eq!(say("b", std::slice::from_ref(&b)), [a, b.clone()]);
        let moved = check("a", Family::V6, 1, 1);
        assert_eq!(say("a", std::slice::from_ref(&moved)), [moved, b.clone()]);
        assert_eq!(say("a", &[]), [b]);
        service_health.want(Vec::new(), [Accepted::At(vec![LOCAL]), Accepted::Everywhere]);
        assert_eq!(service_health.wanted.borrow().v4, Accepted::At(vec![LOCAL]));
    }
}

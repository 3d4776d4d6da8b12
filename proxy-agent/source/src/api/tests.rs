//! The source against a scripted API server on loopback.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// What the server answers to one request for Services.
enum Reply {
    /// A watch: these events, then silence.
    Open(Vec<Value>),
    /// A watch: these events, then its normal end.
    Closed(Vec<Value>),
    /// A whole document with a status code.
    Whole(u16, Value),
}

/// A server that answers requests for Services by script (then with silence), and has nothing else, or only some
/// ServiceCIDRs.
struct Server {
    replies: Mutex<VecDeque<Reply>>,
    asked: Mutex<Vec<String>>,
    /// Whether it shows ServiceCIDRs.
    service_cidrs: bool,
}

impl Server {
    async fn start(replies: Vec<Reply>, service_cidrs: bool) -> (Arc<Self>, Cluster) {
        let asked = Mutex::new(Vec::new());
        let server = Arc::new(Self { replies: Mutex::new(replies.into()), asked, service_cidrs });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = axum::Router::new().fallback(answer).with_state(server.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        (server, cluster(None, &url).await.unwrap())
    }

    fn asked(&self, what: &str) -> Vec<String> {
        self.asked.lock().unwrap().iter().filter(|asked| asked.starts_with(what)).cloned().collect()
    }
}

async fn cluster(kubeconfig: Option<&str>, url: &str) -> Result<Cluster, Error> {
    let servers = Some(url).filter(|url| !url.is_empty()).map(str::to_owned).into_iter().collect();
    let config = ClientConfig { kubeconfig: kubeconfig.map(PathBuf::from), servers };
    Cluster::open(config, &Requests::default(), Box::new(NoCache)).await
}

struct NoCache;

impl ServerCache for NoCache {
    fn load(&self) -> String {
        String::new()
    }

    fn save(&self, _: &str) {
        panic!("a server without a certificate is nothing to be kept");
    }
}

async fn answer(State(server): State<Arc<Server>>, request: Request) -> Response {
    let asked = request.uri().to_string();
    let reply = match request.uri().path() {
        "/api/v1/services" => server.replies.lock().unwrap().pop_front().unwrap_or(Reply::Open(Vec::new())),
        "/apis/networking.k8s.io/v1/servicecidrs" => match server.service_cidrs {
            true => Reply::Open(vec![
                event("ADDED", service_cidr("kubernetes", &["10.96.0.0/16"], "1")),
                complete("1"),
                event("ADDED", service_cidr("more", &["10.200.0.0/24", "x", "fd00:200::/112"], "2")),
                event("DELETED", service_cidr("kubernetes", &["10.96.0.0/16"], "3")),
            ]),
            false => Reply::Whole(403, status(403, "Forbidden")),
        },
        _ => Reply::Open(vec![complete("1")]),
    };
    server.asked.lock().unwrap().push(asked);
    let lines = |events: Vec<Value>| {
        stream::iter(events.into_iter().map(|event| Ok::<_, std::io::Error>(format!("{event}\n"))))
    };
    let (code, body) = match reply {
        Reply::Open(events) => (200, Body::from_stream(lines(events).chain(stream::pending()))),
        Reply::Closed(events) => (200, Body::from_stream(lines(events))),
        Reply::Whole(code, value) => (code, Body::from(value.to_string())),
    };
    Response::builder().status(code).header("content-type", "application/json").body(body).unwrap()
}

fn object(name: &str, ip: &str, version: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": name, "resourceVersion": version},
        "spec": {"clusterIP": ip, "ports": [{"port": 80}]},
    })
}

fn service_cidr(name: &str, cidrs: &[&str], version: &str) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": {"name": name, "resourceVersion": version},
        "spec": {"cidrs": cidrs},
    })
}

fn event(kind: &str, object: Value) -> Value {
    json!({"type": kind, "object": object})
}

fn added(name: &str, ip: &str, version: &str) -> Value {
    event("ADDED", object(name, ip, version))
}

/// The bookmark that ends a streaming list.
fn complete(version: &str) -> Value {
    let metadata = json!({"resourceVersion": version, "annotations": {"k8s.io/initial-events-end": "true"}});
    event("BOOKMARK", json!({"kind": "Service", "apiVersion": "v1", "metadata": metadata}))
}

fn status(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": reason})
}

/// Receives changes and keeps what they amount to.
struct Receiver {
    rx: mpsc::Receiver<Change>,
    services: HashMap<String, String>,
    warnings: HashMap<String, Vec<String>>,
    ranges: HashMap<String, Vec<IpNet>>,
    synced: Vec<Kind>,
    connected: Vec<bool>,
    repeated: Vec<Kind>,
    changes: usize,
}

impl Receiver {
    async fn start(replies: Vec<Reply>) -> (Arc<Server>, Self) {
        Self::start_with(replies, true).await
    }

    async fn start_with(replies: Vec<Reply>, service_cidrs: bool) -> (Arc<Server>, Self) {
        let (server, cluster) = Server::start(replies, service_cidrs).await;
        let (tx, rx) = mpsc::channel(64);
        tokio::spawn(cluster.run("n1".into(), false, tx));
        let (services, warnings, ranges, synced, connected, repeated) = Default::default();
        (server, Self { rx, services, warnings, ranges, synced, connected, repeated, changes: 0 })
    }

    async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let waited = timeout(PATIENCE, async {
            while !done(self) {
                let change = self.rx.recv().await.unwrap();
                self.take(change);
            }
        });
        assert!(waited.await.is_ok(), "waited in vain until {what}: {:?} {:?}", self.services, self.warnings);
    }

    fn take(&mut self, change: Change) {
        match change {
            Change::Service(name, Some(service)) => {
                self.changes += 1;
                self.services.insert(name.name.to_string(), service.cluster_ips[0].to_string());
            }
            Change::Service(name, None) => {
                self.changes += 1;
                assert!(self.services.remove(&*name.name).is_some());
            }
            Change::Warnings { object, lines } => {
                self.warnings.insert(object, lines);
            }
            Change::ServiceRanges(name, Some(ranges)) => drop(self.ranges.insert(name, ranges)),
            Change::ServiceRanges(name, None) => assert!(self.ranges.remove(&name).is_some()),
            Change::Synced(kind) => self.synced.push(kind),
            Change::Connected(connected) => self.connected.push(connected),
            Change::Repeated(kind) => self.repeated.push(kind),
            other => panic!("unexpected: {other:?}"),
        }
    }

    fn has(&self, expected: &[(&str, &str)]) -> bool {
        self.services.len() == expected.len()
            && expected.iter().all(|(name, ip)| self.services.get(*name).is_some_and(|known| known == ip))
    }
}

#[tokio::test]
async fn a_streaming_list_is_followed_by_its_watch() {
    let (server, mut receiver) = Receiver::start(vec![Reply::Open(vec![
        added("a", "10.96.0.1", "1"),
        added("b", "10.96.0.2", "2"),
        complete("3"),
        event("MODIFIED", object("a", "10.96.0.3", "4")),
        event("DELETED", object("b", "10.96.0.2", "5")),
    ])])
    .await;
    receiver.until("the watch is followed", |l| l.has(&[("a", "10.96.0.3")]) && l.synced.len() == 4).await;
    receiver.until("the server answers", |l| l.connected == [true]).await;

    let services = server.asked("/api/v1/services");
    assert_eq!(services.len(), 1, "{services:?}");
    for part in [
        "labelSelector=%21service.kubernetes.io%2Fservice-proxy-name",
        "fieldSelector=spec.clusterIP%21%3DNone",
        "sendInitialEvents=true",
        "allowWatchBookmarks=true",
    ] {
        assert!(services[0].contains(part), "{part} in {services:?}");
    }
    // E-1: those of all namespaces.
    let slices = server.asked("/apis/discovery.k8s.io/v1/endpointslices");
    assert!(slices[0].contains("labelSelector=%21service.kubernetes.io%2Fheadless"), "{slices:?}");
    let nodes = server.asked("/api/v1/nodes");
    assert!(nodes[0].contains("fieldSelector=metadata.name%3Dn1"), "{nodes:?}");
}

#[tokio::test]
async fn ranges_of_cluster_ips_are_followed() {
    // Y-4, Y-16.
    let (_server, mut receiver) = Receiver::start(vec![Reply::Open(vec![complete("1")])]).await;
    receiver.until("the ranges are in", |l| l.ranges.contains_key("more") && l.ranges.len() == 1).await;
    let ranges: Vec<String> = receiver.ranges["more"].iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["10.200.0.0/24", "fd00:200::/112"]);
    receiver.until("the bad one gives a warning", |l| l.warnings.contains_key("ServiceCIDR more")).await;
    let [line] = &receiver.warnings["ServiceCIDR more"][..] else { panic!("{:?}", receiver.warnings) };
    assert!(line.contains("spec.cidrs[1]") && line.contains("\"x\""), "{line}");
}

#[tokio::test]
async fn a_server_without_service_cidrs_is_connected_all_the_same() {
    // Y-16: as if there were none.
    let list = vec![added("a", "10.96.0.1", "1"), complete("3")];
    let (server, mut receiver) = Receiver::start_with(vec![Reply::Open(list)], false).await;
    receiver.until("the rest is in", |l| l.has(&[("a", "10.96.0.1")]) && l.synced.len() == 3).await;
    receiver.until("the server answers", |l| l.connected == [true]).await;
    assert!(receiver.ranges.is_empty() && !receiver.synced.contains(&Kind::ServiceCidr));
    assert_eq!(
        server.asked("/apis/networking.k8s.io/v1/servicecidrs").len(),
        1,
        "it is not asked all the time"
    );
}

#[tokio::test]
async fn objects_that_a_relist_lacks_are_removed() {
    let first = vec![
        added("a", "10.96.0.1", "1"),
        added("b", "10.96.0.2", "2"),
        complete("3"),
        event("ERROR", status(410, "Expired")),
    ];
    let second = vec![added("b", "10.96.0.2", "2"), added("c", "10.96.0.3", "9"), complete("10")];
    let (_server, mut receiver) = Receiver::start(vec![Reply::Open(first), Reply::Open(second)]).await;
    receiver.until("the second list is in", |l| l.has(&[("b", "10.96.0.2"), ("c", "10.96.0.3")])).await;
    assert_eq!(receiver.changes, 4, "only the difference is sent");
    assert_eq!(receiver.synced.iter().filter(|kind| **kind == Kind::Service).count(), 1);
}

#[tokio::test]
async fn an_expired_version_leads_to_a_relist() {
    let (server, mut receiver) = Receiver::start(vec![
        Reply::Closed(vec![added("a", "10.96.0.1", "1"), complete("3")]),
        Reply::Whole(410, status(410, "Expired")),
        Reply::Open(vec![added("b", "10.96.0.2", "7"), complete("8")]),
    ])
    .await;
    receiver.until("the new list is in", |l| l.has(&[("b", "10.96.0.2")])).await;
    let services = server.asked("/api/v1/services");
    assert!(services[1].contains("resourceVersion=3"), "the watch goes on where it ended: {services:?}");
    assert!(!receiver.connected.contains(&false), "a 410 is no lost connection");
}

#[tokio::test]
async fn a_server_without_streaming_lists_is_listed_and_watched() {
    let list = json!({
        "kind": "ServiceList", "apiVersion": "v1", "metadata": {"resourceVersion": "5"},
        "items": [object("a", "10.96.0.1", "1")],
    });
    let (server, mut receiver) = Receiver::start(vec![
        Reply::Whole(422, status(422, "sendInitialEvents is forbidden for watch")),
        Reply::Whole(200, list),
        Reply::Open(vec![added("b", "10.96.0.2", "6")]),
    ])
    .await;
    receiver.until("list and watch are in", |l| l.has(&[("a", "10.96.0.1"), ("b", "10.96.0.2")])).await;
    let services = server.asked("/api/v1/services");
    assert!(!services[1].contains("watch=true"), "{services:?}");
    assert!(services[2].contains("resourceVersion=5"), "{services:?}");
}

#[tokio::test]
async fn an_object_that_cannot_be_decoded_gives_a_warning_and_stops_no_other() {
    let mut bad = object("bad", "10.96.0.1", "1");
    bad["spec"]["ports"] = json!("many");
    let (_server, mut receiver) = Receiver::start(vec![Reply::Open(vec![
        event("ADDED", bad),
        added("good", "10.96.0.2", "2"),
        complete("3"),
        event("MODIFIED", object("bad", "10.96.0.1", "4")),
    ])])
    .await;
    receiver.until("the bad one gives a warning", |l| !l.warnings.is_empty()).await;
    let lines = &receiver.warnings["Service default/bad"];
    assert!(lines[0].starts_with("cannot be read:"), "{lines:?}");
    receiver.until("both are in", |l| l.has(&[("bad", "10.96.0.1"), ("good", "10.96.0.2")])).await;
    receiver.until("the warning is cleared", |l| l.warnings["Service default/bad"].is_empty()).await;
}

#[tokio::test]
async fn after_an_error_the_watch_is_retried_and_known_objects_stay() {
    let (_server, mut receiver) = Receiver::start(vec![
        Reply::Closed(vec![added("a", "10.96.0.1", "1"), complete("3")]),
        Reply::Whole(403, status(403, "Forbidden")),
        Reply::Open(vec![event("MODIFIED", object("a", "10.96.0.2", "4"))]),
    ])
    .await;
    receiver.until("the change is in", |l| l.has(&[("a", "10.96.0.2")])).await;
    assert_eq!(receiver.changes, 2);
    assert_eq!(receiver.connected.iter().rev().take(2).collect::<Vec<_>>(), [&true, &false]);
}

#[tokio::test]
async fn a_truncated_list_is_repeated_and_removes_nothing() {
    let both = vec![
        added("a", "10.96.0.1", "1"),
        added("b", "10.96.0.2", "2"),
        complete("3"),
        event("ERROR", status(410, "Expired")),
    ];
    let (_server, mut receiver) = Receiver::start(vec![
        Reply::Open(both),
        Reply::Closed(vec![added("a", "10.96.0.9", "7")]),
        Reply::Open(vec![added("a", "10.96.0.9", "7"), complete("8")]),
    ])
    .await;
    receiver.until("both are in", |l| l.has(&[("a", "10.96.0.1"), ("b", "10.96.0.2")])).await;
    receiver.until("the whole list is in", |l| l.has(&[("a", "10.96.0.9")])).await;
    assert_eq!(receiver.changes, 4, "half a list is none");
}

#[tokio::test]
async fn a_wrong_address_or_file_is_an_error_that_names_it() {
    let error = cluster(None, "not a url").await.err().unwrap().to_string();
    assert!(error.contains("not a url"), "{error}");
    let error = cluster(Some("/nonexistent/kubeconfig"), "").await.err().unwrap().to_string();
    assert!(error.contains("/nonexistent/kubeconfig"), "{error}");
}

#[tokio::test]
async fn a_stale_relist_changes_nothing_before_it_is_accepted() {
    let first = vec![
        added("a", "10.96.0.1", "7"),
        added("b", "10.96.0.2", "8"),
        complete("9"),
        event("ERROR", status(410, "Expired")),
    ];
    let old = || vec![added("a", "10.96.0.9", "1"), complete("2")];
    let (server, mut receiver) = Receiver::start(vec![
        Reply::Open(first),
        Reply::Open(old()),
        Reply::Open(old()),
        Reply::Open(vec![added("a", "10.96.0.4", "10"), complete("11")]),
    ])
    .await;
    receiver
        .until("the older state gives a warning", |l| {
            l.warnings.values().flatten().any(|c| c.contains("older"))
        })
        .await;
    assert!(receiver.has(&[("a", "10.96.0.1"), ("b", "10.96.0.2")]), "{:?}", receiver.services);
    receiver.until("a newer list is in", |l| l.has(&[("a", "10.96.0.4")])).await;
    let lists: Vec<String> =
        server.asked("/api/v1/services").into_iter().filter(|asked| asked.contains("sendInitial")).collect();
    assert!(lists[0].ends_with("resourceVersion=0"), "{lists:?}");
    assert!(lists[1].ends_with("resourceVersion=9"), "not older than what is known: {lists:?}");
    assert!(lists[2].ends_with("resourceVersion="), "from etcd: {lists:?}");
}

#[tokio::test]
async fn a_list_of_another_kind_is_not_accepted() {
    let list = |kind: &str| {
        let items = [object("a", "10.96.0.1", "1")];
        json!({"kind": kind, "apiVersion": "v1", "metadata": {"resourceVersion": "5"}, "items": items})
    };
    let (_server, mut receiver) = Receiver::start(vec![
        Reply::Whole(422, status(422, "sendInitialEvents is forbidden for watch")),
        Reply::Whole(200, list("PodList")),
        Reply::Whole(200, json!("welcome to the hotel's network")),
        Reply::Whole(200, list("ServiceList")),
    ])
    .await;
    let warned =
        |l: &Receiver| l.warnings.values().flatten().any(|line| line.contains("PodList is not a list"));
    receiver.until("the wrong kind gives a warning", warned).await;
    assert!(receiver.services.is_empty());
    receiver.until("the right kind is in", |l| l.has(&[("a", "10.96.0.1")])).await;
}

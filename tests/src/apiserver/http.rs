//! Requests to lists, watches and single objects.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use http::header::{ACCEPT, AUTHORIZATION};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use serde_json::{Value, json};

use super::selector::Filter;
use super::watch::{self, Watch};
use super::{Asked, Fault, Gone, Shared, StreamingLists, fault, store};
use crate::object::{Key, Kind};

/// Where events are sent to.
const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/";

/// kubeadm's ConfigMap for machines that join.
const CLUSTER_INFO: &str = "/api/v1/namespaces/kube-public/configmaps/cluster-info";

pub(super) type Body = BoxBody<Bytes, Infallible>;

/// Answers a request; every failure is a `Status` object as from the real server.
pub(super) async fn answer(
    shared: Arc<Shared>,
    certificate: Option<Vec<u8>>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let asked = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
    shared.requests.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), asked));
    let header = |name| Some(request.headers().get(name)?.to_str().ok()?.to_owned());
    let headers = Asked { authorization: header(AUTHORIZATION), accept: header(ACCEPT), certificate };
    shared.headers.lock().unwrap_or_else(PoisonError::into_inner).push(headers);
    shared.answering().await;
    let fault = shared.behaviour.borrow().fault;
    let about_events = request.uri().path().starts_with(EVENTS);
    let watch = request.uri().query().is_some_and(|query| query.contains("watch=true"));
    Ok(match fault {
        Fault::Status(code) => failure(code, "InternalError", "the test wants it so"),
        Fault::Busy(seconds) => busy(seconds),
        Fault::Garbage => Response::new(fault::page()),
        Fault::Cut if watch => Response::new(Full::default().boxed()),
        Fault::NoHeaders if watch => std::future::pending().await,
        Fault::Slow => route(&shared, &request).map(fault::slowly),
        _ if about_events => event(&shared, request).await,
        _ => route(&shared, &request),
    })
}

/// Too much is asked, for so many seconds.
fn busy(seconds: u16) -> Response<Body> {
    let mut response = failure(429, "TooManyRequests", "the test wants it so");
    response.headers_mut().insert(http::header::RETRY_AFTER, seconds.into());
    response
}

/// Events are made and counted up; nobody reads them here but the test.
async fn event(shared: &Shared, request: Request<Incoming>) -> Response<Body> {
    if shared.behaviour.borrow().events_forbidden {
        return failure(403, "Forbidden", "events.events.k8s.io is forbidden: the test wants it so");
    }
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let Ok(json) = serde_json::from_slice::<Value>(&body) else {
        return failure(400, "BadRequest", "the event is no JSON");
    };
    let mut events = shared.events.lock().unwrap_or_else(PoisonError::into_inner);
    let same = |known: &&mut Value| known["metadata"]["name"] == json["metadata"]["name"];
    match (head.method, events.iter_mut().find(same)) {
        (Method::POST, None) => events.push(json.clone()),
        (Method::PATCH, Some(known)) => *known = json.clone(),
        (Method::POST, Some(_)) => return failure(409, "AlreadyExists", "there is such an event"),
        (Method::PATCH, None) => return failure(404, "NotFound", "no such event"),
        _ => return failure(405, "MethodNotAllowed", "events are created and patched"),
    }
    ok(&json)
}

fn route(shared: &Arc<Shared>, request: &Request<Incoming>) -> Response<Body> {
    if request.method() != Method::GET {
        return failure(405, "MethodNotAllowed", "this server only reads");
    }
    if request.uri().path() == CLUSTER_INFO {
        return cluster_info(shared, request);
    }
    let path: Vec<&str> = request.uri().path().trim_matches('/').split('/').collect();
    let (group, rest) = match path.as_slice() {
        ["api", "v1", rest @ ..] => ("v1", rest),
        ["apis", "discovery.k8s.io", "v1", rest @ ..] => ("discovery.k8s.io/v1", rest),
        // Without a ServiceCIDR it is as a server from before there were any.
        ["apis", "networking.k8s.io", "v1", rest @ ..] if shared.shown().has(Kind::ServiceCidr) => {
            ("networking.k8s.io/v1", rest)
        }
        ["version"] => return ok(&json!({ "major": "1", "minor": "36", "gitVersion": "v1.36.1" })),
        ["healthz" | "livez" | "readyz"] => return ok(&json!("ok")),
        _ => return failure(404, "NotFound", "no such path"),
    };
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] => (Some(*namespace), rest),
        rest => (None, rest),
    };
    let (plural, name) = match rest {
        [plural] => (*plural, None),
        [plural, name] => (*plural, Some(*name)),
        _ => return failure(404, "NotFound", "no such path"),
    };
    let kinds = [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::ServiceCidr, Kind::Pod];
    let Some(kind) = kinds.into_iter().find(|kind| kind.plural() == plural && kind.api_version() == group)
    else {
        return failure(404, "NotFound", "the server could not find the requested resource");
    };
    match name {
        Some(name) => get(shared, kind, namespace, name),
        None => collection(shared, kind, namespace, request.uri().query().unwrap_or_default()),
    }
}

/// As kubeadm's role has it: shown to strangers, and to nobody else.
fn cluster_info(shared: &Shared, request: &Request<Incoming>) -> Response<Body> {
    if request.headers().contains_key(AUTHORIZATION) {
        return failure(403, "Forbidden", "configmaps \"cluster-info\" is forbidden");
    }
    let server = shared.cluster_info.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let Some(server) = server else { return failure(404, "NotFound", "no such ConfigMap") };
    let cluster = json!({ "name": "", "cluster": { "server": server } });
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [], "users": []
    });
    let metadata = json!({ "name": "cluster-info", "namespace": "kube-public" });
    let data = json!({ "kubeconfig": kubeconfig.to_string() });
    ok(&json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data }))
}

fn get(shared: &Shared, kind: Kind, namespace: Option<&str>, name: &str) -> Response<Body> {
    let key = Key { kind, namespace: namespace.unwrap_or_default().into(), name: name.into() };
    match shared.shown().get(&key) {
        Some(object) => ok(object),
        None => failure(404, "NotFound", &format!("{} \"{name}\" not found", kind.plural())),
    }
}

fn collection(shared: &Arc<Shared>, kind: Kind, namespace: Option<&str>, query: &str) -> Response<Body> {
    let query: HashMap<String, String> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let value = |name: &str| query.get(name).map_or("", String::as_str);
    let filter = match Filter::new(namespace.map(Into::into), value("labelSelector"), value("fieldSelector"))
    {
        Ok(filter) => filter,
        Err(error) => return failure(400, "BadRequest", &error),
    };
    let watched = ["true", "1"].contains(&value("watch"));
    let behaviour = *shared.behaviour.borrow();
    let current = shared.shown().version();
    if value("resourceVersionMatch") == "NotOlderThan"
        && value("resourceVersion").parse().is_ok_and(|wanted: u64| wanted > current)
    {
        let wanted = value("resourceVersion");
        let message = format!("Too large resource version: {wanted}, current: {current}");
        return failure(504, "Timeout", &message);
    }
    if !watched {
        return list(shared, kind, &filter, value("limit"), value("continue"));
    }
    let bookmarks = value("allowWatchBookmarks") == "true";
    let initial = value("sendInitialEvents") == "true" && behaviour.streaming != StreamingLists::Ignored;
    if initial && behaviour.streaming == StreamingLists::Rejected {
        return failure(
            422,
            "Invalid",
            "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch",
        );
    }
    if initial && (value("resourceVersionMatch") != "NotOlderThan" || !bookmarks) {
        return failure(
            422,
            "Invalid",
            "sendInitialEvents needs resourceVersionMatch=NotOlderThan and bookmarks",
        );
    }
    let Ok(after) = watch_from(value("resourceVersion")) else {
        return failure(400, "BadRequest", "resourceVersion is not a number");
    };
    if let (Some(version), Gone::Http, false) = (after, behaviour.gone, initial)
        && shared.shown().since(version, kind, &filter).is_err()
    {
        return gone();
    }
    let seconds = value("timeoutSeconds").parse().unwrap_or(1800);
    let after = after.filter(|_| !initial);
    let n = shared.watches.fetch_add(1, Ordering::Relaxed);
    let half = behaviour.fault == Fault::Half && after.is_none();
    watch::start(shared.clone(), Watch { kind, filter, after, initial, bookmarks, seconds, n, half })
}

/// The version after which a watch begins; without one it begins with what there is.
fn watch_from(version: &str) -> Result<Option<u64>, std::num::ParseIntError> {
    if version.is_empty() || version == "0" { Ok(None) } else { version.parse().map(Some) }
}

fn list(shared: &Shared, kind: Kind, filter: &Filter, limit: &str, token: &str) -> Response<Body> {
    let limit = limit.parse().ok().filter(|limit| *limit > 0);
    let token = Some(token).filter(|token| !token.is_empty());
    let endless = shared.behaviour.borrow().fault == Fault::Endless;
    let token = token.filter(|_| !endless);
    let Ok(store::Page { version, items, next }) = shared.shown().page(kind, filter, limit, token) else {
        return gone();
    };
    let version = version.min(shared.version(kind));
    let mut items: Vec<Value> = items.into_iter().map(Arc::unwrap_or_clone).collect();
    for item in items.iter_mut().filter_map(Value::as_object_mut) {
        // As the real server: the list says it once.
        item.remove("kind");
        item.remove("apiVersion");
    }
    let mut metadata = json!({ "resourceVersion": version.to_string() });
    if endless {
        items.clear();
        let page = shared.requests.lock().unwrap_or_else(PoisonError::into_inner).len();
        metadata["continue"] = json!(format!("page {page}"));
    }
    if let Some((token, left)) = next {
        metadata["continue"] = json!(token);
        metadata["remainingItemCount"] = json!(left);
    }
    let (name, api_version) = (format!("{}List", kind.name()), kind.api_version());
    let list = json!({ "kind": name, "apiVersion": api_version, "metadata": metadata, "items": items });
    match shared.behaviour.borrow().fault {
        Fault::Half => Response::new(fault::half(&list.to_string())),
        _ => ok(&list),
    }
}

/// The `Status` that says why.
pub(super) fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {},
        "status": "Failure", "message": message, "reason": reason, "code": code
    })
}

/// The `Status` for a version that is forgotten.
pub(super) fn expired() -> Value {
    status(410, "Expired", "too old resource version")
}

fn gone() -> Response<Body> {
    respond(StatusCode::GONE, &expired())
}

fn ok(value: &Value) -> Response<Body> {
    respond(StatusCode::OK, value)
}

fn failure(code: u16, reason: &str, message: &str) -> Response<Body> {
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    respond(code, &status(code.as_u16(), reason, message))
}

fn respond(code: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())).boxed());
    *response.status_mut() = code;
    let json = http::HeaderValue::from_static("application/json");
    response.headers_mut().insert(http::header::CONTENT_TYPE, json);
    response
}

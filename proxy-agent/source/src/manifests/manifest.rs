//! Parses one manifest file into objects, each with the line it begins at.

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use serde_json::Value;

use crate::convert;
use agent_core::model::{Node, ObjectName, Service, Slice};

/// YAML nodes of one file, with aliases expanded: a limit against "billion laughs". The largest file that is read has half as
/// many if it consists of Services and EndpointSlices.
const MAX_YAML_NODES: usize = 3_000_000;
/// The same for the bytes of all scalars.
const MAX_YAML_BYTES: usize = 64 << 20;

/// An object's kind and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Id {
    Service(ObjectName),
    Slice(ObjectName),
    Endpoints(ObjectName),
    /// Our own Node.
    Node,
    ServiceCidr(String),
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Service(name) => write!(f, "Service {name}"),
            Self::Slice(name) => write!(f, "EndpointSlice {name}"),
            Self::Endpoints(name) => write!(f, "Endpoints {name}"),
            Self::Node => f.write_str("Node"),
            Self::ServiceCidr(name) => write!(f, "ServiceCIDR {name}"),
        }
    }
}

/// A converted object.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// `None`: it is not to be proxied.
    Service(Option<Service>),
    /// `None`: it belongs to no Service.
    Slice(Option<Slice>),
    /// The slices of a legacy `Endpoints` object.
    Endpoints(Vec<Slice>),
    Node(Node),
    ServiceRanges(Vec<IpNet>),
}

/// An object of a kind that is used.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    pub id: Id,
    pub content: Content,
    /// About the parts that cannot be used.
    pub warnings: Vec<String>,
}

/// A part of a file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Line in the file, from 1.
    pub line: u64,
    /// The object, if its name can be read: its previous version stays in use.
    pub id: Option<Id>,
    pub text: String,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Manifest {
    /// Objects of the kinds that are used, in order.
    pub objects: Vec<Object>,
    pub faults: Vec<Fault>,
}

/// Parses a file. `Err` if it is not YAML or JSON at all: then nothing of it is used.
pub fn read(text: &str, json: bool, node_name: &str) -> Result<Manifest, Fault> {
    let documents = if json { json_documents(text)? } else { yaml_documents(text)? };
    let mut manifest = Manifest::default();
    for (line, document) in documents {
        manifest.add(document, line, None, node_name);
    }
    Ok(manifest)
}

fn yaml_documents(text: &str) -> Result<Vec<(u64, Value)>, Fault> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 2 * MAX_YAML_NODES,
            max_nodes: MAX_YAML_NODES,
            max_documents: MAX_YAML_NODES,
            max_total_scalar_bytes: MAX_YAML_BYTES,
        },
    };
    let documents = serde_saphyr::from_multiple_with_options::<serde_saphyr::Spanned<Value>>(text, options);
    let documents = documents.map_err(|error| Fault {
        line: error.location().map_or(1, |location| location.line()),
        id: None,
        text: first_line(&error.without_snippet().to_string()),
    })?;
    Ok(documents.into_iter().map(|document| (document.referenced.line(), document.value)).collect())
}

fn json_documents(text: &str) -> Result<Vec<(u64, Value)>, Fault> {
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let mut documents = Vec::new();
    loop {
        let rest = &text[stream.byte_offset()..];
        let begin = text.len() - rest.trim_start().len();
        let line = 1 + text[..begin].matches('\n').count() as u64;
        match stream.next() {
            None => return Ok(documents),
            Some(Ok(document)) => documents.push((line, document)),
            Some(Err(error)) => {
                return Err(Fault { line: error.line() as u64, id: None, text: error.to_string() });
            }
        }
    }
}

/// The parser's message without its excerpt: a warning is one line.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

impl Manifest {
    /// Adds a document. `item_of`: apiVersion and kind of the items of a typed list, which need not repeat them.
    fn add(&mut self, document: Value, line: u64, item_of: Option<(&str, &str)>, node_name: &str) {
        if document.is_null() {
            return;
        }
        let text = |key: &str| document.get(key).and_then(Value::as_str);
        let Some(kind) = text("kind").or(item_of.map(|(_, kind)| kind)).map(str::to_owned) else {
            let text = "is not a Kubernetes object: it has no `kind`".to_owned();
            self.faults.push(Fault { line, id: None, text });
            return;
        };
        let version =
            text("apiVersion").or(item_of.map(|(version, _)| version)).unwrap_or_default().to_owned();
        match (version.as_str(), kind.as_str()) {
            ("v1", "List") => self.add_items(document, line, None, node_name),
            ("v1", "ServiceList" | "EndpointsList" | "NodeList")
            | ("discovery.k8s.io/v1", "EndpointSliceList")
            | ("networking.k8s.io/v1", "ServiceCIDRList") => {
                let kind = kind.trim_end_matches("List");
                self.add_items(document, line, Some((&version, kind)), node_name);
            }
            ("v1", "Service") => self.decode(document, line, Id::Service, |mut object: core::Service| {
                default_service(&mut object);
                let (service, warnings) = convert::service(&object);
                (Content::Service(service), warnings)
            }),
            ("v1", "Endpoints") => self.decode(document, line, Id::Endpoints, |object: core::Endpoints| {
                let (slices, warnings) = convert::endpoints(&object);
                (Content::Endpoints(slices), warnings)
            }),
            ("discovery.k8s.io/v1", "EndpointSlice") => {
                self.decode(document, line, Id::Slice, |mut object: discovery::EndpointSlice| {
                    default_slice(&mut object);
                    let (slice, warnings) = convert::slice(&object);
                    (Content::Slice(slice), warnings)
                });
            }
            ("networking.k8s.io/v1", "ServiceCIDR") => {
                let id = |name: ObjectName| Id::ServiceCidr(name.name.to_string());
                self.decode(document, line, id, |object: networking::ServiceCIDR| {
                    let (ranges, warnings) = convert::service_cidr(&object);
                    (Content::ServiceRanges(ranges), warnings)
                });
            }
            ("v1", "Node") => {
                let name = document.get("metadata").and_then(|m| m.get("name")).and_then(Value::as_str);
                if name == Some(node_name) {
                    self.decode(
                        document,
                        line,
                        |_| Id::Node,
                        |object: core::Node| {
                            let (node, warnings) = convert::node(&object);
                            (Content::Node(node), warnings)
                        },
                    );
                }
            }
            _ => tracing::debug!(%version, %kind, line, "kind is not used: ignored"),
        }
    }

    fn add_items(&mut self, mut list: Value, line: u64, item_of: Option<(&str, &str)>, node_name: &str) {
        match list.get_mut("items").map(Value::take) {
            None | Some(Value::Null) => {}
            Some(Value::Array(items)) => {
                for item in items {
                    self.add(item, line, item_of, node_name);
                }
            }
            Some(_) => {
                self.faults.push(Fault { line, id: None, text: "`items` is not a sequence".to_owned() });
            }
        }
    }

    fn decode<K: serde::de::DeserializeOwned>(
        &mut self,
        document: Value,
        line: u64,
        id: impl Fn(ObjectName) -> Id,
        convert: impl Fn(K) -> (Content, Vec<String>),
    ) {
        let text = |key: &str| document.get("metadata").and_then(|m| m.get(key)).and_then(Value::as_str);
        let namespace = text("namespace").filter(|namespace| !namespace.is_empty()).unwrap_or("default");
        let Some(name) = text("name").filter(|name| !name.is_empty()) else {
            let text = "has no `metadata.name`".to_owned();
            self.faults.push(Fault { line, id: None, text });
            return;
        };
        if !is_name(namespace) || !is_name(name) {
            let text = format!("has a name that Kubernetes would not accept: {namespace:?}/{name:?}");
            self.faults.push(Fault { line, id: None, text });
            return;
        }
        let id = id(ObjectName::new(namespace, name));
        match serde_json::from_value::<K>(document) {
            Ok(object) => {
                let (content, warnings) = convert(object);
                self.objects.push(Object { id, content, warnings });
            }
            Err(error) => {
                self.faults.push(Fault { line, text: format!("{id} cannot be read: {error}"), id: Some(id) });
            }
        }
    }
}

/// Whether this can be the name of an object or namespace. Names are printed on terminals.
fn is_name(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.')
}

/// Fills in what an API server would (S-21): `clusterIP` and `clusterIPs` agree.
fn default_service(object: &mut core::Service) {
    let Some(spec) = &mut object.spec else { return };
    let listed = spec.cluster_ips.get_or_insert_default();
    match &spec.cluster_ip {
        Some(ip) if !ip.is_empty() => {
            if listed.is_empty() {
                listed.push(ip.clone());
            }
        }
        _ => spec.cluster_ip = listed.first().cloned(),
    }
    if spec.ip_families.as_ref().is_none_or(Vec::is_empty) && listed.len() > 1 {
        let family = |ip: &String| if ip.contains(':') { "IPv6" } else { "IPv4" }.to_owned();
        spec.ip_families = Some(listed.iter().map(family).collect());
    }
}

/// The same for a slice: port names and the address type.
fn default_slice(object: &mut discovery::EndpointSlice) {
    for port in object.ports.iter_mut().flatten() {
        port.name.get_or_insert_default();
    }
    if object.address_type.is_empty() {
        let first = object.endpoints.iter().flatten().flat_map(|endpoint| &endpoint.addresses).next();
        object.address_type =
            if first.is_some_and(|address| address.contains(':')) { "IPv6" } else { "IPv4" }.to_owned();
    }
}

//! Parses one manifest file into objects, each with the line it begins at.

use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::convert;
use agent_core::model::{Names, Node, ObjectName, Service, Slice};

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
    Service(Option<Arc<Service>>),
    /// `None`: it belongs to no Service.
    Slice(Option<Arc<Slice>>),
    /// The slices of a legacy `Endpoints` object.
    Endpoints(Vec<Arc<Slice>>),
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
    let mut reader = Reader { manifest: Manifest::default(), names: Names::default(), node_name };
    if json {
        json_documents(text, |document, line| reader.add_json(document, line))?;
    } else {
        yaml_documents(text)?.into_iter().for_each(|(line, document)| reader.add(document, line, None));
    }
    Ok(reader.manifest)
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

/// Shows each document of a file, with its line.
fn json_documents<'a>(
    text: &'a str,
    mut see: impl FnMut(&'a RawValue, u64) -> serde_json::Result<()>,
) -> Result<(), Fault> {
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<&RawValue>();
    loop {
        let begin = text.len() - text[stream.byte_offset()..].trim_start().len();
        let line = 1 + text[..begin].matches('\n').count() as u64;
        let fault = |error: serde_json::Error, line| Fault { line, id: None, text: error.to_string() };
        match stream.next() {
            None => return Ok(()),
            Some(Ok(document)) => see(document, line).map_err(|error| fault(error, line))?,
            Some(Err(error)) => {
                let line = error.line() as u64;
                return Err(fault(error, line));
            }
        }
    }
}

/// The parser's message without its excerpt: a warning is one line.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// A list, of which the items are read one by one: a tree of all its values takes ten times its text.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct List<'a> {
    #[serde(default)]
    api_version: Value,
    kind: Value,
    #[serde(borrow)]
    items: Vec<&'a RawValue>,
}

/// The items' apiVersion and kind, where they need not have them, if this is a list.
fn items_of<'a>(version: &'a str, kind: &'a str) -> Option<Option<(&'a str, &'a str)>> {
    match (version, kind) {
        ("v1", "List") => Some(None),
        ("v1", "ServiceList" | "EndpointsList" | "NodeList")
        | ("discovery.k8s.io/v1", "EndpointSliceList")
        | ("networking.k8s.io/v1", "ServiceCIDRList") => Some(Some((version, kind.trim_end_matches("List")))),
        _ => None,
    }
}

/// Makes a manifest of documents.
struct Reader<'a> {
    manifest: Manifest,
    names: Names,
    node_name: &'a str,
}

impl Reader<'_> {
    fn add_json(&mut self, document: &RawValue, line: u64) -> serde_json::Result<()> {
        if let Ok(List { api_version, kind, items }) = serde_json::from_str::<List<'_>>(document.get())
            && let Some(item_of) =
                items_of(api_version.as_str().unwrap_or_default(), kind.as_str().unwrap_or_default())
        {
            return items.into_iter().try_for_each(|item| {
                self.add(serde_json::from_str(item.get())?, line, item_of);
                Ok(())
            });
        }
        self.add(serde_json::from_str(document.get())?, line, None);
        Ok(())
    }

    /// Adds a document. `item_of`: apiVersion and kind of the items of a typed list, which need not repeat them.
    fn add(&mut self, document: Value, line: u64, item_of: Option<(&str, &str)>) {
        if document.is_null() {
            return;
        }
        let text = |key: &str| document.get(key).and_then(Value::as_str);
        let Some(kind) = text("kind").or(item_of.map(|(_, kind)| kind)).map(str::to_owned) else {
            let text = "is not a Kubernetes object: it has no `kind`".to_owned();
            self.manifest.faults.push(Fault { line, id: None, text });
            return;
        };
        let version =
            text("apiVersion").or(item_of.map(|(version, _)| version)).unwrap_or_default().to_owned();
        if let Some(item_of) = items_of(&version, &kind) {
            return self.add_items(document, line, item_of);
        }
        match (version.as_str(), kind.as_str()) {
            ("v1", "Service") => self.decode(document, line, Id::Service, |mut object: core::Service| {
                default_service(&mut object);
                let (service, warnings) = convert::service(&object);
                (Content::Service(service.map(Arc::new)), warnings)
            }),
            ("v1", "Endpoints") => self.decode(document, line, Id::Endpoints, |object: core::Endpoints| {
                let (slices, warnings) = convert::endpoints(&object);
                (Content::Endpoints(slices.into_iter().map(Arc::new).collect()), warnings)
            }),
            ("discovery.k8s.io/v1", "EndpointSlice") => {
                let mut names = std::mem::take(&mut self.names);
                self.decode(document, line, Id::Slice, |mut object: discovery::EndpointSlice| {
                    default_slice(&mut object);
                    let (slice, warnings) = convert::slice(&object);
                    (Content::Slice(slice.map(|slice| Arc::new(slice.sorted(&mut names)))), warnings)
                });
                self.names = names;
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
                if name == Some(self.node_name) {
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

    fn add_items(&mut self, mut list: Value, line: u64, item_of: Option<(&str, &str)>) {
        match list.get_mut("items").map(Value::take) {
            None | Some(Value::Null) => {}
            Some(Value::Array(items)) => {
                for item in items {
                    self.add(item, line, item_of);
                }
            }
            Some(_) => {
                self.manifest.faults.push(Fault {
                    line,
                    id: None,
                    text: "`items` is not a sequence".to_owned(),
                });
            }
        }
    }

    fn decode<K: serde::de::DeserializeOwned>(
        &mut self,
        document: Value,
        line: u64,
        id: impl Fn(ObjectName) -> Id,
        convert: impl FnOnce(K) -> (Content, Vec<String>),
    ) {
        let text = |key: &str| document.get("metadata").and_then(|m| m.get(key)).and_then(Value::as_str);
        let namespace = text("namespace").filter(|namespace| !namespace.is_empty()).unwrap_or("default");
        let Some(name) = text("name").filter(|name| !name.is_empty()) else {
            let text = "has no `metadata.name`".to_owned();
            self.manifest.faults.push(Fault { line, id: None, text });
            return;
        };
        if !is_name(namespace) || !is_name(name) {
            let text = format!("has a name that Kubernetes would not accept: {namespace:?}/{name:?}");
            self.manifest.faults.push(Fault { line, id: None, text });
            return;
        }
        let id = id(ObjectName::new(namespace, name));
        match serde_json::from_value::<K>(document) {
            Ok(object) => {
                let (content, warnings) = convert(object);
                self.manifest.objects.push(Object { id, content, warnings });
            }
            Err(error) => {
                self.manifest.faults.push(Fault {
                    line,
                    text: format!("{id} cannot be read: {error}"),
                    id: Some(id),
                });
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

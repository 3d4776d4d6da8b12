//! The Kubernetes objects the agent watches, as JSON with a name: what manifests and the API server publish.

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use serde_json::Value;

/// The kinds there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `v1` Node.
    Node,
    /// `networking.k8s.io/v1` ServiceCIDR.
    ServiceCidr,
    /// `v1` Pod.
    Pod,
}

impl Kind {
    /// Its name in objects.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
            Self::Pod => "Pod",
        }
    }

    /// Its name in URLs.
    #[must_use]
    pub fn plural(self) -> &'static str {
        match self {
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::Node => "nodes",
            Self::ServiceCidr => "servicecidrs",
            Self::Pod => "pods",
        }
    }

    /// Its group and version.
    #[must_use]
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Service | Self::Node | Self::Pod => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::ServiceCidr => "networking.k8s.io/v1",
        }
    }
}

/// What names an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace; empty for Nodes and ServiceCIDRs.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// An object with its name.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// What names it.
    pub key: Key,
    /// The object with `apiVersion` and `kind`.
    pub json: Value,
}

impl Object {
    fn new(kind: Kind, json: Value) -> Self {
        let text = |field: &str| json["metadata"][field].as_str().unwrap_or_default().to_owned();
        let key = Key { kind, namespace: text("namespace"), name: text("name") };
        Self { key, json }
    }
}

impl From<&Service> for Object {
    fn from(service: &Service) -> Self {
        Self::new(Kind::Service, serde_json::to_value(service).expect("a Service is JSON"))
    }
}

impl From<&EndpointSlice> for Object {
    fn from(slice: &EndpointSlice) -> Self {
        Self::new(Kind::EndpointSlice, serde_json::to_value(slice).expect("an EndpointSlice is JSON"))
    }
}

impl From<&Node> for Object {
    fn from(node: &Node) -> Self {
        Self::new(Kind::Node, serde_json::to_value(node).expect("a Node is JSON"))
    }
}

impl From<&Pod> for Object {
    fn from(pod: &Pod) -> Self {
        Self::new(Kind::Pod, serde_json::to_value(pod).expect("a Pod is JSON"))
    }
}

impl From<&ServiceCIDR> for Object {
    fn from(cidr: &ServiceCIDR) -> Self {
        Self::new(Kind::ServiceCidr, serde_json::to_value(cidr).expect("a ServiceCIDR is JSON"))
    }
}

/// Where objects can be published: a directory of manifests, or an API server.
pub trait Publish {
    /// Creates or replaces an object, at once and whole.
    fn publish(&self, object: &Object) -> anyhow::Result<()>;
    /// Takes an object away.
    fn retract(&self, key: &Key) -> anyhow::Result<()>;
}

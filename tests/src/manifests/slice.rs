//! EndpointSlices in few words.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::controller::Phase;

/// An address family; a slice holds one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// Its name in objects.
    #[must_use]
    pub fn api_name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// A slice that is being described.
#[derive(Clone, Debug)]
pub struct SlicePlan {
    slice: EndpointSlice,
}

impl SlicePlan {
    /// An empty slice of a Service in the namespace `default`, named `<service>-<suffix>`.
    #[must_use]
    pub fn new(service: &str, suffix: &str, family: Family) -> Self {
        let labels = BTreeMap::from([
            ("kubernetes.io/service-name".to_owned(), service.to_owned()),
            (
                "endpointslice.kubernetes.io/managed-by".to_owned(),
                "endpointslice-controller.k8s.io".to_owned(),
            ),
        ]);
        let metadata = ObjectMeta {
            name: Some(format!("{service}-{suffix}")),
            namespace: Some("default".into()),
            labels: Some(labels),
            ..ObjectMeta::default()
        };
        let slice = EndpointSlice {
            address_type: family.api_name().into(),
            endpoints: Some(Vec::new()),
            metadata,
            ports: Some(Vec::new()),
        };
        Self { slice }
    }

    /// A port of all its endpoints; its name is that of the Service's port.
    #[must_use]
    pub fn port(mut self, name: &str, protocol: &str, number: u16) -> Self {
        self.slice.ports.get_or_insert_default().push(EndpointPort {
            app_protocol: None,
            // Slices write the name of an unnamed port as an empty string.
            name: Some(name.into()),
            port: Some(number.into()),
            protocol: Some(protocol.into()),
        });
        self
    }

    /// An endpoint.
    #[must_use]
    pub fn endpoint(mut self, pod: &str, address: IpAddr, node: Option<&str>, phase: Phase) -> Self {
        let (ready, serving, terminating) = phase.conditions();
        let reference = ObjectReference {
            kind: Some("Pod".into()),
            name: Some(pod.into()),
            ..ObjectReference::default()
        };
        self.slice.endpoints.get_or_insert_default().push(Endpoint {
            addresses: vec![address.to_string()],
            conditions: Some(EndpointConditions {
                ready: Some(ready),
                serving: Some(serving),
                terminating: Some(terminating),
            }),
            node_name: node.map(Into::into),
            target_ref: Some(reference),
            ..Endpoint::default()
        });
        self
    }

    /// Hints for the last endpoint: for which zones and which nodes it is meant.
    #[must_use]
    pub fn hints(mut self, zones: &[&str], nodes: &[&str]) -> Self {
        let for_zones = zones.iter().map(|zone| ForZone { name: (*zone).into() }).collect();
        let for_nodes = nodes.iter().map(|node| ForNode { name: (*node).into() }).collect();
        let last = self.slice.endpoints.as_mut().and_then(|endpoints| endpoints.last_mut());
        last.expect("hints need an endpoint before them").hints =
            Some(EndpointHints { for_nodes: Some(for_nodes), for_zones: Some(for_zones) });
        self
    }

    /// The slice.
    #[must_use]
    pub fn build(&self) -> EndpointSlice {
        self.slice.clone()
    }
}

//! A Service port by its name: for people, and in SERVICES.

use proxy_common::abi::{ServiceName, TEXT_LEN, text};

use crate::model::{Family, ServicePort};

/// `Service default/web port http (TCP, IPv4)`.
pub(super) fn describe(port: &ServicePort) -> String {
    let family = match port.family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    let name = if port.port.is_empty() { String::new() } else { format!(" port {}", port.port) };
    format!("Service {}/{}{name} ({}, {family})", port.service.namespace, port.service.name, port.proto)
}

/// The name under which a Service port stands in SERVICES; `None` when a part of it is too long.
#[must_use]
pub fn service_name(port: &ServicePort) -> Option<ServiceName> {
    let parts = [&port.service.namespace, &port.service.name, &port.port];
    if parts.iter().any(|part| part.len() >= TEXT_LEN) {
        return None;
    }
    Some(ServiceName {
        namespace: text(&port.service.namespace),
        name: text(&port.service.name),
        port: text(&port.port),
        proto: port.proto,
        family: match port.family {
            Family::V4 => 4,
            Family::V6 => 6,
        },
        pad: [0; 2],
    })
}

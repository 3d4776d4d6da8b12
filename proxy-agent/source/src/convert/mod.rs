//! Converts Kubernetes objects into ours. It never fails: the valid parts of an object are used, and each invalid one gives
//! a warning (X-1…X-16).

pub(crate) mod address;
mod node;
mod service;
mod slice;

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proxy_common::addr::{Addr, Proto};

use agent_core::model::ObjectName;

pub use node::{excluded, node, service_cidr};
pub use service::service;
pub use slice::{endpoints, slice, triggered};

/// A Service with this label belongs to another proxy, whatever the value (S-1).
pub const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// A slice with this label belongs to a headless Service (E-2).
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
/// Names the Service of a slice.
pub(crate) const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Lines about parts of an object that could not be used.
#[derive(Debug, Default)]
struct Warnings(Vec<String>);

impl Warnings {
    fn add(&mut self, part: impl std::fmt::Display, why: impl std::fmt::Display) {
        self.0.push(format!("{part} {why}"));
    }

    /// The address in `text`, if it can be a Service's or an endpoint's.
    fn ip(&mut self, part: impl std::fmt::Display, text: &str) -> Option<IpAddr> {
        match address::ip(text) {
            Ok(ip) if Addr::from(ip).is_never_service() => {
                self.add(
                    part,
                    format_args!("{text:?} is a loopback, multicast or unspecified address: skipped"),
                );
                None
            }
            Ok(ip) => Some(ip),
            Err(fault) => {
                self.add(part, format_args!("{text:?} {fault}: skipped"));
                None
            }
        }
    }

    fn ranges(&mut self, part: &str, texts: &[String]) -> Vec<IpNet> {
        let mut ranges = Vec::new();
        for (i, text) in texts.iter().enumerate() {
            match address::range(text) {
                Ok(range) => ranges.push(range),
                Err(fault) => {
                    self.add(format_args!("{part}[{i}]"), format_args!("{text:?} {fault}: skipped"));
                }
            }
        }
        ranges
    }

    fn proto(&mut self, part: impl std::fmt::Display, text: Option<&str>) -> Option<Proto> {
        match text {
            None | Some("" | "TCP") => Some(Proto::TCP),
            Some("UDP") => Some(Proto::UDP),
            Some("SCTP") => Some(Proto::SCTP),
            Some(other) => {
                self.add(
                    part,
                    format_args!("has protocol {other:?}, which is not TCP, UDP or SCTP: skipped"),
                );
                None
            }
        }
    }

    fn port(&mut self, part: impl std::fmt::Display, number: i32) -> Option<u16> {
        match u16::try_from(number) {
            Ok(port) if port != 0 => Some(port),
            _ => {
                self.add(part, format_args!("has port {number}, which is not in 1…65535: skipped"));
                None
            }
        }
    }
}

/// Namespace and name. An object without a namespace is in `default`, as with `kubectl`.
#[must_use]
pub fn object_name(metadata: &ObjectMeta) -> ObjectName {
    let namespace = metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty());
    ObjectName::new(namespace.unwrap_or("default"), metadata.name.as_deref().unwrap_or_default())
}

#[cfg(test)]
mod tests;

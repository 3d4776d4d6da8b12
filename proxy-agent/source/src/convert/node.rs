//! Nodes, their pods, and ServiceCIDRs.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1 as networking;

use super::Warnings;
use agent_core::model::Node;

/// Whether a pod's sockets are translated at connect.
pub(super) const ANNOTATION_SOCKET_LB: &str = "ebpf-proxy/socket-lb";
/// The UID that kubelet gives a static pod.
const ANNOTATION_MIRROR: &str = "kubernetes.io/config.mirror";
const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
const TAINT_TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// Our own Node object.
#[must_use]
pub fn node(object: &core::Node) -> (Node, Vec<String>) {
    let mut warnings = Warnings::default();
    let labels = object.metadata.labels.as_ref();
    let zone = labels.and_then(|labels| labels.get(LABEL_ZONE)).filter(|zone| !zone.is_empty());
    let spec = object.spec.as_ref();
    let to_be_deleted = spec
        .and_then(|spec| spec.taints.as_deref())
        .is_some_and(|taints| taints.iter().any(|taint| taint.key == TAINT_TO_BE_DELETED));
    let node = Node {
        ips: node_ips(object, &mut warnings),
        pod_cidrs: spec.map(|spec| pod_cidrs(spec, &mut warnings)).unwrap_or_default(),
        zone: zone.map(|zone| zone.as_str().into()),
        eligible: !to_be_deleted && object.metadata.deletion_timestamp.is_none(),
    };
    (node, warnings.0)
}

/// The ranges of ClusterIPs in a ServiceCIDR, whatever its status (Y-16).
#[must_use]
pub fn service_cidr(object: &networking::ServiceCIDR) -> (Vec<IpNet>, Vec<String>) {
    let mut warnings = Warnings::default();
    let texts = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    (warnings.ranges("spec.cidrs", texts), warnings.0)
}

/// The UID after which a pod's cgroup is named, if its sockets are not to be translated at connect. Kubelet gives a static
/// pod another UID than its object has.
#[must_use]
pub fn excluded(object: &core::Pod) -> (Option<String>, Vec<String>) {
    let annotation = |name: &str| object.metadata.annotations.as_ref().and_then(|all| all.get(name));
    let host_network = object.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true));
    let warning = match annotation(ANNOTATION_SOCKET_LB).map(String::as_str) {
        None | Some("true") => return (None, Vec::new()),
        Some("false") if host_network => "cannot be: packets of the node's own network are not translated",
        Some("false") => {
            return (annotation(ANNOTATION_MIRROR).or(object.metadata.uid.as_ref()).cloned(), Vec::new());
        }
        Some(_) => "must be \"true\" or \"false\"",
    };
    (None, vec![format!("the annotation {ANNOTATION_SOCKET_LB} {warning}")])
}

/// InternalIPs first, then ExternalIPs (Y-10).
fn node_ips(object: &core::Node, warnings: &mut Warnings) -> Vec<IpAddr> {
    let addresses = object.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    let mut ips = Vec::new();
    for kind in ["InternalIP", "ExternalIP"] {
        for (i, address) in addresses.iter().enumerate().filter(|(_, address)| address.type_ == kind) {
            let ip = warnings.ip(format_args!("status.addresses[{i}]"), &address.address);
            ips.extend(ip.filter(|ip| !ips.contains(ip)));
        }
    }
    ips
}

fn pod_cidrs(spec: &core::NodeSpec, warnings: &mut Warnings) -> Vec<IpNet> {
    let listed = spec.pod_cidrs.as_deref().filter(|listed| !listed.is_empty());
    let texts = listed.or(spec.pod_cidr.as_ref().map(std::slice::from_ref)).unwrap_or_default();
    let mut ranges = warnings.ranges("spec.podCIDRs", texts);
    // A pod's address cannot be a Service's, so this range would disable all Services.
    ranges.retain(|range| {
        let some = range.prefix_len() > 0;
        if !some {
            warnings
                .add("spec.podCIDRs", format_args!("{range} is every address, and no node's own: skipped"));
        }
        some
    });
    ranges
}

//! Services and Nodes in few words. What is not said here is set on the built object.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{
    ClientIPConfig, LoadBalancerIngress, LoadBalancerStatus, Node, NodeAddress, NodeSpec, NodeStatus,
    Service, ServicePort, ServiceSpec, ServiceStatus, SessionAffinityConfig,
};
use k8s_openapi::api::networking::v1::{ServiceCIDR, ServiceCIDRSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::slice::Family;

/// A Service that is being described; type ClusterIP in the namespace `default` unless changed.
#[derive(Clone, Debug)]
pub struct ServicePlan {
    service: Service,
}

impl ServicePlan {
    /// A Service with these cluster addresses: the first names the primary family; none makes it headless.
    #[must_use]
    pub fn new(name: &str, cluster_ips: &[IpAddr]) -> Self {
        let ips: Vec<String> = if cluster_ips.is_empty() {
            vec!["None".into()]
        } else {
            cluster_ips.iter().map(ToString::to_string).collect()
        };
        let families = cluster_ips.iter().map(|address| Family::of(*address).api_name().to_owned()).collect();
        let spec = ServiceSpec {
            type_: Some("ClusterIP".into()),
            cluster_ip: ips.first().cloned(),
            cluster_ips: Some(ips),
            ip_families: Some(families),
            ip_family_policy: Some(
                if cluster_ips.len() > 1 { "RequireDualStack" } else { "SingleStack" }.into(),
            ),
            internal_traffic_policy: Some("Cluster".into()),
            session_affinity: Some("None".into()),
            selector: Some(BTreeMap::from([("app".into(), name.into())])),
            ports: Some(Vec::new()),
            ..ServiceSpec::default()
        };
        let metadata = ObjectMeta {
            name: Some(name.into()),
            namespace: Some("default".into()),
            ..ObjectMeta::default()
        };
        Self { service: Service { metadata, spec: Some(spec), status: None } }
    }

    /// A port: its protocol, its number and the number at the endpoints.
    #[must_use]
    pub fn port(mut self, name: &str, protocol: &str, port: u16, target: u16) -> Self {
        self.spec().ports.get_or_insert_default().push(ServicePort {
            name: Some(name.into()).filter(|name: &String| !name.is_empty()),
            protocol: Some(protocol.into()),
            port: port.into(),
            target_port: Some(IntOrString::Int(target.into())),
            ..ServicePort::default()
        });
        self
    }

    /// Gives the last port a NodePort and makes the Service one of type NodePort if it was of type ClusterIP.
    #[must_use]
    pub fn node_port(mut self, number: u16) -> Self {
        let spec = self.spec();
        if spec.type_.as_deref() == Some("ClusterIP") {
            spec.type_ = Some("NodePort".into());
            spec.external_traffic_policy = Some("Cluster".into());
        }
        let port = spec.ports.as_mut().and_then(|ports| ports.last_mut());
        port.expect("a NodePort needs a port before it").node_port = Some(number.into());
        self
    }

    /// Makes it a Service of type LoadBalancer whose balancer has these addresses.
    #[must_use]
    pub fn load_balancer(mut self, addresses: &[IpAddr]) -> Self {
        let spec = self.spec();
        spec.type_ = Some("LoadBalancer".into());
        spec.external_traffic_policy.get_or_insert("Cluster".into());
        let ingress = addresses.iter().map(|address| LoadBalancerIngress {
            ip: Some(address.to_string()),
            ip_mode: Some("VIP".into()),
            ..LoadBalancerIngress::default()
        });
        let balancer = LoadBalancerStatus { ingress: Some(ingress.collect()) };
        self.service.status =
            Some(ServiceStatus { load_balancer: Some(balancer), ..ServiceStatus::default() });
        self
    }

    /// Only these clients may use the load balancer's addresses.
    #[must_use]
    pub fn source_ranges(mut self, ranges: &[&str]) -> Self {
        self.spec().load_balancer_source_ranges = Some(ranges.iter().map(ToString::to_string).collect());
        self
    }

    /// Serves these external addresses.
    #[must_use]
    pub fn external_ips(mut self, addresses: &[IpAddr]) -> Self {
        let spec = self.spec();
        spec.external_ips = Some(addresses.iter().map(ToString::to_string).collect());
        spec.external_traffic_policy.get_or_insert("Cluster".into());
        self
    }

    /// `externalTrafficPolicy: Local`, with the port of its health check for a load balancer.
    #[must_use]
    pub fn external_local(mut self, health_check_port: Option<u16>) -> Self {
        let spec = self.spec();
        spec.external_traffic_policy = Some("Local".into());
        spec.health_check_node_port = health_check_port.map(Into::into);
        self
    }

    /// `internalTrafficPolicy: Local`.
    #[must_use]
    pub fn internal_local(mut self) -> Self {
        self.spec().internal_traffic_policy = Some("Local".into());
        self
    }

    /// `sessionAffinity: ClientIP` with this time-out.
    #[must_use]
    pub fn affinity(mut self, seconds: u32) -> Self {
        let spec = self.spec();
        spec.session_affinity = Some("ClientIP".into());
        let timeout = ClientIPConfig { timeout_seconds: i32::try_from(seconds).ok() };
        spec.session_affinity_config = Some(SessionAffinityConfig { client_ip: Some(timeout) });
        self
    }

    /// `trafficDistribution`.
    #[must_use]
    pub fn traffic_distribution(mut self, distribution: &str) -> Self {
        self.spec().traffic_distribution = Some(distribution.into());
        self
    }

    /// `publishNotReadyAddresses: true`.
    #[must_use]
    pub fn publish_not_ready(mut self) -> Self {
        self.spec().publish_not_ready_addresses = Some(true);
        self
    }

    /// A label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.service.metadata.labels.get_or_insert_default().insert(key.into(), value.into());
        self
    }

    /// An annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.service.metadata.annotations.get_or_insert_default().insert(key.into(), value.into());
        self
    }

    /// The Service.
    #[must_use]
    pub fn build(&self) -> Service {
        self.service.clone()
    }

    fn spec(&mut self) -> &mut ServiceSpec {
        self.service.spec.get_or_insert_default()
    }
}

impl From<&ServicePlan> for Service {
    fn from(plan: &ServicePlan) -> Self {
        plan.build()
    }
}

impl From<ServicePlan> for Service {
    fn from(plan: ServicePlan) -> Self {
        plan.service
    }
}

/// A Node with these internal addresses and pod networks.
#[must_use]
pub fn node(name: &str, addresses: &[IpAddr], pod_cidrs: &[String], labels: &[(&str, &str)]) -> Node {
    let address = |kind: &str, address: String| NodeAddress { type_: kind.into(), address };
    let mut listed: Vec<_> = addresses.iter().map(|ip| address("InternalIP", ip.to_string())).collect();
    listed.push(address("Hostname", name.into()));
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let spec = NodeSpec {
        pod_cidr: pod_cidrs.first().cloned(),
        pod_cidrs: Some(pod_cidrs.to_vec()),
        ..NodeSpec::default()
    };
    Node {
        metadata: ObjectMeta { name: Some(name.into()), labels: Some(labels), ..ObjectMeta::default() },
        spec: Some(spec),
        status: Some(NodeStatus { addresses: Some(listed), ..NodeStatus::default() }),
    }
}

/// A ServiceCIDR with these ranges.
#[must_use]
pub fn service_cidr(name: &str, ranges: &[&str]) -> ServiceCIDR {
    let cidrs = Some(ranges.iter().map(ToString::to_string).collect());
    ServiceCIDR {
        metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
        spec: Some(ServiceCIDRSpec { cidrs }),
        ..ServiceCIDR::default()
    }
}

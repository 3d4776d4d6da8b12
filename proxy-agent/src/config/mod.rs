//! What the operator has set: flags and environment in, one validated [`Config`] out.
//!
//! Everything that is wrong is said at once, each with its flag, its value and the reason (F-4).

mod args;
mod bootstrap;
mod host;
mod ports;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;

pub use args::{Capacities, RunArgs, Scheduler, SocketLbArg};
pub use host::{Host, ThisHost};

use crate::model::{DetectLocal, NodePortAddresses, Settings};
use crate::netlink::Devices;

/// Where pins live unless `--bpf-root` says otherwise.
pub const DEFAULT_BPF_ROOT: &str = "/sys/fs/bpf/ebpf-proxy";

/// Seed of the selection hash. Fixed: nodes must agree on where a flow goes.
const SELECTION_SEED: u32 = 0x7f4a_7c15;

/// Where Services come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceConfig {
    /// An API server, as a kubeconfig says.
    Kubeconfig(PathBuf),
    /// An API server at a URL.
    ApiServer(String),
    /// A directory of manifests.
    Manifests(PathBuf),
    /// The API server of the cluster we are a pod of.
    InCluster,
}

impl fmt::Display for SourceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kubeconfig(file) => write!(f, "kubeconfig {}", file.display()),
            Self::ApiServer(url) => write!(f, "API server {url}"),
            Self::Manifests(dir) => write!(f, "manifests {}", dir.display()),
            Self::InCluster => f.write_str("in-cluster API server"),
        }
    }
}

/// All settings of `run`, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where Services come from.
    pub source: SourceConfig,
    /// What shapes the tables.
    pub settings: Settings,
    /// Root of the cgroup v2 hierarchy; `None` for where it is mounted.
    pub cgroup_root: Option<PathBuf>,
    /// Where pins live.
    pub bpf_root: PathBuf,
    /// Which interfaces carry programs.
    pub devices: Devices,
    /// How an endpoint is chosen.
    pub scheduler: Scheduler,
    /// Where health is served; `None` for nowhere.
    pub healthz: Option<SocketAddr>,
    /// Where metrics are served.
    pub metrics: SocketAddr,
    /// How large tables are made.
    pub capacities: Capacities,
    /// Whether what kube-proxy has left goes once this agent does its work (Z-2).
    pub remove_kube_proxy_rules: bool,
    /// What is legal but will hurt: to be logged and shown.
    pub warnings: Vec<String>,
}

/// One flag that cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{flag} {value:?}: {reason}")]
pub struct FlagError {
    /// The flag.
    pub flag: &'static str,
    /// Its value.
    pub value: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Every flag that cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<FlagError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of the flags cannot be followed:", self.0.len())?;
        self.0.iter().try_for_each(|error| write!(f, "\n  {error}"))
    }
}

impl std::error::Error for ConfigErrors {}

/// Collects what is wrong.
#[derive(Default)]
struct Errors(Vec<FlagError>);

impl Errors {
    fn add(&mut self, flag: &'static str, value: impl Into<String>, reason: impl Into<String>) {
        self.0.push(FlagError { flag, value: value.into(), reason: reason.into() });
    }
}

impl Config {
    /// The settings that these flags mean on this host.
    pub fn new(args: &RunArgs, bpf_root: &Path, host: &dyn Host) -> Result<Self, ConfigErrors> {
        let mut errors = Errors::default();
        let mut warnings = Vec::new();
        let source = source(args, &mut errors);
        let server = server(&source, host, &mut errors);
        warnings.extend(bootstrap::depends_on_itself(host, &source, &server));
        let (snat_ports, warning) = ports::snat_ports(host);
        warnings.extend(warning);
        let settings = Settings {
            node_name: node_name(args, host, &mut errors),
            cluster_cidrs: cluster_cidrs(&args.cluster_cidr, &mut errors),
            detect_local: detect_local(args, &mut errors),
            drop_unallocated: args.drop_unallocated_cluster_ips,
            masquerade_all: args.masquerade_all,
            masquerade_local: args.masquerade_local,
            nodeport_addresses: nodeport_addresses(&args.nodeport_addresses, &mut errors),
            socket_lb: args.socket_lb.into(),
            localhost_node_ports: args.localhost_nodeports,
            host_netns: host.netns_cookie(),
            snat_ports,
            seed: SELECTION_SEED,
        };
        warnings.extend(no_pods(&settings));
        let healthz = match args.healthz_bind_address.as_str() {
            "" => None,
            text => address("--healthz-bind-address", text, 10256, &mut errors),
        };
        let metrics = address("--metrics-bind-address", &args.metrics_bind_address, 10249, &mut errors);
        if healthz.is_some() && healthz == metrics {
            errors.add(
                "--metrics-bind-address",
                &args.metrics_bind_address,
                "is taken by --healthz-bind-address",
            );
        }
        let devices = devices(&args.devices, &mut errors);
        if !bpf_root.is_absolute() {
            errors.add("--bpf-root", bpf_root.display().to_string(), "must be an absolute path");
        }
        let (metrics, devices) = match (metrics, devices, errors.0.is_empty()) {
            (Some(metrics), Some(devices), true) => (metrics, devices),
            _ => return Err(ConfigErrors(errors.0)),
        };
        Ok(Self {
            source,
            settings,
            cgroup_root: args.cgroup_root.clone(),
            bpf_root: bpf_root.to_owned(),
            devices,
            scheduler: args.scheduler,
            healthz,
            metrics,
            capacities: args.capacities,
            remove_kube_proxy_rules: args.remove_kube_proxy_rules,
            warnings,
        })
    }
}

/// The one source that was named; without any the cluster we are a pod of.
fn source(args: &RunArgs, errors: &mut Errors) -> SourceConfig {
    let RunArgs { kubeconfig, apiserver, manifests, .. } = args;
    // Empty values are what templates leave of an unset option.
    let kubeconfig = kubeconfig.as_ref().filter(|path| !path.as_os_str().is_empty());
    let apiserver = apiserver.as_ref().filter(|url| !url.is_empty());
    let manifests = manifests.as_ref().filter(|path| !path.as_os_str().is_empty());
    let mut named = Vec::new();
    named.extend(kubeconfig.map(|file| SourceConfig::Kubeconfig(file.clone())));
    named.extend(apiserver.map(|url| SourceConfig::ApiServer(url.clone())));
    named.extend(manifests.map(|dir| SourceConfig::Manifests(dir.clone())));
    if let [_, others @ ..] = named.as_slice() {
        for other in others {
            let (flag, value) = match other {
                SourceConfig::ApiServer(url) => ("--apiserver", url.clone()),
                SourceConfig::Manifests(dir) => ("--manifests", dir.display().to_string()),
                SourceConfig::Kubeconfig(file) => ("--kubeconfig", file.display().to_string()),
                SourceConfig::InCluster => continue,
            };
            errors.add(flag, value, "only one of --kubeconfig, --apiserver and --manifests may be given");
        }
    }
    if let Some(url) = apiserver {
        let known = url.starts_with("https://") || url.starts_with("http://");
        if !known || bootstrap::url_host(url).is_empty() {
            errors.add("--apiserver", url, "must be a URL such as https://10.0.0.10:6443");
        }
    }
    named.into_iter().next().unwrap_or(SourceConfig::InCluster)
}

/// The URL of the API server where it is known; empty otherwise.
fn server(source: &SourceConfig, host: &dyn Host, errors: &mut Errors) -> String {
    match source {
        SourceConfig::ApiServer(url) => url.clone(),
        SourceConfig::Kubeconfig(file) => bootstrap::kubeconfig_server(host, file).unwrap_or_else(|reason| {
            errors.add("--kubeconfig", file.display().to_string(), reason);
            String::new()
        }),
        SourceConfig::Manifests(_) | SourceConfig::InCluster => String::new(),
    }
}

/// The node's name: trimmed and lower-cased (F-9).
fn node_name(args: &RunArgs, host: &dyn Host, errors: &mut Errors) -> Arc<str> {
    const FLAG: &str = "--hostname-override";
    let given = args.hostname_override.as_deref().filter(|name| !name.is_empty());
    let name = match given {
        Some(name) => name.to_owned(),
        None => host.hostname().unwrap_or_else(|e| {
            errors.add(FLAG, "", format!("is needed: the host name cannot be read: {e}"));
            "unknown".to_owned()
        }),
    };
    let trimmed = name.trim().to_lowercase();
    if trimmed.is_empty() {
        errors.add(FLAG, name, "the node name is blank");
    } else if trimmed.len() >= proxy_common::abi::TEXT_LEN * 4 {
        errors.add(FLAG, name, "the node name is longer than Kubernetes allows (253 bytes)");
    }
    trimmed.into()
}

/// Ranges of pod addresses: at most one a family.
fn cluster_cidrs(values: &[String], errors: &mut Errors) -> Vec<IpNet> {
    const FLAG: &str = "--cluster-cidr";
    let mut cidrs: Vec<IpNet> = Vec::new();
    for value in values.iter().filter(|value| !value.is_empty()) {
        match value.parse::<IpNet>() {
            Err(_) => errors.add(FLAG, value, "is not a range such as 10.244.0.0/16"),
            Ok(cidr) if cidrs.iter().any(|c| c.addr().is_ipv4() == cidr.addr().is_ipv4()) => {
                errors.add(FLAG, value, "is the second range of its family: one a family is allowed");
            }
            Ok(cidr) => cidrs.push(cidr.trunc()),
        }
    }
    cidrs
}

/// How pods are told from other sources (M-1); empty is what templates leave of an unset option.
fn detect_local(args: &RunArgs, errors: &mut Errors) -> DetectLocal {
    let mut named = |flag: &'static str, name: &str, mode: fn(Arc<str>) -> DetectLocal| {
        if name.is_empty() {
            errors.add(
                flag,
                name,
                format!("is missing: --detect-local-mode {} goes by it", args.detect_local_mode),
            );
        }
        mode(name.into())
    };
    match args.detect_local_mode.as_str() {
        "" => DetectLocal::AnyRange,
        "ClusterCIDR" => DetectLocal::ClusterCidr,
        "NodeCIDR" => DetectLocal::NodeCidr,
        "BridgeInterface" => named("--pod-bridge-interface", &args.pod_bridge_interface, DetectLocal::Bridge),
        "InterfaceNamePrefix" => {
            let prefix = &args.pod_interface_name_prefix;
            named("--pod-interface-name-prefix", prefix, DetectLocal::InterfacePrefix)
        }
        mode => {
            let reason = "is none of ClusterCIDR, NodeCIDR, BridgeInterface and InterfaceNamePrefix";
            errors.add("--detect-local-mode", mode, reason);
            DetectLocal::AnyRange
        }
    }
}

/// A mode that was asked for and has nothing to go by (M-5).
fn no_pods(settings: &Settings) -> Option<String> {
    let nothing = settings.detect_local == DetectLocal::ClusterCidr && settings.cluster_cidrs.is_empty();
    nothing.then(|| {
        "--detect-local-mode ClusterCIDR without --cluster-cidr: no source counts as a pod, so nothing that \
         goes to a ClusterIP is masqueraded; set --cluster-cidr, or leave the mode away"
            .to_owned()
    })
}

/// Where NodePorts are accepted (V-33). Unset is `primary`, as in kube-proxy's nftables mode.
fn nodeport_addresses(values: &[String], errors: &mut Errors) -> NodePortAddresses {
    const FLAG: &str = "--nodeport-addresses";
    let values: Vec<&str> = values.iter().map(|v| v.trim()).filter(|v| !v.is_empty()).collect();
    if values.is_empty() || values == ["primary"] {
        return NodePortAddresses::Primary;
    }
    let mut ranges = Vec::new();
    for value in values {
        match value.parse::<IpNet>() {
            Ok(range) => ranges.push(range.trunc()),
            Err(_) if value == "primary" => errors.add(FLAG, value, "must stand alone"),
            Err(_) => errors.add(FLAG, value, "is neither a range such as 192.168.0.0/16 nor `primary`"),
        }
    }
    NodePortAddresses::Ranges(ranges)
}

/// An address to listen at; a bare IP gets the default port (F-11, H-26).
fn address(flag: &'static str, text: &str, port: u16, errors: &mut Errors) -> Option<SocketAddr> {
    let bare = text.strip_prefix('[').and_then(|v6| v6.strip_suffix(']')).unwrap_or(text);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Some(SocketAddr::new(ip, port));
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => return Some(address),
        Ok(_) => errors.add(flag, text, "port 0 cannot be found by anyone: give 1 to 65535"),
        Err(_) => errors.add(flag, text, format!("is not an address such as 0.0.0.0:{port} or [::]:{port}")),
    }
    None
}

/// Patterns of interface names.
fn devices(patterns: &[String], errors: &mut Errors) -> Option<Devices> {
    let patterns: Vec<&str> = patterns.iter().map(|p| p.trim()).filter(|p| !p.is_empty()).collect();
    match Devices::new(&patterns) {
        Ok(devices) => Some(devices),
        Err(error) => {
            errors.add("--devices", error.pattern(), error.reason());
            None
        }
    }
}

#[cfg(test)]
mod tests;

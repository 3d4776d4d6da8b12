//! What the operator has set: flags, environment and kube-proxy's file in, one validated [`Config`] out.
//!
//! Flags and file fill the same [`KubeProxyConfiguration`]; from there on it does not matter which it was. Everything
//! that is wrong is said at once, each with its name, its value and the reason (F-4).

mod args;
mod bootstrap;
mod check;
mod errors;
mod families;
mod host;
mod input;
mod kube_proxy;
mod ports;
mod sizes;
mod source;
mod sysctl;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use proxy_common::abi::PortRange;

pub use args::{LoadBalancerModeArg, RunArgs, Scheduler, SocketLbArg};
pub use errors::{ConfigErrors, FlagError};
pub use families::Misfits;
pub use host::{Host, ThisHost};
pub use kube_proxy::duration::GoDuration;
pub use kube_proxy::v1alpha1::KubeProxyConfiguration;
pub use sizes::TableSizes;
pub use source::SourceConfig;
pub use sysctl::Sysctls;

use agent_core::model::{DetectLocal, Drivers, NodePortAddresses, ObjectName, Settings};
use agent_kernel::datapath::attach::exclude::Excluded;
use agent_kernel::datapath::flow::Timeouts;
use agent_kernel::netlink::Devices;
use errors::Errors;
use input::Input;
use kube_proxy::v1alpha1::Nftables;
use kube_proxy::{fields, file, gates};

/// Seed of the selection hash. Fixed: nodes must agree on where a flow goes.
const SELECTION_SEED: u32 = 0x7f4a_7c15;

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
    /// Which interfaces carry a program at their driver.
    pub drivers: Drivers,
    /// Whose sockets are left to their packets.
    pub excluded: Excluded,
    /// Whether pods say that, too.
    pub pod_annotations: bool,
    /// How an endpoint is chosen.
    pub scheduler: Scheduler,
    /// Where health is served; `None` for nowhere.
    pub healthz: Option<SocketAddr>,
    /// Where metrics are served.
    pub metrics: SocketAddr,
    /// Whether an address for health or metrics that cannot be had ends the agent (H-12, H-28).
    pub hard_fail: bool,
    /// How large tables are made.
    pub capacities: TableSizes,
    /// Whether what kube-proxy has left goes once this agent does its work (Z-2).
    pub remove_kube_proxy_rules: bool,
    /// What the kernel's connection tracking is to be set to.
    pub sysctls: Sysctls,
    /// How readily the kernel ends this process when memory runs out (Z-11).
    pub oom_score_adj: i32,
    /// How long our own flows may be silent.
    pub flow_timeouts: Timeouts,
    /// A failed round of writing is tried again after this time at the latest (Y-19).
    pub sync_period: Duration,
    /// Shortest time from one round of writing to the next; `None` for as short as it will do.
    pub min_sync_period: Option<Duration>,
    /// kube-proxy's settings, with defaults for what was not set.
    pub kube_proxy: KubeProxyConfiguration,
    /// The file they came from, and what it said.
    pub file: Option<ConfigFile>,
    /// Only set the sysctls, and end (F-7).
    pub init_only: bool,
    /// What is legal but will hurt: to be logged and shown.
    pub warnings: Vec<String>,
}

/// The file of `--config`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it said when it was read.
    pub text: String,
}

impl Config {
    /// The settings that these flags, and the file that they name, mean on this host.
    pub fn new(args: &RunArgs, bpf_root: &Path, host: &dyn Host) -> Result<Self, ConfigErrors> {
        let input = Input::new(args, host)?;
        let mut errors = Errors { origin: input.origin(), errors: Vec::new() };
        let Input { mut kube, file, mut warnings } = input;
        check::check(&kube, &mut errors);
        warnings.extend(gates::without_effect(&kube.feature_gates));
        default_addresses(&mut kube);
        let source = source::of(args, &kube, &mut errors);
        let servers = source::servers(&source, host, &mut errors);
        warnings.extend(bootstrap::depends_on_itself(host, &source, &servers));
        let (snat_ports, warning) = ports::snat_ports(host);
        warnings.extend(warning);
        let section = kube.section();
        let mut settings = settings(args, &kube, host, snat_ports, &mut errors);
        warnings.extend(no_pods(&settings));
        let healthz = match kube.healthz_bind_address.as_deref() {
            None | Some("") => None,
            Some(text) => address("--healthz-bind-address", text, 10256, &mut errors),
        };
        let at = kube.metrics_bind_address.clone().unwrap_or_default();
        let metrics = address("--metrics-bind-address", &at, 10249, &mut errors);
        if healthz.is_some() && healthz == metrics {
            errors.add("--metrics-bind-address", at, "is taken by --healthz-bind-address");
        }
        settings.own_ports = healthz.iter().chain(&metrics).map(SocketAddr::port).collect();
        probe_port(&mut settings, &mut errors);
        let devices = devices(&args.devices, &mut errors);
        let excluded = excluded(&args.socket_lb_exclude_cgroups, &mut errors);
        if !bpf_root.is_absolute() {
            errors.add("--bpf-root", bpf_root.display().to_string(), "must be an absolute path");
        }
        let (Some(metrics), Some(devices), true) = (metrics, devices, errors.errors.is_empty()) else {
            return Err(ConfigErrors(errors.errors));
        };
        Ok(Self {
            source,
            settings,
            cgroup_root: args.cgroup_root.clone(),
            bpf_root: bpf_root.to_owned(),
            devices,
            drivers: args.xdp.into(),
            excluded,
            pod_annotations: args.socket_lb_pod_annotations,
            scheduler: args.scheduler,
            healthz,
            metrics,
            hard_fail: kube.bind_address_hard_fail,
            capacities: args.capacities,
            remove_kube_proxy_rules: args.remove_kube_proxy_rules,
            sysctls: Sysctls::new(&kube.conntrack, host.cpus()),
            oom_score_adj: kube.oom_score_adj,
            flow_timeouts: sysctl::flow_timeouts(&kube.conntrack),
            sync_period: section.sync_period.positive().unwrap_or(Duration::from_secs(30)),
            min_sync_period: section
                .min_sync_period
                .positive()
                .filter(|_| section.min_sync_period > Nftables::default().min_sync_period),
            kube_proxy: kube,
            file,
            init_only: args.init_only,
            warnings,
        })
    }

    /// kube-proxy's settings as a file for `--config` (F-6).
    pub fn to_file(&self) -> Result<String, String> {
        file::encode(&self.kube_proxy)
    }

    /// kube-proxy's settings as `/configz` shows them (H-27).
    #[must_use]
    pub fn configz(&self) -> serde_json::Value {
        serde_json::json!({ "kubeproxy.config.k8s.io": fields::value(&self.kube_proxy) })
    }
}

/// What shapes the tables.
fn settings(
    args: &RunArgs,
    kube: &KubeProxyConfiguration,
    host: &dyn Host,
    snat_ports: Vec<PortRange>,
    errors: &mut Errors,
) -> Settings {
    Settings {
        node_name: node_name(args, kube, host, errors),
        bind_address: bind_address(&kube.bind_address, errors).filter(|ip| !ip.is_unspecified()),
        ipv6: families::has_ipv6(host),
        external_ips: kube.feature_gates.get(gates::EXTERNAL_IPS) != Some(&false),
        cluster_cidrs: cluster_cidrs(&kube.cluster_cidr, errors),
        detect_local: detect_local(kube, errors),
        drop_unallocated: args.drop_unallocated_cluster_ips,
        masquerade_all: kube.section().masquerade_all,
        masquerade_local: args.masquerade_local,
        loadbalancer_mode: args.loadbalancer_mode.into(),
        nodeport_addresses: nodeport_addresses(&kube.node_port_addresses, errors),
        socket_lb: args.socket_lb.into(),
        localhost_node_ports: kube.iptables.localhost_node_ports,
        host_netns: host.netns_cookie(),
        snat_ports,
        own_ports: Vec::new(),
        agents_service: agents_service(&args.agents_service, errors),
        probe_port: args.dsr_probe_port,
        seed: SELECTION_SEED,
    }
}

/// The Service of the agents.
fn agents_service(text: &str, errors: &mut Errors) -> ObjectName {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            ObjectName::new(namespace, name)
        }
        _ => {
            let reason = "is not a namespace and a name such as kube-system/ebpf-proxy";
            errors.add("--agents-service", text, reason);
            ObjectName::new("", "")
        }
    }
}

/// The port of probes becomes one of the agent's own. It is of another protocol than the others, but a port that has one use
/// is understood by who writes rules for it.
fn probe_port(settings: &mut Settings, errors: &mut Errors) {
    let port = settings.probe_port;
    if settings.own_ports.contains(&port) {
        let reason = "is taken by --healthz-bind-address or --metrics-bind-address";
        errors.add("--dsr-probe-port", port.to_string(), reason);
    }
    settings.own_ports.extend(Some(port).filter(|port| *port != 0));
}

/// The address that stands for the node; empty is what templates leave of an unset option.
fn bind_address(text: &str, errors: &mut Errors) -> Option<IpAddr> {
    if text.is_empty() {
        return None;
    }
    text.parse().map_err(|_| errors.add("--bind-address", text, "is not an IP address")).ok()
}

/// Where health and metrics are served unless something else is said: in the family of the bind address (H-26).
fn default_addresses(kube: &mut KubeProxyConfiguration) {
    let v6 = kube.bind_address.parse().is_ok_and(|ip: IpAddr| ip.is_ipv6());
    let (healthz, metrics) =
        if v6 { ("[::]:10256", "[::1]:10249") } else { ("0.0.0.0:10256", "127.0.0.1:10249") };
    kube.healthz_bind_address.get_or_insert_with(|| healthz.to_owned());
    kube.metrics_bind_address.get_or_insert_with(|| metrics.to_owned());
}

/// The node's name: trimmed and lower-cased (F-9).
fn node_name(
    args: &RunArgs,
    kube: &KubeProxyConfiguration,
    host: &dyn Host,
    errors: &mut Errors,
) -> Arc<str> {
    const FLAG: &str = "--hostname-override";
    let flag = args.hostname_override.as_deref().filter(|name| !name.is_empty());
    let given = flag.or(Some(kube.hostname_override.as_str()).filter(|name| !name.is_empty()));
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
fn cluster_cidrs(text: &str, errors: &mut Errors) -> Vec<IpNet> {
    const FLAG: &str = "--cluster-cidr";
    let mut cidrs: Vec<IpNet> = Vec::new();
    for value in text.split(',').filter(|value| !value.is_empty()) {
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
fn detect_local(kube: &KubeProxyConfiguration, errors: &mut Errors) -> DetectLocal {
    let (mode, names) = (kube.detect_local_mode.as_str(), &kube.detect_local);
    let mut named = |flag: &'static str, name: &str, means: fn(Arc<str>) -> DetectLocal| {
        if name.is_empty() {
            errors.add(flag, name, format!("is missing: the mode {mode} goes by it"));
        }
        means(name.into())
    };
    match mode {
        "" => DetectLocal::AnyRange,
        "ClusterCIDR" => DetectLocal::ClusterCidr,
        "NodeCIDR" => DetectLocal::NodeCidr,
        "BridgeInterface" => named("--pod-bridge-interface", &names.bridge_interface, DetectLocal::Bridge),
        "InterfaceNamePrefix" => {
            named("--pod-interface-name-prefix", &names.interface_name_prefix, DetectLocal::InterfacePrefix)
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
fn excluded(patterns: &[String], errors: &mut Errors) -> Excluded {
    let given: Vec<&str> = patterns.iter().map(|p| p.trim()).filter(|p| !p.is_empty()).collect();
    Excluded::new(&given).unwrap_or_else(|error| {
        let reason = "must be a pattern for paths below the cgroup root, such as kubepods/**/pod1234*";
        errors.add("--socket-lb-exclude-cgroups", error.pattern(), reason);
        Excluded::default()
    })
}

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
mod input_tests;
#[cfg(test)]
mod tests;

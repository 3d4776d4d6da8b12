//! `KubeProxyConfiguration` of `kubeproxy.config.k8s.io/v1alpha1`: one shape for kube-proxy's flags and its file.
//!
//! The flags fill it, the file fills it (`file.rs`), and the defaults of both are those written here.

use std::collections::BTreeMap;

use clap::{ArgAction, Args, Command};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::duration::GoDuration;

/// `apiVersion` of the file.
pub(in crate::config) const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// `kind` of the file.
pub(in crate::config) const KIND: &str = "KubeProxyConfiguration";

/// Heading of the flags that change nothing.
pub(in crate::config) const IGNORED: &str = "Accepted because kube-proxy has them; without effect here";
const CONNTRACK: &str = "The kernel's connection tracking";
const SOURCE: &str = "Where Services come from (none: in-cluster)";

/// What kube-proxy can be told, by flags or by its file.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KubeProxyConfiguration {
    /// `apiVersion`.
    #[arg(skip = API_VERSION)]
    pub api_version: String,
    /// `kind`.
    #[arg(skip = KIND)]
    pub kind: String,
    /// Kubernetes' feature gates: `AllowServiceExternalIPs=false` leaves external IPs out, the others change
    /// nothing here.
    #[arg(long, value_name = "NAME=BOOL,...", default_value = "", hide_default_value = true,
        value_parser = super::gates::parse)]
    pub feature_gates: BTreeMap<String, bool>,
    /// `clientConnection`.
    #[command(flatten)]
    pub client_connection: ClientConnection,
    /// `logging`: taken as it comes.
    #[arg(skip)]
    pub logging: Value,
    /// `hostnameOverride`: the flag of this name is not here, because it counts beside a file, too.
    #[arg(skip)]
    pub hostname_override: String,
    /// Address of this node in the place of the one in its Node object, if it is not 0.0.0.0 or ::; its family
    /// becomes the primary one.
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub bind_address: String,
    /// Where /healthz and /livez answer; empty for nowhere [default: 0.0.0.0:10256].
    #[arg(long, value_name = "IP[:PORT]")]
    pub healthz_bind_address: Option<String>,
    /// Where /metrics answers [default: 127.0.0.1:10249].
    #[arg(long, value_name = "IP[:PORT]")]
    pub metrics_bind_address: Option<String>,
    /// End when an address for health or metrics cannot be had, instead of trying again.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
        action = ArgAction::Set, value_name = "BOOL")]
    pub bind_address_hard_fail: bool,
    /// Not profiled over HTTP.
    #[arg(long = "profiling", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_short_help = true,
        help_heading = IGNORED)]
    pub enable_profiling: bool,
    /// No metric is hidden.
    #[arg(long, value_name = "VERSION", default_value = "", hide_default_value = true, hide_short_help = true,
        help_heading = IGNORED)]
    pub show_hidden_metrics_for_version: String,
    /// There is one mode: eBPF.
    #[arg(long = "proxy-mode", value_name = "MODE", default_value = "", hide_default_value = true,
        hide_short_help = true, help_heading = IGNORED)]
    pub mode: String,
    /// `iptables`: what is not of that mode alone is followed.
    #[command(flatten)]
    pub iptables: Iptables,
    /// `ipvs`.
    #[command(flatten)]
    pub ipvs: Ipvs,
    /// `nftables`: what is not of that mode alone is followed when the mode is `nftables` (F-10).
    #[arg(skip)]
    pub nftables: Nftables,
    /// `winkernel`: taken as it comes.
    #[arg(skip)]
    pub winkernel: Value,
    /// `windowsRunAsService`.
    #[arg(skip)]
    pub windows_run_as_service: bool,
    /// Which range tells pods from other sources: `ClusterCIDR` for --cluster-cidr, `NodeCIDR` for podCIDRs of
    /// this Node [default: --cluster-cidr, and without it podCIDRs].
    #[arg(long, value_name = "MODE", default_value = "", hide_default_value = true)]
    pub detect_local_mode: String,
    /// `detectLocal`.
    #[command(flatten)]
    pub detect_local: DetectLocalConfiguration,
    /// Range of pod addresses, at most one a family: what comes from elsewhere is masqueraded.
    #[arg(long, value_name = "CIDR,...", default_value = "", hide_default_value = true)]
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: String,
    /// Addresses at which NodePorts are accepted: ranges, or `primary` for the node's own [default: primary].
    #[arg(long = "nodeport-addresses", value_name = "CIDR,...|primary", value_delimiter = ',')]
    pub node_port_addresses: Vec<String>,
    /// How readily the kernel ends this process when memory runs out.
    #[arg(long, value_name = "N", default_value_t = -999, allow_negative_numbers = true)]
    pub oom_score_adj: i32,
    /// `conntrack`.
    #[command(flatten)]
    pub conntrack: Conntrack,
    /// Nothing is delivered again and again.
    #[arg(long, value_name = "DURATION", default_value_t = GoDuration::secs(900), hide_short_help = true,
        help_heading = IGNORED)]
    pub config_sync_period: GoDuration,
    /// `portRange`: of a mode that no longer exists.
    #[arg(skip)]
    pub port_range: String,
}

/// `clientConnection`: how the API server is reached.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientConnection {
    /// Reach the API server as this kubeconfig says.
    #[arg(long, value_name = "FILE", default_value = "", hide_default_value = true, help_heading = SOURCE)]
    pub kubeconfig: String,
    /// `acceptContentTypes`.
    #[arg(skip)]
    pub accept_content_types: String,
    /// JSON is spoken.
    #[arg(long = "kube-api-content-type", value_name = "TYPE", default_value = "application/vnd.kubernetes.protobuf",
        hide_short_help = true, help_heading = IGNORED)]
    pub content_type: String,
    /// A few watches need no limit.
    #[arg(long = "kube-api-qps", value_name = "N", default_value_t = 5.0, hide_short_help = true,
        help_heading = IGNORED)]
    pub qps: f64,
    /// A few watches need no limit.
    #[arg(long = "kube-api-burst", value_name = "N", default_value_t = 10, allow_negative_numbers = true,
        hide_short_help = true, help_heading = IGNORED)]
    pub burst: i32,
}

/// `iptables`.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Iptables {
    /// Packets are not marked.
    #[arg(long = "iptables-masquerade-bit", value_name = "N", default_value_t = 14, allow_negative_numbers = true,
        hide_short_help = true, help_heading = IGNORED)]
    pub masquerade_bit: i32,
    /// Masquerade everything that goes to a ClusterIP.
    // Go's flags take `--flag=true`, and manifests are full of it.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
        action = ArgAction::Set, value_name = "BOOL")]
    pub masquerade_all: bool,
    /// Let host processes reach NodePorts at 127.0.0.1 and ::1, too (with --socket-lb=all or host).
    #[arg(long = "localhost-nodeports", visible_alias = "iptables-localhost-nodeports", num_args = 0..=1,
        require_equals = true, default_missing_value = "true", default_value_t = true, action = ArgAction::Set,
        value_name = "BOOL")]
    pub localhost_node_ports: bool,
    /// Try again this long after a failure at the latest; /healthz says 503 after twice that.
    #[arg(id = "iptables-sync-period", long, value_name = "DURATION", default_value_t = GoDuration::secs(30))]
    pub sync_period: GoDuration,
    /// Shortest time between two rounds of writing; what is not above the default means milliseconds.
    #[arg(id = "iptables-min-sync-period", long, value_name = "DURATION", default_value_t = GoDuration::secs(1))]
    pub min_sync_period: GoDuration,
}

/// `nftables`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Nftables {
    /// Packets are not marked.
    pub masquerade_bit: i32,
    /// As in [`Iptables`].
    pub masquerade_all: bool,
    /// As in [`Iptables`].
    pub sync_period: GoDuration,
    /// As in [`Iptables`].
    pub min_sync_period: GoDuration,
}

/// `ipvs`.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ipvs {
    /// Of IPVS mode.
    #[arg(id = "ipvs-sync-period", long, value_name = "DURATION", default_value_t = GoDuration::secs(30),
        hide_short_help = true,
        help_heading = IGNORED)]
    pub sync_period: GoDuration,
    /// Of IPVS mode.
    #[arg(
        id = "ipvs-min-sync-period",
        long,
        value_name = "DURATION",
        default_value_t,
        hide_short_help = true, help_heading = IGNORED
    )]
    pub min_sync_period: GoDuration,
    /// Of IPVS mode: see --scheduler.
    #[arg(
        id = "ipvs-scheduler",
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true,
        hide_short_help = true, help_heading = IGNORED
    )]
    pub scheduler: String,
    /// Of IPVS mode.
    #[arg(
        id = "ipvs-exclude-cidrs",
        long,
        value_name = "CIDR,...",
        value_delimiter = ',',
        hide_short_help = true, help_heading = IGNORED
    )]
    #[serde(rename = "excludeCIDRs")]
    pub exclude_cidrs: Vec<String>,
    /// Of IPVS mode.
    #[arg(id = "ipvs-strict-arp", long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_short_help = true,
        help_heading = IGNORED)]
    #[serde(rename = "strictARP")]
    pub strict_arp: bool,
    /// Of IPVS mode.
    #[arg(id = "ipvs-tcp-timeout", long, value_name = "DURATION", default_value_t, hide_short_help = true,
        help_heading = IGNORED)]
    pub tcp_timeout: GoDuration,
    /// Of IPVS mode.
    #[arg(
        id = "ipvs-tcpfin-timeout",
        long,
        value_name = "DURATION",
        default_value_t,
        hide_short_help = true, help_heading = IGNORED
    )]
    pub tcp_fin_timeout: GoDuration,
    /// Of IPVS mode.
    #[arg(id = "ipvs-udp-timeout", long, value_name = "DURATION", default_value_t, hide_short_help = true,
        help_heading = IGNORED)]
    pub udp_timeout: GoDuration,
}

/// `detectLocal`.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DetectLocalConfiguration {
    /// Bridge that pods are behind, for --detect-local-mode=BridgeInterface.
    #[arg(long = "pod-bridge-interface", value_name = "NAME", default_value = "", hide_default_value = true)]
    pub bridge_interface: String,
    /// What names of pods' interfaces begin with, for --detect-local-mode=InterfaceNamePrefix.
    #[arg(
        long = "pod-interface-name-prefix",
        value_name = "PREFIX",
        default_value = "",
        hide_default_value = true
    )]
    pub interface_name_prefix: String,
}

/// `conntrack`: limits and time-outs of the kernel's connection tracking, the latter for our own flows, too.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[command(next_help_heading = CONNTRACK)]
pub struct Conntrack {
    /// Entries for each CPU; 0 leaves the limit as it is.
    #[arg(
        id = "conntrack-max-per-core",
        long,
        value_name = "N",
        default_value_t = 32_768,
        allow_negative_numbers = true
    )]
    pub max_per_core: i64,
    /// Entries at least, however few CPUs there are.
    #[arg(
        id = "conntrack-min",
        long,
        value_name = "N",
        default_value_t = 131_072,
        allow_negative_numbers = true
    )]
    pub min: i64,
    /// How long an established TCP connection may be silent; 0 leaves it as it is.
    #[arg(id = "conntrack-tcp-timeout-established", long, value_name = "DURATION",
        default_value_t = GoDuration::secs(86_400))]
    pub tcp_established_timeout: GoDuration,
    /// How long a TCP connection may be silent that one side has closed; 0 leaves it as it is.
    #[arg(id = "conntrack-tcp-timeout-close-wait", long, value_name = "DURATION",
        default_value_t = GoDuration::secs(3_600))]
    pub tcp_close_wait_timeout: GoDuration,
    /// Do not call packets outside a TCP window invalid.
    #[arg(id = "conntrack-tcp-be-liberal", long, num_args = 0..=1, require_equals = true,
        default_missing_value = "true", default_value_t = false, action = ArgAction::Set, value_name = "BOOL")]
    pub tcp_be_liberal: bool,
    /// How long a UDP flow may be silent that nobody has answered; 0 leaves it as it is.
    #[arg(id = "conntrack-udp-timeout", long, value_name = "DURATION", default_value_t)]
    pub udp_timeout: GoDuration,
    /// How long a UDP flow may be silent; 0 leaves it as it is.
    #[arg(id = "conntrack-udp-timeout-stream", long, value_name = "DURATION", default_value_t)]
    pub udp_stream_timeout: GoDuration,
}

/// What no flag at all amounts to.
fn defaults<T: Args>() -> T {
    let matches = T::augment_args(Command::new("proxy-agent")).get_matches_from(["proxy-agent"]);
    T::from_arg_matches(&matches).expect("every flag has a default")
}

impl Default for KubeProxyConfiguration {
    fn default() -> Self {
        defaults()
    }
}

impl Default for ClientConnection {
    fn default() -> Self {
        defaults()
    }
}

impl Default for Iptables {
    fn default() -> Self {
        defaults()
    }
}

impl Default for Ipvs {
    fn default() -> Self {
        defaults()
    }
}

impl Default for DetectLocalConfiguration {
    fn default() -> Self {
        defaults()
    }
}

impl Default for Conntrack {
    fn default() -> Self {
        defaults()
    }
}

impl Default for Nftables {
    fn default() -> Self {
        Self::from(&Iptables::default())
    }
}

impl From<&Iptables> for Nftables {
    fn from(iptables: &Iptables) -> Self {
        let Iptables {
            masquerade_bit,
            masquerade_all,
            localhost_node_ports: _,
            sync_period,
            min_sync_period,
        } = *iptables;
        Self { masquerade_bit, masquerade_all, sync_period, min_sync_period }
    }
}

impl KubeProxyConfiguration {
    /// The section that counts: that of nftables in that mode, that of iptables otherwise (F-10).
    #[must_use]
    pub fn section(&self) -> Nftables {
        if self.mode == "nftables" { self.nftables.clone() } else { Nftables::from(&self.iptables) }
    }
}

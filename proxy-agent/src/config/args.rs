//! The flags of `run`, as they are typed. What they mean is decided in [`super::Config`].

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::kube_proxy::v1alpha1::{IGNORED, KubeProxyConfiguration};
use super::sizes::TableSizes;
use agent_core::model::{Drivers, LoadBalancerMode, SocketLb};

/// Whose sockets are translated at `connect`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SocketLbArg {
    /// Host processes and pods.
    All,
    /// Host processes; pods are left to TC.
    Host,
    /// Nobody: pods and the outside are translated packet by packet, and host processes reach no Service.
    Off,
}

impl From<SocketLbArg> for SocketLb {
    fn from(arg: SocketLbArg) -> Self {
        match arg {
            SocketLbArg::All => Self::All,
            SocketLbArg::Host => Self::Host,
            SocketLbArg::Off => Self::Off,
        }
    }
}

/// Which interfaces to the outside carry a program at their driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum XdpArg {
    /// None.
    Off,
    /// Hardware and bonds, where the driver takes it.
    Auto,
    /// Every interface whose driver takes it, such as veth devices.
    Native,
}

impl From<XdpArg> for Drivers {
    fn from(arg: XdpArg) -> Self {
        match arg {
            XdpArg::Off => Self::Off,
            XdpArg::Auto => Self::Auto,
            XdpArg::Native => Self::Native,
        }
    }
}

/// What becomes of packets from outside for endpoints on other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LoadBalancerModeArg {
    /// They are masqueraded, and the answers come back by this node.
    Snat,
    /// They go to the endpoint's node as they are, which answers the client itself (direct server return).
    Dsr,
}

impl From<LoadBalancerModeArg> for LoadBalancerMode {
    fn from(arg: LoadBalancerModeArg) -> Self {
        match arg {
            LoadBalancerModeArg::Snat => Self::Snat,
            LoadBalancerModeArg::Dsr => Self::Dsr,
        }
    }
}

/// How the slots of a Service are filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scheduler {
    /// One slot an endpoint, chosen by a hash of the flow.
    Hash,
}

/// Flags of `proxy-agent run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Take kube-proxy's settings from this file, a `KubeProxyConfiguration` of kubeproxy.config.k8s.io/v1alpha1.
    /// Flags that stand for one of its fields are then overruled, save --hostname-override; flags that
    /// kube-proxy does not have, and --master, count in any case.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Write kube-proxy's settings as they would be used to this file, fit for --config, and end.
    #[arg(long, value_name = "FILE")]
    pub write_config_to: Option<PathBuf>,
    /// Set what the kernel's connection tracking is to be set to, mount a bpffs where there is none, and end: that takes more
    /// privileges than the rest.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
        action = clap::ArgAction::Set, value_name = "BOOL")]
    pub init_only: bool,
    /// Reach the API server at this URL, whatever a kubeconfig says of its address. Several servers of one cluster are
    /// tried in turn; one that answers is kept.
    #[arg(
        long,
        visible_alias = "master",
        value_name = "URL,...",
        value_delimiter = ',',
        help_heading = "Where Services come from (none: in-cluster)"
    )]
    pub apiserver: Vec<String>,
    /// Read Services and EndpointSlices from the YAML files of a directory; no API server is needed.
    #[arg(long, value_name = "DIR", help_heading = "Where Services come from (none: in-cluster)")]
    pub manifests: Option<PathBuf>,

    /// Name of this node's Node object [default: the host name].
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    pub hostname_override: Option<String>,
    /// Root of the cgroup v2 hierarchy [default: where it is mounted].
    #[arg(long, value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// Whose sockets are translated at connect. What host processes send past TCP and UDP sockets (SCTP, raw sockets) is
    /// translated with no setting.
    #[arg(long, value_enum, default_value_t = SocketLbArg::All)]
    pub socket_lb: SocketLbArg,
    /// Pods whose sockets are left to their packets, as glob patterns for their cgroups below --cgroup-root: a cluster
    /// or a service mesh inside the pod then sees Service addresses. `*` stands within one name, `**` for any number of
    /// names. Not for host processes, whose packets nobody translates.
    #[arg(long, value_name = "GLOB,...", value_delimiter = ',')]
    pub socket_lb_exclude_cgroups: Vec<String>,
    /// Leave the sockets of pods with the annotation `ebpf-proxy/socket-lb: "false"` to their packets, too. The agent
    /// then watches this node's pods, for which its role must allow list and watch.
    #[arg(long)]
    pub socket_lb_pod_annotations: bool,
    /// Interfaces that carry programs, as glob patterns [default: all but lo].
    #[arg(long, value_name = "GLOB,...", value_delimiter = ',')]
    pub devices: Vec<String>,
    /// Send on at the driver (XDP) what comes from outside and goes to an endpoint elsewhere, or back: connections that
    /// have been answered then pass neither netfilter nor TC programs of others on this node. Some drivers reset their
    /// device when the program comes or goes. A driver that refuses is left to the stack, which is said.
    #[arg(long, value_enum, default_value_t = XdpArg::Off)]
    pub xdp: XdpArg,
    /// Drop what goes to an address inside a ServiceCIDR that is no Service's, as kube-proxy's nftables mode does;
    /// false where another proxy serves some of the Services.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true,
        action = clap::ArgAction::Set, value_name = "BOOL")]
    pub drop_unallocated_cluster_ips: bool,
    /// Masquerade outside clients towards endpoints of this node too, as kube-proxy does under policy Cluster.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
        action = clap::ArgAction::Set, value_name = "BOOL")]
    pub masquerade_local: bool,
    /// What becomes of packets from outside for endpoints on other nodes, unless the Service says otherwise (annotation
    /// `ebpf-proxy/loadbalancer-mode`). Direct server return keeps the client's address and saves answers a hop; the
    /// network has to let nodes send under the Service's address. It holds for NodePorts, external and load-balancer
    /// addresses under externalTrafficPolicy Cluster, over TCP and UDP.
    #[arg(long, value_enum, value_name = "MODE", default_value_t = LoadBalancerModeArg::Snat)]
    pub loadbalancer_mode: LoadBalancerModeArg,
    /// The Service whose endpoints are the agents of all nodes, with a UDP port `dsr`: by it they know each other's addresses,
    /// for direct server return.
    #[arg(long, value_name = "NAMESPACE/NAME", default_value = "kube-system/ebpf-proxy")]
    pub agents_service: String,
    /// UDP port at which the agents of other nodes ask whether wrapped packets get through to this one; the same on all. 0
    /// switches direct server return off, on the way to this node and from it.
    #[arg(long, value_name = "PORT", default_value_t = 10261)]
    pub dsr_probe_port: u16,
    /// Remove what a kube-proxy has left on this node, once this agent does its work and no kube-proxy runs here.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true,
        action = clap::ArgAction::Set, value_name = "BOOL")]
    pub remove_kube_proxy_rules: bool,
    /// How an endpoint is chosen.
    #[arg(long, value_name = "NAME", value_enum, default_value_t = Scheduler::Hash)]
    pub scheduler: Scheduler,

    /// What kube-proxy has flags for, too.
    #[command(flatten)]
    pub kube_proxy: KubeProxyConfiguration,
    /// What kube-proxy's flags leave for nothing.
    #[command(flatten)]
    pub leftover: Leftover,
    /// How large the tables are made.
    #[command(flatten)]
    pub capacities: TableSizes,
}

/// Flags of kube-proxy that no field of its file stands for. All but `--v` change nothing.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = IGNORED)]
pub struct Leftover {
    /// Verbosity of kube-proxy's log: 4 and more is our -v, 6 and more -vv.
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub v: Option<u8>,
    /// See RUST_LOG.
    #[arg(long, value_name = "FILE=N,...", hide_short_help = true)]
    pub vmodule: Option<String>,
    /// The log is text.
    #[arg(long, value_name = "FORMAT", hide_short_help = true)]
    pub logging_format: Option<String>,
    /// The log is not held back.
    #[arg(long, value_name = "DURATION", hide_short_help = true)]
    pub log_flush_frequency: Option<String>,
    /// The log is text.
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub log_json_info_buffer_size: Option<String>,
    /// The log is text.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        hide_short_help = true)]
    pub log_json_split_stream: Option<String>,
    /// The log is not held back.
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub log_text_info_buffer_size: Option<String>,
    /// The log goes to standard error.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        hide_short_help = true)]
    pub log_text_split_stream: Option<String>,
    /// See --healthz-bind-address.
    #[arg(long, value_name = "PORT", hide_short_help = true)]
    pub healthz_port: Option<u16>,
    /// See --metrics-bind-address.
    #[arg(long, value_name = "PORT", hide_short_help = true)]
    pub metrics_port: Option<u16>,
    /// Nobody reads it.
    #[arg(long, value_name = "FILE,...", hide_short_help = true)]
    pub boot_id_file: Option<String>,
    /// Nobody reads it.
    #[arg(long, value_name = "FILE,...", hide_short_help = true)]
    pub machine_id_file: Option<String>,
}

impl RunArgs {
    /// How much more the log is to say, as `-v` counts it.
    #[must_use]
    pub fn verbosity(&self) -> u8 {
        match self.leftover.v.unwrap_or(0) {
            0..4 => 0,
            4..6 => 1,
            _ => 2,
        }
    }
}

//! The flags of `run`, as they are typed. What they mean is decided in [`super::Config`].

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use proxy_common::abi::capacity;

use crate::model::SocketLb;

/// Whose sockets are translated at `connect`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SocketLbArg {
    /// Host processes and pods.
    All,
    /// Host processes; pods are left to TC.
    Host,
    /// Nobody: everything is translated packet by packet.
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

/// How the slots of a Service are filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scheduler {
    /// One slot an endpoint, chosen by a hash of the flow.
    Hash,
}

/// Flags of `proxy-agent run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Reach the API server as this kubeconfig says.
    #[arg(long, value_name = "FILE", help_heading = "Where Services come from (none: in-cluster)")]
    pub kubeconfig: Option<PathBuf>,
    /// Reach the API server at this URL.
    #[arg(long, value_name = "URL", help_heading = "Where Services come from (none: in-cluster)")]
    pub apiserver: Option<String>,
    /// Read Services and EndpointSlices from the YAML files of a directory; no API server is needed.
    #[arg(long, value_name = "DIR", help_heading = "Where Services come from (none: in-cluster)")]
    pub manifests: Option<PathBuf>,

    /// Name of this node's Node object [default: the host name].
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    pub hostname_override: Option<String>,
    /// Root of the cgroup v2 hierarchy [default: where it is mounted].
    #[arg(long, value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// Whose sockets are translated at connect.
    #[arg(long, value_enum, default_value_t = SocketLbArg::All)]
    pub socket_lb: SocketLbArg,
    /// Interfaces that carry programs, as glob patterns [default: all but lo].
    #[arg(long, value_name = "GLOB,...", value_delimiter = ',')]
    pub devices: Vec<String>,
    /// Addresses at which NodePorts are accepted: ranges, or `primary` for the node's own [default: primary].
    #[arg(long, value_name = "CIDR,...|primary", value_delimiter = ',')]
    pub nodeport_addresses: Vec<String>,
    /// Range of pod addresses, at most one a family: what comes from elsewhere is masqueraded.
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',')]
    pub cluster_cidr: Vec<String>,
    /// What tells pods from other sources: `ClusterCIDR` for --cluster-cidr, `NodeCIDR` for podCIDRs of this
    /// Node, `BridgeInterface` or `InterfaceNamePrefix` for the interface that they send through [default:
    /// --cluster-cidr, and without it podCIDRs].
    #[arg(long, value_name = "MODE", default_value = "", hide_default_value = true)]
    pub detect_local_mode: String,
    /// The bridge that pods send through, for `BridgeInterface`.
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub pod_bridge_interface: String,
    /// How names of interfaces that pods send through begin, for `InterfaceNamePrefix`.
    #[arg(long, value_name = "PREFIX", default_value = "", hide_default_value = true)]
    pub pod_interface_name_prefix: String,
    /// Drop what goes to an address inside a ServiceCIDR that is no Service's, as kube-proxy's nftables mode does;
    /// false where another proxy serves some of the Services.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true,
        action = clap::ArgAction::Set, value_name = "BOOL")]
    pub drop_unallocated_cluster_ips: bool,
    /// Let host processes reach NodePorts at 127.0.0.1 and ::1, too (with --socket-lb=all or host).
    #[arg(long, visible_alias = "iptables-localhost-nodeports", num_args = 0..=1, require_equals = true,
        default_missing_value = "true", default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub localhost_nodeports: bool,
    /// Masquerade everything that goes to a ClusterIP.
    // Go's flags take `--flag=true`, and manifests are full of it.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
        action = clap::ArgAction::Set, value_name = "BOOL")]
    pub masquerade_all: bool,
    /// Masquerade outside clients towards endpoints of this node too, as kube-proxy does under policy Cluster.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
        action = clap::ArgAction::Set, value_name = "BOOL")]
    pub masquerade_local: bool,
    /// Remove what a kube-proxy has left on this node, once this agent does its work and no kube-proxy runs here.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true,
        action = clap::ArgAction::Set, value_name = "BOOL")]
    pub remove_kube_proxy_rules: bool,
    /// How an endpoint is chosen.
    #[arg(long, value_name = "NAME", value_enum, default_value_t = Scheduler::Hash)]
    pub scheduler: Scheduler,
    /// Where /healthz and /livez answer; empty for nowhere.
    #[arg(long, value_name = "IP[:PORT]", default_value = "0.0.0.0:10256")]
    pub healthz_bind_address: String,
    /// Where /metrics answers.
    #[arg(long, value_name = "IP[:PORT]", default_value = "127.0.0.1:10249")]
    pub metrics_bind_address: String,

    /// How large the tables are made.
    #[command(flatten)]
    pub capacities: Capacities,
}

/// A table that holds nothing helps nobody; indices have 32 bits.
fn entries(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(0) => Err("a table needs room for at least one entry".to_owned()),
        Ok(n) => Ok(n),
        Err(e) => Err(e.to_string()),
    }
}

/// How many entries the tables are made for.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
#[command(next_help_heading = "Sizes of tables, in entries")]
pub struct Capacities {
    /// Addresses x ports of all Services.
    #[arg(long = "max-frontends", value_name = "N", default_value_t = capacity::FRONTENDS as u32, value_parser = entries)]
    pub frontends: u32,
    /// Slots of all Services: about twice the endpoints, counted once per Service port.
    #[arg(long = "max-slots", value_name = "N", default_value_t = capacity::SLOTS as u32, value_parser = entries)]
    pub slots: u32,
    /// Endpoints, counted once per Service port.
    #[arg(long = "max-backends", value_name = "N", default_value_t = capacity::BACKENDS as u32, value_parser = entries)]
    pub backends: u32,
    /// Service ports.
    #[arg(long = "max-services", value_name = "N", default_value_t = capacity::SERVICES as u32, value_parser = entries)]
    pub services: u32,
    /// Source ranges of all Services.
    #[arg(long = "max-sources", value_name = "N", default_value_t = capacity::SOURCES as u32, value_parser = entries)]
    pub sources: u32,
    /// Service and node addresses.
    #[arg(long = "max-addresses", value_name = "N", default_value_t = capacity::ADDRESSES as u32, value_parser = entries)]
    pub addresses: u32,
    /// Entries of established flows: two to four a flow.
    #[arg(long = "max-flows", value_name = "N", default_value_t = capacity::FLOWS as u32, value_parser = entries)]
    pub flows: u32,
    /// Flows that nobody has answered yet.
    #[arg(long = "max-half-open", value_name = "N", default_value_t = capacity::HALF_OPEN as u32, value_parser = entries)]
    pub half_open: u32,
    /// Fragmented packets under way.
    #[arg(long = "max-fragments", value_name = "N", default_value_t = capacity::FRAGMENTS as u32, value_parser = entries)]
    pub fragments: u32,
    /// Clients that Services with session affinity remember.
    #[arg(long = "max-affinity", value_name = "N", default_value_t = capacity::AFFINITY as u32, value_parser = entries)]
    pub affinity: u32,
    /// Interfaces of this node.
    #[arg(long = "max-interfaces", value_name = "N", default_value_t = capacity::IFACES as u32, value_parser = entries)]
    pub ifaces: u32,
}

impl Capacities {
    /// These sizes, for the maps.
    #[must_use]
    pub fn of_maps(&self) -> crate::datapath::load::Capacities {
        let Self {
            frontends,
            slots,
            backends,
            services,
            sources,
            addresses,
            flows,
            half_open,
            fragments,
            affinity,
            ifaces,
        } = *self;
        crate::datapath::load::Capacities {
            frontends,
            slots,
            backends,
            services,
            sources,
            addresses,
            flows,
            half_open,
            fragments,
            affinity,
            ifaces,
        }
    }
}

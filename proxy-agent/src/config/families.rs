//! Address families: which ones this node has, and what was set for the other one (Y-11, F-12, F-13).

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use ipnet::IpNet;

use super::{Config, Host};
use agent_core::model::{DetectLocal, Family, NodePortAddresses, Settings};

/// Whether the kernel has IPv6, and nobody has switched it off. A file that is there and cannot be read says neither: to
/// take what it says for a no would take IPv6 from a node that has it.
pub(super) fn has_ipv6(host: &dyn Host) -> bool {
    let listed = host.read(Path::new("/proc/net/if_inet6"));
    let there = !listed.is_err_and(|error| error.kind() == ErrorKind::NotFound);
    let off = host.read(Path::new("/proc/sys/net/ipv6/conf/all/disable_ipv6"));
    there && !off.is_ok_and(|text| text.trim() == "1")
}

/// What was set for a family that is not the node's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Misfits {
    /// What cannot work.
    pub errors: Vec<String>,
    /// What may not be meant.
    pub warnings: Vec<String>,
}

impl Config {
    /// What does not fit a node with this primary family and these podCIDRs. A list that has the right family among
    /// others is fine.
    #[must_use]
    pub fn misfits(&self, primary: Family, pod_cidrs: &[IpNet]) -> Misfits {
        let mut found = Misfits::default();
        let settings = &self.settings;
        let alien = |ranges: &[IpNet]| {
            !ranges.is_empty() && ranges.iter().all(|range| Family::of(&range.addr()) != primary)
        };
        let name = primary.name();
        if primary == Family::V6 && !settings.ipv6 {
            found.errors.push(
                "the node's first address is an IPv6 address, but IPv6 is switched off (net.ipv6.conf.all.disable_ipv6)"
                    .to_owned(),
            );
        }
        if alien(&settings.cluster_cidrs) {
            let line =
                format!("the cluster CIDR has no {name} range, and the node's first address is {name}");
            let decides = matches!(settings.detect_local, DetectLocal::AnyRange | DetectLocal::ClusterCidr);
            if decides && !settings.ipv6 { found.errors.push(line) } else { found.warnings.push(line) }
        }
        if alien(pod_cidrs) {
            found
                .warnings
                .push(format!("the Node's podCIDRs have no {name} range, and its first address is {name}"));
        }
        if !settings.ipv6 {
            self.alien_listeners(primary, &mut found.warnings);
        }
        found.warnings.extend(node_port_ranges(settings, primary, pod_cidrs));
        found
    }

    fn alien_listeners(&self, primary: Family, warnings: &mut Vec<String>) {
        let alien = |address: &SocketAddr| {
            let ip: IpAddr = address.ip();
            !ip.is_unspecified() && Family::of(&ip) != primary
        };
        for (what, address) in [("health", self.healthz), ("metrics", Some(self.metrics))] {
            if let Some(address) = address.filter(alien) {
                warnings.push(format!("{what} is served at {address}, and the node has no such family"));
            }
        }
    }
}

/// Ranges for NodePorts that leave a family out: NodePorts of that family are accepted at all its addresses (V-33).
fn node_port_ranges(settings: &Settings, primary: Family, pod_cidrs: &[IpNet]) -> Option<String> {
    let NodePortAddresses::Ranges(ranges) = &settings.nodeport_addresses else { return None };
    let has = |ranges: &[IpNet], family| ranges.iter().any(|range| Family::of(&range.addr()) == family);
    let both = |ranges: &[IpNet]| has(ranges, Family::V4) && has(ranges, Family::V6);
    let missing = [Family::V4, Family::V6].into_iter().find(|family| !has(ranges, *family))?;
    let dual_stack = both(&settings.cluster_cidrs) || both(pod_cidrs);
    let matters = missing == primary || dual_stack && (settings.ipv6 || missing == Family::V4);
    let name = missing.name();
    matters.then(|| {
        format!("the NodePort addresses have no {name} range: NodePorts are accepted at every {name} address")
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::FakeHost;
    use super::*;

    #[test]
    fn what_cannot_be_read_takes_ipv6_from_nobody() {
        assert!(has_ipv6(&FakeHost::named("n1")));
        assert!(!has_ipv6(&FakeHost::without_ipv6()));
        let broken = |path: &str| {
            let mut host = FakeHost::named("n1");
            host.broken = Some(path.into());
            host
        };
        assert!(has_ipv6(&broken("/proc/net/if_inet6")));
        assert!(has_ipv6(&broken("/proc/sys/net/ipv6/conf/all/disable_ipv6")));
        let off = FakeHost::named("n1").with_file("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1\n");
        assert!(!has_ipv6(&off));
    }
}

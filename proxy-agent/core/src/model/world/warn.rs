//! What is wrong with what was reported, in words for the operator.

use ipnet::IpNet;
use proxy_common::abi::FrontendKey;

use super::World;
use crate::model::local::UsedBy;
use crate::model::warnings::Warning;
use crate::model::{DetectLocal, ObjectName};

/// How many warnings about destinations that several Services ask for there are at most.
const MAX_CONFLICTS: usize = 1_000;

impl World {
    /// What is wrong with the input, destinations that another Service owns included; by object.
    #[must_use]
    pub fn warnings(&self) -> Vec<Warning> {
        let conflicts = self.owners.conflicts().take(MAX_CONFLICTS).map(|(key, loser, owner)| Warning {
            object: format!("Service {}", loser.service),
            line: format!(
                "{} is held by Service {}, which comes first (ClusterIPs, then age, then name)",
                destination(key),
                owner.service
            ),
        });
        let mut all: Vec<Warning> = self.warnings.iter().chain(conflicts).collect();
        all.extend(self.no_pod_cidrs());
        all.extend(self.covering_ranges());
        all.extend(self.here.nodes.without().map(|(node, first)| Warning {
            object: format!("Node {node}"),
            line: format!(
                "has the same number as Node {first}: what goes to its endpoints is masqueraded, and not answered by it \
                 (direct server return); give one of them another name"
            ),
        }));
        let not_served = |(name, all): (&ObjectName, &Vec<(FrontendKey, UsedBy)>)| {
            let lines = all.iter().filter_map(|(key, by)| why_not_served(key, by));
            lines.map(|line| Warning { object: format!("Service {name}"), line }).collect::<Vec<_>>()
        };
        all.extend(self.in_use.iter().flat_map(not_served));
        all.sort();
        all.dedup();
        all
    }

    /// What should be known and is as it should be; by object.
    #[must_use]
    pub fn notes(&self) -> Vec<Warning> {
        let mut all = Vec::new();
        for (name, used) in &self.in_use {
            for (key, by) in used {
                if let UsedBy::LocalService(device) = by {
                    all.push(Warning {
                        object: format!("Service {name}"),
                        line: format!(
                            "{} is served on this node by what has bound it on {device} (such as NodeLocal DNSCache), \
                             and by the Service again when that goes",
                            destination(key)
                        ),
                    });
                }
            }
        }
        all
    }

    /// Ranges of ClusterIPs with something else in them.
    fn covering_ranges(&self) -> Vec<Warning> {
        let ranges =
            self.service_ranges.iter().flat_map(|(name, ranges)| ranges.iter().map(move |r| (name, r)));
        let drops = self.settings.drop_unallocated;
        let warning = |(name, range): (&String, &IpNet)| {
            let inside = self.lies_inside(range)?;
            let line = format!(
                "{range} covers {inside}: packets to addresses of no Service in it are not dropped; give Services \
                 a range of their own"
            );
            Some(Warning { object: format!("ServiceCIDR {name}"), line })
        };
        ranges.filter(|_| drops).filter_map(warning).collect()
    }

    /// A Node whose podCIDRs were asked for and are not there: kube-proxy would not start (Y-9).
    fn no_pod_cidrs(&self) -> Option<Warning> {
        let wanted = self.settings.detect_local == DetectLocal::NodeCidr;
        (wanted && self.synced() && self.last_node.pod_cidrs.is_empty()).then(|| Warning {
            object: format!("Node {}", self.settings.node_name),
            line: "has no podCIDRs: until it has, no source counts as a pod (--detect-local-mode NodeCIDR)"
                .to_owned(),
        })
    }
}

/// Why a Service does not get a destination; nothing where it is meant to be so.
fn why_not_served(key: &FrontendKey, by: &UsedBy) -> Option<String> {
    let why = match by {
        UsedBy::LocalService(_) => return None,
        UsedBy::Interface(name) => format!("the address is the node's, on {name}"),
        UsedBy::Node => "the address is the node's, by its Node object".to_owned(),
        UsedBy::Pod => "the address is that of a pod".to_owned(),
        UsedBy::PodRange(range) => format!("the address lies in the node's pod range {range}"),
        UsedBy::Agent => "the agent itself uses it".to_owned(),
    };
    let remedy = if *by == UsedBy::Agent { "port" } else { "address" };
    Some(format!("{} is not served, because {why}; give the Service another {remedy}", destination(key)))
}

/// A destination for a person.
fn destination(key: &FrontendKey) -> String {
    if key.addr.is_unspecified() {
        format!("NodePort {}/{}", key.port, key.proto)
    } else if key.addr.is_v4() {
        format!("{}:{}/{}", key.addr, key.port, key.proto)
    } else {
        format!("[{}]:{}/{}", key.addr, key.port, key.proto)
    }
}

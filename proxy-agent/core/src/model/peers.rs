//! The agents of other nodes, as the endpoints of their Service say: at which addresses and port they answer probes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use proxy_common::addr::Proto;

use super::{Endpoint, Family, Slice, SlicePort};

/// The name of the port, in the Service of the agents.
pub const PORT_NAME: &str = "dsr";

/// Agents by the names of their nodes.
pub type Peers = BTreeMap<Arc<str>, Peer>;

/// Where a node's agent answers probes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Over IPv4.
    pub v4: Option<SocketAddr>,
    /// Over IPv6.
    pub v6: Option<SocketAddr>,
    /// Whether one of its endpoints is ready. Nothing hangs on that: the agent itself is asked.
    pub ready: bool,
}

impl Peer {
    /// Where it answers over a family.
    #[must_use]
    pub fn at(&self, family: Family) -> Option<SocketAddr> {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

/// The agents that `slices` of their Service name. A node that has two of a family, as while one replaces the other, is known by
/// the better one.
pub(super) fn peers<'a>(slices: impl Iterator<Item = &'a Slice>) -> Peers {
    let mut best: BTreeMap<(Arc<str>, Family), (&Endpoint, u16)> = BTreeMap::new();
    for slice in slices {
        let named = |port: &&SlicePort| &*port.name == PORT_NAME && port.proto == Proto::UDP;
        let Some(port) = slice.ports.iter().find(named) else { continue };
        for endpoint in &slice.endpoints {
            let Some(node) = &endpoint.node else { continue };
            let place = best.entry((node.clone(), slice.family)).or_insert((endpoint, port.port));
            if worth(endpoint) > worth(place.0) {
                *place = (endpoint, port.port);
            }
        }
    }
    let mut peers = Peers::new();
    for ((node, family), (endpoint, port)) in best {
        let peer = peers.entry(node).or_default();
        peer.ready |= endpoint.ready;
        let at = Some(SocketAddr::new(endpoint.ip, port));
        match family {
            Family::V4 => peer.v4 = at,
            Family::V6 => peer.v6 = at,
        }
    }
    peers
}

/// What makes one endpoint of a node better than another; of equal ones the lower address counts, whatever slice has it.
fn worth(endpoint: &Endpoint) -> impl Ord {
    (!endpoint.terminating, endpoint.ready, std::cmp::Reverse(endpoint.ip))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Change, ObjectName, Settings, World};

    fn endpoint(node: &str, ip: &str) -> Endpoint {
        Endpoint {
            ip: ip.parse().unwrap(),
            ready: true,
            serving: true,
            terminating: false,
            node: (!node.is_empty()).then(|| node.into()),
            hints: None,
        }
    }

    fn slice(port: &str, proto: Proto, endpoints: Vec<Endpoint>) -> Slice {
        Slice {
            service: ObjectName::new("kube-system", "ebpf-proxy"),
            family: Family::of(&endpoints[0].ip),
            ports: vec![
                SlicePort { name: "healthz".into(), proto: Proto::TCP, port: 10256 },
                SlicePort { name: port.into(), proto, port: 10261 },
            ],
            endpoints,
        }
    }

    fn known(slices: &[Slice]) -> Vec<(String, Option<String>, Option<String>, bool)> {
        let text = |at: Option<SocketAddr>| at.map(|at| at.to_string());
        let all = peers(slices.iter()).into_iter();
        all.map(|(node, peer)| {
            (node.to_string(), text(peer.at(Family::V4)), text(peer.at(Family::V6)), peer.ready)
        })
        .collect()
    }

    #[test]
    fn a_node_is_known_by_its_addresses_of_both_families() {
        let slices = [
            slice("dsr", Proto::UDP, vec![endpoint("b", "10.0.0.2"), endpoint("a", "10.0.0.1")]),
            slice("dsr", Proto::UDP, vec![endpoint("a", "fd00::1"), endpoint("", "fd00::9")]),
        ];
        assert_eq!(
            known(&slices),
            [
                ("a".into(), Some("10.0.0.1:10261".into()), Some("[fd00::1]:10261".into()), true),
                ("b".into(), Some("10.0.0.2:10261".into()), None, true),
            ]
        );
    }

    #[test]
    fn the_world_knows_the_agents_as_their_slices_come_change_hands_and_go() {
        let mut world = World::new(Settings::of_node("n1"));
        let mut say = |name: &str, service: Option<&str>| {
            let slice = service.map(|service| Slice {
                service: ObjectName::new("kube-system", service),
                ..slice("dsr", Proto::UDP, vec![endpoint(name, "10.0.0.1")])
            });
            world.apply(Change::Slice(ObjectName::new("kube-system", name), slice));
            world.peers().keys().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(say("a", Some("ebpf-proxy")), ["a"]);
        assert_eq!(say("b", Some("ebpf-proxy")), ["a", "b"]);
        assert_eq!(say("c", Some("kube-dns")), ["a", "b"], "another Service");
        assert_eq!(say("a", Some("kube-dns")), ["b"]);
        assert_eq!(say("b", None), [""; 0]);
    }

    #[test]
    fn ports_of_another_name_or_protocol_are_not_meant() {
        assert!(known(&[slice("dns", Proto::UDP, vec![endpoint("a", "10.0.0.1")])]).is_empty());
        assert!(known(&[slice("dsr", Proto::TCP, vec![endpoint("a", "10.0.0.1")])]).is_empty());
    }

    #[test]
    fn while_one_agent_replaces_another_the_better_one_counts_in_any_order() {
        let leaving = Endpoint { terminating: true, ..endpoint("a", "10.0.0.1") };
        let coming = Endpoint { ready: false, serving: false, ..endpoint("a", "10.0.0.3") };
        let there = endpoint("a", "10.0.0.2");
        let at = |endpoints: Vec<Endpoint>| known(&[slice("dsr", Proto::UDP, endpoints)])[0].clone();
        let is = |ip: &str, ready| ("a".to_owned(), Some(format!("{ip}:10261")), None, ready);
        assert_eq!(at(vec![leaving.clone(), coming.clone()]), is("10.0.0.3", false));
        for all in [[&coming, &leaving, &there], [&there, &coming, &leaving], [&leaving, &there, &coming]] {
            assert_eq!(at(all.map(Clone::clone).into()), is("10.0.0.2", true));
        }
        let twin = endpoint("a", "10.0.0.9");
        assert_eq!(at(vec![twin.clone(), there.clone()]), at(vec![there, twin]));
    }
}

//! The outside reaches Services by NodePort and external IP.

use std::net::SocketAddr;

use proxy_common::abi::frontend::{INTERNAL, LOCAL, NODE_PORT};
use proxy_common::abi::{address, config};
use proxy_common::addr::Proto;
use proxy_tests::packet::TcpFlags;

use crate::node::{ACK, Cast, FAMILIES, NEW, Node, SYN, SYN_ACK, V4, addr, at, packet};
use crate::stage::{Stage, story};

/// A node with one port to masquerade with: 2000.
pub(crate) fn one_port() -> Node {
    let mut node = Node::new();
    node.ports(2000, 1);
    node
}

/// NodePort 30200 with one endpoint.
pub(crate) fn node_port(cast: Cast, proto: Proto, endpoint: &str) -> Node {
    one_port().with((cast.any, 30_200), proto, NODE_PORT, &[(endpoint, 8080)])
}

/// The ends of a masqueraded flow.
pub(crate) struct Masqueraded {
    pub(crate) proto: Proto,
    pub(crate) client: SocketAddr,
    pub(crate) service: SocketAddr,
    pub(crate) endpoint: SocketAddr,
    pub(crate) node: SocketAddr,
}

impl Masqueraded {
    /// From outside to the NodePort, which leads to another node by the one port there is.
    pub(crate) fn node_port(cast: Cast, proto: Proto) -> Self {
        let (client, service) = (at(cast.client, 5555), at(cast.node, 30_200));
        Self { proto, client, service, endpoint: at(cast.remote, 8080), node: at(cast.node, 2000) }
    }

    /// A packet of the client's: translated where it comes in, masqueraded where it leaves.
    #[track_caller]
    pub(crate) fn goes(&self, stage: &mut Stage, flags: TcpFlags) {
        let inside = packet(self.proto, self.client, self.endpoint, flags);
        stage.ingress(&packet(self.proto, self.client, self.service, flags)).becomes(&inside);
        stage.egress(&inside).becomes(&packet(self.proto, self.node, self.endpoint, flags));
    }

    /// The endpoint's answer, the other way round.
    #[track_caller]
    pub(crate) fn comes_back(&self, stage: &mut Stage, flags: TcpFlags) {
        let inside = packet(self.proto, self.endpoint, self.client, flags);
        stage.ingress(&packet(self.proto, self.endpoint, self.node, flags)).becomes(&inside);
        stage.egress(&inside).becomes(&packet(self.proto, self.service, self.client, flags));
    }
}

#[test]
fn a_client_reaches_a_node_port_under_three_pairs_of_ends() {
    for cast in FAMILIES {
        for proto in [Proto::TCP, Proto::UDP] {
            let flow = Masqueraded::node_port(cast, proto);
            story(
                || node_port(cast, proto, cast.remote),
                |stage| {
                    flow.goes(stage, SYN);
                    stage.counted(NEW);
                    flow.comes_back(stage, SYN_ACK);
                    assert_eq!((stage.flows(), stage.legs()), ((1, 0), 3));
                    flow.goes(stage, ACK);
                    stage.counted(&[]);
                },
            );
        }
    }
}

#[test]
fn a_local_endpoint_sees_the_client_s_own_address() {
    for cast in FAMILIES {
        let (client, node, endpoint) = (at(cast.client, 5555), at(cast.node, 30_200), at(cast.pod, 8080));
        let near = format!("+{}", cast.pod);
        story(
            || node_port(cast, Proto::TCP, &near),
            |stage| {
                let entered = packet(Proto::TCP, client, endpoint, SYN);
                stage.ingress(&packet(Proto::TCP, client, node, SYN)).becomes(&entered);
                stage.egress(&entered).passes();
                stage.egress(&packet(Proto::TCP, endpoint, client, SYN_ACK)).becomes(&packet(
                    Proto::TCP,
                    node,
                    client,
                    SYN_ACK,
                ));
                stage.counted(NEW);
            },
        );
        // M-8: kube-proxy's way.
        story(
            || node_port(cast, Proto::TCP, &near).config(|config| config.flags |= config::MASQUERADE_LOCAL),
            |stage| {
                let entered = packet(Proto::TCP, client, endpoint, SYN);
                stage.ingress(&packet(Proto::TCP, client, node, SYN)).becomes(&entered);
                stage.egress(&entered).becomes(&packet(Proto::TCP, at(cast.node, 2000), endpoint, SYN));
                stage.counted(NEW);
            },
        );
    }
}

#[test]
fn a_node_port_stands_only_at_the_addresses_that_accept_it() {
    // V-33.
    let knock = packet(Proto::TCP, at(V4.client, 5555), at(V4.node, 30_200), SYN);
    story(
        || {
            let mut node = node_port(V4, Proto::TCP, V4.remote);
            node.tables.addresses.insert(addr(V4.node), address::NODE);
            node
        },
        |stage| stage.ingress(&knock).passes(),
    );
    let elsewhere = packet(Proto::TCP, at(V4.client, 5555), at(V4.other, 30_200), SYN);
    story(|| node_port(V4, Proto::TCP, V4.remote), |stage| stage.ingress(&elsewhere).passes());
}

#[test]
fn a_service_at_a_node_s_own_address_goes_before_the_node_port() {
    // V-2: an external IP may be an address of the node.
    story(
        || node_port(V4, Proto::TCP, V4.remote).with((V4.node, 30_200), Proto::TCP, 0, &[(V4.other, 80)]),
        |stage| {
            let client = at(V4.client, 5555);
            stage.ingress(&packet(Proto::TCP, client, at(V4.node, 30_200), SYN)).becomes(&packet(
                Proto::TCP,
                client,
                at(V4.other, 80),
                SYN,
            ));
            stage.counted(NEW);
        },
    );
}

#[test]
fn a_node_port_and_a_cluster_ip_share_an_endpoint_and_no_flow() {
    for cast in FAMILIES {
        story(
            || {
                node_port(cast, Proto::TCP, cast.remote).with(
                    (cast.vip, 80),
                    Proto::TCP,
                    INTERNAL,
                    &[(cast.remote, 8080)],
                )
            },
            |stage| {
                let (pod, client, endpoint) =
                    (at(cast.pod, 5555), at(cast.client, 5555), at(cast.remote, 8080));
                stage.ingress(&packet(Proto::TCP, pod, at(cast.vip, 80), SYN)).becomes(&packet(
                    Proto::TCP,
                    pod,
                    endpoint,
                    SYN,
                ));
                stage.ingress(&packet(Proto::TCP, client, at(cast.node, 30_200), SYN)).becomes(&packet(
                    Proto::TCP,
                    client,
                    endpoint,
                    SYN,
                ));
                stage.counted(&[(proxy_common::abi::Reason::NewFlow, 2)]);
                stage.egress(&packet(Proto::TCP, endpoint, client, SYN_ACK)).becomes(&packet(
                    Proto::TCP,
                    at(cast.node, 30_200),
                    client,
                    SYN_ACK,
                ));
                stage.egress(&packet(Proto::TCP, endpoint, pod, SYN_ACK)).becomes(&packet(
                    Proto::TCP,
                    at(cast.vip, 80),
                    pod,
                    SYN_ACK,
                ));
            },
        );
    }
}

#[test]
fn a_node_port_under_policy_local_serves_from_this_node_with_the_client_s_address() {
    // P-9, M-9: a local endpoint, although a remote one is there as well.
    for cast in FAMILIES {
        let near = format!("+{}", cast.pod);
        let ends = [(cast.remote, 8080), (near.as_str(), 8080), (cast.other, 8080)];
        story(
            || one_port().with((cast.any, 30_200), Proto::TCP, NODE_PORT | LOCAL, &ends),
            |stage| {
                for port in 5000..5010 {
                    let entered = packet(Proto::TCP, at(cast.client, port), at(cast.pod, 8080), SYN);
                    stage
                        .ingress(&packet(Proto::TCP, at(cast.client, port), at(cast.node, 30_200), SYN))
                        .becomes(&entered);
                    stage.egress(&entered).passes();
                }
                stage.counted(&[(proxy_common::abi::Reason::NewFlow, 10)]);
            },
        );
    }
}

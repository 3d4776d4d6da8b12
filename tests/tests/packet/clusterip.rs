//! Pods reach Services by their ClusterIP.

use proxy_common::abi::frontend::INTERNAL;
use proxy_common::addr::Proto;
use proxy_common::lb::FlowTable;

use crate::node::{ACK, FAMILIES, NEW, Node, SYN, SYN_ACK, at, packet};
use crate::stage::story;

#[test]
fn a_pod_reaches_a_cluster_ip_and_sees_it_answer() {
    for cast in FAMILIES {
        for proto in [Proto::TCP, Proto::UDP] {
            let (pod, vip) = (at(cast.pod, 40_000), at(cast.vip, 80));
            let endpoint = at(cast.remote, 8080);
            story(
                || Node::new().with((cast.vip, 80), proto, INTERNAL, &[(cast.remote, 8080)]),
                |stage| {
                    let entered = packet(proto, pod, endpoint, SYN);
                    stage.ingress(&packet(proto, pod, vip, SYN)).becomes(&entered);
                    // A pod keeps its address (M-6, M-17): nothing more happens on the way out.
                    stage.egress(&entered).passes();
                    stage.counted(NEW);
                    assert_eq!((stage.legs(FlowTable::HalfOpen), stage.legs(FlowTable::Established)), (2, 0));
                    let answer = packet(proto, endpoint, pod, SYN_ACK);
                    stage.ingress(&answer).passes();
                    stage.egress(&answer).becomes(&packet(proto, vip, pod, SYN_ACK));
                    assert_eq!((stage.legs(FlowTable::HalfOpen), stage.legs(FlowTable::Established)), (0, 2));
                    stage.ingress(&packet(proto, pod, vip, ACK)).becomes(&packet(proto, pod, endpoint, ACK));
                    stage.counted(&[]);
                },
            );
        }
    }
}

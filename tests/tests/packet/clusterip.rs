//! Pods reach Services by their ClusterIP.

use std::net::SocketAddr;

use proxy_common::abi::frontend::INTERNAL;
use proxy_common::addr::Proto;
use proxy_tests::packet::{Packet, Transport};

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
                    assert_eq!((stage.flows(), stage.legs()), ((1, 0), 2));
                    let answer = packet(proto, endpoint, pod, SYN_ACK);
                    stage.ingress(&answer).passes();
                    stage.egress(&answer).becomes(&packet(proto, vip, pod, SYN_ACK));
                    assert_eq!(stage.flows(), (1, 0));
                    stage.ingress(&packet(proto, pod, vip, ACK)).becomes(&packet(proto, pod, endpoint, ACK));
                    stage.counted(&[]);
                    // The client has acknowledged what the endpoint said: this is a connection. UDP takes its time.
                    assert_eq!(stage.flows(), if proto == Proto::TCP { (0, 1) } else { (1, 0) });
                },
            );
        }
    }
}

/// Sequence and acknowledgement numbers, TTL, traffic class.
const ODD: [(u32, u32, u8, u8); 4] =
    [(0xffff_fff0, 7, 64, 0), (1, 0xdead_beef, 64, 0), (2_000, 1_000, 2, 0xb8 | 3), (2_000, 1_000, 255, 1)];

/// D-9: the window is the ends' business. D-15: hops are the stack's to count; classes and marks of congestion are the
/// sender's. All of it goes both ways as it came.
#[test]
fn whatever_a_packet_of_a_flow_says_beside_its_addresses_stays() {
    for cast in FAMILIES {
        let (pod, vip, endpoint) = (at(cast.pod, 40_000), at(cast.vip, 80), at(cast.remote, 8080));
        story(
            || Node::new().with((cast.vip, 80), Proto::TCP, INTERNAL, &[(cast.remote, 8080)]),
            |stage| {
                stage.ingress(&packet(Proto::TCP, pod, vip, SYN)).becomes(&packet(
                    Proto::TCP,
                    pod,
                    endpoint,
                    SYN,
                ));
                let answer = packet(Proto::TCP, endpoint, pod, SYN_ACK);
                stage.egress(&answer).becomes(&packet(Proto::TCP, vip, pod, SYN_ACK));
                stage.counted(NEW);
                for odd in ODD {
                    stage.ingress(&segment(pod, vip, odd)).becomes(&segment(pod, endpoint, odd));
                    stage.egress(&segment(endpoint, pod, odd)).becomes(&segment(vip, pod, odd));
                }
                stage.counted(&[]);
            },
        );
    }
}

fn segment(from: SocketAddr, to: SocketAddr, odd: (u32, u32, u8, u8)) -> Packet {
    let (sequence, acknowledged, ttl, class) = odd;
    let transport = Transport::Tcp {
        source: from.port(),
        destination: to.port(),
        sequence,
        acknowledged,
        flags: ACK,
        options: Vec::new(),
    };
    Packet::new(from.ip(), to.ip(), transport).ttl(ttl).traffic_class(class).payload(b"odd")
}

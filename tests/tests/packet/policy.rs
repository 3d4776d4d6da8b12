//! Who may use which endpoint, and whose address the endpoint sees.

use std::collections::BTreeSet;

use proxy_common::abi::frontend::{AFFINITY, INTERNAL, LOCAL, SOURCE_RANGES};
use proxy_common::abi::{Range, Reason, config, iface};
use proxy_common::addr::Proto;

use crate::node::{ACK, Cast, FAMILIES, NEW, Node, SYN, SYN_ACK, V4, V6, addr, at, ip, packet};
use crate::nodeport::{Masqueraded, one_port};
use crate::real::IFACE;
use crate::stage::{Stage, story};
use proxy_tests::packet::Packet;

/// A SYN from `client` to port 80 of `vip` goes to port 8080 of `endpoint`, and leaves with this source.
#[track_caller]
fn goes(stage: &mut Stage, client: &str, vip: &str, endpoint: &str, source: (&str, u16)) {
    let (from, to) = (at(client, 5555), at(endpoint, 8080));
    let entered = packet(Proto::TCP, from, to, SYN);
    stage.ingress(&packet(Proto::TCP, from, at(vip, 80), SYN)).becomes(&entered);
    let source = at(source.0, source.1);
    if source == from {
        stage.egress(&entered).passes();
    } else {
        stage.egress(&entered).becomes(&packet(Proto::TCP, source, to, SYN));
    }
    stage.counted(NEW);
}

fn cluster_ip(cast: Cast, flags: u32, endpoint: &str) -> Node {
    one_port().with((cast.vip, 80), Proto::TCP, INTERNAL | flags, &[(endpoint, 8080)])
}

#[test]
fn masquerade_all_hides_every_client_of_a_cluster_ip() {
    // M-6.
    for cast in FAMILIES {
        let near = format!("+{}", cast.pod);
        for (client, endpoint) in [(cast.pod, cast.remote), (cast.other, near.as_str())] {
            story(
                || cluster_ip(cast, 0, endpoint).config(|config| config.flags |= config::MASQUERADE_ALL),
                |stage| goes(stage, client, cast.vip, endpoint.trim_start_matches('+'), (cast.node, 2000)),
            );
        }
    }
}

#[test]
fn a_client_outside_the_pod_range_is_masqueraded_towards_a_cluster_ip() {
    // M-6, and M-7: without a pod range nobody is.
    for cast in FAMILIES {
        story(
            || cluster_ip(cast, 0, cast.remote),
            |stage| goes(stage, cast.client, cast.vip, cast.remote, (cast.node, 2000)),
        );
        story(
            || cluster_ip(cast, 0, cast.remote).config(|config| config.flags = 0),
            |stage| goes(stage, cast.client, cast.vip, cast.remote, (cast.client, 5555)),
        );
    }
}

#[test]
fn only_the_range_of_the_packet_s_family_counts() {
    story(
        || cluster_ip(V6, 0, V6.remote).config(|config| config.flags = config::POD_RANGE_V4),
        |stage| goes(stage, V6.client, V6.vip, V6.remote, (V6.client, 5555)),
    );
    story(
        || cluster_ip(V4, 0, V4.remote).config(|config| config.flags = config::POD_RANGE_V6),
        |stage| goes(stage, V4.client, V4.vip, V4.remote, (V4.client, 5555)),
    );
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    // M-10: hairpin. The answer must pass here again, so the pod must see another address than its own.
    for cast in FAMILIES {
        let near = format!("+{}", cast.pod);
        for flags in [0, LOCAL] {
            story(
                || cluster_ip(cast, flags, &near),
                |stage| {
                    goes(stage, cast.pod, cast.vip, cast.pod, (cast.node, 2000));
                    let (client, endpoint) = (at(cast.pod, 5555), at(cast.pod, 8080));
                    let (service, node) = (at(cast.vip, 80), at(cast.node, 2000));
                    let flow = Masqueraded { proto: Proto::TCP, client, service, endpoint, node };
                    flow.comes_back(stage, SYN_ACK);
                },
            );
        }
    }
}

#[test]
fn a_pod_reaches_itself_from_the_very_port_that_it_serves() {
    // Both directions would be one tuple behind the Service: the client's port must give way.
    for cast in FAMILIES {
        let near = format!("+{}", cast.pod);
        for proto in [Proto::TCP, Proto::UDP] {
            let (pod, vip) = (at(cast.pod, 8080), at(cast.vip, 80));
            let (moved, node) = (at(cast.pod, 2000), at(cast.node, 2000));
            story(
                || one_port().with((cast.vip, 80), proto, INTERNAL, &[(&near, 8080)]),
                |stage| {
                    stage.ingress(&packet(proto, pod, vip, SYN)).becomes(&packet(proto, moved, pod, SYN));
                    stage.egress(&packet(proto, moved, pod, SYN)).becomes(&packet(proto, node, pod, SYN));
                    stage.counted(&[(Reason::NewFlow, 1), (Reason::FlowCollision, 1)]);
                    stage
                        .ingress(&packet(proto, pod, node, SYN_ACK))
                        .becomes(&packet(proto, pod, moved, SYN_ACK));
                    stage
                        .egress(&packet(proto, pod, moved, SYN_ACK))
                        .becomes(&packet(proto, vip, pod, SYN_ACK));
                },
            );
        }
    }
}

#[test]
fn pods_are_told_by_their_interface_where_that_is_how_they_are_told() {
    // M-1, M-2: the address does not count then, whether it would have said yes or no.
    for cast in FAMILIES {
        let by_interface = |pods: bool| {
            let mut node = cluster_ip(cast, 0, cast.remote)
                .with((cast.external, 80), Proto::TCP, LOCAL, &[(cast.remote, 8080)])
                .config(|config| config.flags |= config::POD_INTERFACES);
            if pods {
                node.tables.ifaces.get_mut(&IFACE).unwrap().flags |= iface::POD;
            }
            node
        };
        story(
            || by_interface(true),
            |stage| {
                goes(stage, cast.client, cast.vip, cast.remote, (cast.client, 5555));
                goes(stage, cast.router, cast.external, cast.remote, (cast.router, 5555)); // V-24
            },
        );
        story(
            || by_interface(false),
            |stage| {
                goes(stage, cast.pod, cast.vip, cast.remote, (cast.node, 2000));
                // V-30: a pod of another node is a stranger here.
                let stranger = packet(Proto::TCP, at(cast.pod, 5555), at(cast.external, 80), SYN);
                stage.ingress(&stranger).dropped();
                stage.counted(&[(Reason::NoLocalEndpoint, 1)]);
            },
        );
    }
}

#[test]
fn an_address_of_a_service_range_that_is_no_service_s_leads_nowhere() {
    // P-22, T-57: whatever the protocol; other addresses go their way (D-19).
    for cast in FAMILIES {
        let (none, beside) = match cast.vip {
            "10.96.0.1" => ("10.96.3.7", "10.97.0.1"),
            _ => ("fd00:96::3:7", "fd00:97::1"),
        };
        story(
            || {
                cluster_ip(cast, 0, cast.remote).config(|config| {
                    config.service_range_count = 2;
                    config.service_ranges[0] = Range {
                        first: addr("10.96.0.0"),
                        mask: addr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:0"),
                    };
                    config.service_ranges[1] =
                        Range { first: addr("fd00:96::"), mask: addr("ffff:ffff:ffff:ffff::") };
                })
            },
            |stage| {
                goes(stage, cast.pod, cast.vip, cast.remote, (cast.pod, 5555));
                for proto in [Proto::TCP, Proto::UDP, Proto::SCTP] {
                    stage.ingress(&packet(proto, at(cast.pod, 5555), at(none, 80), SYN)).dropped();
                    stage.ingress(&packet(proto, at(cast.pod, 5555), at(beside, 80), SYN)).passes();
                    stage.egress(&packet(proto, at(cast.pod, 5555), at(none, 80), SYN)).passes();
                }
                let request = if cast.pod.contains(':') { 128 } else { 8 };
                stage.ingress(&Packet::icmp(ip(cast.pod), ip(none), request, 0, [0; 4])).dropped();
                stage.counted(&[(Reason::UnallocatedClusterIp, 4)]);
                // A flow that is under way outlives its Service (P-18), since only new ones come here.
                let (pod, endpoint) = (at(cast.pod, 5555), at(cast.remote, 8080));
                stage.ingress(&packet(Proto::TCP, endpoint, pod, SYN_ACK)).passes();
                stage.egress(&packet(Proto::TCP, endpoint, pod, SYN_ACK)).becomes(&packet(
                    Proto::TCP,
                    at(cast.vip, 80),
                    pod,
                    SYN_ACK,
                ));
                stage.change(|node| {
                    node.tables.frontends.clear();
                    node.tables.addresses.remove(&addr(cast.vip));
                });
                stage.ingress(&packet(Proto::TCP, pod, at(cast.vip, 80), ACK)).becomes(&packet(
                    Proto::TCP,
                    pod,
                    endpoint,
                    ACK,
                ));
            },
        );
    }
}

#[test]
fn an_external_ip_masquerades_pods_and_strangers_alike() {
    // M-12: policy Cluster.
    for cast in FAMILIES {
        for client in [cast.pod, cast.client] {
            story(
                || one_port().with((cast.external, 80), Proto::TCP, 0, &[(cast.remote, 8080)]),
                |stage| goes(stage, client, cast.external, cast.remote, (cast.node, 2000)),
            );
        }
    }
}

#[test]
fn policy_local_binds_strangers_to_this_node_and_lets_pods_take_the_short_cut() {
    for cast in FAMILIES {
        let near = format!("+{}", cast.pod);
        // P-15, P-16: endpoints elsewhere do not count.
        story(
            || one_port().with((cast.external, 80), Proto::TCP, LOCAL, &[(cast.remote, 8080)]),
            |stage| {
                let stranger = packet(Proto::TCP, at(cast.client, 5555), at(cast.external, 80), SYN);
                stage.ingress(&stranger).dropped();
                stage.counted(&[(Reason::NoLocalEndpoint, 1)]);
                // V-24.
                goes(stage, cast.other, cast.external, cast.remote, (cast.other, 5555));
            },
        );
        story(
            || one_port().with((cast.external, 80), Proto::TCP, LOCAL, &[(&near, 8080)]),
            |stage| goes(stage, cast.client, cast.external, cast.pod, (cast.client, 5555)),
        );
        // Internal policy: pods are bound as well.
        story(
            || cluster_ip(cast, LOCAL, cast.remote),
            |stage| {
                stage.ingress(&packet(Proto::TCP, at(cast.pod, 5555), at(cast.vip, 80), SYN)).dropped();
                stage.counted(&[(Reason::NoLocalEndpoint, 1)]);
            },
        );
    }
}

#[test]
fn source_ranges_let_in_who_is_listed_and_drop_the_rest() {
    // V-17.
    for (cast, range, bits) in [(V4, "198.51.100.0", 24), (V6, "2001:db8:9::", 48), (V4, "0.0.0.0", 0)] {
        story(
            || {
                one_port()
                    .with((cast.external, 80), Proto::TCP, SOURCE_RANGES, &[(cast.remote, 8080)])
                    .allow(1, range, bits)
            },
            |stage| {
                goes(stage, cast.client, cast.external, cast.remote, (cast.node, 2000));
                let stranger = packet(Proto::TCP, at(cast.router, 5555), at(cast.external, 80), SYN);
                if bits == 0 {
                    stage.ingress(&stranger).becomes_some();
                    stage.counted(NEW);
                } else {
                    stage.ingress(&stranger).dropped();
                    stage.counted(&[(Reason::SourceRange, 1)]);
                }
            },
        );
    }
    // Ranges are the Service's own, and those of one family say nothing of the other.
    story(
        || {
            one_port()
                .with((V4.external, 80), Proto::TCP, SOURCE_RANGES, &[(V4.remote, 8080)])
                .allow(2, "198.51.100.0", 24)
                .allow(1, "2001:db8::", 32)
        },
        |stage| {
            stage.ingress(&packet(Proto::TCP, at(V4.client, 5555), at(V4.external, 80), SYN)).dropped();
            stage.counted(&[(Reason::SourceRange, 1)]);
        },
    );
}

#[test]
fn a_client_with_affinity_stays_with_its_endpoint_until_that_goes() {
    //
    for cast in FAMILIES {
        let ends = [(cast.remote, 8080), (cast.other, 8080), (cast.router, 8080)];
        story(
            || Node::new().with((cast.vip, 80), Proto::TCP, INTERNAL | AFFINITY, &ends),
            |stage| {
                let knock = |stage: &mut Stage, port| {
                    let syn = packet(Proto::TCP, at(cast.pod, port), at(cast.vip, 80), SYN);
                    stage.ingress(&syn).becomes_some().1
                };
                let first = knock(stage, 5000);
                for port in 5001..5020 {
                    assert_eq!(knock(stage, port), first);
                }
                let index = ends.iter().position(|(ip, port)| at(ip, *port).to_string() == first).unwrap();
                stage.change(|node| {
                    node.retire(100 + index as u32);
                    // The slot leads to one that is left, as the agent would have it.
                    node.tables.slots.insert(100 + index as u32, 100 + (index as u32 + 1) % 3);
                });
                let second = knock(stage, 6000);
                assert_ne!(second, first);
                assert_eq!(knock(stage, 6001), second);
                stage.counted(&[(Reason::NewFlow, 22)]);
            },
        );
    }
}

#[test]
fn clients_spread_over_all_endpoints() {
    for cast in FAMILIES {
        let ends = [(cast.remote, 8080), (cast.other, 8080), (cast.router, 8080)];
        story(
            || Node::new().with((cast.vip, 80), Proto::UDP, INTERNAL, &ends),
            |stage| {
                let mut seen = BTreeSet::new();
                for port in 5000..5040 {
                    let datagram = packet(Proto::UDP, at(cast.pod, port), at(cast.vip, 80), SYN);
                    seen.insert(stage.ingress(&datagram).becomes_some().1);
                }
                assert_eq!(seen.len(), 3, "{seen:?}");
                stage.counted(&[(Reason::NewFlow, 40)]);
            },
        );
    }
}

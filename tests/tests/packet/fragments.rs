//! Datagrams in fragments: only the first has ports, the others follow it (RFC 791 §3.2, RFC 8200 §4.5).

use proxy_common::abi::frontend::INTERNAL;
use proxy_common::abi::{Hook, Reason};
use proxy_common::addr::Proto;
use proxy_tests::packet::Packet;

use crate::node::{Cast, FAMILIES, NEW, Node, at};
use crate::nodeport::node_port;
use crate::stage::{Seen, Stage, story};

const SIZE: usize = 64;

fn datagram(from: (&str, u16), to: (&str, u16), id: u32) -> Packet {
    Packet::udp(at(from.0, from.1), at(to.0, to.1)).payload(&[0xab; 150]).may_fragment().identification(id)
}

fn cluster_ip(cast: Cast) -> Node {
    Node::new().with((cast.vip, 80), Proto::UDP, INTERNAL, &[(cast.remote, 8080)])
}

/// Every fragment of `before` becomes that of `after`.
#[track_caller]
fn all_become(stage: &mut Stage, hook: Hook, before: &Packet, after: &Packet) {
    let (before, after) = (stage.fragments(before, SIZE), stage.fragments(after, SIZE));
    assert!(before.len() == 3 && after.len() == 3);
    for (before, after) in before.into_iter().zip(after) {
        stage.frame(hook, before).becomes_bytes(after);
    }
}

/// A pod's datagram to a ClusterIP in fragments, and those that are due behind it.
struct InFragments {
    sent: Vec<Vec<u8>>,
    due: Vec<Vec<u8>>,
}

impl InFragments {
    fn to_cluster_ip(stage: &Stage, cast: Cast) -> Self {
        let fragments = |to| stage.fragments(&datagram((cast.pod, 40_000), to, 7), SIZE);
        Self { sent: fragments((cast.vip, 80)), due: fragments((cast.remote, 8080)) }
    }

    #[track_caller]
    fn comes<'a>(&self, stage: &'a mut Stage, n: usize) -> Seen<'a> {
        stage.frame(Hook::INGRESS, self.sent[n].clone())
    }

    #[track_caller]
    fn is_translated(&self, stage: &mut Stage, n: usize) {
        self.comes(stage, n).becomes_bytes(self.due[n].clone());
    }
}

#[test]
fn later_fragments_follow_the_first_in_both_directions() {
    for cast in FAMILIES {
        let (pod, vip, endpoint) = ((cast.pod, 40_000), (cast.vip, 80), (cast.remote, 8080));
        story(
            || cluster_ip(cast),
            |stage| {
                all_become(stage, Hook::INGRESS, &datagram(pod, vip, 7), &datagram(pod, endpoint, 7));
                all_become(stage, Hook::EGRESS, &datagram(endpoint, pod, 8), &datagram(vip, pod, 8));
                // Another datagram of the flow, which is known.
                all_become(stage, Hook::INGRESS, &datagram(pod, vip, 9), &datagram(pod, endpoint, 9));
                stage.counted(NEW);
            },
        );
    }
}

#[test]
fn fragments_are_masqueraded_like_whole_datagrams() {
    for cast in FAMILIES {
        let (client, node, endpoint) = ((cast.client, 5555), (cast.node, 30_200), (cast.remote, 8080));
        let masqueraded = (cast.node, 2000);
        story(
            || node_port(cast, Proto::UDP, cast.remote),
            |stage| {
                all_become(stage, Hook::INGRESS, &datagram(client, node, 7), &datagram(client, endpoint, 7));
                all_become(
                    stage,
                    Hook::EGRESS,
                    &datagram(client, endpoint, 7),
                    &datagram(masqueraded, endpoint, 7),
                );
                all_become(
                    stage,
                    Hook::INGRESS,
                    &datagram(endpoint, masqueraded, 8),
                    &datagram(endpoint, client, 8),
                );
                all_become(stage, Hook::EGRESS, &datagram(endpoint, client, 8), &datagram(node, client, 8));
                stage.counted(NEW);
            },
        );
    }
}

#[test]
fn a_fragment_before_the_first_waits_for_it() {
    // D-3: whatever it is for, since an answer is known only when it leaves.
    for cast in FAMILIES {
        story(
            || cluster_ip(cast),
            |stage| {
                let (pod, endpoint) = ((cast.pod, 40_000), (cast.remote, 8080));
                let asked = InFragments::to_cluster_ip(stage, cast);
                asked.comes(stage, 2).waits();
                asked.comes(stage, 1).waits();
                asked.is_translated(stage, 0);
                asked.is_translated(stage, 2);
                asked.is_translated(stage, 1);
                let answer = stage.fragments(&datagram(endpoint, pod, 8), SIZE);
                stage.frame(Hook::INGRESS, answer[1].clone()).waits();
                stage.frame(Hook::INGRESS, answer[0].clone()).passes();
                stage.frame(Hook::INGRESS, answer[1].clone()).passes();
                stage.counted(NEW);
            },
        );
    }
}

#[test]
fn a_fragment_to_a_service_whose_first_does_not_come_is_dropped() {
    for cast in FAMILIES {
        story(
            || cluster_ip(cast),
            |stage| {
                let pod = (cast.pod, 40_000);
                let asked = InFragments::to_cluster_ip(stage, cast);
                for _ in 0..2 {
                    asked.comes(stage, 1).waits();
                    asked.comes(stage, 2).waits();
                }
                asked.comes(stage, 1).dropped();
                asked.comes(stage, 2).dropped();
                stage.counted(&[(Reason::FragmentUnknown, 2)]);
                asked.is_translated(stage, 0);
                // After the first the order does not matter.
                asked.is_translated(stage, 2);
                asked.is_translated(stage, 1);
                stage.counted(NEW);
                // Another identification is another datagram.
                let other = stage.fragments(&datagram(pod, (cast.vip, 80), 8), SIZE);
                stage.frame(Hook::INGRESS, other[1].clone()).waits();
                // Nor does a refused one let the rest through.
                let closed = stage.fragments(&datagram(pod, (cast.vip, 81), 9), SIZE);
                stage.frame(Hook::INGRESS, closed[0].clone()).gets_refused();
                stage.frame(Hook::INGRESS, closed[1].clone()).dropped();
                stage.counted(&[(Reason::UndefinedPort, 1), (Reason::FragmentUnknown, 1)]);
            },
        );
    }
}

#[test]
fn fragments_that_are_no_service_s_pass() {
    for cast in FAMILIES {
        story(
            || cluster_ip(cast),
            |stage| {
                for to in [cast.node, cast.remote] {
                    for fragment in stage.fragments(&datagram((cast.client, 5), (to, 9), 7), SIZE) {
                        stage.frame(Hook::INGRESS, fragment).passes();
                    }
                }
                for fragment in stage.fragments(&datagram((cast.remote, 9), (cast.client, 5), 7), SIZE) {
                    stage.frame(Hook::EGRESS, fragment).passes();
                }
            },
        );
    }
}

#[test]
fn an_atomic_fragment_is_a_whole_datagram() {
    // RFC 6946: a fragment header that cuts nothing.
    let cast = FAMILIES[1];
    let (pod, vip, endpoint) = ((cast.pod, 40_000), (cast.vip, 80), (cast.remote, 8080));
    story(
        || cluster_ip(cast),
        |stage| {
            let atomic = |from, to| datagram(from, to, 7);
            let sent = stage.fragments(&atomic(pod, vip), 160);
            let due = stage.fragments(&atomic(pod, endpoint), 160);
            assert_eq!(sent.len(), 1);
            stage.frame(Hook::INGRESS, sent[0].clone()).becomes_bytes(due[0].clone());
            stage.counted(NEW);
        },
    );
}

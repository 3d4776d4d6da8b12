//! What passes the node in one go.

use crate::abi::{Iface, Reason};
use crate::addr::Proto;
use crate::lb::tests::{ETH, Node, Talk, key, shown};
use crate::testing::{ByteFrame, frame, run_through, segment, tuple};
use crate::wire::Packet;

const VIPS: [(&str, u16); 2] = [("203.0.113.1", 80), ("2001:db8::1", 80)];
const CLIENTS: [(&str, u16); 2] = [("198.51.100.9", 40_000), ("2001:db8:9::9", 40_000)];
const FAR: [(&str, u16); 2] = [("10.244.2.7", 8080), ("fd00:244:0:2::7", 8080)];
const NEAR: [(&str, u16); 2] = [("+10.244.1.7", 8080), ("+fd00:244::7", 8080)];
const ACK: u8 = Packet::ACK;

/// A node with one external Service in both families and over both protocols.
fn node(endpoints: [(&str, u16); 2]) -> Node {
    let mut node = Node::new();
    for (vip, endpoint) in VIPS.into_iter().zip(endpoints) {
        for proto in [Proto::TCP, Proto::UDP] {
            node.service(vip, proto, 0, &[endpoint]);
        }
    }
    node
}

/// The first question of a datagram flow, its answer, and what makes it an old one.
fn talk_udp(node: &Node, family: usize) -> (ByteFrame, ByteFrame) {
    let ask = frame(&key(CLIENTS[family], VIPS[family], Proto::UDP), 0, b"?", false);
    let (left, through) = node.pass(&ask);
    assert!(!through, "it has not been answered");
    let answer = frame(&tuple(&left).unwrap().tuple.reversed(), 0, b"!", false);
    assert!(!node.pass(&answer).1, "it is young");
    node.wait(2_100);
    assert!(!node.pass(&ask).1, "it grows old by this");
    (ask, answer)
}

fn through(node: &Node, frame: &ByteFrame) -> bool {
    node.pass(frame).1
}

#[test]
fn packets_of_answered_flows_to_endpoints_elsewhere_go_through_in_both_directions() {
    let node = node(FAR);
    for family in [0, 1] {
        let talk = Talk::open(&node, CLIENTS[family], VIPS[family]);
        let numbers = [Talk::CLIENT.wrapping_add(1), Talk::ENDPOINT + 1];
        let ask = segment(&talk.ask, ACK, numbers, b"question", false);
        let answer = segment(&talk.received.reversed(), ACK, [numbers[1], numbers[0]], b"answer", false);
        let datagrams = talk_udp(&node, family);
        // Time has passed: its legs are looked after by the stack.
        assert!(!through(&node, &ask));
        for _ in 0..3 {
            for (packet, word) in
                [(&ask, "question"), (&answer, "answer"), (&datagrams.0, "asked"), (&datagrams.1, "told")]
            {
                assert!(through(&node, packet), "{word} {}", shown(packet));
            }
            // In this window of the clock, and in later ones.
            node.wait(70);
        }
    }
    assert_eq!(node.tables.counted(Reason::PassedThrough), 24);
}

#[test]
fn what_begins_or_ends_something_goes_by_the_stack() {
    let node = node(FAR);
    let begun = Talk::begin(&node, CLIENTS[0], VIPS[0]);
    begun.answered();
    let with =
        |flags| segment(&begun.ask, flags, [Talk::CLIENT.wrapping_add(1), Talk::ENDPOINT + 1], b"", false);
    assert!(!through(&node, &with(ACK)), "this one makes it old");
    assert!(through(&node, &with(ACK)));
    for flags in [Packet::SYN, Packet::FIN | ACK, Packet::RST | ACK] {
        assert!(run_through(&node.tables, &with(flags), ETH, ETH).is_none(), "{flags:#x}");
    }
}

#[test]
fn neither_what_is_for_an_endpoint_here_nor_what_is_for_nobody_nor_what_has_no_hops_left() {
    let near = node(NEAR);
    let talk = Talk::open(&near, CLIENTS[0], VIPS[0]);
    let numbers = [Talk::CLIENT.wrapping_add(1), Talk::ENDPOINT + 1];
    assert!(!through(&near, &segment(&talk.ask, ACK, numbers, b"", false)));
    let stranger = key(CLIENTS[0], ("192.0.2.1", 80), Proto::TCP);
    assert!(!through(&near, &segment(&stranger, ACK, numbers, b"", false)));
    let far = node(FAR);
    for family in [0, 1] {
        let talk = Talk::open(&far, CLIENTS[family], VIPS[family]);
        let mut last = segment(&talk.ask, ACK, numbers, b"", false);
        assert!(through(&far, &last));
        let (at, field) = [(14 + 8, Some(14 + 10)), (14 + 7, None)][family];
        let hops = last.bytes[at];
        last.bytes[at] = 1;
        if let Some(field) = field {
            // The header's sum grows by what the hops have lost.
            let sum = u16::from_be_bytes([last.bytes[field], last.bytes[field + 1]]);
            let sum = u32::from(sum) + (u32::from(hops - 1) << 8);
            let sum = (sum & 0xffff) + (sum >> 16);
            last.bytes[field..field + 2].copy_from_slice(&(sum as u16).to_be_bytes());
        }
        assert!(run_through(&far.tables, &last, ETH, ETH).is_none());
    }
}

#[test]
fn an_answer_that_has_to_leave_by_another_uplink_goes_by_the_stack() {
    let mut node = node(FAR);
    node.tables.ifaces.insert(ETH, Iface::new(0, ETH));
    let talk = Talk::open(&node, CLIENTS[0], VIPS[0]);
    let numbers = [Talk::ENDPOINT + 1, Talk::CLIENT.wrapping_add(1)];
    let answer = segment(&talk.received.reversed(), ACK, numbers, b"answer", false);
    assert!(run_through(&node.tables, &answer, ETH, ETH).is_some());
    node.wait(70);
    assert!(run_through(&node.tables, &answer, ETH, ETH + 1).is_none());
}

#[test]
fn datagrams_follow_their_service_by_the_stack_when_their_endpoint_goes() {
    // C-4.
    let mut node = node(FAR);
    let (ask, _) = talk_udp(&node, 0);
    assert!(through(&node, &ask));
    // The backends of UDP in the first family: the second port that was made.
    node.retire(200);
    assert!(run_through(&node.tables, &ask, ETH, ETH).is_none());
    node.wait(70);
    assert!(run_through(&node.tables, &ask, ETH, ETH).is_none());
    node.tables.live().iter().for_each(|flow| assert_eq!(flow.backend, 200));
}

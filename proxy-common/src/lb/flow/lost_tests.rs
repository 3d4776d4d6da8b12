//! What becomes of connections whose endpoint has left without terminating.

use super::lost;
use crate::abi::{FORWARD, Flow, Hook, REPLY, Reason, State, TELL, Timeouts, Tuple};
use crate::addr::Proto;
use crate::lb::tests::{ETH, Node, Talk, addr, key};
use crate::lb::{Subprograms as _, Tables as _, adopt};
use crate::testing::{Outcome, run, segment, tuple};
use crate::wire::Packet;

const VIP: (&str, u16) = ("203.0.113.1", 80);
const VIP_V6: (&str, u16) = ("2001:db8::1", 80);
const CLIENT: (&str, u16) = ("198.51.100.9", 40_000);
const CLIENT_V6: (&str, u16) = ("2001:db8:1::9", 40_000);

fn node() -> Node {
    let mut node = Node::new();
    node.service(VIP, Proto::TCP, 0, &[("10.244.2.7", 8080)]);
    node.service(VIP_V6, Proto::TCP, 0, &[("fd00:244:2::7", 8080)]);
    node
}

/// What becomes of a segment that enters the node.
fn enters(node: &Node, tuple: &Tuple, flags: u8, numbers: [u32; 2]) -> Outcome {
    run(&node.tables, &segment(tuple, flags, numbers, b"", false), Hook::INGRESS, ETH)
}

/// A segment that enters is answered with a RST of this sequence number.
#[track_caller]
fn is_reset(node: &Node, sent: &Tuple, numbers: [u32; 2]) {
    let Outcome::Rejected(answer) = enters(node, sent, Packet::ACK, numbers) else { panic!("not rejected") };
    let answer = tuple(&answer).unwrap();
    assert_eq!((answer.tuple, answer.tcp_flags, answer.seq), (sent.reversed(), Packet::RST, numbers[1]));
}

#[track_caller]
fn lose(node: &Node) -> Flow {
    let live = node.tables.live();
    assert_eq!((live.len(), lost::lose(&node.tables, live[0].id)), (1, 1));
    node.tables.records.borrow()[live[0].id.index() as usize]
}

#[test]
fn whoever_goes_on_is_reset_with_numbers_that_fit() {
    for (client, vip) in [(CLIENT, VIP), (CLIENT_V6, VIP_V6)] {
        let node = node();
        let talk = Talk::open(&node, client, vip);
        let flow = lose(&node);
        assert_eq!(flow.acked, [Talk::ENDPOINT + 1, Talk::CLIENT.wrapping_add(1)]);
        // The leg of IPv4 speaks for the record until its window ends.
        node.wait(70);
        is_reset(&node, &talk.ask, [Talk::CLIENT.wrapping_add(1), Talk::ENDPOINT + 1]);
        is_reset(&node, &talk.received.reversed(), [Talk::ENDPOINT + 1, Talk::CLIENT.wrapping_add(1)]);
        assert_eq!(node.tables.counted(Reason::EndpointLost), 2);
        // What an end says last still reaches the other one.
        let last = enters(&node, &talk.ask, Packet::RST, [Talk::CLIENT.wrapping_add(1), 0]);
        assert!(matches!(last, Outcome::Rewritten(_)), "{last:?}");
    }
}

#[test]
fn a_new_connection_from_the_same_port_is_a_new_flow() {
    let node = node();
    Talk::open(&node, CLIENT, VIP);
    let old = lose(&node);
    Talk::open(&node, CLIENT, VIP);
    let live = node.tables.live();
    assert_eq!(live.len(), 1);
    assert_ne!(live[0].id, old.id);
    assert_eq!(lost::lose(&node.tables, old.id), 0, "it is gone");
}

#[test]
fn an_unanswered_connection_is_ignored_since_it_finds_another_endpoint() {
    let node = node();
    Talk::begin(&node, CLIENT, VIP);
    let id = node.tables.live()[0].id;
    assert_eq!(lost::lose(&node.tables, id), 0);
    assert_eq!(node.tables.live().len(), 1);
}

#[test]
fn a_lost_flow_gives_everything_back_when_its_ends_have_been_notified() {
    let node = node();
    Talk::open(&node, CLIENT, VIP);
    let index = lose(&node).id.index();
    assert_eq!(node.tables.sweep(index, &Timeouts::CONNTRACK), 0);
    node.wait(TELL / 1_000_000);
    assert_eq!(node.tables.sweep(index, &Timeouts::CONNTRACK), 1);
    assert!(node.tables.flows.borrow().is_empty());
}

#[test]
fn a_connection_that_its_socket_was_led_through_is_reset_though_it_was_no_flow() {
    let node = node();
    let direct = key(("10.244.1.5", 50_000), ("10.244.2.7", 8080), Proto::TCP);
    let flow = Flow::lost(&direct, [1, 1, 1], true, node.tables.now());
    let index = adopt::adopt(&node.tables, adopt::From::Proxy, |record| {
        *record = Flow { id: record.id, claims: record.claims, ..flow };
        true
    });
    assert_eq!(node.tables.records.borrow()[index as usize].state, State::LOST);
    is_reset(&node, &direct, [7, 9]);
    is_reset(&node, &direct.reversed(), [9, 7]);
    assert_eq!(*flow.client().0, addr("10.244.1.5"));
    // Another connection from there is nobody's.
    assert_eq!(enters(&node, &direct, Packet::SYN, [1, 0]), Outcome::Passed);
    assert!(node.tables.flows.borrow().is_empty());
    assert_eq!([FORWARD, REPLY], [0, 1]);
}

#[test]
fn a_connection_that_its_socket_tries_in_vain_is_rejected() {
    let node = node();
    let direct = key(("10.244.1.5", 50_000), ("10.244.2.7", 8080), Proto::TCP);
    let flow = Flow::lost(&direct, [1, 1, 1], false, node.tables.now());
    adopt::adopt(&node.tables, adopt::From::Proxy, |record| {
        *record = Flow { id: record.id, claims: record.claims, ..flow };
        true
    });
    let Outcome::Rejected(answer) = enters(&node, &direct, Packet::SYN, [7, 0]) else {
        panic!("not rejected")
    };
    let answer = tuple(&answer).unwrap();
    // RFC 9293 section 3.5.2: a RST that acknowledges the SYN.
    assert_eq!((answer.tuple, answer.tcp_flags), (direct.reversed(), Packet::RST | Packet::ACK));
    assert_eq!((answer.seq, answer.ack), (0, 8));
}

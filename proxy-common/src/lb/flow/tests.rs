//! How flows begin, live and end.

use std::string::String;
use std::vec::Vec;

use crate::abi::{
    FORWARD, Flow, FlowId, FrontendKey, Hook, PortRange, REPLY, Reason, Role, State, Timeouts, Tuple, config,
    frontend,
};
use crate::addr::{Addr, Port, Proto};
use crate::lb::flow::BELIEVED;
use crate::lb::tests::{ETH, Node, Talk, addr, answer, key, shown};
use crate::lb::{LONGEST_PAUSE, Subprograms as _, Tables as _, adopt, flow};
use crate::testing::{ByteFrame, Outcome, SECRET, frame, run, segment, tuple};
use crate::wire::Packet;

const VIP: (&str, u16) = ("203.0.113.1", 80);
const OTHER_VIP: (&str, u16) = ("203.0.113.2", 80);
const ENDPOINT: (&str, u16) = ("10.244.2.7", 8080);
const CLIENT: (&str, u16) = ("198.51.100.9", 40_000);
const NODE: &str = "192.168.10.1";
const ACK: u8 = Packet::ACK;
const SYN: u8 = Packet::SYN;
const RST: u8 = Packet::RST;
const FIN_ACK: u8 = Packet::FIN | Packet::ACK;

/// A node with one external Service port of each protocol, whose endpoint is elsewhere: flows are masqueraded.
fn masquerading() -> Node {
    let mut node = Node::new();
    for vip in [VIP, OTHER_VIP] {
        for proto in [Proto::TCP, Proto::UDP, Proto::SCTP] {
            node.service(vip, proto, 0, &[ENDPOINT]);
        }
    }
    node
}

/// The same with so many masquerade ports from 2000 on.
fn with_ports(count: u16) -> Node {
    let mut node = masquerading();
    let config = node.tables.config.take().unwrap();
    node.tables.config = Some(config.with_snat_ports(&[PortRange { first: 2000, count }]));
    node
}

fn the_flow(node: &Node) -> Flow {
    let live = node.tables.live();
    assert_eq!(live.len(), 1, "{live:?}");
    live[0]
}

fn sweep(node: &Node) -> u32 {
    let records = node.tables.records.borrow().len() as u32;
    (0..records).map(|index| node.tables.sweep(index, &Timeouts::CONNTRACK)).sum()
}

/// A datagram of a client, as it leaves.
#[track_caller]
fn ask(node: &Node, from: (&str, u16), to: (&str, u16), proto: Proto) -> ByteFrame {
    node.pass(&frame(&key(from, to, proto), 0, b"?", false)).0
}

/// What becomes of a client's packet on its whole way.
fn asks(node: &Node, tuple: &Tuple, flags: u8, numbers: [u32; 2]) -> Outcome {
    match run(&node.tables, &segment(tuple, flags, numbers, b"", false), Hook::INGRESS, ETH) {
        Outcome::Rewritten(entered) => run(&node.tables, &entered, Hook::EGRESS, ETH),
        other => other,
    }
}

#[test]
fn only_what_the_node_itself_sends_from_the_port_of_a_service_is_noted() {
    let node = masquerading();
    let noted = |from| {
        let sent = frame(&key(from, ("192.0.2.99", 53), Proto::UDP), 0, b"?", false);
        assert_eq!(run(&node.tables, &sent, Hook::EGRESS, ETH), Outcome::Passed);
        node.tables.live().len()
    };
    assert_eq!(noted((NODE, 81)), 0, "no Service has that port");
    assert_eq!(noted(("10.244.1.5", 80)), 0, "a pod's is the pod's");
    assert_eq!(noted((NODE, 80)), 1);
    assert!(the_flow(&node).has(Role::OWN));
}

#[test]
fn a_blind_acknowledgement_makes_no_connection() {
    // The SYN-ACKs of a flood reach nobody.
    let node = masquerading();
    let talk = Talk::begin(&node, CLIENT, VIP);
    let next = Talk::CLIENT.wrapping_add(1);
    talk.asks(ACK, next, Talk::ENDPOINT + 1);
    assert_eq!(node.flows(), [1, 0], "nothing has been answered");
    talk.answered();
    for wrong in [0, Talk::ENDPOINT, Talk::ENDPOINT + 2, Talk::ENDPOINT.wrapping_add(1 << 31), u32::MAX] {
        talk.asks(ACK, next, wrong);
        assert_eq!(node.flows(), [1, 0], "{wrong}");
    }
    talk.asks(RST | ACK, next, Talk::ENDPOINT + 1);
    assert_eq!(node.flows(), [1, 0], "who resets means no connection");
    talk.goes_on();
    assert_eq!(node.flows(), [0, 1]);
}

#[test]
fn a_syn_ack_that_is_sent_again_may_have_another_number() {
    // With SYN cookies it has.
    let node = masquerading();
    let talk = Talk::begin(&node, CLIENT, VIP);
    talk.answered();
    talk.answers(SYN | ACK, 77_000, Talk::CLIENT.wrapping_add(1));
    talk.goes_on();
    assert_eq!(node.flows(), [1, 0], "the first number counts no more");
    talk.asks(ACK, Talk::CLIENT.wrapping_add(1), 77_001);
    assert_eq!(node.flows(), [0, 1]);
}

#[test]
fn what_the_endpoint_has_sent_since_may_be_acknowledged_too() {
    let node = masquerading();
    let talk = Talk::begin(&node, CLIENT, VIP);
    talk.answered();
    // The client's third packet was lost, and the endpoint sends 6 bytes.
    let data = segment(&talk.received.reversed(), ACK, [Talk::ENDPOINT + 1, 0], b"banner", false);
    node.leave(&node.enter(&data));
    talk.asks(ACK, Talk::CLIENT.wrapping_add(1), Talk::ENDPOINT + 8);
    assert_eq!(node.flows(), [1, 0]);
    talk.asks(ACK, Talk::CLIENT.wrapping_add(1), Talk::ENDPOINT + 7);
    assert_eq!(node.flows(), [0, 1]);
}

#[test]
fn a_connection_that_is_met_in_its_middle_becomes_old_like_others() {
    // D-8: its record was lost. The numbers of the endpoint are learned from its next segment, across the end
    // of all.
    let mut node = Node::new();
    node.service(("10.96.0.1", 80), Proto::TCP, frontend::INTERNAL, &[ENDPOINT]);
    let ask = key(("10.244.1.5", 40_000), ("10.96.0.1", 80), Proto::TCP);
    let left = node.leave(&node.enter(&segment(&ask, ACK, [5, 0xffff_fff0], b"", false)));
    let talk = Talk { node: &node, ask, received: tuple(&left).unwrap().tuple };
    assert_eq!(talk.received.dst, addr(ENDPOINT.0));
    node.leave(&segment(&talk.received.reversed(), ACK, [0xffff_fff8, 6], &[0; 16], false));
    assert_eq!(node.flows(), [1, 0]);
    talk.asks(ACK, 6, 8);
    assert_eq!(node.flows(), [0, 1]);
}

#[test]
fn answers_and_the_middle_of_connections_open_nothing_at_an_address_of_the_node() {
    // They are the node's own affair.
    let mut node = Node::new();
    node.service(("0.0.0.0", 30_200), Proto::TCP, frontend::NODE_PORT, &[ENDPOINT]);
    node.service((NODE, 80), Proto::TCP, 0, &[ENDPOINT]);
    node.service(VIP, Proto::TCP, 0, &[ENDPOINT]);
    let opens = |to, flags| {
        let sent = frame(&key(CLIENT, to, Proto::TCP), flags, b"", false);
        let opened = run(&node.tables, &sent, Hook::INGRESS, ETH) != Outcome::Passed;
        node.tables.live().iter().for_each(|flow| assert_eq!(node.tables.take_apart(flow.id), 1));
        opened
    };
    for to in [(NODE, 30_200), (NODE, 80)] {
        for flags in [SYN | ACK, ACK, FIN_ACK, RST, RST | ACK] {
            assert!(!opens(to, flags), "{to:?} {flags:#x}");
        }
        assert!(opens(to, SYN), "{to:?}");
    }
    assert_eq!([SYN | ACK, RST, RST | ACK].map(|flags| opens(VIP, flags)), [false; 3]);
    assert_eq!([SYN, ACK, FIN_ACK].map(|flags| opens(VIP, flags)), [true; 3]);
}

#[test]
fn a_forged_end_does_not_end_an_old_flow() {
    for flags in [FIN_ACK, RST, RST | ACK] {
        for client in [true, false] {
            let node = masquerading();
            let talk = Talk::open(&node, CLIENT, VIP);
            // Both ends have acknowledged something now.
            let right = if client { Talk::CLIENT.wrapping_add(1) } else { Talk::ENDPOINT + 1 };
            for far in [BELIEVED, 1 << 31, 0_u32.wrapping_sub(1)] {
                let seq = right.wrapping_add(far);
                if client {
                    talk.asks(flags, seq, 1)
                } else {
                    talk.answers(flags, seq, right)
                };
            }
            let flow = the_flow(&node);
            assert_eq!((flow.fin, flow.rst), ([0; 2], [0; 2]), "{flags:#x} {client}");
        }
    }
}

#[test]
fn an_end_behind_all_that_linux_lets_be_under_way_is_believed() {
    // D-6.
    for client in [true, false] {
        let node = masquerading();
        let talk = Talk::open(&node, CLIENT, VIP);
        let right = if client { Talk::CLIENT.wrapping_add(1) } else { Talk::ENDPOINT + 1 };
        let seq = right.wrapping_add(6 << 20);
        if client {
            talk.asks(FIN_ACK, seq, 1)
        } else {
            talk.answers(FIN_ACK, seq, right)
        };
        assert_eq!(the_flow(&node).fin, if client { [1, 0] } else { [0, 1] });
    }
}

/// A connection whose legs know that it is old, in the middle of a window.
fn settled<'a>(node: &'a Node, client: (&str, u16), vip: (&str, u16)) -> Talk<'a> {
    let talk = Talk::open(node, client, vip);
    node.tables.now.set((node.tables.now.get() >> 26 << 26) + (2 << 26) + 20_000_000);
    talk.goes_on();
    talk.says(ACK, false);
    talk
}

#[test]
fn a_record_is_asked_once_in_a_window() {
    let node = masquerading();
    let talk = settled(&node, CLIENT, VIP);
    let asked = the_flow(&node).seen;
    for ms in [10, 30] {
        node.wait(ms);
        talk.goes_on();
        assert_eq!(shown(&talk.says(ACK, false)), "203.0.113.1|80 > 198.51.100.9|40000");
        assert_eq!(the_flow(&node).seen, asked, "the legs know as much");
    }
    node.wait(10);
    talk.goes_on();
    talk.says(ACK, false);
    assert_eq!(the_flow(&node).seen.map(|seen| seen - asked[0]), [50_000_000; 2]);
    // Ends and beginnings are written to the record at once.
    talk.says(FIN_ACK, true);
    assert_eq!(the_flow(&node).fin, [1, 0]);
    assert_eq!(node.tables.counted(Reason::NewFlow), 1);
    talk.asks(SYN, 77, 0);
    assert_eq!((node.tables.counted(Reason::NewFlow), the_flow(&node).old), (2, 0));
}

#[test]
fn a_flow_that_has_been_reset_and_goes_on_is_watched_closely() {
    let node = masquerading();
    let talk = settled(&node, CLIENT, VIP);
    talk.says(RST, false);
    // A while later both ends go on, in all parts of a window.
    node.wait(70);
    for _ in 0..150 {
        node.wait(7);
        talk.goes_on();
        talk.says(ACK, false);
        assert_eq!(the_flow(&node).seen, [node.tables.now(); 2]);
        assert!(!the_flow(&node).is_closed(node.tables.now()));
    }
    assert!(!the_flow(&node).is_reset());
}

#[test]
fn a_flow_that_is_taken_apart_in_a_window_leads_nobody_any_more() {
    let node = masquerading();
    let talk = settled(&node, CLIENT, VIP);
    assert_eq!(node.tables.take_apart(the_flow(&node).id), 1);
    let answer = segment(&talk.received.reversed(), ACK, [1, 1], b"", false);
    assert_eq!(run(&node.tables, &answer, Hook::INGRESS, ETH), Outcome::Passed);
}

#[test]
fn an_end_is_judged_by_all_that_has_been_acknowledged_in_a_window() {
    const FAR: u32 = 500_000_000;
    // A Service that is its own endpoint has one leg for both directions.
    let own = ("192.0.2.7", 8080);
    for (client, vip) in [(true, VIP), (false, VIP), (true, own), (false, own)] {
        let mut node = masquerading();
        node.service(own, Proto::TCP, 0, &[own]);
        let talk = settled(&node, CLIENT, vip);
        // One end receives a lot.
        for part in 1..=10 {
            let far = FAR / 10 * part;
            if client {
                talk.answers(ACK, Talk::ENDPOINT + 1, Talk::CLIENT.wrapping_add(1 + far));
            } else {
                talk.asks(ACK, Talk::CLIENT.wrapping_add(1), Talk::ENDPOINT + 1 + far);
            }
        }
        talk.says(FIN_ACK, client);
        assert_eq!(the_flow(&node).fin, [0; 2], "long ago");
        if client {
            talk.asks(FIN_ACK, Talk::CLIENT.wrapping_add(1 + FAR), Talk::ENDPOINT + 1);
        } else {
            talk.answers(FIN_ACK, Talk::ENDPOINT + 1 + FAR, Talk::CLIENT.wrapping_add(1));
        }
        assert_eq!(the_flow(&node).fin, [u8::from(client), u8::from(!client)]);
    }
}

#[test]
fn a_leg_that_is_broken_is_written_anew_for_its_flow() {
    let v6 = ("2001:db8::80", 80);
    for (client, vip, endpoint) in
        [(CLIENT, VIP, ENDPOINT), (("2001:db8:1::9", 40_000), v6, ("fd00:244:0:1::7", 8080))]
    {
        for role in [Role::OUTER, Role::MIDDLE] {
            let mut node = Node::new();
            node.service(vip, Proto::TCP, 0, &[endpoint]);
            let talk = settled(&node, client, vip);
            let flow = the_flow(&node);
            let key = flow.pairs[role.index()].key(|| Some(&SECRET));
            node.tables.flows.borrow_mut().get_mut(&key).unwrap().lower ^= 1 << 40;
            node.wait(1_100);
            let on = segment(&talk.ask, ACK, [Talk::CLIENT.wrapping_add(1), Talk::ENDPOINT + 1], b"", false);
            if role == Role::OUTER {
                // It finds its flow by the endpoint that the hash chooses again.
                assert_eq!(run(&node.tables, &on, Hook::INGRESS, ETH), Outcome::Waits);
            }
            talk.goes_on();
            assert_eq!(tuple(&talk.says(ACK, false)).unwrap().tuple, talk.ask.reversed(), "{vip:?} {role:?}");
            assert_eq!(the_flow(&node).id, flow.id);
        }
    }
}

#[test]
fn a_connection_that_goes_on_after_a_rst_has_not_been_reset() {
    // RFC 5961 §3.2: the RST did not fit exactly, and was challenged.
    let node = masquerading();
    let talk = Talk::open(&node, CLIENT, VIP);
    talk.says(RST, false);
    assert!(the_flow(&node).is_reset());
    talk.goes_on();
    assert!(the_flow(&node).is_reset(), "that was under way");
    node.wait(1_100);
    assert!(the_flow(&node).is_closed(node.tables.now()));
    talk.goes_on();
    assert!(!the_flow(&node).is_reset());
    node.wait(80_000_000);
    assert_eq!(sweep(&node), 0);
    assert_eq!(node.flows(), [0, 1]);
}

#[test]
fn a_client_begins_anew_from_the_port_of_a_connection_that_it_or_its_peer_has_ended() {
    // P-26.
    for (flags, client, anew) in
        [(FIN_ACK, true, true), (RST, true, true), (RST | ACK, false, true), (FIN_ACK, false, false)]
    {
        let node = masquerading();
        let talk = Talk::open(&node, CLIENT, VIP);
        let before = the_flow(&node).id;
        talk.says(flags, client);
        let again = Talk::begin(&node, CLIENT, VIP);
        let flow = the_flow(&node);
        assert_eq!(flow.id != before, anew, "{flags:#x} {client}");
        assert_eq!(flow.old == 0, anew);
        again.answered();
        again.goes_on();
        assert_eq!(node.flows(), [0, 1]);
    }
}

#[test]
fn a_reset_connection_is_closed_after_a_second() {
    // The endpoint's port is closed; the numbers of a RST in answer to a SYN are its own.
    let node = with_ports(1);
    let talk = Talk::begin(&node, CLIENT, VIP);
    let back = talk.answers(RST | ACK, 0, Talk::CLIENT.wrapping_add(1));
    assert_eq!(tuple(&back).unwrap().tuple, talk.ask.reversed());
    let first = the_flow(&node);
    assert!(first.is_reset() && !first.is_closed(node.tables.now()));
    // Once more from the same port: a new flow.
    Talk::begin(&node, CLIENT, VIP).answers(RST | ACK, 0, Talk::CLIENT.wrapping_add(1));
    assert_ne!(the_flow(&node).id, first.id);
    // The port is to be had.
    node.wait(1_100);
    Talk::open(&node, ("198.51.100.10", 40_000), OTHER_VIP);
    assert_eq!(node.flows(), [0, 1]);
    assert_eq!(node.tables.counted(Reason::Displaced), 0);
}

#[test]
fn a_reset_flow_is_swept_soon() {
    let node = masquerading();
    Talk::open(&node, CLIENT, VIP).says(RST, true);
    node.wait(10_000);
    assert_eq!(sweep(&node), 0);
    node.wait(1_000);
    assert_eq!(sweep(&node), 1);
    assert_eq!(node.flows(), [0, 0]);
}

#[test]
fn flows_without_handshake_become_old_when_both_have_spoken_for_two_seconds() {
    for proto in [Proto::UDP, Proto::SCTP] {
        let node = masquerading();
        let wire = ask(&node, CLIENT, VIP, proto);
        node.wait(3_000);
        ask(&node, CLIENT, VIP, proto);
        assert_eq!(node.flows(), [1, 0], "no answer yet");
        node.leave(&node.enter(&answer(&wire, 0)));
        assert_eq!(node.flows(), [1, 0], "the client does not go on yet");
        ask(&node, CLIENT, VIP, proto);
        assert_eq!(node.flows(), [0, 1]);
        let other = ask(&node, CLIENT, OTHER_VIP, proto);
        node.leave(&node.enter(&answer(&other, 0)));
        node.wait(1_900);
        ask(&node, CLIENT, OTHER_VIP, proto);
        assert_eq!(node.flows(), [1, 1], "within two seconds");
        let idle = |old| {
            let of_age = |flow: &&Flow| flow.old == old;
            Timeouts::CONNTRACK.idle(node.tables.live().iter().find(of_age).unwrap())
        };
        assert_eq!([idle(0), idle(1)], if proto == Proto::UDP { [30, 120] } else { [60, 86_400] });
    }
}

#[test]
fn time_outs_arrive_as_they_were_given() {
    let words: [u32; 10] = std::array::from_fn(|n| n as u32 + 1);
    let read = Timeouts::from_words(words);
    assert_eq!((read.words(), read.tcp_established, read.udp, read.sctp_init), (words, 1, 6, 9));
}

#[test]
fn a_flow_is_swept_when_it_has_been_silent_for_its_time() {
    // D-6, C-16: seconds for young, old, half-closed and closed TCP, and UDP.
    type Life = (u64, fn(&Node));
    let lives: [Life; 6] = [
        (60, |node| Talk::begin(node, CLIENT, VIP).answered()),
        (86_400, |node| Talk::open(node, CLIENT, VIP).goes_on()),
        (3_600, |node| drop(Talk::open(node, CLIENT, VIP).says(FIN_ACK, false))),
        (120, |node| {
            let talk = Talk::open(node, CLIENT, VIP);
            talk.says(FIN_ACK, false);
            talk.says(FIN_ACK, true);
        }),
        (30, |node| drop(ask(node, CLIENT, VIP, Proto::UDP))),
        (120, |node| {
            let wire = ask(node, CLIENT, VIP, Proto::UDP);
            node.leave(&node.enter(&answer(&wire, 0)));
            node.wait(2_000);
            ask(node, CLIENT, VIP, Proto::UDP);
        }),
    ];
    for (secs, life) in lives {
        let node = masquerading();
        life(&node);
        node.wait(secs * 1_000);
        assert_eq!(sweep(&node), 0, "{secs}");
        node.wait(100);
        assert_eq!(sweep(&node), 1, "{secs}");
        assert_eq!(node.flows(), [0, 0], "{secs}");
        assert!(node.tables.flows.borrow().is_empty(), "{secs}");
    }
}

#[test]
fn the_sweep_frees_what_has_never_been_used_and_what_was_left_in_the_middle() {
    let node = Node::new();
    node.tables.records.borrow_mut().extend([Flow::EMPTY; 5]);
    // One that has been used and could not be given back.
    node.tables.records.borrow_mut()[4].id = FlowId(7 << 32 | 4);
    assert_eq!(sweep(&node), 0);
    assert_eq!(sweep(&node), 0);
    let mut free: Vec<u32> = node.tables.free.borrow().iter().copied().collect();
    free.sort_unstable();
    assert_eq!(free, [1, 2, 3, 4]);
    let ids: Vec<u64> = node.tables.records.borrow().iter().map(|flow| flow.id.0 >> 32).collect();
    assert_eq!(ids, [0, 1, 1, 1, 8]);
    assert_eq!(node.tables.records.borrow()[0].state, State::NEW, "the first is never used");
}

#[test]
fn young_flows_are_displaced_in_order_and_old_ones_never() {
    // A flood costs only its own kind.
    let mut node = masquerading();
    node.tables.places = Some(4);
    let old = Talk::open(&node, CLIENT, VIP);
    let dns = ask(&node, CLIENT, VIP, Proto::UDP);
    let flood = |n| Talk::begin(&node, ("198.51.100.66", n), VIP);
    let floods: Vec<Talk<'_>> = (1..=20).map(flood).collect();
    assert_eq!(node.flows(), [4 + 1, 1]);
    assert_eq!(node.tables.counted(Reason::Displaced), 20 - 4);
    old.goes_on();
    assert_eq!(ask(&node, CLIENT, VIP, Proto::UDP), dns);
    // The last ones are still there.
    floods[16..].iter().for_each(Talk::answered);
    assert_eq!(node.tables.flows.borrow().len(), 6 * 3);
}

#[test]
fn without_free_records_the_oldest_young_flow_makes_room() {
    let mut node = masquerading();
    node.tables.places = Some(4);
    node.tables.max_records = Some(1 + 3);
    let old = Talk::open(&node, CLIENT, VIP);
    for n in 1..20 {
        Talk::begin(&node, ("198.51.100.66", n), VIP).answered();
        assert!(node.tables.live().len() <= 3);
    }
    old.goes_on();
    for n in 1..3 {
        Talk::open(&node, ("198.51.100.67", n), VIP);
    }
    // Nobody young is left.
    let ask = key(("198.51.100.68", 1), VIP, Proto::TCP);
    assert_eq!(asks(&node, &ask, SYN, [1, 0]), Outcome::Dropped);
    assert_eq!(node.flows(), [0, 3]);
    assert!(node.tables.counted(Reason::FlowTableFull) > 0);
}

#[test]
fn the_whole_range_of_masquerade_ports_can_be_used_to_the_last_one() {
    let node = with_ports(40);
    let mut ports: Vec<u16> =
        (1..=40).map(|n| Talk::open(&node, ("198.51.100.9", n), VIP).received.sport.number()).collect();
    ports.sort_unstable();
    assert_eq!(ports, (2000..2040).collect::<Vec<_>>());
    let one_more = key(("198.51.100.9", 41), VIP, Proto::TCP);
    assert_eq!(asks(&node, &one_more, SYN, [1, 0]), Outcome::Dropped);
    assert_eq!(node.tables.counted(Reason::NoSourcePort), 1);
    // That one holds no port; to another protocol's endpoint all are free.
    ask(&node, CLIENT, VIP, Proto::UDP);
    assert_eq!(node.flows(), [2, 40]);
}

#[test]
fn a_large_range_is_used_to_the_last_port_and_a_flood_may_not_look_for_it_all_the_time() {
    // As many as there are when nobody else needs one.
    const ALL: u16 = 40_000;
    let mut node = with_ports(ALL);
    let others = (0..ALL).filter(|n| *n != 31_234).map(|n| key((NODE, 2000 + n), ENDPOINT, Proto::TCP));
    node.tables.taken = others.collect();
    let calls = |node: &Node| node.tables.looked.replace(0).div_ceil(128);
    for n in 0..12 {
        let talk = Talk::open(&node, CLIENT, VIP);
        assert_eq!(talk.received.sport.number(), 2000 + 31_234, "{n}");
        assert!(calls(&node) <= 313);
        for client in [false, true] {
            talk.says(FIN_ACK, client);
        }
        // Each search may begin anew.
        node.wait(1_100);
    }
    let held = Talk::open(&node, CLIENT, VIP);
    node.wait(1_100);
    calls(&node);
    let mut looked = Vec::new();
    for n in 1..=20 {
        let syn = key(("198.51.100.9", n), VIP, Proto::TCP);
        assert_eq!(asks(&node, &syn, SYN, [1, 0]), Outcome::Dropped);
        looked.push(calls(&node));
    }
    assert_eq!(looked[0], 313, "all ports");
    // What is left of 512, and then one call each.
    assert_eq!(looked[1], 1 + 512 - 312);
    assert_eq!(looked[2..], [1; 18]);
    assert_eq!(node.tables.counted(Reason::NoSourcePort), 20);
    held.goes_on();
}

#[test]
fn the_port_of_a_flow_that_is_closed_is_used_again_and_then_that_of_the_oldest_young_one() {
    let node = with_ports(4);
    let talks: Vec<Talk<'_>> = (1..=2).map(|n| Talk::open(&node, ("198.51.100.9", n), VIP)).collect();
    let young: Vec<Talk<'_>> = (3..=4)
        .map(|n| {
            node.wait(10);
            Talk::begin(&node, ("198.51.100.9", n), VIP)
        })
        .collect();
    for client in [false, true] {
        talks[0].says(FIN_ACK, client);
    }
    // The closed one first, though others are younger.
    let fifth = Talk::open(&node, ("198.51.100.9", 5), VIP);
    assert_eq!(fifth.received.sport, talks[0].received.sport);
    let sixth = Talk::open(&node, ("198.51.100.9", 6), VIP);
    assert_eq!(sixth.received.sport, young[0].received.sport);
    assert_eq!(node.tables.counted(Reason::Displaced), 1);
    for talk in [&talks[1], &young[1], &fifth, &sixth] {
        talk.answered();
        talk.goes_on();
    }
    // What the endpoint has still to say to one that has ended is for nobody else.
    let late = segment(&young[0].received.reversed(), SYN | ACK, [1, 1], b"", false);
    assert_eq!(shown(&node.leave(&node.enter(&late))), "203.0.113.1|80 > 198.51.100.9|6");
}

#[test]
fn ports_that_sockets_or_conversations_of_the_node_hold_are_left_to_them() {
    let mut node = with_ports(4);
    let [held, tracked] = [2000, 2003].map(|port| key((NODE, port), ENDPOINT, Proto::TCP));
    node.tables.sockets.insert(held);
    // What a CNI has masqueraded and the agent has read of.
    node.tables.taken.insert(tracked);
    // A port of a Service is none for masquerading.
    node.service(("0.0.0.0", 2001), Proto::TCP, frontend::NODE_PORT, &[ENDPOINT]);
    let talk = Talk::open(&node, CLIENT, VIP);
    assert_eq!(talk.received.sport.number(), 2002);
    let other = key(("198.51.100.10", 1), VIP, Proto::TCP);
    assert_eq!(asks(&node, &other, SYN, [1, 0]), Outcome::Dropped);
    assert_eq!(node.tables.counted(Reason::NoSourcePort), 1);
    // Nor are they to be had while flows have them that are over, or young.
    for over in [false, true] {
        for by_socket in [false, true] {
            let mut node = with_ports(1);
            let talk = Talk::begin(&node, CLIENT, VIP);
            if over {
                talk.answered();
                talk.goes_on();
                talk.says(FIN_ACK, true);
                talk.says(FIN_ACK, false);
            }
            let tuple = talk.received;
            let theirs = if by_socket { &mut node.tables.sockets } else { &mut node.tables.taken };
            theirs.insert(tuple);
            assert_eq!(asks(&node, &other, SYN, [1, 0]), Outcome::Dropped);
            if by_socket { &mut node.tables.sockets } else { &mut node.tables.taken }.clear();
            Talk::open(&node, ("198.51.100.10", 1), VIP);
        }
    }
}

#[test]
fn somebody_else_s_masquerade_to_our_endpoint_keeps_its_port_and_its_answers() {
    for proto in [Proto::TCP, Proto::UDP] {
        let node = with_ports(2);
        let guest = key((NODE, 2000), ENDPOINT, proto);
        node.tables.forwarded.set(true);
        // To nobody's endpoint it is nobody's business.
        node.leave(&frame(&key((NODE, 2000), ("10.244.2.8", 8080), proto), SYN, b"", false));
        assert_eq!(node.flows(), [0, 0]);
        node.leave(&frame(&guest, SYN, b"", false));
        assert_eq!(node.flows(), [1, 0]);
        node.tables.forwarded.set(false);
        for n in 1..3 {
            let left = asks(&node, &key(("198.51.100.9", n), VIP, proto), SYN, [1, 0]);
            let Outcome::Rewritten(left) = left else { panic!("{left:?}") };
            assert_eq!(tuple(&left).unwrap().tuple.sport.number(), 2001);
        }
        let back = frame(&guest.reversed(), SYN | ACK, b"", false);
        assert_eq!(run(&node.tables, &back, Hook::INGRESS, ETH), Outcome::Passed);
        // It never becomes old: what we note for others may go when there is no room.
        node.wait(2_500);
        node.leave(&segment(&guest, ACK, [1001, 1001], b"", false));
        let own: Vec<Flow> = node.tables.live().into_iter().filter(Flow::is_own).collect();
        assert_eq!(own.iter().map(|flow| flow.old).collect::<Vec<_>>(), [0]);
    }
}

#[test]
fn a_flow_that_is_closed_leaves_its_port_to_another_masquerade() {
    let back = |node: &Node, guest: &Tuple, flags| {
        run(&node.tables, &frame(&guest.reversed(), flags, b"", false), Hook::INGRESS, ETH)
    };
    let node = masquerading();
    let talk = Talk::open(&node, CLIENT, VIP);
    // A flow that lives has its port to itself.
    node.leave(&frame(&talk.received, SYN, b"", false));
    assert_ne!(back(&node, &talk.received, SYN | ACK), Outcome::Passed);
    talk.says(FIN_ACK, true);
    talk.says(FIN_ACK, false);
    assert!(the_flow(&node).is_closed(node.tables.now()));
    // The rest of it is its own.
    talk.goes_on();
    node.leave(&frame(&talk.received, SYN, b"", false));
    assert_eq!(back(&node, &talk.received, SYN | ACK), Outcome::Passed);
    assert!(node.tables.live().iter().all(Flow::is_own));

    let node = masquerading();
    let received = tuple(&ask(&node, CLIENT, VIP, Proto::UDP)).unwrap().tuple;
    node.leave(&frame(&received, 0, b"", false));
    assert_ne!(back(&node, &received, 0), Outcome::Passed);
    node.wait(1_100);
    node.leave(&frame(&received, 0, b"", false));
    assert_eq!(back(&node, &received, 0), Outcome::Passed);
}

#[test]
fn a_conversation_that_the_node_begins_from_a_service_s_port_is_ignored() {
    for (proto, node_ip, server) in [
        (Proto::TCP, NODE, "198.51.100.50"),
        (Proto::UDP, NODE, "198.51.100.50"),
        (Proto::TCP, "fd00:10::1", "2001:db8::50"),
        (Proto::UDP, "fd00:10::1", "2001:db8::50"),
    ] {
        let mut node = Node::new();
        let v4 = node_ip == NODE;
        let (any, endpoint) = if v4 { ("0.0.0.0", "10.244.2.7") } else { ("::", "fd00:244::2:7") };
        node.service((any, 30_200), proto, frontend::NODE_PORT, &[(endpoint, 8080)]);
        let asks = key((node_ip, 30_200), (server, 443), proto);
        let out = |flags, numbers| {
            let sent = segment(&asks, flags, numbers, b"", false);
            assert_eq!(run(&node.tables, &sent, Hook::EGRESS, ETH), Outcome::Passed);
        };
        let back = |flags, numbers| {
            let sent = segment(&asks.reversed(), flags, numbers, b"", false);
            assert_eq!(run(&node.tables, &sent, Hook::INGRESS, ETH), Outcome::Passed, "{proto}");
        };
        out(SYN, [100, 0]);
        assert_eq!(node.flows(), [1, 0]);
        back(SYN | ACK, [500, 101]);
        node.wait(2_000);
        out(ACK, [101, 501]);
        assert_eq!(node.flows(), [0, 1]);
        for _ in 0..3 {
            back(ACK, [501, 101]);
            out(ACK, [101, 501]);
        }
        assert_eq!(node.tables.counted(Reason::NodeTraffic), 1);
        // Others reach the Service as before.
        let other = if v4 { CLIENT } else { ("2001:db8::9", 40_000) };
        let question = frame(&key(other, (node_ip, 30_200), proto), SYN, b"", false);
        assert_ne!(node.enter(&question), question);
        // It ends like other flows, and then the other end may ask.
        node.wait(if proto == Proto::TCP { 86_401_000 } else { 121_000 });
        assert_eq!(sweep(&node), 2);
        let question = frame(&asks.reversed(), SYN, b"", false);
        assert_ne!(node.enter(&question), question, "{proto}");
    }
}

#[test]
fn who_was_asked_may_ask_when_that_is_closed() {
    let mut node = Node::new();
    node.service(("0.0.0.0", 30_200), Proto::TCP, frontend::NODE_PORT, &[ENDPOINT]);
    let asks = key((NODE, 30_200), ("198.51.100.50", 443), Proto::TCP);
    let syn = frame(&asks.reversed(), SYN, b"", false);
    // Only tried: nobody has answered.
    node.leave(&segment(&asks, SYN, [100, 0], b"", false));
    assert_ne!(node.enter(&syn), syn);
    assert!(!the_flow(&node).is_own());
    node.tables.take_apart(the_flow(&node).id);
    // A connection is one until it ends.
    node.leave(&segment(&asks, SYN, [100, 0], b"", false));
    node.enter(&segment(&asks.reversed(), SYN | ACK, [500, 101], b"", false));
    node.leave(&segment(&asks, ACK, [101, 501], b"", false));
    assert_eq!(run(&node.tables, &syn, Hook::INGRESS, ETH), Outcome::Passed);
    node.leave(&segment(&asks, FIN_ACK, [101, 501], b"", false));
    node.enter(&segment(&asks.reversed(), FIN_ACK, [501, 102], b"", false));
    assert_ne!(node.enter(&syn), syn);
}

#[test]
fn the_node_may_ask_over_udp_whom_it_has_taken_for_a_client() {
    // Its question left before anybody looked, and the answer was taken for a question.
    let mut node = Node::new();
    node.service(("0.0.0.0", 30_200), Proto::UDP, frontend::NODE_PORT, &[ENDPOINT]);
    let asks = key((NODE, 30_200), ("198.51.100.50", 443), Proto::UDP);
    let back = frame(&asks.reversed(), 0, b"", false);
    assert_ne!(node.enter(&back), back);
    assert!(!the_flow(&node).is_own());
    assert_eq!(run(&node.tables, &frame(&asks, 0, b"", false), Hook::EGRESS, ETH), Outcome::Passed);
    assert!(the_flow(&node).is_own());
    assert_eq!(run(&node.tables, &back, Hook::INGRESS, ETH), Outcome::Passed);
}

#[test]
fn an_answer_that_ipvs_has_translated_is_the_flow_s_and_nothing_that_the_node_says() {
    // IPVS knows its connections until they time out, also those that have become ours.
    for (proto, from) in
        [Proto::TCP, Proto::UDP].into_iter().flat_map(|proto| [(proto, false), (proto, true)])
    {
        let node = masquerading();
        let ask = key(CLIENT, VIP, proto);
        if from {
            take(&node, &adopted(&node, None, proto, true));
        } else {
            node.enter(&frame(&ask, SYN, b"", false));
        }
        let flow = the_flow(&node);
        node.wait(100);
        node.tables.forwarded.set(true);
        let answer = segment(&ask.reversed(), SYN | ACK, [500, 1], b"", false);
        assert_eq!(run(&node.tables, &answer, Hook::EGRESS, ETH), Outcome::Passed);
        assert_eq!(the_flow(&node).id, flow.id);
        assert!(the_flow(&node).seen[1] > flow.seen[1], "{proto}: it is seen");
        assert_eq!(node.tables.counted(Reason::NodeTraffic), 0);
        assert_eq!(node.tables.broken_flows(), Vec::<String>::new());
    }
}

#[test]
fn own_conversations_displace_only_each_other() {
    let mut node = Node::new();
    node.tables.places = Some(3);
    node.service(("0.0.0.0", 30_200), Proto::UDP, frontend::NODE_PORT, &[ENDPOINT]);
    let question = frame(&key(CLIENT, (NODE, 30_200), Proto::UDP), 0, b"", false);
    let entered = node.enter(&question);
    for n in 1..20 {
        node.leave(&frame(&key((NODE, 30_200), ("198.51.100.50", n), Proto::UDP), 0, b"", false));
    }
    assert_eq!(node.tables.live().iter().filter(|flow| flow.is_own()).count(), 3);
    assert_eq!(node.enter(&question), entered);
    assert_eq!(node.tables.live().len(), 4);
}

#[test]
fn an_address_that_shares_the_bit_of_an_endpoint_counts_as_one() {
    let mut node = Node::new();
    node.service(("0.0.0.0", 30_200), Proto::UDP, frontend::NODE_PORT, &[ENDPOINT]);
    let endpoint = node.tables.backends.values().next().unwrap().addr;
    let other =
        (0..u32::MAX).map(Addr::v4).find(|addr| addr.place() == endpoint.place() && *addr != endpoint);
    assert!(node.tables.is_endpoint(&endpoint) && node.tables.is_endpoint(&other.unwrap()));
}

#[test]
fn a_service_that_is_its_own_endpoint_is_followed_and_not_translated() {
    let mut node = Node::new();
    let here = ("192.168.10.1", 8080);
    node.service(here, Proto::TCP, 0, &[("+192.168.10.1", 8080)]);
    let talk = Talk::open(&node, CLIENT, here);
    assert_eq!(talk.received, talk.ask);
    let flow = the_flow(&node);
    assert!(flow.is_identity() && flow.old == 1);
    assert_eq!(node.tables.flows.borrow().len(), 1);
    talk.says(FIN_ACK, true);
    talk.says(FIN_ACK, false);
    assert!(the_flow(&node).is_closed(node.tables.now()));
}

#[test]
fn a_service_that_is_its_own_endpoint_elsewhere_is_masqueraded_all_the_same() {
    // M-8: its answers would not come back this way.
    for proto in [Proto::TCP, Proto::UDP] {
        let mut node = Node::new();
        let there = ("192.168.10.2", 8080);
        node.service(there, proto, 0, &[there]);
        let left = node.leave(&node.enter(&frame(&key(CLIENT, there, proto), SYN, b"", false)));
        let received = tuple(&left).unwrap().tuple;
        assert_eq!((received.src, received.dst), (addr(NODE), addr(there.0)));
        let back = node.leave(&node.enter(&answer(&left, SYN | ACK)));
        assert_eq!(shown(&back), "192.168.10.2|8080 > 198.51.100.9|40000");
        assert_eq!(node.tables.flows.borrow().len(), 2);
    }
}

/// Deletes the leg of the only flow that has this role.
fn cut(node: &Node, role: Role) {
    let flow = the_flow(node);
    assert!(node.tables.flows.borrow_mut().remove(&flow.pairs[role.index()].key(|| Some(&SECRET))).is_some());
}

#[test]
fn a_leg_that_somebody_deletes_is_written_again_when_its_client_goes_on() {
    for role in [Role::OUTER, Role::MIDDLE, Role::INNER] {
        for proto in [Proto::TCP, Proto::UDP] {
            let node = masquerading();
            let sent = key(CLIENT, VIP, proto);
            let received = if proto == Proto::TCP {
                Talk::open(&node, CLIENT, VIP).received
            } else {
                tuple(&ask(&node, CLIENT, VIP, proto)).unwrap().tuple
            };
            let before = the_flow(&node).id;
            cut(&node, role);
            assert_ne!(node.tables.broken_flows(), [""; 0]);
            node.wait(1_100);
            let next = [Talk::CLIENT.wrapping_add(1), Talk::ENDPOINT + 1];
            // Without its first leg it is found by its second, and the packet comes round once more.
            if role == Role::OUTER {
                assert_eq!(asks(&node, &sent, ACK, next), Outcome::Waits, "{proto}");
            }
            let left = asks(&node, &sent, ACK, next);
            let Outcome::Rewritten(left) = left else { panic!("{role:?} {proto} {left:?}") };
            assert_eq!(tuple(&left).unwrap().tuple, received, "{role:?} {proto}");
            assert_eq!(the_flow(&node).id, before);
            assert_eq!(node.tables.broken_flows(), [""; 0], "{role:?} {proto}");
        }
    }
}

#[test]
fn the_sweep_ends_flows_whose_packets_cannot_find_them() {
    let mut node = Node::new();
    node.service((NODE, 8080), Proto::TCP, 0, &[("+192.168.10.1", 8080)]);
    node.service(("0.0.0.0", 30_200), Proto::TCP, frontend::NODE_PORT, &[ENDPOINT]);
    node.leave(&frame(&key((NODE, 30_200), ("198.51.100.50", 443), Proto::TCP), SYN, b"", false));
    cut(&node, Role::OWN);
    assert_eq!(sweep(&node), 1);
    assert_eq!(node.tables.broken_flows(), [""; 0]);
    assert_eq!(node.tables.live(), []);
    Talk::open(&node, CLIENT, (NODE, 8080));
    cut(&node, Role::OUTER);
    assert_eq!(sweep(&node), 1);
    assert_eq!(node.tables.broken_flows(), [""; 0]);
    assert_eq!(node.tables.live(), []);
}

#[test]
fn a_flow_ends_when_another_one_has_taken_the_place_of_its_leg() {
    for role in [Role::MIDDLE, Role::INNER] {
        let node = with_ports(1);
        let talk = Talk::open(&node, CLIENT, VIP);
        cut(&node, role);
        if role == Role::MIDDLE {
            // The same client port through the other address: the same way to the endpoint.
            node.enter(&frame(&key(CLIENT, OTHER_VIP, Proto::TCP), SYN, b"", false));
        } else {
            Talk::open(&node, ("198.51.100.10", 1), OTHER_VIP);
        }
        node.wait(1_100);
        node.enter(&segment(&talk.ask, ACK, [Talk::CLIENT.wrapping_add(1), Talk::ENDPOINT + 1], b"", false));
        let flow = the_flow(&node);
        assert_eq!(flow.vip().0, &addr(OTHER_VIP.0), "{role:?}");
        assert_eq!(node.tables.broken_flows(), [""; 0], "{role:?}");
    }
}

#[test]
fn a_flow_that_is_claimed_is_not_taken_apart() {
    let node = masquerading();
    Talk::open(&node, CLIENT, VIP).says(FIN_ACK, true);
    let flow = the_flow(&node);
    assert!(node.tables.claim(flow.id.index()));
    assert_eq!(node.tables.take_apart(flow.id), 0);
    assert_eq!(flow::look_after(&node.tables, flow.id), 0);
    // Its client begins anew, and has to wait until it has been dealt with.
    assert_eq!(asks(&node, &key(CLIENT, VIP, Proto::TCP), SYN, [9, 0]), Outcome::Dropped);
    node.tables.unclaim(flow.id.index());
    assert!(matches!(asks(&node, &key(CLIENT, VIP, Proto::TCP), SYN, [9, 0]), Outcome::Rewritten(_)));
    assert_ne!(the_flow(&node).id, flow.id);
}

#[test]
fn a_flow_that_has_ended_is_no_longer_there_under_its_id() {
    let node = masquerading();
    Talk::open(&node, CLIENT, VIP);
    let flow = the_flow(&node);
    assert_eq!(node.tables.take_apart(flow.id), 1);
    assert_eq!(node.tables.take_apart(flow.id), 1, "it is gone");
    Talk::open(&node, CLIENT, VIP);
    assert_eq!(node.tables.take_apart(flow.id), 1);
    let next = the_flow(&node);
    assert_eq!((next.id.index(), next.id != flow.id), (flow.id.index(), true));
    assert!(next.seen[FORWARD] != 0 && next.seen[REPLY] != 0 && Port(0) != next.node().1);
}

#[test]
fn a_leg_that_is_left_behind_is_in_nobody_s_way() {
    let node = with_ports(1);
    let first = Talk::open(&node, CLIENT, VIP);
    let legs = node.tables.flows.borrow().clone();
    assert_eq!(node.tables.take_apart(the_flow(&node).id), 1);
    // The kernel could not delete them.
    *node.tables.flows.borrow_mut() = legs;
    let answer = segment(&first.received.reversed(), ACK, [1, 1], b"", false);
    assert_eq!(run(&node.tables, &answer, Hook::INGRESS, ETH), Outcome::Passed, "they lead nowhere");
    let second = Talk::open(&node, CLIENT, VIP);
    assert_eq!(second.received, first.received);
    assert_eq!(node.tables.flows.borrow().len(), 3);
}

/// A connection of another proxy from the client to the Service, as the agent tells of it.
fn adopted(node: &Node, source: Option<(&str, u16)>, proto: Proto, meant: bool) -> Flow {
    let asked = key(CLIENT, VIP, proto);
    let end = |(text, port)| (addr(text), Port::new(port));
    let service = node.tables.frontends[&FrontendKey::new(asked.dst, asked.dport, proto)].service;
    let (index, backend) =
        node.tables.backends.iter().find(|(_, backend)| backend.service == service).unwrap();
    let backend = [service, *index, backend.generation];
    Flow::adopted(&asked, end(ENDPOINT), source.map(end), backend, (true, meant), node.tables.now())
}

/// Has the tables adopt it; the index of its record.
fn adopt(node: &Node, flow: &Flow) -> u32 {
    adopt::adopt(&node.tables, adopt::From::Proxy, |record| {
        *record = Flow { id: record.id, claims: record.claims, ..*flow };
        true
    })
}

/// Which flow is in a record.
fn id_at(node: &Node, index: u32) -> FlowId {
    node.tables.records.borrow()[index as usize].id
}

/// The same, and it is ours from then on.
fn take(node: &Node, flow: &Flow) -> u32 {
    let index = adopt(node, flow);
    assert_eq!(adopt::take(&node.tables, id_at(node, index)), 1, "{index:#x}");
    index
}

#[test]
fn what_another_proxy_has_begun_is_netfilter_s_until_it_is_taken_and_then_a_flow_like_others() {
    for proto in [Proto::TCP, Proto::UDP] {
        let node = masquerading();
        let (ask, asked) = (key(CLIENT, VIP, proto), key(CLIENT, ENDPOINT, proto));
        let run_at = |hook, tuple: &Tuple| {
            let packet = match proto {
                Proto::TCP => segment(tuple, ACK, [7, 9], b"", false),
                _ => frame(tuple, 0, b"?", false),
            };
            run(&node.tables, &packet, hook, ETH)
        };
        let index = adopt(&node, &adopted(&node, None, proto, true));
        assert_ne!(index, 0);
        // As netfilter has them: the question before and behind it, and the answer.
        assert_eq!(run_at(Hook::INGRESS, &ask), Outcome::Passed);
        assert_eq!(run_at(Hook::EGRESS, &asked), Outcome::Passed);
        assert_eq!(run_at(Hook::INGRESS, &asked.reversed()), Outcome::Passed);
        let seen = the_flow(&node).seen;
        node.tables.now.set(node.tables.now.get() + 1_000_000_000);
        assert_eq!(run_at(Hook::EGRESS, &ask.reversed()), Outcome::Passed);
        assert_eq!(run_at(Hook::INGRESS, &ask), Outcome::Passed);
        assert!(
            the_flow(&node).seen[0] > seen[0] && the_flow(&node).seen[1] > seen[1],
            "{proto}: it is seen"
        );
        // An answer that netfilter has not translated.
        let Outcome::Rewritten(back) = run_at(Hook::EGRESS, &asked.reversed()) else { panic!("{proto}") };
        assert_eq!(tuple(&back).unwrap().tuple, ask.reversed());
        assert_eq!(adopt::take(&node.tables, id_at(&node, index)), 1);
        assert_eq!(adopt::take(&node.tables, id_at(&node, index)), 1, "it is");
        let Outcome::Rewritten(there) = run_at(Hook::INGRESS, &ask) else { panic!("{proto}") };
        assert_eq!(tuple(&there).unwrap().tuple, asked);
        assert_eq!(run_at(Hook::INGRESS, &asked.reversed()), Outcome::Passed);
        let Outcome::Rewritten(back) = run_at(Hook::EGRESS, &asked.reversed()) else { panic!("{proto}") };
        assert_eq!(tuple(&back).unwrap().tuple, ask.reversed());
        assert_eq!(node.tables.broken_flows(), Vec::<String>::new());
    }
}

#[test]
fn what_is_netfilter_s_ends_like_others() {
    let node = masquerading();
    adopt(&node, &adopted(&node, None, Proto::TCP, true));
    let ask = key(CLIENT, VIP, Proto::TCP);
    let says =
        |hook, tuple: &Tuple, flags| run(&node.tables, &segment(tuple, flags, [7, 9], b"", false), hook, ETH);
    says(Hook::INGRESS, &ask, FIN_ACK);
    says(Hook::EGRESS, &ask.reversed(), FIN_ACK);
    assert_eq!(the_flow(&node).fin, [1, 1]);
    // A new connection from the same port is ours.
    assert!(matches!(says(Hook::INGRESS, &ask, SYN), Outcome::Rewritten(_)));
    assert!(the_flow(&node).state == State::LIVE);
    // And silence ends it.
    let node = masquerading();
    adopt(&node, &adopted(&node, None, Proto::UDP, true));
    node.tables.now.set(node.tables.now.get() + 121_000_000_000);
    assert_eq!(sweep(&node), 1);
    assert_eq!(node.tables.flows.borrow().len(), 0);
}

#[test]
fn without_its_endpoint_what_is_netfilter_s_and_over_udp_is_chosen_anew() {
    let mut node = masquerading();
    let flow = adopted(&node, None, Proto::UDP, true);
    adopt(&node, &flow);
    node.tables.backends.get_mut(&flow.backend).unwrap().generation += 1;
    let next = run(&node.tables, &frame(&key(CLIENT, VIP, Proto::UDP), 0, b"?", false), Hook::INGRESS, ETH);
    assert!(matches!(next, Outcome::Rewritten(_)), "{next:?}");
    assert!(the_flow(&node).state == State::LIVE);
}

#[test]
fn one_whose_middle_pair_is_another_s_stays_netfilter_s() {
    let node = masquerading();
    let talk = Talk::open(&node, CLIENT, VIP);
    // To another frontend, with the same endpoint behind it.
    let mut flow = adopted(&node, None, Proto::TCP, true);
    let asked = key(CLIENT, (NODE, 30_999), Proto::TCP);
    flow.near[0] = asked.write_pair(&mut flow.pairs[0]) as u8;
    let answer = adopt(&node, &flow);
    assert_ne!(answer & crate::abi::ask::ALONE, 0);
    assert_eq!(adopt::take(&node.tables, id_at(&node, answer & !crate::abi::ask::ALONE)), 0);
    let passes = segment(&asked, ACK, [7, 9], b"", false);
    assert_eq!(run(&node.tables, &passes, Hook::INGRESS, ETH), Outcome::Passed);
    talk.goes_on();
    // Behind a masquerade that is found out later.
    let mut flow = adopted(&node, Some((NODE, 61_234)), Proto::TCP, true);
    let asked = key(CLIENT, (NODE, 30_998), Proto::TCP);
    flow.near[0] = asked.write_pair(&mut flow.pairs[0]) as u8;
    let index = adopt(&node, &flow);
    assert_eq!(adopt::take(&node.tables, id_at(&node, index)), 0);
    talk.goes_on();
    assert_eq!(node.tables.live().len(), 3);
}

#[test]
fn the_last_words_of_an_adopted_connection_are_believed_though_nothing_before_them_is_known() {
    let node = masquerading();
    take(&node, &adopted(&node, None, Proto::TCP, true));
    let (ask, asked) = (key(CLIENT, VIP, Proto::TCP), key(CLIENT, ENDPOINT, Proto::TCP));
    let says = |hook, tuple: &Tuple, numbers| {
        run(&node.tables, &segment(tuple, FIN_ACK, numbers, b"", false), hook, ETH);
    };
    says(Hook::INGRESS, &ask, [0x7000_0000, 0x3000_0000]);
    assert_eq!(the_flow(&node).fin, [1, 0]);
    // By now it is known.
    says(Hook::EGRESS, &asked.reversed(), [0x1000_0000, 0x7000_0001]);
    assert_eq!(the_flow(&node).fin, [1, 0]);
    says(Hook::EGRESS, &asked.reversed(), [0x3000_0000, 0x7000_0001]);
    assert_eq!(the_flow(&node).fin, [1, 1]);
}

#[test]
fn a_masqueraded_one_keeps_its_port() {
    let node = masquerading();
    let (ask, seen) = (key(CLIENT, VIP, Proto::UDP), key((NODE, 61_234), ENDPOINT, Proto::UDP));
    let index = adopt(&node, &adopted(&node, Some((NODE, 61_234)), Proto::UDP, true));
    // As netfilter has them.
    let run_at = |hook, tuple: &Tuple| run(&node.tables, &frame(tuple, 0, b"?", false), hook, ETH);
    for (hook, tuple) in [
        (Hook::INGRESS, ask),
        (Hook::EGRESS, seen),
        (Hook::INGRESS, seen.reversed()),
        (Hook::EGRESS, ask.reversed()),
    ] {
        assert_eq!(run_at(hook, &tuple), Outcome::Passed, "{tuple:?}");
    }
    assert_eq!(adopt::take(&node.tables, id_at(&node, index)), 1);
    let left = node.leave(&node.enter(&frame(&ask, 0, b"?", false)));
    assert_eq!(tuple(&left).unwrap().tuple, seen);
    let back = node.leave(&node.enter(&frame(&seen.reversed(), 0, b"!", false)));
    assert_eq!(tuple(&back).unwrap().tuple, ask.reversed());
    assert_eq!(node.tables.broken_flows(), Vec::<String>::new());
}

#[test]
fn an_answer_to_a_masquerade_of_another_proxy_is_no_question_though_it_has_the_port_of_a_service() {
    let mut node = masquerading();
    node.service(("0.0.0.0", 30_201), Proto::UDP, frontend::NODE_PORT, &[("10.244.2.8", 8080)]);
    node.tables.config.as_mut().unwrap().flags |= config::LEAVE_MIDDLE;
    let (ask, seen) = (key(CLIENT, VIP, Proto::UDP), key((NODE, 30_201), ENDPOINT, Proto::UDP));
    let passes = |hook, tuple: &Tuple| {
        assert_eq!(run(&node.tables, &frame(tuple, 0, b"?", false), hook, ETH), Outcome::Passed, "{tuple:?}");
    };
    // Not adopted yet: the masqueraded question says that the node speaks from there.
    node.tables.forwarded.set(true);
    passes(Hook::EGRESS, &seen);
    passes(Hook::INGRESS, &seen.reversed());
    assert!(the_flow(&node).is_own());
    // Adopted: by its own pair, whoever speaks first, and however often.
    let index = adopt(&node, &adopted(&node, Some((NODE, 30_201)), Proto::UDP, true));
    assert!(!the_flow(&node).is_own());
    passes(Hook::INGRESS, &seen.reversed());
    node.wait(2_000);
    passes(Hook::EGRESS, &seen);
    passes(Hook::INGRESS, &seen.reversed());
    assert!(the_flow(&node).is_left(id_at(&node, index)));
    assert_eq!(adopt::take(&node.tables, id_at(&node, index)), 1);
    let Outcome::Rewritten(back) =
        run(&node.tables, &frame(&seen.reversed(), 0, b"!", false), Hook::INGRESS, ETH)
    else {
        panic!("not translated");
    };
    assert_eq!(tuple(&back).unwrap().tuple, key(ENDPOINT, CLIENT, Proto::UDP));
    assert_eq!(node.tables.broken_flows(), Vec::<String>::new());
    assert_ne!(node.enter(&frame(&ask, 0, b"?", false)), frame(&ask, 0, b"?", false));
}

#[test]
fn a_client_that_was_bound_to_its_endpoint_stays_so() {
    let node = masquerading();
    let mut flow = adopted(&node, None, Proto::TCP, true);
    flow.flags |= crate::abi::flow_flags::AFFINITY;
    let index = adopt(&node, &flow);
    let found: Vec<u32> = node.tables.affinity.borrow().values().map(|bound| bound.backend).collect();
    assert_eq!(found, [flow.backend]);
    assert_eq!(adopt::take(&node.tables, id_at(&node, index)), 1);
}

#[test]
fn a_connection_of_ours_is_newer_than_one_that_would_have_its_ends() {
    let node = masquerading();
    let talk = Talk::open(&node, CLIENT, VIP);
    assert_eq!(adopt(&node, &adopted(&node, None, Proto::TCP, true)), 0);
    talk.goes_on();
    // A datagram tells nothing of the kind: the conversation has begun before it.
    let first = ask(&node, CLIENT, VIP, Proto::UDP);
    assert_ne!(tuple(&first).unwrap().tuple.sport.number(), 61_234);
    let index = take(&node, &adopted(&node, Some((NODE, 61_234)), Proto::UDP, false));
    let next = ask(&node, CLIENT, VIP, Proto::UDP);
    assert_eq!(tuple(&next).unwrap().tuple.sport.number(), 61_234);
    // Adopted once, it stays as it is, whatever else connection tracking still has.
    let again = adopted(&node, Some((NODE, 61_234)), Proto::UDP, false);
    assert_eq!(adopt(&node, &again), index | crate::abi::ask::KNOWN);
    assert_eq!(adopt(&node, &adopted(&node, Some((NODE, 61_235)), Proto::UDP, false)), 0);
    assert_eq!(ask(&node, CLIENT, VIP, Proto::UDP), next);
    assert_eq!(node.flows()[1], 1);
    assert_eq!(node.tables.broken_flows(), Vec::<String>::new());
}

#[test]
fn without_room_nothing_is_adopted_and_nothing_left_behind() {
    let mut node = masquerading();
    node.tables.max_flows = Some(2);
    let masqueraded = adopted(&node, Some((NODE, 61_234)), Proto::TCP, true);
    let index = adopt(&node, &masqueraded);
    assert_eq!(adopt::take(&node.tables, id_at(&node, index)), 0);
    assert!(the_flow(&node).state == State::LEFT, "it stays netfilter's");
    node.tables.max_flows = Some(0);
    assert_eq!(adopt(&node, &adopted(&node, None, Proto::UDP, true)), crate::abi::ask::NO_ROOM);
    assert_eq!(node.tables.flows.borrow().len(), 2);
    let mut node = masquerading();
    node.tables.max_records = Some(1);
    assert_eq!(adopt(&node, &masqueraded), crate::abi::ask::NO_ROOM);
    assert_eq!(node.tables.live().len(), 0);
}

#[test]
fn a_pause_holds_what_is_new_until_it_ends_and_one_that_no_agent_can_have_begun_holds_nothing() {
    let longest = LONGEST_PAUSE / 1_000_000;
    let node = masquerading();
    let now = node.tables.now.get();
    let talk = Talk::open(&node, CLIENT, VIP);
    let begins = |port| {
        run(
            &node.tables,
            &frame(&key((CLIENT.0, port), VIP, Proto::TCP), SYN, b"", false),
            Hook::INGRESS,
            ETH,
        )
    };
    node.tables.paused_until.set(now + LONGEST_PAUSE);
    assert_eq!(begins(1), Outcome::Waits);
    assert_eq!(
        tuple(&node.leave(&node.enter(&segment(&talk.ask, ACK, [7, 9], b"", false)))).unwrap().tuple,
        talk.received
    );
    node.wait(longest - 1);
    assert_eq!(begins(1), Outcome::Waits);
    node.wait(1);
    assert!(matches!(begins(1), Outcome::Rewritten(_)));
    for (port, until) in [(2, u64::MAX), (3, u64::MAX >> 1), (4, node.tables.now.get() + 2 * LONGEST_PAUSE)] {
        node.tables.paused_until.set(until);
        assert!(matches!(begins(port), Outcome::Rewritten(_)), "{until}");
    }
}

#[test]
fn what_is_left_to_another_proxy_passes_and_what_is_there_goes_on() {
    let mut node = masquerading();
    let talk = Talk::open(&node, CLIENT, VIP);
    let set = |node: &mut Node, flags| node.tables.config.as_mut().unwrap().flags = flags;
    let keep = node.tables.config.unwrap().flags;
    let enters = |node: &Node, proto, flags| {
        run(
            &node.tables,
            &frame(&key(("198.51.100.10", 1), VIP, proto), flags, b"", false),
            Hook::INGRESS,
            ETH,
        )
    };
    let received = talk.received;
    set(&mut node, keep | config::LEAVE_NEW);
    for (proto, flags) in [(Proto::TCP, SYN), (Proto::TCP, ACK), (Proto::UDP, 0), (Proto::SCTP, 0)] {
        assert_eq!(enters(&node, proto, flags), Outcome::Passed, "{proto} {flags}");
    }
    let goes_on = node.leave(&node.enter(&segment(&key(CLIENT, VIP, Proto::TCP), ACK, [7, 9], b"", false)));
    assert_eq!(tuple(&goes_on).unwrap().tuple, received);
    set(&mut node, keep | config::LEAVE_MIDDLE);
    assert_eq!(enters(&node, Proto::TCP, ACK), Outcome::Passed);
    assert_ne!(enters(&node, Proto::TCP, SYN), Outcome::Passed);
    assert_ne!(enters(&node, Proto::UDP, 0), Outcome::Passed);
}

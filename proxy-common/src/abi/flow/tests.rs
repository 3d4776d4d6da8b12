//! Pairs, their keys, and values that were read in halves.

use std::net::IpAddr;

use super::*;
use crate::addr::{Addr, Port, Proto};
use crate::testing::SECRET;

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

#[test]
fn both_directions_have_one_pair() {
    let ends = [("10.0.0.1", 80), ("10.0.0.1", 81), ("10.0.0.2", 80), ("fd00::1", 80), ("fd01::1", 80)];
    for (a, p) in ends {
        for (b, q) in ends {
            let there = Tuple::new(addr(a), Port::new(p), addr(b), Port::new(q), Proto::TCP);
            let back = there.reversed();
            assert_eq!(there.pair(), back.pair(), "{a}:{p} {b}:{q}");
            assert_eq!(there.is_rising() == back.is_rising(), there == back, "{a}:{p} {b}:{q}");
            let from = usize::from(!there.is_rising());
            assert_eq!(there.pair().tuple(from), there);
        }
    }
}

fn some_tuples() -> Vec<Tuple> {
    let ends = ["10.0.0.1", "10.0.0.2", "10.1.0.1", "192.168.0.1", "255.255.255.255"];
    let ends6 = ["::1:0:0:1", "fd00::1", "fd00::2", "fd00:0:0:1::1", "fd00:1::1", "2001:db8::ffff:a00:1"];
    let ports = [0, 1, 80, 256, 65_535];
    let mut tuples = Vec::new();
    for family in [&ends[..], &ends6[..]] {
        for (a, b) in family.iter().flat_map(|a| family.iter().map(move |b| (a, b))) {
            for (p, q) in ports.iter().flat_map(|p| ports.iter().map(move |q| (p, q))) {
                for proto in [Proto::TCP, Proto::UDP] {
                    tuples.push(Tuple::new(addr(a), Port::new(*p), addr(b), Port::new(*q), proto));
                }
            }
        }
    }
    tuples
}

#[test]
fn a_packet_finds_the_key_of_its_pair_and_no_other() {
    let mut keys = std::collections::HashMap::new();
    for tuple in some_tuples() {
        let pair = tuple.pair();
        let (key, source) = tuple.key(tuple.src.is_v4(), || Some(&SECRET));
        assert_eq!(key, pair.key(|| Some(&SECRET)), "{tuple:?}");
        assert_eq!(pair.tuple(source), tuple);
        assert_eq!(*keys.entry(key).or_insert(pair), pair, "two pairs have one key");
    }
    // Another node's keys of IPv6 are others.
    let mut other = SECRET;
    other.factors[1][0] ^= 1 << 40;
    let pair = some_tuples().pop().unwrap().pair();
    assert_ne!(pair.key(|| Some(&SECRET)), pair.key(|| Some(&other)));
}

#[test]
fn a_leg_that_is_half_another_one_is_none() {
    let words = |leg: &Leg| [leg.id.0, leg.upper, leg.lower, leg.rest];
    let tuples = some_tuples();
    let (mut mixed, mut taken) = (0, 0);
    // Legs as alike as they come: of neighbouring records, that differ in an address or a port.
    for (n, pair) in tuples.windows(2).enumerate() {
        let leg = |n: usize, tuple: &Tuple| {
            let [a, b, c, d] = tuple.dst.0.map(u64::from);
            // What packets have noted is theirs.
            let upper = if tuple.dst.is_v4() { 0 } else { a | b << 32 };
            let (id, lower, rest) = (FlowId(n as u64).next(), c | d << 32, u64::from(tuple.dport.0));
            let key = tuple.pair().key(|| Some(&SECRET));
            (Leg { id, upper, lower, rest }.sealed(&key), key)
        };
        let ((one, key), (other, other_key)) = (leg(n, &pair[0]), leg(n + 1, &pair[1]));
        assert!(one.is_of(&key) && other.is_of(&other_key));
        for mask in 1..16 {
            let mut mix = words(&one);
            (0..4).filter(|bit| mask >> bit & 1 != 0).for_each(|bit| mix[bit] = words(&other)[bit]);
            let mix = Leg { id: FlowId(mix[0]), upper: mix[1], lower: mix[2], rest: mix[3] };
            if mix != one && key != other_key {
                mixed += 1;
                taken += usize::from(mix.is_of(&key));
            }
        }
    }
    assert!(mixed > 10_000 && taken < mixed / 10_000, "{taken} of {mixed} were taken for whole ones");
}

#[test]
fn half_a_masquerade_choice_reads_as_none() {
    let pair =
        Tuple::new(addr("10.0.0.1"), Port::new(4000), addr("10.0.0.9"), Port::new(80), Proto::TCP).pair();
    let mut flow = Flow { source: pair.seal() | 1, ..Flow::EMPTY };
    assert!(!flow.has_source());
    flow.pairs[2] = pair;
    assert!(flow.has_source());
    flow.pairs[2].ports[0] = Port::new(4001);
    assert!(!flow.has_source());
    assert!(!Flow::EMPTY.has_source());
}

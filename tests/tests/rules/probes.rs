//! Every probe after every step.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proptest::prelude::*;
use proptest::test_runner::Config;
use proxy_common::addr::Proto;

use super::draw;
use super::facts::{
    Edit, FAMILIES, Facts, OWN_NODE, cluster_ip, endpoint_ip, endpoint_node, ip, own_addresses, vip,
};
use super::objects::{HOST_NETNS, node_change, service_change, slice_change};
use super::oracle::{Class, Expected, PortId, Ruling, Target};
use super::system::{Observed, System};

/// Network namespace of the pod whose sockets call.
const POD_NETNS: u64 = 4_711;

/// Who probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Prober {
    /// A packet from an address.
    Packet(IpAddr),
    /// A process of the node.
    Host,
    /// A process of a pod.
    Pod,
}

/// A node under test, with what its clients should stick to.
struct Trial {
    facts: Facts,
    system: System,
    remembered: BTreeMap<(PortId, Prober), Target>,
    next_port: u16,
}

fn sources(six: bool) -> Vec<IpAddr> {
    let mut all: Vec<_> = [0, 1, 3, 10].into_iter().map(|n| endpoint_ip(n, six)).collect();
    all.push(ip("198.51.100.7", "2001:db8:51::7", six));
    all.push(ip("10.99.0.7", "fd00:99::7", six));
    all.push(vip(1, six));
    all
}

fn destinations(six: bool) -> BTreeSet<IpAddr> {
    let cluster = (1..=4).map(|n| cluster_ip(n, six));
    cluster
        .chain((1..=5).map(|n| vip(n, six)))
        .chain(own_addresses(six))
        .chain([endpoint_ip(3, six)])
        .collect()
}

const TRANSPORTS: [(Proto, u16); 13] = [
    (Proto::TCP, 80),
    (Proto::TCP, 53),
    (Proto::UDP, 53),
    (Proto::SCTP, 80),
    (Proto::UDP, 80),
    (Proto::TCP, 30_001),
    (Proto::TCP, 30_002),
    (Proto::TCP, 30_003),
    (Proto::UDP, 30_001),
    (Proto::UDP, 30_002),
    (Proto::SCTP, 30_001),
    (Proto::SCTP, 30_002),
    (Proto::TCP, 8_080),
];

impl Trial {
    fn new(facts: Facts) -> Self {
        let system = System::new(&facts);
        Self { facts, system, remembered: BTreeMap::new(), next_port: 30_000 }
    }

    fn step(&mut self, burst: &[Edit]) {
        let mut changes = Vec::new();
        for edit in burst {
            let (services, slices, node) = self.facts.edit(edit);
            changes.extend(services.iter().map(|n| service_change(&self.facts, *n)));
            changes.extend(slices.iter().map(|n| slice_change(&self.facts, *n)));
            changes.extend(node.then(|| node_change(&self.facts)));
        }
        self.system.hear(changes);
        // A record ends with its port's affinity and when its endpoint is not used any more.
        let sticky = self.facts.sticky();
        self.remembered.retain(|(id, _), target| sticky.get(id).is_some_and(|used| used.contains(target)));
    }

    /// Probes everything.
    fn probe_all(&mut self) -> Result<(), String> {
        for six in FAMILIES {
            for dst in destinations(six) {
                for (proto, port) in TRANSPORTS {
                    let to = (dst, port);
                    for source in sources(six).into_iter().filter(|source| *source != dst) {
                        let ruling = self.facts.ruling(source, self.facts.class(source), dst, proto, port);
                        self.probe(Prober::Packet(source), to, proto, &ruling)?;
                        if ruling.port.is_none() {
                            break; // Nobody's destination: all sources are alike.
                        }
                    }
                    let own = own_addresses(six)[self.facts.node.primary];
                    let ruling = self.facts.ruling(own, Class::Host, dst, proto, port);
                    self.probe(Prober::Host, to, proto, &ruling)?;
                    let pod = endpoint_ip(1, six);
                    let ruling = self.facts.ruling(pod, Class::Pod, dst, proto, port);
                    self.probe(Prober::Pod, to, proto, &ruling)?;
                }
            }
        }
        Ok(())
    }

    fn probe(&mut self, who: Prober, to: Target, proto: Proto, ruling: &Ruling) -> Result<(), String> {
        let flows = if matches!(ruling.expected, Expected::Forward(_)) { 3 } else { 1 };
        for _ in 0..flows {
            self.next_port = if self.next_port == u16::MAX { 30_001 } else { self.next_port + 1 };
            let observed = match who {
                Prober::Packet(source) => {
                    self.system.packet((source, self.next_port), to, proto, &here(source.is_ipv6()))
                }
                Prober::Host => Ok(self.system.call(to, proto, HOST_NETNS, true)),
                Prober::Pod => Ok(self.system.call(to, proto, POD_NETNS, proto != Proto::UDP)),
            };
            let fault = match observed {
                Ok(observed) => match self.judge(who, ruling, &observed) {
                    Ok(()) => continue,
                    Err(fault) => format!("{fault}: {observed:?}"),
                },
                Err(fault) => fault,
            };
            return Err(self.report(who, to, proto, ruling, &fault));
        }
        Ok(())
    }

    fn judge(&mut self, who: Prober, ruling: &Ruling, observed: &Observed) -> Result<(), &'static str> {
        // What a pod's socket may leave to the packets: where the client's address counts, or has to be hidden.
        let operator = &self.facts.operator;
        let hidden = operator.masquerade_all || operator.masquerade_local;
        let left = who == Prober::Pod && (ruling.affinity || ruling.restricted || hidden);
        let expected = match (&ruling.expected, observed) {
            (_, Observed::Pass) if left => return Ok(()),
            (Expected::Pass, Observed::Pass)
            | (Expected::Refuse, Observed::Refuse)
            | (Expected::Drop, Observed::Drop) => return Ok(()),
            (Expected::Forward(expected), Observed::Forward(..)) => expected,
            _ => return Err("another outcome"),
        };
        let Observed::Forward(target, source) = observed else {
            return Err("another outcome");
        };
        let masqueraded = *expected.get(target).ok_or("an endpoint that is not in the set")?;
        match (masqueraded, source, who) {
            (_, None, Prober::Host | Prober::Pod) | (false, None, _) => {}
            (true, Some(source), _) if self.facts.may_masquerade(*source) => {}
            (true, None, _) => return Err("not masqueraded"),
            (_, Some(_), _) => return Err("masqueraded, or with a strange address"),
        }
        if let (true, Some(id)) = (ruling.affinity, ruling.port) {
            // the record holds as long as its endpoint is in the set.
            let before = self.remembered.insert((id, who), *target);
            if before.is_some_and(|before| before != *target && expected.contains_key(&before)) {
                return Err("affinity lost");
            }
        }
        Ok(())
    }

    /// P-25: every endpoint gets flows, for each Service address that has several.
    fn spread(&mut self) -> Result<(), String> {
        for six in FAMILIES {
            let source = endpoint_ip(1, six);
            for dst in (1..=4).map(|n| cluster_ip(n, six)) {
                let ruling = self.facts.ruling(source, self.facts.class(source), dst, Proto::TCP, 80);
                let Expected::Forward(set) = &ruling.expected else { continue };
                let mut missing: BTreeSet<_> = set.keys().copied().collect();
                for _ in 0..if ruling.affinity { 0 } else { 50 * set.len() } {
                    self.next_port = if self.next_port == u16::MAX { 30_001 } else { self.next_port + 1 };
                    let from = (source, self.next_port);
                    if let Observed::Forward(target, _) =
                        self.system.packet(from, (dst, 80), Proto::TCP, &here(six))?
                    {
                        missing.remove(&target);
                    }
                }
                if !ruling.affinity && !missing.is_empty() {
                    let fault = format!("never chosen: {missing:?}");
                    return Err(self.report(Prober::Packet(source), (dst, 80), Proto::TCP, &ruling, &fault));
                }
            }
        }
        Ok(())
    }

    fn report(&self, who: Prober, to: Target, proto: Proto, ruling: &Ruling, fault: &str) -> String {
        format!(
            "{fault}\nprobe: {who:?} -> {}:{} protocol {}\nthe rules say: {ruling:?}\n{:#?}\ntables:\n{}",
            to.0,
            to.1,
            proto.0,
            self.facts,
            self.system.dump()
        )
    }
}

/// Addresses behind the bridge.
fn here(six: bool) -> BTreeSet<IpAddr> {
    (0..9).filter(|n| endpoint_node(*n) == Some(OWN_NODE)).map(|n| endpoint_ip(n, six)).collect()
}

proptest! {
    #![proptest_config(Config { failure_persistence: None, max_shrink_iters: 400, ..Config::default() })]

    #[test]
    fn every_new_flow_gets_what_the_rules_say_after_every_change(
        facts in draw::facts(),
        bursts in prop::collection::vec(draw::burst(), 0..6),
    ) {
        let mut trial = Trial::new(facts);
        trial.probe_all().map_err(TestCaseError::fail)?;
        for burst in &bursts {
            trial.step(burst);
            trial.probe_all().map_err(TestCaseError::fail)?;
        }
        trial.spread().map_err(TestCaseError::fail)?;
    }
}

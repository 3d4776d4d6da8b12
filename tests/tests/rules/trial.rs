//! Every probe after every step.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proxy_common::addr::Proto;

use super::facts::{Edit, FAMILIES, Facts, Stale, cluster_ip, endpoint_ip, ip, own_addresses, vip};
use super::objects::changes;
use super::oracle::{Class, Expected, PortId, Ruling, Target};
use super::system::{ACK, Caller, Observed, Programs, SYN, SYN_ACK, System};

/// Who probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Prober {
    /// A packet from an address.
    Packet(IpAddr),
    /// A process.
    Socket(Caller),
}

/// Where a client of a Service with affinity went last, when, and for how long that was to hold.
#[derive(Clone, Copy, Debug)]
struct Memory {
    target: Target,
    at: u64,
    secs: u32,
}

/// A flow that its endpoint has answered.
#[derive(Clone, Debug)]
struct Flow {
    client: Target,
    service: Target,
    proto: Proto,
    port: PortId,
    endpoint: Target,
    /// The client as the endpoint sees it.
    seen: Target,
}

/// A UDP socket that sends to one destination again and again.
#[derive(Clone, Debug)]
struct Sender {
    number: usize,
    who: Caller,
    to: Target,
    /// Where its last datagram went, if that was translated.
    last: Option<(PortId, Target)>,
}

/// A node under test, with what its clients should stick to.
struct Trial<'a, P> {
    facts: Facts,
    system: System<'a, P>,
    remembered: BTreeMap<(PortId, Prober), Memory>,
    flows: Vec<Flow>,
    senders: Vec<Sender>,
    now: u64,
    next_port: u16,
    next_flow: u16,
}

/// Ports of probes; each step begins anew, since it forgets what nobody has answered.
const PROBES: u16 = 30_000;
/// Ports of flows that are kept.
const FLOWS: u16 = 10_000;
/// One of so many forwarded probes is made again as a flow that is answered and kept.
const KEEP: u16 = 23;

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

/// A cluster and what becomes of it, with every probe after every step.
pub(crate) fn try_all<P: Programs>(
    programs: &mut P,
    facts: Facts,
    bursts: &[Vec<Edit>],
) -> Result<(), String> {
    let system = System::new(programs, &facts);
    let mut trial = Trial {
        facts,
        system,
        remembered: BTreeMap::new(),
        flows: Vec::new(),
        senders: Vec::new(),
        now: 0,
        next_port: PROBES,
        next_flow: FLOWS,
    };
    trial.make_senders();
    trial.send()?;
    trial.probe_all()?;
    for burst in bursts {
        trial.step(burst)?;
        trial.probe_flows()?;
        trial.send()?;
        trial.probe_all()?;
    }
    trial.spread()
}

impl<P: Programs> Trial<'_, P> {
    fn step(&mut self, burst: &[Edit]) -> Result<(), String> {
        let mut stale = Stale::default();
        for edit in burst {
            self.facts.edit(edit, &mut stale);
            if let Edit::Rest(secs) = edit {
                self.now += u64::from(*secs);
                self.system.rest(*secs);
            }
        }
        self.system.apply(changes(&self.facts, &stale));
        self.system.lint()?;
        if burst.iter().any(|edit| matches!(edit, Edit::Restart)) {
            self.system.restart(&self.facts)?;
        }
        // A record ends with its port's affinity and when its endpoint is not used any more. One
        // made under a longer time-out may end with the new one.
        let sticky = self.facts.sticky();
        self.remembered.retain(|(id, _), memory| match sticky.get(id) {
            Some((secs, used)) => {
                memory.secs = memory.secs.min(*secs);
                used.contains(&memory.target)
            }
            None => false,
        });
        Ok(())
    }

    /// Probes everything.
    fn probe_all(&mut self) -> Result<(), String> {
        self.next_port = PROBES;
        for six in FAMILIES {
            for dst in destinations(six) {
                for (proto, port) in TRANSPORTS {
                    self.probe_packets((dst, port), proto)?;
                    self.probe_calls((dst, port), proto)?;
                }
            }
            // Host processes at their loopback (V-36).
            let loopback = ip("127.0.0.1", "::1", six);
            for (proto, port) in TRANSPORTS {
                self.probe_calls((loopback, port), proto)?;
            }
        }
        Ok(())
    }

    fn probe_packets(&mut self, to: Target, proto: Proto) -> Result<(), String> {
        for source in sources(to.0.is_ipv6()).into_iter().filter(|source| *source != to.0) {
            let ruling = self.facts.ruling(source, self.facts.class(source), to.0, proto, to.1);
            self.probe(Prober::Packet(source), to, proto, &ruling)?;
            if proto == Proto::TCP {
                self.probe_strays(source, to, &ruling)?;
            }
            if ruling.port.is_none() {
                break; // Nobody's destination: all sources are alike.
            }
        }
        Ok(())
    }

    /// TCP segments that belong to no flow. An answer is no question; at an address of the node neither is what goes on:
    /// both are the node's own affair. Elsewhere it finds an endpoint like a new flow (D-8).
    fn probe_strays(&mut self, source: IpAddr, to: Target, ruling: &Ruling) -> Result<(), String> {
        let who = Prober::Packet(source);
        for flags in [SYN_ACK, ACK] {
            let mut ruling = ruling.clone();
            let opens = flags == ACK && !self.facts.own(to.0.is_ipv6()).contains(&to.0);
            if !opens && !self.facts.unallocated(to.0) {
                (ruling.expected, ruling.affinity) = (Expected::Pass, None);
            }
            self.next_port = if self.next_port == u16::MAX { PROBES + 1 } else { self.next_port + 1 };
            let observed = self.system.packet((source, self.next_port), to, Proto::TCP, flags);
            self.check(who, to, Proto::TCP, &ruling, observed)?;
        }
        Ok(())
    }

    fn probe_calls(&mut self, to: Target, proto: Proto) -> Result<(), String> {
        for caller in [Caller::Host, Caller::Pod] {
            let (class, source) = self.identity(caller, to.0.is_ipv6());
            let ruling = self.facts.call_ruling(source, class, to, proto);
            self.probe(Prober::Socket(caller), to, proto, &ruling)?;
        }
        Ok(())
    }

    fn probe(&mut self, who: Prober, to: Target, proto: Proto, ruling: &Ruling) -> Result<(), String> {
        let flows = if matches!(ruling.expected, Expected::Forward(_)) { 3 } else { 1 };
        for _ in 0..flows {
            self.next_port = if self.next_port == u16::MAX { PROBES + 1 } else { self.next_port + 1 };
            let observed = match who {
                Prober::Packet(source) => self.system.packet((source, self.next_port), to, proto, SYN),
                // Connected UDP of pods is left to the packets.
                Prober::Socket(caller) => {
                    let connect = caller == Caller::Host || proto != Proto::UDP;
                    match self.system.call(to, proto, caller, connect) {
                        Some(observed) => Ok(observed),
                        None => return Ok(()),
                    }
                }
            };
            self.check(who, to, proto, ruling, observed)?;
        }
        match (who, ruling.port) {
            (Prober::Packet(source), Some(port)) if flows > 1 && self.next_port.is_multiple_of(KEEP) => {
                self.open((source, to), proto, port, ruling)
            }
            _ => Ok(()),
        }
    }

    fn check(
        &mut self,
        who: Prober,
        to: Target,
        proto: Proto,
        ruling: &Ruling,
        observed: Result<Observed, String>,
    ) -> Result<(), String> {
        let fault = match observed {
            Ok(observed) => match self.judge(who, ruling, &observed) {
                Ok(()) => return Ok(()),
                Err(fault) => format!("{fault}: {observed:?}"),
            },
            Err(fault) => fault,
        };
        Err(self.report(who, to, proto, ruling, &fault))
    }

    fn judge(&mut self, who: Prober, ruling: &Ruling, observed: &Observed) -> Result<(), &'static str> {
        // What a pod's socket may leave to the packets: where the client's address or class counts, or has to be
        // hidden.
        let pod = who == Prober::Socket(Caller::Pod);
        let hidden = self.facts.operator.masquerade_all || self.facts.operator.masquerade_local;
        let left = pod && (ruling.affinity.is_some() || ruling.restricted || ruling.by_class || hidden);
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
            (_, None, Prober::Socket(_)) | (false, None, _) => {}
            (true, Some(source), _) if self.facts.may_masquerade(source.0) => {}
            (true, None, _) => return Err("not masqueraded"),
            (_, Some(_), _) => return Err("masqueraded, or with a strange address"),
        }
        if let (Some(secs), Some(id)) = (ruling.affinity, ruling.port) {
            // the record holds for a while, as long as its endpoint is in the set.
            let memory = Memory { target: *target, at: self.now, secs };
            if let Some(before) = self.remembered.insert((id, who), memory)
                && before.target != *target
                && expected.contains_key(&before.target)
                && self.now - before.at <= u64::from(before.secs)
            {
                return Err("affinity lost");
            }
        }
        Ok(())
    }

    /// A flow that is answered and kept.
    fn open(
        &mut self,
        (source, to): (IpAddr, Target),
        proto: Proto,
        port: PortId,
        ruling: &Ruling,
    ) -> Result<(), String> {
        self.next_flow += 1;
        let client = (source, self.next_flow);
        let observed = self.system.packet(client, to, proto, SYN);
        self.check(Prober::Packet(source), to, proto, ruling, observed.clone())?;
        if let Ok(Observed::Forward(endpoint, new)) = observed {
            let flow = Flow { client, service: to, proto, port, endpoint, seen: new.unwrap_or(client) };
            self.converse(&flow, SYN_ACK)?;
            let next = self.system.packet(client, to, proto, ACK);
            if next != observed {
                return Err(self.describe(&flow, &format!("the next packet: {next:?}")));
            }
            self.flows.push(flow);
        }
        Ok(())
    }

    /// The endpoint answers.
    fn converse(&mut self, flow: &Flow, flags: u8) -> Result<(), String> {
        self.system
            .answer(flow.endpoint, flow.seen, (flow.client, flow.service), flow.proto, flags)
            .map_err(|fault| self.describe(flow, &fault))
    }

    /// Flows that were answered go on. TCP and SCTP as they were, whatever has happened to their Service, the
    /// node or the agent (P-18, P-28, V-23, A-12, C-1, C-2, S-23); UDP while its endpoint serves, and else to where a
    /// new flow would go (C-4…C-8, C-14, T-85…T-91). Where nobody serves it is refused or left alone like
    /// a new one: the deliberate difference from C-6.
    fn probe_flows(&mut self) -> Result<(), String> {
        for mut flow in std::mem::take(&mut self.flows) {
            let observed = self.system.packet(flow.client, flow.service, flow.proto, ACK);
            let same = Observed::Forward(flow.endpoint, Some(flow.seen).filter(|seen| *seen != flow.client));
            let stays = match flow.proto {
                Proto::UDP => self.facts.udp_stays(flow.port, flow.endpoint),
                _ => Some(true),
            };
            match observed {
                Ok(observed) if observed == same && stays != Some(false) => {}
                observed if stays == Some(true) => {
                    return Err(self.describe(&flow, &format!("it should stay, and: {observed:?}")));
                }
                observed => {
                    let (source, (dst, number)) = (flow.client.0, flow.service);
                    let ruling = self.facts.ruling(source, self.facts.class(source), dst, flow.proto, number);
                    self.check(Prober::Packet(source), flow.service, flow.proto, &ruling, observed.clone())?;
                    let (Ok(Observed::Forward(endpoint, new)), Some(port)) = (observed, ruling.port) else {
                        continue;
                    };
                    flow = Flow { port, endpoint, seen: new.unwrap_or(flow.client), ..flow };
                }
            }
            self.converse(&flow, ACK)?;
            self.flows.push(flow);
        }
        Ok(())
    }

    fn make_senders(&mut self) {
        for six in FAMILIES {
            for dst in destinations(six) {
                for (number, who) in [(53, Caller::Host), (53, Caller::Pod), (30_001, Caller::Host)] {
                    let number_of = self.system.keep_socket(who, six);
                    self.senders.push(Sender { number: number_of, who, to: (dst, number), last: None });
                }
            }
        }
    }

    /// Unconnected UDP sockets go on sending: to where they went while that serves, and else as if they were new
    /// (C-4…C-8, C-13, D-1).
    fn send(&mut self) -> Result<(), String> {
        for mut sender in std::mem::take(&mut self.senders) {
            let observed = self.system.send(sender.number, sender.to);
            let stays = sender.last.map(|(port, target)| self.facts.udp_stays(port, target));
            let same = sender.last.map(|(_, target)| Observed::Forward(target, None));
            match stays {
                Some(Some(true) | None) if Some(&observed) == same.as_ref() => {}
                Some(Some(true)) => {
                    let dump = self.system.dump();
                    return Err(format!(
                        "it should stay, and: {observed:?}\n{sender:?}\n{:#?}\n{dump}",
                        self.facts
                    ));
                }
                _ => {
                    let (class, source) = self.identity(sender.who, sender.to.0.is_ipv6());
                    let ruling = self.facts.call_ruling(source, class, sender.to, Proto::UDP);
                    let who = Prober::Socket(sender.who);
                    self.check(who, sender.to, Proto::UDP, &ruling, Ok(observed.clone()))?;
                    sender.last = match observed {
                        Observed::Forward(target, _) => ruling.port.map(|port| (port, target)),
                        _ => None,
                    };
                }
            }
            self.senders.push(sender);
        }
        Ok(())
    }

    /// Class and address of a caller.
    fn identity(&self, who: Caller, six: bool) -> (Class, IpAddr) {
        match who {
            Caller::Host => (Class::Host, self.facts.primary(six)),
            Caller::Pod => (self.facts.class(endpoint_ip(1, six)), endpoint_ip(1, six)),
        }
    }

    /// P-25: every endpoint gets flows, for each Service address that has several.
    fn spread(&mut self) -> Result<(), String> {
        for six in FAMILIES {
            let source = endpoint_ip(1, six);
            for dst in (1..=4).map(|n| cluster_ip(n, six)) {
                let ruling = self.facts.ruling(source, self.facts.class(source), dst, Proto::TCP, 80);
                let Expected::Forward(set) = &ruling.expected else { continue };
                if ruling.affinity.is_some() {
                    continue;
                }
                let mut missing: BTreeSet<_> = set.keys().copied().collect();
                for _ in 0..50 * set.len() {
                    self.next_port = if self.next_port == u16::MAX { PROBES + 1 } else { self.next_port + 1 };
                    let from = (source, self.next_port);
                    if let Observed::Forward(target, _) =
                        self.system.packet(from, (dst, 80), Proto::TCP, SYN)?
                    {
                        missing.remove(&target);
                    }
                }
                if !missing.is_empty() {
                    let fault = format!("never chosen: {missing:?}");
                    return Err(self.report(Prober::Packet(source), (dst, 80), Proto::TCP, &ruling, &fault));
                }
            }
        }
        Ok(())
    }

    fn describe(&mut self, flow: &Flow, fault: &str) -> String {
        format!("{fault}\n{flow:?}\n{:#?}\ntables:\n{}", self.facts, self.system.dump())
    }

    fn report(&mut self, who: Prober, to: Target, proto: Proto, ruling: &Ruling, fault: &str) -> String {
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

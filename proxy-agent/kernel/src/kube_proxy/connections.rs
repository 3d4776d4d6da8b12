//! Connections that a kube-proxy's rules have led to an endpoint: what is to become of each.

use std::collections::{HashMap, HashSet};

use proxy_common::abi::{Backend, Flow, Tuple, address, flow_flags, frontend};
use proxy_common::addr::{Addr, Port, Proto};

use crate::netlink::conntrack::{
    CLOSE_WAIT, Connection, ESTABLISHED, FIN_WAIT, LAST_ACK, OVER_FROM, OVER_TO, Status,
};
use agent_core::plan::Actual;

/// What is to become of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is no Service's, or not the default zone's.
    None,
    /// A process of the node has begun it: no packet of its passes a hook before netfilter has rewritten it, so it stays as it
    /// is.
    OfNode,
    /// It becomes this flow; and these are its ends between client and endpoint.
    Adopt(Box<Flow>, Tuple),
    /// It is over, or its endpoint has gone and its client asks each time (C-4): nobody must be kept from its ends.
    Forget,
    /// Netfilter does not lead it: it goes straight to an endpoint, or a flow of ours does. A connection between the same two ends
    /// that becomes ours would be taken for it. Whether it is over.
    Beside(bool),
}

/// What is in the tables, so that an endpoint is found at once.
#[derive(Debug)]
pub struct Known<'a> {
    actual: &'a Actual,
    /// Index and generation of each, by Service and end.
    backends: HashMap<(u32, Addr, Port), (u32, u32)>,
    ends: HashSet<(Addr, Port)>,
}

impl<'a> Known<'a> {
    pub fn of(actual: &'a Actual) -> Self {
        let live = actual.backends.iter().filter(|(_, backend)| backend.is_live());
        let end = |backend: &Backend| (backend.service, backend.addr, backend.port);
        let backends: HashMap<_, _> =
            live.map(|(index, backend)| (end(backend), (index, backend.generation))).collect();
        let ends = backends.keys().map(|(_, addr, port)| (*addr, *port)).collect();
        Self { actual, backends, ends }
    }
}

/// Decides it, from what is in the tables.
pub fn fate(known: &Known<'_>, connection: &Connection, now: u64) -> Fate {
    let Known { actual, backends, ends } = known;
    let Connection { asked, answered, status, tcp, .. } = connection;
    if connection.zoned {
        return Fate::None;
    }
    let over = asked.proto == Proto::TCP && matches!(tcp, Some(OVER_FROM..=OVER_TO) | None);
    if !connection.is_rewritten() {
        // Over UDP one socket has a port, whomever it speaks to: only what has another port now is another conversation.
        let other = asked.proto == Proto::TCP || *answered != asked.reversed();
        let beside = other && ends.contains(&(asked.dst, asked.dport));
        return if beside { Fate::Beside(over) } else { Fate::None };
    }
    let Some(frontend) = actual.frontend_at(asked.dst, asked.dport, asked.proto) else {
        return Fate::None;
    };
    let client = actual.addresses.get(&asked.src).copied().unwrap_or(0);
    // In IPVS mode Service addresses are the node's, and it speaks from them.
    if asked.src.is_loopback() || client & (address::NODE | address::CLUSTER_IP) != 0 {
        return Fate::OfNode;
    }
    let endpoint = (answered.src, answered.sport);
    let backend = backends.get(&(frontend.service, endpoint.0, endpoint.1));
    let meant = match (asked.proto, *tcp) {
        _ if over => return Fate::Forget,
        (Proto::TCP, Some(state)) => state >= ESTABLISHED,
        // A TCP connection goes on while its endpoint answers (P-18).
        _ if backend.is_none() => return Fate::Forget,
        _ => status.contains(Status::Assured),
    };
    let (index, generation) = backend.copied().unwrap_or((0, 0));
    let seen_as = (answered.dst, answered.dport);
    let source = (seen_as != (asked.src, asked.sport)).then_some(seen_as);
    let answered = status.contains(Status::SeenReply);
    let mut flow =
        Flow::adopted(asked, endpoint, source, [frontend.service, index, generation], (answered, meant), now);
    // Which end has closed it is not told, and counts for nothing else.
    flow.fin = match *tcp {
        Some(LAST_ACK) => [1, 1],
        Some(FIN_WAIT | CLOSE_WAIT) => [1, 0],
        _ => [0, 0],
    };
    if frontend.flags & frontend::AFFINITY != 0 && backend.is_some() {
        flow.flags |= flow_flags::AFFINITY;
    }
    let between = Tuple::new(asked.src, asked.sport, endpoint.0, endpoint.1, asked.proto);
    Fate::Adopt(Box::new(flow), between)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use agent_core::plan::Array;
    use proxy_common::abi::{Frontend, FrontendKey, Role, Run, State};

    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn tuple(from: (&str, u16), to: (&str, u16), proto: Proto) -> Tuple {
        Tuple::new(addr(from.0), Port::new(from.1), addr(to.0), Port::new(to.1), proto)
    }

    const POD: (&str, u16) = ("10.244.1.5", 40_000);
    const VIP: (&str, u16) = ("10.96.0.1", 80);
    const ENDPOINT: (&str, u16) = ("10.244.2.7", 8080);
    const NODE: &str = "192.168.10.1";
    const NOW: u64 = 5_000_000_000;

    fn tables() -> Actual {
        let mut actual = Actual::default();
        for (service, proto) in [(1, Proto::TCP), (2, Proto::UDP)] {
            for (vip, port) in [(VIP.0, VIP.1), ("0.0.0.0", 30_200)] {
                let key = FrontendKey::new(addr(vip), Port::new(port), proto);
                let value = Frontend {
                    service,
                    cluster: Run::EMPTY,
                    local: Run::EMPTY,
                    flags: 0,
                    affinity_secs: 0,
                    seal: 0,
                };
                actual.frontends.insert(key, value.sealed(&key));
            }
            let (addr, port) = (addr(ENDPOINT.0), Port::new(ENDPOINT.1));
            let backend = Backend { addr, port, flags: 0, generation: 7, service, node: 0 };
            actual.backends.insert(service * 10, backend);
        }
        actual.addresses.insert(addr(NODE), address::NODE | address::NODE_PORT);
        actual
    }

    fn connection(asked: Tuple, answered: Tuple, tcp: Option<u8>) -> Connection {
        let status = Status::DstNat | Status::SeenReply | Status::Assured;
        Connection { asked, answered, status, tcp, timeout: 60, mark: 0, zoned: false }
    }

    /// A pod's to the ClusterIP.
    fn of_pod(proto: Proto, tcp: Option<u8>) -> Connection {
        connection(tuple(POD, VIP, proto), tuple(ENDPOINT, POD, proto), tcp)
    }

    #[track_caller]
    fn adopted(connection: &Connection) -> (Flow, Tuple) {
        match fate(&Known::of(&tables()), connection, NOW) {
            Fate::Adopt(flow, between) => (*flow, between),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_pod_s_connection_keeps_its_endpoint_and_its_source() {
        for (proto, tcp, service) in [(Proto::TCP, Some(ESTABLISHED), 1), (Proto::UDP, None, 2)] {
            let (flow, between) = adopted(&of_pod(proto, tcp));
            assert_eq!(between, tuple(POD, ENDPOINT, proto));
            assert_eq!(
                (flow.client(), flow.vip()),
                ((&addr(POD.0), Port::new(POD.1)), (&addr(VIP.0), Port::new(VIP.1)))
            );
            assert_eq!(flow.endpoint(), (&addr(ENDPOINT.0), Port::new(ENDPOINT.1)));
            assert_eq!((flow.state, flow.old, flow.has_source()), (State::LEFT, 1, false));
            assert_eq!((flow.service, flow.backend, flow.generation), (service, service * 10, 7));
            assert!(flow.has(Role::OUTER) && flow.has(Role::MIDDLE) && !flow.has(Role::INNER));
        }
    }

    #[test]
    fn a_client_that_is_bound_to_its_endpoint_stays_so_while_that_is_there() {
        let mut actual = tables();
        actual.frontends.values_mut().for_each(|frontend| frontend.flags = frontend::AFFINITY);
        let of = |actual: &Actual| match fate(&Known::of(actual), &of_pod(Proto::TCP, Some(ESTABLISHED)), NOW)
        {
            Fate::Adopt(flow, _) => flow.flags & flow_flags::AFFINITY,
            other => panic!("{other:?}"),
        };
        assert_ne!(of(&actual), 0);
        actual.backends = Array::default();
        assert_eq!(of(&actual), 0);
    }

    #[test]
    fn what_ipvs_leads_is_told_by_its_answers() {
        let mut connection = of_pod(Proto::TCP, Some(ESTABLISHED));
        connection.status = Status::SeenReply | Status::Assured;
        assert_eq!(adopted(&connection).1, tuple(POD, ENDPOINT, Proto::TCP));
    }

    #[test]
    fn a_masqueraded_one_keeps_its_masquerade_address_and_port() {
        let client = ("198.51.100.9", 50_000);
        let answered = tuple(ENDPOINT, (NODE, 61_234), Proto::TCP);
        let (flow, between) =
            adopted(&connection(tuple(client, (NODE, 30_200), Proto::TCP), answered, Some(ESTABLISHED)));
        assert_eq!(between, tuple(client, ENDPOINT, Proto::TCP));
        assert!(flow.has_source() && flow.is_masqueraded() && flow.state == State::LEFT);
        assert_eq!(flow.node(), (&addr(NODE), Port::new(61_234)));
    }

    #[test]
    fn how_far_it_is_decides_what_becomes_of_it() {
        let of = |tcp| fate(&Known::of(&tables()), &of_pod(Proto::TCP, tcp), NOW);
        for over in [None, Some(7), Some(8)] {
            assert_eq!(of(over), Fate::Forget, "{over:?}");
        }
        for (state, old) in [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1), (9, 1)] {
            assert_eq!(adopted(&of_pod(Proto::TCP, Some(state))).0.old, old, "{state}");
        }
        for (state, fin) in [(3, [0, 0]), (4, [1, 0]), (5, [1, 0]), (6, [1, 1])] {
            assert_eq!(adopted(&of_pod(Proto::TCP, Some(state))).0.fin, fin, "{state}");
        }
        let mut young = of_pod(Proto::UDP, None);
        young.status = Status::DstNat;
        let (flow, _) = adopted(&young);
        assert_eq!((flow.old, flow.seen), (0, [NOW, 0]));
    }

    #[test]
    fn without_its_endpoint_tcp_goes_on_and_udp_asks_anew() {
        let mut actual = tables();
        actual.backends = Array::default();
        assert_eq!(fate(&Known::of(&actual), &of_pod(Proto::UDP, None), NOW), Fate::Forget);
        let Fate::Adopt(flow, _) = fate(&Known::of(&actual), &of_pod(Proto::TCP, Some(ESTABLISHED)), NOW)
        else {
            panic!()
        };
        assert_eq!((flow.service, flow.backend, flow.generation), (1, 0, 0));
    }

    #[test]
    fn what_is_the_node_s_or_no_service_s_is_left_alone() {
        let answered = tuple(ENDPOINT, (NODE, 40_000), Proto::TCP);
        for (from, fates) in [(NODE, Fate::OfNode), ("127.0.0.1", Fate::OfNode)] {
            let asked = tuple((from, 40_000), VIP, Proto::TCP);
            assert_eq!(
                fate(&Known::of(&tables()), &connection(asked, answered, Some(ESTABLISHED)), NOW),
                fates,
                "{from}"
            );
        }
        let mut actual = tables();
        actual.addresses.insert(addr(VIP.0), address::CLUSTER_IP);
        let asked = tuple((VIP.0, 40_000), VIP, Proto::TCP);
        assert_eq!(
            fate(&Known::of(&actual), &connection(asked, answered, Some(ESTABLISHED)), NOW),
            Fate::OfNode,
            "a Service address that IPVS has at an interface"
        );
        let moved = tuple(ENDPOINT, (NODE, 61_234), Proto::TCP);
        for (to, state, expected) in [
            (ENDPOINT, ESTABLISHED, Fate::Beside(false)),
            (ENDPOINT, OVER_FROM, Fate::Beside(true)),
            ((ENDPOINT.0, 8081), ESTABLISHED, Fate::None),
        ] {
            let mut straight = connection(tuple(POD, to, Proto::TCP), moved, Some(state));
            straight.answered.sport = straight.asked.dport;
            assert_eq!(fate(&Known::of(&tables()), &straight, NOW), expected, "{to:?} {state}");
            straight.answered = straight.asked.reversed();
            assert_eq!(fate(&Known::of(&tables()), &straight, NOW), expected, "{to:?} {state}");
        }
        let host_port = tuple(("198.51.100.9", 1), (NODE, 8443), Proto::TCP);
        let mut plain = of_pod(Proto::TCP, Some(ESTABLISHED));
        plain.answered = plain.asked.reversed();
        let mut zoned = of_pod(Proto::TCP, Some(ESTABLISHED));
        zoned.zoned = true;
        for other in [connection(host_port, answered, Some(ESTABLISHED)), plain, zoned] {
            assert_eq!(fate(&Known::of(&tables()), &other, NOW), Fate::None, "{other:?}");
        }
    }
}

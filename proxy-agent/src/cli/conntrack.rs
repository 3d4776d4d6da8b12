//! `conntrack list|flush`: the flow table, one row a flow.
//!
//! A flow has two to four entries (see `proxy_common::abi::FlowKey`); each is found from its DNAT leg.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use anyhow::Result;
use clap::Args;
use proxy_common::abi::{Flow, FlowKey, Hook, Leg, untext};
use proxy_common::addr::{Addr, Port, Proto};
use serde::Serialize;

use super::table;
use super::view::{FlowTable, Now, View, endpoint_text, service_text, span};
use crate::plan::Actual;

/// An address, or an address and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    ip: IpAddr,
    port: Option<u16>,
}

impl Peer {
    fn matches(&self, addr: Addr, port: Port) -> bool {
        IpAddr::from(addr) == self.ip && self.port.is_none_or(|number| number == port.number())
    }
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bare = text.strip_prefix('[').and_then(|v6| v6.strip_suffix(']')).unwrap_or(text);
        if let Ok(ip) = bare.parse() {
            return Ok(Self { ip, port: None });
        }
        let both: SocketAddr =
            text.parse().map_err(|_| "give an address, address:port or [address]:port".to_owned())?;
        Ok(Self { ip: both.ip(), port: Some(both.port()) })
    }
}

/// Namespace and name of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRef {
    namespace: String,
    name: String,
}

impl FromStr for ServiceRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err("give NAMESPACE/NAME".to_owned()),
        }
    }
}

/// Which flows are meant: those that pass every filter.
#[derive(Args, Clone, Debug, Default)]
pub struct Filter {
    /// Flows of this Service.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub service: Option<ServiceRef>,
    /// Flows to this endpoint.
    #[arg(long, value_name = "IP[:PORT]")]
    pub endpoint: Option<Peer>,
    /// Flows from this client.
    #[arg(long, value_name = "IP[:PORT]")]
    pub client: Option<Peer>,
}

/// One flow.
#[derive(Clone, Debug, Serialize)]
pub struct FlowRow {
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Who opened it.
    pub client: String,
    /// The address that was named.
    pub destination: String,
    /// Where it goes.
    pub endpoint: String,
    /// The node's address and port that the endpoint sees; null when it sees the client.
    pub masquerade: Option<String>,
    /// See [`state`].
    pub state: &'static str,
    /// Milliseconds since a packet passed in either direction.
    pub idle_ms: u64,
    /// `namespace/name:port`.
    pub service: String,
    /// Entries it has in the tables.
    pub entries: usize,
    #[serde(skip)]
    keys: Vec<(FlowTable, FlowKey)>,
}

/// Both flow tables, in memory.
type Entries = HashMap<FlowKey, (FlowTable, Flow)>;

/// The flows that pass `filter`, by client.
pub fn rows(view: &dyn View, filter: &Filter, now: Now) -> Result<Vec<FlowRow>> {
    let actual = view.actual()?;
    let mut entries: Entries = HashMap::new();
    view.flows(&mut |table, key, flow| {
        // An entry on its way from HALF_OPEN to FLOWS is in both for a moment: the answered one counts.
        if table == FlowTable::Established || !entries.contains_key(&key) {
            entries.insert(key, (table, flow));
        }
    })?;
    let mut dnat: Vec<_> = entries
        .iter()
        .filter(|(key, (_, flow))| flow.leg == Leg::DNAT && passes(filter, key, flow, &actual))
        .map(|(key, _)| *key)
        .collect();
    dnat.sort_unstable_by_key(|k| {
        (IpAddr::from(k.src), k.sport.number(), IpAddr::from(k.dst), k.dport.number(), k.proto)
    });
    Ok(dnat.iter().filter_map(|key| row(key, &entries, &actual, now)).collect())
}

fn passes(filter: &Filter, key: &FlowKey, flow: &Flow, actual: &Actual) -> bool {
    let Filter { service, endpoint, client } = filter;
    let of_service = |wanted: &ServiceRef| {
        actual.services.get(&flow.service).is_some_and(|name| {
            untext(&name.namespace) == wanted.namespace && untext(&name.name) == wanted.name
        })
    };
    service.as_ref().is_none_or(of_service)
        && endpoint.is_none_or(|peer| peer.matches(flow.addr, flow.port))
        && client.is_none_or(|peer| peer.matches(key.src, key.sport))
}

/// The flow of a DNAT leg, with the legs that are found from it.
fn row(dnat: &FlowKey, entries: &Entries, actual: &Actual, now: Now) -> Option<FlowRow> {
    let (table, flow) = *entries.get(dnat)?;
    let sport = if flow.other_port == Port(0) { dnat.sport } else { flow.other_port };
    let snat_key = FlowKey { dst: flow.addr, dport: flow.port, sport, hook: Hook::EGRESS, ..*dnat };
    let snat = entries.get(&snat_key).filter(|(_, leg)| leg.leg == Leg::SNAT);
    let node = snat.map(|(_, leg)| (leg.addr, leg.port)).filter(|(addr, _)| !addr.is_unspecified());
    let unsnat_key = node.map(|(addr, port)| FlowKey {
        src: flow.addr,
        sport: flow.port,
        dst: addr,
        dport: port,
        hook: Hook::INGRESS,
        ..*dnat
    });
    let undnat_key = snat_key.reversed(Hook::EGRESS);

    // DNAT first: without it no packet of the client meets half a flow while the others go.
    let mut legs = vec![(*dnat, (table, flow))];
    for (key, leg) in
        [(Some(snat_key), Leg::SNAT), (unsnat_key, Leg::UNSNAT), (Some(undnat_key), Leg::UNDNAT)]
    {
        let found = key.and_then(|key| Some((key, *entries.get(&key)?)));
        legs.extend(found.filter(|(_, (_, flow))| flow.leg == leg));
    }
    let seen = |wanted: [Leg; 2]| {
        legs.iter().filter(|(_, (_, f))| wanted.contains(&f.leg)).fold(0, |bits, (_, (_, f))| bits | f.seen)
    };
    let last = legs.iter().map(|(_, (_, flow))| flow.last_seen).max().unwrap_or(0);
    Some(FlowRow {
        protocol: dnat.proto.to_string(),
        client: endpoint_text(dnat.src, dnat.sport),
        destination: endpoint_text(dnat.dst, dnat.dport),
        endpoint: endpoint_text(flow.addr, flow.port),
        masquerade: node.map(|(addr, port)| endpoint_text(addr, port)),
        state: state(dnat.proto, table, seen([Leg::DNAT, Leg::SNAT]), seen([Leg::UNDNAT, Leg::UNSNAT])),
        idle_ms: now.mono_ns.saturating_sub(last) / 1_000_000,
        service: service_text(flow.service, &actual.services),
        entries: legs.len(),
        keys: legs.into_iter().map(|(key, (table, _))| (table, key)).collect(),
    })
}

const FIN: u8 = 0x01;
const RST: u8 = 0x04;

/// The word for how far a flow is, from the TCP flags of both directions (RFC 9293 §3.1).
#[must_use]
pub fn state(proto: Proto, table: FlowTable, forward: u8, reply: u8) -> &'static str {
    match (proto, table) {
        (Proto::TCP, _) if (forward | reply) & RST != 0 => "reset",
        (_, FlowTable::HalfOpen) => "unanswered",
        (Proto::TCP, FlowTable::Established) => match (forward & FIN != 0, reply & FIN != 0) {
            (true, true) => "closed",
            (true, false) => "closing by client",
            (false, true) => "closing by endpoint",
            (false, false) => "established",
        },
        (_, FlowTable::Established) => "established",
    }
}

/// Flows and entries that [`flush`] has removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Flushed {
    /// Flows.
    pub flows: u64,
    /// Their entries.
    pub entries: u64,
}

/// Removes the flows that pass `filter`.
pub fn flush(view: &dyn View, filter: &Filter, now: Now) -> Result<Flushed> {
    let mut done = Flushed::default();
    for row in rows(view, filter, now)? {
        let mut any = false;
        for (table, key) in row.keys {
            if view.delete_flow(table, &key)? {
                done.entries += 1;
                any = true;
            }
        }
        done.flows += u64::from(any);
    }
    Ok(done)
}

/// The rows for a person.
#[must_use]
pub fn text(rows: &[FlowRow]) -> String {
    let header = ["PROTO", "CLIENT", "DESTINATION", "ENDPOINT", "MASQUERADED AS", "STATE", "IDLE", "SERVICE"];
    let cells = rows.iter().map(|row| {
        vec![
            row.protocol.clone(),
            row.client.clone(),
            row.destination.clone(),
            row.endpoint.clone(),
            row.masquerade.clone().unwrap_or_else(|| "-".to_owned()),
            row.state.to_owned(),
            span(row.idle_ms),
            row.service.clone(),
        ]
    });
    table::table(&header, cells.collect())
}

#[cfg(test)]
mod tests {
    use super::super::memory::{Legs, NOW, golden, small_cluster};
    use super::*;

    fn filter(service: &str, endpoint: &str, client: &str) -> Filter {
        Filter {
            service: (!service.is_empty()).then(|| service.parse().unwrap()),
            endpoint: (!endpoint.is_empty()).then(|| endpoint.parse().unwrap()),
            client: (!client.is_empty()).then(|| client.parse().unwrap()),
        }
    }

    fn clients(filter: &Filter) -> Vec<String> {
        rows(&small_cluster(), filter, NOW).unwrap().into_iter().map(|row| row.client).collect()
    }

    #[test]
    fn a_flow_is_one_row_with_all_its_legs() {
        let rows = rows(&small_cluster(), &Filter::default(), NOW).unwrap();
        golden("conntrack_list", &text(&rows));
        let entries: Vec<_> = rows.iter().map(|row| row.entries).collect();
        assert_eq!(entries, [2, 2, 4]);
        assert_eq!(
            serde_json::to_value(&rows[2]).unwrap(),
            serde_json::json!({
                "protocol": "TCP", "client": "192.0.2.9:40000", "destination": "10.0.0.1:30200",
                "endpoint": "10.244.2.7:8080", "masquerade": "10.0.0.1:1024", "state": "established",
                "idle_ms": 5000, "service": "default/web:http", "entries": 4,
            })
        );
    }

    #[test]
    fn a_flow_with_another_client_port_behind_the_service_keeps_its_legs_together() {
        let memory = small_cluster();
        memory.flows.borrow_mut().clear();
        memory.add_flow(&Legs {
            table: FlowTable::Established,
            proto: Proto::UDP,
            client: "[fd00::9]:4000",
            vip: "[fd00::a]:53",
            endpoint: "[fd00:1::5]:5353",
            node: None,
            seen: (0, 0),
            backend: (1, 1),
            service: 2,
            idle_s: 1,
        });
        {
            // The programs gave the flow source port 5000 towards the endpoint.
            let mut flows = memory.flows.borrow_mut();
            let ((table, key), flow) =
                flows.iter().find(|(_, f)| f.leg == Leg::UNDNAT).map(|(k, f)| (*k, *f)).unwrap();
            flows.remove(&(table, key));
            let moved = FlowKey { dport: Port::new(5000), ..key };
            flows.insert((table, moved), Flow { other_port: Port::new(4000), ..flow });
            flows.values_mut().filter(|f| f.leg == Leg::DNAT).for_each(|f| f.other_port = Port::new(5000));
        }
        let rows = rows(&memory, &Filter::default(), NOW).unwrap();
        assert_eq!((rows.len(), rows[0].entries, rows[0].state), (1, 2, "established"));
        assert_eq!(rows[0].destination, "[fd00::a]:53");
        assert_eq!(flush(&memory, &Filter::default(), NOW).unwrap(), Flushed { flows: 1, entries: 2 });
        assert!(memory.flows.borrow().is_empty());
    }

    #[test]
    fn filters_narrow_together() {
        assert_eq!(clients(&filter("default/web", "", "")).len(), 3);
        assert_eq!(clients(&filter("default/we", "", "")), Vec::<String>::new());
        assert_eq!(clients(&filter("", "10.244.2.7", "")), ["192.0.2.9:40000"]);
        assert_eq!(clients(&filter("", "10.244.2.7:81", "")), Vec::<String>::new());
        assert_eq!(clients(&filter("", "", "10.244.1.3")).len(), 2);
        assert_eq!(clients(&filter("", "10.244.1.5:8080", "10.244.1.3:40002")), ["10.244.1.3:40002"]);
        assert_eq!(clients(&filter("", "10.244.1.5:8080", "10.244.1.3:40001")), Vec::<String>::new());
    }

    #[test]
    fn flushing_removes_what_was_meant_and_nothing_else() {
        let memory = small_cluster();
        let done = flush(&memory, &filter("", "", "192.0.2.9"), NOW).unwrap();
        assert_eq!(done, Flushed { flows: 1, entries: 4 });
        assert_eq!(memory.flows.borrow().len(), 4);
        assert_eq!(flush(&memory, &filter("", "", "192.0.2.9"), NOW).unwrap(), Flushed::default());
        let rest = flush(&memory, &Filter::default(), NOW).unwrap();
        assert_eq!(rest, Flushed { flows: 2, entries: 4 });
    }

    #[test]
    fn states_follow_the_flags_of_both_directions() {
        use FlowTable::{Established as Flows, HalfOpen};
        assert_eq!(state(Proto::TCP, HalfOpen, 0x02, 0), "unanswered");
        assert_eq!(state(Proto::TCP, Flows, 0x12, 0x12), "established");
        assert_eq!(state(Proto::TCP, Flows, 0x13, 0x12), "closing by client");
        assert_eq!(state(Proto::TCP, Flows, 0x12, 0x13), "closing by endpoint");
        assert_eq!(state(Proto::TCP, Flows, 0x13, 0x13), "closed");
        assert_eq!(state(Proto::TCP, Flows, 0x12, 0x14), "reset");
        assert_eq!(state(Proto::UDP, HalfOpen, 0, 0), "unanswered");
        assert_eq!(state(Proto::UDP, Flows, 0, 0), "established");
    }

    #[test]
    fn filters_are_parsed_strictly() {
        let peer = |text: &str| text.parse::<Peer>().ok().map(|p| (p.ip.to_string(), p.port));
        assert_eq!(peer("10.0.0.1"), Some(("10.0.0.1".to_owned(), None)));
        assert_eq!(peer("10.0.0.1:80"), Some(("10.0.0.1".to_owned(), Some(80))));
        assert_eq!(peer("fd00::1"), Some(("fd00::1".to_owned(), None)));
        assert_eq!(peer("[fd00::1]"), Some(("fd00::1".to_owned(), None)));
        assert_eq!(peer("[fd00::1]:80"), Some(("fd00::1".to_owned(), Some(80))));
        assert_eq!(peer("web"), None);
        assert_eq!(peer("10.0.0.1:"), None);
        assert!("default/web".parse::<ServiceRef>().is_ok());
        for wrong in ["web", "/web", "default/", "a/b/c"] {
            assert!(wrong.parse::<ServiceRef>().is_err(), "{wrong}");
        }
    }
}

//! `conntrack list|flush`: the flow table, one row a flow.
//!
//! Everything about a flow is in its record (see `proxy_common::abi::Flow`).

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use anyhow::Result;
use clap::Args;
use proxy_common::abi::{FORWARD, Flow, FlowId, REPLY, Role, State, untext};
use proxy_common::addr::{Addr, Port};
use serde::Serialize;

use super::table;
use super::view::{Now, View, endpoint_text, service_text, span};
use agent_core::plan::Actual;

/// An address, or an address and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    ip: IpAddr,
    port: Option<u16>,
}

impl Peer {
    /// Whether it is this address, whatever the port.
    fn is(&self, addr: &Addr) -> bool {
        IpAddr::from(*addr) == self.ip && self.port.is_none()
    }

    fn matches(&self, (addr, port): (&Addr, Port)) -> bool {
        IpAddr::from(*addr) == self.ip && self.port.is_none_or(|number| number == port.number())
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
    /// Where it goes; with `dsr` the address of a node.
    pub endpoint: String,
    /// Whether that node answers the client itself (direct server return), so that answers do not pass here.
    pub dsr: bool,
    /// The node's address and port that the endpoint sees; null when it sees the client.
    pub masquerade: Option<String>,
    /// See [`state`].
    pub state: &'static str,
    /// Milliseconds since a packet passed in either direction.
    pub idle_ms: u64,
    /// `namespace/name:port`.
    pub service: String,
    /// Who translates its packets: `ebpf-proxy`, or `netfilter` for what a kube-proxy has begun and we have not taken yet.
    pub translated_by: &'static str,
    /// Entries it has in the tables.
    pub entries: usize,
    #[serde(skip)]
    id: FlowId,
}

/// Who translates the packets of what a kube-proxy has begun, until we do.
const NETFILTER: &str = "netfilter";

/// The flows that pass `filter`, by client. Conversations of the node's own are none: nothing is translated in them.
pub fn rows(view: &dyn View, filter: &Filter, now: Now) -> Result<Vec<FlowRow>> {
    let actual = view.actual()?;
    let mut flows = Vec::new();
    view.flows(&mut |flow| {
        if !flow.is_own() && passes(filter, flow, &actual) {
            flows.push(*flow);
        }
    })?;
    flows.sort_unstable_by_key(|flow| {
        let ((client, port), (vip, vip_port)) = (flow.client(), flow.vip());
        (IpAddr::from(*client), port.number(), IpAddr::from(*vip), vip_port.number(), flow.proto())
    });
    Ok(flows.iter().map(|flow| row(flow, &actual, now)).collect())
}

fn passes(filter: &Filter, flow: &Flow, actual: &Actual) -> bool {
    let Filter { service, endpoint, client } = filter;
    let of_service = |wanted: &ServiceRef| {
        actual.services.get(&flow.service).is_some_and(|name| {
            untext(&name.namespace) == wanted.namespace && untext(&name.name) == wanted.name
        })
    };
    service.as_ref().is_none_or(of_service)
        && endpoint.is_none_or(|peer| match flow.is_direct() {
            true => peer.is(flow.endpoint().0),
            false => peer.matches(target(flow)),
        })
        && client.is_none_or(|peer| peer.matches(flow.client()))
}

/// Where the flow goes: the endpoint, which may be the address that was named.
fn target(flow: &Flow) -> (&Addr, Port) {
    if flow.is_identity() { flow.vip() } else { flow.endpoint() }
}

fn row(flow: &Flow, actual: &Actual, now: Now) -> FlowRow {
    let text = |(addr, port): (&Addr, Port)| endpoint_text(*addr, port);
    let last = flow.last_seen().max(flow.last_reset());
    FlowRow {
        protocol: flow.proto().to_string(),
        client: text(flow.client()),
        destination: text(flow.vip()),
        // What stands there as a port is a hint to the node.
        endpoint: if flow.is_direct() { flow.endpoint().0.to_string() } else { text(target(flow)) },
        dsr: flow.is_direct(),
        masquerade: flow.has_source().then(|| text(flow.node())),
        state: state(flow),
        idle_ms: now.mono_ns.saturating_sub(last) / 1_000_000,
        service: service_text(flow.service, &actual.services),
        translated_by: if flow.state == State::LEFT { NETFILTER } else { "ebpf-proxy" },
        entries: [Role::OUTER, Role::MIDDLE, Role::INNER].iter().filter(|role| flow.has(**role)).count(),
        id: flow.id,
    }
}

/// The word for how far a flow is.
#[must_use]
pub fn state(flow: &Flow) -> &'static str {
    if flow.is_reset() {
        return "reset";
    }
    match (flow.old != 0, flow.fin[FORWARD] != 0, flow.fin[REPLY] != 0) {
        (_, true, true) => "closed",
        (false, ..) if flow.is_direct() => "begun",
        (false, ..) if flow.seen[REPLY] == 0 => "unanswered",
        (false, ..) => "answered",
        (true, true, false) => "closing by client",
        (true, false, true) => "closing by endpoint",
        (true, false, false) => "established",
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
        if view.end_flows(&[row.id])? != 0 {
            done.flows += 1;
            done.entries += row.entries as u64;
        }
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
            if row.dsr { format!("dsr via {}", row.endpoint) } else { row.endpoint.clone() },
            row.masquerade.clone().unwrap_or_else(|| "-".to_owned()),
            match row.translated_by {
                NETFILTER => format!("{} ({NETFILTER})", row.state),
                _ => row.state.to_owned(),
            },
            span(row.idle_ms),
            row.service.clone(),
        ]
    });
    table::table(&header, cells.collect())
}

#[cfg(test)]
mod tests {
    use proxy_common::abi::flow_flags;
    use proxy_common::addr::Proto;

    use super::super::memory::{NOW, Sketch, golden, small_cluster};
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
        assert_eq!(entries, [2, 2, 3]);
        assert_eq!(
            serde_json::to_value(&rows[2]).unwrap(),
            serde_json::json!({
                "protocol": "TCP", "client": "192.0.2.9:40000", "destination": "10.0.0.1:30200",
                "endpoint": "10.244.2.7:8080", "dsr": false, "masquerade": "10.0.0.1:1024", "state": "established",
                "idle_ms": 5000, "service": "default/web:http", "translated_by": "ebpf-proxy", "entries": 3,
            })
        );
    }

    #[test]
    fn a_flow_with_another_client_port_behind_the_service_keeps_its_legs_together() {
        let memory = small_cluster();
        memory.flows.borrow_mut().clear();
        // The programs gave the flow source port 5000 towards the endpoint.
        memory.add_flow(&Sketch {
            old: true,
            proto: Proto::UDP,
            client: "[fd00::9]:4000",
            vip: "[fd00::a]:53",
            endpoint: "[fd00:1::5]:5353",
            middle_port: Some(5000),
            node: None,
            fin: [0, 0],
            backend: (1, 1),
            service: 2,
            idle_s: 1,
        });
        let rows = rows(&memory, &Filter::default(), NOW).unwrap();
        assert_eq!((rows.len(), rows[0].entries, rows[0].state), (1, 2, "established"));
        assert_eq!(rows[0].destination, "[fd00::a]:53");
        assert_eq!(flush(&memory, &Filter::default(), NOW).unwrap(), Flushed { flows: 1, entries: 2 });
        assert!(memory.flows.borrow().is_empty());
    }

    #[test]
    fn a_flow_that_goes_to_a_node_is_shown_without_a_port_there() {
        let memory = small_cluster();
        memory.flows.borrow_mut().clear();
        let sketch = |client, old| Sketch {
            old,
            proto: Proto::TCP,
            client,
            vip: "203.0.113.7:80",
            // What stands in the place of a port is a hint.
            endpoint: "10.0.0.2:32513",
            middle_port: None,
            node: None,
            fin: [0, 0],
            backend: (2, 3),
            service: 1,
            idle_s: 1,
        };
        memory.add_flow(&sketch("192.0.2.9:40000", true));
        memory.add_flow(&sketch("192.0.2.9:40001", false));
        for flow in memory.flows.borrow_mut().iter_mut() {
            (flow.flags, flow.legs, flow.node) = (flow_flags::DIRECT, 1, 9);
        }
        let of = |endpoint: &str| rows(&memory, &filter("", endpoint, ""), NOW).unwrap();
        let all = of("");
        golden("conntrack_list_dsr", &text(&all));
        assert_eq!((&*all[0].endpoint, all[0].dsr, all[0].entries), ("10.0.0.2", true, 1));
        assert_eq!((of("10.0.0.2").len(), of("10.0.0.2:32513").len(), of("203.0.113.7").len()), (2, 0, 0));
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
        assert_eq!(done, Flushed { flows: 1, entries: 3 });
        assert_eq!(memory.flows.borrow().len(), 2);
        assert_eq!(flush(&memory, &filter("", "", "192.0.2.9"), NOW).unwrap(), Flushed::default());
        let rest = flush(&memory, &Filter::default(), NOW).unwrap();
        assert_eq!(rest, Flushed { flows: 2, entries: 4 });
    }

    #[test]
    fn states_follow_what_both_ends_have_shown() {
        let flow = |old, answered, fin| Flow { old, seen: [1, answered], fin, ..Flow::EMPTY };
        assert_eq!(state(&flow(0, 0, [0, 0])), "unanswered");
        assert_eq!(state(&flow(0, 2, [0, 0])), "answered");
        assert_eq!(state(&flow(1, 2, [0, 0])), "established");
        assert_eq!(state(&flow(1, 2, [1, 0])), "closing by client");
        assert_eq!(state(&flow(1, 2, [0, 1])), "closing by endpoint");
        assert_eq!(state(&flow(1, 2, [1, 1])), "closed");
        assert_eq!(state(&Flow { rst: [0, 3], ..flow(1, 2, [0, 0]) }), "reset");
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

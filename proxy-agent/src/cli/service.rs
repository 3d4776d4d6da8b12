//! `service list`: every frontend and its endpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Result;
use proxy_common::abi::{Backend, Frontend, FrontendKey, Run, ServiceStats, backend, frontend};
use serde::Serialize;

use super::table;
use super::view::{View, connections, endpoint_text, service_text};
use agent_core::plan::Actual;

/// What an endpoint does for a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// New flows go there.
    Active,
    /// No new flows; the ones it has go on.
    Draining,
    /// New flows of this frontend go elsewhere: its traffic policy or topology leaves the endpoint out.
    Unused,
}

impl State {
    /// The word for a table.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Draining => "draining",
            Self::Unused => "unused",
        }
    }
}

/// One endpoint of a frontend.
#[derive(Clone, Debug, Serialize)]
pub struct EndpointRow {
    /// `address:port`.
    pub endpoint: String,
    /// What it does.
    pub state: State,
    /// Whether it runs on this node.
    pub local: bool,
    /// Flows to it. Connections translated at their socket have none.
    pub connections: u64,
}

/// One frontend.
#[derive(Clone, Debug, Serialize)]
pub struct FrontendRow {
    /// `namespace/name:port`.
    pub service: String,
    /// `ClusterIP`, `NodePort` or `External`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Address; `*` for every accepted address of this node.
    pub address: String,
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// 4 or 6.
    pub family: u8,
    /// Traffic policy: `Cluster` or `Local`.
    pub policy: &'static str,
    /// Whether endpoints' nodes answer clients from outside themselves (direct server return).
    pub dsr: bool,
    /// Idle time-out of session affinity in seconds; null without affinity.
    pub affinity_seconds: Option<u32>,
    /// Whether only listed source ranges may open flows.
    pub source_ranges: bool,
    /// Flows and connects of the Service port that got an endpoint.
    pub connections: u64,
    /// The ones that were rejected: there is no endpoint.
    pub rejected: u64,
    /// The ones that were dropped.
    pub dropped: u64,
    pub endpoints: Vec<EndpointRow>,
}

/// Every frontend, by Service, type and address.
pub fn rows(view: &dyn View) -> Result<Vec<FrontendRow>> {
    let (actual, stats, connections) = (view.actual()?, view.service_stats()?, connections(view)?);
    let mut of_service: BTreeMap<u32, Vec<(u32, &Backend)>> = BTreeMap::new();
    for (index, backend) in actual.backends.iter().filter(|(_, backend)| backend.is_live()) {
        of_service.entry(backend.service).or_default().push((index, backend));
    }
    let mut rows: Vec<_> = actual
        .frontends
        .iter()
        .map(|(key, value)| {
            let backends = of_service.get(&value.service).map_or(&[][..], Vec::as_slice);
            let endpoints = endpoints(value, backends, &actual, &connections);
            row(key, value, &actual, stats.get(&value.service), endpoints)
        })
        .collect();
    rows.sort_by(|a, b| {
        (&a.service, a.family, a.kind, &a.address, a.port)
            .cmp(&(&b.service, b.family, b.kind, &b.address, b.port))
    });
    Ok(rows)
}

fn row(
    key: &FrontendKey,
    value: &Frontend,
    actual: &Actual,
    stats: Option<&ServiceStats>,
    endpoints: Vec<EndpointRow>,
) -> FrontendRow {
    let is = |bit| value.flags & bit != 0;
    let kind = match (is(frontend::INTERNAL), is(frontend::NODE_PORT)) {
        (true, _) => "ClusterIP",
        (false, true) => "NodePort",
        (false, false) => "External",
    };
    FrontendRow {
        service: service_text(value.service, &actual.services),
        kind,
        address: if is(frontend::NODE_PORT) { "*".to_owned() } else { key.addr.to_string() },
        port: key.port.number(),
        protocol: key.proto.to_string(),
        family: if key.addr.is_v4() { 4 } else { 6 },
        policy: if is(frontend::LOCAL) { "Local" } else { "Cluster" },
        dsr: is(frontend::DSR),
        affinity_seconds: is(frontend::AFFINITY).then_some(value.affinity_secs),
        source_ranges: is(frontend::SOURCE_RANGES),
        connections: stats.map_or(0, |s| s.chosen),
        rejected: stats.map_or(0, |s| s.refused),
        dropped: stats.map_or(0, |s| s.dropped),
        endpoints,
    }
}

/// The backends of a frontend's Service, with what they do for this frontend.
fn endpoints(
    value: &Frontend,
    backends: &[(u32, &Backend)],
    actual: &Actual,
    connections: &BTreeMap<(u32, u32), u64>,
) -> Vec<EndpointRow> {
    let selected = selected(value, actual);
    let mut rows: Vec<_> = backends
        .iter()
        .map(|(index, backend)| {
            let state = match (backend.flags & backend::DRAINING != 0, selected.contains(index)) {
                (true, _) => State::Draining,
                (false, true) => State::Active,
                (false, false) => State::Unused,
            };
            let row = EndpointRow {
                endpoint: endpoint_text(backend.addr, backend.port),
                state,
                local: backend.is_local(),
                connections: connections.get(&(*index, backend.generation)).copied().unwrap_or(0),
            };
            ((IpAddr::from(backend.addr), backend.port.number()), row)
        })
        .collect();
    rows.sort_by_key(|(order, _)| *order);
    rows.into_iter().map(|(_, row)| row).collect()
}

/// The backends that new flows of a frontend go to, by index: those of its policy, and those that other nodes send to.
pub(super) fn selected(value: &Frontend, actual: &Actual) -> BTreeSet<u32> {
    let is = |bit| value.flags & bit != 0;
    let runs = [(value.cluster, !is(frontend::LOCAL)), (value.local, is(frontend::LOCAL | frontend::DSR))];
    let backends = |run: Run| {
        let count = run.count.min(actual.slots.last().unwrap_or(0));
        actual.run(Run { count, ..run }).filter(|index| *index != 0)
    };
    runs.into_iter().filter(|(_, used)| *used).flat_map(|(run, _)| backends(run)).collect()
}

/// `address:port/protocol` of a frontend.
fn destination(row: &FrontendRow) -> String {
    let FrontendRow { address, port, protocol, .. } = row;
    match address.contains(':') {
        true => format!("[{address}]:{port}/{protocol}"),
        false => format!("{address}:{port}/{protocol}"),
    }
}

fn endpoint_line(row: &EndpointRow) -> String {
    let mut line = format!("{} {}", row.endpoint, row.state.word());
    match row.connections {
        0 => {}
        1 => line += " 1 connection",
        n => line += &format!(" {n} connections"),
    }
    if row.local {
        line += " (local)";
    }
    line
}

/// The rows for a person.
#[must_use]
pub fn text(rows: &[FrontendRow]) -> String {
    let header = [
        "SERVICE",
        "TYPE",
        "DESTINATION",
        "POLICY",
        "AFFINITY",
        "CONNECTIONS",
        "REJECTED",
        "DROPPED",
        "ENDPOINTS",
    ];
    let cells = rows.iter().map(|row| {
        let endpoints: Vec<_> = row.endpoints.iter().map(endpoint_line).collect();
        vec![
            row.service.clone(),
            match (row.kind, row.family) {
                ("NodePort", 6) => "NodePort (IPv6)".to_owned(),
                (kind, _) => kind.to_owned(),
            },
            destination(row),
            format!("{}{}", row.policy, if row.dsr { " (dsr)" } else { "" }),
            row.affinity_seconds.map_or_else(|| "-".to_owned(), |s| format!("{s}s")),
            row.connections.to_string(),
            row.rejected.to_string(),
            row.dropped.to_string(),
            if endpoints.is_empty() { "none".to_owned() } else { endpoints.join("\n") },
        ]
    });
    table::table(&header, cells.collect())
}

#[cfg(test)]
mod tests {
    use super::super::memory::{golden, small_cluster};
    use super::*;

    #[test]
    fn a_frontend_is_shown_with_its_endpoints_and_what_they_do() {
        let rows = rows(&small_cluster()).unwrap();
        golden("service_list", &text(&rows));
    }

    #[test]
    fn the_json_form_has_the_same_and_keeps_its_names() {
        let rows = rows(&small_cluster()).unwrap();
        let json = serde_json::to_value(&rows[1]).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "service": "default/web:http", "type": "NodePort", "address": "*", "port": 30200,
                "protocol": "TCP", "family": 4, "policy": "Local", "dsr": false, "affinity_seconds": 10800,
                "source_ranges": false, "connections": 41, "rejected": 0, "dropped": 2,
                "endpoints": [
                    {"endpoint": "10.244.1.5:8080", "state": "active", "local": true, "connections": 1},
                    {"endpoint": "10.244.1.9:8080", "state": "draining", "local": true, "connections": 1},
                    {"endpoint": "10.244.2.7:8080", "state": "unused", "local": false, "connections": 1},
                ],
            })
        );
        assert!(serde_json::to_value(&rows[0]).unwrap()["affinity_seconds"].is_null());
    }

    #[test]
    fn a_frontend_of_which_other_nodes_answer_says_so_and_has_what_they_send_to() {
        let mut memory = small_cluster();
        let node_port =
            memory.actual.frontends.keys().find(|key| key.addr.is_unspecified()).copied().unwrap();
        // The endpoint of this node is only for what other nodes send.
        memory.actual.slots = [(10, 2), (20, 1)].into_iter().collect();
        let cluster = Run { first: 10, count: 1 };
        memory.actual.frontends.entry(node_port).and_modify(|value| {
            *value =
                Frontend { flags: frontend::NODE_PORT | frontend::ANY | frontend::DSR, cluster, ..*value };
        });
        let rows = rows(&memory).unwrap();
        assert_eq!((rows[0].dsr, rows[1].dsr), (false, true));
        let states: Vec<_> = rows[1].endpoints.iter().map(|row| row.state.word()).collect();
        assert_eq!(states, ["active", "draining", "active"]);
        assert!(text(&rows).lines().any(|line| line.contains("*:30200/TCP        Cluster (dsr)  ")));
    }

    #[test]
    fn a_service_without_a_name_is_shown_by_its_id() {
        let mut memory = small_cluster();
        memory.actual.services.remove(&2);
        assert!(rows(&memory).unwrap().iter().any(|row| row.service == "#2"));
    }
}

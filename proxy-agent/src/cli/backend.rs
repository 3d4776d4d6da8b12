//! `backend list`: every endpoint, the Services that use it, its live connections.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Result;
use proxy_common::abi::backend;
use serde::Serialize;

use super::service::{State, selected};
use super::table;
use super::view::{View, connections, endpoint_text, service_text};

/// What one Service port does with an endpoint.
#[derive(Clone, Debug, Serialize)]
pub struct Use {
    /// `namespace/name:port`.
    pub service: String,
    /// What the endpoint does for it.
    pub state: State,
    /// Flows of the Service port to it.
    pub connections: u64,
    /// Index in BACKENDS.
    pub index: u32,
    /// How often the index has been given away.
    pub generation: u32,
}

/// One endpoint.
#[derive(Clone, Debug, Serialize)]
pub struct BackendRow {
    /// `address:port`.
    pub endpoint: String,
    /// `TCP`, `UDP`, `SCTP`; empty when the Service is not known.
    pub protocol: String,
    /// Whether it runs on this node.
    pub local: bool,
    /// Flows to it. Connections translated at their socket have none.
    pub connections: u64,
    /// The Service ports that use it.
    pub services: Vec<Use>,
}

/// Every endpoint by address.
pub fn rows(view: &dyn View) -> Result<Vec<BackendRow>> {
    let (actual, connections) = (view.actual()?, connections(view)?);
    let mut in_use = std::collections::BTreeSet::new();
    for value in actual.frontends.values() {
        in_use.extend(selected(value, &actual));
    }
    let mut rows = BTreeMap::new();
    for (index, backend) in actual.backends.iter().filter(|(_, backend)| backend.is_live()) {
        let proto = actual.services.get(&backend.service).map(|name| name.proto);
        let connections = connections.get(&(index, backend.generation)).copied().unwrap_or(0);
        let row =
            rows.entry((IpAddr::from(backend.addr), backend.port.number(), proto)).or_insert_with(|| {
                BackendRow {
                    endpoint: endpoint_text(backend.addr, backend.port),
                    protocol: proto.map(|proto| proto.to_string()).unwrap_or_default(),
                    local: backend.is_local(),
                    connections: 0,
                    services: vec![],
                }
            });
        row.connections += connections;
        row.services.push(Use {
            service: service_text(backend.service, &actual.services),
            state: match (backend.flags & backend::DRAINING != 0, in_use.contains(&index)) {
                (true, _) => State::Draining,
                (false, true) => State::Active,
                (false, false) => State::Unused,
            },
            connections,
            index,
            generation: backend.generation,
        });
    }
    Ok(rows.into_values().collect())
}

/// The rows for a person.
#[must_use]
pub fn text(rows: &[BackendRow]) -> String {
    let cells = rows.iter().map(|row| {
        let lines = |line: fn(&Use) -> String| row.services.iter().map(line).collect::<Vec<_>>().join("\n");
        vec![
            format!("{}/{}", row.endpoint, if row.protocol.is_empty() { "?" } else { &row.protocol }),
            if row.local { "yes" } else { "no" }.to_owned(),
            row.connections.to_string(),
            lines(|service| service.state.word().to_owned()),
            lines(|service| service.service.clone()),
        ]
    });
    table::table(&["ENDPOINT", "LOCAL", "CONNECTIONS", "STATE", "SERVICES"], cells.collect())
}

#[cfg(test)]
mod tests {
    use super::super::memory::{golden, name, small_cluster};
    use super::*;
    use proxy_common::abi::Backend;
    use proxy_common::addr::Proto;

    #[test]
    fn an_endpoint_is_listed_once_with_every_service_that_uses_it() {
        let mut memory = small_cluster();
        memory.actual.services.insert(3, name("default", "web-canary", "http", Proto::TCP, 4).into());
        let shared = Backend { service: 3, generation: 1, ..*memory.actual.backends.get(1).unwrap() };
        memory.actual.backends.insert(7, shared);
        let rows = rows(&memory).unwrap();
        golden("backend_list", &text(&rows));
        assert_eq!(
            serde_json::to_value(&rows[0]).unwrap(),
            serde_json::json!({
                "endpoint": "10.244.1.5:8080", "protocol": "TCP", "local": true, "connections": 1,
                "services": [
                    {"service": "default/web:http", "state": "active", "connections": 1, "index": 1, "generation": 1},
                    {"service": "default/web-canary:http", "state": "unused", "connections": 0, "index": 7, "generation": 1},
                ],
            })
        );
    }

    #[test]
    fn flows_to_an_earlier_owner_of_the_index_are_not_counted() {
        let mut memory = small_cluster();
        let now = *memory.actual.backends.get(2).unwrap();
        memory.actual.backends.insert(2, Backend { generation: now.generation + 1, ..now });
        let rows = rows(&memory).unwrap();
        let row = rows.iter().find(|row| row.endpoint == "10.244.2.7:8080").unwrap();
        assert_eq!(row.connections, 0);
    }
}

//! Tables in memory for the tests of the commands, and one small cluster in them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use proxy_common::abi::{
    AgentState, Backend, Flow, FlowKey, Frontend, FrontendKey, Hook, Leg, Reason, Run, ServiceName,
    ServiceStats, backend, frontend, text,
};
use proxy_common::addr::{Addr, Port, Proto};

use super::view::{FlowTable, LinkInfo, MapFill, Now, View};
use crate::plan::Actual;

/// The moment of all tests.
pub(super) const NOW: Now = Now { unix_ms: 1_800_000_000_000, mono_ns: 1_000_000_000_000 };

pub(super) struct Memory {
    pub(super) actual: Actual,
    pub(super) agent: AgentState,
    pub(super) running: bool,
    pub(super) complaints: Vec<String>,
    pub(super) reasons: Vec<(Reason, u64)>,
    pub(super) stats: BTreeMap<u32, ServiceStats>,
    pub(super) flows: RefCell<BTreeMap<(FlowTable, FlowKey), Flow>>,
    pub(super) fill: Vec<MapFill>,
    pub(super) links: Vec<LinkInfo>,
}

impl View for Memory {
    fn actual(&self) -> Result<Actual> {
        Ok(self.actual.clone())
    }
    fn agent(&self) -> Result<AgentState> {
        Ok(self.agent)
    }
    fn is_running(&self) -> Result<bool> {
        Ok(self.running)
    }
    fn complaints(&self) -> Result<Vec<String>> {
        Ok(self.complaints.clone())
    }
    fn reasons(&self) -> Result<Vec<(Reason, u64)>> {
        Ok(self.reasons.clone())
    }
    fn service_stats(&self) -> Result<BTreeMap<u32, ServiceStats>> {
        Ok(self.stats.clone())
    }
    fn flows(&self, each: &mut dyn FnMut(FlowTable, FlowKey, Flow)) -> Result<()> {
        self.flows.borrow().iter().for_each(|((table, key), flow)| each(*table, *key, *flow));
        Ok(())
    }
    fn delete_flow(&self, table: FlowTable, key: &FlowKey) -> Result<bool> {
        Ok(self.flows.borrow_mut().remove(&(table, *key)).is_some())
    }
    fn fill(&self) -> Result<Vec<MapFill>> {
        Ok(self.fill.clone())
    }
    fn links(&self) -> Result<Vec<LinkInfo>> {
        Ok(self.links.clone())
    }
}

fn split(address: &str) -> (Addr, Port) {
    let address: SocketAddr = address.parse().unwrap();
    (address.ip().into(), Port::new(address.port()))
}

pub(super) fn name(namespace: &str, name: &str, port: &str, proto: Proto, family: u8) -> ServiceName {
    ServiceName { namespace: text(namespace), name: text(name), port: text(port), proto, family, pad: [0; 2] }
}

/// A flow with all its legs, as the programs leave them.
pub(super) struct Legs<'a> {
    pub(super) table: FlowTable,
    pub(super) proto: Proto,
    pub(super) client: &'a str,
    pub(super) vip: &'a str,
    pub(super) endpoint: &'a str,
    /// Node address and port of a masqueraded flow.
    pub(super) node: Option<&'a str>,
    /// TCP flags seen from the client, and from the endpoint.
    pub(super) seen: (u8, u8),
    pub(super) backend: (u32, u32),
    pub(super) service: u32,
    pub(super) idle_s: u64,
}

impl Memory {
    pub(super) fn add_flow(&self, legs: &Legs<'_>) {
        let Legs { table, proto, client, vip, endpoint, node, seen, backend, service, idle_s } = *legs;
        let ((src, sport), (vip, vport), (ep, eport)) = (split(client), split(vip), split(endpoint));
        let last_seen = NOW.mono_ns - idle_s * 1_000_000_000;
        let key = |src, sport, dst, dport, hook| FlowKey { src, dst, sport, dport, proto, hook, pad: 0 };
        let flow = |leg, addr, port, seen| Flow {
            addr,
            port,
            other_port: Port(0),
            leg,
            seen,
            pad: 0,
            backend: backend.0,
            generation: backend.1,
            service,
            pad2: 0,
            last_seen,
        };
        let snat = key(src, sport, ep, eport, Hook::EGRESS);
        let mut flows = self.flows.borrow_mut();
        flows.insert((table, key(src, sport, vip, vport, Hook::INGRESS)), flow(Leg::DNAT, ep, eport, seen.0));
        flows.insert((table, snat.reversed(Hook::EGRESS)), flow(Leg::UNDNAT, vip, vport, seen.1));
        if let Some((node, nport)) = node.map(split) {
            flows.insert((table, snat), flow(Leg::SNAT, node, nport, seen.0));
            flows.insert(
                (table, key(ep, eport, node, nport, Hook::INGRESS)),
                flow(Leg::UNSNAT, src, sport, seen.1),
            );
        }
    }

    fn add_frontend(&mut self, key: (&str, u16, Proto), service: u32, flags: u32, runs: (Run, Run)) {
        let ip: IpAddr = key.0.parse().unwrap();
        let key = FrontendKey::new(ip.into(), Port::new(key.1), key.2);
        let affinity_secs = if flags & frontend::AFFINITY != 0 { 10800 } else { 0 };
        let value =
            Frontend { service, cluster: runs.0, local: runs.1, flags, affinity_secs, seal: 0 }.sealed(&key);
        self.actual.frontends.insert(key, value);
    }

    fn add_backend(&mut self, index: u32, endpoint: &str, flags: u16, generation: u32, service: u32) {
        let (addr, port) = split(endpoint);
        self.actual.backends.insert(index, Backend { addr, port, flags, generation, service, pad: 0 });
    }
}

/// `default/web:http` (ClusterIP, NodePort under policy Local, an endpoint here, one elsewhere, one draining),
/// `kube-system/dns` (UDP, IPv6, no endpoint left), one masqueraded TCP flow, one draining, one half-open.
pub(super) fn small_cluster() -> Memory {
    let mut memory = Memory {
        actual: Actual::default(),
        agent: agent(),
        running: true,
        complaints: vec![],
        reasons: Reason::ALL.iter().map(|r| (*r, u64::from(*r == Reason::NewFlow) * 12)).collect(),
        stats: BTreeMap::from([(1, ServiceStats { chosen: 41, refused: 0, dropped: 2 })]),
        flows: RefCell::default(),
        fill: vec![
            MapFill { name: "FRONTENDS", used: 3, max: 131_072 },
            MapFill { name: "FLOWS", used: 8, max: 524_288 },
        ],
        links: vec![
            LinkInfo { name: "connect4".into(), program: "connect4".into(), attached: true, program_id: 7 },
            LinkInfo {
                name: "tc_ingress-2".into(),
                program: "tc_ingress".into(),
                attached: true,
                program_id: 8,
            },
        ],
    };
    memory.actual.services.insert(1, name("default", "web", "http", Proto::TCP, 4));
    memory.actual.services.insert(2, name("kube-system", "dns", "", Proto::UDP, 6));
    memory.add_backend(1, "10.244.1.5:8080", backend::LOCAL, 1, 1);
    memory.add_backend(2, "10.244.2.7:8080", 0, 3, 1);
    memory.add_backend(3, "10.244.1.9:8080", backend::LOCAL | backend::DRAINING, 1, 1);
    memory.actual.backends.insert(4, Backend::retired(9));
    memory.actual.slots = BTreeMap::from([(10, 1), (11, 2), (20, 1)]);
    let runs = (Run { first: 10, count: 2 }, Run { first: 20, count: 1 });
    memory.add_frontend(("10.96.0.20", 80, Proto::TCP), 1, frontend::INTERNAL | frontend::ANY, runs);
    let node_port = frontend::NODE_PORT | frontend::LOCAL | frontend::ANY | frontend::AFFINITY;
    memory.add_frontend(("0.0.0.0", 30200, Proto::TCP), 1, node_port, runs);
    memory.add_frontend(("fd00::a", 53, Proto::UDP), 2, frontend::INTERNAL, (Run::EMPTY, Run::EMPTY));
    let (syn, syn_ack, fin) = (0x02, 0x12, 0x01);
    let tcp = |client, vip, endpoint, backend| Legs {
        table: FlowTable::Established,
        proto: Proto::TCP,
        client,
        vip,
        endpoint,
        node: None,
        seen: (syn | 0x10, syn_ack),
        backend,
        service: 1,
        idle_s: 5,
    };
    memory.add_flow(&Legs {
        node: Some("10.0.0.1:1024"),
        ..tcp("192.0.2.9:40000", "10.0.0.1:30200", "10.244.2.7:8080", (2, 3))
    });
    memory.add_flow(&Legs {
        seen: (syn | 0x10 | fin, syn_ack),
        idle_s: 70,
        ..tcp("10.244.1.3:40001", "10.96.0.20:80", "10.244.1.9:8080", (3, 1))
    });
    memory.add_flow(&Legs {
        table: FlowTable::HalfOpen,
        seen: (syn, 0),
        idle_s: 0,
        ..tcp("10.244.1.3:40002", "10.96.0.20:80", "10.244.1.5:8080", (1, 1))
    });
    memory
}

/// An agent that is alive and in step.
fn agent() -> AgentState {
    AgentState {
        pid: 4242,
        started_ms: NOW.unix_ms - 3_600_000,
        beat_ms: NOW.unix_ms - 2_000,
        synced_ms: NOW.unix_ms - 61_000,
        queued_ms: 0,
        generation: 17,
        services: 2,
        endpoints: 3,
        complaints: 0,
        synced: 1,
        connected: 1,
        interfaces: 4,
        interfaces_failed: 0,
        pad: 0,
        version: text("0.1.0"),
        node: text("n1"),
        source: text("manifests /etc/services"),
    }
}

/// Compares with `golden/<name>.txt`; `UPDATE_EXPECT=1` writes it instead.
#[track_caller]
pub(super) fn golden(name: &str, actual: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/cli/golden/{name}.txt"));
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::write(&path, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(actual, expected, "{} (UPDATE_EXPECT=1 accepts the new text)", path.display());
}

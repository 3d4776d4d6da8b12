//! Tables in memory for the tests of the commands, and one small cluster in them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use proxy_common::abi::config::{LEAVE_MIDDLE, LEAVE_NEW};
use proxy_common::abi::{
    AgentState, Backend, Flow, FlowId, Frontend, FrontendKey, Reason, Role, Run, ServiceName, ServiceStats,
    State, Tuple, backend, flow_flags, frontend, text,
};
use proxy_common::addr::{Addr, Port, Proto};

use super::view::{LinkInfo, MapFill, Now, View};
use agent_core::plan::Actual;

/// The moment of all tests.
pub(super) const NOW: Now = Now { unix_ms: 1_800_000_000_000, mono_ns: 1_000_000_000_000 };

pub(super) struct Memory {
    pub(super) actual: Actual,
    pub(super) agent: AgentState,
    pub(super) running: bool,
    pub(super) warnings: Vec<String>,
    pub(super) reasons: Vec<(Reason, u64)>,
    pub(super) stats: BTreeMap<u32, ServiceStats>,
    pub(super) flows: RefCell<Vec<Flow>>,
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
    fn warnings(&self) -> Result<Vec<String>> {
        Ok(self.warnings.clone())
    }
    fn reasons(&self) -> Result<Vec<(Reason, u64)>> {
        Ok(self.reasons.clone())
    }
    fn service_stats(&self) -> Result<BTreeMap<u32, ServiceStats>> {
        Ok(self.stats.clone())
    }
    fn flows(&self, each: &mut dyn FnMut(&Flow)) -> Result<()> {
        self.flows.borrow().iter().for_each(each);
        Ok(())
    }
    fn end_flows(&self, ids: &[FlowId]) -> Result<u32> {
        let mut flows = self.flows.borrow_mut();
        let before = flows.len();
        flows.retain(|flow| !ids.contains(&flow.id));
        Ok(u32::try_from(before - flows.len())?)
    }
    fn fill(&self) -> Result<Vec<MapFill>> {
        Ok(self.fill.clone())
    }
    fn links(&self) -> Result<Vec<LinkInfo>> {
        Ok(self.links.clone())
    }
    fn retire(&mut self, retired: bool) -> Result<()> {
        let leave = LEAVE_NEW | LEAVE_MIDDLE;
        self.actual.config.flags = self.actual.config.flags & !leave | if retired { leave } else { 0 };
        Ok(())
    }
}

fn split(address: &str) -> (Addr, Port) {
    let address: SocketAddr = address.parse().unwrap();
    (address.ip().into(), Port::new(address.port()))
}

pub(super) fn name(namespace: &str, name: &str, port: &str, proto: Proto, family: u8) -> ServiceName {
    ServiceName { namespace: text(namespace), name: text(name), port: text(port), proto, family, pad: [0; 2] }
}

/// A flow as the programs leave it.
pub(super) struct Sketch<'a> {
    pub(super) old: bool,
    pub(super) proto: Proto,
    pub(super) client: &'a str,
    pub(super) vip: &'a str,
    pub(super) endpoint: &'a str,
    /// The client's port towards the endpoint.
    pub(super) middle_port: Option<u16>,
    /// Node address and port of a masqueraded flow.
    pub(super) node: Option<&'a str>,
    /// Whether the client, and the endpoint, have closed the connection.
    pub(super) fin: [u8; 2],
    pub(super) backend: (u32, u32),
    pub(super) service: u32,
    pub(super) idle_s: u64,
}

impl Memory {
    pub(super) fn add_flow(&self, sketch: &Sketch<'_>) {
        let ((src, sport), (vip, vport)) = (split(sketch.client), split(sketch.vip));
        let (ep, eport) = split(sketch.endpoint);
        let mut flow = Flow {
            id: FlowId(self.flows.borrow().len() as u64 + 1).next(),
            service: sketch.service,
            backend: sketch.backend.0,
            generation: sketch.backend.1,
            state: State::LIVE,
            old: sketch.old.into(),
            legs: 2,
            seen: [NOW.mono_ns - sketch.idle_s * 1_000_000_000, 0],
            fin: sketch.fin,
            ..Flow::EMPTY
        };
        let mut set = |role: Role, src, sport, dst, dport| {
            let tuple = Tuple::new(src, sport, dst, dport, sketch.proto);
            flow.near[role.index()] =
                u8::try_from(tuple.write_pair(&mut flow.pairs[role.index()])).expect("one of two ends");
        };
        set(Role::OUTER, src, sport, vip, vport);
        set(Role::MIDDLE, src, sketch.middle_port.map_or(sport, Port::new), ep, eport);
        if let Some((node, nport)) = sketch.node.map(split) {
            set(Role::INNER, node, nport, ep, eport);
            flow.flags |= flow_flags::MASQUERADE;
            flow.source = flow.pairs[Role::INNER.index()].seal() | 1;
        }
        self.flows.borrow_mut().push(flow);
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
        self.actual.backends.insert(index, Backend { addr, port, flags, generation, service, node: 0 });
    }
}

/// `default/web:http` (ClusterIP, NodePort under policy Local, an endpoint here, one elsewhere, one draining),
/// `kube-system/dns` (UDP, IPv6, no endpoint left), one masqueraded TCP flow, one draining, one unanswered.
pub(super) fn small_cluster() -> Memory {
    let mut memory = Memory {
        actual: Actual::default(),
        agent: agent(),
        running: true,
        warnings: vec![],
        reasons: Reason::ALL.iter().map(|r| (*r, u64::from(*r == Reason::NewFlow) * 12)).collect(),
        stats: BTreeMap::from([(1, ServiceStats { chosen: 41, refused: 0, dropped: 2 })]),
        flows: RefCell::default(),
        fill: vec![
            MapFill { name: "FRONTENDS", used: 3, max: 131_072 },
            MapFill { name: "RECORDS", used: 3, max: 163_840 },
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
    memory.actual.services.insert(1, name("default", "web", "http", Proto::TCP, 4).into());
    memory.actual.services.insert(2, name("kube-system", "dns", "", Proto::UDP, 6).into());
    memory.add_backend(1, "10.244.1.5:8080", backend::LOCAL, 1, 1);
    memory.add_backend(2, "10.244.2.7:8080", 0, 3, 1);
    memory.add_backend(3, "10.244.1.9:8080", backend::LOCAL | backend::DRAINING, 1, 1);
    memory.actual.backends.insert(4, Backend::retired(9));
    memory.actual.slots = [(10, 1), (11, 2), (20, 1)].into_iter().collect();
    let runs = (Run { first: 10, count: 2 }, Run { first: 20, count: 1 });
    memory.add_frontend(("10.96.0.20", 80, Proto::TCP), 1, frontend::INTERNAL | frontend::ANY, runs);
    let node_port = frontend::NODE_PORT | frontend::LOCAL | frontend::ANY | frontend::AFFINITY;
    memory.add_frontend(("0.0.0.0", 30200, Proto::TCP), 1, node_port, runs);
    memory.add_frontend(("fd00::a", 53, Proto::UDP), 2, frontend::INTERNAL, (Run::EMPTY, Run::EMPTY));
    let tcp = |client, vip, endpoint, backend| Sketch {
        old: true,
        proto: Proto::TCP,
        client,
        vip,
        endpoint,
        middle_port: None,
        node: None,
        fin: [0, 0],
        backend,
        service: 1,
        idle_s: 5,
    };
    memory.add_flow(&Sketch {
        node: Some("10.0.0.1:1024"),
        ..tcp("192.0.2.9:40000", "10.0.0.1:30200", "10.244.2.7:8080", (2, 3))
    });
    memory.add_flow(&Sketch {
        fin: [1, 0],
        idle_s: 70,
        ..tcp("10.244.1.3:40001", "10.96.0.20:80", "10.244.1.9:8080", (3, 1))
    });
    memory.add_flow(&Sketch {
        old: false,
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
        absent: 0,
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

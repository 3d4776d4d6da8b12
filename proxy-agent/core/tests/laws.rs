//! Laws of planning, over random worlds: small pools of addresses, ports and endpoints, so that Services
//! collide and hand destinations to one another all the time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use agent_core::datapath::Datapath;
use agent_core::datapath::memory::{Fault, Faulty, Memory};
use agent_core::model::{
    Desired, DesiredBackend, DesiredFrontend, DesiredService, Family, NodeTables, ObjectName, ServicePort,
};
use agent_core::plan::{
    Actual, Capacity, GRACE_MS, Plan, Planner, Proposal, Step, lint, lint_prefix, service_name,
};
use proptest::prelude::*;
use proxy_common::abi::{
    Backend, Config, Frontend, FrontendKey, Iface, RouteKey, SourceKey, address, backend, frontend,
};
use proxy_common::addr::{Addr, Port, Proto};

const SERVICES: usize = 5;
const ENDPOINTS: usize = 6;

type Endpoint = (Addr, Port);

fn addr(a: u8, b: u8, c: u8, d: u8) -> Addr {
    Addr::from(Ipv4Addr::new(a, b, c, d))
}

fn endpoint(n: usize) -> Endpoint {
    (addr(10, 244, 0, n as u8 + 1), Port::new(8080))
}

fn port(n: usize) -> ServicePort {
    ServicePort {
        service: ObjectName { namespace: "default".into(), name: format!("svc-{n}").into() },
        port: "http".into(),
        proto: Proto::TCP,
        family: Family::V4,
    }
}

/// Every destination there is: four addresses (the last one is also the node's) by two ports, two NodePorts.
fn keys() -> Vec<FrontendKey> {
    let vips = [addr(10, 96, 0, 1), addr(10, 96, 0, 2), addr(203, 0, 113, 1), addr(192, 0, 2, 1)];
    let ports = [80, 443].map(Port::new);
    let node_ports = [30080, 30443].map(Port::new);
    let at_vips = vips.into_iter().flat_map(|vip| ports.map(|port| FrontendKey::new(vip, port, Proto::TCP)));
    at_vips.chain(node_ports.map(|port| FrontendKey::new(Addr::ANY_V4, port, Proto::TCP))).collect()
}

/// What is drawn for one Service.
#[derive(Clone, Debug)]
struct Draw {
    /// 0 absent, 1 ready, 2 ready and local, 3 draining, 4 ready on a node that answers clients itself.
    endpoints: Vec<u8>,
    reversed: bool,
    affinity_secs: u32,
    sources: u8,
}

fn draw() -> impl Strategy<Value = Draw> {
    let affinity = prop_oneof![3 => Just(0), 1 => Just(10_800_u32)];
    (prop::collection::vec(0_u8..5, ENDPOINTS), prop::bool::weighted(0.2), affinity, 0_u8..4).prop_map(
        |(endpoints, reversed, affinity_secs, sources)| Draw { endpoints, reversed, affinity_secs, sources },
    )
}

fn service(draw: &Draw) -> DesiredService {
    let mut backends = BTreeMap::new();
    let (mut cluster, mut local) = (Vec::new(), Vec::new());
    for (n, state) in draw.endpoints.iter().enumerate() {
        let flags = match state {
            0 => continue,
            1 | 4 => 0,
            2 => backend::LOCAL,
            _ => backend::DRAINING,
        };
        let node = if *state == 4 { 9 } else { 0 };
        backends.insert(endpoint(n), DesiredBackend { flags, node });
        if *state != 3 {
            cluster.push(endpoint(n));
        }
        if *state == 2 {
            local.push(endpoint(n));
        }
    }
    if draw.reversed {
        cluster.reverse();
    }
    let ranges = (0..2).filter(|bit| draw.sources >> bit & 1 != 0);
    let source_ranges = ranges.map(|bit| (addr(198, 51, 100 + bit, 0), 24)).collect();
    let affinity_secs = draw.affinity_secs;
    DesiredService { frontends: Vec::new(), affinity_secs, backends, cluster, local, source_ranges }
}

/// A whole world: who has which destination has been settled, as the model does.
fn world() -> impl Strategy<Value = Desired> {
    let services = prop::collection::vec(prop::option::weighted(0.8, draw()), SERVICES);
    let owners = prop::collection::vec((0..SERVICES + 2, 0_u8..16), keys().len());
    (services, owners, 0_u8..8, 0_u32..2).prop_map(|(draws, owners, node, seed)| {
        let mut services: BTreeMap<ServicePort, DesiredService> = draws
            .iter()
            .enumerate()
            .filter_map(|(n, draw)| Some((port(n), service(draw.as_ref()?))))
            .collect();
        for (key, (owner, bits)) in keys().into_iter().zip(owners) {
            let Some(service) = services.get_mut(&port(owner)) else { continue };
            let flags = frontend_flags(service, &key, bits);
            service.frontends.push(DesiredFrontend { key, flags });
        }
        Desired { services, node: node_tables(node, seed) }
    })
}

fn frontend_flags(service: &DesiredService, key: &FrontendKey, bits: u8) -> u32 {
    let mut flags = if bits & 1 != 0 { frontend::ANY } else { 0 };
    if bits & 2 != 0 {
        flags |= frontend::LOCAL;
    }
    if service.affinity_secs != 0 {
        flags |= frontend::AFFINITY;
    }
    if key.addr == Addr::ANY_V4 {
        flags |= frontend::NODE_PORT;
    } else if bits & 4 != 0 {
        flags |= frontend::INTERNAL;
    } else if !service.source_ranges.is_empty() {
        flags |= frontend::SOURCE_RANGES;
    }
    if bits & 8 != 0 && flags & (frontend::INTERNAL | frontend::LOCAL) == 0 {
        flags |= frontend::DSR;
    }
    flags
}

fn node_tables(bits: u8, seed: u32) -> NodeTables {
    let has = |bit: u8| bits >> bit & 1 != 0;
    let config = Config { seed, ..Config::EMPTY };
    let mut node =
        NodeTables { config, ifaces: BTreeMap::new(), routes: BTreeMap::new(), addresses: BTreeMap::new() };
    for index in (0..2).filter(|bit| has(*bit)) {
        let index = u32::from(index) + 2;
        node.ifaces.insert(index, Iface::new(0, seed));
        node.routes.insert(RouteKey::range(index, Addr::ANY_V4, 0), addr(192, 0, 2, seed as u8));
    }
    if has(1) {
        let node_port = if has(2) { address::NODE_PORT } else { 0 };
        node.addresses.insert(addr(192, 0, 2, 1), address::NODE | node_port);
    }
    if has(2) {
        node.addresses.insert(addr(192, 0, 2, 2), address::NODE);
    }
    node
}

/// Worlds, each some time after the one before.
fn history() -> impl Strategy<Value = Vec<(Desired, u64)>> {
    let pause = prop_oneof![Just(0), Just(1), Just(GRACE_MS - 1), Just(GRACE_MS), Just(3 * GRACE_MS)];
    prop::collection::vec((world(), pause), 1..7)
}

/// What a packet makes of a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    service: String,
    cluster: Vec<Endpoint>,
    local: Vec<Endpoint>,
    flags: u32,
    affinity_secs: u32,
}

fn seen(actual: &Actual) -> BTreeMap<FrontendKey, Seen> {
    let look = |(key, value): (&FrontendKey, &Frontend)| {
        let seen = Seen {
            service: name_of(actual, value.service),
            cluster: actual.endpoints(value.cluster).collect(),
            local: actual.endpoints(value.local).collect(),
            flags: value.flags,
            affinity_secs: value.affinity_secs,
        };
        (*key, seen)
    };
    actual.frontends.iter().map(look).collect()
}

fn name_of(actual: &Actual, id: u32) -> String {
    let line = actual.services.get(&id).map(|name| Step::PutService(0, name.clone()).to_string());
    line.unwrap_or_else(|| format!("nameless {id}"))
}

/// Everything that can be seen from outside, without indices.
#[derive(Debug, PartialEq, Eq)]
struct Observed {
    frontends: BTreeMap<FrontendKey, Seen>,
    backends: BTreeMap<(String, Endpoint), DesiredBackend>,
    sources: BTreeSet<(String, Addr, u32)>,
    addresses: BTreeMap<Addr, u32>,
    ifaces: BTreeMap<u32, Iface>,
    routes: BTreeMap<RouteKey, Addr>,
    service_ports: BTreeSet<u32>,
    config: Config,
}

fn observe(actual: &Actual) -> Observed {
    let live = actual.backends.values().filter(|backend| backend.is_live());
    let source = |key: &SourceKey| (name_of(actual, u32::from_be(key.service)), key.addr, key.prefix_len);
    Observed {
        frontends: seen(actual),
        backends: live
            .map(|b| {
                let Backend { addr, port, flags, generation: _, service, node } = *b;
                ((name_of(actual, service), (addr, port)), DesiredBackend { flags, node })
            })
            .collect(),
        sources: actual.sources.iter().map(source).collect(),
        addresses: actual.addresses.clone(),
        ifaces: actual.ifaces.clone(),
        routes: actual.routes.clone(),
        service_ports: (0..65_536)
            .filter(|port| {
                actual.service_ports.get(port / 64).is_some_and(|bits| bits >> (port % 64) & 1 != 0)
            })
            .collect(),
        config: actual.config,
    }
}

/// What should be observed: computed from the wish alone, knowing nothing of the planner.
fn expect(desired: &Desired) -> Observed {
    let mut expected = Observed {
        frontends: BTreeMap::new(),
        backends: BTreeMap::new(),
        sources: BTreeSet::new(),
        addresses: desired.node.addresses.clone(),
        ifaces: desired.node.ifaces.clone(),
        routes: desired.node.routes.clone(),
        service_ports: BTreeSet::new(),
        config: desired.node.config,
    };
    for (port, service) in &desired.services {
        let name = Step::PutService(0, service_name(port).expect("names are short").into()).to_string();
        for DesiredFrontend { key, flags } in &service.frontends {
            let seen = Seen {
                service: name.clone(),
                cluster: service.cluster.clone(),
                local: service.local.clone(),
                flags: *flags,
                affinity_secs: service.affinity_secs,
            };
            expected.frontends.insert(*key, seen);
            if flags & frontend::INTERNAL == 0 {
                expected.service_ports.insert(key.port.number().into());
            }
            let bit = match flags {
                flags if flags & frontend::NODE_PORT != 0 => continue,
                flags if flags & frontend::INTERNAL != 0 => address::CLUSTER_IP,
                _ => address::EXTERNAL,
            };
            *expected.addresses.entry(key.addr).or_insert(0) |= bit;
        }
        if service.frontends.iter().any(|f| f.flags & frontend::SOURCE_RANGES != 0) {
            let ranges = service.source_ranges.iter();
            expected.sources.extend(ranges.map(|(addr, bits)| (name.clone(), *addr, 32 + 96 + bits)));
        }
        expected.backends.extend(service.backends.iter().map(|(e, backend)| ((name.clone(), *e), *backend)));
    }
    expected
}

/// Tables that watch every write.
struct Watched {
    memory: Memory,
    /// When a slot was last shown by a frontend.
    shown: BTreeMap<u32, u64>,
    /// When a backend index was last live.
    live: BTreeMap<u32, u64>,
    /// When a service id was last named.
    named: BTreeMap<u32, u64>,
}

impl Watched {
    fn new(capacity: Capacity) -> Self {
        Self {
            memory: Memory::new(capacity),
            shown: BTreeMap::new(),
            live: BTreeMap::new(),
            named: BTreeMap::new(),
        }
    }

    /// Carries out a plan and checks all that must hold on the way.
    fn carry_out(&mut self, proposal: Proposal, now_ms: u64) -> Planner {
        let steps = proposal.plan.steps.clone();
        let before = seen(&self.memory.actual);
        let mut finished = self.memory.actual.clone();
        steps.iter().for_each(|step| finished.apply(step));
        let after = seen(&finished);
        for (n, step) in steps.iter().enumerate() {
            self.note(now_ms);
            self.check_rest(step, now_ms);
            self.memory.apply(std::slice::from_ref(step)).expect("the planner knows the capacity");
            let actual = &self.memory.actual;
            let story = || format!("after step {n} `{step}` of\n{}\n{}", lines(&steps), actual.dump());
            assert_eq!(lint_prefix(actual), [], "{}", story());
            let now = seen(actual);
            for (key, old) in &before {
                let Some(new) = after.get(key) else { continue };
                let is = now.get(key);
                assert!(is == Some(old) || is == Some(new), "{key:?} is {is:?}\n{}", story());
            }
        }
        self.note(now_ms);
        let actual = &self.memory.actual;
        assert_eq!(lint(actual), [], "{}\n{}", lines(&steps), actual.dump());
        let planner = proposal.applied(now_ms).0;
        assert_eq!(planner.actual(), actual);
        let mut twice = actual.clone();
        steps.iter().for_each(|step| twice.apply(step));
        assert_eq!(&twice, actual, "twice is not once:\n{}", lines(&steps));
        planner
    }

    /// Whoever reads the tables has waited until nothing of what was before is followed any more.
    fn restart(&mut self) {
        self.shown.clear();
        self.live.clear();
        self.named.clear();
    }

    fn note(&mut self, now_ms: u64) {
        let actual = &self.memory.actual;
        for run in actual.frontends.values().flat_map(|value| [value.cluster, value.local]) {
            self.shown.extend((run.first..run.first + run.count).map(|slot| (slot, now_ms)));
        }
        let live = actual.backends.iter().filter(|(_, backend)| backend.is_live());
        self.live.extend(live.map(|(index, _)| (index, now_ms)));
        self.named.extend(actual.services.keys().map(|id| (*id, now_ms)));
    }

    /// A number that comes into use has rested, and a live index keeps its endpoint until it retires.
    fn check_rest(&self, step: &Step, now_ms: u64) {
        let actual = &self.memory.actual;
        let last = match step {
            Step::PutSlot(slot, _) => self.shown.get(slot),
            Step::PutBackend(index, new) if new.is_live() => match actual.backends.get(*index) {
                Some(old) if old.is_live() => {
                    let identity = |b: &Backend| (b.addr, b.port, b.service, b.generation);
                    assert_eq!(identity(old), identity(new), "`{step}` changes a live backend");
                    return;
                }
                Some(old) => {
                    assert_eq!(old.generation, new.generation, "`{step}` forgets its generation");
                    self.live.get(index)
                }
                None => None,
            },
            Step::PutBackend(index, new) => {
                let old = actual.backends.get(*index).map(|old| old.generation);
                assert_eq!(old, new.generation.checked_sub(1), "`{step}` keeps its generation");
                None
            }
            Step::PutService(id, _) => self.named.get(id),
            _ => None,
        };
        if let Some(last) = last {
            assert!(now_ms >= last + GRACE_MS, "`{step}` at {now_ms}: still in use at {last}");
        }
    }
}

fn lines(steps: &[Step]) -> String {
    steps.iter().map(|step| format!("  {step}\n")).collect()
}

/// What differs between two worlds, as the model would report it.
fn difference(old: &Desired, new: &Desired) -> Vec<(ServicePort, Option<DesiredService>)> {
    let ports: BTreeSet<&ServicePort> = old.services.keys().chain(new.services.keys()).collect();
    ports
        .into_iter()
        .filter(|port| old.services.get(port) != new.services.get(port))
        .map(|port| (port.clone(), new.services.get(port).cloned()))
        .collect()
}

/// What a planner says of the tables without a walk through them: slots, backends and affinity.
fn known(planner: &Planner) -> (usize, usize, BTreeMap<u32, u32>) {
    (planner.used_slots(), planner.live_backends(), planner.affinity_secs().clone())
}

/// The same with one.
fn counted(actual: &Actual) -> (usize, usize, BTreeMap<u32, u32>) {
    let live = actual.backends.values().filter(|backend| backend.is_live()).count();
    (actual.shown_slots(), live, actual.affinity_secs())
}

fn empty_world() -> Desired {
    Desired { services: BTreeMap::new(), node: node_tables(0, 0) }
}

fn tight() -> impl Strategy<Value = Capacity> {
    (2_u32..12, 4_u32..24, 4_u32..20, 2_u32..7, 1_u32..5, 3_u32..7).prop_map(
        |(frontends, slots, backends, addresses, sources, services)| Capacity {
            frontends,
            slots,
            backends,
            addresses,
            sources,
            services,
            ifaces: 1,
            routes: 1,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn every_prefix_is_safe_and_every_end_is_what_was_wished(history in history()) {
        let mut tables = Watched::new(Capacity::default());
        let mut now_ms = 10_000;
        let mut planner = Planner::new(&Actual::default(), Capacity::default());
        for (desired, pause) in &history {
            now_ms += pause;
            let proposal = planner.full(desired, now_ms);
            prop_assert_eq!(&proposal.plan.warnings, &Vec::<String>::new());
            prop_assert_eq!(proposal.plan.retry_at_ms, None);
            planner = tables.carry_out(proposal, now_ms);
            prop_assert_eq!(observe(&tables.memory.actual), expect(desired));
            prop_assert_eq!(known(&planner), counted(&tables.memory.actual));
        }
    }

    #[test]
    fn changes_one_by_one_end_where_comparing_everything_ends(history in history()) {
        let mut tables = Watched::new(Capacity::default());
        let mut now_ms = 10_000;
        let mut planner = Planner::new(&Actual::default(), Capacity::default());
        let mut old = empty_world();
        for (desired, pause) in &history {
            now_ms += pause;
            let node = (old.node != desired.node).then_some(&desired.node);
            let proposal = planner.dirty(&difference(&old, desired), node, now_ms);
            planner = tables.carry_out(proposal, now_ms);
            prop_assert_eq!(observe(&tables.memory.actual), expect(desired));
            prop_assert_eq!(known(&planner), counted(&tables.memory.actual));
            old = desired.clone();
        }
        let proposal = planner.full(&old, now_ms);
        prop_assert_eq!(proposal.plan.steps, []);
    }

    #[test]
    fn a_restart_in_an_unchanged_world_plans_nothing(history in history()) {
        let mut tables = Watched::new(Capacity::default());
        let mut now_ms = 10_000;
        for (desired, pause) in &history {
            now_ms += pause;
            let proposal = Planner::new(&tables.memory.actual, Capacity::default()).full(desired, now_ms);
            tables.restart();
            drop(tables.carry_out(proposal, now_ms));
            let again = Planner::new(&tables.memory.actual, Capacity::default()).full(desired, now_ms);
            prop_assert_eq!(again.plan.steps, []);
        }
    }

    #[test]
    fn faults_are_overcome_by_reading_and_planning_again(
        history in history(),
        seed: u64,
        per_mille in 1_u32..50,
    ) {
        let fault = Fault::Chance { per_mille, state: seed };
        let mut tables = Faulty { inner: Memory::default(), fault };
        let mut now_ms = 10_000;
        let mut kept: Option<Planner> = None;
        for (desired, pause) in &history {
            now_ms += pause;
            for tries in 0.. {
                prop_assert!(tries < 2_000, "does not converge");
                let planner = match kept.take() {
                    Some(planner) => planner,
                    None => Planner::new(&tables.read().unwrap(), Capacity::default()),
                };
                let proposal = planner.full(desired, now_ms);
                let before = tables.inner.writes;
                let Err((done, _)) = tables.apply(&proposal.plan.steps) else {
                    kept = Some(proposal.applied(now_ms).0);
                    break;
                };
                prop_assert_eq!(tables.inner.writes - before, done);
                prop_assert_eq!(lint_prefix(&tables.inner.actual), []);
                now_ms += 7;
            }
            prop_assert_eq!(lint(&tables.inner.actual), []);
            prop_assert_eq!(observe(&tables.inner.actual), expect(desired));
        }
    }

    #[test]
    fn full_tables_leave_services_whole_and_let_the_others_pass(history in history(), capacity in tight()) {
        let mut tables = Watched::new(capacity);
        let mut now_ms = 10_000;
        let mut planner = Planner::new(&Actual::default(), capacity);
        let mut old = empty_world();
        for (n, (desired, pause)) in history.iter().enumerate() {
            now_ms += pause;
            let proposal = if n % 2 == 0 {
                planner.full(desired, now_ms)
            } else {
                planner.dirty(&difference(&old, desired), Some(&desired.node), now_ms)
            };
            let warnings = proposal.plan.warnings.clone();
            let before = seen(&tables.memory.actual);
            planner = tables.carry_out(proposal, now_ms);
            let (is, wished) = (seen(&tables.memory.actual), expect(desired).frontends);
            for (key, is) in &is {
                let whole = wished.get(key) == Some(is) || before.get(key) == Some(is);
                prop_assert!(whole, "{:?} is neither as wished nor as before: {:?}", key, is);
            }
            for (port, service) in &desired.services {
                let as_wished = service.frontends.iter().all(|f| is.get(&f.key) == wished.get(&f.key));
                let named = format!("Service default/{} ", port.service.name);
                let named_in_warning = warnings.iter().any(|line| line.starts_with(&named));
                prop_assert!(as_wished || named_in_warning, "{} is neither served nor named: {:?}", named, warnings);
            }
            old = desired.clone();
        }
        // With room enough everything falls into place.
        let actual = std::mem::take(&mut tables.memory.actual);
        tables.memory = Memory::default();
        tables.memory.actual = actual;
        tables.restart();
        let proposal = Planner::new(&tables.memory.actual, Capacity::default()).full(&old, now_ms);
        prop_assert_eq!(&proposal.plan.warnings, &Vec::<String>::new());
        drop(tables.carry_out(proposal, now_ms));
        prop_assert_eq!(observe(&tables.memory.actual), expect(&old));
    }
}

fn big_world(services: u32, endpoints: u32) -> Desired {
    let one = |n: u32| {
        let key = FrontendKey::new(Addr::v4((0x0a60_0000 + n).to_be()), Port::new(80), Proto::TCP);
        let list: Vec<Endpoint> = (0..endpoints)
            .map(|e| (Addr::v4((0x0af4_0000 + n * endpoints + e).to_be()), Port::new(8080)))
            .collect();
        let service = DesiredService {
            frontends: vec![DesiredFrontend { key, flags: frontend::INTERNAL | frontend::ANY }],
            backends: list.iter().map(|endpoint| (*endpoint, DesiredBackend::default())).collect(),
            cluster: list,
            ..DesiredService::default()
        };
        (port(n as usize), service)
    };
    Desired { services: (0..services).map(one).collect(), node: node_tables(7, 0) }
}

#[test]
fn one_endpoint_change_among_ten_thousand_services_writes_one_service() {
    // Y-24.
    let mut desired = big_world(10_000, 4);
    let mut memory = Memory::default();
    let proposal = Planner::new(&Actual::default(), Capacity::default()).full(&desired, 0);
    memory.apply(&proposal.plan.steps).unwrap();
    let planner = proposal.applied(1).0;
    assert_eq!(lint(&memory.actual), []);

    let (port, service) = desired.services.iter_mut().nth(5_000).unwrap();
    let removed = service.cluster.pop().unwrap();
    let new = (addr(10, 1, 2, 3), Port::new(8080));
    service.backends.remove(&removed);
    service.backends.insert(new, DesiredBackend::default());
    service.cluster.push(new);
    let proposal = planner.dirty(&[(port.clone(), Some(service.clone()))], None, 5_000);
    let lines: Vec<String> = proposal.plan.steps.iter().map(ToString::to_string).collect();
    // One backend in, four slots, one flip, one backend out.
    assert_eq!(lines.len(), 7, "{lines:#?}");
    assert_eq!(lines[0], "backend 40001 = 10.1.2.3:8080 of svc 5001 gen 0 flags -");
    assert!(lines[1..5].iter().all(|line| line.starts_with("slot ")), "{lines:#?}");
    assert!(lines[5].contains(" -> svc 5001 cluster 40001+4 local 0+0 "), "{}", lines[5]);
    assert_eq!(lines[6], "backend 20004 retired gen 1");

    memory.apply(&proposal.plan.steps).unwrap();
    let planner = proposal.applied(5_001).0;
    assert_eq!(planner.full(&desired, 5_002).plan.steps, []);
}

#[test]
fn an_unchanged_service_in_a_change_writes_nothing() {
    // S-22.
    let desired = big_world(10, 3);
    let planner = Planner::new(&Actual::default(), Capacity::default()).full(&desired, 0).applied(0).0;
    let all: Vec<_> = desired.services.iter().map(|(p, s)| (p.clone(), Some(s.clone()))).collect();
    assert_eq!(planner.dirty(&all, Some(&desired.node), 1).plan, Plan::default());
}

#[test]
fn damaged_tables_are_seen_and_repaired() {
    // Y-20.
    let desired = big_world(3, 2);
    let mut memory = Memory::default();
    let proposal = Planner::new(&Actual::default(), Capacity::default()).full(&desired, 0);
    memory.apply(&proposal.plan.steps).unwrap();
    let whole = memory.actual;
    let (key, value) = whole.frontends.iter().next().map(|(k, v)| (*k, *v)).unwrap();
    let other = *whole.frontends.values().next_back().unwrap();
    let stolen = Frontend { cluster: other.cluster, ..value }.sealed(&key);
    let damages = [
        Step::PutFrontend(key, Frontend { seal: !value.seal, ..value }),
        Step::PutFrontend(key, stolen),
        Step::PutFrontend(key, Frontend { service: 77, ..value }.sealed(&key)),
        Step::PutFrontend(key, Frontend { flags: frontend::SOURCE_RANGES, ..value }.sealed(&key)),
        Step::PutFrontend(key, Frontend { flags: value.flags | frontend::DSR, ..value }.sealed(&key)),
        Step::PutBackend(1, Backend { flags: backend::LOCAL, node: 9, ..*whole.backends.get(1).unwrap() }),
        Step::PutBackend(1, Backend::retired(1)),
        Step::PutBackend(9, Backend { service: 77, ..*whole.backends.get(1).unwrap() }),
        Step::PutSlot(value.cluster.first, 0),
        Step::DeleteService(value.service),
        Step::PutService(9, whole.services[&1].clone()),
        Step::DeleteAddress(key.addr),
        Step::PutServicePorts(1023, 1),
        Step::PutAddress(addr(10, 99, 99, 99), address::CLUSTER_IP),
        Step::PutSource(SourceKey::range(77, addr(10, 0, 0, 0), 8)),
        Step::DeleteFrontend(key),
    ];
    for damage in damages {
        let mut memory = Memory::default();
        memory.actual = whole.clone();
        memory.actual.apply(&damage);
        assert_ne!(lint(&memory.actual), [], "`{damage}` goes unseen");
        let proposal = Planner::new(&memory.actual, Capacity::default()).full(&desired, 9);
        memory.apply(&proposal.plan.steps).unwrap();
        assert_eq!(lint(&memory.actual), [], "after `{damage}`:\n{}", memory.actual.dump());
        assert_eq!(observe(&memory.actual), expect(&desired), "after `{damage}`");
    }
}

#[test]
fn agents_that_are_started_again_and_again_never_run_out_of_numbers() {
    // Room for what there is twice over, as replacing takes it, and not a number more.
    let capacity = Capacity { slots: 13, backends: 13, services: 5, ..Capacity::default() };
    let mut tables = Watched::new(capacity);
    for n in 0..300 {
        // Other endpoints each time, and every third time other Services.
        let mut desired = Desired { services: BTreeMap::new(), node: node_tables(0, 0) };
        for (mut name, mut service) in big_world(2, 3).services {
            let endpoint = |(addr, _): &Endpoint| (*addr, Port::new(8000 + n));
            service.cluster = service.cluster.iter().map(endpoint).collect();
            service.backends = service.cluster.iter().map(|end| (*end, DesiredBackend::default())).collect();
            name.port = format!("p{}", n / 3).into();
            desired.services.insert(name, service);
        }
        tables.restart();
        let proposal = Planner::new(&tables.memory.actual, capacity).full(&desired, 0);
        assert_eq!(proposal.plan.warnings, Vec::<String>::new(), "start {n}");
        let _ = tables.carry_out(proposal, 0);
        let actual = &tables.memory.actual;
        let live = actual.backends.values().filter(|backend| backend.is_live()).count();
        assert_eq!((actual.shown_slots(), live, actual.services.len()), (6, 6, 2), "start {n}");
    }
}

#[test]
fn a_full_table_is_named_with_its_remedy_and_tried_again() {
    let capacity = Capacity { backends: 4, ..Capacity::default() };
    let mut desired = big_world(2, 2);
    let proposal = Planner::new(&Actual::default(), capacity).full(&desired, 0);
    let warning = "Service default/svc-1 port http (TCP, IPv4): table BACKENDS is full: 2 more needed, 1 free; \
                     raise --max-backends; until then it stays as it is";
    assert_eq!(proposal.plan.warnings, [warning]);
    assert_eq!(proposal.plan.retry_at_ms, Some(GRACE_MS));
    let planner = proposal.applied(0).0;
    desired.services.remove(&port(0));
    let planner = planner.dirty(&[(port(0), None)], None, 10).applied(10).0;
    let proposal = planner.dirty(&[], None, 10 + GRACE_MS);
    assert_eq!(proposal.plan.warnings, Vec::<String>::new());
    assert_eq!(observe(proposal.applied(10 + GRACE_MS).0.actual()), expect(&desired));
}

#[test]
fn what_may_only_be_unreadable_is_not_taken_away() {
    // Y-22 with a source of which a part could not be read since the start.
    let desired = big_world(3, 2);
    let proposal = Planner::new(&Actual::default(), Capacity::default()).full(&desired, 0);
    let mut memory = Memory::new(Capacity::default());
    memory.apply(&proposal.plan.steps).unwrap();
    let mut partial = desired;
    let (removed, _) = partial.services.pop_first().expect("three Services");
    let bare = partial.services.values_mut().next().expect("two are left");
    (bare.cluster, bare.backends) = (Vec::new(), BTreeMap::new());

    let again = || Planner::new(&memory.actual, Capacity::default());
    assert_eq!(again().full_keeping(&partial, 9).plan.steps, []);
    let whole = again().full(&partial, 9).plan.steps;
    let id =
        memory.actual.services.iter().find(|(_, n)| Some(***n) == service_name(&removed)).map(|(id, _)| *id);
    assert!(whole.contains(&Step::DeleteService(id.expect("its name is in the tables"))));
}

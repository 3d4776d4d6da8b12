//! Zero downtime: endpoints come and go in every order in which they can be reported, and after every single write a new
//! connection goes to an endpoint that serves, while flows to those that still serve are left where they are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use agent_core::model::{
    Affinity, Endpoint, Family, ObjectName, Port, Service, Settings, Slice, SlicePort, World,
};
use agent_core::model::{Change, Kind};
use agent_core::plan::{Actual, Capacity, GRACE_MS, Planner};
use proxy_common::abi::PortRange;
use proxy_common::addr::Proto;

/// What a slice says of an endpoint; `Gone` is no word of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Gone,
    Starting,
    Ready,
    Leaving,
    Ended,
}

use State::{Ended, Gone, Leaving, Ready, Starting};

/// Lives that endpoints lead: a graceful end, a sudden one, one that is not announced, a start, and a failing probe.
const LIVES: [&[State]; 6] = [
    &[Ready, Leaving, Ended, Gone],
    &[Ready, Ended, Gone],
    &[Ready, Gone],
    &[Gone, Starting, Ready],
    &[Gone, Ready],
    &[Ready, Starting, Ready],
];

impl State {
    fn is_serving(self) -> bool {
        matches!(self, Ready | Leaving)
    }

    fn endpoint(self, n: usize) -> Option<Endpoint> {
        let node = if n == 0 { "n1" } else { "n2" };
        (self != Gone).then(|| Endpoint {
            ip: ip(n),
            ready: self == Ready,
            serving: self.is_serving(),
            terminating: matches!(self, Leaving | Ended),
            node: Some(node.into()),
            hints: None,
        })
    }
}

fn ip(n: usize) -> IpAddr {
    Ipv4Addr::new(10, 244, 1, n as u8 + 1).into()
}

/// How endpoints are spread over slices.
#[derive(Clone, Copy, Debug)]
enum Slices {
    One,
    /// Each has its own.
    Each,
    /// Each is in two, of which the second shows everything one change later (E-21).
    Late,
}

/// Where new connections may go: to ready endpoints, else to those that leave but still serve (P-4).
fn wanted(states: &[State]) -> BTreeSet<IpAddr> {
    let of =
        |wanted: State| (0..states.len()).filter(|n| states[*n] == wanted).map(ip).collect::<BTreeSet<_>>();
    if states.contains(&Ready) { of(Ready) } else { of(Leaving) }
}

/// What two slices amount to: a copy that is not on its way out counts before one that is, a ready one first (E-21).
fn merged(early: &[State], late: &[State]) -> Vec<State> {
    let rank = |state: &State| match state {
        Ready => 4,
        Starting => 3,
        Leaving => 2,
        Ended => 1,
        Gone => 0,
    };
    early.iter().zip(late).map(|(a, b)| if rank(a) >= rank(b) { *a } else { *b }).collect()
}

struct Trial {
    world: World,
    planner: Option<Planner>,
    actual: Actual,
    now_ms: u64,
    slices: Slices,
    /// What was reported last, and before that.
    reported: [Vec<State>; 2],
}

fn service() -> ObjectName {
    ObjectName::new("default", "web")
}

impl Trial {
    fn new(states: &[State], slices: Slices) -> Self {
        let mut world = World::new(Settings {
            host_netns: 1,
            snat_ports: vec![PortRange { first: 1024, count: 1024 }],
            seed: 7,
            ..Settings::of_node("n1")
        });
        world.apply(Change::Service(
            service(),
            Some(Service {
                cluster_ips: vec![Ipv4Addr::new(10, 96, 0, 1).into()],
                ports: vec![Port { name: "".into(), proto: Proto::TCP, port: 80, node_port: 30_001 }],
                external_ips: Vec::new(),
                load_balancer_ips: Vec::new(),
                source_ranges: Vec::new(),
                affinity: Affinity::None,
                internal_local: false,
                external_local: false,
                health_check_node_port: 0,
                reset_on_loss: false,
                mode: None,
                created: 0,
            }),
        ));
        let reported = [states.to_vec(), states.to_vec()];
        let mut trial = Self { world, planner: None, actual: Actual::default(), now_ms: 0, slices, reported };
        trial.tell();
        trial.world.apply(Change::Links(Vec::new()));
        for kind in [Kind::Service, Kind::Slice, Kind::Node] {
            trial.world.apply(Change::Synced(kind));
        }
        let planner = Planner::new(&trial.actual, Capacity::default());
        let proposal = planner.full(&trial.world.take_desired(), 0);
        proposal.plan.steps.iter().for_each(|step| trial.actual.apply(step));
        trial.planner = Some(proposal.applied(0).0);
        trial
    }

    /// Reports the slices as they are now to the world.
    fn tell(&mut self) {
        let slice = |endpoints: Vec<Endpoint>| Slice {
            service: service(),
            family: Family::V4,
            ports: vec![SlicePort { name: "".into(), proto: Proto::TCP, port: 8080 }],
            endpoints,
        };
        let all = |states: &[State]| -> Vec<Endpoint> {
            states.iter().enumerate().filter_map(|(n, state)| state.endpoint(n)).collect()
        };
        let [now, before] = &self.reported;
        let slices = match self.slices {
            Slices::One => vec![all(now)],
            Slices::Each => (0..now.len()).map(|n| Vec::from_iter(now[n].endpoint(n))).collect(),
            Slices::Late => vec![all(now), all(before)],
        };
        for (n, endpoints) in slices.into_iter().enumerate() {
            let name = ObjectName::new("default", &format!("web-{n}"));
            self.world.apply(Change::Slice(name, Some(slice(endpoints))));
        }
    }

    /// What the slices amount to.
    fn states(&self) -> Vec<State> {
        match self.slices {
            Slices::One | Slices::Each => self.reported[0].clone(),
            Slices::Late => merged(&self.reported[0], &self.reported[1]),
        }
    }

    /// Tells the next state of things, and looks after every write of the sync that follows.
    fn next(&mut self, states: &[State], pause_ms: u64) -> Result<(), String> {
        let before = self.states();
        let flows = self.backends();
        self.reported = [states.to_vec(), self.reported[0].clone()];
        let after = self.states();
        self.tell();
        self.now_ms += pause_ms;
        let planner = self.planner.take().expect("a planner is always put back");
        let proposal = planner.dirty(&self.world.take_dirty(), Some(&self.world.node()), self.now_ms);
        for (n, step) in proposal.plan.steps.iter().enumerate() {
            self.actual.apply(step);
            let context =
                |what: String| format!("{what}, after write {n} ({step}) from {before:?} to {after:?}");
            self.check(&before, &after).map_err(context)?;
        }
        self.check(&after, &after).map_err(|what| format!("{what}, from {before:?} to {after:?}"))?;
        // C-1, C-5, P-18: a flow is left where it is as long as its endpoint serves.
        let kept = self.backends();
        for n in (0..after.len()).filter(|n| before[*n].is_serving() && after[*n].is_serving()) {
            if flows.get(&ip(n)) != kept.get(&ip(n)) {
                return Err(format!("flows to {} are torn, from {before:?} to {after:?}", ip(n)));
            }
        }
        self.planner = Some(proposal.applied(self.now_ms).0);
        Ok(())
    }

    /// Every frontend shows the endpoints of one of the two moments, all of them, and nothing else.
    fn check(&self, before: &[State], after: &[State]) -> Result<(), String> {
        let allowed = [wanted(before), wanted(after)];
        for (key, frontend) in &self.actual.frontends {
            let shown: BTreeSet<IpAddr> =
                self.actual.endpoints(frontend.cluster).map(|(addr, _)| IpAddr::from(addr)).collect();
            if !allowed.contains(&shown) || frontend.cluster.count as usize != shown.len() {
                return Err(format!("port {} leads to {shown:?}", key.port));
            }
        }
        if self.actual.frontends.len() != 2 { Err("a frontend is missing".into()) } else { Ok(()) }
    }

    /// What a flow remembers of its endpoint.
    fn backends(&self) -> BTreeMap<IpAddr, (u32, u32)> {
        let live = self.actual.backends.iter().filter(|(_, backend)| backend.is_live());
        live.map(|(index, backend)| (backend.addr.into(), (index, backend.generation))).collect()
    }
}

/// Every way to tell the steps of these lives one at a time.
fn orders(left: &mut [usize], order: &mut Vec<usize>, all: &mut Vec<Vec<usize>>) {
    if left.iter().all(|steps| *steps == 0) {
        all.push(order.clone());
        return;
    }
    for n in 0..left.len() {
        if left[n] > 0 {
            left[n] -= 1;
            order.push(n);
            orders(left, order, all);
            order.pop();
            left[n] += 1;
        }
    }
}

fn play(lives: &[&[State]], order: &[usize], slices: Slices, pause_ms: u64) -> Result<(), String> {
    let mut at = vec![0; lives.len()];
    let states = |at: &[usize]| -> Vec<State> { at.iter().zip(lives).map(|(at, life)| life[*at]).collect() };
    let mut trial = Trial::new(&states(&at), slices);
    for n in order {
        at[*n] += 1;
        trial.next(&states(&at), pause_ms)?;
    }
    // The copy that comes later has its say, too.
    trial.next(&states(&at), pause_ms)
}

fn in_every_order(lives: &[&[State]]) -> usize {
    let mut steps: Vec<usize> = lives.iter().map(|life| life.len() - 1).collect();
    let mut all = Vec::new();
    orders(&mut steps, &mut Vec::new(), &mut all);
    for order in &all {
        for slices in [Slices::One, Slices::Each, Slices::Late] {
            for pause_ms in [0, 2 * GRACE_MS] {
                if let Err(what) = play(lives, order, slices, pause_ms) {
                    panic!("{what}\nlives {lives:?}, order {order:?}, {slices:?}, {pause_ms} ms apart");
                }
            }
        }
    }
    all.len()
}

#[test]
fn no_connection_is_sent_to_an_endpoint_that_has_ended_in_whatever_order_two_lives_are_told() {
    // P-1…P-5, P-27, P-28, C-2, E-21.
    let mut played = 0;
    for first in LIVES {
        for second in LIVES {
            played += in_every_order(&[first, second]);
        }
    }
    assert_eq!(played, 194);
}

#[test]
fn a_rolling_update_is_told_in_any_order_without_a_gap() {
    // P-4, P-5, C-3: two old pods leave gracefully while a new one starts; and the reverse proportion.
    let (old, new): (&[State], &[State]) = (LIVES[0], LIVES[3]);
    assert_eq!(in_every_order(&[old, old, new]), 560);
    assert_eq!(in_every_order(&[old, new, new]), 210);
}

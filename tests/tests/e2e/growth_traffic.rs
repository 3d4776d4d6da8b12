//! Tables that traffic fills grow under it: flows, and clients that are bound to their endpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::Agent;
use proxy_tests::answer::Answer;
use proxy_tests::chaos::clients::{Clients, Term};
use proxy_tests::crowd::Target;
use proxy_tests::manifests::ManifestDir;
use proxy_tests::pod::Place;
use proxy_tests::probe::{Server, eventually, wait};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};

use crate::common::{manifests, two_nodes, vips};
use crate::growth::size;
use crate::life::{one_node, warns};
use crate::metrics::Scrape;
use crate::scene::{at, counted, servers, service};

const NODE_PORT: u16 = 30_080;
/// Loading larger tables takes seconds, and nothing else gets done on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// New requests a second of each crowd. Those over UDP leave a flow for half a minute.
const STEADY: f64 = 1.0;
/// As good as none: where tables are full to the last entry it may take a new request more than one try.
const NONE: f64 = 0.001;
/// Where crowds are, and how many targets each has.
const CROWDS: u64 = 2 * 4;
/// Sockets of each crowd over UDP to a target that are silent between two checks, at most.
const UDP: u32 = 8;
/// Connections of each crowd to a target that are used all the time.
const BUSY: u64 = 2;

/// What the smallest tables take on this machine, in MiB: the agent says it that is allowed less.
pub(crate) fn least() -> Result<u64> {
    let (cluster, dir) = (one_node(&[])?, manifests()?);
    let binary = proxy_tests::require::agent_binary()?;
    let mut agent = Agent::prepare(&binary, &cluster, "node1", &dir, &["--map-memory=1"])?;
    agent.spawn()?;
    let status = agent.ended()?;
    let log = agent.log_text();
    ensure!(!status.success(), "it runs: {log}");
    let (_, rest) = log.split_once("the smallest tables take ").with_context(|| log.clone())?;
    let (number, _) = rest.split_once(" MiB").with_context(|| log.clone())?;
    number.parse().context("a number")
}

/// A Service, an agent that may take so much memory more than the least, and a growing crowd of clients.
struct Scene {
    clients: Clients,
    rate: f64,
    agent: Agent,
    _servers: Vec<Server>,
    dir: ManifestDir,
    cluster: TestCluster,
}

impl Scene {
    fn raise(more: u64, rate: f64) -> Result<Self> {
        let memory = format!("--map-memory={}", least()? + more);
        let (cluster, dir) = (two_nodes(PodNetwork::Routed)?, manifests()?);
        let servers = servers(&cluster, &["b", "c"])?;
        service(&dir, &cluster, ("web", 1, NODE_PORT), &["c"], |plan| plan)?;
        // Else connecting would choose the endpoint of a pod, and make no flow.
        let flags = ["--cluster-cidr=10.244.0.0/16,fd00:244::/32", "--socket-lb=off", &memory];
        let agent = Agent::start(&cluster, "node1", &dir, &flags)?;
        Ok(Self { clients: Clients::default(), rate, agent, _servers: servers, dir, cluster })
    }

    /// About so many connections more, which are held: from a pod, and from outside with a masquerade; over TCP and UDP and
    /// both families.
    fn come(&mut self, connections: u64) -> Result<()> {
        let idle = u32::try_from((connections / CROWDS).saturating_sub(BUSY))?;
        let target = |to, udp| Target {
            service: "web".into(),
            to,
            udp,
            servers: vec!["c".into()],
            by_packet: true,
            same: false,
            // All of them ask at the same moment: more datagrams would find no room at the server.
            idle: if udp { idle.min(UDP) } else { 2 * idle - idle.min(UDP) },
            busy: BUSY as u32,
        };
        let targets =
            |to: [SocketAddr; 2]| to.into_iter().flat_map(|to| [target(to, false), target(to, true)]);
        let ways = [("a", at(vips(1), 80)), ("outside", self.cluster.place("node1").at(NODE_PORT))];
        let crowds = ways.map(|(place, to)| (self.cluster.place(place), targets(to).collect()));
        self.clients.start(Term::Play, &crowds, self.rate)?;
        self.go_on()
    }

    /// All connections go on, and nothing has been lost.
    fn go_on(&mut self) -> Result<()> {
        self.clients.check()?;
        let count = self.clients.count();
        ensure!(count.lost == 0 && count.requests > count.held, "{count:?}: {}", self.agent.log_text());
        Ok(())
    }

    /// What a metric says, if it has such a sample.
    fn metric(&self, sample: &str) -> Result<f64> {
        Scrape::of(self.agent.place())?.value(sample)
    }
}

#[test]
fn living_flows_fill_their_table_and_it_grows_twice_and_no_connection_is_lost() -> Result<()> {
    let mut scene = Scene::raise(8, STEADY)?;
    let first = size(&scene.agent, "RECORDS")?;
    scene.come(first * 40 / 100)?;
    ensure!(size(&scene.agent, "RECORDS")? == first, "it grows too early");
    for (more, grown) in [(first * 45 / 100, first * 2), (first * 80 / 100, first * 4)] {
        scene.come(more)?;
        eventually(SOON, || {
            scene.clients.receive()?;
            let now = size(&scene.agent, "RECORDS")?;
            ensure!(now >= grown, "{now} entries, not {grown}: {}", scene.agent.log_text());
            Ok(())
        })?;
        ensure!(size(&scene.agent, "FLOWS")? == 3 * size(&scene.agent, "RECORDS")?, "legs have no room");
        scene.go_on()?;
    }
    let log = scene.agent.log_text();
    let (reported, done) = (log.find("table RECORDS has"), log.find("over to new tables"));
    ensure!(reported.is_some() && reported < done, "it was not reported before: {log}");
    let grown = scene.metric("proxy_agent_table_growths_total{result=\"done\"}")?;
    ensure!(grown >= 2.0, "{grown} times");
    let [full, displaced] = ["flow_table_full", "displaced"].map(|reason| counted(&scene.agent, reason));
    let (full, displaced) = (full?, displaced?);
    ensure!(full == 0 && displaced == 0, "{full} found no room, {displaced} made room");
    scene.clients.end()?;
    let count = scene.clients.count();
    ensure!(count.lost == 0 && count.held * 100 > first * 150, "{count:?}");
    Ok(())
}

#[test]
fn where_memory_ends_it_is_told_old_flows_go_on_and_young_ones_make_room() -> Result<()> {
    let mut scene = Scene::raise(1, NONE)?;
    let blocked = "proxy_agent_table_growth_blocked{table=\"RECORDS\",by=\"memory\"}";
    let mut held = 0;
    // Four fifths of what there is, until there is no more.
    let last = loop {
        let now = size(&scene.agent, "RECORDS")?;
        scene.come(now * 86 / 100 - held)?;
        held = now * 86 / 100;
        let grown = eventually(SOON, || {
            let grown = size(&scene.agent, "RECORDS")? > now;
            ensure!(grown || scene.metric(blocked).is_ok_and(|is| is == 1.0), "{}", scene.agent.log_text());
            Ok(grown)
        })?;
        scene.go_on()?;
        if !grown {
            break now;
        }
    };
    warns(&scene.agent, &["table RECORDS", "cannot grow", "raise --map-memory"], true)?;
    ensure!(scene.agent.log_text().contains("table RECORDS"), "nothing is logged");
    let memory = scene.metric("proxy_agent_table_memory_bytes")?;
    let limit = scene.metric("proxy_agent_table_memory_limit_bytes")?;
    ensure!(memory <= limit, "{memory} of {limit}");
    // Nearly full, of flows that have shown that they mean it.
    scene.come(last * 8 / 100)?;
    wait(Duration::from_secs(2), "flows that go on are not young any more");
    scene.go_on()?;
    // Questions that are answered once fill the rest, and are dropped until the turn comes to one of their own kind.
    let made_room = || counted(&scene.agent, "displaced");
    let (before, to) = (made_room()?, scene.cluster.place("node1").at(NODE_PORT));
    eventually(SOON, || {
        questions(scene.cluster.place("outside"), to, 20, Duration::from_millis(200)).ok();
        ensure!(made_room()? > before, "no young flow makes room");
        Ok(())
    })?;
    let full = counted(&scene.agent, "flow_table_full")?;
    scene.go_on()?;
    ensure!(size(&scene.agent, "RECORDS")? == last, "it has grown");
    ensure!(counted(&scene.agent, "flow_table_full")? == full, "what is old finds no room");
    // When flows go, so does the warning.
    scene.clients.end()?;
    let client = scene.cluster.place("a").v4.to_string();
    for client in [scene.cluster.place("outside").v4.to_string(), client] {
        let (status, said) = scene.agent.ask(&["conntrack", "flush", "--client", &client])?;
        ensure!(status.success(), "{said}");
    }
    warns(&scene.agent, &["table RECORDS"], false)?;
    ensure!(scene.metric(blocked).is_err(), "a metric stays");
    Ok(())
}

/// So many questions, each from a port of its own and answered once.
fn questions(place: &Place, to: [SocketAddr; 2], count: usize, patience: Duration) -> Result<()> {
    place.netns.run_in(|| {
        for to in to.into_iter().cycle().take(count) {
            let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
            ask(any, to, patience)?;
        }
        Ok(())
    })?
}

/// Who answers a question from this address.
fn ask(from: IpAddr, to: SocketAddr, patience: Duration) -> Result<String> {
    let socket = UdpSocket::bind((from, 0)).with_context(|| format!("binding {from}"))?;
    socket.set_read_timeout(Some(patience))?;
    socket.connect(to)?;
    socket.send(b"?")?;
    let mut answer = vec![0; 2048];
    let length = socket.recv(&mut answer).with_context(|| format!("from {from} to {to}"))?;
    // It is followed by the question.
    let text = answer.get(..length).and_then(|text| text.strip_suffix(b"?")).context("an answer")?;
    Ok(serde_json::from_slice::<Answer>(text)?.name)
}

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Services with session affinity, from number 2.
const STICKY: u8 = 4;

#[test]
fn bound_clients_fill_their_table_and_it_grows_and_each_keeps_its_endpoint() -> Result<()> {
    let mut scene = Scene::raise(16, STEADY)?;
    for n in 0..STICKY {
        let service_of = (&*format!("sticky{n}"), 2 + n, NODE_PORT + 1 + u16::from(n));
        service(&scene.dir, &scene.cluster, service_of, &["b", "c"], |plan| plan.affinity(10_800))?;
    }
    let (node, outside) = (scene.cluster.place("node1"), scene.cluster.place("outside"));
    let first = size(&scene.agent, "AFFINITY")?;
    // Each of them has an address of either family, and asks all Services.
    let clients = u16::try_from(first * 83 / 100 / u64::from(STICKY) / 2)?;
    let own = |n: u16| -> [IpAddr; 2] {
        let [high, low] = n.to_be_bytes();
        [[198, 18, high, low].into(), [0xfd00, 0x198, 0, 0, 0, 0, 0, n].into()]
    };
    let mut batch = String::new();
    for [v4, v6] in (1..=clients).map(own) {
        batch += &format!("addr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad\n");
    }
    outside.netns.ip(&batch)?;
    let [v4, v6] = outside.addresses();
    node.netns.ip(&format!("route add 198.18.0.0/16 via {v4}\nroute add fd00:198::/64 via {v6}\n"))?;
    let services: Vec<[SocketAddr; 2]> = (0..STICKY).map(|n| node.at(NODE_PORT + 1 + u16::from(n))).collect();
    // Everybody once: who answers whom.
    let everybody = || -> Result<BTreeMap<(IpAddr, SocketAddr), String>> {
        outside.netns.run_in(|| {
            let mut answers = BTreeMap::new();
            for own in (1..=clients).map(own) {
                for (from, to) in services.iter().flat_map(|to| own.into_iter().zip(*to)) {
                    answers.insert((from, to), ask(from, to, PATIENCE)?);
                }
            }
            Ok(answers)
        })?
    };
    eventually(SOON, || ask_all(outside, &services))?;
    let bound = everybody()?;
    ensure!(bound.values().collect::<BTreeSet<_>>().len() == 2, "one serves all");
    let all_keep_theirs = || -> Result<()> {
        let moved = everybody()?.into_iter().filter(|(who, name)| bound.get(who) != Some(name)).count();
        ensure!(moved == 0, "{moved} of {} were led elsewhere: {}", bound.len(), scene.agent.log_text());
        Ok(())
    };
    eventually(SOON, || {
        all_keep_theirs()?;
        let now = size(&scene.agent, "AFFINITY")?;
        ensure!(now >= first * 2, "{now} clients, not {}: {}", first * 2, scene.agent.log_text());
        Ok(())
    })?;
    all_keep_theirs()?;
    scene.come(64)
}

/// Each Service answers.
fn ask_all(place: &Place, services: &[[SocketAddr; 2]]) -> Result<()> {
    services.iter().try_for_each(|to| questions(place, *to, 2, PATIENCE))
}

//! What becomes of connections to an endpoint that leaves without terminating, as its Service wants it.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use proxy_tests::agent::{Agent, FLAGS};
use proxy_tests::manifests::{EndpointController, ManifestDir, Phase, ServicePlan};
use proxy_tests::object::{Key, Kind, Object, Publish as _};
use proxy_tests::pod::Place;
use proxy_tests::probe::{Remote, Server, eventually};
use proxy_tests::reference::{self, Door};
use proxy_tests::test_cluster::{PodNetwork, TestCluster};

use crate::common::{manifests, two_nodes, vips};
use crate::growth_traffic::least;
use crate::life::{answers, generation, nobody_answers, warns};
use crate::scene::{SOON, at, servers, service};

const ANNOTATION: &str = "ebpf-proxy/on-endpoint-loss";
const NODE_PORT: u16 = 30_080;

/// A connection that has been answered.
pub(crate) fn connected(from: &Place, to: SocketAddr) -> Result<Remote> {
    let family = if to.is_ipv4() { "inet" } else { "inet6" };
    let mut socket = Remote::open(from, family, "tcp")?;
    socket.done("connect", &to.to_string()).with_context(|| format!("{} → {to}", from.name))?;
    goes_on(&mut socket).with_context(|| format!("{} → {to}", from.name))?;
    Ok(socket)
}

pub(crate) fn goes_on(socket: &mut Remote) -> Result<()> {
    socket.done("send", "")?;
    socket.done("receive", "").map(drop)
}

/// It is over although its process does nothing: the kernel says so in one of these ways.
fn ends(socket: &mut Remote, ways: &[&str]) -> Result<()> {
    eventually(SOON, || {
        let received = socket.step("receive", "")?;
        let how = received.failure.as_deref().unwrap_or("an answer");
        ensure!(ways.contains(&how), "{received:?}, not {ways:?}");
        Ok(())
    })
}

/// The same address of IPv4 as a socket of IPv6 has it.
fn mapped(to: SocketAddr) -> Option<SocketAddr> {
    let SocketAddr::V4(v4) = to else { return None };
    Some(SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()))
}

/// How many connections are open at port 8080 of a place.
fn open_at(place: &Place) -> Result<usize> {
    let listed = place.netns.output("ss", &["-Htn", "state", "established", "sport", "=", ":8080"])?;
    Ok(listed.lines().count())
}

fn none_is_open_at(place: &Place) -> Result<()> {
    eventually(SOON, || {
        let open = open_at(place)?;
        ensure!(open == 0, "{open} connections are still open at {}", place.name);
        Ok(())
    })
}

/// The endpoint `name` cannot be reached any more, as when its node has died.
fn cut_off(place: &Place) -> Result<()> {
    place.netns.ip("link set eth0 down\n")
}

struct Scene {
    cluster: TestCluster,
    dir: ManifestDir,
    _servers: Vec<Server>,
}

impl Scene {
    fn new() -> Result<Self> {
        let cluster = two_nodes(PodNetwork::Routed)?;
        let _servers = servers(&cluster, &["b", "c", "d", "h1", "h2"])?;
        Ok(Self { cluster, dir: manifests()?, _servers })
    }

    /// Service number `n` with these endpoints; the first one has a NodePort.
    fn service(&self, n: u8, ends: &[&str], reset: bool) -> Result<EndpointController<'_>> {
        let node_port = if n == 1 { NODE_PORT } else { 0 };
        let change = |plan: ServicePlan| if reset { plan.annotation(ANNOTATION, "reset") } else { plan };
        service(&self.dir, &self.cluster, (&format!("s{n}"), n, node_port), ends, change)
    }

    /// The same Service wants something else.
    fn wish(&self, n: u8, word: &str) -> Result<()> {
        let plan = ServicePlan::new(&format!("s{n}"), &vips(n)).port("tcp", "TCP", 80, 8080);
        self.dir.publish(&Object::from(&plan.annotation(ANNOTATION, word).build()))
    }

    fn agent(&self, flags: &[&str]) -> Result<Agent> {
        Agent::start(&self.cluster, "node1", &self.dir, &[&FLAGS[..], flags].concat())
    }

    /// The ways to the first Service from each kind of client, and how the end is noticed there.
    fn ways(&self, sockets: bool) -> Vec<(&Place, SocketAddr, &'static str)> {
        let node = self.cluster.place("node1").addresses();
        let mut ways = Vec::new();
        for to in at(vips(1), 80).into_iter().chain(at(node, NODE_PORT)) {
            ways.extend(["a", "outside"].map(|place| (self.cluster.place(place), to, "receive ECONNRESET")));
            if sockets {
                let own = [Some(to), mapped(to)].into_iter().flatten();
                ways.extend(own.map(|to| (self.cluster.place("h1"), to, "receive ECONNABORTED")));
            }
        }
        ways
    }
}

#[test]
fn idle_connections_to_an_endpoint_that_has_gone_are_reset_from_every_client() -> Result<()> {
    for (flags, sockets) in [(&[][..], true), (&["--socket-lb=off"], false), (&["--masquerade-all"], true)] {
        let scene = Scene::new()?;
        // One on another node, and one on this node.
        for gone in ["c", "b"] {
            let mut controller = scene.service(1, &[gone], true)?;
            let agent = scene.agent(flags)?;
            let context = || format!("{flags:?}, endpoint {gone}");
            let ways = scene.ways(sockets);
            let mut open = Vec::new();
            for (place, to, how) in &ways {
                open.push((connected(place, *to).with_context(context)?, place, to, how));
            }
            cut_off(scene.cluster.place(gone))?;
            controller.remove(gone)?;
            for (socket, place, to, how) in &mut open {
                ends(socket, &[how]).with_context(|| format!("{}: {} → {to}", context(), place.name))?;
            }
            scene.cluster.place(gone).netns.ip("link set eth0 up\n")?;
            controller.withdraw()?;
            drop(agent);
        }
    }
    Ok(())
}

#[test]
fn who_is_still_connecting_to_an_endpoint_that_has_gone_is_told_or_led_to_another() -> Result<()> {
    let scene = Scene::new()?;
    let mut controller = scene.service(1, &["c"], true)?;
    let agent = scene.agent(&[])?;
    let dead = scene.cluster.place("c");
    // It takes every packet and answers none.
    dead.netns.nft(
        "table inet dead { chain input { type filter hook input priority 0; meta l4proto tcp drop; }; }\n",
    )?;
    let tries = |(place, to): (&Place, SocketAddr)| -> Result<Remote> {
        let family = if to.is_ipv4() { "inet" } else { "inet6" };
        let mut socket = Remote::open(place, family, "tcp")?;
        let tried = socket.step("connect", &to.to_string())?;
        ensure!(tried.failure.as_deref() == Some("connect EINPROGRESS"), "{} → {to}: {tried:?}", place.name);
        Ok(socket)
    };
    let ways = scene.ways(true);
    // All at once, as a SYN is sent again ever later.
    let open = std::thread::scope(|scope| {
        let tries: Vec<_> =
            ways.iter().map(|(place, to, _)| scope.spawn(move || tries((place, *to)))).collect();
        let tries = tries.into_iter().map(|tried| tried.join().expect("a thread that asks"));
        tries.collect::<Result<Vec<_>>>()
    })?;
    controller.replace(&[scene.cluster.place("b")])?;
    // Sockets that were translated when they connected are reset; those whose packets are follow the Service.
    for (mut socket, (place, to, _)) in open.into_iter().zip(&ways) {
        match place.name.as_str() {
            "outside" => eventually(SOON, || goes_on(&mut socket)),
            "a" => ends(&mut socket, &["receive ECONNREFUSED"]),
            _ => ends(&mut socket, &["receive ECONNABORTED"]),
        }
        .with_context(|| format!("{} → {to}: {}", place.name, agent.log_text()))?;
    }
    Ok(())
}

#[test]
fn an_endpoint_that_lives_on_hears_of_it_too() -> Result<()> {
    // Its labels have changed: it is no endpoint any more, but there.
    for flags in [&[][..], &["--socket-lb=off"], &["--masquerade-all"]] {
        let scene = Scene::new()?;
        for gone in ["c", "b", "h2", "h1"] {
            let mut controller = scene.service(1, &[gone, "d"], true)?;
            controller.remove("d")?;
            let agent = scene.agent(flags)?;
            let context = || format!("{flags:?}, endpoint {gone}");
            let mut open = Vec::new();
            for (place, to, how) in scene.ways(flags.is_empty()) {
                open.push((connected(place, to).with_context(context)?, place, to, how));
            }
            ensure!(open_at(scene.cluster.place(gone))? == open.len(), "{}", context());
            controller.replace(&[scene.cluster.place("d")])?;
            for (socket, place, to, how) in &mut open {
                ends(socket, &[how]).with_context(|| format!("{}: {} → {to}", context(), place.name))?;
                let mut next = connected(place, *to).with_context(context)?;
                goes_on(&mut next)?;
            }
            none_is_open_at(scene.cluster.place(gone)).with_context(context)?;
            controller.withdraw()?;
            drop(agent);
        }
    }
    Ok(())
}

/// Clients over packets and over sockets.
const CLIENTS: [&str; 3] = ["a", "outside", "h1"];

impl Scene {
    fn open(&self, n: u8) -> Result<Vec<Remote>> {
        let ways = CLIENTS.into_iter().flat_map(|client| vips(n).map(|vip| (client, vip)));
        ways.map(|(client, vip)| connected(self.cluster.place(client), SocketAddr::new(vip, 80))).collect()
    }
}

fn all_go_on(open: &mut [Remote]) -> Result<()> {
    open.iter_mut().try_for_each(goes_on)
}

fn all_have_ended(open: &mut [Remote]) -> Result<()> {
    open.iter_mut().try_for_each(|socket| ends(socket, &["receive ECONNRESET", "receive ECONNABORTED"]))
}

/// Waits until the agent has written that an endpoint has gone: new connections find the other one.
fn is_led_to(scene: &Scene, n: u8, other: &str) -> Result<()> {
    at(vips(n), 80).into_iter().try_for_each(|to| answers(scene.cluster.place("a"), to, other))
}

#[test]
fn by_default_and_for_what_has_terminated_connections_go_on() -> Result<()> {
    let scene = Scene::new()?;
    let mut kept = scene.service(1, &["c"], false)?;
    let mut terminated = scene.service(2, &["c"], true)?;
    let mut unready = scene.service(3, &["c"], true)?;
    let deleted = scene.service(4, &["c"], true)?;
    let _agent = scene.agent(&[])?;
    let [mut first, mut second, mut third, mut fourth] =
        [scene.open(1)?, scene.open(2)?, scene.open(3)?, scene.open(4)?];
    let (c, d) = (scene.cluster.place("c"), scene.cluster.place("d"));
    kept.replace(&[d])?;
    is_led_to(&scene, 1, "d")?;
    for phase in [Phase::Terminating, Phase::Stopped] {
        terminated.set(c, phase)?;
        terminated.set(d, Phase::Ready)?;
        is_led_to(&scene, 2, "d")?;
        all_go_on(&mut second)?;
    }
    terminated.remove("c")?;
    // One that is not ready may come back.
    unready.set(c, Phase::Starting)?;
    unready.set(d, Phase::Ready)?;
    is_led_to(&scene, 3, "d")?;
    // With its Service its wish has gone.
    scene.dir.retract(&Key { kind: Kind::Service, namespace: "default".into(), name: "s4".into() })?;
    nobody_answers(scene.cluster.place("outside"), at(vips(4), 80)[0])?;
    deleted.withdraw()?;
    for open in [&mut first, &mut second, &mut third, &mut fourth] {
        all_go_on(open)?;
    }
    // But it has left when it leaves.
    unready.remove("c")?;
    all_have_ended(&mut third)?;
    for open in [&mut first, &mut second, &mut fourth] {
        all_go_on(open)?;
    }
    Ok(())
}

#[test]
fn each_service_speaks_for_its_own_connections_and_may_change_its_mind() -> Result<()> {
    let scene = Scene::new()?;
    let mut controllers = [scene.service(1, &["c"], true)?, scene.service(2, &["c"], false)?];
    let agent = scene.agent(&[])?;
    let (c, d) = (scene.cluster.place("c"), scene.cluster.place("d"));
    let [mut first, mut second] = [scene.open(1)?, scene.open(2)?];
    for (n, controller) in (1..).zip(&mut controllers) {
        controller.replace(&[d])?;
        is_led_to(&scene, n, "d")?;
    }
    all_have_ended(&mut first)?;
    all_go_on(&mut second)?;
    // The address is an endpoint again, and what begins there now is a connection like others; the other way round.
    for (n, controller) in (1..).zip(&mut controllers) {
        controller.replace(&[c])?;
        is_led_to(&scene, n, "c")?;
    }
    let [mut third, mut fourth] = [scene.open(1)?, scene.open(2)?];
    for (n, word) in [(1, "keep"), (2, "reset")] {
        let before = generation(&agent)?;
        scene.wish(n, word)?;
        eventually(SOON, || {
            ensure!(generation(&agent)? > before, "{word:?} has not been written");
            Ok(())
        })?;
    }
    for (n, controller) in (1..).zip(&mut controllers) {
        controller.replace(&[d])?;
        is_led_to(&scene, n, "d")?;
    }
    all_have_ended(&mut fourth)?;
    all_go_on(&mut third)?;
    // What cannot be understood is reported, and changes nothing.
    scene.wish(2, "Reset")?;
    warns(&agent, &["Service default/s2", ANNOTATION, "\"Reset\" is neither keep nor reset"], true)?;
    let mut fifth = scene.open(2)?;
    controllers[1].replace(&[c])?;
    is_led_to(&scene, 2, "c")?;
    all_go_on(&mut fifth)?;
    scene.wish(2, "reset")?;
    warns(&agent, &[ANNOTATION], false)
}

#[test]
fn what_leaves_while_no_agent_runs_is_reset_by_the_next_one() -> Result<()> {
    let scene = Scene::new()?;
    let mut controller = scene.service(1, &["c"], true)?;
    let mut agent = scene.agent(&[])?;
    let mut open = scene.open(1)?;
    agent.kill()?;
    controller.replace(&[scene.cluster.place("d")])?;
    all_go_on(&mut open)?;
    agent.spawn()?;
    agent.wait_ready()?;
    all_have_ended(&mut open)?;
    none_is_open_at(scene.cluster.place("c"))
}

#[test]
fn who_is_silent_is_told_where_netfilter_goes_on_with_what_a_kube_proxy_has_begun() -> Result<()> {
    let scene = Scene::new()?;
    let mut controller = scene.service(1, &["c"], true)?;
    let (node, c) = (scene.cluster.place("node1"), scene.cluster.place("c"));
    // What netfilter is to translate has to have a route first.
    node.netns.ip("route add 10.96.0.0/16 dev eth0\nroute add fd00:10:96::/112 dev eth0\n")?;
    let doors =
        at(vips(1), 80).map(Door::Address).into_iter().flat_map(|door| [door, Door::NodePort(NODE_PORT)]);
    let doors: Vec<_> = doors.zip(at(c.addresses(), 8080).into_iter().flat_map(|to| [to, to])).collect();
    reference::load_as("kube-proxy", &node.netns, &doors)?;
    let mut open = Vec::new();
    // Those of the node's own processes stay with netfilter in any case.
    for (place, to, how) in scene.ways(true) {
        open.push((connected(place, to)?, place, to, how));
    }
    let agent = scene.agent(&[])?;
    eventually(SOON, || {
        let log = agent.log_text();
        ensure!(log.contains("stay with netfilter until they end"), "{log}");
        Ok(())
    })?;
    cut_off(c)?;
    controller.replace(&[scene.cluster.place("d")])?;
    for (socket, place, to, how) in &mut open {
        ends(socket, &[how]).with_context(|| format!("{} → {to}: {}", place.name, agent.log_text()))?;
    }
    eventually(SOON, || {
        let (log, open) = (agent.log_text(), open.len());
        let reset = reset(&log);
        ensure!(reset == open, "{reset} of {open} connections have been reset: {log}");
        Ok(())
    })
}

/// How many connections have been reset, as the log has it. The slices of both families may come apart, and then the endpoints
/// of one are lost before those of the other.
fn reset(log: &str) -> usize {
    let lines = log.lines().filter_map(|line| line.split_once("left without terminating: "));
    lines.filter_map(|(_, rest)| rest.split_once(" connections reset")?.0.parse::<usize>().ok()).sum()
}

#[test]
fn an_endpoint_that_is_lost_while_tables_grow_costs_only_its_own_connections() -> Result<()> {
    let scene = Scene::new()?;
    let mut first = scene.service(1, &["c"], true)?;
    let _plain = scene.service(2, &["d"], false)?;
    let _early = scene.service(3, &["d"], false)?;
    let mut last = scene.service(4, &["b"], true)?;
    let memory = format!("--map-memory={}", least()? + 4);
    let agent = Agent::start(&scene.cluster, "node1", &scene.dir, &[FLAGS[0], "--socket-lb=off", &memory])?;
    let open = |n: u8| -> Result<Vec<Remote>> {
        let ways = ["a", "outside"].into_iter().flat_map(|client| at(vips(n), 80).map(|to| (client, to)));
        ways.map(|(client, to)| connected(scene.cluster.place(client), to)).collect()
    };
    // The first records are free again: in the next tables each flow has another one.
    drop(open(3)?);
    let (mut lost, mut others) = (open(1)?, [open(2)?, open(2)?]);
    let (status, said) = agent.ask(&["conntrack", "flush", "--service", "default/s3"])?;
    ensure!(status.success(), "{said}");
    for n in 10..70 {
        let plan = ServicePlan::new(&format!("s{n}"), &vips(n)).port("tcp", "TCP", 80, 8080);
        scene.dir.publish(&Object::from(&plan.port("udp", "UDP", 80, 8080).build()))?;
    }
    let logs = |words: &str| {
        eventually(crate::life::SOON, || {
            let log = agent.log_text();
            ensure!(log.contains(words), "not {words:?}: {log}");
            Ok(())
        })
    };
    logs("table SERVICES has")?;
    first.replace(&[scene.cluster.place("d")])?;
    logs("over to new tables")?;
    last.replace(&[scene.cluster.place("d")])?;
    all_have_ended(&mut lost)?;
    // Its last round.
    logs("of Service default/s4 left without terminating")?;
    others.iter_mut().try_for_each(|open| all_go_on(open))
}

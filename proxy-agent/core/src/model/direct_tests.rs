//! Direct server return: who asks for it, which endpoints have a node, and what changes when a node does.

use std::collections::BTreeMap;

use proxy_common::abi::{backend, frontend};
use proxy_common::addr::{Addr, Port as Number, Proto};

use super::tests::{endpoint, ip, name, octets, only, service, settings, slice};
use super::*;

const NODE_PORT: u16 = 30_080;

/// A Service that is asked for in every way there is.
fn everywhere() -> Service {
    let mut web = service("10.96.0.1");
    web.ports[0].node_port = NODE_PORT;
    web.external_ips = vec![ip("192.0.2.7")];
    web.load_balancer_ips = vec![ip("203.0.113.7")];
    web
}

fn direct() -> Service {
    Service { mode: Some(LoadBalancerMode::Dsr), ..everywhere() }
}

/// Endpoints on nodes: `1@n1 2@n2`.
fn on_nodes(service: &str, endpoints: &str) -> Slice {
    let ends = endpoints.split_whitespace().map(|text| {
        let (last, node) = text.split_once('@').unwrap();
        Endpoint { node: Some(node.into()), ..endpoint(&format!("{last} R"), "n1") }
    });
    Slice { endpoints: ends.collect(), ..slice(service, "") }
}

/// A world of node n1 with a Service `web` and its endpoints.
fn world_of(settings: Settings, web: Service, endpoints: &str) -> World {
    let mut world = World::new(settings);
    world.apply(Change::Service(name("web"), Some(web)));
    world.apply(Change::Slice(name("web-1"), Some(on_nodes("web", endpoints))));
    world
}

/// The frontends with the flag, by address.
fn flagged(desired: &DesiredService) -> Vec<String> {
    let flagged = desired.frontends.iter().filter(|f| f.flags & frontend::DSR != 0);
    flagged.map(|f| f.key.addr.to_string()).collect()
}

/// The node of each endpoint that has one.
fn nodes(desired: &DesiredService) -> BTreeMap<String, u32> {
    let with = desired.backends.iter().filter(|(_, backend)| backend.node != 0);
    with.map(|(key, backend)| (octets(&[*key]), backend.node)).collect()
}

fn numbered<const N: usize>(nodes: [(&str, &str); N]) -> BTreeMap<String, u32> {
    nodes.into_iter().map(|(end, node)| (end.to_owned(), node_number(node))).collect()
}

/// What is different of the one Service port that has changed.
fn changed(world: &mut World) -> DesiredService {
    let dirty = world.take_dirty();
    assert_eq!(dirty.len(), 1, "{dirty:?}");
    dirty.into_iter().find_map(|(_, desired)| desired).expect("it is still there")
}

fn in_use(world: &World) -> Vec<(String, u32)> {
    let mut nodes: Vec<_> = world.dsr_nodes().map(|(name, number)| (name.to_string(), number)).collect();
    nodes.sort();
    nodes
}

#[test]
fn external_frontends_under_policy_cluster_are_direct_and_nothing_else_changes() {
    let ends = "1@n1 2@n2 3@n3";
    let plain = only(&world_of(settings(), everywhere(), ends));
    let direct = only(&world_of(settings(), direct(), ends));
    assert_eq!(flagged(&plain), Vec::<String>::new());
    assert_eq!(flagged(&direct), ["0.0.0.0", "192.0.2.7", "203.0.113.7"]);
    assert_eq!((nodes(&plain), plain.local.len()), (BTreeMap::new(), 0));
    assert_eq!(nodes(&direct), numbered([("2", "n2"), ("3", "n3")]));
    assert_eq!((octets(&direct.cluster), octets(&direct.local)), ("1 2 3".into(), "1".into()));
    let flags = |last: u8| {
        let at = (Addr::from(ip(&format!("10.244.0.{last}"))), Number::new(8080));
        direct.backends[&at].flags
    };
    assert_eq!(flags(1), backend::LOCAL | backend::IN_CLUSTER | backend::IN_LOCAL);
    assert_eq!(flags(2), backend::IN_CLUSTER);

    let mut rest = direct;
    rest.frontends.iter_mut().for_each(|f| f.flags &= !frontend::DSR);
    rest.backends.values_mut().for_each(|b| (b.flags, b.node) = (b.flags & !backend::IN_LOCAL, 0));
    rest.local.clear();
    assert_eq!(rest, plain);
}

#[test]
fn policy_local_sctp_and_a_service_of_the_cluster_alone_are_not_direct() {
    let ends = "1@n1 2@n2";
    let local = Service { external_local: true, ..direct() };
    let mut sctp = direct();
    sctp.ports[0].proto = Proto::SCTP;
    let inside = Service { mode: Some(LoadBalancerMode::Dsr), ..service("10.96.0.1") };
    for (web, local) in [(local, "1"), (sctp, ""), (inside, "")] {
        let mut ends = on_nodes("web", ends);
        ends.ports[0].proto = web.ports[0].proto;
        let mut world = world_of(settings(), web, "");
        world.apply(Change::Slice(name("web-1"), Some(ends)));
        let desired = only(&world);
        assert_eq!((flagged(&desired), nodes(&desired)), (Vec::new(), BTreeMap::new()), "{desired:?}");
        assert_eq!(octets(&desired.local), local, "{desired:?}");
        assert_eq!(in_use(&world), []);
    }
    // Whatever the policy inside the cluster is.
    let web = Service { internal_local: true, ..direct() };
    let desired = only(&world_of(settings(), web, ends));
    assert_eq!((flagged(&desired).len(), octets(&desired.local)), (3, "1".into()));
}

#[test]
fn what_came_for_an_endpoint_that_is_about_to_leave_is_served_here_as_there() {
    // P-6: the node that it is sent to falls back as the one that chose it.
    let mut world = world_of(settings(), direct(), "");
    world.apply(Change::Slice(name("web-1"), Some(slice("web", "1 L ST; 2 ST; 3 L T"))));
    assert_eq!((octets(&only(&world).cluster), octets(&only(&world).local)), ("1 2".into(), "1".into()));
}

#[test]
fn what_a_service_says_counts_more_than_the_flag_and_may_change() {
    let by_flag = |mode| Settings { loadbalancer_mode: mode, ..settings() };
    let says = |mode| Service { mode, ..everywhere() };
    for (flag, said, direct) in [
        (LoadBalancerMode::Snat, None, false),
        (LoadBalancerMode::Dsr, None, true),
        (LoadBalancerMode::Snat, Some(LoadBalancerMode::Dsr), true),
        (LoadBalancerMode::Dsr, Some(LoadBalancerMode::Snat), false),
    ] {
        let mut world = world_of(by_flag(flag), says(said), "1@n1 2@n2");
        assert_eq!(!flagged(&only(&world)).is_empty(), direct, "{flag:?} {said:?}");
        assert_eq!(in_use(&world).len(), usize::from(direct), "{flag:?} {said:?}");
        world.take_dirty();
        // What was said is what holds in any case.
        let same = if direct { LoadBalancerMode::Dsr } else { LoadBalancerMode::Snat };
        assert_eq!(world.apply(Change::Service(name("web"), Some(says(Some(same))))), None);

        let other = if direct { LoadBalancerMode::Snat } else { LoadBalancerMode::Dsr };
        let urgency = world.apply(Change::Service(name("web"), Some(says(Some(other)))));
        assert_eq!(urgency, Some(Urgency::AtOnce));
        let desired = changed(&mut world);
        assert_eq!(flagged(&desired).is_empty(), direct, "{flag:?} {said:?}");
        assert_eq!(nodes(&desired).is_empty(), direct, "{flag:?} {said:?}");
        assert_eq!(in_use(&world).is_empty(), direct, "{flag:?} {said:?}");
    }
}

#[test]
fn an_endpoint_that_moves_takes_its_node_with_it() {
    let mut world = world_of(settings(), direct(), "1@n2 2@n2");
    world.take_dirty();
    let mut moved = |ends: &str| {
        world.apply(Change::Slice(name("web-1"), Some(on_nodes("web", ends))));
        let desired = changed(&mut world);
        (nodes(&desired), in_use(&world))
    };
    let one = |node: &str| (node.to_owned(), node_number(node));
    assert_eq!(moved("1@n2 2@n3"), (numbered([("1", "n2"), ("2", "n3")]), vec![one("n2"), one("n3")]));
    assert_eq!(moved("1@n1 2@n3"), (numbered([("2", "n3")]), vec![one("n3")]));
    // The node is not known.
    let mut nowhere = on_nodes("web", "1@n1 2@n3");
    nowhere.endpoints[1].node = None;
    world.apply(Change::Slice(name("web-1"), Some(nowhere)));
    assert_eq!((nodes(&only(&world)), in_use(&world)), (BTreeMap::new(), vec![]));
}

#[test]
fn nodes_are_in_use_as_long_as_a_slice_of_a_direct_service_names_them() {
    let mut world = world_of(settings(), direct(), "1@n1 2@n2");
    let used = |world: &World| in_use(world).into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(" ");
    assert_eq!(used(&world), "n2");
    let slice = |n: u8, ends: &str| Change::Slice(name(&format!("web-{n}")), Some(on_nodes("web", ends)));
    world.apply(slice(2, "3@n2 4@n3"));
    world.apply(Change::Slice(name("web-1"), None));
    assert_eq!(used(&world), "n2 n3");
    // E-7: it goes to a Service that is not direct, and comes back.
    world.apply(Change::Service(name("other"), Some(service("10.96.0.2"))));
    world.apply(Change::Slice(name("web-2"), Some(on_nodes("other", "3@n2 4@n3"))));
    assert_eq!(used(&world), "");
    world.apply(slice(2, "3@n2 4@n3"));
    assert_eq!(used(&world), "n2 n3");
    // Its only way in from outside goes, and comes back.
    world.apply(Change::Service(name("web"), Some(Service { mode: direct().mode, ..service("10.96.0.1") })));
    assert_eq!(used(&world), "");
    world.apply(Change::Service(name("web"), Some(direct())));
    assert_eq!(used(&world), "n2 n3");
    world.apply(Change::Service(name("web"), None));
    assert_eq!(used(&world), "");
    // Slices that are there before their Service.
    world.apply(Change::Service(name("web"), Some(direct())));
    assert_eq!(used(&world), "n2 n3");
}

#[test]
fn of_two_nodes_with_one_number_only_the_first_is_sent_anything() {
    // Two words with the same hash.
    let (first, second) = ("costarring", "liquid");
    let ends = |ends: &[(&str, &str)]| {
        numbered([]).into_iter().chain(ends.iter().map(|(e, n)| ((*e).to_owned(), node_number(n)))).collect()
    };
    let mut world = world_of(settings(), direct(), &format!("1@{second}"));
    let two = Service {
        cluster_ips: vec![ip("10.96.0.2")],
        external_ips: vec![ip("192.0.2.8")],
        load_balancer_ips: vec![],
        ..direct()
    };
    let two = Service { ports: vec![Port { node_port: 0, ..two.ports[0].clone() }], ..two };
    world.apply(Change::Service(name("two"), Some(two)));
    let of = |world: &World, service: &str| -> BTreeMap<String, u32> {
        let all = world.desired().services.into_iter();
        all.filter(|(port, _)| port.service == name(service))
            .flat_map(|(_, desired)| nodes(&desired))
            .collect()
    };
    world.take_dirty();
    assert_eq!(of(&world, "web"), ends(&[("1", second)]));
    assert_eq!(world.warnings(), []);

    // The first of both comes with another Service, whose change is all that is reported.
    world.apply(Change::Slice(name("two-1"), Some(on_nodes("two", &format!("9@{first}")))));
    let mut dirty: Vec<String> =
        world.take_dirty().into_iter().map(|(port, _)| port.service.to_string()).collect();
    dirty.sort();
    assert_eq!(dirty, ["default/two", "default/web"]);
    assert_eq!((of(&world, "two"), of(&world, "web")), (ends(&[("9", first)]), ends(&[])));
    assert_eq!(in_use(&world), [(first.to_owned(), node_number(first))]);
    let [warning] = world.warnings().try_into().unwrap();
    assert_eq!(warning.object, format!("Node {second}"));
    assert!(warning.line.starts_with(&format!("has the same number as Node {first}: ")), "{}", warning.line);

    // It goes again.
    world.apply(Change::Slice(name("two-1"), None));
    assert!(world.take_dirty().iter().any(|(port, _)| port.service == name("web")));
    assert_eq!(of(&world, "web"), ends(&[("1", second)]));
    assert_eq!(in_use(&world), [(second.to_owned(), node_number(second))]);
    assert_eq!(world.warnings(), []);
}

#[test]
fn a_frontend_that_another_service_has_gives_no_endpoint_a_node() {
    let mut world = world_of(settings(), service("10.96.0.1"), "1@n1");
    let older = Service { created: -1, external_ips: vec![ip("192.0.2.7")], ..service("10.96.0.9") };
    world.apply(Change::Service(name("older"), Some(older)));
    let web = Service { external_ips: vec![ip("192.0.2.7")], mode: direct().mode, ..service("10.96.0.1") };
    world.apply(Change::Service(name("web"), Some(web)));
    world.apply(Change::Slice(name("web-1"), Some(on_nodes("web", "1@n1 2@n2"))));
    let desired =
        world.desired().services.into_iter().find(|(port, _)| port.service == name("web")).unwrap().1;
    assert_eq!((flagged(&desired), nodes(&desired)), (Vec::new(), BTreeMap::new()));
}

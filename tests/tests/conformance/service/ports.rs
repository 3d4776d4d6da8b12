//! Several ports, protocols, and numbers at the pods.

use std::net::SocketAddr;

use anyhow::Result;
use proxy_tests::manifests::ServicePlan;
use proxy_tests::pod::Place;
use proxy_tests::probe::{Ask, Server};
use proxy_tests::test_cluster::PodNetwork;

use crate::cluster::{Cluster, READY, at, service, vips, web};
use crate::reach::{connections, dial, never, silent, soon, unbroken};

/// TCP leads to exactly these servers in both families.
fn tcp(client: &Place, targets: [SocketAddr; 2], servers: &[&str]) -> Result<()> {
    targets.into_iter().try_for_each(|to| soon(|| dial(client, &Ask::tcp(to), servers)))
}

/// UDP leads to exactly these servers in both families.
fn udp(client: &Place, targets: [SocketAddr; 2], servers: &[&str]) -> Result<()> {
    targets.into_iter().try_for_each(|to| soon(|| dial(client, &Ask::udp(to), servers)))
}

/// Nobody answers, soon and from then on.
fn gone(client: &Place, asks: [Ask; 2]) -> Result<()> {
    asks.iter().try_for_each(|ask| soon(|| silent(client, ask)).and_then(|()| never(client, ask)))
}

#[test]
fn should_serve_multiport_endpoints_from_pods() -> Result<()> {
    // service.go:803; S-13, S-14, S-15
    let cluster = Cluster::raise(PodNetwork::Routed)?;
    let client = cluster.place("a");
    let _servers = [Server::start(cluster.place("c"), &[100])?, Server::start(cluster.place("d"), &[101])?];
    let plan = ServicePlan::new("multi-endpoint-test", &vips(1));
    cluster.apply(plan.port("portname1", "TCP", 80, 100).port("portname2", "TCP", 81, 101));
    let (first, second) = (service(1), at(vips(1), 81));
    // Each pod has one of the ports only: its name stands in that pod's slice.
    let put = |pod: &str, there: bool| {
        let (port, number) = if pod == "c" { ("portname1", 100) } else { ("portname2", 101) };
        let pods: &[_] = if there { &[(pod, READY)] } else { &[] };
        cluster.slices("multi-endpoint-test", pod, &[(port, "TCP", number)], pods);
    };
    put("c", true);
    tcp(client, first, &["c"])?;
    gone(client, second.map(Ask::tcp))?;
    put("d", true);
    tcp(client, first, &["c"])?;
    tcp(client, second, &["d"])?;
    put("c", false);
    gone(client, first.map(Ask::tcp))?;
    tcp(client, second, &["d"])?;
    put("d", false);
    gone(client, second.map(Ask::tcp))
}

#[test]
fn should_be_updated_after_adding_or_deleting_ports() -> Result<()> {
    // service.go:906; S-23, E-14
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    let client = cluster.place("a");
    let _servers = [Server::start(cluster.place("c"), &[100])?, Server::start(cluster.place("e"), &[101])?];
    let one = ServicePlan::new("edit-port-test", &vips(1)).port("portname1", "TCP", 80, 100);
    cluster.apply(&one);
    cluster.slices("edit-port-test", "one", &[("portname1", "TCP", 100)], &[("c", READY)]);
    tcp(client, service(1), &["c"])?;
    let mut loads = Vec::new();
    for to in service(1) {
        loads.push(connections(client, to)?);
    }
    cluster.apply(one.clone().port("portname2", "TCP", 81, 101));
    cluster.slices("edit-port-test", "two", &[("portname2", "TCP", 101)], &[("e", READY)]);
    tcp(client, at(vips(1), 81), &["e"])?;
    tcp(client, service(1), &["c"])?;
    cluster.apply(&one);
    gone(client, at(vips(1), 81).map(Ask::tcp))?;
    tcp(client, service(1), &["c"])?;
    loads.into_iter().try_for_each(unbroken)
}

/// A Service of one port number over TCP and UDP; then TCP only; then UDP only.
fn same_port(cluster: &Cluster, name: &str, change: impl Fn(ServicePlan) -> ServicePlan) -> Result<()> {
    let _servers = cluster.serve(&["c"])?;
    let client = cluster.place("a");
    let plan = || change(ServicePlan::new(name, &vips(1)));
    cluster.apply(change(web(name, 1)));
    cluster.slices(name, "all", &[("tcp", "TCP", 8080), ("udp", "UDP", 8080)], &[("c", READY)]);
    tcp(client, service(1), &["c"])?;
    udp(client, service(1), &["c"])?;
    cluster.apply(plan().port("tcp", "TCP", 80, 8080));
    gone(client, service(1).map(Ask::udp))?;
    tcp(client, service(1), &["c"])?;
    cluster.apply(plan().port("udp", "UDP", 80, 8080));
    gone(client, service(1).map(Ask::tcp))?;
    udp(client, service(1), &["c"])
}

#[test]
fn should_serve_endpoints_on_same_port_and_different_protocols() -> Result<()> {
    // service.go:3579; S-13, S-23
    same_port(&Cluster::raise(PodNetwork::Bridged)?, "multiprotocol-test", |plan| plan)
}

#[test]
fn should_serve_endpoints_on_same_port_and_different_protocol_for_internal_traffic_on_type_load_balancer()
-> Result<()> {
    // service.go:3701; S-7, S-13
    // Nobody has given it an address yet.
    let balanced = |plan: ServicePlan| plan.load_balancer(&[]);
    same_port(&Cluster::raise(PodNetwork::Routed)?, "multiprotocol-lb-test", balanced)
}

#[test]
fn should_connect_to_the_ports_exposed_by_restartable_init_containers() -> Result<()> {
    // service.go:4044; E-10
    let cluster = Cluster::raise(PodNetwork::Bridged)?;
    // The pod's own container, and its sidecar, to which the Service leads.
    let _own = Server::named(cluster.place("c"), "container", &[8080])?;
    let _sidecar = Server::named(cluster.place("c"), "sidecar", &[9090])?;
    cluster.expose(&ServicePlan::new("sidecar", &vips(1)).port("", "TCP", 80, 9090), &["c"])?;
    tcp(cluster.place("a"), service(1), &["sidecar"])
}

#[test]
fn should_connect_to_the_named_ports_exposed_by_restartable_init_containers() -> Result<()> {
    // service.go:4080; E-10
    let cluster = Cluster::raise(PodNetwork::Overlay)?;
    let _own = Server::named(cluster.place("c"), "container", &[8080])?;
    let _sidecar = Server::named(cluster.place("c"), "sidecar", &[9090])?;
    let plan = ServicePlan::new("sidecar-with-named-port", &vips(1)).port("http", "TCP", 80, 9090);
    cluster.apply(named_target(&plan, "http-sidecar"));
    cluster.slices("sidecar-with-named-port", "all", &[("http", "TCP", 9090)], &[("c", READY)]);
    tcp(cluster.place("a"), service(1), &["sidecar"])
}

#[test]
fn should_support_named_target_ports_that_resolve_to_different_ports_on_different_endpoints() -> Result<()> {
    // service.go:4116; E-14
    let cluster = Cluster::raise(PodNetwork::Routed)?;
    let [client, c, e] = cluster.places(["a", "c", "e"]);
    let plan = ServicePlan::new("named", &vips(1)).port("http", "TCP", 80, 0).node_port(30_080);
    cluster.apply(named_target(&plan, "foo"));
    // The pods are made again with the numbers exchanged.
    for (first, second) in [(8080, 8081), (8081, 8080)] {
        let _servers = [Server::start(c, &[first])?, Server::start(e, &[second])?];
        cluster.slices("named", "c", &[("http", "TCP", first)], &[("c", READY)]);
        cluster.slices("named", "e", &[("http", "TCP", second)], &[("e", READY)]);
        for targets in [service(1), cluster.place("node1").at(30_080), cluster.place("node2").at(30_080)] {
            tcp(client, targets, &["c", "e"])?;
        }
        for pod in ["c", "e"] {
            cluster.slices("named", pod, &[("http", "TCP", 0)], &[]);
        }
    }
    Ok(())
}

/// The target port by its name.
fn named_target(plan: &ServicePlan, name: &str) -> k8s_openapi::api::core::v1::Service {
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
    let mut service = plan.build();
    for port in service.spec.iter_mut().flat_map(|spec| spec.ports.iter_mut().flatten()) {
        port.target_port = Some(IntOrString::String(name.into()));
    }
    service
}

//! Objects that are wrong in part or whole: each is reported by its name and costs only what is wrong with it
//! (X-1…X-17).

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use proxy_tests::agent::Agent;
use proxy_tests::apiserver::ApiServer;
use proxy_tests::manifests::{EndpointController, Family, Phase, ServicePlan, SlicePlan};
use proxy_tests::object::{Object, Publish};
use proxy_tests::test_cluster::TestCluster;
use serde_json::json;

use crate::common::{ip, manifests, vips};

use crate::life::{FLAGS, answers, nobody_answers, one_node, servers, service, warns};

fn cluster() -> Result<TestCluster> {
    one_node(&["a", "b"])
}

/// What is wrong with a Service, and what is said of it.
struct Bad {
    name: &'static str,
    spoil: fn(&mut ServiceSpec),
    said: &'static str,
    /// Whether its IPv4 and its IPv6 address work all the same.
    works: [bool; 2],
}

fn ports(spec: &mut ServiceSpec) -> &mut Vec<k8s_openapi::api::core::v1::ServicePort> {
    spec.ports.get_or_insert_default()
}

fn cluster_ip(spec: &mut ServiceSpec, ip: &str) {
    spec.cluster_ip = Some(ip.into());
    spec.cluster_ips.get_or_insert_default()[0] = ip.into();
}

const BAD: [Bad; 8] = [
    Bad {
        name: "x4-external-ip",
        spoil: |spec| spec.external_ips = Some(vec![" 198.51.100.1".into(), "nonsense".into()]),
        said: "spec.externalIPs[1] \"nonsense\"",
        works: [true, true],
    },
    Bad {
        name: "x6-no-address",
        spoil: |spec| cluster_ip(spec, "10.96.0.256"),
        said: "spec.clusterIPs[0] \"10.96.0.256\"",
        works: [false, true],
    },
    Bad {
        name: "x6-other-family",
        spoil: |spec| cluster_ip(spec, "fd00:10:96::ff"),
        said: "spec.clusterIPs[0] \"fd00:10:96::ff\" is not of family IPv4",
        works: [false, true],
    },
    Bad {
        name: "x8-source-range",
        spoil: |spec| spec.load_balancer_source_ranges = Some(vec!["10.0.0.0/99".into()]),
        said: "spec.loadBalancerSourceRanges[0]",
        works: [true, true],
    },
    Bad {
        name: "x9-zone",
        spoil: |spec| spec.external_ips = Some(vec!["fe80::1%eth0".into()]),
        said: "spec.externalIPs[0] \"fe80::1%eth0\"",
        works: [true, true],
    },
    Bad {
        name: "x10-affinity",
        spoil: |spec| spec.session_affinity = Some("Cookie".into()),
        said: "spec.sessionAffinity \"Cookie\"",
        works: [true, true],
    },
    Bad {
        name: "x11-protocol",
        spoil: |spec| {
            let mut port = ports(spec)[0].clone();
            (port.name, port.protocol, port.port) = (Some("odd".into()), Some("ICMP".into()), 81);
            ports(spec).push(port);
        },
        said: "has protocol \"ICMP\"",
        works: [true, true],
    },
    Bad {
        name: "x12-port",
        spoil: |spec| {
            let mut port = ports(spec)[0].clone();
            (port.name, port.port) = (Some("odd".into()), 70000);
            ports(spec).push(port);
        },
        said: "has port 70000",
        works: [true, true],
    },
];

fn plan(name: &str, n: u8) -> Service {
    ServicePlan::new(name, &vips(n)).port("tcp", "TCP", 80, 8080).build()
}

/// Publishes everything bad, beside something good; checks what is said and what works; corrects it all.
fn play(to: &dyn Publish, cluster: &TestCluster, agent: &Agent) -> Result<()> {
    let pod = cluster.place("a");
    let endpoints = |name: &str| -> Result<EndpointController<'_>> {
        let mut controller = EndpointController::new(to, name, &[("tcp", "TCP", 8080)])?;
        controller.set(cluster.place("b"), Phase::Ready)?;
        Ok(controller)
    };
    for (n, bad) in (10..).zip(&BAD) {
        let mut service = plan(bad.name, n);
        (bad.spoil)(service.spec.get_or_insert_default());
        endpoints(bad.name)?;
        to.publish(&Object::from(&service))?;
    }
    // of the endpoints of this slice only one is an address.
    let slice = SlicePlan::new("x7", "more", Family::V4).port("tcp", "TCP", 8080);
    let mut slice = slice.endpoint("b", cluster.place("b").v4.into(), Some("node1"), Phase::Ready).build();
    let mut spoilt = slice.endpoints.get_or_insert_default()[0].clone();
    for address in ["10.244.1.300", "fd00:244:1::11"] {
        spoilt.addresses = vec![address.into()];
        slice.endpoints.get_or_insert_default().push(spoilt.clone());
    }
    to.publish(&Object::from(&slice))?;
    to.publish(&Object::from(&plan("x7", 30)))?;
    // it cannot even be decoded.
    let mut undecodable = Object::from(&plan("x16", 31));
    undecodable.json["spec"]["ports"] = json!("many");
    to.publish(&undecodable)?;
    // odd, but no fault.
    let mut lenient = plan("x1", 32);
    cluster_ip(lenient.spec.get_or_insert_default(), "10.096.000.032");
    endpoints("x1")?;
    to.publish(&Object::from(&lenient))?;
    // two claim one address and port.
    for (name, n) in [("x17-first", 33), ("x17-second", 34)] {
        endpoints(name)?;
        let shared = ServicePlan::new(name, &vips(n)).port("tcp", "TCP", 80, 8080);
        to.publish(&Object::from(&shared.external_ips(&[ip("198.51.100.9")]).build()))?;
    }
    endpoints("good")?;
    to.publish(&Object::from(&plan("good", 1)))?;

    for vip in service(1) {
        answers(pod, vip, "b")?;
    }
    for (n, bad) in (10..).zip(&BAD) {
        warns(agent, &[&format!("Service default/{}", bad.name), bad.said], true)?;
        for (vip, works) in service(n).into_iter().zip(bad.works) {
            let seen = if works { answers(pod, vip, "b") } else { nobody_answers(pod, vip) };
            seen.with_context(|| format!("{} at {vip}", bad.name))?;
        }
    }
    warns(agent, &["EndpointSlice default/x7-more", "10.244.1.300"], true)?;
    warns(agent, &["EndpointSlice default/x7-more", "fd00:244:1::11"], true)?;
    answers(pod, service(30)[0], "b")?;
    warns(agent, &["x16", "cannot be read"], true)?;
    for vip in service(32) {
        answers(pod, vip, "b")?;
    }
    warns(agent, &["x17-", "198.51.100.9"], true)?;
    for n in [33, 34] {
        answers(pod, service(n)[0], "b")?;
    }
    answers(pod, SocketAddr::new(ip("198.51.100.9"), 80), "b")?;
    let (status, page) = agent.ask(&["status"])?;
    ensure!(status.success(), "other people's mistakes are no illness:\n{page}");

    for (n, bad) in (10..).zip(&BAD) {
        to.publish(&Object::from(&plan(bad.name, n)))?;
        warns(agent, &[bad.name], false)?;
        answers(pod, service(n)[0], "b").with_context(|| format!("{} is corrected", bad.name))?;
    }
    endpoints("x16")?;
    to.publish(&Object::from(&plan("x16", 31)))?;
    warns(agent, &["x16"], false)?;
    answers(pod, service(31)[0], "b")
}

#[test]
fn bad_objects_in_a_directory_are_named_and_cost_only_themselves() -> Result<()> {
    let (cluster, dir) = (cluster()?, manifests()?);
    let _servers = servers(&cluster, &["b"])?;
    let agent = Agent::start(&cluster, "node1", &dir, &FLAGS)?;
    play(&dir, &cluster, &agent)
}

#[test]
fn bad_objects_from_an_api_server_are_named_and_cost_only_themselves() -> Result<()> {
    let cluster = cluster()?;
    let server = ApiServer::start_in(&cluster.place("node1").netns, "127.0.0.1:6443".parse()?)?;
    let _servers = servers(&cluster, &["b"])?;
    let agent = Agent::start(&cluster, "node1", &server, &FLAGS)?;
    play(&server, &cluster, &agent)
}

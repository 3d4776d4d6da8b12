//! A large cluster: Services with ten endpoints each, as objects, as an agent's flags, and in its tables.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use agent_kernel::datapath::store::pin::BpfRoot;
use anyhow::{Context, Result};
use aya::maps::{HashMap, Map, MapData};
use proxy_common::abi::{Frontend, FrontendKey, maps};
use proxy_common::addr::{Port, Proto};
use proxy_tests::apiserver::{ApiServer, Gone};
use proxy_tests::manifests::{Family, Phase, ServicePlan, SlicePlan};
use proxy_tests::pod::Place;
use serde_json::{Value, json};

/// Endpoints of each Service.
pub(crate) const ENDPOINTS: u32 = 10;
/// Nodes that they are on.
const NODES: u32 = 100;

pub(crate) fn service(n: u32) -> ServicePlan {
    ServicePlan::new(&name(n), &[address(n).into()]).port("http", "TCP", 80, 8080)
}

/// Of another version the last endpoint is another.
pub(crate) fn slice(n: u32, version: u32) -> SlicePlan {
    endpoints(n, version).fold(
        SlicePlan::new(&name(n), "v4", Family::V4).port("http", "TCP", 8080),
        |slice, (number, pod)| {
            slice.endpoint(&format!("pod-{number}"), pod.into(), Some(&node(number)), Phase::Ready)
        },
    )
}

/// A slice with one endpoint.
pub(crate) fn lone_slice(n: u32) -> SlicePlan {
    let slice = SlicePlan::new(&name(n), "v4", Family::V4).port("http", "TCP", 8080);
    let (number, pod) = endpoint(n, 0);
    slice.endpoint(&format!("pod-{number}"), pod.into(), Some(&node(number)), Phase::Ready)
}

/// All in one document, with no more than is needed: a manifest has its limit.
pub(crate) fn manifest(services: u32) -> Result<String> {
    let service = |n| {
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name(n), "namespace": "default"},
            "spec": {
                "type": "ClusterIP", "clusterIP": address(n), "clusterIPs": [address(n)],
                "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
            },
        })
    };
    let slice = |n| {
        let endpoint = |(number, pod): (u32, Ipv4Addr)| json!({"addresses": [pod], "nodeName": node(number)});
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": format!("{}-v4", name(n)), "namespace": "default",
                "labels": {"kubernetes.io/service-name": name(n)},
            },
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
            "endpoints": endpoints(n, 0).map(endpoint).collect::<Vec<_>>(),
        })
    };
    let items: Vec<Value> = (0..services).flat_map(|n| [service(n), slice(n)]).collect();
    Ok(serde_json::to_string(&json!({"apiVersion": "v1", "kind": "List", "items": items}))?)
}

/// Flags of an agent whose tables have room for so many Services.
pub(crate) fn flags(services: u32) -> Vec<String> {
    let room = |of_each: u32| services * 2 * of_each;
    vec![
        "--cluster-cidr=10.128.0.0/9".to_owned(),
        format!("--max-services={}", room(1)),
        format!("--max-frontends={}", room(1)),
        format!("--max-addresses={}", room(1)),
        format!("--max-backends={}", room(ENDPOINTS)),
        format!("--max-slots={}", room(2 * ENDPOINTS)),
    ]
}

/// The Services in the tables of an agent.
pub(crate) type Frontends = HashMap<MapData, FrontendKey, Frontend>;

/// As they are now: a table that has grown is another one.
pub(crate) fn frontends(root: &Path) -> Result<Frontends> {
    let pin = BpfRoot::new(root).settled()?.map(maps::FRONTENDS);
    let map = MapData::from_pin(&pin).with_context(|| format!("opening {}", pin.display()))?;
    Ok(Map::HashMap(map).try_into()?)
}

/// An error unless every Service is in the tables.
pub(crate) fn is_there(root: &Path, services: u32) -> Result<()> {
    let frontends = frontends(root)?;
    (0..services).try_for_each(|n| frontends.get(&key(n), 0).map(drop)).context("not all are in the table")
}

/// An API server in a node that has so many Services.
pub(crate) fn api_server(node: &Place, services: u32) -> Result<ApiServer> {
    let server = ApiServer::start_in(&node.netns, (Ipv4Addr::LOCALHOST, 6443).into())?;
    fill(&server, services);
    Ok(server)
}

/// Gives a server so many Services.
pub(crate) fn fill(server: &ApiServer, services: u32) {
    for n in 0..services {
        server.put(&service(n).build());
        server.put(&slice(n, 0).build());
    }
    // It looks through the changes that it remembers for each watch: those of the loading are of no use.
    server.expire(Gone::Event);
}

/// Numbers and addresses of the endpoints of a Service.
fn endpoints(n: u32, version: u32) -> impl Iterator<Item = (u32, Ipv4Addr)> {
    (0..ENDPOINTS - 1).chain([ENDPOINTS - 1 + version]).map(move |k| endpoint(n, k))
}

fn endpoint(n: u32, k: u32) -> (u32, Ipv4Addr) {
    let number = n * (ENDPOINTS + 1) + k;
    (number, Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 1)) + number))
}

fn node(endpoint: u32) -> String {
    format!("node{}", 2 + endpoint % NODES)
}

pub(crate) fn name(n: u32) -> String {
    format!("service-{n}")
}

pub(crate) fn address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 100, 0, 1)) + n)
}

pub(crate) fn key(n: u32) -> FrontendKey {
    FrontendKey::new(IpAddr::from(address(n)).into(), Port::new(80), Proto::TCP)
}

//! A large cluster: Services with ten endpoints each.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use agent_kernel::datapath::store::pin::BpfRoot;
use anyhow::{Context, Result};
use aya::maps::{HashMap, Map, MapData};
use proxy_common::abi::{Frontend, FrontendKey, maps};
use proxy_common::addr::{Port, Proto};
use proxy_tests::manifests::{Family, Phase, ServicePlan, SlicePlan};
use serde_json::{Value, json};

/// Endpoints of each Service.
pub(super) const ENDPOINTS: u32 = 10;
/// Nodes that they are on.
const NODES: u32 = 100;

pub(super) fn service(n: u32) -> ServicePlan {
    ServicePlan::new(&name(n), &[address(n).into()]).port("http", "TCP", 80, 8080)
}

pub(super) fn slice(n: u32) -> SlicePlan {
    endpoints(n).fold(
        SlicePlan::new(&name(n), "v4", Family::V4).port("http", "TCP", 8080),
        |slice, (number, pod)| {
            slice.endpoint(&format!("pod-{number}"), pod.into(), Some(&node(number)), Phase::Ready)
        },
    )
}

/// All in one document, with no more than is needed: a manifest has its limit.
pub(super) fn manifest(services: u32) -> Result<String> {
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
            "endpoints": endpoints(n).map(endpoint).collect::<Vec<_>>(),
        })
    };
    let items: Vec<Value> = (0..services).flat_map(|n| [service(n), slice(n)]).collect();
    Ok(serde_json::to_string(&json!({"apiVersion": "v1", "kind": "List", "items": items}))?)
}

/// Flags of an agent whose tables have room for so many Services.
pub(super) fn flags(services: u32) -> Vec<String> {
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

/// Whether every Service is in the tables.
pub(super) fn is_there(root: &Path, services: u32) -> Result<()> {
    let pin = BpfRoot::new(root).settled()?.map(maps::FRONTENDS);
    let map = MapData::from_pin(&pin).with_context(|| format!("opening {}", pin.display()))?;
    let frontends: HashMap<_, FrontendKey, Frontend> = Map::HashMap(map).try_into()?;
    (0..services).try_for_each(|n| frontends.get(&key(n), 0).map(drop)).context("not all are in the table")
}

/// Numbers and addresses of the endpoints of a Service.
fn endpoints(n: u32) -> impl Iterator<Item = (u32, Ipv4Addr)> {
    let pod = |number| Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 1)) + number);
    (n * ENDPOINTS..(n + 1) * ENDPOINTS).map(move |number| (number, pod(number)))
}

fn node(endpoint: u32) -> String {
    format!("node{}", 2 + endpoint % NODES)
}

fn name(n: u32) -> String {
    format!("service-{n}")
}

fn address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 100, 0, 1)) + n)
}

fn key(n: u32) -> FrontendKey {
    FrontendKey::new(IpAddr::from(address(n)).into(), Port::new(80), Proto::TCP)
}

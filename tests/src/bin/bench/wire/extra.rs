//! Services that are there and that nobody asks.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use proxy_tests::manifests::{Family, Phase, ServicePlan, SlicePlan};
use proxy_tests::object::Object;

/// The address of the `n`th of them.
pub(crate) fn address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 101, 0, 1)) + n)
}

/// The addresses of its endpoints.
pub(crate) fn endpoints(n: u32) -> impl Iterator<Item = Ipv4Addr> {
    (0..3).map(move |k| Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 245, 0, 1)) + n * 3 + k))
}

/// A List of this many Services and their slices, three endpoints each, as JSON.
pub(crate) fn services(count: u32) -> Result<String> {
    let mut items = Vec::new();
    for n in 0..count {
        let name = format!("extra-{n}");
        let service = ServicePlan::new(&name, &[address(n).into()]).port("http", "TCP", 80, 8080).build();
        items.push(Object::from(&service).json);
        let mut slice = SlicePlan::new(&name, "v4", Family::V4).port("http", "TCP", 8080);
        for (k, pod) in endpoints(n).enumerate() {
            slice = slice.endpoint(&format!("{name}-{k}"), IpAddr::from(pod), Some("node2"), Phase::Ready);
        }
        items.push(Object::from(&slice.build()).json);
    }
    let list = serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": items });
    Ok(serde_json::to_string(&list)?)
}

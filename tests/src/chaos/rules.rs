//! The reference: nftables rules of the shape that kube-proxy's nftables mode makes, for one Service.
//!
//! A look-up in a map of Services, or of NodePorts for the node's own addresses, leads to the Service's chain, which
//! chooses an endpoint at random; what comes from outside is marked on the way and masqueraded after routing.

use std::net::IpAddr;

use anyhow::Result;

use super::scene::{NODE_PORT, PORT, TARGET};
use crate::pod::Place;
use crate::reference::{self, HOOKS};

/// Loads them into a node: TCP and UDP, both families, one endpoint.
pub(super) fn load(node: &Place, vips: [IpAddr; 2], pod: &Place) -> Result<()> {
    reference::needs_nft()?;
    let text: String = vips
        .iter()
        .zip(node.addresses().iter().zip(pod.addresses()))
        .map(|(vip, (node, pod))| table(*vip, *node, pod))
        .collect();
    node.netns.nft(&text)
}

/// The rules of one family.
fn table(vip: IpAddr, node: IpAddr, pod: IpAddr) -> String {
    let (family, address_type, pods, target) = match pod {
        IpAddr::V4(pod) => {
            ("ip", "ipv4_addr", crate::test_cluster::TestCluster::CLUSTER_CIDRS[0], format!("{pod}:{TARGET}"))
        }
        IpAddr::V6(pod) => (
            "ip6",
            "ipv6_addr",
            crate::test_cluster::TestCluster::CLUSTER_CIDRS[1],
            format!("[{pod}]:{TARGET}"),
        ),
    };
    let chains: String = ["tcp", "udp"]
        .iter()
        .map(|proto| {
            format!(
                "
    chain endpoint-{proto} {{
        {family} saddr {pod} jump mark-for-masquerade
        meta l4proto {proto} dnat to {target}
    }}
    chain service-{proto} {{
        {family} daddr {vip} {proto} dport {PORT} {family} saddr != {pods} jump mark-for-masquerade
        numgen random mod 1 vmap {{ 0 : goto endpoint-{proto} }}
    }}
    chain external-{proto} {{
        jump mark-for-masquerade
        goto service-{proto}
    }}"
            )
        })
        .collect();
    format!(
        "table {family} services {{
    chain mark-for-masquerade {{ meta mark set meta mark | 0x4000; }}{chains}
    set nodeport-ips {{ type {address_type}; elements = {{ {node} }}; }}
    map service-ips {{
        type {address_type} . inet_proto . inet_service : verdict
        elements = {{ {vip} . tcp . {PORT} : goto service-tcp, {vip} . udp . {PORT} : goto service-udp }}
    }}
    map service-nodeports {{
        type inet_proto . inet_service : verdict
        elements = {{ tcp . {NODE_PORT} : goto external-tcp, udp . {NODE_PORT} : goto external-udp }}
    }}
    map no-endpoint-services {{ type {address_type} . inet_proto . inet_service : verdict; }}
    map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
    chain services {{
        {family} daddr . meta l4proto . th dport vmap @service-ips
        {family} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
    }}
    chain endpoints-check {{
        {family} daddr . meta l4proto . th dport vmap @no-endpoint-services
        {family} daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
    }}{HOOKS}
}}
"
    )
}

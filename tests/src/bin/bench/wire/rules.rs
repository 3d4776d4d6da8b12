//! The rival: rules of the shape that kube-proxy's nftables mode makes.
//!
//! One look-up in a map of Services leads to a chain of the Service, which chooses an endpoint at random; that chain
//! marks what must be masqueraded and rewrites the destination. The Services that nobody asks share a chain: only the
//! map grows with them.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use anyhow::Result;
use proxy_tests::reference::{self, HOOKS};
use proxy_tests::test_cluster::TestCluster;

use super::{NODE_PORT, PORT, VIP};

/// Loads rules for a Service whose one endpoint is the cluster's server pod, and as many more as make up `services`.
pub(crate) fn load(cluster: &TestCluster, services: u32) -> Result<()> {
    reference::needs_nft()?;
    let node = cluster.place("node1");
    node.netns.nft(&text(node.v4, cluster.place("server").v4, services))
}

fn text(node: Ipv4Addr, pod: Ipv4Addr, services: u32) -> String {
    let (vip, port, node_port) = (Ipv4Addr::from(VIP), PORT, NODE_PORT);
    let mut elements = format!("{vip} . tcp . 80 : goto service-web");
    for n in 1..services {
        write!(elements, ",\n{} . tcp . 80 : goto service-other", super::extra::address(n - 1)).ok();
    }
    let pods = "10.244.0.0/16";
    format!(
        "table ip services {{}}
delete table ip services
table ip services {{
    chain mark-for-masquerade {{ meta mark set meta mark | 0x4000; }}
    chain endpoint-web {{
        ip saddr {pod} jump mark-for-masquerade
        meta l4proto tcp dnat to {pod}:{port}
    }}
    chain service-web {{
        ip daddr {vip} tcp dport 80 ip saddr != {pods} jump mark-for-masquerade
        numgen random mod 1 vmap {{ 0 : goto endpoint-web }}
    }}
    chain external-web {{
        jump mark-for-masquerade
        goto service-web
    }}
    chain service-other {{
        ip saddr != {pods} jump mark-for-masquerade
        numgen random mod 3 vmap {{ 0 : goto endpoint-web, 1 : goto endpoint-web, 2 : goto endpoint-web }}
    }}
    map service-ips {{
        type ipv4_addr . inet_proto . inet_service : verdict
        elements = {{ {elements} }}
    }}
    map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
    set nodeport-ips {{ type ipv4_addr; elements = {{ {node} }}; }}
    map service-nodeports {{
        type inet_proto . inet_service : verdict
        elements = {{ tcp . {node_port} : goto external-web }}
    }}
    chain services {{
        ip daddr . meta l4proto . th dport vmap @service-ips
        ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
    }}
    chain endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}{HOOKS}
}}
"
    )
}

//! What netfilter makes of the same Services: rules of the shape of kube-proxy's nftables mode.
//!
//! A scene in which these rules serve a client and the agent does not is a fault of the agent and not of the scene.

use std::fmt::Write as _;
use std::net::SocketAddr;

use anyhow::Result;

use crate::netns::Netns;
use crate::test_cluster::TestCluster;

/// Fails where there is no nft to play the reference with.
pub fn needs_nft() -> Result<()> {
    let found = std::process::Command::new("nft").arg("--version").output();
    anyhow::ensure!(
        found.is_ok_and(|output| output.status.success()),
        "there is no nft here to compare with: install the package nftables, or leave it out with --only agent"
    );
    Ok(())
}

/// What leads to the chains `services` and `endpoints-check` of a table of kube-proxy's shape, and masquerades what they
/// have marked with 0x4000.
pub const HOOKS: &str = "
    chain masquerading {
        meta mark & 0x4000 == 0 return
        meta mark set meta mark ^ 0x4000
        masquerade fully-random
    }
    chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept; jump services; }
    chain nat-output { type nat hook output priority -100; policy accept; jump services; }
    chain nat-postrouting { type nat hook postrouting priority srcnat; policy accept; jump masquerading; }
    chain filter-prerouting {
        type filter hook prerouting priority -110; policy accept;
        ct state new jump endpoints-check
    }
    chain filter-output {
        type filter hook output priority -110; policy accept;
        ct state new jump endpoints-check
    }";

/// Where clients knock: TCP and UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// A cluster, external or load balancer's address with its port.
    Address(SocketAddr),
    /// A port of every address of the node.
    NodePort(u16),
}

/// Has the node translate what comes to these doors to their endpoints. Strangers at an address, everybody at a
/// NodePort, and an endpoint that asks for itself are masqueraded.
pub fn load(node: &Netns, doors: &[(Door, SocketAddr)]) -> Result<()> {
    load_as("services", node, doors)
}

/// The same in a table of this name.
pub fn load_as(name: &str, node: &Netns, doors: &[(Door, SocketAddr)]) -> Result<()> {
    let families =
        [("ip", true, TestCluster::CLUSTER_CIDRS[0]), ("ip6", false, TestCluster::CLUSTER_CIDRS[1])];
    families.into_iter().try_for_each(|(family, v4, pods)| {
        let own = doors.iter().filter(|(_, endpoint)| endpoint.is_ipv4() == v4);
        node.nft(&table(name, family, pods, own))
    })
}

/// The same by chains of the shape of kube-proxy's iptables mode: `kind` is `nft` or `legacy`.
pub fn load_iptables(kind: &str, node: &Netns, doors: &[(Door, SocketAddr)]) -> Result<()> {
    let families = [
        ("iptables", true, TestCluster::CLUSTER_CIDRS[0]),
        ("ip6tables", false, TestCluster::CLUSTER_CIDRS[1]),
    ];
    families.into_iter().try_for_each(|(program, v4, pods)| {
        let own = doors.iter().filter(|(_, endpoint)| endpoint.is_ipv4() == v4);
        let rules = chains(pods, own);
        let script = format!("{program}-{kind}-restore --noflush <<'END'\n{rules}END");
        node.output("sh", &["-e", "-c", &script]).map(drop)
    })
}

fn chains<'a>(pods: &str, doors: impl Iterator<Item = &'a (Door, SocketAddr)>) -> String {
    let mut names = String::new();
    let mut rules = String::new();
    // Writing to a string does not fail.
    for (n, (door, endpoint)) in doors.enumerate() {
        let name = format!("KUBE-SEP-{n:016}");
        writeln!(names, ":{name} - [0:0]").ok();
        writeln!(rules, "-A {name} -s {} -j KUBE-MARK-MASQ", endpoint.ip()).ok();
        for protocol in ["tcp", "udp"] {
            let (chain, knock, stranger) = match door {
                Door::Address(at) => (
                    "KUBE-SERVICES",
                    format!("-d {} -p {protocol} -m {protocol} --dport {}", at.ip(), at.port()),
                    format!("! -s {pods}"),
                ),
                Door::NodePort(port) => {
                    ("KUBE-NODEPORTS", format!("-p {protocol} -m {protocol} --dport {port}"), String::new())
                }
            };
            writeln!(rules, "-A {chain} {knock} {stranger} -j KUBE-MARK-MASQ").ok();
            writeln!(rules, "-A {chain} {knock} -j {name}").ok();
            writeln!(rules, "-A {name} -p {protocol} -m {protocol} -j DNAT --to-destination {endpoint}").ok();
        }
    }
    format!(
        "*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
{names}-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
{rules}-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
"
    )
}

fn table<'a>(
    name: &str,
    family: &str,
    pods: &str,
    doors: impl Iterator<Item = &'a (Door, SocketAddr)>,
) -> String {
    let mut rules = String::new();
    for (door, endpoint) in doors {
        for protocol in ["tcp", "udp"] {
            let (knock, masqueraded) = match door {
                Door::Address(at) => (
                    format!("{family} daddr {} {protocol} dport {}", at.ip(), at.port()),
                    format!("{family} saddr != {pods}"),
                ),
                Door::NodePort(port) => {
                    (format!("fib daddr type local {protocol} dport {port}"), String::new())
                }
            };
            let mark = "meta mark set meta mark | 0x4000";
            // Writing to a string does not fail.
            writeln!(
                rules,
                "{knock} {masqueraded} {mark}\n{knock} {family} saddr {} {mark}\n{knock} dnat to {endpoint}",
                endpoint.ip()
            )
            .ok();
        }
    }
    format!(
        "table {family} {name} {{
            chain services {{
                {rules}
            }}
            chain prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
            chain output {{ type nat hook output priority -100; jump services; }}
            chain postrouting {{
                type nat hook postrouting priority srcnat;
                meta mark & 0x4000 == 0 return
                meta mark set meta mark ^ 0x4000
                masquerade fully-random
            }}
        }}
"
    )
}

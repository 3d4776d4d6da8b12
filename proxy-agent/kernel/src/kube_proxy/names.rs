//! The names that are a kube-proxy's own (Z-3, Z-5). Those of kubelet are not among them.

/// The tables of iptables that it writes to.
pub(super) const TABLES: [&str; 3] = ["filter", "nat", "mangle"];

const FILTER: [&str; 11] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FORWARD",
    "KUBE-NODEPORTS",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    "KUBE-NODE-PORT",
    "KUBE-LOAD-BALANCER",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
];

const NAT: [&str; 7] = [
    "KUBE-SERVICES",
    "KUBE-NODEPORTS",
    POSTROUTING,
    MARK_MASQ,
    "KUBE-PROXY-CANARY",
    "KUBE-NODE-PORT",
    "KUBE-LOAD-BALANCER",
];

/// The chains of single Services and endpoints.
const NAT_PREFIXES: [&str; 5] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-EXT-"];

/// Marks packets to be masqueraded. CNI plug-ins jump to it, too, and then need [`POSTROUTING`] as well.
pub(super) const MARK_MASQ: &str = "KUBE-MARK-MASQ";
/// Masquerades packets with the mark.
pub(super) const POSTROUTING: &str = "KUBE-POSTROUTING";

const SETS: [&str; 17] = [
    "LOOP-BACK",
    "CLUSTER-IP",
    "EXTERNAL-IP",
    "EXTERNAL-IP-LOCAL",
    "LOAD-BALANCER",
    "LOAD-BALANCER-LOCAL",
    "LOAD-BALANCER-FW",
    "LOAD-BALANCER-SOURCE-IP",
    "LOAD-BALANCER-SOURCE-CIDR",
    "NODE-PORT-TCP",
    "NODE-PORT-LOCAL-TCP",
    "NODE-PORT-UDP",
    "NODE-PORT-LOCAL-UDP",
    "NODE-PORT-SCTP-HASH",
    "NODE-PORT-LOCAL-SCTP-HASH",
    "HEALTH-CHECK-NODE-PORT",
    "IPVS-IPS",
];

/// The longest name of a set: longer ones were cut when they were made.
const SET_NAME: usize = 31;

/// Whether a chain of a table is a kube-proxy's.
pub(super) fn is_chain(table: &str, chain: &str) -> bool {
    match table {
        "filter" => FILTER.contains(&chain),
        "nat" => NAT.contains(&chain) || NAT_PREFIXES.iter().any(|prefix| chain.starts_with(prefix)),
        "mangle" => chain == "KUBE-PROXY-CANARY",
        _ => false,
    }
}

/// Whether an IP set is a kube-proxy's, of either family.
pub(super) fn is_set(set: &str) -> bool {
    let of = |prefix: &str| {
        set.strip_prefix(prefix)
            .is_some_and(|rest| SETS.iter().any(|name| cut(name, SET_NAME - prefix.len()) == rest))
    };
    of("KUBE-6-") || of("KUBE-")
}

fn cut(name: &str, length: usize) -> &str {
    name.get(..length).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubelets_chains_are_not_kube_proxys() {
        // Z-3.
        for table in TABLES {
            for chain in
                ["KUBE-FIREWALL", "KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY", "PREROUTING", "DOCKER"]
            {
                assert!(!is_chain(table, chain), "{table} {chain}");
            }
            assert!(is_chain(table, "KUBE-PROXY-CANARY"));
        }
        assert!(is_chain("nat", "KUBE-SEP-ABCDEF") && !is_chain("filter", "KUBE-SEP-ABCDEF"));
        assert!(is_chain("filter", "KUBE-FORWARD") && !is_chain("nat", "KUBE-FORWARD"));
        assert!(!is_chain("raw", "KUBE-PROXY-CANARY"));
    }

    #[test]
    fn sets_of_both_families_are_known_by_their_whole_name() {
        // Z-5.
        for set in ["KUBE-LOOP-BACK", "KUBE-6-LOOP-BACK", "KUBE-IPVS-IPS", "KUBE-6-LOAD-BALANCER-SOURCE-CIDR"]
        {
            assert!(is_set(cut(set, SET_NAME)), "{set}");
        }
        for set in ["KUBE-MINE", "LOOP-BACK", "KUBE-LOOP-BACK-2", "cali40masq"] {
            assert!(!is_set(set), "{set}");
        }
    }
}
